"""log p(class | sample) of a classifier that was fitted to labelled data: a linear head on frozen features, calibrated.

    p(. | x) = softmax((W (phi(x) - mean) + bias) / temperature),   R(x) = log p(target | x) <= 0, in nats

At kl_weight 1 the tilted law p_model exp(R) / Z is the posterior p_model(x | target), and J* = log Z is the logarithm of the
target's share among the model's own samples. kl_weight 1 / k weighs the evidence k times. Fitting one is `feedback`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..support.names import known_name
from ..types import Condition
from .sample_features import Features

FORM = "class_probability"


@dataclass(frozen=True)
class ClassProbability:
    """R(x) = log p(target | x). Has a gradient in the samples, and does not look at the prompt.

    Args:
        features: phi, frozen.
        mean: [F], of the features.
        weight: [K, F], in nats a unit of phi, a row a class; bias: [K].
        temperature: what all logits are divided by, fitted on examples that the head did not see.
        classes: names of the K classes.
        target: the wanted one of them.
        name: for messages.
        facts: what else its folder says of it.

    Calling: decoded samples [B, *D], condition of B -> [B]. RewardError for samples of another shape.
    """

    features: Features
    mean: Tensor
    weight: Tensor
    bias: Tensor
    temperature: float
    classes: tuple[str, ...]
    target: str
    name: str = "class_probability"
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    differentiable = True

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return self.log_probabilities(samples)[:, self.classes.index(self.target)]

    def log_probabilities(self, samples: Tensor) -> Tensor:
        """Of every class, [B, K]."""
        return self.logits(self.features(samples)).log_softmax(1)

    def probability(self, samples: Tensor) -> Tensor:
        """p(target | x) of decoded samples, [B]."""
        return self.log_probabilities(samples)[:, self.classes.index(self.target)].exp()

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, F] -> [B, K], calibrated."""
        mean, weight, bias = (part.to(features) for part in (self.mean, self.weight, self.bias))
        return ((features - mean) @ weight.T + bias) / self.temperature

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What its folder holds beside its facts: what it says of itself, and its numbers."""
        about = {
            "form": FORM, "features": self.features.described(), "temperature": self.temperature,
            "classes": list(self.classes), "target": self.target,
        }  # fmt: skip
        return about, {"mean": self.mean, "weight": self.weight, "bias": self.bias}


def class_from_folder(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, seen: Features
) -> ClassProbability:
    """What `ClassProbability.described` told of, made again."""
    classes, own = tuple(about["classes"]), {"form", "features", "temperature", "classes", "target", "digest"}
    return ClassProbability(
        seen, tensors["mean"], tensors["weight"], tensors["bias"], float(about["temperature"]), classes,
        known_name(about["target"], classes, "unknown class"), name,
        {key: value for key, value in about.items() if key not in own},
    )  # fmt: skip
