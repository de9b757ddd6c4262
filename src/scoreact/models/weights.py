"""Weights: put into a model by the names of its parameters, written back into a user's own network, told apart by a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..support.errors import ModelError, RunError
from ..support.files import add_to_digest, read_tensors
from .base import HasAdapters, HasReferenceDigest


def load_weights(model: nn.Module, path: Path) -> None:
    """Put trained weights into a freshly built model.

    Args:
        model: the same model as the one that was trained; changed in place.
        path: model.safetensors of a run.

    Raises:
        RunError: a name or a shape that the model does not have.
    """
    load_parameters(model, read_tensors(path))


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of these names.

    Args:
        model: changed in place.
        tensors: by the names of `model.named_parameters()`; parameters without a tensor stay as they are.

    Raises:
        RunError: a name or a shape that the model does not have; then nothing is copied.
    """
    own = {name: p for name, p in model.named_parameters()}
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "no such parameter"
            raise RunError(
                f"the stored weights do not fit this model: {name} is {tuple(tensor.shape)} there, {have} here. "
                "Were they made by another recipe or with other options?"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def write_back(tuned: nn.Module, original: nn.Module, target: nn.Module | None = None) -> int:
    """Copy a tuned model's weights into the user's own network; adapters are added to the weights that they are beside.

    Args:
        tuned: the model with the weights that are wanted, of the same structure as `original`.
        original: the model that was given to training.
        target: where they go: None or `original` itself; a module inside `original`, such as the network that was wrapped;
            or another network whose names and shapes are those of one part of the model. Its dtype and device stay.

    Returns:
        The number of tensors written: parameters, and buffers that a state_dict holds.

    Raises:
        ModelError: the target is no part of the model and fits none, or fits several. Then nothing is written.
    """
    source = _tensors(tuned)
    target = original if target is None else target
    inside = next((name for name, module in original.named_modules() if module is target), None)
    wanted = _tensors(target)
    if inside is not None:
        prefix = f"{inside}." if inside else ""
    else:
        if isinstance(tuned, HasAdapters):
            source = _tensors(tuned.merged())
        fitting = [p for p in _prefixes(source, wanted) if not _misfits(_below(source, p), wanted)]
        if len(fitting) != 1:
            raise ModelError(_why_it_does_not_fit(source, target, fitting))
        prefix = fitting[0]
    part = _below(source, prefix)
    if wrong := _misfits(part, wanted):
        raise ModelError(f"the tuned weights do not fit {type(target).__name__}: {'; '.join(wrong[:3])}.")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if isinstance(tuned, HasAdapters) and inside is None:  # its memory may be that of the frozen weights
                tensor.data = tensor.clone()
            tensor.copy_(part[name])
    return len(wanted)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers, themselves and not copies, by their names."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prefixes(source: Mapping[str, Tensor], wanted: Iterable[str]) -> list[str]:
    """Of the source's names, every part before a dot, and nothing."""
    found = {""}
    for name in source:
        parts = name.split(".")
        found |= {".".join(parts[:k]) + "." for k in range(1, len(parts))}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _misfits(part: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps the tensors from filling all of the wanted ones, and no more."""
    wrong = [f"{name} is missing in the tuned model" for name in wanted if name not in part]
    wrong += [f"{name} is there in the tuned model alone" for name in part if name not in wanted]
    wrong += [
        f"{name} is {tuple(part[name].shape)} in the tuned model, {tuple(wanted[name].shape)} in the target"
        for name in wanted if name in part and part[name].shape != wanted[name].shape
    ]  # fmt: skip
    return wrong


def _why_it_does_not_fit(source: Mapping[str, Tensor], target: nn.Module, fitting: list[str]) -> str:
    name, wanted = type(target).__name__, _tensors(target)
    if not wanted:
        return f"{name} has no weights to write to; give the network that was tuned."
    if fitting:
        places = " and ".join(repr(prefix.rstrip(".")) for prefix in fitting)
        return f"{name} fits {places} of the tuned model alike; give the very module that the model was made with."
    nearest = min(_prefixes(source, wanted), key=lambda prefix: len(_misfits(_below(source, prefix), wanted)))
    wrong = _misfits(_below(source, nearest), wanted)
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return (
        f"{name} is no part of the model that was tuned, and fits none of its parts; the nearest, {nearest.rstrip('.')!r}, "
        f"differs: {'; '.join(wrong[:3])}{more}. Give a network built with the same options as the tuned one."
    )


def digest_of(model: nn.Module) -> str:
    """A fingerprint of all of a module's weights, to notice that they have changed.

    Args:
        model: any module; on any device.

    Returns:
        sha256 in hexadecimal over names, types, shapes and bytes of parameters and of buffers that a state_dict holds.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(_tensors(model).items()):
        add_to_digest(found, name, tensor)
    return found.hexdigest()


def reference_digest_of(model: object) -> str:
    """A fingerprint of the pretrained weights in a model: what it says itself (`HasReferenceDigest`), else `digest_of` it.

    Of a model that has been trained in place the second changes with training, the first does not.
    """
    if isinstance(model, HasReferenceDigest):
        return model.reference_digest()
    return digest_of(model) if isinstance(model, nn.Module) else ""
