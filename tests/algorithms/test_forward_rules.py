"""Forward-process rules: losses by hand, gradients and fixed points by formula, pairs and their files, resume, optima."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_problem import DIM, Setup
from torch import Tensor, nn

from scoreact.algorithms.diffusion_nft import DiffusionNFT, graded
from scoreact.algorithms.dpo import DPO, paired, read_pairs, write_pairs
from scoreact.algorithms.forward import ForwardRule
from scoreact.algorithms.ram import RAM, leave_one_out
from scoreact.algorithms.rwr import RWR, log_weights
from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.control.policy import Policy
from scoreact.control.trajectory import Trajectory
from scoreact.control.transitions import Paths
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import VP, RectifiedFlow, Schedule, noising
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import euler_maruyama
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.gaussian import linear_reward, mixture, quadratic_reward
from scoreact.rewards import Quadratic
from scoreact.training.config import Config, updated
from scoreact.types import Condition, Metrics, expand

BETA, STEPS = 0.7, 5
KINDS: dict[str, type[ForwardRule]] = {"rwr": RWR, "diffusion_nft": DiffusionNFT, "ram": RAM, "dpo": DPO}


def setup_of(moved: float = 0.3, schedule: Schedule | None = None) -> Setup:
    return Setup(euler_maruyama, BETA, STEPS, moved, schedule=schedule)


def prepared(
    setup: Setup, kind: type[ForwardRule], count: int = 16, prompts: str = "", **settings: Any
) -> tuple[Any, Any]:
    """A rule and its rows for a rollout of `count` samples."""
    generator, rule = torch.Generator().manual_seed(1), setup.rule(kind, **settings)
    path = setup.paths_for(rule, [prompts[i % len(prompts)] if prompts else "" for i in range(count)], generator)
    return rule, rule.prepare(Paths(path, setup.reward(path.xs[-1], path.condition)), generator, 1.0)


# --- noising ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VP(t_max=0.9), RectifiedFlow()])
def test_noising_from_the_end_of_a_path_keeps_the_marginals(schedule: Schedule, generator: torch.Generator) -> None:
    """N(m, v) data are N(alpha m, alpha^2 v + sigma^2) at every time, though the samples have noise at the end already."""
    setup, mean, variance, count = setup_of(schedule=schedule), 0.8, 0.3, 200_000
    end = torch.tensor(schedule.t_max)
    spread = (schedule.alpha(end) ** 2 * variance + schedule.sigma(end) ** 2).sqrt()
    x_end = schedule.alpha(end) * mean + spread * torch.randn(count, 1, generator=generator)
    t = torch.tensor([0.1, 0.5, 0.8]).expand(count, 3)
    noise = torch.randn(count, 3, 1, generator=generator)
    x, score = setup.rule(RWR).renoised(x_end, end, t, noise)
    for k in range(3):
        at = schedule.alpha(t[0, k]), schedule.sigma(t[0, k])
        wanted = float(at[0] ** 2 * variance + at[1] ** 2)
        found = x[:, k, 0]
        assert abs(float(found.mean() - at[0] * mean)) < 4 * math.sqrt(wanted / count)
        assert abs(float(found.var() / wanted - 1)) < 4 * math.sqrt(2 / count)
        # denoising: the conditional score's regression on x is the marginal's score, slope -1 / variance
        centred = found - found.mean()
        slope = float((centred * score[:, k, 0]).mean() / centred.square().mean())
        assert slope == pytest.approx(-1 / wanted, abs=4 * float(score[:, k, 0].std()) / math.sqrt(wanted * count))


def test_every_acting_step_is_looked_at_once_or_draws_of_them(generator: torch.Generator) -> None:
    setup = setup_of(schedule=RectifiedFlow())
    setup.policy.act_until = 0.7
    rule = setup.rule(RWR)
    t0, t1, steps = rule.times(setup.ts, 3, generator)
    assert steps == 4  # t0 = 0.001, 0.2, 0.4, 0.6; at 0.8 the reference acts
    for row, ends in zip(t0, t1, strict=True):
        assert torch.equal(row.sort().values, setup.ts[:4])
        assert torch.equal(ends.sort().values, setup.ts[1:5])
    few, _, steps = setup.rule(RWR, draws=2).times(setup.ts, 1000, generator)
    assert (few.shape, steps) == ((1000, 2), 4)
    assert bool((few[:, 0] != few[:, 1]).all())
    assert abs(float((few == setup.ts[0]).float().sum(1).mean()) - 0.5) < 4 * 0.5 / math.sqrt(1000)


def test_the_kl_error_is_the_control_and_the_others_are_predictions(generator: torch.Generator) -> None:
    setup = setup_of()
    rule, schedule = setup.rule(RWR), setup.sde.schedule
    t0, t1 = torch.tensor([0.2, 0.6]), torch.tensor([0.3, 0.75])
    x, one, two = (torch.randn(2, DIM, generator=generator) for _ in range(3))
    error = {name: rule.error(name, t0, t1, x, one, two) for name in ("kl", "epsilon", "x0")}
    control = setup.sde.control(t0, one, two) * expand((t1 - t0).sqrt(), x)
    torch.testing.assert_close(error["kl"], control)
    torch.testing.assert_close(error["epsilon"], -expand(schedule.sigma(t0), x) * (one - two))
    torch.testing.assert_close(error["x0"], expand(schedule.sigma(t0) ** 2 / schedule.alpha(t0), x) * (one - two))


# --- rwr --------------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    weights = log_weights(torch.tensor([0.0, 2.0, 1.0, 5.0]), Condition(["a", "b", "a", "b"]), 0.5).exp()
    e2, e6 = math.exp(2), math.exp(6)  # exp(1 / 0.5), exp(3 / 0.5)
    wanted = [2 / (1 + e2), 2 / (1 + e6), 2 * e2 / (1 + e2), 2 * e6 / (1 + e6)]
    assert weights.tolist() == pytest.approx(wanted)


def test_rwr_loss_by_hand() -> None:
    setup = setup_of()
    rule, rows = prepared(setup, RWR, weighting="epsilon")
    at, schedule = rows.noised, setup.sde.schedule
    with torch.no_grad():
        loss = float(rule.loss(rows)[0])
        score = setup.model.score(at.t0, at.x, at.condition)
    total = 0.0
    for i in range(len(rows)):
        error = schedule.sigma(at.t0[i]) * (score[i] - at.target[i])
        total += float(rows.weight[i]) * 0.5 * float(error.square().sum())
    assert loss == pytest.approx(total / 16, rel=1e-4)  # 16 samples; 5 steps of each summed
    assert len(rows) == 16 * STEPS


class Linear(nn.Module):
    """The score a(t) x + b(t) in one dimension, a and b free at each of the grid's times."""

    def __init__(self, ts: Tensor) -> None:
        super().__init__()
        self.ts, self.slope, self.offset = ts, nn.Parameter(torch.zeros(len(ts))), nn.Parameter(torch.zeros(len(ts)))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        k = (t.unsqueeze(1) - self.ts).abs().argmin(1)
        result: Tensor = self.slope[k].unsqueeze(1) * x + self.offset[k].unsqueeze(1)
        return result


