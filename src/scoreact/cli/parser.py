"""Words parsed: argparse with sentences. Refusals are ValueErrors.

An option that would do nothing is refused: one given twice, and one whose choice (`Parser.belongs`) is another.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from ..support.errors import SettingError
from ..support.names import nearest
from ..support.text import parsed_yaml


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


class Once(argparse.Action):
    """Keeps an option's value, and refuses a second one: only one of the two could be used."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = vars(namespace).setdefault(GIVEN, set())
        if self.option_strings and self.dest in given:
            before = getattr(namespace, self.dest)
            raise ValueError(f"{option_string} is given twice, {_words(before)} and {_words(values)}; give it once.")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


GIVEN = "given"  # in a namespace: the options that were among the words


def _words(value: Any) -> str:
    if isinstance(value, tuple):  # names with commas between
        return ",".join(map(str, value))
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError with a sentence, and names the nearest option for an unknown one."""

    def __init__(self, command: str, about: str) -> None:
        prog = f"scoreact {command}"
        super().__init__(prog, description=about, formatter_class=Formatter, allow_abbrev=False, add_help=False)
        for action in (None, "store"):
            self.register("action", action, Once)
        self._negative_number_matcher = re.compile(r"^-[\d.][-+\d.,eE]*$")  # several too, with commas between: a value
        self._belongs: list[tuple[str, str, tuple[str, ...]]] = []

    def error(self, message: str) -> NoReturn:
        if message.endswith(": expected one argument"):
            message = f"{message.removeprefix('argument ').split('/')[0].split(':')[0]} needs a value"
        raise ValueError(f"{message}; `{self.prog} --help` says more.")

    def belongs(self, option: str, choice: str, *values: str) -> None:
        """The option is used with these values of a choice only, or, without values, where the choice is given."""
        self._belongs.append((option, choice, values))

    def _check_use(self, options: argparse.Namespace) -> None:
        given = vars(options).get(GIVEN, set())
        for option, choice, values in self._belongs:
            used = getattr(options, choice) in values if values else choice in given
            value = getattr(options, option)
            if (option in given or value is True or (isinstance(value, list) and value)) and not used:
                names = {action.dest: [*action.option_strings, ""][0] for action in self._actions}
                wanted = f"{names[choice]} {' or '.join(values)}".strip()
                name, wanted = names[option], wanted if names[choice] else f"`{self.prog} {wanted}`"
                raise ValueError(f"{name} does nothing without {wanted}; leave it out, or give that too.")

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
        self._check_use(options)
        return options


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """A whole number from `low` to `high`, for argparse."""

    def convert(text: str) -> int:
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,30}", text) else None
        if number is None or number < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        if number > high:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {high}, got {text!r}")
        return number

    return convert


def assignments(words: Sequence[str], flag: str, texts: Collection[str] = ()) -> dict[str, Any]:
    """`name=value` words as a mapping; values are read as YAML, those of `texts` stay texts (no, 12, null)."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} got {word!r}; expected name=value.")
        if name in found:
            raise ValueError(f"{flag} {name} is given twice; give it once.")
        try:
            found[name] = parsed_yaml(value, f"{flag} {name}")
        except SettingError as error:  # a text with a colon or a bracket in it
            if "twice" in str(error):
                raise
            found[name] = value
        if name in texts and not isinstance(found[name], str):
            found[name] = value
    return found
