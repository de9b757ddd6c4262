"""A value made of a surrogate at the expected sample: closed forms, its gradient, whole runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.control.policy import Policy
from scoreact.control.ridge_surrogate import RidgeSurrogate
from scoreact.control.rollout import rollout
from scoreact.control.surrogate_value import SurrogateFit, SurrogateValue
from scoreact.control.value_fit import Sample
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import VP
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.base import recipes
from scoreact.types import Condition

SLOPE = torch.tensor([0.8, -0.6])
BETA = 0.5


def problem(paths: int, seed: int, loss: str = "martingale") -> tuple[SurrogateFit, Sample, Tensor]:
    """A linear reward on a Gaussian: V(t, x) of the reference is R(x_data_hat), exactly. A fit, paths, states [M, 2]."""
    schedule = VP()
    model = GaussianMixture(schedule, torch.tensor([1.0]), torch.tensor([[0.5, -0.2]]), torch.eye(2)[None])
    policy, sde = Policy(model, model), SDE(schedule, noise_level(1.0))
    generator = torch.Generator().manual_seed(seed)
    ts, c = uniform(schedule, 8), Condition([""] * paths)
    path = rollout(policy, sde, ddim, ts, c, generator, reference_only=True)
    surrogate = RidgeSurrogate(nn.Flatten(), [""])
    known = torch.randn(200, 2, generator=generator)
    surrogate.add(known, Condition([""] * 200), known @ SLOPE)
    surrogate.fit()
    value = SurrogateValue(surrogate, sde, policy)
    t, x = ts[:-1].repeat_interleave(paths), path.xs[:-1].flatten(0, 1)
    with torch.no_grad():
        features = value.inputs_at(t, x, Condition([""] * len(t)))
    sample = Sample(t, features, (path.xs[-1] @ SLOPE).repeat(8), Condition([""] * len(t)))
    return SurrogateFit(value, BETA, loss), sample, x


def test_a_linear_rewards_value_is_its_value_at_the_expected_sample(generator: torch.Generator) -> None:
    fit, sample, x = problem(4_000, 0)
    fit.add(sample)
    fit.fit(generator)
    believed = fit.value.network
    late = slice(5, 9)  # at early times x_data_hat is nearly constant, and any a explains it
    assert float((believed.a[late] - 1).abs().max()) < 0.1  # type: ignore[index,operator]
    assert float(believed.b[late].abs().max()) < 0.1  # type: ignore[index,operator]
    value, gradient = fit.value.gradient(sample.t, x, sample.condition)
    expected, wanted = sa_value(fit.value, sample.t, x)
    assert float((value - expected).abs().mean()) < 0.05
    assert float((gradient - wanted).norm() / wanted.norm()) < 0.1


def sa_value(value: SurrogateValue, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """R(x_data_hat) and its gradient from the model's own score, without the surrogate."""
    x = x.clone().requires_grad_(True)
    policy = value._policy[0]
    estimate = value.sde.x_data_hat(t, x, policy.reference.score(t, x, Condition([""] * len(t))))
    found = estimate @ SLOPE
    (gradient,) = torch.autograd.grad(found.sum(), x)
    return found.detach(), gradient


def test_a_and_b_say_how_far_the_surrogate_can_be_believed(generator: torch.Generator) -> None:
    """Returns that are half the surrogate and 3: a = 1/2, b = 3, up to the prior of a few paths."""
    fit, sample, _ = problem(4_000, 1)
    guess = fit.value.surrogate.of_features(sample.features, sample.condition)  # type: ignore[attr-defined]
    fit.add(Sample(sample.t, sample.features, 0.5 * guess + 3, sample.condition))
    fit.fit(generator)
    believed = fit.value.network
    assert float((believed.a[5:9] - 0.5).abs().max()) < 0.05  # type: ignore[index,operator]
    assert float((believed.b[5:9] - 3).abs().max()) < 0.05  # type: ignore[index,operator]


def test_the_soft_value_is_that_of_normal_returns(generator: torch.Generator) -> None:
    """beta log E exp(R / beta) = mean + variance / (2 beta), here of x_data given x_t."""
    fit, sample, _ = problem(8_000, 2, "soft")
    fit.add(sample)
    fit.fit(generator)
    mean = fit.value.surrogate.of_features(sample.features, sample.condition)  # type: ignore[attr-defined]
    for k in (3, 5, 7):
        rows = slice(8_000 * k, 8_000 * (k + 1))
        left = (sample.target[rows] - mean[rows]).var()
        found = fit.value.of_inputs(sample.t[rows], sample.features[rows], sample.condition[rows_of(rows)])
        assert float((found - mean[rows]).mean()) == pytest.approx(float(left) / (2 * BETA), rel=0.25, abs=0.03)


def rows_of(rows: slice) -> Tensor:
    return torch.arange(rows.start, rows.stop)


def test_other_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="value_loss log_probability needs value network or linear"):
        problem(10, 0, "log_probability")


@pytest.mark.parametrize("algorithm", [pytest.param("ctrl", marks=pytest.mark.slow), "ctrl_pathwise"])
def test_a_run_reaches_most_of_the_optimum(algorithm: str) -> None:
    """What an untrained layer sees of a point says nearly all of the mixture's reward."""
    settings = {
        "value": "surrogate",
        "iterations": 20,
        "batch_size": 128,
        "heldout_samples": 1024,
        "evaluate_every": 20,
    }
    found = sa.finetune(recipes()["gaussian"].build(), algorithm=algorithm, reference_batches=4, **settings)
    assert found.final["objective/recovered"] > 0.7
