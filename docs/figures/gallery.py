"""The pictures of README and gallery, from run folders.

    scoreact train gaussian; scoreact train series; scoreact train plain; scoreact train bright
    python docs/figures/gallery.py runs/*-001        # writes docs/figures/RECIPE.png, each under 150 kB

Points and series are the report's own figure. Pictures are drawn as columns of a prompt: above the pretrained model's, below
the tuned model's, from the same noise.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import scoreact as sa

HERE = Path(__file__).resolve().parent
LIMIT = 150_000  # bytes
SCALE, ROWS = 3, 2  # pixels a pixel, pictures a prompt
LEFT, GAP = 74, 10  # pixels for the words, between before and after


def strip(before: Tensor, after: Tensor, columns: int) -> Image.Image:
    """Two blocks of ROWS rows: [columns x ROWS, 1 or 3, H, W] in [0, 1], each prompt's pictures together."""
    blocks = []
    for samples in (before, after):
        pixels = (samples.clamp(0, 1) * 255).round().byte().numpy().repeat(SCALE, 2).repeat(SCALE, 3)
        grid = pixels.reshape(columns, ROWS, *pixels.shape[1:])
        padded = np.pad(grid, ((0, 0),) * 3 + ((1, 1), (1, 1)), constant_values=255)
        rows = [np.concatenate(list(padded[:, row]), axis=2) for row in range(ROWS)]
        blocks.append(np.concatenate(rows, axis=1))
    height, width = blocks[0].shape[1:]
    canvas = Image.new("L" if len(blocks[0]) == 1 else "RGB", (LEFT + width, 2 * height + GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for block, word, top in zip(blocks, ("before", "after"), (0, height + GAP), strict=True):
        canvas.paste(Image.fromarray(block[0] if len(block) == 1 else block.transpose(1, 2, 0)), (LEFT, top))
        pen.text((LEFT - 6, top + height // 2), word, "black" if canvas.mode == "RGB" else 0, font, anchor="rm")
    return canvas


def picture(run: sa.SavedRun) -> Image.Image:
    """What a run makes of its samples."""
    before, after = (run.sample(count=ROWS, seed=1, reference=which) for which in (True, False))
    if before.ndim == 4 and before.shape[1] in (1, 3):
        return strip(before, after, len(run.problem.prompts))
    file = io.BytesIO()
    run.plot().savefig(file, format="png", dpi=80, bbox_inches="tight")
    return Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for folder in parser.parse_args().runs:
        path = HERE / f"{folder.name.rpartition('-')[0]}.png"
        picture(sa.open_run(folder)).save(path, optimize=True)
        size = path.stat().st_size
        print(f"{path}: {size / 1000:.0f} kB")
        if size > LIMIT:
            raise SystemExit(f"{path} is larger than {LIMIT / 1000:.0f} kB; draw fewer or smaller pictures.")


if __name__ == "__main__":
    main()
