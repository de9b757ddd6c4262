"""A reward made of labelled data: its probabilities and the law it asks for, against closed forms; and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.schedule import VP
from scoreact.evaluation.optimum import estimate_optimum
from scoreact.feedback.classify import best_temperature, classify, fit_softmax
from scoreact.feedback.log_ratio import calibration
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.rewards.class_probability import ClassProbability
from scoreact.rewards.learned import open_learned
from scoreact.support.own_data import Examples, OwnData
from scoreact.types import Condition

WEIGHTS = torch.tensor([0.7, 0.3])
MEANS = torch.tensor([[-0.8, 0.2], [0.9, -0.3]])


def mixture() -> GaussianMixture:
    """Two components of one covariance: which one a point is from is a linear logit."""
    return GaussianMixture(VP(t_max=0.99), WEIGHTS, MEANS, 0.6 * torch.eye(2).repeat(2, 1, 1))


def exact(x: Tensor) -> Tensor:
    """log p(component | x), [N, 2]."""
    square = (x[:, None] - MEANS.to(x)).square().sum(2)
    return (WEIGHTS.to(x).log() - square / (2 * 0.6)).log_softmax(1)


def labelled(count: int, seed: int) -> OwnData:
    """Points of the mixture with their component, a fifth held out."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(count, generator=generator) < WEIGHTS[1]).long()
    x = MEANS[y] + math.sqrt(0.6) * torch.randn(count, 2, generator=generator)
    both = Examples(x, y)
    return OwnData("vectors", both[count // 5 :], both[: count // 5], ("common", "rare"))


@pytest.fixture(scope="module")
def reward() -> ClassProbability:
    return classify(labelled(20_000, 1), "rare", features="values", ridge=1e-9)


def nothing(count: int) -> Condition:
    return Condition([""] * count)


def test_the_reward_is_the_log_probability_within_its_standard_error(reward: ClassProbability) -> None:
    x = mixture().sample(2000, torch.Generator().manual_seed(2)).double()
    p = exact(x).exp()[:, 1]
    design = torch.cat([x, torch.ones(2000, 1)], 1)
    information = 16_000 * (design * (p * (1 - p))[:, None]).T @ design / 2000  # of the logit, by Fisher
    error = (1 - p) * (design @ torch.linalg.inv(information) * design).sum(1).sqrt()
    found = reward(x, nothing(2000))
    z = (found - p.log()) / error
    assert 0.1 < float(z.square().mean().sqrt()) < 2.5  # three directions of error, and the temperature's
    assert reward.temperature == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(reward.probability(x), found.exp())
    facts = reward.facts["by_class"][1]
    assert facts["share"] == pytest.approx(0.3, abs=0.03)
    assert facts["calibration_error"] < 0.02


def test_at_kl_weight_1_the_tilted_law_is_the_component_and_j_star_the_log_of_its_share(
    reward: ClassProbability,
) -> None:
    x = mixture().sample(40_000, torch.Generator().manual_seed(3)).double()
    r = reward(x, nothing(len(x)))
    w = r.exp() / r.exp().sum()
    torch.testing.assert_close(w @ x, MEANS[1].double(), atol=0.04, rtol=0)
    centred = x - w @ x
    torch.testing.assert_close((centred * w[:, None]).T @ centred, 0.6 * torch.eye(2).double(), atol=0.04, rtol=0)
    found = estimate_optimum(r, nothing(len(x)), 1.0)
    assert found["objective/J_star"] == pytest.approx(math.log(0.3), abs=0.03)


@pytest.mark.slow
def test_a_model_tuned_to_it_draws_the_component(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classify(labelled(20_000, 1), "rare", tmp_path / "rare", features="values", ridge=1e-9)
    result = sa.finetune(
        ResidualModel(mixture(), dim=2), str(tmp_path / "rare"), algorithm="adjoint_matching", kl_weight=1.0, steps=20,
        grid="log_snr", iterations=60, batch_size=256, minibatch_size=512, learning_rate=2e-3, epochs=1, heldout_samples=4000,
        evaluate_every=60, progress=False, reference_batches=8,
    )  # fmt: skip
    first, last = (line["reward/share"] for line in result.history if "reward/share" in line)
    assert first == pytest.approx(0.3, abs=0.03)
    own = exact(MEANS[1] + math.sqrt(0.6) * torch.randn(20_000, 2)).exp()[:, 1].mean()  # what the component itself has
    assert last == pytest.approx(float(own), abs=0.04)
    assert float((result.sample(count=4000).mean(0) - MEANS[1]).norm()) < 0.15


def test_the_temperature_is_found_and_flat_logits_are_sharpened() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for factor in (0.25, 1.0, 3.0):
        assert best_temperature(factor * logits, y) == pytest.approx(factor, rel=0.05)
    separable = torch.eye(3, dtype=torch.float64)
    assert best_temperature(separable, torch.arange(3)) == pytest.approx(1 / 20, rel=1e-3)  # no sharper than that


def test_a_head_that_learned_by_heart_is_calibrated() -> None:
    """40 examples and 30 features of noise: far too sure. The error after is measured on examples left out."""
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(1040) % 2
    x = torch.randn(1040, 30, generator=generator) + 0.5 * y[:, None] * (torch.arange(30) < 2)
    data = OwnData("vectors", Examples(x[:40], y[:40]), Examples(x[40:], y[40:]), ("no", "yes"))
    found = classify(data, "yes", features="values", ridge=1e-6)
    assert found.temperature > 3
    after, before = (found.facts["by_class"][1][f"calibration_error{word}"] for word in ("", "_before"))
    assert after < 0.06 < 0.2 < before
    assert found.facts["log_loss"] < math.log(2) + 0.02 < found.facts["log_loss_before"]
    odds = found.probability(x[40:]).double().logit()
    assert calibration(odds, y[40:].bool())[1] < 0.06, "of the reward itself"


def test_three_classes_are_those_of_scikit_learns_softmax_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(6)
    y = torch.arange(600) % 3
    x = torch.randn(600, 4, generator=generator, dtype=torch.float64) + y[:, None] * torch.tensor([0.6, -0.4, 0.0, 0.2])
    ridge = 0.01
    head = fit_softmax(x, y, 3, ridge)
    z = (x - x.mean(0)) / (x.std(0) * (1 + 1e-3 * x.std(0).mean() / x.std(0)))
    other = linear_model.LogisticRegression(C=1 / (2 * ridge * 600), tol=1e-10, max_iter=5000).fit(z.numpy(), y.numpy())
    expected = torch.from_numpy(other.predict_proba(z.numpy()))
    torch.testing.assert_close(head.logits(x).softmax(1), expected, atol=1e-4, rtol=0)


def test_a_folder_serves_every_class(tmp_path: Path) -> None:
    data = labelled(2000, 7)
    made = classify(data, "rare", tmp_path / "rare", features="values")
    assert {p.name for p in (tmp_path / "rare").iterdir()} == {"reward.json", "reward.safetensors", "reliability.png"}
    x, condition = data.heldout.values, nothing(400)
    torch.testing.assert_close(open_learned(tmp_path / "rare")(x, condition), made(x, condition))
    other = sa.load_reward(str(tmp_path / "rare"), target="common")
    torch.testing.assert_close(other(x, condition).exp() + made(x, condition).exp(), torch.ones(400))
    assert (
        made.facts["by_class"][1]["auc"]
        == json.loads((tmp_path / "rare/reward.json").read_text())["by_class"][1]["auc"]
    )
    with pytest.raises(ValueError, match="unknown class 'comon'; known: common, rare\\. Did you mean 'common'"):
        sa.load_reward(str(tmp_path / "rare"), target="comon")
    with pytest.raises(ValueError, match="leave caution out"):
        open_learned(tmp_path / "rare", caution=1.0)
    with pytest.raises(sa.RunExists, match="not empty"):
        classify(data, "rare", tmp_path / "rare")


def test_what_cannot_be_told_apart_is_refused() -> None:
    data = labelled(2000, 8)
    with pytest.raises(ValueError, match="unknown class 'ill'; known: common, rare"):
        classify(data, "ill")
    with pytest.raises(ValueError, match="no classes to tell apart; give labels"):
        classify(OwnData("vectors", Examples(data.train.values), Examples(data.heldout.values)), "rare")
    assert data.heldout.labels is not None
    few = data.heldout[data.heldout.labels.argsort(descending=True)[-290:]]
    assert few.labels is not None
    count = int(few.labels.sum())
    assert count < 20
    with pytest.raises(ValueError, match=f"class 'rare' has {count} examples held out, too few to calibrate by"):
        classify(OwnData("vectors", data.train, few, data.classes), "rare")
    with pytest.raises(ValueError, match="ridge is 0"):
        classify(data, "rare", ridge=0)
