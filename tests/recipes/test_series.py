"""The recipe `series`: its closed forms, and the model that starts at the exact score."""

from __future__ import annotations

import math

import pytest
import torch

from scoreact.recipes.base import recipes
from scoreact.recipes.series import SeriesModel


def test_the_series_problem_against_its_formulas() -> None:
    problem = recipes()["series"].build()
    model = problem.model
    assert isinstance(model, SeriesModel)
    condition = model.condition([""] * 20_000)
    x = model.base.sample(20_000, torch.Generator().manual_seed(0)).unsqueeze(1)
    assert model.prior(condition, torch.Generator().manual_seed(0)).shape == (20_000, 1, 32)
    reward = problem.reward(x, condition)
    first, last = x[:, 0, :8].mean(1), x[:, 0, 24:].mean(1)
    assert torch.allclose(reward, last - first**2, atol=1e-5)
    # J* = beta log E exp(R / beta) over exact data
    assert problem.optimum is not None
    scaled = reward.double() / 0.5
    estimate = 0.5 * float(torch.logsumexp(scaled, 0) - math.log(len(x)))
    error = 0.5 * float(scaled.exp().std() / scaled.exp().mean() / len(x) ** 0.5)
    assert abs(problem.optimum(0.5) - estimate) < 4 * error
    assert error < 0.02


def test_the_series_model_starts_at_the_exact_score_and_can_be_moved() -> None:
    model = recipes()["series"].build().model
    assert isinstance(model, SeriesModel)
    condition = model.condition([""] * 5)
    t = torch.linspace(0.1, 0.9, 5)
    x = torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    log_prob = model.base.log_prob(t, x.flatten(1)).sum()
    (gradient,) = torch.autograd.grad(log_prob, x)
    score = model.score(t, x.detach(), condition)
    assert score.shape == (5, 1, 32)
    assert torch.allclose(score, gradient, atol=1e-3 * float(gradient.abs().max()))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith("change.") for name in trained)
    score.square().sum().backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


def test_series_length_must_have_a_quarter() -> None:
    with pytest.raises(ValueError, match="length is 3; a series needs at least 4 values"):
        recipes()["series"].build(length=3)