class LinearModel(ResidualModel):
    """A Gaussian's exact score plus `Linear`."""

    def __init__(self, base: GaussianMixture, ts: Tensor) -> None:
        super().__init__(base, 1, width=4)
        self.residual = Linear(ts)  # type: ignore[assignment]

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        change: Tensor = self.residual(t, x)  # its arguments the other way round
        return self.base.score(t, x, condition) + change


class Line:
    """A Gaussian N(m, v) with reward a x, and the tilted law N(m + v a / beta, v)."""

    mean, variance, slope = 0.3, 0.5, 0.9

    def __init__(self) -> None:
        schedule = VP(t_max=0.98)
        self.base = self.law(self.mean, schedule)
        self.tilted = self.law(self.mean + self.variance * self.slope / BETA, schedule)
        self.ts = uniform(schedule, 6)
        self.model = LinearModel(self.base, self.ts)
        self.policy, self.sde = Policy(self.model, self.base), SDE(schedule, noise_level(1.0))

    def law(self, mean: float, schedule: Schedule) -> GaussianMixture:
        return GaussianMixture(schedule, torch.ones(1), torch.tensor([[mean]]), torch.tensor([[[self.variance]]]))

    def samples(self, law: GaussianMixture, count: int, generator: torch.Generator) -> Paths:
        """Exact samples of a law at the path's end as a rollout's, and R: log tilted / p_ref there, times beta."""
        end = self.ts[-1].expand(count)
        x_data = law.sample(count, generator)
        noise = torch.randn(count, 1, generator=generator)
        x = law.schedule.alpha(end[:1]) * x_data + law.schedule.sigma(end[:1]) * noise
        none = torch.empty(0)
        path = Trajectory(self.ts, x.unsqueeze(0), *[none] * 7, Condition([""] * count))
        return Paths(path, BETA * (self.tilted.log_prob(end, x) - self.base.log_prob(end, x)))

    def distance(self) -> tuple[float, float]:
        """Path KL from the tilted law's score, and the reference's, on the tilted law's noised samples."""
        generator = torch.Generator().manual_seed(9)
        ours = theirs = 0.0
        for t0, t1 in zip(self.ts[:-1], self.ts[1:], strict=True):
            t = t0.expand(4000)
            x = self.tilted.schedule.alpha(t0) * self.tilted.sample(4000, generator)
            x = x + self.tilted.schedule.sigma(t0) * torch.randn(x.shape, generator=generator)
            with torch.no_grad():
                wanted = self.tilted.score(t, x)
                scale = 0.5 * (t1 - t0)
                for law in (self.model, self.base):
                    u = self.sde.control(t, law.score(t, x, Condition([""] * 4000)), wanted)
                    kl = float(scale * u.square().mean())
                    ours, theirs = (ours + kl, theirs) if law is self.model else (ours, theirs + kl)
        return ours, theirs


