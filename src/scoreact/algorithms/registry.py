"""The update rules by name, and the user's own from a file."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from ..support.errors import LoadError, SettingError
from ..support.loading import load_named
from ..support.names import did_you_mean
from .base import Rule


@functools.cache
def rules() -> dict[str, type[Rule]]:
    """Every rule by name: the `RULES` of each module in this package."""
    found: dict[str, type[Rule]] = {}
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        found.update(getattr(importlib.import_module(f"{__package__}.{module.name}"), "RULES", {}))  # helpers have none
    return found


def find_rule(name: str) -> type[Rule]:
    """A rule by name, or the user's own class as 'file.py:Class' or 'module:Class'. Raises ValueError."""
    if ":" not in name:
        if name not in rules():
            known = ", ".join(rules())
            raise SettingError(f"algorithm is {name!r}; known: {known}, or file.py:Class.{did_you_mean(name, rules())}")
        return rules()[name]
    found = load_named(name, "algorithm")
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise LoadError(f"algorithm {name!r} is {found!r}; expected a subclass of scoreact.algorithms.Rule.")
    missing = [part for part in ("prepare", "loss") if getattr(found, part) is getattr(Rule, part)]
    if missing:
        raise LoadError(
            f"algorithm {name!r} has no {' and no '.join(missing)} of its own; a rule is these two functions."
        )
    return found
