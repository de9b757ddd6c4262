"""Few steps on Fashion-MNIST: what no training costs, and what each rule makes of a discriminator's reward at equal calls.

    python benchmarks/few_steps.py baselines --data fashion_mnist.npz --out benchmarks/few_steps.jsonl
    python benchmarks/few_steps.py grids --data fashion_mnist.npz --out benchmarks/few_steps.jsonl
    python benchmarks/few_steps.py split --data fashion_mnist.npz --pictures seen.npz
    scoreact reward discriminate plain --data seen.npz --features classifier --steps 4 --ridge 0.1 --out real
    python benchmarks/few_steps.py train --data fashion_mnist.npz --pictures seen.npz --real real --steps 4 \\
        --out benchmarks/few_steps.jsonl
    python benchmarks/few_steps.py table --out benchmarks/few_steps.jsonl --write docs/results/few-steps.md

The judge is the network that no reward and no training used. `baselines` draws the shipped model with every solver at every
number of steps, on three grids and at three noise levels where the solver has noise. Settings are chosen on pictures of the
training set that no discriminator here sees (`validation`); what is printed is measured against the 10,000 test pictures.
`train` runs every arm within `--calls` network calls (policy and reference, one a picture and pass). Each arm has
TRIALS settings, on a seed of its own and with half the calls; the one nearest to the validation pictures goes on to the other
seeds. `split` writes the real pictures that training may see: all of the training set but `validation`.
Arms with `energy distance` have that reward of a batch in the discriminator's place.
Every figure is of SAMPLES pictures, balanced over the classes; Frechet distances of other numbers are others.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from page_tables import put
from torch import Tensor

from scoreact.dynamics.grids import GRIDS, grid_times, uniform
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.dynamics.sde import noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.evaluation.evaluate import evaluate
from scoreact.evaluation.grid_search import search_grid
from scoreact.evaluation.metrics import confidence_interval, feature_statistics, frechet_distance, neighbours
from scoreact.models.network import NetworkModel
from scoreact.recipes.fashion_mnist import recipe
from scoreact.recipes.fashion_mnist.classifiers import load_classifier
from scoreact.recipes.fashion_mnist.data import CLASSES, load_pictures
from scoreact.rewards.base import FunctionReward, Reward
from scoreact.rewards.check import checked
from scoreact.rewards.registry import load
from scoreact.sampling.draw import balanced, draw
from scoreact.support.errors import ScoreactError
from scoreact.support.files import append_line, resume_lines
from scoreact.training.config import Config, updated, usable
from scoreact.training.loop import Hook, Stop, training_loop
from scoreact.training.pretrain import fit_denoiser
from scoreact.training.trainer import Trainer
from scoreact.types import Condition, Metrics

MARKS = ("<!-- few-steps -->\n", "<!-- /few-steps -->\n")
SAMPLES, CHUNK = 2000, 250
VALIDATION = 10_000  # the last of the training set
SEEDS = {"validation": 41, "test": 42}  # of the pictures that are judged
SOLVERS = {"ddim": 1, "ode": 1, "heun": 2, "dpm_solver_pp_2m": 1}  # network calls a step
STEPS = (2, 4, 5, 10, 20, 50)
LEVELS = (0.5, 1.0)  # of ddim; 0 is `ode`
SEARCHED, TRIES, SEARCH_SAMPLES = (2, 4, 5, 10), 40, 500

CALLS, TUNING_SEED = 60_000, 1_000
JUDGED = ("ddim", "ode", "dpm_solver_pp_2m")  # each at the steps of training
COMMON: dict[str, Any] = {
    "solver": "ddim", "batch_size": 64, "minibatch_size": 64, "reference_batches": 4, "warmup": 1, "average": 0.8,
    "max_kl": 0.5, "act_until": 1.0, "epochs": 1, "decay_from": 0.5, "iterations": 10_000,
    "evaluate_every": 10_000, "heldout_samples": 2,
    "value": "residual", "value_loss": "soft", "device": "cpu",
}  # fmt: skip
TRIALS: list[dict[str, Any]] = [
    {"kl_weight": weight, "learning_rate": rate} for weight in (0.1, 0.2, 0.4) for rate in (1.5e-4, 3e-4)
]
ARMS: dict[str, dict[str, Any]] = {
    "adjoint_matching": {"algorithm": "adjoint_matching"},
    "draft": {"algorithm": "draft"},
    "ctrl_pathwise": {"algorithm": "ctrl_pathwise"},
    "ctrl": {"algorithm": "ctrl"},
    "ctrl_trpo": {"algorithm": "ctrl_trpo"},
    "ram": {"algorithm": "ram"},
    "dxmi": {"algorithm": "dxmi"},
    "dxmi, published step": {"algorithm": "dxmi", "form": "clamped_displacement"},
    "ctrl, black box": {"algorithm": "ctrl_pathwise", "value": "surrogate"},
    "ddpo, black box": {"algorithm": "ddpo"},
    "draft, energy distance": {"algorithm": "draft"},
}  # fmt: skip
DISTANCE = ", energy distance"  # of a batch to real pictures, class by class, in the features of the discriminator
OF_DISTANCE: list[dict[str, Any]] = [  # its reward is smaller
    {"kl_weight": weight, "learning_rate": rate} for weight in (2e-3, 4e-3, 8e-3) for rate in (1.5e-4, 3e-4)
]
OF_DXMI: list[dict[str, Any]] = [
    {"learning_rate": rate, "energy_rate": 3e-4, "time_bonus": bonus}
    for rate, bonus in ((3e-6, 0.0), (1e-5, 0.0), (1e-6, 1.0), (3e-6, 1.0), (1e-5, 1.0), (3e-6, 3.0))
]
RATES: list[dict[str, Any]] = [
    {"learning_rate": rate} for rate in (5e-7, 1.5e-6, 5e-6, 1.5e-5, 5e-5, 1.5e-4)
]  # no kl_weight
HIDDEN = ("ctrl, black box", "ddpo, black box")


class Judged:
    """Real pictures of one split in the judge's features, and what generated ones are against them."""

    def __init__(self, images: Tensor, seed: int = 0) -> None:
        self.judge = load_classifier()
        with torch.no_grad():
            features = torch.cat([self.judge.features(part[:, None].float() / 255) for part in images.split(1000)])
        self.statistics = feature_statistics(features)
        chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
        self.some = features[chosen]

    @torch.no_grad()
    def look(self, images: Tensor, labels: Tensor, near: bool = True) -> dict[str, float]:
        features = self.judge.features(images)
        found = {
            "frechet": float(frechet_distance(*feature_statistics(features), *self.statistics)),
            "class_error": float((self.judge.log_probs(images).argmax(1) != labels).float().mean()),
        }
        if near:
            n = neighbours(self.some, features)
            found |= {"precision": n.precision, "recall": n.recall, "coverage": n.coverage}
        return found


