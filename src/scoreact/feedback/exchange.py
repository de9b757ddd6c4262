"""Comparisons in the forms of others: Pick-a-Pic's columns, ImageReward's JSON, TRL's preference sets, the pairs of `dpo`.

What a form cannot say is said by the notes that `export_answers` and `import_answers` return. Forms:

    pickapic     Parquet, a row a pair: caption, jpg_0, jpg_1 (bytes of pictures), label_0, label_1 (1 the better, 0.5 a tie)
    imagereward  JSON, an object a judgement: id, prompt, generations (files), ranking (1 the best, equals allowed)
    trl          JSON lines: prompt, chosen, rejected (files)
    dpo          safetensors: chosen, rejected (states before `decode`), prompts
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algorithms.dpo import read_pairs, write_pairs
from ..support.errors import FeedbackError, RunExists
from ..support.files import write_text
from ..support.text import parsed_json, read_text
from .picture_folder import inside, picture_of
from .store import QUESTION, Store, load_state

FORMS = ("pickapic", "imagereward", "trl", "dpo")
RATER = "imported"  # where a form names nobody


@dataclass(frozen=True)
class Judgement:
    """An answer in any form. ranks: of each sample, 1 the best. samples: ids of the store."""

    id: str
    prompt: str
    samples: tuple[int, ...]
    ranks: tuple[int, ...]
    rater: str = RATER
    both_bad: bool = False

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """Both samples of each pair, and 1 where the first is better, -1 where the second is, 0 for a tie."""
        for (a, rank), (b, other) in itertools.combinations(zip(self.samples, self.ranks, strict=True), 2):
            yield a, b, (rank < other) - (rank > other)


def judgements(store: Store, question: str | None = None) -> tuple[list[Judgement], list[str]]:
    """All comparisons and rankings that stand, and what is left out. FeedbackError where several questions were asked and none
    is chosen."""
    rows = store.rows(
        "SELECT a.*, t.kind, t.samples AS members, t.prompt FROM answers a JOIN tasks t ON t.id = a.task "
        "WHERE a.undone IS NULL AND a.answer != 'skip' ORDER BY a.id"
    )
    asked = list(dict.fromkeys(row["question"] for row in rows))
    if question is None and len(asked) > 1:
        raise FeedbackError(
            f"{store.path} has answers to {len(asked)} questions ({', '.join(asked)}); give --question."
        )
    if question is not None and question not in asked:
        raise FeedbackError(f"{store.path} has no answer to {question!r}; its questions: {', '.join(asked) or 'none'}.")
    rows = [row for row in rows if question in (None, row["question"])]
    found, single = [], 0
    for row in rows:
        shown, answer = json.loads(row["shown"]), row["answer"]
        if row["kind"] in ("thumbs", "scores"):
            single += 1
            continue
        on_screen = (
            json.loads(answer) if row["kind"] == "rank" else {"left": (1, 2), "right": (2, 1)}.get(answer, (1, 1))
        )
        rank = dict(zip(shown, on_screen, strict=True))
        ranks = tuple(rank[place] for place in range(len(shown)))
        members = tuple(json.loads(row["members"]))
        found.append(Judgement(str(row["id"]), row["prompt"], members, ranks, row["rater"], answer == "both_bad"))
    notes = [f"{single} thumbs and scores are left out: they compare nothing."] if single else []
    if any(row["repeat_of"] for row in rows):
        notes.append("repeated answers stand as answers of their own: no form says which they repeat.")
    return found, notes


def export_answers(store: Store, path: Path, form: str, question: str | None = None) -> list[str]:
    """Write a store's comparisons in another form; what that form cannot say, in sentences.

    Args:
        store: Open.
        path: A new file; pictures of `imagereward` and `trl` are put into a folder beside it, of the same name with `-images`.
        form: pickapic, imagereward, trl or dpo.
        question: Only answers to this one; needed where the store has several.

    Raises:
        FeedbackError: For a store without comparisons, or samples that the form does not take.
        RunExists: For a file that is there.
    """
    images = path.with_name(f"{path.stem}-images")
    for place in (path, images):
        if place.exists():
            raise RunExists(f"{place} is there already, and nothing is written over; give another --out.")
    found, notes = judgements(store, question)
    if not found:
        raise FeedbackError(f"{store.path} has no comparisons to export; `scoreact rate` collects them.")
    bad = sum(judgement.both_bad for judgement in found)
    if form in ("pickapic", "imagereward") and bad:
        notes.append(f"{bad} answers 'both bad' stand as ties, which is all that this form can say of them.")
    if form in ("trl", "dpo"):
        ties = sum(better == 0 for judgement in found for *_, better in judgement.pairs())
        if ties:
            notes.append(f"{ties} ties and 'both bad' are left out: this form has only a chosen and a rejected one.")
    if form != "imagereward" and any(len(judgement.samples) > 2 for judgement in found):
        notes.append("a ranking is all its pairs, which are not independent; this form does not say so.")
    if form == "dpo":
        _write_dpo(store, path, found)
        return [*notes, "who answered is not in this form."]
    if form == "pickapic":
        _write_pickapic(store, path, found)
        return notes
    files = _Images(store, images)
    if form == "imagereward":
        entries = [
            {"id": j.id, "prompt": j.prompt, "generations": list(map(files, j.samples)), "ranking": list(j.ranks)}
            for j in found
        ]
        write_text(path, json.dumps(entries, indent=1) + "\n")
    else:
        decided = [(j, *((a, b) if better > 0 else (b, a))) for j in found for a, b, better in j.pairs() if better]
        lines = [{"prompt": j.prompt, "chosen": files(won), "rejected": files(lost)} for j, won, lost in decided]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return [*notes, "who answered is not in this form."]


class _Images:
    """Copies a sample's picture into a folder once; its name, from the folder's own on."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder

    def __call__(self, number: int) -> str:
        self.folder.mkdir(exist_ok=True)
        target = self.folder / f"{number:06d}.png"
        if not target.exists():
            shutil.copyfile(_picture_file(self.store, number), target)
        return f"{self.folder.name}/{target.name}"


