"""`scoreact reward discriminate`: data in, a reward out that `train` takes from any folder; refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from scoreact.cli import main as cli

SMALL = ["--features", "values", "--samples", "200", "--steps", "4", "--out", "real"]


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Data to the right of the recipe's mixture."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal([2.0, 0.0], 1.0, size=(600, 2))
    np.savetxt("points.csv", x, delimiter=",", header="a,b", comments="")
    return "points.csv"


def test_data_become_a_reward_that_a_run_takes(
    points: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reward", "discriminate", "gaussian", "--data", points, *SMALL]) == 0
    said = capsys.readouterr().out
    auc = json.loads(Path("real/reward.json").read_text())["auc"]
    assert auc > 0.8
    assert f"AUC        {auc:.3f} ± " in said
    assert "by cross-validation; 1 head on 2 features (values), fitted on 400 examples" in said
    train = [
        "train",
        "gaussian",
        "--reward",
        "real",
        "--iterations",
        "4",
        "--steps",
        "4",
        "--out",
        "run",
        "--no-report",
    ]
    assert cli.main([*train, "--batch-size", "64", "--reference-batches", "1", "--heldout-samples", "128"]) == 0
    assert re.search(r"reward/auc +0\.\d+ -> 0\.\d+", capsys.readouterr().out)
    described = json.loads(Path("run/config.json").read_text())["description"]
    assert described["reward"] == str(tmp_path / "real")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = ["reward", "discriminate", "../run", "--data", f"../{points}", *SMALL[2:], "--onto", "../real"]
    assert cli.main(again) == 0
    assert "sample of the final gaussian model" in capsys.readouterr().out


def test_words_that_do_not_fit_are_refused(points: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/file").write_text("")
    for words, said in {
        f"gaussian --data {points} --out clip": "--out clip is the name of a reward that the package has",
        f"gaussian --data {points} --out full": "full is not empty, and a reward is never written over",
        f"gaussian --data {points} --out r --labels a --no-labels": "are both given; leave one out",
        f"gaussian --data {points} --out r --onto full": "holds no reward.json",
        f"gaussian --data {points} --out r --features values --onto full": "--features are those of the reward that --onto",
        f"gaussian --data {points} --out r --ridge 0": "expected a number above 0",
        "gaussian --out r": "--data",
    }.items():
        assert cli.main(["reward", "discriminate", *words.split()]) == 2, words
        assert said in capsys.readouterr().err
    assert not Path("r").exists()
    assert cli.main(["reward"]) == 0
    assert "reward discriminate  Make a reward of data" in capsys.readouterr().out
    assert cli.main(["reward", "discriminat"]) == 2
    assert "Did you mean 'reward discriminate'?" in capsys.readouterr().err


def test_labelled_data_become_a_reward_that_a_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(1500, 2))
    found = ["right" if a > 0.8 else "left" for a, _ in x]
    Path("points.csv").write_text("a,b,found\n" + "".join(f"{a},{b},{y}\n" for (a, b), y in zip(x, found, strict=True)))
    words = [
        "reward",
        "classify",
        "--data",
        "points.csv",
        "--features",
        "values",
        "--labels",
        "found",
        "--out",
        "right",
    ]
    assert cli.main([*words, "--target", "maybe"]) == 2
    assert "unknown class 'maybe'; known: left, right" in capsys.readouterr().err
    assert cli.main([*words, "--target", "right"]) == 0
    said = capsys.readouterr().out
    facts = json.loads(Path("right/reward.json").read_text())
    row = facts["by_class"][1]
    assert f"AUC        {row['auc']:.3f} ± " in said
    assert f"off        {row['calibration_error']:.3f}: " in said
    assert f"temperature {facts['temperature']:.3g}" in said
    train = [
        "train",
        "gaussian",
        "--reward",
        "right",
        "--iterations",
        "2",
        "--steps",
        "4",
        "--out",
        "run",
        "--no-report",
    ]
    small = ["--batch-size", "64", "--reference-batches", "1", "--heldout-samples", "128"]
    assert cli.main([*train, *small, "--reward-option", "target=left"]) == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    share = next(line["reward/share"] for line in lines if "reward/share" in line)
    assert share > 0.5  # of samples that are not far to the right
