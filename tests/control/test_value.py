"""Values: the martingale property of the true V, minimisers of the losses, gradients, V(1, .) = R, the fit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from scoreact.control.advantage import explained_variance
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.value import ResidualValue, ValueNetwork
from scoreact.control.value_fit import Sample, ValueFit, logit_of, martingale_loss, soft_loss
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import VP
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.recipes.gaussian import linear_reward, mixture, quadratic_reward
from scoreact.training.config import Config, updated
from scoreact.training.state import restore, state_of
from scoreact.training.trainer import Trainer
from scoreact.types import Condition

BETA = 0.7


def network(dim: int, inputs: str = "both", seed: int = 0) -> VectorValue:
    """Weights that are not zero anywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = VectorValue(dim * (2 if inputs == "both" else 1), 32)
        torch.nn.init.normal_(made.net.last.weight, std=0.3)
    return made


def problem(dim: int = 2) -> tuple[Policy, SDE]:
    base = mixture(dim, 3, 0)
    return Policy(base, base), SDE(base.schedule, noise_level(1.0))


def test_true_value_has_martingale_increments(generator: torch.Generator) -> None:
    """One Gaussian, quadratic reward: along the optimum beta log(p*_t / p_t) + J* less the costs is a martingale."""
    schedule, beta, count = VP(t_max=0.999), 0.8, 4000
    base = GaussianMixture(schedule, torch.ones(1), torch.full((1, 2), 0.4), 0.5 * torch.eye(2).unsqueeze(0))
    reward = quadratic_reward(2, 0)
    optimum, best = base.tilted(reward.linear, reward.quadratic, beta, reward.constant)
    sde, ts = SDE(schedule, noise_level(1.0)), uniform(schedule, 400)
    path = rollout(Policy(optimum, base), sde, ddim, ts, Condition([""] * count), generator)

    def value(k: int) -> Tensor:
        t = ts[k].expand(count)
        return beta * (optimum.log_prob(t, path.xs[k]) - base.log_prob(t, path.xs[k])) + best

    checked = 0
    for begin, end in ((0, 100), (100, 200), (200, 300), (300, 399)):
        cost = beta * (0.5 * path.controls[begin:end] ** 2).sum((0, 2))
        increment = value(end) - value(begin) - cost
        error = float(increment.std()) / math.sqrt(count)
        assert abs(float(increment.mean())) < 4 * error + 0.005  # 0.005: discretisation, 400 steps
        assert float(cost.mean()) < 1e-3 or abs(float((increment + cost).mean())) > 0.8 * float(cost.mean()) - 4 * error
        checked += float(cost.mean()) > 10 * error
    assert checked >= 1  # without the cost the test would fail
    # and V at the path's end is the reward
    assert float((value(400) - reward(path.xs[-1], path.condition)).abs().mean()) < 0.05


def minimiser(loss: object, targets: Tensor) -> float:
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS(
        [v], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-14, tolerance_change=1e-16
    )

    def closure() -> Tensor:
        steps.zero_grad()
        value: Tensor = loss(v.expand(len(targets)), targets, BETA)  # type: ignore[operator]
        value.backward()  # type: ignore[no-untyped-call]
        return value

    steps.step(closure)  # type: ignore[no-untyped-call]
    return v.item()


def test_minimisers_of_the_losses(generator: torch.Generator) -> None:
    targets = 0.4 * torch.rand(500, generator=generator, dtype=torch.float64) + 1.0
    assert minimiser(martingale_loss, targets) == pytest.approx(float(targets.mean()), abs=1e-6)
    assert minimiser(soft_loss, targets) == pytest.approx(BETA * float((targets / BETA).exp().mean().log()), abs=1e-6)


def test_logits_of_log_probabilities() -> None:
    logits = torch.tensor([-60.0, -20.0, -1.0, 0.0, 3.0, 20.0, 60.0], dtype=torch.float64)
    found = logit_of(torch.nn.functional.logsigmoid(logits))
    torch.testing.assert_close(found, logits.clamp(-30, 30), rtol=1e-6, atol=1e-6)
    single = logit_of(torch.nn.functional.logsigmoid(logits[1:6].float()))
    torch.testing.assert_close(single, logits[1:6].float(), rtol=1e-4, atol=1e-4)
    assert float(logit_of(torch.zeros(1))) == 30, "a certain property, log p = 0"


