"""The rules: ratio 1 at first, no gradient without reward, `ctrl`'s gradient unbiased whatever V is, known optima."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_problem import Setup

from scoreact.algorithms.ctrl import CTRL
from scoreact.algorithms.ctrl_pathwise import CTRLPathwise
from scoreact.algorithms.ctrl_trpo import CTRLTrustRegion
from scoreact.api.result import Result
from scoreact.control.rollout import rollout
from scoreact.control.transitions import Batch, Paths, shift_of
from scoreact.dynamics import girsanov
from scoreact.dynamics.solvers import SOLVERS, Solver, ddim, euler_maruyama, step_of
from scoreact.types import Condition

BETA, STEPS = 0.6, 4
RULES = {"ctrl": CTRL, "ctrl_pathwise": CTRLPathwise, "ctrl_trpo": CTRLTrustRegion}


def setup_of(solver: Solver = euler_maruyama, **settings: Any) -> Setup:
    return Setup(solver, BETA, STEPS, **settings)


def learn(setup: Setup, generator: torch.Generator) -> None:
    """Fit V to the policy's own returns, then keep it as it is: forces are large where V is right."""
    fitter = setup.critic.fitter
    fitter.fitted, fitter.first_steps = False, 200
    for _ in range(4):
        setup.rule(CTRL).prepare(setup.scored(500, generator), generator, 1.0)
        fitter.fitted = False
    fitter.fitted = True


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("kind", list(RULES))
def test_ratio_is_one_before_the_first_update(kind: str, solver: str, generator: torch.Generator) -> None:
    setup = setup_of(SOLVERS[solver])
    rule = setup.rule(RULES[kind])
    batch = rule.prepare(setup.scored(64, generator), generator, 1.0)
    with torch.no_grad():
        shift = shift_of(setup.policy, setup.sde, setup.solver, batch)
        _, metrics = rule.loss(batch)
    assert float(girsanov.log_ratio(shift, batch.noise).abs().max()) < 1e-5
    assert metrics["policy/kl_to_behaviour"] < 1e-9
    assert metrics.get("policy/ratio_deviation", 0.0) < 1e-5
    setup.move()
    with torch.no_grad():
        assert rule.loss(batch)[1]["policy/kl_to_behaviour"] > 1e-4


def test_a_batch_keeps_rows_together(generator: torch.Generator) -> None:
    setup = setup_of()
    path = setup.paths(10, generator)
    batch = Paths(path, torch.zeros(10)).batch
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
    setup = setup_of(SOLVERS[solver], moved=0.0)
    setup.rule(CTRL)
    found = []
    for _ in range(40):
        rule = setup.rule(CTRL)
        path = setup.paths(64, generator)
        batch = rule.prepare(Paths(path, torch.zeros(64)), generator, 1.0)
        found.append(setup.gradient(rule.loss(batch)[0]))
    stacked = torch.stack(found)
    error = stacked.std(0) / math.sqrt(len(stacked))
    assert float(error.max()) > 1e-4  # V is not zero, so each batch alone has a gradient
    assert float((stacked.mean(0).abs() / error.clamp(min=1e-6)).max()) < 4.5  # 4 for one, 4.5 for the most of 40


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
    setup = setup_of(SOLVERS[solver], value_scale=value_scale)
    if value_scale == 0:
        learn(setup, generator)
    exact = torch.stack([setup.simulated(500, generator) for _ in range(20)])
    rule, found = setup.rule(CTRL, **settings), []
    for _ in range(30):
        batch = rule.prepare(setup.scored(1000, generator), generator, 1.0)
        found.append(-setup.compared(rule.loss(batch)[0]))
    if value_scale == 0:
        assert rule.metrics["policy/value_force"] > 0.2
    mine = torch.stack(found)
    error = (mine.var(0) / len(mine) + exact.var(0) / len(exact)).sqrt()
    assert float(((mine.mean(0) - exact.mean(0)).abs() / error).max()) < 4
    # the comparison can tell: the gradient is many standard errors long
    assert float((exact.mean(0).abs() / error).max()) > 8


def test_clipping_stops_the_gain_beyond_the_range() -> None:
    """One transition in one dimension, by hand: ratio 1.5, clip 0.2 sqrt(0.25) = 0.1."""
    setup = setup_of()
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
    setup = setup_of()
    rule = setup.rule(CTRLPathwise, gradient_at="next", force=1.0)
    count = 20_000
    x = torch.tensor([[0.4, -0.3]]).expand(count, 2)
    t0, t1 = setup.ts[2].expand(count), setup.ts[3].expand(count)
    condition = Condition([""] * count)
    step = step_of(setup.sde, setup.solver, setup.policy.model.score(t0, x, condition).detach(), t0, t1, x)
    noise = torch.randn(count, 2, generator=generator)
    gradient = rule.critic.gradients(t1, step.sample(noise), condition)
    force = step.std[0] * gradient.mean(0)
    for i in range(2):
        w = torch.zeros(2)
        w[i] = 0.02
        with torch.no_grad():
            up, down = (rule.critic.value(t1, step.sample(noise + s * w), condition).mean() for s in (1, -1))
        assert float(force[i]) == pytest.approx(float((up - down) / 0.04), rel=0.02, abs=1e-3)
    path = setup.paths(50, generator)
    batch = rule.prepare(Paths(path, torch.zeros(50)), generator, 1.0)
    assert len(batch) == 50 * STEPS
    assert rule.critic.fitter.memory[-1].t.max() == setup.ts[-1]  # V is fitted at the path's end too
    row = 7
    after = (batch.mean + batch.std.unsqueeze(1) * batch.noise)[row : row + 1]
    _, expected = rule.critic.value.gradient(batch.t1[row : row + 1], after, Condition([""]))
    torch.testing.assert_close(batch.target[row], batch.std[row] * expected[0] / BETA, rtol=1e-3, atol=1e-4)


