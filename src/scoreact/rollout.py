"""Rollouts: paths of the controlled SDE with everything an update rule needs to replay them.

The only place where gradients are off while the policy acts, and where the SDE's own noise is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import girsanov
from .policy import Policy
from .sde import SDE, noise_level
from .solvers import Solver, Transition
from .types import Condition

# exploration: (t [B], x, policy score, reference score, generator) -> the score acted with, [B, *D]
Exploration = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """B paths of N steps. A step without noise (std 0) or after the policy's `act_until` is the reference's, at no cost."""

    ts: Tensor  # [N+1]
    xs: Tensor  # [N+1, B, *D]
    actions: Tensor  # [N, B, *D] the scores acted with
    references: Tensor  # [N, B, *D] the pretrained model's scores there
    means: Tensor  # [N, B, *D] the behaviour's kernel means
    controls: Tensor  # [N, B, *D] (mean - reference mean) / std: u sqrt(dt)
    noise: Tensor  # [N, B, *D] standard normal
    std: Tensor  # [N] of the kernels
    acts: Tensor  # [N] bool: the policy's steps; in the others the reference acts and the control is zero
    condition: Condition

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "condition"}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], condition: Condition) -> Trajectory:
        """The inverse of `tensors` (other keys are ignored)."""
        return cls(condition=condition, **{f.name: tensors[f.name] for f in fields(cls) if f.name != "condition"})

    @classmethod
    def join(cls, parts: Sequence[Trajectory], condition: Condition) -> Trajectory:
        """Paths drawn one part after another on the same times, as those of the whole condition."""
        found = [part.tensors() for part in parts]
        joined = {k: torch.cat([f[k] for f in found], 1) if v.ndim > 1 else v for k, v in found[0].items()}
        return cls.of(joined, condition)

    def path_kl(self) -> Tensor:
        """1/2 sum |u|^2 dt of each path, [B], nats."""
        return torch.stack([girsanov.kl(u) for u in self.controls]).sum(0)

    def log_ratio_to_reference(self) -> Tensor:
        """log p_behaviour / p_reference of each path, [B], nats; its mean is the path KL."""
        pairs = zip(self.controls, self.noise, strict=True)
        return torch.stack([girsanov.stochastic_cost(u, z) for u, z in pairs]).sum(0)


@torch.no_grad()
def rollout(
    policy: Policy,
    sde: SDE,
    solver: Solver,
    ts: Tensor,
    condition: Condition,
    generator: torch.Generator,
    exploration: Exploration | None = None,
    reference_only: bool = False,
    stochastic: Tensor | None = None,
    with_reference: bool = True,
) -> Trajectory:
    """Draw one path for each sample of the condition. ts [N+1] increasing; every random number is the generator's.

    reference_only: act by the reference (half the network calls; controls are zero). stochastic [N] bool: in the other
    steps the policy draws by its ODE; they are no actions, and no path KL counts them. with_reference False: do not ask
    the reference where the policy draws; references and controls are nan there.
    """
    ode = SDE(sde.schedule, noise_level(0.0))
    x = policy.reference.prior(condition, generator)
    ts = ts.to(x.device)
    batch = len(x)
    acts: list[bool] = []
    records: tuple[list[Tensor], ...] = ([x], [], [], [], [], [], [])  # in the order of the fields of Trajectory
    for k, (t0, t1) in enumerate(zip(ts[:-1].tolist(), ts[1:].tolist(), strict=True)):
        begin, end = x.new_full((batch,), t0), x.new_full((batch,), t1)
        drawn_by_ode = stochastic is not None and not bool(stochastic[k])
        kernel = ode if drawn_by_ode else sde
        std = step_of(kernel, solver, x, begin, end, x).std  # the same for every score
        noisy = float(std.max()) > 0
        own = not reference_only and t0 < policy.act_until and (noisy or drawn_by_ode)
        acts.append(noisy and t0 < policy.act_until)
        if own and not with_reference:
            reference = torch.full_like(x, math.nan)
        else:
            reference = policy.reference_score(begin, x, condition)
        base = solver(kernel, _constant(reference), begin, end, x)
        if own:
            action = policy.score(begin, x, condition)
            if exploration is not None and noisy:
                action = exploration(begin, x, action, reference, generator)
            step = solver(kernel, _constant(action), begin, end, x)
        else:
            action, step = reference, base
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if not noisy:
            noise = torch.zeros_like(noise)
        x = step.sample(noise)
        for record, value in zip(
            records,
            (x, action, reference, step.mean, step.shift(base), noise, step.std[0]),
            strict=True,
        ):
            record.append(value)
    xs, actions, references, means, controls, noises, std = (torch.stack(record) for record in records)
    acting = torch.tensor(acts, device=x.device)
    return Trajectory(ts, xs, actions, references, means, controls, noises, std, acting, condition)


def _constant(score: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A score already computed, as the score function of a one-evaluation solver."""
    return lambda t, x: score


def step_of(sde: SDE, solver: Solver, score: Tensor, t0: Tensor, t1: Tensor, x: Tensor) -> Transition:
    """The kernel of a one-evaluation solver for a score already computed at (t0 [B], x [B, *D])."""
    return solver(sde, _constant(score), t0, t1, x)


# --- exploration beyond the SDE's own noise ----------------------------------------------------------------------------


def gaussian_actions(scale: Callable[[Tensor], Tensor]) -> Exploration:
    """a = score + scale(t) xi with xi standard normal (Zhao et al. 2025, section 4)."""

    def explore(t: Tensor, x: Tensor, score: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
        xi = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return score + scale(t).reshape(-1, *[1] * (x.ndim - 1)) * xi

    return explore


def epsilon_greedy(epsilon: float) -> Exploration:
    """With probability epsilon a sample's step acts by the reference instead of the policy."""
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must lie in [0, 1], got {epsilon}.")

    def explore(t: Tensor, x: Tensor, score: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
        coin = torch.rand(len(x), generator=generator, device=x.device) < epsilon
        return torch.where(coin.reshape(-1, *[1] * (x.ndim - 1)), reference, score)

    return explore
