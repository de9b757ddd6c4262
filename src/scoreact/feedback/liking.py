"""A reward of what people answered: features and prompts by what they predict, weights by Newton, and how good it is.

Every choice is by the held-out log-likelihood: answers are predicted by a fit that saw no answer to the same pair. Features
that need nothing else come first. The pretrained model's own, which cost its passes, and a trained network are the second
choice: they are taken where their held-out log-likelihood is better by more than one standard error of the difference (as
Breiman et al. 1984 choose the simpler tree), tasks being independent. Only pairs that were drawn at random judge the result.
Knows answers, features and the model's contract; does not know pages.
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

from ..models.base import ScoreModel
from ..models.weights import reference_digest_of
from ..rewards.bradley_terry import BradleyTerryReward, UtilitySpace
from ..rewards.denoiser_features import TIMES
from ..rewards.sample_features import DENOISER, Features, open_features, trained_features
from ..runs.films import as_picture
from ..support.errors import FeedbackError, RewardError, ScoreactError
from ..support.loading import said_by
from .answers import Share
from .evidence import Evidence
from .liking_network import LEAST, train_network
from .preferences import Compared, Fitted, fit, log_likelihoods

FOLDS = 5
PRECISIONS = tuple(10 ** (k / 2) for k in range(1, -6, -1))  # of w: |psi|^2 is about 1, so u varies by 0.6 to 18
MOST = 300  # directions of psi that are fitted; of the others the prior stands
BINS = 5  # of the calibration
SHOWN, SIDE = 12, 128  # samples in a row of the picture, and pixels of each
NETWORK = "network"  # as the name of features: the last layer of one that is trained on the answers


Folds = tuple[Tensor, Tensor]  # of each pair, of each rating


@dataclass(frozen=True)
class Candidate:
    """Features with a way to read the prompts, and what a fit on them foretold.

    Args:
        features: frozen; space, basis, design: psi of them, its span, and what the fit to all answers sees of the samples.
        precision: of the weights' prior, the best of `PRECISIONS`.
        each: log P of each answer by the fit that did not see it, [A + ratings]; `ignorant`: their mean without features.
        logits: that the first of a pair wins, by that fit, [A]; `gaps`: by its utilities alone, whoever stood on the left.
    """

    features: Features
    space: UtilitySpace
    basis: Tensor
    design: Tensor
    precision: float
    each: Tensor
    ignorant: float
    logits: Tensor
    gaps: Tensor

    @property
    def likelihood(self) -> float:
        """Mean log P of answers left out."""
        return float(self.each.mean())


def fit_reward(
    evidence: Evidence, features: Sequence[str] = (), generator: torch.Generator | None = None, model: ScoreModel | None = None
) -> BradleyTerryReward:  # fmt: skip
    """Fit a reward to answers.

    Args:
        evidence: Of `read_evidence`.
        features: Candidates, as `open_features` takes them, "denoiser" (of `model`) or "network" (trained on the answers);
            left out, those of `usual_features`, of the model where there is one, and a network where there are answers enough.
        generator: Of the folds and of networks.
        model: The pretrained model that drew the samples.

    Returns:
        The reward, in nats of odds of one rater. Its `facts` are what the fit found: `candidates`, `accuracy`,
        `accuracy_interval`, `calibration`, `raters`, `self_agreement`, `between_raters`, `notes`, ...

    Raises:
        FeedbackError: No answer prefers a sample, or all are about one task. RewardError: Features that are not there, or are
            none of such samples.
    """
    generator, count = generator or torch.Generator().manual_seed(0), len(evidence.pairs) + len(evidence.ratings)
    prefers = bool((evidence.pairs.winner >= 0).any()) or len(evidence.ratings) > 0
    if not prefers or max(len(evidence.group.unique()), len(evidence.ratings.sample.unique())) < 2:
        why = "all are about one task" if prefers else "none prefers one sample to another"
        raise FeedbackError(f"of {count} answer{'s' * (count > 1)} {why}, so no reward can be fitted; collect more.")
    folds, notes = folds_of(evidence, generator), list[str]()
    names = list(features or usual_features(evidence.samples))
    opened = [open_features(name, evidence.samples.shape[1:]) for name in names if name not in (DENOISER, NETWORK)]
    groups = [[candidate for one in opened for candidate in _of_features(evidence, one, folds)]]
    if DENOISER in names or (not features and model is not None):
        try:
            groups.append(_of_model(evidence, model, folds))
        except ScoreactError as error:
            if features:
                raise
            notes.append(f"the pretrained model's own features were not tried: {error}")
    elif not features:
        notes.append("the pretrained model's own features were not tried; name the model (--model), and they are.")
    if NETWORK in names or (not features and count >= LEAST):
        groups.append(_of_network(evidence, [one for group in groups for one in group], folds, generator))
    elif not features:
        notes.append(f"no network was trained on the answers: it takes {LEAST}, and there are {count}.")
    best = preferred(groups, evidence)
    if model is not None:
        best.features.take_model(model)
    fitted = fit(best.design, evidence.pairs, evidence.ratings, len(evidence.raters), best.precision)
    return BradleyTerryReward(
        best.features, best.space, best.basis.float(), fitted.weights.float(), fitted.covariance.float(), best.precision,
        facts=facts_of(evidence, [one for group in groups for one in group], best, fitted, notes),
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


def folds_of(evidence: Evidence, generator: torch.Generator) -> Folds:
    """The fold of each pair and of each rating; what is about one task, or one rated sample, is in one."""

    def some(group: Tensor) -> Tensor:
        names, place = torch.unique(group, return_inverse=True)
        return (torch.randperm(len(names), generator=generator) % FOLDS)[place]

    return some(evidence.group), some(evidence.ratings.sample)


def _of_features(evidence: Evidence, features: Features, folds: Folds) -> list[Candidate]:
    """Of frozen features, with each way to read the prompts."""
    return _each_way(evidence, features, features.in_parts(evidence.samples, evidence.prompts).cpu(), folds)


def _of_model(evidence: Evidence, model: ScoreModel | None, folds: Folds) -> list[Candidate]:
    """The pretrained model's own, at each noise level and at all. The passes are made once."""
    if model is None:
        raise RewardError(f"features {DENOISER} are a pretrained model's own; name it: --model, or model=.")
    shape, own = evidence.samples.shape[1:], {"model": reference_digest_of(model)}
    every = open_features(DENOISER, shape, {"times": list(TIMES), **own})
    every.take_model(model)
    try:
        found = every.in_parts(evidence.samples, evidence.prompts).cpu()
    except RuntimeError as error:
        raise RewardError(
            f"{type(model).__name__} does not take samples of shape {tuple(shape)} ({said_by(error)}); name the model that "
            "drew them."
        ) from error
    single = [open_features(DENOISER, shape, {"times": [time], **own}) for time in TIMES]
    parts = [*zip(single, found.chunk(len(TIMES), 1), strict=True), (every, found)]
    return [candidate for one, part in parts for candidate in _each_way(evidence, one, part, folds)]


