"""Rewards of a batch: what each sample adds to a measure F of n samples together.

    R_i = n F(S) - (n - 1) F(S without i)         (Tukey's pseudo-values of the jackknife)

F(S without i) does not know sample i, so that it is a baseline: the gradient of the mean R is that of E F(S), whatever F is.
The mean of R is the jackknife's estimate of F. R depends on the other samples of the batch, so there is no tilted law and no
J*, and whoever asks for the reward of one state is refused (`training.assembly`). Measures of a batch are below; each gives F
and all F without one, in closed form where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..support.loading import load_named
from ..support.own_data import read_data
from ..types import Condition, groups
from .sample_features import Features, open_features

FEWEST = 3  # samples: without one of them there are still pairs
Measured = tuple[Tensor, Tensor]  # F [], and F without each [n]
Measure = Callable[[Tensor], Measured]  # of features [n, F] in float64


class BatchReward:
    """R above. Without a gradient in the samples.

    Args:
        measure: F and F without each, of features.
        name: for messages.
        features: what a sample is seen by, as of `open_features`: "values", its own numbers, or others.
        by_prompt: the samples of each prompt are a batch of their own.

    A call raises RewardError where a batch has fewer than `FEWEST` samples.
    """

    differentiable = False
    of_batch = True

    def __init__(self, measure: Measure, name: str, features: str = "values", by_prompt: bool = False) -> None:
        self.measure, self.name, self.by_prompt = measure, name, by_prompt
        self.seen = SeenBy(features)

    @torch.no_grad()
    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        seen = self.seen(samples)
        if not self.by_prompt:
            return self._contributions(seen, f"a batch of {len(samples)}").to(samples)
        found = torch.zeros(len(samples), dtype=torch.float64)
        for prompt, rows in groups(condition).items():
            found[rows] = self._contributions(seen[rows], f"the {len(rows)} of prompt {prompt!r}").cpu()
        return found.to(samples)

    def _contributions(self, seen: Tensor, what: str) -> Tensor:
        n = len(seen)
        if n < FEWEST:
            raise RewardError(
                f"reward {self.name} is of samples together, and {what} is too few; give at least {FEWEST}: another "
                "batch_size, heldout_samples or group_size."
            )
        whole, without = self.measure(seen)
        return n * whole - (n - 1) * without


class SeenBy:
    """Samples [n, *D] as features [n, F], float64. The map is made at the first call, when the shape is known."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._made: Features | None = None

    def __call__(self, samples: Tensor) -> Tensor:
        if self.spec == "values":
            return samples.flatten(1).double()
        if self._made is None or self._made.shape != tuple(samples.shape[1:]):
            self._made = open_features(self.spec, samples.shape[1:])
        return self._made.in_parts(samples).double()


