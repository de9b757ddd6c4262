"""Anomaly scores: against closed forms on mixtures, and the likelihood paradox where it can be worked out."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import VE, VP, RectifiedFlow, Schedule
from scoreact.evaluation.anomaly_scores import (
    NormalSamples,
    ScoreSettings,
    norm_features,
    path_log_prob,
    png_bits,
    raw_scores,
    reconstruction_error,
    stein_features,
)
from scoreact.evaluation.likelihood import exact_seconds, slow_trace
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.network import NetworkModel
from scoreact.recipes.gaussian import mixture, quadratic_reward
from scoreact.recipes.own_model import ScaledModel
from scoreact.support.errors import SettingError

LAW = mixture(2, 4, 0)


def on(schedule: Schedule) -> GaussianMixture:
    return GaussianMixture(schedule, LAW.weights, LAW.means, LAW.covariances)


def some(count: int) -> Tensor:
    return LAW.sample(count, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", [VP(), RectifiedFlow(), VE()], ids=lambda s: type(s).__name__)
def test_denoising_errors_make_the_log_density(schedule: Schedule) -> None:
    model, x = on(schedule), some(30)
    found = path_log_prob(model, x, model.condition([""] * 30), levels=16, noises=256)
    exact = model.log_prob(torch.ones(30), x).double()
    assert torch.allclose(found, exact, atol=0.2)  # mostly one offset, as all meet the same noise
    assert float(torch.corrcoef(torch.stack([found, exact]))[0, 1]) > 0.995


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_path_ratio_of_an_optimum_is_the_reward_over_beta_less_log_z(beta: float) -> None:
    model, x, reward = on(VP()), some(30), quadratic_reward(2, 0)
    best, optimum = model.tilted(reward.linear, reward.quadratic, beta, reward.constant)
    condition = model.condition([""] * 30)
    found = -raw_scores(ScoreSettings("ratio", levels=24, noises=64), best, model, x, [""] * 30)[0][:, 0]
    wanted = (reward(x, condition).double() - optimum) / beta
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.99
    assert torch.allclose(found, wanted, atol=0.25)
    # a few calls tell the order as well: all samples meet the same noise
    few = -raw_scores(ScoreSettings("ratio", levels=8, noises=2), best, model, x, [""] * 30)[0][:, 0]
    assert float(torch.corrcoef(torch.stack([few, wanted]))[0, 1]) > 0.95


class TwoGaussians(nn.Module):
    """The score of N(+-mean, 1) by the label 0 or 1."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        schedule, sign = VP(), 1.0 - 2.0 * label[:, None]
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return (sign * alpha * self.mean - x) / (alpha**2 + sigma**2)


def test_a_posterior_is_bayes_rule_and_needs_classes() -> None:
    mean = torch.tensor([0.8, -0.3])
    model = NetworkModel(TwoGaussians(mean), VP(), prediction.score, (2,), ["plus", "minus"])
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    names = ["plus"] * 20 + ["minus"] * 20
    found = raw_scores(ScoreSettings("posterior", levels=16, noises=32), model, None, x, names)[0][:, 0]
    against = -2 * x @ mean * torch.tensor([1.0] * 20 + [-1.0] * 20)  # log N(x; -m) - log N(x; m)
    assert torch.allclose(found, against.double(), atol=0.25)
    noisy = ScoreSettings("path", levels=16, noises=128, least_noise=2.0)
    bits = raw_scores(noisy, model, None, x, names)[0][:, 0] * 2 * math.log(2)
    draws = x + 2 * torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(1))
    law = torch.distributions.Normal(mean * torch.tensor([1.0] * 20 + [-1.0] * 20)[:, None], math.sqrt(5))
    assert torch.allclose(bits, -law.log_prob(draws).sum(2).mean(0).double(), atol=0.2)
    with pytest.raises(SettingError, match="has none"):
        raw_scores(ScoreSettings("posterior"), on(VP()), None, x, [""] * 40)


def test_a_ratio_is_of_densities_of_the_samples_whatever_unit_a_model_computes_in() -> None:
    class Unit(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -x / (VP().alpha(t) ** 2 + VP().sigma(t) ** 2)[:, None]

    narrow, broad = (
        ScaledModel(Unit(), VP(), prediction.score, (2,), mean=torch.full((2,), m), spread=torch.full((2,), s))
        for m, s in ((1.0, 1.0), (0.0, 3.0))
    )
    x = torch.tensor([[1.0, 1.0], [4.0, -3.0], [0.0, 0.0]])
    laws = [torch.distributions.Normal(m, s) for m, s in ((1.0, 1.0), (0.0, 3.0))]
    wanted = [law.log_prob(x).sum(1).double() for law in laws]
    found = raw_scores(ScoreSettings("ratio", levels=16, noises=64), narrow, broad, x, [""] * 3)[0][:, 0]
    assert torch.allclose(found, wanted[1] - wanted[0], atol=0.1)
    # a reference without classes is of all of them
    mean = torch.tensor([0.5, 0.5])
    named = NetworkModel(TwoGaussians(mean), VP(), prediction.score, (2,), ["plus", "minus"])
    whole = NetworkModel(Unit(), VP(), prediction.score, (2,))
    found = raw_scores(ScoreSettings("ratio", levels=16, noises=64), named, whole, x, ["plus"] * 3)[0][:, 0]
    exact = 0.5 * ((x - mean).square() - x.square()).sum(1)
    assert torch.allclose(found, exact.double(), atol=0.2)


def test_norm_and_trace_of_the_score_cancel_over_the_law() -> None:
    """Stein's identity, which `scoped` looks for departures from."""
    wide = GaussianMixture(RectifiedFlow(), torch.ones(1), torch.zeros(1, 200), 2 * torch.eye(200)[None])
    x = wide.sample(30, torch.Generator().manual_seed(1))
    found = stein_features(wide, x, wide.condition([""] * 30), levels=3, noises=32)
    assert bool((found.mean(0).abs() < 0.1).all())  # each of the two parts is near 1 at the greatest noise
    wrong = stein_features(wide, x.zero_(), wide.condition([""] * 30), levels=3, noises=32)
    assert float(wrong[:, 1].mean()) < float(found[:, 1].mean()) - 0.1
    model, x = on(RectifiedFlow()), some(400)
    few, far = (stein_features(model, y, model.condition([""] * len(y)), levels=4) for y in (x, x[:40] + 5))
    normal = NormalSamples("scoped", few[:300])
    assert float((normal.scores(far)[:, None] > normal.scores(few[300:])).double().mean()) > 0.95
    with pytest.raises(SettingError, match="at least 20, not 5"):
        NormalSamples("scoped", found[:5])


class SlowGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.01)
        return -gradient


