"""Who rates what next. A task is lent to a rater for a while: no two work on one unless more answers to it are wanted.

What is lent is in the store, so a server that is killed and started again goes on where it was. Some of what a rater has
answered comes again, half of it with the sides swapped: that measures how sure they are. Knows no page.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..support.errors import FeedbackError
from .store import Store, Task

AHEAD = 3  # tasks that a rater holds: the one on the screen and those that load meanwhile
REPEAT_AFTER, REPEAT_WITHIN = 10, 60  # a repeat is of an answer so many answers ago


class NotLent(FeedbackError):
    """An answer to what the rater does not hold: they, or another in their place, have answered it already."""


@dataclass(frozen=True)
class Lease:
    """A task in a rater's hands. shown: its places from left to right. open: the questions that are still unanswered."""

    task: Task
    shown: tuple[int, ...]
    open: tuple[str, ...]


class TaskQueue:
    """Lends a store's tasks to raters and takes their answers. May serve several threads.

    Args:
        store: Open, with tasks; more may come at any time.
        questions: All of them are asked about each task.
        wanted: Raters that are to answer a task.
        repeats: Share of what is lent that the rater has answered before.
        seconds: After which a task may be lent to another, unless its rater still asks for it.
        chance: Sides, and what is repeated.
    """

    def __init__(
        self,
        store: Store,
        questions: Sequence[str],
        wanted: int = 1,
        repeats: float = 0.08,
        seconds: float = 300.0,
        chance: random.Random | None = None,
    ) -> None:
        self.store, self.questions, self.wanted = store, tuple(questions), wanted
        self.repeats, self.seconds, self.chance = repeats, seconds, chance or random.Random()
        self._asked = json.dumps(self.questions), len(self.questions)
        self._count()  # other questions may have been asked before

    def hand_out(self, rater: str) -> list[Lease]:
        """What the rater holds, the first to be answered first: up to AHEAD tasks, [] when nothing waits for them."""
        with self.store.transaction():
            held = []
            for row in self._held(rater):
                late = row["repeat_of"] is None and self._given(row["task"]) >= self.wanted
                if late or not self._open(row):
                    self._return(row["task"], rater)
                else:
                    held.append(row["task"])
            self.store.run("UPDATE leases SET until = ? WHERE rater = ?", time.time() + self.seconds, rater)
            while len(held) < AHEAD and (task := self._lend_next(rater)) is not None:
                held.append(task)
            return [self._lease(row) for row in self._held(rater)]

    def answer(
        self, rater: str, task: int, question: str, answer: str, milliseconds: int = 0, key: str | None = None
    ) -> int:
        """Keep a rater's answer; its id. One that is sent again (same key) is kept once.

        Raises NotLent where the task is not in this rater's hands (any more), FeedbackError for what is no answer to it.
        """
        with self.store.transaction():
            known = self.store.rows("SELECT id FROM answers WHERE key = ?", key) if key is not None else []
            if known:
                return int(known[0][0])
            held = self.store.rows("SELECT * FROM leases WHERE task = ? AND rater = ?", task, rater)
            late = bool(held) and held[0]["repeat_of"] is None and self._given(task) >= self.wanted
            if not held or late or question not in self._open(held[0]):
                raise NotLent(f"task {task} is answered already, by {rater!r} or by another; nothing was kept.")
            original = None
            if held[0]["repeat_of"] is not None:
                first = self.store.rows(f"{_OWN} AND question = ? AND repeat_of IS NULL", task, rater, question)
                original = first[0]["id"] if first else None
            shown = json.loads(held[0]["shown"])
            number = self.store.add_answer(task, answer, rater, question, shown, milliseconds, original, key)
            if not self._open(held[0]):
                self._return(task, rater)
                self._count(task)
            return number

    def undo(self, rater: str) -> bool:
        """Take back the rater's last answer; whether there was one. Its task is the first in their hands again, as shown."""
        with self.store.transaction():
            last = self.store.rows(_LAST, rater)
            row = self.store.undo(rater) if last and last[0]["question"] in self.questions else None
            if row is None:
                return False
            first = self.store.rows("SELECT MIN(position) FROM leases WHERE rater = ?", rater)[0][0] or 0
            self.store.run(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)",
                row["task"], rater, row["shown"], row["repeat_of"], first - 1, time.time() + self.seconds,
            )  # fmt: skip
            self._count(row["task"])
            return True

    def give_back(self, rater: str) -> None:
        """What the rater holds is for others, too."""
        self.store.run("DELETE FROM leases WHERE rater = ?", rater)

    def counts(self, rater: str) -> dict[str, float]:
        """answered (questions), left (tasks that wait for this rater), seconds (an answer, over their last twenty)."""
        answered = self.store.rows("SELECT COUNT(*) FROM answers WHERE rater = ? AND undone IS NULL", rater)[0][0]
        left = self.store.rows(f"SELECT COUNT(*) FROM tasks t WHERE {_OPEN}", self.wanted, rater, *self._asked)[0][0]
        last = self.store.rows(
            "SELECT milliseconds FROM answers WHERE rater = ? AND undone IS NULL ORDER BY id DESC LIMIT 20", rater
        )
        # who fetches a coffee has not thought for an hour
        seconds = sum(min(row[0], 60_000) for row in last) / 1000 / len(last) if last else 0.0
        return {"answered": answered, "left": left, "seconds": seconds}

    # --- inside a transaction --------------------------------------------------------------------------------------------

    def _held(self, rater: str) -> list[sqlite3.Row]:
        return self.store.rows("SELECT * FROM leases WHERE rater = ? ORDER BY position", rater)

    def _lease(self, row: sqlite3.Row) -> Lease:
        return Lease(self.store.task(row["task"]), tuple(json.loads(row["shown"])), self._open(row))

    def _open(self, row: sqlite3.Row) -> tuple[str, ...]:
        """Questions that a lease still asks."""
        repeats = "IS NULL" if row["repeat_of"] is None else "IS NOT NULL"
        answered = self.store.rows(f"{_OWN} AND repeat_of {repeats}", row["task"], row["rater"])
        return tuple(q for q in self.questions if q not in {a["question"] for a in answered})

    def _given(self, task: int) -> int:
        return int(self.store.rows("SELECT given FROM tasks WHERE id = ?", task)[0][0])

    def _return(self, task: int, rater: str) -> None:
        self.store.run("DELETE FROM leases WHERE task = ? AND rater = ?", task, rater)

    def _count(self, task: int | None = None) -> None:
        """Who has answered all of a task, of every task by default: a skip leaves it to others."""
        self.store.run(
            "UPDATE tasks SET given = (SELECT COUNT(*) FROM (SELECT rater FROM answers WHERE task = tasks.id "
            f"AND undone IS NULL AND repeat_of IS NULL AND answer != 'skip' AND {_AMONG} GROUP BY rater "
            "HAVING COUNT(DISTINCT question) = ?4)) WHERE ?1 IS NULL OR id = ?1", task, None, *self._asked,
        )  # fmt: skip

    def _lend_next(self, rater: str) -> int | None:
        """Lend another task, a new one or a repeat; its id, or None when nothing waits."""
        fresh = self.store.rows(_WAITING, self.wanted, rater, *self._asked, time.time())
        if not fresh:
            return None
        repeat = self._repeat(rater) if self.chance.random() < self.repeats else None
        if repeat is not None:
            task, shown = repeat["task"], json.loads(repeat["shown"])
            if self.chance.random() < 0.5:
                shown.reverse()
        else:
            task, count = fresh[0]["id"], len(json.loads(fresh[0]["samples"]))
            shown = self.chance.sample(range(count), count)
        last = self.store.rows("SELECT MAX(position) FROM leases WHERE rater = ?", rater)[0][0] or 0
        self.store.run(
            "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?)",
            task, rater, json.dumps(shown), repeat["id"] if repeat is not None else None, last + 1,
            time.time() + self.seconds,
        )  # fmt: skip
        return int(task)

    def _repeat(self, rater: str) -> sqlite3.Row | None:
        """An answer of the rater that may come again: some answers ago, the first time it does."""
        possible = self.store.rows(_REPEATABLE, rater, REPEAT_WITHIN, REPEAT_AFTER, self.questions[0])
        return self.chance.choice(possible) if possible else None