def test_value_of_a_log_probability_is_the_mean_probability(generator: torch.Generator) -> None:
    """V = beta log E sigmoid(l), l normal: against the mean of 200,000 draws; MacKay's form is right to 0.02 or so."""
    policy, sde = problem()
    t, x, empty = torch.full((4,), 0.55), torch.randn(4, 2, generator=generator), Condition([""] * 4)
    value = ValueNetwork(network(2), sde, policy, log_sigmoid=BETA)
    with torch.no_grad():
        value.shift.fill_(-0.5)
        value.scale.fill_(2.0)
        value.log_spread.copy_(torch.linspace(0.3, -0.7, 11))
        spread = math.exp(0.3 - 0.55)
        torch.testing.assert_close(value.spread(t), torch.full((4,), spread))
        output = value.network(value.inputs_at(t, x, empty), t, empty)
        draws = -0.5 + 2.0 * (output + spread * torch.randn(200_000, 1, generator=generator))
        torch.testing.assert_close((value(t, x, empty) / BETA).exp(), draws.sigmoid().mean(0), rtol=0, atol=0.02)


def test_log_probabilities_are_fitted_by_the_likelihood_of_the_logit(generator: torch.Generator) -> None:
    """A constant state: mean and spread of the logits are found; costs reweigh, as if the reference had drawn."""
    policy, sde = problem()
    logits = torch.cat([torch.full((500,), 2.0), torch.full((500,), -4.0)])
    log_p = torch.nn.functional.logsigmoid(logits)
    t, empty = torch.full((1000,), 0.5), Condition([""] * 1000)
    costs = torch.where(logits > 0, -BETA * math.log(3.0) + 0.5 * BETA, 0.5 * BETA)  # the first count three times
    for later, mean in ((None, -1.0), (costs, (3 * 2.0 - 4.0) / 4)):
        value = ValueNetwork(network(2), sde, policy, log_sigmoid=BETA)
        fit = ValueFit(value, BETA, "log_probability", 1e-2, first_steps=400)
        target = BETA * log_p if later is None else BETA * log_p - later
        fit.add(Sample(t, torch.zeros(1000, 4), target, empty, later))
        fit.fit(generator)
        with torch.no_grad():
            output = value.shift + value.scale * value.network(torch.zeros(1, 4), t[:1], empty)
            found = float(value.scale * value.spread(t[:1]))
        share = (mean + 4) / 6
        assert float(output) == pytest.approx(mean, abs=0.15)
        assert found == pytest.approx(6 * math.sqrt(share * (1 - share)), rel=0.05)


def test_soft_loss_bounds_the_pull_of_one_sample() -> None:
    v = torch.zeros(1, requires_grad=True)
    pulls = []
    for target in (3.0, 30.0, 300.0):
        (gradient,) = torch.autograd.grad(soft_loss(v, torch.tensor([target]), 1.0), v)
        pulls.append(float(gradient))
    assert pulls == pytest.approx([-(math.exp(2) - 1)] * 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["x", "x_data_hat", "both", "residual"])
def test_gradient_against_finite_differences(kind: str, generator: torch.Generator) -> None:
    policy, sde = problem()
    if kind == "residual":
        value: ValueNetwork = ResidualValue(network(2, "x"), sde, policy, quadratic_reward(2, 0))
    else:
        value = ValueNetwork(network(2, kind), sde, policy, kind)
    value.shift.fill_(0.3)
    value.scale.fill_(1.7)
    t, x = torch.tensor([0.2, 0.6, 0.95]), torch.randn(3, 2, generator=generator)
    empty = Condition([""] * 3)
    found, gradient = value.gradient(t, x, empty)
    assert not found.requires_grad
    assert not gradient.requires_grad
    torch.testing.assert_close(found, value(t, x, empty).detach())
    h = 1e-2
    for i in range(2):
        step = torch.zeros(2)
        step[i] = h
        with torch.no_grad():
            slope = (value(t, x + step, empty) - value(t, x - step, empty)) / (2 * h)
        torch.testing.assert_close(gradient[:, i], slope, rtol=2e-2, atol=2e-3)


def test_residual_value_is_the_reward_at_the_end(generator: torch.Generator) -> None:
    base = mixture(2, 3, 0)
    base._schedule = VP(t_max=1.0)
    policy, reward = Policy(base, base), linear_reward(2, 0)
    value = ResidualValue(network(2, "x"), SDE(base.schedule, noise_level(1.0)), policy, reward)
    x, empty = torch.randn(50, 2, generator=generator), Condition([""] * 50)
    with torch.no_grad():
        torch.testing.assert_close(value(torch.ones(50), x, empty), reward(x, empty), rtol=1e-5, atol=1e-5)
        middle = value(torch.full((50,), 0.5), x, empty)
    assert float((middle - reward(x, empty)).abs().mean()) > 0.1


