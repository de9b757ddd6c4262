"""A small network on decoded samples, whose last layer is features. Training it on answers is `feedback`'s business."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32  # features
SIDE = 32  # pixels a side at about which pictures are seen


class SampleNetwork(nn.Module):
    """Samples [B, *D] of one shape -> [B, 32]. Of pictures by convolutions, of videos by those of their frames, averaged.

    mean, scale: of the samples, by which they are standardised: one number of pictures, one a coordinate of others.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        size = () if len(shape) > 2 else tuple(shape)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], 16, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.SiLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, WIDTH), nn.SiLU(),
        ) if len(shape) > 2 else nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
            nn.Linear(64, WIDTH), nn.SiLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            return self(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), x.shape[2])).mean(1)
        x = (x - self.mean) / self.scale
        return self.layers(F.avg_pool2d(x, max(1, min(x.shape[2:]) // SIDE)) if x.ndim == 4 else x)
