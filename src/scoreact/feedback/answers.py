"""Answers as arrays: who won, in the samples' own order and not as they stood on the screen.

Skipped and undone answers are left out. What a rater says of themselves: self-agreement and side bias.
"""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .store import Store, StoredSample

Indices = NDArray[np.int64]

FIRST, SECOND, TIE, BOTH_BAD = 0, 1, -1, -2  # values of `Answers.winner`


@dataclass(frozen=True)
class Answers:
    """A comparisons. A ranking of n is n (n - 1) / 2 of them, with one number in `ranking`: they are not independent.

    Args:
        samples: What was compared.
        first, second: [A], rows of `samples`.
        winner: [A], FIRST (0), SECOND (1), TIE (-1) or BOTH_BAD (-2).
        left: [A], which of the two stood on the left, 0 or 1.
        rater: [A], rows of `raters`. question: [A], rows of `questions`.
        task: [A], ids; a repeated pair has the id of the first time.
        random: [A], whether the pair was drawn at random, not chosen for what it may tell: only these judge a reward.
        repeat_of: [A], the comparison that this one repeats, or -1.
        ranking: [A], the id of the ranking, or -1.
        milliseconds, time: [A]; time in seconds since 1970.
    """

    samples: list[StoredSample]
    first: Indices
    second: Indices
    winner: Indices
    left: Indices
    rater: Indices
    raters: list[str]
    question: Indices
    questions: list[str]
    task: Indices
    random: NDArray[np.bool_]
    repeat_of: Indices
    ranking: Indices
    milliseconds: Indices
    time: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.winner)

    @property
    def prompts(self) -> list[str]:
        """[A]"""
        return [self.samples[i].prompt for i in self.first]

    @property
    def ties(self) -> NDArray[np.bool_]:
        """[A]"""
        return self.winner == TIE

    @property
    def both_bad(self) -> NDArray[np.bool_]:
        """[A]"""
        return self.winner == BOTH_BAD

    @property
    def left_won(self) -> NDArray[np.bool_]:
        """[A], whether the one on the left did; False for ties and both bad."""
        return (self.winner >= 0) & (self.winner == self.left)


@dataclass(frozen=True)
class Ratings:
    """A judgements of single samples. kind: "thumbs" (value 0 or 1) or "scores" (1 to 5). repeat_of: as of `Answers`."""

    samples: list[StoredSample]
    sample: Indices  # [A], rows of `samples`
    kind: list[str]  # [A]
    value: NDArray[np.float64]  # [A]
    rater: Indices
    raters: list[str]
    question: Indices
    questions: list[str]
    random: NDArray[np.bool_]
    repeat_of: Indices
    milliseconds: Indices
    time: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.value)


_STANDING = (
    "SELECT a.*, t.kind, t.samples AS members, t.chosen FROM answers a JOIN tasks t ON t.id = a.task "
    "WHERE a.undone IS NULL AND a.answer != 'skip' AND t.kind IN ({}) ORDER BY a.id"
)


_VALUES = {"up": 1.0, "down": 0.0}


def read_answers(store: str | Path | Store, question: str | None = None) -> Answers:
    """Pairs and rankings of a store.

    Args:
        store: Its path, or the open one.
        question: Only answers to this one; all by default, and `Answers.question` tells them apart.

    Raises:
        FeedbackError: For a file that is no store.
    """
    samples, found = _standing(store, ("pair", "rank"), question)
    place = {sample.id: i for i, sample in enumerate(samples)}
    comparisons: list[tuple[int, int, int, int, int, int]] = []  # first, second, winner, left, row of found, ranking
    where: dict[tuple[int, int, int], int] = {}  # (answer, first, second) -> comparison
    repeats: list[int] = []
    for number, row in enumerate(found):
        members, shown = json.loads(row["members"]), json.loads(row["shown"])
        ranked = row["kind"] == "rank"
        for a, b, won in _comparisons(row["answer"], shown, ranked):
            where[row["id"], a, b] = len(comparisons)
            repeats.append(where.get((row["repeat_of"], a, b), -1))
            side = 0 if shown.index(a) < shown.index(b) else 1
            comparisons.append((place[members[a]], place[members[b]], won, side, number, row["id"] if ranked else -1))
    table = np.array(comparisons, dtype=np.int64).reshape(-1, 6)
    first, second, winner, left, index, ranking = (table[:, i] for i in range(6))
    kept = [found[i] for i in index]
    raters, rater = _numbered(row["rater"] for row in kept)
    questions, asked = _numbered(row["question"] for row in kept)
    return Answers(
        samples, first, second, winner, left, rater, raters, asked, questions,
        np.array([row["task"] for row in kept], dtype=np.int64),
        np.array([row["chosen"] == "random" for row in kept], dtype=bool),
        np.array(repeats, dtype=np.int64), ranking,
        np.array([row["milliseconds"] for row in kept], dtype=np.int64),
        np.array([row["time"] for row in kept], dtype=np.float64),
    )  # fmt: skip


