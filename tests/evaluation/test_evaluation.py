"""Evaluation: J* against the closed form, shares, balanced prompts, fixed noise, other steps and solvers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from scoreact.api.start import finetune
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics.grids import uniform, uniform_log_snr
from scoreact.dynamics.samplers import ode as ode_sampler
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim, euler_maruyama
from scoreact.evaluation.evaluate import TRANSFER, diversity, evaluate, share_of, transfer_table
from scoreact.evaluation.optimum import estimate_optimum, recovered
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.gaussian import build, linear_reward, mixture, quadratic_reward
from scoreact.sampling.draw import balanced, draw
from scoreact.types import Condition, groups


def empty(count: int) -> Condition:
    return Condition([""] * count)


def tilt(reward_dim: int = 2, beta: float = 0.8) -> tuple[GaussianMixture, GaussianMixture, float]:
    """Mixture, its tilt by the quadratic reward, J*."""
    base, reward = mixture(reward_dim, 4, 0), quadratic_reward(reward_dim, 0)
    optimum, best = base.tilted(reward.linear, reward.quadratic, beta, reward.constant)
    return base, optimum, best


@pytest.mark.parametrize("dim", [2, 16])
def test_estimated_optimum_is_the_closed_form(dim: int, generator: torch.Generator) -> None:
    base, _, best = tilt(dim)
    rewards = quadratic_reward(dim, 0)(base.sample(20_000, generator), empty(20_000))
    found = estimate_optimum(rewards, empty(20_000), 0.8)
    error = (found["objective/J_star_high"] - found["objective/J_star_low"]) / (2 * 1.96)
    assert abs(found["objective/J_star"] - best) < 4 * error
    assert 0 < error < 0.05
    assert found["objective/J_ref"] == pytest.approx(float(rewards.mean()), abs=1e-5)
    assert found["objective/trusted"] == 1


def test_the_interval_of_the_optimum_covers() -> None:
    """400 repetitions of 200 samples: the 95 % interval holds the truth in 95 % of them, and the bias is small."""
    base, _, best = tilt()
    generator, reward = torch.Generator().manual_seed(3), quadratic_reward(2, 0)
    rewards = reward(base.sample(400 * 200, generator), empty(400 * 200)).reshape(400, 200)
    found = [estimate_optimum(row, empty(200), 0.8) for row in rewards]
    covered = sum(f["objective/J_star_low"] <= best <= f["objective/J_star_high"] for f in found) / 400
    assert 0.91 < covered < 0.985


def test_the_bias_of_a_log_of_a_mean_is_corrected() -> None:
    """3000 repetitions of 30 samples: what is left of the bias is less than half of the plain estimate's."""
    base, _, best = tilt()
    generator, reward = torch.Generator().manual_seed(4), quadratic_reward(2, 0)
    rewards = reward(base.sample(3000 * 30, generator), empty(3000 * 30)).reshape(3000, 30)
    plain = float((0.8 * ((rewards / 0.8).logsumexp(1) - math.log(30))).mean()) - best
    corrected = sum(estimate_optimum(row, empty(30), 0.8)["objective/J_star"] for row in rewards) / 3000 - best
    assert plain < -0.005
    assert abs(corrected) < 0.5 * abs(plain)


def test_optimum_is_per_prompt_and_then_averaged() -> None:
    condition = Condition(["a", "b"] * 500)
    rewards = torch.tensor([0.0, 10.0] * 500)
    found = estimate_optimum(rewards, condition, 1.0)
    assert found["objective/J_star"] == pytest.approx(5.0)  # pooled it would be 10 - log 2
    assert found["objective/effective_samples"] == pytest.approx(500)


def test_a_few_samples_that_carry_everything_are_not_trusted() -> None:
    rewards = torch.zeros(1000)
    rewards[0] = 100.0
    found = estimate_optimum(rewards, empty(1000), 1.0)
    assert found["objective/effective_samples"] == pytest.approx(1.0)
    assert found["objective/trusted"] == 0


