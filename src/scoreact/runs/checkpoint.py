"""Checkpoints of a run: a folder written under a temporary name and renamed when complete (safetensors + JSON, no pickle).

A kill at any moment leaves either the old one or the new one. Does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.errors import RunError, RunExists
from ..support.files import DIGEST, SUMS, UNREADABLE, check_sums, put_in_place, read_stored, write_json, write_tensors
from ..support.folders import LOCK

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
        digest = write_tensors(temporary / "tensors.safetensors", tensors)
        plain = json.loads(json.dumps(rest, default=str))
        record = {"format": FORMAT, "iteration": iteration, "tensors": digest, "state": plain}
        write_json(temporary / "state.json", {**record, DIGEST: _digest(record)})
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        _remove(target)
    put_in_place(temporary, target)
    for old in sorted(p for p in folder.iterdir() if p.name.isdigit())[:-keep]:
        _remove(old)
    return target


def _remove(path: Path) -> None:
    """Out of sight first, at once: a kill in the middle of the deletion leaves no half checkpoint to be read."""
    hidden = path.with_name(f".{path.name}.old")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _digest(record: Mapping[str, Any]) -> str:
    """sha256 of a record, less its own digest."""
    text = json.dumps({key: value for key, value in record.items() if key != DIGEST}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run's `checkpoints`, the newest first."""
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), reverse=True) if folder.is_dir() else []


def load_checkpoint(
    folder: Path, device: str | torch.device = "cpu", problems: list[str] | None = None
) -> tuple[int, dict[str, Any]]:
    """The newest whole checkpoint in `folder`: (iteration, state). A damaged newest one falls back to the one before.

    problems: is told of the damaged ones. Raises RunError when there is none that can be read, with what is wrong with the
    newest.
    """
    found = [] if problems is None else problems
    for path in checkpoints(folder):
        try:
            return read_checkpoint(path, device)
        except (*UNREADABLE, AttributeError, RecursionError) as error:
            found.append(f"{path} cannot be read: {' '.join(str(error).split())}")
    if found:
        raise RunError(f"{found[0]} Start the run anew.")
    raise RunError(
        f"{folder} holds no checkpoint; start the run anew (`scoreact train` takes a folder where nothing was saved), or "
        "check the path."
    )


def read_checkpoint(path: Path, device: str | torch.device) -> tuple[int, dict[str, Any]]:
    """(iteration, state) of one checkpoint; raises whatever its damage makes of it."""
    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RunError(f"{path / 'state.json'} is not a scoreact checkpoint of format {FORMAT}.")
    if DIGEST in record and record[DIGEST] != _digest(record):  # earlier versions wrote none
        raise RunError(f"{path / 'state.json'} is damaged: it is not what was written, as its digest tells.")
    tensors, header = read_stored(path / "tensors.safetensors", device)
    if "tensors" in record and record["tensors"] != header.get(DIGEST):
        raise RunError(f"{path / 'tensors.safetensors'} is damaged: it belongs to another checkpoint.")
    return int(record["iteration"]), join_tree(record["state"], tensors)


# --- a run's folder --------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Any]:
    """config.json of a run. Raises ValueError when the folder is no run."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is no run folder: it has no config.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in ("config", "description", "versions"):
            if not isinstance(content[name] if name == "config" else content.get(name) or {}, dict):
                raise TypeError(f"{name} is no mapping")
    except KeyError as error:
        raise RunError(f"{path} is damaged (it has no {error}); restore it or start a new run.") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); restore it or start a new run.") from None
    result: dict[str, Any] = content
    return result


# what a run leaves that ended before its first checkpoint, beside files on their way to these names
BEGUN = {
    "config.json", "metrics.jsonl", "reference.safetensors", "result.json", "checkpoints", "trackers.json", "tensorboard",
    "wandb", LOCK,
}  # fmt: skip


CUT_SHORT = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # what a kill leaves of a file that safetensors was writing


def saved_nothing(folder: Path) -> bool:
    """Whether a run may begin in a folder: it does not exist, is empty, or holds a run that saved nothing and no other file."""
    if not folder.exists():
        return True
    found = [path.name for path in folder.iterdir() if not (path.is_file() and CUT_SHORT.fullmatch(path.name))]
    names = {name.removesuffix(".tmp") for name in found}
    if not names <= BEGUN or checkpoints(folder / "checkpoints"):
        return False
    try:
        return "config.json" not in names or "versions" in read_run(folder)
    except RunError:
        return False


def check_free(folder: Path) -> None:
    """Raises RunExists for a folder in which no run may begin."""
    if not saved_nothing(folder):
        raise RunExists(f"{folder} is not empty; give a new folder with out, or continue that run with resume.")


def clear(folder: Path) -> None:
    """Remove what a run left that saved nothing."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def look_at_weights(folder: Path) -> list[str]:
    """Damage and NaN in the weight files of a run outside its checkpoints; sentences that begin with fine, note or problem."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if folder / "checkpoints" not in path.parents]
    lines, without = list[str](), list[str]()
    for path in files:
        try:
            tensors, header = read_stored(path)
        except RunError as error:
            lines.append(f"problem: {error}")
            continue
        bad = [name for name, x in tensors.items() if x.is_floating_point() and not bool(x.isfinite().all())]
        if bad:
            lines.append(f"problem: {path} holds NaN or inf in {len(bad)} of its tensors, such as {bad[0]}.")
        if DIGEST not in header and not any((above / SUMS).is_file() for above in path.parents):
            without.append(path.relative_to(folder).as_posix())
    for sums in sorted(folder.rglob(SUMS)):
        try:
            check_sums(sums.parent)
        except RunError as error:
            lines.append(f"problem: {error}")
    if without:
        lines.append(f"note: {', '.join(without)} came without a digest, so damage to it cannot be noticed.")
    if not any(line.startswith("problem") for line in lines):
        lines.append(f"fine: {len(files)} files of weights are whole and finite.")
    return lines
