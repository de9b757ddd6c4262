"""Rollouts: the record replays itself, costs match a closed form, noise-free steps, exploration, reproducibility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact.control.policy import Policy
from scoreact.control.rollout import epsilon_greedy, gaussian_actions, rollout
from scoreact.control.trajectory import Trajectory
from scoreact.dynamics.grids import uniform, uniform_log_snr
from scoreact.dynamics.schedule import VP, RectifiedFlow, Schedule
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import SOLVERS, Transition, ddim, euler_maruyama, step_of
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.gaussian import linear_reward, mixture
from scoreact.types import Condition


def policies(dim: int = 2) -> tuple[Policy, SDE]:
    """A policy that differs from its reference: the exact optimum for a linear reward."""
    base, reward = mixture(dim, 4, 0), linear_reward(dim, 0)
    optimum, _ = base.tilted(reward.linear, reward.quadratic, 0.5)
    return Policy(optimum, base), SDE(base.schedule, noise_level(1.0))


def condition(count: int) -> Condition:
    return Condition([""] * count)


class Shifted(nn.Module):
    """The score of N(0, alpha^2 + sigma^2) in one dimension, moved by a constant."""

    def __init__(self, schedule: Schedule, shift: float) -> None:
        super().__init__()
        self.schedule, self.shift = schedule, shift

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return torch.randn(len(condition), 1, generator=generator)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return Condition(list(prompts))

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        variance = self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2
        return self.shift - x / variance.unsqueeze(1)

    def decode(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_the_record_replays_itself(solver: str, generator: torch.Generator) -> None:
    policy, sde = policies()
    ts = uniform(sde.schedule, 7)
    path = rollout(policy, sde, SOLVERS[solver], ts, condition(5), generator)
    assert path.xs.shape == (8, 5, 2)
    for k in range(7):
        t0, t1 = ts[k].expand(5), ts[k + 1].expand(5)
        torch.testing.assert_close(path.xs[k + 1], path.means[k] + path.std[k] * path.noise[k])
        torch.testing.assert_close(path.actions[k], policy.model.score(t0, path.xs[k], path.condition))
        acted = step_of(sde, SOLVERS[solver], path.actions[k], t0, t1, path.xs[k])
        reference = policy.reference.score(t0, path.xs[k], path.condition)
        unmoved = step_of(sde, SOLVERS[solver], reference, t0, t1, path.xs[k])
        torch.testing.assert_close(path.means[k], acted.mean)
        torch.testing.assert_close(path.controls[k], (acted.mean - unmoved.mean) / path.std[k])
        # the log-ratio to the reference is a difference of log-densities
        difference = acted.log_prob(path.xs[k + 1]) - unmoved.log_prob(path.xs[k + 1])
        cost = (path.controls[k] * path.noise[k] + 0.5 * path.controls[k] ** 2).sum(1)
        torch.testing.assert_close(cost, difference, rtol=1e-3, atol=1e-3)


def test_euler_maruyama_control_is_u_sqrt_dt(generator: torch.Generator) -> None:
    policy, sde = policies()
    ts = uniform(sde.schedule, 5)
    path = rollout(policy, sde, euler_maruyama, ts, condition(4), generator)
    for k in range(5):
        t0 = ts[k].expand(4)
        u = sde.control(t0, path.actions[k], policy.reference.score(t0, path.xs[k], path.condition))
        torch.testing.assert_close(path.controls[k], u * (ts[k + 1] - ts[k]).sqrt(), rtol=1e-3, atol=1e-4)


def test_path_kl_of_a_constant_shift_is_closed_form(generator: torch.Generator) -> None:
    """s - s_ref = c everywhere: 1/2 sum (gain / g)^2 c^2 dt on every path alike."""
    schedule = VP()
    sde, ts, shift = SDE(schedule, noise_level(1.0)), uniform(schedule, 12), 0.3
    policy = Policy(Shifted(schedule, shift), Shifted(schedule, 0.0))
    path = rollout(policy, sde, euler_maruyama, ts, condition(3), generator)
    expected = float((0.5 * (sde.gain(ts[:-1]) / sde.diffusion(ts[:-1]) * shift) ** 2 * ts.diff()).sum())
    torch.testing.assert_close(path.path_kl(), torch.full((3,), expected), rtol=1e-4, atol=1e-6)


def test_path_kl_of_a_gaussian_problem(generator: torch.Generator) -> None:
    """One Gaussian, linear reward: the path KL of the memoryless optimum is the KL of its law at t_max."""
    schedule = VP(t_max=0.98)
    base = GaussianMixture(schedule, torch.ones(1), torch.zeros(1, 2), 0.5 * torch.eye(2).unsqueeze(0))
    slope, beta = torch.tensor([1.0, -0.5]), 0.8
    optimum, _ = base.tilted(slope, torch.zeros(2, 2), beta)
    sde = SDE(schedule, noise_level(1.0))
    policy = Policy(optimum, base)
    coarse, fine = (
        rollout(policy, sde, ddim, uniform_log_snr(schedule, steps), condition(2000), generator) for steps in (50, 100)
    )
    end = torch.tensor(schedule.t_max)
    alpha, sigma = float(schedule.alpha(end)), float(schedule.sigma(end))
    distance = alpha * 0.5 * slope / beta  # of the means of p*_t and p_t
    expected = 0.5 * float(distance @ distance) / (0.5 * alpha**2 + sigma**2)
    extrapolated = 2 * float(fine.path_kl().mean()) - float(coarse.path_kl().mean())  # the error is of order 1
    assert extrapolated == pytest.approx(expected, rel=0.01)
    ratio = fine.log_ratio_to_reference()
    assert abs(float(ratio.mean()) - float(fine.path_kl().mean())) < 4 * float(ratio.std()) / math.sqrt(2000)


def test_no_control_no_cost(generator: torch.Generator) -> None:
    base = mixture(2, 4, 0)
    sde = SDE(base.schedule, noise_level(1.0))
    path = rollout(Policy(base, base), sde, euler_maruyama, uniform(base.schedule, 4), condition(6), generator)
    assert float(path.path_kl().abs().max()) == 0
    assert float(path.log_ratio_to_reference().abs().max()) == 0


def test_a_step_without_noise_is_the_reference_and_free(generator: torch.Generator) -> None:
    """Rectified flow to t = 1: DDIM's last step is deterministic."""
    schedule = RectifiedFlow(t_max=1.0)
    sde, ts = SDE(schedule, noise_level(1.0)), uniform(schedule, 4)
    policy = Policy(Shifted(schedule, 0.5), Shifted(schedule, 0.0))
    path = rollout(policy, sde, ddim, ts, condition(6), generator)
    assert (path.std > 0).tolist() == [True, True, True, False]
    assert float(path.controls[-1].abs().max()) == float(path.noise[-1].abs().max()) == 0
    reference = policy.reference.score(ts[3].expand(6), path.xs[3], path.condition)
    torch.testing.assert_close(path.actions[-1], reference)
    assert not torch.equal(path.actions[0], policy.reference.score(ts[0].expand(6), path.xs[0], path.condition))