def test_pathwise_on_the_references_paths_follows_its_own_policy(generator: torch.Generator) -> None:
    """The gradient is taken where the moved policy leads from there, not where the reference's path went on."""
    setup = setup_of(moved=1.0)
    rule = setup.rule(CTRLPathwise, gradient_at="next", reuse_reference=1, force=1.5)
    condition = Condition([""] * 40)
    path = rollout(setup.policy, setup.sde, setup.solver, setup.ts, condition, generator, reference_only=True)
    batch = rule.prepare(Paths(path, torch.zeros(40)), generator, 1.0)
    with torch.no_grad():
        shift = rule.shift(batch)
    std = batch.std.unsqueeze(1)
    assert float(shift.abs().max()) > 0.1
    for moved, same in ((shift, True), (torch.zeros_like(shift), False)):
        led_to = batch.mean + std * (moved + batch.noise)
        force = 1.5 * std * rule.critic.gradients(batch.t1, led_to, batch.condition) / BETA
        assert torch.allclose(batch.target, force, rtol=1e-4, atol=1e-6) is same


def test_pathwise_measures_how_far_to_follow_its_value(generator: torch.Generator) -> None:
    """Returns three times as far apart as V says: force 0 follows three times V's gradient, less the slope's error."""
    setup = setup_of(ddim)
    path = setup.paths(50, generator)
    rule = setup.rule(CTRLPathwise, gradient_at="state", force=0.0)
    rule.critic.fitter.slope_of_newest = lambda last, generator: {"value/slope": 3.0, "value/slope_error": 0.5}
    batch = rule.prepare(Paths(path, torch.zeros(50)), generator, 1.0)
    expected = setup.critic.force_at(batch, setup.policy.reference.score(batch.t0, batch.x, batch.condition))
    assert rule.metrics["policy/force"] == 2.5
    torch.testing.assert_close(batch.target, 2.5 * expected / BETA)
    rule.form = "clamped_displacement"  # the authors' published code knows no such thing
    rule.prepare(Paths(path, torch.zeros(50)), generator, 1.0)
    assert rule.metrics["policy/force"] == 1.0


@pytest.mark.parametrize(("found", "most"), [(1.0, 1.0), (3.0, 2.5), (0.2, 1.0)])
def test_ctrl_follows_its_value_beyond_1_as_far_as_the_returns_say(
    found: float, most: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Returns that vary thirty times as much as V: least squares would take its force that often."""
    measured = {"value/slope": found, "value/slope_error": 0.5}
    monkeypatch.setattr("scoreact.control.critic.slope", lambda values, returns, paths: measured)
    setup = setup_of(ddim)
    path, rule = setup.paths(400, generator), setup.rule(CTRL, gradient_at="state")
    with torch.no_grad():
        rewards = 30 * rule.critic.value(path.ts[-1:].expand(400), path.xs[-1], path.condition)
    rule.prepare(Paths(path, rewards), generator, 1.0)
    assert 0.4 * most < rule.metrics["policy/value_force"] <= most  # in half of the steps V has the other sign


def test_the_fitted_value_is_that_of_the_newest_paths(generator: torch.Generator) -> None:
    setup = setup_of(ddim)
    rule = setup.rule(CTRL)
    for _ in range(2):  # the first are still remembered: the fit was none yet
        path = setup.paths(20, generator)
        paths, returns = Paths(path, torch.zeros(20)), torch.randn(STEPS + 1, 20, generator=generator)
        rule.critic.fitter.fitted = False
        setup.critic.fit(paths, returns, generator, end=True)
    assert len(rule.critic.fitter.memory) == 2
    with torch.no_grad():
        expected = [rule.critic.value(t.expand(20), x, path.condition) for t, x in zip(path.ts, path.xs, strict=True)]
    values, _ = setup.critic.values(paths, returns)
    torch.testing.assert_close(values, torch.stack([*expected[:-1], returns[-1]]))


def test_pathwise_may_take_some_transitions_only(generator: torch.Generator) -> None:
    setup = setup_of(ddim)
    path = setup.paths(50, generator)
    assert len(setup.rule(CTRLPathwise, transitions=30).prepare(Paths(path, torch.zeros(50)), generator, 1.0)) == 30


def test_the_published_variants_run(generator: torch.Generator) -> None:
    setup = setup_of()
    paths = setup.scored(50, generator)
    rule = setup.rule(CTRL, advantage="standardised_value_differences")
    batch = rule.prepare(paths, generator, 1.0)
    by_step = batch.advantage.reshape(STEPS, 50)
    torch.testing.assert_close(by_step.mean(1), torch.zeros(STEPS), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_step.std(1), torch.ones(STEPS), atol=1e-3, rtol=0)
    clamped = setup.rule(CTRLPathwise, form="clamped_displacement", loss_clamp=1e-3)
    loss, _ = clamped.loss(clamped.prepare(paths, generator, 1.0))
    assert abs(loss.item()) <= STEPS * 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s.rule(CTRL, advantage="best"), "unknown advantage 'best'. Known: gae, standardised"),
        (lambda s: s.rule(CTRLPathwise, form="x"), "unknown form 'x'. Known: regression, clamped"),
        (lambda s: s.rule(CTRL, gradient_at="x"), "unknown gradient_at 'x'. Known: state, next"),
        (lambda s: CTRL(s.policy, s.sde, s.solver, s.critic, 0.0), "kl_weight must be positive, got 0"),
    ],
)
def test_unknown_settings_are_told(make: Callable[[Setup], CTRL], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(setup_of())


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
