"""Distances of a batch of samples to a reference set, as rewards of a batch: MMD, energy distance, sliced Wasserstein.

With labels an example has a class, and a sample's class is the one that its prompt names. Then the joint laws of features and
class are compared, given how often the batch has each class: prompts are dealt out, not drawn, and two samples of a class are
rarer in a batch than in the law. Each pair of classes counts as often as in the law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.base import HasClasses, ScoreModel, rows_among
from ..support.errors import RewardError
from ..support.own_data import read_data
from ..types import Condition
from .batch import FEWEST, BatchReward, Measured, SeenBy, check_bandwidth, gaussian_kernel, mean_of, weighted_pairs

APART = 3  # spreads of the features between the examples of one class and those of another


class Reference:
    """Real examples as features [m, F], and their classes [m], places in `names`; without labels one class without a name.

    what: of an example, for messages. Raises RewardError where a class has fewer than `FEWEST`.
    """

    def __init__(
        self, features: Tensor, rows: Tensor | None = None, names: Sequence[str] = ("",), what: str = ""
    ) -> None:
        self.features, self.names, self.what = features.double(), tuple(names), what
        self.rows = torch.zeros(len(features), dtype=torch.int64) if rows is None else rows
        self.counts = torch.bincount(self.rows, minlength=len(self.names))
        if int(self.counts.min()) < FEWEST:
            which = f"class {self.names[int(self.counts.argmin())]!r} has" if len(self.names) > 1 else "there are"
            raise RewardError(
                f"{which} {int(self.counts.min())} examples among the {len(features)} that are compared with; give at least "
                f"{FEWEST}: more of them, a larger `most`, or no labels."
            )

    def within(self) -> Tensor:
        """The distances of any two examples of one class."""
        return torch.cat([torch.pdist(self.features[self.rows == row]) for row in range(len(self.names))])

    def beside(self, x: Tensor) -> Reference:
        """This one, on the device and in the dtype of samples' features x [n, F]. Raises RewardError for another F."""
        if x.shape[1] != self.features.shape[1]:
            raise RewardError(
                f"a sample has {x.shape[1]} features and a reference example {self.features.shape[1]}{self.what}; "
                "give a reference set of the model's samples' shape."
            )
        self.features = self.features.to(x)
        self.rows, self.counts = self.rows.to(x.device), self.counts.to(x.device)
        return self


def open_reference(
    data: str | Path | Tensor, seen: SeenBy, most: int, seed: int, labels: bool | str = False
) -> Reference:
    """At most `most` examples of a tensor [m, *D], or of what `read_data` takes, drawn by `seed`; seen: by what."""
    rows, names = None, [""]
    if isinstance(data, Tensor):
        if labels:
            raise RewardError("labels are of a file or folder, and the reference set is a tensor; leave them out.")
        values = data
    else:
        own = read_data(data, labels=labels)
        values, rows, names = own.train.floats(), own.train.labels, list(own.classes) or [""]
    kept = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:most]
    what = f" (of shape {tuple(values.shape[1:])})"
    return Reference(seen(values[kept]), None if rows is None else rows[kept], names, what)


