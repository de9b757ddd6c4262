"""The rules: ratio 1 at first, no gradient without reward, `ctrl`'s gradient unbiased whatever V is, known optima."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from scoreact.algorithms.ctrl import CTRL, fit_value, fitted_value, gradients, pathwise_force
from scoreact.algorithms.ctrl_pathwise import CTRLPathwise
from scoreact.algorithms.ctrl_trpo import CTRLTrustRegion
from scoreact.api.result import Result
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.trajectory import Trajectory
from scoreact.control.transitions import Batch, acting_steps, flatten, shift_of
from scoreact.control.value import ValueNetwork
from scoreact.control.value_fit import ValueFit
from scoreact.dynamics import girsanov
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import SOLVERS, Solver, ddim, euler_maruyama, step_of
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.recipes.gaussian import linear_reward, mixture
from scoreact.types import Condition

BETA, STEPS, DIM = 0.6, 4, 2
RULES = {"ctrl": CTRL, "ctrl_pathwise": CTRLPathwise, "ctrl_trpo": CTRLTrustRegion}


class Setup:
    """A policy away from its reference and a value network with random weights, fitted to nothing."""

    def __init__(self, solver: Solver = euler_maruyama, moved: float = 0.3, value_scale: float = 0.5) -> None:
        base = mixture(DIM, 3, 0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = ResidualModel(base, DIM, width=8)
            nn.init.normal_(model.residual.last.weight, std=moved)
            network = VectorValue(2 * DIM, 16)
            nn.init.normal_(network.net.last.weight, std=value_scale)
        self.policy, self.sde, self.solver = Policy(model, base), SDE(base.schedule, noise_level(1.0)), solver
        self.value = ValueFit(ValueNetwork(network, self.sde, self.policy), BETA, steps=0, first_steps=0)
        self.value.fitted = True  # V stays the random function it is
        self.ts = uniform(base.schedule, STEPS)

    def learn(self, generator: torch.Generator) -> None:
        """Fit V to the policy's own returns, then keep it as it is: forces are large where V is right."""
        self.value.fitted, self.value.first_steps = False, 200
        for _ in range(4):
            path = self.paths(500, generator)
            self.rule(CTRL).prepare(path, linear_reward(DIM, 0)(path.xs[-1], path.condition), generator, 1.0)
            self.value.fitted = False
        self.value.fitted = True

    def rule(self, kind: type[CTRL], **settings: object) -> CTRL:
        return kind(self.policy, self.sde, self.solver, self.value, BETA, **settings)  # type: ignore[arg-type]

    def paths(self, count: int, generator: torch.Generator) -> Trajectory:
        condition = Condition([""] * count)
        return rollout(self.policy, self.sde, self.solver, self.ts, condition, generator)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.policy.trainable())])


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("kind", list(RULES))
def test_ratio_is_one_before_the_first_update(kind: str, solver: str, generator: torch.Generator) -> None:
    setup = Setup(SOLVERS[solver])
    rule = setup.rule(RULES[kind])
    path = setup.paths(64, generator)
    batch = rule.prepare(path, linear_reward(DIM, 0)(path.xs[-1], path.condition), generator, 1.0)
    with torch.no_grad():
        shift = shift_of(setup.policy, setup.sde, setup.solver, batch)
        _, metrics = rule.loss(batch)
    assert float(girsanov.log_ratio(shift, batch.noise).abs().max()) < 1e-5
    assert metrics["policy/kl_to_behaviour"] < 1e-9
    assert metrics.get("policy/ratio_deviation", 0.0) < 1e-5
    with torch.no_grad():
        for p in setup.policy.trainable():
            p.add_(0.05)
        assert rule.loss(batch)[1]["policy/kl_to_behaviour"] > 1e-4


