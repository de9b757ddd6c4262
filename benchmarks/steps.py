"""Does the number of training steps matter? Trained at 5, 10, 20, 50 steps with one continuous-time setting, measured at all.

    python benchmarks/steps.py --jobs 2 --out steps.jsonl      # resumable

The two-dimensional mixture (recipe `gaussian`, exact Gaussian transitions, beta 0.5). A rule's settings are the same at every
step count: as many rollouts, paths, reward calls, sweeps and optimiser steps (a minibatch holds as many paths' worth of
transitions), so that only the grid differs; network calls grow with the steps. Each trained policy is then measured on the
grids of 5, 10, 20 and 50 steps: share of J* - J_ref that it recovers there, J_ref and J* = beta log E exp(R / beta) from
20,000 of that grid's own reference samples, which no policy can exceed there. Mean and 95 % interval over seeds. The last
row is the continuous-time optimum itself, the score of the tilted mixture: what a coarse grid makes of a policy that is
right between its times.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from scoreact.api.start import finetune
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.evaluation.evaluate import evaluate
from scoreact.evaluation.metrics import confidence_interval
from scoreact.evaluation.optimum import estimate_optimum, recovered
from scoreact.recipes.base import Problem, recipes
from scoreact.recipes.gaussian import mixture, quadratic_reward
from scoreact.support.files import append_line, resume_lines
from scoreact.support.workers import Workers
from scoreact.training.config import Config, updated, usable

RULES = ("ctrl", "ctrl_pathwise", "ctrl_trpo", "dpok", "flow_grpo", "ddpo")
STEPS = (5, 10, 20, 50)
SAMPLES = 20_000
EVALUATION_SEED = 88_000_001
UPDATES = 4  # optimiser steps a sweep, at every step count
COMMON: dict[str, Any] = {
    "solver": "ddim", "kl_weight": 0.5, "iterations": 40, "batch_size": 256, "heldout_samples": 2, "evaluate_every": 10_000,
    "device": "cpu",
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "dpok": {"learning_rate": 4e-3, "later_costs": True},
    "flow_grpo": {"noise": "noise_level", "noise_scale": 1.0, "advantage_scale": "none", "learning_rate": 4e-3, "epochs": 3},
}  # fmt: skip


def build(seed: int) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipes()["gaussian"].build()


def references() -> dict[int, dict[str, Any]]:
    """J_ref and J* of each grid, and the rewards' mean on the evaluation's own noise."""
    problem, found = build(0), {}
    policy = Policy(problem.model, problem.model)
    for steps in STEPS:
        sde, ts = SDE(policy.schedule, noise_level(1.0)), uniform(policy.schedule, steps)
        generator = torch.Generator().manual_seed(EVALUATION_SEED + 1)
        condition = policy.condition([""] * SAMPLES)
        path = rollout(policy, sde, ddim, ts, condition, generator, reference_only=True)
        found[steps] = estimate_optimum(problem.reward(path.xs[-1], condition), condition, COMMON["kl_weight"])
        found[steps]["start"] = measure(policy, problem, steps)["objective/J"]
    return found


def measure(policy: Policy, problem: Problem, steps: int) -> dict[str, Any]:
    sde, ts = SDE(policy.schedule, noise_level(1.0)), uniform(policy.schedule, steps)
    return evaluate(
        policy, sde, ddim, ts, problem.reward, problem.prompts, COMMON["kl_weight"], SAMPLES, EVALUATION_SEED
    )


def run(rule: str, steps: int, seed: int) -> dict[str, Any]:
    """Train at `steps`; J on every grid."""
    problem = build(seed)
    size = COMMON["batch_size"] * steps // UPDATES
    given = {
        **COMMON,
        **SETTINGS.get(rule, {}),
        "algorithm": rule,
        "steps": steps,
        "seed": seed,
        "minibatch_size": size,
    }
    config = updated(Config(), usable(Config(), given))
    result = finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, config=config
    )
    last = [line for line in result.history if "cost/reward_calls" in line][-1]
    found = {str(n): measure(result.policy, problem, n) for n in STEPS}
    return {
        "rule": rule, "steps": steps, "seed": seed,
        "J": {n: m["objective/J"] for n, m in found.items()}, "kl": {n: m["policy/kl"] for n, m in found.items()},
        "reward_calls": last["cost/reward_calls"], "network_calls": last["cost/network_calls"],
    }  # fmt: skip


def exact(grids: dict[int, dict[str, Any]]) -> list[float]:
    """The share that the score of the continuous-time optimum recovers on each grid."""
    base, reward = mixture(2, 4, 0), quadratic_reward(2, 0)  # those of the recipe
    tilted, _ = base.tilted(reward.linear, reward.quadratic, COMMON["kl_weight"], reward.constant)
    found = {n: measure(Policy(tilted, base), build(0), n)["objective/J"] for n in STEPS}
    return [recovered(found[n] - grids[n]["start"], grids[n]) for n in STEPS]


def table(lines: list[dict[str, Any]], grids: dict[int, dict[str, Any]]) -> str:
    rows = ["| rule | trained at | reward calls | " + " | ".join(f"at {n} steps" for n in STEPS) + " |"]
    rows.append("| --- | ---: | ---: |" + " ---: |" * len(STEPS))
    for rule in dict.fromkeys(line["rule"] for line in lines):
        for steps in STEPS:
            mine = [line for line in lines if (line["rule"], line["steps"]) == (rule, steps)]
            if not mine:
                continue
            cells = []
            for n in STEPS:
                shares = [recovered(line["J"][str(n)] - grids[n]["start"], grids[n]) for line in mine]
                mean, half = confidence_interval(shares)
                cells.append(f"{100 * mean:.0f} ± {100 * half:.0f} %")
            rows.append(f"| `{rule}` | {steps} | {mine[0]['reward_calls']} | " + " | ".join(cells) + " |")
    rows.append(
        "| the exact optimum | in continuous time | | " + " | ".join(f"{100 * e:.0f} %" for e in exact(grids)) + " |"
    )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("steps.jsonl"), help="finished runs in it are not repeated")
    options = parser.parse_args()
    lines = resume_lines(options.out)
    done = {(line["rule"], line["steps"], line["seed"]) for line in lines}
    tasks = [(rule, n, seed) for seed in range(options.seeds) for rule in options.rules for n in STEPS]
    todo = [task for task in tasks if task not in done]
    with Workers(options.jobs) as workers:
        for index, line in workers.map(run, todo):
            if "failed" in line:
                print(f"{todo[index]}: {line['failed']}", file=sys.stderr, flush=True)
                continue
            append_line(options.out, line)
            lines.append(line)
            print(f"{len(lines)}/{len(tasks)} {todo[index]}: J {line['J']}", file=sys.stderr, flush=True)
    print(table([line for line in lines if line["rule"] in options.rules], references()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
