"""A value network on the denoiser's own features: no second large network.

The denoiser has learned what matters in a noised picture under its prompt; a small MLP reads the value off the mean of its
mid-block (UNet) or last block (transformer). Knows features and time; where they come from is the model's business.
After Explicit Critic Guidance (arXiv 2605.27736), without its own pretraining: the first fit, on the reference's paths, is it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import distributed
from ..types import Condition
from .mlp import MLP


class FeatureValue(nn.Module):
    """F: features [B, F] of the pretrained network at (t, x), t [B] -> [B]; zero at first.

    The features know the prompt, so prompts never seen before need no row of their own. Each is standardised by its mean and
    spread in the first batch seen: a denoiser's channels differ by orders of magnitude, and most of each is a constant.
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
