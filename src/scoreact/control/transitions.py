"""Transitions: the rows that a loss looks at, and the paths that they are flattened from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
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


@dataclass(frozen=True)
class Paths:
    """A batch of paths and their rewards, as a rule receives them: N steps of B paths, of which K act.

    The acting steps are flattened once, when they are first asked for: M = K B rows, step by step.
    """

    trajectory: Trajectory
    rewards: Tensor  # [B]

    @cached_property
    def acting(self) -> Tensor:
        """Indices [K] of the steps that are actions."""
        return torch.nonzero(self.trajectory.acts).flatten()

    @cached_property
    def batch(self) -> Batch:
        """The transitions of the acting steps, advantage and target zero."""
        return _rows(self.trajectory, self.acting, self._acting_states)

    @cached_property
    def _acting_states(self) -> tuple[Tensor, Tensor, Condition]:
        return _states(self.trajectory, self.acting)

    def states(self, steps: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """t [M], x [M, *D] and condition of the states before the named steps; step N is the path's end."""
        return self._acting_states if torch.equal(steps, self.acting) else _states(self.trajectory, steps)

    def rows(self, values: Tensor) -> Tensor:
        """What is known of each step of each path, [N, B, ...], for the rows of `batch`: [M, ...]."""
        return values[self.acting].flatten(0, 1)

    def costs(self, kl_weight: float) -> Tensor:
        """kl_weight times the path KL that each step pays, in units of the reward, [N, B]."""
        return torch.stack([kl_weight * girsanov.kl(w) for w in self.trajectory.controls])

    def sampled_costs(self, kl_weight: float) -> Tensor:
        """The same with each step's sampled log-ratio to the reference, whose mean is its KL, [N, B]."""
        pairs = zip(self.trajectory.controls, self.trajectory.noise, strict=True)
        return torch.stack([kl_weight * girsanov.stochastic_cost(w, z) for w, z in pairs])


def flatten(trajectory: Trajectory, steps: Tensor) -> Batch:
    """The transitions of the steps named by index (among the N), advantage and target zero. All that act: `Paths.batch`."""
    return _rows(trajectory, steps, _states(trajectory, steps))


def _states(trajectory: Trajectory, steps: Tensor) -> tuple[Tensor, Tensor, Condition]:
    b = trajectory.xs.shape[1]
    t = trajectory.ts[steps].repeat_interleave(b)
    return t, trajectory.xs[steps].flatten(0, 1), trajectory.condition[torch.arange(b).repeat(len(steps))]


def _rows(trajectory: Trajectory, steps: Tensor, states: tuple[Tensor, Tensor, Condition]) -> Batch:
    b, (t, x, condition) = trajectory.xs.shape[1], states
    return Batch(
        t0=t,
        t1=trajectory.ts[steps + 1].repeat_interleave(b),
        x=x,
        noise=trajectory.noise[steps].flatten(0, 1),
        mean=trajectory.means[steps].flatten(0, 1),
        std=trajectory.std[steps].repeat_interleave(b),
        control=trajectory.controls[steps].flatten(0, 1),
        advantage=torch.zeros_like(t),
        target=torch.zeros_like(x),
        condition=condition,
        steps=len(steps),
    )


def shift_of(policy: Policy, sde: SDE, solver: Solver, batch: Batch) -> Tensor:
    """(policy's mean - behaviour's mean) / std at the batch's states, [M, *D]: d sqrt(dt), exactly 0 if unchanged."""
    score = policy.score(batch.t0, batch.x, batch.condition)
    mean = step_of(sde, solver, score, batch.t0, batch.t1, batch.x).mean
    return (mean - batch.mean) / expand(batch.std, mean)


def has_moved(shift: Callable[[Batch], Tensor], batch: Batch) -> bool:
    """Whether a policy is no longer the behaviour: on fresh paths `shift` is 0 everywhere, and a few rows tell."""
    few = torch.linspace(0, len(batch) - 1, min(4, len(batch)), device=batch.t0.device).long()
    with torch.no_grad():
        return bool((shift(batch[few]).abs() > 1e-4).any())
