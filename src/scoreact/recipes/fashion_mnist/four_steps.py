"""`four-steps`: the shipped Fashion-MNIST model as a sampler of four steps, tuned towards the data themselves.

The reward is the log-ratio of real pictures to the model's own in four steps, on features of the training-side classifier; it
ships as a folder, made by

    scoreact reward discriminate plain --data FASHION_MNIST --features classifier --steps 4 --ridge 0.1 --out FOLDER

The judge is the other network, which neither the reward nor the training has seen.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from torch import Tensor

from ...evaluation.evaluate import Judge
from ...evaluation.metrics import neighbours
from ...rewards.base import Reward
from ...rewards.learned import LearnedReward, open_learned
from ...training.config import Config
from ...types import Condition, Metrics
from ..base import Problem, Recipe
from . import data
from .recipe import OPTIONS, features, model, property_judge, value_network

REWARD = "fashion_mnist_real"  # a folder in assets/


def real_reward() -> LearnedReward:
    """The shipped log-ratio of real pictures to the pretrained model's in four steps."""
    with resources.as_file(resources.files("scoreact") / "assets" / REWARD) as folder:
        found = open_learned(folder)
    assert isinstance(found, LearnedReward)
    return found


def real_judge() -> Judge:
    """Frechet distance to real test pictures, class error, precision, recall and coverage among as many real pictures.

    Precision, recall and coverage depend on the number of pictures: compare at equal numbers, up to 2,000.
    """
    moments, real = property_judge("all"), data.neighbour_features()

    def look(images: Tensor, condition: Condition) -> Metrics:
        own = features(images)
        found = neighbours(real[: len(own)], own[: len(real)])
        return {
            **moments(images, condition),
            "judge/precision": found.precision,
            "judge/recall": found.recall,
            "judge/coverage": found.coverage,
        }

    return look


def in_few_steps(reward: Reward, words: str, guidance_scale: float, weights: str | None) -> Problem:
    """The shipped model in few steps, a reward made of real pictures, and the judge of these. words: on the report."""
    return Problem(
        model=model(guidance_scale, weights),
        reward=reward,
        prompts=data.CLASSES,
        value_network=value_network,
        judge=real_judge(),
        features=features,
        labels={"problem": f"Fashion-MNIST, 28x28, ten classes, {words}"},
    )


def build(guidance_scale: float = 1.0, weights: str | None = None) -> Problem:
    """The shipped log-ratio as the reward."""
    return in_few_steps(real_reward(), "in four steps; the data are the reward", guidance_scale, weights)


# At a kl_weight below 1 the ratio is followed further than it says: its head is held back by the ridge.
SHARED: dict[str, Any] = {
    "steps": 4,
    "batch_size": 64,
    "minibatch_size": 64,
    "reference_batches": 8,
    "warmup": 1,
    "epochs": 1,
    "decay_from": 0.5,
    "max_kl": 0.5,
    "average": 0.8,
    "value": "residual",
    "value_loss": "soft",
    "heldout_samples": 300,
    "evaluate_every": 60,
    "checkpoint_every": 30,
}
OWN = Config(algorithm="ctrl_pathwise", kl_weight=0.1, iterations=30, learning_rate=1.5e-4, **SHARED)
OTHERS = Config(algorithm="ctrl", kl_weight=0.3, iterations=60, learning_rate=2e-4, **SHARED)

FOUR_STEPS = Recipe(
    "four-steps",
    "Fashion-MNIST in four steps, nearer to real pictures than in fifty: the data are the reward",
    build,
    OWN,
    OPTIONS,
    other_rules=OTHERS,
)
