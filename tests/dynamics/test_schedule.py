"""Schedules against autograd, their tables and closed forms; time grids."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scoreact.dynamics.grids import GRIDS, karras, random, uniform_log_snr
from scoreact.dynamics.schedule import (
    EDM,
    VE,
    VP,
    Cosine,
    FromAlphasCumprod,
    RectifiedFlow,
    Schedule,
    log_snr,
    time_at_log_snr,
)

Times = Callable[[Schedule, int], Tensor]


def test_derivatives_equal_autograd(schedule: Schedule, inner_times: Times) -> None:
    t = inner_times(schedule, 101).requires_grad_()
    for value, derivative in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        # + 0 t: alpha = 1 has no graph of its own
        (expected,) = torch.autograd.grad((value(t) + 0 * t).sum(), t)
        torch.testing.assert_close(derivative(t).detach(), expected, rtol=1e-10, atol=1e-10)


def test_closed_forms() -> None:
    t = torch.tensor([0.3], dtype=torch.float64)
    expected: dict[Schedule, tuple[float, float]] = {
        RectifiedFlow(): (0.3, 0.7),
        VP(): (math.exp(-(0.49 * 19.9 / 4 + 0.035)), math.sqrt(1 - math.exp(-2 * (0.49 * 19.9 / 4 + 0.035)))),
        Cosine(): (math.sin(0.15 * math.pi), math.cos(0.15 * math.pi)),
        VE(): (1.0, 50.0**0.7 * 0.01**0.3),
        EDM(): (1.0, (0.7 * 80 ** (1 / 7) + 0.3 * 0.002 ** (1 / 7)) ** 7),
    }
    for schedule, (alpha, sigma) in expected.items():
        assert schedule.alpha(t).item() == pytest.approx(alpha, rel=1e-12)
        assert schedule.sigma(t).item() == pytest.approx(sigma, rel=1e-12)


def test_float32_keeps_five_digits_up_to_both_ends(schedule: Schedule) -> None:
    exact = torch.linspace(schedule.t_min, schedule.t_max, 997).double()
    for value in (schedule.alpha, schedule.sigma):
        torch.testing.assert_close(value(exact.float()).double(), value(exact), rtol=8e-6, atol=0)


def test_any_shape_is_kept(schedule: Schedule) -> None:
    for shape in ((), (3,), (2, 3)):
        t = torch.full(shape, 0.4)
        for value in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma):
            assert value(t).shape == shape
            assert value(t).dtype == t.dtype


def test_table_is_reproduced_at_its_times() -> None:
    table = torch.linspace(0.99, 0.01, 50, dtype=torch.float64)
    schedule = FromAlphasCumprod(table)  # type: ignore[arg-type]
    t = 1 - torch.arange(1, 51, dtype=torch.float64) / 50
    torch.testing.assert_close(schedule.alpha(t) ** 2, table, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - table, rtol=1e-12, atol=0)
    assert (schedule.t_min, schedule.t_max) == (0.0, 0.98)
    between = log_snr(schedule, (t[10] + t[11]) / 2)
    torch.testing.assert_close(between, (log_snr(schedule, t[10]) + log_snr(schedule, t[11])) / 2)


def test_a_table_that_goes_on_to_the_data() -> None:
    """Up to its cleanest entry the same path; then the noise falls evenly to 0, where a last step lands on the data."""
    table = torch.linspace(0.99, 0.01, 50, dtype=torch.float64).tolist()
    plain, longer = FromAlphasCumprod(table), FromAlphasCumprod(table, to_data=True)
    assert (longer.t_max, plain.t_max) == (1.0, 0.98)
    before = torch.linspace(0, 0.98, 99, dtype=torch.float64)
    late = torch.linspace(0.98, 1, 21, dtype=torch.float64)[1:].requires_grad_()
    for name in ("alpha", "sigma"):
        torch.testing.assert_close(getattr(longer, name)(before), getattr(plain, name)(before))
    torch.testing.assert_close(longer.sigma(late), (1 - late) * 50 * 0.1)
    torch.testing.assert_close(longer.alpha(late) ** 2 + longer.sigma(late) ** 2, torch.ones_like(late))
    for value, derivative in ((longer.alpha, longer.d_alpha), (longer.sigma, longer.d_sigma)):
        (expected,) = torch.autograd.grad(value(late).sum(), late)
        torch.testing.assert_close(derivative(late).detach(), expected, rtol=1e-10, atol=1e-10)
    assert float(longer.sigma(torch.tensor(1.0))) == 0
    assert longer != plain


def test_table_is_a_value() -> None:
    assert FromAlphasCumprod([0.9, 0.5, 0.1]) == FromAlphasCumprod([0.9, 0.5, 0.1])
    assert FromAlphasCumprod([0.9, 0.5, 0.1]) != FromAlphasCumprod([0.9, 0.5, 0.2])
    assert len({FromAlphasCumprod([0.9, 0.1]), FromAlphasCumprod([0.9, 0.1])}) == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.5], r"alphas_cumprod has shape \(1,\); expected one row of at least 2 values\."),
        ([0.1, 0.9], r"alphas_cumprod must decrease strictly .* the least noisy step first\."),
        ([0.9, 0.9], r"must decrease strictly"),
        ([0.9, 0.0], r"lie in \(0, 1\)"),
        ([1.0, 0.5], r"lie in \(0, 1\)"),
    ],
)
def test_bad_table_says_what_is_expected(table: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FromAlphasCumprod(table)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.floats(0.01, 0.99))
def test_time_at_log_snr_inverts_log_snr(fraction: float) -> None:
    for schedule in (RectifiedFlow(), VP(), Cosine(), VE(), EDM()):
        t = torch.tensor(schedule.t_min + fraction * (schedule.t_max - schedule.t_min), dtype=torch.float64)
        assert time_at_log_snr(schedule, log_snr(schedule, t)).item() == pytest.approx(t.item(), abs=1e-10)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 200])
def test_grids_increase_between_exact_ends(
    name: str, steps: int, schedule: Schedule, generator: torch.Generator
) -> None:
    ts = GRIDS[name](schedule, steps, generator)
    assert ts.shape == (steps + 1,)
    assert bool((ts.diff() > 0).all())
    assert ts[0] == torch.tensor(schedule.t_min)
    assert ts[-1] == torch.tensor(schedule.t_max)


def test_log_snr_grid_has_equal_steps(schedule: Schedule) -> None:
    ts = uniform_log_snr(schedule, 20).double()
    steps = log_snr(schedule, ts[:-1]).diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=2e-3, atol=0)


def test_karras_grid_is_uniform_in_edm_time(schedule: Schedule) -> None:
    torch.testing.assert_close(karras(EDM(), 10), torch.linspace(0, 1, 11))
    ts = karras(schedule, 20).double()[:-1]
    steps = ((schedule.sigma(ts) / schedule.alpha(ts)) ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=2e-3, atol=0)


def test_grids_go_to_the_data_where_the_path_ends_there() -> None:
    ts = uniform_log_snr(RectifiedFlow(), 10)
    assert (1 - ts[-2]) / ts[-2] == pytest.approx(0.01, rel=1e-4)


def test_random_grid_jitters_by_up_to_half_a_step(generator: torch.Generator) -> None:
    offsets = torch.stack([random(VE(), 10, generator) for _ in range(200)]) - torch.linspace(0, 1, 11)
    assert 0.045 < float(offsets.abs().max()) < 0.05
    assert torch.equal(random(VE(), 10, generator.manual_seed(3)), random(VE(), 10, generator.manual_seed(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tables_coefficients_are_computed_once_a_time(dtype: torch.dtype) -> None:
    """At knots, between and beyond them: bit for bit what each formula gives by itself."""
    table = [0.99, 0.7, 0.3, 0.05]
    schedule, t = FromAlphasCumprod(table), torch.linspace(-0.1, 1.0, 23).to(dtype)
    alphas = torch.tensor(table, dtype=torch.float64)
    knots = (alphas.log() - torch.log1p(-alphas)).flip(0).to(dtype)
    left = (t * 4).clamp(0, 3).floor().clamp(max=2).long()
    rise = knots[left + 1] - knots[left]
    value, slope = knots[left] + ((t * 4).clamp(0, 3) - left) * rise, 4 * rise
    formulas = {
        "alpha": torch.sigmoid(value).sqrt(),
        "sigma": torch.sigmoid(-value).sqrt(),
        "d_alpha": 0.5 * torch.sigmoid(value).sqrt() * torch.sigmoid(-value) * slope,
        "d_sigma": -0.5 * torch.sigmoid(-value).sqrt() * torch.sigmoid(value) * slope,
    }
    for name, expected in formulas.items():
        found = getattr(schedule, name)(t)
        assert torch.equal(found, expected)
        assert getattr(schedule, name)(t) is found


def test_a_tables_memory_of_the_last_times_sees_every_change() -> None:
    schedule = FromAlphasCumprod([0.99, 0.7, 0.3, 0.05])
    t, other = torch.tensor([0.1, 0.6], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    first = schedule.alpha(t).clone()
    assert torch.equal(schedule.alpha(t), first)
    t += 0.05  # the same tensor, changed in place
    fresh = FromAlphasCumprod([0.99, 0.7, 0.3, 0.05])
    assert torch.equal(schedule.alpha(t), fresh.alpha(t.clone()))
    assert not torch.equal(schedule.alpha(t), first)
    assert torch.equal(schedule.sigma(other), fresh.sigma(other.clone()))
    leaf = t.clone().requires_grad_(True)
    for _ in range(2):  # each graph its own
        (slope,) = torch.autograd.grad(schedule.alpha(leaf).sum(), leaf)
    torch.testing.assert_close(slope, schedule.d_alpha(t))
    with torch.inference_mode():
        inside = torch.tensor([0.2], dtype=torch.float64)
        assert torch.equal(schedule.alpha(inside), fresh.alpha(torch.tensor([0.2], dtype=torch.float64)))
