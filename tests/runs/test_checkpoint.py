"""Checkpoints: round trip, atomic under kill and full disk, truncated and foreign files refused in sentences."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreact.runs.checkpoint import load_checkpoint, save_checkpoint
from scoreact.support.files import append_line, read_lines, read_tensors, resume_lines, truncate_lines


def state(number: float) -> dict[str, Any]:
    return {
        "weights": {"a": torch.full((3, 2), number), "b": torch.arange(4)},
        "optimizer": {"state": {0: {"step": torch.tensor(5.0), "avg": torch.ones(2)}}, "groups": [{"lr": 0.1}]},
        "best": None, "text": "x", "count": 3, "flags": [True, False], "nothing": {},
    }  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 7, state(2.5))
    iteration, found = load_checkpoint(tmp_path)
    assert iteration == 7
    assert torch.equal(found["weights"]["a"], torch.full((3, 2), 2.5))
    assert torch.equal(found["weights"]["b"], torch.arange(4))
    assert torch.equal(found["optimizer"]["state"]["0"]["avg"], torch.ones(2))  # JSON's keys are strings
    assert found["optimizer"]["groups"] == [{"lr": 0.1}]
    assert [found[k] for k in ("best", "text", "count", "flags", "nothing")] == [None, "x", 3, [True, False], {}]


def test_shared_memory_is_stored_twice(tmp_path: Path) -> None:
    x = torch.ones(4)
    save_checkpoint(tmp_path, 1, {"a": x, "b": x[:2]})
    assert torch.equal(load_checkpoint(tmp_path)[1]["b"], torch.ones(2))


def test_newest_few_are_kept(tmp_path: Path) -> None:
    for iteration in (5, 10, 100):
        save_checkpoint(tmp_path, iteration, state(iteration))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000100"]
    assert load_checkpoint(tmp_path)[0] == 100


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, state(1.0))
    save_checkpoint(tmp_path, 5, state(2.0))
    assert float(load_checkpoint(tmp_path)[1]["weights"]["a"][0, 0]) == 2


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["cut", "empty", "gone", "garbage"])
def test_a_damaged_newest_falls_back(tmp_path: Path, file: str, how: str) -> None:
    save_checkpoint(tmp_path, 5, state(1.0))
    newest = save_checkpoint(tmp_path, 10, state(2.0)) / file
    content = newest.read_bytes()
    if how == "gone":
        newest.unlink()
    else:
        newest.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xff\x00hello" * 9}[how])
    assert load_checkpoint(tmp_path)[0] == 5


def test_nothing_readable_names_the_newest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint; start the run anew"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "absent")
    newest = save_checkpoint(tmp_path, 10, state(2.0))
    (newest / "tensors.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"00000010 cannot be read: .*not a complete safetensors file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ['{"format": 99, "iteration": 1, "state": {}}', "[]", '{"state": {}}'])
def test_foreign_records_are_refused(tmp_path: Path, content: str) -> None:
    newest = save_checkpoint(tmp_path, 10, state(2.0))
    (newest / "state.json").write_text(content)
    with pytest.raises(ValueError, match="not a scoreact checkpoint of format 1"):
        load_checkpoint(tmp_path)


def test_missing_tensors_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; is this the folder of a run"):
        read_tensors(tmp_path / "model.safetensors")


def forked(work: Callable[[], None]) -> int:
    """A child process that runs `work` (a fork: importing torch anew would take seconds); its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limit here")
def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"a": torch.ones(10)})

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match=r"tensors.safetensors could not be written"):
            save_checkpoint(tmp_path, 2, {"a": torch.ones(1_000_000)})

    assert os.waitpid(forked(work), 0)[1] == 0
    assert load_checkpoint(tmp_path)[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A real one: a tmpfs of 1 MiB, where this user may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        save_checkpoint(disk, 1, {"a": torch.ones(10)})
        with pytest.raises(OSError, match=r"could not be written|No space left"):
            save_checkpoint(disk, 2, {"a": torch.ones(1_000_000)})
        assert sorted(p.name for p in disk.iterdir()) == ["00000001"]
        assert load_checkpoint(disk)[0] == 1
        save_checkpoint(disk, 3, {"a": torch.ones(10)})  # room for a small one again
        assert load_checkpoint(disk)[0] == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    reached = tmp_path / "reached"

    def work() -> None:
        for iteration in range(1, 100_000):
            save_checkpoint(tmp_path / "checkpoints", iteration, {"a": torch.full((200_000,), float(iteration))})
            reached.write_text(str(iteration))

    for number in range(12):
        reached.unlink(missing_ok=True)
        child = forked(work)
        while not reached.is_file():
            time.sleep(0.001)
        time.sleep(0.0007 * number)  # other moments of the next write
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        for folder in (tmp_path / "checkpoints").iterdir():  # whatever can be seen is whole
            if folder.name.isdigit():
                json.loads((folder / "state.json").read_text())
                read_tensors(folder / "tensors.safetensors")
        iteration, found = load_checkpoint(tmp_path / "checkpoints")
        assert torch.equal(found["a"], torch.full((200_000,), float(iteration)))
        assert iteration >= int(reached.read_text() or 0)
        shutil.rmtree(tmp_path / "checkpoints")


def test_lines_survive_a_cut_and_are_truncated_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in range(5):
        append_line(path, {"iteration": iteration, "x": float("nan"), "y": -float("inf"), "z": 0.5})
    with path.open("a") as file:
        file.write('{"iteration": 5, "x": 0.')
    lines = read_lines(path)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0] == {"iteration": 0, "x": None, "y": None, "z": 0.5}
    truncate_lines(path, 2)
    assert [json.loads(text)["iteration"] for text in path.read_text().splitlines()] == [0, 1, 2]
    assert read_lines(tmp_path / "absent") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_nothing_that_is_not_finite_is_written(tmp_path: Path) -> None:
    append_line(tmp_path / "r.jsonl", {"a": math.nan, "b": [1.0, {"c": math.inf}], "d": "x"})
    assert read_lines(tmp_path / "r.jsonl") == [{"a": None, "b": [1.0, {"c": None}], "d": "x"}]


@pytest.mark.parametrize(("left", "kept"), [('{"n": 3', 2), ('{"n": 3}', 3), ("", 2)])
def test_a_file_that_goes_on_has_whole_lines_only(left: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n' + left)
    wanted = [{"n": n + 1} for n in range(kept)]
    assert resume_lines(path) == wanted
    append_line(path, {"n": 9})
    assert [json.loads(text) for text in path.read_text().splitlines()] == [*wanted, {"n": 9}]


def test_a_line_damaged_in_the_middle_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert resume_lines(path) == []
    assert not path.exists()
    path.write_text('{"n": 1}\n{torn\n{"n": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*results\.jsonl is damaged; delete that line"):
        resume_lines(path)
    assert path.read_text() == '{"n": 1}\n{torn\n{"n": 3}\n'