def _of_network(
    evidence: Evidence, tried: Sequence[Candidate], folds: Folds, generator: torch.Generator
) -> list[Candidate]:
    """The last layer of a network that is trained for each fold without it, and once on all answers."""
    design, precision = torch.zeros(len(evidence.samples), 0).double(), 1.0
    if tried:
        before = max(tried, key=lambda one: one.likelihood)
        design, precision = before.design, before.precision
    known = fit(design, evidence.pairs, evidence.ratings, len(evidence.raters), precision)
    seen = [~(folds[0] == fold) for fold in range(FOLDS)], [~(folds[1] == fold) for fold in range(FOLDS)]
    networks = [train_network(evidence, known, generator, *inside) for inside in zip(*seen, strict=True)]
    networks.append(train_network(evidence, known, generator))
    opened = [trained_features(network, NETWORK, evidence.samples.shape[1:]) for network in networks]
    *by_fold, found = (one.in_parts(evidence.samples) for one in opened)
    return _each_way(evidence, opened[-1], found, folds, by_fold, known)


def _each_way(
    evidence: Evidence, features: Features, found: Tensor, folds: Folds, by_fold: Sequence[Tensor] = (),
    known: Fitted | None = None,
) -> list[Candidate]:  # fmt: skip
    """found: the features of all samples, [N, F]; by_fold: those that did not see a fold's answers, where features learn."""
    candidates = []
    for by_word in (False, True) if len(set(evidence.prompts)) > 1 else (False,):
        spaces, designs = [], []
        for seen in (found.double(), *(one.double() for one in by_fold)):
            space = UtilitySpace.of(seen, evidence.prompts, by_word)
            spaces.append((space, *basis_of(space.vectors(seen, evidence.prompts))))
            designs.append(spaces[-1][2])
        people = known or _people(evidence, designs[0])
        each, logits, gaps = held_out(evidence, designs[1:] or designs * FOLDS, folds, PRECISIONS, people)
        # without features, by raters as they are then and by the very raters: the latter may foretell sides better
        nothing = designs[0][:, :0]
        without = [held_out(evidence, [nothing] * FOLDS, folds, [1.0], one)[0].mean() for one in (
            people, _people(evidence, nothing)
        )]  # fmt: skip
        best = int(each.sum(1).argmax())
        candidates.append(Candidate(
            features, *spaces[0], PRECISIONS[best], each[best], float(max(without)), logits[best], gaps[best]
        ))  # fmt: skip
    return candidates


