"""The best that can be had: J*, its path KL, and the share of J* - J_ref recovered, from the reference's samples alone."""

from __future__ import annotations

import math

from torch import Tensor

from ..types import Condition, Metrics, groups


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


def optimal_kl(rewards: Tensor, condition: Condition, kl_weight: float) -> Metrics:
    """Path KL of the optimum, KL* = (E* R - J*) / beta, from rewards [B] of the reference's samples, with its error.

    The optimum is the path law P* = P_ref exp(R / beta) / Z, so beta KL(P* | P_ref) = E* R - beta log Z and J* = beta log
    Z; also KL* = -dJ* / dbeta. Per prompt by the weights exp(R / beta), then averaged; the error is the delta method's.
    At most log of the number of samples: trust it where J* is trusted.
    """
    rewards = rewards.double().cpu()
    total, variance = 0.0, 0.0
    by_prompt = groups(condition)
    for rows in by_prompt.values():
        scaled = rewards[rows] / kl_weight
        w = (scaled - scaled.max()).exp()
        w = w / w.mean()  # d P* / d P_ref
        log_w = w.clamp(min=1e-300).log()
        kl = (w * log_w).mean()
        # a sample's influence on (E* R - J*) / beta, whose parts are a ratio and a logarithm of means
        influence = w * (log_w - kl) - (w - 1)
        total += float(kl)
        variance += float(influence.square().mean() / len(w))
    count = len(by_prompt)
    return {"objective/KL_star": total / count, "objective/KL_star_se": math.sqrt(variance) / count}