class TwoSampleReward(BatchReward):
    """F = 2 E d(X, Y) - E d(X, X') - E d(Y, Y'), times -1 and unbiased: X of the batch, Y of the reference set.

    distance: features [n, F], [m, F] -> d [n, m], conditionally negative definite (Sejdinovic et al. 2013), so that F <= 0,
    and 0 where the laws are one.
    """

    def __init__(self, name: str, real: Reference, seen: SeenBy, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(self.compare, name)
        self.seen, self.distance, self.names = seen, distance, real.names
        self.row_of = {name: row for row, name in enumerate(real.names)}
        self.apart = APART * float(real.features.std(0).norm())
        self.real = Reference(self.with_class(real.features, real.rows), real.rows, real.names, real.what)
        one = F.one_hot(real.rows, len(real.names)).to(real.features)
        between = distance(self.real.features, self.real.features).fill_diagonal_(0)
        counts = one.sum(0)
        self.of_real = (one.T @ between @ one) / (counts.outer(counts) - counts.diag())  # mean distances of classes

    def take_model(self, model: ScoreModel) -> None:
        """The model whose classes those of the reference set are, where they are numbers."""
        if len(self.names) > 1 and isinstance(model, HasClasses) and model.classes:
            places = rows_among(self.names, list(model.classes))
            self.row_of |= {model.classes[place]: self.row_of[name] for name, place in places.items()}

    def look(self, samples: Tensor, condition: Condition) -> Tensor:
        """Features, and where there are classes those of the prompts. Raises RewardError for a prompt that is no class."""
        if len(self.names) == 1:
            return self.seen(samples)
        if unknown := [prompt for prompt in condition.prompts if prompt not in self.row_of]:
            raise RewardError(
                f"prompt {unknown[0]!r} is no class of the reference set ({', '.join(self.names)}); name its classes "
                "as the prompts, or leave labels out."
            )
        rows = torch.tensor([self.row_of[prompt] for prompt in condition.prompts], device=samples.device)
        return self.with_class(self.seen(samples), rows)

    def with_class(self, features: Tensor, rows: Tensor) -> Tensor:
        """A column for each class: 0, or `APART` spreads for its own."""
        count = len(self.names)
        return features if count == 1 else torch.cat([features, self.apart * F.one_hot(rows, count).to(features)], 1)

    def compare(self, x: Tensor) -> Measured:
        real, count = self.real.beside(x), len(self.names)
        rows = x[:, -count:].argmax(1) if count > 1 else torch.zeros(len(x), dtype=torch.int64, device=x.device)
        share = torch.bincount(rows, minlength=count).to(x) / len(x)
        own = weighted_pairs(self.distance(x, x), pair_weights(rows, share))
        across = mean_of(self.distance(x, real.features) @ (share / real.counts)[real.rows])
        within = share @ self.of_real.to(x) @ share
        whole, without = (a + within - 2 * b for a, b in zip(own, across, strict=True))
        return whole, without


def pair_weights(rows: Tensor, share: Tensor) -> Tensor:
    """Of samples of the classes `rows` [n], a weight for each pair, of sum 1: pairs of two classes weigh as much together as
    among independent draws of these shares [K]. A class with one sample has no pair of its own; the others make up for it."""
    counts = share * len(rows)
    of_classes = share.outer(share) / (counts.outer(counts) - counts.diag())
    weights = of_classes[rows][:, rows].fill_diagonal_(0)
    return weights / weights.sum()


def mmd_reward(
    reference: str | Path | Tensor, features: str = "values", bandwidth: float | None = None, labels: bool | str = False,
    most: int = 2000, seed: int = 0,
) -> BatchReward:  # fmt: skip
    """F = -MMD^2 to real examples, unbiased (Gretton et al. 2012), Gaussian kernel.

    reference: what `read_data` takes, `most` of its examples drawn by `seed`. bandwidth: the median distance of two of them, of
    one class. labels: True or the labels' name: samples are compared with the examples of the class that their prompt names.
    """
    check_bandwidth(bandwidth)
    seen = SeenBy(features)
    real = open_reference(reference, seen, most, seed, labels)
    width = bandwidth or float(real.within().median())
    check_bandwidth(width)
    return TwoSampleReward("mmd", real, seen, lambda x, y: -gaussian_kernel(x, y, width))


def energy_distance_reward(
    reference: str | Path | Tensor, features: str = "values", labels: bool | str = False, most: int = 2000, seed: int = 0
) -> BatchReward:  # fmt: skip
    """F = -(2 E|X - Y| - E|X - X'| - E|Y - Y'|), unbiased: the squared energy distance to real examples (Székely).

    reference, labels, most, seed: as of `mmd_reward`.
    """
    seen = SeenBy(features)
    return TwoSampleReward("energy_distance", open_reference(reference, seen, most, seed, labels), seen, torch.cdist)


def sliced_wasserstein_reward(
    reference: str | Path | Tensor, features: str = "values", projections: int = 64, most: int = 2000, seed: int = 0
) -> BatchReward:
    """F = -mean of the 1-Wasserstein distances to real examples along random directions, the same in every call.

    Biased by the batch's size: only batches of one size compare.
    """
    if projections < 1:
        raise RewardError(f"projections is {projections}; give at least 1.")
    found = BatchReward(lambda x: measure(x), "sliced_wasserstein", features)
    real = open_reference(reference, found.seen, most, seed)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, real.features.shape[1], generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)

    def measure(x: Tensor) -> Measured:
        y, lines = real.beside(x).features, directions.to(x)
        each = [wasserstein(x @ line, y @ line) for line in lines]
        return -torch.stack([a for a, _ in each]).mean(), -torch.stack([b for _, b in each]).mean(0)

    return found


def wasserstein(x: Tensor, y: Tensor) -> Measured:
    """The 1-Wasserstein distance of x [n] and y [m] on the line, the area between their distributions; and without each x."""
    at = torch.cat([x, y]).sort().values
    width = at[1:] - at[:-1]
    below_x = torch.searchsorted(x.sort().values, at[:-1], right=True)
    below_y = torch.searchsorted(y.sort().values, at[:-1], right=True).to(x) / len(y)
    whole = ((below_x / len(x) - below_y).abs() * width).sum()
    without = (below_x - (x.unsqueeze(1) <= at[:-1]).to(x)) / (len(x) - 1)
    return whole, ((without - below_y).abs() * width).sum(1)
