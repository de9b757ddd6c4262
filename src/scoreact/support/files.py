"""Files that a kill leaves whole and that say when they are damaged: JSON, safetensors and JSON lines.

Everything is written aside, brought to the disk and renamed. Does not know what the files mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import RunError

Line = dict[str, Any]  # of a file of JSON lines
DIGEST = "digest"  # in a safetensors file's header: sha256 of its tensors and of the rest of that header
SUMS = "scoreact.sha256"  # beside files that other libraries wrote, as `sha256sum -c` reads it
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)  # what damage looks like


# --- whole or not at all -----------------------------------------------------------------------------------------------


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file or folder that is complete, so that a crash of the machine leaves the old or the new one."""
    if temporary.is_file():
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can (Windows cannot open a folder)."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_text(path: Path, text: str) -> None:
    """UTF-8 through a temporary file and a rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    put_in_place(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """JSON through a temporary file and a rename: never half a file."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


# --- tensors -----------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> str:
    """Safetensors through a temporary file and a rename, with a digest in the header, which is returned.

    header: what else the file says of itself.
    """
    temporary = path.with_name(path.name + ".tmp")
    # clones: safetensors refuses tensors that share memory
    kept = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    digest = _digest(kept, header or {})
    try:
        save_file(kept, temporary, {**(header or {}), DIGEST: digest})
    except SafetensorError as error:  # a full disk reaches us in this dress
        raise OSError(f"{path} could not be written: {error}") from error
    temporary.chmod(0o644)  # safetensors writes 0600: the report's readers could not open the weights
    put_in_place(temporary, path)
    return digest


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises RunError naming the file when it is missing, damaged or foreign."""
    return read_stored(path, device)[0]


def read_stored(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file, held against its digest, where it has one.

    Raises RunError naming the file when it is missing, cut short, foreign, or not what was written.
    """
    if not path.is_file():
        raise RunError(f"{path} does not exist; is this the folder of a run?")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except UNREADABLE as error:
        raise RunError(
            f"{path} is not a complete safetensors file ({' '.join(str(error).split())}); "
            "it was cut short or is something else. Restore a copy of it."
        ) from None
    if DIGEST in header and header[DIGEST] != _digest(tensors, header):
        raise RunError(
            f"{path} is damaged: its tensors are not those that were written, as its digest tells. Restore a copy of it."
        )
    return {name: tensor.to(device) for name, tensor in tensors.items()}, header


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    found = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != DIGEST}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        add_to_digest(found, name, tensor)
    return found.hexdigest()


def add_to_digest(found: hashlib._Hash, name: str, tensor: Tensor, most: int | None = None) -> None:
    """Add one tensor's name, type, shape and bytes to a hash.

    Args:
        found: the hash, changed in place.
        name: of the tensor.
        tensor: any shape and type, on any device.
        most: values to look at, evenly spread, where there are more; None: all of them.
    """
    flat = tensor.detach().reshape(-1)
    if most is not None and len(flat) > most:
        flat = flat[torch.linspace(0, len(flat) - 1, most, dtype=torch.float64).long().to(flat.device)]
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(flat.contiguous().cpu().view(torch.uint8).numpy().data)


# --- digests of files --------------------------------------------------------------------------------------------------


def digest_of_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """The digests of all safetensors files below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    write_text(folder / SUMS, "".join(f"{digest_of_file(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def check_sums(folder: Path) -> None:
    """Raises RunError for a file that is not as the folder's digests have it; nothing where there is none."""
    sums = folder / SUMS
    if not sums.is_file():
        return
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or digest_of_file(path) != digest:
            raise RunError(
                f"{path} is damaged or missing: {sums} has another digest of it. Export the weights anew, or delete that list."
            )


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
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def _any(line: Line) -> bool:
    return True


def read_lines(path: Path, is_whole: Callable[[Line], bool] = _any) -> list[Line]:
    """The lines of a file, [] where there is none; damaged ones, and a last one cut short by a kill, are left out."""
    return sort_lines(path, is_whole)[0]


def sort_lines(path: Path, is_whole: Callable[[Line], bool] = _any) -> tuple[list[Line], list[int]]:
    """The lines that can be read and are whole, and the numbers of the damaged ones.

    A last line without its end was cut short by a kill, which is no damage; it is in neither list.
    """
    lines: list[Line] = []
    damaged: list[int] = []
    if not path.is_file():
        return lines, damaged
    *texts, last = path.read_bytes().split(b"\n")
    for number, text in enumerate([*texts, last], start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # no UTF-8, no JSON
            line = None
        if isinstance(line, dict) and is_whole(line):
            lines.append(line)
        elif number <= len(texts):
            damaged.append(number)
    return lines, damaged


def resume_lines(path: Path) -> list[Line]:
    """`read_lines` of a file that is to go on: a last line cut short is dropped from the file too.

    Raises RunError naming a damaged line.
    """
    lines, damaged = sort_lines(path)
    if damaged:
        raise RunError(f"line {damaged[0]} of {path} is damaged; delete that line, and its run is repeated.")
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        _write_lines(path, lines)
    return lines


def truncate_lines(
    path: Path, iteration: int, is_whole: Callable[[Line], bool] = _any, most: int | None = None
) -> tuple[list[int], Path]:
    """Drop the lines after `iteration`, which a run wrote that was killed after its last checkpoint.

    most: how many lines there were when that was made, where it is known: what was said after it at the same iteration goes
    too. Damaged lines are dropped too, once the whole file is kept under another name: their numbers and that name.
    """
    lines, damaged = sort_lines(path, is_whole)
    kept = lines if most is None else lines[: max(0, most - sum(number <= most for number in damaged))]
    copy = path.with_name(f"{path.name}.damaged")
    number = 1
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.name}.damaged-{number}")
    if damaged:
        shutil.copyfile(path, copy)
    _write_lines(path, [line for line in kept if line["iteration"] <= iteration])
    return damaged, copy


def _write_lines(path: Path, lines: Iterable[Line]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
