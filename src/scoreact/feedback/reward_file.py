"""Rewards in a file that a person or another program wrote, by the ids of the samples that were handed out.

A .csv or .tsv with a line of names, or JSON lines. Columns: `reward`, and `id`, or beside the folder of those samples `number`
or `file`. An empty reward is one that is missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..support.errors import FeedbackError
from ..support.text import parsed_json, read_text

LOCAL = ("number", "file")  # what a sample is called in the folder where `scoreact sample` wrote it


def read_rewards(path: Path, samples: Path | None = None) -> list[tuple[int, float | None]]:
    """Ids and rewards, a pair a line; None for a reward that is missing.

    Args:
        path: the file.
        samples: the folder that `scoreact sample --for-update` wrote, or its index.json, where the file names numbers or files.

    Raises:
        FeedbackError: a line without a sample, or with a reward that is no number.
    """
    if not path.is_file():
        raise FeedbackError(
            f"{path} does not exist; give a .csv with the columns id and reward, or JSON lines with both."
        )
    places = _places(samples)
    return [
        (_number(row, places, f"{path}, line {line}", samples), _reward(row.get("reward"), f"{path}, line {line}"))
        for line, row in _rows(path)
    ]


def _reward(word: object, where: str) -> float | None:
    if word is None or (isinstance(word, str) and not word.strip()):
        return None
    try:
        return float(word)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise FeedbackError(
            f"{where}: the reward is {word!r}; give a number, or leave it empty where there is none yet."
        ) from None


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and what the lines say."""
    text = read_text(path)
    if path.suffix in (".jsonl", ".ndjson"):
        for line, words in enumerate(text.splitlines(), start=1):
            if words.strip():
                row = parsed_json(words, f"{path}, line {line}")
                if not isinstance(row, dict):
                    raise FeedbackError(f"{path}, line {line} holds no object; give one with id and reward.")
                yield line, row
        return
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
    if "reward" not in (reader.fieldnames or ()):
        raise FeedbackError(
            f"{path} has no column `reward` in its first line ({', '.join(reader.fieldnames or ())}); name them id, reward."
        )
    for row in reader:
        yield reader.line_num, row


def _places(samples: Path | None) -> dict[str, dict[str, int]]:
    """Of each local name the ids of the samples in a folder."""
    if samples is None:
        return {}
    path = samples / "index.json" if samples.is_dir() else samples
    if not path.is_file():
        raise FeedbackError(f"{path} does not exist; give the folder that `scoreact sample --for-update` wrote.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["samples"]
        return {name: {str(e[name]): int(e["id"]) for e in entries if name in e} for name in LOCAL}
    except (ValueError, LookupError, TypeError):
        raise FeedbackError(
            f"{path} knows no ids: its samples were not handed out; draw some with `scoreact sample RUN --for-update`."
        ) from None


def _number(row: Mapping[str, Any], places: Mapping[str, Mapping[str, int]], where: str, samples: Path | None) -> int:
    """The id that a line is about."""
    for name in ("id", *LOCAL):
        word = str(row[name]).strip() if row.get(name) is not None else ""
        if not word:
            continue
        if name == "id":
            if not word.isdigit():
                raise FeedbackError(f"{where}: the id is {word!r}; give a whole number, as index.json has it.")
            return int(word)
        if samples is None:
            raise FeedbackError(
                f"{where} names a {name} and no id; give the folder of these samples too (--samples FOLDER)."
            )
        if word not in places[name]:
            raise FeedbackError(f"{where}: {samples} has no sample whose {name} is {word!r}.")
        return places[name][word]
    raise FeedbackError(f"{where} names no sample; give its id, or its number or file with --samples FOLDER.")
