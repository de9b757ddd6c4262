"""Words that people mistype: which known name is nearest, and the sentence that says so. Knows nothing else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .errors import SettingError


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like `word`, or None where none is at least `cutoff` like it (1 is the word itself).

    One that begins with the word, of three letters at least, goes before one that is only like it.
    """
    known = list(known)
    if len(str(word).lstrip("-")) >= 3 and (begun := [name for name in known if name.startswith(str(word))]):
        return min(begun, key=len)
    return next(iter(difflib.get_close_matches(str(word), known, 1, cutoff)), None)


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question for the end of an error, the space before it included; empty where nothing is near."""
    found = nearest(word, known, cutoff)
    return f" Did you mean {found!r}?" if found is not None else ""


def known_name(wanted: str, known: Iterable[str], problem: str) -> str:
    """`wanted` if it is known; else ValueError: the problem, the word, all known names and the nearest."""
    known = list(known)
    if wanted in known:
        return wanted
    raise SettingError(f"{problem} {wanted!r}; known: {', '.join(known) or 'none'}.{did_you_mean(wanted, known)}")