def pictures(
    model: NetworkModel, solver: str, ts: Tensor, seed: int, level: float = 1.0, count: int = SAMPLES
) -> tuple[Tensor, Tensor]:
    """Pictures in [0, 1] and their classes; the same seed is the same noise for every model."""
    names = balanced(CLASSES, count, torch.Generator().manual_seed(seed))
    parts = [
        draw(model, names[i : i + CHUNK], sampler_by_name(solver), ts, seed * 1000 + i, noise=noise_level(level))[1]
        for i in range(0, count, CHUNK)
    ]
    return torch.cat(parts), torch.tensor([CLASSES.index(name) for name in names])


def splits(data: str) -> dict[str, Judged]:
    return {
        "validation": Judged(load_pictures(data, "train")[0][-VALIDATION:]),
        "test": Judged(load_pictures(data, "test")[0]),
    }


def baselines(data: str, out: Path) -> None:
    """Every solver, grid and noise level of the shipped model; lines that are in the file are not drawn again."""
    lines = [line for line in resume_lines(out) if line["kind"] == "baseline"]
    done = {(line["solver"], line["grid"], line["level"], line["steps"]) for line in lines}
    judges, model = splits(data), recipe.model()
    if ("real", "", 0.0, 0) not in done:
        images, labels = load_pictures(data, "train")
        test = judges["test"].look(images[-SAMPLES:, None].float() / 255, labels[-SAMPLES:].long())
        append_line(
            out, {"kind": "baseline", "solver": "real", "grid": "", "level": 0.0, "steps": 0, "calls": 0, "test": test}
        )
    for steps in STEPS:
        for solver, calls in SOLVERS.items():
            for grid in ("uniform", "log_snr", "karras"):
                for level in LEVELS if solver == "ddim" else (0.0,):
                    if steps % calls or (solver, grid, level, steps) in done or (steps > 10 and grid != "uniform"):
                        continue
                    ts = GRIDS[grid](model.schedule, steps // calls, None)
                    begin = time.process_time()
                    found: dict[str, Any] = {}
                    for split, judged in judges.items():
                        images, labels = pictures(model, solver, ts, SEEDS[split], level)
                        found[split] = judged.look(images, labels)
                    seconds = time.process_time() - begin
                    append_line(out, {"kind": "baseline", "solver": solver, "grid": grid, "level": level,
                                      "steps": steps, "calls": steps, "seconds": seconds, **found})  # fmt: skip


class Spend(Hook):
    """Ends a run before its budget of network calls; the rates fall to 0 there."""

    def __init__(self, calls: int) -> None:
        self.calls, self.was = calls, 0
        self.costs: list[int] = []

    def before(self, trainer: Trainer) -> Stop | None:
        self.was = trainer.policy.network_calls
        return Stop() if self.costs and self.was + self.costs[-1] > self.calls else None

    def iteration(self, trainer: Trainer, metrics: Metrics) -> None:
        self.costs.append(trainer.policy.network_calls - self.was)
        left = (self.calls - trainer.policy.network_calls) // max(self.costs[-3:])
        trainer.config = dataclasses.replace(trainer.config, iterations=trainer.iteration + max(1, left))


@torch.no_grad()
def no_gradient(reward: Reward, images: Tensor, condition: Condition) -> Tensor:
    return reward(images, condition)


def tuned(
    arm: str, settings: dict[str, Any], reward: Any, steps: int, seed: int, calls: int
) -> tuple[NetworkModel, dict[str, Any]]:
    """The averaged policy's model, and what it cost."""
    given = {**COMMON, **ARMS[arm], **settings, "steps": steps, "seed": seed}
    if arm in HIDDEN:
        reward = FunctionReward(functools.partial(no_gradient, reward), "without its gradient")
    config = updated(Config(), usable(Config(), given), arm)
    trainer = Trainer(recipe.model(), reward, CLASSES, recipe.value_network, config)
    begin = time.process_time()
    if trainer.algorithm.critic or trainer.surrogate is not None:
        trainer.look_at_reference()
    hook = Spend(calls)
    training_loop(trainer, [hook])
    costs = {
        "iterations": trainer.iteration, "seconds": time.process_time() - begin,
        "network_calls": trainer.policy.network_calls, "value_calls": trainer.value.value.calls,
        "reward_calls": trainer.reward.calls,
    }  # fmt: skip
    ts = uniform(trainer.policy.schedule, steps)
    found = evaluate(
        trainer.averaged(), trainer.sde, ddim, ts, checked(reward), CLASSES, config.kl_weight, 500, SEEDS["test"]
    )
    costs |= {"reward": found["reward/heldout"], "kl": found["policy/kl"]}
    return trainer.averaged().model, costs  # type: ignore[return-value]


def split(data: str, out: Path) -> None:
    """The real pictures that training may see; `test_images` there are those of validation."""
    images, labels = (part.numpy() for part in load_pictures(data, "train"))
    seen, kept = slice(None, -VALIDATION), slice(-VALIDATION, None)
    np.savez(
        out, train_images=images[seen], train_labels=labels[seen], test_images=images[kept], test_labels=labels[kept]
    )


def more_pretraining(data: str, rate: float, seed: int, calls: int) -> tuple[NetworkModel, dict[str, Any]]:
    """The zero-reward rival: the same calls (a picture and its gradient is one) spent on the loss that made the model."""
    images, labels = load_pictures(data, "train")
    model, batch = recipe.model(), 128
    model.requires_grad_(True)
    x = images[:-VALIDATION, None].float().div(127.5).sub(1)
    begin = time.process_time()
    averaged = fit_denoiser(
        model.network, x, labels[:-VALIDATION].long(), RectifiedFlow(), steps=calls // batch, batch_size=batch,
        learning_rate=rate, average_halflife=100, seed=seed,
    )  # fmt: skip
    model.network.load_state_dict(averaged.state_dict())
    costs = {"iterations": calls // batch, "seconds": time.process_time() - begin, "network_calls": calls}
    return model, costs


def reward_of(arm: str, options: argparse.Namespace) -> Any:
    if not arm.endswith(DISTANCE):
        return load(str(options.real))
    found = load("energy_distance", reference=options.pictures, features="classifier", labels=True)
    found.take_model(recipe.model())  # the classes of an .npz are numbers
    return found


def one(arm: str, trial: int, steps: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm, and judge what it draws at its steps with each solver."""
    settings, final = trials(arm)[trial], seed != TUNING_SEED
    calls = options.calls if final else options.calls // 2
    if arm == "more pretraining":
        model, costs = more_pretraining(options.data, settings["learning_rate"], seed, calls)
    else:
        data = {"data": str(options.pictures)} if ARMS[arm]["algorithm"] == "dxmi" else {}
        model, costs = tuned(arm, {**settings, **data}, reward_of(arm, options), steps, seed, calls)
    found: dict[str, Any] = {}
    for split, judged in (
        splits(options.data).items() if final else [("validation", splits(options.data)["validation"])]
    ):
        for solver in JUDGED:
            images, labels = pictures(model, solver, uniform(model.schedule, steps), SEEDS[split])
            found.setdefault(split, {})[solver] = judged.look(images, labels, near=split == "test")
    return {
        "kind": "train", "arm": arm, "settings": settings, "steps": steps, "seed": seed,
        "calls": calls, **costs, **found,
    }  # fmt: skip


def trials(arm: str) -> list[dict[str, Any]]:
    """The settings that are tried: as many for every arm."""
    if arm == "more pretraining":
        return RATES
    if arm.endswith(DISTANCE):
        return OF_DISTANCE
    return {"dxmi": OF_DXMI, "ddpo": RATES}.get(ARMS[arm]["algorithm"], TRIALS)


def best_trial(lines: list[dict[str, Any]], arm: str, steps: int) -> int:
    """The setting nearest to the validation pictures with its best solver, on the seed of tuning."""
    mine = [x for x in lines if x["kind"] == "train" and (x["arm"], x["steps"], x["seed"]) == (arm, steps, TUNING_SEED)]
    mine = [x for x in mine if x["settings"] in trials(arm)]
    best = min(mine, key=lambda x: min(found["frechet"] for found in x["validation"].values()))
    return trials(arm).index(best["settings"])


def train(options: argparse.Namespace) -> None:
    lines = [line for line in resume_lines(options.out) if line["kind"] == "train"]
    done = [(x["arm"], x["settings"], x["steps"], x["seed"]) for x in lines]

    def run(arm: str, trial: int, seed: int) -> None:
        if (arm, trials(arm)[trial], options.steps, seed) not in done:
            try:
                lines.append(one(arm, trial, options.steps, seed, options))
            except ScoreactError as error:
                print(f"{arm}, trial {trial}, seed {seed}: {error}", file=sys.stderr, flush=True)
                return
            append_line(options.out, lines[-1])

    for arm in options.arms:
        for trial in range(len(trials(arm))):
            run(arm, trial, TUNING_SEED)
        for seed in range(options.seeds):
            run(arm, best_trial(lines, arm, options.steps), seed)


def grids(data: str, out: Path) -> None:
    """The best grid and noise level that a search finds on the validation pictures, for few steps."""
    done = {(line["solver"], line["steps"]) for line in resume_lines(out) if line["kind"] == "grid"}
    judges, model = splits(data), recipe.model()

    def measure(images: Tensor, condition: Condition) -> float:
        labels = torch.tensor([CLASSES.index(name) for name in condition.prompts])
        return judges["validation"].look(images, labels, near=False)["frechet"]

    for steps in SEARCHED:
        for solver in JUDGED:
            if (solver, steps) in done:
                continue
            begin = time.process_time()
            best = search_grid(model, CLASSES, measure, steps, solver, tries=TRIES, samples=SEARCH_SAMPLES).best
            level = 1.0 if best.noise_level is None else best.noise_level
            ts = grid_times(best.grid, model.schedule, steps)
            found = {
                split: judged.look(*pictures(model, solver, ts, SEEDS[split], level))
                for split, judged in judges.items()
            }
            seconds = time.process_time() - begin
            append_line(out, {"kind": "grid", "solver": solver, "grid": best.grid, "level": level, "steps": steps,
                              "calls": steps, "seconds": seconds, **found})  # fmt: skip


def cell(values: list[float], digits: int) -> str:
    """Mean with its 95 % interval where there are several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean, half = confidence_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


MEASURES = {"frechet": 1, "class_error": 3, "precision": 2, "recall": 2, "coverage": 2}


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown: the pretrained model at each number of steps, and the arms."""
    rows = [
        "| pretrained, steps | solver | grid | noise level | Frechet | class error | precision | recall | coverage |"
    ]
    rows.append("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for x in lines:
        if x["kind"] == "baseline" and x["steps"] == 0:
            measured = " | ".join(f"{x['test'][name]:.{digits}f}" for name, digits in MEASURES.items())
            rows.append(f"| | real pictures of the validation split | | | {measured} |")
    for steps in STEPS:
        named = [x for x in lines if x["kind"] == "baseline" and x["steps"] == steps]
        found = [x for x in lines if x["kind"] == "grid" and x["steps"] == steps]
        # the best on the validation pictures, of the named grids and of the searched ones
        best = [min(some, key=lambda x: x["validation"]["frechet"]) for some in (named, found) if some]
        for x in best:
            grid = x["grid"] if x["kind"] == "baseline" else f"searched, `{x['grid']}`"
            measured = " | ".join(f"{x['test'][name]:.{digits}f}" for name, digits in MEASURES.items())
            rows.append(f"| {steps} | {x['solver']} | {grid} | {x['level']:.2g} | {measured} |")
    trained = [
        x for x in lines if x["kind"] == "train" and x["seed"] != TUNING_SEED and x["settings"] in trials(x["arm"])
    ]
    for steps in sorted({x["steps"] for x in trained}):
        heads = [f"tuned at {steps} steps", "seeds", *(f"Frechet, {s}" for s in JUDGED), "solver"]
        heads += ["validation, half of the calls", "validation", "class error", "precision", "recall", "coverage"]
        heads += ["reward", "path KL", "iterations", "CPU s"]
        rows += ["", "| " + " | ".join(heads) + " |",
                 "| --- | ---: |" + " ---: |" * len(JUDGED) + " --- |" + " ---: |" * 10]  # fmt: skip
        for arm in dict.fromkeys(x["arm"] for x in trained):
            mine = [x for x in trained if (x["arm"], x["steps"]) == (arm, steps)]
            if not mine:
                continue
            chosen = trials(arm)[best_trial(lines, arm, steps)]  # others may have been run before more were tried
            mine = [x for x in mine if x["settings"] == chosen]
            solver = min(JUDGED, key=lambda name: sum(x["validation"][name]["frechet"] for x in mine))
            cells = [cell([x["test"][name]["frechet"] for x in mine], 1) for name in JUDGED] + [solver]
            [half] = [
                x["validation"][solver]["frechet"] for x in lines
                if (x.get("arm"), x["steps"], x.get("seed"), x.get("settings")) == (arm, steps, TUNING_SEED, chosen)
            ]  # fmt: skip
            cells += [f"{half:.1f}", cell([x["validation"][solver]["frechet"] for x in mine], 1)]
            cells += [cell([x["test"][solver][name] for x in mine], MEASURES[name]) for name in list(MEASURES)[1:]]
            cells += [cell([x[name] for x in mine], 2) if name in mine[0] else "" for name in ("reward", "kl")]
            cells += [f"{statistics.mean(x[name] for x in mine):.0f}" for name in ("iterations", "seconds")]
            rows.append(f"| {arm} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["baselines", "grids", "split", "train", "table"])
    parser.add_argument("--data", default=None, help="Fashion-MNIST as .npz or a folder; else it is downloaded")
    parser.add_argument("--real", type=Path, help="folder of the discriminator's reward")
    parser.add_argument("--pictures", type=Path, help="what `split` writes")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--calls", type=int, default=CALLS, help="network calls of a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=[*ARMS, "more pretraining"])
    parser.add_argument("--out", type=Path, default=Path("few_steps.jsonl"), help="what is in it is not run again")
    parser.add_argument("--write", type=Path, help="put the tables between the marks of this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "baselines":
        baselines(options.data, options.out)
    elif options.part == "grids":
        grids(options.data, options.out)
    elif options.part == "split":
        split(options.data, options.pictures)
    elif options.part == "train":
        train(options)
    else:
        shown = tables(resume_lines(options.out)) + "\n"
        print(shown, end="")
        if options.write:
            put(shown, options.write, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
