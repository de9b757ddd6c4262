"""Bradley-Terry on features: another library's results, a published example, derivatives, and data of known utilities."""

from __future__ import annotations

import math

import choix
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian

from scoreact.feedback.preferences import (
    FIRST,
    NO_PAIRS,
    NO_RATINGS,
    SECOND,
    TIE,
    Compared,
    Rated,
    _Answers,
    _pair,
    _rating,
    fit,
    log_likelihoods,
)  # fmt: skip
from scoreact.feedback.simulated import SimulatedRater, simulate
from scoreact.support.errors import FeedbackError

# Davidson (1970), chocolate puddings: brands i and j, preferences for i, for j, for none
PUDDING = """1 2 19 22 16; 1 3 16 19 12; 2 3 19 19 10; 1 4 18 23 13; 2 4 23 19 9; 3 4 19 20 15; 1 5 13 19 18; 2 5 16 20 12;
3 5 16 15 17; 4 5 17 14 16; 1 6 18 21 12; 2 6 22 20 12; 3 6 13 18 10; 4 6 14 19 18; 5 6 11 21 12"""
# the R package PlackettLuce's maximum likelihood, as printed in its vignette: worths that sum to one, and the tie's
WORTHS, TIED = [0.1388005, 0.1729985, 0.1617420, 0.1653930, 0.1586805, 0.2023855], 0.7468147


def compared(rows: list[tuple[int, int, int]], side: Tensor | None = None) -> Compared:
    """One rater's answers (first, second, winner)."""
    first, second, winner = torch.tensor(rows).T
    none = torch.zeros_like(first)
    return Compared(first, second, winner, none if side is None else side, none, torch.ones(len(rows)).double())


