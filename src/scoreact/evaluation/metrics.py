"""How near two sets of feature vectors are, how varied one is, and how sure a mean is.

Knows feature matrices [N, F] and numbers; does not know pictures or networks (whoever calls extracts the features).
Computed in float64. A Frechet distance is an "FID" only when the features are Inception's; name the features instead.
Sources: Heusel et al. 2017 (Frechet distance), Binkowski et al. 2018 (KID), Kynkaanniemi et al. 2019 (precision,
recall), Naeem et al. 2020 (density, coverage), DeLong et al. 1988 (the interval of an AUC), Friedman & Dieng 2023 (Vendi
score), Abramowitz & Stegun 26.7 (Student's t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ..rewards.learned import auc_of
from ..support.devices import in_double
from ..support.errors import SettingError


def feature_statistics(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean [F] and unbiased covariance [F, F] of features [N, F], float64.

    weights [N] >= 0 (any sum) say how much each row counts, for example to give classes of unequal size an equal part:
    then cov = sum w (x - mean)(x - mean)^T / (1 - sum w^2) with w summing to one, which for equal weights is 1 / (N -
    1).
    """
    features = _matrix(features, "features")
    if len(features) < 2:
        raise SettingError(f"a covariance needs two samples or more; got {len(features)}.")
    if weights is None:
        weights = torch.ones(len(features))
    if weights.shape != (len(features),) or bool((weights < 0).any()):
        raise SettingError(f"weights of shape {tuple(weights.shape)}; expected ({len(features)},), none negative.")
    weights = weights.to(features)
    weights = weights / weights.sum()
    mean = weights @ features
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (1 - weights.square().sum())


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    Means [F], covariances [F, F]. tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1 S2, which are
    those of the symmetric S1^(1/2) S2 S1^(1/2). Between two finite samples of one law it is positive: compare only at
    equal sample sizes, or against that floor. Units: features squared.
    """
    mean1, cov1, mean2, cov2 = (in_double(x) for x in (mean1, cov1, mean2, cov2))
    if mean1.ndim != 1 or mean1.shape != mean2.shape or not cov1.shape == cov2.shape == mean1.shape * 2:
        shapes = [tuple(x.shape) for x in (mean1, cov1, mean2, cov2)]
        raise SettingError(
            f"mean, covariance, mean, covariance have shapes {shapes}; expected (F,), (F, F), (F,), (F, F)."
        )
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ cov2 @ root)
    trace = cov1.trace() + cov2.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + trace)


def kid(real: Tensor, generated: Tensor, blocks: int = 10, degree: int = 3) -> tuple[float, float]:
    """Unbiased MMD^2 with kernel (x.y / F + 1)^degree, and its standard error; features [N, F] and [M, F].

    Each of `blocks` blocks takes every `blocks`-th row (so rows sorted by class give blocks of all classes); the value
    is the mean over the blocks, the error their standard deviation / sqrt(blocks). Near zero, also below, for equal
    laws.
    """
    real, generated = _pair(real, generated)
    size = min(len(real), len(generated)) // blocks
    if blocks < 2 or size < 2:
        raise SettingError(f"{blocks} blocks of {size} samples; needs two blocks or more of two samples or more.")
    values = []
    for block in range(blocks):
        x, y = real[block::blocks][:size], generated[block::blocks][:size]
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** degree for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    stacked = torch.stack(values)
    return float(stacked.mean()), float(stacked.std() / math.sqrt(blocks))


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance of two different samples, features [N, F]: diversity, in feature units."""
    features = _matrix(features, "features")
    if len(features) < 2:
        raise SettingError(f"a pairwise distance needs two samples or more; got {len(features)}.")
    total = torch.stack([_distances(part, features).sum() for part in torch.split(features, 1000)]).sum()
    return float(total) / (len(features) * (len(features) - 1))


