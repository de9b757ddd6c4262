"""Checkpoints of a run: a folder written under a temporary name and renamed when complete (safetensors + JSON, no pickle).

A kill at any moment leaves either the old one or the new one. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.errors import RunError
from ..support.files import read_tensors, write_json, write_tensors

FORMAT = 1  # of the checkpoint folder


def split_tree(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists into named tensors and the JSON that remains ({"__tensor__": name} in their place)."""
    if isinstance(tree, Tensor):
        return {prefix: tree}, {"__tensor__": prefix}
    if isinstance(tree, Mapping):
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for key, value in tree.items():
            found, rest[str(key)] = split_tree(value, f"{prefix}.{key}" if prefix else str(key))
            tensors |= found
        return tensors, rest
    if isinstance(tree, list | tuple):
        parts = [split_tree(value, f"{prefix}.{i}") for i, value in enumerate(tree)]
        return {k: v for found, _ in parts for k, v in found.items()}, [rest for _, rest in parts]
    return {}, tree


def join_tree(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten` (tuples come back as lists, integer keys as strings)."""
    if isinstance(rest, dict):
        if set(rest) == {"__tensor__"}:
            return tensors[rest["__tensor__"]]
        return {key: join_tree(value, tensors) for key, value in rest.items()}
    if isinstance(rest, list):
        return [join_tree(value, tensors) for value in rest]
    return rest


def save_checkpoint(folder: Path, iteration: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state` (nested dicts and lists of tensors and plain values) as folder/<iteration>; keep the newest few.

    Raises OSError when the disk is full or the folder cannot be written; earlier checkpoints are left as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{iteration:08d}"
    temporary = folder / f".{iteration:08d}.tmp"
    for left in folder.glob(".*"):  # by a run that was killed in here
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    tensors, rest = split_tree(state)
    try:
        write_tensors(temporary / "tensors.safetensors", tensors)
        write_json(temporary / "state.json", {"format": FORMAT, "iteration": iteration, "state": rest})
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        _remove(target)
    os.replace(temporary, target)
    for old in sorted(p for p in folder.iterdir() if p.name.isdigit())[:-keep]:
        _remove(old)
    return target


def _remove(path: Path) -> None:
    """Out of sight first, at once: a kill in the middle of the deletion leaves no half checkpoint to be read."""
    hidden = path.with_name(f".{path.name}.old")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def load_checkpoint(folder: Path, device: str | torch.device = "cpu") -> tuple[int, dict[str, Any]]:
    """The newest complete checkpoint in `folder`: (iteration, state). A damaged newest one falls back to the one before.

    Raises ValueError when there is none that can be read, with what is wrong with the newest.
    """
    names = sorted((p for p in folder.iterdir() if p.name.isdigit()), reverse=True) if folder.is_dir() else []
    problem = f"{folder} holds no checkpoint; start the run anew, or check the path."
    for number, path in enumerate(names):
        try:
            record = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise RunError(f"{path / 'state.json'} is not a scoreact checkpoint of format {FORMAT}.")
            tensors = read_tensors(path / "tensors.safetensors", device)
            return int(record["iteration"]), join_tree(record["state"], tensors)
        except (OSError, ValueError, KeyError) as error:
            if number == 0:
                problem = f"{path} cannot be read: {' '.join(str(error).split())}"
    raise RunError(problem)


# --- a run's folder --------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Any]:
    """config.json of a run. Raises ValueError when the folder is no run."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is no run folder: it has no config.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["config"], dict):
            raise TypeError("config is no mapping")
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}); restore it or start a new run.") from None
    result: dict[str, Any] = content
    return result
