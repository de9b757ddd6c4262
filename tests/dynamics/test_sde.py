"""The SDE: marginals for any g, noise choices, control, and the Hamiltonian's maximiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import EDM, VE, VP, Cosine, RectifiedFlow, Schedule
from scoreact.dynamics.sde import SDE, Noise, constant, flow_grpo, kappa, noise_level, ode_gain
from scoreact.types import ScoreFn, expand

Times = Callable[[Schedule, int], Tensor]
GaussianScore = Callable[[Schedule, float, float], ScoreFn]

NOISES = {
    "ode": noise_level(0.0),
    "half": noise_level(0.5),
    "memoryless": noise_level(1.0),
    "more": noise_level(1.7),
    "constant": constant(0.6),
    "flow_grpo": flow_grpo(0.7),
}
MEAN, VARIANCE = 1.3, 0.4


def moment_rates(sde: SDE, score: ScoreFn, t: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """d mean / dt and d variance / dt of the linear dX = (a + b X) dt + g dB, a and b read off its drift. All [B]."""
    x = mean[:, None]
    at = sde.drift(t, x, score(t, x))
    slope = sde.drift(t, x + 1, score(t, x + 1)) - at
    return at.flatten(), 2 * slope.flatten() * variance + sde.diffusion(t) ** 2


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_moment_equations_keep_the_marginals(
    noise: Noise, schedule: Schedule, inner_times: Times, gaussian_score: GaussianScore
) -> None:
    t = inner_times(schedule, 101)
    alpha, sigma, d_alpha, d_sigma = schedule.alpha(t), schedule.sigma(t), schedule.d_alpha(t), schedule.d_sigma(t)
    variance = alpha**2 * VARIANCE + sigma**2
    sde, score = SDE(schedule, noise), gaussian_score(schedule, MEAN, VARIANCE)
    d_mean, d_variance = moment_rates(sde, score, t, alpha * MEAN, variance)
    expected = 2 * (alpha * d_alpha * VARIANCE + sigma * d_sigma)
    # the terms that cancel: 2 gain and its like, times the variance
    size = sde.gain(t) + variance * kappa(schedule, t) + expected.abs()
    torch.testing.assert_close(d_mean / size.sqrt(), d_alpha * MEAN / size.sqrt(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d_variance / size, expected / size, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", ["ode", "memoryless", "constant", "flow_grpo"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), VP()], ids=["rectified_flow", "vp"])
def test_integrated_moments_reach_the_marginals(noise: str, schedule: Schedule, gaussian_score: GaussianScore) -> None:
    sde, score = SDE(schedule, NOISES[noise]), gaussian_score(schedule, MEAN, VARIANCE)
    ts = torch.linspace(0.2, 0.95, 81, dtype=torch.float64)
    alpha, variance = schedule.alpha(ts), schedule.alpha(ts) ** 2 * VARIANCE + schedule.sigma(ts) ** 2

    def rate(t: Tensor, moments: Tensor) -> Tensor:
        return torch.stack(moment_rates(sde, score, t[None], moments[:1], moments[1:])).flatten()

    moments = torch.stack([alpha[0] * MEAN, variance[0]])
    for t, dt in zip(ts[:-1], ts.diff(), strict=True):  # the classical Runge-Kutta rule
        k1 = rate(t, moments)
        k2 = rate(t + dt / 2, moments + dt / 2 * k1)
        k3 = rate(t + dt / 2, moments + dt / 2 * k2)
        k4 = rate(t + dt, moments + dt * k3)
        moments = moments + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(moments, torch.stack([alpha[-1] * MEAN, variance[-1]]), rtol=1e-6, atol=0)


def test_vp_at_noise_level_one_is_the_reverse_sde() -> None:
    t, x, score = (torch.tensor(value, dtype=torch.float64) for value in ([0.3], [[0.7]], [[-1.1]]))
    sde, beta = SDE(VP(), noise_level(1.0)), 0.7 * 19.9 + 0.1
    assert sde.drift(t, x, score).item() == pytest.approx(beta * (0.7 / 2 - 1.1), rel=1e-12)
    assert sde.diffusion(t).item() == pytest.approx(math.sqrt(beta), rel=1e-12)


def test_ode_drift_is_the_velocity(schedule: Schedule, inner_times: Times, generator: torch.Generator) -> None:
    t = inner_times(schedule, 9)
    x, velocity = (torch.randn(9, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    score = prediction.convert(prediction.velocity, prediction.score, schedule, t, x, velocity)
    drift = SDE(schedule, noise_level(0.0)).drift(t, x, score)
    size = 1 + x.abs() * expand(kappa(schedule, t), x)
    torch.testing.assert_close(drift / size, velocity / size, rtol=1e-10, atol=1e-10)


def test_ode_gain_is_not_negative(schedule: Schedule) -> None:
    assert bool((ode_gain(schedule, torch.linspace(schedule.t_min, schedule.t_max, 999)) >= 0).all())


def test_noise_choices() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    flow = RectifiedFlow()
    assert torch.equal(constant(0.3)(flow, t), torch.full_like(t, 0.3))
    expected = torch.tensor([math.sqrt(19), math.sqrt(3), 1.0, 0.0], dtype=torch.float64) * 0.7
    torch.testing.assert_close(flow_grpo(0.7)(flow, t), expected)
    torch.testing.assert_close(noise_level(0.5)(flow, t[1:]) ** 2, 0.5 * ode_gain(flow, t[1:]))
    sde = SDE(flow, constant(0.3))
    torch.testing.assert_close(sde.gain(t[1:]), (1 - t[1:]) / t[1:] + 0.045)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (noise_level, r"noise_level must be at least 0, got -0\.5\."),
        (constant, r"the diffusion coefficient must be at least 0, got -0\.5\."),
        (flow_grpo, r"flow_grpo's a must be at least 0, got -0\.5\."),
    ],
)
def test_negative_noise_is_refused(make: Callable[[float], Noise], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(-0.5)


@pytest.mark.parametrize("noise", ["half", "memoryless", "constant"])
def test_control_is_the_change_of_drift_over_g(
    noise: str, schedule: Schedule, inner_times: Times, generator: torch.Generator
) -> None:
    sde, t = SDE(schedule, NOISES[noise]), inner_times(schedule, 7)
    x, score, reference = (torch.randn(7, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    change = sde.drift(t, 0 * x, score) - sde.drift(t, 0 * x, reference)
    torch.testing.assert_close(expand(sde.diffusion(t), x) * sde.control(t, score, reference), change)


@pytest.mark.parametrize("noise", ["half", "memoryless", "constant"])
def test_optimal_action_is_stationary_for_the_hamiltonian(noise: str, generator: torch.Generator) -> None:
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    reference, gradient = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    for schedule in (RectifiedFlow(), VP(), Cosine(), VE(), EDM()):
        sde = SDE(schedule, NOISES[noise])
        action = sde.optimal_action(t, reference, gradient, 0.2).requires_grad_()
        drift = (expand(sde.gain(t), action) * action * gradient).sum()
        hamiltonian = drift - 0.2 / 2 * (sde.control(t, action, reference) ** 2).sum()
        (slope,) = torch.autograd.grad(hamiltonian, action)
        assert float((slope / expand(sde.gain(t), slope)).abs().max()) < 1e-10
        assert float((action.detach() - reference).abs().max()) > 1e-3


def test_x_data_hat_is_the_posterior_mean(
    schedule: Schedule, inner_times: Times, gaussian_score: GaussianScore
) -> None:
    t = inner_times(schedule, 9)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = (alpha * MEAN + 0.8 * sigma)[:, None]
    estimate = SDE(schedule, noise_level(1.0)).x_data_hat(t, x, gaussian_score(schedule, MEAN, VARIANCE)(t, x))
    precision = 1 / VARIANCE + alpha**2 / sigma**2
    expected = (MEAN / VARIANCE + alpha * x.flatten() / sigma**2) / precision
    torch.testing.assert_close(estimate.flatten(), expected, rtol=1e-9, atol=1e-9)
