"""Where to compute: the device that a setting names, the one a model is on, and what this processor does fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import SettingError


@runtime_checkable
class HasDevice(Protocol):
    """Says where a model computes, where its parameters do not: it has none, or they are not all of it."""

    @property
    def device(self) -> torch.device:
        """Where states, times and generators have to be."""
        ...


def choose_device(name: str) -> torch.device:
    """auto: CUDA, else MPS, else CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(f"device is {name!r}; known: auto, cpu, cuda, cuda:N, mps.") from None
    if (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise SettingError(f"device {name!r} is not available on this machine; use device auto or cpu.")
    return device


def device_of(model: object) -> torch.device:
    """Where a model computes: its `device` if it says so, else that of its first parameter, else the CPU."""
    if isinstance(model, HasDevice) and isinstance(model.device, torch.device):
        return model.device
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


def in_double(x: Tensor) -> Tensor:
    """x in float64, where it is; on the CPU where its device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def bfloat16_pays() -> bool:
    """Whether this CPU has instructions for bfloat16 (AMX or AVX512-BF16), where it is the faster type."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@contextlib.contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """Whether float32 products may be made in TF32 meanwhile. torch's default: convolutions yes, matrices no."""
    if not torch.cuda.is_initialized():
        yield
        return
    switches: list[tuple[Any, str, Any]]
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9, which refuses to mix it with the older
        word = "tf32" if allowed else "ieee"
        switches = [(part, "fp32_precision", word) for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]  # type: ignore[attr-defined]
    else:
        switches = [(part, "allow_tf32", allowed) for part in (torch.backends.cuda.matmul, torch.backends.cudnn)]
    before = [getattr(part, name) for part, name, _ in switches]
    for part, name, value in switches:
        setattr(part, name, value)
    try:
        yield
    finally:
        for (part, name, _), value in zip(switches, before, strict=True):
            setattr(part, name, value)
