"""Text that a user wrote, read as UTF-8, as YAML or as JSON.

A key that stands twice is refused: one of the two would do nothing.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import SettingError


def read_text(path: Path) -> str:
    """Of a file in UTF-8, with or without a byte order mark; lines end with \\n. SettingError naming the file and the line."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}, line {line} is not UTF-8 ({error.reason}); save the file as UTF-8.") from None
    if "\0" in text:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise SettingError(f"{path}, line {line} holds a NUL, so it is no text; give a text file in UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parsed_json(text: str, where: str) -> Any:
    """SettingError naming `where`, and the line and column inside it."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise SettingError(f"{where} is no JSON ({error.msg} at {place}); correct it there.") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of 5,000 digits, brackets without end
        raise SettingError(f"{where} cannot be read as JSON: {_said(error)}.") from None


def parsed_yaml(text: str, where: str) -> Any:
    """SettingError naming `where`, and the line inside it."""
    try:
        return yaml.load(text, _UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-01
        raise SettingError(f"{where} cannot be read as YAML: {_said(error)}.") from None


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()).rstrip(".")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice; leave one")
    return found


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        before: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in before:
                raise ValueError(
                    f"the key {key.value!r} stands there twice, again in line {key.start_mark.line + 1}; leave one"
                )
            before.add(key.value)
        return super().construct_mapping(node, deep)