def test_a_batch_keeps_rows_together(generator: torch.Generator) -> None:
    setup = Setup()
    path = setup.paths(10, generator)
    batch = flatten(path, acting_steps(path))
    assert (len(batch), batch.steps) == (10 * STEPS, STEPS)
    seen = 0
    for part in batch.minibatches(16, generator):
        assert part.steps == STEPS
        reached = part.mean + part.std.unsqueeze(1) * part.noise
        for row in range(len(part)):
            k = int((path.ts - part.t0[row]).abs().argmin())
            b = int((path.xs[k] - part.x[row]).abs().sum(1).argmin())
            assert torch.equal(path.xs[k, b], part.x[row])
            assert torch.equal(path.controls[k, b], part.control[row])
            torch.testing.assert_close(path.xs[k + 1, b], reached[row])
        seen += len(part)
    assert seen == len(batch)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_no_reward_and_the_reference_give_no_gradient_on_average(solver: str, generator: torch.Generator) -> None:
    setup = Setup(SOLVERS[solver], moved=0.0)
    setup.rule(CTRL)
    found = []
    for _ in range(40):
        rule = setup.rule(CTRL)
        path = setup.paths(64, generator)
        batch = rule.prepare(path, torch.zeros(64), generator, 1.0)
        found.append(setup.gradient(rule.loss(batch)[0]))
    stacked = torch.stack(found)
    error = stacked.std(0) / math.sqrt(len(stacked))
    assert float(error.max()) > 1e-4  # V is not zero, so each batch alone has a gradient
    assert float((stacked.mean(0).abs() / error.clamp(min=1e-6)).max()) < 4.5  # 4 for one, 4.5 for the most of 40


def pathwise_gradient(setup: Setup, count: int, generator: torch.Generator) -> Tensor:
    """grad J by differentiating the simulation itself: reward and costs through every step."""
    condition, reward = Condition([""] * count), linear_reward(DIM, 0)
    x, cost = setup.policy.reference.prior(condition, generator), torch.zeros(count)
    for t0, t1 in zip(setup.ts[:-1].tolist(), setup.ts[1:].tolist(), strict=True):
        begin, end = x.new_full((count,), t0), x.new_full((count,), t1)
        score, reference = setup.policy.score(begin, x, condition), setup.policy.reference_score(begin, x, condition)
        step = step_of(setup.sde, setup.solver, score, begin, end, x)
        cost = cost + step.kl(step_of(setup.sde, setup.solver, reference, begin, end, x))
        x = step.sample(torch.randn(x.shape, generator=generator))
    return setup.gradient((reward(x, condition) - BETA * cost).mean())


def directions(size: int) -> Tensor:
    """A few fixed directions in which gradients are compared: one number each, so that 4 standard errors mean it."""
    return torch.randn(8, size, generator=torch.Generator().manual_seed(5)) / math.sqrt(size)


@pytest.mark.parametrize(
    ("value_scale", "solver", "settings"),
    [
        (3.0, "euler_maruyama", {}),  # V a random function, far off
        (0.0, "ddim", {"gradient_at": "state"}),  # V learned: most of the gradient is the force
        (0.0, "euler_maruyama", {}),
    ],
)
def test_gradient_of_ctrl_is_unbiased_whatever_the_value(
    value_scale: float, solver: str, settings: dict[str, str], generator: torch.Generator
) -> None:
    setup = Setup(SOLVERS[solver], value_scale=value_scale)
    compare = directions(sum(p.numel() for p in setup.policy.trainable()))
    if value_scale == 0:
        setup.learn(generator)
    exact = torch.stack([compare @ pathwise_gradient(setup, 500, generator) for _ in range(20)])
    rule, reward, found = setup.rule(CTRL, **settings), linear_reward(DIM, 0), []
    for _ in range(30):
        path = setup.paths(1000, generator)
        batch = rule.prepare(path, reward(path.xs[-1], path.condition), generator, 1.0)
        found.append(compare @ -setup.gradient(rule.loss(batch)[0]))
    if value_scale == 0:
        assert rule.metrics["policy/value_force"] > 0.2
    mine = torch.stack(found)
    error = (mine.var(0) / len(mine) + exact.var(0) / len(exact)).sqrt()
    assert float(((mine.mean(0) - exact.mean(0)).abs() / error).max()) < 4
    # the comparison can tell: the gradient is many standard errors long
    assert float((exact.mean(0).abs() / error).max()) > 8


