"""A reward made of labelled data: log p(class | sample) of a calibrated classifier.

Softmax regression on frozen features, every example counting once, so that the classes' shares are the data's; then one
temperature, fitted on held-out examples (Guo et al. 2017). How far its probabilities are off is measured on held-out examples
that its temperature was not fitted on: each half is judged with the other half's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.metrics import auc_interval
from ..rewards.class_probability import ClassProbability
from ..rewards.learned import need_empty, save_learned
from ..rewards.sample_features import open_features
from ..support.errors import SettingError
from ..support.names import known_name
from ..support.own_data import OwnData, read_data
from .log_ratio import FOLDS, calibration, search_ridge
from .reliability import draw_reliability

FEWEST = 20  # examples of a class, to learn from and held out
SHARPEST, FLATTEST = 0.05, 1000.0  # temperatures; held-out examples without an error would ask for 0


def classify(
    data: str | Path | OwnData,
    target: str,
    out: str | Path | None = None,
    *,
    labels: bool | str = True,
    kind: str | None = None,
    size: int | None = None,
    features: str = "convolution",
    features_options: Mapping[str, Any] | None = None,
    ridge: float | None = None,
    seed: int = 0,
) -> ClassProbability:
    """Fit a reward that says how probable a class is, given the sample: R(x) = log p(target | x), calibrated.

    At kl_weight 1 a model tuned to it has the posterior p_model(x | target) as its law. The probabilities are those of a
    world in which the classes are as frequent as in the data.

    Args:
        data: labelled examples: what `read_data` takes, or what it returned. The model's own, or such as it draws.
        target: the wanted class.
        out: a new folder for the reward, which `scoreact train --reward` and `load_reward` take. None: nothing is written.
        labels: the array or column of the classes; True: `labels`, `label`, or the folders' names.
        kind: pictures, vectors or series, where the file does not say.
        size: pictures of a folder are scaled and cut to a square of so many pixels.
        features: what the classifier sees, as of `open_features`; features_options: its options.
        ridge: smoothness of the head; None: chosen by cross-validation.
        seed: of the folds and halves.

    Returns:
        The reward. Its `facts` say temperature, calibration error before and after, and the AUC of each class.

    Raises:
        SettingError: data without classes, too few of one, an unknown target. RewardError: features that do not fit the
        data. RunExists: `out` holds something.
    """
    if ridge is not None and not 0 < ridge < float("inf"):
        raise SettingError(f"ridge is {ridge}; give a number above 0, or none for the cross-validated one.")
    if out is not None:
        need_empty(Path(out))
    found = data if isinstance(data, OwnData) else read_data(data, kind=kind, labels=labels, size=size)
    if found.train.labels is None or found.heldout.labels is None:
        raise SettingError("the data have no classes to tell apart; give labels.")
    known_name(target, found.classes, "unknown class")
    _check_counts(found)
    phi = open_features(features, tuple(found.train.values.shape[1:]), features_options)
    seen, heldout = (phi.in_parts(part.floats()).double() for part in (found.train, found.heldout))
    generator = torch.Generator().manual_seed(seed)
    table: list[dict[str, float]] = []
    if ridge is None:
        ridge, table = _cross_validated(seen, found.train.labels, len(found.classes), generator)
    head = fit_softmax(seen, found.train.labels, len(found.classes), ridge)
    logits, y = head.logits(heldout), found.heldout.labels
    half = torch.randperm(len(y), generator=generator) % 2 == 0
    honest = torch.empty_like(logits)
    for part in (half, ~half):
        honest[part] = logits[part] / best_temperature(logits[~part], y[~part])
    temperature = best_temperature(logits, y)
    rows = [_facts_of(name, i, logits, honest, y) for i, name in enumerate(found.classes)]
    facts = {
        "made_by": "scoreact reward classify", "ridge": ridge, "ridges": table, "by_class": rows,
        "log_loss": float(F.cross_entropy(honest, y)), "log_loss_before": float(F.cross_entropy(logits, y)),
        "accuracy": float((logits.argmax(1) == y).double().mean()), "fitted_on": len(seen), "held_out": len(y),
        "seed": seed, "notes": list(found.notes),
    }  # fmt: skip
    reward = ClassProbability(
        phi, head.mean.float(), head.weight.float(), head.bias.float(), temperature, found.classes, target,
        Path(out).name if out is not None else "class_probability", facts,
    )  # fmt: skip
    if out is not None:
        save_learned(reward, Path(out))
        row = rows[found.classes.index(target)]
        draw_reliability(row["calibration"], Path(out) / "reliability.png", target)
    return reward


@dataclass(frozen=True)
class SoftmaxHead:
    """mean [F]; weight [K, F] in nats a unit of the features; bias [K]; what was solved for, for the next fit."""

    mean: Tensor
    weight: Tensor
    bias: Tensor
    solved: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.weight.T + self.bias


def fit_softmax(
    features: Tensor, labels: Tensor, classes: int, ridge: float, start: SoftmaxHead | None = None
) -> SoftmaxHead:
    """The head of the least cross-entropy + ridge |W|^2 on standardised features.

    Args:
        features: [N, F] float64. labels: [N] int64, 0 to classes - 1. classes: K.
        ridge: above 0.
        start: a head of another ridge on the same examples, which saves time.
    """
    mean, deviation = features.mean(0), features.std(0)
    scale = deviation + 1e-3 * deviation.mean() + 1e-12  # a feature that hardly varies is not blown up
    z = (features - mean) / scale
    zeros = torch.zeros(classes, z.shape[1] + 1, dtype=torch.float64)
    parameters = (zeros if start is None else start.solved.clone()).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        loss = F.cross_entropy(z @ weight.T + bias, labels) + ridge * weight.square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    found = parameters.detach()
    return SoftmaxHead(mean, found[:, :-1] / scale, found[:, -1], found)


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T of the least cross-entropy of logits / T, from SHARPEST to FLATTEST; logits [N, K] float64, labels [N].

    Convex in 1 / T: the root of its slope, by halving.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    sharp, flat = 1 / SHARPEST, 1 / FLATTEST  # of 1 / T
    for _ in range(60):
        middle = (sharp * flat) ** 0.5
        slope = (((logits * middle).softmax(1) * logits).sum(1) - own).mean()
        sharp, flat = (middle, flat) if slope > 0 else (sharp, middle)
    return 1 / middle


def _cross_validated(
    features: Tensor, labels: Tensor, classes: int, generator: torch.Generator
) -> tuple[float, list[dict[str, float]]]:
    starts: list[SoftmaxHead | None] = [None] * FOLDS

    def left_out(fold: int, out: Tensor, ridge: float) -> Tensor:
        head = starts[fold] = fit_softmax(features[~out], labels[~out], classes, ridge, starts[fold])
        return F.cross_entropy(head.logits(features[out]), labels[out], reduction="none")

    return search_ridge(left_out, torch.full_like(features[:, 0], 1 / len(features)), generator)


def _facts_of(name: str, row: int, before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Any]:
    """How well a class is told on held-out examples; logits [N, K] before and after the temperature."""
    own = labels == row
    auc, half = auc_interval(_odds(after, row)[own], _odds(after, row)[~own])
    bins, off = calibration(_odds(after, row), own)
    return {
        "class": name, "share": float(own.double().mean()), "auc": auc, "auc_half_width": half, "calibration": bins,
        "calibration_error": off, "calibration_error_before": calibration(_odds(before, row), own)[1],
    }  # fmt: skip


def _odds(logits: Tensor, row: int) -> Tensor:
    """log p / (1 - p) of a class, [N]."""
    others = torch.cat([logits[:, :row], logits[:, row + 1 :]], 1)
    return logits[:, row] - others.logsumexp(1)


def _check_counts(data: OwnData) -> None:
    for part, what in ((data.train, "to learn from"), (data.heldout, "held out")):
        assert part.labels is not None
        counts: Sequence[int] = torch.bincount(part.labels, minlength=len(data.classes)).tolist()
        least = min(range(len(counts)), key=lambda i: counts[i])
        if counts[least] < FEWEST:
            raise SettingError(
                f"class {data.classes[least]!r} has {counts[least]} examples {what}, too few to calibrate by; give at least "
                f"{FEWEST}, or leave the class out."
            )
