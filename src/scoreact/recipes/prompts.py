"""Prompts from a file, a function or the command line.

A file is a text file with a prompt a line, or a table (jsonl, json, csv, tsv, parquet) with a column `prompt`, whose other
columns are the prompts' metadata. What cannot be read is refused with the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..models.base import HasMetadata
from ..support.errors import ModelError, SettingError
from ..support.loading import load_named

Row = tuple[str, dict[str, Any]]  # where it stands, and its values by column


class Prompts(dict[str, Mapping[str, Any]]):
    """Prompts in the order of their file, each with its metadata.

    notes: sentences on what was left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []


def read_prompts(source: str | Path, column: str = "") -> Prompts:
    """The prompts of a file with their metadata.

    Args:
        source: a text file (a prompt a line), a table (.jsonl, .json, .csv, .tsv, .parquet), or, where it names no file, the
            only prompt itself.
        column: of a table, that of the prompts. Left out: `prompt`, in capital or small letters.

    Returns:
        A mapping from each prompt to its metadata, the other columns of its row; of a text file they are empty. A prompt counts
        once: where a row repeats it, the first row's metadata stay, and `notes` says so.

    Raises:
        SettingError: the file is missing, is no such table, lacks the column, or has a row without a prompt.
    """
    path, kind = Path(source), Path(source).suffix.lower()
    if not os.path.isfile(path):  # Path.is_file raises for a prompt longer than a file's name may be
        if kind in (".txt", *TABLES):
            raise SettingError(
                f"prompts {str(source)!r}: there is no such file; give a text file with one prompt a line, or a table."
            )
        only = Prompts()
        only[str(source)] = {}
        return only
    if kind in TABLES:
        return _collected(TABLES[kind](path), column, str(path))
    if column:
        raise SettingError(f"prompts {str(path)!r} is a text file without columns; leave out prompt_column {column!r}.")
    lines = enumerate(_text(path).split("\n"), 1)
    found = [(f"{path}, line {number}", {"prompt": line}) for number, line in lines if line.strip()]
    return _collected(found, "prompt", str(path))


def give_metadata(model: object, prompts: Mapping[str, Mapping[str, Any]]) -> None:
    """Let `model.condition` hand the prompts' metadata on to the reward. Raises ModelError for a model that cannot."""
    if any(prompts.values()):
        if not isinstance(model, HasMetadata):
            raise ModelError(
                f"the prompts have metadata, but {type(model).__name__} has no attribute `metadata` that its `condition` would "
                "hand on to the reward; give the prompts alone, as a list."
            )
        model.metadata = {**model.metadata, **prompts}


# --- tables ----------------------------------------------------------------------------------------------------------


def _collected(rows: list[Row], column: str, source: str) -> Prompts:
    """The prompts of the rows, each once."""
    found, again, other = Prompts(), 0, ""
    for where, row in rows:
        name = _column(row, column, where)
        prompt = row[name]
        if not isinstance(prompt, str) or not prompt.strip():
            raise SettingError(f"{where}: {name} is {prompt!r}; expected a prompt that is not empty.")
        prompt, metadata = prompt.strip(), {key: value for key, value in row.items() if key != name}
        if prompt in found:
            again += 1
            other = other or (where if found[prompt] != metadata else "")
        else:
            found[prompt] = metadata
    if not found:
        raise SettingError(f"prompts {source!r} holds no prompt; write one a line.")
    if again:
        also = f"; some have other metadata there (first at {other}), which are left out" if other else ""
        found.notes.append(f"{source}: {again} rows repeat a prompt of an earlier row, which counts once{also}.")
    return found


def _column(row: Mapping[str, Any], column: str, where: str) -> str:
    names = [column] if column else ["prompt", *(name for name in row if name.lower() == "prompt")]
    kept = list(dict.fromkeys(name for name in names if name in row))
    if not kept or (len(kept) > 1 and kept[0] != "prompt"):
        raise SettingError(
            f"{where}: there is {'no' if not kept else 'more than one'} column {column or 'prompt'!r} (columns: "
            f"{', '.join(map(str, row))}); name the prompts' column with prompt_column."
        )
    return kept[0]


