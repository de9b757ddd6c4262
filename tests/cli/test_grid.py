"""`scoreact grid` and the words it prints: what it finds is taken by train, sample and evaluate."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import scoreact as sa
from scoreact.cli.main import main
from scoreact.recipes.gaussian import build, mixture
from scoreact.support.errors import SettingError


def test_what_it_finds_is_taken_by_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = "--tries 14 --samples 300"
    assert main(shlex.split(f"grid gaussian --steps 3 --solver ddim {small}")) == 0
    printed = capsys.readouterr().out
    assert "Frechet distance to the model's own samples (50 steps of heun), 300 samples" in printed
    rows = re.findall(r"^(\S+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert [name for name, _, _ in rows[:3]] == ["uniform", "log_snr", "karras"]
    line = re.search(r"^best: scoreact (sample gaussian .*)$", printed, re.MULTILINE)
    assert line is not None
    name, level, _ = min(rows, key=lambda row: float(row[2]))
    assert line[1] == f"sample gaussian --steps 3 --solver ddim --grid {name} --noise-level {level}"
    assert main([*shlex.split(line[1]), "--count", "4", "--out", "drawn"]) == 0
    assert json.loads(Path("drawn/index.json").read_text())["grid"] == name
    assert main(shlex.split(f"grid gaussian --steps 3 --solver ddim {small}")) == 0
    assert line[0] in capsys.readouterr().out, "the same seed finds the same grid"


def test_real_examples_are_the_standard_where_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    distances = []
    for shift in (0.0, 5.0):
        random = np.random.default_rng(0)
        np.save("real.npy", random.normal(shift, 1.0, (500, mixture(2, 4, 0).dim)).astype("float32"))
        assert main(shlex.split("grid gaussian --steps 2 --data real.npy --tries 4 --samples 200")) == 0
        printed = capsys.readouterr().out
        assert "Frechet distance to real.npy" in printed
        assert "--noise-level" not in printed
        distances.append(float(re.findall(r"^uniform +([\d.]+)", printed, re.MULTILINE)[0]))
    assert distances[1] > distances[0] + 20


def test_a_grid_is_trained_with_and_evaluated_on(tmp_path: Path) -> None:
    problem = build(width=8)
    small = {
        "iterations": 1,
        "batch_size": 16,
        "reference_batches": 1,
        "heldout_samples": 16,
        "steps": 3,
        "device": "cpu",
    }
    sa.finetune(problem, out=tmp_path / "run", report=False, grid="log_snr:-1,3", algorithm="rwr", **small)
    run = sa.open_run(tmp_path / "run", build(width=8))
    own, other = (run.evaluate(16, ["ode"], [3], grid=grid) for grid in (None, "karras"))
    assert (own["grid"], other["grid"]) == ("log_snr:-1,3", "karras")
    with pytest.raises(SettingError, match="grid is 'karas'; known: "):
        run.evaluate(16, ["ode"], [3], grid="karas")
    assert own["heldout"] == other["heldout"]
    assert own["transfer"][0]["reward"] != other["transfer"][0]["reward"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("grid gaussian", "--steps"),
        ("grid gaussian --steps 1", "expected a whole number of at least 2, got '1'"),
        ("grid gaussian --steps 3 --tries 9 --solver ddim", "tries is 9; the known grids alone take 9"),
        ("grid gaussian --steps 3 --weights best", "--weights best is of a run"),
        ("sample gaussian --grid log_snr:x", "expected numbers after log_snr:"),
        ("evaluate run --survey --grid karras", "--survey has solvers, steps and a grid of its own"),
    ],
)
def test_what_cannot_be_is_said(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(words)) == 2
    assert said in capsys.readouterr().err
