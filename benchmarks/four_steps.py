"""The recipes `four-steps` and `two-steps` over seeds, beside the pretrained model at as few steps and at many.

    python benchmarks/four_steps.py --seeds 5 --out benchmarks/four_steps.jsonl     # 100 to 130 CPU seconds a seed
    python benchmarks/four_steps.py --table                                         # prints it, and trains nothing
    python benchmarks/four_steps.py --table --write docs/results/four-steps.md      # and puts it there
    python benchmarks/four_steps.py --seeds 1 --picture docs/figures/four-steps.png
    python benchmarks/four_steps.py --recipe two-steps --seeds 5 --write docs/results/four-steps.md

Every row is measured on 2,000 pictures, the same prompts and noise for all models, by a network that neither the reward nor the
training has seen. AUC is that of the discriminator of `four-steps`: how often a real picture, held out, has the larger reward.
Resumable: what is in the file is not run again.
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
from page_tables import put
from torch import Tensor

from scoreact.api.start import finetune
from scoreact.dynamics.grids import grid_times
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.evaluation.metrics import confidence_interval
from scoreact.recipes.base import recipes
from scoreact.recipes.fashion_mnist.four_steps import real_judge, real_reward
from scoreact.recipes.fashion_mnist.recipe import model as pretrained
from scoreact.sampling.draw import balanced, draw
from scoreact.training.config import updated

SAMPLES, SEED = 2000, 20_261_127
PRETRAINED = {
    "four-steps": (("ddim", 4), ("ode", 4), ("dpm_solver_pp_2m", 4), ("dpm_solver_pp_2m", 10), ("ddim", 50)),
    "two-steps": (("ddim", 2), ("ode", 2), ("dpm_solver_pp_2m", 4), ("dpm_solver_pp_2m", 5)),
}
TUNED = {
    "four-steps": (("ddim", 4), ("ode", 4), ("dpm_solver_pp_2m", 4)),
    "two-steps": (("ddim", 2), ("ode", 2)),  # two steps of the multistep solver are those of the ODE here
}
COLUMNS = {
    "judge/frechet": "Frechet", "judge/class_error": "class error", "judge/precision": "precision", "judge/recall": "recall",
    "judge/coverage": "coverage", "reward/auc": "AUC",
}  # fmt: skip
MARKS = {name: (f"<!-- {name} -->\n", f"<!-- /{name} -->\n") for name in TUNED}


@torch.no_grad()
def measured(model: Any, solver: str, steps: int) -> dict[str, Any]:
    """The judge's figures and the AUC of 2,000 pictures."""
    prompts = balanced(model.classes, SAMPLES, torch.Generator().manual_seed(SEED))
    ts, sampler = grid_times("uniform", model.schedule, steps), sampler_by_name(solver)
    parts = [draw(model, prompts[i : i + 250], sampler, ts, SEED + i)[1] for i in range(0, SAMPLES, 250)]
    pictures, condition, reward = torch.cat(parts), model.condition(prompts), real_reward()
    auc = reward.auc(reward(pictures, condition))
    return {"solver": solver, "steps": steps, **real_judge()(pictures, condition), "reward/auc": auc}


