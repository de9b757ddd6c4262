"""The policy: a trainable score beside its frozen reference. Knows which weights move; not how they are moved."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..dynamics.schedule import Schedule
from ..models.base import HasReference, ReadsFeatures, ScoreModel
from ..types import Condition


class Policy(nn.Module):
    """A model being tuned, and the pretrained one it started from. Itself a `ScoreModel`: it can be sampled.

    `model` is trained in place. `reference`, unless given, is what the model's own `reference()` returns where there is one
    (a view of the same weights with an adapter off), else a frozen deep copy. From time `act_until` on the reference acts:
    late steps decide little and are dear in KL (half the squared change of x_data_hat times the step's gain in SNR), so noise
    in the weights costs most there.
    """

    def __init__(self, model: ScoreModel, reference: ScoreModel | None = None, act_until: float = math.inf) -> None:
        super().__init__()
        self.model = model
        if reference is None:
            reference = model.reference() if isinstance(model, HasReference) else copy.deepcopy(model)
        self.reference = reference
        if isinstance(self.reference, nn.Module):
            self.reference.eval().requires_grad_(False)
        self.act_until = act_until
        self.network_calls = 0  # samples through either network: the one place where they are counted

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """The action at (t [B], x [B, *D]): float32 [B, *D]."""
        own = t < self.act_until
        if bool(own.all()):
            self.network_calls += len(x)
            return self.model.score(t, x, condition)
        if not bool(own.any()):
            return self.reference_score(t, x, condition)
        score = torch.empty_like(x)
        for rows, part in ((own, self.score), (~own, self.reference_score)):
            index = torch.nonzero(rows).flatten()
            score[index] = part(t[index], x[index], condition[index])
        return score

    def reference_score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """The pretrained model's score there."""
        self.network_calls += len(x)
        return self.reference.score(t, x, condition)

    def reference_features(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """What the pretrained network makes of the states inside, [B, F]; of a model that `ReadsFeatures`."""
        assert isinstance(self.reference, ReadsFeatures)  # a value on features was made by such a model
        features, passes = self.reference.features(t, x, condition)
        self.network_calls += passes
        return features

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [p for p in self.model.parameters() if p.requires_grad] if isinstance(self.model, nn.Module) else []

    # the other members of the model contract: the tuned model's

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return self.model.prior(condition, generator)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return self.model.condition(prompts)

    def decode(self, x: Tensor) -> Tensor:
        return self.model.decode(x)
