"""The main job over seeds: the README's table of `plain`, with 95 % intervals.

    python benchmarks/main_job.py --seeds 5 --out main_job.jsonl      # about 3 minutes a seed on 2 cores, alone

Each line of the output is one seed: the held-out evaluation before and after, with 2,000 pictures each, and the seconds of
the run itself (the first look at the reference, training and its own evaluations). Resumable: seeds already in the file are
not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from scoreact.config import updated
from scoreact.evaluation import evaluate, recovered
from scoreact.metrics import confidence_interval
from scoreact.policy import Policy
from scoreact.recipes import recipes
from scoreact.schedule import GRIDS
from scoreact.sde import SDE, noise_level
from scoreact.solvers import SOLVERS
from scoreact.trainer import finetune

ROWS = {
    "judge/property": "share with the property",
    "judge/frechet": "Frechet distance to real pictures with it",
    "judge/class_error": "judge's error on the class",
    "sample/diversity": "diversity within a class",
    "reward/heldout": "reward, log p(property)",
    "policy/kl": "path KL, nats",
    "objective/J": "J",
    "objective/recovered": "share of J* - J_ref recovered",
    "seconds": "seconds",
}
EVALUATION_SEED = 20_261_122


def one(recipe_name: str, seed: int, samples: int, settings: dict[str, Any]) -> dict[str, Any]:
    recipe = recipes()[recipe_name]
    config = updated(recipe.config, {"seed": seed, **settings})
    problem = recipe.build()
    begin = time.perf_counter()
    result = finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, config=config,
        judge=problem.judge, features=problem.features,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    model = problem.model
    sde = SDE(model.schedule, noise_level(config.noise_scale))
    ts = GRIDS[config.grid](model.schedule, config.steps, None)
    untrained = Policy(result.policy.reference, result.policy.reference)
    found = [
        evaluate(policy, sde, SOLVERS[config.solver], ts, problem.reward, problem.prompts, config.kl_weight, samples,
                 EVALUATION_SEED, problem.judge, problem.features)
        for policy in (untrained, result.policy)
    ]  # fmt: skip
    before, after = found
    after["objective/recovered"] = recovered(after["objective/J"] - before["objective/J"], result.reference)
    return {"seed": seed, "before": before, "after": {**after, "seconds": seconds}, "reference": result.reference}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: before, and after with its 95 % interval over seeds."""
    rows = [f"| | pretrained | after (mean ± 95 % over {len(lines)} seeds) |", "| --- | --- | --- |"]
    for key, text in ROWS.items():
        mean, half = confidence_interval(torch.tensor([line["after"][key] for line in lines]))
        before = lines[0]["before"].get(key)
        rows.append(f"| {text} | {'' if before is None else f'{before:.3g}'} | {mean:.3g} ± {half:.2g} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="plain")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--iterations", type=int, help="other than the recipe's")
    parser.add_argument("--out", type=Path, default=Path("main_job.jsonl"))
    options = parser.parse_args()
    lines = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {line["seed"] for line in lines}
    settings = {"iterations": options.iterations} if options.iterations else {}
    for seed in range(options.seeds):
        if seed not in done:
            lines.append(one(options.recipe, seed, options.samples, settings))
            with options.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(f"seed {seed}: {lines[-1]['after']}", flush=True)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
