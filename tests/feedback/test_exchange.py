"""Other forms of comparisons: what goes out comes back, what a form cannot say is said, the sign is watched."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoreact.algorithms.dpo import read_pairs
from scoreact.cli import main as cli
from scoreact.feedback.exchange import export_answers, import_answers, judgements
from scoreact.feedback.store import Store, load_sample, load_state
from scoreact.support.errors import FeedbackError, RunExists

Content = Counter[tuple[str, tuple[float, ...], tuple[int, ...]]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Left, right, tie and both bad by Ann, shown either way round, and a ranking by Bob with equals."""
    made = Store(tmp_path / "preferences.db", synced=False)
    prompts = [f"cat {i // 2}" for i in range(8)] + ["four"] * 4
    numbers = [
        made.add_sample(torch.full((3, 4, 4), i / 255), prompt, torch.full((2,), float(i)))
        for i, prompt in enumerate(prompts)
    ]
    for i, (answer, shown) in enumerate([("left", [0, 1]), ("left", [1, 0]), ("tie", [0, 1]), ("both_bad", [1, 0])]):
        made.add_answer(made.add_task(numbers[2 * i : 2 * i + 2]), answer, "ann", shown=shown)
    ranking = made.add_task(numbers[8:], "rank")
    made.add_answer(ranking, "[4, 1, 2, 2]", "bob", shown=[2, 0, 3, 1])  # ranks by place: 1, 2, 4, 2
    made.add_answer(made.add_task(numbers[:2]), "skip", "ann")
    return made


def content_of(store: Store, exploded: bool = False) -> Content:
    """Prompt, the samples' values and ranks of each judgement, or of each of its pairs."""
    found: Content = Counter()
    for judgement in judgements(store)[0]:
        value = {s: round(float(load_sample(store.sample(s)).flatten()[0]) * 255, 3) for s in judgement.samples}
        if exploded:
            for a, b, better in judgement.pairs():
                ranks = (1, 1) if better == 0 else (1, 2) if better > 0 else (2, 1)
                found[judgement.prompt, (value[a], value[b]), ranks] += 1
        else:
            found[judgement.prompt, tuple(value[s] for s in judgement.samples), judgement.ranks] += 1
    return found


def there_and_back(store: Store, tmp_path: Path, form: str, name: str) -> tuple[Store, list[str], list[str]]:
    path = tmp_path / "out" / name
    path.parent.mkdir()
    notes = export_answers(store, path, form)
    back = Store(tmp_path / "back.db", synced=False)
    _, more = import_answers(back, path, form, decode=lambda states: states)
    return back, notes, more


def said(notes: list[str], *words: str) -> bool:
    return all(any(word in note for note in notes) for word in words)


def test_judgements_are_in_the_samples_order(store: Store) -> None:
    found, notes = judgements(store)
    assert [j.ranks for j in found] == [(1, 2), (2, 1), (1, 1), (1, 1), (1, 2, 4, 2)]
    assert [j.both_bad for j in found] == [False, False, False, True, False]
    assert [j.rater for j in found] == ["ann"] * 4 + ["bob"]
    assert notes == []


def test_pickapic_there_and_back(store: Store, tmp_path: Path) -> None:
    back, notes, more = there_and_back(store, tmp_path, "pickapic", "p.parquet")
    assert content_of(back) == content_of(store, exploded=True)
    assert Counter(j.rater for j in judgements(back)[0]) == {"ann": 4, "bob": 6}
    assert said(notes, "1 answers 'both bad' stand as ties", "a ranking is all its pairs")
    assert not said(more, "some sets mean the opposite")
    assert len(back.samples()) == 12  # each picture once, however many pairs it is in


def test_imagereward_there_and_back(store: Store, tmp_path: Path) -> None:
    back, notes, _ = there_and_back(store, tmp_path, "imagereward", "p.json")
    assert content_of(back) == content_of(store)
    assert said(notes, "'both bad' stand as ties", "who answered is not in this form")
    entry = json.loads((tmp_path / "out" / "p.json").read_text())[-1]
    assert set(entry) == {"id", "prompt", "generations", "ranking"}
    assert entry["ranking"] == [1, 2, 4, 2]


