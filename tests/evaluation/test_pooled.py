"""J* and KL* where each prompt has a sample or a few: the pooled estimates are the closed form, the naive ones are not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreact.evaluation.optimum import estimate_optimum, is_pooled, optimal_kl
from scoreact.types import Condition, groups

BETA, SIGMA = 0.5, 0.6


def few_a_prompt(generator: torch.Generator, prompts: int = 500) -> tuple[Tensor, Condition, Tensor]:
    """Rewards m_c + SIGMA z with one to four samples a prompt, and the means of the samples' prompts [B]."""
    counts = torch.randint(1, 5, (prompts,), generator=generator)
    mean = (2 * torch.randn(prompts, generator=generator)).repeat_interleave(counts)
    names = [f"prompt {i}" for i in torch.arange(prompts).repeat_interleave(counts).tolist()]
    return mean + SIGMA * torch.randn(len(mean), generator=generator), Condition(names), mean


def naive(rewards: Tensor, condition: Condition) -> float:
    """Each prompt's own log of a mean, then the mean over prompts."""
    parts = [
        BETA * float((rewards[rows] / BETA).logsumexp(0) - math.log(len(rows))) for rows in groups(condition).values()
    ]
    return sum(parts) / len(parts)


def test_the_pooled_optimum_is_the_closed_form_within_its_error() -> None:
    """J* = mean + s^2 / (2 beta), KL* = s^2 / (2 beta^2), in 300 repetitions; the naive estimate misses it by far."""
    generator = torch.Generator().manual_seed(0)
    gain, nats = SIGMA**2 / (2 * BETA), SIGMA**2 / (2 * BETA**2)
    covered, close, errors, apart, nat_errors = 0, 0, [], [], []
    for _ in range(300):
        rewards, condition, mean = few_a_prompt(generator)
        exact = float(mean.mean()) + gain
        found = estimate_optimum(rewards, condition, BETA)
        covered += found["objective/J_star_low"] <= exact <= found["objective/J_star_high"]
        errors.append(found["objective/J_star"] - exact)
        kl = optimal_kl(rewards, condition, BETA)
        close += abs(kl["objective/KL_star"] - nats) < 1.96 * kl["objective/KL_star_se"]
        nat_errors.append(kl["objective/KL_star"] - nats)
        by_prompt = torch.tensor([float(mean[rows[0]]) for rows in groups(condition).values()])
        apart.append(naive(rewards, condition) - float(by_prompt.mean()) - gain)
    assert found["objective/pooled"] == 1
    assert found["objective/trusted"] == 1
    assert 0.90 < covered / 300 < 0.985
    assert 0.8 < close / 300 < 0.99
    assert abs(sum(nat_errors) / 300) < 0.05 * nats
    assert abs(sum(errors) / 300) < 0.02 * gain
    assert sum(apart) / 300 < -0.4 * gain


def test_enough_samples_a_prompt_are_looked_at_one_by_one() -> None:
    rewards = torch.randn(80, generator=torch.Generator().manual_seed(0))
    assert not is_pooled(Condition(["a", "b", "c", "d"] * 20))
    assert is_pooled(Condition(["a", "b", "c", "d", "e"] * 16))
    assert not is_pooled(Condition([""] * 5)), "one prompt: there is nothing to pool"
    assert estimate_optimum(rewards, Condition(["a", "b", "c", "d"] * 20), 1.0)["objective/pooled"] == 0


def test_prompts_drawn_once_say_nothing_of_the_optimum() -> None:
    found = estimate_optimum(torch.randn(10), Condition([str(i) for i in range(10)]), 1.0)
    assert math.isnan(found["objective/J_star"])
    assert found["objective/trusted"] == found["objective/effective_samples"] == 0
    assert math.isnan(optimal_kl(torch.randn(10), Condition([str(i) for i in range(10)]), 1.0)["objective/KL_star"])


def test_one_residual_that_carries_everything_is_not_trusted() -> None:
    rewards = torch.zeros(400)
    rewards[0] = 100.0
    found = estimate_optimum(rewards, Condition([str(i // 4) for i in range(400)]), 1.0)
    assert found["objective/effective_samples"] == pytest.approx(0.75, abs=0.01)
    assert found["objective/trusted"] == 0