def _picture_file(store: Store, number: int) -> Path:
    picture = store.sample(number).picture
    if picture is None:
        raise FeedbackError(f"sample {number} of {store.path} is no picture, and this form holds pictures; use dpo.")
    return picture


def _write_pickapic(store: Store, path: Path, found: Sequence[Judgement]) -> None:
    _, table, parquet = _pyarrow()
    rows = []
    for judgement in found:
        for a, b, better in judgement.pairs():
            rows.append({
                "caption": judgement.prompt, "jpg_0": _picture_file(store, a).read_bytes(),
                "jpg_1": _picture_file(store, b).read_bytes(), "label_0": (1 + better) / 2, "label_1": (1 - better) / 2,
                "best_image_uid": str(a if better > 0 else b) if better else "tie",
                "image_0_uid": str(a), "image_1_uid": str(b),
                "are_different": bool(better), "has_label": True, "user_id": judgement.rater, "ranking_id": judgement.id,
                "model_0": store.sample(a).model, "model_1": store.sample(b).model,
            })  # fmt: skip
    parquet.write_table(table.from_pylist(rows), path)


def _write_dpo(store: Store, path: Path, found: Sequence[Judgement]) -> None:
    decided = [(j, a, b, better) for j in found for a, b, better in j.pairs() if better]
    if not decided:
        raise FeedbackError(f"{store.path} holds ties alone, and `dpo` learns from a chosen and a rejected one.")
    states: dict[int, Tensor] = {}
    for number in {s for _, a, b, _ in decided for s in (a, b)}:
        state = load_state(store.sample(number))
        if state is None:
            raise FeedbackError(
                f"sample {number} has no state before `decode` (it came as a picture), and `dpo` learns from states; rate "
                "samples of the model itself."
            )
        states[number] = state
    shapes = {tuple(state.shape) for state in states.values()}
    if len(shapes) > 1:
        raise FeedbackError(
            f"the samples' states have {len(shapes)} shapes ({sorted(shapes)}): they are of several models."
        )
    sides = [(states[a], states[b]) if better > 0 else (states[b], states[a]) for _, a, b, better in decided]
    chosen, rejected = (torch.stack(side) for side in zip(*sides, strict=True))
    write_pairs(path, chosen, rejected, [j.prompt for j, *_ in decided])


