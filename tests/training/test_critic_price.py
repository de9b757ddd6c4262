"""A run says which critic it has, what that sees and what a reward at every state would cost; weights do not depend on it."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.recipes.base import recipes
from scoreact.training.critic_price import brief

PAUSE = 0.02  # seconds a sample
SMALL: dict[str, Any] = {
    "batch_size": 16, "iterations": 1, "steps": 4, "reference_batches": 1, "heldout_samples": 16, "evaluate_every": 9,
    "minibatch_size": 64, "kl_weight": 1.0,
}  # fmt: skip


def slow(points: Tensor) -> Tensor:
    time.sleep(PAUSE * len(points))
    return points[:, 0]


def said(reward: Any, **settings: Any) -> tuple[list[str], sa.Result]:
    torch.manual_seed(0)
    problem = replace(recipes()["gaussian"].build(), value_network=None)
    found = sa.finetune(problem, reward, **SMALL, **settings)
    texts = [line["text"] for line in found.history if line.get("guard") == "note"]
    return [text for text in texts if text.startswith("The value is made of")], found


def test_of_a_surrogate_and_of_the_reward_itself() -> None:
    (text,), _ = said(slow, algorithm="ctrl_pathwise", value="surrogate")
    assert "asks 16 rewards an iteration" in text
    assert "at least 64 times an iteration" in text
    price = re.search(r"A reward takes ([\d.]+) ms here", text)
    assert price is not None
    assert PAUSE <= float(price[1]) / 1000 < 8 * PAUSE  # of one sample, not of the batch of 16
    beside = re.search(r"an iteration, ([\d.]+) s beside", text)
    assert beside is not None
    assert float(beside[1]) == pytest.approx(64 * float(price[1]) / 1000, rel=0.05)
    (text,), _ = said(slow, algorithm="ctrl", value="residual", value_steps=1, value_first_steps=1, value_batch_size=2)
    assert "is asked at every state, at least 64 times an iteration" in text


@pytest.mark.parametrize(
    ("span", "text"), [(0.00123, "1.2 ms"), (0.242, "242 ms"), (5.61, "5.6 s"), (90.0, "1.5 min"), (7200.0, "2 h")]
)
def test_seconds_in_words(span: float, text: str) -> None:
    assert brief(span) == text


def test_where_no_value_is_made_of_the_reward_nothing_is_said() -> None:
    assert said(lambda points: points[:, 0], algorithm="ddpo")[0] == []
    assert said(lambda points: points[:, 0], algorithm="ctrl", value="network")[0] == []


def test_the_clock_decides_nothing() -> None:
    """A reward that takes a hundred times as long leaves the same weights and the same counts of calls."""
    runs = [said(reward, algorithm="ctrl_pathwise", value="surrogate")[1] for reward in (slow, lambda x: x[:, 0])]
    for first, second in zip(*(dict(run.policy.model.named_parameters()).values() for run in runs), strict=True):
        assert torch.equal(first, second)
    calls = [[line.get("cost/network_calls") for line in run.history] for run in runs]
    assert calls[0] == calls[1]


def test_a_residual_value_has_the_gradient_of_a_users_reward_or_its_lack_is_told() -> None:
    few = {"value": "residual", "value_steps": 1, "value_first_steps": 1, "value_batch_size": 2, **SMALL}

    def notes(reward: Any, algorithm: str) -> list[str]:
        torch.manual_seed(0)
        problem = replace(recipes()["gaussian"].build(), value_network=None)
        found = sa.finetune(problem, reward, algorithm=algorithm, **few)
        return [line["text"] for line in found.history if "has none" in line.get("text", "")]

    def counts(points: Tensor) -> Any:
        return points[:, 0].detach().numpy() > 0

    assert notes(lambda points: points[:, 0], "ctrl_pathwise") == []
    (text,) = notes(counts, "ctrl_pathwise")
    assert "follows the value's gradient" in text
    assert notes(counts, "ctrl") == []
