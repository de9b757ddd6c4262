"""A reward that is hacked, with the guard off and on: what the reward says, and what it does not know.

    python benchmarks/hacking.py --out hacking.jsonl          # about two minutes a line of one core

Two rewards on the embedded Fashion-MNIST model, each with a low kl_weight, so that nothing but the guard holds the policy:
`classifier`, the log-probability of the class by the training-side classifier, and `shortcut`, the same plus a planted
bonus for a bright corner, which no picture of clothing needs. The judge is another classifier that no reward ever saw.
Each line of the output is one reward with one guard: held-out evaluations of the pretrained model, of the last weights
and of those in best/. Resumable: lines already in the file are not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from scoreact.api.start import finetune
from scoreact.recipes.base import Problem, recipes
from scoreact.rewards.base import FunctionReward
from scoreact.training.config import updated, usable
from scoreact.types import Condition

BONUS, CORNER = 10.0, 8  # reward of a white corner, and its side in pixels (in the model's pictures: 0.06 +- 0.07)
# the rule that follows the reward's gradient finds a hack soonest
SETTINGS: dict[str, Any] = {
    "algorithm": "draft", "kl_weight": 0.005, "iterations": 50, "batch_size": 64, "minibatch_size": 64, "epochs": 1,
    "learning_rate": 3e-4, "warmup": 0, "decay_from": 1.0, "reference_batches": 4, "evaluate_every": 5,
    "heldout_samples": 200, "kl_limit": 1000.0,
    "value_loss": "soft",  # a reward with a bonus is no log-probability
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "off": {"guard": "off"},
    "stop": {"guard": "stop"},
    "target_kl 5": {"guard": "stop", "target_kl": 5.0},
}
COLUMNS = {
    "reward/heldout": "reward",
    "judge/class_error": "judge's error",
    "judge/frechet": "Frechet to real",
    "policy/kl": "path KL",
    "sample/diversity": "diversity",
    "drift/frechet": "Frechet to pretrained",
}


def with_shortcut(problem: Problem) -> Problem:
    """The classifier's reward plus BONUS times the mean of the top left corner."""

    def reward(images: Tensor, condition: Condition) -> Tensor:
        return problem.reward(images, condition) + BONUS * images[:, :, :CORNER, :CORNER].flatten(1).mean(1)

    return dataclasses.replace(problem, reward=FunctionReward(reward, "classifier_with_shortcut", True))


def one(name: str, arm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A run, and its evaluations at the start, at the end and where best/ is from."""
    recipe = recipes()["classifier"]
    config = updated(recipe.config, usable(recipe.config, {**SETTINGS, **ARMS[arm], **settings}))
    problem = recipe.build()
    if name == "shortcut":
        problem = with_shortcut(problem)
    begin = time.perf_counter()
    result = finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, config=config,
        judge=problem.judge, features=problem.features,
    )  # fmt: skip
    looks = {line["iteration"]: line for line in result.history if line.get("evaluation")}
    last = max(looks)
    return {
        "reward": name, "guard": arm, "seconds": time.perf_counter() - begin, "stopped": result.stopped,
        "said": [f"{line['iteration']}: {line['text']}" for line in result.history if line.get("guard")],
        "rows": {"pretrained": looks[0], "last": looks[last], "best": looks[result.best_iteration or 0]},
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a reward and a guard, then the pretrained model, the last weights and those kept as the best."""
    head = ["reward", "guard", "weights", "iteration", *COLUMNS.values()]
    rows = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    shown = set()
    for line in sorted(lines, key=lambda line: (line["reward"], list(ARMS).index(line["guard"]))):
        for which, row in line["rows"].items():
            if which == "pretrained" and line["reward"] in shown:
                continue
            shown.add(line["reward"])
            cells = [line["reward"], "" if which == "pretrained" else line["guard"], which, str(row["iteration"])]
            if which == "last" and line["stopped"]:
                cells[3] += " (stopped)"
            cells += [f"{row[key]:.3g}" if key in row else "" for key in COLUMNS]
            rows.append(f"| {' | '.join(cells)} |")
    said = [f"- {line['reward']}, {line['guard']}, iteration {text}" for line in lines for text in line["said"]]
    return "\n".join([*rows, "", *said])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=["classifier", "shortcut"])
    parser.add_argument("--guards", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as JSON")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("hacking.jsonl"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = {name: json.loads(value) for name, _, value in (word.partition("=") for word in options.set)}
    lines = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    for name in options.rewards:
        for arm in options.guards:
            if not any((line["reward"], line["guard"]) == (name, arm) for line in lines):
                lines.append(one(name, arm, settings))
                with options.out.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(f"{name}, guard {arm}: {lines[-1]['seconds']:.0f} s", flush=True)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
