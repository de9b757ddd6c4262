"""A setting: a dataclass field with its help text, its range and its known values; and how a given value is checked."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any, Literal

from .names import did_you_mean, nearest


def setting(
    default: Any,
    text: str,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    known: Callable[[], Iterable[str]] | None = None,
) -> Any:
    """A field with its help text (unit included) and the range it must lie in; above: the low end itself is excluded.

    known: the names that a string may be, asked for when one is checked.
    """
    return field(default=default, metadata={"help": text, "low": low, "high": high, "above": above, "known": known})


def fields_of(record: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The settings among a dataclass's fields, those with a help text, each with its type."""
    hints = typing.get_type_hints(record)
    return [(f, hints[f.name]) for f in dataclasses.fields(record) if "help" in f.metadata]


def nearest_or_known(word: Any, known: Iterable[str]) -> str:
    close = nearest(word, known := list(known))
    return f"; did you mean {close!r}?" if close else f". Known: {', '.join(known) or 'none'}."


def checked_setting(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """The value in its field's type, or ValueError naming field, value, and what is accepted."""
    known = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
    if f.metadata["known"] is not None and not (f.name == "algorithm" and ":" in str(value)):  # the user's own rule
        known = tuple(f.metadata["known"]())
    if known is not None:
        if value is False and "off" in known:  # YAML reads a bare off so
            value = "off"
        if value not in known:
            hint_text = did_you_mean(value, known, 0.4)  # eulr is short for euler_maruyama
            raise ValueError(f"{f.name} is {value!r}; known: {', '.join(known)}.{hint_text}")
        return value
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{f.name} is {value!r}; expected a number ({f.metadata['help']}).") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(
            f"{f.name} is {value!r} ({type(value).__name__}); expected {hint.__name__} ({f.metadata['help']})."
        )
    if hint in (int, float):
        low, high, above = f.metadata["low"], f.metadata["high"], f.metadata["above"]
        inside = (low < value if above else low <= value) and value <= high  # so written, nan is refused
        if not inside or math.isinf(value):
            bounds = [f"{'above' if above else 'at least'} {low:g}"] * (low > -math.inf)
            bounds += [f"at most {high:g}"] * (high < math.inf)
            raise ValueError(f"{f.name} is {value}; it must be {' and '.join(bounds)} ({f.metadata['help']}).")
    return value
