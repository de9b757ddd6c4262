"""`q_learning`: the little q-function, quadratic in the action, and its martingale conditions.

    q(t, x, a) = -beta / 2 |u_a - u*(t, x)|^2,        the policy network being u*
    dV - beta / 2 |u_a|^2 dt - q(t, x, a) dt = a martingale's increment, whatever policy chose a

q is the rate at which acting by a loses value. Here the Hamiltonian is exactly quadratic in a with curvature beta, so
nothing but its maximiser is left to learn. On a grid, with w = u sqrt(dt) in units of the step's noise, w_a the action's
and w the policy's,

    delta_k = V_{k+1} - V_k - beta (w . w_a - |w|^2 / 2),        E[delta_k | x_k, w_a] = 0

V is fitted to R - later sums of the bracket (its martingale loss), w by the orthogonality condition with test function
dq/dw = beta (w_a - w), which is the stationary point of sum_k |delta_k + later deltas|^2 / (2 beta), V fixed.

What tells how an action matters is that w_a - w varies at a state. `regress_on` "action": it varies by exploration only
(Config's exploration). "action_and_noise": the SDE's own noise z_k is counted as part of the action, w_a + z_k in w_a's
place. Its mean given (x_k, w_a) is the same, so the conditions still hold and no exploration is needed, and delta_k
itself, not only its mean, vanishes at the optimum as dt -> 0: the bracket is then the log-ratio of policy and reference.

Fixed point: the optimum of E R - beta path KL, the law p_ref exp(R / beta) / Z when the noise is memoryless; exact on
the grid from the policy's own paths, otherwise up to V's curvature within a step.
Sources: Jia & Zhou 2023 (arXiv 2207.00713); Gao, Zha & Zhou 2024 (arXiv 2409.04832).
Departs from them: no entropy in the objective (their temperature to 0; the KL is the regulariser), so exploration is the
behaviour's, not the policy's; V is fitted first, by many steps; the noise as part of the action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.advantage import gae, returns_to_go
from ..control.transitions import Batch, Paths
from ..dynamics import girsanov
from ..support.errors import SettingError
from ..support.settings import setting
from ..types import Metrics
from .base import Rule


@dataclass
class QLearning(Rule):
    """Settings of the rule: regress_on, see the top of this file; trace, by which later deltas count, per unit time."""

    defaults: ClassVar[Mapping[str, Any]] = {"minibatch_size": 1024}
    search: ClassVar[Mapping[str, Any]] = {"trace": (0.5, 1.0, "linear")}
    fits_value = True
    off_policy = True

    regress_on: Literal["action", "action_and_noise"] = setting(
        "action_and_noise",
        "What q is fitted on: the action alone (needs exploration), or with the path's noise as a part of it",
    )
    trace: float = setting(1.0, "Lambda per unit time: how much later increments of the martingale count", 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic is not None and self.critic.fitter.loss != "martingale":
            raise SettingError(f"value_loss is {self.critic.fitter.loss!r}; q_learning's V is a mean: use martingale.")

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Batch:
        """Fit V; target = the action w_a (with its noise), advantage = V_{k+1} - V_k + later deltas."""
        assert self.critic is not None
        path, keep, batch = paths.trajectory, paths.acting, paths.batch
        shift = self._exploration(batch).reshape(batch.steps, *path.controls.shape[1:])
        actions, policy = path.controls.clone(), path.controls.clone()
        policy[keep] = policy[keep] + shift
        if self.regress_on == "action_and_noise":
            actions[keep] = actions[keep] + path.noise[keep]
        brackets = torch.stack(
            [self.kl_weight * girsanov.log_ratio(w, a) for w, a in zip(policy, actions, strict=True)]
        )
        returns = returns_to_go(paths.rewards, brackets)
        fit = self.critic.fit(paths, returns, generator, rate)
        values, explained = self.critic.values(paths, returns)
        self.metrics = fit | explained
        advantages = gae(values, torch.zeros_like(brackets), brackets, path.ts, self.trace)
        return replace(batch, advantage=paths.rows(advantages), target=paths.rows(actions))

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """|delta|^2 / (2 beta), summed over a path's steps, mean over paths."""
        shift = self.shift(batch)
        delta = batch.advantage - self.kl_weight * girsanov.log_ratio(batch.control + shift, batch.target)
        loss = batch.steps * (delta**2).mean() / (2 * self.kl_weight)
        return loss, {
            "q/delta": float((delta.detach() ** 2).mean().sqrt()),
            "policy/kl_to_behaviour": float(batch.steps * girsanov.kl(shift.detach()).mean()),
        }

    def _exploration(self, batch: Batch) -> Tensor:
        """w - w_a, [M, *D]: how far the policy is from what was done."""
        shift = self.shift_in_parts(batch)
        if self.regress_on == "action" and float(shift.abs().max()) < 1e-4:
            raise SettingError(
                "no action differs from the policy's, so regress_on action learns nothing; set exploration to gaussian, "
                "or regress_on to action_and_noise."
            )
        return shift


RULES = {"q_learning": QLearning}
