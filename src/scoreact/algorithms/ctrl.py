"""`ctrl`: actor-critic on the SDE, the score as the action. The default rule.

    grad J = E sum_k [ grad w_k . (h_k - beta w_k)  +  grad log_ratio_k (A_k - h_k . z_k) ]

w_k = u sqrt(dt) is the control of step k in units of its noise z_k. The cost beta |w|^2 / 2 is paid by the action: its
gradient is taken directly. A_k = V_{k+1} - V_k - later costs is the advantage. h_k, any function of the state, is a control
variate: its part of the advantage is known and enters as a direct force. Two candidates are weighed per step by least
squares: beta w_k (exact at the optimum) and S grad V (exact when V is). What is left goes under a clipped Girsanov ratio.
Later costs are counted as sampled log-ratios, which makes the return constant along every path at the optimum.

Sources: Zhao et al. 2025 (Score as Action), Zhao, Tang & Yao 2023 (CPO, arXiv 2305.18901), Schulman et al. 2017 (clip).
Departs from the paper: control variates, the direct gradient of the cost. The variant of the authors' published code
(value differences standardised per step, no cost) is `advantage="standardised_value_differences"`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import girsanov
from ..advantage import control_variate, explained_variance, gae, returns_to_go, standardised_per_step
from ..policy import Policy
from ..rollout import Trajectory, step_of
from ..sde import SDE
from ..solvers import Solver
from ..types import Metrics
from ..value import Sample, ValueFit
from . import Batch, flatten, noisy_steps, shift_of, states

ADVANTAGES = ("gae", "standardised_value_differences")


@dataclass
class CTRL:
    """Settings of the rule.

    kl_weight: beta. clip_range: per square root of unit time, the ratio of a step of length dt is clipped at
    1 +- clip_range sqrt(dt). trace: GAE's lambda per unit time. ratio_weight: weight of the ratio term, 1 the unbiased
    gradient; in high dimension its noise grows with the dimension, and less (down to 0, the pathwise rule) learns faster.
    trust: weight of the squared distance to the behaviour policy, in units of kl_weight.
    """

    policy: Policy
    sde: SDE
    solver: Solver
    value: ValueFit
    kl_weight: float = 1.0
    clip_range: float = 1.0
    trace: float = 1.0
    ratio_weight: float = 1.0
    trust: float = 0.0
    advantage: str = "gae"
    metrics: Metrics = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kl_weight <= 0:
            raise ValueError(f"kl_weight must be positive, got {self.kl_weight}.")
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"unknown advantage {self.advantage!r}. Known: {', '.join(ADVANTAGES)}.")

    def prepare(self, trajectory: Trajectory, rewards: Tensor, generator: torch.Generator, rate: float) -> Batch:
        """Fit V to the returns, then advantages [N, B] and forces h [N, B, *D]."""
        beta, keep = self.kl_weight, noisy_steps(trajectory)
        costs = torch.stack([beta * girsanov.kl(w) for w in trajectory.controls])
        sampled = torch.stack(
            [beta * girsanov.stochastic_cost(w, z) for w, z in zip(trajectory.controls, trajectory.noise, strict=True)]
        )
        returns = returns_to_go(rewards, sampled)
        values, forces, fit = value_and_force(self, trajectory, returns, keep, generator, rate)
        values[-1] = rewards
        if self.advantage == "standardised_value_differences":
            advantages = standardised_per_step(values[1:] - values[:-1])
            forces = torch.zeros_like(forces)
        else:
            advantages = gae(values, costs, sampled, trajectory.ts, self.trace)
            own = beta * trajectory.controls
            candidates = torch.stack([(force * trajectory.noise).flatten(2).sum(2) for force in (own, forces)], dim=1)
            weights = control_variate(advantages, candidates)
            fit["policy/value_force"] = float(weights[keep, 1].mean())
            shape = (-1, *[1] * (forces.ndim - 1))
            forces = weights[:, 0].reshape(shape) * own + weights[:, 1].reshape(shape) * forces
            advantages = advantages - (forces * trajectory.noise).flatten(2).sum(2)
            advantages = advantages - advantages.mean(1, keepdim=True)
        self.metrics = fit
        return flatten(trajectory, advantages, forces / beta, keep)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """beta / 2 |w - h / beta|^2 - clipped ratio x advantage, summed over a path's steps, mean over paths."""
        shift = shift_of(self.policy, self.sde, self.solver, batch)
        log_ratio = girsanov.log_ratio(shift, batch.noise)
        ratio = log_ratio.exp()
        clip = (self.clip_range * (batch.t1 - batch.t0).sqrt()).clamp(max=0.99)
        clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
        surrogate = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
        moved = girsanov.kl(shift)
        if self.advantage == "standardised_value_differences":
            force = self.kl_weight * girsanov.kl(batch.control + shift)
        else:
            force = self.kl_weight * girsanov.kl(batch.control + shift - batch.target)
        loss = batch.steps * (force - self.ratio_weight * surrogate + self.trust * self.kl_weight * moved).mean()
        return loss, {
            "policy/clip_fraction": float(((ratio - 1).abs() > clip).float().mean()),
            "policy/ratio_deviation": float((ratio - 1).abs().max()),
            "policy/kl_to_behaviour": float(batch.steps * moved.mean()),
        }


def value_and_force(
    rule: CTRL, trajectory: Trajectory, returns: Tensor, keep: Tensor, generator: torch.Generator, rate: float
) -> tuple[Tensor, Tensor, Metrics]:
    """Fit the value; V at the states [N + 1, B] and S grad V (beta times the pathwise control) [N, B, *D].

    The force is the shift that the optimal action s_ref + (g^2 / gain) grad V / beta makes in the solver's own kernel.
    """
    t, x, condition = states(trajectory, keep)
    b, shape = trajectory.xs.shape[1], trajectory.xs.shape[2:]
    with torch.no_grad():
        reference = rule.policy.reference_score(t, x, condition)
        features = rule.value.value.features(t, x, condition, reference)
    targets = returns[keep].flatten()
    rule.value.add(Sample(t, features, targets, condition))
    metrics = rule.value.fit(generator, rate)
    chunks = torch.arange(len(t), device=t.device).split(1024)  # bounds the memory of the gradient's graph
    pairs = [rule.value.value.gradient(t[i], x[i], condition[i]) for i in chunks]
    value = torch.cat([v for v, _ in pairs])
    gradient = torch.cat([g for _, g in pairs])
    action = rule.sde.optimal_action(t, reference, gradient, rule.kl_weight)
    t1 = trajectory.ts[keep + 1].repeat_interleave(b)
    base = step_of(rule.sde, rule.solver, reference, t, t1, x)
    force = rule.kl_weight * step_of(rule.sde, rule.solver, action, t, t1, x).shift(base)
    values = returns.clone()
    values[keep] = value.reshape(len(keep), b)
    forces = torch.zeros_like(trajectory.controls)
    forces[keep] = force.reshape(len(keep), b, *shape)
    metrics["value/explained_variance"] = explained_variance(value, targets)
    metrics["value/mean"] = float(value.mean())
    return values, forces, metrics
