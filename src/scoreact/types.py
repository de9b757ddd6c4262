"""The few shapes and signatures that every module shares. No computation but `expand`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ScoreFn = Callable[[Tensor, Tensor], Tensor]  # (t [B], x [B, *D]) -> score [B, *D]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Condition:
    """What a batch of B samples is generated for.

    Args:
        prompts: B strings.
        rows: where each sample's prompt stands in the model's own table (of classes, of encoded prompts), [B] integers;
            None for a model without prompts. Guidance's row for "no prompt" is the model's business.
        metadata: B mappings that a reward may read, or none at all.
    """

    prompts: Sequence[str]
    rows: Tensor | None = None  # [B] int64
    metadata: Sequence[Mapping[str, Any]] = field(default=())

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Tensor) -> Condition:
        """The condition of the samples named by an index tensor [b] (a minibatch, or every sample repeated)."""
        kept = index.tolist()
        return Condition(
            [self.prompts[i] for i in kept],
            None if self.rows is None else self.rows[index],
            [self.metadata[i] for i in kept] if self.metadata else (),
        )


def groups(condition: Condition) -> dict[str, Tensor]:
    """Indices of the samples of each prompt."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(condition.prompts):
        found.setdefault(prompt, []).append(i)
    return {prompt: torch.tensor(rows) for prompt, rows in found.items()}


def expand(t: Tensor, x: Tensor) -> Tensor:
    """t [B] as [B, 1, ...], ready to be multiplied with x [B, *D]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def sum_over_data(x: Tensor) -> Tensor:
    """Sum over the data dimensions: [B, *D] -> [B]. Log-probabilities are sums, never means."""
    return x.flatten(1).sum(1)
