"""A run that is asked to end saves what it has, whoever asks and whenever; what goes on from there is the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scoreact.api.start import train_problem
from scoreact.cli import main as cli
from scoreact.cli import running
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.base import Problem
from scoreact.recipes.gaussian import linear_reward, mixture
from scoreact.runs import stopping
from scoreact.runs.checkpoint import checkpoints, load_checkpoint
from scoreact.support.files import read_lines
from scoreact.training.config import Config, updated
from scoreact.types import Condition

SETTINGS: dict[str, Any] = {
    "algorithm": "ddpo", "iterations": 4, "batch_size": 16, "steps": 3, "reference_batches": 1, "heldout_samples": 16,
    "evaluate_every": 2, "checkpoint_every": 100, "device": "cpu",
}  # fmt: skip
Event = Callable[[str, dict[str, Any]], None]
SMALL = ["--batch-size", "16", "--heldout-samples", "8", "--algorithm", "ddpo", "--device", "cpu"]


def train(
    out: Path, on_event: Event | None = None, reward: Any = None, *, resume: bool = False, **settings: Any
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResidualModel(mixture(2, 3, 0), 2, width=8)
    problem, config = Problem(model, reward or linear_reward(2, 0)), updated(Config(), {**SETTINGS, **settings})
    train_problem(
        problem, config, out, resume=resume, extend=False, start=None, description={}, progress=False, on_event=on_event,
        report=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


def assert_equal(one: Path, other: Path) -> None:
    """Bit for bit, and line for line but for the clock's."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "metrics.jsonl")]
        for folder in (one, other)
    ]
    assert lines[0] == lines[1]


def at(iteration: int, number: int) -> Event:
    """Sends the signal at the end of that iteration, before the evaluation that may be due."""

    def tell(kind: str, line: dict[str, Any]) -> None:
        if kind == "iteration" and line["iteration"] == iteration:
            signal.raise_signal(number)

    return tell


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda n: n.name)
@pytest.mark.parametrize("iteration", [1, 2, 4])
def test_what_is_asked_to_end_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path, number: signal.Signals, iteration: int
) -> None:
    """Also where an evaluation was due, which the resumed run makes; and after the last iteration."""
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is silenced
    try:
        with pytest.raises(KeyboardInterrupt, match=f"stopped after iteration {iteration}"):
            train(tmp_path / "run", at(iteration, number))
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[0] == iteration
    evaluated = [line["iteration"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line.get("evaluation")]
    assert evaluated == [n for n in (0, 2) if n < iteration]
    train(tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", whole)


def test_a_signal_that_is_silenced_or_taken_stays_so(tmp_path: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:

        def tell(kind: str, line: dict[str, Any]) -> None:
            if kind == "iteration":
                signal.raise_signal(signal.SIGHUP)
                signal.raise_signal(signal.SIGUSR1)

        train(tmp_path / "run", tell, iterations=1)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert heard == [signal.SIGUSR1]
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("call", [1, 4])  # in the look at the reference, and in the second iteration
def test_who_is_about_to_kill_is_not_kept_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    monkeypatch.setattr(stopping, "PATIENCE", 0.2)
    calls = 0

    def slow(x: Tensor, condition: Condition) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        return x[:, 0]

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", reward=slow)
    assert time.monotonic() - begin < 30
    assert [int(path.name) for path in checkpoints(tmp_path / "run" / "checkpoints")] == ([] if call == 1 else [0])


def test_the_look_at_the_reference_is_kept(whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    linear = linear_reward(2, 0)

    def fails(x: Tensor, condition: Condition) -> Tensor:
        if "checkpoint" in said:
            raise KeyError("no such thing")
        return linear(x, condition)

    with pytest.raises(RuntimeError, match="no such thing"):
        train(tmp_path / "run", lambda kind, line: said.append(kind), reward=fails)
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[0] == 0
    train(tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", whole)


def test_checkpoints_by_time(tmp_path: Path) -> None:
    saved: list[int] = []

    def tell(kind: str, line: dict[str, Any]) -> None:
        if kind == "checkpoint":
            saved.append(line["iteration"])

    for minutes, wanted in ((1e-9, [0, 1, 2, 3, 4]), (0, [0, 4]), (60, [0, 4])):
        saved.clear()
        train(tmp_path / f"run {minutes}", tell, checkpoint_minutes=minutes)
        assert saved == wanted


def test_a_reader_that_goes_away_ends_a_run_in_peace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`scoreact train ... | head -1`, in a fork."""
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        words = ["--iterations", "500", *SMALL]
        os._exit(cli.main(["train", "gaussian", *words, "--checkpoint-every", "400", "--out", "run"]))
    os.close(writer)
    with open(reader, "rb") as lines:
        while not lines.readline().strip().startswith(b"2/500"):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    saved = load_checkpoint(Path("run/checkpoints"))[0]
    assert 2 <= saved < 400
    assert capfd.readouterr().err.endswith(f"Iteration {saved} is saved; continue with `scoreact resume run`.\n")


def test_a_queued_job_goes_on_or_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "write_report", lambda source: 0)  # as good, and dear
    (tmp_path / "r.py").write_text(
        "import os, signal\ncalls = 0\n"
        "def first(x):\n    global calls\n    calls += 1\n"
        "    if calls == int(os.environ['AT']): os.kill(os.getpid(), signal.SIGTERM)\n    return x[:, 0]\n"
    )
    few = ["--iterations", "3", *SMALL]
    words = ["train", "gaussian", *few, "--reward", "r.py:first", "--resume-or-start"]
    assert cli.main(words) == 2
    assert "--resume-or-start needs --out" in capsys.readouterr().err
    for at, status in (("7", 130), ("-1", 0), ("-1", 0)):  # interrupted in an iteration; goes on; has finished
        monkeypatch.setenv("AT", at)
        assert cli.main([*words, "--out", "run"]) == status
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "/3 " in line] == ["1/3", "2/3", "3/3"]
    assert "run has finished its 3 iterations" in out
    for changed, said in (
        (["--seed", "1"], "seed 0 -> 1"),
        (["--option", "width=9"], "options {"),
        (["--reward", "r.py:x"], ""),
    ):
        assert cli.main([*words, "--out", "run", *changed]) == 2
        assert said in capsys.readouterr().err
    assert json.loads(Path("run/result.json").read_text())["iterations"] == 3


def test_what_was_said_after_the_last_checkpoint_is_not_said_twice(tmp_path: Path) -> None:
    """A sentence of the very end, in a process that was killed before it wrote anything else."""
    still: dict[str, Any] = {"learning_rate": 1e-9}  # hardly moved, which is said in the end
    train(tmp_path / "whole", **still)
    last = read_lines(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert (last["guard"], last["iteration"]) == ("unmoved", 4)

    def die(kind: str, line: dict[str, Any]) -> None:
        if kind == "guard" and line["iteration"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        train(tmp_path / "cut", die, **still)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    train(tmp_path / "cut", resume=True, **still)
    assert_equal(tmp_path / "cut", tmp_path / "whole")
