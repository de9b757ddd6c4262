"""Every rule rests at the optimum that its docstring names, and nowhere near it.

The reference is one Gaussian, so the optimum is known. The mean gradient of the rule's own loss, over batches drawn there,
must vanish within four standard errors; it must not when the rule pays another price for a nat, or at another policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from small_problem import DIM, Gaussian
from torch import Tensor

from scoreact.algorithms.base import Rule
from scoreact.algorithms.registry import rules
from scoreact.control.trajectory import Trajectory
from scoreact.control.transitions import Paths, Rows
from scoreact.rewards import Quadratic, checked
from scoreact.types import Condition

BETA = 0.7
LINEAR = Quadratic(0.0, linear=[0.8, -0.5])
CURVED = Quadratic([[0.9, 0.2], [0.2, 0.4]], linear=[0.8, -0.5])  # has an argmax


@dataclass
class Case:
    """A rule, its settings, and how to look at it."""

    rule: str
    settings: dict[str, Any] = field(default_factory=dict)
    reward: Quadratic = LINEAR
    batches: int = 25
    count: int = 1000  # paths a batch
    steps: int = 4
    tolerance: float = 2e-3  # of the gradient at the other policy: rounding, and what a finite batch or grid leaves
    dearer: float = 1.1  # a price, in units of beta, at which it must not rest
    law: str = ""  # forward rules: whose exact samples they see, the reference's or the tilted law's


CASES = [
    Case("ctrl", reward=CURVED, count=4000),
    Case("ctrl", {"gradient_at": "state"}, reward=CURVED, count=4000, dearer=1.2),
    Case("ctrl_trpo", reward=CURVED, count=4000),
    Case("ctrl_pathwise", reward=CURVED),
    Case("q_learning", reward=CURVED, count=4000, dearer=1.2),
    Case("adjoint_matching", reward=CURVED),
    Case("draft", reward=CURVED),
    Case("dpok", {"later_costs": True}, reward=CURVED, count=5000),
    # without later costs: the optimum where these do not depend on the state
    Case("dpok", count=5000),
    Case("flow_grpo", count=5000),
    Case("ddpo", reward=CURVED, count=5000),
    Case("rwr", {"replay": 1}, law="reference", count=2000),
    Case("diffusion_nft", {"advantage_clip": 20.0}, law="tilted", count=1000),
    Case("ram", law="tilted", count=4000),
    Case("dpo", law="tilted", steps=100, count=200, tolerance=0.02, dearer=1.25),
]


class Rest:
    """A policy at the case's optimum plus `away`, and the rule's gradients there."""

    def __init__(self, case: Case, away: float = 0.0, price: float = 1.0) -> None:
        self.case = case
        self.problem = Gaussian(case.reward, beta=BETA, steps=case.steps)
        gains, offsets = self.optimum()
        self.policy = self.problem.policy(gains, offsets + away / math.sqrt(case.steps))
        kind, problem = rules()[case.rule], self.problem
        critic = problem.critic(self.policy) if kind.fits_value else None
        beta = price * BETA
        if case.rule == "flow_grpo" and case.settings.get("advantage_scale") is None:
            beta = beta / self.spread()  # advantages are in standard deviations of the reward
        make: Callable[..., Rule] = kind
        self.rule = make(
            self.policy, problem.sde, problem.solver, critic, beta, checked(problem.reward), **case.settings
        )

    def optimum(self) -> tuple[Tensor, Tensor]:
        """gains and offsets of the fixed point."""
        problem = self.problem
        if self.case.rule == "ddpo":  # the argmax of the reward: the last step goes there from wherever it is
            gains, offsets = torch.zeros(self.case.steps, DIM, DIM), 0.2 * torch.ones(self.case.steps, DIM)
            best = torch.linalg.solve(problem.reward.quadratic.float(), problem.reward.linear.float())
            gains[-1], offsets[-1] = -problem.a[-1] / problem.std[-1], (best - problem.b[-1]) / problem.std[-1]
            return gains, offsets
        if not self.case.law:
            return problem.optimum()
        # the score of the tilted law at every time, whose mean is further by covariance r / beta
        t = problem.ts[:-1]
        alpha, sigma = problem.base.schedule.alpha(t), problem.base.schedule.sigma(t)
        noised = alpha.reshape(-1, 1, 1) ** 2 * problem.base.covariances + sigma.reshape(-1, 1, 1) ** 2 * torch.eye(DIM)
        change = torch.linalg.solve(noised, alpha.unsqueeze(1) * self.tilt())
        return torch.zeros(len(t), DIM, DIM), problem.unit.unsqueeze(1) * change

    def tilt(self) -> Tensor:
        """How far the mean of the tilted law is from the reference's."""
        return self.problem.base.covariances[0] @ self.problem.reward.linear.float() / BETA

    def spread(self) -> float:
        """The standard deviation of the reward at the path's end, the same for all policies that only shift it."""
        paths = self.problem.paths(self.policy, 100_000, torch.Generator().manual_seed(3))
        return float(paths.rewards.std())

    def rows(self, generator: torch.Generator) -> Rows:
        prompts = [""] * self.case.count
        if self.rule.own_rows:
            return self.rule.rows_for(prompts, self.problem.ts, generator)
        if self.case.law:
            return self.rule.prepare(self.samples(generator), generator, 1.0)
        paths = self.problem.paths(self.policy, self.case.count, generator)
        return self.rule.prepare(paths, generator, 1.0)

    def samples(self, generator: torch.Generator) -> Paths:
        """Exact samples of the case's law as the ends of paths, and beta log tilted / reference there as the reward."""
        base, end = self.problem.base, self.problem.ts[-1]
        alpha, sigma = base.schedule.alpha(end), base.schedule.sigma(end)
        x = base.sample(self.case.count, generator) + (self.tilt() if self.case.law == "tilted" else 0.0)
        x = alpha * x + sigma * torch.randn(x.shape, generator=generator)
        covariance = alpha**2 * base.covariances[0] + sigma**2 * torch.eye(DIM)
        rewards = BETA * x @ torch.linalg.solve(covariance, alpha * self.tilt())
        none = torch.empty(0)
        path = Trajectory(self.problem.ts, x.unsqueeze(0), *[none] * 7, Condition([""] * len(x)))
        return Paths(path, rewards - rewards.mean())

    def pull(self) -> tuple[Tensor, Tensor]:
        """The mean gradient by eight numbers, four stretches of time and two dimensions; and its standard errors."""
        generator, found = torch.Generator().manual_seed(1), []
        for _ in range(self.case.batches):
            loss, _ = self.rule.loss(self.rows(generator))
            (gradient,) = torch.autograd.grad(loss, self.policy.trainable())
            found.append(gradient.reshape(4, -1, DIM).sum(1).flatten())
        stacked = torch.stack(found)
        return stacked.mean(0), stacked.std(0) / math.sqrt(len(stacked))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join([c.rule, *map(str, c.settings.values())]))
def test_rests_at_its_optimum_and_not_elsewhere(case: Case) -> None:
    rest, error = Rest(case).pull()
    away, away_error = Rest(case, away=0.4).pull()
    size = float(away.abs().max())
    excess = float(((rest.abs() - case.tolerance * size) / error.clamp(min=1e-12)).max())
    print(
        f"{case.rule}: {excess:.1f} standard errors at rest, error {float(error.max()) / size:.4f} of the gradient away"
    )
    assert excess < 4
    assert float((away.abs() / away_error.clamp(min=1e-12)).max()) > 10
    if rules()[case.rule].kl_term:
        dearer, its_error = Rest(case, price=case.dearer).pull()
        said = float(((dearer.abs() - case.tolerance * size) / its_error.clamp(min=1e-12)).max())
        print(f"{said:.1f} standard errors at a price {case.dearer} times as high")
        assert said > 5


def test_every_rule_has_a_fixed_point_here() -> None:
    assert {case.rule for case in CASES} == set(rules()) - {"dxmi"}  # whose is the data's law: test_dxmi
