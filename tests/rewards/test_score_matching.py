"""Score matching as a reward: against the closed form of a Gaussian, deterministic, and with a gradient."""

from __future__ import annotations

import math

import pytest
import torch

import scoreact as sa
from scoreact.dynamics.schedule import VP
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.gaussian import build
from scoreact.rewards import checked
from scoreact.rewards.score_matching import ScoreMatching
from scoreact.types import Condition

V = 0.6


def model() -> GaussianMixture:
    return GaussianMixture(VP(), torch.ones(1), torch.zeros(1, 1), torch.tensor([[[V]]]))


def here(count: int) -> Condition:
    return Condition([""] * count)


def test_against_the_closed_form() -> None:
    """e_hat - e = (sigma alpha x - alpha^2 v e) / (alpha^2 v + sigma^2) for each noise, the same for all samples."""
    x, time = torch.linspace(-2, 2, 5).unsqueeze(1), 0.6
    t = torch.tensor([time])
    a, s = float(VP().alpha(t)), float(VP().sigma(t))
    generator = torch.Generator().manual_seed(7)
    noise = torch.stack([torch.randn(1, generator=generator) for _ in range(300)])
    error = (s * a * x[:, 0] - a**2 * V * noise) / (a**2 * V + s**2)  # [300, 5]
    found = ScoreMatching(model(), [time], draws=300, seed=7)(x, here(5))
    assert torch.allclose(found, -error.square().mean(0), rtol=1e-3)
    mean = -(s**2 * a**2 * x[:, 0] ** 2 + a**4 * V**2) / (a**2 * V + s**2) ** 2
    assert torch.allclose(found, mean, rtol=0.25)


def test_it_is_a_function_of_the_sample_with_a_gradient() -> None:
    reward = checked(ScoreMatching(model(), [0.3, 0.8], draws=3))
    x = torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    together = reward(x, here(6))
    assert torch.equal(together, reward(x, here(6)))
    assert torch.allclose(together[2:4], reward(x[2:4], here(2)))
    x.requires_grad_()
    slope = torch.autograd.grad(reward(x, here(6)).sum(), x)[0]
    step = 1e-2
    with torch.no_grad():
        by_hand = (reward(x + step, here(6)) - reward(x - step, here(6))) / (2 * step)
    assert torch.allclose(slope[:, 0], by_hand, atol=1e-3)


def test_a_run_denoises_by_its_pretrained_model() -> None:
    problem = build(width=8)
    reward = ScoreMatching()
    with pytest.raises(sa.RewardError, match="score_matching has no model"):
        reward(torch.zeros(2, 2), here(2))
    tuned = sa.finetune(
        problem.model, reward, kl_weight=1.0, iterations=2, batch_size=16, steps=3, heldout_samples=16, reference_batches=1,
        value_steps=1, value_first_steps=1, learning_rate=0.1, progress=False,
    )  # fmt: skip
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    fresh = ScoreMatching(build(width=8).model)(x, here(4))
    assert torch.allclose(reward(x, here(4)), fresh), "training did not change what it denoises by"
    assert not torch.allclose(ScoreMatching(tuned.policy.model)(x, here(4)), fresh)
    with pytest.raises(sa.RewardError, match=r"time 1.5 is none of the model's"):
        ScoreMatching(model(), [1.5])
    assert math.isfinite(tuned.final["reward/heldout"])