def test_a_fit_asks_for_the_reward_of_a_state_once(generator: torch.Generator) -> None:
    """The paper's value returns to its states thousands of times; with the rewards known it is the same value."""
    policy, sde = problem()
    asked: list[int] = []

    def reward(x: torch.Tensor, condition: Condition) -> torch.Tensor:
        asked.append(len(x))
        return quadratic_reward(2, 0)(x, condition)

    value = ResidualValue(network(2, "x"), sde, policy, reward)
    t, x, empty = torch.rand(40, generator=generator), torch.randn(40, 2, generator=generator), Condition([""] * 40)
    fit = ValueFit(value, kl_weight=1.0, batch_size=16, steps=7, first_steps=9)
    fit.add(Sample(t, value.inputs_at(t, x, empty), torch.randn(40, generator=generator), empty))
    fit.fit(generator)
    rows = torch.arange(40)
    found = fit.values_at(0, rows)
    assert sum(asked) == 40
    torch.testing.assert_close(found, value(t, x, empty))
    fit.memory[0].rewards.add_(1)  # type: ignore[union-attr]
    assert bool((fit.values_at(0, rows) > found).all())  # they are what V is made of


def test_of_inputs_is_the_value(generator: torch.Generator) -> None:
    policy, sde = problem()
    value = ValueNetwork(network(2), sde, policy)
    t, x, empty = torch.rand(6, generator=generator), torch.randn(6, 2, generator=generator), Condition([""] * 6)
    features = value.inputs_at(t, x, empty)
    known = value.inputs_at(t, x, empty, policy.reference_score(t, x, empty))
    torch.testing.assert_close(features, known)
    torch.testing.assert_close(value.of_inputs(t, features, empty), value(t, x, empty))
    alpha, sigma = sde.schedule.alpha(t), sde.schedule.sigma(t)
    torch.testing.assert_close(features[:, :2], (alpha / (alpha**2 + sigma**2).sqrt()).unsqueeze(1) * x)


def test_at_pure_noise_the_state_does_not_matter(generator: torch.Generator) -> None:
    policy, sde = problem()
    value = ValueNetwork(network(2), sde, policy)
    x, empty = torch.randn(6, 2, generator=generator), Condition([""] * 6)
    early = value.gradient(torch.zeros(6), x, empty)[1].norm()
    assert float(early) < 0.05 * float(value.gradient(torch.full((6,), 0.9), x, empty)[1].norm())


def test_unknown_names_are_told() -> None:
    policy, sde = problem()
    with pytest.raises(ValueError, match=r"value inputs 'y' unknown\. Known: x_data_hat, x, both"):
        ValueNetwork(network(2), sde, policy, "y")
    with pytest.raises(ValueError, match=r"unknown value loss 'l1'\. Known: martingale, soft"):
        ValueFit(ValueNetwork(network(2), sde, policy), 1.0, "l1")


def samples(policy: Policy, sde: SDE, seed: int, offset: float = 0.0) -> Sample:
    """States of the reference's paths and their rewards."""
    generator = torch.Generator().manual_seed(seed)
    ts = uniform(sde.schedule, 8)
    path = rollout(policy, sde, ddim, ts, Condition([""] * 256), generator, reference_only=True)
    x = path.xs[:-1].flatten(0, 1)
    t = ts[:-1].repeat_interleave(256)
    condition = Condition([""] * len(t))
    rewards = linear_reward(2, 0)(path.xs[-1], condition[torch.arange(256)]) + offset
    features = ValueNetwork(network(2), sde, policy).inputs_at(t, x, condition)
    return Sample(t, features, rewards.repeat(8), condition)


def test_fit_explains_returns_on_fresh_paths(generator: torch.Generator) -> None:
    policy, sde = problem()
    fit = ValueFit(ValueNetwork(network(2), sde, policy), BETA, first_steps=150)
    for seed in range(4):
        fit.add(samples(policy, sde, seed, 100.0))  # an offset that only `shift` can carry so fast
    fit.fit(generator)
    fresh = samples(policy, sde, 99, 100.0)
    with torch.no_grad():
        value = fit.value.of_inputs(fresh.t, fresh.features, fresh.condition)
    last = fresh.t > 0.8  # there the state decides the reward; at the start nothing can be known
    assert explained_variance(value[last], fresh.target[last]) > 0.8
    assert explained_variance(value, fresh.target) > 0.3


