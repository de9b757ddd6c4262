"""The loop: simulated people answer in place of the page. They know what they like, so the runs have to win."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from scoreact.api.start import train_source
from scoreact.feedback.answers import read_answers
from scoreact.feedback.rounds import PRETRAINED, STORE, FeedbackLoop, loop_table, verdict
from scoreact.feedback.simulated import SimulatedRater, answer_store
from scoreact.feedback.store import Store
from scoreact.runs.checkpoint import checkpoints
from scoreact.runs.source import Source, open_source
from scoreact.support.errors import FeedbackError, RunExists, SettingError
from scoreact.training.config import updated
from scoreact.types import Condition

SMALL = {"batch_size": 96, "heldout_samples": 64, "reference_batches": 1, "iterations": 20, "kl_weight": 0.3, "device": "cpu",
         "value_steps": 10, "value_first_steps": 20, "learning_rate": 4e-3}  # fmt: skip
TINY = {**SMALL, "batch_size": 16, "heldout_samples": 16, "iterations": 2, "value_steps": 2, "value_first_steps": 2}


def rightwards(samples: torch.Tensor, condition: Condition) -> torch.Tensor:
    return 1.5 * samples[:, 0]


def people(store: Store) -> None:
    given = store.rows("SELECT COUNT(*) FROM answers")[0][0]  # a loop that goes on gets what it would have got
    generator = torch.Generator().manual_seed(given)
    answer_store(store, rightwards, [SimulatedRater(tie=-2.0, both_bad=-8.0)], generator)


def training(source: Source) -> None:
    assert source.folder is not None
    train_source(source, "", resume=bool(checkpoints(source.folder / "checkpoints")))


def loop_in(out: Path, settings: dict[str, object], **changes: object) -> FeedbackLoop:
    source = open_source("gaussian")
    source = dataclasses.replace(
        source, config=updated(source.config, settings), options={**source.options, "width": 16}
    )
    made = FeedbackLoop(source, out, people, training, rounds=2, answers=8, features=["values"])
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_what_people_like_wins(tmp_path: Path) -> None:
    said: list[str] = []
    rows = loop_in(tmp_path / "loop", SMALL, answers=60, say=said.append).run()
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert [row["answers"] for row in rows] == [60, 60, 60]
    assert [row.get("won_of", 0) > 20 for row in rows] == [True, True, False]
    assert rows[1]["won_interval"][0] > 0.5, "the last verdict is of 60 answers"
    for row in rows[:2]:
        assert row["accuracy"] > 0.6
        assert row["sigma"] > 0
        assert row["J"] is not None
        assert row["won_interval"][0] < row["won"] < row["won_interval"][1]
    assert json.loads((tmp_path / "loop" / "loop.json").read_text())["rounds"] == rows
    assert said[-4:] == loop_table(rows)
    run = json.loads((tmp_path / "loop" / "round-2" / "run" / "config.json").read_text())
    assert run["description"]["reward_options"] == {"caution": 1.0}
    with Store(tmp_path / "loop" / STORE) as store:
        chosen = [tuple(row) for row in store.rows(
            "SELECT s.model, t.chosen, COUNT(*) FROM tasks t JOIN samples s ON s.id = json_extract(t.samples, '$[0]') "
            "GROUP BY 1, 2 ORDER BY 1, 2")]  # fmt: skip
        assert chosen[0] == (PRETRAINED, "random", 60)
        by_chance = {how: count for model, how, count in chosen if model == "round-1/run"}
        assert sum(by_chance.values()) == 60
        assert by_chance["random"] >= 30 + 6, "the verdict, and one in five of the others"
        assert by_chance["information"] >= 18
        assert chosen[-1] == ("round-2/run", "random", 60)


class Killed(Exception):
    pass


def killing(function: Callable[..., None], at: int, after: bool) -> Callable[..., None]:
    calls = iter(range(1, 1000))

    def called(what: object) -> None:
        now = next(calls) == at
        if now and not after:
            raise Killed
        function(what)
        if now:
            raise Killed

    return called


def files(out: Path) -> dict[str, bytes]:
    """What has to be the same: rewards, weights, what the rounds came to and who won."""
    kept = [*out.glob("round-*/liking/*.safetensors"), *out.glob("round-*/run/model.safetensors")]
    found = {str(path.relative_to(out)): path.read_bytes() for path in kept}
    answers = read_answers(out / STORE)
    return {**found, "winners": answers.winner.tobytes(), "loop": (out / "loop.json").read_bytes()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "loop"
    loop_in(out, TINY).run()
    return files(out)


@pytest.mark.parametrize(
    ("stage", "at", "after"),
    [("ask", 1, False), ("ask", 3, True), ("ask", 6, False), ("train", 1, True), ("train", 2, False)],
)
def test_a_killed_loop_goes_on(tmp_path: Path, whole: dict[str, bytes], stage: str, at: int, after: bool) -> None:
    out = tmp_path / "loop"
    killed = loop_in(out, TINY)
    setattr(killed, stage, killing(getattr(killed, stage), at, after))
    with pytest.raises(Killed):
        killed.run()
    (out / "round-2" / "liking.part").mkdir(parents=True)  # as a fit that was killed leaves it
    (out / "round-2" / "liking.part" / "reward.json").write_text("{")
    loop_in(out, TINY).run()
    shutil.rmtree(out / "round-2" / "liking.part", ignore_errors=True)
    found = files(out)
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []


def test_a_kill_within_training_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    def stopped(source: Source) -> None:
        def event(kind: str, line: object) -> None:
            if kind == "checkpoint":
                raise Killed

        train_source(source, "", on_event=event)

    with pytest.raises(Killed):
        loop_in(tmp_path / "loop", TINY, train=stopped).run()
    assert checkpoints(tmp_path / "loop" / "round-1" / "run" / "checkpoints")
    loop_in(tmp_path / "loop", TINY).run()
    assert files(tmp_path / "loop") == whole


def test_a_loop_is_extended_and_other_settings_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "loop"
    loop_in(out, TINY, rounds=1).run()
    weights = (out / "round-1" / "run" / "model.safetensors").stat().st_mtime_ns
    rows = loop_in(out, TINY).run()
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert rows[1]["answers"] == 8, "those of the last verdict are the next round's"
    assert (out / "round-1" / "run" / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(SettingError, match=r"iterations 2 -> 3.*Give the same, or another folder"):
        loop_in(out, {**TINY, "iterations": 3}).run()
    with pytest.raises(SettingError, match=r"caution 1.0 -> 2.0"):
        loop_in(out, TINY, caution=2.0).run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(RunExists, match="holds no loop"):
        loop_in(tmp_path / "other", TINY).run()
    runs = [out / f"round-{n}" / "run" / "model.safetensors" for n in (1, 2)]
    shutil.copy(*runs)
    with pytest.raises(FeedbackError, match="by other weights"):
        loop_in(out, TINY, answers=10).run()


def test_a_skipped_pair_is_replaced(tmp_path: Path) -> None:
    skipped: list[int] = []

    def picky(store: Store) -> None:
        if not skipped:
            skipped.append(1)
            store.add_answer(1, "skip")
        people(store)

    rows = loop_in(tmp_path / "loop", TINY, ask=picky, rounds=1).run()
    assert [row["answers"] for row in rows] == [8, 8]
    with Store(tmp_path / "loop" / STORE) as store:
        assert len(store.rows("SELECT id FROM tasks")) == 8 + 1 + 8


def test_features_may_be_code_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def first(samples):\n    return samples[:, :1]\n")
    rows = loop_in(tmp_path / "loop", TINY, features=["mine.py:first"]).run()
    assert rows[1]["won_of"] == 8
    with Store(tmp_path / "loop" / STORE) as store:
        assert store.rows("SELECT id FROM tasks WHERE chosen = 'information'")


def test_the_verdict_counts_random_pairs_once(tmp_path: Path) -> None:
    with Store(tmp_path / "made.db", synced=False) as store:

        def add(winner: str, chosen: str = "random", sources: str = "tr", model: str = "a", **how: object) -> None:
            kinds = {"t": "tuned", "r": "reference"}
            numbers = [store.add_sample(torch.rand(2), "", source=kinds[kind], model=model) for kind in sources]
            store.add_answer(store.add_task(numbers, chosen=chosen), winner, **how)  # type: ignore[arg-type]

        for _ in range(6):
            add("left")  # tuned
        add("right", shown=[1, 0])  # tuned
        for _ in range(2):
            add("right", sources="rt")  # tuned
        add("left", sources="rt")
        add("right")
        add("tie")
        for _ in range(4):
            add("both_bad")
            add("right", chosen="information")
            add("right", sources="tt")
            add("right", model="b")
            add("skip")
        store.add_answer(1, "right", repeat_of=1)
        share = verdict(read_answers(store), "a")
    assert (share.hits, share.count) == (9.5, 12)
    for k, n in ((8, 11), (0, 5), (40, 40)):
        expected = binomtest(k, n).proportion_ci(method="wilson")
        found = dataclasses.replace(share, hits=k, count=n)
        assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-6)
    low, high = share.interval
    between = [binomtest(k, 12).proportion_ci(method="wilson") for k in (9, 10)]
    assert between[0].low < low < between[1].low
    assert between[0].high < high < between[1].high
