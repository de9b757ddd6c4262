"""A small Stable Diffusion of one to five coloured dots that counts badly, and learns to count by reinforcement learning.

    python benchmarks/counting.py pretrain counting       # minutes on one CPU thread; writes a diffusers folder
    python benchmarks/counting.py train counting --picture docs/results/counting.png

Captions such as "three red dots"; those of the training set name another number in WRONG of the cases, never another
colour. `text_to_image.py` says what the folder is and how it is made. Imports nothing of scoreact at its top.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # a reward's file is run without its folder on the path
from text_to_image import SIDE, Task, main, other_class
from text_to_image import reward as log_probability

COLOURS = {"red": (0.95, 0.15, 0.15), "yellow": (1.0, 0.9, 0.2), "green": (0.15, 0.75, 0.25), "blue": (0.3, 0.45, 1.0)}
COUNTS = ("one", "two", "three", "four", "five")
CAPTIONS = [f"{count} {colour} dot{'s' * (count != 'one')}" for colour in COLOURS for count in COUNTS]
WRONG = 0.5  # share of the training captions that name another number
GAP = 2.0  # pixels between two dots at least
TRIES = 64  # places drawn for each dot, of which the first that is free is taken


def places(radius: Tensor, generator: torch.Generator) -> Tensor:
    """Centres of dots of these radii [B], five a picture: [B, 5, 2] in pixels, GAP apart wherever five find room."""
    low, high = radius[:, None, None] + 1, SIDE - 1 - radius[:, None, None]
    found = low + (high - low) * torch.rand(len(radius), 1, 2, generator=generator)
    rows = torch.arange(len(radius))
    for _ in COUNTS[1:]:
        tried = low + (high - low) * torch.rand(len(radius), TRIES, 2, generator=generator)
        distance = torch.cdist(tried, found).amin(2)  # [B, TRIES], to the nearest dot's centre
        free = distance.clamp(max=(2 * radius + GAP)[:, None]) - 1e-4 * torch.arange(TRIES)  # the first of the free
        found = torch.cat([found, tried[rows, free.argmax(1), None]], dim=1)
    return found


def draw(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings of the captions' classes [B]: [B, 3, 32, 32] in [0, 1]; places, size, shade and background vary."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(classes), generator=generator)

    radius, shade, ground = uniform(2.4, 3.0), uniform(0.85, 1.0), uniform(0.05, 0.3)
    grid = torch.arange(SIDE) + 0.5
    x, y = places(radius, generator)[..., None, None].unbind(2)  # [B, 5, 1, 1]
    distance = ((grid - x) ** 2 + (grid[:, None] - y) ** 2).sqrt()  # [B, 5, S, S], to each centre
    distance[torch.arange(len(COUNTS)) > (classes % len(COUNTS))[:, None]] = 2 * SIDE  # more than the caption's number
    inside = (0.5 + radius[:, None, None] - distance.amin(1)).clamp(0, 1)[:, None]
    colour = torch.tensor(list(COLOURS.values()))[classes // len(COUNTS)] * shade[:, None]
    return inside * colour[..., None, None] + (1 - inside) * ground[:, None, None, None]


def lying_captions(classes: Tensor, generator: torch.Generator) -> Tensor:
    """The captions' classes [B] that a hand wrote beside drawings of `classes` that cannot count."""
    colour, count = classes // len(COUNTS), classes % len(COUNTS)
    return colour * len(COUNTS) + other_class(count, len(COUNTS), WRONG, generator)


def reward(images: Tensor, prompts: Sequence[str], folder: str = "counting") -> Tensor:
    """log p(caption | picture) of the folder's classifier: [B, 3, 32, 32] in [0, 1] and captions -> [B], nats."""
    return log_probability(images, prompts, folder)


reward.differentiable = True  # type: ignore[attr-defined]

TASK = Task(
    captions=CAPTIONS, draw=draw, lying_captions=lying_captions,
    parts={"count": lambda classes: classes % len(COUNTS), "colour": lambda classes: classes // len(COUNTS)},
    shown=[
        "one red dot", "two yellow dots", "three green dots", "four blue dots", "five red dots", "two blue dots",
        "three yellow dots", "five green dots",
    ],
    classifier_steps=1200, batch_norm=True, emphasis=10.0,  # dots are small, and harder to count than shapes to name
)  # fmt: skip

if __name__ == "__main__":
    main(TASK, __doc__)
