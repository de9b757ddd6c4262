"""Transitions: the rows that a loss looks at, flattened from paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from ..dynamics import girsanov
from ..dynamics.sde import SDE
from ..dynamics.solvers import Solver, step_of
from ..types import Condition, expand
from .policy import Policy
from .trajectory import Trajectory

CHUNK = 1024  # rows at a time outside of the loss: bounds the memory of a network call or a graph


@dataclass(frozen=True)
class Rows:
    """What a `loss` looks at: a field that is a tensor, a Condition or Rows has one row an item; others are shared."""

    def __len__(self) -> int:
        return len(next(v for v in vars(self).values() if isinstance(v, Tensor)))

    def __getitem__(self, index: Tensor) -> Self:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {name: v[index] for name, v in values.items() if isinstance(v, Tensor | Condition | Rows)}
        return type(self)(**{**values, **rows})

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Self]:
        """Every row once, in random order, `size` at a time (the last may be smaller)."""
        device = next(v for v in vars(self).values() if isinstance(v, Tensor)).device
        for index in torch.split(torch.randperm(len(self), generator=generator, device=device), size):
            yield self[index]


@dataclass(frozen=True)
class Batch(Rows):
    """Transitions of a batch of paths, flattened: M = acting steps x paths. What most rules look at."""

    t0: Tensor  # [M]
    t1: Tensor  # [M]
    x: Tensor  # [M, *D] state at t0
    noise: Tensor  # [M, *D] the step's standard normal
    mean: Tensor  # [M, *D] of the behaviour's kernel
    std: Tensor  # [M]
    control: Tensor  # [M, *D] behaviour against reference, in units of the noise (u sqrt(dt))
    advantage: Tensor  # [M]
    target: Tensor  # [M, *D] where a rule wants the control to be; what it means is the rule's
    condition: Condition
    steps: int  # acting steps a path: a sum over a path is `steps` times the mean over transitions


def chunks(rows: Tensor) -> Sequence[Tensor]:
    """Indices of the rows of a tensor, CHUNK at a time."""
    return torch.split(torch.arange(len(rows), device=rows.device), CHUNK)


@torch.no_grad()
def in_parts(
    function: Callable[[Tensor, Tensor, Condition], Tensor], t: Tensor, x: Tensor, condition: Condition
) -> Tensor:
    """function(t [M], x [M, ...], condition) -> [M, ...], a score or a value, without gradient at any number of states."""
    return torch.cat([function(t[i], x[i], condition[i]) for i in chunks(t)])


def flatten(trajectory: Trajectory, keep: Tensor) -> Batch:
    """The transitions of the steps named by `keep` (indices into the N steps), advantage and target zero."""
    n, b = len(keep), trajectory.xs.shape[1]
    t, x, condition = states(trajectory, keep)
    return Batch(
        t0=t,
        t1=trajectory.ts[keep + 1].repeat_interleave(b),
        x=x,
        noise=trajectory.noise[keep].flatten(0, 1),
        mean=trajectory.means[keep].flatten(0, 1),
        std=trajectory.std[keep].repeat_interleave(b),
        control=trajectory.controls[keep].flatten(0, 1),
        advantage=torch.zeros_like(t),
        target=torch.zeros_like(x),
        condition=condition,
        steps=n,
    )


def acting_steps(trajectory: Trajectory) -> Tensor:
    """Indices of the steps that are actions."""
    return torch.nonzero(trajectory.acts).flatten()


def sampled_costs(trajectory: Trajectory, kl_weight: float) -> Tensor:
    """Costs of the steps counted as sampled log-ratios to the reference, in units of the reward, [N, B]."""
    pairs = zip(trajectory.controls, trajectory.noise, strict=True)
    return torch.stack([kl_weight * girsanov.stochastic_cost(w, z) for w, z in pairs])


def states(trajectory: Trajectory, keep: Tensor) -> tuple[Tensor, Tensor, Condition]:
    """t [M], x [M, *D] and condition of the states before the named steps, flattened."""
    b = trajectory.xs.shape[1]
    t = trajectory.ts[keep].repeat_interleave(b)
    return t, trajectory.xs[keep].flatten(0, 1), trajectory.condition[torch.arange(b).repeat(len(keep))]


def shift_of(policy: Policy, sde: SDE, solver: Solver, batch: Batch) -> Tensor:
    """(policy's mean - behaviour's mean) / std at the batch's states, [M, *D]: d sqrt(dt), exactly 0 if unchanged."""
    score = policy.score(batch.t0, batch.x, batch.condition)
    mean = step_of(sde, solver, score, batch.t0, batch.t1, batch.x).mean
    return (mean - batch.mean) / expand(batch.std, mean)
