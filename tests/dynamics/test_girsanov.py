"""Change of measure: the log-ratio against densities and the control, path KL against a closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scoreact.dynamics import girsanov
from scoreact.dynamics.grids import uniform_log_snr
from scoreact.dynamics.schedule import VP, RectifiedFlow, Schedule
from scoreact.dynamics.sde import SDE, Noise, constant, flow_grpo, noise_level
from scoreact.dynamics.solvers import Solver, Transition, ddim, euler_maruyama
from scoreact.types import ScoreFn

GaussianScore = Callable[[Schedule, float, float], ScoreFn]


@pytest.fixture
def kernels(generator: torch.Generator) -> tuple[Transition, Transition, Tensor]:
    """Two kernels of equal std and a step's noise, B = 5, D = (2, 3)."""
    new, old, noise = (torch.randn(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    std = torch.rand(5, generator=generator, dtype=torch.float64) + 0.2
    return Transition(new, std), Transition(old, std), noise


def test_log_ratio_is_the_difference_of_log_probs(kernels: tuple[Transition, Transition, Tensor]) -> None:
    new, old, noise = kernels
    x = old.sample(noise)
    expected = new.log_prob(x) - old.log_prob(x)
    torch.testing.assert_close(girsanov.log_ratio(new.shift(old), noise), expected, rtol=1e-12, atol=1e-12)


def test_stochastic_cost_is_the_log_ratio_of_the_acting_policy(kernels: tuple[Transition, Transition, Tensor]) -> None:
    policy, reference, noise = kernels
    x = policy.sample(noise)
    expected = policy.log_prob(x) - reference.log_prob(x)
    cost = girsanov.stochastic_cost(policy.shift(reference), noise)
    torch.testing.assert_close(cost, expected, rtol=1e-12, atol=1e-12)


def test_stochastic_cost_has_the_kl_as_its_mean(kernels: tuple[Transition, Transition, Tensor]) -> None:
    new, old, _ = kernels
    shift, grid = new.shift(old), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    # two antithetic noises: the linear term cancels and the quadratic one does not depend on the noise
    mean = torch.stack([girsanov.stochastic_cost(shift, z.expand_as(shift)) for z in grid]).mean(0)
    torch.testing.assert_close(mean, girsanov.kl(shift))


def test_ratio_of_a_policy_with_itself_is_exactly_one(kernels: tuple[Transition, Transition, Tensor]) -> None:
    policy, _, noise = kernels
    assert torch.equal(girsanov.log_ratio(policy.shift(policy), noise), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("noise", [noise_level(0.5), noise_level(1.0), constant(0.4), flow_grpo(0.7)])
def test_log_ratio_is_the_girsanov_increment(noise: Noise, generator: torch.Generator) -> None:
    sde = SDE(RectifiedFlow(), noise)
    t0, t1 = torch.tensor([0.3, 0.5], dtype=torch.float64), torch.tensor([0.34, 0.57], dtype=torch.float64)
    x, new, old, z = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    shift = euler_maruyama(sde, lambda t, x: new, t0, t1, x).shift(euler_maruyama(sde, lambda t, x: old, t0, t1, x))
    dt, d = (t1 - t0)[:, None], sde.control(t0, new, old)
    expected = (d * z * dt.sqrt() - 0.5 * d**2 * dt).sum(1)
    torch.testing.assert_close(girsanov.log_ratio(shift, z), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(girsanov.kl(shift), 0.5 * (d**2 * dt).sum(1), rtol=1e-12, atol=1e-12)


def test_kl_is_the_closed_form(kernels: tuple[Transition, Transition, Tensor]) -> None:
    new, old, _ = kernels
    normals = [torch.distributions.Normal(kernel.mean, kernel.std[:, None, None]) for kernel in (new, old)]
    expected = torch.distributions.kl_divergence(*normals).sum((1, 2))
    torch.testing.assert_close(new.kl(old), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(girsanov.kl(new.shift(old)), expected, rtol=1e-12, atol=1e-12)


def gaussian_kl(schedule: Schedule, t: Tensor, policy: tuple[float, float], reference: tuple[float, float]) -> float:
    """KL of the two marginals at t, for Gaussian data (mean, variance)."""
    alpha, sigma2 = float(schedule.alpha(t)), float(schedule.sigma(t)) ** 2
    (m1, v1), (m0, v0) = ((alpha * m, alpha**2 * v + sigma2) for m, v in (policy, reference))
    return 0.5 * (v1 / v0 - 1 - math.log(v1 / v0) + (m1 - m0) ** 2 / v0)


@pytest.mark.parametrize("solver", [euler_maruyama, ddim])
@pytest.mark.parametrize("schedule", [VP(), RectifiedFlow(t_min=0.02, t_max=0.97)], ids=["vp", "rectified_flow"])
def test_path_kl_of_gaussians(
    solver: Solver, schedule: Schedule, gaussian_score: GaussianScore, generator: torch.Generator
) -> None:
    """Both are noised by the same kernel, so the path KL is what the marginals' KL gains between the two ends."""
    policy, reference = (0.8, 0.5), (0.0, 1.0)
    sde, ts = SDE(schedule, noise_level(1.0)), uniform_log_snr(schedule, 300).double()
    score, reference_score = gaussian_score(schedule, *policy), gaussian_score(schedule, *reference)
    t0 = ts[:1]
    start = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    x = schedule.alpha(t0) * policy[0] + (schedule.alpha(t0) ** 2 * policy[1] + schedule.sigma(t0) ** 2).sqrt() * start
    total = torch.zeros(len(x), dtype=torch.float64)
    for begin, end in itertools.pairwise(ts):
        interval = begin.expand(len(x)), end.expand(len(x))
        kernel = solver(sde, score, *interval, x)
        total += kernel.kl(solver(sde, reference_score, *interval, x))
        x = kernel.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    expected = gaussian_kl(schedule, ts[-1], policy, reference) - gaussian_kl(schedule, ts[0], policy, reference)
    assert abs(float(total.mean()) - expected) < 4 * float(total.std()) / math.sqrt(len(x))
    assert float(total.std()) / math.sqrt(len(x)) < 0.02 * expected
