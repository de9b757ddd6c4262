"""What people answered, in the form that a reward is fitted to: decoded samples and rows of them.

Knows the store; does not know features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..support.errors import FeedbackError
from .answers import Answers, Ratings, Share, read_answers, read_ratings, self_agreement
from .preferences import NO_PAIRS, NO_RATINGS, Compared, Rated
from .store import Store, load_sample


@dataclass(frozen=True)
class Evidence:
    """Answers to one question.

    Args:
        samples: Decoded, [N, *D].
        prompts: Of each sample, N.
        pairs: With rows of `samples` and of `raters`.
        ratings: With such rows too.
        raters: Their names.
        group: [A] of pairs; a group is left out together when a fit is judged (a task with its repeats, a ranking).
        judges: [A], whether a pair may judge a reward: those drawn at random, or all where none was (`at_random` is False).
        repeats: How often a rater gave a repeated pair the first answer again.
        others: How often two raters who both chose one of a pair chose the same.
        question: What was asked.
    """

    samples: Tensor
    prompts: list[str]
    pairs: Compared = NO_PAIRS
    ratings: Rated = NO_RATINGS
    raters: Sequence[str] = ("",)
    group: Tensor = NO_PAIRS.winner
    judges: Tensor = NO_RATINGS.score
    repeats: Share = Share(0, 0)  # noqa: RUF009  frozen
    others: Share = Share(0, 0)  # noqa: RUF009
    question: str = ""
    at_random: bool = True

    def groups(self) -> Tensor:
        """Of every answer, pairs and then ratings, a number of what it is about: `group`, or the rated sample. [A + ratings]"""
        beyond = int(self.group.max()) + 1 if len(self.group) else 0
        return torch.cat([self.group, beyond + self.ratings.sample])


def read_evidence(path: str | Path, question: str | None = None) -> Evidence:
    """The answers of a store, with the samples that they are about.

    Args:
        path: Of the store.
        question: Which one; may be left out where only one was asked.

    Raises:
        FeedbackError: No store, no answer, samples of different shapes, or several questions and none is named.
    """
    with Store(path, make=False) as store:
        answers, ratings = read_answers(store, question), read_ratings(store, question)
        imported = {row[0] for row in store.rows("SELECT id FROM tasks WHERE chosen = 'imported'")}
    questions = sorted({*answers.questions, *ratings.questions})
    if not questions:
        asked = "" if question is None else f" to the question {question!r}"
        raise FeedbackError(f"{path} has no answer{asked} yet; `scoreact rate` collects some.")
    if len(questions) > 1:
        raise FeedbackError(f"{path} has answers to {len(questions)} questions; name one: {', '.join(questions)}.")
    used = np.unique(np.concatenate([answers.first, answers.second, ratings.sample]))
    rows = np.full(len(answers.samples), -1)
    rows[used] = np.arange(len(used))
    samples = [load_sample(answers.samples[i]) for i in used]
    if len(shapes := {tuple(sample.shape) for sample in samples}) > 1:
        raise FeedbackError(f"{path} holds samples of shapes {sorted(shapes)}; a reward takes one shape.")
    raters = list(dict.fromkeys([*answers.raters, *ratings.raters]))
    return Evidence(
        torch.stack(samples), [answers.samples[i].prompt for i in used], _pairs(answers, rows, raters, imported),
        _ratings(ratings, rows, raters), raters, torch.from_numpy(answers.task), _judges(answers), self_agreement(answers),
        between_raters(answers), questions[0], bool(answers.random.any()),
    )  # fmt: skip


def _pairs(answers: Answers, rows: NDArray[np.int64], raters: list[str], imported: set[int]) -> Compared:
    shown = np.where(answers.left == 0, 1, -1)
    shown[np.isin(answers.task, list(imported))] = 0  # a file's first column is often the winner's
    first, second, winner, side = map(
        torch.from_numpy, (rows[answers.first], rows[answers.second], answers.winner, shown)
    )
    rater = _named(answers.rater, answers.raters, raters)
    return Compared(first, second, winner, side, rater, torch.from_numpy(_weights(answers)))


def _weights(answers: Answers) -> NDArray[np.float64]:
    """1 of a pair; of a ranking of n as much as its n - 1 choices together, shared among its n (n - 1) / 2 pairs."""
    found = np.ones(len(answers))
    for ranking in np.unique(answers.ranking[answers.ranking >= 0]):
        own = answers.ranking == ranking
        n = (1 + np.sqrt(1 + 8 * own.sum())) / 2
        found[own] = (n - 1) / own.sum()
    return found


def _ratings(ratings: Ratings, rows: NDArray[np.int64], raters: list[str]) -> Rated:
    return Rated(
        torch.from_numpy(rows[ratings.sample]), torch.from_numpy(ratings.value).long(),
        torch.tensor([kind == "scores" for kind in ratings.kind], dtype=torch.bool),
        _named(ratings.rater, ratings.raters, raters),
    )  # fmt: skip


def _named(index: NDArray[np.int64], own: list[str], every: list[str]) -> Tensor:
    places = torch.tensor([every.index(name) for name in own], dtype=torch.int64)
    return places[torch.from_numpy(index)]


def _judges(answers: Answers) -> Tensor:
    random = torch.from_numpy(answers.random)
    return random if bool(random.any()) else torch.ones_like(random)


def between_raters(answers: Answers) -> Share:
    """How often two raters who both chose one of a pair chose the same: each rater's first answer to a task."""
    chosen: dict[tuple[int, int, int], dict[int, int]] = {}
    for a in np.flatnonzero(answers.winner >= 0):
        key = int(answers.task[a]), int(answers.first[a]), int(answers.second[a])
        chosen.setdefault(key, {}).setdefault(int(answers.rater[a]), int(answers.winner[a]))
    hits = count = 0
    for votes in chosen.values():
        n, first = len(votes), sum(won == 0 for won in votes.values())
        hits += (first * (first - 1) + (n - first) * (n - first - 1)) // 2
        count += n * (n - 1) // 2
    return Share(hits, count)