class Reference:
    """Real examples as features [m, F], at most `most` of them: a tensor [m, *D], or what `read_data` takes."""

    def __init__(self, data: str | Path | Tensor, seen: SeenBy, most: int, seed: int) -> None:
        values = data if isinstance(data, Tensor) else read_data(data).train.floats()
        if len(values) < FEWEST:
            raise RewardError(f"the reference set holds {len(values)} examples; give at least {FEWEST}.")
        kept = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:most]
        self.shape, self.features = tuple(values.shape[1:]), seen(values[kept])

    def beside(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.features.shape[1]:
            raise RewardError(
                f"a sample has {x.shape[1]} features and a reference example {self.features.shape[1]} (of shape {self.shape}); "
                "give a reference set of the model's samples' shape."
            )
        return self.features.to(x)


# --- measures ----------------------------------------------------------------------------------------------------------


def pairs(matrix: Tensor) -> Measured:
    """The mean over pairs i != j of a symmetric matrix [n, n], and the same without each."""
    n, rows = len(matrix), matrix.sum(1) - matrix.diagonal()
    total = rows.sum()
    return total / (n * (n - 1)), (total - 2 * rows) / ((n - 1) * (n - 2))


def mean_of(values: Tensor) -> Measured:
    """The mean of [n], and the same without each."""
    return values.mean(), (values.sum() - values) / (len(values) - 1)


def gaussian_kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """exp(-|x - y|^2 / (2 bandwidth^2)), [n, m]."""
    return (-torch.cdist(x, y).square() / (2 * bandwidth**2)).exp()


def _checked_bandwidth(bandwidth: float | None) -> None:
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise RewardError(f"bandwidth is {bandwidth}; give a distance above 0, in units of the features.")


def diversity_reward(features: str = "values", bandwidth: float | None = None, by_prompt: bool = False) -> BatchReward:
    """F = mean distance of two samples; with a bandwidth 1 - mean Gaussian kernel, to which far apart is as good as farther."""
    _checked_bandwidth(bandwidth)

    def measure(x: Tensor) -> Measured:
        if bandwidth is None:
            return pairs(torch.cdist(x, x))
        mean, without = pairs(gaussian_kernel(x, x, bandwidth))
        return 1 - mean, 1 - without

    return BatchReward(measure, "diversity", features, by_prompt)


def vendi_reward(features: str = "values", bandwidth: float | None = None, by_prompt: bool = False) -> BatchReward:
    """F = Vendi score (Friedman & Dieng 2023): exp of the entropy of the eigenvalues of K / n, the effective number of
    different samples. K: the cosine of features, or with a bandwidth the Gaussian kernel. n + 1 eigenvalue problems a batch."""
    _checked_bandwidth(bandwidth)

    def measure(x: Tensor) -> Measured:
        n = len(x)
        if bandwidth is None:
            x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
            if x.shape[1] < n:  # the nonzero eigenvalues of x x' are those of x' x
                gram = x.T @ x
                own = x.unsqueeze(2) * x.unsqueeze(1)
                rest = torch.stack([effective_number((gram - part) / (n - 1)) for part in own])
                return effective_number(gram / n), rest
            kernel = x @ x.T
        else:
            kernel = gaussian_kernel(x, x, bandwidth)
        index = torch.arange(n, device=x.device)
        others = [index[index != i] for i in range(n)]
        return effective_number(kernel / n), torch.stack([effective_number(kernel[i][:, i] / (n - 1)) for i in others])

    return BatchReward(measure, "vendi", features, by_prompt)


def effective_number(matrix: Tensor) -> Tensor:
    """exp of the entropy of the eigenvalues of a symmetric matrix of trace 1."""
    return torch.special.entr(torch.linalg.eigvalsh(matrix).clamp(min=0)).sum().exp()


def mmd_reward(
    reference: str | Path | Tensor, features: str = "values", bandwidth: float | None = None, most: int = 2000, seed: int = 0
) -> BatchReward:  # fmt: skip
    """F = -MMD^2 to real examples, unbiased (Gretton et al. 2012), Gaussian kernel.

    reference: what `read_data` takes, `most` of its examples drawn by `seed`. bandwidth: the median distance of two of them.
    """
    _checked_bandwidth(bandwidth)
    found = BatchReward(lambda x: measure(x), "mmd", features)
    real = Reference(reference, found.seen, most, seed)
    width = bandwidth or float(torch.pdist(real.features).median())
    _checked_bandwidth(width)
    within = pairs(gaussian_kernel(real.features, real.features, width))[0]

    def measure(x: Tensor) -> Measured:
        y = real.beside(x)
        own, across = pairs(gaussian_kernel(x, x, width)), mean_of(gaussian_kernel(x, y, width).mean(1))
        whole, without = (2 * b - a - within.to(x) for a, b in zip(own, across, strict=True))
        return whole, without

    return found


def energy_distance_reward(
    reference: str | Path | Tensor, features: str = "values", most: int = 2000, seed: int = 0
) -> BatchReward:
    """F = -(2 E|X - Y| - E|X - X'| - E|Y - Y'|), unbiased: the squared energy distance to real examples (Székely)."""
    found = BatchReward(lambda x: measure(x), "energy_distance", features)
    real = Reference(reference, found.seen, most, seed)
    within = pairs(torch.cdist(real.features, real.features))[0]

    def measure(x: Tensor) -> Measured:
        y = real.beside(x)
        own, across = pairs(torch.cdist(x, x)), mean_of(torch.cdist(x, y).mean(1))
        whole, without = (a + within.to(x) - 2 * b for a, b in zip(own, across, strict=True))
        return whole, without

    return found


def sliced_wasserstein_reward(
    reference: str | Path | Tensor, features: str = "values", projections: int = 64, most: int = 2000, seed: int = 0
) -> BatchReward:
    """F = -mean of the 1-Wasserstein distances to real examples along random directions, the same in every call.

    Biased by the batch's size: only batches of one size compare.
    """
    if projections < 1:
        raise RewardError(f"projections is {projections}; give at least 1.")
    found = BatchReward(lambda x: measure(x), "sliced_wasserstein", features)
    real = Reference(reference, found.seen, most, seed)
    directions = torch.randn(
        projections, real.features.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    directions = directions / directions.norm(dim=1, keepdim=True)

    def measure(x: Tensor) -> Measured:
        y, lines = real.beside(x), directions.to(x)
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


def coverage_reward(classes: str | Callable[[Tensor], Tensor], by_prompt: bool = False) -> BatchReward:
    """F = effective number of classes that the batch holds: exp of the entropy of their shares.

    classes: samples [n, ...] -> class numbers [n] or probabilities [n, K]; a function, or file.py:function.
    """
    function: Callable[[Tensor], Tensor] = load_named(classes, "classes") if isinstance(classes, str) else classes

    def shares(samples: Tensor) -> Tensor:
        found = function(samples)
        if not isinstance(found, Tensor) or len(found) != len(samples) or found.ndim not in (1, 2):
            raise RewardError(
                f"classes returned {tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__} for "
                f"{len(samples)} samples; expected class numbers [n] or probabilities [n, K]."
            )
        return torch.nn.functional.one_hot(found.long()).double() if found.ndim == 1 else found.double()

    def measure(p: Tensor) -> Measured:
        n, total = len(p), p.sum(0)
        return (
            torch.special.entr(total / n).sum().exp(), torch.special.entr((total - p) / (n - 1)).sum(1).exp()
        )  # fmt: skip

    found = BatchReward(measure, "coverage", by_prompt=by_prompt)
    found.seen = shares  # type: ignore[assignment]
    return found
