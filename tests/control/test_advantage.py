"""Returns and advantages: by hand, against an independent recomputation, and for another number of steps."""

from __future__ import annotations

import pytest
import torch

from scoreact.control.advantage import (
    believed,
    control_variate,
    explained_variance,
    gae,
    returns_to_go,
    standardised_per_step,
)

# two paths of three steps
VALUES = torch.tensor([[1.0, 0.0], [2.0, 0.5], [2.5, 0.0], [4.0, -1.0]])
COSTS = torch.tensor([[0.1, 0.0], [0.2, 0.3], [0.3, 0.0]])
LATER = torch.tensor([[0.5, 0.0], [0.1, 0.2], [0.4, 0.6]])
TS = torch.tensor([0.0, 0.25, 0.5, 1.0])


def test_returns_to_go_by_hand() -> None:
    expected = torch.tensor([[3.4, -1.3], [3.5, -1.3], [3.7, -1.0], [4.0, -1.0]])
    torch.testing.assert_close(returns_to_go(torch.tensor([4.0, -1.0]), COSTS), expected)


def test_one_step_advantage_by_hand() -> None:
    expected = torch.tensor([[0.9, 0.5], [0.3, -0.8], [1.2, -1.0]])
    torch.testing.assert_close(gae(VALUES, COSTS, LATER, TS, 0.0), expected)


def test_whole_return_by_hand() -> None:
    # R - V_k - own cost - later costs: 4 - 1 - 0.1 - 0.1 - 0.4, ...
    expected = torch.tensor([[2.4, -1.8], [1.4, -2.4], [1.2, -1.0]])
    torch.testing.assert_close(gae(VALUES, COSTS, LATER, TS, 1.0), expected)


def test_gae_against_its_definition(generator: torch.Generator) -> None:
    """A_k = sum_{j >= k} trace^(t_{j+1} - t_{k+1}) delta_j, delta_j step j's TD error; the own cost in the first."""
    steps, trace = 6, 0.3
    values = torch.randn(steps + 1, 4, generator=generator, dtype=torch.float64)
    costs, later = (torch.rand(steps, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    ts = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2
    for k in range(steps):
        expected = values[k + 1] - values[k] - costs[k]
        for j in range(k + 1, steps):
            # an error at the end of step k is reached at t_{k+1}; that of step j after further t_j - t_{k+1} + dt
            weight = trace ** float(ts[j + 1] - ts[k + 1])
            expected = expected + weight * (values[j + 1] - values[j] - later[j])
        torch.testing.assert_close(gae(values, costs, later, ts, trace)[k], expected)


def test_step_invariance() -> None:
    """Half the step with half the cost a step: advantages over the same interval agree as dt goes to 0."""

    def first(steps: int) -> float:
        ts = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        values = (3 * ts).sin().unsqueeze(1)
        costs = torch.full((steps, 1), 0.7 / steps, dtype=torch.float64)
        return float(gae(values, costs, costs, ts, 0.2)[0])

    assert first(2000) == pytest.approx(first(1000), rel=2e-2)
    assert first(1000) == pytest.approx(first(500), rel=4e-2)
    # lambda a step instead of a unit of time would change it by more than half
    assert abs(first(500)) > 0.1


def test_standardised_per_step(generator: torch.Generator) -> None:
    advantages = torch.randn(3, 500, generator=generator) * torch.tensor([[0.1], [1.0], [9.0]]) + 5
    standard = standardised_per_step(advantages)
    torch.testing.assert_close(standard.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(1), torch.ones(3), atol=1e-4, rtol=0)


def test_control_variate_finds_the_coefficients(generator: torch.Generator) -> None:
    candidates = torch.randn(2, 3, 4000, generator=generator)  # [N, C, B]
    truth = torch.tensor([[0.2, 0.9, 0.0], [1.0, 0.0, 0.5]])
    advantages = (truth.unsqueeze(2) * candidates).sum(1) + 0.3 * torch.randn(2, 4000, generator=generator) + 7.0
    torch.testing.assert_close(control_variate(advantages, candidates, torch.ones(3)), truth, atol=0.03, rtol=0)


def test_control_variate_stays_in_range_and_bears_zero_candidates() -> None:
    candidates = torch.stack([torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.zeros(4)]).unsqueeze(0)
    assert control_variate(5 * candidates[:, 0], candidates, torch.ones(2)).tolist() == [[1.0, 0.0]]
    assert control_variate(5 * candidates[:, 0], candidates, torch.tensor([3.0, 1.0])).tolist() == [[3.0, 0.0]]
    assert control_variate(-5 * candidates[:, 0], candidates, torch.ones(2)).tolist() == [[0.0, 0.0]]
    assert control_variate(torch.ones(1, 4), torch.zeros(1, 2, 4), torch.ones(2)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("slope", "error", "force"),
    [
        (1.0, 0.3, 1.0),
        (1.2, 0.3, 1.0),
        (0.8, 0.3, 1.0),
        (4.0, 0.5, 3.5),
        (0.5, 0.2, 0.7),
        (90.0, 1.0, 6.0),
        (-3.0, 1.0, 1 / 6),
    ],
)
def test_only_what_is_beyond_the_error_is_believed(slope: float, error: float, force: float) -> None:
    assert believed({"value/slope": slope, "value/slope_error": error}) == pytest.approx(force)
    assert believed({}) == 1.0  # a value that is the same everywhere


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((4,), 9.0), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) < 0
    assert explained_variance(returns, torch.ones(4)) != explained_variance(returns, torch.ones(4))  # NaN
