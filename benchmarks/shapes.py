"""A small Stable Diffusion that knows coloured shapes, and its prompt alignment improved by reinforcement learning.

    python benchmarks/shapes.py pretrain shapes       # minutes on one CPU thread; writes a diffusers folder
    python benchmarks/shapes.py train shapes --picture docs/results/shapes.png

Captions such as "a red circle"; those of the training set name another colour or shape in WRONG of the cases.
`text_to_image.py` says what the folder is and how it is made. Imports nothing of scoreact at its top.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # a reward's file is run without its folder on the path
from text_to_image import Task, main, other_class
from text_to_image import reward as log_probability

SIDE = 32
COLOURS = {
    "red": (0.9, 0.1, 0.1), "orange": (1.0, 0.55, 0.0), "yellow": (1.0, 0.95, 0.2), "green": (0.1, 0.7, 0.2),
    "cyan": (0.2, 0.9, 0.95), "blue": (0.15, 0.25, 0.95), "pink": (1.0, 0.5, 0.8), "white": (1.0, 1.0, 1.0),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]  # a caption's place is its class
WRONG = 0.4  # share of the training captions that name another colour, another shape, or both


def draw(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings of the captions' classes [B]: [B, 3, 32, 32] in [0, 1]; place, size, shade and background vary."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(classes), 1, 1, generator=generator)

    grid = torch.arange(SIDE) + 0.5
    size, shade, ground = uniform(6, 10), uniform(0.85, 1.0), uniform(0.05, 0.3)
    x, y = grid - uniform(12, 20), grid[:, None] - uniform(12, 20)  # [B, 1, S] and [B, S, 1], pixels from the centre
    distances = torch.stack(  # to each shape's edge in pixels, negative inside
        [
            (x**2 + y**2).sqrt() - size,
            torch.maximum(x.abs(), y.abs()) - 0.85 * size,
            torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.6 * size,
        ]
    )
    distance = distances[classes % len(SHAPES), torch.arange(len(classes))]
    inside = (0.5 - distance).clamp(0, 1)[:, None]
    colour = torch.tensor(list(COLOURS.values()))[classes // len(SHAPES), :, None, None]
    return inside * colour * shade[:, None] + (1 - inside) * ground[:, None]


def lying_captions(classes: Tensor, generator: torch.Generator) -> Tensor:
    """The captions' classes [B] that a careless hand wrote beside drawings of `classes`."""
    return other_class(classes, len(CAPTIONS), WRONG, generator)


def reward(images: Tensor, prompts: Sequence[str], folder: str = "shapes") -> Tensor:
    """log p(caption | picture) of the folder's classifier: [B, 3, 32, 32] in [0, 1] and captions -> [B], nats."""
    return log_probability(images, prompts, folder)


reward.differentiable = True  # type: ignore[attr-defined]

TASK = Task(
    captions=CAPTIONS, draw=draw, lying_captions=lying_captions,
    parts={"colour": lambda classes: classes // len(SHAPES), "shape": lambda classes: classes % len(SHAPES)},
    shown=[
        "a red circle", "a orange square", "a yellow triangle", "a green circle", "a cyan square", "a blue triangle",
        "a pink circle", "a white square",
    ],
)  # fmt: skip

if __name__ == "__main__":
    main(TASK, __doc__)
