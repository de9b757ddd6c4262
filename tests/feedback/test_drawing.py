"""What raters see: the model against its reference, each sample the one that its seed and number say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scoreact.api.result import Result
from scoreact.feedback.drawing import Drawing, _check_shape, draw_tasks, tasks_of
from scoreact.feedback.picture_folder import add_pictures, holds_pictures, read_pictures
from scoreact.feedback.store import Store, load_sample, load_state
from scoreact.models.weights import digest_of
from scoreact.support.errors import FeedbackError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "preferences.db", synced=False)


@pytest.fixture
def small_run(train_on_mixture: Callable[..., Result]) -> Result:
    """A policy that has moved from its reference, on points of the plane."""
    few = {"batch_size": 32, "heldout_samples": 16, "reference_batches": 1, "value_steps": 2, "value_first_steps": 2}
    return train_on_mixture(width=8, iterations=2, **few)


@pytest.fixture
def draw(store: Store, small_run: Result) -> Callable[..., None]:
    def fill(count: int = 3, **how: object) -> None:
        run = small_run
        found = draw_tasks(
            store,
            run.policy,
            run.config,
            [""],
            count,
            Drawing(**{"at_once": 2, **how}),
            "runs/a",  # type: ignore[arg-type]
        )
        assert list(found)[-1] == count

    return fill


@pytest.mark.parametrize("noise", ["same", "other"])
def test_pairs_are_of_the_policy_and_its_reference(
    draw: Callable[..., None], store: Store, small_run: Result, noise: str
) -> None:
    draw(noise=noise, seed=7)
    samples = store.samples()
    assert [s.source for s in samples] == ["tuned", "reference"] * 3
    assert [s.number for s in samples] == ([0, 0, 1, 1, 2, 2] if noise == "same" else [0, 1, 2, 3, 4, 5])
    assert [store.task(i + 1).samples for i in range(3)] == [(1, 2), (3, 4), (5, 6)]
    tuned, reference = (small_run.sample(count=6, seed=7, reference=which) for which in (False, True))
    for s in samples:
        expected = (tuned if s.source == "tuned" else reference)[s.number]
        assert torch.allclose(load_sample(s), expected, atol=1e-5)
        assert torch.allclose(load_state(s), load_sample(s))  # this model's decode changes nothing
        assert (s.model, s.seed, s.steps) == ("runs/a", 7, small_run.config.steps)
    assert {s.digest for s in samples if s.source == "tuned"} == {digest_of(small_run.policy.model)}
    assert len({s.digest for s in samples}) == 2


def test_a_store_that_is_added_to_gets_new_noise(draw: Callable[..., None], store: Store) -> None:
    draw()
    draw(kind="rank")
    draw(kind="thumbs", count=2)
    numbers = [s.number for s in store.samples()]
    assert sorted(numbers) == list(range(6 + 12 + 2))
    assert [len(store.task(i).samples) for i in range(1, 9)] == [2, 2, 2, 4, 4, 4, 1, 1]
    assert [s.source for s in store.samples()[6:10]] == ["tuned", "tuned", "reference", "reference"]
    assert tasks_of(store, "pair", lambda s: s.model == "runs/a") == 3
    assert tasks_of(store, "pair", lambda s: s.model == "runs/b") == 0


def folder_of(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(np.full((4, 5, 3), 20 * i, dtype=np.uint8)).save(folder / name)
    return folder


def test_prompts_of_pictures_in_the_forms_they_come_in(tmp_path: Path) -> None:
    names = ["a.png", "b.jpg", "c.png"]
    plain = folder_of(tmp_path / "plain", names)
    assert [(p.name, prompt) for p, prompt in read_pictures(plain)] == [(name, "") for name in names]
    (plain / "a.txt").write_text("a cat\n")
    assert read_pictures(plain)[0][1] == "a cat"
    lines = folder_of(tmp_path / "lines", names)
    (lines / "metadata.jsonl").write_text(
        '{"file_name": "b.jpg", "text": "a dog"}\n{"file_name": "a.png", "prompt": "x"}\n'
    )
    assert [(p.name, prompt) for p, prompt in read_pictures(lines)] == [("b.jpg", "a dog"), ("a.png", "x")]
    table = folder_of(tmp_path / "table", names)
    (table / "metadata.csv").write_text('file_name,caption\nc.png,"a cat, a dog"\n')
    assert [(p.name, prompt) for p, prompt in read_pictures(table)] == [("c.png", "a cat, a dog")]
    index = folder_of(tmp_path / "index", names)
    (index / "index.json").write_text(json.dumps({"samples": [{"number": 0, "prompt": "p", "file": "a.png"}]}))
    assert [(p.name, prompt) for p, prompt in read_pictures(index)] == [("a.png", "p")]
    assert all(map(holds_pictures, (plain, lines, table, index)))
    assert not holds_pictures(tmp_path)
    (index / "model_index.json").write_text("{}")
    assert not holds_pictures(index)
    for text, said in [
        ('{"file_name": "../plain/a.png"}', "names '../plain/a.png', which is no file in "),
        ('{"file_name": "none.png"}', "no file in "), ('{"file": "a.png"}', "row 1: expected file_name"),
        ('{"file_name": "a.png", "prompt": 3}', "row 1: expected"), ("{", "line 1 is no JSON"),
    ]:  # fmt: skip
        (lines / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match=said.replace(".", r"\.")):
            read_pictures(lines)


def test_pairs_of_pictures_are_different_and_of_one_prompt(tmp_path: Path, store: Store) -> None:
    folder = folder_of(tmp_path / "pictures", [f"{i}.png" for i in range(9)])
    for i in range(9):
        (folder / f"{i}.txt").write_text(["a", "a", "a", "a", "b", "b", "b", "b", "alone"][i])
    assert list(add_pictures(store, folder, 4, Drawing(against="itself"))) == [1, 2, 3, 4]
    first = [store.task(i) for i in range(1, 5)]
    assert Counter(task.prompt for task in first) == {"a": 2, "b": 2}
    assert len({s for task in first for s in task.samples}) == 8  # no picture twice before the others had their turn
    assert list(add_pictures(store, folder, 99, Drawing(against="itself")))[-1] == 8  # 2 x 6 in all
    tasks = {store.task(i).samples for i in range(1, 13)}
    assert len({frozenset(samples) for samples in tasks}) == 12
    assert len(store.samples()) == 8
    assert all(s.source == "given" and s.model == str(folder / Path(s.model).name) for s in store.samples())
    shown = store.sample(first[0].samples[0])
    assert float(load_sample(shown).unique() * 255) == pytest.approx(20 * int(Path(shown.model).stem))
    with pytest.raises(FeedbackError, match=r"no prompt in .* has 4 pictures"):
        next(add_pictures(store, folder_of(tmp_path / "few", ["a.png"]), 1, Drawing("rank")))
    (folder / "0.png").write_bytes(b"no picture")
    with pytest.raises(FeedbackError, match=r"0\.png cannot be read as a picture"), Store(tmp_path / "new.db") as new:
        list(add_pictures(new, folder, 4, Drawing()))


def test_samples_that_cannot_be_shown_are_refused() -> None:
    for shape in ((2,), (30,), (4, 30), (1, 8, 8), (3, 8, 8), (3, 5, 8, 8)):
        _check_shape(shape)
    for shape in ((), (4, 8, 8), (5, 3, 8, 8), (3, 2, 2, 2, 2)):
        with pytest.raises(FeedbackError, match="cannot be shown"):
            _check_shape(shape)


def test_chosen_pairs_are_drawn_wider_and_say_how_they_were_chosen(store: Store, small_run: Result) -> None:
    looked: list[int] = []

    def last_ones(prompts: list[str], first: torch.Tensor, second: torch.Tensor, count: int) -> list[tuple[int, str]]:
        looked.append(len(prompts))
        assert first.shape == second.shape == (len(prompts), 2)
        return [(0, "random"), *[(len(prompts) - 1 - i, "gap") for i in range(count - 1)]]

    run, how = small_run, Drawing(at_once=1, seed=3)
    assert list(draw_tasks(store, run.policy, run.config, [""], 6, how, "a", choose=last_ones)) == [4, 6]  # type: ignore[arg-type]
    assert looked == [16, 8]
    rows = store.rows("SELECT chosen FROM tasks ORDER BY id")
    assert [row[0] for row in rows] == ["random", "gap", "gap", "gap", "random", "gap"]
    numbers = [sample.number for sample in store.samples()]
    assert numbers[:8] == [0, 1, 30, 31, 28, 29, 26, 27]  # each the sample that its number says
    with Store(store.path.with_name("all.db"), synced=False) as every:
        list(draw_tasks(every, run.policy, run.config, [""], 16, Drawing(seed=3), "a"))
        same = {sample.number: load_sample(sample) for sample in every.samples() if sample.source == "tuned"}
    torch.testing.assert_close(load_sample(store.samples()[2]), same[30])
