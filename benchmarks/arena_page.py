"""The tables of docs/results/arena.md, made from the results that `scoreact bench` left.

    python benchmarks/arena_page.py                     # prints the tables of benchmarks/arena
    python benchmarks/arena_page.py --write             # and puts them into that page, between their marks

`benchmarks/arena` has the runs at each problem's budget, `benchmarks/arena-third` those at a third of the network calls
that `ddpo` needed there, `benchmarks/arena-shapes` those on the pipeline of `shapes.py`. `tests/docs/test_results.py` holds the
page against the same results.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page_tables import put

from scoreact.arena.statistics import summarise
from scoreact.support.files import resume_lines

HERE = Path(__file__).resolve().parent
MARKS = ("<!-- arena-table -->\n", "<!-- /arena-table -->")
PIPELINE_MARKS = ("<!-- arena-shapes -->\n", "<!-- /arena-shapes -->")


def thousands(number: float) -> str:
    return f"{number / 1000:.0f}k" if math.isfinite(number) else "never"


def entry_of(place: dict[str, Any], rule: str) -> dict[str, Any] | None:
    return next((e for e in place["rules"] if e["rule"] == rule and e["runs"]), None)


def share(place: dict[str, Any] | None, rule: str) -> str:
    """Share recovered."""
    entry = entry_of(place, rule) if place else None
    if entry is None:
        return ""
    mean, half = entry["recovered"]
    return f"{100 * mean:.0f} ± {100 * half:.0f} %" if mean > -1 else "ran away"


def share_and_rewards(place: dict[str, Any] | None, rule: str) -> str:
    """Share recovered, and the reward calls that it took."""
    entry = entry_of(place, rule) if place else None
    return f"{share(place, rule)}, {entry['reward_calls'][0]:,.0f}" if entry else ""


def fewer(place: dict[str, Any], rule: str) -> str:
    """How many times fewer calls than ddpo the rule needs to where ddpo ends: network / reward."""
    pair = next((p for p in place["pairs"] if (p["a"], p["b"]) == (rule, "ddpo")), None)
    if pair is None:
        return ""
    times = [pair[calls]["times_fewer"] for calls in ("network_calls", "reward_calls")]
    return " / ".join(f"{number:.1f}" for number in times) if times[0] > 0 else "-"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(titles) - 1), *lines[1:]])


def by_rank(places: Sequence[dict[str, Any]]) -> list[str]:
    """The rules that ran anywhere, by mean rank over the problems."""
    rules = list(dict.fromkeys(entry["rule"] for place in places for entry in place["rules"] if entry["runs"]))
    ranks: dict[str, list[float]] = {rule: [] for rule in rules}
    for place in places:
        ran = sorted((e for e in place["rules"] if e["runs"]), key=lambda e: -e["recovered"][0])
        for rank, entry in enumerate(ran):
            ranks[entry["rule"]].append(rank / len(ran))
    return sorted(rules, key=lambda rule: (sum(ranks[rule]) / len(ranks[rule]), -len(ranks[rule])))


def made(folder: Path, third: Path) -> str:
    """The tables, and where they come from."""
    places, short = (summarise(resume_lines(path / "results.jsonl")) for path in (folder, third))
    rules = by_rank(places)
    names = [place["problem"] for place in places]
    seeds = min(e["runs"] for place in [*places, *short] for e in place["rules"] if e["runs"])
    budgets = "; ".join(
        f"{p['problem']} {thousands(p['budget']['network_calls'])} and {p['budget']['reward_calls']:,}" for p in places
    )
    shares = table(["rule", *names], [[f"`{rule}`", *(share(place, rule) for place in places)] for rule in rules])
    behind = [rule for rule in rules if rule != "ddpo"]
    calls = table(["rule", *names], [[f"`{rule}`", *(fewer(place, rule) for place in places)] for rule in behind])
    parts = [
        shares,
        f"Share of J* - J_ref at the end, mean and 95 % interval over {seeds} seeds, by mean rank; empty where a rule "
        f"did not run. Budgets, network and reward calls: {budgets}.",
        calls,
        "How many times fewer network / reward calls than tuned `ddpo` a rule needs to where `ddpo` ends: medians, and a dash "
        "where half of its runs do not get there.",
    ]
    if short:
        whole = {place["problem"]: place for place in places}
        rows = [[f"`{rule}`", *(share_and_rewards(place, rule) for place in short)] for rule in by_rank(short)]
        rows += [["`ddpo`, all its calls", *(share_and_rewards(whole.get(p["problem"]), "ddpo") for p in short)]]
        titles = ["rule", *(f"{p['problem']}, {thousands(p['budget']['network_calls'])}" for p in short)]
        parts += [
            table(titles, rows),
            "With a third of the network calls: share, and the reward calls it took, beside what `ddpo` reaches with all of "
            "them. Settings searched at that budget, on `series` at 30k; on pictures those of the whole budget.",
        ]
    parts = [part if part.startswith("|") else textwrap.fill(part, 128) for part in parts]
    return "\n\n".join(parts) + "\n"


def of_pipeline(folder: Path) -> str:
    """The rules on a pipeline: what each gains and pays."""
    lines = resume_lines(folder / "results.jsonl")
    [place] = summarise(lines)
    star, budget = place["yardstick"], place["budget"]
    titles = ["rule", "its best", "of trials", "seeds", "gain in J", "gain in reward", "path KL, nats"]
    titles += ["network calls", "reward calls", "CPU s"]
    rows = []
    for entry in (e for e in place["rules"] if e["runs"]):
        name = f"{entry['rule']}.{place['problem']}.json"
        own = json.loads((folder / "tuned" / name).read_text(encoding="utf-8"))
        chosen = ", ".join(f"`{what}` {value:g}" for what, value in own["settings"].items())
        row = [f"`{entry['rule']}`", chosen, str(own["trials"]), str(entry["runs"])]
        for what, key in (("J", "objective/J"), ("reward", "reward/heldout")):
            mean, half = entry[what]
            row.append(f"{mean - star['start'][key]:+.3f} ± {half:.3f}")
        used = [f"{entry[what][0]:,.0f}" for what in ("network_calls", "reward_calls", "seconds")]
        rows.append([*row, f"{entry['kl'][0]:.1f}", *used])
    most = star["objective/J_star"] - star["objective/J_ref"]
    sure = "" if star["objective/trusted"] else ", which is not trusted"
    said = (
        f"Mean and 95 % interval over the seeds, of J = reward - {place['kl_weight']:g} path KL and of the reward, on "
        f"{lines[0]['config']['heldout_samples']} held-out pictures. J* - J_ref is {most:.2f}{sure}. Budget: "
        f"{budget['network_calls']:,} network and {budget['reward_calls']:,} reward calls. Trials were on a seed of their own."
    )
    return "\n\n".join([table(titles, rows), textwrap.fill(said, 128)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "arena")
    parser.add_argument("third", nargs="?", type=Path, default=HERE / "arena-third")
    parser.add_argument("pipeline", nargs="?", type=Path, default=HERE / "arena-shapes")
    parser.add_argument("--write", action="store_true", help="put them into docs/results/arena.md")
    options = parser.parse_args()
    page = HERE.parent / "docs" / "results" / "arena.md"
    for text, marks in ((made(options.folder, options.third), MARKS), (of_pipeline(options.pipeline), PIPELINE_MARKS)):
        print(text)
        if options.write:
            put(text, page, marks)


if __name__ == "__main__":
    main()