def fit(line: Line, rule: Any, law: GaussianMixture, iterations: int, count: int, rate: float) -> None:
    """Adam on the rule's loss with fresh samples of `law` each time, the rate falling to zero."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(line.policy.trainable(), lr=rate, betas=(0.9, 0.99))
    for n in range(iterations):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 - 2 * n / iterations)
        rows = rule.prepare(line.samples(law, count, generator), generator, 1.0)
        optimizer.zero_grad()
        rule.loss(rows)[0].backward()
        optimizer.step()
        rule.moved()


@pytest.mark.parametrize("weighting", ["kl", "velocity"])
def test_rwr_from_the_reference_has_the_tilted_law_as_minimiser(weighting: str) -> None:
    line = Line()
    rule = RWR(line.policy, line.sde, euler_maruyama, None, BETA, weighting=weighting, replay=1)  # type: ignore[arg-type]
    fit(line, rule, line.base, 100, 600, 0.08)
    ours, theirs = line.distance()
    assert theirs > 0.3  # nats: the tilt is no small one
    assert ours < 0.02 * theirs


def gradients(line: Line, baseline: str, reward: Callable[[Tensor, Condition], Tensor], batches: int) -> Tensor:
    """Of the loss at the reference, a row a batch of the reference's samples; the same samples for every baseline."""
    rule = RWR(line.policy, line.sde, euler_maruyama, None, BETA, reward, replay=1, baseline=baseline)  # type: ignore[arg-type]
    generator, rows = torch.Generator().manual_seed(5), []
    for _ in range(batches):
        path = line.samples(line.base, 200, generator).trajectory
        loss = rule.loss(rule.prepare(Paths(path, reward(path.xs[-1], path.condition)), generator, 1.0))[0]
        rows.append(torch.cat(torch.autograd.grad(loss, line.policy.trainable())))
    return torch.stack(rows)


def along(x: Tensor, condition: Condition) -> Tensor:
    return 0.3 * Line.slope * x[:, 0]


def test_a_baseline_changes_the_noise_of_the_gradient_and_not_its_mean() -> None:
    """At the reference, where the target less the reference's score has mean 0 given the state."""
    line = Line()
    without, with_one = (gradients(line, baseline, along, 300) for baseline in ("none", "denoised"))
    error = (without - with_one).std(0) / 300**0.5
    assert float(((without.mean(0) - with_one.mean(0)) / (error + 1e-6)).abs().max()) < 4
    slopes, offsets = (without.std(0) / with_one.std(0)).view(2, -1)[:, :-1]  # no step begins at the last time
    assert float(torch.cat([slopes, offsets]).min()) > 2
    assert int(offsets.argmax()) == len(offsets) - 1, (
        "the nearest to the data, where the denoised sample tells the most"
    )


def test_with_a_baseline_a_constant_reward_changes_nothing() -> None:
    def flat(x: Tensor, condition: Condition) -> Tensor:
        return torch.full((len(x),), 2.5)

    assert float(gradients(Line(), "denoised", flat, 2).abs().max()) < 1e-3
    assert float(gradients(Line(), "none", flat, 2).abs().max()) > 0.01


def test_rwr_with_a_baseline_has_the_tilted_law_as_minimiser_sooner() -> None:
    found = []
    for baseline in ("none", "denoised"):
        line = Line()
        end = line.ts[-1:]

        def reward(x: Tensor, condition: Condition, line: Line = line, end: Tensor = end) -> Tensor:
            t = end.expand(len(x))
            return BETA * (line.tilted.log_prob(t, x) - line.base.log_prob(t, x))

        rule = RWR(line.policy, line.sde, euler_maruyama, None, BETA, reward, replay=1, baseline=baseline)  # type: ignore[arg-type]
        fit(line, rule, line.base, 100, 150, 0.08)
        found.append(line.distance())
    (without, theirs), (with_one, _) = found
    assert with_one < 0.01 * theirs
    assert with_one < 0.5 * without


def test_rwr_remembers_the_reference_and_forgets_the_policy(generator: torch.Generator) -> None:
    setup = setup_of()
    for samples, kept in (("reference", 3), ("policy", 1)):
        rule = setup.rule(RWR, samples=samples, replay=3)
        for _ in range(5):
            path = setup.paths_for(rule, ["a", "b"] * 8, generator)
            rows = rule.prepare(Paths(path, path.xs[-1][:, 0]), generator, 1.0)
        assert len(rule.memory) == kept
        assert len(rows) == 16 * STEPS, "an iteration costs the same however much is remembered"
        assert torch.equal(rule.memory[-1][0], path.xs[-1])
    reference = setup.paths_for(setup.rule(RWR), [""] * 8, torch.Generator().manual_seed(2))
    assert torch.equal(
        reference.actions[0], setup.model.base.score(torch.full((8,), 0.0), reference.xs[0], Condition([""]))
    )


# --- diffusion_nft ----------------------------------------------------------------------------------------------------


def test_optimality_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.0, 7.0])
    r, std = graded(rewards, Condition(["a", "b", "a", "b", "c"]), 0.5)
    assert r.tolist() == pytest.approx(
        [0.0, 0.5, 1.0, 0.5, 0.5]
    )  # one std is beyond 0.5; equals, and one alone, are even
    r, std = graded(rewards, Condition(["a", "b", "a", "b", "c"]), 4.0)
    assert r.tolist() == pytest.approx([0.375, 0.5, 0.625, 0.5, 0.5], abs=1e-4)
    assert std[:3].tolist() == pytest.approx([1.0, 0.0, 1.0], abs=2e-4)


