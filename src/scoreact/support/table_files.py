"""A table of numbers out of a text file: .csv, .tsv, .txt, with or without a line of names. Knows no models."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import SettingError
from .names import known_name
from .text import read_text

LABELS = ("label", "labels", "class", "target", "y")  # what a column of labels is called


@dataclass(frozen=True)
class Table:
    """numbers float64 [rows, columns]; their names; the file's line of each row; the column of labels, where it is wanted.

    words: the cells of each column that holds no numbers.
    """

    numbers: np.ndarray
    columns: tuple[str, ...]
    lines: list[int]
    label: str
    labels: list[str] | None
    words: dict[str, list[str]]
    notes: list[str]


def read_table(path: Path, labels: bool | str = False, columns: Sequence[str] = ()) -> Table:
    """Read a table.

    Args:
        path: values with commas, semicolons, tabs or blanks between. Where no value of the first line is a number, it holds the
            columns' names; else they are called 1, 2, 3.
        labels: True: the column of labels is called `label`, `class` or `target`; a text: its name.
        columns: names of those to read, in this order; none: every one that holds numbers.

    Raises:
        SettingError: a missing or unreadable value, lines of different length, no numbers; with the line and the column.
    """
    rows, lines = _cells(path)
    if not rows:
        raise SettingError(f"{path} is empty; give rows of numbers.")
    named = not any(map(_is_number, rows[0]))
    every = [cell.strip() or str(i + 1) for i, cell in enumerate(rows[0])] if named else []
    every = every or [str(i + 1) for i in range(len(rows[0]))]
    if twice := next((c for c in every if every.count(c) > 1), None):
        raise SettingError(f"{path} has two columns {twice!r}; give each a name of its own.")
    rows, lines = rows[named:], lines[named:]
    if not rows:
        raise SettingError(f"{path} holds a line of names and no rows; give rows of numbers.")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(every):
            raise SettingError(
                f"{path}, line {line} has {len(row)} values, the first line {len(every)}; give all the same."
            )
    label = _label(every, labels, path) if labels else ""
    notes: list[str] = []
    kept = [every.index(known_name(name, every, f"{path} has no column")) for name in columns]
    if label in columns:
        raise SettingError(f"column {label!r} of {path} is the labels; leave it out of the columns.")
    if twice := next((c for c in columns if list(columns).count(c) > 1), None):
        raise SettingError(f"columns name {twice!r} twice; name each once.")
    words: dict[str, list[str]] = {}
    for i, name in enumerate(every):
        if name == label or i in kept:
            continue
        cells = [row[i] for row in rows]
        if not any(map(_is_number, cells)):
            words[name] = cells
            notes.append(f"Column {name!r} of {path.name} holds no numbers ({cells[0]!r}) and is left out.")
        elif columns:
            continue
        elif len(rows) > 2 and [c.strip() for c in cells] in _counting(len(rows)):
            notes.append(f"Column {name!r} of {path.name} counts the rows and is left out.")
        else:
            kept.append(i)
    if not kept:
        raise SettingError(f"{path} has no column of numbers; give at least one.")
    numbers = np.array(
        [[_number(row[i], path, line, every[i]) for i in kept] for row, line in zip(rows, lines, strict=True)]
    )
    found = [row[every.index(label)].strip() for row in rows] if label else None
    if found is not None and "" in found:
        raise SettingError(f"{path}, line {lines[found.index('')]} has no {label}; fill it in, or delete that line.")
    if found is not None and all(map(_is_number, found)):
        found = [f"{float(word):g}" for word in found]
    return Table(numbers, tuple(every[i] for i in kept), lines, label, found, words, notes)


def _cells(path: Path) -> tuple[list[list[str]], list[int]]:
    """The cells of each line that is not blank, and the numbers of those lines."""
    texts = [(number, text) for number, text in enumerate(read_text(path).split("\n"), start=1) if text.strip()]
    if not texts:
        return [], []
    first = texts[0][1]
    mark = next((mark for mark in ("\t", ";", ",") if mark in first), None)
    try:
        rows = [next(csv.reader([text], delimiter=mark)) if mark else text.split() for _, text in texts]
    except csv.Error as error:
        raise SettingError(f"{path} cannot be read as a table ({error}); give one row a line.") from None
    return rows, [number for number, _ in texts]


def _counting(count: int) -> list[list[str]]:
    return [[str(i + start) for i in range(count)] for start in (0, 1)]


def _is_number(cell: str) -> bool:
    try:
        return not math.isnan(float(cell))
    except ValueError:
        return False


def _number(cell: str, path: Path, line: int, column: str) -> float:
    found = float(cell) if _is_number(cell) else math.nan
    if not math.isfinite(found):
        what = "is empty" if not cell.strip() else f"is {cell.strip()!r}"
        raise SettingError(f"{path}, line {line}, column {column} {what}; give a finite number, or delete that line.")
    return found


def _label(columns: Sequence[str], labels: bool | str, path: Path) -> str:
    if isinstance(labels, str):
        return known_name(labels, columns, f"{path} has no column")
    found = next((c for name in LABELS for c in columns if c.lower() == name), None)
    if found is None:
        raise SettingError(f"{path} has no column `label`; name the one with the labels: --labels NAME.")
    return found
