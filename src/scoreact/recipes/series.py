"""`series`: one-dimensional series of 32 values, a mixture of Gaussian processes with an exact score and a known optimum.

Three kinds of series: rising, falling, and waves of random phase. The reward wants them high at the end and at 0 at the
start: R(x) = mean of the last quarter - pin / 2 (mean of the first quarter)^2, quadratic, so that J* is closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..dynamics.schedule import VP, Schedule
from ..models.gaussian_mixture import GaussianMixture
from ..models.layers import fourier_features
from ..models.value_networks import VectorValue
from ..rewards.closed_form import Quadratic
from ..support.errors import SettingError
from ..training.config import Config
from ..types import Condition
from .base import Problem, Recipe


def processes(length: int) -> GaussianMixture:
    """Rising and falling trends and waves, as vectors [length]; each with smooth deviations and a little noise."""
    place = torch.linspace(0, 1, length)
    distance = place[:, None] - place
    smooth = 0.25 * torch.exp(-0.5 * (distance / 0.15) ** 2)
    waves = 0.5 * torch.cos(4 * math.pi * distance)  # a cos + b sin with independent a, b: a random phase
    noise = 0.02 * torch.eye(length)
    means = torch.stack([place - 0.5, 0.5 - place, torch.zeros(length)])
    covariances = torch.stack([smooth + noise, smooth + noise, 0.3 * smooth + waves + noise])
    # t_max 0.98: a coarse grid to 0.999 would spend the whole path KL in its last step
    return GaussianMixture(VP(t_max=0.98), torch.tensor([0.3, 0.3, 0.4]), means, covariances)


def wanted_series(length: int, pin: float) -> Quadratic:
    """R above."""
    first, last = torch.zeros(2, length)
    first[: length // 4] = last[-(length // 4) :] = 1 / (length // 4)
    return Quadratic(pin * torch.outer(first, first), linear=last)


class SeriesModel(nn.Module):
    """Series [B, 1, L]: the mixture's exact score plus a small convolutional change, which is zero at the start."""

    def __init__(self, base: GaussianMixture, width: int = 32, kernel: int = 7) -> None:
        super().__init__()
        self.base = base
        place = torch.linspace(0, 1, base.dim)
        waves = [f(math.pi * k * place) for k in (1, 2) for f in (torch.sin, torch.cos)]
        self.register_buffer("places", torch.stack([place, *waves]))  # [5, L]: where in the series a value is
        self.places: Tensor
        channels = [1 + 5 + 16, width, width, 1]  # x, its place, the time
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layers += [nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.SiLU()]
        self.change = nn.Sequential(*layers[:-1])
        last = self.change[-1]
        assert isinstance(last, nn.Conv1d)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return self.base.prior(condition, generator).unsqueeze(1)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return self.base.condition(prompts)

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        time = fourier_features(t, 16).unsqueeze(2).expand(-1, -1, x.shape[2])
        places = self.places.expand(len(x), -1, -1)
        change: Tensor = self.change(torch.cat([x, places, time], dim=1))
        return self.base.score(t, x.flatten(1)).unsqueeze(1) + change

    def decode(self, x: Tensor) -> Tensor:
        return x


def build(length: int = 32, pin: float = 2.0, width: int = 32) -> Problem:
    """length: values a series; pin: the price of not starting at 0; width: channels of the network."""
    if length < 4:
        raise SettingError(f"length is {length}; a series needs at least 4 values, a quarter of which is rewarded.")
    base, reward = processes(length), wanted_series(length, pin)
    return Problem(
        model=SeriesModel(base, width),
        reward=reward,
        prompts=[""],
        value_network=lambda: VectorValue(2 * length),
        optimum=lambda kl_weight: base.tilted(reward.linear, reward.quadratic, kl_weight, reward.constant)[1],
        labels={"problem": f"series of {length} values: trends and waves, wanted low at first and high at the end"},
    )


RECIPES = [
    Recipe(
        "series",
        "short time series, wanted to start at 0 and end high, against its closed form (a minute)",
        build,
        Config(kl_weight=0.3, solver="euler_maruyama", heldout_samples=1000),
        {"length": 32, "pin": 2.0, "width": 32},
    )
]