def test_clipping_stops_the_gain_beyond_the_range() -> None:
    """One transition in one dimension, by hand: ratio 1.5, clip 0.2 sqrt(0.25) = 0.1."""
    setup = Setup()
    batch = Batch(
        t0=torch.zeros(1), t1=torch.full((1,), 0.25), x=torch.zeros(1, 2), noise=torch.tensor([[1.0, 0.0]]),
        mean=torch.zeros(1, 2), std=torch.ones(1), control=torch.zeros(1, 2), advantage=torch.ones(1),
        target=torch.zeros(1, 2), condition=Condition([""]), steps=1,
    )  # fmt: skip
    with torch.no_grad():
        mean = setup.rule(CTRL)  # where the policy's kernel is for this state
        shift = shift_of(mean.policy, mean.sde, mean.solver, batch)
    wanted = 1 - math.sqrt(1 - 2 * math.log(1.5))  # w - w^2 / 2 = log 1.5
    batch = replace(batch, mean=shift - torch.tensor([[wanted, 0.0]]))
    for advantage, expected in ((1.0, 1.1), (-1.0, -1.5)):
        part = replace(batch, advantage=torch.tensor([advantage]))
        loss, metrics = setup.rule(CTRL, clip_range=0.2).loss(part)
        assert -(loss.item() - BETA * 0.5 * wanted**2) == pytest.approx(expected, abs=1e-3)
        assert metrics["policy/clip_fraction"] == 1
        assert metrics["policy/ratio_deviation"] == pytest.approx(0.5, abs=1e-3)


def test_next_gradient_is_the_kernels_exact_force(generator: torch.Generator) -> None:
    """d/dw E[V(m + S (w + z))] by finite differences = mean of S grad V at the states that followed."""
    setup = Setup()
    rule = setup.rule(CTRLPathwise, gradient_at="next", force=1.0)
    count = 20_000
    x = torch.tensor([[0.4, -0.3]]).expand(count, 2)
    t0, t1 = setup.ts[2].expand(count), setup.ts[3].expand(count)
    condition = Condition([""] * count)
    step = step_of(setup.sde, setup.solver, setup.policy.model.score(t0, x, condition).detach(), t0, t1, x)
    noise = torch.randn(count, 2, generator=generator)
    gradient = gradients(rule, t1, step.sample(noise), condition)
    force = step.std[0] * gradient.mean(0)
    for i in range(2):
        w = torch.zeros(2)
        w[i] = 0.02
        with torch.no_grad():
            up, down = (rule.value.value(t1, step.sample(noise + s * w), condition).mean() for s in (1, -1))
        assert float(force[i]) == pytest.approx(float((up - down) / 0.04), rel=0.02, abs=1e-3)
    path = setup.paths(50, generator)
    batch = rule.prepare(path, torch.zeros(50), generator, 1.0)
    assert len(batch) == 50 * STEPS
    assert rule.value.memory[-1].t.max() == setup.ts[-1]  # V is fitted at the path's end too
    row = 7
    after = (batch.mean + batch.std.unsqueeze(1) * batch.noise)[row : row + 1]
    _, expected = rule.value.value.gradient(batch.t1[row : row + 1], after, Condition([""]))
    torch.testing.assert_close(batch.target[row], batch.std[row] * expected[0] / BETA, rtol=1e-3, atol=1e-4)


def test_pathwise_on_the_references_paths_follows_its_own_policy(generator: torch.Generator) -> None:
    """The gradient is taken where the moved policy leads from there, not where the reference's path went on."""
    setup = Setup(moved=1.0)
    rule = setup.rule(CTRLPathwise, gradient_at="next", reuse_reference=1, force=1.5)
    condition = Condition([""] * 40)
    path = rollout(setup.policy, setup.sde, setup.solver, setup.ts, condition, generator, reference_only=True)
    batch = rule.prepare(path, torch.zeros(40), generator, 1.0)
    with torch.no_grad():
        shift = rule.shift(batch)
    std = batch.std.unsqueeze(1)
    assert float(shift.abs().max()) > 0.1
    for moved, same in ((shift, True), (torch.zeros_like(shift), False)):
        led_to = batch.mean + std * (moved + batch.noise)
        force = 1.5 * std * gradients(rule, batch.t1, led_to, batch.condition) / BETA
        assert torch.allclose(batch.target, force, rtol=1e-4, atol=1e-6) is same


def test_pathwise_measures_how_far_to_follow_its_value(generator: torch.Generator) -> None:
    """Returns three times as far apart as V says: force 0 follows three times V's gradient, less the slope's error."""
    setup = Setup(ddim)
    path = setup.paths(50, generator)
    rule = setup.rule(CTRLPathwise, gradient_at="state", force=0.0)
    rule.value.slope_of_newest = lambda last, generator: {"value/slope": 3.0, "value/slope_error": 0.5}
    batch = rule.prepare(path, torch.zeros(50), generator, 1.0)
    expected = pathwise_force(
        rule, batch, setup.policy.reference.score(batch.t0, batch.x, batch.condition), batch.noise
    )
    assert rule.metrics["policy/force"] == 2.5
    torch.testing.assert_close(batch.target, 2.5 * expected / BETA)
    rule.form = "clamped_displacement"  # the authors' published code knows no such thing
    rule.prepare(path, torch.zeros(50), generator, 1.0)
    assert rule.metrics["policy/force"] == 1.0


