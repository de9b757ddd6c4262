"""Statistics over seeds: intervals, curves, and how often one rule is better than another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.metrics import confidence_interval
from ..support.files import Line
from ..types import Condition, groups

FRACTIONS = (0.5, 0.8)  # of J* - J_ref, to be reached


def area(calls: Sequence[float], shares: Sequence[float], budget: float) -> float:
    """Mean share over the calls of the whole budget: trapezoids between the points, the last share held to the end."""
    total = shares[-1] * (budget - calls[-1])
    for x0, x1, y0, y1 in zip(calls, calls[1:], shares, shares[1:], strict=False):
        total += (x1 - x0) * (y0 + y1) / 2
    return total / budget


def calls_to(calls: Sequence[float], shares: Sequence[float], level: float) -> float:
    """Calls at which the share first reaches the level, linear between the points; infinity where it never does."""
    for k, share in enumerate(shares):
        if share >= level:
            if k == 0:
                return calls[0]
            before = shares[k - 1]
            return calls[k - 1] + (calls[k] - calls[k - 1]) * (level - before) / (share - before)
    return math.inf


def probability_better(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> float:
    """P(A > B) + P(A = B) / 2 over all pairs of a seed of A and one of B (the Mann-Whitney statistic)."""
    difference = torch.as_tensor(a, dtype=torch.float64)[:, None] - torch.as_tensor(b, dtype=torch.float64)
    return float((difference.sign() + 1).mean() / 2)


def probability_interval(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of `probability_better`, the seeds of both drawn anew with replacement; NaN for one seed."""
    if len(a) < 2 or len(b) < 2:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.as_tensor(x, dtype=torch.float64)[torch.randint(len(x), (resamples, len(x)), generator=generator)]
        for x in (a, b)
    ]
    found = ((drawn[0][:, :, None] - drawn[1][:, None, :]).sign() + 1).mean((1, 2)) / 2
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = found.quantile(edges).tolist()
    return low, high


def curve_of(line: Line, x: str, y: str = "recovered") -> tuple[list[float], list[float]]:
    return [number_or_nan(p[x]) for p in line["curve"]], [number_or_nan(p[y]) for p in line["curve"]]


MEANS = ("recovered", "J", "reward", "kl", "diversity", "network_calls", "reward_calls", "seconds", "iterations")


def summarise(lines: Iterable[Line]) -> list[Line]:
    """One entry a (problem, kl_weight): its rules with mean and 95 % half width, best first, and all pairs of them."""
    places: dict[tuple[str, float], dict[str, list[Line]]] = {}
    for line in _latest(lines):
        places.setdefault((line["problem"], line["kl_weight"]), {}).setdefault(line["rule"], []).append(line)
    return [_place(problem, kl_weight, found) for (problem, kl_weight), found in places.items()]


def _latest(lines: Iterable[Line]) -> list[Line]:
    """The last line of each run: one repeated, or made with other settings, replaces what was there."""
    return list({(x["problem"], x["kl_weight"], x["rule"], x["seed"]): x for x in lines}.values())


def _place(problem: str, kl_weight: float, by_rule: Mapping[str, list[Line]]) -> Line:
    finished = {rule: [x for x in lines if "failed" not in x] for rule, lines in by_rule.items()}
    entries = []
    for rule, every in by_rule.items():
        lines = finished[rule]
        entry: Line = {
            "rule": rule, "runs": len(lines), "tuned": bool(lines) and all(x["tuned"] for x in lines),
            "failed": [x["failed"] for x in every if "failed" in x],
            "stopped": [x["stopped"] for x in lines if x["stopped"]],
        }  # fmt: skip
        if lines:
            for name in MEANS:
                entry[name] = confidence_interval([number_or_nan(x[name]) for x in lines])
            areas = [area(*curve_of(x, "network_calls"), x["budget"]["network_calls"]) for x in lines]
            entry["area"] = confidence_interval(areas)
            entry["spread"] = (
                statistics.stdev(number_or_nan(x["recovered"]) for x in lines) if len(lines) > 1 else math.nan
            )
            entry["calls_to"] = {}
            for fraction in FRACTIONS:
                needed = [calls_to(*curve_of(x, "network_calls"), fraction) for x in lines]
                entry["calls_to"][f"{fraction:g}"] = {
                    "median": statistics.median(needed), "reached": sum(map(math.isfinite, needed))
                }  # fmt: skip
            entry["transfer"] = {
                name: confidence_interval([x["transfer"][name] for x in lines])
                for name in max((x["transfer"] for x in lines), key=len)
                if all(name in x["transfer"] for x in lines)
            }
        entries.append(entry)
    entries.sort(key=lambda e: -number_or_nan(e["recovered"][0]) if e["runs"] else math.inf)
    pairs = [
        _pair(a["rule"], b["rule"], finished)
        for a in entries
        for b in entries
        if a is not b and a["runs"] and b["runs"]
    ]
    some = next((x for lines in finished.values() for x in lines), None)
    return {
        "problem": problem, "kl_weight": kl_weight, "rules": entries, "pairs": pairs,
        "yardstick": some["yardstick"] if some else {}, "budget": some["budget"] if some else {},
    }  # fmt: skip


def _pair(a: str, b: str, lines: Mapping[str, list[Line]]) -> Line:
    """A against B: the probability that A's share is higher, and how many fewer calls A needs to where B ends."""
    ours, theirs = ([number_or_nan(x["recovered"]) for x in lines[rule]] for rule in (a, b))
    low, high = probability_interval(ours, theirs)
    level = statistics.mean(theirs)
    found: Line = {"a": a, "b": b, "better": probability_better(ours, theirs), "low": low, "high": high}
    for calls in ("network_calls", "reward_calls"):
        needed = statistics.median(calls_to(*curve_of(x, calls), level) for x in lines[a])
        used = statistics.median(
            calls_to(*curve_of(x, calls), min(level, number_or_nan(x["recovered"]))) for x in lines[b]
        )
        found[calls] = {"to_the_others_end": needed, "times_fewer": used / needed if needed > 0 else math.nan}
    return found


def number_or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def tilted_frontier(yardstick: Mapping[str, Any], kl_weight: float) -> list[tuple[float, float]]:
    """(path KL, reward) of the best policies for prices of KL around `kl_weight`, from the reference's rewards.

    The law p_ref exp(R / beta) / Z per prompt; prices at which fewer than 20 samples carry a prompt are left out.
    """
    values = torch.tensor(yardstick["rewards"], dtype=torch.float64)
    parts = [values[rows] for rows in groups(Condition(yardstick["prompts"])).values()]
    frontier = []
    for factor in torch.logspace(2.0, -1.2, 41, base=10, dtype=torch.float64).tolist():
        weights = [torch.softmax(part / (factor * kl_weight), 0) for part in parts]
        if min(float(1 / w.square().sum()) for w in weights) < 20:
            break
        kl = [float((w * (w * len(w)).clamp(min=1e-300).log()).sum()) for w in weights]
        reward = [float((w * part).sum()) for w, part in zip(weights, parts, strict=True)]
        frontier.append((statistics.mean(kl), statistics.mean(reward)))
    return frontier