def test_trl_there_and_back(store: Store, tmp_path: Path) -> None:
    back, notes, _ = there_and_back(store, tmp_path, "trl", "p.jsonl")
    decided: Content = Counter()
    for (prompt, values, ranks), count in content_of(store, exploded=True).items():
        if ranks != (1, 1):
            decided[prompt, values if ranks == (1, 2) else values[::-1], (1, 2)] += count
    assert content_of(back) == decided
    assert said(notes, "3 ties and 'both bad' are left out")


def test_dpo_there_and_back(store: Store, tmp_path: Path) -> None:
    back, notes, _ = there_and_back(store, tmp_path, "dpo", "p.safetensors")
    chosen, rejected, prompts = read_pairs(tmp_path / "out" / "p.safetensors")
    assert prompts[:2] == ["cat 0", "cat 1"]
    assert (chosen[:2, 0].tolist(), rejected[:2, 0].tolist()) == ([0, 3], [1, 2])
    assert len(chosen) == 2 + 5  # of the ranking, two are equal
    assert said(notes, "3 ties", "who answered")
    again = judgements(back)[0]
    assert all(j.ranks == (1, 2) for j in again)
    assert [float(load_state(back.sample(j.samples[0]))[0]) for j in again] == chosen[:, 0].tolist()


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """table(labels, uids) -> a file in Pick-a-Pic's columns, of pictures 10 and 20, 11 and 21, ..."""
    from pyarrow import Table, parquet

    def write(labels: list[tuple[Any, Any]], best: list[str] | None = None, **more: Any) -> Path:
        rows = [
            {"caption": "a cat", "jpg_0": png(10 + i), "jpg_1": png(20 + i), "label_0": a, "label_1": b,
             **({"best_image_uid": best[i], "image_0_uid": "x", "image_1_uid": "y"} if best else {}), **more}
            for i, (a, b) in enumerate(labels)
        ]  # fmt: skip
        parquet.write_table(Table.from_pylist(rows), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    return write


def test_the_sign_of_labels(table: Callable[..., Path], tmp_path: Path) -> None:
    def imported(path: Path, flip: bool = False) -> tuple[list[tuple[int, ...]], list[str]]:
        with Store(tmp_path / f"{len(list(tmp_path.iterdir()))}.db", synced=False) as new:
            _, notes = import_answers(new, path, "pickapic", flip=flip)
            return [j.ranks for j in judgements(new)[0]], notes

    ranks, notes = imported(table([(1, 0), (0, 1), (0.5, 0.5)]))
    assert ranks == [(1, 2), (2, 1), (1, 1)]
    assert said(notes, "1 is taken for the better one; some sets mean the opposite")
    ranks, notes = imported(table([(1, 0), (0.5, 0.5)]), flip=True)
    assert ranks == [(2, 1), (1, 1)]
    assert said(notes, "taken for the worse one")
    right = table([(1, 0), (0, 1)], ["x", "y"])
    assert imported(right)[0] == [(1, 2), (2, 1)]
    assert not said(imported(right)[1], "some sets mean")
    with pytest.raises(FeedbackError, match="leave out --flip"):
        imported(right, flip=True)
    wrong = table([(1, 0), (0, 1)], ["y", "x"])
    with pytest.raises(FeedbackError, match=r"2 of 2 rows best_image_uid names the other picture.*give --flip"):
        imported(wrong)
    assert imported(wrong, flip=True)[0] == [(2, 1), (1, 2)]


def test_what_cannot_be_imported_leaves_the_store_as_it_was(
    table: Callable[..., Path], store: Store, tmp_path: Path
) -> None:
    before = [len(store.rows(f"SELECT * FROM {name}")) for name in ("samples", "tasks", "answers")]
    cases: list[tuple[Path, str, str]] = [(table([(1, 0), (1, 1)]), "pickapic", r"row 2: labels are \(1, 1\)"),
                                          (tmp_path / "none.json", "imagereward", "does not exist")]  # fmt: skip
    texts = [
        ("imagereward", "{}", "is no list"), ("imagereward", "[3]", "entry 1 is no object"),
        ("imagereward", '[{"prompt": "p", "generations": ["../a.png"], "ranking": [1]}]', r"names '\.\./a\.png'"),
        ("imagereward", '[{"prompt": "p", "generations": ["a.png", "b.png"], "ranking": [1]}]', "a rank from 1 for each"),
        ("imagereward", '[{"prompt": "p", "generations": ["a.png", "b.png"], "ranking": [0, 1]}]', "a rank from 1"),
        ("imagereward", '[{"prompt": 3}]', "prompt is '3'; expected a text"),
        ("trl", '{"prompt": "p", "chosen": "a.png"}', "line 1: rejected is 'None'"), ("trl", "[]", "line 1 is no object"),
        ("trl", '{"prompt": "p", "chosen": "a.png", "rejected": "text.png"}', "cannot be read as a picture"),
        ("trl", "", "holds no comparison"), ("dpo", "", "give the model that drew them: --model"),
        ("pickapic", "no parquet", "is no Parquet file"),
    ]  # fmt: skip
    folder = tmp_path / "in"
    folder.mkdir()
    for name, value in (("a.png", 1), ("b.png", 2)):
        (folder / name).write_bytes(png(value))
    (folder / "text.png").write_text("no picture")
    (tmp_path / "a.png").write_bytes(png(3))
    for i, text in enumerate(texts):
        (folder / f"{i}").write_text(text[1])
    for path, form, match in [*cases, *[(folder / f"{i}", form, match) for i, (form, _, match) in enumerate(texts)]]:
        with pytest.raises(ValueError, match=match):
            import_answers(store, path, form)
    assert [len(store.rows(f"SELECT * FROM {name}")) for name in ("samples", "tasks", "answers")] == before


def test_what_cannot_be_exported(store: Store, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("")
    with pytest.raises(RunExists, match="nothing is written over"):
        export_answers(store, tmp_path / "there.json", "imagereward")
    with Store(tmp_path / "new.db") as empty, pytest.raises(FeedbackError, match="no comparisons to export"):
        export_answers(empty, tmp_path / "new.json", "trl")
    store.add_answer(1, "left", "ann", "looks")
    with pytest.raises(FeedbackError, match=r"2 questions \(better, looks\); give --question"):
        export_answers(store, tmp_path / "new.json", "trl")
    with pytest.raises(FeedbackError, match="no answer to 'fits'"):
        export_answers(store, tmp_path / "new.json", "trl", "fits")
    assert export_answers(store, tmp_path / "new.jsonl", "trl", "looks")
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 1
    series = store.add_task([store.add_sample(torch.ones(3), "s"), store.add_sample(torch.zeros(3), "s")])
    store.add_answer(series, "left", "ann", "series")
    with pytest.raises(FeedbackError, match="is no picture"):
        export_answers(store, tmp_path / "s.parquet", "pickapic", "series")
    with pytest.raises(FeedbackError, match="no state before `decode`"):
        export_answers(store, tmp_path / "s.safetensors", "dpo", "series")


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Out as pairs for dpo, and in again with the model."""
    monkeypatch.chdir(tmp_path)
    with Store("preferences.db", synced=False) as made:
        for i in range(8):
            states = torch.randn(2, 2, generator=torch.Generator().manual_seed(i))
            made.add_answer(made.add_task([made.add_sample(x, "", x) for x in states]), "left" if i % 2 else "tie")
    assert cli.main(["preferences", "export", "preferences.db", "--format", "dpo", "--out", "pairs.safetensors"]) == 0
    assert "note: 4 ties and 'both bad' are left out" in capsys.readouterr().err
    words = ["preferences", "import", "pairs.safetensors", "--format", "dpo", "--out", "back.db"]
    assert cli.main(words) == 2
    assert cli.main([*words, "--model", "gaussian"]) == 0
    assert "4 answers of pairs.safetensors are in back.db" in capsys.readouterr().out