def test_from_act_until_on_the_reference_acts(generator: torch.Generator) -> None:
    free, sde = policies()
    policy = Policy(free.model, free.reference, act_until=0.5)
    ts = uniform(sde.schedule, 7)
    path = rollout(policy, sde, euler_maruyama, ts, condition(6), generator)
    assert path.acts.tolist() == (ts[:-1] < 0.5).tolist() == [True] * 4 + [False] * 3
    moved = path.controls.abs().flatten(1).sum(1) > 0
    assert moved.tolist() == path.acts.tolist()
    assert bool((path.noise[-1] != 0).any())  # the noise stays
    x, t = path.xs[3], torch.tensor([0.1, 0.6, 0.2, 0.9, 0.5, 0.49])  # rows at different times
    expected = torch.where(
        (t < 0.5).unsqueeze(1), free.model.score(t, x, path.condition), free.reference.score(t, x, path.condition)
    )
    torch.testing.assert_close(policy.score(t, x, path.condition), expected)


def test_a_record_survives_as_tensors(generator: torch.Generator) -> None:
    policy, sde = policies()
    path = rollout(policy, sde, euler_maruyama, uniform(sde.schedule, 3), condition(4), generator)
    again = Trajectory.of({**path.tensors(), "other": torch.zeros(1)}, path.condition)
    assert again.tensors().keys() == path.tensors().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), path.tensors().values(), strict=True))


