"""Steps: Adam inside a path-KL radius, natural gradients against solved systems, averages of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoreact.control.transitions import Batch
from scoreact.support.errors import ModelError
from scoreact.training.optim import AdamSteps, Average, Diverged, NaturalGradient, StepKL, backtrack
from scoreact.types import Condition, Metrics

DIM, STEPS, COUNT = 3, 5, 200
TRUTH = torch.tensor([1.0, -2.0, 0.5, 0.3, 0.0, -1.0])


class Linear:
    """Control w = weight x, loss beta / 2 sum_k E|w - target|^2: a linear-Gaussian policy whose optimum is `TRUTH`."""

    def __init__(self, kl_weight: float = 0.7, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(COUNT, DIM, 6, generator=generator)
        self.features[:, :, 0] *= 20  # badly scaled on purpose
        self.parameter = nn.Parameter(torch.zeros(6))
        self.kl_weight = kl_weight
        zeros = torch.zeros(COUNT, DIM)
        self.batch = Batch(
            t0=torch.arange(COUNT).float(), t1=torch.ones(COUNT), x=zeros, noise=zeros, mean=zeros,
            std=torch.ones(COUNT), control=zeros, advantage=torch.zeros(COUNT),
            target=self.features @ TRUTH + noise * torch.randn(COUNT, DIM, generator=generator),
            condition=Condition([""] * COUNT), steps=STEPS,
        )  # fmt: skip
        self.metrics: Metrics = {}

    def shift(self, batch: Batch) -> Tensor:
        return self.features[batch.t0.long()] @ self.parameter

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        error = self.shift(batch) - batch.target
        return self.kl_weight * batch.steps * 0.5 * error.square().sum(1).mean(), {"seen": 1.0}


def natural(problem: Linear, **settings: float) -> NaturalGradient:
    return NaturalGradient([problem.parameter], **{"max_kl": 1e9, **settings})  # type: ignore[arg-type]


def take(step: Callable[..., Metrics], problem: Linear, rate: float = 1.0) -> Metrics:
    return step(problem, problem.batch, torch.Generator().manual_seed(0), rate)


def test_natural_gradient_reaches_a_linear_gaussian_optimum_in_one_step() -> None:
    problem = Linear()
    metrics = take(natural(problem, damping=0.0, cg_steps=20), problem)
    torch.testing.assert_close(problem.parameter.detach(), TRUTH, rtol=1e-3, atol=1e-3)
    assert metrics["policy/step_share"] == 1
    assert metrics["seen"] == 1


class Attending(Linear):
    """A control that comes out of attention."""

    def shift(self, batch: Batch) -> Tensor:
        seen = (self.features[:8] * self.parameter)[None]
        found = nn.functional.scaled_dot_product_attention(seen, seen, seen)[0].sum(2)
        return found.repeat(len(batch) // 8, 1)


def test_fused_attention_has_no_natural_gradient_and_the_remedy_is_told() -> None:
    problem = Attending()
    problem.parameter.data.fill_(0.1)
    with pytest.raises(ModelError, match=r"need second derivatives, .* twice_differentiable=true"):
        take(natural(problem), problem)
    with sdpa_kernel(SDPBackend.MATH):
        assert take(natural(problem), problem)["policy/step_share"] > 0


def test_conjugate_gradients_solve_the_damped_system() -> None:
    problem, target = Linear(), torch.tensor([1.0, 2.0, -1.0, 0.0, 0.5, 3.0])
    matrix = problem.kl_weight * STEPS * torch.einsum("mdi,mdj->ij", problem.features, problem.features) / COUNT
    damping = 0.1 * float(target @ matrix @ target) / float(target @ target)
    expected = torch.linalg.solve(matrix + damping * torch.eye(6), target)
    solution = natural(problem, damping=0.1, cg_steps=30)._solve(
        problem.shift, problem.batch, problem.kl_weight, target
    )
    torch.testing.assert_close(solution, expected, rtol=1e-3, atol=1e-4)


def test_natural_gradient_stays_inside_the_radius() -> None:
    problem = Linear()
    metrics = take(natural(problem, max_kl=0.3), problem)
    moved = STEPS * 0.5 * float(problem.shift(problem.batch).detach().square().sum(1).mean())
    assert 0.03 < moved <= 0.3
    assert metrics["policy/step_kl"] == pytest.approx(moved, rel=1e-4)
    assert 0 < metrics["policy/step_share"] < 1


def test_natural_gradient_takes_no_step_that_makes_the_loss_worse() -> None:
    problem = Linear()
    with torch.no_grad():
        problem.parameter.copy_(TRUTH)  # at the optimum of an exactly solvable problem nothing is better
    before = problem.parameter.detach().clone()
    metrics = take(natural(problem), problem)
    torch.testing.assert_close(problem.parameter.detach(), before, rtol=0, atol=1e-5)
    assert metrics["policy/step_kl"] <= 1e-6


def adam(problem: Linear, **settings: float) -> AdamSteps:
    return AdamSteps([problem.parameter], minibatch_size=50, **settings)  # type: ignore[arg-type]


def test_adam_learns_and_reports() -> None:
    problem = Linear()
    step = adam(problem, learning_rate=0.05, epochs=100, max_kl=1e9)
    before = problem.loss(problem.batch)[0].item()
    metrics = take(step, problem)
    assert problem.loss(problem.batch)[0].item() < 0.01 * before
    assert metrics["policy/step_share"] == 1
    assert {"seen", "policy/gradient_norm", "policy/step_kl"} <= set(metrics)


def test_adam_is_shortened_to_the_radius() -> None:
    for radius in (0.5, 1e-3):
        problem = Linear()
        metrics = take(adam(problem, learning_rate=1.0, max_kl=radius, kl_states=COUNT), problem)
        moved = STEPS * 0.5 * float(problem.shift(problem.batch).detach().square().sum(1).mean())
        assert 0 < moved <= radius * 1.0001
        assert metrics["policy/step_kl"] == pytest.approx(moved, rel=1e-4)
        assert 0 < metrics["policy/step_share"] < 1


def test_the_bound_counts_from_where_the_step_began_and_asks_fresh_paths_once_less() -> None:
    far = Linear()  # paths that another policy drew: the shift is not 0 before the step
    with torch.no_grad():
        far.parameter.copy_(TRUTH / 2)
    begin = far.shift(far.batch).detach()
    metrics = take(adam(far, learning_rate=1.0, max_kl=0.5, kl_states=COUNT), far)
    moved = STEPS * 0.5 * float((far.shift(far.batch).detach() - begin).square().sum(1).mean())
    assert metrics["policy/step_kl"] == pytest.approx(moved, rel=1e-4)
    assert 0 < moved <= 0.5001
    asked: list[int] = []
    for start in (torch.zeros(6), TRUTH / 2):
        problem = Linear()
        with torch.no_grad():
            problem.parameter.copy_(start)

        def shift(batch: Batch, problem: Linear = problem) -> Tensor:
            asked.append(len(batch))
            return problem.shift(batch)

        StepKL(shift, problem.batch, 40)
    assert asked == [4, 4, 40]


def test_without_states_to_measure_at_a_step_is_not_bounded() -> None:
    problem, free = Linear(), Linear()
    take(adam(problem, learning_rate=1.0, max_kl=1e-3), problem)
    metrics = take(adam(free, learning_rate=1.0, max_kl=1e-3, kl_states=0), free)
    assert "policy/step_kl" not in metrics
    assert free.parameter.detach().norm() > 10 * problem.parameter.detach().norm()


def test_the_rate_scales_the_step() -> None:
    sizes = []
    for rate in (1.0, 0.1):
        problem = Linear()
        step = AdamSteps([problem.parameter], 1e-3, epochs=1, minibatch_size=COUNT, max_kl=1e9)
        take(step, problem, rate)
        sizes.append(float(problem.parameter.detach().norm()))
    assert sizes[1] == pytest.approx(0.1 * sizes[0], rel=1e-3)


def test_accumulated_minibatches_are_one_step() -> None:
    """4 minibatches of 50 accumulated = 1 of 200: gradients are means over the same transitions."""
    results = []
    for size, accumulate in ((COUNT, 1), (COUNT // 4, 4)):
        problem = Linear(noise=1.0)
        step = AdamSteps([problem.parameter], 1e-2, epochs=2, minibatch_size=size, accumulate=accumulate, max_kl=1e9)
        metrics = take(step, problem)
        results.append((problem.parameter.detach().clone(), metrics["policy/gradient_norm"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_a_remedy() -> None:
    problem = Linear()
    problem.batch.target[0] = math.nan
    with pytest.raises(Diverged, match="the policy's loss is nan; lower the learning rate"):
        take(adam(problem), problem)
    with pytest.raises(Diverged, match="the policy's gradient is not finite"):
        take(natural(problem), problem)


def test_backtrack_honours_the_limit_for_any_measure() -> None:
    def moved(power: float, start: float, limit: float) -> tuple[float, float, float]:
        p = nn.Parameter(torch.tensor([start]))
        share, value = backtrack([p], [torch.zeros(1)], lambda: float(p.detach().abs() ** power), limit)
        return share, value, p.item()

    assert moved(2, 0.5, 1.0) == (1.0, 0.25, 0.5)  # inside: untouched
    for power in (1.0, 2.0, 4.0):
        share, value, p = moved(power, 10.0, 0.5)
        assert value <= 0.5
        assert p == pytest.approx(10 * share)
        assert p > 0.05
    share, value, p = moved(2, math.inf, 0.5)  # not a number anywhere between: the step is dropped
    assert (share, value, p) == (0.0, 0.0, 0.0)


def test_step_kl_counts_from_where_it_was_made() -> None:
    problem = Linear()
    with torch.no_grad():
        problem.parameter.copy_(TRUTH)
    kl = StepKL(problem.shift, problem.batch, COUNT)
    assert kl() == 0
    with torch.no_grad():
        problem.parameter[1] += 0.1
    expected = STEPS * 0.5 * float((0.1 * problem.features[:, :, 1]).square().sum(1).mean())
    assert kl() == pytest.approx(expected, rel=1e-3)


def test_adam_state_survives_a_round_trip() -> None:
    one, other = Linear(noise=1.0), Linear(noise=1.0)
    first = adam(one, max_kl=1e9)
    take(first, one)
    with torch.no_grad():
        other.parameter.copy_(one.parameter)
    second = adam(other, max_kl=1e9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take(first, one)
    take(second, other)
    assert torch.equal(one.parameter, other.parameter)
    with pytest.raises(ValueError, match="keeps no state"):
        natural(one).load_state_dict({"step": 1})


def test_average_is_a_mean_at_first_and_exponential_later() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    expected = 0.0
    for update in range(1, 30):
        average.update(model)
        decay = min(0.5, update / (update + 10))
        expected = decay * expected + (1 - decay)
        assert average.model.weight.item() == pytest.approx(expected, rel=1e-5)  # type: ignore[operator]
    assert not any(p.requires_grad for p in average.model.parameters())
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        Average(model, 1.0)
