"""What people were shown and what they answered: an SQLite file, and beside it a folder with the samples.

A store `preferences.db` and its folder `preferences-samples` can be moved together, and a reward is fitted from them without
the model. A *task* is what a rater sees at once: two samples of one prompt (kind "pair"), several to put in order ("rank"), or
one ("thumbs", "scores"). An answer is a row, never changed: undoing it puts the time into `undone`. `answers.py` reads them as
arrays; `leases.py` says who rates what next. Knows no model and no page.

Tables (`scoreact_version` in `about` tells which):

    about    key, value
    samples  id, prompt, picture, tensors (files in the folder, or ""), source, model, digest (of its weights), seed, ...
    tasks    id, prompt, kind, samples (JSON list of ids), chosen ("random", "information", "gap", "imported"), time, given
             (raters who have answered all that was asked last)
    answers  id, task, rater, question, shown, answer, milliseconds, time, repeat_of, undone, key
    leases   task, rater, shown, repeat_of, position, until

`shown` is a JSON list: the places in the task's samples, from left to right as on the screen. `answer` is as on the screen too:
"left", "right", "tie", "both_bad", "skip"; of "rank" a JSON list of ranks from left to right, 1 the best, equals allowed; of
"thumbs" "up", "down"; of "scores" "1" to "5".
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from ..runs.films import as_picture
from ..support.errors import FeedbackError
from ..support.files import put_in_place, read_tensors

FORMAT = 1
PAIR = ("left", "right", "tie", "both_bad", "skip")
KINDS = ("pair", "rank", "thumbs", "scores")
CHOSEN = ("random", "information", "gap", "imported")
SOURCES = ("tuned", "reference", "given")
QUESTION = "better"  # asked where only one thing is

_TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, picture TEXT NOT NULL, tensors TEXT NOT NULL, source TEXT NOT NULL,
    model TEXT NOT NULL, digest TEXT NOT NULL, seed INTEGER, number INTEGER, solver TEXT NOT NULL, steps INTEGER);
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, kind TEXT NOT NULL, samples TEXT NOT NULL, chosen TEXT NOT NULL,
    time REAL NOT NULL, given INTEGER NOT NULL DEFAULT 0);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY, task INTEGER NOT NULL REFERENCES tasks, rater TEXT NOT NULL, question TEXT NOT NULL,
    shown TEXT NOT NULL, answer TEXT NOT NULL, milliseconds INTEGER NOT NULL, time REAL NOT NULL,
    repeat_of INTEGER REFERENCES answers, undone REAL, key TEXT UNIQUE);
CREATE TABLE leases (
    task INTEGER NOT NULL REFERENCES tasks, rater TEXT NOT NULL, shown TEXT NOT NULL, repeat_of INTEGER,
    position INTEGER NOT NULL, until REAL NOT NULL, PRIMARY KEY (task, rater));
CREATE INDEX tasks_given ON tasks (given, id);
CREATE INDEX answers_task ON answers (task);
CREATE INDEX answers_rater ON answers (rater, id);
CREATE INDEX answers_repeat ON answers (repeat_of) WHERE repeat_of IS NOT NULL;
"""


@dataclass(frozen=True)
class StoredSample:
    """A row of `samples`. picture, tensors: whole paths, where there is such a file."""

    id: int
    prompt: str
    picture: Path | None
    tensors: Path | None
    source: str
    model: str
    digest: str
    seed: int | None
    number: int | None
    solver: str
    steps: int | None


@dataclass(frozen=True)
class Task:
    """A row of `tasks`. samples: ids, in the order in which answers are counted."""

    id: int
    prompt: str
    kind: str
    samples: tuple[int, ...]
    chosen: str