def _text(path: Path) -> str:
    """Of a file in UTF-8, with or without a byte order mark; lines end with \\n."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}, line {line} is not UTF-8 ({error.reason}); save the file as UTF-8.") from None
    if "\0" in text:
        raise SettingError(f"{path} is no text file; give .txt, {', '.join(TABLES)}.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _jsonl(path: Path) -> list[Row]:
    found = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            found.append(_object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}"))
    return found


def _json(path: Path) -> list[Row]:
    content = _parsed(_text(path), str(path))
    if not isinstance(content, list):
        raise SettingError(f"{path} holds {type(content).__name__}; expected a list of objects with a prompt each.")
    return [_object(entry, f"{path}, entry {number}") for number, entry in enumerate(content, 1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise SettingError(f"{where} is no JSON ({error.msg} at {place}); write one object a line.") from None


def _object(entry: Any, where: str) -> Row:
    if not isinstance(entry, dict):
        raise SettingError(f'{where} is {type(entry).__name__}; expected an object such as {{"prompt": "a cat"}}.')
    return where, entry


def _csv(path: Path, delimiter: str = ",", quoted: bool = True) -> list[Row]:
    """The first row names the columns; a field with the delimiter or a line's end in it stands in double quotes."""
    found, header = [], None
    for where, row in _fields(path, delimiter, quoted):
        if header is None:
            header = [name.strip() for name in row]
            if twice := {name for name in header if header.count(name) > 1}:
                raise SettingError(f"{where}: the column {min(twice)!r} stands there twice; rename one.")
        elif len(row) != len(header):
            raise SettingError(
                f"{where} has {len(row)} fields, and the header has {len(header)} ({', '.join(header)})"
                + (f'; quote a prompt that holds {delimiter!r}: "...".' if quoted else ".")
            )
        else:
            found.append((where, dict(zip(header, row, strict=True))))
    return found


def _fields(path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[str, list[str]]]:
    """Rows that are not empty, and the line on which each begins."""
    text, line = io.StringIO(_text(path), newline=""), 1
    plain = csv.reader(text, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)
    reader = csv.reader(text, delimiter=delimiter, strict=True) if quoted else plain
    try:
        for row in reader:
            if row:
                yield f"{path}, line {line}", row
            line = reader.line_num + 1
    except csv.Error as error:
        raise SettingError(f"{path}, line {line} is no row of a table ({error}); quote it as CSV does.") from None


def _tsv(path: Path) -> list[Row]:
    """Quoted as CSV is; where that cannot be, as in PartiPrompts.tsv, a quotation mark is a character like others."""
    try:
        return _csv(path, "\t")
    except SettingError as error:
        if "is no row of a table" not in str(error):
            raise
        return _csv(path, "\t", quoted=False)


def _parquet(path: Path) -> list[Row]:
    """Without the columns of bytes, such as pictures: no reward here reads them, and they are most of a file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SettingError(
            f"prompts {str(path)!r}: Parquet files need pyarrow; pip install 'scoreact[parquet]', or save it as .jsonl."
        ) from None
    try:
        with ParquetFile(path) as file:
            names = [field.name for field in file.schema_arrow if "binary" not in str(field.type)]
            rows = file.read(columns=names).to_pylist()
    except (ArrowException, OSError) as error:
        raise SettingError(f"{path} is no Parquet file that can be read ({' '.join(str(error).split())}).") from None
    # dates and decimals as text: metadata go to rewards elsewhere as JSON
    return [(f"{path}, row {i}", json.loads(json.dumps(row, default=str))) for i, row in enumerate(rows, 1)]


TABLES: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet,
}  # fmt: skip


# --- functions -------------------------------------------------------------------------------------------------------


def drawn_prompts(function: Callable[[], Any], draws: int, name: str = "the prompt function") -> dict[str, Any]:
    """What a prompt function such as TRL's returns in `draws` calls: prompts, each with its first metadata.

    function: () -> prompt, or (prompt, metadata). The generators of random, numpy and torch are seeded for it and put back,
    so that a resumed run has the same prompts. How often one came is not kept: training draws all alike.
    """
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()  # noqa: NPY002  what such functions use
    found: dict[str, Any] = {}
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            for _ in range(draws):
                drawn = function()
                prompt, metadata = drawn if isinstance(drawn, tuple) and len(drawn) == 2 else (drawn, {})
                if not isinstance(prompt, str):
                    raise SettingError(f"{name} returned {drawn!r}; expected a prompt, or a prompt and its metadata.")
                found.setdefault(prompt, metadata)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
    return found


def prompt_function(source: str) -> Callable[[], Any] | None:
    """That of 'file.py:name'; None for anything else."""
    if not source.rpartition(":")[0].endswith(".py"):
        return None
    function: Callable[[], Any] = load_named(source, "prompts")
    return function
