"""Files that a kill leaves whole: JSON, safetensors and JSON lines, written aside and renamed. Does not know what they mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import RunError

Line = dict[str, Any]  # of a file of JSON lines


def write_json(path: Path, content: Any) -> None:
    """JSON through a temporary file and a rename: never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Safetensors through a temporary file and a rename. header: what the file says of itself."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        # clones: safetensors refuses tensors that share memory
        kept = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(kept, temporary, None if header is None else dict(header))
    except SafetensorError as error:  # a full disk reaches us in this dress
        raise OSError(f"{path} could not be written: {error}") from error
    temporary.chmod(0o644)  # safetensors writes 0600: the report's readers could not open the weights
    os.replace(temporary, path)


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError naming the file when it is missing, cut short or foreign."""
    if not path.is_file():
        raise RunError(f"{path} does not exist; is this the folder of a run?")
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(
            f"{path} is not a complete safetensors file ({' '.join(str(error).split())}); "
            "it was cut short or is something else. Use an earlier checkpoint."
        ) from None


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
        raise RunError(f"line {len(lines) + 1} of {path} is damaged; delete that line, and its run is repeated.")
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
