"""`ram`: Reinforce Adjoint Matching, on the noising process, from rewards of finished samples alone.

    loss = E_t | v_theta(x_t) - sg( v_ref(x_t) + (R / beta) [ v(x_t | x_data) - v_theta(x_t) ] ) |^2,   x_data ~ theta

v is the velocity, v(x_t | x_data) the one that made x_t, R less the mean reward of the prompt's other samples. No noise on
the rollout, no gradient of the reward, no value: any sampler may draw x_data.

Source: Bergmeister et al. 2026 (arXiv 2605.10759), eq. 17, from a secondary reading; their code was not found.
Fixed point: where theta is the score of its own noised samples, E_theta[R (v(x_t | x_data) - v_theta) | x_t] is the
posterior covariance of R and the score, hence
    s = s_ref + grad_x E_theta[R | x_t] / beta.
The optimum has the value E_theta[R - later costs | x_t] in the place of E_theta[R | x_t]: the later path cost is dropped.
The tilted law p_ref exp(R / beta) for a Gaussian reference and a linear reward, where the cost depends on no state; to first
order in 1 / beta for any other. How far off it is: docs/results/ram.md.
Departs from it: the mean reward is that of the other samples, without which a group of n has beta n / (n - 1); the loss in
other forms of the prediction (`weighting`), at the grid's times; sums over the data in place of means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.transitions import Paths, Rows, in_parts
from ..support.settings import setting
from ..types import Condition, Metrics, expand, groups, sum_over_data
from .forward import ForwardRule, Noised


@dataclass(frozen=True)
class Judged(Rows):
    """Noised samples, their rewards in units of beta, and the reference's scores there."""

    advantage: Tensor  # [M]
    reference: Tensor  # [M, *D]
    noised: Noised


@dataclass
class RAM(ForwardRule):
    """Settings of the rule; kl_weight is beta."""

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1}

    sampling: Literal["sde", "ode"] = setting(
        "ode", "How rollouts are drawn: by the SDE, or by its probability-flow ODE (without noise)"
    )
    weighting: Literal["velocity", "kl", "epsilon", "x0"] = setting(
        "velocity", "Weight of each time: that of a squared error of velocity, noise or data (x0), or the path KL's"
    )

    def compares_samples(self) -> bool:
        return True

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Judged:
        """Samples noised again, R / beta, and the reference's scores."""
        path = paths.trajectory
        rows, index = self.noised(path.xs[-1], path.ts, path.condition, generator)
        advantage = leave_one_out(paths.rewards, path.condition) / self.kl_weight
        reference = in_parts(self.policy.reference_score, rows.t0, rows.x, rows.condition)
        return Judged(advantage[index], reference, rows)

    def loss(self, rows: Judged) -> tuple[Tensor, Metrics]:
        """beta / 2 |error|^2, summed over the grid's steps, mean over samples."""
        at = rows.noised
        score = self.policy.score(at.t0, at.x, at.condition)
        pull = expand(rows.advantage, at.x) * (at.target - score.detach())
        error = self.error(self.weighting, at.t0, at.t1, at.x, score, rows.reference + pull)
        loss = 0.5 * self.kl_weight * at.steps * sum_over_data(error**2).mean()
        away = self.error(self.weighting, at.t0, at.t1, at.x, score.detach(), rows.reference)
        return loss, {"policy/from_reference": float(sum_over_data(away**2).mean())}


def leave_one_out(rewards: Tensor, condition: Condition) -> Tensor:
    """R less the mean over the prompt's other samples, [B]; 0 where a prompt has one sample."""
    centred = torch.zeros_like(rewards)
    for index in groups(condition).values():
        rows = index.to(rewards.device)
        if len(rows) > 1:
            centred[rows] = (rewards[rows] - rewards[rows].mean()) * len(rows) / (len(rows) - 1)
    return centred


RULES = {"ram": RAM}
