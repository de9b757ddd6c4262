"""The features of states that a reference was asked about, kept so that a value on them takes no second pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..types import Condition

LIMIT = 16384  # states: more than a rollout's


class FeatureMemory:
    """Features [F] by state, the oldest forgotten first."""

    def __init__(self) -> None:
        self.rows: dict[tuple[float, int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, t: Tensor, x: Tensor, condition: Condition, features: Tensor) -> None:
        """Remember features [B, F] of (t [B], x [B, *D])."""
        self.rows.update(zip(_keys(t, x, condition), features.detach(), strict=True))
        for key in list(itertools.islice(self.rows, max(0, len(self.rows) - LIMIT))):
            del self.rows[key]

    def recall(
        self, t: Tensor, x: Tensor, condition: Condition, make: Callable[[Tensor, Tensor, Condition], Tensor]
    ) -> tuple[Tensor, int]:
        """Features [B, F], by `make` where they are not known, and for how many states that was."""
        kept = [self.rows.get(key) for key in _keys(t, x, condition)]
        missing = torch.tensor([i for i, row in enumerate(kept) if row is None], dtype=torch.long, device=x.device)
        if len(missing):
            made = make(t[missing], x[missing], condition[missing])
            if len(missing) == len(x):
                return made, len(x)
            for i, row in zip(missing.tolist(), made, strict=True):
                kept[i] = row
        return torch.stack([row for row in kept if row is not None]), len(missing)


def _keys(t: Tensor, x: Tensor, condition: Condition) -> list[tuple[float, int, int]]:
    """What tells states apart: time, prompt, and a sum over the state's bits, in integers so that no batch changes it."""
    bits = x.detach().float().contiguous().view(torch.int32).flatten(1).long()
    weights = 2 * torch.arange(bits.shape[1], device=x.device) + 1
    rows = [0] * len(x) if condition.rows is None else condition.rows.tolist()
    return list(zip(t.tolist(), rows, (bits * weights).sum(1).tolist(), strict=True))
