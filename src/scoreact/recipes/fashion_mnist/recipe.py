"""`plain` (the main job), `busy`, `bright`, `classifier`: 28x28 Fashion-MNIST drawn by class name, tuned on a laptop's CPU.

The model, the judge and the statistics of real pictures ship with the package; nothing is downloaded. For the first three
the reward is log p(property | picture) and kl_weight 1, so that the optimum is the model's own posterior and real pictures
with the property show what it should look like.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from torch import Tensor, nn

from ...dynamics import prediction
from ...dynamics.schedule import RectifiedFlow
from ...evaluation.evaluate import Judge
from ...evaluation.metrics import feature_statistics, frechet_distance
from ...models.network import NetworkModel
from ...models.unet import UNet
from ...models.value_networks import Encoder
from ...rewards.base import FunctionReward, Reward
from ...rewards.image import ClassifierAlignment, brightness, class_by_prompt, jpeg_kilobytes
from ...support.devices import bfloat16_pays
from ...support.files import read_tensors
from ...training.config import Config, updated
from ...types import Condition, Metrics
from ..base import Problem, Recipe
from . import classifiers as judges
from . import data

WIDTHS = (32, 64, 96)
CHECKPOINT = "fashion_mnist_flow.safetensors"


def model(guidance_scale: float = 1.0, weights: str | None = None) -> NetworkModel:
    """The pretrained class-conditional rectified flow. weights: another safetensors file of the same network."""
    network = UNet(widths=WIDTHS)
    if weights is None:
        with resources.as_file(resources.files("scoreact") / "assets" / CHECKPOINT) as path:
            tensors = read_tensors(path)
    else:
        from pathlib import Path

        tensors = read_tensors(Path(weights))
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return NetworkModel(
        network, RectifiedFlow(), prediction.velocity, (1, 28, 28), data.CLASSES,
        guidance_scale=guidance_scale, low=-1, high=1, bfloat16=bfloat16_pays(),
    )  # fmt: skip


def bytes_of(images: Tensor) -> Tensor:
    """JPEG size at quality 75 in bytes, [B]."""
    return (1000 * jpeg_kilobytes(images, quality=75)).round()


MEASURES = {"jpeg_bytes": bytes_of, "brightness": brightness}


def property_reward(name: str) -> Reward:
    """log p(property | picture): a logistic around the class's threshold; a black box without gradient."""
    real = data.reference()[name]
    measure = MEASURES[real.measure]
    class_of = class_by_prompt(data.CLASSES)
    return FunctionReward(lambda images, c: real.log_prob(measure(images), class_of(c).cpu()), name)


def property_judge(name: str) -> Judge:
    """Share with the property, Frechet distance to real test pictures with it, class error, diversity within a class.

    All in the features of a classifier that no reward and no training ever used.
    """
    real = data.reference()[name]
    judge = judges.load_classifier()
    class_of = class_by_prompt(data.CLASSES)

    def look(images: Tensor, condition: Condition) -> Metrics:
        labels = class_of(condition).cpu()
        features = judge.features(images.cpu())
        mean, covariance = feature_statistics(features)
        metrics: Metrics = {
            "judge/frechet": float(frechet_distance(mean, covariance, real.mean, real.covariance)),
            "judge/class_error": float((judge.log_probs(images.cpu()).argmax(1) != labels).float().mean()),
        }
        if name != "all":
            holds = real.holds(MEASURES[real.measure](images.cpu()), labels)
            metrics = {"judge/property": float(holds.float().mean()), **metrics}
        return metrics

    return look


def features(images: Tensor) -> Tensor:
    """The judge's features, [B, F]: where diversity is measured."""
    return judges.load_classifier().features(images.cpu())


def value_network() -> nn.Module:
    return Encoder(classes=len(data.CLASSES))


def problem(name: str, guidance_scale: float = 1.0, weights: str | None = None) -> Problem:
    """name: plain, busy, bright (properties) or classifier (alignment with the class by the training-side classifier)."""
    if name == "classifier":
        reward: Reward = ClassifierAlignment(judges.load_classifier("classifier"), class_by_prompt(data.CLASSES))
        judge = property_judge("all")
    else:
        reward, judge = property_reward(name), property_judge(name)
    return Problem(
        model=model(guidance_scale, weights),
        reward=reward,
        prompts=data.CLASSES,
        value_network=value_network,
        judge=judge,
        features=features,
        labels={"problem": f"Fashion-MNIST, 28x28, ten classes, {name}"},
    )


SETTINGS = Config(
    algorithm="ctrl_pathwise",
    iterations=17,
    batch_size=256,
    reference_batches=10,
    rule={
        "force": 2.75,  # of 1 to 3, J is flat from 1.5 on, and more pictures have the property
        "reuse_reference": 8,
        "transitions": 1024,
    },
    kl_weight=1.0,
    steps=10,
    act_until=0.65,
    learning_rate=7e-5,
    epochs=1,
    minibatch_size=256,
    warmup=3,
    decay_from=0.5,
    max_kl=0.3,
    average=0.7,
    value_loss="log_probability",
    value_inputs="x_data_hat",
    value_replay=20,
    value_batch_size=256,
    value_first_steps=400,
    value_steps=10,
    value_learning_rate=3e-3,
    value_weight_decay=0.01,
    heldout_samples=500,
    evaluate_every=9,
    checkpoint_every=9,
)

# The main job's own: the reward's stand-in has a gradient, and the reference's paths teach the optimum at once.
OWN: dict[str, Any] = {
    "algorithm": "adjoint_matching",
    "reference_batches": 36,
    "reuse_reference": 36,
    "iterations": 42,  # six of them draw their own paths
    "force": 1.3,  # few paths leave the policy short of the fixed point
    "act_until": 0.55,
    "reward_gradient": "surrogate",
    "surrogate_target": "logit",
    "surrogate_prompts": False,  # a plain picture tells its class no better
    "learning_rate": 2e-4,
    "minibatch_size": 256,
    "decay_from": 0.4,
    "average": 0.85,
    "kl_states": 0,
    "heldout_samples": 300,
    "evaluate_every": 42,
    "checkpoint_every": 14,
}
PLAIN = updated(SETTINGS, OWN)

OPTIONS = {"guidance_scale": 1.0, "weights": None}


def _recipe(name: str, summary: str, config: Config = SETTINGS) -> Recipe:
    def build(guidance_scale: float = 1.0, weights: str | None = None) -> Problem:
        return problem(name, guidance_scale, weights)

    return Recipe(name, summary, build, config, OPTIONS, other_rules=SETTINGS)


RECIPES = [
    _recipe("plain", "Fashion-MNIST pictures whose JPEG is small for their class: the main job (3 minutes)", PLAIN),
    _recipe("busy", "the other direction: pictures whose JPEG is large for their class"),
    _recipe("bright", "pictures brighter than three quarters of their class"),
    _recipe("classifier", "alignment with the class name, by a classifier (a reward that can be hacked)"),
]
