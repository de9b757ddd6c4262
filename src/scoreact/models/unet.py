"""A small class-conditional UNet for pictures: a few MB of weights, a few milliseconds a picture on a CPU.

Knows: feature maps, time and class embeddings. Does not know schedules, noise or what its output means.
The picture is folded to a quarter of its area (pixel-unshuffle) first, where the convolutions are cheap.
After Ho et al. 2020 (arXiv 2006.11239) and Dhariwal & Nichol 2021 (arXiv 2105.05233), reduced to what 28x28 needs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import Condition


def fourier_features(t: Tensor, dim: int) -> Tensor:
    """Cosines and sines of t [B] in [0, 1] at dim/2 frequencies from 1 to 1000, geometric: [B, dim]."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000.0), dim // 2, device=t.device, dtype=t.dtype))
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


class UNet(nn.Module):
    """Maps x [B, C, H, W], t [B] in [0, 1] and class indices [B] to an array of x's shape.

    H and W are padded to a multiple of 2^(levels) inside. A class index equal to `classes` means
    "no class" (the row used by classifier-free guidance).
    """

    def __init__(
        self,
        channels: int = 1,
        widths: tuple[int, ...] = (32, 64, 128),
        classes: int = 10,
        blocks: int = 1,
        heads: int = 4,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if any(w % 8 for w in widths):
            raise ValueError(f"widths {tuple(widths)} must be multiples of 8 (group normalisation has 8 groups)")
        self.config = dict(
            channels=channels, widths=list(widths), classes=classes, blocks=blocks, heads=heads, outputs=outputs
        )
        self.outputs = outputs or channels
        self.multiple = 2 ** len(widths)
        embedding = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding)
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = []
        width = widths[0]
        for level, w in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(width, w, 3, stride=2, padding=1))
                width = w
            for _ in range(blocks):
                self.down.append(ResBlock(width, w, embedding))
                width = w
                skips.append(w)
        self.middle1 = ResBlock(width, width, embedding)
        self.attention = Attention(width, heads)
        self.middle2 = ResBlock(width, width, embedding)
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                self.up.append(ResBlock(width + skips.pop(), w, embedding))
                width = w
            if level:
                self.up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.norm = nn.GroupNorm(8, width)
        self.head = nn.Conv2d(width, 4 * self.outputs, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None  # for the type checker: a convolution may have none
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.with_features(x, t, label)[0]

    def with_features(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and what the way up made of the picture: each block's channels, mean over positions, [B, F]."""
        h, (top, left) = fold(x, self.multiple)
        height, width = x.shape[-2:]
        features = []
        embedding = F.silu(self.time(fourier_features(t, 64)) + self.label(label))
        h = self.stem(h)
        skips = []
        for layer in self.down:
            if isinstance(layer, ResBlock):
                h = layer(h, embedding)
                skips.append(h)
            else:
                h = layer(h)
        h = self.middle2(self.attention(self.middle1(h, embedding)), embedding)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                h = layer(torch.cat([h, skips.pop()], 1), embedding)
                features.append(h.mean((2, 3)))
            else:
                h = layer(h)
        h = F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)
        return h[..., top : top + height, left : left + width], torch.cat(features, dim=1)


class Encoder(nn.Module):
    """A small convolutional value network F: pictures [B, C, H, W], t [B], class in `condition.embedding` -> [B].

    A class has its own offset. The picture's part starts at zero and is gated by t / sqrt(t^2 + (1 - t)^2): a state of pure
    noise says nothing about the sample, and what a denoiser makes of it there is error, which its gradient would amplify.
    """

    def __init__(self, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        embedding = 4 * widths[0]
        self.multiple = 2 ** len(widths)
        self.time = nn.Linear(64, embedding)
        self.label = nn.Embedding(classes + 1, embedding)
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            ResBlock(inputs, outputs, embedding)
            for inputs, outputs in zip((widths[0], *widths[:-1]), widths, strict=True)
        )
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], 1)
        self.offset = nn.Embedding(classes + 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.embedding is not None
        embedding = F.silu(self.time(fourier_features(t, 64)) + self.label(condition.embedding))
        h = self.stem(fold(x, self.multiple)[0])
        for level, block in enumerate(self.blocks):
            h = block(F.avg_pool2d(h, 2) if level else h, embedding)
        h = F.silu(self.norm(h)).mean((2, 3))
        gate = t / (t**2 + (1 - t) ** 2).sqrt()
        value: Tensor = gate * self.head(h)[:, 0] + self.offset(condition.embedding)[:, 0]
        return value
