"""The log-ratio of two laws by logistic regression: against laws that are known, and its figures against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreact.evaluation.metrics import auc_interval
from scoreact.feedback.log_ratio import Sides, calibration, cross_validated, fit_head
from scoreact.rewards.learned import auc_of


def quadratic(x: Tensor) -> Tensor:
    """What is sufficient for Gaussians: x and its products."""
    return torch.cat([x, x[:, :1] * x[:, :1], x[:, :1] * x[:, 1:], x[:, 1:] * x[:, 1:]], 1)


def gaussians(count: int, generator: torch.Generator, real_share: float = 0.5) -> tuple[Sides, Tensor, Tensor]:
    """Two classes in 2-D whose real law is N(m_c, S_c), the base's N(0, 1): sides, points, the exact log-ratio at them."""
    means = torch.tensor([[0.5, -0.3], [-0.4, 0.6]], dtype=torch.float64)
    covariances = torch.tensor([[[0.7, 0.2], [0.2, 0.8]], [[0.9, 0.0], [0.0, 0.6]]], dtype=torch.float64)
    rows = torch.arange(count) % 2
    real = torch.rand(count, generator=generator) < torch.where(rows == 0, real_share, 0.5)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    moved = means[rows] + (torch.linalg.cholesky(covariances)[rows] @ x[..., None])[..., 0]
    x = torch.where(real[:, None], moved, x)
    laws = [torch.distributions.MultivariateNormal(m, s) for m, s in zip(means, covariances, strict=True)]
    base = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    exact = torch.where(rows == 0, laws[0].log_prob(x), laws[1].log_prob(x)) - base.log_prob(x)
    return Sides(quadratic(x), real, rows, 2), x, exact


@pytest.mark.parametrize("real_share", [0.5, 0.2])
def test_the_logit_is_the_log_ratio_within_its_standard_error(real_share: float) -> None:
    """Unequal numbers of real and base examples in a class do not move it. Standard errors by the Fisher information."""
    generator = torch.Generator().manual_seed(1)
    sides, _, exact = gaussians(40_000, generator, real_share)
    head = fit_head(sides, 1e-9)
    z = []  # at ten points each: the error over its own standard error
    for row in (0, 1):
        own = sides.rows == row
        design = torch.cat([sides.features[own], torch.ones(int(own.sum()), 1).double()], 1)
        weight = sides.weights()[own] * len(sides)
        p = exact[own].sigmoid()
        information = (design * (weight * p * (1 - p))[:, None]).T @ design
        spread = (design * (weight.square() * p * (1 - p))[:, None]).T @ design
        covariance = torch.linalg.solve(information, torch.linalg.solve(information, spread).T)
        error = (design[:10] @ covariance * design[:10]).sum(1).sqrt()
        z.append((head.logits(sides[own])[:10] - exact[own][:10]) / error)
    assert float(torch.cat(z).abs().max()) < 4
    assert float(torch.cat(z).abs().mean()) > 0.1  # the standard error is of that size


def test_what_all_classes_share_is_found_with_few_examples_of_each(generator: torch.Generator) -> None:
    """40 classes with 12 examples a side, all moved alike: together they know it better than each alone."""
    rows = torch.arange(40 * 24) % 40
    real = torch.arange(40 * 24) < 40 * 12
    x = torch.randn(len(rows), 5, generator=generator, dtype=torch.float64) + real[:, None].double() * 0.7
    test = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    places, blank = torch.arange(4000) % 40, torch.zeros(4000).bool()
    together = fit_head(Sides(x, real, rows, 40), 0.1).logits(Sides(test, blank, places, 40))
    alone = torch.zeros(4000, dtype=torch.float64)
    for k in range(40):
        own, zero = rows == k, torch.zeros_like(rows)
        head = fit_head(Sides(x[own], real[own], zero[own], 1), 0.1)
        alone[places == k] = head.logits(Sides(test[places == k], blank[:100], torch.zeros(100).long(), 1))
    exact = 0.7 * test.sum(1) - 5 * 0.7**2 / 2
    seen = [float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) for found in (together, alone)]
    assert seen[0] > 0.9 > 0.85 > seen[1]


def test_the_ridge_is_large_where_nothing_is_to_be_learned(generator: torch.Generator) -> None:
    rows = torch.zeros(400, dtype=torch.int64)
    real = torch.arange(400) % 2 == 0
    noise = Sides(torch.randn(400, 30, generator=generator, dtype=torch.float64), real, rows, 1)
    told = Sides(noise.features + 2.0 * real[:, None] / math.sqrt(30), real, rows, 1)
    ridges = [10.0, 1.0, 0.1, 0.01, 0.001]
    blind, table = cross_validated(noise, generator, ridges)
    sees, other = cross_validated(told, generator, ridges)
    assert blind == 10.0
    assert sees < 1.0
    assert len(table) < len(ridges)  # it stops where it only gets worse
    best = min(other, key=lambda row: row["loss"])
    chosen = next(row for row in other if row["ridge"] == sees)
    assert chosen["loss"] <= best["loss"] + best["loss_se"]
    assert abs(table[0]["loss"] - math.log(2)) < 0.02


def test_an_auc_is_the_share_of_pairs_and_its_interval_covers(generator: torch.Generator) -> None:
    real, other = torch.randint(0, 5, (70,), generator=generator), torch.randint(0, 4, (50,), generator=generator)
    pairs = (real[:, None] > other).double() + (real[:, None] == other).double() / 2
    assert auc_of(real, other) == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert auc_of(real, real) == 0.5
    true = 0.5 * (1 + math.erf(0.5))  # of two unit normals one apart: Phi(1 / sqrt 2)
    covered = 0
    for _ in range(200):
        a = torch.randn(60, generator=generator) + 1
        b = torch.randn(80, generator=generator)
        auc, half = auc_interval(a, b)
        covered += abs(auc - true) < half
    assert 180 <= covered <= 198


def test_a_calibrated_head_is_found_calibrated_and_a_loud_one_is_not(generator: torch.Generator) -> None:
    logits = 2 * torch.randn(20_000, generator=generator)
    real = torch.rand(20_000, generator=generator) < logits.sigmoid()
    rows, off = calibration(logits, real)
    assert sum(row["count"] for row in rows) == 20_000
    assert off < 0.02
    assert all(abs(row["said"] - row["found"]) < 4 * row["found_se"] for row in rows)
    assert calibration(3 * logits, real)[1] > 0.08
