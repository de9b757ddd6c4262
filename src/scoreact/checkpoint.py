"""Files of a run: atomic checkpoints (safetensors + JSON, no pickle), run configuration, files of JSON lines.

A checkpoint is a folder written under a temporary name and renamed when complete, so that a kill at any moment leaves
either the old one or the new one. Knows files; does not know what the tensors mean.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1  # of the checkpoint folder
Line = dict[str, Any]  # of a file of JSON lines


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts and lists into named tensors and the JSON that remains ({"__tensor__": name} in their place)."""
    if isinstance(tree, Tensor):
        return {prefix: tree}, {"__tensor__": prefix}
    if isinstance(tree, Mapping):
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for key, value in tree.items():
            found, rest[str(key)] = flatten(value, f"{prefix}.{key}" if prefix else str(key))
            tensors |= found
        return tensors, rest
    if isinstance(tree, list | tuple):
        parts = [flatten(value, f"{prefix}.{i}") for i, value in enumerate(tree)]
        return {k: v for found, _ in parts for k, v in found.items()}, [rest for _, rest in parts]
    return {}, tree


def unflatten(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten` (tuples come back as lists, integer keys as strings)."""
    if isinstance(rest, dict):
        if set(rest) == {"__tensor__"}:
            return tensors[rest["__tensor__"]]
        return {key: unflatten(value, tensors) for key, value in rest.items()}
    if isinstance(rest, list):
        return [unflatten(value, tensors) for value in rest]
    return rest


def write_json(path: Path, content: Any) -> None:
    """JSON through a temporary file and a rename: never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors through a temporary file and a rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        # clones: safetensors refuses tensors that share memory
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary)
    except SafetensorError as error:  # a full disk reaches us in this dress
        raise OSError(f"{path} could not be written: {error}") from error
    temporary.chmod(0o644)  # safetensors writes 0600: the report's readers could not open the weights
    os.replace(temporary, path)


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError naming the file when it is missing, cut short or foreign."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is this the folder of a run?")
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({' '.join(str(error).split())}); "
            "it was cut short or is something else. Use an earlier checkpoint."
        ) from None


def save(folder: Path, iteration: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state` (nested dicts and lists of tensors and plain values) as folder/<iteration>; keep the newest few.

    Raises OSError when the disk is full or the folder cannot be written; earlier checkpoints are left as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{iteration:08d}"
    temporary = folder / f".{iteration:08d}.tmp"
    for left in folder.glob(".*"):  # by a run that was killed in here
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    tensors, rest = flatten(state)
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


def load(folder: Path, device: str | torch.device = "cpu") -> tuple[int, dict[str, Any]]:
    """The newest complete checkpoint in `folder`: (iteration, state). A damaged newest one falls back to the one before.

    Raises ValueError when there is none that can be read, with what is wrong with the newest.
    """
    names = sorted((p for p in folder.iterdir() if p.name.isdigit()), reverse=True) if folder.is_dir() else []
    problem = f"{folder} holds no checkpoint; start the run anew, or check the path."
    for number, path in enumerate(names):
        try:
            record = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise ValueError(f"{path / 'state.json'} is not a scoreact checkpoint of format {FORMAT}.")
            tensors = read_tensors(path / "tensors.safetensors", device)
            return int(record["iteration"]), unflatten(record["state"], tensors)
        except (OSError, ValueError, KeyError) as error:
            if number == 0:
                problem = f"{path} cannot be read: {' '.join(str(error).split())}"
    raise ValueError(problem)


# --- files of JSON lines ---------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON does not have, however deep in mappings and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """One JSON line, on the disk when this returns; NaN and infinities become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, [] where there is none; a last line cut short by a kill is left out."""
    lines: list[Line] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def resume_lines(path: Path) -> list[Line]:
    """`read_lines` of a file that is to go on: a last line cut short is dropped from the file too.

    Raises ValueError naming a damaged line that is not the last.
    """
    lines = read_lines(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    count = len(text.splitlines())
    if len(lines) < count - 1:
        raise ValueError(f"line {len(lines) + 1} of {path} is damaged; delete that line, and its run is repeated.")
    if len(lines) < count or (text and not text.endswith("\n")):
        _write_lines(path, lines)
    return lines


def truncate_lines(path: Path, iteration: int) -> None:
    """Drop the lines after `iteration` (written by a run that was killed after its last checkpoint)."""
    _write_lines(path, [line for line in read_lines(path) if line["iteration"] <= iteration])


def _write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Through a temporary file and a rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


# --- a run's folder --------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Any]:
    """config.json of a run. Raises ValueError when the folder is no run."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["config"], dict):
            raise TypeError("config is no mapping")
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or start a new run.") from None
    result: dict[str, Any] = content
    return result


def load_weights(model: nn.Module, path: Path) -> None:
    """Put trained weights (model.safetensors of a run) into a freshly built model. ValueError if they do not fit."""
    load_parameters(model, read_tensors(path))


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of these names. ValueError if one does not fit."""
    own = {name: p for name, p in model.named_parameters()}
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "no such parameter"
            raise ValueError(
                f"the stored weights do not fit this model: {name} is {tuple(tensor.shape)} there, {have} here. "
                "Were they made by another recipe or with other options?"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
