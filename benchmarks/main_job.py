"""The main job over seeds: the README's table of `plain`, with 95 % intervals.

    python benchmarks/main_job.py --seeds 5 --out main_job.jsonl      # about 3 minutes a seed on 2 cores, alone

Each line of the output is one seed: the held-out evaluation before and after, with 2,000 pictures each, and the seconds of
the run itself (the first look at the reference, training and its own evaluations). Resumable: seeds already in the file are
not run again. The column `optimum` is what no training can better at this kl_weight: the pretrained model's own pictures,
drawn again with weights exp(R / kl_weight), which is the tilted law that maximises J.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from scoreact.api.start import finetune
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import SOLVERS
from scoreact.evaluation.evaluate import diversity, evaluate
from scoreact.evaluation.metrics import confidence_interval
from scoreact.evaluation.optimum import recovered
from scoreact.recipes.base import recipes
from scoreact.sampling.draw import balanced
from scoreact.training.config import updated
from scoreact.types import Condition, groups

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
    config = updated(recipe.config_for(settings), {"seed": seed, **settings})
    problem = recipe.build()
    begin = time.perf_counter()
    result = finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, config=config,
        judge=problem.judge, features=problem.features,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    model = problem.model
    sde = SDE(model.schedule, noise_level(config.noise_scale))
    ts = config.times(model.schedule)
    untrained = Policy(result.policy.reference, result.policy.reference)
    found = [
        evaluate(policy, sde, SOLVERS[config.solver], ts, problem.reward, problem.prompts, config.kl_weight, samples,
                 EVALUATION_SEED, problem.judge, problem.features)
        for policy in (untrained, result.policy)
    ]  # fmt: skip
    before, after = found
    after["objective/recovered"] = recovered(after["objective/J"] - before["objective/J"], result.reference)
    return {"seed": seed, "before": before, "after": {**after, "seconds": seconds}, "reference": result.reference}


@torch.no_grad()
def optimum(recipe_name: str, samples: int, times: int = 12) -> dict[str, Any]:
    """The same measures of the tilted law: `samples` of `times` as many pretrained pictures, drawn by weight."""
    recipe = recipes()[recipe_name]
    problem, config = recipe.build(), recipe.config
    sde = SDE(problem.model.schedule, noise_level(config.noise_scale))
    ts = config.times(problem.model.schedule)
    policy = Policy(problem.model, problem.model)
    generator = torch.Generator().manual_seed(EVALUATION_SEED + 1)
    names = balanced(problem.prompts, samples * times, generator)
    pictures, rewards = [], []
    for start in range(0, len(names), 500):
        condition = problem.model.condition(names[start : start + 500])
        path = rollout(policy, sde, SOLVERS[config.solver], ts, condition, generator, reference_only=True)
        pictures.append(problem.model.decode(path.xs[-1]))
        rewards.append(problem.reward(pictures[-1], condition).double())
    everything, r = torch.cat(pictures), torch.cat(rewards) / config.kl_weight
    chosen, kls, means, best = [], [], [], []
    for rows in groups(Condition(names)).values():
        weights = (r[rows] - r[rows].logsumexp(0)).exp()
        chosen.append(rows[torch.multinomial(weights, len(rows) // times, False, generator=generator)])
        kls.append(float((weights * (weights.clamp(min=1e-300) * len(rows)).log()).sum()))
        means.append(float((weights * r[rows]).sum()) * config.kl_weight)
        best.append(config.kl_weight * (float(r[rows].logsumexp(0)) - math.log(len(rows))))
    index = torch.cat(chosen)
    condition = problem.model.condition([names[i] for i in index.tolist()])
    found: dict[str, Any] = {} if problem.judge is None else dict(problem.judge(everything[index], condition))
    found["sample/diversity"] = diversity(everything[index], condition, problem.features)
    means_of = {"policy/kl": kls, "reward/heldout": means, "objective/J": best}
    return found | {key: sum(values) / len(values) for key, values in means_of.items()} | {"objective/recovered": 1.0}


def table(lines: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """Markdown: before, after with its 95 % interval over seeds, and the optimum."""
    over = f"mean ± 95 % over {len(lines)} seeds" if len(lines) > 1 else "one seed"
    rows = [f"| | pretrained | after ({over}) | optimum |", "| --- | --- | --- | --- |"]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    for key, text in ROWS.items():
        mean, half = confidence_interval(torch.tensor([line["after"][key] for line in lines]))
        before = number(lines[0]["before"].get(key))
        after = f"{mean:.3g} ± {half:.2g}" if len(lines) > 1 else f"{mean:.3g}"
        rows.append(f"| {text} | {before} | {after} | {number(best.get(key))} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="plain")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--iterations", type=int, help="other than the recipe's")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting")
    parser.add_argument("--out", type=Path, default=Path("main_job.jsonl"))
    options = parser.parse_args()
    content = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    lines = [line for line in content if "seed" in line]
    best = next((line["optimum"] for line in content if "optimum" in line), None)
    if best is None:
        best = optimum(options.recipe, options.samples)
        with options.out.open("a") as file:
            file.write(json.dumps({"optimum": best}) + "\n")
    done = {line["seed"] for line in lines}
    settings: dict[str, Any] = {"iterations": options.iterations} if options.iterations else {}
    for text in options.set:
        name, _, value = text.partition("=")
        settings[name] = json.loads(value)
    for seed in range(options.seeds):
        if seed not in done:
            lines.append(one(options.recipe, seed, options.samples, settings))
            with options.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(f"seed {seed}: {lines[-1]['after']}", flush=True)
    print(table(lines, best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