@pytest.mark.parametrize("weighting", ["velocity", "adaptive"])
def test_nft_loss_by_hand(weighting: str) -> None:
    """The paper's formula with the implicit policies written out, in a policy moved away from the old one."""
    setup = setup_of()
    rule, rows = prepared(setup, DiffusionNFT, mix=0.3, weighting=weighting, kl_share=2.0)
    setup.move()
    at, schedule = rows.noised, setup.sde.schedule

    def form(score: Tensor) -> Tensor:
        alpha, sigma = expand(schedule.alpha(at.t0), at.x), expand(schedule.sigma(at.t0), at.x)
        data = (at.x + sigma**2 * score) / alpha
        if weighting == "adaptive":
            return data
        d_alpha, d_sigma = expand(schedule.d_alpha(at.t0), at.x), expand(schedule.d_sigma(at.t0), at.x)
        return d_alpha * data - d_sigma * sigma * score

    with torch.no_grad():
        new, old = form(setup.model.score(at.t0, at.x, at.condition)), form(rows.old)
        truth, reference = form(at.target), form(setup.model.base.score(at.t0, at.x, at.condition))
        plus, minus = 0.7 * old + 0.3 * new, 1.3 * old - 0.3 * new
        loss = float(rule.loss(rows)[0])

    def squared(a: Tensor, size: Tensor) -> Tensor:
        return a.square().sum(1) / (size.abs().mean(1) if weighting == "adaptive" else 1)

    r = rows.optimality
    total = r * squared(plus - truth, plus - truth) + (1 - r) * squared(minus - truth, minus - truth)
    total = total + rows.kl_weight * squared(new - reference, old - truth)
    assert loss == pytest.approx(float(total.mean()), rel=1e-3)
    assert not torch.allclose(new, old)


def test_nft_gradient_at_the_old_policy_is_the_closed_formula() -> None:
    """-2 b (2 r - 1) (v - v_old) . dv/dtheta, mean over rows: the reward-weighted pull, nothing else."""
    setup = setup_of()
    rule, rows = prepared(setup, DiffusionNFT, 64, "ab", mix=0.4, weighting="epsilon", kl_share=0.0)
    at = rows.noised
    sigma = expand(setup.sde.schedule.sigma(at.t0), at.x)
    found = setup.gradient(rule.loss(rows)[0])
    noise = -sigma * setup.policy.score(at.t0, at.x, at.condition)
    pull = 0.4 * (2 * rows.optimality - 1).unsqueeze(1) * (-sigma * (at.target - rows.old))
    wanted = setup.gradient(-2 * (pull.detach() * noise).sum(1).mean())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float(wanted.norm()) > 1e-3


def test_nft_with_its_kl_rests_at_the_tilted_law(generator: torch.Generator) -> None:
    """Gaussian and linear reward: at the tilted law with old = theta the mean gradient vanishes, elsewhere not."""
    line = Line()
    rule = DiffusionNFT(line.policy, line.sde, euler_maruyama, None, BETA, advantage_clip=20.0)
    alpha, sigma = line.base.schedule.alpha(line.ts), line.base.schedule.sigma(line.ts)
    spread = alpha**2 * line.variance + sigma**2
    grads: dict[float, Tensor] = {}
    for share_of_tilt, law in ((1.0, line.tilted), (0.0, line.base)):
        with torch.no_grad():
            line.model.residual.offset.copy_(share_of_tilt * alpha * line.variance * line.slope / BETA / spread)
        rule.moved()
        rule.updates = 0
        found = []
        for _ in range(30):
            rows = rule.prepare(line.samples(law, 1000, generator), generator, 1.0)
            found.append(torch.cat([g for g in torch.autograd.grad(rule.loss(rows)[0], line.policy.trainable())]))
        stacked = torch.stack(found)
        error = stacked.std(0) / math.sqrt(30)
        keep = error > 0  # the last time is no action's
        grads[share_of_tilt] = (stacked.mean(0)[keep] / error[keep]).abs()
    assert float(grads[1.0].max()) < 4.5
    assert float(grads[0.0].max()) > 20


def test_the_old_policy_follows_by_its_schedule_draws_and_is_counted(generator: torch.Generator) -> None:
    setup = setup_of()
    rule = setup.rule(DiffusionNFT, old_rise=0.25, old_most=0.4)
    old = [float(rule._parameters(rule.old)[-1][0])]
    for decay in (0.0, 0.25, 0.4, 0.4):
        setup.move()
        assert rule.decay() == decay
        rule.moved()
        old.append(decay * old[-1] + (1 - decay) * float(setup.policy.trainable()[-1][0].detach()))
        assert float(rule._parameters(rule.old)[-1][0]) == pytest.approx(old[-1])
    path = setup.paths_for(rule, [""] * 6, generator)
    assert torch.equal(path.actions[1], rule.old.model.score(path.ts[1].expand(6), path.xs[1], path.condition))
    assert not path.acts.any(), "its rollouts are the ODE's"
    before = setup.policy.network_calls
    rule.old.network_calls = 0
    rows = rule.prepare(Paths(path, path.xs[-1][:, 0]), generator, 1.0)
    assert setup.policy.network_calls - before == 2 * len(rows)  # the old policy and the reference
    assert bool(setup.rule(DiffusionNFT, sampling="sde").stochastic_steps(STEPS, generator) is None)


