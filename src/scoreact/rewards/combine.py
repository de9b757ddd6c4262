"""Rewards made of rewards.

Everything here changes what `kl_weight` (beta) means: the optimum is p_ref exp(R / beta) / Z, so R / std at beta is the
problem R at beta * std. A fixed `normalise` is a change of unit; a `RunningNormaliser` that is updated during training
moves the optimum while it is being approached, and runs with it are comparable only with `.std` reported.
A constant added to R changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.base import ScoreModel
from ..support.errors import RewardError
from ..types import Condition
from .base import FunctionReward, Reward, TakesModel, is_differentiable, is_of_batch, name_of
from .check import part_of
from .user import with_gradient


class WeightedSum:
    """R = sum of weight * reward. `parts` gives the unweighted rewards by name, for the log.

    Differentiable when every part is. Raises ValueError for no parts or a weight that is not finite.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Reward]]) -> None:
        if not parts:
            raise RewardError("weighted_sum got no rewards. Give {name: (weight, reward)}.")
        for name, (weight, _) in parts.items():
            if not math.isfinite(weight):
                raise RewardError(f"the weight of {name!r} is {weight}; give a finite number.")
        self._parts = dict(parts)
        self.name = " + ".join(f"{weight:g} {name}" for name, (weight, _) in parts.items())
        self.differentiable = all(is_differentiable(reward) for _, reward in parts.values())
        self.of_batch = any(is_of_batch(reward) for _, reward in parts.values())

    def parts(self, samples: Tensor, condition: Condition) -> dict[str, Tensor]:
        """{name: rewards [B]}, each reward called once, unweighted. Raises RewardError naming the part that is not finite."""
        return {
            name: part_of(f"{name} (a part of {self.name})", reward, samples, condition)
            for name, (_, reward) in self._parts.items()
        }

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [B] of what `parts` gave."""
        return torch.stack([weight * parts[name] for name, (weight, _) in self._parts.items()]).sum(0)

    def take_model(self, model: ScoreModel) -> None:
        """The pretrained model of the run, for the parts that ask it."""
        for _, reward in self._parts.values():
            if isinstance(reward, TakesModel):
                reward.take_model(model)

    def with_gradient(self) -> WeightedSum:
        """See `user.with_gradient`."""
        return WeightedSum({name: (weight, with_gradient(reward)) for name, (weight, reward) in self._parts.items()})

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return self.total(self.parts(samples, condition))


def weighted_sum(parts: Mapping[str, tuple[float, Reward]]) -> WeightedSum:
    """{name: (weight, reward)} -> R = sum of weight * reward."""
    return WeightedSum(parts)


def product(rewards: Sequence[Reward]) -> FunctionReward:
    """R = product of the rewards; meant for rewards >= 0, where one bad part spoils the whole."""
    if not rewards:
        raise RewardError("product got no rewards. Give a list of at least one.")
    for reward in rewards:
        _check_of_a_sample("product", reward)
    name = " * ".join(name_of(reward) for reward in rewards)
    parts = [(f"{name_of(reward)} (a part of {name})", reward) for reward in rewards]
    return FunctionReward(
        lambda x, condition: torch.stack([part_of(part, reward, x, condition) for part, reward in parts]).prod(0),
        name,
        all(is_differentiable(reward) for reward in rewards),
    )


def threshold(reward: Reward, at: float) -> FunctionReward:
    """R = 1 where reward >= at, else 0. No gradient; `image.logistic_threshold` is the smooth relative."""
    _check_finite("at", at)
    _check_of_a_sample("threshold", reward)

    def above(x: Tensor, condition: Condition) -> Tensor:
        values = part_of(name_of(reward), reward, x, condition)  # NaN is below nothing
        return (values >= at).to(values.dtype)

    return FunctionReward(above, f"{name_of(reward)} >= {at:g}")


def clip(reward: Reward, low: float, high: float) -> FunctionReward:
    """R = min(max(reward, low), high); the gradient is zero outside. An end may be infinite."""
    if not low < high:
        raise RewardError(f"clip got low={low} and high={high}; give low < high.")
    _check_of_a_sample("clip", reward)
    return FunctionReward(
        lambda x, condition: reward(x, condition).clamp(low, high),
        f"clip({name_of(reward)}, {low:g}, {high:g})",
        is_differentiable(reward),
    )


def normalise(reward: Reward, mean: float, std: float) -> FunctionReward:
    """R = (reward - mean) / std with fixed numbers. The same problem at kl_weight * std."""
    _check_finite("mean", mean)
    _check_of_a_sample("normalise", reward)
    if not 0 < std < math.inf:
        raise RewardError(f"std is {std}; give a positive number, such as the reward's spread under the reference.")
    return FunctionReward(
        lambda x, condition: (reward(x, condition) - mean) / std,
        f"normalise({name_of(reward)})",
        is_differentiable(reward),
    )


class RunningNormaliser:
    """R = (reward - mean) / std of all rewards given to `update`; nothing is learnt from calling it.

    Before two values were given, and for a constant reward, std is 1. Population variance, merged batch by batch
    (Chan, Golub & LeVeque 1983). Read the head of this file on what it does to kl_weight.
    """

    def __init__(self, reward: Reward) -> None:
        _check_of_a_sample("RunningNormaliser", reward)
        self.reward = reward
        self.name = f"running_normaliser({name_of(reward)})"
        self.differentiable = is_differentiable(reward)
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # sum of squared distances from the mean

    @property
    def std(self) -> float:
        """Standard deviation of what was given, 1 while there is none."""
        return math.sqrt(self._squares / self.count) if self._squares > 0 else 1.0

    def update(self, rewards: Tensor) -> None:
        """Take in unnormalised rewards [B]. Raises ValueError for NaN or inf."""
        if not len(rewards):
            return
        values = rewards.detach().cpu().double()
        if not values.isfinite().all():
            raise RewardError("rewards given to the normaliser contain NaN or inf; wrap the reward in `checked` first.")
        batch_mean, count = float(values.mean()), self.count + len(values)
        gap = batch_mean - self.mean
        self._squares += float((values - batch_mean).square().sum()) + gap**2 * self.count * len(values) / count
        self.mean += gap * len(values) / count
        self.count = count

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return (self.reward(samples, condition) - self.mean) / self.std

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing = {"count", "mean", "squares"} - state.keys()
        if missing:
            raise RewardError(
                f"the normaliser's state lacks {', '.join(sorted(missing))}; give what state_dict returned."
            )
        self.count, self.mean = int(state["count"]), float(state["mean"])
        self._squares = float(state["squares"])


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise RewardError(f"{name} is {value}; give a finite number.")


def _check_of_a_sample(what: str, reward: Reward) -> None:
    if is_of_batch(reward):
        raise RewardError(
            f"{what} got {name_of(reward)}, a reward of samples together, whose values are contributions to a mean; put it "
            "into a weighted sum."
        )