def _people(evidence: Evidence, design: Tensor) -> Fitted:
    """What raters are like, by all answers at the middle precision: a few numbers, which learn nothing by heart."""
    return fit(design, evidence.pairs, evidence.ratings, len(evidence.raters), PRECISIONS[len(PRECISIONS) // 2])


def held_out(
    evidence: Evidence, designs: Sequence[Tensor], folds: Folds, precisions: Sequence[float], known: Fitted
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of each precision log P of each answer by the fit that did not see it, [K, A + ratings], and of pairs `Candidate.logits`
    and `gaps`, [K, A] each. known: what raters are like. designs: of each fold."""
    pairs, ratings, raters = evidence.pairs, evidence.ratings, len(evidence.raters)
    each = torch.zeros(len(precisions), len(pairs) + len(ratings), dtype=torch.float64)
    logits, gaps = (torch.zeros(len(precisions), len(pairs), dtype=torch.float64) for _ in range(2))
    for fold, design in enumerate(designs):
        out, rated_out = folds[0] == fold, folds[1] == fold
        if not bool(out.any() | rated_out.any()):
            continue
        for k, precision in enumerate(precisions):
            found = fit(design, pairs[~out], ratings[~rated_out], raters, precision, known)
            each[k, torch.cat([out, rated_out])] = log_likelihoods(found, design, pairs[out], ratings[rated_out])
            logits[k, out] = found.logit(design, pairs[out])
            gaps[k, out] = found.logit(design, pairs[out], sides=False)
    return each, logits, gaps


def preferred(groups: Sequence[Sequence[Candidate]], evidence: Evidence) -> Candidate:
    """The best of the first group, or of a later one where it is better beyond the noise."""
    best: Candidate | None = None
    for group in filter(None, groups):
        rival = max(group, key=lambda one: one.likelihood)
        if best is None or _is_better(rival.each - best.each, evidence.groups()):
            best = rival
    assert best is not None  # every call names features
    return best


def _is_better(difference: Tensor, groups: Tensor) -> bool:
    """Whether differences sum to more than the sum's standard error over independent groups."""
    names, place = torch.unique(groups, return_inverse=True)
    sums = torch.zeros(len(names)).double().index_add(0, place, difference)
    return bool(sums.sum() > len(names) ** 0.5 * sums.std())


# --- what it says of itself ----------------------------------------------------------------------------------------------


def facts_of(
    evidence: Evidence, tried: Sequence[Candidate], best: Candidate, fitted: Fitted, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Of a fit, for its folder and for the screen."""
    pairs, judges = evidence.pairs, evidence.judges
    accuracy = accuracy_of(best.gaps[judges], pairs[judges])
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
                "features": c.features.label, "by_word": c.space.by_word, "precision": c.precision,
                "log_likelihood": c.likelihood, "without_features": c.ignorant,
                "accuracy": _value(accuracy_of(c.gaps[judges], pairs[judges])), "chosen": c is best,
            }
            for c in tried
        ],
        "log_likelihood": best.likelihood,
        "without_features": best.ignorant,
        "raters": raters,
        "notes": list(notes),
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


def accuracy_of(gaps: Tensor, pairs: Compared) -> Share:
    """How often the one of the larger utility won, of pairs where one did. gaps: of the first less that of the second, [A]."""
    decided = pairs.winner >= 0
    right = (gaps[decided] < 0) == (pairs.winner[decided] == 1)
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
    order = reward.utility(reward.features.in_parts(samples, evidence.prompts).cpu(), evidence.prompts).argsort()
    each = min(SHOWN, len(order) // 2)
    rows = [order[-each:].flip(0), order[:each]]
    sheet = torch.cat([torch.cat(list(samples[row]), 2) for row in rows], 1)
    sheet = avg_pool2d(sheet, max(1, samples.shape[2] // SIDE))
    path = folder / "liked.png"
    as_picture(sheet).save(path)
    return path
