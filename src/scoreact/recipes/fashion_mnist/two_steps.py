"""`two-steps`: the shipped Fashion-MNIST model as a sampler of two steps, tuned so that its batches are like real ones.

The reward is minus the energy distance of a batch to 2,000 real training pictures, each sample's class against its own, in the
features of the training-side classifier; they ship. The judge is the other network, which the training has not seen.
"""

from __future__ import annotations

from typing import Any

import torch

from ...rewards.batch import SeenBy
from ...rewards.two_sample import Reference, TwoSampleReward
from ...training.config import Config
from ..base import Problem, Recipe
from . import data
from .four_steps import in_few_steps
from .recipe import OPTIONS


def real_distance() -> TwoSampleReward:
    """Minus the energy distance to the shipped examples, of samples whose prompts are the classes."""
    found, rows = data.example_features()
    real = Reference(found, rows, data.CLASSES)
    return TwoSampleReward("energy_distance", real, SeenBy("classifier"), torch.cdist)


def build(guidance_scale: float = 1.0, weights: str | None = None) -> Problem:
    """The distance to the shipped examples as the reward."""
    return in_few_steps(real_distance(), "in two steps; batches are to be like real ones", guidance_scale, weights)


SHARED: dict[str, Any] = {
    "steps": 2,
    "batch_size": 64,
    "minibatch_size": 64,
    "reference_batches": 8,
    "warmup": 1,
    "epochs": 1,
    "decay_from": 0.5,
    "average": 0.8,
    "heldout_samples": 300,
    "evaluate_every": 75,
    "checkpoint_every": 50,
}
OWN = Config(algorithm="draft", kl_weight=4e-3, iterations=150, learning_rate=1.5e-4, **SHARED)
OTHERS = Config(
    algorithm="ctrl", kl_weight=4e-3, iterations=60, learning_rate=1.5e-4, max_kl=0.5, value="linear", **SHARED
)

TWO_STEPS = Recipe(
    "two-steps",
    "Fashion-MNIST in two steps: batches of samples against batches of real pictures",
    build,
    OWN,
    OPTIONS,
    other_rules=OTHERS,
)
