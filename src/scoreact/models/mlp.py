"""A multilayer perceptron for points and short vectors, alone or as a residual on an exact score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..dynamics.schedule import Schedule
from ..types import Condition
from .base import HasExactLaw, HasPriorDensity, ScoreModel
from .gaussian_mixture import GaussianMixture
from .layers import fourier_features


class MLP(nn.Module):
    """A multilayer perceptron with SiLU: (x [B, dim], t [B] in [0, 1]) -> [B, outputs].

    Args:
        dim: numbers in x; other shapes than [B, dim] are flattened to it.
        outputs: numbers out.
        width: of each hidden layer.
        layers: hidden ones.
        zero_last: make the last layer 0, so that the network says 0 at first.
    """

    def __init__(self, dim: int, outputs: int, width: int = 128, layers: int = 2, zero_last: bool = False) -> None:
        super().__init__()
        sizes = [dim + 16, *[width] * layers]
        hidden: list[nn.Module] = []
        for inputs, size in pairwise(sizes):
            hidden += [nn.Linear(inputs, size), nn.SiLU()]
        self.body = nn.Sequential(*hidden)
        self.last = nn.Linear(sizes[-1], outputs)
        if zero_last:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.last(self.body(torch.cat([x.flatten(1), fourier_features(t, 16)], dim=1)))
        return output


class ResidualModel(nn.Module):
    """base.score(t, x) + residual(x, t): an exact base with a learned change, which is zero at the start.

    Only the residual is trained.

    Args:
        base: any model on vectors [B, dim].
        dim: numbers in a state.
        width, layers: of the residual `MLP`.
    """

    def __init__(self, base: ScoreModel, dim: int, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.base = base
        self.residual = MLP(dim, dim, width, layers, zero_last=True)
        if isinstance(base, HasPriorDensity):  # offered only where there is one
            self.prior_log_prob = base.prior_log_prob

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return self.base.prior(condition, generator)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return self.base.condition(prompts)

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        change: Tensor = self.residual(x, t)
        return self.base.score(t, x, condition) + change

    def decode(self, x: Tensor) -> Tensor:
        return self.base.decode(x)

    def exact_law(self) -> GaussianMixture | None:
        """The law that the base samples from, where it knows it: that of this model before training."""
        return self.base.exact_law() if isinstance(self.base, HasExactLaw) else None
