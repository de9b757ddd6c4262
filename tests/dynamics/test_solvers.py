"""Kernels, orders, exact cases, diffusers' schedulers on the same network, and the registry of samplers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.grids import uniform, uniform_log_snr
from scoreact.dynamics.samplers import (
    SAMPLERS,
    Sampler,
    adaptive_ode,
    by_steps,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    foreign,
    heun,
    ode,
    sampler_by_name,
)
from scoreact.dynamics.schedule import VE, VP, FromAlphasCumprod, RectifiedFlow, Schedule
from scoreact.dynamics.sde import SDE, constant, flow_grpo, noise_level
from scoreact.dynamics.solvers import SOLVERS, Transition, ddim, euler_maruyama
from scoreact.types import ScoreFn, expand

GaussianScore = Callable[[Schedule, float, float], ScoreFn]
Times = Callable[[Schedule, int], Tensor]

MEAN, VARIANCE = 1.3, 0.4


def marginal(schedule: Schedule, t: Tensor, variance: float = VARIANCE) -> tuple[float, float]:
    """Mean and standard deviation at t of Gaussian data noised."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return alpha * MEAN, math.sqrt(alpha**2 * variance + sigma**2)


def order(steps: list[int], errors: list[float]) -> float:
    """Minus the slope of log error on log steps, by least squares."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


# --- the kernel of one step ------------------------------------------------------------------------------------------


def test_transition_is_a_normal_distribution(generator: torch.Generator) -> None:
    mean, x = (torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std[:, None, None]).log_prob(x).sum((1, 2))
    torch.testing.assert_close(Transition(mean, std).log_prob(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Transition(mean, std).sample(x), mean + std[:, None, None] * x)


def test_shift_is_in_units_of_the_noise_and_zero_without() -> None:
    mean = torch.tensor([[1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    std = torch.tensor([0.5, 0.0])
    shift = Transition(mean, std).shift(Transition(torch.zeros(2, 2), std))
    assert torch.equal(shift, torch.tensor([[2.0, 4.0], [0.0, 0.0]]))
    shift.sum().backward()
    assert mean.grad is not None
    assert torch.equal(mean.grad, torch.tensor([[2.0, 2.0], [0.0, 0.0]]))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("noise", [noise_level(0.0), noise_level(0.7), noise_level(1.0), constant(0.5)])
def test_solvers_are_consistent(
    solver: Any, noise: Any, schedule: Schedule, inner_times: Times, generator: torch.Generator
) -> None:
    """(mean - x) / dt -> drift and std^2 / dt -> g^2 as dt -> 0."""
    sde, t = SDE(schedule, noise), inner_times(schedule, 9)
    x = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    score = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    dt = 1e-7
    kernel = solver(sde, lambda t, x: score, t, t + dt, x)
    drift = sde.drift(t, x, score)
    assert float(((kernel.mean - x) / dt - drift).abs().max() / drift.abs().max()) < 1e-3
    torch.testing.assert_close(kernel.std**2 / dt, sde.diffusion(t) ** 2, rtol=1e-3, atol=1e-12)


def test_ddim_at_noise_level_one_is_exact_for_a_point_mass(schedule: Schedule, inner_times: Times) -> None:
    """With consistency (above), two steps in a row being one step is exactness."""
    score = lambda t, x: (expand(schedule.alpha(t), x) * MEAN - x) / expand(schedule.sigma(t) ** 2, x)  # noqa: E731
    sde, ts = SDE(schedule, noise_level(1.0)), inner_times(schedule, 12)
    t0, t1, t2 = ts[:-2], ts[1:-1], ts[2:]
    x = torch.linspace(-2, 2, 10, dtype=torch.float64)[:, None]
    once, first = ddim(sde, score, t0, t2, x), ddim(sde, score, t0, t1, x)
    second, nudged = ddim(sde, score, t1, t2, first.mean), ddim(sde, score, t1, t2, first.mean + 1)
    slope = (nudged.mean - second.mean).flatten()
    torch.testing.assert_close(second.mean, once.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((second.std**2 + slope**2 * first.std**2).sqrt(), once.std, rtol=1e-10, atol=1e-10)
    # and the law of the noising path is kept
    alpha, sigma = schedule.alpha(t0[:, None]), schedule.sigma(t0[:, None])
    start = ddim(sde, score, t0, t2, alpha * MEAN + 0 * sigma)
    torch.testing.assert_close(start.mean, schedule.alpha(t2)[:, None] * MEAN, rtol=1e-10, atol=1e-10)
    gain = (ddim(sde, score, t0, t2, alpha * MEAN + sigma).mean - start.mean).flatten()
    torch.testing.assert_close(gain**2 + start.std**2, schedule.sigma(t2) ** 2, rtol=1e-10, atol=1e-12)


def test_ddim_noise_never_exceeds_the_schedules() -> None:
    t0, t1, x = torch.tensor([0.2]), torch.tensor([0.6]), torch.zeros(1, 2)
    kernel = ddim(SDE(RectifiedFlow(), constant(9.0)), lambda t, x: x, t0, t1, x)
    assert kernel.std == pytest.approx(0.4)


def test_euler_maruyama_has_strong_order_one(gaussian_score: GaussianScore, generator: torch.Generator) -> None:
    schedule, fine = RectifiedFlow(), 1024
    sde, score = SDE(schedule, constant(0.8)), gaussian_score(schedule, MEAN, VARIANCE)
    start = torch.randn(500, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(fine, 500, 1, generator=generator, dtype=torch.float64)

    def end(steps: int) -> Tensor:
        ts, x = torch.linspace(0.2, 0.9, steps + 1, dtype=torch.float64), start
        increments = noise.reshape(steps, fine // steps, 500, 1).sum(1) / math.sqrt(fine // steps)
        for t0, t1, z in zip(ts[:-1], ts[1:], increments, strict=True):
            x = euler_maruyama(sde, score, t0.expand(500), t1.expand(500), x).sample(z)
        return x

    truth, steps = end(fine), [8, 16, 32, 64]
    assert order(steps, [float((end(n) - truth).pow(2).mean().sqrt()) for n in steps]) == pytest.approx(1.0, abs=0.15)


# --- whole paths on Gaussian data ------------------------------------------------------------------------------------


def gaussian_flow(schedule: Schedule, ts: Tensor, x: Tensor) -> Tensor:
    """Where the probability-flow ODE carries x [B, 1] from ts[0] to ts[-1] for Gaussian data."""
    (mean0, std0), (mean1, std1) = marginal(schedule, ts[0]), marginal(schedule, ts[-1])
    return mean1 + std1 / std0 * (x - mean0)


ORDERS: list[tuple[Sampler, float]] = [(ode, 1.0), (heun, 2.0), (dpm_solver_pp_2m, 2.0)]


@pytest.mark.parametrize(("sampler", "expected"), ORDERS)
@pytest.mark.parametrize("schedule", [VP(), VE(), RectifiedFlow(t_max=0.98)], ids=["vp", "ve", "rectified_flow"])
def test_order_of_the_deterministic_samplers(
    sampler: Sampler, expected: float, schedule: Schedule, gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    score, sde = gaussian_score(schedule, MEAN, VARIANCE), SDE(schedule, noise_level(1.0))
    steps, errors = [40, 80, 160], []
    for n in steps:
        ts = uniform_log_snr(schedule, n).double()
        mean, std = marginal(schedule, ts[0])
        x = mean + std * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        errors.append(float((sampler(sde, score, ts, x, generator)[-1] - gaussian_flow(schedule, ts, x)).abs().max()))
    assert order(steps, errors) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_reaches_the_data(
    name: str, schedule: Schedule, gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    score, ts = gaussian_score(schedule, MEAN, VARIANCE), uniform_log_snr(schedule, 80)
    x = torch.randn(2000, 1, generator=generator)
    mean, std = marginal(schedule, ts[0])
    xs = SAMPLERS[name](SDE(schedule, noise_level(1.0)), score, ts, mean + std * x, generator)
    assert xs.shape == (81, 2000, 1)
    assert xs.dtype == torch.float32
    assert torch.equal(xs[0], mean + std * x)
    mean, std = marginal(schedule, ts[-1])
    # 4 standard errors, and 3 % of the standard deviation for the 80 steps
    assert abs(float(xs[-1].mean()) - mean) < (4 / math.sqrt(2000) + 0.03) * std
    assert abs(float(xs[-1].std()) - std) < (4 / math.sqrt(4000) + 0.03) * std


@pytest.mark.parametrize("noise", [noise_level(0.5), noise_level(1.5), constant(0.6), flow_grpo(0.7)])
@pytest.mark.parametrize("name", ["euler_maruyama", "ddim", "dpm_solver_pp_2m_sde"])
def test_marginals_are_kept_for_any_noise(
    name: str, noise: Any, gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    schedule = RectifiedFlow(t_min=0.02, t_max=0.97)
    ts = uniform_log_snr(schedule, 300)
    x = torch.randn(4000, 1, generator=generator)
    mean, std = marginal(schedule, ts[0])
    sde, score = SDE(schedule, noise), gaussian_score(schedule, MEAN, VARIANCE)
    xs = SAMPLERS[name](sde, score, ts, mean + std * x, generator)
    for k in (150, 300):
        mean, std = marginal(schedule, ts[k])
        assert abs(float(xs[k].mean()) - mean) < 4 * std / math.sqrt(4000)
        assert abs(float(xs[k].std()) - std) < 4 * std / math.sqrt(8000)


@pytest.mark.parametrize("level", [0.5, 1.0, 1.5])
def test_dpm_solver_sde_is_exact_for_a_point_mass(level: float, generator: torch.Generator) -> None:
    """A constant x_data_hat is not approximated: two steps give the law of the path, whatever the noise."""
    schedule = VP()
    score = lambda t, x: (expand(schedule.alpha(t), x) * MEAN - x) / expand(schedule.sigma(t) ** 2, x)  # noqa: E731
    ts = torch.tensor([0.2, 0.5, 0.7])
    x = schedule.alpha(ts[0]) * MEAN + schedule.sigma(ts[0]) * torch.randn(20000, 1, generator=generator)
    xs = dpm_solver_pp_2m_sde(SDE(schedule, noise_level(level)), score, ts, x, generator)
    z = (xs[-1] - schedule.alpha(ts[-1]) * MEAN) / schedule.sigma(ts[-1])
    assert abs(float(z.mean())) < 4 / math.sqrt(20000)
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(40000)
    # the correlation of start and end is e^(-(1 + eta^2) h)
    h = float((schedule.alpha(ts[[0, 2]]) / schedule.sigma(ts[[0, 2]])).log().diff())
    z0 = (x - schedule.alpha(ts[0]) * MEAN) / schedule.sigma(ts[0])
    assert float((z * z0).mean()) == pytest.approx(math.exp(-(level**2) * h), abs=4 * math.sqrt(2 / 20000))


def test_dpm_solver_is_the_sde_form_without_noise(gaussian_score: GaussianScore, generator: torch.Generator) -> None:
    schedule = VP()
    score, ts, x = gaussian_score(schedule, MEAN, VARIANCE), uniform_log_snr(schedule, 20), torch.randn(3, 1)
    paths = [
        dpm_solver_pp_2m(SDE(schedule, noise_level(1.0)), score, ts, x, generator),
        dpm_solver_pp_2m_sde(SDE(schedule, noise_level(0.0)), score, ts, x, generator),
    ]
    assert torch.equal(*paths)


def test_a_path_is_repeated_by_its_seed(gaussian_score: GaussianScore) -> None:
    schedule = VP()
    sde, score, x = SDE(schedule, noise_level(1.0)), gaussian_score(schedule, MEAN, VARIANCE), torch.zeros(3, 2)
    ts = uniform_log_snr(schedule, 4)
    for sampler in SAMPLERS.values():
        one, two = (sampler(sde, score, ts, x, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaptive_ode_keeps_its_tolerance(
    dtype: torch.dtype, schedule: Schedule, gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    ts = torch.tensor([schedule.t_min, (schedule.t_min + schedule.t_max) / 2, schedule.t_max], dtype=dtype)
    mean, std = marginal(schedule, ts[0])
    x = mean + std * torch.linspace(-2, 2, 9, dtype=dtype)[:, None]
    sde, score = SDE(schedule, noise_level(1.0)), gaussian_score(schedule, MEAN, VARIANCE)
    errors, calls = [], []
    for tolerance in (1e-2, 1e-4):
        counted = CountedScore(score)
        xs = adaptive_ode(sde, counted, ts, x, generator, rtol=tolerance, atol=tolerance)
        ends = torch.stack([gaussian_flow(schedule, ts[: k + 1], x) for k in (1, 2)])
        errors.append(float(((xs[1:] - ends).abs() / (1 + ends.abs())).max()))
        calls.append(counted.calls)
    assert xs.dtype == dtype
    assert errors[0] < 5e-2
    assert errors[1] < 5e-4
    assert calls[0] < calls[1] < 600


def test_adaptive_ode_steps_from_the_last_noise_to_the_data(
    gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    schedule, x = RectifiedFlow(), torch.randn(5, 2, generator=generator)
    sde, ts = SDE(schedule, noise_level(0.0)), torch.tensor([0.001, 1.0])
    xs = adaptive_ode(sde, gaussian_score(schedule, MEAN, 0.0), ts, x, generator)  # a point mass: straight lines
    torch.testing.assert_close(xs[-1], torch.full_like(x, MEAN), rtol=0, atol=1e-4)


def test_adaptive_ode_is_not_slowed_by_a_close_pair_of_times(
    gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    schedule, x, calls = VP(), torch.randn(5, 2, generator=generator), []
    for ts in ([0.0, 0.5, 0.999], [0.0, 0.5, 0.500001, 0.999]):
        score = CountedScore(gaussian_score(schedule, MEAN, VARIANCE))
        adaptive_ode(SDE(schedule, noise_level(0.0)), score, torch.tensor(ts), x, generator)
        calls.append(score.calls)
    assert calls[1] <= calls[0] + 3


class CountedScore:
    """A score that counts its calls and remembers the times it was called at."""

    def __init__(self, score: ScoreFn) -> None:
        self.score, self.times = score, list[float]()

    @property
    def calls(self) -> int:
        return len(self.times)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        return self.score(t, x)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("ode", 10), ("ddim", 10), ("euler_maruyama", 10), ("heun", 19), ("dpm_solver_pp_2m", 10), ("adaptive_ode", None)],
)
def test_no_score_is_asked_for_where_there_is_no_noise(
    name: str, calls: int | None, gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    schedule = RectifiedFlow()
    score = CountedScore(gaussian_score(schedule, MEAN, VARIANCE))
    xs = SAMPLERS[name](
        SDE(schedule, noise_level(1.0)), score, uniform_log_snr(schedule, 10), torch.ones(2, 1), generator
    )
    assert bool(torch.isfinite(xs).all())
    assert max(score.times) < 1
    assert calls in (None, score.calls)


def test_adaptive_ode_that_cannot_finish_says_so(gaussian_score: GaussianScore, generator: torch.Generator) -> None:
    schedule = VP()
    sde, ts, x = SDE(schedule, noise_level(1.0)), torch.tensor([0.0, 0.999]), torch.ones(2, 1)
    score = gaussian_score(schedule, MEAN, VARIANCE)
    text = r"adaptive_ode took 5 steps and is at t = 0\.\d+ of 0\.999\. Raise rtol \(1e-06\), atol \(1e-06\) or max_ste"
    with pytest.raises(RuntimeError, match=text):
        adaptive_ode(sde, score, ts, x, generator, rtol=1e-6, atol=1e-6, max_steps=5)
    with pytest.raises(RuntimeError, match=r"the score is not finite for some sample between t = 0\.000 and 0\.\d+\."):
        adaptive_ode(sde, lambda t, x: x * math.nan, ts, x, generator)


# --- diffusers' schedulers on the same network -----------------------------------------------------------------------


def network(x: Tensor, s: float) -> Tensor:
    """A smooth epsilon of x = variance-preserving state and s = sigma / alpha."""
    return torch.tanh(0.9 * x + math.log(s) / 5) + 0.3 * x.roll(1, -1)


def as_score(schedule: Schedule) -> ScoreFn:
    """The score of `network`, whatever the schedule's own scaling."""

    def score(t: Tensor, x: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        scaled = x / expand((alpha**2 + sigma**2).sqrt(), x)
        return -network(scaled, float(sigma[0] / alpha[0])) / expand(sigma, x)

    return score


def relative_difference(xs: Tensor, others: list[Tensor]) -> float:
    """The worst state's largest difference, relative to the size of that state."""
    assert len(xs) == len(others)
    pairs = zip(xs, others, strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


TABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def table_times(indices: list[int]) -> Tensor:
    return 1 - (torch.tensor(indices) + 1).float() / 1000


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_agrees_with_diffusers(eta: float, generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(**TABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(20)
    schedule = FromAlphasCumprod(theirs.alphas_cumprod.tolist())
    states, twin = [torch.randn(4, 8, generator=generator)], torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        s = float((1 / theirs.alphas_cumprod[t] - 1).sqrt())
        noise = torch.randn(4, 8, generator=twin)
        output = network(states[-1], s)
        states.append(theirs.step(output, t, states[-1], eta=eta, variance_noise=noise if eta else None).prev_sample)
    ts = table_times([*theirs.timesteps.tolist(), 0])
    sde = SDE(schedule, noise_level(eta))
    xs = by_steps(ddim)(sde, as_score(schedule), ts, states[0], torch.Generator().manual_seed(1))
    assert relative_difference(xs, states) < 1e-5


def test_ddpm_agrees_with_diffusers(generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**TABLE, clip_sample=False, steps_offset=1, timestep_spacing="leading")
    theirs.set_timesteps(20)
    schedule = FromAlphasCumprod(theirs.alphas_cumprod.tolist())
    states, twin = [torch.randn(4, 8, generator=generator)], torch.Generator().manual_seed(1)
    for t in theirs.timesteps[:-1]:  # the last one goes beyond the table, to the data
        s = float((1 / theirs.alphas_cumprod[t] - 1).sqrt())
        states.append(theirs.step(network(states[-1], s), t, states[-1], generator=twin).prev_sample)
    sde, ts = SDE(schedule, noise_level(1.0)), table_times(theirs.timesteps.tolist())
    xs = by_steps(ddim)(sde, as_score(schedule), ts, states[0], torch.Generator().manual_seed(1))
    assert relative_difference(xs, states) < 1e-5


@pytest.mark.parametrize("sampler", [by_steps(euler_maruyama), ode])
def test_flow_euler_agrees_with_diffusers(sampler: Sampler, generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=torch.linspace(0.98, 0.05, 20).tolist())
    schedule, states = RectifiedFlow(), [torch.randn(4, 8, generator=generator)]
    for t, sigma in zip(theirs.timesteps, theirs.sigmas.tolist()[:-1], strict=True):
        x = states[-1]
        noise = network(x / math.hypot(sigma, 1 - sigma), sigma / (1 - sigma))
        velocity = (noise - x) / (1 - sigma)  # noise - data, theirs runs towards the noise
        states.append(theirs.step(velocity, t, x).prev_sample)
    sde, ts = SDE(schedule, noise_level(0.0)), 1 - theirs.sigmas
    assert relative_difference(sampler(sde, as_score(schedule), ts, states[0], generator), states) < 1e-5


def run_theirs(theirs: Any, x: Tensor, heun: bool) -> list[Tensor]:
    """States of a diffusers scheduler in y = x / alpha, for schedulers that keep y (Heun) or the VP x (DPM-Solver)."""
    twin, state, ys = torch.Generator().manual_seed(1), x, [x]
    for k, t in enumerate(theirs.timesteps):
        s = float(theirs.sigmas[k])
        if heun:
            output = network(state / math.sqrt(1 + s**2), s)
            state = theirs.step(output, t, state).prev_sample
            if theirs.state_in_first_order or k == len(theirs.timesteps) - 1:
                ys.append(state)
        else:
            state = x / math.sqrt(1 + s**2) if k == 0 else state
            state = theirs.step(network(state, s), t, state, generator=twin).prev_sample
            ys.append(state * math.sqrt(1 + float(theirs.sigmas[k + 1]) ** 2))
    return ys


def flow_times(levels: Tensor) -> Tensor:
    """The times at which RectifiedFlow has these sigma / alpha; 0 is t = 1."""
    return 1 / (1 + levels)


@pytest.mark.parametrize("karras", [True, False])
def test_heun_agrees_with_diffusers(karras: bool, generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.HeunDiscreteScheduler(**TABLE, use_karras_sigmas=karras)
    theirs.set_timesteps(12)
    levels = torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]]).double()
    schedule, ts = (
        RectifiedFlow(t_min=0.06),
        flow_times(levels).float(),
    )  # that begins with some signal, as their table does
    ys = run_theirs(theirs, levels[0].float() * torch.randn(4, 8, generator=generator), heun=True)
    xs = heun(SDE(schedule, noise_level(1.0)), as_score(schedule), ts, ys[0] * ts[0], generator)
    assert relative_difference(xs / ts[:, None, None], ys) < 1e-5


def test_heun_on_a_flow_agrees_with_diffusers(generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchHeunDiscreteScheduler()
    theirs.set_timesteps(8)
    schedule = RectifiedFlow()
    theirs.sigmas.clamp_(max=1 - schedule.t_min)  # at pure noise there is no score

    def velocity(x: Tensor) -> Tensor:  # towards the data
        return torch.tanh(0.9 * x) + 0.3 * x.roll(1, -1)

    def score(t: Tensor, x: Tensor) -> Tensor:
        return prediction.convert(prediction.velocity, prediction.score, schedule, t, x, velocity(x))

    states = [torch.randn(4, 8, generator=generator)]
    state, last = states[0], len(theirs.timesteps) - 1
    for k, t in enumerate(theirs.timesteps):
        state = theirs.step(-velocity(state), t, state).prev_sample
        if theirs.state_in_first_order or k == last:
            states.append(state)
    ts = 1 - torch.cat([theirs.sigmas[:1], theirs.sigmas[1::2]])
    xs = heun(SDE(schedule, noise_level(1.0)), score, ts, states[0], generator)
    assert relative_difference(xs, states) < 1e-5


def test_heun_in_few_steps_is_nearer_than_euler_on_a_flow(
    gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    """At equal network calls, from times at which sigma / alpha is 1,000."""
    schedule = RectifiedFlow()
    score, sde = gaussian_score(schedule, MEAN, VARIANCE), SDE(schedule, noise_level(0.0))
    mean, std = marginal(schedule, torch.tensor(schedule.t_min))
    x = mean + std * torch.linspace(-2, 2, 9)[:, None]
    exact = gaussian_flow(schedule, uniform(schedule, 1), x)
    for steps in (4, 8, 16):
        errors = [
            float((sampler(sde, score, uniform(schedule, n), x, generator)[-1] - exact).abs().max())
            for sampler, n in ((heun, steps), (ode, 2 * steps))
        ]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver_agrees_with_diffusers(kind: str, steps: int, final: str, generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        **TABLE, algorithm_type=kind, solver_order=2, solver_type="midpoint", final_sigmas_type=final
    )
    theirs.set_timesteps(steps)
    schedule, ts = RectifiedFlow(), flow_times(theirs.sigmas.double()).float()
    ys = run_theirs(theirs, theirs.sigmas[0] * torch.randn(4, 8, generator=generator), heun=False)
    sampler = {"dpmsolver++": dpm_solver_pp_2m, "sde-dpmsolver++": dpm_solver_pp_2m_sde}[kind]
    twin = torch.Generator().manual_seed(1)
    xs = sampler(SDE(schedule, noise_level(1.0)), as_score(schedule), ts, ys[0] * ts[0], twin)
    assert relative_difference(xs / ts[:, None, None], ys) < 1e-5


def test_dpm_solver_agrees_with_diffusers_on_its_own_table(generator: torch.Generator) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(**TABLE, final_sigmas_type="sigma_min")
    theirs.set_timesteps(20)
    schedule = FromAlphasCumprod(theirs.alphas_cumprod.tolist())
    ts = table_times([*theirs.timesteps.tolist(), 0])
    ys = run_theirs(theirs, theirs.sigmas[0] * torch.randn(4, 8, generator=generator), heun=False)
    alphas = schedule.alpha(ts)
    xs = dpm_solver_pp_2m(SDE(schedule, noise_level(1.0)), as_score(schedule), ts, ys[0] * alphas[0], generator)
    assert relative_difference(xs / alphas[:, None, None], ys) < 1e-5


# --- foreign samplers and names --------------------------------------------------------------------------------------


def run_foreign(fn: Callable[[ScoreFn, Tensor, Tensor], Any], generator: torch.Generator) -> Tensor:
    score = lambda t, x: -x * expand(t, x)  # noqa: E731
    ts = torch.tensor([0.1, 0.2, 0.4, 0.5])
    return foreign(fn)(SDE(VP(), noise_level(1.0)), score, ts, torch.ones(2, 3), generator)


def test_foreign_takes_states_with_or_without_the_start(generator: torch.Generator) -> None:
    def states(score: ScoreFn, x: Tensor, ts: Tensor) -> list[Tensor]:
        result = [x]
        for t in ts[:-1]:
            result.append(result[-1] + score(t, result[-1]))
        return result

    expected = torch.tensor([1.0, 0.9, 0.72, 0.432])
    for fn in (states, lambda *a: states(*a)[1:], lambda *a: torch.stack(states(*a))):
        xs = run_foreign(fn, generator)
        torch.testing.assert_close(xs, expand(expected, xs).expand(4, 2, 3))


def test_foreign_with_only_the_end_leaves_the_rest_unknown(generator: torch.Generator) -> None:
    xs = run_foreign(lambda score, x, ts: score(0.5, x), generator)  # type: ignore[arg-type]
    assert torch.equal(xs[0], torch.ones(2, 3))
    assert torch.equal(xs[-1], torch.full((2, 3), -0.5))
    assert bool(xs[1:-1].isnan().all())
    assert xs.shape == (4, 2, 3)


def test_foreign_says_what_it_expected(generator: torch.Generator) -> None:
    def mine(score: ScoreFn, x: Tensor, ts: Tensor) -> list[Tensor]:
        return [x, x]

    text = r"solver 'mine' returned 2 states for 3 steps; expected 3, or 4 with the start, or the last state alone"
    with pytest.raises(ValueError, match=text):
        run_foreign(mine, generator)
    with pytest.raises(ValueError, match=r"returned a state of shape \(6,\); expected \(2, 3\)\."):
        run_foreign(lambda score, x, ts: [x.flatten()] * 3, generator)


def test_samplers_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*SOLVERS} < {*SAMPLERS}
    assert sampler_by_name("heun") is heun
    assert sampler_by_name("scoreact.dynamics.samplers:adaptive_ode") is adaptive_ode
    file = tmp_path / "mine.py"
    file.write_text("def still(sde, score, ts, x, generator):\n    return x.expand(len(ts), *x.shape)\nnumber = 3\n")
    xs = sampler_by_name(f"{file}:still")(
        SDE(VP(), noise_level(1.0)), lambda t, x: x, torch.rand(4), torch.ones(2, 3), torch.Generator()
    )
    assert xs.shape == (4, 2, 3)
    with pytest.raises(ValueError, match=r"mine\.py:number' is 3; expected a function \(sde, score, ts"):
        sampler_by_name(f"{file}:number")
    more = tmp_path / "more.py"
    more.write_text(
        "import torch\n"
        "def three(score, x, ts): return x\n"
        "def last(sde, score, ts, x, generator): return x\n"
        "def listed(sde, score, ts, x, generator): return [x] * len(ts)\n"
        "class Kind: pass\n"
    )
    for word, said in (
        (
            "three",
            r"cannot be called with five arguments \(too many positional arguments\); .* or wrap it in `foreign`",
        ),
        ("Kind", "cannot be called with five arguments"),
        ("last", r"returned shape \(2, 3\) for 3 steps of states \(2, 3\); expected a function"),
        ("listed", "returned list for 3 steps"),
    ):
        with pytest.raises(sa.LoadError, match=rf"more\.py:{word}' {said}"):
            sampler_by_name(f"{more}:{word}")(
                SDE(VP(), noise_level(1.0)), lambda t, x: x, torch.rand(4), torch.ones(2, 3), torch.Generator()
            )
    with pytest.raises(ValueError, match=r"mine\.py has no 'nothing'. It has: still"):
        sampler_by_name(f"{file}:nothing")
    with pytest.raises(ValueError, match=r"solver file .nowhere\.py. does not exist"):
        sampler_by_name("nowhere.py:still")
    with pytest.raises(ValueError, match=r"solver module 'no_such_module' was not found"):
        sampler_by_name("no_such_module:f")


def test_an_unknown_name_gets_the_known_ones_and_a_guess() -> None:
    text = (
        r"unknown solver 'eulr'\. Known: adaptive_ode, ddim, dpm_solver_pp_2m, dpm_solver_pp_2m_sde, euler_maruyama, "
        r"heun, ode\. Or give 'module:name'\. Did you mean 'euler_maruyama'\?"
    )
    with pytest.raises(ValueError, match=text):
        sampler_by_name("eulr")
    with pytest.raises(ValueError, match=r"Did you mean 'ddim'\?"):
        sampler_by_name("ddpm")
    with pytest.raises(ValueError, match=r"Or give 'module:name'\.$"):
        sampler_by_name("zzz")
