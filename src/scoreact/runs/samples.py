"""Samples as files: a picture each (or one array), and an index that says what each is. Nothing is overwritten."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..support.errors import RunExists
from ..support.files import write_json


def free_folder(parent: Path, name: str) -> Path:
    """parent/NAME, or NAME-2, NAME-3, ...: the first that does not exist."""
    number, folder = 1, parent / name
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def write_samples(
    decoded: Tensor, prompts: Sequence[str], folder: Path, columns: int, about: Mapping[str, Any]
) -> list[Path]:
    """Write samples and index.json into a new folder; returns the files.

    decoded: [B, ...]. Pictures [B, 1 or 3, H, W] in [0, 1] become a PNG each and a sheet of all; everything else becomes
    samples.npy, and points and series [B, d] also samples.csv. prompts: B of them. about: what the index says of all of them.
    Raises RunExists for a folder that holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunExists(f"{folder} is not empty, and samples never overwrite others; give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    array = decoded.detach().cpu().numpy()
    entries: list[dict[str, Any]] = [{"number": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        written = [folder / "sheet.png", *(folder / f"{i:05d}.png" for i in range(len(array)))]
        sheet(decoded, columns).save(written[0])
        for entry, path, picture in zip(entries, written[1:], decoded, strict=True):
            as_picture(picture).save(path)
            entry["file"] = path.name
    else:
        written = [folder / "samples.npy"]
        np.save(written[0], array)
        if array.ndim == 2:
            written.append(folder / "samples.csv")
            with written[1].open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["prompt", *(f"x{i}" for i in range(array.shape[1]))])
                writer.writerows([prompt, *row] for prompt, row in zip(prompts, array.tolist(), strict=True))
    write_json(folder / "index.json", {**about, "shape": list(array.shape), "samples": entries})
    return [*written, folder / "index.json"]


def as_picture(picture: Tensor) -> Image.Image:
    """[1 or 3, H, W] in [0, 1] as a PIL image of its own size."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def sheet(images: Tensor, columns: int) -> Image.Image:
    """Pictures [B, 1 or 3, H, W] in [0, 1] on one: small ones enlarged by a whole factor, two white pixels between."""
    factor = max(1, 112 // images.shape[-1])
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((channels, rows * (height + 2) - 2, columns * (width + 2) - 2), 255, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        canvas[:, top : top + height, left : left + width] = picture
    return Image.fromarray(canvas[0] if channels == 1 else canvas.transpose(1, 2, 0))
