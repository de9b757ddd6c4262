"""A run's folder under damage, two processes at once, and a run that saved nothing: a sentence, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scoreact.api.result import Result
from scoreact.api.start import train_problem
from scoreact.cli import main as cli
from scoreact.cli import running
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.base import Problem
from scoreact.recipes.gaussian import linear_reward, mixture
from scoreact.runs.checkpoint import load_checkpoint, save_checkpoint
from scoreact.runs.record import is_whole
from scoreact.support.errors import RunError, RunExists
from scoreact.support.files import read_lines
from scoreact.support.folders import FolderLock, made_folder
from scoreact.training.config import Config, updated

SETTINGS: dict[str, Any] = {
    "algorithm": "ddpo", "iterations": 4, "batch_size": 16, "steps": 3, "reference_batches": 1, "heldout_samples": 16,
    "evaluate_every": 2, "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip


def train(out: Path, reward: Any = None, **more: Any) -> Result:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResidualModel(mixture(2, 3, 0), 2, width=8)
    given: dict[str, Any] = {
        "resume": False, "extend": False, "start": None, "description": {}, "progress": False, "on_event": None, **more,
    }  # fmt: skip
    config = updated(Config(), SETTINGS)
    return train_problem(Problem(model, reward or linear_reward(2, 0)), config, out, report=False, **given)


def undone(whole: Path, to: Path) -> Path:
    """A copy of a finished run, as it was killed after its checkpoint of iteration 2."""
    shutil.copytree(whole, to)
    shutil.rmtree(to / "checkpoints" / "00000004")
    for name in ("model.safetensors", "result.json"):
        (to / name).unlink()
    return to


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def said(folder: Path) -> list[str]:
    return [line["text"] for line in read_lines(folder / "metrics.jsonl") if line.get("guard") == "note"]


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff" + text[1:],
        lambda text: b"[1, 2]",
        lambda text: b"",
        lambda text: b'{"evaluation": true}',
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "iteration"}).encode(),
        lambda text: json.dumps({**json.loads(text), "seconds": "x"}).encode(),
    ],
    ids=["cut", "no UTF-8", "no mapping", "empty", "no metrics", "no iteration", "no seconds"],
)
def test_a_damaged_line_costs_that_line_only(whole: Path, tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    run = undone(whole, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    assert json.loads(lines[2])["iteration"] == 1
    damaged = b"\n".join([*lines[:2], harm(lines[2]), *lines[3:], b""])
    (run / "metrics.jsonl").write_bytes(damaged)
    train(run, resume=True)
    kept = read_lines(run / "metrics.jsonl")
    assert [line["iteration"] for line in kept if "seconds" in line] == [2, 3, 4]
    assert [line["iteration"] for line in kept if line.get("evaluation")] == [0, 2, 4]
    assert said(run) == [
        "Line 3 of metrics.jsonl is damaged and left out; metrics.jsonl.damaged keeps the file as it was."
    ]
    assert (run / "metrics.jsonl.damaged").read_bytes() == damaged
    assert same_weights(run, whole)


def test_every_line_that_a_run_writes_is_whole(whole: Path) -> None:
    stored = Path(__file__).parents[1] / "assets" / "run-0.1.0" / "metrics.jsonl"
    for path in (whole / "metrics.jsonl", stored):
        lines = read_lines(path)
        assert lines
        assert all(is_whole(line) for line in lines)


@pytest.mark.parametrize("change", ["seconds", "guard", None])
def test_a_state_that_is_not_what_was_written_is_not_taken(whole: Path, tmp_path: Path, change: str | None) -> None:
    """Also where it is JSON as before: the run goes on from the checkpoint before it, and says so."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "00000004"
    record = json.loads((newest / "state.json").read_text())
    if change is None:
        shutil.copy(run / "checkpoints" / "00000002" / "tensors.safetensors", newest)
    else:
        record["state"][change] = None
        (newest / "state.json").write_text(json.dumps(record))
    train(run, resume=True)
    [text] = said(run)
    assert text.startswith(f"{newest} cannot be read: {newest}")
    assert "is damaged: " in text
    assert text.endswith("The run goes on from iteration 2.")
    assert same_weights(run, whole)


def test_a_state_that_lacks_something_is_told_in_a_sentence(whole: Path, tmp_path: Path) -> None:
    run = undone(whole, tmp_path / "run")
    _, state = load_checkpoint(run / "checkpoints")
    del state["guard"]
    save_checkpoint(run / "checkpoints", 3, state)
    with pytest.raises(RunError, match=r"iteration 3 in .* is incomplete \(KeyError: 'guard'\).*Start the run anew\."):
        train(run, resume=True)


