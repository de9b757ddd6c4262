"""The arena's results: statistics over seeds, tables, plots. Knows lines of results.jsonl; does not know how a run goes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Line, finite, resume_lines, write_json
from .metrics import confidence_interval
from .types import Condition, groups

FRACTIONS = (0.5, 0.8)  # of J* - J_ref, to be reached


# --- statistics over seeds -------------------------------------------------------------------------------------------


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
    return [_number(p[x]) for p in line["curve"]], [_number(p[y]) for p in line["curve"]]


MEANS = ("recovered", "J", "reward", "kl", "diversity", "network_calls", "reward_calls", "seconds", "iterations")


def summary(lines: Iterable[Line]) -> list[Line]:
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
                entry[name] = confidence_interval([_number(x[name]) for x in lines])
            areas = [area(*curve_of(x, "network_calls"), x["budget"]["network_calls"]) for x in lines]
            entry["area"] = confidence_interval(areas)
            entry["spread"] = statistics.stdev(_number(x["recovered"]) for x in lines) if len(lines) > 1 else math.nan
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
    entries.sort(key=lambda e: -_number(e["recovered"][0]) if e["runs"] else math.inf)
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
    ours, theirs = ([_number(x["recovered"]) for x in lines[rule]] for rule in (a, b))
    low, high = probability_interval(ours, theirs)
    level = statistics.mean(theirs)
    found: Line = {"a": a, "b": b, "better": probability_better(ours, theirs), "low": low, "high": high}
    for calls in ("network_calls", "reward_calls"):
        needed = statistics.median(calls_to(*curve_of(x, calls), level) for x in lines[a])
        used = statistics.median(calls_to(*curve_of(x, calls), min(level, _number(x["recovered"]))) for x in lines[b])
        found[calls] = {"to_the_others_end": needed, "times_fewer": used / needed if needed > 0 else math.nan}
    return found


def _number(value: float | None) -> float:
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


# --- what is written -------------------------------------------------------------------------------------------------


def report(folder: Path) -> str:
    """table.md, summary.json and plots/ from results.jsonl; returns the table."""
    if not (folder / "results.jsonl").is_file():
        raise ValueError(f"{folder} holds no results.jsonl; run `scoreact bench --out {folder}` first.")
    lines = resume_lines(folder / "results.jsonl")
    found = summary(lines)
    text = table(found)
    write_json(folder / "summary.json", finite(found))
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    plots(folder, lines, found)
    return text


def table(found: Sequence[Line]) -> str:
    """Markdown: a section a problem and price of KL."""
    return "\n\n".join(_section(place) for place in found)


def _section(place: Line) -> str:
    yardstick, budget = place["yardstick"], place["budget"]
    head = f"### {place['problem']}, kl_weight {place['kl_weight']:g}\n\n"
    if not yardstick:
        return head + "No run finished.\n\n" + "\n".join(f"- {e['rule']}: {e['failed'][0]}" for e in place["rules"])
    estimate, j_ref = yardstick["objective/J_star"], yardstick["objective/J_ref"]
    exact = yardstick.get("objective/J_star_exact")
    if exact is None:
        known = f"J* {estimate:.4g}, estimated from {yardstick['objective/effective_samples']:.0f} effective samples"
    else:
        limit = (estimate - j_ref) / (exact - j_ref)
        known = f"J* {exact:.4g} in closed form, of which no policy on this grid recovers more than {_percent(limit)}"
    head += (
        f"J_ref {j_ref:.4g}; {known}. Budget of a run: {_short(budget['network_calls'])} network calls and "
        f"{_short(budget['reward_calls'])} reward calls.\n\n"
    )
    fractions = [f"calls to {100 * f:.0f} %" for f in FRACTIONS]
    titles = ["recovered", "rule", "J", "reward", "path KL", "area", *fractions, "diversity", "spread",
              "network calls", "reward calls", "seconds", "seeds", "settings"]  # fmt: skip
    rows = [_row(titles), _row(["---"] * len(titles))]
    notes: list[str] = []
    for entry in place["rules"]:
        notes += [f"- {entry['rule']}: {len(entry[what])} {what}, the first: {entry[what][0]}"
                  for what in ("failed", "stopped") if entry[what]]  # fmt: skip
        if not entry["runs"]:
            continue
        reached = [_reached(entry["calls_to"][f"{f:g}"], entry["runs"]) for f in FRACTIONS]
        rows.append(_row([
            _share(*entry["recovered"]), entry["rule"], _mean(*entry["J"]), _mean(*entry["reward"]), _mean(*entry["kl"]),
            _share(*entry["area"]), *reached, _mean(*entry["diversity"]), _percent(entry["spread"]),
            _short(entry["network_calls"][0]), _short(entry["reward_calls"][0]), f"{entry['seconds'][0]:.0f}",
            str(entry["runs"]), "tuned" if entry["tuned"] else "default",
        ]))  # fmt: skip
    start = yardstick["start"]
    rows.append(_row([
        "0 %", "(pretrained)", *(f"{start[key]:.3g}" for key in ("objective/J", "reward/heldout", "policy/kl")),
        "", "", "", f"{start['sample/diversity']:.3g}", *[""] * (len(titles) - 9),
    ]))  # fmt: skip
    parts = [head + "\n".join(rows)]
    names = next((list(e["transfer"]) for e in place["rules"] if e["runs"] and e["transfer"]), [])
    if names:
        lines = [_row(["reward by", *names]), _row(["---"] * (1 + len(names)))]
        lines += [_row([e["rule"], *(_mean(*e["transfer"][n]) for n in names)])
                  for e in place["rules"] if e["runs"] and e["transfer"]]  # fmt: skip
        lines.append(_row(["(pretrained)", *(f"{yardstick['transfer'][n]:.3g}" for n in names)]))
        parts.append("Other solvers and steps than training's:\n\n" + "\n".join(lines))
    if place["pairs"]:
        lines = [_row(["A", "B", "P(A > B)", "network calls of A to B's end", "times fewer than B", "reward calls",
                       "times fewer"]), _row(["---"] * 7)]  # fmt: skip
        lines += [
            _row([p["a"], p["b"], _interval(p), *_fewer(p["network_calls"]), *_fewer(p["reward_calls"])])
            for p in place["pairs"]
        ]
        parts.append("Pairs:\n\n" + "\n".join(lines))
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _interval(pair: Line) -> str:
    ends = f" [{pair['low']:.2f}, {pair['high']:.2f}]" if math.isfinite(pair["low"]) else ""
    return f"{pair['better']:.2f}{ends}"


def _fewer(calls: Mapping[str, float]) -> list[str]:
    times = calls["times_fewer"]
    return [_short(calls["to_the_others_end"]), f"{times:.2g}" if times > 0 else "-"]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def _share(mean: float, half: float) -> str:
    return f"{100 * mean:.1f} ± {100 * half:.1f} %" if math.isfinite(half) else _percent(mean)


def _mean(mean: float, half: float) -> str:
    """Mean and half width to the half width's second digit."""
    if not math.isfinite(half):
        return f"{mean:.3g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 3
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _short(number: float) -> str:
    """12345678 as 12.3M."""
    if not math.isfinite(number):
        return "not reached"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _reached(needed: Mapping[str, Any], runs: int) -> str:
    text = _short(needed["median"])
    return text if needed["reached"] in (0, runs) else f"{text} ({needed['reached']} of {runs})"


