"""A reward that was fitted to what people answered, with its uncertainty: R(x, c) = u - caution sigma.

    u = w . psi(x, c),   psi = [z, z (x) q, BIAS q],   z = (phi(x) - mean) / scale,   q the prompt's words, a unit vector
    w ~ N(V w', V S V^T + (I - V V^T) / precision)

phi are frozen features. V [P, R] spans what people were shown, S is the posterior's covariance there; beside it the prior
stands, so that sigma grows where nobody was asked. sigma is that of u against a mean sample of the same prompt: pairs know no
more. u is in nats of odds of one rater: P(x preferred to y) = sigmoid(u(x) - u(y)). Fitting one is `feedback`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..models.base import ScoreModel
from ..models.prompt_words import MANY, bag_of_words
from ..support.errors import RewardError
from ..types import Condition
from .sample_features import Features

BIAS = 3.0  # prior standard deviation of a word's offset, that of the features together being 1
FORM = "bradley_terry"
OF_FEATURES = "features."  # before the names of the weights of features that were trained with it


@dataclass(frozen=True)
class UtilitySpace:
    """Features and prompts as the vectors that utilities are linear in.

    Args:
        mean, scale: [F], of the features.
        words: each has numbers of its own; None: there are too many, and hashes of them do (`bag_of_words`).
        by_word: whether the features' weights differ by word; else words have offsets alone.
    """

    mean: Tensor
    scale: Tensor
    words: tuple[str, ...] | None
    by_word: bool

    @staticmethod
    def of(features: Tensor, prompts: Sequence[str], by_word: bool) -> UtilitySpace:
        """The one that suits features [N, F] of samples of these prompts."""
        words: tuple[str, ...] | None = tuple(dict.fromkeys(word for prompt in prompts for word in _words(prompt)))
        if len(set(prompts)) == 1:
            words = ()  # one prompt tells nothing apart
        elif words is not None and len(words) > MANY:
            words = None
        scale = (features.std(0, correction=0) + 1e-4) * math.sqrt(features.shape[1])
        return UtilitySpace(features.mean(0), scale, words, by_word)

    def vectors(self, features: Tensor, prompts: Sequence[str], offset: bool = True) -> Tensor:
        """psi [B, P] of features [B, F]; without `offset` the prompts' own part is 0."""
        z = (features - self.mean.to(features)) / self.scale.to(features)
        q = self.bag(prompts).to(z)
        crossed = (z[:, :, None] * q[:, None, :]).flatten(1) if self.by_word else z[:, :0]
        return torch.cat([z, crossed, BIAS * q if offset else 0 * q], 1)

    def bag(self, prompts: Sequence[str]) -> Tensor:
        """q [B, Q]. Words that are not known are left out."""
        if self.words is None:
            return normalize(bag_of_words(prompts, MANY), dim=1)
        rows = {word: i for i, word in enumerate(self.words)}
        found = torch.zeros(len(prompts), len(rows))
        for row, prompt in enumerate(prompts):
            for word in _words(prompt):
                if word in rows:
                    found[row, rows[word]] = 1.0
        return normalize(found, dim=1)


def _words(prompt: str) -> list[str]:
    return prompt.lower().split()


@dataclass(frozen=True)
class BradleyTerryReward:
    """R(x, c) = u - caution sigma, in nats of odds of one rater. Has a gradient in the samples.

    Args:
        features: phi, frozen.
        space: psi of phi and the prompt.
        basis: V [P, R], orthonormal.
        weights: w' [R]; covariance: S [R, R]; precision: of the prior of w beside V.
        caution: how many sigma a sample is worth less. 0: the most probable utility.
        name: for messages.
        facts: what else its folder says of it.

    Calling: decoded samples [B, *D], condition of B -> [B].
    """

    features: Features
    space: UtilitySpace
    basis: Tensor
    weights: Tensor
    covariance: Tensor
    precision: float
    caution: float = 0.0
    name: str = "liking"
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    differentiable = True

    def __post_init__(self) -> None:
        if isinstance(self.caution, str | bool) or not 0 <= self.caution < math.inf:
            raise RewardError(f"caution is {self.caution!r}; give a number of sigma, 0 or more.")

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        features = self.features(samples, condition.prompts)
        utility = self.utility(features, condition.prompts)
        return utility - self.caution * self.sigma(features, condition.prompts) if self.caution else utility

    def uncertainty(self, samples: Tensor, condition: Condition) -> Tensor:
        """sigma of decoded samples, [B]."""
        return self.sigma(self.features(samples, condition.prompts), condition.prompts)

    def take_model(self, model: ScoreModel) -> None:
        """The pretrained model that it is a reward of, for features that are its own."""
        self.features.take_model(model)

    def utility(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """u [B] of features [B, F]."""
        return self.space.vectors(features, prompts) @ (self.basis @ self.weights).to(features)

    def sigma(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B]"""
        vectors = self.space.vectors(features, prompts, offset=False)
        inside = vectors @ self.basis.to(vectors)
        beside = vectors.square().sum(1) - inside.square().sum(1)
        variance = ((inside @ self.covariance.to(vectors)) * inside).sum(1) + beside.clamp(min=0) / self.precision
        return (variance + 1e-8).sqrt()  # a root has no gradient at 0

    def differences(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [M] and covariance [M, M] of utility differences whose psi differ by `vectors` [M, P]."""
        inside = vectors @ self.basis.to(vectors)
        beside = (vectors @ vectors.T - inside @ inside.T) / self.precision
        return inside @ self.weights.to(vectors), inside @ self.covariance.to(vectors) @ inside.T + beside

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What its folder holds beside its facts: what it says of itself, and its numbers."""
        about = {
            "form": FORM, "features": self.features.described(), "by_word": self.space.by_word,
            "words": None if self.space.words is None else list(self.space.words), "precision": self.precision,
        }  # fmt: skip
        names = ("basis", "weights", "covariance")
        own = {f"{OF_FEATURES}{name}": tensor for name, tensor in self.features.tensors().items()}
        return about, {
            "mean": self.space.mean,
            "scale": self.space.scale,
            **{n: getattr(self, n) for n in names},
            **own,
        }


def from_folder(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, seen: Features
) -> BradleyTerryReward:  # fmt: skip
    """What `BradleyTerryReward.described` told of, made again."""
    words = about["words"]
    space = UtilitySpace(tensors["mean"], tensors["scale"], None if words is None else tuple(words), about["by_word"])
    own = {"form", "features", "by_word", "words", "precision", "digest"}
    return BradleyTerryReward(
        seen, space, tensors["basis"], tensors["weights"], tensors["covariance"], float(about["precision"]), name=name,
        facts={key: value for key, value in about.items() if key not in own},
    )  # fmt: skip