# --- ram --------------------------------------------------------------------------------------------------------------


def test_a_sample_is_compared_with_the_others_of_its_prompt() -> None:
    rewards = torch.tensor([1.0, 0.0, 4.0, 2.0, 4.0, 7.0])
    assert leave_one_out(rewards, Condition(list("ababac"))).tolist() == pytest.approx([-3, -2, 1.5, 2, 1.5, 0])


@pytest.mark.parametrize("weighting", ["velocity", "kl"])
def test_ram_loss_by_hand(weighting: str) -> None:
    """The paper's formula in velocities, or the square of u sqrt(dt); the pull's own score has no gradient."""
    setup = setup_of()
    rule, rows = prepared(setup, RAM, weighting=weighting)
    at, schedule, sde = rows.noised, setup.sde.schedule, setup.sde

    def form(score: Tensor) -> Tensor:
        if weighting == "kl":
            return sde.control(at.t0, score, torch.zeros_like(score)) * expand((at.t1 - at.t0).sqrt(), score)
        alpha, sigma = expand(schedule.alpha(at.t0), at.x), expand(schedule.sigma(at.t0), at.x)
        data = (at.x + sigma**2 * score) / alpha
        d_alpha, d_sigma = expand(schedule.d_alpha(at.t0), at.x), expand(schedule.d_sigma(at.t0), at.x)
        return d_alpha * data - d_sigma * sigma * score

    new = setup.policy.score(at.t0, at.x, at.condition)
    reference = form(setup.model.base.score(at.t0, at.x, at.condition))
    goal = reference + rows.advantage.unsqueeze(1) * (form(at.target) - form(new)).detach()
    wanted = BETA / 2 * (form(new) - goal).square().sum() / 16
    loss, _ = rule.loss(rows)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(setup.gradient(loss), setup.gradient(wanted), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["epsilon", "kl"])
def test_rams_pull_is_the_gradient_of_the_expected_reward(weighting: str, generator: torch.Generator) -> None:
    """On a mixture with a quadratic reward: the mean gradient is that of s - s_ref - grad E[R | x_t] / beta, by quadrature."""
    line, reward, count = Line(), Quadratic([[-0.9]], linear=[0.4]), 4000
    law = GaussianMixture(
        line.base.schedule, torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.1]], [[0.3]]])
    )
    line.model.base = law  # the policy is the score of its own samples; the reference is another law
    rule = RAM(line.policy, line.sde, euler_maruyama, None, BETA, weighting=weighting)  # type: ignore[arg-type]
    end, t = line.ts[-1:].double(), line.ts[:-1]
    grid = torch.linspace(-6, 6, 601, dtype=torch.float64).unsqueeze(1)
    density, worth = law.double().log_prob(end.expand(601), grid).exp(), reward(grid, Condition([""] * 601))
    law.float()
    wanted = []
    for k in range(len(t)):
        kept, std = noising(law.schedule, end, t[k : k + 1].double())
        x = grid.flatten().clone().requires_grad_(True)
        posterior = torch.softmax(density.log() - 0.5 * ((x.unsqueeze(1) - kept * grid.T) / std) ** 2, dim=1)
        (slope,) = torch.autograd.grad((posterior @ worth).sum(), x)
        here, at = t[k].expand(601), grid.float()
        away = law.score(here, at) - line.policy.reference.score(here, at, Condition([""] * 601))
        error = away.flatten().double() - slope / BETA
        weight = law.log_prob(here, at).exp().double()
        scale = law.schedule.sigma(t[k]) ** 2
        if weighting == "kl":
            scale = line.sde.diffusion(t[k]) ** 2 * (line.ts[k + 1] - t[k])
        wanted.append([float(BETA * scale * (weight * error * f).sum() / weight.sum()) for f in (grid.flatten(), 1.0)])
    found = []
    for _ in range(40):
        samples = line.samples(law, count, generator)
        paths = Paths(samples.trajectory, reward(samples.trajectory.xs[-1], samples.trajectory.condition))
        loss, _ = rule.loss(rule.prepare(paths, generator, 1.0))
        found.append(torch.stack(torch.autograd.grad(loss, line.policy.trainable()))[:, :-1].T)
    stacked = torch.stack(found)
    error = stacked.std(0) / math.sqrt(len(stacked))
    assert float(((stacked.mean(0) - torch.tensor(wanted)).abs() / error).max()) < 4
    assert float((torch.tensor(wanted).abs() / error).max()) > 30


# --- dpo --------------------------------------------------------------------------------------------------------------


def test_pairs_of_every_kind(generator: torch.Generator) -> None:
    rewards, condition = torch.tensor([3.0, 0.0, 1.0, 2.0, 5.0, 4.0, 9.0]), Condition(list("ababaac"))
    first, second = paired("best_worst", 1, rewards, condition, generator)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(3, 1), (4, 2)]
    first, second = paired("all", 1, rewards, condition, generator)
    assert len(first) == 6 + 1  # four of a, two of b, one of c
    first, second = paired("random", 3, rewards, condition, generator)
    assert len(first) == 3 * (2 + 1)
    assert all(condition.prompts[a] == condition.prompts[b] for a, b in zip(first, second, strict=True))
    assert bool((first != second).all())
    assert sorted([*first.tolist(), *second.tolist()]) == sorted([0, 1, 2, 3, 4, 5] * 3)
    first, second = paired("best_worst", 1, torch.zeros(2), Condition(["", ""]), generator)
    assert first.item() != second.item()
    with pytest.raises(ValueError, match="no prompt has two samples in a batch of 2; raise batch_size"):
        paired("random", 1, rewards[:2], Condition(["a", "b"]), generator)