# --- import ------------------------------------------------------------------------------------------------------------


def import_answers(
    store: Store,
    path: Path,
    form: str,
    question: str = QUESTION,
    flip: bool = False,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> tuple[int, list[str]]:
    """Add comparisons in another form to a store, all or none; their number, and what that form did not say, in sentences.

    Args:
        store: Open. What comes is marked as imported, and as shown in its own order: the sides are not known.
        path: Of the file; files that it names lie in its folder.
        form: pickapic, imagereward, trl or dpo.
        question: To which the answers are.
        flip: Of pickapic: label 1 marks the worse one.
        decode: Of dpo: states [B, *D] to samples, of the model that drew them.

    Raises:
        FeedbackError: For what cannot be read, with the row. SettingError: Likewise, of dpo's files and of JSON.
    """
    if not path.is_file():
        raise FeedbackError(f"{path} does not exist; give a file of the form {form}.")
    notes: list[str] = []
    known: dict[tuple[str, str], int] = {}

    def sample(content: Path | bytes, prompt: str, name: str) -> int:
        """A picture is kept once a prompt, however often it comes."""
        data = content.read_bytes() if isinstance(content, Path) else content
        key = (hashlib.sha256(data).hexdigest(), prompt)
        if key not in known:
            known[key] = store.add_sample(picture_of(data, name), prompt, model=str(path))
        return known[key]

    def files(names: object, prompt: str, where: str) -> list[int]:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FeedbackError(f"{where}: expected names of files; got {str(names)[:80]}.")
        return [sample(inside(path.parent, name, where), prompt, f"{where}, {name}") for name in names]

    with store.transaction():
        if form == "pickapic":
            found = _read_pickapic(path, sample, flip, notes)
        elif form == "imagereward":
            found = _read_imagereward(path, files, notes)
        elif form == "trl":
            found = _read_trl(path, files, notes)
        else:
            found = _read_dpo(path, store, decode, notes)
        count = 0
        for judgement in found:
            ranks = judgement.ranks
            task = store.add_task(judgement.samples, "pair" if len(ranks) == 2 else "rank", "imported")
            answer = "left" if ranks[0] < ranks[1] else "right" if ranks[0] > ranks[1] else "tie"
            store.add_answer(task, answer if len(ranks) == 2 else json.dumps(list(ranks)), judgement.rater, question)
            count += 1
        if not count:
            raise FeedbackError(f"{path} holds no comparison that could be read.")
    return count, [*notes, "on which side each stood is not in this form: the first counts as the left one."]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise FeedbackError(f"{where}: {name} is {str(row.get(name))[:60]!r}; expected a text.")
    return str(row[name])


def _pyarrow() -> tuple[Any, Any, Any]:
    try:
        from pyarrow import ArrowException, Table, parquet
    except ImportError:
        raise FeedbackError("Parquet files need pyarrow: pip install 'scoreact[parquet]'.") from None
    return ArrowException, Table, parquet


Sampling = Callable[[Path | bytes, str, str], int]
Naming = Callable[[object, str, str], list[int]]


def _read_pickapic(path: Path, sample: Sampling, flip: bool, notes: list[str]) -> Iterator[Judgement]:
    broken, _, parquet = _pyarrow()
    number = unlabelled = against = along = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            if missing := {"caption", "jpg_0", "jpg_1", "label_0", "label_1"} - names:
                raise FeedbackError(
                    f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(sorted(names))}."
                )
            for batch in file.iter_batches(64):
                for row in batch.to_pylist():
                    number += 1
                    if row.get("has_label") is False:
                        unlabelled += 1
                        continue
                    where = f"{path}, row {number}"
                    labels = (row["label_0"], row["label_1"])
                    if labels not in ((0, 1), (1, 0), (0.5, 0.5)):
                        raise FeedbackError(f"{where}: labels are {labels}; expected 1 and 0, or 0.5 twice for a tie.")
                    if flip:
                        labels = labels[::-1]
                    best = row.get("best_image_uid")
                    if (
                        labels[0] != 0.5
                        and best is not None
                        and best in (row.get("image_0_uid"), row.get("image_1_uid"))
                    ):
                        agrees = (best == row["image_0_uid"]) == (labels[0] == 1)
                        along, against = along + agrees, against + (not agrees)
                    caption = _text(row, "caption", where)
                    pictures = [
                        row[name]["bytes"] if isinstance(row[name], dict) else row[name] for name in ("jpg_0", "jpg_1")
                    ]
                    if not all(isinstance(picture, bytes) for picture in pictures):
                        raise FeedbackError(f"{where}: jpg_0 and jpg_1 are not the bytes of pictures.")
                    a, b = (sample(p, caption, f"{where}, jpg_{i}") for i, p in enumerate(pictures))
                    if a == b:
                        notes.append(f"{where} compares a picture with itself and is left out.")
                        continue
                    ranks = (1, 1) if labels[0] == 0.5 else (1, 2) if labels[0] == 1 else (2, 1)
                    rater = row.get("user_id")
                    yield Judgement(str(number), caption, (a, b), ranks, RATER if rater is None else str(rater)[:60])
    except (broken, OSError) as error:
        raise FeedbackError(f"{path} is no Parquet file that can be read ({' '.join(str(error).split())}).") from None
    if against > along:
        raise FeedbackError(
            f"{path}: in {against} of {against + along} rows best_image_uid names the other picture than the labels; "
            + ("leave out --flip." if flip else "its labels mark the worse one: give --flip.")
        )
    if unlabelled:
        notes.append(f"{unlabelled} rows without a label are left out.")
    if not along:
        better = "worse" if flip else "better"
        notes.append(
            f"nothing in the file says what a label means: 1 is taken for the {better} one; some sets mean the opposite."
        )


