"""A run folder that version 0.1.0 left still opens, goes on and is reported; tests/assets/run-0.1.0 was written by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import scoreact as sa
from scoreact.cli import main as cli

STORED = Path(__file__).parents[1] / "assets" / "run-0.1.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def test_it_opens_with_its_weights(run: Path) -> None:
    opened = sa.open_run(run)
    assert opened.config.iterations == 4
    assert opened.config.algorithm == "ctrl"
    policy = opened.policy()
    stored = load_file(run / "model.safetensors")
    assert {n: p for n, p in policy.model.named_parameters() if n in stored}.keys() == stored.keys()
    assert all(torch.equal(p, stored[n]) for n, p in policy.model.named_parameters() if n in stored)
    assert (
        opened.final["objective/recovered"]
        == json.loads((run / "result.json").read_text())["final"]["objective/recovered"]
    )
    assert opened.sample(count=3).shape == (3, 2)


def test_it_goes_on_from_its_checkpoint_to_where_it_ended_then(run: Path) -> None:
    """Bits differ between processors; the way does not."""
    wanted = load_file(run / "model.safetensors")
    for name in ("model.safetensors", "result.json"):
        (run / name).unlink()
    assert cli.main(["resume", str(run)]) == 0
    found = load_file(run / "model.safetensors")
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3)
    assert "Held-out reward" in (run / "report.html").read_text(encoding="utf-8")


def test_it_is_reported_and_extended(run: Path) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["resume", str(run), "--iterations", "5"]) in (0, 1, 2)
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["check", "run", str(run)]) == 1
