"""Layerwise casting: weights stored in half precision, activations and products in float32, one layer at a time.

Policy and reference differ by little, and a network that rounds its activations to 8 or 11 bits draws their difference anew
with every change of a weight (`training.rounding`). The stored weights are what they are; it is the activations that must
not be rounded. A layer's weights are cast when it is called and the copy is let go, in the backward pass too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as gradients

from ...support.devices import tensor_cores

Product = Callable[..., Tensor]  # (x, weight, bias or None) -> [B, ...], linear in x and in weight

CONVOLUTIONS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # forward, gradient of x
    nn.Conv1d: (F.conv1d, gradients.conv1d_input),
    nn.Conv2d: (F.conv2d, gradients.conv2d_input),
    nn.Conv3d: (F.conv3d, gradients.conv3d_input),
}


def compute_in_float32(network: nn.Module) -> None:
    """From now on the network's frozen layers take float32 inputs, and give float32 outputs, whatever they are stored in.

    Inputs of another dtype are computed with as before: in plain diffusers the pipeline stays what it was. Parameters keep
    dtype, name and place; of an adapter that the pipeline came with they become float32.
    """
    for name, p in network.named_parameters():
        if ".lora_" in name:  # peft would round the inputs to an adapter's dtype
            p.data = p.data.float()
    for layer in network.modules():
        if any(True for _ in layer.parameters(recurse=False)) and not any(True for _ in layer.children()):
            layer.forward = functools.partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *inputs: Any, **named: Any) -> Any:
    plain = type(layer).forward
    own = [p for p in layer._parameters.values() if p is not None]
    plenty = all(p.dtype == torch.float32 for p in own) and not x.is_cuda  # there is nothing to cast
    if x.dtype != torch.float32 or plenty or any(p.requires_grad for p in own):
        return plain(layer, x, *inputs, **named)
    if type(layer) is nn.Linear or (type(layer) in CONVOLUTIONS and layer.padding_mode == "zeros"):
        return _Product.apply(x, layer.weight, layer.bias, layer)
    with _cast(layer):
        return plain(layer, x, *inputs, **named)


@contextlib.contextmanager
def _cast(layer: nn.Module) -> Iterator[None]:
    """With float32 copies of the layer's own parameters, for the few bytes of a norm."""
    stored = dict(layer._parameters)
    layer._parameters.update({name: None if p is None else p.float() for name, p in stored.items()})  # type: ignore[misc]
    try:
        yield
    finally:
        layer._parameters.update(stored)


class _Product(torch.autograd.Function):
    """A linear layer or a convolution with a frozen weight. It keeps the weight as it is stored, not its float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layer, ctx.shape = layer, x.shape
        product: Product = F.linear
        if type(layer) is not nn.Linear:
            product = functools.partial(CONVOLUTIONS[type(layer)][0], **_places(layer))
        bias = None if bias is None else bias.float()
        return multiply(product, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (weight,) = ctx.saved_tensors
        with tensor_cores(gradient.is_cuda):  # a gradient needs no more than TF32's 11 bits
            if type(ctx.layer) is nn.Linear:
                return gradient @ weight.float(), None, None, None
            transposed = CONVOLUTIONS[type(ctx.layer)][1]
            return transposed(ctx.shape, weight.float(), gradient, **_places(ctx.layer)), None, None, None


def _places(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


# --- float32 on tensor cores ---------------------------------------------------------------------------------------------


def multiply(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """product(x, weight, bias) in float32."""
    return in_two_parts(product, x, weight, bias) if x.is_cuda else product(x, weight.float(), bias)


def in_two_parts(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """product(x, weight, bias) to about 22 bits by products of TF32, which keeps 11 bits of each factor.

    x = high + low, of which each has 11 bits or few more, so that nothing is lost but low's last two. A weight stored in
    bfloat16 or float16 has 8 or 11 bits: two products. One in float32 is taken in two parts as well: three.
    """
    high, low = parts(x)
    with tensor_cores(x.is_cuda):
        if weight.dtype != torch.float32:
            return product(low, weight.float(), None) + product(high, weight.float(), bias)
        strong, weak = parts(weight)
        return product(low, strong, None) + product(high, weak, None) + product(high, strong, bias)


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """x's first 11 bits, by cutting off the other 13, and what they leave. x float32."""
    high = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, x - high
