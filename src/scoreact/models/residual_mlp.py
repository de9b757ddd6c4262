"""A residual multilayer perceptron for vectors, with or without classes: what `scoreact pretrain` learns tables with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import fourier_features

HIGHEST = 30.0  # frequency of time: with higher ones each step of a sampler has an error of its own


class ResidualMLP(nn.Module):
    """Maps x [B, dim], t [B] in [0, 1] and class indices [B] to an array of x's shape.

    The output is a multiple of x that depends on time and class, coordinate by coordinate, plus what the blocks say: the first
    alone is exact for independent Gaussians.

    Args:
        dim: numbers in x.
        classes: their number; the index `classes`, or no index at all, means "no class".
        width: of the blocks.
        blocks: their number.
    """

    def __init__(self, dim: int, classes: int = 0, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.config = dict(dim=dim, classes=classes, width=width, blocks=blocks)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.stem = nn.Linear(dim, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.film = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.gate = nn.Linear(width, dim)
        self.head = nn.Linear(width, dim)
        for layer in (*self.second, self.gate, self.head):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.with_features(x, t, label)[0]

    def with_features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output [B, dim], and what the last block made of x [B, width]."""
        none = torch.full((len(x),), self.label.num_embeddings - 1, device=x.device) if label is None else label
        embedding = F.silu(self.time(fourier_features(t, 64, HIGHEST)) + self.label(none))
        h = self.stem(x)
        for first, film, second in zip(self.first, self.film, self.second, strict=True):
            scale, shift = film(embedding).chunk(2, dim=1)
            h = h + second(F.silu(first(h) * (1 + scale) + shift))
        return self.gate(embedding) * x + self.head(F.silu(h)), h
