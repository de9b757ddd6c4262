"""Pictures and videos as files. Videos are written frame by frame: animated pictures, and small copies that are cheap to keep.

A video is [1 or 3, frames, H, W] in [0, 1], as video pipelines decode it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FRAMES_A_SECOND = 8


def as_picture(picture: Tensor) -> Image.Image:
    """[1 or 3, H, W] in [0, 1] as a PIL image of its own size."""
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def is_video(shape: Sequence[int]) -> bool:
    """Whether a sample of this shape is shown as a video."""
    return len(shape) == 4 and shape[0] in (1, 3)


def small(video: Tensor, side: int, most: int) -> Tensor:
    """A copy of `most` frames at most, evenly chosen with the first and the last, no side longer than `side`: uint8 on the CPU.

    Frames smaller than half of `side` are enlarged by a whole factor.
    """
    count, (height, width) = video.shape[1], video.shape[2:]
    kept = torch.linspace(0, count - 1, min(count, most)).round().long()
    x = video.detach()[:, kept.to(video.device)].float().transpose(0, 1)  # [F, C, H, W]
    longest = max(height, width)
    if longest > side:
        size = (max(1, height * side // longest), max(1, width * side // longest))
        x = F.interpolate(x, size, mode="area")
    factor = max(1, side // longest)
    x = (x.clamp(0, 1) * 255).round().byte().cpu().transpose(0, 1)
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


class _Later:
    """Frames that are made anew whenever they are asked for; Pillow goes through those of a PNG twice."""

    def __init__(self, frame: Callable[[int], Image.Image], numbers: range) -> None:
        self.frame, self.numbers = frame, numbers

    def __iter__(self) -> Iterator[Image.Image]:
        return map(self.frame, self.numbers)


def write_film(frame: Callable[[int], Image.Image], count: int, file: str | Path | BinaryIO, form: str) -> None:
    """An animated picture that repeats. frame: number -> picture, asked for one by one; form: GIF (256 colours) or PNG."""
    others = _Later(frame, range(1, count))
    frame(0).save(file, form, save_all=True, append_images=others, duration=1000 // FRAMES_A_SECOND, loop=0)


def write_video(video: Tensor, file: str | Path | BinaryIO) -> None:
    """All of a video as an animated PNG, its values rounded to 8 bits."""
    write_film(lambda number: as_picture(video[:, number]), video.shape[1], file, "PNG")
