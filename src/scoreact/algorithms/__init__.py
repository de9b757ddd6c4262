"""Update rules. Each is two functions: `prepare` (a trajectory and rewards -> a batch) and `loss` (a minibatch).

One file a rule. A rule knows policies, values and advantages; it does not know optimisers, devices or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from ..policy import Policy
from ..rollout import Trajectory, step_of
from ..sde import SDE
from ..solvers import Solver
from ..types import Condition, Metrics, expand
from ..value import ValueFit


@dataclass(frozen=True)
class Batch:
    """Transitions of a batch of paths, flattened: M = steps with noise x paths. All a `loss` may look at."""

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
    steps: int  # noisy steps a path: a sum over a path is `steps` times the mean over transitions

    def __len__(self) -> int:
        return len(self.t0)

    def __getitem__(self, index: Tensor) -> Batch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {name: v[index] for name, v in values.items() if isinstance(v, Tensor | Condition)}
        return Batch(**{**values, **rows})

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Every transition once, in random order, `size` at a time (the last may be smaller)."""
        order = torch.randperm(len(self), generator=generator, device=self.t0.device)
        for index in torch.split(order, size):
            yield self[index]


class Algorithm(Protocol):
    """What the trainer needs of a rule."""

    value: ValueFit
    metrics: Metrics  # of the last `prepare`

    def prepare(self, trajectory: Trajectory, rewards: Tensor, generator: torch.Generator, rate: float) -> Batch:
        """Fit the value, compute advantages and targets. rewards [B]; `rate` in (0, 1] scales learning rates."""
        ...

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss of a minibatch (to be minimised) and what to report."""
        ...


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
