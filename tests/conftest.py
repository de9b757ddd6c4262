"""What the tests share: one thread, no network, a seeded generator, the schedules, a Gaussian's score, a run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.dynamics import schedule as schedules
from scoreact.dynamics.schedule import Schedule
from scoreact.recipes.gaussian import build
from scoreact.training.config import Config, updated
from scoreact.types import ScoreFn, expand

torch.set_num_threads(1)

SCHEDULES: dict[str, Schedule] = {
    "rectified_flow": schedules.RectifiedFlow(),
    "vp": schedules.VP(),
    "cosine": schedules.Cosine(),
    "ve": schedules.VE(),
    "edm": schedules.EDM(),
    # the table of Stable Diffusion
    "table": schedules.FromAlphasCumprod(
        (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).tolist()
    ),
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Every schedule in turn."""
    return SCHEDULES[request.param]


@pytest.fixture
def inner_times() -> Callable[[Schedule, int], Tensor]:
    """(schedule, n) -> n float64 times inside (t_min, t_max), none of them on a knot of the table."""

    def times(schedule: Schedule, n: int) -> Tensor:
        fractions = torch.linspace(0.00723, 0.99577, n, dtype=torch.float64)
        return schedule.t_min + (schedule.t_max - schedule.t_min) * fractions

    return times


@pytest.fixture
def gaussian_score() -> Callable[[Schedule, float, float], ScoreFn]:
    """(schedule, mean, variance of the data) -> the exact score of N(alpha mean, alpha^2 variance + sigma^2)."""

    def make(schedule: Schedule, mean: float, variance: float) -> ScoreFn:
        def score(t: Tensor, x: Tensor) -> Tensor:
            alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            return (alpha * mean - x) / (alpha**2 * variance + sigma**2)

        return score

    return make


@pytest.fixture
def train_on_mixture() -> Callable[..., Result]:
    """(settings) -> a run on the gaussian recipe, 10 Euler-Maruyama steps, every weight from seed 0.

    The exact continuous-time policy recovers 0.76 of J* - J_ref on this grid. reward: instead of the recipe's.
    """

    def train(reward: Any = None, width: int = 128, **settings: Any) -> Result:
        common = Config(
            kl_weight=0.5, solver="euler_maruyama", device="cpu", batch_size=256, heldout_samples=2000, evaluate_every=10_000
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            problem = build(width=width)
            return finetune(
                problem.model, reward or problem.reward, [""], value_network=problem.value_network,
                config=updated(common, settings), optimum=None if reward else problem.optimum,
            )  # fmt: skip

    return train
