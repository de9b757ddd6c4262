"""The contract: what a model must have to be fine-tuned, and what it may have. Any data shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..dynamics.schedule import Schedule
from ..types import Condition


@runtime_checkable
class ScoreModel(Protocol):
    """The contract: a schedule, a prior, prompts to conditions, a score, and a decoder. Any data shape.

    A trainable model is also an `nn.Module`; its parameters with requires_grad are what training changes.
    """

    @property
    def schedule(self) -> Schedule: ...

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """States at t_min, [B, *D] for the B samples of the condition."""
        ...

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts (any strings the model knows). Raises ValueError naming an unknown one."""
        ...

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """grad log p_t(x | condition), float32; guidance and prediction type live in here. t [B], x [B, *D]."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Final states to what a reward sees (pictures in [0, 1], series, points): [B, *D] -> [B, ...]."""
        ...


@runtime_checkable
class HasReference(Protocol):
    """A model that gives its own pretrained self without a copy, such as an adapter that is switched off."""

    def reference(self) -> ScoreModel: ...
