"""The policy: which network acts when, and what that costs."""

from __future__ import annotations

import torch
from torch import nn

from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import euler_maruyama
from scoreact.models.base import ScoreModel
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.gaussian import mixture
from scoreact.types import Condition


def moved_policy(act_until: float) -> Policy:
    """A policy whose trained part differs from the reference everywhere."""
    torch.manual_seed(0)
    policy = Policy(ResidualModel(mixture(2, 2, 0), 2, width=8), act_until=act_until)
    assert isinstance(policy.model, ResidualModel)
    nn.init.normal_(policy.model.residual.last.bias)
    return policy


@torch.no_grad()
def test_the_reference_acts_from_act_until_on(generator: torch.Generator) -> None:
    policy, condition = moved_policy(0.5), Condition([""] * 4)
    t, x = torch.tensor([0.1, 0.5, 0.4, 0.9]), torch.randn(4, 2, generator=generator)
    mixed = policy.score(t, x, condition)
    own, reference = policy.model.score(t, x, condition), policy.reference.score(t, x, condition)
    assert float((own - reference).abs().min()) > 0  # so that the two can be told apart
    torch.testing.assert_close(mixed[[0, 2]], own[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3]], reference[[1, 3]])


def test_steps_of_the_reference_cost_nothing(generator: torch.Generator) -> None:
    policy = moved_policy(0.5)
    sde = SDE(policy.schedule, noise_level(1.0))
    ts = uniform(policy.schedule, 8)
    path = rollout(policy, sde, euler_maruyama, ts, Condition([""] * 16), generator)
    assert path.acts.tolist() == [float(t) < 0.5 for t in ts[:-1]]
    assert float(path.controls[path.acts].abs().min()) > 0
    assert float(path.controls[~path.acts].abs().max()) == 0


def test_network_calls_are_counted_once_a_sample(generator: torch.Generator) -> None:
    policy = moved_policy(0.5)
    t, x = torch.tensor([0.1, 0.6, 0.4]), torch.randn(3, 2, generator=generator)
    policy.score(t, x, Condition([""] * 3))
    policy.reference_score(t, x, Condition([""] * 3))
    assert policy.network_calls == 6


def test_a_policy_can_be_sampled_as_a_model() -> None:
    assert isinstance(moved_policy(1.0), ScoreModel)