class Store:
    """A store, made where there is none. One object may serve several threads, several processes one file.

    Args:
        path: Of the SQLite file; its samples are in a folder of the same name with `-samples`.
        make: Whether to make it where it is missing.
        synced: Whether samples and answers are on the disk before `add_sample` and `add_answer` return (some milliseconds).
            Without, a crash of the machine may cost the last ones, a kill of the process none.

    Raises:
        FeedbackError: For a file that is missing, no store, or of a newer version.
    """

    def __init__(self, path: str | Path, make: bool = True, synced: bool = True) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(f"{self.path.stem}-samples")
        if not (make or self.path.is_file()):
            raise FeedbackError(f"{self.path} does not exist; `scoreact rate` makes such a store.")
        if not self.path.parent.is_dir():
            raise FeedbackError(f"{self.path.parent} is no folder; make it first, or name a store in another.")
        self.synced, self._lock, self._depth = synced, threading.RLock(), 0
        try:
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self._open()
        except sqlite3.DatabaseError as error:
            raise FeedbackError(f"{self.path} cannot be read as a store ({error}); restore a copy of it.") from None

    def _open(self) -> None:
        with self.transaction():
            known = {row[0] for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not known:
                for statement in _TABLES.split(";\n"):
                    self._db.execute(statement)
                self.describe("scoreact_version", str(FORMAT))
                return
        version = self.about("scoreact_version") if "about" in known else None
        if version is None or not {"samples", "tasks", "answers", "leases"} <= known:
            raise FeedbackError(f"{self.path} is a database, but no store of scoreact; give another name.")
        if int(version) > FORMAT:
            raise FeedbackError(f"{self.path} was made by a newer scoreact (its format is {version}); update scoreact.")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Everything is in the one file then, which can be copied."""
        with self._lock:
            self._db.close()

    # --- plain access ----------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is written inside, or nothing; one inside another belongs to it."""
        with self._lock:
            if self._depth == 0:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
            except BaseException:
                self._depth -= 1
                if self._depth == 0:
                    self._db.execute("ROLLBACK")
                raise
            self._depth -= 1
            if self._depth == 0:
                self._db.execute("COMMIT")

    def rows(self, statement: str, *values: object) -> list[sqlite3.Row]:
        """All rows of one statement."""
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def run(self, statement: str, *values: object) -> int:
        """Run a statement that writes; the new row's id."""
        with self.transaction():
            return int(self._db.execute(statement, values).lastrowid or 0)

    def describe(self, key: str, value: str) -> None:
        """Keep a text under a key."""
        self.run("INSERT INTO about VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", key, value)

    def about(self, key: str) -> str | None:
        """The text under a key."""
        found = self.rows("SELECT value FROM about WHERE key = ?", key)
        return found[0][0] if found else None

    # --- samples and tasks -------------------------------------------------------------------------------------------------

    def add_sample(
        self,
        sample: Tensor,
        prompt: str,
        state: Tensor | None = None,
        *,
        source: str = "given",
        model: str = "",
        digest: str = "",
        seed: int | None = None,
        number: int | None = None,
        solver: str = "",
        steps: int | None = None,
    ) -> int:
        """Keep a sample; its id.

        Args:
            sample: Decoded. [1 or 3, H, W] in [0, 1] becomes a PNG of 8 bits, anything else is kept as it is.
            prompt: What it was asked for.
            state: What the sampler ended with, before `decode`: `dpo` learns from these, and they are the model's own input.
            source: "tuned", "reference" (the pretrained model) or "given" (no model is known).
            model: A run's folder or a recipe.
            digest: Of the weights that drew it.
            seed, number, solver, steps: It can be drawn again from these.
        """
        _one_of("source", source, SOURCES)
        if not bool(sample.isfinite().all()):
            raise FeedbackError(f"a sample of {prompt!r} has NaN or infinite values; nobody can rate it.")
        self.folder.mkdir(exist_ok=True)
        drawn = sample.ndim == 3 and sample.shape[0] in (1, 3)
        kept = {} if drawn else {"sample": sample}
        if state is not None:
            kept["state"] = state
        with self.transaction():
            number_of = self.run(
                "INSERT INTO samples (prompt, picture, tensors, source, model, digest, seed, number, solver, steps) "
                "VALUES (?, '', '', ?, ?, ?, ?, ?, ?, ?)",
                prompt, source, model, digest, seed, number, solver, steps,
            )  # fmt: skip
            picture, tensors = f"{number_of:06d}.png" if drawn else "", f"{number_of:06d}.safetensors" if kept else ""
            if drawn:
                png = io.BytesIO()
                as_picture(sample).save(png, "PNG")
                self._write(picture, png.getvalue())
            if kept:  # clones: safetensors refuses tensors that share memory
                self._write(tensors, save({name: t.detach().cpu().contiguous().clone() for name, t in kept.items()}))
            self.run("UPDATE samples SET picture = ?, tensors = ? WHERE id = ?", picture, tensors, number_of)
        return number_of

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.folder / f"{name}.tmp"
        temporary.write_bytes(content)
        (put_in_place if self.synced else os.replace)(temporary, self.folder / name)

    def add_task(self, samples: Sequence[int], kind: str = "pair", chosen: str = "random") -> int:
        """Ask for a comparison, a ranking or a rating of samples of one prompt; its id.

        chosen: how: "random" (only these judge a reward), "information", "gap", "imported".
        """
        _one_of("kind", kind, KINDS)
        _one_of("chosen", chosen, CHOSEN)
        wanted = {"pair": "two", "rank": "two or more"}.get(kind, "one")
        fits = {"two": len(samples) == 2, "two or more": len(samples) >= 2, "one": len(samples) == 1}[wanted]
        if not fits or len(set(samples)) < len(samples):
            raise FeedbackError(f"a task of kind {kind} takes {wanted} samples, each another; got {list(samples)}.")
        prompts = {self.sample(number).prompt for number in samples}
        if len(prompts) > 1:
            raise FeedbackError(
                f"samples {list(samples)} are of {len(prompts)} prompts; only those of one are compared."
            )
        return self.run(
            "INSERT INTO tasks (prompt, kind, samples, chosen, time) VALUES (?, ?, ?, ?, ?)",
            prompts.pop(), kind, json.dumps(list(samples)), chosen, time.time(),
        )  # fmt: skip

    def sample(self, number: int) -> StoredSample:
        """FeedbackError for one that is not there."""
        found = self.rows("SELECT * FROM samples WHERE id = ?", number)
        if not found:
            raise FeedbackError(f"{self.path} has no sample {number}.")
        return self._sample(found[0])

    def samples(self) -> list[StoredSample]:
        """All of them, by id."""
        return [self._sample(row) for row in self.rows("SELECT * FROM samples ORDER BY id")]

    def _sample(self, row: sqlite3.Row) -> StoredSample:
        return StoredSample(
            **{**dict(row), "picture": self._inside(row["picture"]), "tensors": self._inside(row["tensors"])}
        )

    def _inside(self, name: str) -> Path | None:
        """A file of the samples' folder: a store that somebody sent must not name any other."""
        if name and (Path(name).name != name or name in (".", "..")):
            raise FeedbackError(
                f"{self.path} names {name!r}, which is no file of {self.folder}; do not use this store."
            )
        return self.folder / name if name else None

    def task(self, number: int) -> Task:
        """FeedbackError for one that is not there."""
        found = self.rows("SELECT * FROM tasks WHERE id = ?", number)
        if not found:
            raise FeedbackError(f"{self.path} has no task {number}.")
        row = found[0]
        return Task(row["id"], row["prompt"], row["kind"], tuple(json.loads(row["samples"])), row["chosen"])

    # --- answers -----------------------------------------------------------------------------------------------------------

    def add_answer(
        self,
        task: int,
        answer: str,
        rater: str = "",
        question: str = QUESTION,
        shown: Sequence[int] | None = None,
        milliseconds: int = 0,
        repeat_of: int | None = None,
        key: str | None = None,
    ) -> int:
        """Keep an answer; its id.

        Args:
            task: Which was asked.
            answer: As on the screen, see above.
            rater: Who answered.
            question: What was asked.
            shown: Places in the task's samples from left to right; as they are by default.
            milliseconds: From seeing to answering.
            repeat_of: The rater's answer that this one repeats, which measures how sure they are.
            key: An answer with a key that is known already is the same answer sent again: it is kept once.
        """
        asked = self.task(task)
        order = list(range(len(asked.samples))) if shown is None else list(shown)
        if sorted(order) != list(range(len(asked.samples))):
            raise FeedbackError(f"shown is {order}; expected the places 0 to {len(asked.samples) - 1} in any order.")
        check_answer(asked, answer)
        with self.transaction():
            before = self.rows("SELECT id FROM answers WHERE key = ?", key) if key is not None else []
            if before:
                return int(before[0][0])
            return self.run(
                "INSERT INTO answers (task, rater, question, shown, answer, milliseconds, time, repeat_of, key) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                task, rater, question, json.dumps(order), answer, milliseconds, time.time(), repeat_of, key,
            )  # fmt: skip

    def undo(self, rater: str = "") -> sqlite3.Row | None:
        """Take back the rater's last answer that stands; its row, or None where there is none."""
        with self.transaction():
            last = self.rows("SELECT * FROM answers WHERE rater = ? AND undone IS NULL ORDER BY id DESC LIMIT 1", rater)
            if not last:
                return None
            self.run("UPDATE answers SET undone = ? WHERE id = ?", time.time(), last[0]["id"])
            return last[0]


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise FeedbackError(f"{what} is {value!r}; known: {', '.join(known)}.")


def check_answer(task: Task, answer: str) -> None:
    """Raises FeedbackError for an answer that the task does not take."""
    if task.kind == "rank":
        try:
            ranks = json.loads(answer) if answer != "skip" else [1] * len(task.samples)
        except ValueError:
            ranks = None
        if not isinstance(ranks, list) or not _are_ranks(ranks, len(task.samples)):
            raise FeedbackError(
                f"answer is {answer!r}; expected {len(task.samples)} ranks such as [1, 3, 2, 3], or skip."
            )
        return
    known = {"pair": PAIR, "thumbs": ("up", "down", "skip"), "scores": ("1", "2", "3", "4", "5", "skip")}
    _one_of("answer", answer, known[task.kind])


def _are_ranks(ranks: Sequence[object], count: int) -> bool:
    return len(ranks) == count and all(
        isinstance(r, int) and not isinstance(r, bool) and 1 <= r <= count for r in ranks
    )


def load_sample(sample: StoredSample) -> Tensor:
    """The decoded sample, [C, H, W] in [0, 1] float32 of a picture. Raises FeedbackError where its file is gone."""
    if sample.picture is None and sample.tensors is None:
        raise FeedbackError(f"sample {sample.id} has no file; its store is damaged, restore a copy.")
    try:
        if sample.picture is None:
            assert sample.tensors is not None
            return read_tensors(sample.tensors)["sample"]
        with Image.open(sample.picture) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"))
    except (OSError, KeyError, ValueError) as error:
        place = sample.picture or sample.tensors
        raise FeedbackError(f"{place} cannot be read ({error}); move a store together with its folder.") from None
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 255


def load_state(sample: StoredSample) -> Tensor | None:
    """What its sampler ended with, before `decode`, [*D]; None where that was not kept."""
    return None if sample.tensors is None else read_tensors(sample.tensors).get("state")
