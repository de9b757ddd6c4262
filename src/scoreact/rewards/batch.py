"""Rewards of a batch: what each sample adds to a measure F of n samples together.

    R_i = n F(S) - (n - 1) F(S without i)         (Tukey's pseudo-values of the jackknife)

F(S without i) does not know sample i, so that it is a baseline: the gradient of the mean R is that of E F(S), whatever F is.
The mean of R is the jackknife's estimate of F, and the gradient of that mean in the samples is what `draft` and the adjoint
follow: of a mean over pairs it is F's own, without bias at any size of a batch. R depends on the other samples of the batch,
so there is no tilted law and no J*, and whoever asks for the reward of one state is refused (`training.assembly`). Measures
of a batch alone are below, distances to a reference set in `two_sample`; each gives F and all F without one, in closed form
where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..support.loading import load_named
from ..types import Condition, groups
from .base import is_differentiable
from .sample_features import Features, open_features

FEWEST = 3  # samples: without one of them there are still pairs
Measured = tuple[Tensor, Tensor]  # F [], and F without each [n]
Measure = Callable[[Tensor], Measured]  # of features [n, F] in float64


class BatchReward:
    """R above.

    Args:
        measure: F and F without each, of features.
        name: for messages.
        features: what a sample is seen by, as of `open_features`: "values", its own numbers, or others.
        by_prompt: the samples of each prompt are a batch of their own.

    A call raises RewardError where a batch has fewer than `FEWEST` samples.
    """

    of_batch = True

    def __init__(self, measure: Measure, name: str, features: str = "values", by_prompt: bool = False) -> None:
        self.measure, self.name, self.by_prompt = measure, name, by_prompt
        self.seen = SeenBy(features)
        self.differentiable = True

    def look(self, samples: Tensor, condition: Condition) -> Tensor:
        """What is measured of each, [n, F]."""
        return self.seen(samples)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        seen = self.look(samples, condition)
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
        look = self._made if torch.is_grad_enabled() and samples.requires_grad else self._made.in_parts
        return look(samples).double()


# --- measures ----------------------------------------------------------------------------------------------------------


def pairs(matrix: Tensor) -> Measured:
    """The mean over pairs i != j of a symmetric matrix [n, n], and the same without each."""
    n, rows = len(matrix), matrix.sum(1) - matrix.diagonal()
    total = rows.sum()
    return total / (n * (n - 1)), (total - 2 * rows) / ((n - 1) * (n - 2))


def weighted_pairs(matrix: Tensor, weights: Tensor) -> Measured:
    """The same with a weight for each pair [n, n], symmetric, of sum 1 and 0 on the diagonal."""
    rows = (weights * matrix).sum(1)
    return rows.sum(), (rows.sum() - 2 * rows) / (1 - 2 * weights.sum(1))


def mean_of(values: Tensor) -> Measured:
    """The mean of [n], and the same without each."""
    return values.mean(), (values.sum() - values) / (len(values) - 1)


def gaussian_kernel(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """exp(-|x - y|^2 / (2 bandwidth^2)), [n, m]."""
    return (-torch.cdist(x, y).square() / (2 * bandwidth**2)).exp()


def check_bandwidth(bandwidth: float | None) -> None:
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise RewardError(f"bandwidth is {bandwidth}; give a distance above 0, in units of the features.")


def diversity_reward(features: str = "values", bandwidth: float | None = None, by_prompt: bool = False) -> BatchReward:
    """F = mean distance of two samples; with a bandwidth 1 - mean Gaussian kernel, to which far apart is as good as farther."""
    check_bandwidth(bandwidth)

    def measure(x: Tensor) -> Measured:
        if bandwidth is None:
            return pairs(torch.cdist(x, x))
        mean, without = pairs(gaussian_kernel(x, x, bandwidth))
        return 1 - mean, 1 - without

    return BatchReward(measure, "diversity", features, by_prompt)


def vendi_reward(features: str = "values", bandwidth: float | None = None, by_prompt: bool = False) -> BatchReward:
    """F = Vendi score (Friedman & Dieng 2023): exp of the entropy of the eigenvalues of K / n, the effective number of
    different samples. K: the cosine of features, or with a bandwidth the Gaussian kernel. n + 1 eigenvalue problems a batch."""
    check_bandwidth(bandwidth)

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
    eigenvalues = torch.linalg.eigvalsh(matrix).clamp(min=1e-12)  # the slope of entr at 0 is infinite
    return torch.special.entr(eigenvalues).sum().exp()


def coverage_reward(classes: str | Callable[[Tensor], Tensor], by_prompt: bool = False) -> BatchReward:
    """F = effective number of classes that the batch holds: exp of the entropy of their shares.

    classes: samples [n, ...] -> class numbers [n] or probabilities [n, K]; a function, or file.py:function. Of probabilities
        there is a gradient, where the function says `differentiable`.
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
    found.differentiable = is_differentiable(function)
    return found
