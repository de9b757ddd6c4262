"""`dpok`: policy gradient with a value baseline, and the KL to the reference differentiated directly, step by step.

    grad = E[ - sum_k (R - V(t_k, x_k)) grad log p_theta(x_{k+1} | x_k, c)
              + beta sum_k grad KL(p_theta(. | x_k, c) || p_ref(. | x_k, c)) ],     KL_k = |w_k|^2 / 2,  w = u sqrt(dt)

The sum of the KL of the steps bounds the KL of the samples. V is fitted to the terminal rewards by least squares.
Source: Fan et al. 2023 (DPOK, arXiv 2305.16381, Algorithm 1 and section 4.2); the ratio as in its published code.
Fixed point: u = g grad V / beta with V = E_policy[R | x], since what a step does to the KL of later steps is left out
of its gradient; the tilted law p_ref exp(R / beta) to first order in 1 / beta, and elsewhere below it in J: early steps
leave to later ones what those can do only at a higher KL. `later_costs=True` puts the left-out term back (R less the
later steps' log-ratios to the reference, V fitted to that): the gradient is then J's, the fixed point the tilted law.
Departs from it: PPO's pessimistic minimum (their clamp takes the gradient on both sides); no buffer of old transitions;
their weights alpha, beta (10, 0.01) of reward and KL are one, kl_weight = beta / alpha. Their learning rates (1e-5,
value 1e-4), for LoRA on Stable Diffusion, are not taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.advantage import returns_to_go
from ..control.transitions import Batch, Paths
from ..dynamics import girsanov
from ..support.settings import setting
from ..types import Metrics
from .base import Rule
from .surrogate import surrogate


@dataclass
class DPOK(Rule):
    """Settings of the rule; clip_range and temperature as in `ddpo`, kl_weight is beta."""

    search: ClassVar[Mapping[str, Any]] = {"clip_range": (0.1, 3.0, "log"), "later_costs": [False, True]}
    fits_value = True

    clip_range: float = setting(
        1.0, "Distance from 1 at which a step's ratio is clipped, per square root of unit time", 0, above=True
    )
    temperature: Literal["one", "root_dimensions", "dimensions"] = setting(
        "one", "What the log-ratio is divided by: 1, the root of the number of data dimensions, or that number"
    )
    later_costs: bool = setting(False, "Whether a step is charged for the KL of later steps (not so in the paper)")

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Batch:
        """Fit V to the returns; A_k = return after step k - V(t_k, x_k)."""
        assert self.critic is not None
        returns = paths.rewards.expand(len(paths.trajectory.ts), -1)
        if self.later_costs:
            returns = returns_to_go(paths.rewards, paths.sampled_costs(self.kl_weight))
        fit = self.critic.fit(paths, returns, generator, rate)
        values, explained = self.critic.values(paths, returns)
        self.metrics = fit | explained
        return replace(paths.batch, advantage=paths.rows(returns[1:] - values[:-1]))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """beta |w|^2 / 2 - clipped ratio x advantage, summed over a path's steps, mean over paths."""
        shift = self.shift(batch)
        gain, metrics = surrogate(girsanov.log_ratio(shift, batch.noise), batch, self.clip_range, self.temperature)
        cost = self.kl_weight * girsanov.kl(batch.control + shift)
        moved = float(batch.steps * girsanov.kl(shift.detach()).mean())
        return batch.steps * (cost - gain).mean(), {**metrics, "policy/kl_to_behaviour": moved}


RULES = {"dpok": DPOK}