def test_recovered_share() -> None:
    reference = {"objective/J_ref": 1.0, "objective/J_star": 3.0}
    assert recovered(1.0, reference) == pytest.approx(0.5)
    assert recovered(1.0, {**reference, "objective/J_star_exact": 5.0}) == pytest.approx(0.25)
    assert math.isnan(recovered(1.0, {"objective/J_ref": 1.0, "objective/J_star": 1.0}))


def test_balanced_draws() -> None:
    prompts = ["a", "b", "c"]
    generator = torch.Generator().manual_seed(0)
    counts = Counter(balanced(prompts, 3 * 40, generator))
    assert set(counts.values()) == {40}
    extra: Counter[str] = Counter()
    for _ in range(600):
        drawn = Counter(balanced(prompts, 5, generator))
        assert set(drawn.values()) <= {1, 2}
        assert len(drawn) == 3
        extra.update(p for p in prompts if drawn[p] == 2)
    assert all(abs(extra[p] - 400) < 4 * math.sqrt(600 * 2 / 9) for p in prompts)
    orders = {tuple(balanced(prompts, 3, generator)) for _ in range(100)}
    assert len(orders) == 6
    assert balanced(prompts, 50, torch.Generator().manual_seed(1)) == balanced(
        prompts, 50, torch.Generator().manual_seed(1)
    )


def test_groups_are_the_rows_of_each_prompt() -> None:
    found = groups(Condition(["a", "b", "a"]))
    assert {k: v.tolist() for k, v in found.items()} == {"a": [0, 2], "b": [1]}


def test_diversity_is_within_prompts() -> None:
    points = torch.tensor([[0.0], [100.0], [1.0], [103.0], [7.0]])
    condition = Condition(["a", "b", "a", "b", "c"])
    assert diversity(points, condition) == pytest.approx(2.0)  # (1 + 3) / 2; c has one sample only
    assert diversity(points, condition, lambda x: 2 * x) == pytest.approx(4.0)
    assert math.isnan(diversity(points[:1], Condition(["a"])))


def test_evaluation_measures_the_policy_on_fixed_noise() -> None:
    base, optimum, best = tilt()
    sde, ts, reward = SDE(base.schedule, noise_level(1.0)), uniform_log_snr(base.schedule, 60), quadratic_reward(2, 0)

    def of(policy: Policy, seed: int = 5) -> dict[str, float]:
        return evaluate(policy, sde, ddim, ts, reward, [""], 0.8, 3000, seed)

    found = of(Policy(optimum, base))
    assert found["objective/J"] == pytest.approx(found["reward/heldout"] - 0.8 * found["policy/kl"], rel=1e-4)
    assert abs(found["objective/J"] - best) < 4 * found["objective/J_se"] + 0.03  # 0.03: 60 steps, t_max 0.98
    assert found == of(Policy(optimum, base))
    assert found != of(Policy(optimum, base), 6)
    reference = of(Policy(base, base))
    assert reference["policy/kl"] == 0
    assert reference["objective/J"] < best - 0.1
    judged = evaluate(
        Policy(base, base), sde, ddim, ts, reward, [""], 0.8, 10, 5, judge=lambda x, c: {"judge/count": float(len(x))}
    )
    assert judged["judge/count"] == 10


def test_network_and_reward_see_every_sample_once() -> None:
    base, _, _ = tilt()
    seen: list[int] = []

    def counting(x: Tensor, condition: Condition) -> Tensor:
        seen.append(len(x))
        return x[:, 0]

    sde, ts = SDE(base.schedule, noise_level(1.0)), uniform(base.schedule, 3)
    found = evaluate(Policy(base, base), sde, euler_maruyama, ts, counting, [""], 1.0, 300, 0)
    assert sum(seen) == 300
    assert found["reward/heldout_se"] > 0


