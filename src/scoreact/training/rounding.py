"""What rounding alone costs: the path KL that a network computing in bfloat16 or float16 charges for any change, however small.

Two forward passes that differ at all are rounded differently in every layer, and what comes out differs by the format's noise,
whatever the size of the change. That noise is part of the policy: its path KL is real, is paid on top of the change's own, and
grows with the number of latents, with guidance^2 and with the steps. Knows policies and paths; changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..control.policy import Policy
from ..control.rollout import rollout
from ..dynamics import girsanov
from ..dynamics.sde import SDE
from ..dynamics.solvers import Solver, step_of
from ..types import Condition


@torch.no_grad()
def rounding_kl(
    policy: Policy,
    sde: SDE,
    solver: Solver,
    ts: Tensor,
    condition: Condition,
    generator: torch.Generator,
    step: float,
) -> float:
    """Path KL (nats) that rounding costs a policy one optimiser step away from the reference, on the grid ts [N + 1].

    Every trainable weight moves by +step or -step at random, then by the opposite. With m+, m-, m0 the kernel's means of the
    two and of the unmoved policy, half of m+ + m- less m0 has no part that is linear in the change: what is left is rounding,
    the mean of two independent draws less a third, 3/4 of the mean square of the difference of two. States are the
    reference's. The weights are put back, and no network call is counted.
    """
    calls = policy.network_calls
    path = rollout(policy, sde, solver, ts, condition, generator, reference_only=True)
    weights = policy.trainable()
    before = [p.clone() for p in weights]
    signs = [torch.randint(0, 2, p.shape, generator=generator, device=generator.device).to(p) * 2 - 1 for p in weights]
    means = []
    for sign in (1.0, -1.0, 0.0):
        for p, start, direction in zip(weights, before, signs, strict=True):
            p.copy_(start + sign * step * direction)
        means.append([_mean(policy, sde, solver, path.ts, path.xs, k, condition) for k in range(len(path.noise))])
    total = 0.0
    for up, down, middle, std, acts in zip(*means, path.std, path.acts, strict=True):
        if bool(acts):
            total += float(girsanov.kl(((up + down) / 2 - middle) / std).mean())
    policy.network_calls = calls
    return total * 4 / 3


def _mean(policy: Policy, sde: SDE, solver: Solver, ts: Tensor, xs: Tensor, k: int, condition: Condition) -> Tensor:
    """Of the policy's kernel at step k of a path."""
    t0, t1 = ts[k].expand(len(condition)), ts[k + 1].expand(len(condition))
    return step_of(sde, solver, policy.score(t0, xs[k], condition), t0, t1, xs[k]).mean
