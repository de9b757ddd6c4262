"""The search for a time grid: against brute force where the best grid is known, and never behind the known grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreact.dynamics.grids import grid_times, shaped_log_snr, shaped_name, uniform_log_snr
from scoreact.dynamics.samplers import ode
from scoreact.dynamics.schedule import VP, RectifiedFlow, Schedule, log_snr
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.evaluation.grid_search import search_grid
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.gaussian import mixture
from scoreact.support.errors import SettingError
from scoreact.training.config import Config, updated
from scoreact.types import Condition

VARIANCE = 4.0


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP()], ids=["flow", "vp"])
def test_two_steps_are_placed_where_brute_force_places_them(schedule: Schedule) -> None:
    """Two steps of the ODE multiply a Gaussian's state by a number, and so its standard deviation."""
    model = GaussianMixture(schedule, torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), VARIANCE))

    def miss_at(inner: float) -> float:
        ts = torch.tensor([schedule.t_min, inner, schedule.t_max])
        std = float(schedule.alpha(ts[0]) ** 2 * VARIANCE + schedule.sigma(ts[0]) ** 2) ** 0.5
        one = torch.ones(1, 1)
        factor = ode(SDE(schedule, noise_level(1.0)), model.score, ts, one, torch.Generator())[-1]
        return abs(float(factor) * std - VARIANCE**0.5)

    def miss(samples: Tensor, condition: Condition) -> float:
        assert len(samples) == len(condition) == 4000
        return abs(float(samples.std()) - VARIANCE**0.5)

    every = torch.linspace(schedule.t_min, schedule.t_max, 302)[1:-1].tolist()
    found = search_grid(model, [""], miss, 2, samples=4000, tries=30)
    inner = float(grid_times(found.best.grid, schedule, 2)[1])
    assert miss_at(inner) < min(map(miss_at, every)) + 0.005
    assert min(t.value for t in found.named) > found.best.value + 0.05
    assert found.best.noise_level is None
    assert len(found.tries) <= 30


def test_the_winner_is_measured_anew_and_is_never_behind_a_known_grid() -> None:
    """The measure likes large samples of the search's noise: a known grid wins where the search's winner is luck."""
    model, calls = mixture(2, 3, 0), []

    def measure(samples: Tensor, condition: Condition) -> float:
        calls.append(samples)
        return float(samples.mean()) if len(calls) <= 20 else -float(samples.mean())

    found = search_grid(model, [""], measure, 4, "ddim", samples=64, tries=20, seed=3)
    assert len(calls) == len(found.tries) + 4
    assert not any(torch.equal(calls[20], other) for other in calls[:20]), "other noise than the search's"
    assert found.best.value == min([*(t.value for t in found.named), -float(calls[20].mean())])
    assert found.best.value in [t.value for t in found.named]
    levels = {(t.grid, t.noise_level) for t in found.tries[:9]}
    assert levels == {(g, n) for g in ("uniform", "log_snr", "karras") for n in (0.0, 0.5, 1.0)}
    again = search_grid(model, [""], lambda x, c: float(x.mean()), 4, "ddim", samples=64, tries=20, seed=3)
    assert again.tries == found.tries, "the same seed, the same search"


def test_few_steps_and_few_tries_are_refused() -> None:
    with pytest.raises(SettingError, match="steps is 1: one step has no time to place"):
        search_grid(mixture(2, 3, 0), [""], lambda x, c: 0.0, 1)
    with pytest.raises(SettingError, match="tries is 9; the known grids alone take 9"):
        search_grid(mixture(2, 3, 0), [""], lambda x, c: 0.0, 4, "ddim", tries=9)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP()], ids=["flow", "vp"])
def test_a_shaped_grid_by_hand_and_by_name(schedule: Schedule) -> None:
    ts = grid_times("log_snr:-1,3,0.5", schedule, 6)
    assert ts[0] == pytest.approx(schedule.t_min)
    assert ts[-1] == pytest.approx(schedule.t_max)
    wanted = [-1 + 3 * z + 0.5 * z * z for z in (-1, -0.5, 0, 0.5, 1)]
    assert log_snr(schedule, ts.double()[1:-1]).tolist() == pytest.approx(wanted, abs=1e-3)
    assert torch.equal(shaped_log_snr([-1, 3, 0.5])(schedule, 6, None), ts)
    assert shaped_name([-1.0, 3.0, 0.5]) == "log_snr:-1,3,0.5"
    assert len(grid_times("log_snr:-1,3,0.5", schedule, 1)) == 2
    assert log_snr(schedule, grid_times("log_snr:-1,3", schedule, 2).double()[1]).item() == pytest.approx(-1, abs=1e-3)


def test_equal_steps_in_log_snr_are_a_shaped_grid() -> None:
    schedule = VP()
    first, last = log_snr(schedule, torch.tensor([schedule.t_min, schedule.t_max]).double()).tolist()
    middle, half = (first + last) / 2, (last - first) / 2
    shaped = shaped_log_snr([middle, half * 0.75])(schedule, 8, None)
    torch.testing.assert_close(shaped, uniform_log_snr(schedule, 8), atol=1e-4, rtol=1e-4)


def test_grids_that_cannot_be_are_told_in_a_sentence() -> None:
    with pytest.raises(SettingError, match=r"grid log_snr:0,-1 has no 4 rising times on this schedule"):
        grid_times("log_snr:0,-1", RectifiedFlow(), 4)
    with pytest.raises(SettingError, match=r"expected numbers after log_snr:, such as log_snr:-1.5,4,0.2"):
        updated(Config(), {"grid": "log_snr:a,2"})
    with pytest.raises(SettingError, match=r"grid is 'log-snr:1'; known: uniform, .* or log_snr:C0,C1,"):
        updated(Config(), {"grid": "log-snr:1"})
    with pytest.raises(SettingError, match=r"grid is 'karas'; known: uniform, log_snr, karras, random\. Did you mean"):
        updated(Config(), {"grid": "karas"})
    times = updated(Config(), {"grid": "log_snr:-1,2"}).times(RectifiedFlow(), steps=3)
    assert torch.equal(times, grid_times("log_snr:-1,2", RectifiedFlow(), 3))
    assert math.isclose(float(times[1]), 1 / (1 + math.exp(1.5)), rel_tol=1e-4)
