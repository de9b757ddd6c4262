"""The best that can be had: J*, its path KL, and the share of J* - J_ref recovered, from the reference's samples alone.

Both are means over prompts. Where prompts have `ENOUGH` samples each, every prompt's own samples give its J*. Where they are
too many for that, the estimates are pooled: rewards are taken to vary around each prompt's mean by one law, the same for all
prompts, which the residuals of all of them show:

    R = m_c + e,   J* = J_ref + beta log E exp(e / beta),   KL* = E[w log w],  w = exp(e / beta) / E exp(e / beta)

A residual from the mean of n samples has (n - 1) / n of the law's variance; it is lengthened by the root of the inverse, and
weighs (n - 1) / n. Exact for normal rewards of one variance. Where the laws differ, J* comes out too large, to second order by
half the variance over prompts of beta log E exp(e / beta), over beta.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Condition, Metrics, groups

ENOUGH = 20  # samples a prompt, on average, from which on a prompt's own are taken


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of [B]."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def is_pooled(condition: Condition) -> bool:
    """Whether the prompts have too few samples to be looked at one by one."""
    prompts = len(set(condition.prompts))
    return prompts > 1 and len(condition) < ENOUGH * prompts


def estimate_optimum(rewards: Tensor, condition: Condition, kl_weight: float) -> Metrics:
    """J_ref and J* from rewards [B] of the reference's samples, J* per prompt and then averaged, with 95 % intervals.

    J* is corrected for the bias of a log of a mean to first order. `objective/effective_samples` is the least over prompts
    of (sum w)^2 / sum w^2 with w = exp(R / beta); below 20 the estimate is not to be trusted: a few samples carry it. With
    `objective/pooled` 1 it is that of the pooled residuals, times the share of them that is free.
    """
    rewards = rewards.cpu().double()
    j_ref, j_ref_se = mean_and_error(rewards)
    pooled = is_pooled(condition)
    if pooled:
        gain, gain_error, mean_error, effective = _pooled_gain(rewards, condition, kl_weight)
        optimum, error = j_ref + gain, 1.96 * math.hypot(gain_error, mean_error)
        clear = 1.96 * gain_error < 0.5 * max(gain, 1e-12)
    else:
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
        clear = error < 0.5 * max(optimum - j_ref, 1e-12)
    return {
        "objective/J_ref": j_ref,
        "objective/J_ref_se": j_ref_se,
        "objective/J_star": optimum,
        "objective/J_star_low": optimum - error,
        "objective/J_star_high": optimum + error,
        "objective/effective_samples": effective,
        "objective/trusted": float(effective >= ENOUGH and clear),
        "objective/pooled": float(pooled),
    }


def recovered(gain: float, reference: Metrics) -> float:
    """gain / (J* - J_ref) with gain = J - J_ref on the same noise; the exact J* is used where the problem has one."""
    optimum = reference.get("objective/J_star_exact", reference["objective/J_star"])
    gap = optimum - reference["objective/J_ref"]
    return gain / gap if gap > 0 else math.nan


def optimal_kl(rewards: Tensor, condition: Condition, kl_weight: float) -> Metrics:
    """Path KL of the optimum, KL* = (E* R - J*) / beta, from rewards [B] of the reference's samples, with its error.

    The optimum is the path law P* = P_ref exp(R / beta) / Z, so beta KL(P* | P_ref) = E* R - beta log Z and J* = beta log
    Z; also KL* = -dJ* / dbeta. Per prompt by the weights exp(R / beta), then averaged, or pooled; the error is the delta
    method's. At most log of the number of samples: trust it where J* is trusted.
    """
    rewards = rewards.cpu().double()
    if is_pooled(condition):
        return _pooled_kl(rewards, condition, kl_weight)
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


# --- pooled ----------------------------------------------------------------------------------------------------------


class Residuals(NamedTuple):
    """Of the prompts with two samples or more, n of them: what varies within a prompt."""

    values: Tensor  # [n] with the law's own variance
    weights: Tensor  # [n] summing to one
    prompts: Tensor  # [n] to which of the prompts each belongs, counted from 0
    free: int  # degrees of freedom


def residuals(rewards: Tensor, condition: Condition) -> Residuals:
    """The rewards [B] less the mean of their prompt's, lengthened."""
    values, weights, prompts, free = [rewards[:0]], [rewards[:0]], [], 0
    for rows in groups(condition).values():
        n = len(rows)
        if n > 1:
            own = rewards[rows]
            values.append((own - own.mean()) * math.sqrt(n / (n - 1)))
            weights.append(torch.full_like(own, (n - 1) / n))
            prompts.append(n)
            free += n - 1
    index = torch.arange(len(prompts)).repeat_interleave(torch.tensor(prompts, dtype=torch.long))
    weight = torch.cat(weights)
    return Residuals(torch.cat(values), weight / weight.sum().clamp(min=1e-300), index, free)


def _pooled_gain(rewards: Tensor, condition: Condition, kl_weight: float) -> tuple[float, float, float, float]:
    """beta log E exp(e / beta), its standard error, that of J_ref given the prompts, and the effective samples."""
    found = residuals(rewards, condition)
    if not found.free:  # no prompt was drawn twice
        return math.nan, math.nan, math.nan, 0.0
    scaled = found.values / kl_weight
    share = found.weights * (scaled - scaled.max()).exp()
    mean = share.sum()
    influence = _by_prompt(share / mean - found.weights, found)  # a prompt's residuals hang together
    relative = float(influence.square().sum())
    gain = kl_weight * (float(scaled.max()) + math.log(float(mean)) + 0.5 * relative)
    within = float((found.weights * found.values.square()).sum())
    effective = float(mean**2 / share.square().sum()) * found.free / len(found.values)
    return gain, kl_weight * math.sqrt(relative), math.sqrt(within / len(rewards)), effective


def _pooled_kl(rewards: Tensor, condition: Condition, kl_weight: float) -> Metrics:
    found = residuals(rewards, condition)
    if not found.free:
        return {"objective/KL_star": math.nan, "objective/KL_star_se": math.nan}
    scaled = found.values / kl_weight
    w = (scaled - scaled.max()).exp()
    w = w / (found.weights * w).sum()
    log_w = w.clamp(min=1e-300).log()
    kl = (found.weights * w * log_w).sum()
    influence = _by_prompt(found.weights * (w * (log_w - kl) - (w - 1)), found)
    return {"objective/KL_star": float(kl), "objective/KL_star_se": float(influence.square().sum().sqrt())}


def _by_prompt(values: Tensor, found: Residuals) -> Tensor:
    """Sums over each prompt's rows."""
    return torch.zeros(int(found.prompts.max()) + 1, dtype=values.dtype).index_add_(0, found.prompts, values)
