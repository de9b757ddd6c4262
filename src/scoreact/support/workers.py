"""Processes that take tasks one after another, one thread each. Knows nothing of what a task does.

No worker outlives the process that started it: each waits, beside its task, for that process's end.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch

Outcome = dict[str, Any]  # what a task returns, or {"failed": why}


def _attempt(function: Callable[..., Outcome], arguments: Sequence[Any]) -> Outcome:
    try:
        return function(*arguments)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _work(pipe: multiprocessing.connection.Connection) -> None:
    """A worker: one thread, no Ctrl-C of its own (the parent ends it), until the pipe closes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        while True:
            pipe.send(_attempt(*pipe.recv()))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """A killed parent closes no pipe that a worker at its task would look at."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Workers:
    """`jobs` processes with one thread each; with one job, this process. One that dies costs its own task only."""

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs is {jobs}; it must be at least 1.")
        self.jobs = jobs
        self.idle: list[tuple[Any, multiprocessing.connection.Connection]] = []
        self.busy: dict[multiprocessing.connection.Connection, tuple[Any, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ignored: object) -> None:
        for process, pipe in [*self.idle, *((process, pipe) for pipe, (process, _) in self.busy.items())]:
            process.terminate()
            process.join()
            pipe.close()
        self.idle, self.busy = [], {}

    def map(self, function: Callable[..., Outcome], tasks: Sequence[Sequence[Any]]) -> Iterator[tuple[int, Outcome]]:
        """(index, outcome) as they come; an exception is {"failed": its sentence}, a dead process "killed" too."""
        if self.jobs == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                for index, task in enumerate(tasks):
                    yield index, _attempt(function, task)
            finally:
                torch.set_num_threads(threads)
            return
        waiting = list(range(len(tasks)))
        while waiting or self.busy:
            while waiting and len(self.busy) < self.jobs:
                process, pipe = self.idle.pop() if self.idle else self._start()
                index = waiting.pop(0)
                pipe.send((function, tasks[index]))
                self.busy[pipe] = (process, index)
            for ready in multiprocessing.connection.wait(list(self.busy)):
                assert isinstance(ready, multiprocessing.connection.Connection)
                process, index = self.busy.pop(ready)
                try:
                    outcome = ready.recv()
                    self.idle.append((process, ready))
                except (EOFError, OSError):
                    process.join()
                    ready.close()
                    text = f"its process ended with status {process.exitcode}; out of memory, or killed"
                    outcome = {"failed": text, "killed": True}
                yield index, outcome

    @staticmethod
    def _start() -> tuple[Any, multiprocessing.connection.Connection]:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half alive
        ours, theirs = context.Pipe()
        previous = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
        finally:
            if previous is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = previous
        theirs.close()
        return process, ours
