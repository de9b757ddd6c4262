"""`adjoint_matching`, `draft` and `q_learning`, on problems whose optimal control is known on the grid itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_problem import DIM, Gaussian, Setup, kept, worst
from torch import Tensor, nn

from scoreact.algorithms.adjoint_matching import AdjointMatching
from scoreact.algorithms.draft import DRaFT
from scoreact.algorithms.q_learning import QLearning
from scoreact.api.result import Result
from scoreact.control import transitions
from scoreact.control.critic import Critic
from scoreact.control.rollout import gaussian_actions
from scoreact.control.trajectory import Trajectory
from scoreact.control.transitions import Paths
from scoreact.control.value import ValueNetwork
from scoreact.dynamics.schedule import VP, RectifiedFlow, Schedule
from scoreact.dynamics.solvers import SOLVERS
from scoreact.rewards import Quadratic, checked, clip, weighted_sum
from scoreact.rewards.base import FunctionReward
from scoreact.rewards.user import adapt
from scoreact.rewards.weighted_statistics import WeightedStatistics
from scoreact.types import Condition

BETA, STEPS = 0.7, 4
LINEAR = Quadratic(0.0, linear=[0.8, -0.5])
QUADRATIC = Quadratic([[0.9, 0.2], [0.2, 0.4]], linear=[0.8, -0.5])


def setup_of(schedule: Schedule | None = None, solver: str = "euler_maruyama") -> Setup:
    return Setup(SOLVERS[solver], BETA, STEPS, schedule=schedule, reward=QUADRATIC)


def gaussian(reward: Quadratic, solver: str = "euler_maruyama") -> Gaussian:
    return Gaussian(reward, SOLVERS[solver], BETA, STEPS)


def cost_rate(setup: Setup, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """The policy's score, and beta / 2 |u|^2, by the formulas of the SDE."""
    score, reference = setup.policy.model.score(t, x, condition), setup.base.score(t, x)
    return score, BETA / 2 * setup.sde.control(t, score, reference).square().sum(1)


def simulated(setup: Setup, path: Trajectory, first: int) -> Tensor:
    """Running cost - reward of each path simulated again from `first`, written out: [B]."""
    x, cost = path.xs[first], torch.zeros(path.xs.shape[1])
    for k in range(first, STEPS):
        t, dt = path.ts[k].expand(len(x)), path.ts[k + 1] - path.ts[k]
        score, rate = cost_rate(setup, t, x, path.condition)
        cost = cost + rate * dt
        x = x + setup.sde.drift(t, x, score) * dt + setup.sde.diffusion(t).unsqueeze(1) * dt.sqrt() * path.noise[k]
    return cost - QUADRATIC(x, path.condition)


# --- adjoint_matching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_adjoint_of_a_linear_reward_is_the_optimal_control(solver: str, generator: torch.Generator) -> None:
    """Independently: d E R(x_N) / d w_k by pushing a unit of w_k forward through the reference's steps."""
    problem = gaussian(LINEAR, solver)
    policy = problem.policy(torch.zeros(STEPS, DIM, DIM), 0.3 * torch.ones(STEPS, DIM))
    rule = AdjointMatching(policy, problem.sde, problem.solver, None, BETA, checked(LINEAR))
    paths = problem.paths(policy, 20, generator)
    target = rule.prepare(paths, generator, 1.0).target.reshape(STEPS, 20, DIM)
    for k in range(STEPS):
        for i in range(DIM):
            x = problem.std[k] * torch.eye(DIM)[i]
            for later in range(k + 1, STEPS):
                x = problem.a[later] @ x
            best = float(x @ LINEAR.linear.float()) / BETA
            torch.testing.assert_close(target[k, :, i], torch.full((20,), best), atol=1e-4, rtol=1e-4)