def test_draws_share_their_noise_between_models() -> None:
    base, _, _ = tilt()
    ts = uniform(base.schedule, 4)
    xs, decoded = draw(base, [""] * 6, ode_sampler, ts, 3)
    again, _ = draw(base, [""] * 6, ode_sampler, ts, 3)
    other, _ = draw(base, [""] * 6, ode_sampler, ts, 4)
    assert xs.shape == (5, 6, 2)
    assert torch.equal(xs, again)
    assert torch.equal(xs[-1], decoded)
    assert not torch.equal(xs[0], other[0])


def test_transfer_table_has_a_row_for_each_solver_and_both_models() -> None:
    base, optimum, _ = tilt()
    table = transfer_table(Policy(optimum, base), quadratic_reward(2, 0), [""], samples=500)
    assert [(row["solver"], row["steps"]) for row in table] == list(TRANSFER)
    for row in table:
        assert {"solver", "steps", "reward", "reward_se", "reference_reward", "reference_reward_se"} < set(row)
        assert row["gain"] == pytest.approx(row["reward"] - row["reference_reward"], abs=1e-5)
        errors = row["reward_se"], row["reference_reward_se"]
        assert 0 < row["gain_se"] < math.hypot(*errors), "the shared noise helps"
        assert float(row["reward"]) > float(row["reference_reward"]) + 3 * float(row["reward_se"])
    same = transfer_table(Policy(base, base), quadratic_reward(2, 0), [""], samples=50)
    assert all(row["reward"] == row["reference_reward"] for row in same)  # the same noise for both


@pytest.mark.slow
def test_step_invariance() -> None:
    """Trained at N = 10: at 20 steps and by the ODE it keeps 80 % of the gain that the exact optimum has there."""
    problem = build()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = finetune(
            problem.model, problem.reward, [""], value_network=problem.value_network, device="cpu", kl_weight=0.5,
            solver="euler_maruyama", gradient_at="next", heldout_samples=2, evaluate_every=10_000,
        )  # fmt: skip
    base = mixture(2, 4, 0)
    reward = quadratic_reward(2, 0)
    optimum, _ = base.tilted(reward.linear, reward.quadratic, 0.5, reward.constant)
    sde = SDE(base.schedule, noise_level(1.0))

    def objective(policy: Policy, steps: int) -> float:
        path = rollout(
            policy, sde, euler_maruyama, uniform(base.schedule, steps), empty(8000), torch.Generator().manual_seed(1)
        )
        return float((reward(path.xs[-1], path.condition) - 0.5 * path.path_kl()).mean())

    def by_ode(policy: Policy) -> float:
        _, decoded = draw(policy, [""] * 8000, ode_sampler, uniform_log_snr(base.schedule, 30), 1)
        return float(reward(decoded, empty(8000)).mean())

    exact, unmoved = Policy(optimum, base), Policy(base, base)
    for measure in (lambda p: objective(p, 10), lambda p: objective(p, 20), by_ode):
        share = (measure(result.policy) - measure(unmoved)) / (measure(exact) - measure(unmoved))
        assert share > 0.8


def test_rewards_of_the_closed_form_problems_differ_by_seed() -> None:
    x = torch.ones(1, 2)
    assert float(linear_reward(2, 0)(x, empty(1))) != float(linear_reward(2, 1)(x, empty(1)))


def test_the_share_of_a_gain_and_its_error() -> None:
    """The error against the spread over repetitions; no share of a gain that may be none."""
    generator = torch.Generator().manual_seed(0)
    shares, errors = [], []
    for _ in range(400):
        own = 1 + torch.randn(100, generator=generator)
        gains = 0.6 * own + 0.5 * torch.randn(100, generator=generator)
        found = share_of(gains, own)
        shares.append(found["share"])
        errors.append(found["share_se"])
    assert float(torch.tensor(shares).mean()) == pytest.approx(0.6, abs=4 * 0.05 / 20)
    assert float(torch.tensor(shares).std()) == pytest.approx(sum(errors) / 400, rel=0.15)
    assert math.isnan(share_of(gains, own - own.mean())["share"])