def test_reference_only_costs_half_the_calls_and_follows_the_reference(generator: torch.Generator) -> None:
    policy, sde = policies()
    ts = uniform(sde.schedule, 5)
    path = rollout(policy, sde, euler_maruyama, ts, condition(4), generator, reference_only=True)
    assert policy.network_calls == 5 * 4
    assert float(path.controls.abs().max()) == 0
    again = rollout(
        Policy(policy.reference, policy.reference), sde, euler_maruyama, ts, condition(4),
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(path.xs, again.xs)


def draw(seed: int, exploration: object = None) -> Trajectory:
    policy, sde = policies()
    generator = torch.Generator().manual_seed(seed)
    return rollout(
        policy,
        sde,
        euler_maruyama,
        uniform(sde.schedule, 5),
        condition(4000),
        generator,
        exploration,  # type: ignore[arg-type]
    )


def test_the_generator_decides_everything() -> None:
    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)  # the global generator must not matter
    assert torch.equal(first.xs, draw(3).xs)
    assert not torch.equal(first.xs, draw(4).xs)


def test_gradients_stay_off_and_network_calls_are_counted(generator: torch.Generator) -> None:
    policy, sde = policies()
    path = rollout(policy, sde, euler_maruyama, uniform(sde.schedule, 3), condition(7), generator)
    assert not path.xs.requires_grad
    assert policy.network_calls == 2 * 3 * 7


@pytest.mark.parametrize(("with_reference", "calls"), [(True, 1 + 2 * 3), (False, 1 + 3)])
def test_a_step_makes_each_kernel_once(with_reference: bool, calls: int, generator: torch.Generator) -> None:
    """Small networks feel what a step computes beside them. One call more says which steps have noise."""
    policy, sde = policies()
    made = []

    def solver(*arguments: Any) -> Transition:
        made.append(arguments[2])
        return euler_maruyama(*arguments)

    drawn = rollout(
        policy, sde, solver, uniform(sde.schedule, 3), condition(7), generator, with_reference=with_reference
    )
    assert len(made) == calls
    assert bool(drawn.controls[:-1].isnan().all()) != with_reference


def test_gaussian_actions_have_the_scale() -> None:
    path = draw(0, gaussian_actions(lambda t: 0.2 + t))
    policy, _ = policies()
    for k in (0, 4):
        t = path.ts[k].expand(4000)
        error = path.actions[k] - policy.model.score(t, path.xs[k], path.condition)
        scale = 0.2 + float(path.ts[k])
        assert abs(float(error.std()) - scale) < 4 * scale / math.sqrt(2 * error.numel())
        assert abs(float(error.mean())) < 4 * scale / math.sqrt(error.numel())
    # the means are of the actions taken: off-path behaviour enters the ratio
    torch.testing.assert_close(path.xs[1], path.means[0] + path.std[0] * path.noise[0])


def test_epsilon_greedy_acts_by_the_reference_that_often() -> None:
    path = draw(0, epsilon_greedy(0.3))
    for k in range(5):
        share = float((path.controls[k].abs().sum(1) == 0).float().mean())
        assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert float(draw(0, epsilon_greedy(1.0)).path_kl().max()) == 0
    with pytest.raises(ValueError, match=r"epsilon must lie in \[0, 1\], got 1.5"):
        epsilon_greedy(1.5)
