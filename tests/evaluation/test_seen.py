"""How much of the reward a guess sees, and what the guard makes of a surrogate that sees nothing or is exploited."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from scoreact.evaluation.seen import seen
from scoreact.training.guard import Guard
from scoreact.types import Condition


def test_it_is_the_squared_correlation_inside_prompts(generator: torch.Generator) -> None:
    """Normal guess and reward of correlation 0.6 inside prompts; what differs between prompts counts for nothing."""
    common, own = torch.randn(2, 20_000, generator=generator)
    number = torch.arange(20_000) % 10
    rewards = 0.6 * common + 0.8 * own + 50 * number
    share, error = seen(3 * common - 20 * number, rewards, Condition([f"prompt {i}" for i in number.tolist()]))
    assert share == pytest.approx(0.36, abs=3 * error)
    assert error == pytest.approx(2 * 0.6 * 0.64 / math.sqrt(20_000), rel=0.1)
    assert seen(-common, rewards, Condition([f"prompt {i}" for i in number.tolist()]))[0] == pytest.approx(
        share, abs=1e-6
    )


def test_a_guess_of_nothing_is_within_its_error(generator: torch.Generator) -> None:
    """r^2 of independent numbers is 1 / n on average, and beyond 3 errors seldom."""
    c = Condition([f"prompt {i % 5}" for i in range(100)])
    found = [seen(*torch.randn(2, 100, generator=generator), c) for _ in range(200)]
    assert sum(share > 3 * error for share, error in found) < 10
    assert min(error for _, error in found) > 1 / 100  # also where r happens to be 0


def test_what_cannot_be_known_is_nan(generator: torch.Generator) -> None:
    x = torch.randn(4, generator=generator)
    assert math.isnan(seen(x, x, Condition(["a", "b", "c", "d"]))[0])
    assert math.isnan(seen(torch.ones(4), x, Condition(["a"] * 4))[0])


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"surrogate/seen": 0.01, "surrogate/seen_se": 0.01}, "sees 0.01 ± 0.01 of the reward's variance"),
        ({"surrogate/seen": 0.5, "surrogate/seen_se": 0.04}, None),
        ({"surrogate/seen": math.nan, "surrogate/seen_se": math.nan}, None),
        ({"surrogate/bias": 1.5, "surrogate/bias_se": 0.1, "reward/heldout": 0.2}, "worth 1.5 more than by the reward"),
        ({"surrogate/bias": 1.5, "surrogate/bias_se": 0.1, "reward/heldout": 3.2}, None),
        ({"surrogate/bias": 0.2, "surrogate/bias_se": 0.1, "reward/heldout": -0.2}, None),
    ],
)
def test_the_guard_says_when_a_surrogate_is_blind_or_exploited(metrics: dict[str, Any], said: str | None) -> None:
    guard = Guard(1.0, start={"reward/heldout": 0.0, "surrogate/bias": 0.0})
    found = [finding.text for finding in guard.findings(metrics, {})]
    assert (said is None and not found) or (said is not None and said in found[0])