@pytest.mark.parametrize("weighting", ["kl", "epsilon"])
def test_dpo_loss_by_hand(weighting: str) -> None:
    setup = setup_of()
    rule, rows = prepared(setup, DPO, 8, weighting=weighting, draws=3, consistency=0.2)
    schedule = setup.sde.schedule
    with torch.no_grad():
        loss = float(rule.loss(rows)[0])
    t = setup.ts[:-1]
    # Euler-Maruyama at noise_level 1: gain / g = g; in the noise's units g / sigma
    weight = setup.sde.diffusion(t) ** 2 / schedule.sigma(t) ** 2 * t.diff(append=setup.ts[-1:])
    if weighting == "epsilon":
        weight = weight.mean().expand_as(weight)
    total = 0.0
    for p in range(len(rows)):
        delta, own = [], 0.0
        for side in (0, 1):
            difference = 0.0
            for k in range(3):
                t0, x = rows.t0[p, k].reshape(1), rows.x[p, side, k].unsqueeze(0)
                step = int((t - t0).abs().argmin())
                with torch.no_grad():
                    scores = setup.model.score(t0, x, Condition([""])), setup.model.base.score(t0, x, Condition([""]))
                errors = [float((schedule.sigma(t0) * (s[0] - rows.target[p, side, k])).square().sum()) for s in scores]
                difference += STEPS / 3 * 0.5 * float(weight[step]) * (errors[1] - errors[0])
                own += STEPS / 3 * 0.5 * float(weight[step]) * errors[0] / 2
            delta.append(difference)
        logit = BETA * (delta[0] - delta[1])
        label = float(rows.preference[p])
        total += label * math.log(1 + math.exp(-logit)) + (1 - label) * math.log(1 + math.exp(logit)) + 0.2 * BETA * own
    assert loss == pytest.approx(total / len(rows), rel=1e-3)
    assert float(rows.preference.std()) > 0.1


def test_dpo_starts_at_ln_2_and_goes_towards_the_chosen() -> None:
    setup = setup_of(moved=0.0)
    rule, rows = prepared(setup, DPO, 32, labels="hard", consistency=0.0)
    loss, metrics = rule.loss(rows)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["policy/preference_logit"] < 1e-4
    step = setup.gradient(loss)
    with torch.no_grad():
        start = 0
        for p in setup.policy.trainable():
            p -= 1e-3 * step[start : start + p.numel()].view_as(p)
            start += p.numel()
        after, _ = rule.loss(rows)
        errors = rule._errors(rows, setup.policy.score) - rule._errors(rows, setup.policy.reference_score)
    assert after.item() < loss.item()
    gap = errors[:, 1] - errors[:, 0]  # Delta(first) - Delta(second)
    assert float((gap * (2 * rows.preference - 1)).mean()) > 0, "the policy denoises the better sample better"