def tuned(name: str, seed: int, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One run of the recipe: the model, and what it cost."""
    recipe = recipes()[name]
    problem = recipe.build()
    config = updated(recipe.config_for(settings), {"seed": seed, **settings})
    begin, cpu = time.perf_counter(), time.process_time()
    result = finetune(problem, config=config, progress=False)
    costs = next(line for line in reversed(result.history) if "cost/reward_calls" in line)
    return result.policy.model, {
        "algorithm": config.algorithm, "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu,
        "policy/kl": result.final["policy/kl"],
        **{key: costs[key] for key in ("cost/reward_calls", "cost/network_calls")},
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a model, solver and number of steps; of several seeds the mean with its 95 % interval."""
    rows = [f"| model | solver, steps | {' | '.join(COLUMNS.values())} |", f"| --- | --- |{' ---: |' * len(COLUMNS)}"]
    keys = dict.fromkeys((line.get("algorithm", "pretrained"), line["solver"], line["steps"]) for line in lines)
    for kind, solver, steps in sorted(keys, key=lambda key: key[0] != "pretrained"):
        same = [
            x for x in lines if (x.get("algorithm", "pretrained"), x["solver"], x["steps"]) == (kind, solver, steps)
        ]
        cells = []
        for key in COLUMNS:
            mean, half = confidence_interval(torch.tensor([line[key] for line in same]))
            cells.append(f"{mean:.3g} ± {half:.1g}" if len(same) > 1 else f"{mean:.3g}")
        who = kind if kind == "pretrained" else f"tuned by `{kind}`, {len(same)} seed{'s' * (len(same) > 1)}"
        rows.append(f"| {who} | {solver} {steps} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


@torch.no_grad()
def picture(model: Any, path: Path, steps: int) -> None:
    """Two pictures a class from the same noise: before and after at a few steps, pretrained at 50; all by the ODE."""
    from PIL import Image, ImageDraw, ImageFont

    from scoreact.runs.samples import sheet

    before, prompts = pretrained(), [name for name in model.classes for _ in range(2)]
    blocks = [(f"before, {steps} steps", before, steps), (f"after, {steps} steps", model, steps)]
    made: list[tuple[str, Image.Image]] = []
    for words, which, count in [*blocks, ("before, 50 steps", before, 50)]:
        drawn: Tensor = draw(which, prompts, sampler_by_name("ode"), grid_times("uniform", which.schedule, count), 1)[1]
        made.append((words, sheet(torch.cat([drawn[0::2], drawn[1::2]]), 10).reduce(4).resize((860, 172))))
    left, gap = 140, 8
    width, height = made[0][1].size
    canvas = Image.new("L", (left + width, len(made) * (height + gap) - gap), 255)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for i, (words, block) in enumerate(made):
        canvas.paste(block, (left, i * (height + gap)))
        pen.text((left - 8, i * (height + gap) + height // 2), words, 0, font, anchor="rm")
    canvas.quantize(32).save(path, optimize=True)
    print(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=TUNED, default="four-steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="other settings, such as algorithm"
    )
    parser.add_argument("--out", type=Path, help="by default the recipe's .jsonl beside this file")
    parser.add_argument("--picture", type=Path, help="draw the first seed's model into this file")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    options = parser.parse_args()
    options.out = options.out or Path(__file__).with_name(f"{options.recipe.replace('-', '_')}.jsonl")
    lines = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []

    def keep(line: dict[str, Any]) -> None:
        lines.append(line)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if not options.table:
        settings = {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
        rule = settings.get("algorithm", recipes()[options.recipe].config.algorithm)
        before = {(line["solver"], line["steps"]) for line in lines if "algorithm" not in line}
        for solver, steps in PRETRAINED[options.recipe]:
            if (solver, steps) not in before:
                keep(measured(pretrained(), solver, steps))
        done = {line["seed"] for line in lines if line.get("algorithm") == rule}
        for seed in range(options.seeds):
            if seed in done and not (options.picture and seed == 0):
                continue
            model, costs = tuned(options.recipe, seed, settings)
            if seed not in done:  # its lines at once: a killed seed leaves none
                for line in [
                    {"seed": seed, **costs, **measured(model, solver, steps)} for solver, steps in TUNED[options.recipe]
                ]:
                    keep(line)
            if options.picture and seed == 0:
                picture(model, options.picture, TUNED[options.recipe][0][1])
            print(f"seed {seed}: {costs}", flush=True)
    print(table(lines), end="")
    if options.write:
        put(table(lines), options.write, MARKS[options.recipe])
    return 0


if __name__ == "__main__":
    sys.exit(main())
