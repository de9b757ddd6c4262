"""A device that is not there, for tests: as strict as Apple's MPS, and computed on the CPU.

Tensors on it are a subclass that says so. There is no float64 on it and no eigenvalue; numpy cannot read it; a tensor made
without naming the device is on the CPU and does not mix with these (but for a single number and an index, as in torch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("mps")
CPU = torch.device("cpu")
MISSING = {torch.linalg.eigh, torch.linalg.eigvalsh, torch.linalg.svd, torch.linalg.lstsq, torch.linalg.eig}
STAYS = {Tensor.numpy, Tensor.__array__, torch.from_numpy}
MAY_MIX = {Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_, torch._has_compatible_shallow_copy_type}


class OnDevice(Tensor):
    """A tensor over there."""


class Generator(torch.Generator):
    """torch.Generator that remembers where it was made for."""

    place = CPU

    def __new__(cls, device: Any = "cpu") -> Generator:
        new = super().__new__(cls, "cpu")
        new.place = torch.device(device)
        return new

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


def place_of(x: Tensor) -> torch.device:
    return THERE if isinstance(x, OnDevice) else CPU


def moved(x: Tensor, place: torch.device) -> Tensor:
    if place_of(x) == place:
        return x
    if place == THERE and x.dtype == torch.float64:
        raise TypeError("float64 cannot be moved there: the device has none")
    x = x.clone()
    return x.as_subclass(OnDevice) if place == THERE else x.as_subclass(Tensor)


class Strict(TorchFunctionMode):
    """Refuses what the device would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, OnDevice) for x in tensors)
        if func == Tensor.device.__get__:
            return place_of(args[0])
        if func == Tensor.grad.__get__ and there:  # autograd makes plain ones
            found = func(*args)
            return None if found is None else found.as_subclass(OnDevice)
        if func is Tensor.cpu:
            return moved(args[0], CPU)
        if func is Tensor.__deepcopy__ and there:
            return copied(*args)
        if there and func in STAYS:
            raise TypeError(f"{func.__name__} of a tensor on {THERE}; use .cpu() first")
        if there and func in MISSING:
            raise NotImplementedError(f"{func.__name__} is not implemented on {THERE}")
        if func is Tensor.to:
            return sent(*args, **kwargs)
        target = None
        if there and func not in MAY_MIX and any(x.ndim and not isinstance(x, OnDevice) for x in tensors):
            raise RuntimeError(f"{getattr(func, '__name__', func)} of tensors on {THERE} and on the CPU")
        if kwargs.get("device") is not None:
            target = torch.device(kwargs.pop("device"))
        generator = kwargs.get("generator")
        if isinstance(generator, Generator):
            wanted = target or (THERE if there else CPU)
            if generator.place.type != wanted.type:
                raise RuntimeError(f"a generator of {generator.place} draws on {wanted}")
        found = func(*args, **kwargs)
        if target is not None:
            found = tree_map(lambda x: moved(x, target) if isinstance(x, Tensor) else x, found)
        for x in tree_leaves(found):
            if isinstance(x, OnDevice) and x.dtype == torch.float64:
                raise TypeError(f"{getattr(func, '__name__', func)} makes float64 on {THERE}, which has none")
        return found


def sent(x: Tensor, *how: Any, **named: Any) -> Tensor:
    """Tensor.to."""
    given = [*how, *named.values()]
    like = next((y for y in given if isinstance(y, Tensor)), None)
    dtype = like.dtype if like is not None else next((y for y in given if isinstance(y, torch.dtype)), x.dtype)
    places = [torch.device(y) for y in given if isinstance(y, str | torch.device)]
    place = place_of(like) if like is not None else places[0] if places else place_of(x)
    if place == CPU:
        return moved(x, CPU).to(dtype)
    if dtype == torch.float64:
        raise TypeError("float64 cannot be moved there: the device has none")
    return moved(x.to(dtype), place)


def copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(x) not in memo:
        new = x.detach().clone().requires_grad_(x.requires_grad)
        if getattr(x, "_is_param", False):
            new._is_param = True  # type: ignore[attr-defined]
        memo[id(x)] = new
    return memo[id(x)]


@contextmanager
def strict_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], bool]]:
    """`auto` finds the device, which is strict; gives the test for whether a tensor is on it."""
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Strict():
            yield lambda x: isinstance(x, OnDevice)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