def plots(folder: Path, lines: Sequence[Line], found: Sequence[Line]) -> list[Path]:
    """plots/PROBLEM.png (with the price of KL in its name where there are several) and plots/PROBLEM.frontier.png."""
    import matplotlib

    from . import figures

    (folder / "plots").mkdir(exist_ok=True)
    done = [x for x in _latest(lines) if "failed" not in x]
    written: list[Path] = []
    with matplotlib.rc_context(figures.STYLE):
        for name in dict.fromkeys(place["problem"] for place in found):
            places = [p for p in found if p["problem"] == name and p["yardstick"]]
            frontier: dict[str, list[tuple[float, float, float, float]]] = {}
            for place in places:
                price = place["kl_weight"]
                shown = [e["rule"] for e in place["rules"] if e["runs"]]
                mine = {
                    rule: [x for x in done if (x["problem"], x["kl_weight"], x["rule"]) == (name, price, rule)]
                    for rule in shown
                }
                bands = {
                    (x, y): {rule: _band(mine[rule], x, y) for rule in shown}
                    for x in figures.ARENA_COSTS
                    for y in figures.ARENA_MEASURES
                }
                title = f"{name}, kl_weight {price:g}: mean and 95% interval over seeds"
                written.append(folder / "plots" / (f"{name}.{price:g}.png" if len(places) > 1 else f"{name}.png"))
                figures.arena_curves(title, bands).savefig(written[-1])
                for entry in place["rules"]:
                    if entry["runs"]:
                        frontier.setdefault(entry["rule"], []).append((*entry["kl"], *entry["reward"]))
            measured = folder / "yardsticks" / f"{name}.json"
            if frontier:
                yardstick = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
                best = tilted_frontier(yardstick, places[0]["kl_weight"]) if yardstick else []
                written.append(folder / "plots" / f"{name}.frontier.png")
                figures.arena_frontier(f"{name}: reward and path KL", frontier, best).savefig(written[-1])
    return written


def _band(lines: Sequence[Line], x: str, y: str, count: int = 200) -> list[tuple[float, float, float]]:
    """(x, mean, half width) of runs' curves on a common grid, as far as the shortest goes."""
    curves = [curve_of(line, x, y) for line in lines]
    last = min(xs[-1] for xs, _ in curves)
    grid = [last * k / count for k in range(count + 1)]
    columns = zip(*([_at(xs, ys, place) for place in grid] for xs, ys in curves), strict=True)
    return [(place, *confidence_interval(column)) for place, column in zip(grid, columns, strict=True)]


def _at(xs: Sequence[float], ys: Sequence[float], place: float) -> float:
    """Linear interpolation; the right-hand value where x does not move."""
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if place <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    return ys[-1]
