"""Steering against laws that are known: tilted Gaussians and mixtures, order statistics, the exact optimal policy."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scoreact.api.start import finetune
from scoreact.cli import main as cli
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.value import ValueNetwork
from scoreact.dynamics.grids import uniform, uniform_log_snr
from scoreact.dynamics.samplers import SAMPLERS, by_steps
from scoreact.dynamics.schedule import VP
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import SOLVERS
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.recipes.gaussian import linear_reward, mixture, quadratic_reward
from scoreact.rewards import Linear
from scoreact.runs.session import Session
from scoreact.runs.source import load_value
from scoreact.sampling.draw import draw
from scoreact.sampling.guided import Guided, Interpolated, RewardOfEstimate
from scoreact.sampling.particles import best_of, best_of_kl, smc, systematic
from scoreact.sampling.steering import METHODS, Steering
from scoreact.training.config import Config, usable
from scoreact.training.trainer import Trainer
from scoreact.types import Condition, ScoreFn

BETA = 0.7


def gaussian() -> GaussianMixture:
    """One Gaussian in one dimension: with it every kernel is linear in x, and the discrete law is known."""
    return GaussianMixture(VP(t_max=0.98), torch.ones(1), torch.tensor([[0.6]]), torch.tensor([[[0.5]]]))


def tilted_policy(base: GaussianMixture, linear: Tensor) -> Policy:
    """A policy near the optimum for R = linear.x: the score of the tilted law."""
    return Policy(base.tilted(linear, torch.zeros(len(linear), len(linear)), BETA)[0], base)


def discrete_law(score: ScoreFn, base: GaussianMixture, solver: str, ts: Tensor) -> tuple[float, float]:
    """Mean and variance of the path's end for a score linear in x, by the kernels' own coefficients, in float64."""
    sde, ts = SDE(base.schedule, noise_level(1.0)), ts.double()
    alpha, sigma = float(base.schedule.alpha(ts[:1])), float(base.schedule.sigma(ts[:1]))
    mean = alpha * float(base.means)
    variance = alpha**2 * float(base.covariances) + sigma**2
    for t0, t1 in pairwise(ts):
        step = SOLVERS[solver](sde, score, t0.expand(2), t1.expand(2), torch.tensor([[0.0], [1.0]]).double())
        offset, slope = float(step.mean[0]), float(step.mean[1] - step.mean[0])
        mean, variance = offset + slope * mean, slope**2 * variance + float(step.std[0]) ** 2
    return mean, variance


def exact_value(base: GaussianMixture, wanted: Any) -> Any:
    """V(t, x) = beta log E_ref[exp(R / beta) | x_t = x] with R of the noiseless data, by Bayes' rule."""
    tilted, j_star = base.tilted(wanted.linear, wanted.quadratic, BETA)

    def value(t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        return BETA * (tilted.log_prob(t, x) - base.log_prob(t, x)) + j_star

    return value


def weighted(log_z: Tensor, values: Tensor) -> tuple[float, float]:
    """sum Z f / sum Z and its standard error: with one sample a population, unbiased estimates of both sums."""
    z = (log_z - log_z.max()).exp()
    mean = (z * values).mean() / z.mean()
    return float(mean), float((z * (values - mean)).std() / z.mean() / len(z) ** 0.5)


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("value", ["exact", "estimate", "nothing"])
@pytest.mark.parametrize("proposed", [False, True])
def test_smc_weights_are_unbiased_for_any_value_proposal_and_kernel(solver: str, value: str, proposed: bool) -> None:
    base, ts = gaussian(), uniform(VP(t_max=0.98), 6)
    reward = Linear([0.8])
    policy, sde = tilted_policy(base, torch.tensor([0.5])), SDE(base.schedule, noise_level(1.0))
    values = {
        "exact": exact_value(base, reward),
        "estimate": RewardOfEstimate(policy, sde, reward),
        "nothing": lambda t, x, c: torch.zeros(len(x)),
    }
    found = smc(
        policy, values[value], reward, sde, SOLVERS[solver], ts, [""] * 3000, 4, BETA,
        torch.Generator().manual_seed(1), policy if proposed else None,
    )  # fmt: skip
    mean, variance = discrete_law(lambda t, x: base.double().score(t, x), base, solver, ts)
    pull = 0.8 / BETA
    assert found.log_z is not None
    z = found.log_z.exp()
    expected = math.exp(pull * mean + pull**2 * variance / 2)
    assert abs(float(z.mean()) - expected) < 4 * float(z.std()) / len(z) ** 0.5
    x_mean, error = weighted(found.log_z, found.x[:, 0].double())
    assert abs(x_mean - (mean + pull * variance)) < 4 * error
    square, error = weighted(found.log_z, (found.x[:, 0].double() - mean - pull * variance) ** 2)
    assert abs(square - variance) < 4 * error
    assert error < 0.1  # the test is able to fail


def test_smc_reaches_the_tilted_mixture_and_the_optimum_keeps_every_particle() -> None:
    base, reward = mixture(2, 4, 0), quadratic_reward(2, 0)
    tilted, j_star = base.tilted(reward.linear, reward.quadratic, BETA)
    policy, sde = Policy(tilted, base), SDE(base.schedule, noise_level(1.0))
    ts = uniform_log_snr(base.schedule, 40)

    def run(value: Any, proposal: Any) -> Any:
        return smc(
            policy, value, reward, sde, SOLVERS["ddim"], ts, [""] * 400, 16, BETA, torch.Generator().manual_seed(2),
            proposal,
        )  # fmt: skip

    good = run(exact_value(base, reward), None)
    draws = tilted.sample(200_000, torch.Generator().manual_seed(3))
    for function in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: reward(x, Condition([""] * len(x)))):
        mean, error = weighted(good.log_z, function(good.x).double())
        assert abs(mean - float(function(draws).mean())) < 4 * error + 0.03  # 0.03: the grid, and t_max 0.98
    assert abs(BETA * float(good.log_z.exp().mean().log()) - j_star) < 0.05
    optimal = run(exact_value(base, reward), policy)  # every weight the same, up to the prior's and the grid's
    assert optimal.effective > 0.8 > good.effective
    assert float(optimal.log_z.std()) < 0.6 * float(good.log_z.std())


