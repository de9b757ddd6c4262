"""Problems small enough to hold a rule to: one with random networks, and one whose optimum on the grid is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scoreact.algorithms.base import Rule
from scoreact.control.critic import Critic
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.trajectory import Trajectory
from scoreact.control.transitions import Paths
from scoreact.control.value import ValueNetwork
from scoreact.control.value_fit import ValueFit
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import VP, Schedule
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import Solver, euler_maruyama, step_of
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.recipes.gaussian import linear_reward, mixture
from scoreact.rewards import Quadratic, checked
from scoreact.types import Condition, expand

DIM = 2


def needed(rule: str, folder: Path, shape: Sequence[int] = (DIM,), classes: Sequence[str] = ()) -> dict[str, Any]:
    """The settings without which a rule does not start: real examples of this shape for `dxmi`."""
    if rule != "dxmi":
        return {}
    random, path = np.random.default_rng(0), folder / "real.npz"
    labels = {"labels": random.permutation(np.arange(60) % len(classes))} if classes else {}
    np.savez(path, data=random.random((60, *shape)).astype("float32"), **labels)
    return {"data": str(path)}


class Setup:
    """A policy away from its reference on a Gaussian mixture, and a value that is a random function, fitted to nothing."""

    def __init__(
        self, solver: Solver = euler_maruyama, beta: float = 0.7, steps: int = 4, moved: float = 0.3,
        value_scale: float = 0.5, schedule: Schedule | None = None, reward: Any = None,
    ) -> None:  # fmt: skip
        base = mixture(DIM, 3, 0)
        if schedule is not None:
            base = GaussianMixture(schedule, base.weights, base.means, base.covariances)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = ResidualModel(base, DIM, width=8)
            nn.init.normal_(self.model.residual.last.weight, std=moved)
            network = VectorValue(2 * DIM, 16)
            nn.init.normal_(network.net.last.weight, std=value_scale)
        self.base, self.policy, self.sde, self.solver = base, Policy(self.model, base), _memoryless(base), solver
        self.beta, self.steps, self.ts = beta, steps, uniform(base.schedule, steps)
        self.reward = checked(reward or linear_reward(DIM, 0))
        value = ValueNetwork(network, self.sde, self.policy)
        self.critic = Critic(kept(value, beta), self.policy, self.sde, solver)

    def rule(self, kind: type[Any], critic: Critic | None = None, **settings: Any) -> Any:
        own = (critic or self.critic) if kind.fits_value else None
        return kind(self.policy, self.sde, self.solver, own, self.beta, self.reward, **settings)

    def paths(self, of: int | Sequence[str], generator: torch.Generator, **more: Any) -> Trajectory:
        """So many paths of the policy, or one for each prompt."""
        condition = Condition([""] * of if isinstance(of, int) else of)
        return rollout(self.policy, self.sde, self.solver, self.ts, condition, generator, **more)

    def scored(self, of: int | Sequence[str], generator: torch.Generator, **more: Any) -> Paths:
        """The same with their rewards."""
        path = self.paths(of, generator, **more)
        return Paths(path, self.reward(path.xs[-1], path.condition))

    def paths_for(self, rule: Rule, prompts: Sequence[str], generator: torch.Generator) -> Trajectory:
        """Paths as the rule asks for them: whose policy draws, and which steps are the SDE's."""
        stochastic, condition = rule.stochastic_steps(self.steps, generator), Condition(prompts)
        return rollout(
            rule.behaviour(), self.sde, self.solver, self.ts, condition, generator, stochastic=stochastic,
            with_reference=rule.reads_reference,
        )  # fmt: skip

    def move(self) -> None:
        """The policy becomes another."""
        with torch.no_grad():
            for p in self.policy.trainable():
                p.add_(0.05)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.policy.trainable())])

    def compared(self, loss: Tensor) -> Tensor:
        """The gradient along 8 fixed directions: one number each, so that four standard errors mean it."""
        flat = self.gradient(loss)
        return torch.randn(8, len(flat), generator=torch.Generator().manual_seed(5)) @ flat / math.sqrt(len(flat))

    def simulated(self, count: int, generator: torch.Generator, cost: str = "path") -> Tensor:
        """`compared` of E[R] - beta cost, by differentiating the simulation itself through every step.

        cost: "none", "own" (each step's KL at a state held fixed, the paper's of dpok) or "path" (the path KL: J).
        """
        condition = Condition([""] * count)
        x, kl = self.policy.reference.prior(condition, generator), torch.zeros(count)
        for t0, t1 in zip(self.ts[:-1].tolist(), self.ts[1:].tolist(), strict=True):
            begin, end = torch.full((count,), t0), torch.full((count,), t1)
            if cost != "none":
                at = x.detach() if cost == "own" else x
                kernels = [
                    step_of(self.sde, self.solver, score(begin, at, condition), begin, end, at)
                    for score in (self.policy.score, self.policy.reference_score)
                ]
                kl = kl + kernels[0].kl(kernels[1])
            step = step_of(self.sde, self.solver, self.policy.score(begin, x, condition), begin, end, x)
            x = step.sample(torch.randn(x.shape, generator=generator))
        return self.compared((self.reward(x, condition) - self.beta * kl).mean())


