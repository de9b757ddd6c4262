"""Which pairs are asked next: the gain by the formula, some always at random, and what is gained over chance."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from scoreact.feedback.choosing import CERTAIN, PairCandidates, choose_pairs, pairs_within
from scoreact.rewards.bradley_terry import BradleyTerryReward, UtilitySpace
from scoreact.rewards.sample_features import open_features


def posterior(covariance: Tensor, weights: Tensor) -> BradleyTerryReward:
    """On the numbers of a sample as they are."""
    width = len(weights)
    space = UtilitySpace(torch.zeros(width), torch.ones(width), (), False)
    return BradleyTerryReward(open_features("values", (width,)), space, torch.eye(width), weights, covariance, 1.0)


def candidates(differences: Tensor) -> PairCandidates:
    """Pairs of a sample and 0."""
    count = len(differences)
    features = torch.cat([differences, torch.zeros(count, differences.shape[1])])
    return PairCandidates(features, [""] * (2 * count), torch.arange(count), torch.arange(count) + count)


def rows(found: list[tuple[int, str]], kind: str) -> list[int]:
    return [row for row, chosen in found if chosen == kind]


def test_each_has_the_largest_determinant_given_those_before() -> None:
    generator = torch.Generator().manual_seed(0)
    covariance, weights = torch.diag(torch.tensor([2.0, 1.0, 0.5])), torch.tensor([0.3, -0.2, 0.1])
    given = candidates(torch.randn(30, 3, generator=generator))
    found = choose_pairs(posterior(covariance, weights), given, 6, generator)
    d = given.features[:30].double()
    variance = ((d @ covariance.double()) * d).sum(1)
    p = ((d @ weights.double()) / (1 + torch.pi * variance / 8).sqrt()).sigmoid()
    precision, left = torch.linalg.inv(covariance.double()), set(range(30)) - set(rows(found, "random"))
    for row in rows(found, "information"):
        gains = {i: float(torch.logdet(precision + p[i] * (1 - p[i]) * torch.outer(d[i], d[i]))) for i in left}
        assert row == max(gains, key=gains.__getitem__)
        precision = precision + p[row] * (1 - p[row]) * torch.outer(d[row], d[row])
        left.remove(row)


def test_a_fifth_is_drawn_at_random_and_nothing_twice() -> None:
    given = candidates(torch.randn(40, 2, generator=torch.Generator().manual_seed(1)))
    known = posterior(torch.eye(2), torch.zeros(2))
    drawn: Counter[int] = Counter()
    for seed in range(300):
        found = choose_pairs(known, given, 10, torch.Generator().manual_seed(seed))
        assert [chosen for _, chosen in found] == ["random"] * 2 + ["information"] * 8
        assert len({row for row, _ in found}) == 10
        drawn.update(rows(found, "random"))
    assert len(drawn) == 40
    assert max(drawn.values()) < 35  # each of 40 is drawn 15 times in 300, give or take 4
    assert len(choose_pairs(known, given, 99, torch.Generator())) == 40
    assert {chosen for _, chosen in choose_pairs(None, given, 10, torch.Generator())} == {"random"}


def test_what_is_certain_is_not_asked() -> None:
    """The widest pair would tell most, were its winner not plain."""
    d = torch.tensor([[20.0, 10.0], [0.0, 1.0], [0.0, 0.5], [0.1, 0.2], [0.0, 0.9]])
    known = posterior(torch.diag(torch.tensor([0.001, 1.0])), torch.tensor([1.0, 0.0]))
    mean, covariance = known.differences(d)
    assert float((mean[0] / (1 + torch.pi * covariance[0, 0] / 8).sqrt()).sigmoid()) > CERTAIN
    for seed in range(10):
        found = choose_pairs(known, candidates(d), 3, torch.Generator().manual_seed(seed))
        assert 0 not in rows(found, "information")


def test_for_dpo_winners_are_plain_and_samples_different() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(24, 2, generator=generator)
    known, given = (
        posterior(0.1 * torch.eye(2), torch.tensor([2.0, 0.0])),
        pairs_within(features, ["a", "b"] * 12, generator),
    )
    assert len(given.first) == 2 * 66
    found = choose_pairs(known, given, 8, generator, "gap")
    chosen = rows(found, "gap")
    gaps = (features[given.first] - features[given.second])[:, 0].abs()
    assert float(gaps[chosen].mean()) > 2 * float(gaps.mean())
    assert max(Counter([*given.first[chosen].tolist(), *given.second[chosen].tolist()]).values()) == 1
    assert all(given.prompts[given.first[row]] == given.prompts[given.second[row]] for row in chosen)
