"""`ctrl_pathwise`: no ratio; the score is regressed to s_ref + (g^2 / gain) grad_x V / beta at visited states.

    loss = sum_k beta / 2 |w_k - S grad V / beta|^2 + trust |w_k - w_behaviour|^2

Needs only states, so any solver may have produced them. With the `soft` value loss V is the optimal value whatever
policy drew the paths, and the regression's target is the optimum at once.
Sources: Zhao et al. 2025 (Score as Action, policy gradient with the score's gradient), Tang 2024 (arXiv 2403.06279).
Departs from it: a trust region; the multiplier `force`, which is measured. The variant of the authors' published code
(value gradient times displacement, both clamped, no regulariser) is `form="clamped_displacement"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.advantage import believed, returns_to_go
from ..control.transitions import Batch, Paths, has_moved
from ..dynamics import girsanov
from ..dynamics.solvers import step_of
from ..support.settings import setting
from ..types import Metrics, expand, sum_over_data
from .ctrl import ControlRule

CLAMPED = {"form": ("clamped_displacement",)}


@dataclass
class CTRLPathwise(ControlRule):
    """Settings of the rule.

    transitions: at how many states a rollout to take the value's gradient and regress; 0 is all.
    force: 1 is the rule at its fixed point. Far from it following the optimal value's gradient brings more at once than that
    value says, and a value fitted on few samples is shrunk: 0 takes the slope of the returns on V, which becomes 1.
    displacement_clamp, loss_clamp: of the published variant, with the values of its code.
    """

    search: ClassVar[Mapping[str, Any]] = {
        "force": [0.0, 1.0, 2.0, 4.0], "transitions": [0, 200], "reuse_reference": [0, 2], "value_loss": ["soft"],
    }  # fmt: skip

    form: Literal["regression", "clamped_displacement"] = setting(
        "regression", "The loss; the second is the authors' published code"
    )
    transitions: int = setting(0, "Number of states of a rollout at which the score is regressed; 0: all of them", 0)
    force: float = setting(
        0.0,
        "Multiplier of the value's gradient; 0: the slope of the returns on the value, measured in each iteration",
        0,
    )
    displacement_clamp: float = setting(
        0.1, "Largest displacement of a number of the state that the loss counts", 0, above=True, needs=CLAMPED
    )
    loss_clamp: float = setting(1.0, "Largest loss of a step, either way", 0, above=True, needs=CLAMPED)

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Batch:
        """Fit V to the returns; the controls to regress to, at `transitions` random states of the paths."""
        critic = self.critic
        assert critic is not None
        returns = returns_to_go(paths.rewards, paths.sampled_costs(self.kl_weight))
        first = not critic.fitter.fitted
        self.metrics = critic.fit(paths, returns, generator, rate, end=self.gradient_at == "next")
        # the newest paths, the policy's own unless `reuse_reference`; at first, when it still is the reference, all of them
        self.metrics |= critic.fitter.slope_of_newest(len(critic.fitter.memory) if first else 1, generator)
        order = torch.randperm(len(paths.batch), generator=generator, device=paths.batch.t0.device)
        chosen = order[: self.transitions or len(order)]
        batch = paths.batch[chosen]
        if self.gradient_at == "next":
            # only on paths that others drew: the reference's, after the first step
            others = self.reuse_reference and has_moved(self.shift, batch)
            shift = self.shift_in_parts(batch) if others else None
            force = critic.force_after(batch, batch.noise, shift)
        else:
            force = critic.force_at(batch, paths.rows(paths.trajectory.references)[chosen])
        measured = believed(self.metrics) if self.form == "regression" else 1.0
        self.metrics["policy/force"] = gain = self.force or measured
        return replace(batch, target=gain * force / self.kl_weight)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """beta / 2 |w - w_target|^2, summed over a path's steps, mean over paths."""
        shift = self.shift(batch)
        moved = girsanov.kl(shift)
        if self.form == "clamped_displacement":
            force = -self._clamped(batch, shift)
        else:
            force = self.kl_weight * girsanov.kl(batch.control + shift - batch.target)
        loss = batch.steps * (force + self.trust * self.kl_weight * moved).mean()
        return loss, {"policy/kl_to_behaviour": float(batch.steps * moved.detach().mean())}

    def _clamped(self, batch: Batch, shift: Tensor) -> Tensor:
        """clamp(<grad V, clamp(x' - x, +-0.1)>, +-1) with x' the policy's next state under the step's own noise."""
        score = self.policy.score(batch.t0, batch.x, batch.condition)
        step = step_of(self.sde, self.solver, score, batch.t0, batch.t1, batch.x)
        displacement = (step.sample(batch.noise) - batch.x).clamp(-self.displacement_clamp, self.displacement_clamp)
        gradient = self.kl_weight * batch.target / expand(batch.std, batch.target)
        return sum_over_data(gradient * displacement).clamp(-self.loss_clamp, self.loss_clamp)


RULES = {"ctrl_pathwise": CTRLPathwise}
