"""The layers of the small networks here: time features, folding, residual blocks with an embedding, attention.

After Ho et al. 2020 (arXiv 2006.11239) and Dhariwal & Nichol 2021 (arXiv 2105.05233), reduced to what 28x28 needs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fourier_features(t: Tensor, dim: int, highest: float = 1000.0) -> Tensor:
    """Cosines and sines of t [B] in [0, 1] at dim/2 frequencies from 1 to `highest`, geometric: [B, dim]."""
    frequencies = torch.exp(torch.linspace(0, math.log(highest), dim // 2, device=t.device, dtype=t.dtype))
    angles = t.reshape(-1, 1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def fold(x: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """x [B, C, H, W] padded to a multiple, then each 2x2 block as 4 channels; also the padding's top and left."""
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    top, left = bottom // 2, right // 2
    padded = F.pad(x, (left, right - left, top, bottom - top))
    # not channels_last: torch's group normalisation on a CPU is many times slower there, which outweighs faster convolutions
    return F.pixel_unshuffle(padded, 2), (top, left)


class ResBlock(nn.Module):
    """x + conv(silu(film(norm(conv(silu(norm(x))))))), the embedding entering as scale and shift."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding).reshape(len(x), -1, 1, 1).chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the positions of a feature map."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, height, width)
        return x + self.out(h)
