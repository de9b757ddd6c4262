"""The features inside a denoiser's pass, which a value can read: its mid-block's output, or what leaves its last block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...support.errors import ModelError
from ...types import Condition

if TYPE_CHECKING:
    from .families import Family


class _Enough(Exception):
    """Ends a forward pass of which only the features are wanted."""


@contextlib.contextmanager
def reading(network: Any, stop: bool = False) -> Iterator[list[Tensor]]:
    """A list that fills with the features [B, F] of each of the network's passes; stop: each ends where they are read."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> None:  # [B, F, H, W] of a UNet, [B, positions, F] of a transformer
        found.append(hidden.float().mean((2, 3) if hidden.ndim == 4 else 1))
        if stop:
            raise _Enough

    if hasattr(network, "mid_block"):
        handle = network.mid_block.register_forward_hook(lambda module, inputs, output: keep(output))
    else:
        handle = network.norm_out.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))
    try:
        with contextlib.suppress(_Enough):
            yield found
    finally:
        handle.remove()


def features_at(family: Family, network: nn.Module, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
    """What the network makes of a state inside, under the prompt alone. The pass ends where they are read.

    Args:
        family: of the pipeline.
        network: the denoiser, or a copy of it.
        t, x: times [B] and states [B, *D].
        condition: of the B samples; guidance does not enter.

    Returns:
        The mid-block's output (UNet) or what leaves the last block (transformer), mean over positions: [B, F] float32.
    """
    parts, rows = [], family.rows_of(condition)
    for index, count in family.calls(x):
        with reading(network, stop=True) as found:
            family.predict_rows(network, t[index], x[index], rows[index], guided=False)
        parts.append(found[0][:count])
    return torch.cat(parts)


def prediction_and_features(
    family: Family, network: nn.Module, t: Tensor, x: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    """The guided prediction [B, *D] and the features [B, F] of `features_at`, by the same pass."""
    with reading(network) as found:
        output = family.predict(network, t, x, condition)
    size = family.rows_per_call or len(x)
    return output, torch.cat([part[-size:] for part in found])[: len(x)]  # guided: the prompt's half is the second


def feature_width(family: Family) -> int:
    """F of `features_at`. Raises ModelError for a UNet without a mid-block."""
    config = family.denoiser.config
    if family.component == "unet":
        if family.denoiser.mid_block is None:
            raise ModelError("this UNet has no mid-block whose features a value could read; use the encoder.")
        return int(config.block_out_channels[-1])
    return int(config.num_attention_heads * config.attention_head_dim)
