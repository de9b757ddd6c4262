"""A small class-conditional UNet for pictures: a few MB of weights, a few milliseconds a picture on a CPU.

Knows: feature maps, time and class embeddings. Does not know schedules, noise or what its output means.
The picture is folded to a quarter of its area (pixel-unshuffle) first, where the convolutions are cheap.
After Ho et al. 2020 (arXiv 2006.11239) and Dhariwal & Nichol 2021 (arXiv 2105.05233), reduced to what 28x28 needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.errors import ModelError
from .layers import Attention, ResBlock, fold, fourier_features


class UNet(nn.Module):
    """Maps x [B, C, H, W], t [B] in [0, 1] and class indices [B] to an array of x's shape.

    H and W are padded to a multiple of 2^(levels) inside.

    Args:
        channels: C.
        widths: channels of the feature maps, one number a level, each a multiple of 8.
        classes: their number; the index `classes`, or no index at all, means "no class", for classifier-free guidance.
        blocks: residual blocks a level.
        heads: of the attention at the lowest level.
        outputs: channels out, C by default.

    Raises:
        ValueError: a width that is no multiple of 8.
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
            raise ModelError(f"widths {tuple(widths)} must be multiples of 8 (group normalisation has 8 groups)")
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

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.with_features(x, t, label)[0]

    def with_features(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, and what the way up made of the picture.

        Args:
            x, t, label: as of the network.

        Returns:
            The output [B, outputs, H, W], and each block's channels, mean over positions: [B, F].
        """
        h, (top, left) = fold(x, self.multiple)
        height, width = x.shape[-2:]
        features = []
        if label is None:
            label = torch.full((len(x),), self.label.num_embeddings - 1, device=x.device)
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
