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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from ..models.base import HasMetadata
from ..support.errors import ModelError, SettingError
from ..support.loading import load_named
from ..support.text import parsed_json, read_text

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
    path, kind = Path(source).expanduser(), Path(source).suffix.lower()
    if not os.path.isfile(path):  # Path.is_file raises for a prompt longer than a file's name may be
        only = _only(source)
        if column:
            raise SettingError(f"prompts {str(source)!r} is no file; leave out prompt_column {column!r}.")
        return only
    if kind in TABLES:
        return _collected(TABLES[kind](path), column, str(path))
    if column:
        raise SettingError(f"prompts {str(path)!r} is a text file without columns; leave out prompt_column {column!r}.")
    if kind == ".py":
        raise SettingError(f"prompts {str(path)!r} names no function; give '{path}:function'.")
    if kind in NO_LIST:
        raise SettingError(f"prompts {str(path)!r} is no list of lines; give .txt, {', '.join(TABLES)}.")
    return _lines(path)


NO_LIST = (".yaml", ".yml", ".toml", ".xml", ".html", ".ini")  # whose lines are no prompts


def _only(source: str | Path) -> Prompts:
    """The text itself as the only prompt. Raises SettingError for what is more likely the misspelt name of a file."""
    text = str(source)
    where = "give the path of a text file with one prompt a line, or of a table (if it is a prompt, write it into such a file)"
    if isinstance(source, Path) or _names_a_file(text):
        what = "is a folder" if os.path.isdir(Path(text).expanduser()) else "names a file, and there is no such file"
        raise SettingError(f"prompts {text!r} {what}; {where}.")
    only = Prompts()
    only[text] = {}
    return only


def check_spelling(text: str) -> None:
    """Raises SettingError for a word given as a prompt that is a folder, or nearly the name of a prompt file in this one."""
    if os.path.isdir(text):
        raise SettingError(
            f"prompts {text!r} is a folder; give a file in it. If it is a prompt, write it into a text file."
        )
    if len(text) < 5 or os.path.isfile(text):
        return
    for name in (name for name in sorted(os.listdir()) if Path(name).suffix.lower() in (".txt", *TABLES)):
        if any(SequenceMatcher(None, text, known).ratio() > 0.8 for known in (name, Path(name).stem)):
            raise SettingError(
                f"prompts {text!r} names no file; did you mean {name!r}? If it is a prompt, write it into a text file."
            )


def _names_a_file(text: str) -> bool:
    path = Path(text).expanduser()
    if path.suffix.lower() in (".txt", *TABLES) or text.startswith(("/", "./", "../", "~/")):
        return True
    if len(text.split()) != 1:
        return False
    return "/" in text or "\\" in text or ".py:" in text or bool(re.search(r"\w\.[A-Za-z]\w{1,7}$", text))


def _lines(path: Path) -> Prompts:
    """A prompt a line. Raises SettingError where the lines are JSON."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and all(line.strip().startswith("{") and line.strip().endswith("}") for _, line in lines):
        raise SettingError(f"prompts {str(path)!r} holds an object a line, as a .jsonl file does; give it that name.")
    if text.strip().startswith("[") and text.strip().endswith("]") and len(text.strip()) > 2 and len(lines) > 1:
        raise SettingError(f"prompts {str(path)!r} holds a list, as a .json file does; give it that name.")
    found = _collected([(f"{path}, line {number}", {"prompt": line}) for number, line in lines], "prompt", str(path))
    if comments := sum(line.startswith("#") for _, line in lines):
        found.notes.append(f"{path}: {comments} lines begin with #; they are prompts as the others are.")
    return found


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
        if "\0" in prompt or not _encodes(prompt):
            raise SettingError(f"{where}: {name} is {prompt!r}, which holds a character that is no text; take it out.")
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


def check_texts(prompts: Iterable[str]) -> None:
    """Raises SettingError for a prompt that is no text."""
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise SettingError(f"prompts[{i}] is {prompt!r} ({type(prompt).__name__}); expected a text.")
        if "\0" in prompt or not _encodes(prompt):
            raise SettingError(f"prompts[{i}] is {prompt!r}, which holds a character that is no text; take it out.")


def _encodes(text: str) -> bool:
    """Whether a text can be written down: half a surrogate pair, as JSON may hold, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _column(row: Mapping[str, Any], column: str, where: str) -> str:
    names = [column] if column else ["prompt", *(name for name in row if name.lower() == "prompt")]
    kept = list(dict.fromkeys(name for name in names if name in row))
    if not kept or (len(kept) > 1 and kept[0] != "prompt"):
        raise SettingError(
            f"{where}: there is {'no' if not kept else 'more than one'} column {column or 'prompt'!r} (columns: "
            f"{', '.join(map(str, row))}); name the prompts' column with prompt_column."
        )
    return kept[0]


def _jsonl(path: Path) -> list[Row]:
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            found.append(_object(parsed_json(line, f"{path}, line {number}"), f"{path}, line {number}"))
    return found


def _json(path: Path) -> list[Row]:
    content = parsed_json(read_text(path), str(path))
    if not isinstance(content, list):
        raise SettingError(f"{path} holds {type(content).__name__}; expected a list of objects with a prompt each.")
    return [_object(entry, f"{path}, entry {number}") for number, entry in enumerate(content, 1)]


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
    text, line = io.StringIO(read_text(path), newline=""), 1
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
