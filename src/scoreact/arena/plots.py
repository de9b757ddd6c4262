"""The arena's plots: curves over what was spent, and the frontier of reward against path KL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..evaluation.metrics import confidence_interval
from ..report.figures import OPTIMUM, REFERENCE
from ..support.files import Line
from .statistics import _latest, curve_of, tilted_frontier


def plots(folder: Path, lines: Sequence[Line], found: Sequence[Line]) -> list[Path]:
    """plots/PROBLEM.png (with the price of KL in its name where there are several) and plots/PROBLEM.frontier.png."""
    import matplotlib

    from ..report.figures import STYLE

    (folder / "plots").mkdir(exist_ok=True)
    done = [x for x in _latest(lines) if "failed" not in x]
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
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
                    for x in ARENA_COSTS
                    for y in ARENA_MEASURES
                }
                title = f"{name}, kl_weight {price:g}: mean and 95% interval over seeds"
                written.append(folder / "plots" / (f"{name}.{price:g}.png" if len(places) > 1 else f"{name}.png"))
                arena_curves(title, bands).savefig(written[-1])
                for entry in place["rules"]:
                    if entry["runs"]:
                        frontier.setdefault(entry["rule"], []).append((*entry["kl"], *entry["reward"]))
            measured = folder / "yardsticks" / f"{name}.json"
            if frontier:
                yardstick = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
                best = tilted_frontier(yardstick, places[0]["kl_weight"]) if yardstick else []
                written.append(folder / "plots" / f"{name}.frontier.png")
                arena_frontier(f"{name}: reward and path KL", frontier, best).savefig(written[-1])
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


Band = Sequence[tuple[float, float, float]]  # (x, mean, half width) in order of x
ARENA_COSTS = {"network_calls": "network calls", "reward_calls": "reward calls", "seconds": "CPU seconds"}
ARENA_MEASURES = {"recovered": "share of J* - J_ref recovered", "reward": "held-out reward"}
ARENA_COLORS = ("#0f62a8", "#c8553d", "#7a5c3e", "#8d4fb0", "#d19a00", "#3aa6b9", "#6b7075", "#b0306e")
ARENA_DASHES = ("-", "--", ":", "-.")


def arena_style(index: int) -> dict[str, Any]:
    """A colour and dash for the rule of this number."""
    dash = ARENA_DASHES[(index // len(ARENA_COLORS)) % len(ARENA_DASHES)]
    return {"color": ARENA_COLORS[index % len(ARENA_COLORS)], "linestyle": dash}


def arena_curves(title: str, bands: Mapping[tuple[str, str], Mapping[str, Band]]) -> Figure:
    """Measures (rows) against costs (columns), one curve a rule. bands: (cost, measure) -> rule -> its curve."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    every = figure.subplots(len(ARENA_MEASURES), len(ARENA_COSTS), sharex="col", sharey="row")
    names = sorted({rule for rules in bands.values() for rule in rules})
    for row, (measure, unit) in zip(every, ARENA_MEASURES.items(), strict=True):
        for axes, (cost, label) in zip(row, ARENA_COSTS.items(), strict=True):
            lowest: list[float] = []
            for rule, band in bands[cost, measure].items():
                x, mean, half = (list(part) for part in zip(*band, strict=True))
                style = arena_style(names.index(rule))
                axes.plot(x, mean, label=rule, **style)
                low = [m - h if math.isfinite(h) else m for m, h in zip(mean, half, strict=True)]
                high = [m + h if math.isfinite(h) else m for m, h in zip(mean, half, strict=True)]
                axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
                lowest.append(min(mean))
            if cost != "seconds":
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            if measure == "recovered":
                axes.axhline(0, color=REFERENCE, linewidth=1)
                axes.axhline(1, color=OPTIMUM, linewidth=1, linestyle="--")
                # a rule that diverges, or an interval of two seeds, would flatten all others
                axes.set_ylim(max(-0.5, min(-0.05, *lowest)), max(1.05, min(1.3, axes.get_ylim()[1])))
            else:
                axes.set_xlabel(label)
        row[0].set_ylabel(unit)
    handles, labels = every[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


def arena_frontier(
    title: str,
    rules: Mapping[str, Sequence[tuple[float, float, float, float]]],
    best: Sequence[tuple[float, float]],
) -> Figure:
    """Reward against path KL. rules: (KL, its half width, reward, its half width) a price of KL; best: the optimum's."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    every = sorted(kl for points in rules.values() for kl, *_ in points)
    # a rule that runs away would flatten the others: its points are told in words
    edge = min(1.15 * every[-1], 4 * every[(len(every) - 1) // 2]) if every else 1.0
    shown = [point for point in best if point[0] <= edge]
    if shown:
        axes.plot(*zip(*shown, strict=True), color=OPTIMUM, label="optimum, from the reference's samples")
    for index, (rule, points) in enumerate(sorted(rules.items())):
        farthest = max(kl for kl, *_ in points)
        beyond = f" (path KL to {farthest:.3g}, beyond the plot)" if farthest > edge else ""
        inside = sorted(point for point in points if point[0] <= edge) or [(math.nan,) * 4]
        kl, kl_half, reward, half = zip(*inside, strict=True)
        bars = [[h if math.isfinite(h) else 0.0 for h in part] for part in (kl_half, half)]
        axes.errorbar(kl, reward, xerr=bars[0], yerr=bars[1], marker="o", markersize=5, capsize=3, linewidth=1.4,
                      label=f"{rule}{beyond}", **arena_style(index))  # fmt: skip
    axes.set(title=title, xlabel="path KL (nats)", ylabel="held-out reward")
    axes.set_xlim(-0.03 * edge, edge)
    axes.legend()
    return figure
