"""Which pairs to ask about next: those that say most about the weights, those whose winner is plain, and always some at random.

An answer of probability p to a pair whose psi differ by d adds p (1 - p) d d^T to the information about w, so its gain is
1/2 log(1 + p (1 - p) d^T S d) and S loses a rank-one part: greedy D-optimal design (Chaloner & Verdinelli 1995). Only pairs
drawn at random may judge a reward: the others were chosen because the fit is unsure of them. Knows no store and no model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..rewards.bradley_terry import BradleyTerryReward

Chosen = Literal["random", "information", "gap"]
AT_RANDOM = 0.2  # share of what is asked
CERTAIN = 0.95  # a pair whose winner is surer than this is not asked for information
MOST = 1000  # pairs that are looked at


@dataclass(frozen=True)
class PairCandidates:
    """Pairs that could be asked. features: [N, F] of the samples; prompts: of each, N; first, second: rows of them, [M]."""

    features: Tensor
    prompts: Sequence[str]
    first: Tensor
    second: Tensor


def pairs_within(features: Tensor, prompts: Sequence[str], generator: torch.Generator) -> PairCandidates:
    """All pairs of samples of one prompt; of more than `MOST` a random part."""
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    found = torch.tensor([pair for own in rows.values() for pair in itertools.combinations(own, 2)]).reshape(-1, 2)
    found = found[torch.randperm(len(found), generator=generator)[:MOST]]
    return PairCandidates(features, prompts, found[:, 0], found[:, 1])


def choose_pairs(
    posterior: BradleyTerryReward | None,
    candidates: PairCandidates,
    count: int,
    generator: torch.Generator,
    purpose: Literal["information", "gap"] = "information",
) -> list[tuple[int, Chosen]]:
    """Which candidates to ask about, each once.

    Args:
        posterior: What is known of the utilities; None: nothing, so that all are drawn at random.
        candidates: What could be asked.
        count: How many to ask; all of them where there are fewer.
        generator: Of those drawn at random.
        purpose: "information", for a fit, or "gap", for `dpo`: winners that can be foretold, each sample once.

    Returns:
        Rows of the candidates, and how each was chosen, as `Store.add_task` keeps it.
    """
    count = min(count, len(candidates.first))
    order = torch.randperm(len(candidates.first), generator=generator)
    by_chance = order[: math.ceil(AT_RANDOM * count) if posterior is not None else count].tolist()
    found: list[tuple[int, Chosen]] = [(row, "random") for row in by_chance]
    if posterior is None or len(by_chance) == count:
        return found
    psi = posterior.space.vectors(candidates.features.double(), candidates.prompts)
    mean, covariance = posterior.differences(psi[candidates.first] - psi[candidates.second])
    logit = mean / (1 + torch.pi * covariance.diagonal() / 8).sqrt()  # in the mean over the posterior (MacKay 1992)
    free = torch.ones(len(logit), dtype=torch.bool)
    free[by_chance] = False
    if purpose == "gap":
        rows = _plain(logit, candidates, free, count - len(by_chance))
    else:
        rows = _telling(logit, covariance, free, count - len(by_chance))
    return found + [(row, purpose) for row in rows]


def _telling(logit: Tensor, covariance: Tensor, free: Tensor, count: int) -> list[int]:
    """One after another the largest gain, given those before; pairs that are certain already come last."""
    weight = logit.sigmoid() * (-logit).sigmoid()
    last = 1e-6 * (logit.abs().sigmoid() <= CERTAIN) + 1e-12
    rows: list[int] = []
    for _ in range(count):
        gain = torch.log1p(weight * covariance.diagonal().clamp(min=0)) * last
        best = int(gain.masked_fill(~free, -1).argmax())
        column, k = covariance[:, best], weight[best]
        covariance = covariance - torch.outer(column, column) * (k / (1 + k * column[best]))
        free[best] = False
        rows.append(best)
    return rows


def _plain(logit: Tensor, candidates: PairCandidates, free: Tensor, count: int) -> list[int]:
    """The largest odds first; a sample comes again only when all others are used."""
    rows: list[int] = []
    used = torch.zeros(len(candidates.prompts), dtype=torch.int64)
    for _ in range(count):
        again = used[candidates.first].maximum(used[candidates.second])
        best = int((logit.abs() - 1e6 * again).masked_fill(~free, -torch.inf).argmax())
        used[candidates.first[best]] += 1
        used[candidates.second[best]] += 1
        free[best] = False
        rows.append(best)
    return rows


def choosing_by(
    posterior: BradleyTerryReward, generator: torch.Generator, purpose: Literal["information", "gap"] = "information"
) -> Callable[[Sequence[str], Tensor, Tensor, int], list[tuple[int, Chosen]]]:  # fmt: skip
    """What `draw_tasks` asks: prompts of P pairs, their decoded samples [P, *D] twice, how many -> `choose_pairs` of them."""

    def choose(prompts: Sequence[str], first: Tensor, second: Tensor, count: int) -> list[tuple[int, Chosen]]:
        both, rows = [*prompts, *prompts], torch.arange(len(prompts))
        features = posterior.features.in_parts(torch.cat([first, second]), both)
        candidates = PairCandidates(features, both, rows, rows + len(prompts))
        return choose_pairs(posterior, candidates, count, generator, purpose)

    return choose
