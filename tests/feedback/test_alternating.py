"""An energy that is refitted beside another rule: its sign, its rounds, and that a policy follows it to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scoreact as sa
from scoreact.feedback.alternating import AlternatingEnergy
from scoreact.recipes.gaussian import build
from scoreact.support.errors import SettingError
from scoreact.types import Condition

SMALL: dict[str, Any] = {
    "algorithm": "draft", "steps": 4, "batch_size": 64, "reference_batches": 1, "heldout_samples": 200, "device": "cpu",
    "kl_weight": 0.05, "guard": "off", "learning_rate": 3e-3, "minibatch_size": 64, "evaluate_every": 1000,
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Far to the right of the recipe's mixture."""
    np.save(tmp_path / "real.npy", np.random.default_rng(0).normal((3.0, 0.0), 0.3, (500, 2)).astype("float32"))
    return tmp_path / "real.npy"


def test_the_reward_is_larger_where_the_data_are(data: Path) -> None:
    problem = build(width=8)
    energy = AlternatingEnergy(problem.model, data, steps=4, rate=3e-3)
    points = torch.tensor([[3.0, 0.0], [-1.0, 0.0]])
    right, left = energy(points, Condition([""] * 2)).tolist()
    assert right > 0.2 > -0.2 > left
    assert energy.rounds == 50


def test_a_rule_of_ours_follows_it_and_it_follows_the_policy(data: Path) -> None:
    problem = build(width=32)
    energy = AlternatingEnergy(problem.model, data, steps=4, rate=3e-3, every=2, batch_size=64)
    result = sa.finetune(problem.model, energy, [""], hooks=[energy], iterations=20, **SMALL)
    assert energy.rounds == 50 + 10
    before, after = (result.sample(count=400, reference=reference)[:, 0].mean() for reference in (True, False))
    assert float(after - before) > 0.3


def test_a_run_that_goes_on_is_refused(data: Path, tmp_path: Path) -> None:
    problem = build(width=8)
    energy = AlternatingEnergy(problem.model, data, steps=4, first_steps=5)
    small = {**SMALL, "checkpoint_every": 1, "report": False}
    sa.finetune(problem.model, energy, [""], hooks=[energy], iterations=1, out=tmp_path / "run", **small)
    fresh = AlternatingEnergy(build(width=8).model, data, steps=4, first_steps=5)
    with pytest.raises(
        SettingError, match="goes on at iteration 1, but no checkpoint holds its energy; start a new run"
    ):
        sa.finetune(build(width=8).model, fresh, [""], hooks=[fresh], out=tmp_path / "run", resume=True, **{
            **small, "iterations": 2})  # fmt: skip
