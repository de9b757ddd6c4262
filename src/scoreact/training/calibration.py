"""Minimum-KL calibration: the weights lambda of statistics s under which an ensemble has the means m, from its samples.

    min KL(p | p_ref)  with  E_p[s] = m      is solved by      p = p_ref exp(lambda . s) / Z
    lambda = argmin f,    f(lambda) = log E_ref exp(lambda . (s - m)),    KL = -min f

f is convex. Its gradient is the reweighted mean less m, its Hessian the reweighted covariance: Newton's steps, shortened where
f would not fall. The law of the prompts is not the model's to change, so that each prompt has a Z of its own and f is the mean
over prompts. Knows numbers; does not know models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.errors import SettingError
from ..types import Condition, groups

NEWTON = 200  # steps at most
FLAT = 1e-8  # of the gradient, in standard deviations: it is 0
ROUNDING = 1e-11  # of f, by which it may rise
ALONE = 1.01  # effective samples: one sample has all the weight, and lambda grows without an end
BISECTIONS = 20
ALIKE = 1e-6  # smallest eigenvalue of the correlations of statistics that can be told apart


@dataclass(frozen=True)
class Dual:
    """What samples say of the nearest law with given means.

    weights: lambda [k], nats a unit of the statistic. kl: of the law from that of the samples, nats. Both with the standard
    errors that the finite number of samples leaves. effective: n^2 / sum of squared weights, of which kl and lambda are made.
    solved: False where no finite lambda gives these means, as outside of what the samples reach; then the others are NaN and 0.
    """

    weights: Tensor
    weights_se: Tensor
    kl: float
    kl_se: float
    effective: float
    solved: bool


class Samples:
    """Statistics of n samples, standardised, with the prompt of each.

    Args:
        values: [n, k].
        condition: of the n samples.
        names: of the k statistics.

    Raises:
        SettingError: A statistic that is the same for all samples, or that follows from the others.
    """

    def __init__(self, values: Tensor, condition: Condition, names: Sequence[str]) -> None:
        self.values = values.double()
        self.mean, self.std = self.values.mean(0), self.values.std(0)
        by_prompt = groups(condition)
        self.prompt = torch.empty(len(values), dtype=torch.int64)
        for number, rows in enumerate(by_prompt.values()):
            self.prompt[rows] = number
        self.counts = torch.bincount(self.prompt).double()
        for j, name in enumerate(names):
            if not float(self.std[j]) > 1e-9 * float(self.values[:, j].abs().max()):
                raise SettingError(
                    f"statistic {name} is {float(self.mean[j]):.4g} for all {len(values)} samples, so that no weight moves it; "
                    "take one that varies."
                )
        self.z = (self.values - self.mean) / self.std
        eigenvalues, vectors = torch.linalg.eigh(self.z.T @ self.z / (len(values) - 1))
        if len(names) > 1 and float(eigenvalues[0]) < ALIKE:
            involved = [name for name, part in zip(names, vectors[:, 0].tolist(), strict=True) if abs(part) > 0.1]
            raise SettingError(f"statistics {', '.join(involved)} follow from each other; leave one out.")

    def solve(self, targets: Tensor) -> Dual:
        """The nearest law with these means [k]."""
        n, k = self.z.shape
        goal = (targets.double() - self.mean) / self.std
        weights, solved = torch.zeros(k, dtype=torch.float64), False
        value, w = self._dual(weights, goal)
        for _ in range(NEWTON):
            gradient = (w @ self.z) / n - goal
            solved = float(gradient.abs().max()) < FLAT
            if solved or n**2 / float(w.square().sum()) < ALONE:
                break
            step = -torch.linalg.lstsq(self._covariance(w), gradient, driver="gelsd").solution
            slope = float(gradient @ step)
            size = 1.0
            while size > 1e-10:
                value_then, w_then = self._dual(weights + size * step, goal)
                if value_then <= value + 1e-4 * size * slope + ROUNDING:
                    break
                size /= 2
            if size <= 1e-10:
                break
            weights, value, w = weights + size * step, value_then, w_then
        if not solved:
            nowhere = torch.full((k,), math.nan, dtype=torch.float64)
            return Dual(nowhere, nowhere, math.nan, math.nan, 0.0, False)
        pull = w.unsqueeze(1) * (self.z - self._means(w)[self.prompt])  # a sample's influence on the gradient
        inverse = torch.linalg.pinv(self._covariance(w))
        spread = inverse @ (pull.T @ pull / n**2) @ inverse
        return Dual(
            weights / self.std, spread.diagonal().clamp(min=0).sqrt() / self.std, -value, float(w.std()) / math.sqrt(n),
            n**2 / float(w.square().sum()), True,
        )  # fmt: skip

    def step(self, targets: Tensor, least: float) -> tuple[Dual, float]:
        """The law as far towards the means `targets` [k] as leaves `least` effective samples, and the share of the way."""
        whole = self.solve(targets)
        if whole.solved and whole.effective >= least:
            return whole, 1.0
        low, high = 0.0, 1.0
        best = self.solve(self.mean)
        for _ in range(BISECTIONS):
            share = (low + high) / 2
            found = self.solve(self.mean + share * (targets - self.mean))
            if found.solved and found.effective >= least:
                low, best = share, found
            else:
                high = share
        return best, low

    def distance(self, means: Tensor, others: Tensor) -> float:
        """Of two means [k], in standard deviations."""
        return float(((means - others) / self.std).norm())

    def beyond(self, targets: Tensor) -> list[str]:
        """Of each target that no sample's statistic lies past: `3.2 (samples reach -1 to 2.9)`; "" of the others."""
        low, high = self.values.min(0).values, self.values.max(0).values
        return [
            f"{m:.4g} (samples reach {a:.4g} to {b:.4g})" if not a < m < b else ""
            for m, a, b in zip(targets.tolist(), low.tolist(), high.tolist(), strict=True)
        ]

    def bounded(self, targets: Tensor) -> list[bool]:
        """Whether a target lies at or past an end that several samples share: of 0 or 1, as a rule, that nothing passes."""
        found = []
        for m, column in zip(targets.tolist(), self.values.T, strict=True):
            end = column.max() if m >= float(column.max()) else column.min()
            found.append(not float(column.min()) < m < float(column.max()) and int((column == end).sum()) > 1)
        return found

    def _dual(self, weights: Tensor, goal: Tensor) -> tuple[float, Tensor]:
        """f, and the samples' weights [n], of mean 1 in each prompt."""
        tilt = self.z @ weights
        top = torch.full_like(self.counts, -math.inf).scatter_reduce(0, self.prompt, tilt, "amax")
        w = (tilt - top[self.prompt]).exp()
        mean = torch.zeros_like(self.counts).index_add(0, self.prompt, w) / self.counts
        log_z = (mean.log() + top) @ self.counts / len(tilt)
        return float(log_z - weights @ goal), w / mean[self.prompt]

    def _means(self, w: Tensor) -> Tensor:
        """Reweighted, of each prompt: [prompts, k]."""
        sums = torch.zeros(len(self.counts), self.z.shape[1], dtype=torch.float64)
        return sums.index_add(0, self.prompt, w.unsqueeze(1) * self.z) / self.counts.unsqueeze(1)

    def _covariance(self, w: Tensor) -> Tensor:
        """Reweighted, within prompts: [k, k]."""
        centred = self.z - self._means(w)[self.prompt]
        return centred.T @ (w.unsqueeze(1) * centred) / len(w)
