"""Examples out of an .npz or .npy: pictures, vectors or series, with labels and a held-out part where it has them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import SettingError
from .names import known_name
from .picture_files import LARGEST_SIDE

TRAIN, OTHER = ("train", "training"), ("val", "valid", "validation", "test")  # what splits are called
EXAMPLES = ("images", "x", "data", "pictures", "samples", "arr_0")  # what arrays are called
LABELS = ("labels", "label", "y", "targets", "target", "classes", "class")


@dataclass(frozen=True)
class Arrays:
    """values: pictures [N, C, H, W], uint8 or float32 in [0, 1]; vectors [N, D]; series [N, channels, L], float32.

    labels: a word an example, of the array `label`; other, other_labels: of the held-out part, where the file has one.
    """

    kind: str
    values: Tensor
    label: str
    labels: list[str] | None
    other: Tensor | None
    other_labels: list[str] | None
    notes: list[str]


def read_arrays(path: Path, kind: str | None = None, labels: bool | str = False) -> Arrays:
    """Read an .npz or .npy.

    Args:
        path: with one large array, or one called `images` or `data`, or train_images beside val_images or test_images.
        kind: pictures, vectors or series; None: as the shape says.
        labels: True: those beside, called `labels`; a text: the array of that name.

    Raises:
        SettingError: damaged files, pickles, shapes and values that are none of examples; with the array and the remedy.
    """
    arrays = _loaded(path)
    name = _examples_in(arrays, path)
    split = next((word for word in TRAIN if word in name.lower()), None)

    def beside(of: str, word: str) -> str:
        """The name of `of`, with the split's word replaced."""
        assert split is not None
        at = of.lower().find(split)
        return of if at < 0 else of[:at] + word + of[at + len(split) :]

    other = next((word for word in OTHER if split is not None and beside(name, word) in arrays), None)
    label = _labels_in(arrays, split, labels, path) if labels else None
    used = [name, *([label] if label else [])]
    values, kind = _values(arrays[name], f"{path}, array {name!r}", kind)
    words = _words(arrays[label], f"{path}, array {label!r}") if label else None
    notes, theirs, their_words = [], None, None
    if other is not None:
        held = beside(name, other)
        theirs, _ = _values(arrays[held], f"{path}, array {held!r}", kind)
        if theirs.shape[1:] != values.shape[1:]:
            raise SettingError(
                f"{path}: {name} holds examples of shape {tuple(values.shape[1:])}, {held} of {tuple(theirs.shape[1:])}; give "
                "both the same."
            )
        notes, used = [f"Held out are those of {held}."], [*used, held]
        if label is not None:
            theirs_at = beside(label, other)
            if theirs_at not in arrays or theirs_at == label or len(arrays[theirs_at]) != len(theirs):
                raise SettingError(
                    f"{path} has no labels {theirs_at!r}, one for each of {held}; add them, or take {held} out."
                )
            their_words, used = _words(arrays[theirs_at], f"{path}, array {theirs_at!r}"), [*used, theirs_at]
    if idle := [unused for unused in arrays if unused not in used]:
        notes.append(f"Not used of {path.name}: {', '.join(idle)}.")
    return Arrays(kind, values, f"array {label!r}", words, theirs, their_words, notes)


