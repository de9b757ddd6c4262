"""Stored weights put into a model, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

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
