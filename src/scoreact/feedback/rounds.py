"""People in the loop: they compare samples, a reward is fitted to all answers so far, a model is tuned to it, and again.

    loops/plain/loop.json, preferences.db, round-1/liking, round-1/run, round-2/liking, ...

Where a loop stands follows from these files, so one that was killed goes on. Every round tunes the pretrained model anew: what
an earlier reward did wrong is not carried on. A run's verdict is the people's: its samples against the pretrained model's,
pairs drawn at random. Knows no page and no training: `ask` and `train` do these.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..models.weights import digest_of
from ..recipes.base import need_prompts
from ..rewards.learned import is_learned, open_learned, save_learned
from ..rewards.sample_features import DENOISER
from ..runs.record import read_json
from ..runs.source import Source, build_policy
from ..support.errors import FeedbackError, RunExists, SettingError
from ..support.files import write_json
from ..support.folders import FolderLock
from ..support.loading import is_spec
from .answers import BOTH_BAD, FIRST, TIE, Answers, Share, read_answers
from .choosing import choosing_by
from .drawing import ChoosePairs, Drawing, draw_tasks
from .evidence import read_evidence
from .liking import fit_reward, write_liked
from .store import QUESTION, Store

if TYPE_CHECKING:
    from ..control.policy import Policy

Row = dict[str, Any]  # what a round came to
STATE, STORE = "loop.json", "preferences.db"
PRETRAINED = "pretrained"  # the model of the first round's samples
VERDICT = 0.5  # share of a round's answers that are the verdict on the run before; the others are chosen
MINUTE = 60_000  # milliseconds; who fetches a coffee has not thought for an hour

_ASKED = (  # pairs by the model of their first sample
    "SELECT a.digest, b.source = 'reference' AS verdict, EXISTS (SELECT 1 FROM answers WHERE task = t.id AND undone IS NULL "
    "AND answer != 'skip') AS answered, EXISTS (SELECT 1 FROM answers WHERE task = t.id AND undone IS NULL "
    "AND answer = 'skip') AS skipped FROM tasks t JOIN samples a ON a.id = json_extract(t.samples, '$[0]') "
    "JOIN samples b ON b.id = json_extract(t.samples, '$[1]') WHERE t.kind = 'pair' AND a.model = ?"
)


@dataclass
class FeedbackLoop:
    """Rounds of comparing, fitting and tuning in one folder.

    Args:
        source: The recipe with settings that suit a fitted reward; its own reward is not used.
        out: The loop's folder, new, or that of a loop to go on with.
        ask: Called with the open store whenever it has pairs that wait; returns when it likes, and is called again until
            there are enough answers.
        train: Trains a source into its folder, or goes on with the run that is there.
        rounds: Of tuning. After the last one people are asked for its verdict.
        answers: Of each round, skipped ones and repeats not counted.
        caution: Sigmas of its uncertainty that the reward is lowered by.
        question: What is asked about each pair.
        features: Of the reward, as of `fit_reward`.
        say: Told what happens, a line at a time.
    """

    source: Source
    out: Path
    ask: Callable[[Store], None]
    train: Callable[[Source], None]
    rounds: int = 4
    answers: int = 100
    caution: float = 1.0
    question: str = QUESTION
    features: Sequence[str] = ()
    say: Callable[[str], None] = lambda line: None

    def run(self) -> list[Row]:
        """Go on from where the folder stands to the last verdict.

        Returns:
            A row a round, as `loop.json` keeps it, and one of the last verdict's answers: round, answers, minutes (of people),
            accuracy (held out), J, J_star, sigma, won (the share; ties half), won_interval, won_of.

        Raises:
            SettingError: The folder's loop has other settings. RunExists: It holds something else, or is at work.
        """
        self._check()
        self.out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.out)
        try:
            with Store(self.out / STORE) as store:
                self._write(store)
                for n in range(1, self.rounds + 1):
                    if not is_learned(str(self._liking(n))):
                        self._collect(store, n)
                        self._fit(store, n)
                        self._write(store)
                    if not self._is_tuned(n):
                        self.say(f"round {n}: tuning the pretrained model")
                        self.train(self._tuning(n))
                        self._say_rows(self._write(store))
                self._collect(store, self.rounds + 1)
                rows = self._write(store)
                self._say_rows(rows)
                return rows
        finally:
            lock.release()

    # --- the folder --------------------------------------------------------------------------------------------------------

    def _model(self, n: int) -> str:
        """Whose samples round n compares, as the store calls it; the folder may be moved."""
        return PRETRAINED if n == 1 else f"round-{n - 1}/run"

    def _liking(self, n: int) -> Path:
        return self.out / f"round-{n}" / "liking"

    def _is_tuned(self, n: int) -> bool:
        run = self.out / f"round-{n}" / "run"
        return (run / "result.json").is_file() and (run / "model.safetensors").is_file()

    def _tuning(self, n: int) -> Source:
        """What round n trains."""
        return dataclasses.replace(
            self.source, reward=str(self._liking(n).resolve()), reward_options={"caution": self.caution, **self._code(n)},
            folder=self.out / f"round-{n}" / "run",
        )  # fmt: skip

    def _code(self, n: int) -> dict[str, str]:
        """The option that names the user's own features again, where the reward sees samples by them."""
        spec = read_json(self._liking(n) / "reward.json", []).get("features", {}).get("spec")
        named = any(is_spec(own) and _with_full_path(own) == spec for own in self.features)
        return {"features": spec} if named else {}

    def _settings(self) -> dict[str, Any]:
        own = {"caution": self.caution, "question": self.question, "features": list(self.features)}
        described = {key: self.source.description("")[key] for key in ("recipe", "options")}
        return json.loads(json.dumps({**described, **own, **self.source.config.to_dict()}, default=str))

    def _check(self) -> None:
        if not (self.out / STATE).is_file():
            if self.out.exists() and (not self.out.is_dir() or any(p.name[0] != "." for p in self.out.iterdir())):
                raise RunExists(f"{self.out} is not empty and holds no loop; give another folder.")
            return
        problems: list[str] = []
        before, now = read_json(self.out / STATE, problems).get("settings", {}), self._settings()
        if problems:
            raise FeedbackError(f"{self.out}: {problems[0]} Restore a copy of it.")
        changed = [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
        if changed:
            raise SettingError(
                f"{self.out} was started with other settings: {'; '.join(changed)}. Give the same, or another folder. "
                "Only rounds and answers may change."
            )

    # --- the stages --------------------------------------------------------------------------------------------------------

    def _collect(self, store: Store, n: int) -> None:
        """Ask until there are enough answers about the model that round n compares."""
        drawer: tuple[Policy, list[str]] | None = None
        while True:
            asked = store.rows(_ASKED, self._model(n))
            if sum(row["answered"] for row in asked) >= self.answers:
                return
            if any(missing := self._missing(asked, n)):
                if drawer is None:
                    self.say(f"round {n}: {self.answers} answers about {self._model(n)}")
                    policy, problem, _ = build_policy(self.source if n == 1 else self._tuning(n - 1))
                    need_prompts(problem, "give some with --prompts FILE")
                    self._check_digest(asked, policy, n)
                    drawer = policy, list(problem.prompts)
                for _ in self._draw(store, *drawer, n, *missing):
                    self.ask(store)
            self.ask(store)

    def _missing(self, asked: Sequence[sqlite3.Row], n: int) -> tuple[int, int]:
        """Pairs against the pretrained model, and others, that are still to be drawn. A skipped one is replaced."""
        verdict = [row for row in asked if row["verdict"]] if n > 1 else []
        share = 0.0 if n == 1 else VERDICT if n <= self.rounds else 1.0
        against = max(0, math.ceil(share * self.answers) + _lost(verdict) - len(verdict))
        return against, max(0, self.answers + _lost(asked) - len(asked) - against)

    def _check_digest(self, asked: Sequence[sqlite3.Row], policy: Policy, n: int) -> None:
        if {row["digest"] for row in asked} - {digest_of(policy.model)}:  # type: ignore[arg-type]
            raise FeedbackError(
                f"{self.out / STORE} has samples of {self._model(n)} by other weights than those that are there now; restore "
                "the weights, or begin a loop in another folder."
            )

    def _draw(
        self, store: Store, policy: Policy, prompts: list[str], n: int, against: int, others: int
    ) -> Iterator[int]:
        config = self.source.config
        what = store, policy, config, prompts
        yield from draw_tasks(*what, against, Drawing(seed=config.seed), self._model(n))
        choose: ChoosePairs | None = None
        if others and n > 1:
            liking = open_learned(self._liking(n - 1), features=self._code(n - 1).get("features"))
            liking.take_model(policy.reference)
            choose = choosing_by(liking, torch.Generator().manual_seed(config.seed + n))
        yield from draw_tasks(
            *what, others, Drawing(against="itself", seed=config.seed), self._model(n), tuned=n > 1, choose=choose
        )

    def _fit(self, store: Store, n: int) -> None:
        """All answers so far. A fit that was killed leaves nothing that is taken for one."""
        self.say(f"round {n}: fitting the reward")
        part = self._liking(n).with_name("liking.part")
        shutil.rmtree(part, ignore_errors=True)
        evidence = read_evidence(store.path, self.question)
        needs_model = not self.features or DENOISER in self.features
        model = build_policy(self.source)[0].reference if needs_model else None
        reward = fit_reward(evidence, self.features, torch.Generator().manual_seed(self.source.config.seed), model)
        save_learned(reward, part)
        write_liked(reward, evidence, part)
        for note in reward.facts["notes"]:
            self.say(f"note: {note}")
        part.rename(self._liking(n))

    # --- the report --------------------------------------------------------------------------------------------------------

    def _write(self, store: Store) -> list[Row]:
        answers = read_answers(store, self.question)
        rows = [self._row(answers, n) for n in range(1, self.rounds + 2)]
        rows = [row for row in rows if row["answers"]]
        write_json(self.out / STATE, {"settings": self._settings(), "rounds": rows})
        return rows

    def _row(self, answers: Answers, n: int) -> Row:
        own = np.array([answers.samples[i].model == self._model(n) for i in answers.first], dtype=bool)
        row: Row = {
            "round": n, "answers": int((own & (answers.repeat_of < 0)).sum()),
            "minutes": float(np.minimum(answers.milliseconds[own], MINUTE).sum() / MINUTE),
        }  # fmt: skip
        liking, problems = read_json(self._liking(n) / "reward.json", []), list[str]()
        row |= {key: liking[key] for key in ("accuracy", "accuracy_interval", "judged_by") if key in liking}
        if self._is_tuned(n):
            result = read_json(self.out / f"round-{n}" / "run" / "result.json", problems)
            final, reference = result.get("final", {}), result.get("reference", {})
            row |= {
                "J": final.get("objective/J"), "J_star": reference.get("objective/J_star"), "sigma": final.get("reward/sigma")
            }  # fmt: skip
        if (share := verdict(answers, self._model(n + 1))).count:
            row |= {"won": share.value, "won_interval": list(share.interval), "won_of": share.count}
        return row

    def _say_rows(self, rows: Sequence[Row]) -> None:
        for line in loop_table(rows):
            self.say(line)


def _with_full_path(spec: str) -> str:
    place, _, name = spec.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else spec


def _lost(asked: Sequence[sqlite3.Row]) -> int:
    """Pairs that somebody skipped and nobody answered."""
    return sum(row["skipped"] and not row["answered"] for row in asked)


def verdict(answers: Answers, model: str) -> Share:
    """How often a tuned model's sample won against the pretrained model's, ties as half, with Wilson's interval of 95 %.

    Only pairs that were drawn at random, each once. "Both bad" says nothing of the two, so it is left out.

    Args:
        answers: Of a store.
        model: What the store calls the tuned model: a run's folder.
    """
    tuned = np.array([sample.model == model and sample.source == "tuned" for sample in answers.samples], dtype=bool)
    pretrained = np.array([sample.source == "reference" for sample in answers.samples], dtype=bool)
    first = tuned[answers.first] & pretrained[answers.second]
    second = pretrained[answers.first] & tuned[answers.second]
    counts = (first | second) & answers.random & (answers.repeat_of < 0) & (answers.winner != BOTH_BAD)
    won = np.where(answers.winner == TIE, 0.5, (answers.winner == FIRST) == first)
    return Share(float(won[counts].sum()), int(counts.sum()))


def loop_table(rows: Sequence[Row]) -> list[str]:
    """What the rounds came to, in lines of one width."""
    head = "round  answers  minutes  accuracy         J        J*   sigma  won against the pretrained model"
    return [head, *map(_line, rows)]


def _line(row: Row) -> str:
    def number(key: str, width: int) -> str:
        return f"{'' if row.get(key) is None else format(row[key], '.3g'):>{width}}"

    won = ""
    if "won" in row:
        low, high = row["won_interval"]
        won = f"{row['won']:.2f} ({low:.2f} to {high:.2f}) of {row['won_of']}"
    cells = (number("accuracy", 8), number("J", 8), number("J_star", 8), number("sigma", 6), won)
    return "  ".join([f"{row['round']:>5}", f"{row['answers']:>7}", f"{row['minutes']:>7.1f}", *cells]).rstrip()
