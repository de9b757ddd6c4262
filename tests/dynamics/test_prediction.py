"""Conversions between the kinds of prediction: definitions, and all pairs there and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from scoreact.dynamics.prediction import PREDICTIONS, convert
from scoreact.dynamics.schedule import Schedule
from scoreact.types import expand

Times = Callable[[Schedule, int], Tensor]


@pytest.fixture
def case(
    schedule: Schedule, inner_times: Times, generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """t [B], x [B, 2, 3] and what each kind is by its definition from data and noise."""
    t = inner_times(schedule, 9)
    data, noise = (torch.randn(9, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, sigma = expand(schedule.alpha(t), data), expand(schedule.sigma(t), data)
    values = {
        "epsilon": noise,
        "x0": data,
        "v": alpha * noise - sigma * data,
        "velocity": expand(schedule.d_alpha(t), data) * data + expand(schedule.d_sigma(t), data) * noise,
        "score": -noise / sigma,
    }
    return t, alpha * data + sigma * noise, values


@pytest.mark.parametrize(("source", "target"), product(PREDICTIONS, PREDICTIONS))
def test_conversion_equals_the_definition(
    source: str, target: str, schedule: Schedule, case: tuple[Tensor, Tensor, dict[str, Tensor]]
) -> None:
    t, x, values = case
    converted = convert(PREDICTIONS[source], PREDICTIONS[target], schedule, t, x, values[source])
    # relative to the size of the numbers that the conversion subtracts: x / sigma^2 at most
    scale = 1 + (x / expand(schedule.sigma(t), x) ** 2).abs().max() + values[target].abs().max()
    assert float((converted - values[target]).abs().max() / scale) < 1e-10


@pytest.mark.parametrize(("source", "target"), product(PREDICTIONS, PREDICTIONS))
def test_round_trip_through_the_hub(
    source: str, target: str, schedule: Schedule, case: tuple[Tensor, Tensor, dict[str, Tensor]]
) -> None:
    t, x, values = case
    there = convert(PREDICTIONS[source], PREDICTIONS[target], schedule, t, x, values[source])
    back = convert(PREDICTIONS[target], PREDICTIONS[source], schedule, t, x, there)
    torch.testing.assert_close(back, values[source], rtol=1e-10, atol=1e-10)


def test_the_same_kind_is_returned_untouched(schedule: Schedule) -> None:
    t, x, value = torch.tensor([0.5]), torch.zeros(1, 2), torch.ones(1, 2)
    for kind in PREDICTIONS.values():
        assert convert(kind, kind, schedule, t, x, value) is value


def test_every_kind_goes_by_its_own_name() -> None:
    assert list(PREDICTIONS) == ["epsilon", "x0", "v", "velocity", "score"]
    assert all(kind.name == name for name, kind in PREDICTIONS.items())
