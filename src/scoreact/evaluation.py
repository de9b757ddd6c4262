"""How good a policy is: held-out reward, path KL, J and its optimum, diversity, transfer to other steps and solvers.

Knows policies and rewards; does not know how the policy was trained. Every draw is seeded, so two policies are compared
on the same noise. The optimum J* = beta log E_ref exp(R / beta) needs samples of the reference only (design, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .metrics import mean_pairwise_distance
from .models import ScoreModel
from .policy import Policy
from .rewards import Checked, Reward, checked
from .rewards.overlap import Scores
from .rollout import rollout
from .schedule import GRIDS
from .sde import SDE, Noise, noise_level
from .solvers import Sampler, Solver, sampler_by_name
from .types import Condition, Metrics, groups

Judge = Callable[[Tensor, Condition], Metrics]
Features = Callable[[Tensor], Tensor]

CHUNK = 256  # samples at a time


def balanced(prompts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` prompts: every one equally often, the remainder drawn without replacement, in random order."""
    device = generator.device
    whole = torch.arange(len(prompts), device=device).repeat(count // len(prompts))
    rest = torch.randperm(len(prompts), generator=generator, device=device)[: count % len(prompts)]
    index = torch.cat([whole, rest])
    return [prompts[i] for i in index[torch.randperm(count, generator=generator, device=device)].tolist()]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of [B]."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def estimate_optimum(rewards: Tensor, condition: Condition, kl_weight: float) -> Metrics:
    """J_ref and J* from rewards [B] of the reference's samples, J* per prompt and then averaged, with 95 % intervals.

    J* is corrected for the bias of a log of a mean to first order. `objective/effective_samples` is the least over prompts
    of (sum w)^2 / sum w^2 with w = exp(R / beta); below 20 the estimate is not to be trusted: a few samples carry it.
    """
    rewards = rewards.double().cpu()
    optimum, variance, effective = 0.0, 0.0, math.inf
    by_prompt = groups(condition)
    for rows in by_prompt.values():
        scaled = rewards[rows] / kl_weight
        w = (scaled - scaled.max()).exp()
        relative = float(w.var() / w.mean() ** 2 / len(w)) if len(w) > 1 else math.inf
        optimum += kl_weight * (float(scaled.max()) + math.log(float(w.mean())) + 0.5 * relative)
        variance += kl_weight**2 * relative
        effective = min(effective, float(w.sum() ** 2 / w.square().sum()))
    count = len(by_prompt)
    optimum, error = optimum / count, 1.96 * math.sqrt(variance) / count
    j_ref, j_ref_se = mean_and_error(rewards)
    return {
        "objective/J_ref": j_ref,
        "objective/J_ref_se": j_ref_se,
        "objective/J_star": optimum,
        "objective/J_star_low": optimum - error,
        "objective/J_star_high": optimum + error,
        "objective/effective_samples": effective,
        "objective/trusted": float(effective >= 20 and error < 0.5 * max(optimum - j_ref, 1e-12)),
    }


def recovered(gain: float, reference: Metrics) -> float:
    """gain / (J* - J_ref) with gain = J - J_ref on the same noise; the exact J* is used where the problem has one."""
    optimum = reference.get("objective/J_star_exact", reference["objective/J_star"])
    gap = optimum - reference["objective/J_ref"]
    return gain / gap if gap > 0 else math.nan


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
) -> Metrics:
    """Metrics of `samples` fresh paths: held-out reward, path KL and J with standard errors, diversity, the judge's."""
    generator = torch.Generator(device=device or torch.device("cpu")).manual_seed(seed)
    names = balanced(prompts, samples, generator)
    decoded, kls, scores = [], [], Scores(reward if isinstance(reward, Checked) else checked(reward))
    for start in range(0, samples, CHUNK):
        condition = policy.model.condition(names[start : start + CHUNK])
        trajectory = rollout(policy, sde, solver, ts, condition, generator)
        decoded.append(policy.model.decode(trajectory.xs[-1]))
        scores.add(decoded[-1], condition)
        kls.append(trajectory.path_kl().cpu())
    everything, condition = torch.cat(decoded), policy.model.condition(names)
    r, kl = scores.result().cpu(), torch.cat(kls)
    metrics: Metrics = {}
    for name, values in (("reward/heldout", r), ("policy/kl", kl), ("objective/J", r - kl_weight * kl)):
        metrics[name], metrics[f"{name}_se"] = mean_and_error(values)
    metrics["sample/diversity"] = diversity(everything, condition, features)
    if judge is not None:
        metrics |= judge(everything, condition)
    return metrics


def diversity(decoded: Tensor, condition: Condition, features: Features | None = None) -> float:
    """Mean distance of two samples of the same prompt, averaged over prompts with at least two samples."""
    points = features(decoded) if features is not None else decoded.flatten(1)
    distances = [
        float(mean_pairwise_distance(points[rows.to(points.device)]))
        for rows in groups(condition).values()
        if len(rows) > 1
    ]
    return sum(distances) / len(distances) if distances else math.nan


@torch.no_grad()
def draw(
    model: ScoreModel,
    prompts: Sequence[str],
    sampler: Sampler,
    ts: Tensor,
    seed: int,
    device: torch.device | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """States [N + 1, B, *D] and decoded samples of one path a prompt. The same seed gives two models the same noise.

    noise: of samplers that have any; noise_level(1) by default.
    """
    generator = torch.Generator(device=device or torch.device("cpu")).manual_seed(seed)
    condition = model.condition(prompts)
    x = model.prior(condition, generator)
    sde = SDE(model.schedule, noise or noise_level(1.0))
    xs = sampler(sde, lambda t, state: model.score(t, state, condition), ts.to(x.device), x, generator)
    return xs, model.decode(xs[-1])


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
    generator = torch.Generator().manual_seed(seed)
    names = balanced(prompts, samples, generator)
    parts = [names[i : i + CHUNK] for i in range(0, samples, CHUNK)]
    table: list[dict[str, float | str]] = []
    for solver, steps in rows:
        row: dict[str, float | str] = {"solver": solver, "steps": steps}
        ts = GRIDS["uniform" if grid == "random" else grid](policy.model.schedule, steps, None)
        found = {}
        for prefix, model in (("", policy), ("reference_", policy.reference)):
            rewards = []
            for number, part in enumerate(parts):
                _, decoded = draw(model, part, sampler_by_name(solver), ts, seed + number, device, noise)
                rewards.append(reward(decoded, model.condition(part)).cpu())
            found[prefix] = torch.cat(rewards)
            row[f"{prefix}reward"], row[f"{prefix}reward_se"] = mean_and_error(found[prefix])
        row["gain"], row["gain_se"] = mean_and_error(found[""] - found["reference_"])
        table.append(row)
    return table
