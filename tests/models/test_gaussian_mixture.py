"""The exact mixture: its score against autograd, its tilt and J* against quadrature and log-mean-exp."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scoreact.dynamics.schedule import VP
from scoreact.models.base import ScoreModel
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.gaussian import linear_reward, mixture, quadratic_reward
from scoreact.rewards import Quadratic
from scoreact.types import Condition

NONE = Condition([])


def test_is_a_score_model() -> None:
    assert isinstance(mixture(2, 4, 0), ScoreModel)


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_score_is_the_gradient_of_log_prob(dim: int, generator: torch.Generator) -> None:
    model = mixture(dim, 3, 1)
    t = torch.rand(200, generator=generator) * 0.98
    x = torch.randn(200, dim, generator=generator).mul(1.5).requires_grad_(True)
    (expected,) = torch.autograd.grad(model.log_prob(t, x).sum(), x)
    torch.testing.assert_close(model.score(t, x.detach()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.98])
def test_log_prob_is_a_density(t: float) -> None:
    x = torch.linspace(-12, 12, 24001).unsqueeze(1)
    density = mixture(1, 3, 0).log_prob(torch.full((len(x),), t), x).exp().double()
    assert float(torch.trapezoid(density, x[:, 0].double())) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_noised_samples_follow_the_law_at_t(t: float, generator: torch.Generator) -> None:
    """The mean of the score under p_t is zero, and of x . score it is -d: both fail if sample and log_prob disagree."""
    model, count = mixture(2, 4, 0), 20_000
    time = torch.full((count,), t)
    alpha, sigma = model.schedule.alpha(time)[:, None], model.schedule.sigma(time)[:, None]
    x = alpha * model.sample(count, generator) + sigma * torch.randn(count, 2, generator=generator)
    score = model.score(time, x)
    for value, expected in ((score[:, 0], 0.0), (score[:, 1], 0.0), ((x * score).sum(1), -2.0)):
        assert abs(float(value.mean()) - expected) < 4 * float(value.std()) / math.sqrt(count)


def test_prior_is_the_law_at_t_min(generator: torch.Generator) -> None:
    model = GaussianMixture(VP(t_min=0.5), torch.ones(1), torch.tensor([[3.0]]), torch.tensor([[[0.25]]]))
    x = model.prior(Condition([""] * 20_000), generator)
    t = torch.tensor(0.5)
    alpha, sigma = float(model.schedule.alpha(t)), float(model.schedule.sigma(t))
    variance = 0.25 * alpha**2 + sigma**2
    assert abs(float(x.mean()) - 3 * alpha) < 4 * math.sqrt(variance / len(x))
    assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / len(x))


@pytest.mark.parametrize(("linear", "quadratic"), [(1.3, 0.0), (-0.4, 0.8), (0.5, -0.5)])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_tilted_law_and_optimum_by_quadrature(linear: float, quadratic: float, beta: float) -> None:
    model = mixture(1, 3, 2)
    x = torch.linspace(-15, 15, 30001)
    now = torch.full((len(x),), 1.0)  # VP at t = 1 is the data
    reward = linear * x - 0.5 * quadratic * x**2 + 0.7
    log_weight = (model.log_prob(now, x.unsqueeze(1)) + reward / beta).double()
    log_z = torch.trapezoid(log_weight.exp(), x.double()).log()
    tilted, optimum = model.tilted(torch.tensor([linear]), torch.tensor([[quadratic]]), beta, 0.7)
    assert optimum == pytest.approx(beta * float(log_z), abs=1e-4)
    middle = slice(10000, 20001)  # beyond, float32 log-densities of -100s lose digits that do not matter
    torch.testing.assert_close(
        tilted.log_prob(now, x.unsqueeze(1))[middle], (log_weight - log_z).float()[middle], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("make", [linear_reward, quadratic_reward])
def test_optimum_and_tilted_law_by_importance_sampling(
    make: Callable[[int, int], Quadratic], generator: torch.Generator
) -> None:
    model, reward, beta, count = mixture(16, 4, 0), make(16, 0), 1.0, 100_000
    samples = model.sample(count, generator)
    weights = (reward(samples, NONE) / beta).double().exp()
    relative_error = float(weights.std() / weights.mean()) / math.sqrt(count)
    tilted, optimum = model.tilted(reward.linear, reward.quadratic, beta, reward.constant)
    assert abs(optimum - beta * float(weights.mean().log())) < 4 * beta * relative_error
    assert relative_error < 0.01  # the comparison says something
    normalised = weights / weights.sum()
    for index in range(2):
        exact = tilted.weights @ tilted.means[:, index]
        error = float((normalised.square() * (samples[:, index] - exact).square()).sum().sqrt())
        assert abs(float((normalised * samples[:, index]).sum()) - float(exact)) < 4 * error


def test_zero_reward_leaves_the_mixture_alone() -> None:
    model = mixture(2, 4, 0)
    tilted, optimum = model.tilted(torch.zeros(2), torch.zeros(2, 2), 0.5)
    assert optimum == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(tilted.means, model.means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tilted.covariances, model.covariances, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tilted.weights, model.weights)


def _arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(2), torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3)


def test_wrong_inputs_are_named() -> None:
    weights, means, covariances = _arguments()
    with pytest.raises(ValueError, match=r"weights \(3,\)"):
        GaussianMixture(VP(), torch.ones(3), means, covariances)
    with pytest.raises(ValueError, match="must be positive, got"):
        GaussianMixture(VP(), weights - 1, means, covariances)
    with pytest.raises(ValueError, match="positive definite; smallest eigenvalue -1"):
        GaussianMixture(VP(), weights, means, -covariances)
    model = GaussianMixture(VP(), weights, means, covariances)
    with pytest.raises(ValueError, match="kl_weight must be positive, got 0"):
        model.tilted(torch.zeros(3), torch.zeros(3, 3), 0.0)
    with pytest.raises(ValueError, match="raise kl_weight or Q"):
        model.tilted(torch.zeros(3), -2 * torch.eye(3), 1.0)
