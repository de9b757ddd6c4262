"""Stored weights put into a model, by the names of its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..support.errors import ModelError
from ..support.files import read_tensors


def load_weights(model: nn.Module, path: Path) -> None:
    """Put trained weights (model.safetensors of a run) into a freshly built model. ValueError if they do not fit."""
    load_parameters(model, read_tensors(path))


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of these names. ValueError if one does not fit."""
    own = {name: p for name, p in model.named_parameters()}
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "no such parameter"
            raise ValueError(
                f"the stored weights do not fit this model: {name} is {tuple(tensor.shape)} there, {have} here. "
                "Were they made by another recipe or with other options?"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def digest_of(model: object) -> str:
    """A sha256 of all parameters and buffers, names and shapes included: two models of one digest compute the same."""
    own = getattr(model, "reference_digest", None)
    if callable(own):
        return str(own())
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items() if isinstance(model, nn.Module) else ():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_back(tuned: nn.Module, original: nn.Module, target: nn.Module | None = None) -> int:
    """Copy the trained parameters of `tuned` into `target`; returns how many were written.

    target: the original model, one of its submodules, or another network of the same shape. Raises ModelError otherwise.
    """
    names = {name for name, p in original.named_parameters() if p.requires_grad}
    tensors = {name: p for name, p in tuned.named_parameters() if name in names}
    if target is not None and target is not original:
        inside = next((name for name, module in original.named_modules() if module is target), None)
        own = dict(target.named_parameters())
        places = [inside] if inside is not None else [name for name, _ in original.named_modules()]
        for place in places:
            prefix = f"{place}." if place else ""
            moved = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if len(moved) == len(tensors) and all(n in own and own[n].shape == t.shape for n, t in moved.items()):
                tensors = moved
                break
        else:
            raise ModelError(f"the tuned weights do not fit {type(target).__name__}; give the network that was tuned.")
    load_parameters(target if target is not None else original, tensors)
    return len(tensors)
