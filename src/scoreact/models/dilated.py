"""A dilated convolutional network for series, with or without classes: what `scoreact pretrain` learns series with.

After WaveNet and DiffWave (Kong et al. 2021, arXiv 2009.09761): residual blocks whose reach doubles from one to the next.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import fourier_features

HIGHEST = 30.0  # frequency of time: with higher ones each step of a sampler has an error of its own


class DilatedNet(nn.Module):
    """Maps x [B, channels, length], t [B] in [0, 1] and class indices [B] to an array of x's shape.

    Beside x it sees where in the series a value is. A multiple of x that depends on time and class is added to the output.

    Args:
        channels: of the series.
        length: values a series.
        classes: their number; the index `classes`, or no index at all, means "no class".
        width: channels of the blocks, a multiple of 8.
        rounds: how often the blocks go from reach 1 to the whole length.
    """

    places: Tensor

    def __init__(self, channels: int, length: int, classes: int = 0, width: int = 64, rounds: int = 2) -> None:
        super().__init__()
        self.config = dict(channels=channels, length=length, classes=classes, width=width, rounds=rounds)
        embedding = 2 * width
        place = torch.linspace(0, 1, length)
        waves = [f(math.pi * k * place) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
        self.register_buffer("places", torch.stack([place, *waves]), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding)
        self.stem = nn.Conv1d(channels + len(self.places), width, 1)
        reach = [2**i for i in range(max(1, math.ceil(math.log2(length)) - 1))] * rounds
        self.norm = nn.ModuleList(nn.GroupNorm(8, width) for _ in reach)
        self.wide = nn.ModuleList(nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in reach)
        self.film = nn.ModuleList(nn.Linear(embedding, 2 * width) for _ in reach)
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in reach)
        self.last = nn.GroupNorm(8, width)
        self.head = nn.Conv1d(width, channels, 1)
        self.gate = nn.Linear(embedding, channels)
        for layer in (*self.mix, self.head, self.gate):
            assert isinstance(layer, nn.Conv1d | nn.Linear)
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.with_features(x, t, label)[0]

    def with_features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, of x's shape, and the last block's channels, mean over the length [B, width]."""
        none = torch.full((len(x),), self.label.num_embeddings - 1, device=x.device) if label is None else label
        embedding = F.silu(self.time(fourier_features(t, 64, HIGHEST)) + self.label(none))
        h = self.stem(torch.cat([x, self.places.to(x).expand(len(x), -1, -1)], dim=1))
        for norm, wide, film, mix in zip(self.norm, self.wide, self.film, self.mix, strict=True):
            scale, shift = film(embedding).unsqueeze(2).chunk(2, dim=1)
            h = h + mix(F.silu(wide(norm(h)) * (1 + scale) + shift))
        output = self.head(F.silu(self.last(h)))
        return self.gate(embedding).unsqueeze(2) * x + output, h.mean(2)
