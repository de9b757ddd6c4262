"""Low-rank adapters on any model, by peft: training changes the adapters alone, and the pretrained model is the rest.

Every view of the model (the policy, its average, the reference) is a tree of modules of its own around the same frozen
tensors. Knows layers and the model contract; peft is imported when the first adapter is made. LoRA: Hu et al. 2021
(arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..support.errors import ModelError
from ..support.names import did_you_mean
from .base import HasReference, ScoreModel

M = TypeVar("M", bound=nn.Module)
ADAPTER = "default"  # peft's name for it, which is part of the names of its weights
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADDED = ("reference", "merged")  # members that a model gets with its adapters


def lora(model: M, rank: int = 8, targets: str | Sequence[str] | None = None) -> M:
    """A model with low-rank adapters on its layers, which are all that training then changes.

    The model that is given stays as it is: the new one shares its weights, and nothing writes to them. The adapters' first
    weights come from torch's global generator; their sum is zero, so that the new model's score is the old one's bit for bit.

    Args:
        model: an nn.Module with the members of `ScoreModel`, such as a `NetworkModel`.
        rank: of each adapter, which adds up * down with down [rank, inputs] to a layer's weight; a convolution's inputs are
            its channels times the kernel's positions.
        targets: names of layers, whole or their ends ("q", "blocks.3.q"). None: every Linear and convolution that can carry
            adapters and is not frozen where others are not.

    Returns:
        The new model, of a class derived from the old one's, with `reference()` and `merged()` too.

    Raises:
        ModelError: no layer has that name, a named one cannot carry an adapter (the message says why), or none can.
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"low-rank adapters need peft ({error}); pip install 'scoreact[lora]'.") from None
    _check(model, rank)
    chosen = _chosen(model, rank, None if targets is None else [targets] if isinstance(targets, str) else list(targets))
    view = _sharing(model)
    # one expression that names each layer in full: peft takes the names of a list for the ends of names
    names = "|".join(re.escape(name) for name in chosen)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), view, ADAPTER)
    for parameter in adapter_of(view).values():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # Adam's steps would round to nothing
    for module in view.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused form for inference reads the weights past the adapters
    kind: Any = type(model)
    view.__class__ = _with_adapters(kind)
    return view


class _Adapted:
    """What a model's own class gets with adapters."""

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        """A model with adapters of its own around the same frozen weights."""
        own = {id(parameter) for parameter in adapter_of(self).values()}
        memo.update({id(x): x for x in (*self.parameters(), *self.buffers()) if id(x) not in own})
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def reference(self: Any) -> ScoreModel:
        """The pretrained model, of the class that was given: the same weights without the adapters."""
        return _plain(self, merged=False)

    def merged(self: Any) -> nn.Module:
        """A plain model with the adapters added to its weights."""
        return _plain(self, merged=True)


@functools.cache
def _with_adapters(kind: Any) -> Any:
    return type(f"LoRA{kind.__name__}", (_Adapted, kind), {})


def adapter_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' weights by name; none of a model without."""
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def described(model: nn.Module) -> list[str]:
    """What `scoreact check model` says of a model's adapters: nothing of a model without."""
    layers = _adapted_layers(model)
    if not layers:
        return []
    rank = next(iter(layers.values())).r[ADAPTER]
    kinds = Counter(type(layer.get_base_layer()).__name__ for layer in layers.values())
    numbers, frozen = sum(p.numel() for p in adapter_of(model).values()), sum(p.numel() for p in model.parameters())
    lines = [
        f"fine: adapters of rank {rank} on {len(layers)} layers ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}): "
        f"{numbers:,} numbers to train beside {frozen - numbers:,} frozen ones."
    ]
    without = [name for name in _layers(_plain(model, merged=False)) if name not in layers]
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        lines.append(f"note: no adapter on {', '.join(without[:5])}{more}.")
    return lines


# --- choosing layers -------------------------------------------------------------------------------------------------


