"""A reward of what people answered: features and prompts by what they predict, weights by Newton, and how good it is.

Every choice is by the held-out log-likelihood: answers are predicted by a fit that saw no answer to the same pair. Only pairs
that were drawn at random judge the result. Knows answers and features; does not know models or pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..rewards.bradley_terry import BradleyTerryReward, UtilitySpace
from ..rewards.sample_features import Features, open_features
from ..runs.films import as_picture
from .answers import Share
from .evidence import Evidence
from .preferences import Compared, Fitted, fit, log_likelihood

FOLDS = 5
PRECISIONS = tuple(10 ** (k / 2) for k in range(1, -6, -1))  # of w: |psi|^2 is about 1, so u varies by 0.6 to 18
MOST = 300  # directions of psi that are fitted; of the others the prior stands
BINS = 5  # of the calibration
SHOWN, SIDE = 12, 128  # samples in a row of the picture, and pixels of each


@dataclass(frozen=True)
class Candidate:
    """Features with a way to read the prompts, and what a fit on them foretold.

    Args:
        spec: of the features; by_word: whether their weights differ by the prompt's words.
        precision: of the weights' prior, the best of `PRECISIONS`.
        likelihood: mean log P(answer) of answers left out; `ignorant`: of a fit without features.
        logits: that the first of a pair wins, by the fit that did not see it, [A].
    """

    spec: str
    by_word: bool
    precision: float
    likelihood: float
    ignorant: float
    logits: Tensor


def fit_reward(
    evidence: Evidence, features: Sequence[str] = (), generator: torch.Generator | None = None
) -> BradleyTerryReward:
    """Fit a reward to answers.

    Args:
        evidence: Of `read_evidence`.
        features: Candidates, as `open_features` takes them; left out, those of `usual_features`.
        generator: Of the folds.

    Returns:
        The reward, in nats of odds of one rater. Its `facts` are what the fit found: `candidates`, `accuracy`,
        `accuracy_interval`, `calibration`, `raters`, `self_agreement`, `between_raters`, ...

    Raises:
        FeedbackError: There is no answer. RewardError: Features that are not there, or are none of such samples.
    """
    generator = generator or torch.Generator().manual_seed(0)
    folds = folds_of(evidence, generator)
    opened = [open_features(spec, evidence.samples.shape[1:]) for spec in features or usual_features(evidence.samples)]
    seen = [one.in_parts(evidence.samples).cpu().double() for one in opened]
    ways = (False, True) if len(set(evidence.prompts)) > 1 else (False,)
    tried: list[tuple[Candidate, Features, UtilitySpace, Tensor, Tensor]] = []
    for one, found in zip(opened, seen, strict=True):
        for by_word in ways:
            space = UtilitySpace.of(found, evidence.prompts, by_word)
            basis, design = basis_of(space.vectors(found, evidence.prompts))
            tried.append((judged(one.spec, by_word, evidence, design, folds), one, space, basis, design))
    best, chosen, space, basis, design = max(tried, key=lambda entry: entry[0].likelihood)
    fitted = fit(design, evidence.pairs, evidence.ratings, len(evidence.raters), best.precision)
    return BradleyTerryReward(
        chosen, space, basis.float(), fitted.weights.float(), fitted.covariance.float(), best.precision,
        facts=facts_of(evidence, [entry[0] for entry in tried], best, fitted),
    )  # fmt: skip


def usual_features(samples: Tensor) -> tuple[str, ...]:
    """What is tried where nobody names features of decoded samples [N, *D]."""
    if samples.ndim != 4:
        return ("values", "convolution") if samples.ndim < 4 else ("convolution",)
    return ("convolution", "pixels", *(("classifier",) if samples.shape[1:] == (1, 28, 28) else ()))


def basis_of(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """V [P, R], orthonormal, of the span of psi [N, P], and psi V; the `MOST` widest directions."""
    n, p = vectors.shape
    values, found = torch.linalg.eigh(vectors.T @ vectors if p <= n else vectors @ vectors.T)
    kept = (values > 1e-9 * values[-1]) & (torch.arange(len(values)) >= len(values) - MOST)
    basis = found[:, kept] if p <= n else vectors.T @ found[:, kept] / values[kept].sqrt()
    return basis, vectors @ basis


def folds_of(evidence: Evidence, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The fold of each pair and of each rating; what is about one task, or one rated sample, is in one."""

    def some(group: Tensor) -> Tensor:
        names, place = torch.unique(group, return_inverse=True)
        return (torch.randperm(len(names), generator=generator) % FOLDS)[place]

    return some(evidence.group), some(evidence.ratings.sample)


def judged(spec: str, by_word: bool, evidence: Evidence, design: Tensor, folds: tuple[Tensor, Tensor]) -> Candidate:
    """The best precision of a design [N, R], and what the fits on the other folds say of each answer."""
    count = len(evidence.pairs) + len(evidence.ratings)
    ignorant = held_out(evidence, design[:, :0], folds, [1.0])[0][0] / count
    totals, logits = held_out(evidence, design, folds, PRECISIONS)
    best = max(range(len(totals)), key=totals.__getitem__)
    return Candidate(spec, by_word, PRECISIONS[best], totals[best] / count, ignorant, logits[best])


