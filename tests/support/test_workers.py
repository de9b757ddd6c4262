"""Workers: a task that fails or dies costs itself only; a parent that dies takes its workers along."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scoreact.support.workers import Workers

PARENT = """
import os, time
from scoreact.support.workers import Workers

def hold(seconds):
    print("at work", flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    with Workers(2) as workers:
        list(workers.map(hold, [(60,)]))
"""


@pytest.mark.slow
def test_a_process_that_dies_costs_its_own_task_only() -> None:
    tasks = [("{'n': 1}",), ("__import__('os')._exit(9)",), ("1 / 0",), ("{'n': 2, 'pid': __import__('os').getpid()}",)]
    with Workers(2) as workers:
        found = dict(workers.map(eval, tasks))
        started = [process for process, _ in workers.idle]
    assert found[0] == {"n": 1}
    assert found[1] == {"failed": "its process ended with status 9; out of memory, or killed", "killed": True}
    assert found[2] == {"failed": "ZeroDivisionError: division by zero"}
    assert found[3]["n"] == 2
    assert found[3]["pid"] != os.getpid()
    assert not any(process.is_alive() for process in started)


def test_a_killed_parents_workers_end_at_once(tmp_path: Path) -> None:
    """The worker, in the middle of its task, holds the parent's output open: its end is the end of the output."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == b"at work\n"
            parent.send_signal(signal.SIGKILL)
            parent.wait()
            ready, _, _ = select.select([parent.stdout], [], [], 20)
            assert ready
            assert parent.stdout.read() == b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
