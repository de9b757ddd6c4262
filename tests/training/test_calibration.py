"""Minimum-KL weights from samples against closed forms: a Gaussian's mean and variance, weights of a mixture, prompts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreact.support.errors import SettingError
from scoreact.training.calibration import Dual, Samples
from scoreact.types import Condition

MANY = 20_000


def normal(count: int = MANY, seed: int = 0, mean: float = 1.0, std: float = 2.0) -> Tensor:
    return mean + std * torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(values: Tensor, prompts: list[str] | None = None) -> Samples:
    names = [f"s{j}" for j in range(values.shape[1])]
    return Samples(values, Condition(prompts or [""] * len(values)), names)


def near(found: Dual, weights: list[float], kl: float) -> None:
    """Within four of its own standard errors, which are small."""
    assert found.solved
    for got, error, wanted in zip(found.weights.tolist(), found.weights_se.tolist(), weights, strict=True):
        assert abs(got - wanted) < 4 * error
        assert error < 0.1 * max(abs(w) for w in weights)
    assert abs(found.kl - kl) < 4 * found.kl_se
    assert found.kl_se < 0.1 * kl


def test_a_gaussian_with_another_mean() -> None:
    """lambda = delta / var, KL = delta^2 / (2 var)."""
    near(samples(normal()).solve(torch.tensor([2.5])), [1.5 / 4], 1.5**2 / 8)


def test_a_gaussian_with_another_variance() -> None:
    """exp(l x^2) on N(0, v) is N(0, v'), l = 1/(2 v) - 1/(2 v'), KL = (v'/v - 1 - log(v'/v)) / 2."""
    v, new = 4.0, 1.5
    kl = 0.5 * (new / v - 1 - math.log(new / v))
    near(samples(normal(mean=0.0).square()).solve(torch.tensor([new])), [1 / (2 * v) - 1 / (2 * new)], kl)


def test_mean_and_variance_together() -> None:
    x = normal()
    m, v = 0.5, 2.0
    found = samples(torch.cat([x, x.square()], 1)).solve(torch.tensor([m, v + m**2]))
    kl = 0.5 * (v / 4 + (m - 1) ** 2 / 4 - 1 - math.log(v / 4))
    near(found, [m / v - 1 / 4, 1 / 8 - 1 / (2 * v)], kl)


def test_other_weights_of_a_mixtures_components() -> None:
    """The law of the component is all that changes: lambda_j - lambda_k = log ratios of weights, KL that of the weights."""
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    component = torch.multinomial(old, MANY, True, generator=torch.Generator().manual_seed(3))
    found = samples(torch.nn.functional.one_hot(component, 3)[:, :2].double()).solve(new[:2])
    ratio = (new / old).log()
    near(found, (ratio[:2] - ratio[2]).tolist(), float((new * ratio).sum()))


def test_each_prompt_keeps_its_share() -> None:
    """lambda is one for all prompts and Z is each prompt's: lambda = delta / mean variance, where one Z for all would also
    draw the prompts with large statistics more often."""
    x = normal()[:, 0]
    second = torch.arange(MANY) % 2 == 1
    values = torch.where(second, 3 * x + 9, x).unsqueeze(1)  # variances 4 and 36, means 1 and 12
    found = samples(values, [("b" if s else "a") for s in second.tolist()]).solve(torch.tensor([6.5 + 2]))
    near(found, [2 / 20], 0.5 * 20 * 0.1**2)


def test_the_means_are_those_that_were_asked_for() -> None:
    x = torch.cat([normal(3000, 1), normal(3000, 2).exp()], 1)
    found, goal = samples(x), torch.tensor([2.0, 30.0], dtype=torch.float64)
    w = torch.softmax(x @ found.solve(goal).weights, 0)
    assert torch.allclose(w @ x, goal, atol=1e-5)


def test_its_errors_are_those_of_other_samples() -> None:
    """Over 200 ensembles the distance from the truth is as large as is said."""
    found = [samples(normal(500, seed)).solve(torch.tensor([2.0])) for seed in range(200)]
    z = torch.stack([(f.weights[0] - 0.25) / f.weights_se[0] for f in found])
    kl = torch.tensor([(f.kl - 0.125) / f.kl_se for f in found])
    assert 0.85 < float(z.std()) < 1.15
    assert 0.85 < float(kl.std()) < 1.15


def test_effective_samples() -> None:
    """n / E[w^2] of a tilted Gaussian is n exp(-delta^2 / var)."""
    found = samples(normal()).solve(torch.tensor([2.5]))
    assert found.effective == pytest.approx(MANY * math.exp(-(1.5**2) / 4), rel=0.05)


def test_a_step_ends_where_samples_become_few() -> None:
    found = samples(normal(4000))
    step, share = found.step(torch.tensor([9.0]), 100)
    assert 0.2 < share < 0.9
    assert 100 <= step.effective < 105
    whole, all_of_it = found.step(torch.tensor([2.0]), 100)
    assert all_of_it == 1.0
    assert whole.effective > 100


def test_targets_beyond_what_samples_reach() -> None:
    found, far = samples(normal(1000)), torch.tensor([50.0])
    assert "samples reach" in found.beyond(far)[0]
    assert found.bounded(far) == [False]
    assert not found.solve(far).solved
    step, share = found.step(far, 100)
    assert 0 < share < 0.2
    assert bool(step.weights.isfinite().all())
    binary = samples((normal(1000) > 2).double())
    assert binary.bounded(torch.tensor([1.0])) == [True]
    assert binary.bounded(torch.tensor([0.9])) == [False]
    assert binary.beyond(torch.tensor([0.9])) == [""]


def test_no_weights_for_statistics_that_say_nothing_or_the_same() -> None:
    with pytest.raises(SettingError, match=r"s0 is 3 for all 50 samples"):
        samples(torch.full((50, 1), 3.0))
    x = normal(50)
    with pytest.raises(SettingError, match=r"s0, s1 follow from each other"):
        samples(torch.cat([x, 1 - 2 * x], 1))