def held_out(
    evidence: Evidence, design: Tensor, folds: tuple[Tensor, Tensor], precisions: Sequence[float]
) -> tuple[list[float], Tensor]:
    """Of each precision the log-likelihood of all answers by fits that did not see them, and the pairs' logits [K, A].

    What raters are like is taken from all answers, at the middle precision: a few numbers, which learn nothing by heart.
    """
    pairs, ratings, raters = evidence.pairs, evidence.ratings, len(evidence.raters)
    known = fit(design, pairs, ratings, raters, precisions[len(precisions) // 2])
    totals, logits = [0.0] * len(precisions), torch.zeros(len(precisions), len(pairs), dtype=torch.float64)
    for fold in range(FOLDS):
        out, rated_out = folds[0] == fold, folds[1] == fold
        if not bool(out.any() | rated_out.any()) or bool(out.all() & rated_out.all()):
            continue
        for k, precision in enumerate(precisions):
            found = fit(design, pairs[~out], ratings[~rated_out], raters, precision, known)
            totals[k] += log_likelihood(found, design, pairs[out], ratings[rated_out])
            logits[k, out] = found.logit(design, pairs[out])
    return totals, logits


# --- what it says of itself ----------------------------------------------------------------------------------------------


def facts_of(evidence: Evidence, tried: Sequence[Candidate], best: Candidate, fitted: Fitted) -> dict[str, Any]:
    """Of a fit, for its folder and for the screen."""
    pairs, judges = evidence.pairs, evidence.judges
    accuracy = accuracy_of(best.logits[judges], pairs[judges])
    (a, a_error), (b, b_error) = fitted.of_raters(0), fitted.of_raters(1)
    raters = [
        {
            "rater": name,
            "answers": int((pairs.rater == r).sum() + (evidence.ratings.rater == r).sum()),
            "weight": float(a[r].exp()),
            "weight_interval": [float((a[r] + sign * 1.96 * a_error[r]).exp()) for sign in (-1, 1)],
            "left_at_equal": float(b[r].sigmoid()),
            "left_interval": [float((b[r] + sign * 1.96 * b_error[r]).sigmoid()) for sign in (-1, 1)],
        }
        for r, name in enumerate(evidence.raters)
    ]
    found: dict[str, Any] = {
        "question": evidence.question,
        "answers": len(pairs) + len(evidence.ratings),
        "samples": len(evidence.samples),
        "unit": "nats of the odds of one rater",
        "candidates": [
            {
                "features": c.spec, "by_word": c.by_word, "precision": c.precision, "log_likelihood": c.likelihood,
                "without_features": c.ignorant, "accuracy": _value(accuracy_of(c.logits[judges], pairs[judges])),
            }
            for c in tried
        ],
        "log_likelihood": best.likelihood,
        "without_features": best.ignorant,
        "raters": raters,
    }  # fmt: skip
    if accuracy.count:
        found |= {
            "random": evidence.at_random, "accuracy": accuracy.value,
            "accuracy_interval": list(accuracy.interval), "judged_by": accuracy.count,
            "calibration": calibration_of(best.logits[judges], pairs[judges]),
        }  # fmt: skip
    for name, share in (("self_agreement", evidence.repeats), ("between_raters", evidence.others)):
        if share.count:
            found |= {name: share.value, f"{name}_interval": list(share.interval), f"{name}_of": share.count}
    return found


def accuracy_of(logits: Tensor, pairs: Compared) -> Share:
    """How often the one of the larger probability won, of pairs where one did."""
    decided = pairs.winner >= 0
    right = (logits[decided] < 0) == (pairs.winner[decided] == 1)
    return Share(int(right.sum()), int(decided.sum()))


def calibration_of(logits: Tensor, pairs: Compared) -> list[dict[str, float]]:
    """Of pairs where one won, by how sure the fit was: the probability that it gave its favourite, and how often that won."""
    decided = pairs.winner >= 0
    sure = logits[decided].abs().sigmoid()
    right = ((logits[decided] < 0) == (pairs.winner[decided] == 1)).double()
    parts = torch.argsort(sure).tensor_split(BINS)
    return [
        {"said": float(sure[part].mean()), "came": float(right[part].mean()), "pairs": len(part)}
        for part in parts if len(part)
    ]  # fmt: skip


def _value(share: Share) -> float | None:
    return None if math.isnan(share.value) else share.value


def write_liked(reward: BradleyTerryReward, evidence: Evidence, folder: Path) -> Path | None:
    """A picture of the samples that the reward likes most, above, and least, below; None where they are no pictures."""
    samples = evidence.samples
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        return None
    order = reward.utility(reward.features.in_parts(samples), evidence.prompts).argsort()
    each = min(SHOWN, len(order) // 2)
    rows = [order[-each:].flip(0), order[:each]]
    sheet = torch.cat([torch.cat(list(samples[row]), 2) for row in rows], 1)
    sheet = avg_pool2d(sheet, max(1, samples.shape[2] // SIDE))
    path = folder / "liked.png"
    as_picture(sheet).save(path)
    return path