def test_an_exact_trace_says_how_long_it_takes() -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return SlowGradient.apply(x)

    model = NetworkModel(Slow(), VP(), prediction.score, (30,))
    x = torch.zeros(640, 30)
    seconds = exact_seconds(model, x, model.condition([""] * 640), calls=10)
    assert 0.01 <= seconds / (10 * 30 * 20) < 0.05  # calls, gradients a call, and batches of 32
    condition = model.condition([""] * 32)
    said = slow_trace(model, x[:32], condition, None, 640)
    assert said is not None
    assert re.search(r"30 gradients a call: about \d+ minutes for 640 rows on this machine", said)
    assert "--probes 8" in said
    assert slow_trace(model, x[:32], condition, 2, 640) is None
    assert slow_trace(model, x[:32], condition, 0, 1) is None


def test_a_score_depends_on_no_other_sample() -> None:
    model, x = on(VP()), some(6)
    for method in ("path", "reconstruction", "norms", "scoped"):
        plan = ScoreSettings(method, levels=3)
        whole = raw_scores(plan, model, None, x, [""] * 6)[0]
        assert torch.allclose(whole[2:3], raw_scores(plan, model, None, x[2:3], [""])[0], atol=1e-5)


def test_the_centre_of_a_gaussian_is_likely_and_not_typical() -> None:
    """The paradox in closed form: of 200 numbers the mean has the greatest density, and nobody ever draws it."""
    dim = 200
    model = GaussianMixture(VE(), torch.ones(1), torch.zeros(1, dim), torch.eye(dim)[None])
    normal = model.sample(60, torch.Generator().manual_seed(0))
    odd = torch.zeros(1, dim)
    plan = ScoreSettings("path", levels=8, noises=4)
    rows, one = (raw_scores(plan, model, None, x, [""] * len(x))[0] for x in (normal, odd))
    exact = (0.5 * math.log(2 * math.pi) + normal.square().mean(1) / 2) / math.log(2)
    assert torch.allclose(rows[:, 0], exact.double(), atol=0.05)
    assert float(one[0, 0]) < float(rows.min())  # the least bits of all: most likely
    seen = NormalSamples("typicality", rows)
    assert float(seen.scores(one)) > float(seen.scores(rows).max())
    for method, make in (("norms", norm_features), ("scoped", stein_features)):
        features = make(model, torch.cat([normal, odd]), model.condition([""] * 61), levels=4)
        seen = NormalSamples(method, features[:60])
        assert float(seen.scores(features[60:])) > float(seen.scores(features[:60]).max())


def test_what_is_far_away_is_rebuilt_worse() -> None:
    model = on(VP())
    near, far = some(40), some(40) + 6.0
    condition = model.condition([""] * 40)
    errors = [reconstruction_error(model, x, condition) for x in (near, far)]
    assert float((errors[1][:, None] > errors[0]).double().mean()) > 0.95


def test_a_file_of_a_flat_picture_is_small() -> None:
    pictures = torch.zeros(3, 1, 16, 16)
    pictures[1] = torch.linspace(0, 1, 16).mul(255).round() / 255
    pictures[2] = torch.randint(256, (16, 16), generator=torch.Generator().manual_seed(0)) / 255
    bits = png_bits(pictures)
    assert float(bits[0]) == 0
    assert bits[0] < bits[1] < bits[2]
    assert 7.5 < float(bits[2]) < 9.5  # noise of 256 levels has 8 bits, and a file some more
    assert png_bits(pictures.expand(3, 3, 16, 16)).shape == (3,)


def test_what_is_refused() -> None:
    model, x = on(VP()), some(3)
    with pytest.raises(SettingError, match="Did you mean 'path'"):
        ScoreSettings("pathh")
    with pytest.raises(SettingError, match="least_noise is 50"):
        ScoreSettings("path", least_noise=50.0)
    with pytest.raises(SettingError, match="noise ends at"):
        raw_scores(ScoreSettings("path", least_noise=40.0), on(VE(sigma_max=20.0)), None, x, [""] * 3)
    with pytest.raises(SettingError, match="a model with its reference"):
        raw_scores(ScoreSettings("ratio"), model, None, x, [""] * 3)
    with pytest.raises(SettingError, match="8-bit pictures"):
        raw_scores(ScoreSettings("complexity"), model, None, x, [""] * 3)
    with pytest.raises(SettingError, match="there are 3 normal samples"):
        NormalSamples("norms", torch.rand(3, 5).double())
