"""Anomaly scores: against closed forms on mixtures, and the likelihood paradox where it can be worked out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreact.dynamics.schedule import VE, VP, RectifiedFlow, Schedule
from scoreact.evaluation.anomaly_scores import (
    NormalSamples,
    ScoreSettings,
    norm_features,
    path_log_prob,
    path_log_ratio,
    png_bits,
    raw_scores,
    reconstruction_error,
)
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.gaussian import mixture, quadratic_reward
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
    found = path_log_ratio(best, model, x, condition, levels=24, noises=64)
    wanted = (reward(x, condition).double() - optimum) / beta
    assert float(torch.corrcoef(torch.stack([found, wanted]))[0, 1]) > 0.99
    assert torch.allclose(found, wanted, atol=0.25)
    # a few calls tell the order as well: all samples meet the same noise
    few = path_log_ratio(best, model, x, condition, levels=8, noises=2)
    assert float(torch.corrcoef(torch.stack([few, wanted]))[0, 1]) > 0.95


def test_a_score_depends_on_no_other_sample() -> None:
    model, x = on(VP()), some(6)
    for method in ("path", "reconstruction", "norms"):
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
    features = norm_features(model, torch.cat([normal, odd]), model.condition([""] * 61), levels=4)
    seen = NormalSamples("norms", features[:60])
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
    with pytest.raises(SettingError, match="tuned model with its reference"):
        raw_scores(ScoreSettings("ratio"), model, None, x, [""] * 3)
    with pytest.raises(SettingError, match="8-bit pictures"):
        raw_scores(ScoreSettings("complexity"), model, None, x, [""] * 3)
    with pytest.raises(SettingError, match="there are 3 normal samples"):
        NormalSamples("norms", torch.rand(3, 5).double())
