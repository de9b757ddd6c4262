"""Who rates what next: nothing is lost, nothing is answered twice unless it is wanted, repeats measure the rater."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from scoreact.feedback import leases
from scoreact.feedback.answers import read_answers, self_agreement
from scoreact.feedback.leases import NotLent, TaskQueue
from scoreact.feedback.store import Store


def store_of(folder: Path, tasks: int) -> Store:
    store = Store(folder / "preferences.db", synced=False)
    numbers = [store.add_sample(torch.tensor([float(i)]), "") for i in range(2)]
    with store.transaction():
        for _ in range(tasks):
            store.add_task(numbers)
    return store


def queue_of(store: Store, **how: object) -> TaskQueue:
    settings = {"questions": ["better"], "repeats": 0.0, "chance": random.Random(0), **how}
    return TaskQueue(store, **settings)  # type: ignore[arg-type]


def rate_all(queue: TaskQueue, rater: str) -> list[int]:
    """Answer "left" until nothing waits; the tasks in order."""
    done: list[int] = []
    while held := queue.hand_out(rater):
        for question in held[0].open:
            queue.answer(rater, held[0].task.id, question, "left")
        done.append(held[0].task.id)
    return done


@pytest.mark.parametrize("wanted", [1, 2])
def test_raters_at_once_answer_every_task_as_often_as_wanted(tmp_path: Path, wanted: int) -> None:
    store = store_of(tmp_path, 60)
    queue = queue_of(store, wanted=wanted, repeats=0.2)
    threads = [threading.Thread(target=rate_all, args=(queue, name)) for name in ("ann", "bob", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_answers(store)
    first = found.repeat_of < 0
    assert Counter(found.task[first].tolist()) == {task: wanted for task in range(1, 61)}
    assert max(Counter(zip(found.task[first].tolist(), found.rater[first].tolist(), strict=True)).values()) == 1


def test_a_task_in_someones_hands_is_lent_again_only_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = queue_of(store_of(tmp_path, 4))
    assert [lease.task.id for lease in queue.hand_out("ann")] == [1, 2, 3]
    assert [lease.task.id for lease in queue.hand_out("bob")] == [4]
    assert queue.hand_out("eve") == []
    now = leases.time.time()
    monkeypatch.setattr(leases.time, "time", lambda: now + 301)
    assert [lease.task.id for lease in queue.hand_out("eve")] == [1, 2, 3]
    queue.answer("eve", 1, "better", "left")
    with pytest.raises(NotLent):
        queue.answer("ann", 1, "better", "right")  # it was lent to Eve meanwhile, who has answered
    queue.answer("ann", 2, "better", "right")  # nobody has answered this one
    assert [lease.task.id for lease in queue.hand_out("ann")] == [3, 4]
    assert [lease.task.id for lease in queue.hand_out("eve")] == [3]


def test_what_a_rater_holds_survives_a_new_server(tmp_path: Path) -> None:
    store = store_of(tmp_path, 5)
    before = queue_of(store).hand_out("ann")
    store.close()
    with Store(store.path) as again:
        assert queue_of(again, chance=random.Random(9)).hand_out("ann") == before


def test_undo_shows_the_same_again(tmp_path: Path) -> None:
    queue = queue_of(store_of(tmp_path, 3), questions=["fits", "looks"])
    first = queue.hand_out("ann")[0]
    queue.answer("ann", first.task.id, "fits", "left")
    queue.answer("ann", first.task.id, "looks", "tie")
    second = queue.hand_out("ann")[0]
    assert second.task.id != first.task.id
    queue.answer("ann", second.task.id, "fits", "right")
    for expected in [
        (second.task.id, ("fits", "looks")),
        (first.task.id, ("looks",)),
        (first.task.id, ("fits", "looks")),
    ]:
        assert queue.undo("ann")
        held = queue.hand_out("ann")[0]
        assert (held.task.id, held.open) == expected
        assert held.shown == (first if held.task.id == first.task.id else second).shown
    assert not queue.undo("ann")
    assert queue.counts("ann") == {"answered": 0, "left": 3, "seconds": 0.0}
    assert rate_all(queue, "ann") == [1, 2, 3]
    assert len(read_answers(queue.store)) == 6


def test_undoing_gives_a_task_back_to_its_rater_alone(tmp_path: Path) -> None:
    queue = queue_of(store_of(tmp_path, 1))
    rate_all(queue, "ann")
    assert queue.undo("ann")
    assert queue.hand_out("bob") == []
    assert rate_all(queue, "ann") == [1]


def test_a_skipped_task_is_left_to_others(tmp_path: Path) -> None:
    queue = queue_of(store_of(tmp_path, 2))
    queue.answer("ann", queue.hand_out("ann")[0].task.id, "better", "skip")
    assert rate_all(queue, "ann") == [2]
    assert queue.counts("ann")["left"] == 0
    assert queue.counts("bob")["left"] == 1
    assert rate_all(queue, "bob") == [1]


def test_an_answer_is_kept_once_however_often_it_arrives(tmp_path: Path) -> None:
    queue = queue_of(store_of(tmp_path, 2))
    task = queue.hand_out("ann")[0].task.id
    first = queue.answer("ann", task, "better", "left", key="k")
    assert queue.answer("ann", task, "better", "left", key="k") == first
    with pytest.raises(NotLent):
        queue.answer("ann", task, "better", "left", key="other")
    with pytest.raises(NotLent):
        queue.answer("bob", 2, "better", "left")  # Ann holds it
    with pytest.raises(NotLent):
        queue.answer("ann", 2, "no question", "left")
    assert len(read_answers(queue.store)) == 1


def test_repeats_are_of_this_raters_answers_half_of_them_swapped(tmp_path: Path) -> None:
    queue = queue_of(store_of(tmp_path, 400), repeats=0.2)
    rate_all(queue, "ann")
    found = read_answers(queue.store)
    again = found.repeat_of >= 0
    assert (~again).sum() == 400
    assert 60 < again.sum() < 140  # 0.2 / 0.8 of 400, less those refused at first; sd 11
    gaps = [i - found.repeat_of[i] for i in again.nonzero()[0]]
    assert min(gaps) >= leases.REPEAT_AFTER - leases.AHEAD
    assert max(gaps) <= leases.REPEAT_AFTER + leases.REPEAT_WITHIN + leases.AHEAD
    assert (found.task[again] == found.task[found.repeat_of[again]]).all()
    assert len(set(found.repeat_of[again].tolist())) == again.sum()
    swapped, same = self_agreement(found, swapped=True), self_agreement(found, swapped=False)
    assert (swapped.value, same.value) == (0, 1)  # "left" whatever stands there
    assert abs(swapped.count - same.count) < 40
    assert abs((found.left == 0).sum() - len(found) / 2) < 60  # sides are drawn: sd 11


def test_time_left_is_of_the_last_answers_and_no_coffee(tmp_path: Path) -> None:
    queue = queue_of(store_of(tmp_path, 5))
    for milliseconds in (1000, 2000, 3_600_000):
        queue.answer("ann", queue.hand_out("ann")[0].task.id, "better", "left", milliseconds)
    assert queue.counts("ann") == {"answered": 3, "left": 2, "seconds": 21.0}


def test_what_is_given_back_is_for_others(tmp_path: Path) -> None:
    queue = queue_of(store_of(tmp_path, 2))
    queue.hand_out("ann")
    assert queue.hand_out("bob") == []
    queue.give_back("ann")
    assert rate_all(queue, "bob") == [1, 2]


def test_another_question_is_asked_about_what_was_answered_before(tmp_path: Path) -> None:
    store = store_of(tmp_path, 3)
    assert rate_all(queue_of(store, questions=["fits"]), "ann") == [1, 2, 3]
    assert queue_of(store, questions=["fits"]).hand_out("bob") == []
    both = queue_of(store, questions=["fits", "looks"])
    assert both.counts("ann")["left"] == 3
    held = both.hand_out("ann")
    assert [lease.open for lease in held] == [("looks",)] * 3
    both.answer("ann", 1, "looks", "tie")
    looks = queue_of(store, questions=["looks"])
    assert rate_all(looks, "ann") == [2, 3]
    assert looks.hand_out("bob") == []
    fits = queue_of(store, questions=["fits"])
    assert fits.hand_out("ann") == []
    assert not fits.undo("ann")  # the last answer is to another question
    assert len(read_answers(store)) == 6


def test_what_is_held_and_no_longer_asked_is_put_down(tmp_path: Path) -> None:
    store = store_of(tmp_path, 4)
    both = queue_of(store, questions=["fits", "looks"])
    both.hand_out("ann")
    both.answer("ann", 1, "fits", "left")
    assert [(lease.task.id, lease.open) for lease in queue_of(store, questions=["fits"], wanted=2).hand_out("ann")] == [
        (2, ("fits",)), (3, ("fits",)), (4, ("fits",)),
    ]  # fmt: skip