_LAST = "SELECT question FROM answers WHERE rater = ? AND undone IS NULL ORDER BY id DESC LIMIT 1"
_OWN = "SELECT * FROM answers WHERE task = ? AND rater = ? AND undone IS NULL"
_AMONG = "question IN (SELECT value FROM json_each(?3))"
_OPEN = (  # tasks t that more raters are to answer, ?2 among them
    "given < ?1 AND (SELECT COUNT(DISTINCT question) FROM answers WHERE task = t.id AND rater = ?2 AND undone IS NULL "
    f"AND repeat_of IS NULL AND {_AMONG}) < ?4"
)
_WAITING = (
    f"SELECT * FROM tasks t WHERE {_OPEN} AND NOT EXISTS (SELECT 1 FROM leases WHERE task = t.id AND rater = ?2) "
    "AND given + (SELECT COUNT(*) FROM leases WHERE task = t.id AND until > ?5 AND repeat_of IS NULL) < ?1 "
    "ORDER BY id LIMIT 1"
)
_REPEATABLE = (
    "SELECT * FROM (SELECT * FROM answers WHERE rater = ?1 AND undone IS NULL ORDER BY id DESC LIMIT ?2 OFFSET ?3) AS a "
    "WHERE repeat_of IS NULL AND answer != 'skip' AND question = ?4 "
    "AND NOT EXISTS (SELECT 1 FROM answers WHERE repeat_of = a.id AND undone IS NULL) "
    "AND NOT EXISTS (SELECT 1 FROM leases WHERE task = a.task AND rater = ?1)"
)
