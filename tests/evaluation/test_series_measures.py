"""Stylised facts, scores and tests of value at risk: against formulas, scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scoreact.evaluation.metrics import feature_statistics
from scoreact.evaluation.series_scores import (
    blocked_split,
    convolution_distance,
    discriminative_score,
    predictive_score,
    random_convolutions,
)
from scoreact.evaluation.stylised_facts import (
    autocorrelation,
    excess_kurtosis,
    fact_distances,
    leverage,
    marginal_distance,
    series_facts,
    tail_exponent,
)
from scoreact.evaluation.value_at_risk import christoffersen, expected_shortfall, independence, kupiec, value_at_risk
from scoreact.support.errors import SettingError

RNG = np.random.default_rng(0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


# --- facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_the_tail_exponent_of_a_pareto_law(alpha: float) -> None:
    values = torch.from_numpy(np.random.default_rng(1).pareto(alpha, 40_000) + 1)
    assert tail_exponent(values, 0.1) == pytest.approx(alpha, abs=4 * alpha / math.sqrt(4000))


def test_autocorrelation_is_statsmodels_and_that_of_an_ar1() -> None:
    from scipy.signal import lfilter
    from statsmodels.tsa.stattools import acf

    path = lfilter([1], [1, -0.6], RNG.normal(size=20_000))
    found = autocorrelation(torch.from_numpy(path)[None, None], 10)[0].numpy()
    # ours divides each lag by its pairs, statsmodels' adjusted one too
    np.testing.assert_allclose(found, acf(path, adjusted=True, nlags=10, fft=False)[1:], atol=1e-10)
    windows = torch.from_numpy(path[200:].reshape(-1, 1, 20))
    assert autocorrelation(windows, 3)[0].tolist() == pytest.approx([0.6, 0.36, 0.216], abs=0.05)


def test_kurtosis_and_correlations_are_scipys() -> None:
    from scipy.stats import kurtosis

    x = torch.from_numpy(RNG.standard_t(5, size=(50, 2, 30)))
    flat = x.transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(excess_kurtosis(x).numpy(), kurtosis(flat, axis=1), rtol=1e-10)
    np.testing.assert_allclose(series_facts(x, 5).correlation.numpy(), np.corrcoef(flat), atol=1e-12)


def test_the_leverage_of_a_process_with_a_known_one() -> None:
    """r_t = e_t s_t, e_t = 1 or -1, s_(t + 1)^2 = 1 - a e_t: E r_t r_(t + 1)^2 = -a E s_t, and 0 at longer lags."""
    a = 0.5
    signs = 2 * torch.randint(2, (4000, 1, 50), generator=seeded()).double() - 1
    s = (1 - a * torch.cat([torch.zeros(4000, 1, 1), signs[..., :-1]], dim=2)).sqrt()
    found = leverage(3 * signs * s + 1, 3)[0]  # in any unit, about any mean
    assert float(found[0]) == pytest.approx(-a * (math.sqrt(1 + a) + math.sqrt(1 - a)) / 2, abs=0.01)
    assert found[1:].abs().max() < 0.01


def test_the_distance_of_marginals_is_scipys() -> None:
    from scipy.stats import wasserstein_distance

    real, other = normal(400, 2, 10), 2 * normal(300, 2, 10, seed=1) + 0.5
    found = marginal_distance(real, other)
    for channel in range(2):
        a, b = real[:, channel].flatten().double(), other[:, channel].flatten().double()
        assert float(found[channel]) == pytest.approx(wasserstein_distance(a, b) / float(a.std()), rel=0.005)


def test_facts_are_at_no_distance_from_themselves_and_std_counts_by_its_logarithm() -> None:
    x = torch.from_numpy(RNG.standard_t(4, size=(200, 3, 40)))
    own, double = series_facts(x), series_facts(2 * x)
    assert set(fact_distances(own, own).values()) == {0.0}
    assert fact_distances(own, double)["std"] == pytest.approx(math.log(2))
    assert fact_distances(own, double)["acf_abs"] == pytest.approx(0, abs=1e-12)


def test_what_is_no_ensemble_is_refused() -> None:
    with pytest.raises(SettingError, match=r"series have shape \(5, 30\)"):
        series_facts(torch.zeros(5, 30))
    with pytest.raises(SettingError, match="lags are 20 and a window has 20 steps"):
        series_facts(normal(5, 1, 20))
    with pytest.raises(SettingError, match="a tail lies above 0"):
        tail_exponent(-normal(100).abs())


# --- scores ------------------------------------------------------------------------------------------------------------


def test_windows_to_test_with_share_no_row_with_those_learned_from() -> None:
    for offset in range(5):
        learn, test = blocked_split(1000, 30, offset)
        assert len(test) == 200
        assert int((learn[:, None] - test[None]).abs().min()) == 30
    assert len(blocked_split(1000, 1)[0]) == 800
    with pytest.raises(SettingError, match="leave none to learn from"):
        blocked_split(100, 64)


def test_the_discriminative_score_of_one_law_and_of_two() -> None:
    real = normal(1000, 1, 12)
    assert discriminative_score(real, normal(1000, 1, 12, seed=1), seeded(2), steps=60) < 0.12
    other = normal(1000, 1, 12, seed=1).cumsum(2) / 2.55  # of the same spread
    found = discriminative_score(real, other, seeded(2), steps=60)
    assert found > 0.3
    assert found == discriminative_score(real, other, seeded(2), steps=60)


def test_the_predictive_score_of_an_ar1_is_its_innovations() -> None:
    x = [normal(600, 1)]
    for t in range(20):
        x.append(0.9 * x[-1] + math.sqrt(1 - 0.81) * normal(600, 1, seed=t + 1))
    series = torch.stack(x, dim=2)
    best = math.sqrt(2 / math.pi) * math.sqrt(1 - 0.81)
    found = predictive_score(series[:300], series[300:], seeded(), sizes=False, steps=150)
    assert found == pytest.approx(best, rel=0.2)
    assert predictive_score(series[:300], normal(300, 1, 21), seeded(), sizes=False, steps=150) > 1.5 * found


def test_the_convolution_distance_is_scipys_on_the_same_features() -> None:
    from scipy.linalg import sqrtm

    real, other = normal(300, 2, 40), 1.5 * normal(300, 2, 40, seed=1)
    assert convolution_distance(real, real, seeded()) == pytest.approx(0, abs=1e-6)
    found = convolution_distance(real, other, seeded(), 8)
    mean, spread = real.mean((0, 2), keepdim=True), real.transpose(0, 1).flatten(1).std(1)[None, :, None]
    features = random_convolutions(torch.cat([(x - mean) / spread for x in (real, other)]), seeded(), 8)
    features = features / features[:300].std(0)
    (m1, c1), (m2, c2) = (tuple(y.numpy() for y in feature_statistics(x)) for x in (features[:300], features[300:]))
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert found == pytest.approx(wanted, rel=1e-3)


# --- risk --------------------------------------------------------------------------------------------------------------


def test_risk_of_a_normal_law() -> None:
    from scipy.stats import norm

    returns = normal(400_000).double()
    assert value_at_risk(returns, 0.95) == pytest.approx(norm.ppf(0.95), abs=0.01)
    assert expected_shortfall(returns, 0.95) == pytest.approx(norm.pdf(norm.ppf(0.95)) / 0.05, abs=0.015)


def test_kupiecs_ratio_is_the_binomials() -> None:
    from scipy.stats import binom, chi2

    hits = torch.zeros(250, dtype=torch.bool)
    hits[:7] = True
    wanted = 2 * (binom.logpmf(7, 250, 7 / 250) - binom.logpmf(7, 250, 0.01))
    assert kupiec(hits) == pytest.approx((wanted, chi2.sf(wanted, 1)))
    assert kupiec(torch.zeros(250, dtype=torch.bool)).statistic == pytest.approx(-500 * math.log(0.99))


def test_independence_is_the_logit_of_a_violation_on_the_one_before() -> None:
    import statsmodels.api as sm
    from scipy.stats import chi2

    rng = np.random.default_rng(0)
    hits = [0]
    for _ in range(600):
        hits.append(int(rng.random() < (0.4 if hits[-1] else 0.1)))
    path = np.array(hits)
    fit = sm.Logit(path[1:], sm.add_constant(path[:-1])).fit(disp=0)
    found = independence(torch.tensor(hits))
    assert found == pytest.approx((fit.llr, chi2.sf(fit.llr, 1)), rel=1e-6)
    both = christoffersen(torch.tensor(hits), 0.85)
    total = kupiec(torch.tensor(hits), 0.85).statistic + fit.llr
    assert both == pytest.approx((total, chi2.sf(total, 2)), rel=1e-6)