def test_labels_are_bradley_and_terrys(generator: torch.Generator) -> None:
    setup = setup_of()
    path, count = setup.paths_for(setup.rule(DPO), [""] * 4000, generator), 4000
    rewards = torch.tensor([0.0, 1.2]).repeat(count // 2)
    found: dict[str, Tensor] = {}
    for labels in ("expected", "sampled", "hard"):  # one seed: the same pairs
        rule = setup.rule(DPO, labels=labels, draws=1)
        found[labels] = rule.prepare(Paths(path, rewards), torch.Generator().manual_seed(0), 1.0).preference
    p = 1 / (1 + math.exp(-1.2))
    assert sorted({round(v, 5) for v in found["expected"].tolist()}) == pytest.approx([1 - p, 0.5, p], abs=1e-5)
    clear = found["expected"] != 0.5
    assert torch.equal(found["hard"][clear], (found["expected"][clear] > 0.5).float())
    assert set(found["hard"][~clear].tolist()) == {0.5}
    assert set(found["sampled"].tolist()) == {0.0, 1.0}
    for expected in (1 - p, 0.5, p):
        wins = found["sampled"][(found["expected"] - expected).abs() < 1e-4]
        assert abs(float(wins.mean()) - expected) < 4 * 0.5 / math.sqrt(len(wins))


def test_at_the_tilted_law_dpos_logit_is_the_rewards_difference(generator: torch.Generator) -> None:
    """Pair by pair, whatever law the pairs come from: so Bradley-Terry labels have the tilted law as fixed point."""
    line = Line()
    line.ts = uniform(line.base.schedule, 300)  # a fine grid: the ELBO's gap closes
    alpha, sigma = line.base.schedule.alpha(line.ts), line.base.schedule.sigma(line.ts)
    residual = Linear(line.ts)
    residual.offset.data = alpha * line.variance * line.slope / BETA / (alpha**2 * line.variance + sigma**2)
    line.model.residual = residual  # type: ignore[assignment]
    rule = DPO(line.policy, line.sde, euler_maruyama, None, BETA)
    paths = line.samples(line.base, 60, generator)
    samples, logits = paths.trajectory.xs[-1].reshape(30, 2, 1), []
    for _ in range(20):  # the same pairs, other noise
        with torch.no_grad():
            rows = rule._rows(samples, torch.ones(30), Condition([""] * 30), line.ts, generator)
            errors = rule._errors(rows, line.policy.score)
        logits.append(BETA * (rows.difference - errors[:, 0] + errors[:, 1]))
    stacked = torch.stack(logits)
    wanted = paths.rewards[0::2] - paths.rewards[1::2]
    error = stacked.std(0) / math.sqrt(20)
    assert float(wanted.std()) > 0.5
    assert float(((stacked.mean(0) - wanted).abs() / (error + 0.02)).max()) < 4.5
    slope = float((stacked.mean(0) * wanted).sum() / wanted.square().sum())
    assert slope == pytest.approx(1.0, abs=0.03)


# --- files of pairs ---------------------------------------------------------------------------------------------------


def test_pairs_survive_the_file(tmp_path: Path, generator: torch.Generator) -> None:
    chosen, rejected = torch.randn(5, 2, 3, generator=generator), torch.randn(5, 2, 3, generator=generator)
    write_pairs(tmp_path / "a.safetensors", chosen, rejected, list("abcde"))
    again = read_pairs(tmp_path / "a.safetensors")
    assert torch.equal(again[0], chosen)
    assert torch.equal(again[1], rejected)
    assert again[2] == list("abcde")
    save_file({"chosen": chosen, "rejected": rejected}, tmp_path / "b.safetensors")
    assert read_pairs(tmp_path / "b.safetensors")[2] == [""] * 5
    (tmp_path / "b.json").write_text(json.dumps({"prompts": list("vwxyz")}))
    assert read_pairs(tmp_path / "b.safetensors")[2] == list("vwxyz")


def test_a_bad_file_of_pairs_is_told_in_a_sentence(tmp_path: Path) -> None:
    path, x = tmp_path / "p.safetensors", torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"pairs_file .*p\.safetensors does not exist; write one with"):
        read_pairs(path)
    path.write_text("no")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        read_pairs(path)
    for tensors, message in (
        ({"chosen": x}, r"has no tensor `rejected`, only \['chosen'\]"),
        ({"chosen": x, "rejected": x[:2]}, r"chosen is \(3, 2\), rejected \(2, 2\); expected one shape"),
        ({"chosen": x[:0], "rejected": x[:0]}, "with at least one pair"),
        ({"chosen": x, "rejected": x / 0}, "contains NaN or inf"),
    ):
        save_file({name: x.clone() for name, x in tensors.items()}, path)
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    write_pairs(path, x, x, ["a", "b"])
    with pytest.raises(ValueError, match="has 2 prompts for 3 pairs; give one a pair"):
        read_pairs(path)
    save_file({"chosen": x, "rejected": x.clone()}, path, {"prompts": "[1, 2, 3]"})
    with pytest.raises(ValueError, match=r"its `prompts` cannot be read .*; expected a JSON list of strings"):
        read_pairs(path)
    save_file({"chosen": x, "rejected": x.clone()}, path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match=r"p\.json: its `prompts` cannot be read"):
        read_pairs(path)
    write_pairs(path, torch.ones(3, 4), torch.ones(3, 4), [""] * 3)
    with pytest.raises(ValueError, match=r"holds samples of shape \(4,\); the model's are \(2,\)\. Store the states"):
        setup_of().rule(DPO, pairs_file=str(path))


# --- runs -------------------------------------------------------------------------------------------------------------


SMALL: dict[str, Any] = {
    "iterations": 6, "batch_size": 32, "steps": 4, "solver": "euler_maruyama", "kl_weight": 0.5,
    "reference_batches": 2, "heldout_samples": 32, "minibatch_size": 64, "evaluate_every": 2, "checkpoint_every": 2,
    "device": "cpu",
}  # fmt: skip


def train(out: Path | None = None, seed: int = 0, **settings: Any) -> Result:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResidualModel(mixture(2, 3, 0), 2, width=16)
    run = {k: settings.pop(k) for k in ("resume", "on_event") if k in settings}
    config = updated(Config(), {**SMALL, **settings})
    return finetune(model, linear_reward(2, 0), [""], config=config, out=out, **run)


def weights(result: Result) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.policy.model.parameters()])  # type: ignore[attr-defined]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Pairs of the reference's samples, Bradley-Terry's choice with the linear reward."""
    return write_choices(tmp_path / "pairs.safetensors", mixture(2, 3, 0), linear_reward(2, 0), 200)


def write_choices(path: Path, law: GaussianMixture, reward: Any, count: int) -> str:
    generator = torch.Generator().manual_seed(4)
    a, b = law.sample(count, generator), law.sample(count, generator)
    gap = reward(a, Condition([""] * count)) - reward(b, Condition([""] * count))
    first = (torch.rand(count, generator=generator) < gap.sigmoid()).unsqueeze(1)
    write_pairs(path, torch.where(first, a, b), torch.where(first, b, a), [""] * count)
    return str(path)


