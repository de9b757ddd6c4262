"""A value that is linear in the pretrained network's own features, solved for in closed form: no steps, no learning rate.

    V = link(w . phi),   phi = [1, 2 t - 1] x [gate z, the prompt's] and knots in t,   gate = alpha / sqrt(alpha^2 + sigma^2)

The prompt's are its indicator, or, where there are more than 64 prompts, the vector of its words: the solve takes the third
power of the number of columns. z are the features, standardised. The denoiser has learned what matters in a noised picture:
without a step, V is worth what a network fitted from nothing is after 100,000 calls of it (`benchmarks/value_fit.py`). They
come with the reference's score.
The ridge is chosen by the error on paths left out; so is the spread of the returns around V.
Departs from Explicit Critic Guidance (arXiv 2605.27736), which fits a network on such features by descent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..dynamics.schedule import Schedule
from ..models.prompt_words import MANY, bag_of_words
from ..support import distributed
from ..support.devices import in_double
from ..types import Condition, Metrics
from .value import KNOTS, knots
from .value_fit import Sample, ValueFit, logit_of

FOLDS = 4
WORDS = 128  # columns in the place of one a prompt
RIDGES = tuple(10 ** (0.5 * k) for k in range(-6, 3))  # variance of the noise over the prior variance of V's features


class LinearHead(nn.Module):
    """F: features [B, F] of the pretrained network at (t, x), t [B] -> [B]. Its weights are given by `RidgeFit`."""

    inputs: ClassVar[str] = "features"  # what `ValueNetwork` then asks the reference for
    counted: ClassVar[bool] = False  # a dot product is no network call; the pass that makes the features is one
    mean: Tensor
    std: Tensor
    weight: Tensor
    prompts: Tensor

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        for name in ("mean", "std", "weight"):  # of no size until they are fitted
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("prompts", torch.zeros((), dtype=torch.long))

    def begin(self, samples: Sequence[Sample]) -> None:
        """Take the features' scale and the number of prompts from the first paths; the weights become 0."""
        features = torch.cat([sample.features for sample in samples])
        moments = [features.mean(0), features.square().mean(0)]
        distributed.average(moments)
        self.mean = moments[0]
        self.std = (moments[1] - moments[0].square()).clamp(min=0).sqrt() + 1e-6
        rows = [sample.condition.rows for sample in samples]
        most = max(0 if row is None else 1 + int(row.max()) for row in rows)
        self.prompts = distributed.gathered(torch.tensor([most], device=features.device)).max()
        self.weight = features.new_zeros(self._size())

    def basis(self, features: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """phi [B, D]."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        gate = (alpha / (alpha**2 + sigma**2).sqrt()).to(features)[:, None]
        z = gate * (features - self.mean) / (self.std * math.sqrt(len(self.mean)))
        time = (2 * t - 1).to(z)[:, None]
        rows, offset = condition.rows, torch.ones_like(time)
        if int(self.prompts) > MANY:
            offset = bag_of_words(condition.prompts, WORDS).to(z)
        elif rows is not None:  # a prompt that was not among the first has none
            offset = (rows[:, None] == torch.arange(int(self.prompts), device=z.device)).to(z)
        return torch.cat([z, time * z, offset, time * offset, knots(t).T.to(z)], dim=1)

    def forward(self, features: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.basis(features, t, condition) @ self.weight

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """The sizes are those that were fitted; what does not fit together is an error."""
        for name in ("mean", "std", "weight"):
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name]))
        super()._load_from_state_dict(state, prefix, *rest)
        wanted = self._size()
        if len(self.weight) not in (0, wanted):
            errors: list[str] = rest[-1]
            errors.append(
                f"{len(self.weight)} weights where {len(self.mean)} features and {self.prompts} prompts have {wanted}"
            )

    def _size(self) -> int:
        of_prompt = WORDS if int(self.prompts) > MANY else max(1, int(self.prompts))
        return 2 * len(self.mean) + 2 * of_prompt + KNOTS


@dataclass
class RidgeFit(ValueFit):
    """Ridge regression of the returns on what is remembered, anew in every fit.

    "martingale": V = F, the mean return. "soft": a return becomes itself + variance / (2 beta), the optimal value of normal
    returns; the variance is that of its rollout, and small near the optimum. "log_probability": the logit is what is
    regressed, on rewards; a policy's path counts as often as the reference would have drawn it.
    """

    ridge: float = math.nan
    searched: int = 0  # paths at the last search of the ridge
    outside: list[Tensor] = field(default_factory=list)  # F at each remembered state, by fits that did not see its path

    def __post_init__(self) -> None:
        pass  # nothing descends

    @property
    def head(self) -> LinearHead:
        assert isinstance(self.value.network, LinearHead)
        return self.value.network

    @torch.no_grad()
    def fit(self, generator: torch.Generator, rate: float = 1.0) -> Metrics:
        """Solve; nothing is drawn, and `rate` is not used."""
        value, memory = self.value, self.memory
        if not self.fitted:
            outcomes = torch.cat([self._outcome(sample) for sample in memory])
            value.shift.fill_(float(outcomes.mean()))
            value.scale.fill_(max(float(outcomes.std()), 1e-6))
            distributed.average([value.shift, value.scale])
            self.head.begin(memory)
        phi = torch.cat([self.head.basis(s.features, s.t, s.condition) for s in memory])
        t = torch.cat([s.t for s in memory])
        weight = torch.cat([self._weight(s) for s in memory])
        y = torch.cat([(self._outcome(s) - value.shift) / value.scale for s in memory])
        paths = sum(s.paths for s in memory)
        sizes = [len(s.t) for s in memory]
        fold = torch.cat([_fold(s).repeat(len(s.t) // s.paths) for s in memory])
        parts = [torch.nonzero(fold == k).flatten() for k in range(FOLDS)]
        grams = [_summed(in_double(weight[rows, None] * phi[rows]).T @ in_double(phi[rows])) for rows in parts]
        gram_of_all = torch.stack(grams).sum(0)
        per_path = sum(sizes) / paths  # states of a path share its noise, and count as one
        offset = torch.arange(phi.shape[1], device=t.device) >= 2 * len(self.head.mean)

        def solved(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
            penalty = per_path * torch.where(offset, min(ridge, 1.0), ridge)
            factor = torch.linalg.cholesky(gram + in_double(penalty).diag())
            return torch.cholesky_solve(moment[:, None], factor)[:, 0].to(phi)

        def left_out(ridge: float, y: Tensor) -> Tensor:
            """F at every state by the fit to the other folds."""
            moments = [_summed(phi[rows].T @ (weight[rows] * y[rows])) for rows in parts]
            outside = torch.empty_like(y)
            for rows, gram, moment in zip(parts, grams, moments, strict=True):
                outside[rows] = phi[rows] @ solved(gram_of_all - gram, torch.stack(moments).sum(0) - moment, ridge)
            return outside

        def error(outside: Tensor, y: Tensor) -> float:
            found = torch.stack([(weight * (outside - y).square()).sum(), weight.sum()])
            distributed.average([found])
            return float(found[0] / found[1])

        count = int(distributed.world() * paths)
        if count >= 2 * self.searched:
            self.searched = count
            self.ridge = min(RIDGES, key=lambda ridge: error(left_out(ridge, y), y))
        outside = left_out(self.ridge, y)
        spread = self._spread(t, weight, (outside - y).square())
        if self.loss == "soft":
            squares = (outside - y).square() / (spread @ knots(t)).square()
            shares = [part.mean().expand(len(part)) for part in squares.split(sizes)]  # of a rollout's own variance
            variance = torch.cat(shares) * (spread @ knots(t)).square()
            y = y + value.scale * variance / (2 * self.kl_weight)
            outside = left_out(self.ridge, y)
        elif value.log_sigmoid is not None:
            value.log_spread.copy_(spread.log())
        whole = _summed(phi.T @ (weight * y))
        self.head.weight = solved(gram_of_all, whole, self.ridge)
        self.outside = list(outside.split(sizes))
        self.fitted = True
        return {"value/loss": error(outside, y), "value/ridge": self.ridge}

    def _outcome(self, sample: Sample) -> Tensor:
        if self.loss != "log_probability":
            return sample.target
        costs = torch.zeros_like(sample.target) if sample.later_costs is None else sample.later_costs
        return logit_of((sample.target + costs) / self.kl_weight)

    def _weight(self, sample: Sample) -> Tensor:
        if self.loss != "log_probability" or sample.later_costs is None:
            return torch.ones_like(sample.target)
        return (-sample.later_costs / self.kl_weight).clamp(max=1).exp()

    def _spread(self, t: Tensor, weight: Tensor, squares: Tensor) -> Tensor:
        """The standard deviation left at each of `KNOTS` times; where nothing was seen, that of all times."""
        near = weight * knots(t)
        found = in_double(torch.stack([near @ squares, near.sum(1)]))
        distributed.average([found])
        total = found.sum(1)
        prior = 1e-3 * total[1]
        return ((found[0] + prior * total[0] / total[1]) / (found[1] + prior)).sqrt().clamp(min=1e-3).to(squares)

    def values_at(self, number: int, index: Tensor) -> Tensor:
        """V at rows of the remembered sample `number`, by fits that did not see their paths."""
        return self.value.link(self.memory[number].t[index], self.outside[number][index])

    def state_dict(self) -> dict[str, Any]:
        return {"fitted": self.fitted, "ridge": self.ridge, "searched": self.searched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fitted, self.ridge, self.searched = state["fitted"], state["ridge"], state["searched"]


def _fold(sample: Sample) -> Tensor:
    """To which fold each path belongs, by the bits of its first features: a path that is remembered twice is in one fold."""
    bits = sample.features[: sample.paths].float().contiguous().view(torch.int32).long().sum(1)
    return (bits * 2654435761 >> 24).remainder(FOLDS)


def _summed(x: Tensor) -> Tensor:
    """Over the processes, in double precision."""
    found = in_double(x)
    distributed.average([found])
    return found * distributed.world()
