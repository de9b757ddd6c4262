"""A value network on the denoiser's own features: no second large network.

The denoiser has learned what matters in a noised picture under its prompt; a small MLP reads the value off the mean of its
mid-block (UNet) or last block (transformer). Knows features and time; where they come from is the model's business.
After Explicit Critic Guidance (arXiv 2605.27736), without its own pretraining: the first fit, on the reference's paths, is it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support import distributed
from ..types import Condition
from .layers import ResBlock, fold, fourier_features
from .mlp import MLP
from .prompt_words import bag_of_words


class FeatureValue(nn.Module):
    """F: features [B, F] of the pretrained network at (t, x), t [B] -> [B]; zero at first.

    The features know the prompt, so prompts never seen before need no row of their own. Each is standardised by its mean and
    spread in the first batch seen: a denoiser's channels differ by orders of magnitude, and most of each is a constant.

    Args:
        features: F.
        width: of the two hidden layers.
    """

    inputs: ClassVar[str] = "features"  # what `ValueNetwork` then asks the reference for
    mean: Tensor
    std: Tensor
    seen: Tensor

    def __init__(self, features: int, width: int = 128) -> None:
        super().__init__()
        self.net = MLP(features, 1, width, 2, zero_last=True)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if not bool(self.seen) and len(x) > 1:
            with torch.no_grad():
                self.mean.copy_(x.mean(0))
                self.std.copy_(x.std(0) + 1e-6)
                distributed.average([self.mean, self.std])
                self.seen.fill_(True)
        value: Tensor = self.net((x - self.mean) / self.std, t)[:, 0]
        return value


class VectorValue(nn.Module):
    """F for points and short series: (x flattened to [B, inputs], t [B], condition) -> [B]; zero at first.

    Args:
        inputs: numbers in what it sees; twice a state's where it sees the state and x_data_hat.
        width: of the two hidden layers.
    """

    def __init__(self, inputs: int, width: int = 128) -> None:
        super().__init__()
        self.net = MLP(inputs, 1, width, 2, zero_last=True)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        value: Tensor = self.net(x, t)[:, 0]
        return value


class Encoder(nn.Module):
    """A small convolutional value network F: pictures [B, C, H, W], t [B], condition -> [B].

    A class has its own offset, or, where there are too many prompts to learn one for each, a word has. The picture's part
    starts at zero and is gated by t / sqrt(t^2 + (1 - t)^2): a state of pure noise says nothing about the sample, and what a
    denoiser makes of it there is error, which its gradient would amplify.

    Args:
        channels: C.
        widths: channels of the feature maps, one number a level, each a multiple of 8.
        classes: the number of prompts; one whose `condition.rows` is not below it is taken for their average.
        words: 0, or the size of the vectors of words (`bag_of_words`) that prompts are told apart by instead.
    """

    def __init__(
        self, channels: int = 1, widths: tuple[int, ...] = (16, 32, 64), classes: int = 10, words: int = 0
    ) -> None:
        super().__init__()
        self.classes, self.words = classes, words
        embedding = 4 * widths[0]
        self.multiple = 2 ** len(widths)
        self.time = nn.Linear(64, embedding)
        self.label = nn.Embedding(words or classes + 1, embedding)
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            ResBlock(inputs, outputs, embedding)
            for inputs, outputs in zip((widths[0], *widths[:-1]), widths, strict=True)
        )
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Linear(widths[-1], 1)
        self.offset = nn.Embedding(words or classes + 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        label, offset = self._of_prompt(self.label, condition), self._of_prompt(self.offset, condition)
        embedding = F.silu(self.time(fourier_features(t, 64)) + label)
        h = self.stem(fold(x, self.multiple)[0])
        for level, block in enumerate(self.blocks):
            h = block(F.avg_pool2d(h, 2) if level else h, embedding)
        h = F.silu(self.norm(h)).mean((2, 3))
        gate = t / (t**2 + (1 - t) ** 2).sqrt()
        value: Tensor = gate * self.head(h)[:, 0] + offset[:, 0]
        return value

    def _of_prompt(self, table: nn.Embedding, condition: Condition) -> Tensor:
        """What a table of classes or words says of each sample's prompt, [B, E]."""
        if self.words:
            return bag_of_words(condition.prompts, self.words).to(table.weight) @ table.weight
        assert condition.rows is not None
        known = table.weight[: self.classes]
        return torch.cat([known, known.mean(0, keepdim=True)])[condition.rows.clamp(max=self.classes)]

    def unknown(self, condition: Condition) -> list[str]:
        """The prompts that have no row of their own."""
        if self.words or condition.rows is None:
            return []
        beyond = (condition.rows >= self.classes).tolist()
        return list(dict.fromkeys(prompt for prompt, new in zip(condition.prompts, beyond, strict=True) if new))
