"""Metrics against closed forms, hand-computed numbers and identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreact.evaluation import metrics


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(normal(size, size, seed=seed))
    return q


# --- moments


def test_feature_statistics_are_the_sample_mean_and_covariance() -> None:
    x = normal(50, 4)
    mean, cov = metrics.feature_statistics(x.float())
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(cov, torch.cov(x.T), rtol=0, atol=1e-6)
    assert mean.dtype == cov.dtype == torch.float64


def test_feature_statistics_weights_give_classes_equal_parts() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [3.0]], dtype=torch.float64)
    mean, cov = metrics.feature_statistics(x, torch.tensor([1.0, 1.0, 1.0, 3.0]))
    # w = (1, 1, 1, 3) / 6: mean 3/2, sum w (x - mean)^2 = 9/4, 1 - sum w^2 = 24/36
    assert mean.item() == pytest.approx(1.5, abs=1e-12)
    assert cov.item() == pytest.approx(9 / 4 * 36 / 24, abs=1e-12)


def test_feature_statistics_zero_weight_drops_a_row() -> None:
    x = normal(20, 3)
    weights = torch.ones(20)
    weights[5:] = 0
    for got, expected in zip(metrics.feature_statistics(x, weights), metrics.feature_statistics(x[:5]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# --- Frechet distance


def test_frechet_of_commuting_gaussians_is_the_closed_form() -> None:
    basis = rotation(5)
    a, b = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0]).double(), torch.tensor([2.0, 0.1, 0.5, 0.0, 1.0]).double()
    m1, m2 = normal(5, seed=1), normal(5, seed=2)
    expected = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = metrics.frechet_distance(m1, basis * a @ basis.T, m2, basis * b @ basis.T)
    assert got == pytest.approx(expected.item(), abs=1e-6)  # the root of a zero eigenvalue known to 1e-16 is 1e-8


def test_frechet_of_noncommuting_gaussians_agrees_with_eigenvalues_of_the_product() -> None:
    f1, f2 = normal(40, 6, seed=1), normal(40, 6, seed=2) @ normal(6, 6, seed=3)
    (m1, c1), (m2, c2) = metrics.feature_statistics(f1), metrics.feature_statistics(f2)
    product = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()
    expected = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * product
    assert metrics.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected.item(), abs=1e-9)


def test_frechet_is_symmetric_zero_on_itself_and_quadratic_in_the_scale() -> None:
    m1, c1 = metrics.feature_statistics(normal(30, 4, seed=1))
    m2, c2 = metrics.feature_statistics(2 * normal(30, 4, seed=2))
    forward = metrics.frechet_distance(m1, c1, m2, c2)
    assert metrics.frechet_distance(m2, c2, m1, c1) == pytest.approx(forward, abs=1e-10)
    assert metrics.frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-10)
    assert metrics.frechet_distance(3 * m1, 9 * c1, 3 * m2, 9 * c2) == pytest.approx(9 * forward, rel=1e-10)


def test_frechet_of_rank_deficient_covariances_is_finite() -> None:
    few, many = metrics.feature_statistics(normal(5, 20)), metrics.feature_statistics(normal(200, 20, seed=1))
    assert math.isfinite(metrics.frechet_distance(*few, *many))


def test_frechet_names_wrong_shapes() -> None:
    mean, cov = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"shapes .*\(4, 4\).*expected \(F,\)"):
        metrics.frechet_distance(mean, cov, mean, torch.eye(4))


# --- KID


def test_kid_of_one_block_pair_by_hand() -> None:
    # F = 1, degree 1: k = x y + 1, unbiased MMD^2 of blocks {x0, x1}, {y0, y1} = x0 x1 + y0 y1 - 2 mean(x) mean(y)
    x, y = torch.tensor([[1.0], [5.0], [2.0], [7.0]]), torch.tensor([[0.0], [1.0], [4.0], [3.0]])
    first = 1 * 2 + 0 * 4 - 2 * 1.5 * 2  # rows 0 and 2
    second = 5 * 7 + 1 * 3 - 2 * 6 * 2  # rows 1 and 3
    value, error = metrics.kid(x, y, blocks=2, degree=1)
    assert value == pytest.approx((first + second) / 2, abs=1e-12)
    assert error == pytest.approx(abs(first - second) / 2, abs=1e-12)


def test_kid_is_near_zero_for_equal_laws_and_not_for_others() -> None:
    value, error = metrics.kid(normal(2000, 8, seed=1), normal(2000, 8, seed=2))
    assert abs(value) < 4 * error
    value, error = metrics.kid(normal(2000, 8, seed=1), normal(2000, 8, seed=2) + 0.5)
    assert value > 10 * error


# --- diversity


def test_mean_pairwise_distance_of_a_triangle() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert metrics.mean_pairwise_distance(points) == pytest.approx((3 + 4 + 5) / 3, abs=1e-12)
    assert metrics.mean_pairwise_distance(torch.full((4, 2), 1e3)) == 0


def test_mean_pairwise_distance_over_chunks_is_the_whole() -> None:
    x = normal(1203, 3)
    assert metrics.mean_pairwise_distance(x) == pytest.approx(torch.pdist(x).mean().item(), rel=1e-10)


def test_per_class_diversity_ignores_other_classes() -> None:
    features = torch.tensor([[0.0], [100.0], [2.0], [101.0], [7.0]])
    got = metrics.per_class_diversity(features, torch.tensor([0, 1, 0, 1, 2]), 3)
    assert got[:2].tolist() == [2.0, 1.0]
    assert got[2].isnan()


# --- neighbours


def test_neighbours_by_hand_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii at k = 1: 1, 1, 2, 7
    generated = torch.tensor([[0.5], [4.0], [50.0]])  # radii: 3.5, 3.5, 46
    got = metrics.neighbours(real, generated, k=1)
    assert got.precision == pytest.approx(2 / 3)  # 0.5 and 4 lie in a real ball, 50 in none
    # 0.5 in the balls of 0 and 1, not 3 (2.5 > 2) or 10; 4 in those of 3 and 10: (2 + 2 + 0) / 3
    assert got.density == pytest.approx(4 / 3)
    assert got.coverage == pytest.approx(1.0)
    assert got.recall == pytest.approx(1.0)  # 10 is within 46 of 50
    got = metrics.neighbours(real, generated[:2], k=1)
    assert got.recall == pytest.approx(3 / 4)  # 10 is 6 from 4, whose radius is 3.5


def test_neighbours_of_a_set_with_itself_and_of_a_far_one() -> None:
    x = normal(1100, 3)
    assert metrics.neighbours(x, x)[:2] == (1.0, 1.0)
    assert metrics.neighbours(x, x).coverage == 1.0
    assert metrics.neighbours(x, x + 100) == (0.0, 0.0, 0.0, 0.0)
    one_mode = x[:1] + 1e-3 * normal(1100, 3, seed=1)
    collapsed = metrics.neighbours(x, one_mode)
    assert collapsed.precision > 0.9
    assert collapsed.coverage < 0.1
    assert collapsed.recall < 0.1


def test_neighbours_match_a_direct_double_loop() -> None:
    real, fake, k = normal(30, 2), 0.7 * normal(20, 2, seed=1) + 0.3, 3
    between = [[math.dist(r, f) for f in fake.tolist()] for r in real.tolist()]
    radius = [sorted(math.dist(a, b) for b in real.tolist())[k] for a in real.tolist()]
    fake_radius = [sorted(math.dist(a, b) for b in fake.tolist())[k] for a in fake.tolist()]
    balls = [sum(between[i][j] < radius[i] for i in range(30)) for j in range(20)]
    got = metrics.neighbours(real, fake, k)
    assert got.precision == pytest.approx(sum(b > 0 for b in balls) / 20)
    assert got.density == pytest.approx(sum(balls) / (k * 20))
    assert got.coverage == pytest.approx(sum(any(between[i][j] < radius[i] for j in range(20)) for i in range(30)) / 30)
    inside = [any(between[i][j] < fake_radius[j] for j in range(20)) for i in range(30)]
    assert got.recall == pytest.approx(sum(inside) / 30)


# --- Vendi score


def test_vendi_of_orthogonal_vectors_is_their_number_and_of_equal_ones_is_one() -> None:
    assert metrics.vendi_score(7 * rotation(6)) == pytest.approx(6, abs=1e-9)
    assert metrics.vendi_score(torch.ones(5, 3)) == pytest.approx(1, abs=1e-6)


def test_vendi_of_two_groups_is_the_exponential_of_their_entropy() -> None:
    x = torch.cat([torch.tensor([[1.0, 0.0]]).expand(30, 2), torch.tensor([[0.0, 2.0]]).expand(10, 2)])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert metrics.vendi_score(x) == pytest.approx(expected, abs=1e-9)


def test_vendi_is_the_same_from_either_gram_matrix() -> None:
    x = normal(12, 12)
    unit = x / x.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(unit @ unit.T / 12)
    assert metrics.vendi_score(torch.cat([x, x])) == pytest.approx(
        torch.special.entr(values).sum().exp().item(), abs=1e-6
    )
    assert metrics.vendi_score(x) == pytest.approx(torch.special.entr(values).sum().exp().item(), abs=1e-9)


# --- intervals


@pytest.mark.parametrize(
    ("probability", "dof", "table"),
    [
        (0.975, 1, 12.7062047364),
        (0.9995, 1, 636.619249),
        (0.975, 2, 4.30265273),
        (0.975, 3, 3.18244631),
        (0.975, 4, 2.77644511),
        (0.995, 5, 4.03214298),
        (0.95, 9, 1.83311293),
        (0.9, 10, 1.37218364),
        (0.975, 30, 2.04227246),
        (0.975, 120, 1.97993041),
        (0.975, 10**7, 1.95996398),
    ],
)
def test_t_quantile_matches_the_tables(probability: float, dof: int, table: float) -> None:
    assert metrics.t_quantile(probability, dof) == pytest.approx(table, rel=1e-6)
    assert metrics.t_quantile(1 - probability, dof) == pytest.approx(-table, rel=1e-6)


def test_t_quantile_of_one_and_two_degrees_is_closed_form() -> None:
    for p in (0.5, 0.6, 0.9, 0.999):
        assert metrics.t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), abs=1e-9, rel=1e-9)
        closed = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
        assert metrics.t_quantile(p, 2) == pytest.approx(closed, abs=1e-9)


def test_confidence_interval_by_hand() -> None:
    mean, half = metrics.confidence_interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.30265273 / math.sqrt(3), rel=1e-6)
    assert math.isnan(metrics.confidence_interval([4.0])[1])


def test_confidence_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = normal(4000, 4)
    hits = 0
    for row in draws:
        mean, half = metrics.confidence_interval(row, level=0.9)
        hits += abs(mean) < half
    assert hits / 4000 == pytest.approx(0.9, abs=4 * math.sqrt(0.9 * 0.1 / 4000))


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    values = normal(400) + 5
    low, high = metrics.bootstrap_interval(values, torch.mean, torch.Generator().manual_seed(1), resamples=4000)
    mean, half = metrics.confidence_interval(values)
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    again = metrics.bootstrap_interval(values, torch.mean, torch.Generator().manual_seed(1), resamples=4000)
    assert again == (low, high)


# --- contracts


def test_wrong_inputs_are_named() -> None:
    bad = torch.zeros(3, 2)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 rows"):
        metrics.vendi_score(bad)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\).*Flatten"):
        metrics.mean_pairwise_distance(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="zero and has no direction"):
        metrics.vendi_score(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="two samples or more; got 1"):
        metrics.feature_statistics(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="3 real and 2 generated features"):
        metrics.kid(torch.zeros(30, 3), torch.zeros(30, 2))
    with pytest.raises(ValueError, match="10 blocks of 1 samples"):
        metrics.kid(torch.zeros(19, 3), torch.zeros(19, 3))
    with pytest.raises(ValueError, match="k is 5; expected 1 to 3"):
        metrics.neighbours(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"level is 95"):
        metrics.confidence_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) for 3"):
        metrics.per_class_diversity(torch.zeros(3, 2), torch.zeros(2), 1)