def _read_imagereward(path: Path, files: Naming, notes: list[str]) -> Iterator[Judgement]:
    entries = parsed_json(read_text(path), str(path))
    if not isinstance(entries, list):
        raise FeedbackError(f"{path} is no list; expected objects with id, prompt, generations and ranking.")
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise FeedbackError(f"{where} is no object.")
        prompt, ranking = _text(entry, "prompt", where), entry.get("ranking")
        members = files(entry.get("generations"), prompt, where)
        whole = isinstance(ranking, list) and all(
            isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranking
        )
        if not whole or not isinstance(ranking, list) or len(ranking) != len(members) or len(members) < 2:
            raise FeedbackError(
                f"{where}: ranking is {ranking} for {len(members)} generations; expected a rank from 1 for each."
            )
        if len(set(members)) < len(members):
            notes.append(f"{where} has a picture twice and is left out.")
            continue
        ordered = sorted(ranking)  # ranks may have gaps or none: 1, 2, 2, 3
        ranks = tuple(ordered.index(rank) + 1 for rank in ranking)
        yield Judgement(str(entry.get("id", number)), prompt, tuple(members), ranks)


def _read_trl(path: Path, files: Naming, notes: list[str]) -> Iterator[Judgement]:
    for number, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        row = parsed_json(text, where)
        if not isinstance(row, dict):
            raise FeedbackError(f"{where} is no object.")
        prompt = _text(row, "prompt", where)
        a, b = files([_text(row, "chosen", where), _text(row, "rejected", where)], prompt, where)
        if a == b:
            notes.append(f"{where} compares a picture with itself and is left out.")
            continue
        yield Judgement(str(number), prompt, (a, b), (1, 2))


def _read_dpo(
    path: Path, store: Store, decode: Callable[[Tensor], Tensor] | None, notes: list[str]
) -> Iterator[Judgement]:
    if decode is None:
        raise FeedbackError(f"{path} holds states before `decode`; give the model that drew them: --model RUN|RECIPE.")
    chosen, rejected, prompts = read_pairs(path)
    for number, (won, lost, prompt) in enumerate(zip(chosen, rejected, prompts, strict=True), 1):
        states = torch.stack([won, lost])
        samples = decode(states).cpu()
        a, b = (store.add_sample(samples[i], prompt, states[i], model=str(path)) for i in (0, 1))
        yield Judgement(str(number), prompt, (a, b), (1, 2))
