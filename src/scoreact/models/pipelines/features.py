"""The features inside a denoiser's pass, which a value can read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


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
