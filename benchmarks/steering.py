"""What steering at sampling time buys: reward against path KL and against calls, beside the trained policy itself.

    python benchmarks/steering.py gaussian                    # seconds: the run is trained first
    python benchmarks/steering.py bright --run runs/bright-001  # a finished run, with its value network

Path KL is measured where the steered model is a policy (value, interpolate), is log N - (N - 1) / N for best of N of the
pretrained model, and is not defined for particles. Calls are a sample: through the networks (the value's own look at the
reference included), the value, and the reward. J = reward - kl_weight KL; J* is the run's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from scoreact.api.start import train_source
from scoreact.control.policy import Policy
from scoreact.dynamics.solvers import SOLVERS
from scoreact.evaluation.evaluate import evaluate
from scoreact.evaluation.optimum import mean_and_error
from scoreact.recipes.base import recipes
from scoreact.rewards import checked
from scoreact.runs.source import Source, build_policy, load_value, source_of_run
from scoreact.sampling.draw import balanced
from scoreact.sampling.particles import best_of_kl
from scoreact.sampling.steering import Steering
from scoreact.support.files import read_lines
from scoreact.training.config import updated

STRENGTHS = {"interpolate": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), "value": (0.25, 0.5, 1.0, 1.5, 2.0)}
PARTICLES = (2, 4, 8, 16, 32)


def train(name: str, folder: Path, settings: dict[str, Any]) -> None:
    """The recipe's run, as `scoreact train` would leave it."""
    recipe = recipes()[name]
    if not recipe.config.uses("value"):  # `plain` fits none, and half of the ways to steer need one
        settings = {"algorithm": "ctrl_pathwise", **settings}
    source = Source(recipe, dict(recipe.options), updated(recipe.config_for(settings), settings), folder=folder)
    train_source(source, f"python benchmarks/steering.py --recipe {name}")


def rows(folder: Path, samples: int, seed: int, particles: list[int], chunk: int) -> list[list[str]]:
    source = source_of_run(folder)
    config = source.config
    policy, problem, weights = build_policy(source, "final")
    reward = checked(problem.reward)
    path = folder / ("best" if weights == "best" else "") / "value.safetensors"
    value, kl_weight = load_value(path, problem.value_network, config, policy, reward)
    sde, device = config.sde(policy.schedule), next(iter(policy.parameters())).device
    ts = config.times(policy.schedule)
    names = balanced(problem.prompts, samples, torch.Generator().manual_seed(seed))

    def line(method: str, base: str, strength: float, count: int, value: Any) -> list[str]:
        steering = Steering(
            method, policy, reward, sde, config.solver, kl_weight, strength, count, base, value, sde, config.act_until
        )
        generator, size = torch.Generator(device).manual_seed(seed), max(1, chunk // count)
        found = [steering(names[i : i + size], ts, generator) for i in range(0, samples, size)]
        mean, error = mean_and_error(torch.cat([part.rewards for part in found]).cpu())
        kl = None
        if method in STRENGTHS:
            steered = Policy(steering.model(), policy.reference)
            kl = evaluate(
                steered, sde, SOLVERS[config.solver], ts, reward, problem.prompts, config.kl_weight, samples, seed,
                device=device,
            )["policy/kl"]  # fmt: skip
        elif method == "best_of" and base == "reference":
            kl = best_of_kl(count)
        calls = [sum(getattr(part.calls, kind) for part in found) / samples for kind in ("network", "value", "reward")]
        cells = [method, base if method != "interpolate" else "both", f"{strength if method in STRENGTHS else count:g}"]
        cells += [f"{mean:.3f} ± {1.96 * error:.2g}", "" if kl is None else f"{kl:.3g}"]
        cells += ["" if kl is None else f"{mean - config.kl_weight * kl:.3f}", *(f"{c:g}" for c in calls)]
        if method == "smc" and value is None:
            cells[0] += ", by R(x_data_hat)"
        print(f"| {' | '.join(cells)} |", flush=True)
        return cells

    head = ["method", "of", "strength or particles", "reward", "KL", "J", "network", "value", "reward calls"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    table = [line("interpolate", "policy", s, 1, None) for s in STRENGTHS["interpolate"]]
    for base in ("reference", "policy"):
        table += [line("value", base, s, 1, value) for s in STRENGTHS["value"]]
        table += [line("best_of", base, 1.0, n, None) for n in particles]
        table += [line("smc", base, 1.0, n, value) for n in particles]
    return table + [line("smc", "reference", 1.0, n, None) for n in particles]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(recipes()), help="trained first, without --run")
    parser.add_argument("--run", type=Path, help="a finished run of it")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--particles", type=int, nargs="+", default=list(PARTICLES))
    parser.add_argument("--chunk", type=int, default=256, help="states at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, help="of the training, other than the recipe's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.run
        if folder is None:
            folder = Path(place) / "run"
            train(options.recipe, folder, {"iterations": options.iterations} if options.iterations else {})
        reference = next(row for row in read_lines(folder / "metrics.jsonl") if row.get("reference"))
        j_star = reference.get("objective/J_star_exact", reference["objective/J_star"])
        print(f"{options.recipe}: J_ref {reference['objective/J_ref']:.3f}, J* {j_star:.3f}\n")
        rows(folder, options.samples, options.seed, options.particles, options.chunk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
