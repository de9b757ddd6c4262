"""Rewards that were fitted: a linear head a class on frozen features, kept as a folder and loaded from it.

    R(x, c) = clip tanh(logit / clip),   logit = weight_c . (phi(x) - mean) + bias_c,   all in nats

reward.json says what it is, what it was made of and how good it is; reward.safetensors holds the numbers. Nothing that a
folder names is run: of the user's own features it keeps a digest, and whoever opens it names the file. Making one is
`feedback`'s business.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.errors import RewardError, RunError, RunExists
from ..support.files import read_stored, write_json, write_tensors
from ..support.names import known_name
from ..types import Condition
from . import bradley_terry, class_probability
from .bradley_terry import OF_FEATURES, BradleyTerryReward
from .class_probability import ClassProbability
from .image import class_by_prompt
from .sample_features import Features, open_described

ABOUT, NUMBERS = "reward.json", "reward.safetensors"


@dataclass(frozen=True)
class LearnedReward:
    """R(x, c) of a head that was fitted. Has a gradient in the samples.

    Args:
        features: phi, frozen.
        mean: [F], of the features.
        weight: [K, F], in nats a unit of phi; bias: [K]. One row a class, or one for all.
        classes: the prompts that the K rows are for; () with one row, which serves every prompt.
        clip: beyond so many nats R hardly changes: far from what it was fitted on a head knows nothing.
        real: R of real examples that the fit did not see, [n]; None where there are none.
        name: for messages.
        facts: what else its folder says of it.

    Calling: decoded samples [B, *D], condition of B -> [B]. RewardError for a prompt that is none of its classes.
    """

    features: Features
    mean: Tensor
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...] = ()
    clip: float = 6.0
    real: Tensor | None = None
    name: str = "learned"
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    differentiable = True

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return self.clipped(self.logits(self.features(samples), self.rows(condition)))

    def rows(self, condition: Condition) -> Tensor:
        """The head's row for each prompt, [B] int64."""
        if not self.classes:
            return torch.zeros(len(condition), dtype=torch.int64)
        try:
            return class_by_prompt(self.classes)(condition)
        except RewardError as error:
            raise RewardError(f"reward {self.name}: {error}") from None

    def logits(self, features: Tensor, rows: Tensor) -> Tensor:
        """Features [B, F] and rows of the head [B] -> [B], not clipped."""
        mean, weight, bias = (part.to(features) for part in (self.mean, self.weight, self.bias))
        rows = rows.to(features.device)
        return ((features - mean) * weight[rows]).sum(1) + bias[rows]

    def clipped(self, logits: Tensor) -> Tensor:
        return self.clip * torch.tanh(logits / self.clip)

    def described(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What its folder holds beside its facts: what it says of itself, and its numbers."""
        about = {
            "form": "linear", "features": self.features.described(), "classes": list(self.classes), "clip": self.clip
        }  # fmt: skip
        tensors = {"mean": self.mean, "weight": self.weight, "bias": self.bias}
        return about, tensors if self.real is None else {**tensors, "real": self.real}

    def auc(self, rewards: Tensor) -> float:
        """The share of (real, sample) pairs in which the real one has the larger R, ties half: 0.5 where R cannot tell them.

        Args:
            rewards: R of the samples, [B].
        """
        if self.real is None:
            raise RewardError(f"reward {self.name} keeps no real examples to compare with.")
        return auc_of(self.real, rewards)

    def plus(self, other: LearnedReward) -> LearnedReward:
        """The reward whose logit is the sum of both. Its real examples are not known.

        Raises RewardError where the two see other features or have other classes.
        """
        if self.features.digest != other.features.digest or self.features.shape != other.features.shape:
            raise RewardError(
                f"rewards {self.name} ({self.features.spec}) and {other.name} ({other.features.spec}) see other features, so "
                "their sum is no head on either; fit both on the same, or give both to a weighted sum."
            )
        if self.classes != other.classes:
            raise RewardError(
                f"rewards {self.name} and {other.name} are of other classes, {list(self.classes)} and {list(other.classes)}; "
                "fit both on the same."
            )
        moved = other.bias + other.weight @ (self.mean - other.mean)
        return dataclasses.replace(
            self, weight=self.weight + other.weight, bias=self.bias + moved, real=None, clip=max(self.clip, other.clip)
        )


def auc_of(real: Tensor, generated: Tensor) -> float:
    """P(real > generated) + P(equal) / 2 over all pairs of values [n] and [m]."""
    values, real = generated.detach().cpu().double().sort().values, real.detach().cpu().double()
    below = torch.searchsorted(values, real) + torch.searchsorted(values, real, right=True)
    return float(below.double().mean() / (2 * len(values)))


# --- as a folder -------------------------------------------------------------------------------------------------------


def is_learned(spec: str) -> bool:
    """Whether a text is the folder of a reward."""
    return (Path(spec).expanduser() / ABOUT).is_file()


def need_empty(folder: Path) -> None:
    """Raises RunExists where a reward's folder holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunExists(f"{folder} is not empty, and a reward is never written over another; give another --out.")


def save_learned(reward: LearnedReward | BradleyTerryReward | ClassProbability, folder: Path) -> None:
    """Write a new folder. Raises RunExists where there is one with something in it."""
    need_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about, tensors = reward.described()
    digest = write_tensors(folder / NUMBERS, tensors)
    write_json(folder / ABOUT, {**about, "digest": digest, **reward.facts})


def open_learned(
    folder: str | Path, caution: float | None = None, features: str | None = None, target: str | None = None
) -> Any:
    """The reward in a folder, whatever its form.

    Args:
        folder: what `scoreact reward ...` made.
        caution: of one that was fitted to answers: R less so many times its uncertainty.
        features: of one that sees samples by code of the user's: that file.py:function.
        target: of a classifier: another class than the one that it was made for.

    Raises:
        RewardError: no such folder, a damaged one, one of a form that this version does not know, one whose features are
            code that is not named here or no more what they were, a caution of a reward that knows no uncertainty, or a
            target of one that is no classifier.
    """
    place = Path(folder).expanduser()
    if not is_learned(str(place)):
        raise RewardError(
            f"{folder} holds no {ABOUT}, so it is no reward; `scoreact reward --help` lists what makes one."
        )
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        tensors, header = read_stored(place / NUMBERS)
    except RunError as error:
        raise RewardError(f"reward {folder}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{place / ABOUT} is no JSON ({error}); make the reward anew.") from None
    form = about.get("form") if isinstance(about, dict) else None
    if form not in FORMS:
        raise RewardError(
            f"{place / ABOUT} is of the form {form!r}; this version knows {', '.join(FORMS)}. Use the version that made it."
        )
    if about.get("digest") != header.get("digest"):
        raise RewardError(f"{place / ABOUT} and {NUMBERS} are not of one reward; restore both of one copy.")
    try:
        trained = {
            name.removeprefix(OF_FEATURES): tensor for name, tensor in tensors.items() if name.startswith(OF_FEATURES)
        }
        seen = open_described(about["features"], str(place / ABOUT), features, trained)
        found = FORMS[form](about, tensors, place.name, seen)
    except (KeyError, TypeError, IndexError) as error:
        raise RewardError(
            f"{place / ABOUT} is damaged ({type(error).__name__}: {error}); make the reward anew."
        ) from None
    if target is not None:
        if not isinstance(found, ClassProbability):
            raise RewardError(f"reward {folder} is of the form {form!r}, which knows no classes; leave target out.")
        found = dataclasses.replace(found, target=known_name(str(target), found.classes, "unknown class"))
    if caution is None:
        return found
    if not isinstance(found, BradleyTerryReward):
        raise RewardError(f"reward {folder} is of the form {form!r}, which knows no uncertainty; leave caution out.")
    return dataclasses.replace(found, caution=caution)


def _linear(about: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, seen: Features) -> LearnedReward:
    own = {"form", "features", "classes", "clip", "digest"}
    return LearnedReward(
        seen, tensors["mean"], tensors["weight"], tensors["bias"],
        tuple(about["classes"]), float(about["clip"]), tensors.get("real"), name,
        {key: value for key, value in about.items() if key not in own},
    )  # fmt: skip


FORMS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor], str, Features], Any]] = {
    "bradley_terry": bradley_terry.from_folder,
    "class_probability": class_probability.class_from_folder,
    "linear": _linear,
}
