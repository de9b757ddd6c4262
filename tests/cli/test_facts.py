"""`scoreact facts`: what it prints is what the measures say of the data and of the samples; what it refuses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scoreact as sa
from scoreact.cli.main import main, run
from scoreact.evaluation.stylised_facts import series_facts
from scoreact.support.errors import SettingError
from scoreact.support.own_data import read_data

SMALL = {"steps": 2, "width": 8, "batch_size": 16, "bfloat16": "no", "progress": False}


def prices(path: Path, days: int = 200) -> Path:
    levels = np.exp(0.01 * np.random.default_rng(0).standard_t(4, size=(days, 2)).cumsum(0))
    lines = [
        f"{day},{a:.8f},{b:.8f}"
        for day, (a, b) in zip(np.datetime64("2001-01-01") + np.arange(days), levels, strict=True)
    ]
    (path / "stocks.csv").write_text("date,A,B\n" + "\n".join(lines))
    return path / "stocks.csv"


def test_the_table_says_what_the_data_and_the_samples_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = read_data(prices(tmp_path, 1100), window=24, values="returns", columns=["B"])
    sa.pretrain("returns", "stocks.csv", window=24, values="returns", columns=["B"], **SMALL)
    assert main(shlex.split("facts returns --samples 40 --solver ddim --steps 3 --grid uniform --out own.png")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mean over columns +real +held out +pretrained$", printed, re.MULTILINE)
    row = re.search(r"^standard deviation +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert row is not None
    for found, part in zip(row.groups(), (data.train, data.heldout), strict=False):
        assert float(found) == pytest.approx(float(series_facts(part.values).std), abs=6e-5)
    assert float(row[3]) == pytest.approx(float(row[1]), rel=0.5)  # in the data's unit, though nothing is learned yet
    assert f"real are {len(data.train) + 23} rows" in printed
    with Image.open("own.png") as picture:
        assert picture.size[0] > 1000
    small = "--iterations 1 --batch-size 8 --steps 4 --heldout-samples 8 --reference-batches 2 --no-report"
    Path("r.py").write_text("def first(samples):\n    return samples.flatten(1)[:, 0]\n")
    assert main(shlex.split(f"train returns --reward r.py:first {small}")) == 0
    capsys.readouterr()
    assert main(shlex.split("facts runs/returns-001 --samples 20")) == 0
    assert re.search(r"pretrained +tuned$", capsys.readouterr().out, re.MULTILINE)


def test_what_holds_no_returns_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="gaussian is no model of series"):
        run(["facts", "gaussian"])
    sa.pretrain("levels", prices(tmp_path), window=24, **SMALL)
    with pytest.raises(SettingError, match="pretrain with --values returns"):
        run(["facts", "levels"])
    sa.pretrain("short", prices(tmp_path), window=12, values="returns", **SMALL)
    with pytest.raises(SettingError, match="has windows of 12 rows"):
        run(["facts", "short"])
