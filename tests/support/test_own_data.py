"""A user's data: what is read, what is said of it, and every refusal with its sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scoreact.support.errors import SettingError
from scoreact.support.own_data import read_data

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 8, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (40, 8, 6, 3), dtype=np.uint8)
FLOATS = COLOUR / 255.0


def folder(path: Path, pictures: np.ndarray, classes: int = 0, mode: str | None = None) -> Path:
    """Pictures as files 00.png, 01.png, ..., dealt out to folders a, b, ... where classes are wanted."""
    for i, picture in enumerate(pictures):
        place = path / "ab"[i % 2] if classes == 2 else path / "a" if classes == 1 else path
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture)
        (image if mode is None else image.convert(mode)).save(place / f"{i:02d}.png")
    return path


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "own.npz", **arrays)
    return path / "own.npz"


def table(path: Path, text: str, name: str = "own.csv") -> Path:
    (path / name).write_text(text, encoding="utf-8")
    return path / name


def rows(count: int = 40, header: str = "a,b", tail: str = "") -> str:
    values = np.random.default_rng(1).normal(size=(count, 2))
    return "\n".join([*([header] if header else []), *(f"{a:.5f},{b:.5f}{tail}" for a, b in values)]) + "\n"


def all_of(data) -> torch.Tensor:
    return torch.cat([data.train.values, data.heldout.values])


def as_set(values: torch.Tensor | np.ndarray) -> set[bytes]:
    return {np.ascontiguousarray(np.asarray(x)).tobytes() for x in values}


# --- what is read ------------------------------------------------------------------------------------------------------


def test_a_folder_gives_back_its_pictures_with_a_tenth_kept_out(tmp_path: Path) -> None:
    data = read_data(folder(tmp_path / "p", COLOUR))
    assert (data.kind, len(data.train), len(data.heldout), data.notes) == ("pictures", 36, 4, ())
    assert as_set(all_of(data)) == as_set(COLOUR.transpose(0, 3, 1, 2))
    again = read_data(tmp_path / "p")
    assert torch.equal(again.heldout.values, data.heldout.values)


def test_folders_are_classes_when_asked_for_and_taken_together_otherwise(tmp_path: Path) -> None:
    path = folder(tmp_path / "p", GREY, classes=2)
    data = read_data(path, labels=True)
    assert data.classes == ("a", "b")
    of = {x.numpy().tobytes(): int(y) for x, y in zip(data.train.values, data.train.labels, strict=True)}
    assert all(of.get(picture[None].tobytes(), i % 2) == i % 2 for i, picture in enumerate(GREY))
    plain = read_data(path)
    assert plain.classes == ()
    assert plain.train.labels is None
    assert "--labels" in plain.notes[0]


def test_a_folders_own_split_is_kept(tmp_path: Path) -> None:
    folder(tmp_path / "p" / "train", COLOUR[:30], classes=2)
    folder(tmp_path / "p" / "test", COLOUR[30:], classes=2)
    data = read_data(tmp_path / "p", labels=True)
    assert data.classes == ("a", "b")
    assert as_set(data.heldout.values) == as_set(COLOUR[30:].transpose(0, 3, 1, 2))


def test_size_scales_and_cuts_pictures_of_any_size(tmp_path: Path) -> None:
    folder(tmp_path / "p", GREY)
    Image.new("L", (20, 10), 255).save(tmp_path / "p" / "wide.png")
    data = read_data(tmp_path / "p", size=4)
    assert all_of(data).shape == (41, 1, 4, 4)
    assert as_set(all_of(data)) > as_set(np.full((1, 1, 4, 4), 255, np.uint8))


def test_grey_among_colour_and_see_through_pictures_are_said(tmp_path: Path) -> None:
    path = folder(tmp_path / "p", COLOUR)
    Image.fromarray(GREY[0]).save(path / "grey.png")
    Image.new("RGBA", (6, 8), (255, 0, 0, 0)).save(path / "clear.png")
    (path / "notes.doc").write_text("x")
    data = read_data(path)
    assert all_of(data).shape == (42, 3, 8, 6)
    assert as_set(all_of(data)) > as_set(np.full((1, 3, 8, 6), 255, np.uint8))  # white where it is clear
    said = " ".join(data.notes)
    assert "notes.doc" in said
    assert "1 of 42 pictures are grey" in said
    assert "1 pictures are see-through" in said


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (COLOUR, FLOATS.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), FLOATS.transpose(0, 3, 1, 2)),
        (GREY, GREY[:, None] / 255),
        (GREY[..., None], GREY[:, None] / 255),
        (FLOATS, FLOATS.transpose(0, 3, 1, 2)),
        (2 * FLOATS - 1, FLOATS.transpose(0, 3, 1, 2)),
        (255 * FLOATS, FLOATS.transpose(0, 3, 1, 2)),
        (COLOUR.astype(np.int64), FLOATS.transpose(0, 3, 1, 2)),
    ],
)
def test_arrays_of_pictures_in_every_order_and_range(tmp_path: Path, array: np.ndarray, expected: np.ndarray) -> None:
    data = read_data(npz(tmp_path, images=array))
    found = torch.cat([data.train.floats(), data.heldout.floats()])
    order = found.flatten(1).sum(1).sort().indices
    wanted = torch.from_numpy(expected).float()
    wanted = wanted[wanted.flatten(1).sum(1).sort().indices]
    assert data.kind == "pictures"
    torch.testing.assert_close(found[order], wanted, atol=1e-6, rtol=0)


def test_an_npz_with_a_split_and_labels(tmp_path: Path) -> None:
    labels = np.arange(40) % 3
    path = npz(
        tmp_path, train_images=GREY[:30], train_labels=labels[:30], test_images=GREY[30:], test_labels=labels[30:],
        extra=np.zeros(3),
    )  # fmt: skip
    data = read_data(path, labels=True)
    assert data.classes == ("0", "1", "2")
    assert torch.equal(data.train.values, torch.from_numpy(GREY[:30, None]))
    assert data.train.labels.tolist() == labels[:30].tolist()
    assert data.heldout.labels.tolist() == labels[30:].tolist()
    assert data.notes[:2] == ("Held out are those of test_images.", "Not used of own.npz: extra.")


def test_vectors_and_series_of_arrays(tmp_path: Path) -> None:
    vectors = RNG.normal(size=(50, 3))
    assert read_data(npz(tmp_path, data=vectors)).train.values.shape == (45, 3)
    assert read_data(npz(tmp_path, data=vectors), kind="series").train.values.shape == (45, 1, 3)
    assert read_data(npz(tmp_path, x=RNG.normal(size=(50, 2, 9))), kind="series").train.values.shape == (45, 2, 9)
    np.save(tmp_path / "own.npy", vectors)
    assert read_data(tmp_path / "own.npy").kind == "vectors"


@pytest.mark.parametrize(("mark", "name"), [(",", "own.csv"), (";", "own.csv"), ("\t", "own.tsv"), ("  ", "own.txt")])
def test_a_table_of_vectors(tmp_path: Path, mark: str, name: str) -> None:
    data = read_data(table(tmp_path, rows(header="a,b").replace(",", mark), name))
    assert (data.kind, data.columns, all_of(data).shape) == ("vectors", ("a", "b"), (40, 2))


def test_a_tables_columns_of_words_and_counts_are_said_and_labels_taken(tmp_path: Path) -> None:
    lines = rows(header="").splitlines()
    text = "n,a,b,day,kind\n" + "\n".join(f"{i},{line},mon,{i % 2}.0" for i, line in enumerate(lines))
    data = read_data(table(tmp_path, text), labels="kind")
    assert data.columns == ("a", "b")
    assert data.classes == ("0", "1")
    assert data.notes[:2] == (
        "Column 'n' of own.csv counts the rows and is left out.",
        "Column 'day' of own.csv holds no numbers ('mon') and is left out.",
    )


def test_windows_are_rows_in_a_row_and_the_end_is_kept_out(tmp_path: Path) -> None:
    values = np.exp(np.random.default_rng(2).normal(size=(100, 2)).cumsum(0) / 10)
    path = table(tmp_path, "a,b\n" + "\n".join(f"{a:.8f},{b:.8f}" for a, b in values))
    data = read_data(path, window=5)
    assert data.train.values.shape == (86, 2, 5)
    assert data.heldout.values.shape == (6, 2, 5)
    torch.testing.assert_close(data.train.values[7], torch.from_numpy(values[7:12].T).float())
    torch.testing.assert_close(data.heldout.values[-1], torch.from_numpy(values[95:].T).float())
    returns = read_data(path, window=5, values="returns")
    torch.testing.assert_close(
        returns.train.values[7], torch.from_numpy(np.log(values[8:13] / values[7:12]).T).float(), atol=1e-5, rtol=0
    )


def dated(path: Path, order: slice = slice(None), dates: list[str] | None = None) -> tuple[Path, np.ndarray]:
    """Sixty days of two levels and a volume, in this order; the levels as they went."""
    levels = np.exp(np.random.default_rng(3).normal(size=(60, 2)).cumsum(0) / 10)
    days = dates or [str(day) for day in np.datetime64("2007-02-01") + np.arange(60)]
    lines = [f"{day},{a:.8f},{b:.8f},{7 * i % 60}" for i, (day, (a, b)) in enumerate(zip(days, levels, strict=True))]
    return table(path, "\n".join(["Date,a,b,volume", *lines[order]]) + "\n"), levels


def test_rows_that_go_back_in_time_are_turned_round_and_columns_are_taken_by_name(tmp_path: Path) -> None:
    path, levels = dated(tmp_path, slice(None, None, -1))
    data = read_data(path, window=5, values="returns", columns=["b", "a"])
    assert (data.columns, data.values) == (("b", "a"), "returns")
    wanted = np.log(levels[1:6] / levels[:5])[:, ::-1].T.copy()
    torch.testing.assert_close(data.train.values[0], torch.from_numpy(wanted).float(), atol=1e-5, rtol=0)
    assert "The rows of own.csv go back in time by column 'Date' and are turned round." in data.notes
    assert not any("taken to go forward" in note for note in data.notes)


def test_a_column_of_times_in_numbers_is_no_channel(tmp_path: Path) -> None:
    days = [f"{20070201 + i}" for i in range(60)]  # neighbours are one number in float32
    path, levels = dated(tmp_path, dates=days)
    data = read_data(path, window=5)
    assert data.columns == ("a", "b", "volume")
    torch.testing.assert_close(data.train.values[0, :2], torch.from_numpy(levels[:5].T).float())
    assert "Column 'Date' of own.csv is the time of a row and no channel." in data.notes


def test_rows_without_readable_dates_are_said_to_go_forward(tmp_path: Path) -> None:
    path, _ = dated(tmp_path, dates=[f"{i % 28 + 1}/{i // 28 + 1}/2007" for i in range(60)])
    assert any("taken to go forward" in note for note in read_data(path, window=5).notes)


def test_a_held_out_window_holds_no_row_that_is_learned_from(tmp_path: Path) -> None:
    path, levels = dated(tmp_path)
    data = read_data(path, window=5, columns=["a"])
    learned = set(data.train.values.flatten().tolist())
    assert learned.isdisjoint(data.heldout.values.flatten().tolist())
    assert len(learned) + len(set(data.heldout.values.flatten().tolist())) == len(levels)


def unsorted(path: Path) -> Path:
    days = [str(day) for day in np.datetime64("2007-02-01") + np.arange(60)]
    days[30], days[31] = days[31], days[30]
    return dated(path, dates=days)[0]


# --- what is refused ---------------------------------------------------------------------------------------------------


def without(values: np.ndarray, example: int, to: float) -> np.ndarray:
    changed = values.astype(np.float32)
    changed[example] = to
    return changed


def mixed_sizes(path: Path) -> Path:
    Image.new("L", (9, 9)).save(folder(path, GREY) / "zz.png")
    return path


def corrupt(path: Path) -> Path:
    file = folder(path, COLOUR) / "07.png"
    file.write_bytes(file.read_bytes()[:60])
    return path


def beside(path: Path) -> Path:
    Image.fromarray(GREY[0]).save(folder(path, GREY, classes=2) / "own.png")
    return path


def deep(path: Path) -> Path:
    Image.fromarray(np.full((8, 6), 5000, np.uint16)).save(folder(path, GREY) / "07.png")
    return path


def split_classes(path: Path) -> Path:
    folder(path / "train", GREY, classes=2)
    folder(path / "test", GREY, classes=1)
    return path


def damaged_npz(path: Path) -> Path:
    file = npz(path, data=GREY)
    file.write_bytes(file.read_bytes()[:500])
    return file


def other_ending(path: Path) -> Path:
    return table(path, "x", "own.parquet")


Case = tuple[Callable[[Path], Path], dict[str, object], str]
REFUSED: dict[str, Case] = {
    "missing": (lambda p: p / "nothing", {}, "does not exist"),
    "another file": (other_ending, {}, "ends in .parquet"),
    "an empty folder": (lambda p: p, {}, "holds no pictures"),
    "mixed sizes": (mixed_sizes, {}, r"00.png is 6 x 8 and .*zz.png is 9 x 9; .*--size 64"),
    "a damaged picture": (corrupt, {}, r"07.png cannot be read \(.*Delete it or restore it"),
    "16 bits": (deep, {}, "07.png has more than 8 bits"),
    "one class folder": (lambda p: folder(p, GREY, classes=1), {"labels": True}, "one folder, 'a'"),
    "no class folder": (lambda p: folder(p, GREY), {"labels": True}, "no folders, so there are no classes"),
    "a picture beside the classes": (beside, {"labels": True}, "own.png lies beside the folders"),
    "splits with other classes": (split_classes, {"labels": True}, "different classes|one folder"),
    "too few pictures": (lambda p: folder(p, GREY[:12]), {}, "holds 11 examples"),
    "one picture many times": (lambda p: folder(p, GREY[:1].repeat(40, 0)), {}, "all examples are the same"),
    "a size for a table": (lambda p: table(p, rows()), {"size": 8}, "size 8 is for a folder"),
    "a size of one pixel": (lambda p: folder(p, GREY), {"size": 1}, "give 4 to 512"),
    "a folder of vectors": (lambda p: folder(p, GREY), {"kind": "vectors"}, "folder, which holds pictures"),
    "an unknown kind": (lambda p: table(p, rows()), {"kind": "vector"}, "Did you mean 'vectors'"),
    "a table of pictures": (lambda p: table(p, rows()), {"kind": "pictures"}, "is a table"),
    "a window of a folder": (lambda p: folder(p, GREY), {"window": 5}, "makes series of a table's rows"),
    "a window of one row": (lambda p: table(p, rows()), {"window": 1}, "give at least 4"),
    "returns without a window": (lambda p: table(p, rows()), {"values": "returns"}, "table with a window"),
    "returns of negative levels": (lambda p: table(p, rows()), {"window": 4, "values": "returns"}, r"column [ab] is -"),
    "unknown values": (lambda p: table(p, rows()), {"values": "return"}, "Did you mean 'returns'"),
    "a window too long": (lambda p: table(p, rows()), {"window": 15}, "too few for windows of 15"),
    "rows out of order": (unsorted, {"window": 5}, "line 33: its Date does not go on from the line before; sort"),
    "a day twice": (lambda p: dated(p, dates=["2007-02-01"] * 2 + [f"2008-01-{i:02d}" for i in range(1, 32)] + [
        f"2008-03-{i:02d}" for i in range(1, 28)])[0], {"window": 5}, "line 3: its Date"),
    "no channel but times": (
        lambda p: table(p, "time,x\n" + "".join(f"{i}.5,a\n" for i in range(60))), {"window": 5}, "no column but"),
    "an unknown column": (lambda p: table(p, rows()), {"columns": ["c"]}, "has no column 'c'"),
    "a column of words": (lambda p: dated(p)[0], {"columns": ["a", "Date"]}, "line 2, column Date is '2007-02-01'"),
    "a column twice": (lambda p: table(p, rows()), {"columns": ["a", "a"]}, "columns name 'a' twice"),
    "columns of an array": (lambda p: npz(p, data=FLOATS), {"columns": ["a"]}, "columns are of a table"),
    "columns as one text": (lambda p: table(p, rows()), {"columns": "a"}, "give a list of names"),
    "labels among the columns": (
        lambda p: table(p, rows(header="a,label")), {"columns": ["label"], "labels": True}, "is the labels"),
    "labels of windows": (lambda p: table(p, rows(header="a,label")), {"window": 5, "labels": True}, "rows of several labels"),
    "pickles": (lambda p: npz(p, data=np.array([None, {}], dtype=object)), {}, "save it with a numeric dtype"),
    "a damaged npz": (damaged_npz, {}, "damaged or something else"),
    "an unknown dtype": (lambda p: npz(p, data=np.array([["a", "b"]] * 40)), {}, "of dtype <U1"),
    "NaN in an array": (lambda p: npz(p, data=without(FLOATS, 7, np.nan)), {}, "not finite in example 7"),
    "a range of no pictures": (lambda p: npz(p, data=FLOATS * 1000), {}, "holds values from 0 to 1000"),
    "masks": (lambda p: npz(p, data=GREY % 2), {}, "whole numbers from 0 to 1"),
    "four channels": (lambda p: npz(p, data=np.zeros((40, 8, 6, 4), np.uint8)), {}, "1 or 3 channels"),
    "channels at both ends": (lambda p: npz(p, data=np.zeros((40, 3, 6, 3), np.uint8)), {}, "1 or 3 channels"),
    "pictures too large": (lambda p: npz(p, data=np.zeros((2, 600, 4, 1), np.uint8)), {}, "sides of 4 to 512"),
    "pictures or series": (lambda p: npz(p, data=FLOATS[..., 0]), {}, "--kind pictures, or --kind series"),
    "one axis": (lambda p: npz(p, data=np.zeros(40)), {}, "give pictures"),
    "vectors of three axes": (lambda p: npz(p, data=FLOATS[..., 0]), {"kind": "vectors"}, "vectors are"),
    "nothing in an array": (lambda p: npz(p, data=np.zeros((0, 3))), {}, "holds nothing"),
    "several arrays": (lambda p: npz(p, a=GREY, b=GREY), {}, "name the array with the examples"),
    "no labels": (lambda p: npz(p, images=GREY), {"labels": True}, "no array called 'labels'"),
    "labels of another name": (lambda p: npz(p, images=GREY, lable=np.arange(40) % 2), {"labels": "label"}, "'lable'"),
    "too few labels": (lambda p: npz(p, images=GREY, labels=np.arange(9) % 2), {"labels": True}, "9 labels for 40"),
    "one class in an array": (lambda p: npz(p, images=GREY, labels=np.ones(40)), {"labels": True}, "one class, '1'"),
    "a class an example": (lambda p: npz(p, images=GREY, labels=np.arange(40)), {"labels": True}, "so they are none"),
    "labels of no form": (lambda p: npz(p, images=GREY, labels=np.ones((40, 2))), {"labels": True}, "one number or word"),
    "labels not finite": (lambda p: npz(p, images=GREY, labels=np.full(40, np.nan)), {"labels": True}, "at example 0"),
    "a held-out part of another shape": (
        lambda p: npz(p, train_images=GREY, test_images=GREY[:, :4]), {}, r"\(1, 8, 6\), test_images of \(1, 4, 6\)"),
    "a held-out part without labels": (
        lambda p: npz(p, train_images=GREY, train_labels=np.arange(40) % 2, test_images=GREY), {"labels": True},
        "no labels 'test_labels'"),
    "a class among the held out alone": (
        lambda p: npz(p, train_x=GREY, train_y=np.arange(40) % 2, test_x=GREY, test_y=np.arange(40) % 3), {"labels": True},
        "class '2' is among the held-out"),
    "an empty table": (lambda p: table(p, "\n"), {}, "is empty"),
    "a table of names": (lambda p: table(p, "a,b\n"), {}, "no rows"),
    "a table of words": (lambda p: table(p, "a,b\nx,y\nz,w\n"), {}, "no column of numbers"),
    "two columns of one name": (lambda p: table(p, rows(header="a,a")), {}, "two columns 'a'"),
    "a line cut short": (lambda p: table(p, rows() + "1\n"), {}, "line 42 has 1 values, the first line 2"),
    "an empty cell": (lambda p: table(p, rows() + "1,\n"), {}, "line 42, column b is empty"),
    "a word among numbers": (lambda p: table(p, rows() + "1,n/a\n"), {}, "line 42, column b is 'n/a'"),
    "infinity in a table": (lambda p: table(p, rows() + "inf,1\n"), {}, "line 42, column a is 'inf'"),
    "a constant column": (lambda p: table(p, rows(header="a,b,c", tail=",3")), {}, "column c is the same everywhere"),
    "a constant channel": (lambda p: table(p, rows(header="a,b,c", tail=",3")), {"window": 4}, "column c is the same"),
    "no column of labels": (lambda p: table(p, rows()), {"labels": True}, "has no column `label`"),
    "a column of labels with gaps": (
        lambda p: table(p, rows(header="a,b,label", tail=",1") + "1,2,\n"), {"labels": True}, "line 42 has no label"),
    "one class in a table": (lambda p: table(p, rows(header="a,b,label", tail=",x")), {"labels": True}, "one class, 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_are_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    make, options, sentence = REFUSED[case]
    with pytest.raises(SettingError, match=sentence) as refusal:
        read_data(make(tmp_path), **options)
    assert str(refusal.value).endswith((".", "?"))


def test_a_class_of_few_examples_is_said(tmp_path: Path) -> None:
    data = read_data(npz(tmp_path, images=GREY, labels=np.array([0] * 37 + [1] * 3)), labels=True)
    assert "Class '1' has" in data.notes[-1]
