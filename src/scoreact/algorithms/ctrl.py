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

from ..control.advantage import believed, control_variate, gae, returns_to_go, slope, standardised_per_step
from ..control.trajectory import Trajectory
from ..control.transitions import Batch, acting_steps, chunks, flatten, in_parts, sampled_costs, states
from ..control.value_fit import Sample
from ..dynamics import girsanov
from ..dynamics.solvers import step_of
from ..support import distributed
from ..support.settings import setting
from ..types import Condition, Metrics, expand
from .base import Rule
from .surrogate import surrogate


@dataclass
class CTRL(Rule):
    """Settings of the rule.

    kl_weight: beta. clip_range: per square root of unit time, the ratio of a step of length dt is clipped at
    1 +- clip_range sqrt(dt). trace: GAE's lambda per unit time. ratio_weight: weight of the ratio term, 1 the unbiased
    gradient; its noise grows with the dimension, and less (down to 0, the pathwise rule) learns faster there.
    trust: weight of the squared distance to the behaviour policy, in units of kl_weight.
    gradient_at: where the force S grad V is taken. "next": at (t_{k+1}, x'), x' drawn from the step's kernel: its mean is
    the kernel's exact policy gradient on any grid. "state": at (t_k, x_k), the continuous-time form.
    reuse_reference: the first iteration is then on-policy without a rollout; later ones are off it, under the clipped ratio.
    """

    search: ClassVar[Mapping[str, Any]] = {
        "ratio_weight": (0.1, 1.0, "log"), "clip_range": (0.3, 3.0, "log"), "reuse_reference": [0, 1],
    }  # fmt: skip
    critic = True

    clip_range: float = setting(1.0, "ratio clipping, per square root of unit time", 0, above=True)
    trace: float = setting(1.0, "GAE's lambda per unit time", 0, 1)
    ratio_weight: float = setting(1.0, "weight of the ratio term beside the value's gradient", 0)
    trust: float = setting(0.0, "weight of the squared distance to the behaviour policy, in units of kl_weight", 0)
    advantage: Literal["gae", "standardised_value_differences"] = setting(
        "gae", "the advantage; the second is the authors' published code"
    )
    gradient_at: Literal["state", "next"] = setting(
        "next", "where the value's gradient is taken: where the step leads (exact on any grid), or where it begins"
    )
    reuse_reference: int = setting(
        0, "first iterations that learn from the reference's own paths, not new ones; at most reference_batches", 0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight <= 0:
            raise ValueError(f"kl_weight must be positive, got {self.kl_weight}.")

    def prepare(self, trajectory: Trajectory, rewards: Tensor, generator: torch.Generator, rate: float) -> Batch:
        """Fit V to the returns, then advantages [N, B] and forces h [N, B, *D]."""
        beta, keep = self.kl_weight, acting_steps(trajectory)
        costs = torch.stack([beta * girsanov.kl(w) for w in trajectory.controls])
        sampled = sampled_costs(trajectory, beta)
        returns = returns_to_go(rewards, sampled)
        fit = fit_value(self, trajectory, returns, keep, generator, rate, self.gradient_at == "next")
        at_states, explained = fitted_value(self, returns[keep])
        fit |= explained
        batch = flatten(trajectory, keep)
        values, forces = returns.clone(), torch.zeros_like(trajectory.controls)
        values[keep] = at_states
        if self.advantage == "standardised_value_differences":
            advantages = standardised_per_step(values[1:] - values[:-1])
        else:
            # "next" at another draw than the path's own: h must not know the noise that it is multiplied with
            noise = batch.noise
            if self.gradient_at == "next":
                noise = torch.randn(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)
            force = pathwise_force(self, batch, trajectory.references[keep].flatten(0, 1), noise)
            forces[keep] = force.reshape(len(keep), *forces.shape[1:])
            advantages = gae(values, costs, sampled, trajectory.ts, self.trace)
            own = beta * trajectory.controls
            candidates = torch.stack([(force * trajectory.noise).flatten(2).sum(2) for force in (own, forces)], dim=1)
            # least squares on few paths are noise: beyond 1 only as far as the returns say so at all states together
            most = torch.tensor([1.0, max(1.0, believed(fit))], device=candidates.device)
            weights = control_variate(advantages, candidates, most)
            fit["policy/value_force"] = float(weights[keep, 1].mean())
            shape = (-1, *[1] * (forces.ndim - 1))
            forces = weights[:, 0].reshape(shape) * own + weights[:, 1].reshape(shape) * forces
            known = (forces * trajectory.noise).flatten(2).sum(2)  # of each step's noise; later ones have mean zero too
            advantages = gae(values, costs, costs + known, trajectory.ts, self.trace) - known
            advantages = advantages - advantages.mean(1, keepdim=True)
        self.metrics = fit
        return replace(batch, advantage=advantages[keep].flatten(), target=(forces[keep] / beta).flatten(0, 1))

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


def fit_value(
    rule: Rule,
    trajectory: Trajectory,
    returns: Tensor,
    keep: Tensor,
    generator: torch.Generator,
    rate: float,
    end: bool = False,
) -> Metrics:
    """Fit V to the returns [N + 1, B] at the states before the steps `keep`, which become the newest of its memory.

    end: fit it to the state after the last of these steps too, where a force "next" asks for its gradient.
    """
    fitted = torch.cat([keep, keep[-1:] + 1]) if end else keep
    t, x, condition = states(trajectory, fitted)
    known = fitted[fitted < len(trajectory.references)]
    references = trajectory.references[known].flatten(0, 1)
    assert rule.value is not None
    value = rule.value.value
    with torch.no_grad():
        if len(known) < len(fitted):  # the path's end, where nobody has asked the reference yet
            last = torch.arange(len(references), len(t), device=t.device)
            references = torch.cat([references, rule.policy.reference_score(t[last], x[last], condition[last])])
        features = value.inputs_at(t, x, condition, references)
        later = (returns[-1] - returns[fitted]).flatten()
        rule.value.add(Sample(t, features, returns[fitted].flatten(), condition, later))
    return rule.value.fit(generator, rate)


@torch.no_grad()
def fitted_value(rule: Rule, returns: Tensor) -> tuple[Tensor, Metrics]:
    """V after `fit_value` at the same states, [K, B] as their returns, and what it says of these."""
    assert rule.value is not None
    # the path's end, where it is fitted too, comes after these rows
    rows = torch.arange(returns.numel(), device=returns.device)
    values = torch.cat([rule.value.values_at(-1, part) for part in chunks(rows)])
    paths = rows.remainder(returns.shape[1]) + distributed.rank() * returns.shape[1]
    found = slope(*(distributed.gathered(each.flatten()).cpu() for each in (values, returns, paths)))
    return values.reshape(returns.shape), found


def pathwise_force(rule: CTRL, batch: Batch, reference: Tensor, noise: Tensor, shift: Tensor | None = None) -> Tensor:
    """The force S grad V [M, *D] (kl_weight times the pathwise control) on a batch's steps.

    "state": the shift that the optimal action s_ref + (g^2 / gain) grad V / beta makes in the solver's own kernel, with
    reference [M, *D] the pretrained scores there. "next": S grad V where the step leads with `noise` [M, *D]; on paths that
    others drew, shift [M, *D] says where the policy itself would lead: the fixed point is then the optimal kernel there too.
    """
    if rule.gradient_at == "next":
        std = expand(batch.std, noise)
        moved = noise if shift is None else noise + shift
        return std * gradients(rule, batch.t1, batch.mean + std * moved, batch.condition)
    gradient = gradients(rule, batch.t0, batch.x, batch.condition)
    action = rule.sde.optimal_action(batch.t0, reference, gradient, rule.kl_weight)
    base, best = (step_of(rule.sde, rule.solver, s, batch.t0, batch.t1, batch.x) for s in (reference, action))
    return rule.kl_weight * best.shift(base)


def gradients(rule: CTRL, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
    """grad_x V [M, *D] at any number of states."""
    assert rule.value is not None
    value = rule.value.value
    return in_parts(lambda *states: value.gradient(*states)[1], t, x, condition)


RULES = {"ctrl": CTRL}
