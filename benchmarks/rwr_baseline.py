"""`rwr` with and without its control variate, on mixtures whose optimum is known: shares recovered at equal network calls.

    python benchmarks/rwr_baseline.py --out benchmarks/rwr_baseline.jsonl --page docs/reference/rules.md     # a minute
    python benchmarks/rwr_baseline.py --table --out benchmarks/rwr_baseline.jsonl --page docs/reference/rules.md

The recipe `gaussian` in 2 and in 16 dimensions. Each way tries RATES on a seed of its own, and goes on with the best to five
others. Without a baseline it has more iterations, as many as make the network calls equal: a path of STEPS steps and DRAWS
denoised states a sample, and with the baseline DRAWS more of the reference. Reward calls are not equal: the baseline asks for
one a denoised state. Resumable: what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from few_steps import cell
from page_tables import put

import scoreact as sa
from scoreact.recipes.base import recipes
from scoreact.support.files import append_line, resume_lines

DIMENSIONS, STEPS, DRAWS, BATCH, TUNING_SEED = (2, 16), 20, 4, 128, 1000
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
CALLS = 100 * BATCH * (STEPS + 2 * DRAWS)
WAYS = {"none": CALLS // (BATCH * (STEPS + DRAWS)), "denoised": CALLS // (BATCH * (STEPS + 2 * DRAWS))}  # iterations
MARKS = ("<!-- rwr -->\n", "<!-- /rwr -->\n")


def one(dimension: int, way: str, rate: float, seed: int) -> dict[str, Any]:
    begin = time.process_time()
    result = sa.finetune(
        recipes()["gaussian"].build(dim=dimension), algorithm="rwr", baseline=way, iterations=WAYS[way], steps=STEPS,
        draws=DRAWS,
        batch_size=BATCH, minibatch_size=BATCH * DRAWS, learning_rate=rate, decay_from=0.5, average=0.95, seed=seed,
        heldout_samples=1024, evaluate_every=10_000, progress=False, report=False, device="cpu",
    )  # fmt: skip
    costs = next(line for line in reversed(result.history) if "cost/reward_calls" in line)
    return {
        "dimension": dimension, "way": way, "rate": rate, "seed": seed, "recovered": result.final["objective/recovered"],
        "kl": result.final["policy/kl"], "network_calls": costs["cost/network_calls"],
        "reward_calls": costs["cost/reward_calls"], "seconds": time.process_time() - begin,
    }  # fmt: skip


def chosen(lines: list[dict[str, Any]], dimension: int, way: str) -> float:
    tried = [x for x in lines if (x["dimension"], x["way"], x["seed"]) == (dimension, way, TUNING_SEED)]
    return float(max(tried, key=lambda x: x["recovered"])["rate"])


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a dimension and way, means over seeds."""
    rows = ["| dimensions | `baseline` | rate | share recovered | path KL | network calls | reward calls |"]
    rows.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for dimension in DIMENSIONS:
        for way in WAYS:
            rate = chosen(lines, dimension, way)
            mine = [
                x
                for x in lines
                if (x["dimension"], x["way"], x["rate"]) == (dimension, way, rate) and x["seed"] != TUNING_SEED
            ]
            share, kl = (cell([x[name] for x in mine], 2) for name in ("recovered", "kl"))
            calls = [f"{statistics.mean(x[name] for x in mine):,.0f}" for name in ("network_calls", "reward_calls")]
            rows.append(f"| {dimension} | `{way}` | {rate:g} | {share} | {kl} | {calls[0]} | {calls[1]} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = resume_lines(options.out)

    def run(*what: Any) -> None:
        if what not in [(x["dimension"], x["way"], x["rate"], x["seed"]) for x in lines]:
            lines.append(one(*what))
            append_line(options.out, lines[-1])

    for dimension in DIMENSIONS if not options.table else ():
        for way in WAYS:
            for rate in RATES:
                run(dimension, way, rate, TUNING_SEED)
            for seed in range(options.seeds):
                run(dimension, way, chosen(lines, dimension, way), seed)
    shown = table(lines)
    print(shown, end="")
    if options.page:
        put(shown, options.page, MARKS)


if __name__ == "__main__":
    main()