class Gaussian:
    """One Gaussian in two dimensions: every step of the reference is m(x) = A x + b, and the optimum a recursion."""

    def __init__(
        self, reward: Quadratic, solver: Solver = euler_maruyama, beta: float = 0.7, steps: int = 4, t_max: float = 0.98
    ) -> None:
        covariance = torch.tensor([[[0.5, 0.2], [0.2, 0.3]]])
        self.base = GaussianMixture(VP(t_max=t_max), torch.ones(1), torch.tensor([[0.6, -0.4]]), covariance)
        self.sde, self.solver, self.reward, self.beta = _memoryless(self.base), solver, reward, beta
        self.steps, self.ts = steps, uniform(self.base.schedule, steps)
        points = torch.cat([torch.zeros(1, DIM), torch.eye(DIM)])
        a, b, std, unit = [], [], [], []
        for k in range(steps):
            t0, t1 = self.ts[k].expand(len(points)), self.ts[k + 1].expand(len(points))
            step = step_of(self.sde, self.solver, self.base.score(t0, points), t0, t1, points)
            moved = step_of(self.sde, self.solver, self.base.score(t0, points) + 1, t0, t1, points)
            b.append(step.mean[0])
            a.append((step.mean[1:] - step.mean[0]).T)
            std.append(step.std[0])
            unit.append(((moved.mean - step.mean) / step.std[0])[0, 0])
        self.a, self.b, self.std, self.unit = (torch.stack(parts) for parts in (a, b, std, unit))

    def optimum(self) -> tuple[Tensor, Tensor]:
        """gains [N, d, d] and offsets [N, d] of the optimal w_k = gain x + offset."""
        _, slopes, curves = self.values()
        gains, offsets = torch.zeros(self.steps, DIM, DIM), torch.zeros(self.steps, DIM)
        for k in range(self.steps):
            inverse = self._inverse(k, curves[k + 1])
            gains[k] = -self.std[k] * inverse @ curves[k + 1] @ self.a[k]
            offsets[k] = self.std[k] * inverse @ (slopes[k + 1] - curves[k + 1] @ self.b[k])
        return gains, offsets

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """level [N + 1], slope p [N + 1, d] and curve P [N + 1, d, d] of V_k = level + p.x - x'Px / 2."""
        levels = [torch.tensor(self.reward.constant)]
        slopes, curves = [self.reward.linear.float()], [self.reward.quadratic.float()]
        for k in reversed(range(self.steps)):
            level, p, q, std = levels[0], slopes[0], curves[0], self.std[k]
            inverse = self._inverse(k, q)
            # V_k(0) = max over w of E V_{k+1}(b + std (w + z)) - beta |w|^2 / 2
            best = std * inverse @ (p - q @ self.b[k])
            end = self.b[k] + std * best
            level = level + p @ end - end @ q @ end / 2 - std**2 * q.trace() / 2 - self.beta * best @ best / 2
            levels.insert(0, level)
            slopes.insert(0, self.beta * self.a[k].T @ inverse @ (p - q @ self.b[k]))
            curves.insert(0, self.beta * self.a[k].T @ inverse @ q @ self.a[k])
        return torch.stack(levels), torch.stack(slopes), torch.stack(curves)

    def _inverse(self, k: int, curve: Tensor) -> Tensor:
        return torch.linalg.inv(self.beta * torch.eye(DIM) + self.std[k] ** 2 * curve)

    def policy(self, gains: Tensor, offsets: Tensor) -> Policy:
        return Policy(Affine(self, gains, offsets), self.base)

    def paths(self, policy: Policy, count: int, generator: torch.Generator, **more: Any) -> Paths:
        condition = Condition([""] * count)
        path = rollout(policy, self.sde, self.solver, self.ts, condition, generator, **more)
        return Paths(path, self.reward(path.xs[-1], condition))

    def critic(self, policy: Policy) -> Critic:
        """With the exact V, which no fit will change."""
        value = ValueNetwork(ExactValue(self), self.sde, policy, "x")
        return Critic(kept(value, self.beta), policy, self.sde, self.solver)


class Affine(nn.Module):
    """The reference's score plus offsets and gains of each step: w_k = gain_k x + offset_k. The offsets are trained."""

    def __init__(self, problem: Gaussian, gains: Tensor, offsets: Tensor) -> None:
        super().__init__()
        self.base, self.ts, self.unit, self.gains = problem.base, problem.ts, problem.unit, gains
        self.offsets = nn.Parameter(offsets)
        base = problem.base
        self.schedule, self.prior, self.condition, self.decode = base.schedule, base.prior, base.condition, base.decode

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        k = (t.unsqueeze(1) - self.ts[:-1]).abs().argmin(1)
        control = torch.einsum("bij,bj->bi", self.gains[k], x) + self.offsets[k]
        return self.base.score(t, x, condition) + control / self.unit[k].unsqueeze(1)


class ExactValue(nn.Module):
    """V of the nearest time, from the value network's scaled x."""

    def __init__(self, problem: Gaussian) -> None:
        super().__init__()
        self.problem = problem
        levels, self.slopes, self.curves = problem.values()
        self.levels = nn.Parameter(levels)

    def forward(self, scaled: Tensor, t: Tensor, condition: Condition) -> Tensor:
        k = (t.unsqueeze(1) - self.problem.ts).abs().argmin(1)
        alpha, sigma = self.problem.base.schedule.alpha(t), self.problem.base.schedule.sigma(t)
        x = scaled / expand(alpha / (alpha**2 + sigma**2).sqrt(), scaled)
        bend = torch.einsum("bi,bij,bj->b", x, self.curves[k], x) / 2
        return self.levels[k] + (self.slopes[k] * x).sum(1) - bend


def kept(value: ValueNetwork, beta: float) -> ValueFit:
    """A fit that leaves the value as it is."""
    fit = ValueFit(value, beta, steps=0, first_steps=0)
    fit.fitted = True
    return fit


def worst(samples: Tensor) -> float:
    """The largest |mean| in standard errors: [n, m] -> one number."""
    return float((samples.mean(0).abs() / (samples.std(0) / math.sqrt(len(samples)))).max())


def _memoryless(base: GaussianMixture) -> SDE:
    return SDE(base.schedule, noise_level(1.0))
