"""log p_real(phi | c) / p_base(phi | c) by logistic regression on features, and how far to trust it.

With as many real as base examples in a class the best logit *is* the log-ratio of the two laws, as far as the features tell
them apart (Bickel et al. 2007). A head has a weight that all classes share and one of each class:

    logit = (shared + own_c) . z + bias_c,   z = (phi - mean) / scale
    loss = mean over classes and sides of the cross-entropy + ridge (|shared|^2 + mean_c |own_c|^2)

Knows features [N, F], sides and classes; does not know models, samples or files.
Source: Sugiyama et al. 2012 (density ratios).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGES = tuple(10 ** (k / 2) for k in range(1, -9, -1))  # from a head that says nothing to one that learns by heart
FOLDS = 4


@dataclass(frozen=True)
class Sides:
    """features [N, F] float64; real [N] bool, whether from the data; rows [N] int64, the class of each, 0 to classes - 1."""

    features: Tensor
    real: Tensor
    rows: Tensor
    classes: int

    def __getitem__(self, index: Tensor) -> Sides:
        return Sides(self.features[index], self.real[index], self.rows[index], self.classes)

    def __len__(self) -> int:
        return len(self.real)

    def weights(self) -> Tensor:
        """[N], summing to one: every class equally, and in it both sides equally."""
        cell = 2 * self.rows + self.real
        counts = torch.bincount(cell, minlength=2 * self.classes)
        return 1 / (counts[cell] * int((counts > 0).sum())).double()


@dataclass(frozen=True)
class Head:
    """mean [F]; weight [K, F] in nats a unit of the features; bias [K]; the ridge; what was solved for, for the next fit."""

    mean: Tensor
    weight: Tensor
    bias: Tensor
    ridge: float
    solved: Tensor

    def logits(self, sides: Sides) -> Tensor:
        return ((sides.features - self.mean) * self.weight[sides.rows]).sum(1) + self.bias[sides.rows]


def fit_head(sides: Sides, ridge: float, start: Head | None = None) -> Head:
    """The head of the least loss. start: one of another ridge on the same examples, which saves time."""
    mean, scale = _scales(sides)
    z, target, weights = (sides.features - mean) / scale, sides.real.double(), sides.weights()
    k = sides.classes
    # a row a class, and the shared one
    parameters = (
        torch.zeros(k + (k > 1), z.shape[1] + 1, dtype=torch.float64) if start is None else start.solved.clone()
    )
    parameters.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        own, bias = parameters[:k, :-1], parameters[:k, -1]
        # one class: its own weight is the only one
        shared = parameters[k, :-1] if k > 1 else torch.zeros_like(own[0])
        logits = (z @ (own + shared).T + bias).gather(1, sides.rows[:, None])[:, 0]
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (weights * entropy).sum() + ridge * (shared.square().sum() + own.square().sum() / k)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    optimizer.step(closure)
    found = parameters.detach()
    weight = (found[:k, :-1] + (found[k, :-1] if k > 1 else 0)) / scale
    return Head(mean, weight, found[:k, -1], ridge, found)


def cross_validated(
    sides: Sides, generator: torch.Generator, ridges: Sequence[float] = RIDGES
) -> tuple[float, list[dict[str, float]]]:
    """The ridge of the least cross-entropy on examples left out, and what each gave: see `search_ridge`."""
    starts: list[Head | None] = [None] * FOLDS

    def left_out(fold: int, out: Tensor, ridge: float) -> Tensor:
        head = starts[fold] = fit_head(sides[~out], ridge, starts[fold])
        left = sides[out]
        return F.binary_cross_entropy_with_logits(head.logits(left), left.real.double(), reduction="none")

    return search_ridge(left_out, sides.weights(), generator, ridges)


def search_ridge(
    left_out: Callable[[int, Tensor, float], Tensor],
    weights: Tensor,
    generator: torch.Generator,
    ridges: Sequence[float] = RIDGES,
) -> tuple[float, list[dict[str, float]]]:
    """The ridge of the least loss on examples left out, and what each gave: ridge, loss, loss_se.

    Of the ridges within one standard error of the least loss the largest is taken (Breiman et al. 1984): a head that is
    surer than the examples make it leads what is tuned to it astray.

    Args:
        left_out: (fold, which of the N are left out [N] bool, ridge) -> their losses under the fit of the others.
        weights: of the N, [N] float64, summing to one.
        generator: of the folds.
        ridges: to try.
    """
    folds = torch.randperm(len(weights), generator=generator) % FOLDS
    table: list[dict[str, float]] = []
    for ridge in sorted(ridges, reverse=True):
        losses = torch.zeros_like(weights)
        for fold in range(FOLDS):
            losses[folds == fold] = left_out(fold, folds == fold, ridge)
        mean = float((weights * losses).sum())
        error = float((weights.square() * (losses - mean).square()).sum().sqrt())
        table.append({"ridge": ridge, "loss": mean, "loss_se": error})
        best = min(table, key=lambda row: row["loss"])
        if mean > best["loss"] + 4 * best["loss_se"]:
            break  # it only gets worse from here
    chosen = next(row["ridge"] for row in table if row["loss"] <= best["loss"] + best["loss_se"])
    return chosen, table


def calibration(logits: Tensor, real: Tensor, bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """Bins of equal size by the probability that was given: said, found, found_se, count; and the mean |said - found|.

    Args:
        logits: of held-out examples, [N].
        real: whether each was real, [N] bool.
    """
    order = logits.argsort()
    rows: list[dict[str, float]] = []
    for part in order.chunk(bins):
        said, found = float(logits[part].sigmoid().mean()), float(real[part].double().mean())
        error = math.sqrt(max(found * (1 - found), 0.25 / len(part)) / len(part))
        rows.append({"said": said, "found": found, "found_se": error, "count": len(part)})
    return rows, sum(row["count"] * abs(row["said"] - row["found"]) for row in rows) / len(logits)


def _scales(sides: Sides) -> tuple[Tensor, Tensor]:
    """Mean and deviation [F] of all examples; a feature that hardly varies is not blown up."""
    deviation = sides.features.std(0)
    return sides.features.mean(0), deviation + 1e-3 * deviation.mean() + 1e-12
