"""The arena's tables in words and numbers. Knows lines of results.jsonl; does not know how a run goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..support.errors import SettingError
from ..support.files import Line, finite, resume_lines, write_json
from .plots import plots
from .statistics import FRACTIONS, summarise


def report(folder: Path) -> str:
    """table.md, summary.json and plots/ from results.jsonl; returns the table."""
    if not (folder / "results.jsonl").is_file():
        raise SettingError(f"{folder} holds no results.jsonl; run `scoreact bench --out {folder}` first.")
    lines = resume_lines(folder / "results.jsonl")
    found = summarise(lines)
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
