"""The README's summary of a comparison, made from the results that `scoreact bench` left.

    python benchmarks/arena_readme.py                     # prints the table of benchmarks/arena
    python benchmarks/arena_readme.py --write             # and puts it into README.md, between its two marks

`tests/test_readme.py` holds the README against the same results.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from scoreact.arena_report import summary
from scoreact.checkpoint import resume_lines

HERE = Path(__file__).resolve().parent
MARKS = ("<!-- arena-table -->\n", "<!-- /arena-table -->")


def thousands(number: float) -> str:
    return f"{number / 1000:.0f}k" if math.isfinite(number) else "never"


def cells(place: dict[str, Any], rule: str) -> list[str]:
    """Share recovered, and how many fewer network calls than ddpo the rule needs to where ddpo ends."""
    entry = next((e for e in place["rules"] if e["rule"] == rule and e["runs"]), None)
    if entry is None:
        return ["", ""]
    mean, half = entry["recovered"]
    share = f"{100 * mean:.0f} ± {100 * half:.0f} %" if mean > -1 else "ran away"
    pair = next((p for p in place["pairs"] if (p["a"], p["b"]) == (rule, "ddpo")), None)
    times = pair["times_fewer"] if pair else math.nan
    return [share, f"{times:.1f}" if times > 0 else ""]


def made(folder: Path) -> str:
    """The table, and where it comes from."""
    places = summary(resume_lines(folder / "results.jsonl"))
    rules = list(dict.fromkeys(entry["rule"] for place in places for entry in place["rules"] if entry["runs"]))
    ranks: dict[str, list[float]] = {rule: [] for rule in rules}
    for place in places:
        ran = sorted((e for e in place["rules"] if e["runs"]), key=lambda e: -e["recovered"][0])
        for rank, entry in enumerate(ran):
            ranks[entry["rule"]].append(rank / len(ran))
    rules.sort(key=lambda rule: (sum(ranks[rule]) / len(ranks[rule]), -len(ranks[rule])))  # by mean rank
    rows = [
        "| rule | " + " | ".join(f"{p['problem']} | fewer calls" for p in places) + " |",
        "| --- |" + " ---: |" * (2 * len(places)),
    ]
    rows += [
        "| " + " | ".join([f"`{rule}`", *(cell for place in places for cell in cells(place, rule))]) + " |"
        for rule in rules
    ]
    budgets = "; ".join(
        f"{p['problem']} {thousands(p['budget']['network_calls'])} and {p['budget']['reward_calls']:,}" for p in places
    )
    seeds = min(e["runs"] for place in places for e in place["rules"] if e["runs"])
    return "\n".join(rows) + (
        f"\n\nShare of J* - J_ref at the end, mean and 95 % interval over {seeds} seeds, by mean rank; how many times fewer\n"
        "network calls than tuned `ddpo` a rule needs to where `ddpo` ends (empty where it does not get there).\n"
        f"Budgets, network and reward calls: {budgets}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "arena")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    options = parser.parse_args()
    text = made(options.folder)
    print(text)
    if options.write:
        readme = HERE.parent / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        readme.write_text(before + MARKS[0] + text + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