def test_systematic_resampling_counts() -> None:
    weights = torch.tensor([[0.1, 0.35, 0.05, 0.5], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    totals = torch.zeros(2, 4)
    for place in torch.arange(0.0005, 1, 0.001, dtype=torch.float64):
        drawn = systematic(weights, place.expand(2, 1))
        counts = torch.stack([row.bincount(minlength=4) for row in drawn])
        assert bool((counts >= (4 * weights).floor()).all())
        assert bool((counts <= (4 * weights).ceil()).all())
        totals += counts
    assert torch.allclose(totals.double() / 1000, 4 * weights, atol=2e-3)


@pytest.mark.parametrize("count", [1, 5])
def test_best_of_is_the_largest_of_n(count: int) -> None:
    """F(max)^N of the model's own law is uniform: Kolmogorov-Smirnov."""
    base, ts = gaussian(), uniform(VP(t_max=0.98), 5)
    found = best_of(
        base, Linear([-2.0]), by_steps(SOLVERS["ddim"]), SDE(base.schedule, noise_level(1.0)), ts, [""] * 4000, count,
        torch.Generator().manual_seed(4),
    )  # fmt: skip
    mean, variance = discrete_law(lambda t, x: base.double().score(t, x), base, "ddim", ts)
    above = torch.special.ndtr(-(found.x[:, 0].double() - mean) / variance**0.5)  # the least x has the largest reward
    uniform_law = (above**count).sort().values
    steps = torch.arange(1, 4001) / 4000
    assert float((uniform_law - steps).abs().max()) < 1.95 / 4000**0.5  # p = 0.001
    assert torch.equal(found.rewards, -2 * found.x[:, 0])
    assert found.calls.reward == 4000 * count


def test_kl_of_best_of_n_is_the_integral() -> None:
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for count in (1, 2, 7):
        density = count * u ** (count - 1)
        assert best_of_kl(count) == pytest.approx(float((density * density.log()).mean()), abs=1e-5)


def trained() -> Policy:
    """A policy that differs from its reference."""
    policy = Policy(ResidualModel(mixture(2, 3, 0), 2, width=16), act_until=0.7)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in policy.trainable():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return policy


@pytest.mark.parametrize("solver", ["ddim", "euler_maruyama", "ode", "heun", "dpm_solver_pp_2m"])
def test_interpolation_is_the_reference_at_0_and_the_policy_at_1(solver: str) -> None:
    policy = trained()
    ts = uniform(policy.schedule, 6)

    def samples(model: Any) -> Tensor:
        return draw(model, [""] * 9, SAMPLERS[solver], ts, 3)[1]

    assert torch.equal(samples(Interpolated(policy, 0.0)), samples(policy.reference))
    assert torch.equal(samples(Interpolated(policy, 1.0)), samples(policy))
    assert not torch.equal(samples(Interpolated(policy, 1.5)), samples(policy))


def test_interpolation_scales_the_control(generator: torch.Generator) -> None:
    policy = trained()
    x, condition = torch.randn(20, 2, generator=generator), policy.condition([""] * 20)
    t = torch.linspace(0.05, 0.95, 20)
    change = (policy.score(t, x, condition) - policy.reference_score(t, x, condition)).detach()
    assert float(change[t < 0.7].abs().max()) > 0.1
    beyond = Interpolated(policy, 2.5).score(t, x, condition) - policy.reference_score(t, x, condition)
    assert torch.allclose(beyond, 2.5 * change, atol=1e-5)
    for strength in (0.0, 1.0):  # one network is enough there
        before = policy.network_calls
        Interpolated(policy, strength).score(t, x, condition)
        assert policy.network_calls - before == 20


@pytest.mark.parametrize("level", [0.5, 1.0])
def test_guidance_by_the_exact_value_is_the_exact_optimal_policy(level: float, generator: torch.Generator) -> None:
    base, reward = mixture(2, 4, 0), quadratic_reward(2, 0)
    policy, sde = Policy(base, base, act_until=0.6), SDE(base.schedule, noise_level(level))
    tilted = base.tilted(reward.linear, reward.quadratic, BETA)[0]
    t, x = torch.linspace(0.02, 0.95, 50), torch.randn(50, 2, generator=generator)
    condition = base.condition([""] * 50)
    guided = Guided(policy, exact_value(base, reward), sde, BETA)
    # g^2 / gain = 2 eta^2 / (1 + eta^2): 1 for the reverse SDE, where the optimum is the tilted law's own score
    factor = 2 * level**2 / (1 + level**2)
    optimal = base.score(t, x) + factor * (tilted.score(t, x) - base.score(t, x))
    assert torch.allclose(guided.score(t, x, condition), optimal, atol=2e-3)
    half = Guided(policy, exact_value(base, reward), sde, BETA, 0.5, until=0.6).score(t, x, condition)
    midway = base.score(t, x) + 0.5 * (optimal - base.score(t, x))
    assert torch.allclose(half[t < 0.6], midway[t < 0.6], atol=2e-3)
    assert torch.equal(half[t >= 0.6], base.score(t, x)[t >= 0.6])


def test_guided_samples_have_the_optimums_reward_and_path_kl() -> None:
    base, reward = mixture(2, 4, 0), quadratic_reward(2, 0)
    sde, ts = SDE(base.schedule, noise_level(1.0)), uniform_log_snr(base.schedule, 40)
    guided = Guided(Policy(base, base), exact_value(base, reward), sde, BETA)
    path = rollout(
        Policy(guided, base), sde, SOLVERS["ddim"], ts, base.condition([""] * 3000), torch.Generator().manual_seed(6)
    )
    gains = reward(path.xs[-1], path.condition) - BETA * path.path_kl()
    j_star = base.tilted(reward.linear, reward.quadratic, BETA)[1]
    assert abs(float(gains.mean()) - j_star) < 4 * float(gains.std()) / 3000**0.5 + 0.03


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["policy", "reference"])
def test_every_call_is_counted(method: str, base: str) -> None:
    policy, reward, steps, particles = trained(), linear_reward(2, 0), 5, 3
    sde = SDE(policy.schedule, noise_level(1.0))
    asked = {"reward": 0, "value": 0}

    def counted(kind: str, function: Any) -> Any:
        def call(*arguments: Any) -> Tensor:
            asked[kind] += len(arguments[-1])
            return function(*arguments)

        return call

    value = counted("value", lambda t, x, c: x.sum(1))
    steering = Steering(
        method, policy, counted("reward", reward), sde, "ddim", BETA, 1.5, particles, base, value, until=0.7
    )
    before = policy.network_calls
    found = steering(["", ""], uniform(policy.schedule, steps), torch.Generator().manual_seed(0))
    assert found.samples.shape == (2, 2)
    assert found.calls.network == policy.network_calls - before
    assert found.calls.value == asked["value"]
    # steps from t_min with act_until 0.7 or until 0.7: 4 of 5; interpolation asks both networks there
    expected = {
        "value": (2 * 5, 2 * 4, 0),
        "interpolate": (2 * (2 * 4 + 1), 0, 0),
        "best_of": (6 * 5, 0, 6),
        "smc": (6 * 5 * (2 if base == "policy" else 1), 6 * (1 + 3), 6),
    }
    assert (found.calls.network, found.calls.value, found.calls.reward) == expected[method]
    assert asked["reward"] == (6 if method in ("best_of", "smc") else 2)


def test_a_value_network_shares_the_look_at_the_reference(generator: torch.Generator) -> None:
    policy = trained()
    sde = SDE(policy.schedule, noise_level(1.0))
    value = ValueNetwork(VectorValue(4, 16), sde, policy)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(value.network.net.last.weight)  # type: ignore[union-attr]
    t, x, condition = torch.full((9,), 0.3), torch.randn(9, 2, generator=generator), policy.condition([""] * 9)
    optimal = sde.optimal_action(t, policy.reference_score(t, x, condition), value.gradient(t, x, condition)[1], BETA)
    guided, before = Guided(policy, value, sde, BETA), policy.network_calls
    assert torch.allclose(guided.score(t, x, condition), optimal)
    assert policy.network_calls - before == 9
    steering = Steering(
        "smc", policy, linear_reward(2, 0), sde, kl_weight=BETA, particles=3, base="reference", value=value
    )
    found = steering([""], uniform(policy.schedule, 5), generator)
    assert (found.calls.network, found.calls.value, found.calls.reward) == (15, 15, 3)


def test_smc_without_a_value_counts_the_rewards_of_its_estimates() -> None:
    policy, reward = trained(), linear_reward(2, 0)
    steering = Steering("smc", policy, reward, SDE(policy.schedule, noise_level(1.0)), kl_weight=BETA, particles=3)
    found = steering(["", ""], uniform(policy.schedule, 5), torch.Generator().manual_seed(0))
    assert (found.calls.reward, found.calls.value) == (6 * 6, 0)  # 5 times along the path, and the end


def test_what_cannot_be_steered_is_refused() -> None:
    policy, reward = trained(), linear_reward(2, 0)
    sde = SDE(policy.schedule, noise_level(1.0))
    with pytest.raises(ValueError, match=r"steering by 'luck' is unknown. Known: value, interpolate"):
        Steering("luck", policy, reward, sde)
    with pytest.raises(ValueError, match="smc weighs the steps of a path, so solver heun"):
        Steering("smc", policy, reward, sde, "heun")
    with pytest.raises(ValueError, match="steering by value needs a value network"):
        Steering("value", policy, reward, sde)
    with pytest.raises(ValueError, match="base is 'both'; known: reference, policy"):
        Guided(policy, lambda t, x, c: x.sum(1), sde, 1.0, base="both")
    with pytest.raises(ValueError, match="one particle or more, got 0"):
        smc(policy, lambda t, x, c: x[:, 0], reward, sde, SOLVERS["ddim"], uniform(policy.schedule, 3), [""], 0, 1.0,
            torch.Generator())  # fmt: skip


SMALL: dict[str, Any] = {
    "iterations": 2, "batch_size": 32, "steps": 4, "solver": "euler_maruyama", "kl_weight": 0.5, "value_steps": 3,
    "value_first_steps": 5, "value_batch_size": 32, "reference_batches": 2, "heldout_samples": 32, "minibatch_size": 64,
    "evaluate_every": 1, "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"value": "residual"}, {"target_kl": 0.1}])
def test_a_run_leaves_its_value(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Trainer] = []
    finish = Session._finish
    monkeypatch.setattr(Session, "_finish", lambda self, stopped: kept.append(self.trainer) or finish(self, stopped))

    def make() -> VectorValue:
        return VectorValue(2 if "value" in settings else 4, 16)

    reward = linear_reward(2, 0)
    model = ResidualModel(mixture(2, 3, 0), 2, width=16)
    result = finetune(model, reward, [""], value_network=make, out=tmp_path / "run", **{**SMALL, **settings})
    trainer = kept[0]
    value, price = load_value(tmp_path / "run" / "value.safetensors", make, trainer.config, result.policy, reward)
    assert price == pytest.approx(trainer.algorithm.kl_weight, rel=1e-6)
    assert (price != 0.5) == ("target_kl" in settings)
    assert isinstance(value, ValueNetwork)
    t, x = torch.full((7,), 0.4), torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    condition = model.condition([""] * 7)
    with torch.no_grad():
        assert torch.equal(value(t, x, condition), trainer.value.value(t, x, condition))
    assert (tmp_path / "run" / "best" / "value.safetensors").is_file()
    with pytest.raises(ValueError, match="is another network's"):
        load_value(tmp_path / "run" / "value.safetensors", lambda: VectorValue(2 if "value" in settings else 4, 8),
                   trainer.config, result.policy, reward)  # fmt: skip


def test_a_rule_without_a_value_leaves_none(tmp_path: Path) -> None:
    model = ResidualModel(mixture(2, 3, 0), 2, width=16)
    result = finetune(
        model, linear_reward(2, 0), [""], out=tmp_path / "run", **usable(Config(), {**SMALL, "algorithm": "ddpo"})
    )
    assert not (tmp_path / "run" / "value.safetensors").exists()
    with pytest.raises(ValueError, match=r"does not exist: this run's rule fits no value \(ctrl\)"):
        load_value(tmp_path / "run" / "value.safetensors", None, Config(), result.policy, linear_reward(2, 0))


def test_the_command_line_steers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert cli.main(["train", "gaussian", "--out", run, *words, "--option", "width=8"]) == 0
    capsys.readouterr()
    drawn = {}
    for method, more in (
        ("value", ["--strength", "2"]), ("interpolate", ["--strength", "0"]), ("best_of", ["--particles", "16"]),
        ("smc", ["--particles", "16"]), ("smc", ["--particles", "16", "--reference"]),
    ):  # fmt: skip
        assert (
            cli.main(["sample", run, "--count", "30", "--steps", "6", "--solver", "ddim", "--steer", method, *more])
            == 0
        )
        out = capsys.readouterr().out
        assert "network calls" in out
        drawn[method] = float(out.split("reward")[1].split()[0])
    assert drawn["best_of"] > drawn["interpolate"] + 0.3
    assert {p.parent.name for p in (tmp_path / "run" / "samples").glob("*/samples.npy")} == {
        "final-value-2-ddim-6-seed0", "final-interpolate-0-ddim-6-seed0", "final-best_of-16-ddim-6-seed0",
        "final-smc-16-ddim-6-seed0", "pretrained-smc-16-ddim-6-seed0",
    }  # fmt: skip
    assert cli.main(["sample", run, "--steer", "smc", "--solver", "heun"]) == 2
    assert "smc weighs the steps of a path" in capsys.readouterr().err
    assert cli.main(["sample", run, "--steer", "interpolate", "--reference"]) == 2
    assert cli.main(["sample", "gaussian", "--steer", "value"]) == 2
    assert "needs a run, not a recipe" in capsys.readouterr().err