def per_class_diversity(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`mean_pairwise_distance` inside each class: features [N, F], labels [N] in 0..classes-1 -> [classes] float64.

    NaN for a class with fewer than two samples. The mean over classes does not reward a sampler for mixing classes.
    """
    if labels.shape != features.shape[:1]:
        raise SettingError(
            f"labels of shape {tuple(labels.shape)} for {len(features)} features; expected one label a row."
        )
    members = [features[labels == label] for label in range(classes)]
    distances = [mean_pairwise_distance(rows) if len(rows) > 1 else math.nan for rows in members]
    return torch.tensor(distances, dtype=torch.float64)


class Neighbours(NamedTuple):
    """Shares in [0, 1], but density, which may exceed 1."""

    precision: float  # generated samples inside the real samples' balls
    recall: float  # real samples inside the generated samples' balls
    density: float  # how many real balls hold a generated sample, over k
    coverage: float  # real samples whose ball holds a generated sample


def neighbours(real: Tensor, generated: Tensor, k: int = 5) -> Neighbours:
    """Precision, recall, density, coverage with balls that reach each sample's k-th neighbour; features [N, F], [M, F].

    All four depend on N and M: compare at equal sizes.
    """
    real, generated = _pair(real, generated)
    if not 0 < k < min(len(real), len(generated)):
        raise SettingError(
            f"k is {k}; expected 1 to {min(len(real), len(generated)) - 1}, fewer than the samples of each set."
        )
    real_radius, generated_radius = _radii(real, k), _radii(generated, k)
    inside_real, inside_generated, hit = [], [], []
    for part, radius in zip(torch.split(real, 1000), torch.split(real_radius, 1000), strict=True):
        distance = _distances(part, generated)  # [n, M]
        inside = distance < radius[:, None]
        inside_real.append(inside.sum(0))
        hit.append(inside.any(1))
        inside_generated.append((distance < generated_radius).any(1))
    balls = torch.stack(inside_real).sum(0)  # [M]: real balls around each generated sample
    return Neighbours(
        precision=float(in_double(balls > 0).mean()),
        recall=float(in_double(torch.cat(inside_generated)).mean()),
        density=float(in_double(balls).mean() / k),
        coverage=float(in_double(torch.cat(hit)).mean()),
    )


def vendi_score(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the cosine similarities of features [N, F].

    The effective number of different samples, 1 (all alike) to min(N, F). The nonzero eigenvalues of X X^T are those
    of X^T X: the smaller is taken.
    """
    features = _matrix(features, "features")
    length = features.norm(dim=1, keepdim=True)
    if not bool((length > 0).all()):
        raise SettingError("vendi_score: a feature vector is zero and has no direction; drop it or shift the features.")
    unit = features / length
    gram = unit.T @ unit if unit.shape[0] > unit.shape[1] else unit @ unit.T
    values = torch.linalg.eigvalsh(gram / len(unit)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def t_quantile(probability: float, dof: int) -> float:
    """The t with P(T <= t) = probability for Student's t with `dof` degrees of freedom.

    Newton's method from the normal quantile: on the half where the distribution function is concave the steps approach
    the root from one side and cannot overshoot.
    """
    if not 0 < probability < 1 or dof < 1:
        raise SettingError(f"t_quantile({probability}, {dof}): expected a probability in (0, 1) and dof >= 1.")
    if probability < 0.5:
        return -t_quantile(1 - probability, dof)
    t = NormalDist().inv_cdf(probability)
    if dof > 1_000_000:
        return t  # differs by less than 1e-5
    log_scale = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(dof * math.pi)
    for _ in range(200):
        density = math.exp(log_scale - (dof + 1) / 2 * math.log1p(t * t / dof))
        step = (probability - 0.5 - _t_within(t, dof) / 2) / density
        t += step
        if abs(step) <= 1e-12 * max(1.0, t):
            break
    return t


def confidence_interval(values: Sequence[float] | Tensor, level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of Student's t interval of independent values [n] (one a seed, say).

    The half width is NaN for n = 1.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if x.ndim != 1 or len(x) == 0:
        raise SettingError(f"confidence_interval got shape {tuple(x.shape)}; expected (n,) with n >= 1.")
    if not 0 < level < 1:
        raise SettingError(f"level is {level}; expected a share such as 0.95.")
    if len(x) == 1:
        return float(x[0]), math.nan
    half_width = t_quantile(0.5 + level / 2, len(x) - 1) * float(x.std()) / math.sqrt(len(x))
    return float(x.mean()), half_width


def auc_interval(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """P(real > generated) of values [n] and [m], and the half width of its 95 % interval (DeLong)."""
    n, m = len(real), len(generated)
    above = torch.stack([_share_below(value, generated) for value in real.double()])  # of the generated, for each real
    below = torch.stack([1 - _share_below(value, real) for value in generated.double()])
    variance = float(above.var() / n + below.var() / m)
    return auc_of(real, generated), 1.96 * math.sqrt(variance)


def _share_below(value: Tensor, values: Tensor) -> Tensor:
    values = values.double()
    return (values < value).double().mean() + (values == value).double().mean() / 2


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor | float],
    generator: torch.Generator,
    level: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float]:
    """Percentile interval (low, high) of `statistic` over rows drawn with replacement from values [n, ...].

    `statistic` maps [n, ...] to one number. For biased statistics (a Frechet distance) the interval is shifted too.
    """
    if not 0 < level < 1:
        raise SettingError(f"level is {level}; expected a share such as 0.95.")
    count = len(values)
    draws = [
        float(statistic(values[torch.randint(count, (count,), generator=generator, device=generator.device)]))
        for _ in range(resamples)
    ]
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(draws, dtype=torch.float64).quantile(edges).tolist()
    return low, high


def _matrix(x: Tensor, name: str) -> Tensor:
    if x.ndim != 2 or x.shape[0] == 0:
        raise SettingError(
            f"{name} have shape {tuple(x.shape)}; expected (samples, features). Flatten the features first."
        )
    if not bool(x.isfinite().all()):
        raise SettingError(f"{name} hold NaN or infinity in {int((~x.isfinite().all(1)).sum())} of {len(x)} rows.")
    return in_double(x)


def _pair(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    real, generated = _matrix(real, "real features"), _matrix(generated, "generated features")
    if real.shape[1] != generated.shape[1]:
        raise SettingError(
            f"{real.shape[1]} real and {generated.shape[1]} generated features; use one feature extractor."
        )
    return real, generated


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [N, M], by differences: the matrix-product form is off by 1e-7 where samples coincide."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, [N]; the row itself is the first of k + 1."""
    return torch.cat([_distances(part, features).kthvalue(k + 1, dim=1).values for part in torch.split(features, 1000)])


def _t_within(t: float, dof: int) -> float:
    """P(|T| < t), t >= 0, by the finite series in theta = atan(t / sqrt(dof)); Abramowitz & Stegun 26.7.3-4."""
    theta = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(theta), math.cos(theta)
    term, first = (cosine, 3) if dof % 2 else (1.0, 2)
    total = 0.0 if dof == 1 else term
    for k in range(first, dof - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
        if term < 1e-18 * total:
            break
    return 2 / math.pi * (theta + sine * total) if dof % 2 else sine * total