RUNS: list[dict[str, Any]] = [
    {"algorithm": "rwr", "replay": 3},
    {"algorithm": "rwr", "replay": 3, "baseline": "denoised", "draws": 2},
    {"algorithm": "rwr", "samples": "policy", "sampling": "ode"},
    {"algorithm": "diffusion_nft", "old_rise": 0.2, "learning_rate": 0.01},
    {"algorithm": "dpo", "labels": "sampled", "draws": 2},
    {"algorithm": "dpo", "pairs_file": "here", "grid": "random"},
]


@pytest.mark.parametrize("run", RUNS)
def test_kill_and_resume_equals_uninterrupted(tmp_path: Path, run: dict[str, Any], pairs: str) -> None:
    run = {k: pairs if v == "here" else v for k, v in run.items()}
    whole = train(tmp_path / "whole", **run)
    assert torch.equal(weights(whole), weights(train(**run))), "the same seed gives the same weights"
    child = os.fork()
    if child == 0:

        def die(kind: str, metrics: Metrics) -> None:
            if kind == "iteration" and metrics["iteration"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        train(tmp_path / "cut", on_event=die, **run)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    resumed = train(tmp_path / "cut", seed=7, resume=True, **run)  # other initial weights: all are loaded
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.final == resumed.final
    skip = ("seconds",)
    said = [
        line for line in resumed.history if line.get("guard") != "note"
    ]  # that the pretrained weights are the run's
    for one, other in zip(whole.history, said, strict=True):
        assert {k: v for k, v in one.items() if k not in skip} == {k: v for k, v in other.items() if k not in skip}


@pytest.mark.parametrize(
    ("run", "network", "rewards"),
    [
        ({"algorithm": "rwr"}, 4 + 4, 1),  # the reference draws; the policy denoises at every step
        ({"algorithm": "rwr", "draws": 1}, 4 + 1, 1),
        ({"algorithm": "rwr", "draws": 3, "baseline": "denoised"}, 4 + 3 + 3, 1 + 3),  # the reference denoises them too
        ({"algorithm": "diffusion_nft"}, 4 + 4 + 4 + 4, 1),  # rollout; old policy, reference, policy
        ({"algorithm": "diffusion_nft", "kl_share": 0.0}, 4 + 4 + 4, 1),
        ({"algorithm": "ram"}, 4 + 4 + 4, 1),  # rollout; reference, policy
        ({"algorithm": "dpo", "rounds": 1}, 4 + 4 + 4, 1),  # rollout; reference and policy at both of 16 pairs
        ({"algorithm": "dpo", "pairs_file": "here"}, 8 + 8, 0),  # no rollout, no reward; 32 pairs
    ],
)
def test_calls_are_counted(run: dict[str, Any], network: int, rewards: int, pairs: str) -> None:
    run = {k: pairs if v == "here" else v for k, v in run.items()}
    last = [line for line in train(**run).history if "cost/network_calls" in line][-1]
    assert last["cost/network_calls"] == 6 * 32 * network
    assert last["cost/reward_calls"] == 6 * 32 * rewards
    assert "policy/kl" not in last, "nobody has measured it"


@pytest.fixture
def share(train_on_mixture: Callable[..., Result]) -> Callable[..., tuple[float, float]]:
    """(settings) -> the recovered share of J* - J_ref, and the path KL."""

    def run(**settings: Any) -> tuple[float, float]:
        size = {} if settings["algorithm"] == "dpo" else {"minibatch_size": 512}
        final = train_on_mixture(learning_rate=5e-3, **size, **settings).final
        return final["objective/recovered"], final["policy/kl"]

    return run


@pytest.mark.parametrize(("algorithm", "floor"), [("rwr", 0.3), ("diffusion_nft", 0.2), ("ram", 0.2), ("dpo", 0.2)])
def test_every_rule_is_on_its_way_in_eight_iterations(
    algorithm: str, floor: float, share: Callable[..., tuple[float, float]]
) -> None:
    assert share(algorithm=algorithm, iterations=8)[0] > floor


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "floor"), [("rwr", 0.6), ("diffusion_nft", 0.5), ("ram", 0.5), ("dpo", 0.4)])
def test_every_rule_recovers_its_share(algorithm: str, floor: float, share: Callable[..., tuple[float, float]]) -> None:
    assert share(algorithm=algorithm, iterations=40)[0] > floor


@pytest.mark.slow
def test_preferences_from_a_file_recover_their_share_without_a_reward_call(
    tmp_path: Path, share: Callable[..., tuple[float, float]]
) -> None:
    """Bradley-Terry choices between samples of the reference, by the recipe's reward, which training never sees."""
    file = write_choices(tmp_path / "pairs.safetensors", mixture(2, 4, 0), quadratic_reward(2, 0), 10_000)
    recovered, kl = share(algorithm="dpo", pairs_file=file, iterations=40, consistency=0.1)
    assert recovered > 0.4
    assert kl < 1.0
    assert share(algorithm="dpo", pairs_file=file, iterations=40, consistency=0.0)[1] > 1.5, "the docstring's warning"
