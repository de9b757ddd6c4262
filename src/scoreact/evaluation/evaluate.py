"""How good a policy is: held-out reward, path KL, J and its optimum, diversity, transfer to other steps and solvers.

Knows policies and rewards; does not know how the policy was trained. Every draw is seeded, so two policies are compared
on the same noise. The optimum J* = beta log E_ref exp(R / beta) needs samples of the reference only (design, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..control.policy import Policy
from ..control.rollout import rollout
from ..control.trajectory import Trajectory
from ..dynamics.grids import grid_times
from ..dynamics.samplers import sampler_by_name
from ..dynamics.sde import SDE, Noise
from ..dynamics.solvers import Solver
from ..rewards.base import Reward
from ..rewards.bradley_terry import BradleyTerryReward
from ..rewards.check import Checked, checked, unchanged
from ..rewards.class_probability import ClassProbability
from ..rewards.learned import LearnedReward
from ..rewards.remote.overlap import Scores
from ..sampling.draw import balanced, draw
from ..support.seeds import derived
from ..types import Condition, Metrics, groups
from .metrics import mean_pairwise_distance
from .optimum import mean_and_error

Judge = Callable[[Tensor, Condition], Metrics]
Features = Callable[[Tensor], Tensor]
# (some paths of B samples, the decoded samples [B, ...], their rewards [B]) -> metrics
Watch = Callable[[Trajectory, Tensor, Tensor], Metrics]

SAMPLES_AT_ONCE = 256  # samples at a time


@torch.no_grad()
def evaluate(
    policy: Policy,
    sde: SDE,
    solver: Solver,
    ts: Tensor,
    reward: Reward,
    prompts: Sequence[str],
    kl_weight: float,
    samples: int,
    seed: int,
    judge: Judge | None = None,
    features: Features | None = None,
    device: torch.device | None = None,
    watch: Watch | None = None,
) -> Metrics:
    """Metrics of `samples` fresh paths: held-out reward, path KL and J with standard errors, diversity, the judge's.

    watch: told the first `SAMPLES_AT_ONCE` paths and what became of them; its metrics are added.
    """
    generator = torch.Generator(device=device or torch.device("cpu")).manual_seed(seed)
    # two of a prompt, where there are more prompts than samples: diversity is within a prompt
    names = balanced(prompts, samples, generator, each=2 if len(prompts) >= samples else 1)
    decoded, kls, first = [], [], None
    asked = reward if isinstance(reward, Checked) else checked(reward)
    scores = Scores(asked)
    for start in range(0, samples, SAMPLES_AT_ONCE):
        condition = policy.model.condition(names[start : start + SAMPLES_AT_ONCE])
        trajectory = rollout(policy, sde, solver, ts, condition, generator)
        decoded.append(policy.model.decode(trajectory.xs[-1]))
        scores.add(decoded[-1], condition)
        kls.append(trajectory.path_kl().cpu())
        first = first or trajectory
    everything, condition = torch.cat(decoded), policy.model.condition(names)
    r, kl = scores.result().cpu(), torch.cat(kls)
    metrics: Metrics = {}
    for name, values in (("reward/heldout", r), ("policy/kl", kl), ("objective/J", r - kl_weight * kl)):
        metrics[name], metrics[f"{name}_se"] = mean_and_error(values)
    if isinstance(asked.reward, LearnedReward) and asked.reward.real is not None:
        metrics["reward/auc"] = asked.reward.auc(r)
    if isinstance(asked.reward, ClassProbability):
        metrics["reward/share"] = float(r.exp().mean())
    if isinstance(asked.reward, BradleyTerryReward):
        sigma = asked.reward.uncertainty(everything, condition).cpu()
        metrics["reward/sigma"] = float(sigma.mean())
        metrics["reward/cautious"] = float((r - max(0.0, 1 - asked.reward.caution) * sigma).mean())
    metrics["sample/diversity"] = diversity(everything, condition, features)
    if judge is not None:
        metrics |= judge(everything, condition)
    if watch is not None and first is not None:
        size = len(first.condition)
        metrics |= watch(first, everything[:size], r[:size].to(everything.device))
    return metrics


@torch.no_grad()
def rewards_of(
    policy: Policy,
    sde: SDE,
    solver: Solver,
    ts: Tensor,
    reward: Checked,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Condition]:
    """Rewards [B] of fresh paths and their condition; two policies get the same prompts and noise."""
    generator = torch.Generator(device=device or torch.device("cpu")).manual_seed(seed)
    names, scores = balanced(prompts, samples, generator), Scores(reward)
    for start in range(0, samples, SAMPLES_AT_ONCE):
        condition = policy.model.condition(names[start : start + SAMPLES_AT_ONCE])
        trajectory = rollout(policy, sde, solver, ts, condition, generator, with_reference=False)
        scores.add(policy.model.decode(trajectory.xs[-1]), condition)
    return scores.result().cpu(), Condition(names)


def diversity(decoded: Tensor, condition: Condition, features: Features | None = None) -> float:
    """Mean distance of two samples of the same prompt, averaged over prompts with at least two samples."""
    points = decoded.flatten(1)
    if features is not None:
        with unchanged("features", decoded):
            points = features(decoded)
    distances = [
        float(mean_pairwise_distance(points[rows.to(points.device)]))
        for rows in groups(condition).values()
        if len(rows) > 1
    ]
    return sum(distances) / len(distances) if distances else math.nan


TRANSFER = (("ddim", 5), ("ddim", 10), ("ddim", 20), ("ddim", 50), ("ode", 10), ("ode", 50), ("dpm_solver_pp_2m", 10))


def transfer_table(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[str],
    samples: int = 200,
    seed: int = 1,
    grid: str = "uniform",
    rows: Sequence[tuple[str, int]] = TRANSFER,
    device: torch.device | None = None,
    noise: Noise | None = None,
) -> list[dict[str, float | str]]:
    """Reward of the tuned and of the reference model for other solvers and step counts, same noise for both.

    Rows: solver, steps, reward, reward_se, reference_reward, reference_reward_se, gain, gain_se; the gain's error is
    that of the paired differences, which the shared noise makes smaller.
    """
    names = balanced(prompts, samples, torch.Generator().manual_seed(seed))
    table: list[dict[str, float | str]] = []
    for solver, steps in rows:
        tuned, before = paired_rewards(policy, reward, names, solver, steps, seed, grid, device, noise)
        table.append({"solver": solver, "steps": steps, **gain_of(tuned, before)})
    return table


def paired_rewards(
    policy: Policy,
    reward: Reward,
    names: Sequence[str],
    solver: str,
    steps: int,
    seed: int,
    grid: str = "uniform",
    device: torch.device | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewards [B] of the tuned and of the reference model, of a sample a name, from the same noise."""
    ts = grid_times(grid, policy.model.schedule, steps)
    found = []
    for model in (policy, policy.reference):
        rewards = []
        for number, start in enumerate(range(0, len(names), SAMPLES_AT_ONCE)):
            part = names[start : start + SAMPLES_AT_ONCE]
            _, decoded = draw(model, part, sampler_by_name(solver), ts, derived(seed, number), device, noise)
            rewards.append(reward(decoded, model.condition(part)).cpu())
        found.append(torch.cat(rewards))
    return found[0], found[1]


def gain_of(tuned: Tensor, before: Tensor) -> dict[str, float]:
    """Means and their standard errors of paired rewards [B], and of their difference."""
    row: dict[str, float] = {}
    for name, values in (("reward", tuned), ("reference_reward", before), ("gain", tuned - before)):
        row[name], row[f"{name}_se"] = mean_and_error(values)
    return row


def share_of(gains: Tensor, own: Tensor) -> dict[str, float]:
    """mean(gains) / mean(own) of paired gains [B] and its standard error, by linearisation.

    NaN where the own gain is within 1.96 standard errors of zero: a share of nothing.
    """
    whole, error = mean_and_error(own)
    if not abs(whole) > 1.96 * error:
        return {"share": math.nan, "share_se": math.nan}
    share = float(gains.mean()) / whole
    return {"share": share, "share_se": mean_and_error(gains - share * own)[1] / abs(whole)}
