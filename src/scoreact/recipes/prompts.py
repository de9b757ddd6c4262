"""Prompts from a file, a function or the command line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..support.errors import SettingError
from ..support.loading import load_named


def read_prompts(source: str) -> list[str]:
    """The lines of a text file that are not empty; or the text itself as the only prompt."""
    path = Path(source)
    if path.suffix == ".txt" or path.is_file():
        if not path.is_file():
            raise SettingError(f"prompts {source!r}: there is no such file; give a text file with one prompt a line.")
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise SettingError(f"prompts {source!r} holds no prompt; write one a line.")
        return list(dict.fromkeys(found))
    return [source]


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