def drawn(count: int, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first = torch.randint(items, (count,), generator=generator)
    return first, (first + 1 + torch.randint(items - 1, (count,), generator=generator)) % items


def test_it_is_choix_s_estimate_on_items_without_features() -> None:
    generator = torch.Generator().manual_seed(0)
    utility = torch.randn(8, generator=generator)
    pairs = simulate([SimulatedRater()], utility, *drawn(300, 8, generator), generator)
    none = Compared(pairs.first, pairs.second, pairs.winner, torch.zeros_like(pairs.side), pairs.rater, pairs.weight)
    won = [
        (a, b) if w == 0 else (b, a)
        for a, b, w in zip(*map(Tensor.tolist, (none.first, none.second, none.winner)), strict=True)
    ]
    expected = choix.opt_pairwise(8, won, alpha=0.25)  # its penalty is alpha |w|^2
    found = fit(torch.eye(8), none, precision=0.5)
    np.testing.assert_allclose(found.weights, expected, atol=1e-4)


def test_davidson_s_puddings() -> None:
    rows = []
    for text in PUDDING.split(";"):
        i, j, *counts = map(int, text.split())
        rows += [(i - 1, j - 1, w) for w, count in zip((FIRST, SECOND, TIE), counts, strict=True) for _ in range(count)]
    found = fit(torch.eye(6), compared(rows), precision=1e-9)
    np.testing.assert_allclose(found.weights.softmax(0), WORTHS, atol=1e-4)  # theirs stops after 7 iterations
    assert math.exp(found.tie) == pytest.approx(TIED, abs=5e-3)  # in the mean over the posterior


def test_what_may_be_answered_sums_to_one() -> None:
    numbers = torch.tensor([[0.3, -1.1, 0.4, -0.7, 0.2, -0.5]]).double()
    winners = torch.cat([torch.eye(4), torch.zeros(4, 4)], 1).double()
    pair = _pair(numbers[:, :2].expand(4, -1), numbers[:, 2:].expand(4, -1), winners)
    assert float(pair.exp().sum()) == pytest.approx(1, abs=1e-12)
    thresholds = torch.tensor([0.0, -1.0, -0.2, 0.5, 2.0, 0.0]).double()
    others = torch.cat([numbers[:, 1:3].expand(5, -1), torch.stack([thresholds[:-1], thresholds[1:]], 1)], 1)
    far = torch.tensor([[-40.0, 0, 0, 0, 0], [0, 0, 0, 0, 40]]).double().T
    assert float(_rating(numbers[:, :1].expand(5, -1), others, far).exp().sum()) == pytest.approx(1, abs=1e-12)


def everything(generator: torch.Generator) -> tuple[Tensor, Compared, Rated]:
    """A design and all kinds of answer to it by three raters."""
    design = torch.randn(20, 4, generator=generator).double()
    raters = [
        SimulatedRater(1.5, 0.5, 0.0, -1.0), SimulatedRater(0.5, -1.0, -0.5, -1.5), SimulatedRater(1.0, 0.0, 0.0, -1.0)
    ]  # fmt: skip
    pairs = simulate(raters, design @ torch.ones(4).double(), *drawn(60, 20, generator), generator)
    score = torch.arange(40) % 2 == 0
    value = torch.where(
        score, torch.randint(1, 6, (40,), generator=generator), torch.randint(2, (40,), generator=generator)
    )
    return design, pairs, Rated(torch.arange(40) % 20, value, score, torch.arange(40) % 3)


def test_derivatives_are_autograd_s() -> None:
    generator = torch.Generator().manual_seed(1)
    answers = _Answers(*everything(generator), 3, 0.7)
    own = answers.start + 0.1 * torch.randn(len(answers.start), generator=generator)
    weights = torch.randn(4, generator=generator).double()
    found, wanted = [torch.zeros(4).double(), torch.zeros(4, 4).double()], lambda w: answers.loss(w[:, None], own)
    for block in answers.blocks:
        block.add_in_weights(weights, own, *found)
    torch.testing.assert_close(found, [grad(wanted)(weights), hessian(wanted)(weights)])
    columns = torch.stack([weights, weights.flip(0)], 1)
    found = [torch.zeros(len(own)).double(), torch.zeros(len(own), len(own)).double()]
    for block in answers.blocks:
        block.add_in_own(columns, own, False, *found)
    torch.testing.assert_close(found, [grad(answers.loss, 1)(columns, own), hessian(answers.loss, 1)(columns, own)])


def test_the_covariance_is_the_inverse_of_all_second_derivatives() -> None:
    answers = _Answers(*everything(torch.Generator().manual_seed(1)), 3, 300.0)
    found = torch.linalg.inv(answers.covariance(torch.zeros(4).double(), answers.start))
    both = torch.cat([torch.zeros(4).double(), answers.start])
    prior = torch.block_diag(300.0 * torch.eye(4).double(), answers.prior)
    torch.testing.assert_close(
        found, hessian(lambda v: answers.loss(v[:4, None], v[4:]))(both) + prior, rtol=1e-4, atol=1e-4
    )


def test_answers_may_come_in_any_order_and_their_likelihoods_add() -> None:
    generator = torch.Generator().manual_seed(2)
    design, pairs, ratings = everything(generator)
    found = fit(design, pairs, ratings, 3, 0.7)
    again = fit(design, pairs[torch.randperm(60, generator=generator)], ratings, 3, 0.7)
    torch.testing.assert_close(found.weights, again.weights, atol=1e-4, rtol=1e-4)
    whole = log_likelihoods(found, design, pairs, ratings)
    parts = [log_likelihoods(found, design, pairs), log_likelihoods(found, design, ratings=ratings)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_raters_are_taken_as_they_are_known() -> None:
    generator = torch.Generator().manual_seed(2)
    design, pairs, ratings = everything(generator)
    found = fit(design, pairs, ratings, 3, 0.7)
    again = fit(design, pairs, ratings, 3, found.precision, known=found)
    torch.testing.assert_close(found.weights, again.weights, atol=1e-5, rtol=1e-5)
    assert bool(
        (again.covariance.diagonal() < found.covariance.diagonal()).all()
    )  # what raters are like is not in doubt


@pytest.mark.slow
def test_intervals_hold_what_they_say_over_repeats() -> None:
    """Weights, temperatures and sides drawn of their priors: nine in ten are within their 90 % intervals."""
    inside: dict[str, list[Tensor]] = {"utilities": [], "temperatures": [], "sides": []}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        design = torch.randn(80, 5, generator=generator).double()
        weights, own = torch.randn(5, generator=generator).double(), torch.randn(2, 3, generator=generator).double()
        own[0] -= own[0].median()  # the unit
        raters = [SimulatedRater(float(a.exp()), float(b), 0.0) for a, b in own.T]
        found = fit(design, simulate(raters, design @ weights, *drawn(240, 80, generator), generator), raters=3)
        apart = design[:10] - design[10:20]
        spread = ((apart @ found.covariance) * apart).sum(1).sqrt()
        inside["utilities"].append((apart @ (found.weights - weights)).abs() < 1.645 * spread)
        for which, name in enumerate(("temperatures", "sides")):
            value, spread = found.of_raters(which)
            others = torch.ones(3, dtype=torch.bool) if which else own[0] != 0
            inside[name].append((value - own[which])[others].abs() < 1.645 * spread[others])
    shares = {name: float(torch.cat(found).double().mean()) for name, found in inside.items()}
    assert shares == pytest.approx(dict.fromkeys(inside, 0.9), abs=0.08), shares


def test_the_careless_and_the_biased_are_found_and_do_not_bend_the_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    design, weights = torch.randn(200, 3, generator=generator).double(), torch.tensor([1.0, -1.0, 0.5]).double()
    raters = [SimulatedRater(), SimulatedRater(), SimulatedRater(0.0), SimulatedRater(1.0, 3.0), SimulatedRater()]
    pairs = simulate(raters, design @ weights, *drawn(1500, 200, generator), generator)
    found = fit(design, pairs, raters=5, precision=0.1)
    temperature, side = found.of_raters(0)[0].exp(), found.of_raters(1)[0]
    others = torch.tensor([0, 1, 3, 4])
    assert float(temperature[2]) < 0.25 * float(temperature[others].min())
    assert float(side[3]) == pytest.approx(3.0, abs=0.8)
    assert float(side[[0, 1, 4]].abs().max()) < 0.6
    cosine = torch.nn.functional.cosine_similarity(found.weights, weights, dim=0)
    assert float(cosine) > 0.98


def test_both_bad_says_where_utilities_stand_and_pairs_alone_do_not() -> None:
    """A constant feature cancels in every pair; it is the prior's without "both bad" and close to the truth with it."""
    generator = torch.Generator().manual_seed(4)
    design = torch.cat([torch.randn(100, 2, generator=generator), torch.ones(100, 1)], 1).double()
    utility = design @ torch.tensor([1.0, 1.0, 2.0]).double()
    for both_bad in (None, 0.0):
        pairs = simulate([SimulatedRater(both_bad=both_bad)], utility, *drawn(600, 100, generator), generator)
        found = fit(design, pairs, precision=0.1)
        if both_bad is None:
            assert float(found.weights[2].abs()) < 1e-6
        else:
            assert float(found.weights[2]) - found.both_bad == pytest.approx(2.0, abs=0.5)


def test_thumbs_and_scores_give_the_utilities_of_the_samples() -> None:
    generator = torch.Generator().manual_seed(5)
    design, weights = torch.randn(400, 2, generator=generator).double(), torch.tensor([2.0, -1.0]).double()
    noisy = design @ weights + torch.logit(torch.rand(400, generator=generator).double())
    thumbs, none = (noisy > 0.5).long(), torch.zeros(400, dtype=torch.int64)
    scores = 1 + torch.bucketize(noisy, torch.tensor([-2.0, -0.5, 0.5, 2.0]).double())
    every = torch.arange(400)
    for value, is_score in ((thumbs, False), (scores, True)):
        ratings = Rated(every, value, torch.full((400,), is_score), none)
        found = fit(design, ratings=ratings, precision=0.01)
        error = found.covariance.diagonal().sqrt()
        assert bool(((found.weights - weights).abs() < 3 * error).all())
        assert float(error.max()) < 0.35
    assert found.thresholds[1:].tolist() == pytest.approx([-2.0, -0.5, 0.5, 2.0], abs=0.6)


def test_moderated_odds_are_nearer_to_even_and_follow_the_side() -> None:
    rows = [(0, 1, FIRST)] * 5 + [(1, 2, SECOND)] * 2
    pairs = compared(rows, torch.tensor([1, 1, 1, -1, -1, 1, -1]))
    found = fit(torch.eye(3), pairs, precision=0.5)
    plain, moderated = (found.logit(torch.eye(3).double(), pairs, moderated=m) for m in (False, True))
    assert bool((moderated.abs() < plain.abs()).all())
    assert bool((plain.sign() == moderated.sign()).all())
    assert float(plain[0] - plain[3]) == pytest.approx(2 * float(found.of_raters(1)[0]))


def test_no_answer_is_refused() -> None:
    with pytest.raises(FeedbackError, match="rate some pairs first"):
        fit(torch.eye(2), NO_PAIRS, NO_RATINGS)