def _loaded(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:  # ours to close: numpy leaves a damaged one open
            loaded = np.load(file, allow_pickle=False)
            return {"data": loaded} if isinstance(loaded, np.ndarray) else {n: loaded[n] for n in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        remedy = "save it with a numeric dtype" if "Object arrays" in reason else "it is damaged or something else"
        raise SettingError(f"{path} cannot be read ({reason}); {remedy}.") from None


def _examples_in(arrays: Mapping[str, np.ndarray], path: Path) -> str:
    lower = {name.lower(): name for name in arrays}
    wanted = [w for word in TRAIN for n in EXAMPLES for w in (f"{word}_{n}", f"{n}_{word}")]
    named = next((lower[name] for name in [*wanted, *EXAMPLES] if name in lower), None)
    large = [name for name, array in arrays.items() if array.ndim > 1]
    if named is not None or len(large) == 1:
        return named or large[0]
    held = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
    raise SettingError(
        f"{path} holds {held}; name the array with the examples `images` or `data`, its labels `labels`."
    )


def _labels_in(arrays: Mapping[str, np.ndarray], split: str | None, labels: bool | str, path: Path) -> str:
    if isinstance(labels, str):
        return known_name(labels, arrays, f"{path} has no array")
    lower = {name.lower(): name for name in arrays}
    wanted = [w for n in LABELS for w in ((n,) if split is None else (f"{split}_{n}", f"{n}_{split}"))]
    found = next((lower[name] for name in wanted if name in lower), None)
    if found is None:
        raise SettingError(
            f"{path} has no array called {wanted[0]!r}, it holds {', '.join(arrays)}; name it (--labels NAME), or leave labels "
            "out."
        )
    return found


def _words(array: np.ndarray, where: str) -> list[str]:
    """Labels as words; 1.0 is 1."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "uifUSb":
        raise SettingError(f"{where} is {array.shape} of {array.dtype}; give one number or word an example.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise SettingError(
            f"{where} is not finite at example {int(np.flatnonzero(~np.isfinite(array))[0])}; fill it in."
        )
    return [
        f"{x:g}" if isinstance(x, float) else x.decode() if isinstance(x, bytes) else str(x) for x in array.tolist()
    ]


def _values(array: np.ndarray, where: str, kind: str | None) -> tuple[Tensor, str]:
    """An array's examples, and of which kind they are."""
    shape = array.shape
    if array.dtype.kind not in "uif":
        raise SettingError(f"{where} is of dtype {array.dtype}; give numbers: uint8, or float32.")
    if array.size == 0:
        raise SettingError(f"{where} is {shape}, which holds nothing; give examples.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise SettingError(f"{where} is not finite in example {row} (from 0); fill that in, or leave the example out.")
    kind = kind or _kind_of(array, where)
    if kind == "pictures":
        return _pictures(array, where), kind
    if array.ndim != 2 and (kind == "vectors" or array.ndim != 3):
        wanted = "[examples, numbers]" if kind == "vectors" else "[examples, length] or [examples, channels, length]"
        raise SettingError(f"{where} is {shape}; {kind} are {wanted}.")
    if kind == "series":
        array = array.reshape(shape[0], -1, shape[-1])
    return torch.from_numpy(array.astype(np.float32)), kind


def _kind_of(array: np.ndarray, where: str) -> str:
    if array.ndim == 4 or (array.ndim == 3 and array.dtype == np.uint8):
        return "pictures"
    if array.ndim == 2:
        return "vectors"
    remedy = "say whether they are grey pictures or series of several channels: --kind pictures, or --kind series"
    if array.ndim != 3:
        remedy = "give pictures [examples, height, width, channels], vectors [examples, numbers] or series"
    raise SettingError(f"{where} is {array.shape} of {array.dtype}; {remedy}.")


def _pictures(array: np.ndarray, where: str) -> Tensor:
    """uint8 or float32 in [0, 1], [N, C, H, W]."""
    shape = array.shape
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim != 4 or (shape[1] in (1, 3)) == (shape[3] in (1, 3)):
        raise SettingError(f"{where} is {shape}; give pictures [N, H, W, C] or [N, C, H, W], with 1 or 3 channels C.")
    elif shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if max(array.shape[2:]) > LARGEST_SIDE or min(array.shape[2:]) < 4:
        raise SettingError(f"{where} is {shape}; scale the pictures to sides of 4 to {LARGEST_SIDE} pixels.")
    low, high = float(array.min()), float(array.max())
    whole = array.dtype.kind in "ui"
    if low < (0 if whole else -1) or high > 255 or (low < 0 and high > 1):
        ranges = "0 to 255" if whole else "[0, 1], [-1, 1] or 0 to 255"
        raise SettingError(f"{where} holds values from {low:g} to {high:g}; scale pictures to {ranges}.")
    if whole and high <= 1:
        raise SettingError(f"{where} holds whole numbers from {low:g} to {high:g}; scale pictures to 0 to 255.")
    if whole:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))
    found = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return (found + 1) / 2 if low < 0 else found / 255 if high > 1 else found
