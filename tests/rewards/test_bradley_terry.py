"""A reward fitted to answers: its utility and uncertainty by the formula, and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scoreact.rewards import load
from scoreact.rewards.bradley_terry import BIAS, BradleyTerryReward, UtilitySpace
from scoreact.rewards.learned import save_learned
from scoreact.rewards.sample_features import open_features
from scoreact.types import Condition

PROMPTS = ["a red shoe", "a bag", "a red bag"]
CONDITION = Condition(["a bag", "a red shoe", "a bag", "a red bag", "something new"])


def reward(by_word: bool = True, **changes: Any) -> BradleyTerryReward:
    """On two numbers, with two directions of psi fitted."""
    g = torch.Generator().manual_seed(0)
    space = UtilitySpace.of(torch.randn(30, 2, generator=g), PROMPTS * 10, by_word)
    width = space.vectors(torch.zeros(1, 2), PROMPTS[:1]).shape[1]
    basis = torch.linalg.qr(torch.randn(width, 2, generator=g))[0]
    given: dict[str, Any] = {
        "features": open_features("values", (2,)), "space": space, "basis": basis, "weights": torch.tensor([1.0, -2.0]),
        "covariance": torch.tensor([[0.3, 0.1], [0.1, 0.2]]), "precision": 0.5,
    }  # fmt: skip
    return BradleyTerryReward(**{**given, **changes})


def samples() -> Tensor:
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(1))


def whole_covariance(r: BradleyTerryReward) -> Tensor:
    eye = torch.eye(len(r.basis))
    return r.basis @ r.covariance @ r.basis.T + (eye - r.basis @ r.basis.T) / r.precision


@pytest.mark.parametrize("by_word", [False, True])
def test_utility_and_sigma_are_the_formula_s(by_word: bool) -> None:
    r, x = reward(by_word), samples()
    psi = r.space.vectors(x, CONDITION.prompts)
    q = r.space.bag(CONDITION.prompts)
    assert psi.shape[1] == 2 + 4 * 2 * by_word + 4
    torch.testing.assert_close(psi[:, -4:], BIAS * q)
    torch.testing.assert_close(r(x, CONDITION), psi @ r.basis @ r.weights)
    apart = r.space.vectors(x, CONDITION.prompts, offset=False)
    variance = ((apart @ whole_covariance(r)) * apart).sum(1)
    torch.testing.assert_close(r.uncertainty(x, CONDITION), variance.sqrt())
    cautious = reward(by_word, caution=2.0)
    torch.testing.assert_close(cautious(x, CONDITION), r(x, CONDITION) - 2 * variance.sqrt())


def test_sigma_grows_with_the_distance_and_is_nothing_at_the_mean() -> None:
    r, middle = reward(), reward().space.mean
    away = torch.tensor([1.0, -1.0])
    near, far, mean = (r.uncertainty((middle + k * away)[None], Condition(["a bag"])) for k in (1, 10, 0))
    assert float(far) == pytest.approx(10 * float(near), rel=1e-3)
    assert float(mean) < 1e-3


def test_it_has_a_gradient_also_at_the_mean() -> None:
    r = reward(caution=1.0)
    x = torch.cat([samples()[:4], r.space.mean[None]]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(r(x, CONDITION).sum(), x)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().min(1).values.max()) > 0


def test_words_that_nobody_was_asked_about_are_left_out() -> None:
    r, x = reward(), samples()
    torch.testing.assert_close(r(x, Condition(["a bag"] * 5)), r(x, Condition(["a bag blue"] * 5)))
    one = UtilitySpace.of(x, ["the only prompt"] * 5, True)
    assert one.words == ()
    assert one.vectors(x, ["another"] * 5).shape == (5, 2)
    many = UtilitySpace.of(x, [f"word{i} and more{i}" for i in range(60)], True)
    assert many.words is None
    assert not torch.equal(many.bag(["word1"]), many.bag(["word2"]))


def test_differences_are_those_of_single_utilities() -> None:
    r, x = reward(), samples()
    psi = r.space.vectors(x, CONDITION.prompts)
    vectors = psi[:4] - psi[1:]
    mean, covariance = r.differences(vectors)
    utility = r(x, CONDITION)
    torch.testing.assert_close(mean, utility[:4] - utility[1:])
    torch.testing.assert_close(covariance, vectors @ whole_covariance(r) @ vectors.T)


def test_a_folder_gives_it_back_with_another_caution(tmp_path: Path) -> None:
    r, x = reward(facts={"accuracy": 0.8}), samples()
    save_learned(r, tmp_path / "liking")
    found = load(str(tmp_path / "liking"))
    assert torch.equal(found(x, CONDITION), r(x, CONDITION))
    assert found.facts == {"accuracy": 0.8}
    cautious = load(str(tmp_path / "liking"), caution=1)
    torch.testing.assert_close(cautious(x, CONDITION), r(x, CONDITION) - r.uncertainty(x, CONDITION))
    for wrong in (-1.0, "much"):
        with pytest.raises(ValueError, match=r"caution is .*; give a number of sigma, 0 or more"):
            load(str(tmp_path / "liking"), caution=wrong)
    with pytest.raises(ValueError, match="has no option 'cation'"):
        load(str(tmp_path / "liking"), cation=1)