def _comparisons(answer: str, shown: Sequence[int], ranked: bool) -> Iterable[tuple[int, int, int]]:
    """(place of the first, place of the second, winner), places in the task's samples, the first below the second."""
    if not ranked:
        winner = {"left": shown[0], "right": shown[1], "tie": TIE, "both_bad": BOTH_BAD}[answer]
        return [(0, 1, winner)]
    rank = dict(zip(shown, json.loads(answer), strict=True))
    pairs = itertools.combinations(sorted(shown), 2)
    return [(a, b, TIE if rank[a] == rank[b] else FIRST if rank[a] < rank[b] else SECOND) for a, b in pairs]


def read_ratings(store: str | Path | Store, question: str | None = None) -> Ratings:
    """Thumbs and scores of a store; arguments and errors as of `read_answers`."""
    samples, found = _standing(store, ("thumbs", "scores"), question)
    place = {sample.id: i for i, sample in enumerate(samples)}
    where = {row["id"]: number for number, row in enumerate(found)}
    raters, rater = _numbered(row["rater"] for row in found)
    questions, asked = _numbered(row["question"] for row in found)
    return Ratings(
        samples, np.array([place[json.loads(row["members"])[0]] for row in found], dtype=np.int64),
        [row["kind"] for row in found],
        np.array([_VALUES.get(row["answer"], row["answer"]) for row in found], dtype=np.float64),
        rater, raters, asked, questions,
        np.array([row["chosen"] == "random" for row in found], dtype=bool),
        np.array([where.get(row["repeat_of"], -1) for row in found], dtype=np.int64),
        np.array([row["milliseconds"] for row in found], dtype=np.int64),
        np.array([row["time"] for row in found], dtype=np.float64),
    )  # fmt: skip


def _standing(
    store: str | Path | Store, kinds: Sequence[str], question: str | None
) -> tuple[list[StoredSample], list[sqlite3.Row]]:
    """All samples of a store, and the answers that stand with their tasks."""
    if not isinstance(store, Store):
        with Store(store, make=False) as opened:
            return _standing(opened, kinds, question)
    found = store.rows(_STANDING.format(", ".join("?" * len(kinds))), *kinds)
    return store.samples(), [row for row in found if question in (None, row["question"])]


def _numbered(texts: Iterable[str]) -> tuple[list[str], Indices]:
    """The different texts in the order in which they come, and the row of each."""
    rows: dict[str, int] = {}
    index = [rows.setdefault(text, len(rows)) for text in texts]
    return list(rows), np.array(index, dtype=np.int64)


# --- what raters show of themselves ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """`hits` of `count`, with Wilson's interval of 95 %."""

    hits: float
    count: int

    @property
    def value(self) -> float:
        """NaN of none."""
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(0, 1) of none."""
        if not self.count:
            return 0.0, 1.0
        z, n, p = 1.959964, self.count, self.value
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        return max(0.0, low), min(1.0, high)


def self_agreement(answers: Answers, rater: int | None = None, swapped: bool | None = None) -> Share:
    """How often a repeated comparison got the first answer again. It bounds what any reward can agree with them.

    Args:
        answers: Of a store.
        rater: Row of `answers.raters`; all by default.
        swapped: Only repeats with the sides swapped, or only those without; both by default.
    """
    again = answers.repeat_of >= 0
    if rater is not None:
        again &= answers.rater == rater
    if swapped is not None:
        again &= (answers.left != answers.left[answers.repeat_of]) == swapped
    same = answers.winner[again] == answers.winner[answers.repeat_of[again]]
    return Share(int(same.sum()), int(again.sum()))


def left_share(answers: Answers, rater: int | None = None) -> Share:
    """How often the one on the left won, where one did: a half without a bias, for sides are drawn at random."""
    decided = answers.winner >= 0
    if rater is not None:
        decided &= answers.rater == rater
    return Share(int(answers.left_won[decided].sum()), int(decided.sum()))
