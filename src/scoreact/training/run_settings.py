"""The settings of the run, of the policy's update, and of what watches them. Each record is a group of `train --help`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..support.seeds import LARGEST
from ..support.settings import Above, setting


def _rules() -> Iterable[str]:
    from ..algorithms.registry import rules

    return rules()


FOLLOWS = {"differentiates_reward": (True,)}  # used by rules that follow the reward's gradient


@dataclass(frozen=True)
class RunSettings:
    """What is learned, how long, and at which price of path KL."""

    heading: ClassVar[str] = "the run"

    algorithm: str = setting(
        "ctrl", "Update rule: its name, or a class of your own as file.py:Class", known=_rules, own=True
    )
    rule: dict[str, Any] = field(default_factory=dict)  # the rule's own settings; complete once checked
    seed: int = setting(0, "Seed of every random number of the run", 0, LARGEST)
    iterations: int = setting(40, "Number of iterations; each draws one rollout and updates the policy", 1)
    batch_size: int = setting(512, "Number of paths, and so of samples, in a rollout", 2)
    group_size: int = setting(
        1, "Number of samples of a prompt in a batch at least; batch_size must be a multiple of it in each process", 1
    )
    reference_batches: int = setting(
        4, "Number of rollouts of the pretrained model before training; they give J_ref and J* and teach the value", 1
    )
    kl_weight: float = setting(
        1.0, "Price of path KL: how much reward one nat costs (beta in the papers)", 0, above=True
    )
    reward_failures: int = setting(
        0,
        "Number of samples for which the reward may fail in a run, asked again; 0: the first failure ends it",
        0,
    )
    reward_gradient: Literal["exact", "surrogate"] = setting(
        "exact",
        "Whose gradient the rule follows: the reward's own, or its surrogate's, refitted after every rollout",
        needs=FOLLOWS,
    )


ADAM = {"minimiser": ("adam",)}  # natural gradients are computed without these


@dataclass(frozen=True)
class UpdateSettings:
    """How an iteration changes the policy's weights."""

    heading: ClassVar[str] = "policy update"

    learning_rate: float = setting(2e-3, "Learning rate of the policy (Adam)", 0, above=True, needs=ADAM)
    epochs: int = setting(2, "Number of sweeps over a rollout's rows in each iteration", 1, needs=ADAM)
    minibatch_size: int = setting(
        2048, "Number of rows (steps of paths, for most rules) in one forward and backward pass", 1, needs=ADAM
    )
    accumulate: int = setting(1, "Number of minibatches that make one optimiser step", 1, needs=ADAM)
    warmup: int = setting(3, "Number of iterations over which the learning rates rise to their full size", 0)
    decay_from: float = setting(
        0.5, "Share of the run after which the learning rates fall linearly, to 0 at its end", 0, 1
    )
    rate_decay: float = setting(
        1.0,
        "Factor of the learning rates from one iteration to the next, beside the fall of decay_from",
        0,
        1,
        above=True,
    )
    max_kl: float = setting(
        0.5,
        "Path KL (nats) by which one iteration may change the policy at most; a longer step is shortened",
        0,
        above=True,
        needs={"transitions_only": (True,), "kl_states": Above(0)},
    )
    kl_states: int = setting(
        512,
        "Number of states at which the path KL of an iteration's step is measured; 0: the step has no bound",
        0,
        needs={**ADAM, "transitions_only": (True,)},
    )
    max_gradient_norm: float = setting(1e6, "Norm to which a longer gradient is shortened", 0, above=True, needs=ADAM)
    average: float = setting(
        0.9, "Decay per iteration of the averaged weights, which are those that are evaluated and saved", 0, 0.9999
    )


WATCHED = {"guard": ("warn", "stop")}


@dataclass(frozen=True)
class WatchSettings:
    """What is measured on the way, when the run ends early, and where it computes."""

    heading: ClassVar[str] = "evaluation and limits"

    heldout_samples: int = setting(512, "Number of samples in an evaluation, from noise that training never sees", 2)
    heldout_prompts: int = setting(
        -1,
        "Number of prompts that evaluations alone see; -1: a tenth where there are 100 or more, 200 at most",
        -1,
    )
    evaluate_every: int = setting(10, "Number of iterations between two evaluations", 1)
    checkpoint_every: int = setting(10, "Number of iterations between two checkpoints", 1)
    checkpoint_minutes: float = setting(
        5.0,
        "Minutes after which the end of an iteration makes a checkpoint, whatever their number; 0: by number alone",
        0,
    )
    kl_limit: float = setting(50.0, "Path KL (nats) of a rollout above which the run stops as diverged", 0, above=True)
    patience: int = setting(
        4,
        "Number of evaluations in a row with J falling and the training reward rising before the run stops",
        1,
        needs=WATCHED,
    )
    guard: Literal["off", "warn", "stop"] = setting(
        "warn", "What follows when J, path KL, diversity or the judge look wrong: nothing, a warning, or the run's end"
    )
    least_diversity: float = setting(
        0.5, "Share of the pretrained model's diversity below which the guard speaks", 0, 1, needs=WATCHED
    )
    target_kl: float = setting(
        0.0, "Path KL (nats) towards which the price of KL in training is steered; 0: the price stays kl_weight", 0
    )
    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:N or mps")
