"""An ensemble of samples in numbers: statistics of each sample, and the path KL of the path that made it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..control.policy import Policy
from ..control.rollout import rollout
from ..dynamics.sde import SDE
from ..dynamics.solvers import Solver
from ..rewards.check import unchanged
from ..rewards.weighted_statistics import Statistic, columns_of
from ..sampling.draw import balanced
from ..support.files import read_stored, write_tensors
from ..types import Condition
from .evaluate import SAMPLES_AT_ONCE
from .optimum import mean_and_error


@dataclass(frozen=True)
class Ensemble:
    """Of n samples: columns, name -> [n] of each statistic; kl [n], nats, of each path; and their condition."""

    columns: dict[str, Tensor]
    kl: Tensor
    condition: Condition

    def values(self, names: Sequence[str]) -> Tensor:
        """[n, k] of these statistics."""
        return torch.stack([self.columns[name] for name in names], dim=1)

    def path_kl(self) -> tuple[float, float]:
        """Mean and standard error, nats."""
        return mean_and_error(self.kl)

    def write(self, path: Path) -> None:
        """All but what a model adds to the prompts."""
        about = {"columns": json.dumps(list(self.columns)), "prompts": json.dumps(list(self.condition.prompts))}
        write_tensors(path, {"values": self.values(list(self.columns)), "kl": self.kl}, about)

    @classmethod
    def read(cls, path: Path) -> Ensemble:
        """The inverse of `write`. Raises RunError for a damaged file."""
        tensors, about = read_stored(path)
        names = json.loads(about["columns"])
        columns = dict(zip(names, tensors["values"].unbind(1), strict=True))
        return cls(columns, tensors["kl"], Condition(json.loads(about["prompts"])))


@torch.no_grad()
def ensemble_of(
    policy: Policy, sde: SDE, solver: Solver, ts: Tensor, statistics: Sequence[Statistic], prompts: Sequence[str],
    samples: int, seed: int, device: torch.device,
) -> Ensemble:  # fmt: skip
    """Draw an ensemble as training does, every prompt equally often. Two policies get the same prompts and noise.

    Statistics are asked for `SAMPLES_AT_ONCE` samples at a time; of each sample by itself, they do not depend on that.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    names = balanced(prompts, samples, generator)
    parts: list[dict[str, Tensor]] = []
    kls: list[Tensor] = []
    for start in range(0, samples, SAMPLES_AT_ONCE):
        condition = policy.model.condition(names[start : start + SAMPLES_AT_ONCE])
        trajectory = rollout(policy, sde, solver, ts, condition, generator)
        decoded = policy.model.decode(trajectory.xs[-1])
        with unchanged("a statistic", decoded):
            found = [one(decoded, condition) for one in statistics]
        parts.append({name: column.cpu().double() for name, column in columns_of(statistics, found).items()})
        kls.append(trajectory.path_kl().cpu().double())
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Ensemble(columns, torch.cat(kls), policy.model.condition(names))


def by_default() -> list[Statistic]:
    """What is looked at beside what the user names: the mean of a sample's numbers, and how they vary."""

    def mean(samples: Tensor, condition: Condition) -> Tensor:
        return samples.flatten(1).mean(1)

    def size(samples: Tensor, condition: Condition) -> Tensor:
        return samples.flatten(1).square().mean(1).sqrt()

    named: list[tuple[str, Callable[[Tensor, Condition], Tensor]]] = [
        ("mean of a sample", mean),
        ("size of a sample", size),
    ]
    return [Statistic(function, name) for name, function in named]
