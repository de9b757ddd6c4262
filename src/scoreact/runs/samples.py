"""Samples as files: a picture each (or one array), and an index that says what each is. Nothing is overwritten."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..support.errors import RunExists
from ..support.files import write_json
from .films import as_picture, is_video, write_video

THUMBNAIL = 256  # pixels of a side on a contact sheet, at most
ON_A_SHEET = 400  # pictures


@dataclass(frozen=True)
class Drawn:
    """Some samples and what each is.

    samples: [B, ...]; prompts: B of them; numbers: of each among the samples of its prompt and seed; rewards: [B], where they
    were asked for; ids: of samples that were handed out for rewards from outside.
    """

    samples: Tensor
    prompts: Sequence[str]
    numbers: Sequence[int] = ()
    rewards: Tensor | None = None
    ids: Sequence[int] = ()

    def entries(self, first: int) -> list[dict[str, Any]]:
        """What the index says of each."""
        found: list[dict[str, Any]] = [{"number": first + i, "prompt": prompt} for i, prompt in enumerate(self.prompts)]
        for entry, sample in zip(found, self.numbers, strict=False):
            entry["sample"] = sample
        for entry, number in zip(found, self.ids, strict=False):
            entry["id"] = number
        for entry, reward in zip(found, [] if self.rewards is None else self.rewards.tolist(), strict=False):
            entry["reward"] = reward if math.isfinite(reward) else None
        return found


def write_samples(parts: Iterable[Drawn], folder: Path, columns: int, about: Mapping[str, Any]) -> list[Path]:
    """Write samples and index.json into a new folder as they come; returns the files.

    Pictures [B, 1 or 3, H, W] in [0, 1] become a PNG each, and contact sheets of all; videos [B, 1 or 3, frames, H, W] become
    an animated PNG each; everything else becomes samples.npy, and points and series [B, d] also samples.csv. about: what the
    index says of all of them.
    Raises RunExists for a folder that holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunExists(f"{folder} is not empty, and samples never overwrite others; give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    sheets: list[Path] = []
    singles: list[Path] = []
    small: list[Tensor] = []
    others: list[np.ndarray] = []
    shape: Sequence[int] = ()
    on_a_sheet = columns * max(1, ON_A_SHEET // columns)
    for part in parts:
        new = part.entries(len(entries))
        shape = part.samples.shape[1:]
        is_picture = len(shape) == 3 and shape[0] in (1, 3)
        if is_picture or is_video(shape):
            for entry, sample in zip(new, part.samples, strict=True):
                singles.append(folder / f"{entry['number']:05d}.png")
                if is_picture:
                    as_picture(sample).save(singles[-1])
                else:
                    write_video(sample, singles[-1])
                entry["file"] = singles[-1].name
        if is_picture:
            small.append(thumbnails(part.samples))
            while sum(map(len, small)) > on_a_sheet:
                whole = torch.cat(small)
                sheets.append(_save_sheet(whole[:on_a_sheet], columns, folder, len(sheets)))
                small = [whole[on_a_sheet:]]
        elif not is_video(shape):
            others.append(part.samples.detach().cpu().numpy())
        entries += new
    if small:
        sheets.append(_save_sheet(torch.cat(small), columns, folder, len(sheets)))
    written = [*sheets, *singles]
    if others:
        written.append(folder / "samples.npy")
        array = np.concatenate(others)
        np.save(written[0], array)
        if array.ndim == 2:
            written.append(folder / "samples.csv")
            with written[1].open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["prompt", *(f"x{i}" for i in range(array.shape[1]))])
                writer.writerows([entry["prompt"], *row] for entry, row in zip(entries, array.tolist(), strict=True))
    index = {**about, "shape": [len(entries), *shape], "sheets": [path.name for path in sheets], "samples": entries}
    write_json(folder / "index.json", index)
    return [*written, folder / "index.json"]


def thumbnails(pictures: Tensor) -> Tensor:
    """[B, C, H, W], no larger than THUMBNAIL."""
    factor = -(-max(pictures.shape[-2:]) // THUMBNAIL)
    return (
        torch.nn.functional.avg_pool2d(pictures.detach().cpu().float(), factor)
        if factor > 1
        else pictures.detach().cpu()
    )


def _save_sheet(pictures: Tensor, columns: int, folder: Path, number: int) -> Path:
    path = folder / (f"sheet-{number + 1}.png" if number else "sheet.png")
    sheet(pictures, columns).save(path)
    return path


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
