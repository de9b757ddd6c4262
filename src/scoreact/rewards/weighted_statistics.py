"""Statistics of a sample, and the reward that is their weighted sum: R(x, c) = sum_j lambda_j s_j(x, c).

At kl_weight 1 the optimum of R is p_ref exp(R) / Z, the law nearest to the pretrained model's that has its means of the
statistics. Which lambda give which means is `training.calibration`'s business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import Reward, is_differentiable, is_of_batch, name_of
from .user import with_gradient

Spec = str | Callable[..., Any]  # what `open_statistic` takes


@dataclass(frozen=True)
class Statistic:
    """One or several numbers of a sample.

    Args:
        function: (decoded samples [B, ...], condition of B) -> [B] or [B, k].
        name: for messages and the log.
    """

    function: Reward
    name: str

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        """[B, k], in the type of a reward. Raises RewardError for another shape and for numbers that are not finite."""
        found = self.function(samples, condition)
        if found.ndim not in (1, 2) or len(found) != len(samples) or not found[:1].numel():
            raise RewardError(
                f"statistic {self.name} returned shape {tuple(found.shape)} for {len(samples)} samples; expected "
                f"({len(samples)},), or ({len(samples)}, k) for k statistics."
            )
        if not bool(found.detach().isfinite().all()):
            raise RewardError(f"statistic {self.name} returned NaN or inf; return a finite number for every sample.")
        return found if found.ndim == 2 else found.unsqueeze(1)


def open_statistic(spec: Spec) -> Statistic:
    """What `load` takes for a reward, as a statistic: a known name, file.py:function, a function; it may return [B, k].

    Raises RewardError for what is not there, and for a reward of the whole batch, which is no statistic of a sample.
    """
    from .registry import load  # which knows this module

    found = load(spec)
    if is_of_batch(found):
        raise RewardError(
            f"{name_of(found)} is of samples together, and a statistic is of one; give a function of a sample."
        )
    return Statistic(found, spec.rpartition(":")[2] if isinstance(spec, str) else name_of(spec).rpartition(":")[2])


def open_statistics(specs: Sequence[Spec]) -> list[Statistic]:
    """Each of them, with names of their own."""
    found: list[Statistic] = []
    for spec in specs:
        one = open_statistic(spec)
        same = sum(other.name.partition("#")[0] == one.name for other in found)
        found.append(Statistic(one.function, f"{one.name}#{same + 1}") if same else one)
    return found


def columns_of(statistics: Sequence[Statistic], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name -> [B] of what the statistics returned, each [B, k]; with more than one the k have numbers from 0."""
    found: dict[str, Tensor] = {}
    for one, columns in zip(statistics, values, strict=True):
        names = [one.name] if columns.shape[1] == 1 else [f"{one.name}[{j}]" for j in range(columns.shape[1])]
        found |= dict(zip(names, columns.unbind(1), strict=True))
    return found


class WeightedStatistics:
    """R = sum_j lambda_j s_j; `parts` gives the statistics by name, without their weights, for the log.

    Args:
        statistics: each what `open_statistic` takes.
        weights: lambda, one number for each of all their columns, in nats a unit of the statistic.

    Differentiable when every statistic is. Raises RewardError for no statistics, and for weights that are not finite; when
    it is called, for another number of weights than of columns.
    """

    def __init__(self, statistics: Sequence[Spec], weights: Sequence[float]) -> None:
        if isinstance(statistics, str) or not statistics:
            raise RewardError(f"statistics is {statistics!r}; give a list of at least one.")
        if not all(math.isfinite(weight) for weight in weights):
            raise RewardError(f"weights are {list(weights)}; give finite numbers.")
        self.statistics = open_statistics(statistics)
        self.weights = [float(weight) for weight in weights]
        self.name = "statistics"
        self.differentiable = all(is_differentiable(one.function) for one in self.statistics)

    def parts(self, samples: Tensor, condition: Condition) -> dict[str, Tensor]:
        """{name: s_j [B]}."""
        found = columns_of(self.statistics, [one(samples, condition) for one in self.statistics])
        if len(found) != len(self.weights):
            raise RewardError(
                f"there are {len(found)} statistics ({', '.join(found)}) and {len(self.weights)} weights; give one each."
            )
        return found

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """R [B] of what `parts` gave."""
        return torch.stack([w * s for w, s in zip(self.weights, parts.values(), strict=True)]).sum(0)

    def with_gradient(self) -> WeightedStatistics:
        """See `user.with_gradient`."""
        tried = copy.copy(self)
        tried.statistics = [replace(one, function=with_gradient(one.function)) for one in self.statistics]
        tried.differentiable = all(is_differentiable(one.function) for one in tried.statistics)
        return tried

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return self.total(self.parts(samples, condition))
