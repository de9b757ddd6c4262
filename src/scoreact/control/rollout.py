"""Rollouts: paths of the controlled SDE with everything an update rule needs to replay them.

The only place where gradients are off while the policy acts, and where the SDE's own noise is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..dynamics.sde import SDE, noise_level
from ..dynamics.solvers import Solver, _constant, step_of
from ..support.errors import SettingError
from ..types import Condition
from .policy import Policy
from .trajectory import Trajectory

# exploration: (t [B], x, policy score, reference score, generator) -> the score acted with, [B, *D]
Exploration = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], Tensor]


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
    by_ode = [False] * (len(ts) - 1) if stochastic is None else (~stochastic).tolist()
    for t0, t1, drawn_by_ode, noisy in zip(
        ts[:-1].tolist(), ts[1:].tolist(), by_ode, _noisy(sde, solver, ts, x), strict=True
    ):
        begin, end = x.new_full((batch,), t0), x.new_full((batch,), t1)
        kernel, noisy = (ode, False) if drawn_by_ode else (sde, noisy)
        own = not reference_only and t0 < policy.act_until and (noisy or drawn_by_ode)
        acts.append(noisy and t0 < policy.act_until)
        if own and not with_reference:
            reference = torch.full_like(x, math.nan)
        else:
            reference = policy.reference_score(begin, x, condition)
        action, control = reference, torch.zeros_like(x)
        if own:
            action = policy.score(begin, x, condition)
            if exploration is not None and noisy:
                action = exploration(begin, x, action, reference, generator)
        step = solver(kernel, _constant(action), begin, end, x)
        if own and noisy:
            control = step.shift(solver(kernel, _constant(reference), begin, end, x)) if with_reference else reference
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if not noisy:
            noise = torch.zeros_like(noise)
        x = step.sample(noise)
        for record, value in zip(
            records,
            (x, action, reference, step.mean, control, noise, step.std[0]),
            strict=True,
        ):
            record.append(value)
    xs, actions, references, means, controls, noises, std = (torch.stack(record) for record in records)
    acting = torch.tensor(acts, device=x.device)
    return Trajectory(ts, xs, actions, references, means, controls, noises, std, acting, condition)


def _noisy(sde: SDE, solver: Solver, ts: Tensor, x: Tensor) -> list[bool]:
    """Whether the step from each time to the next one has noise, which no state and no score decides."""
    rows = x[:1].expand(len(ts) - 1, *x.shape[1:])
    found: list[bool] = (step_of(sde, solver, rows, ts[:-1], ts[1:], rows).std > 0).tolist()
    return found


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
        raise SettingError(f"epsilon must lie in [0, 1], got {epsilon}.")

    def explore(t: Tensor, x: Tensor, score: Tensor, reference: Tensor, generator: torch.Generator) -> Tensor:
        coin = torch.rand(len(x), generator=generator, device=x.device) < epsilon
        return torch.where(coin.reshape(-1, *[1] * (x.ndim - 1)), reference, score)

    return explore