def test_a_damaged_result_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "write_report", lambda source: 0)  # as good, and dear
    run = tmp_path / "run"
    words = [
        "--iterations",
        "1",
        "--batch-size",
        "16",
        "--heldout-samples",
        "8",
        "--algorithm",
        "ddpo",
        "--device",
        "cpu",
    ]
    assert cli.main(["train", "gaussian", *words, "--out", str(run)]) == 0
    for text in ("{", "[]", ""):
        (run / "result.json").write_text(text)
        assert cli.main(["resume", str(run)]) == 0
        assert "result.json cannot be read" in capsys.readouterr().err
        assert json.loads((run / "result.json").read_text())["iterations"] == 1


# --- a run that saved nothing ------------------------------------------------------------------------------------------


def test_a_reward_that_fails_at_its_first_call_leaves_the_folder_free(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="NaN"):
        train(run, lambda x, condition: x[:, 0] / 0 * 0)
    assert (run / "config.json").is_file()
    with pytest.raises(RunError, match=r"holds no checkpoint; start the run anew"):
        train(run, resume=True)
    (run / "reference.safetensors.tmp").write_bytes(b"a kill in the middle of it")
    (run / ".tmpXb3k9Q").write_bytes(b"a kill in the middle of safetensors' own writing")
    train(run)
    assert same_weights(run, whole)
    assert [line["iteration"] for line in read_lines(run / "metrics.jsonl") if line.get("reference")] == [0]
    assert not list(run.glob(".*")), "what was left is gone"


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "best/model.safetensors", "checkpoints/00000002/x",
                                  ".tmp_notes", ".tmpab12cd/x"])  # fmt: skip
def test_a_folder_with_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="NaN"):
        train(run, lambda x, condition: x[:, 0] / 0 * 0)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("mine")
    with pytest.raises(RunExists, match="is not empty; give a new folder"):
        train(run)
    assert (run / name).read_text() == "mine"


def test_a_config_of_somebody_else_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RunExists):
        train(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


# --- two at once -------------------------------------------------------------------------------------------------------


def test_many_at_once_get_a_folder_each(tmp_path: Path) -> None:
    start, found = threading.Barrier(8), list[Path]()

    def take() -> None:
        start.wait()
        with made_folder(tmp_path / "runs", lambda number: f"x-{number:03d}") as folder:
            (folder / "file").touch()
            found.append(folder)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [tmp_path / "runs" / f"x-{number:03d}" for number in range(1, 9)]


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "gaussian", "--batch-size", "16", "--minibatch-size", "1", "--option", "width=0"]) != 0
    assert list(tmp_path.iterdir()) == []


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def waited(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lock_ends_with_its_holder_however_it_ends(tmp_path: Path) -> None:
    folder, ready = tmp_path / "run", tmp_path / "ready"
    folder.mkdir()

    def hold() -> None:
        lock = FolderLock(folder)
        if os.fork() == 0:  # a child of the holder, such as a data loader's, which outlives it
            ready.touch()
            time.sleep(5)
        time.sleep(60)
        lock.release()

    child = forked(hold)
    waited(ready)
    with pytest.raises(RunExists, match=rf"process {child} of .* is at work in .*run; wait for its end"):
        FolderLock(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / ".lock").exists()
    lock = FolderLock(folder)
    with pytest.raises(RunExists, match="another run of this process"):
        FolderLock(folder)
    lock.release()
    lock.release()
    assert list(folder.iterdir()) == []
    FolderLock(folder).release()


def test_two_runs_of_one_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    run, ready = undone(whole, tmp_path / "run"), tmp_path / "ready"

    def wait(kind: str, line: dict[str, Any]) -> None:
        ready.touch()
        time.sleep(60)

    child = forked(lambda: [train(run, resume=True, on_event=wait)])  # type: ignore[list-item]
    waited(ready)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunExists, match=f"process {child} of"):
        train(run, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    train(run, resume=True)
    assert same_weights(run, whole)
    assert not (run / ".lock").exists()


def test_another_number_of_processes_is_refused(whole: Path, tmp_path: Path) -> None:
    run = undone(whole, tmp_path / "run")
    _, state = load_checkpoint(run / "checkpoints")
    save_checkpoint(run / "checkpoints", 3, {**state, "processes": 2})
    with pytest.raises(RunError, match=r"is a run of 2 processes, and 1 would go on.*torchrun --nproc_per_node 2 -m"):
        train(run, resume=True)