def one(fit: ValueFit, sample: Sample) -> ValueFit:
    """The fit, remembering this sample alone."""
    fit.memory[:] = [sample]
    return fit


def test_the_slope_of_returns_on_the_value(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns 3 V + noise of a path: slope 3, and the error that 40 repetitions show, however many states a path has."""
    policy, sde = problem()
    fit = ValueFit(ValueNetwork(network(2), sde, policy), BETA)
    monkeypatch.setattr(fit.value, "of_inputs", lambda t, features, condition: features[:, 0])
    for states in (1, 6):
        found: list[tuple[float, float]] = []
        for _ in range(40):
            value, noise = torch.randn(2, 40, generator=generator)
            t = torch.arange(states).repeat_interleave(40) / 10
            target = (3 * value + 2 * noise + 7).repeat(states)
            sample = Sample(t, value.repeat(states).unsqueeze(1), target, Condition([""] * len(t)))
            metrics = one(fit, sample).slope_of_newest(1, generator)
            assert metrics["value/explained_variance"] == pytest.approx(
                explained_variance(sample.features[:, 0], target), abs=1e-4
            )
            found.append((metrics["value/slope"], metrics["value/slope_error"]))
        slopes, errors = torch.tensor(found).T
        assert float(slopes.mean()) == pytest.approx(3.0, abs=3 * float(slopes.std()) / 40**0.5)
        assert 0.75 < float(slopes.std()) / float(errors.mean()) < 1.33
        assert float(errors.mean()) == pytest.approx(2 / 40**0.5, rel=0.15)
    monkeypatch.setattr(fit.value, "of_inputs", lambda t, features, condition: torch.zeros_like(t))
    assert "value/slope" not in one(fit, sample).slope_of_newest(1, generator)  # V the same everywhere


def test_replay_forgets_only_after_the_first_fit(generator: torch.Generator) -> None:
    policy, sde = problem()
    fit = ValueFit(ValueNetwork(network(2), sde, policy), BETA, steps=1, first_steps=1, replay=2)
    kept = [samples(policy, sde, seed) for seed in range(5)]
    for sample in kept[:3]:
        fit.add(sample)
    assert fit.memory == kept[:3]
    fit.fit(generator)
    for sample in kept[3:]:
        fit.add(sample)
    assert fit.memory == kept[3:]


def test_fit_depends_on_the_generator_only() -> None:
    def fitted(seed: int) -> Tensor:
        policy, sde = problem()
        fit = ValueFit(ValueNetwork(network(2), sde, policy), BETA, first_steps=5)
        fit.add(samples(policy, sde, 0))
        fit.fit(torch.Generator().manual_seed(seed))
        return torch.cat([p.detach().flatten() for p in fit.parameters])

    assert torch.equal(fitted(1), fitted(1))
    assert not torch.equal(fitted(1), fitted(2))


def test_a_run_that_goes_on_knows_the_rewards_of_its_states() -> None:
    """Bit for bit what the run would have been, and as many reward calls."""

    def trainer() -> Trainer:
        torch.manual_seed(0)
        config = updated(Config(), {
            "algorithm": "ctrl", "value": "residual", "iterations": 3, "batch_size": 8, "steps": 3, "reference_batches": 1,
            "value_first_steps": 3, "value_steps": 2, "value_batch_size": 16, "value_replay": 2, "value_loss": "soft",
            "heldout_samples": 2, "device": "cpu",
        })  # fmt: skip
        base = mixture(2, 3, 0)
        return Trainer(
            ResidualModel(base, dim=2), quadratic_reward(2, 0), [""], lambda: network(2, "x_data_hat"), config
        )

    whole, first, second = trainer(), trainer(), trainer()
    for each, count in ((whole, 3), (first, 2)):
        each.look_at_reference()
        for _ in range(count):
            each.iterate()
    restore(second, copy.deepcopy(state_of(first)))
    second.iteration = 2  # the checkpoint's number
    second.iterate()
    assert second.reward.calls == whole.reward.calls
    expected, found = state_of(whole), state_of(second)
    assert all(torch.equal(found["policy"][name], tensor) for name, tensor in expected["policy"].items())
    assert all(
        torch.equal(b["rewards"], a["rewards"]) for a, b in zip(expected["memory"], found["memory"], strict=True)
    )
