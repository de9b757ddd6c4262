"""The benchmark of kills, small: some runs killed at random moments end as if they had been left alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_equal_those_that_were_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "survive.py"
    spec = importlib.util.spec_from_file_location("survive", path)
    assert spec is not None
    assert spec.loader is not None
    survive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(survive)
    assert survive.main(["--kills", "6", "--only", "ctrl", "dpo", "pipeline", "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| all | 6 | ")
