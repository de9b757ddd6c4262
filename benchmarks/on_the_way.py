"""Is a reward call better spent at a path's end, or on the way, where the surrogate is unsure?

    python benchmarks/on_the_way.py shapes --out benchmarks/on_the_way.jsonl    # a folder of `shapes.py pretrain`
    python benchmarks/on_the_way.py --table --out benchmarks/on_the_way.jsonl
    python benchmarks/on_the_way.py --page docs/results/black-box.md --out benchmarks/on_the_way.jsonl

Paths of the pretrained model (guidance 2, ten steps of DDIM with noise). A surrogate is fitted to half of the reward calls, at
ends drawn at random, then chooses where the other half goes, and is fitted again. "On the way" are the pictures that the POOL
paths are heading for at t = 0.2, 0.4, 0.6, 0.8. "Unsure" is greedy: one after another where its posterior variance is
largest. The figure is the share of the variance of the end's reward within prompts that the surrogate explains on other
paths, as in `surrogate_features.py`. A draw is an order of the paths and an untrained convolution.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from few_steps import cell
from page_tables import put
from surrogate_features import Drawn, drawn

from scoreact.control.ridge_surrogate import RidgeSurrogate
from scoreact.evaluation.seen import SEEN_AT, seen
from scoreact.rewards.sample_features import random_features
from scoreact.support.files import append_line, resume_lines

POOL, FRESH, DRAWS, ASKED = 240, 480, 5, (48, 96, 192)
WAYS = {
    "ends": "at ends, drawn at random", "unsure ends": "at ends, where unsure", "states": "on the way, drawn at random",
    "unsure states": "on the way, where unsure",
}  # fmt: skip
MARKS = ("<!-- on-the-way -->\n", "<!-- /on-the-way -->\n")


@torch.no_grad()
def explained(
    paths: Drawn, seen_at: dict[int, torch.Tensor], rewards_at: Sequence[torch.Tensor], way: str, asked: int, draw: int
) -> dict[str, float]:
    """The share at each time of SEEN_AT and at the end, "1". seen_at: features of the pictures at these steps."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(POOL + FRESH, generator=generator)
    pool, fresh, half = order[:POOL], order[POOL:], asked // 2
    *times, end = seen_at
    surrogate = RidgeSurrogate(torch.nn.Identity(), paths.captions, likelihood=True)  # its samples are features
    first, others = pool[:half], pool[half:]
    surrogate.add(seen_at[end][first], paths.condition[first], paths.rewards[first])
    surrogate.look(seen_at[end][others], paths.condition[others])
    surrogate.fit()
    steps, rows = ([end], others) if way.endswith("ends") else (times, pool)
    features = torch.cat([seen_at[k][rows] for k in steps])
    condition, rewards = paths.condition[rows.repeat(len(steps))], torch.cat([rewards_at[k][rows] for k in steps])
    if way.startswith("unsure"):
        chosen = surrogate.choose(features, condition, half)
    else:
        chosen = torch.randperm(len(features), generator=generator)[:half]
    surrogate.add(features[chosen], condition[chosen], rewards[chosen])
    surrogate.fit()
    condition, true = paths.condition[fresh], paths.rewards[fresh]
    return {
        f"{float(paths.ts[k]):.1g}": seen(surrogate(features[fresh], condition), true, condition)[0]
        for k, features in seen_at.items()
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A row a way and a number of calls: means over draws with 95 % intervals."""
    times = list(lines[0]["explained"])
    rows = [f"| the other half of the calls | calls | {' | '.join(f't = {t}' for t in times[:-1])} | end |"]
    rows.append("| --- |" + " ---: |" * (1 + len(times)))
    for asked in ASKED:
        for way, name in WAYS.items():
            mine = [line["explained"] for line in lines if (line["way"], line["asked"]) == (way, asked)]
            rows.append(f"| {name} | {asked} | {' | '.join(cell([found[t] for found in mine], 2) for t in times)} |")
    return "\n".join(rows) + "\n"


@torch.no_grad()
def measure(folder: str, out: Path) -> None:
    from text_to_image import reward

    paths = drawn(folder, POOL + FRESH)
    rewards_at = [reward(pictures, paths.condition.prompts, folder) for pictures in paths.pictures]
    steps = [int((paths.ts - at).abs().argmin()) for at in (*SEEN_AT, 1.0)]
    for draw in range(DRAWS):
        network = random_features(paths.pictures[-1], draw)
        seen_at = {k: network(paths.pictures[k]) for k in steps}
        for asked in ASKED:
            for way in WAYS:
                found = explained(paths, seen_at, rewards_at, way, asked, draw)
                append_line(out, {"way": way, "asked": asked, "draw": draw, "explained": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="of `shapes.py pretrain` or `counting.py pretrain`")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page; runs nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table and options.page is None:
        if options.folder is None:
            sys.exit("give the folder of `shapes.py pretrain`, or --table.")
        measure(options.folder, options.out)
    shown = table(resume_lines(options.out))
    print(shown)
    if options.page is not None:
        put(shown, options.page, MARKS)


if __name__ == "__main__":
    main()
