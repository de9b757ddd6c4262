"""The one way to load code that a user named: `path/to/file.py:name`, or `module:name`.

Only what was named is executed: the file's folder is not put on the import path and no cached bytecode is read. A file is
run once as long as its text stays the same, under a module name that no other file has.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import LoadError
from .names import did_you_mean


def is_spec(text: str) -> bool:
    """Whether a text names something in a file or a module, and not a known name or an address."""
    place, colon, name = text.rpartition(":")
    return bool(colon and place and name) and "//" not in text


def load_named(spec: str, kind: str) -> Any:
    """The object at `path/to/file.py:name` or `module:name`; kind: what it is to be, for the messages ("reward").

    Raises LoadError, one sentence with the remedy, for whatever is not there and for a file that fails when it is run.
    """
    place, _, attribute = spec.rpartition(":")
    if not place or not attribute:
        raise LoadError(f"{kind} {spec!r} lacks a half. Give 'file.py:name' or 'module:name'.")
    module = _run_file(place, kind) if is_file(place) else _import(place, spec, kind)
    try:
        return getattr(module, attribute)
    except AttributeError:
        callables = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        own = [n for n in callables if getattr(vars(module)[n], "__module__", None) == module.__name__]
        raise LoadError(f"{place} has no {attribute!r}. {_known('It has', attribute, own or callables)}") from None


def is_file(place: str) -> bool:
    """Whether the first half of a spec is a path and not a module's dotted name."""
    return place.endswith(".py") or "/" in place or "\\" in place


def said_by(error: BaseException, file: str | None = None) -> str:
    """`Type: message`, with the line of `file` where it happened."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while file and trace:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = f" (line {line})" if line else ""
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}{where}"


def _known(what: str, wanted: str, names: Collection[str]) -> str:
    return f"{did_you_mean(wanted, names)} {what}: {', '.join(sorted(names)) or 'nothing'}.".lstrip()


def _run_file(place: str, kind: str) -> ModuleType:
    path = Path(place).expanduser()
    if not path.is_file():
        raise LoadError(f"{kind} file {place!r} does not exist (looked in {Path.cwd()}). Give the path of a .py file.")
    full = str(path.resolve())
    try:
        return _module_of(full, path.read_bytes())
    except (Exception, SystemExit) as error:
        raise LoadError(f"{kind} file {place} cannot be run: {said_by(error, full)}. {_remedy(error)}") from error


@functools.lru_cache(maxsize=256)  # failures are not kept
def _module_of(full: str, text: bytes) -> ModuleType:
    """The module of a file's text, run once."""
    digest = hashlib.sha256(full.encode() + b"\0" + text).hexdigest()[:12]
    module = ModuleType(f"scoreact_user_{Path(full).stem}_{digest}")
    module.__file__ = full
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    try:
        exec(compile(text, full, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _import(place: str, spec: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not (error.name and (place == error.name or place.startswith(error.name + "."))):
            raise LoadError(f"{kind} module {place} cannot be imported: {said_by(error)}. {_remedy(error)}") from error
        beside = Path(*place.split(".")).with_suffix(".py")
        hint = (
            f"Did you mean '{beside}:{spec.rpartition(':')[2]}'?"
            if beside.is_file()
            else "Install it, put its folder on PYTHONPATH, or give 'path/to/file.py:name'."
        )
        raise LoadError(f"{kind} module {place!r} was not found. {hint}") from None
    except (Exception, SystemExit) as error:
        raise LoadError(f"{kind} module {place} cannot be imported: {said_by(error)}. {_remedy(error)}") from error


def _remedy(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return "Install what it imports; files beside it are found through PYTHONPATH."
    if isinstance(error, SystemExit):
        return "Put the script's own part under `if __name__ == '__main__':`."
    return "Correct that line."
