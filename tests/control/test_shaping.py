"""`--value residual` is potential-based shaping (Ng, Harada & Russell 1999): the potential is sin(pi t / 2) R(x_data_hat).

Paying Phi(t_{k+1}, x_{k+1}) - Phi(t_k, x_k) at every step, and R - Phi = 0 at the end, gives a dense reward; its critic
learns V - Phi = cos(pi t / 2) F. Its advantages are those of V itself (Wiewiora 2003), and the policy's gradient is J's.
"""

from __future__ import annotations

import math

import pytest
import torch
from small_problem import DIM, Setup, kept
from torch import Tensor, nn

from scoreact.algorithms.ctrl import CTRL
from scoreact.control.advantage import gae, returns_to_go
from scoreact.control.critic import Critic
from scoreact.control.value import ResidualValue
from scoreact.models.value_networks import VectorValue
from scoreact.types import Condition


def shaped(setup: Setup, strength: float) -> ResidualValue:
    """A potential that is the reward of the expected sample, times `strength` on the way, beside a random function."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = VectorValue(DIM, 16)
        nn.init.normal_(network.net.last.weight, std=0.5)
    return ResidualValue(network, setup.sde, setup.policy, lambda x, c: strength * setup.reward(x, c))


@pytest.mark.parametrize("trace", [0.0, 0.3, 1.0])
def test_its_advantages_are_those_of_the_dense_reward(trace: float, generator: torch.Generator) -> None:
    setup = Setup()
    value, paths = shaped(setup, 1.0), setup.scored(50, generator)
    path, costs, rewards = paths.trajectory, paths.costs(setup.beta).double(), paths.rewards.double()
    values, potential = [], []
    rest = list[Tensor]()
    with torch.no_grad():
        for t, x in zip(path.ts[:-1], path.xs[:-1], strict=True):
            at = t.expand(50)
            seen = value.inputs_at(at, x, path.condition)
            values.append(value.of_inputs(at, seen, path.condition).double())
            learned = value.shift + value.scale * value.network(seen, at, path.condition)
            rest.append(math.cos(math.pi * float(t) / 2) * learned.double())
            potential.append(math.sin(math.pi * float(t) / 2) * setup.reward(seen, path.condition).double())
    v, phi = torch.stack([*values, rewards]), torch.stack([*potential, rewards])
    torch.testing.assert_close(v - phi, torch.stack([*rest, torch.zeros(50)]).double(), atol=1e-5, rtol=0)
    dense = phi[1:] - phi[:-1]
    assert float(dense.abs().mean()) > 0.1, "it pays on the way"
    mine = gae(v, costs, costs, path.ts, trace)
    theirs = gae(v - phi, costs - dense, costs - dense, path.ts, trace)
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    # what is paid in all differs by the potential of the start alone, of which no action decides
    whole, parts = returns_to_go(rewards, costs), returns_to_go(rewards - phi[-1], costs - dense)
    torch.testing.assert_close(parts, whole - phi, atol=1e-10, rtol=0)


def test_the_expected_gradient_is_that_of_the_objective_whatever_the_potential(generator: torch.Generator) -> None:
    """So that what is optimal stays: the gradient with a potential 3 R is the derivative of the simulation."""
    setup = Setup(beta=3.0)
    setup.critic = Critic(kept(shaped(setup, 3.0), 3.0), setup.policy, setup.sde, setup.solver)
    exact = torch.stack([setup.simulated(500, generator) for _ in range(12)])
    rule, found = setup.rule(CTRL), list[Tensor]()
    for _ in range(20):
        batch = rule.prepare(setup.scored(600, generator), generator, 1.0)
        found.append(-setup.compared(rule.loss(batch)[0]))
    mine = torch.stack(found)
    error = (mine.var(0) / len(mine) + exact.var(0) / len(exact)).sqrt()
    assert float(((mine.mean(0) - exact.mean(0)).abs() / error).max()) < 4
    assert float((exact.mean(0).abs() / error).max()) > 6
    empty = Condition([""] * 5)
    x = torch.randn(5, DIM, generator=generator)
    with torch.no_grad():
        assert float(setup.critic.value(torch.full((5,), 0.9), x, empty).std()) > 1, "the potential is not small"
