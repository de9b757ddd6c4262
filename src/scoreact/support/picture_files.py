"""Pictures out of a folder, all of one size: of the folder itself, or of a folder a class. Knows pillow; no models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import SettingError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
LARGEST_SIDE = 512  # pixels; larger ones have to be scaled
DEEP = ("I", "F")  # pillow's modes of more than eight bits a channel begin with these


@dataclass(frozen=True)
class Folder:
    """pictures uint8 [N, 1 or 3, H, W]; labels int64 [N], places in `classes`, the folders' names; notes for the user."""

    pictures: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    notes: list[str]


def read_folder(path: Path, labels: bool = False, size: int | None = None) -> Folder:
    """All pictures below a folder, in colour as soon as one is.

    Args:
        path: of the folder.
        labels: its folders are the classes.
        size: scale each so that its shorter side has so many pixels, and cut out the middle square. Without it all have to be
            of one size.

    Raises:
        SettingError: no pictures, damaged ones, sizes that differ, one class; with the file and the remedy.
    """
    inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = sorted(_files(path))
    pictures = [file for file in files if file.suffix.lower() in ENDINGS]
    if not pictures:
        raise SettingError(f"{path} holds no pictures ({', '.join(sorted(ENDINGS))}); give another folder.")
    notes = []
    if len(files) > len(pictures):
        other = next(file for file in files if file.suffix.lower() not in ENDINGS)
        notes.append(
            f"{len(files) - len(pictures)} files of {path} are no pictures and left out, such as {other.name}."
        )
    index, classes = _classes(path, inside, pictures) if labels else (None, ())
    if not labels and len(inside) > 1:
        notes.append(f"The {len(inside)} folders of {path} are taken together; --labels learns them as classes.")
    read, see_through = list[Image.Image](), 0
    for file in pictures:
        picture, alpha = _opened(file, size)
        see_through += alpha
        if read and picture.size != read[0].size:
            shapes = [f"{f} is {p.size[0]} x {p.size[1]}" for f, p in ((pictures[0], read[0]), (file, picture))]
            raise SettingError(f"{' and '.join(shapes)}; give all one size, or let them be scaled and cut: --size 64.")
        read.append(picture)
    if see_through:
        notes.append(f"{see_through} pictures are see-through; they are put on white.")
    colours = sum(picture.mode == "RGB" for picture in read)
    if 0 < colours < len(read):
        notes.append(f"{len(read) - colours} of {len(read)} pictures are grey; they are taken as coloured ones.")
    mode = "RGB" if colours else "L"
    stacked = np.stack([np.asarray(picture.convert(mode)) for picture in read])
    stacked = stacked.transpose(0, 3, 1, 2) if mode == "RGB" else stacked[:, None]
    return Folder(torch.from_numpy(np.ascontiguousarray(stacked)), index, classes, notes)


def _files(path: Path) -> Iterator[Path]:
    """Those below a folder that are not hidden."""
    for file in path.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def _classes(path: Path, inside: list[Path], pictures: list[Path]) -> tuple[Tensor, tuple[str, ...]]:
    names = tuple(p.name for p in inside if any(p in picture.parents for picture in pictures))
    alone = [picture for picture in pictures if picture.parent == path]
    if alone and names:
        raise SettingError(f"{alone[0]} lies beside the folders of {path} and has no class; put it into one of them.")
    if len(names) < 2:
        held = f"one folder, {names[0]!r}" if names else "no folders"
        raise SettingError(f"{path} holds {held}, so there are no classes to tell apart; leave --labels out.")
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place[picture.relative_to(path).parts[0]] for picture in pictures]), names


def _opened(file: Path, size: int | None) -> tuple[Image.Image, bool]:
    """A picture as grey or RGB, upright, and whether it had an alpha channel."""
    try:
        with Image.open(file) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SettingError(
            f"{file} cannot be read ({' '.join(str(error).split())}); it is damaged or no picture. Delete it or restore it."
        ) from None
    if picture.mode.startswith(DEEP):
        raise SettingError(
            f"{file} has more than 8 bits a channel (mode {picture.mode}); save it as 8-bit grey or RGB."
        )
    alpha = picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info
    if alpha:
        above = picture.convert("RGBA")
        alpha = bool((np.asarray(above)[..., 3] < 255).any())
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    grey = picture.mode in ("1", "L", "LA")
    picture = picture.convert("L" if grey else "RGB")
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    if max(picture.size) > LARGEST_SIDE or min(picture.size) < 4:
        raise SettingError(
            f"{file} is {picture.size[0]} x {picture.size[1]}; sides go from 4 to {LARGEST_SIDE} pixels. Let all be scaled: "
            "--size 64."
        )
    return picture, alpha