@pytest.mark.parametrize(("found", "most"), [(1.0, 1.0), (3.0, 2.5), (0.2, 1.0)])
def test_ctrl_follows_its_value_beyond_1_as_far_as_the_returns_say(
    found: float, most: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Returns that vary thirty times as much as V: least squares would take its force that often."""
    measured = {"value/slope": found, "value/slope_error": 0.5}
    monkeypatch.setattr("scoreact.algorithms.ctrl.slope", lambda values, returns, paths: measured)
    setup = Setup(ddim)
    path, rule = setup.paths(400, generator), setup.rule(CTRL, gradient_at="state")
    with torch.no_grad():
        rewards = 30 * rule.value.value(path.ts[-1:].expand(400), path.xs[-1], path.condition)
    rule.prepare(path, rewards, generator, 1.0)
    assert 0.4 * most < rule.metrics["policy/value_force"] <= most  # in half of the steps V has the other sign


def test_the_fitted_value_is_that_of_the_newest_paths(generator: torch.Generator) -> None:
    setup = Setup(ddim)
    rule = setup.rule(CTRL)
    for _ in range(2):  # the first are still remembered: the fit was none yet
        path, keep = setup.paths(20, generator), torch.arange(STEPS)
        rule.value.fitted = False
        fit_value(rule, path, torch.randn(STEPS + 1, 20, generator=generator), keep, generator, 1.0, end=True)
    assert len(rule.value.memory) == 2
    with torch.no_grad():
        expected = [rule.value.value(t.expand(20), x, path.condition) for t, x in zip(path.ts, path.xs, strict=True)]
    torch.testing.assert_close(fitted_value(rule, torch.randn(STEPS, 20))[0], torch.stack(expected[:-1]))


def test_pathwise_may_take_some_transitions_only(generator: torch.Generator) -> None:
    setup = Setup(ddim)
    path = setup.paths(50, generator)
    assert len(setup.rule(CTRLPathwise, transitions=30).prepare(path, torch.zeros(50), generator, 1.0)) == 30


def test_the_published_variants_run(generator: torch.Generator) -> None:
    setup = Setup()
    path = setup.paths(50, generator)
    rewards = linear_reward(DIM, 0)(path.xs[-1], path.condition)
    rule = setup.rule(CTRL, advantage="standardised_value_differences")
    batch = rule.prepare(path, rewards, generator, 1.0)
    by_step = batch.advantage.reshape(STEPS, 50)
    torch.testing.assert_close(by_step.mean(1), torch.zeros(STEPS), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_step.std(1), torch.ones(STEPS), atol=1e-3, rtol=0)
    clamped = setup.rule(CTRLPathwise, form="clamped_displacement", loss_clamp=1e-3)
    loss, _ = clamped.loss(clamped.prepare(path, rewards, generator, 1.0))
    assert abs(loss.item()) <= STEPS * 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s.rule(CTRL, advantage="best"), "unknown advantage 'best'. Known: gae, standardised"),
        (lambda s: s.rule(CTRLPathwise, form="x"), "unknown form 'x'. Known: regression, clamped"),
        (lambda s: s.rule(CTRL, gradient_at="x"), "unknown gradient_at 'x'. Known: state, next"),
        (lambda s: CTRL(s.policy, s.sde, s.solver, s.value, 0.0), "kl_weight must be positive, got 0"),
    ],
)
def test_unknown_settings_are_told(make: Callable[[Setup], CTRL], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Setup())


@pytest.mark.parametrize(("algorithm", "floor"), [("ctrl", 0.3), ("ctrl_pathwise", 0.3), ("ctrl_trpo", 0.3)])
def test_every_rule_is_on_its_way_in_eight_iterations(
    algorithm: str, floor: float, train_on_mixture: Callable[..., Result]
) -> None:
    assert train_on_mixture(algorithm=algorithm, iterations=8).final["objective/recovered"] > floor


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "floor"), [("ctrl", 0.7), ("ctrl_pathwise", 0.7), ("ctrl_trpo", 0.7)])
def test_every_rule_reaches_the_grids_optimum(
    algorithm: str, floor: float, train_on_mixture: Callable[..., Result]
) -> None:
    assert train_on_mixture(algorithm=algorithm, iterations=60).final["objective/recovered"] > floor
