"""What a value is worth after a given number of the pretrained model's paths: a network fitted by descent, or a linear one.

    python benchmarks/value_fit.py                          # fashion-plain: 20 minutes of one core
    python benchmarks/value_fit.py --problem fashion-jpeg --paths 128 512

The worth is the gain in J to first order of following the value's force S grad V from the pretrained model, at the best length:
D^2 / (4 beta K), with D = E[(R - V) sum_k w_k z_k] the derivative of the reward by the length, measured on held-out paths by
their own noise z (so V's own opinion does not enter), and K the path KL of w = S grad V. Also what V explains of the returns
there. Errors are two standard errors over the held-out paths, which are the same for all.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from scoreact.arena.problems import Job, known_problem
from scoreact.control.advantage import explained_variance
from scoreact.control.transitions import Paths
from scoreact.control.value import ValueNetwork
from scoreact.dynamics import girsanov
from scoreact.models.network import NetworkModel
from scoreact.models.value_networks import FeatureValue
from scoreact.training.trainer import Trainer

ON_FEATURES = "a head on the model's features, 400 steps of 256 states"  # as Explicit Critic Guidance has it
FITS = {  # name -> settings
    "linear": {"value": "linear"},
    "network, 120 steps of 32 states": {
        "value": "network",
        "value_inputs": "x_data_hat",
        "value_first_steps": 120,
        "value_batch_size": 32,
    },
    "network, 400 steps of 256 states": {
        "value": "network",
        "value_inputs": "x_data_hat",
        "value_first_steps": 400,
        "value_batch_size": 256,
    },
    ON_FEATURES: {"value": "network", "value_first_steps": 400, "value_batch_size": 256},
}
BATCH = 64


def trainer_of(problem: str, settings: dict[str, object], batches: int, on_features: bool = False) -> Trainer:
    where = known_problem(problem)
    changes = {**settings, "batch_size": BATCH, "reference_batches": batches}
    job = Job("ctrl_pathwise", where, 0, where.config({}).kl_weight, 10**9, 10**9, settings=changes)
    built = where.build(0)
    network = functools.partial(head, built.model, built.prompts) if on_features else built.value_network
    return Trainer(built.model, built.reward, built.prompts, network, job.config())


def head(model: NetworkModel, prompts: Sequence[str]) -> FeatureValue:
    """A value network on what the linear value sees too."""
    with torch.no_grad():
        features, _ = model.features(torch.ones(1), torch.zeros(1, *model.shape), model.condition(prompts[:1]))
    return FeatureValue(features.shape[1])


def worth(value: ValueNetwork, held_out: list[Paths], beta: float) -> tuple[float, float, float]:
    """The gain, its error, and the share of the returns' variance that V explains."""
    pulls, costs, values, returns = [], [], [], []
    for paths in held_out:
        path, rewards = paths.trajectory, paths.rewards
        pull, cost = torch.zeros(2, len(rewards))
        for k in paths.acting.tolist():
            now, gradient = value.gradient(path.ts[k].expand(len(rewards)), path.xs[k], path.condition)
            force = float(path.std[k]) * gradient
            pull += (force * path.noise[k]).flatten(1).sum(1) * (rewards - now)
            cost += girsanov.kl(force)
            values.append(now)
            returns.append(rewards)
        pulls.append(pull)
        costs.append(cost)
    pull, cost = torch.cat(pulls), torch.cat(costs)
    slope, spent = float(pull.mean()), float(cost.mean())
    error = 2 * float(pull.std()) / len(pull) ** 0.5
    gain = slope * abs(slope) / (4 * beta * spent)
    return gain, 2 * abs(gain / slope) * error, explained_variance(torch.cat(values), torch.cat(returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", default="fashion-plain")
    parser.add_argument("--paths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--held-out", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    other = trainer_of(options.problem, FITS["linear"], 1)
    other.generator.manual_seed(1)
    held_out = [other.rollout() for _ in range(options.held_out // BATCH)]
    beta = other.config.kl_weight
    print(
        "| fit | paths | network calls | value calls | gain in J | explained |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for count in options.paths:
        for name, settings in FITS.items():
            trainer = trainer_of(options.problem, settings, count // BATCH, name == ON_FEATURES)
            begin = trainer.value.value.calls
            trainer.look_at_reference()
            trainer.value.fit(trainer.generator)
            made, fitted = trainer.policy.network_calls, trainer.value.value.calls - begin
            gain, error, explained = worth(trainer.value.value, held_out, beta)
            print(
                f"| {name} | {count} | {made:,} | {fitted:,} | {gain:.3g} ± {error:.2g} | {explained:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()
