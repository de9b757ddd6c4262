"""Words parsed: argparse with sentences. Refusals are ValueErrors."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml

from ..support.names import nearest


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


class Formatter(argparse.HelpFormatter):
    """Shows the first spelling of an option only."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        return name if action.nargs == 0 else f"{name} {self._format_args(action, action.dest.upper())}"


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError with a sentence, and names the nearest option for an unknown one."""

    def __init__(self, command: str, about: str) -> None:
        prog = f"scoreact {command}"
        super().__init__(prog, description=about, formatter_class=Formatter, allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        if message.endswith(": expected one argument"):
            message = f"{message.removeprefix('argument ').split('/')[0].split(':')[0]} needs a value"
        raise ValueError(f"{message}; `{self.prog} --help` says more.")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(words)
        for word in unknown:
            if word.startswith("-"):
                name = word.split("=")[0]
                known = [option for action in self._actions for option in action.option_strings]
                close = nearest(name, known, 0.5)
                if close:
                    raise ValueError(f"unknown option {name}; did you mean {close}?")
                self.error(f"unknown option {name}")
        if unknown:
            self.error(f"unexpected word {unknown[0]!r}")
        return options


def whole(low: int) -> Callable[[str], int]:
    """A whole number of at least `low`, for argparse."""

    def convert(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return int(text)

    return convert


def assignments(words: Sequence[str], flag: str) -> dict[str, Any]:
    """`name=value` words as a mapping; values are read as YAML."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} got {word!r}; expected name=value.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name] = value
    return found
