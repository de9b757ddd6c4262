"""A batch of paths of the controlled SDE, with everything an update rule needs to replay them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..dynamics import girsanov
from ..types import Condition


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

    def paths(self, rows: Tensor) -> Trajectory:
        """Some of the paths, by index."""
        some = {k: v[:, rows] if v.ndim > 1 else v for k, v in self.tensors().items()}
        return Trajectory.of(some, self.condition[rows])

    def path_kl(self) -> Tensor:
        """1/2 sum |u|^2 dt of each path, [B], nats."""
        return torch.stack([girsanov.kl(u) for u in self.controls]).sum(0)

    def log_ratio_to_reference(self) -> Tensor:
        """log p_behaviour / p_reference of each path, [B], nats; its mean is the path KL."""
        pairs = zip(self.controls, self.noise, strict=True)
        return torch.stack([girsanov.stochastic_cost(u, z) for u, z in pairs]).sum(0)
