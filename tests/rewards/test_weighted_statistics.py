"""Statistics of samples, and their weighted sum as a reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scoreact.rewards import checked
from scoreact.rewards.registry import load
from scoreact.rewards.weighted_statistics import WeightedStatistics, open_statistics
from scoreact.support.errors import RewardError
from scoreact.types import Condition

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
HERE = Condition(["a"] * 5)


def first(samples: Tensor) -> Tensor:
    return samples[:, 0]


def two(samples: Tensor, prompts: list[str]) -> Tensor:
    return samples[:, :2] ** len(prompts[0])


def test_the_sum_and_its_parts_by_name() -> None:
    reward = checked(load("statistics", statistics=[first, two, first], weights=[2.0, 1.0, -1.0, 0.5]))
    assert torch.allclose(reward(X, HERE), 2.5 * X[:, 0] + X[:, 0] - X[:, 1])
    assert set(reward.take_parts()) == {"first", "two[0]", "two[1]", "first#2"}


def test_it_has_a_gradient_where_all_statistics_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "differentiable", True, raising=False)
    assert not WeightedStatistics([first, two], [1, 1, 1]).differentiable
    reward = WeightedStatistics([first], [3])
    assert reward.differentiable
    x = X.clone().requires_grad_()
    assert torch.autograd.grad(reward(x, HERE).sum(), x)[0][:, 0].tolist() == [3.0] * 5


def cube(samples: Tensor) -> Tensor:
    return samples.reshape(5, 3, 1)


def scalar(samples: Tensor) -> Tensor:
    return samples.mean()


def nothing(samples: Tensor) -> Tensor:
    return samples[:, 0] / 0


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (cube, r"cube returned shape \(5, 3, 1\) for 5 samples; expected \(5,\), or \(5, k\)"),
        (scalar, r"scalar returned shape \(\) for 5"),
        (nothing, "nothing returned NaN or inf"),
    ],
)
def test_what_is_no_statistic_is_said(function: Any, text: str) -> None:
    with pytest.raises(RewardError, match=text):
        open_statistics([function])[0](X, HERE)


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(RewardError, match=r"2 statistics \(two\[0\], two\[1\]\) and 1 weights"):
        WeightedStatistics([two], [1])(X, HERE)
    with pytest.raises(RewardError, match="finite"):
        WeightedStatistics([two], [float("inf"), 1])
