"""A setting: a dataclass field with its help text, its range, its known values, and the choices that use it.

Knows how a given value is checked and which settings a set of choices uses; knows none of them by name.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import SettingError
from .names import did_you_mean, nearest


@dataclass(frozen=True)
class Above:
    """The numbers above `low`, as the values of a choice with which a setting is used."""

    low: float

    def __contains__(self, value: Any) -> bool:
        return bool(value > self.low)


Allowed = tuple[Any, ...] | Above


def setting(
    default: Any,
    text: str,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    known: Callable[[], Iterable[str]] | None = None,
    needs: Mapping[str, Allowed] | None = None,
    own: bool = False,
) -> Any:
    """A field of a record that is a setting.

    Args:
        default: its value where nobody gives another.
        text: what it is, with its unit.
        low, high: the range that a number must lie in.
        above: the low end itself is excluded.
        known: the names that a string may be, asked for when one is checked.
        needs: name of a choice -> its values with which this setting is used. A choice is another setting, or an
            attribute of the update rule (`critic`, `minimiser`, ...). Without needs the setting is always used.
        own: a name may also be the user's own, as file.py:name.
    """
    more = {"low": low, "high": high, "above": above, "known": known, "needs": needs or {}, "own": own}
    return field(default=default, metadata={"help": text, **more})


def fields_of(record: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The settings among a dataclass's fields, those with a help text, each with its type."""
    hints = typing.get_type_hints(record)
    return [(f, hints[f.name]) for f in dataclasses.fields(record) if "help" in f.metadata]


def unmet(name: str, fields: Mapping[str, dataclasses.Field[Any]], values: Mapping[str, Any]) -> str | None:
    """The choice because of which the setting `name` is not used; None where it is.

    values: of every choice, by name. A choice that is itself a setting which is not used counts with its default.
    """
    for choice, allowed in fields[name].metadata["needs"].items():
        idle = choice in fields and unmet(choice, fields, values) is not None
        if (fields[choice].default if idle else values[choice]) not in allowed:
            return str(choice)
    return None


def range_of(f: dataclasses.Field[Any]) -> list[str]:
    """The ends of a number's range in words; [] where it has none."""
    low, high, above = f.metadata["low"], f.metadata["high"], f.metadata["above"]
    ends = [("above" if above else "at least", low)] * (low > -math.inf) + [("at most", high)] * (high < math.inf)
    return [f"{word} {end if isinstance(end, int) else f'{end:g}'}" for word, end in ends]


def nearest_or_known(word: Any, known: Iterable[str]) -> str:
    close = nearest(word, known := list(known))
    return f"; did you mean {close!r}?" if close else f". Known: {', '.join(known) or 'none'}."


def checked_setting(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """The value in its field's type, or ValueError naming field, value, and what is accepted."""
    known = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
    if f.metadata["known"] is not None and not (f.metadata["own"] and ":" in str(value)):
        known = tuple(f.metadata["known"]())
    if known is not None:
        if value is False and "off" in known:  # YAML reads a bare off so
            value = "off"
        if value not in known:
            hint_text = did_you_mean(value, known, 0.4)  # eulr is short for euler_maruyama
            raise SettingError(f"{f.name} is {value!r}; known: {', '.join(known)}.{hint_text}")
        return value
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            value = float(value)
        except ValueError:
            raise SettingError(f"{f.name} is {value!r}; expected a number ({f.metadata['help']}).") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise SettingError(
            f"{f.name} is {value!r} ({type(value).__name__}); expected {hint.__name__} ({f.metadata['help']})."
        )
    if hint in (int, float):
        low, high, above = f.metadata["low"], f.metadata["high"], f.metadata["above"]
        inside = (low < value if above else low <= value) and value <= high  # so written, nan is refused
        if not inside or math.isinf(value):
            bounds = " and ".join(range_of(f)) or "finite"
            raise SettingError(f"{f.name} is {value}; it must be {bounds} ({f.metadata['help']}).")
    return value
