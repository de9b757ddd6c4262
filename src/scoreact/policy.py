"""The policy: a trainable score beside its frozen reference. Knows which weights move; not how they are moved."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .models import ScoreModel
from .types import Condition


class Policy(nn.Module):
    """A model being tuned, and the pretrained one it started from.

    `model` is trained in place. `reference` is a frozen deep copy unless given (a view of the same weights with an
    adapter off, say).
    """

    def __init__(self, model: ScoreModel, reference: ScoreModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.reference = copy.deepcopy(model) if reference is None else reference
        if isinstance(self.reference, nn.Module):
            self.reference.eval().requires_grad_(False)
        self.network_calls = 0  # samples through either network: the one place where they are counted

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """The action at (t [B], x [B, *D]): float32 [B, *D]."""
        self.network_calls += len(x)
        return self.model.score(t, x, condition)

    def reference_score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """The pretrained model's score there."""
        self.network_calls += len(x)
        return self.reference.score(t, x, condition)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [p for p in self.model.parameters() if p.requires_grad] if isinstance(self.model, nn.Module) else []
