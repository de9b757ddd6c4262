"""The store: what is written is read, in the samples' own order; nothing of it can be lost or point elsewhere."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from scoreact.feedback.answers import BOTH_BAD, TIE, Share, left_share, read_answers, read_ratings, self_agreement
from scoreact.feedback.store import Store, load_sample, load_state
from scoreact.support.errors import FeedbackError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "preferences.db", synced=False)


def pictures(store: Store, count: int, prompt: str = "a cat") -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return [store.add_sample(torch.rand(3, 4, 5, generator=generator), prompt, number=i) for i in range(count)]


def test_winners_are_in_the_samples_order_whatever_side_they_stood_on(store: Store) -> None:
    a, b = pictures(store, 2)
    task = store.add_task([a, b])
    answered = [("left", [0, 1]), ("left", [1, 0]), ("right", [1, 0]), ("right", [0, 1]), ("tie", [1, 0])]
    for answer, shown in [*answered, ("both_bad", [0, 1]), ("skip", [0, 1])]:
        store.add_answer(task, answer, "ann", shown=shown, milliseconds=7)
    found = read_answers(store)
    assert found.winner.tolist() == [0, 1, 0, 1, TIE, BOTH_BAD]
    assert found.left.tolist() == [0, 1, 1, 0, 1, 0]
    assert found.left_won.tolist() == [True, True, False, False, False, False]
    assert [found.samples[i].id for i in (found.first[0], found.second[0])] == [a, b]
    assert found.raters == ["ann"]
    assert found.prompts == ["a cat"] * 6
    assert found.milliseconds.tolist() == [7] * 6
    assert left_share(found) == Share(2, 4)


def test_a_ranking_is_all_its_pairs(store: Store) -> None:
    task = store.add_task(pictures(store, 4), "rank", "information")
    store.add_answer(task, "[2, 1, 2, 4]", shown=[3, 1, 0, 2])  # places: 1 best, 3 and 0 alike, 2 last
    found = read_answers(store)
    pairs = list(zip(found.first.tolist(), found.second.tolist(), found.winner.tolist(), strict=True))
    assert pairs == [(0, 1, 1), (0, 2, 0), (0, 3, TIE), (1, 2, 0), (1, 3, 0), (2, 3, 1)]
    assert found.left.tolist() == [1, 0, 1, 0, 1, 1]
    assert len(set(found.ranking.tolist())) == 1
    assert not found.random.any()


def test_ratings(store: Store) -> None:
    a, b = pictures(store, 2)
    thumb, score = store.add_task([a], "thumbs"), store.add_task([b], "scores")
    for task, answer in [(thumb, "up"), (thumb, "down"), (score, "4"), (score, "1"), (score, "skip")]:
        store.add_answer(task, answer, "ann")
    found = read_ratings(store)
    assert found.value.tolist() == [1, 0, 4, 1]
    assert found.kind == ["thumbs", "thumbs", "scores", "scores"]
    assert [found.samples[i].id for i in found.sample] == [a, a, b, b]
    assert len(read_answers(store)) == 0


def test_undone_answers_stay_in_the_file_and_out_of_the_arrays(store: Store) -> None:
    task = store.add_task(pictures(store, 2))
    store.add_answer(task, "left", "ann")
    store.add_answer(task, "right", "bob")
    store.add_answer(task, "tie", "ann")
    assert store.undo("ann")["answer"] == "tie"
    assert store.undo("ann")["answer"] == "left"
    assert store.undo("ann") is None
    found = read_answers(store)
    assert (found.raters, found.winner.tolist()) == (["bob"], [1])
    assert len(store.rows("SELECT * FROM answers")) == 3


def test_an_answer_that_was_sent_twice_is_kept_once(store: Store) -> None:
    task = store.add_task(pictures(store, 2))
    first = store.add_answer(task, "left", key="x")
    assert store.add_answer(task, "left", key="x") == first
    assert len(read_answers(store)) == 1


def test_questions_are_told_apart(store: Store) -> None:
    task = store.add_task(pictures(store, 2))
    store.add_answer(task, "left", question="fits")
    store.add_answer(task, "right", question="looks")
    assert read_answers(store).questions == ["fits", "looks"]
    assert read_answers(store, "looks").winner.tolist() == [1]


def test_agreement_compares_a_repeat_with_its_first_time(store: Store) -> None:
    task = store.add_task(pictures(store, 2))
    one = store.add_answer(task, "left", "ann", shown=[0, 1])
    two = store.add_answer(task, "left", "bob", shown=[0, 1])
    store.add_answer(task, "right", "ann", shown=[1, 0], repeat_of=one)  # the same, swapped
    store.add_answer(task, "tie", "ann", shown=[0, 1], repeat_of=one)
    store.add_answer(task, "left", "bob", shown=[1, 0], repeat_of=two)  # always left
    found = read_answers(store)
    assert self_agreement(found) == Share(1, 3)
    assert self_agreement(found, swapped=True) == Share(1, 2)
    assert self_agreement(found, rater=found.raters.index("bob")) == Share(0, 1)
    store.run("UPDATE answers SET undone = 1 WHERE id = ?", one)
    assert self_agreement(read_answers(store)) == Share(0, 1)


def test_wilsons_interval_against_published_numbers() -> None:
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    table = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for hits, count, low, high in table:
        assert Share(hits, count).interval == pytest.approx((low, high), abs=6e-5)


def test_a_store_is_moved_with_its_folder_and_read_without_the_model(store: Store, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    picture, state, series = (torch.rand(shape, generator=generator) for shape in ((3, 4, 5), (4, 2, 2), (30,)))
    pixels = (picture * 255).round() / 255
    store.add_sample(picture, "a cat", state, source="tuned", model="runs/a", digest="d", seed=3, number=1, steps=8)
    store.add_sample(series, "a series")
    store.add_sample(picture[:1], "grey")
    store.close()
    (tmp_path / "elsewhere").mkdir()
    for name in ("preferences.db", "preferences-samples"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    with Store(tmp_path / "elsewhere" / "preferences.db", make=False) as moved:
        first, second, third = moved.samples()
    assert torch.equal(load_sample(first), pixels)
    assert torch.equal(load_state(first), state)
    assert (first.source, first.model, first.seed, first.number, first.steps) == ("tuned", "runs/a", 3, 1, 8)
    assert torch.equal(load_sample(second), series)
    assert load_state(second) is None
    assert torch.equal(load_sample(third), pixels[:1])


def test_two_processes_and_many_threads_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "preferences.db"
    with Store(path, synced=False) as store:
        task = store.add_task(pictures(store, 2))
        code = (
            "import sys; from scoreact.feedback.store import Store\n"
            "with Store(sys.argv[1], synced=False) as store:\n"
            "    for i in range(200): store.add_answer(1, 'left', 'other')"
        )
        other = subprocess.Popen([sys.executable, "-c", code, str(path)])

        def answer(rater: str) -> None:
            for _ in range(50):
                store.add_answer(task, "right", rater)

        threads = [threading.Thread(target=answer, args=(f"{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert other.wait() == 0
        assert len(read_answers(store)) == 400


def test_a_kill_loses_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "preferences.db"
    with Store(path) as store:
        store.add_task(pictures(store, 2))
    code = (
        "import sys; from scoreact.feedback.store import Store\n"
        "store = Store(sys.argv[1])\n"
        "while True: print(store.add_answer(1, 'left'), flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    said += process.communicate()[0].splitlines()
    with Store(path, make=False) as store:
        assert len(read_answers(store)) >= len(said) >= 20


def test_what_cannot_be_used_is_refused_in_a_sentence(store: Store, tmp_path: Path) -> None:
    a, b = pictures(store, 2)
    dog = store.add_sample(torch.zeros(3, 4, 5), "a dog")
    task = store.add_task([a, b])
    for samples, kind, said in [
        ([a], "pair", "takes two samples"), ([a, a], "pair", "each another"), ([a, dog], "pair", "2 prompts"),
        ([a, 99], "pair", "no sample 99"), ([a, b], "thumbs", "takes one"), ([a, b], "pears", "'pears'; known: pair"),
    ]:  # fmt: skip
        with pytest.raises(FeedbackError, match=said):
            store.add_task(samples, kind)
    with pytest.raises(FeedbackError, match="chosen is 'best'"):
        store.add_task([a, b], chosen="best")
    with pytest.raises(FeedbackError, match="answer is 'up'; known: left"):
        store.add_answer(task, "up")
    with pytest.raises(FeedbackError, match=r"shown is \[0, 0\]"):
        store.add_answer(task, "left", shown=[0, 0])
    ranking = store.add_task([a, b], "rank")
    for answer in ("[1]", "[0, 1]", "[1, 3]", "[true, 1]", "1, 2", "{}"):
        with pytest.raises(FeedbackError, match="expected 2 ranks"):
            store.add_answer(ranking, answer)
    with pytest.raises(FeedbackError, match="NaN"):
        store.add_sample(torch.full((3, 2, 2), torch.nan), "a cat")
    (tmp_path / "text.db").write_text("no database at all, but a text of some length")
    with pytest.raises(FeedbackError, match=r"text.db cannot be read as a store"):
        Store(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE users (name)")
    with pytest.raises(FeedbackError, match="no store of scoreact"):
        Store(tmp_path / "other.db")
    with pytest.raises(FeedbackError, match="does not exist; `scoreact rate`"):
        read_answers(tmp_path / "none.db")
    store.describe("scoreact_version", "99")
    with pytest.raises(FeedbackError, match="newer scoreact"):
        Store(store.path)


def test_a_store_that_somebody_sent_names_no_file_outside(store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    (number,) = pictures(store, 1)
    for name in ("../secret.png", str(tmp_path / "secret.png"), "..", "a/../../secret.png"):
        store.run("UPDATE samples SET picture = ? WHERE id = ?", name, number)
        with pytest.raises(FeedbackError, match="which is no file of"):
            store.sample(number)


def test_a_failure_inside_a_transaction_leaves_nothing_of_it(store: Store) -> None:
    a, b = pictures(store, 2)

    def work() -> None:
        with store.transaction():
            store.add_task([a, b])
            store.add_task([a, 99])

    with pytest.raises(FeedbackError):
        work()
    assert store.rows("SELECT * FROM tasks") == []
    assert np.array_equal(store.add_task([a, b]), 1)