def _check(model: nn.Module, rank: int) -> None:
    name = type(model).__name__
    if rank < 1:
        raise ModelError(f"rank is {rank}; adapters need at least 1.")
    if not isinstance(model, nn.Module) or not isinstance(model, ScoreModel):
        raise ModelError(
            f"lora takes a model with the members of ScoreModel, not {name}; NetworkModel(network, schedule, prediction, "
            "shape) makes one of a network."
        )
    if isinstance(model, HasReference):
        raise ModelError(f"{name} has adapters, or another reference of its own, already; give the model without.")
    for member in ADDED:
        if hasattr(model, member):
            raise ModelError(f"{name} has a `{member}` that is no method of the contract; rename it.")


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}


def _chosen(model: nn.Module, rank: int, targets: list[str] | None) -> list[str]:
    """The names of the layers that get an adapter. Raises ModelError where there is none, or a named one cannot."""
    layers = _layers(model)
    obstacles = {name: _obstacle(model, name, layer, rank) for name, layer in layers.items()}
    if targets is None:
        thawed = {name for name, layer in layers.items() if any(p.requires_grad for p in layer.parameters())}
        chosen = [name for name in layers if not obstacles[name] and (name in thawed or not thawed)]
        if not chosen:
            reasons = "; ".join(f"{name} {why}" for name, why in list(obstacles.items())[:3])
            raise ModelError(
                f"{type(model).__name__} has no Linear layer or convolution that can carry an adapter of rank {rank}"
                + (f": {reasons}." if reasons else "; train its own weights instead.")
            )
        return chosen
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    for target, names in found.items():
        if not names:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            known = ", ".join(ends[:20]) + (", ..." if len(ends) > 20 else "")
            raise ModelError(
                f"no Linear layer or convolution of {type(model).__name__} is called {target!r}; their names end in: "
                f"{known}.{did_you_mean(target, [*ends, *layers])}"
            )
        for name in names:
            if obstacles[name]:
                raise ModelError(f"layer {name} cannot carry an adapter of rank {rank}: it {obstacles[name]}.")
    if not found:
        raise ModelError("targets is empty; name layers, or leave it out for all that can carry an adapter.")
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _obstacle(model: nn.Module, name: str, layer: nn.Module, rank: int) -> str | None:
    """Why peft's adapter on this layer would change nothing, something else, or more than can be merged; None: it would not."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "computes its weight from others (a parametrization), which adapters cannot be merged into"
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) > 1:
        other = next(n for n in names if n != f"{name}.weight").rpartition(".")[0]
        return f"shares its weight with {other}"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "is read by nn.MultiheadAttention past its adapter; attention of Linear layers can be adapted"
    if isinstance(layer, CONVOLUTIONS):
        if type(layer) not in CONVOLUTIONS:
            return f"is a {type(layer).__name__}, of which peft makes no adapter"
        for what, own, plain in (
            ("groups", layer.groups, 1), ("dilation", max(layer.dilation), 1), ("padding_mode", layer.padding_mode, "zeros"),
        ):  # fmt: skip
            if own != plain:
                return f"has {what} {own}, which peft's adapters do not follow"
    elif type(layer).forward is not nn.Linear.forward:
        return f"is a {type(layer).__name__} with a forward of its own, which adapters cannot be merged into"
    most = min(weight.flatten(1).shape)
    return f"has rank {most} at most" if rank > most else None


# --- trees around shared weights -------------------------------------------------------------------------------------


def _sharing(model: M) -> M:
    """A copy whose parameters are frozen views of the model's: one memory, and gradients of none of them."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.detach() for b in model.buffers()})


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")}


@torch.no_grad()
def _plain(model: nn.Module, merged: bool) -> Any:
    """A frozen model of the class that was given, without adapters or with them added to weights of its own."""
    plain = copy.deepcopy(model)
    for name, layer in _adapted_layers(plain).items():
        base: Any = layer.get_base_layer()
        if merged:
            weight: Tensor = base.weight.float() + layer.get_delta_weight(ADAPTER).float()
            base.weight = nn.Parameter(weight.to(base.weight))
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, base)
    del plain.__dict__["peft_config"]
    plain.__class__ = type(model).__bases__[1]
    return plain.requires_grad_(False)
