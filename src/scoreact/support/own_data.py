"""A user's own data, read and looked through: pictures, vectors or series, with labels where they are asked for.

Everything that cannot be learned from is refused in a sentence that names the file, the row or the column. Knows files and
arrays; does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .array_files import OTHER, TRAIN, read_arrays
from .errors import SettingError
from .names import known_name
from .picture_files import LARGEST_SIDE, Folder, read_folder
from .table_files import Table, read_table

KINDS = ("pictures", "vectors", "series")
TABLES = (".csv", ".tsv", ".txt")
TIMES = ("date", "time", "datetime", "timestamp", "day")  # what a column of times is called, where it holds numbers
FEWEST = 20  # examples to learn from
HELD_OUT, MOST_HELD_OUT = 0.1, 2000  # the share kept out of training, and how many at most


@dataclass(frozen=True)
class Examples:
    """values [N, *D]: pictures [N, C, H, W], uint8 or float32 in [0, 1]; vectors [N, D]; series [N, channels, L], float32.

    labels: int64 [N], places in the data's `classes`; None where none were asked for.
    """

    values: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        return Examples(self.values[rows], None if self.labels is None else self.labels[rows])

    def floats(self) -> Tensor:
        """The values as float32; pictures in [0, 1]."""
        return self.values.float().div(255) if self.values.dtype == torch.uint8 else self.values


@dataclass(frozen=True)
class OwnData:
    """What was read.

    kind: one of KINDS. train, heldout: to learn from, and kept out. classes: names of the labels, () without. columns: names of
    a vector's numbers or of a series' channels. notes: sentences on what was left out or changed. values: of windows of a
    table, levels or returns.
    """

    kind: str
    train: Examples
    heldout: Examples
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    values: str = "levels"


def read_data(
    path: str | Path,
    *,
    kind: str | None = None,
    labels: bool | str = False,
    size: int | None = None,
    window: int | None = None,
    values: str = "levels",
    columns: Sequence[str] = (),
) -> OwnData:
    """Read a folder of pictures, an .npz or .npy, or a table.

    Args:
        path: a folder of pictures, or of a folder a class, or of `train` and `test` with either; an .npz with `images` or
            another array, alone or as train_images and test_images (val_images); an .npy; a .csv, .tsv or .txt.
        kind: pictures, vectors or series, where the file does not say.
        labels: True: the folders' names, the array `labels`, or the column `label`; a text: the array or column of that name.
        size: pictures are scaled and cut to a square of so many pixels.
        window: a table's rows are times, and an example is so many of them in a row.
        values: of a table with a window, "levels" as they stand, or "returns", the logarithm of each level over the one before.
        columns: of a table, those to read, in this order; none: every one that holds numbers.

    Returns:
        Train and held-out examples: the file's own split where it has one, else a tenth at random (seed 0), of windows the last
        tenth of the time.

    Raises:
        SettingError: what cannot be learned from, with the file, row or column and the remedy.
    """
    path = Path(path).expanduser()
    if kind is not None:
        known_name(kind, KINDS, "unknown kind of data")
    _check_options(path, kind, size, window, values, columns)
    if path.is_dir():
        found = _from_folder(path, bool(labels), size)
    elif not path.is_file():
        raise SettingError(
            f"{path} does not exist (looked in {Path.cwd()}). Give a folder of pictures, an .npz or a .csv."
        )
    elif path.suffix in (".npz", ".npy"):
        found = _from_file(path, kind, labels)
    elif path.suffix in TABLES:
        found = _from_table(read_table(path, labels, columns), path, kind, window, values)
    else:
        raise SettingError(
            f"{path} ends in {path.suffix or 'nothing'}; give a folder of pictures, an .npz or .npy, or a table "
            f"({', '.join(TABLES)})."
        )
    return _checked(found, path)


@dataclass(frozen=True)
class FileRows:
    """Every example of a file in its order: values [N, *D], a word each where labels were asked for, and notes."""

    values: Tensor
    labels: list[str] | None
    notes: tuple[str, ...] = ()


def read_rows(path: str | Path, shape: Sequence[int], labels: bool | str = False, part: str = "test") -> FileRows:
    """What a model with samples of this shape is asked about, row by row; nothing is held out or left out.

    Args:
        path: a folder of pictures, an .npz or .npy, or a table with an example a row.
        shape: *D of one sample.
        labels: as of `read_data`.
        part: of a file with a split, "train" or "test"; the latter is what `read_data` holds out.

    Raises:
        SettingError: what cannot be read, or has another shape.
    """
    path, kind = Path(path).expanduser(), {1: "vectors", 2: "series", 3: "pictures"}.get(len(shape))
    if kind is None:
        raise SettingError(
            f"a sample of this model has shape {tuple(shape)}, which no data file holds; score it in Python."
        )
    words: list[str] | None = None
    notes: Sequence[str] = ()
    if path.is_dir():
        folder = read_folder(path, bool(labels), shape[-1] if len(shape) == 3 and shape[1] == shape[2] else None)
        values, notes = folder.pictures, folder.notes
        words = None if folder.labels is None else [folder.classes[i] for i in folder.labels.tolist()]
    elif path.suffix in (".npz", ".npy"):
        found = read_arrays(path, kind, labels)
        other = part == "test" and found.other is not None
        values = found.other if other and found.other is not None else found.values
        words = found.other_labels if other else found.labels
        notes = [f"Scored are {len(values):,} held-out examples. {found.notes[0]}"] if other else []
    elif path.suffix in TABLES:
        table = read_table(path, labels)
        values, words, notes = torch.from_numpy(table.numbers), table.labels, table.notes
    else:
        raise SettingError(f"{path} is no folder of pictures, .npz, .npy or table ({', '.join(TABLES)}).")
    if values[0].numel() != torch.Size(shape).numel():
        raise SettingError(f"{path} holds examples of shape {tuple(values.shape[1:])}; the model draws {tuple(shape)}.")
    return FileRows(values.reshape(len(values), *shape), words, tuple(notes))


def split_off(examples: Examples) -> tuple[Examples, Examples]:
    """A tenth at random kept out, always the same: train, held out."""
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(examples))))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return examples[order[count:].sort().values], examples[order[:count].sort().values]


def _check_options(
    path: Path, kind: str | None, size: int | None, window: int | None, values: str, columns: Sequence[str]
) -> None:
    """Refuse what would do nothing with this path."""
    known_name(values, ("levels", "returns"), "unknown values")
    table = path.suffix in TABLES and not path.is_dir()
    if size is not None and not path.is_dir():
        raise SettingError(
            f"size {size} is for a folder of pictures; {path} is read as it is. Leave it out, or scale that file."
        )
    if size is not None and not 4 <= size <= LARGEST_SIDE:
        raise SettingError(f"size is {size}; give 4 to {LARGEST_SIDE} pixels.")
    if window is not None and (not table or kind not in (None, "series")):
        raise SettingError(
            f"window {window} makes series of a table's rows; {path} is none, or kind is {kind}. Leave it out."
        )
    if window is not None and window < 4:
        raise SettingError(f"window is {window}; give at least 4 rows.")
    if isinstance(columns, str):
        raise SettingError(f"columns is the text {columns!r}; give a list of names.")
    if columns and not table:
        raise SettingError(f"columns are of a table; {path} is none. Leave them out.")
    if values != "levels" and window is None:
        raise SettingError(f"values {values!r} are of a table with a window; give that too.")
    if kind is not None and path.is_dir() and kind != "pictures":
        raise SettingError(f"kind is {kind!r}, and {path} is a folder, which holds pictures; give a file of {kind}.")
    if table and kind == "pictures":
        raise SettingError(f"kind is pictures, and {path} is a table; give a folder of pictures or an .npz.")


def _from_folder(path: Path, labels: bool, size: int | None) -> OwnData:
    inside = {p.name.lower(): p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")}
    train = next((inside[name] for name in TRAIN if name in inside), None)
    other = next((inside[name] for name in OTHER if name in inside), None)
    if train is None or other is None or len(inside) > 3:
        folder = read_folder(path, labels, size)
        kept, out = split_off(_examples(folder))
        return OwnData("pictures", kept, out, folder.classes, (), tuple(folder.notes))
    first, second = read_folder(train, labels, size), read_folder(other, labels, size)
    if first.classes != second.classes:
        odd = sorted(set(first.classes) ^ set(second.classes))[0]
        raise SettingError(f"{train} and {other} hold different classes, such as {odd!r}; give both the same folders.")
    if first.pictures.shape[1:] != second.pictures.shape[1:]:
        shapes = " and ".join(str(tuple(f.pictures.shape[1:])) for f in (first, second))
        raise SettingError(f"{train} and {other} hold pictures of shapes {shapes}; give both the same.")
    notes = dict.fromkeys([*first.notes, *second.notes, f"Held out are the pictures in {other}."])
    return OwnData("pictures", _examples(first), _few(_examples(second)), first.classes, (), tuple(notes))


def _examples(folder: Folder) -> Examples:
    return Examples(folder.pictures, folder.labels)


def _few(examples: Examples) -> Examples:
    """No more than are needed for a held-out loss, evenly spread: files are often sorted by class."""
    if len(examples) <= MOST_HELD_OUT:
        return examples
    return examples[torch.linspace(0, len(examples) - 1, MOST_HELD_OUT).round().long()]


# --- arrays ----------------------------------------------------------------------------------------------------------


def _from_file(path: Path, kind: str | None, labels: bool | str) -> OwnData:
    found = read_arrays(path, kind, labels)
    names: dict[str, int] = {}
    if found.labels is not None:
        names = _classes(found.labels, len(found.values), f"{path}, {found.label}")
    train = Examples(found.values, None if found.labels is None else _places(found.labels, names, str(path)))
    if found.other is None:
        kept, out = split_off(train)
    else:
        theirs = None if found.other_labels is None else _places(found.other_labels, names, str(path))
        kept, out = train, _few(Examples(found.other, theirs))
    return OwnData(found.kind, kept, out, tuple(names), (), tuple(found.notes))


def _classes(labels: Sequence[str], count: int, where: str) -> dict[str, int]:
    """Class names in order, each with its place."""
    if len(labels) != count:
        raise SettingError(f"{where} holds {len(labels)} labels for {count} examples; give one an example.")
    names = sorted(set(labels), key=lambda n: (0, int(n), "") if n.lstrip("-").isdigit() else (1, 0, n))
    if len(names) < 2:
        raise SettingError(f"{where} holds one class, {names[0]!r}, which tells nothing apart; leave labels out.")
    if 2 * len(names) > count:
        raise SettingError(
            f"{where} holds {len(names)} classes for {count} examples, so they are none; leave labels out, or name others."
        )
    return {name: i for i, name in enumerate(names)}


def _places(labels: Sequence[str], names: dict[str, int], where: str) -> Tensor:
    if unknown := sorted(set(labels) - set(names)):
        raise SettingError(f"{where}: class {unknown[0]!r} is among the held-out examples alone; leave those out.")
    return torch.tensor([names[label] for label in labels], dtype=torch.int64)


# --- tables ----------------------------------------------------------------------------------------------------------


def _from_table(table: Table, path: Path, kind: str | None, window: int | None, values: str) -> OwnData:
    if window is not None:
        return _windows(table, path, window, values)
    numbers = torch.from_numpy(table.numbers).float()
    names: dict[str, int] = {}
    labels = None
    if table.labels is not None:
        names = _classes(table.labels, len(numbers), f"{path}, column {table.label!r}")
        labels = _places(table.labels, names, str(path))
    if kind == "series":
        numbers = numbers[:, None]
    kept, out = split_off(Examples(numbers, labels))
    columns = () if kind == "series" else table.columns
    return OwnData(kind or "vectors", kept, out, tuple(names), columns, tuple(table.notes))


def _windows(table: Table, path: Path, window: int, values: str) -> OwnData:
    """Examples of `window` rows in a row; the last tenth of the time is kept out."""
    if table.labels is not None:
        raise SettingError(f"{path}: a window has rows of several labels; leave labels out, or give a series a row.")
    table = _forward(table, path)
    numbers = table.numbers
    if values == "returns":
        if (numbers <= 0).any():
            row, column = (int(i) for i in np.argwhere(numbers <= 0)[0])
            raise SettingError(
                f"{path}, line {table.lines[row]}, column {table.columns[column]} is {numbers[row, column]:g}; returns are of "
                "levels above 0. Give values levels, or correct it."
            )
        numbers = np.diff(np.log(numbers), axis=0)
    out = max(round(HELD_OUT * len(numbers)), window)
    if len(numbers) - out < window + FEWEST - 1:
        raise SettingError(
            f"{path} has {len(table.numbers)} rows, too few for windows of {window} with some held out; give at least "
            f"{2 * window + FEWEST}, or a shorter window."
        )
    # [time - window + 1, channels, window]
    train, rest = (
        Examples(torch.from_numpy(part).float().unfold(0, window, 1).contiguous())
        for part in (numbers[:-out], numbers[-out:])
    )
    notes = (*table.notes, f"Held out is the end: the windows in the last {out} rows.")
    return OwnData("series", train, _few(rest), (), table.columns, notes, values)


def _forward(table: Table, path: Path) -> Table:
    """The table with its rows in the order of time, as its column of times says; that column is no channel."""
    named = [i for i, name in enumerate(table.columns) if name.lower() in TIMES]
    if named:
        name, times = table.columns[named[0]], table.numbers[:, named[0]].tolist()
        kept = [i for i in range(len(table.columns)) if i != named[0]]
        if not kept:
            raise SettingError(f"{path} has no column but that of times, {name!r}; give a column of numbers.")
        table = replace(table, numbers=table.numbers[:, kept], columns=tuple(table.columns[i] for i in kept))
        table.notes.append(f"Column {name!r} of {path.name} is the time of a row and no channel.")
    else:
        dated = ((name, parsed) for name, cells in table.words.items() if (parsed := _dates(cells)) is not None)
        name, times = next(dated, ("", []))
    if not name:
        table.notes.append(f"No column of {path.name} is read as dates; its rows are taken to go forward in time.")
        return table
    ups = np.diff(np.array(times))
    if (ups > 0).all():
        return table
    if (ups < 0).all():
        table.notes.append(f"The rows of {path.name} go back in time by column {name!r} and are turned round.")
        return replace(table, numbers=table.numbers[::-1].copy(), lines=table.lines[::-1])
    row = int(np.flatnonzero(ups <= 0 if (ups > 0).sum() >= (ups < 0).sum() else ups >= 0)[0]) + 1
    raise SettingError(
        f"{path}, line {table.lines[row]}: its {name} does not go on from the line before; sort the rows by time, one a time."
    )


def _dates(cells: Sequence[str]) -> list[float] | None:
    """Seconds, of cells that are all dates as ISO 8601 writes them; None where one is not."""
    try:
        return [_moment(cell.strip()) for cell in cells]
    except ValueError:
        return None


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


# --- what every kind is looked through for ----------------------------------------------------------------------------


def _checked(data: OwnData, path: Path) -> OwnData:
    train = data.train
    if len(train) < FEWEST:
        raise SettingError(
            f"{path} holds {len(train)} examples to learn from, too few for a law; give at least {FEWEST}, better thousands."
        )
    if bool((train.values == train.values[0]).all()):
        raise SettingError(f"{path}: all examples are the same, which is no law to learn; give different ones.")
    if data.kind != "pictures":
        flat = train.values.transpose(0, 1).flatten(1)  # a column or a channel each
        if len(constant := (flat == flat[:, :1]).all(1).nonzero()):
            name = data.columns[int(constant[0])] if data.columns else f"{int(constant[0])} (from 0)"
            raise SettingError(f"{path}, column {name} is the same everywhere, which is no law to learn; delete it.")
    if train.labels is not None:
        counts = torch.bincount(train.labels, minlength=len(data.classes))
        if not bool(counts.all()):
            missing = data.classes[int((counts == 0).nonzero()[0])]
            raise SettingError(
                f"{path}: class {missing!r} has no example to learn from; give it some, or leave it out."
            )
        least = int(counts.argmin())
        if int(counts[least]) < FEWEST:
            note = f"Class {data.classes[least]!r} has {int(counts[least])} examples, which will be learned by heart."
            data = replace(data, notes=(*data.notes, note))
    return data