def test_adjoint_matching_stands_still_at_the_grids_optimum_only(generator: torch.Generator) -> None:
    """Quadratic reward: w - target is uncorrelated with 1 and x at the Riccati optimum, and not elsewhere."""
    problem = gaussian(QUADRATIC)
    gains, offsets = problem.optimum()

    def moments(offsets: Tensor) -> float:
        policy = problem.policy(gains, offsets)
        rule = AdjointMatching(policy, problem.sde, problem.solver, None, BETA, checked(QUADRATIC))
        paths = problem.paths(policy, 4000, generator)
        batch = rule.prepare(paths, generator, 1.0)
        wrong = (batch.control - batch.target).reshape(STEPS, 4000, DIM, 1)
        tests = torch.cat([torch.ones(STEPS, 4000, 1), paths.trajectory.xs[:-1]], dim=2).unsqueeze(2)
        return worst((wrong * tests).transpose(0, 1).flatten(1))

    assert moments(offsets) < 4
    assert moments(offsets + 0.1) > 8


def test_adjoint_matching_counts_its_calls_and_knows_its_kl(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = gaussian(QUADRATIC)
    policy = problem.policy(*problem.optimum())
    reward = checked(QUADRATIC)
    rule = AdjointMatching(policy, problem.sde, problem.solver, None, BETA, reward)
    paths = problem.paths(policy, 50, generator)
    path = paths.trajectory
    unread = Paths(
        replace(path, references=path.references * math.nan, controls=path.controls * math.nan), paths.rewards
    )
    policy.network_calls = 0
    batch = rule.prepare(unread, generator, 1.0)
    assert (policy.network_calls, reward.calls) == (50 * STEPS, 50)
    assert rule.metrics["policy/kl"] == pytest.approx(float(path.path_kl().mean()), rel=1e-4)
    torch.testing.assert_close(batch.control, path.controls.flatten(0, 1), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(transitions, "CHUNK", 7)
    torch.testing.assert_close(rule.prepare(unread, generator, 1.0).target, batch.target)


def test_some_steps_are_matched_and_far_ones_are_left_alone(generator: torch.Generator) -> None:
    problem = gaussian(QUADRATIC)
    policy = problem.policy(*problem.optimum())
    make = (policy, problem.sde, problem.solver, None, BETA, checked(QUADRATIC))
    paths = problem.paths(policy, 50, generator)
    early = set()
    for _ in range(20):
        batch = AdjointMatching(*make, matched_steps=3).prepare(paths, generator, 1.0)
        taken = sorted({int((problem.ts - t).abs().argmin()) for t in batch.t0})
        assert (len(batch), len(taken), taken[1:], batch.steps) == (150, 3, [2, 3], STEPS)
        early.add(taken[0])
    assert early == {0, 1}
    whole = AdjointMatching(*make)
    batch = whole.prepare(paths, generator, 1.0)
    squares = ((batch.control - batch.target) ** 2).sum(1) * BETA**2 / (batch.t1 - batch.t0)
    limit = float(squares.sort().values[99:101].mean())
    limited = AdjointMatching(*make, loss_limit=limit)
    near = batch[torch.nonzero(squares < limit).flatten()]
    (all_of_them,) = torch.autograd.grad(limited.loss(batch)[0] * len(batch), policy.trainable())
    (near_ones,) = torch.autograd.grad(whole.loss(near)[0] * len(near), policy.trainable())
    assert len(near) == 100
    torch.testing.assert_close(all_of_them, near_ones, rtol=1e-4, atol=1e-4)


# --- draft ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_steps", [0, 1, 2])
def test_draft_is_the_derivative_of_the_simulation(last_steps: int, generator: torch.Generator) -> None:
    setup = setup_of()
    path = setup.paths(64, generator, with_reference=False)
    rows = setup.rule(DRaFT, last_steps=last_steps).prepare(Paths(path, torch.zeros(64)), generator, 1.0)
    mine = setup.rule(DRaFT, last_steps=last_steps).loss(rows)[0]
    first = STEPS - (last_steps or STEPS)
    assert torch.equal(rows.x, path.xs[first])
    wanted = simulated(setup, path, first).mean()
    if last_steps:  # the earlier steps' own cost, at one state a path
        k = torch.stack([(path.ts - t).abs().argmin() for t in rows.early_t[:, 0]])
        assert set(k.tolist()) == set(range(first))
        assert torch.equal(rows.early_x, path.xs[k, torch.arange(64)])
        rate = cost_rate(setup, path.ts[k], rows.early_x, path.condition)[1]
        wanted = wanted + (first * rate * (path.ts[k + 1] - path.ts[k])).mean()
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(setup.gradient(mine), setup.gradient(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_draft_of_all_steps_draws_its_own_paths(recompute: bool, generator: torch.Generator) -> None:
    """As if they had been rolled out: the same prior and noise, the same derivative; no other reward or network call."""
    setup = setup_of()
    rule = setup.rule(DRaFT, recompute=recompute)
    assert rule.own_rows
    rows = rule.rows_for([""] * 64, setup.ts, generator)
    assert worst(rows.noise.reshape(-1, DIM)) < 4
    assert float(rows.noise.std()) == pytest.approx(1.0, abs=0.1)
    path = setup.paths(64, generator)  # only the shape of a trajectory is its own
    path = replace(path, xs=rows.x.expand(STEPS + 1, -1, -1), noise=rows.noise.transpose(0, 1))
    setup.policy.network_calls = setup.reward.calls = 0
    loss, _ = rule.loss(rows)
    assert (setup.policy.network_calls, setup.reward.calls) == (2 * 64 * STEPS, 64)
    costs = simulated(setup, path, 0)
    torch.testing.assert_close(loss, costs.mean(), rtol=1e-4, atol=1e-5)
    assert rule.metrics["objective/J_training"] == pytest.approx(-costs.mean().item(), rel=1e-4)
    mine = setup.gradient(loss)
    again = STEPS - 1 if recompute else 0  # steps computed a second time
    assert setup.policy.network_calls == 2 * 64 * (STEPS + again)
    torch.testing.assert_close(mine, setup.gradient(costs.mean()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [{"last_steps": 2}, {"last_steps": 2, "variant": "alignprop"}])
def test_draft_of_some_steps_draws_the_others_without_a_gradient(
    settings: dict[str, Any], generator: torch.Generator
) -> None:
    """As a rollout's states are: what `prepare` makes of the same paths gives the same loss and gradient, for fewer calls."""
    setup = setup_of()
    rule = setup.rule(DRaFT, **settings)
    setup.policy.network_calls = setup.reward.calls = 0
    same = torch.Generator().manual_seed(5)
    rows = rule.rows_for([""] * 64, setup.ts, torch.Generator().manual_seed(5))
    k = len(rows.acts)
    assert (setup.policy.network_calls, setup.reward.calls) == (64 * (STEPS - k), 0)
    assert not rows.x.requires_grad
    x, noise = setup.policy.reference.prior(rows.condition, same), torch.randn(64, STEPS, DIM, generator=same)
    assert torch.equal(rows.noise, noise[:, STEPS - k :])
    drawn = rule._states(x, setup.ts, noise, rows.condition, [True] * (STEPS - k))
    assert torch.equal(rows.x, drawn[-1])
    path = setup.paths(64, generator, with_reference=False)
    # the steps without a gradient are a rollout's
    states = rule._states(path.xs[0], path.ts, path.noise.transpose(0, 1), path.condition, [True] * STEPS)
    torch.testing.assert_close(states, path.xs)
    noise = torch.cat([path.noise[: STEPS - k], rows.noise.transpose(0, 1)])
    path = replace(path, xs=rows.x.expand(STEPS + 1, -1, -1), noise=noise)
    at = torch.stack([(path.ts - t).abs().argmin() for t in rows.early_t[:, 0]])
    assert set(at.tolist()) == {0, 1}  # the steps before the last two
    assert torch.equal(rows.early_x, drawn[at, torch.arange(64)])
    early = cost_rate(setup, path.ts[at], rows.early_x, path.condition)[1] * (path.ts[at + 1] - path.ts[at])
    mine, wanted = rule.loss(rows)[0], (simulated(setup, path, STEPS - k) + 2 * early).mean()
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(setup.gradient(mine), setup.gradient(wanted), rtol=1e-3, atol=1e-4)
    assert ("policy/kl" in rule.metrics) == ("variant" not in settings)


@pytest.mark.parametrize("settings", [{"renoise": 1, "last_steps": 1}, {"variant": "refl"}])
def test_draft_that_starts_on_a_path_needs_a_rollout(settings: dict[str, Any]) -> None:
    assert not setup_of().rule(DRaFT, **settings).own_rows


def test_draft_reports_all_the_paths_of_an_iteration(generator: torch.Generator) -> None:
    setup = setup_of()
    rule = setup.rule(DRaFT)
    rows = rule.rows_for([""] * 64, setup.ts, generator)
    whole = rule.loss(rows)[0].item()
    rule.rows_for([""], setup.ts, generator)  # another iteration begins
    for part in rows.minibatches(16, generator):
        rule.loss(part)
    assert rule.metrics["objective/J_training"] == pytest.approx(-whole, rel=1e-4)
    assert rule.metrics["reward/std"] > 0


def test_draft_of_no_kl_is_the_reward_alone(generator: torch.Generator) -> None:
    setup = setup_of()
    path = setup.paths(64, generator, with_reference=False)
    rule = setup.rule(DRaFT, last_steps=2, kl_share=0.0)
    rows = rule.prepare(Paths(path, torch.zeros(64)), generator, 1.0)
    setup.policy.network_calls = setup.reward.calls = 0
    loss, metrics = rule.loss(rows)
    assert (setup.policy.network_calls, setup.reward.calls, metrics) == (2 * 64, 64, {})
    end = path.xs[-1]  # the policy has not moved, so the simulation ends where the path did
    torch.testing.assert_close(loss, -QUADRATIC(end, path.condition).mean(), rtol=1e-5, atol=1e-5)


def test_draft_lv_starts_again_from_the_noised_end(generator: torch.Generator) -> None:
    """Ends drawn from p_{t_N} exactly, noised back, have the moments of p_{t_k}; each start has noise of its own."""
    setup, count = setup_of(VP(t_max=0.7)), 20_000
    path = setup.paths(count, generator, with_reference=False)
    end = setup.ts[-1:]
    exact = setup.base.schedule.alpha(end) * setup.base.sample(count, generator)
    exact = exact + setup.base.schedule.sigma(end) * torch.randn(count, DIM, generator=generator)
    path = replace(path, xs=torch.cat([path.xs[:-1], exact.unsqueeze(0)]))
    rows = setup.rule(DRaFT, last_steps=1, renoise=2).prepare(Paths(path, torch.zeros(count)), generator, 1.0)
    assert (len(rows), len(rows.condition), rows.acts) == (3 * count, 3 * count, (True,))
    assert torch.equal(rows.x[:count], path.xs[3])
    assert torch.equal(rows.noise[:count], path.noise[3:].transpose(0, 1))
    assert torch.equal(rows.early_x[:count], rows.early_x[count : 2 * count])
    alpha, sigma = setup.base.schedule.alpha(setup.ts[3]), setup.base.schedule.sigma(setup.ts[3])
    mean = setup.base.weights @ setup.base.means
    second = torch.einsum("k,kij->ij", setup.base.weights, setup.base.covariances)
    second = second + torch.einsum("k,ki,kj->ij", setup.base.weights, setup.base.means, setup.base.means)
    for part in (rows.x[count : 2 * count], rows.x[2 * count :]):
        assert worst(part - alpha * mean) < 4
        wanted = alpha**2 * second + sigma**2 * torch.eye(DIM)
        assert worst((part.unsqueeze(2) * part.unsqueeze(1) - wanted).flatten(1)) < 4
        # depends on its own end: the regression on it has slope alpha_k / alpha_N
        slope = (part * exact).sum() / (exact**2).sum()
        assert float(slope) == pytest.approx(float(alpha / setup.base.schedule.alpha(end)), abs=0.02)
    together = rows.noise.reshape(3, count, -1)
    assert worst(together[1] * together[2]) < 4
    assert worst(together[0] * together[1]) < 4


def test_alignprop_draws_how_many_of_the_last_steps(generator: torch.Generator) -> None:
    setup = setup_of()
    path = setup.paths(32, generator, with_reference=False)
    rule, seen = setup.rule(DRaFT, variant="alignprop", last_steps=3), set()
    for _ in range(30):
        rows = rule.prepare(Paths(path, torch.zeros(32)), generator, 1.0)
        k = len(rows.acts)
        seen.add(k)
        assert torch.equal(rows.x, path.xs[STEPS - k])
        assert (rows.early_t[:, 0] == path.ts[0]).all()  # what no draw reaches pays its own cost, always
    assert seen == {1, 2, 3}
    everything = setup.rule(DRaFT, variant="alignprop").prepare(Paths(path, torch.zeros(32)), generator, 1.0)
    torch.testing.assert_close(
        setup.rule(DRaFT).loss(everything)[0],
        simulated(setup, path, STEPS - len(everything.acts)).mean(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_refl_is_the_reward_of_the_estimate_at_a_late_step(generator: torch.Generator) -> None:
    setup = setup_of()
    path = setup.paths(200, generator, with_reference=False)
    rule = setup.rule(DRaFT, variant="refl", last_steps=2)
    rows = rule.prepare(Paths(path, torch.zeros(200)), generator, 1.0)
    k = torch.stack([(path.ts - t).abs().argmin() for t in rows.t[:, 0]])
    assert torch.bincount(k, minlength=STEPS).tolist()[:2] == [0, 0]
    assert torch.bincount(k)[2:].min() > 70
    x = path.xs[k, torch.arange(200)]
    score, rate = cost_rate(setup, path.ts[k], x, path.condition)
    alpha, sigma = setup.base.schedule.alpha(path.ts[k]), setup.base.schedule.sigma(path.ts[k])
    estimate = (x + sigma.unsqueeze(1) ** 2 * score) / alpha.unsqueeze(1)
    early = cost_rate(setup, rows.early_t[:, 0], rows.early_x, path.condition)[1]
    cost = 2 * rate * (path.ts[k + 1] - path.ts[k]) + 2 * early * (rows.early_t[:, 1] - rows.early_t[:, 0])
    wanted = (cost - QUADRATIC(estimate, path.condition)).mean()
    loss = rule.loss(rows)[0]
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(setup.gradient(loss), setup.gradient(wanted), rtol=1e-3, atol=1e-4)


def test_the_last_step_that_acts_is_the_last_step(generator: torch.Generator) -> None:
    """The flow's last step has no noise and is the reference's: the gradient goes through it to the one before."""
    setup = setup_of(RectifiedFlow(), "ddim")
    path = setup.paths(32, generator)
    assert path.acts.tolist() == [True, True, True, False]
    rule = setup.rule(DRaFT, last_steps=1, kl_share=0.0)
    rows = rule.prepare(Paths(path, torch.zeros(32)), generator, 1.0)
    assert rows.acts == (True, False)
    loss = rule.loss(rows)[0]
    torch.testing.assert_close(loss, -QUADRATIC(path.xs[-1], path.condition).mean(), rtol=1e-4, atol=1e-5)
    assert float(setup.gradient(loss).norm()) > 1e-4


# --- q_learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regress_on", ["action", "action_and_noise"])
def test_q_and_v_of_the_optimum_make_martingales_and_others_do_not(regress_on: str, generator: torch.Generator) -> None:
    """Whatever drew the paths: E delta = 0 and E (w_a - w) delta = 0 for the optimal policy with its value.

    With the noise as part of the action each delta is 0, for V is linear here, and so is a sum of later ones (trace 1).
    """
    problem, count = gaussian(LINEAR), 4000
    trace = 1.0 if regress_on == "action_and_noise" else 0.0
    gains, offsets = problem.optimum()
    explore = gaussian_actions(lambda t: torch.full_like(t, 0.7))

    errors: list[Tensor] = []

    def deltas(offsets: Tensor) -> tuple[Tensor, float]:
        policy = problem.policy(gains, offsets)
        critic = problem.critic(policy)
        rule = QLearning(policy, problem.sde, problem.solver, critic, BETA, regress_on=regress_on, trace=trace)
        paths = problem.paths(policy, count, generator, exploration=explore)
        batch = rule.prepare(paths, generator, 1.0)
        w = offsets.repeat_interleave(count, 0)  # gains are zero for a linear reward
        delta = batch.advantage - BETA * ((w * batch.target).sum(1) - (w**2).sum(1) / 2)
        fitted, value = critic.fitter.memory[-1], critic.value  # the returns that V is fitted to: V itself on average
        with torch.no_grad():
            loss = rule.loss(batch)[0]
            errors.append(fitted.target - value.of_inputs(fitted.t, fitted.features, fitted.condition))
        assert float(loss) == pytest.approx(STEPS * float((delta**2).mean()) / (2 * BETA), rel=1e-3, abs=1e-6)
        by_path = delta.reshape(STEPS, count, 1) * torch.cat([torch.ones(len(w), 1), batch.target - w], 1).reshape(
            STEPS, count, 3
        )
        return by_path.transpose(0, 1).flatten(1), float(delta.abs().max())

    assert float(gains.abs().max()) == 0
    moments, largest = deltas(offsets)
    if regress_on == "action_and_noise":
        assert largest < 1e-4
        assert float(errors[0].abs().max()) < 1e-4
    else:
        assert largest > 0.1
        assert worst(moments) < 4
        assert worst(errors[0].reshape(STEPS, count).T) < 4
    assert worst(deltas(offsets + 0.2)[0]) > 8


def test_gradient_of_q_learning_is_that_of_the_objective(generator: torch.Generator) -> None:
    """On its own paths, whatever V: compared with the derivative of the simulation, along it and in other directions."""
    setup = setup_of()
    along = setup.gradient(simulated(setup, setup.paths(4000, generator), 0).mean())
    compare = torch.cat([along.unsqueeze(0), torch.randn(5, len(along), generator=generator)])
    exact, mine = [], []
    for _ in range(12):
        path = setup.paths(500, generator)
        exact.append(compare @ setup.gradient(simulated(setup, path, 0).mean()))
    value = kept(ValueNetwork(Bump(), setup.sde, setup.policy, "x"), BETA)
    critic = Critic(value, setup.policy, setup.sde, setup.solver)
    for _ in range(25):
        path = setup.paths(1000, generator)
        rule = setup.rule(QLearning, critic)
        batch = rule.prepare(Paths(path, QUADRATIC(path.xs[-1], path.condition)), generator, 1.0)
        mine.append(compare @ setup.gradient(rule.loss(batch)[0]))
    a, b = torch.stack(mine), torch.stack(exact)
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    assert float(((a.mean(0) - b.mean(0)).abs() / error).max()) < 4
    assert float((b.mean(0).abs() / error).max()) > 8


class Bump(nn.Module):
    """A value that is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.level + (x[:, 0] * 2 + t).sin()


def test_q_learning_says_what_it_cannot_learn_from(generator: torch.Generator) -> None:
    problem = gaussian(LINEAR)
    policy = problem.policy(*problem.optimum())
    critic = problem.critic(policy)
    paths = problem.paths(policy, 20, generator)
    rule = QLearning(policy, problem.sde, problem.solver, critic, BETA, regress_on="action")
    with pytest.raises(ValueError, match="set exploration to gaussian"):
        rule.prepare(paths, generator, 1.0)
    with pytest.raises(ValueError, match=r"unknown regress_on 'x'\. Known: action, action_and_noise"):
        QLearning(policy, problem.sde, problem.solver, critic, BETA, regress_on="x")  # type: ignore[arg-type]
    critic.fitter.loss = "soft"
    with pytest.raises(ValueError, match="value_loss is 'soft'; q_learning's V is a mean: use martingale"):
        QLearning(policy, problem.sde, problem.solver, critic, BETA)


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_unknown_settings_of_draft_are_told() -> None:
    with pytest.raises(ValueError, match=r"unknown variant 'x'\. Known: draft, alignprop, refl"):
        setup_of().rule(DRaFT, variant="x")
    with pytest.raises(ValueError, match="renoise is 2, but refl starts on the path itself"):
        setup_of().rule(DRaFT, variant="refl", renoise=2)


@pytest.mark.parametrize("algorithm", ["adjoint_matching", "draft"])
def test_a_reward_without_gradient_is_refused(algorithm: str, train_on_mixture: Callable[..., Result]) -> None:
    rounded = FunctionReward(lambda x, condition: x.detach()[:, 0].round(), "rounded")
    with pytest.raises(ValueError, match=f"{algorithm} follows the reward's gradient, but reward rounded has none"):
        train_on_mixture(rounded, algorithm=algorithm, iterations=1)


def test_sums_of_unmarked_functions_are_tried_part_by_part(train_on_mixture: Callable[..., Result]) -> None:
    def first(points: Tensor) -> Tensor:
        return points[:, 0]

    def second(points: Tensor) -> Tensor:
        return points[:, 1].square()

    def right(points: Tensor) -> Tensor:
        return (points[:, 0] > 0).float()

    def of(*functions: Any) -> list[Any]:
        parts = {f.__name__: (0.5, adapt(f, f.__name__)) for f in functions}
        return [weighted_sum(parts), WeightedStatistics(functions, [0.5] * len(functions))]

    few = {"algorithm": "draft", "iterations": 1, "batch_size": 16, "heldout_samples": 64}
    weights = [list(train_on_mixture(reward, **few).policy.model.parameters()) for reward in of(first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    marked = FunctionReward(lambda x, condition: 0.5 * first(x) + 0.5 * second(x), "marked", differentiable=True)
    same = train_on_mixture(marked, **few).policy.model.parameters()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights[0], same, strict=True))
    for reward in of(first, right):
        with pytest.raises(ValueError, match=r"has none \(its part \S*right carries no gradient\)"):
            train_on_mixture(reward, **few)
    with pytest.raises(ValueError, match=r"give each function in it the mark f\.differentiable = True"):
        train_on_mixture(clip(adapt(first, "first"), -1, 1), **few)


@pytest.mark.parametrize(
    ("algorithm", "settings", "floor"),
    [
        ("adjoint_matching", {}, 0.25),
        ("draft", {}, 0.25),
        ("q_learning", {}, 0.25),
    ],
)
def test_every_rule_is_on_its_way_in_six_iterations(
    algorithm: str, settings: dict[str, Any], floor: float, train_on_mixture: Callable[..., Result]
) -> None:
    small = {"iterations": 6, "batch_size": 128, "heldout_samples": 1000}
    assert train_on_mixture(algorithm=algorithm, **small, **settings).final["objective/recovered"] > floor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "settings", "floor"),
    [
        ("adjoint_matching", {}, 0.65),
        ("draft", {}, 0.65),
        ("draft", {"last_steps": 5}, 0.6),
        ("draft", {"variant": "alignprop"}, 0.6),
        ("draft", {"last_steps": 1, "renoise": 2}, 0.15),
        ("draft", {"variant": "refl", "last_steps": 3}, 0.25),
        ("q_learning", {}, 0.65),
        ("q_learning", {"regress_on": "action", "exploration": "gaussian", "exploration_scale": 1.0}, 0.4),
    ],
)
def test_every_rule_reaches_its_optimum(
    algorithm: str, settings: dict[str, Any], floor: float, train_on_mixture: Callable[..., Result]
) -> None:
    result = train_on_mixture(algorithm=algorithm, iterations=40, **settings)
    assert result.final["objective/recovered"] > floor
