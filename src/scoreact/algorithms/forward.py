"""Rules that see samples, not how they were drawn: the forward process noises them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..control.transitions import Rows
from ..dynamics.prediction import PREDICTIONS, convert
from ..dynamics.schedule import noising
from ..dynamics.solvers import step_of
from ..support.settings import setting
from ..types import Condition, expand
from .base import Rule, steps_that_act


@dataclass(frozen=True)
class Noised(Rows):
    """Samples noised again, M = samples x grid steps looked at. What most forward-process rules look at."""

    t0: Tensor  # [M]
    t1: Tensor  # [M] where the step from t0 would end
    x: Tensor  # [M, *D] at t0
    target: Tensor  # [M, *D] the score of x given its sample
    condition: Condition
    steps: int  # of the grid: a sum over a path is `steps` times the mean over rows


@dataclass
class ForwardRule(Rule):
    """A rule that sees samples, not how they were drawn: it noises them again and regresses the score (denoising).

    The end of a path is a sample at time e = ts[-1], little noise but some. It goes back by the noising path's own law
    (`noising`), so that regressing the score on -noise / s gives the score of the noised law of x_e, whatever e is. t are
    the times of the rollout's grid at which the policy acts: one draw a step and sample, or `draws` of them.
    """

    reads_reference = False
    transitions_only = False

    draws: int = setting(
        0, "Number of steps of the grid, at random, at which each sample is denoised; 0: all of them", 0
    )
    sampling: Literal["sde", "ode"] = setting(
        "sde", "How rollouts are drawn: by the SDE, or by its probability-flow ODE (without noise)"
    )

    def stochastic_steps(self, steps: int, generator: torch.Generator) -> Tensor | None:
        return torch.zeros(steps, dtype=torch.bool) if self.sampling == "ode" else None

    def acting_times(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """t0 and t1 of the grid's steps that are the policy's and have noise in the SDE, each [steps]."""
        keep = steps_that_act(self, ts)
        return ts[:-1][keep], ts[1:][keep]

    def times(self, ts: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """t0 and t1 [count, K] at which to look at `count` samples, no step twice at one; the grid's number of steps."""
        t0, t1 = self.acting_times(ts)
        order = torch.rand(count, len(t0), generator=generator, device=ts.device).argsort(1)
        order = order[:, : self.draws or len(t0)]
        return t0[order], t1[order], len(t0)

    def renoised(self, x_end: Tensor, end: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x at times t [B, K] given the sample x_end [B, *D] at time `end`, and its score: noise, x, score [B, K, *D]."""
        kept, std = noising(self.sde.schedule, end, t)
        return expand(kept, noise) * x_end.unsqueeze(1) + expand(std, noise) * noise, -noise / expand(std, noise)

    def noised(
        self, x_end: Tensor, ts: Tensor, condition: Condition, generator: torch.Generator
    ) -> tuple[Noised, Tensor]:
        """Rows of the samples x_end [B, *D], and [M] which sample each is of."""
        t0, t1, steps = self.times(ts, len(x_end), generator)
        shape = (*t0.shape, *x_end.shape[1:])
        noise = torch.randn(shape, generator=generator, device=x_end.device, dtype=x_end.dtype)
        x, target = self.renoised(x_end, ts[-1], t0, noise)
        index = torch.arange(len(x_end), device=x_end.device).repeat_interleave(t0.shape[1])
        rows = Noised(t0.flatten(), t1.flatten(), x.flatten(0, 1), target.flatten(0, 1), condition[index], steps)
        return rows, index

    def error(self, weighting: str, t0: Tensor, t1: Tensor, x: Tensor, score: Tensor, other: Tensor) -> Tensor:
        """score - other [M, *D] in the units of `weighting`: a prediction's (epsilon, velocity, x0, v, score), or "kl".

        "kl": the difference of the step's means in units of its noise, u sqrt(dt), so that half its square, summed over
        a path, is the path KL.
        """
        if weighting == "kl":
            return step_of(self.sde, self.solver, score, t0, t1, x).shift(
                step_of(self.sde, self.solver, other, t0, t1, x)
            )
        kind, schedule = PREDICTIONS[weighting], self.sde.schedule
        one, two = (convert(PREDICTIONS["score"], kind, schedule, t0, x, value) for value in (score, other))
        return one - two
