"""`ctrl`: actor-critic on the SDE, the score as the action. The default rule.

    grad J = E sum_k [ grad w_k . (h_k - beta w_k)  +  grad log_ratio_k (A_k - h_k . z_k) ]

w_k = u sqrt(dt) is the control of step k in units of its noise z_k. The cost beta |w|^2 / 2 is paid by the action: its
gradient is taken directly. A_k = V_{k+1} - V_k - later costs is the advantage. h_k, anything that does not know z_k, is a
control variate: its part of the advantage is known and enters as a direct force. Two candidates are weighed per step by
least squares: beta w_k (exact at the optimum) and S grad V (exact when V is). What is left goes under a clipped Girsanov
ratio. Later costs are counted as sampled log-ratios, which makes the return constant along every path at the optimum.

Sources: Zhao et al. 2025 (Score as Action), Zhao, Tang & Yao 2023 (CPO, arXiv 2305.18901), Schulman et al. 2017 (clip).
Departs from the paper: control variates, the direct gradient of the cost. The variant of the authors' published code
(value differences standardised per step, no cost) is `advantage="standardised_value_differences"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.advantage import believed, control_variate, gae, returns_to_go, standardised_per_step
from ..control.transitions import Batch, Paths
from ..dynamics import girsanov
from ..support.errors import SettingError
from ..support.settings import Above, setting
from ..types import Metrics
from .base import Rule
from .surrogate import surrogate


@dataclass
class ControlRule(Rule):
    """What `ctrl`, `ctrl_trpo` and `ctrl_pathwise` share: a value, its force S grad V, and these settings.

    kl_weight: beta. trust: weight of the squared distance to the behaviour policy, in units of kl_weight.
    gradient_at: where the force is taken. "next": at (t_{k+1}, x'), x' drawn from the step's kernel: its mean is the
    kernel's exact policy gradient on any grid. "state": at (t_k, x_k), the continuous-time form.
    reuse_reference: the first iteration is then on-policy without a rollout; later ones are off it.
    """

    fits_value = True
    off_policy = True

    trust: float = setting(
        0.0, "Weight of the squared distance to the policy that drew the paths, in units of kl_weight", 0
    )
    gradient_at: Literal["state", "next"] = setting(
        "next", "Where the value's gradient is taken: where a step leads (exact on any grid), or where it begins"
    )
    reuse_reference: int = setting(
        0, "Number of first iterations that learn from the reference's paths; at most reference_batches", 0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight <= 0:
            raise SettingError(f"kl_weight must be positive, got {self.kl_weight}.")


@dataclass
class CTRL(ControlRule):
    """Settings of the rule.

    clip_range: per square root of unit time, the ratio of a step of length dt is clipped at 1 +- clip_range sqrt(dt).
    trace: GAE's lambda per unit time. ratio_weight: weight of the ratio term, 1 the unbiased gradient; its noise grows
    with the dimension, and less (down to 0, the pathwise rule) learns faster there.
    """

    search: ClassVar[Mapping[str, Any]] = {
        "ratio_weight": (0.1, 1.0, "log"), "clip_range": (0.3, 3.0, "log"), "reuse_reference": [0, 1],
    }  # fmt: skip
    clip_range: float = setting(
        1.0,
        "Distance from 1 at which a step's ratio is clipped, per square root of unit time",
        0,
        above=True,
        needs={"ratio_weight": Above(0)},
    )
    trace: float = setting(
        1.0, "Lambda of generalised advantage estimation (GAE), per unit time", 0, 1, needs={"advantage": ("gae",)}
    )
    ratio_weight: float = setting(1.0, "Weight of the ratio term beside the value's gradient; 1 is unbiased", 0)
    advantage: Literal["gae", "standardised_value_differences"] = setting(
        "gae", "How an action's advantage is estimated; the second is the authors' published code"
    )

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Batch:
        """Fit V to the returns, then advantages [N, B] and forces h [N, B, *D]."""
        critic, path, beta = self.critic, paths.trajectory, self.kl_weight
        assert critic is not None
        costs, sampled = paths.costs(beta), paths.sampled_costs(beta)
        returns = returns_to_go(paths.rewards, sampled)
        fit = critic.fit(paths, returns, generator, rate, end=self.gradient_at == "next")
        values, explained = critic.values(paths, returns)
        fit |= explained
        batch, forces = paths.batch, torch.zeros_like(path.controls)
        if self.advantage == "standardised_value_differences":
            advantages = standardised_per_step(values[1:] - values[:-1])
        else:
            if self.gradient_at == "next":
                # at another draw than the path's own: h must not know the noise that it is multiplied with
                z = batch.noise
                other = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
                force = critic.force_after(batch, other)
            else:
                force = critic.force_at(batch, paths.rows(path.references))
            forces[paths.acting] = force.reshape(batch.steps, *forces.shape[1:])
            advantages = gae(values, costs, sampled, path.ts, self.trace)
            own = beta * path.controls
            candidates = torch.stack([(force * path.noise).flatten(2).sum(2) for force in (own, forces)], dim=1)
            # least squares on few paths are noise: beyond 1 only as far as the returns say so at all states together
            most = torch.tensor([1.0, max(1.0, believed(fit))], device=candidates.device)
            weights = control_variate(advantages, candidates, most)
            fit["policy/value_force"] = float(weights[paths.acting, 1].mean())
            shape = (-1, *[1] * (forces.ndim - 1))
            forces = weights[:, 0].reshape(shape) * own + weights[:, 1].reshape(shape) * forces
            known = (forces * path.noise).flatten(2).sum(2)  # of each step's noise; later ones have mean zero too
            advantages = gae(values, costs, costs + known, path.ts, self.trace) - known
            advantages = advantages - advantages.mean(1, keepdim=True)
        self.metrics = fit
        return replace(batch, advantage=paths.rows(advantages), target=paths.rows(forces) / beta)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """beta / 2 |w - h / beta|^2 - clipped ratio x advantage, summed over a path's steps, mean over paths."""
        shift = self.shift(batch)
        gain, metrics = surrogate(girsanov.log_ratio(shift, batch.noise), batch, self.clip_range)
        moved = girsanov.kl(shift)
        if self.advantage == "standardised_value_differences":
            force = self.kl_weight * girsanov.kl(batch.control + shift)
        else:
            force = self.kl_weight * girsanov.kl(batch.control + shift - batch.target)
        loss = batch.steps * (force - self.ratio_weight * gain + self.trust * self.kl_weight * moved).mean()
        return loss, {**metrics, "policy/kl_to_behaviour": float(batch.steps * moved.detach().mean())}


RULES = {"ctrl": CTRL}
