"""Adapters in the forms that others load, written and read: diffusers', kohya's, peft's.

Knows files and peft's layers; does not know what was trained. Written adapters have alpha = rank everywhere, so that no
reader has to get a scale right, and one rank a network, filled up with zeros.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...support.errors import ModelError, RunError
from ...support.files import read_tensors, write_tensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
KOHYA_FILE = "lora.safetensors"
GIVEN = "given"  # the name of the user's own adapter

Layers = dict[
    str, dict[str, Tensor]
]  # by the layer's name: lora_A [r, in], lora_B [out, r], lora_magnitude_vector of DoRA


# --- what acts on a network ------------------------------------------------------------------------------------------


@torch.no_grad()
def acting_layers(network: nn.Module, names: Sequence[str] | None = None) -> Layers:
    """The sum of the adapters with these names (None: of those that act) as one adapter with alpha = rank.

    Several are joined along the rank. Raises ModelError for what is no plain LoRA, where there is more than one of it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: Layers = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        kinds: Any = layer
        acting = [a for a in (layer.active_adapters if names is None else names) if a in _adapters_of(layer)]
        if any(a not in getattr(layer, "lora_A", {}) for a in acting):
            raise ModelError(f"the adapter on {name} is no LoRA, which no form but `pipeline` holds; export that.")
        if not acting:
            continue
        dora = [a for a in acting if a in getattr(layer, "lora_magnitude_vector", {})]
        if dora and len(acting) > 1:
            raise ModelError(f"{name} has a DoRA adapter beside another, which cannot be one; export a `pipeline`.")
        found[name] = {
            "lora_A": torch.cat([kinds.lora_A[a].weight.float() for a in acting]),
            "lora_B": torch.cat([kinds.lora_B[a].weight.float() * kinds.scaling[a] for a in acting], dim=1),
        }
        if any(kinds.lora_B[a].bias is not None for a in acting):
            raise ModelError(f"the adapter on {name} has a bias, which no form but `pipeline` holds; export that.")
        if dora:
            found[name]["lora_magnitude_vector"] = kinds.lora_magnitude_vector[dora[0]].weight.float()
    return _same_rank(found)


def _adapters_of(layer: Any) -> set[str]:
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind)}


def has_adapters(network: nn.Module) -> bool:
    return any(type(m).__module__.startswith("peft.") for m in network.modules())


def _same_rank(layers: Layers) -> Layers:
    """Filled up with zeros, which change nothing: readers disagree on what a mixture of ranks means."""
    rank = rank_of(layers)
    for parts in layers.values():
        a, b = parts["lora_A"], parts["lora_B"]
        if len(a) < rank:
            parts["lora_A"] = torch.cat([a, a.new_zeros(rank - len(a), *a.shape[1:])])
            parts["lora_B"] = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1], *b.shape[2:])], dim=1)
    return layers


def rank_of(layers: Layers) -> int:
    return max((len(parts["lora_A"]) for parts in layers.values()), default=0)


@torch.no_grad()
def merge_adapters(network: nn.Module, names: Sequence[str] | None = None) -> None:
    """Add the adapters (None: those that act) into the weights and take peft's layers away, in place.

    Saved with them the weights would have names under which nothing is found again. The sum is made in float32.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned: list[tuple[str, Any]] = [(name, m) for name, m in network.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in tuned:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        base.float()
        wanted = layer.active_adapters if names is None else names
        layer.merge(adapter_names=[a for a in wanted if a in _adapters_of(layer)])
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, base.to(dtype))
    network.__dict__.pop("peft_config", None)
    if hasattr(network, "_hf_peft_config_loaded"):
        network._hf_peft_config_loaded = False  # type: ignore[assignment]


def dtypes_of(network: nn.Module) -> dict[str, torch.dtype]:
    """Of its floating tensors by name, those of adapters left out: some networks keep a part of theirs in float32."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {
        name.replace(".base_layer", ""): tensor.dtype
        for name, tensor in tensors
        if tensor.is_floating_point() and ".lora_" not in name
    }


def cast(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """The network's tensors to these dtypes, in place; those that are not named stay."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


# --- written ---------------------------------------------------------------------------------------------------------


def write_diffusers(folder: Path, networks: Mapping[str, Layers], about: Mapping[str, str]) -> None:
    """For `pipe.load_lora_weights(folder)`. networks: by component, unet or transformer and text encoders."""
    tensors = {f"{part}.{name}": t for part, layers in networks.items() for name, t in _named(layers).items()}
    write_tensors(folder / DIFFUSERS_FILE, tensors, {"format": "pt", **about})


def write_kohya(folder: Path, layers: Layers, about: Mapping[str, str]) -> None:
    """A UNet's adapter under kohya's names, for `pipe.load_lora_weights(folder)` and the programs that read this form."""
    tensors: dict[str, Tensor] = {}
    rank = rank_of(layers)
    for name, parts in layers.items():
        if "lora_magnitude_vector" in parts:
            raise ModelError("diffusers drops what kohya's form calls dora_scale; export DoRA as diffusers or peft.")
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = parts["lora_A"], parts["lora_B"]
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    theirs = {"ss_network_module": "networks.lora", "ss_network_dim": f"{rank}", "ss_network_alpha": f"{rank}"}
    write_tensors(folder / KOHYA_FILE, tensors, {"format": "pt", **theirs, **about})


def write_peft(folder: Path, layers: Layers, about: Mapping[str, str]) -> None:
    """For `peft.PeftModel.from_pretrained(denoiser, folder)`."""
    from peft import LoraConfig

    rank = rank_of(layers)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layers), inference_mode=True,
        use_dora=any("lora_magnitude_vector" in parts for parts in layers.values()),
        base_model_name_or_path=about.get("base_model"),
    )  # fmt: skip
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": t for name, t in _named(layers).items()}
    write_tensors(folder / PEFT_FILE, tensors, {"format": "pt", **about})


def _named(layers: Layers) -> dict[str, Tensor]:
    named = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    return {name + ".weight" * ("magnitude" not in name): tensor for name, tensor in named.items()}


# --- read ------------------------------------------------------------------------------------------------------------


def load_adapter(pipeline: Any, component: str, source: str | Path) -> str:
    """Put a user's LoRA onto a pipeline, acting; returns the name of its file.

    source: a file of diffusers' or kohya's form, one of peft's beside its adapter_config.json, or the folder of one.
    Raises ModelError for what cannot be read, does not fit, or would be used in part only.
    """
    path = _adapter_file(Path(source).expanduser())
    network = getattr(pipeline, component)
    if has_adapters(network):
        raise ModelError("this pipeline has an adapter already; load yours into it too (`load_lora_weights`), and leave lora "
                         "out.")  # fmt: skip
    try:
        with _heard() as said:
            if (path.parent / "adapter_config.json").is_file() and path.name == PEFT_FILE:
                _load_peft(network, path)
            elif hasattr(pipeline, "load_lora_weights"):
                pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=GIVEN)
            else:
                raise ModelError(f"diffusers loads no LoRA into {type(pipeline).__name__}; give one of peft's form.")
    except ModelError:
        raise
    except (ValueError, RuntimeError, LookupError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"LoRA {str(path)!r} does not fit this pipeline's {component}: {reason}") from error
    if said:
        raise ModelError(f"LoRA {str(path)!r} would be used in part only: {' '.join(said)[:300]}")
    if not any(GIVEN in getattr(m, "lora_A", {}) for m in network.modules()):
        raise ModelError(
            f"LoRA {str(path)!r} has nothing for this pipeline's {component}; was it made for another one?"
        )
    return path.name


def _adapter_file(source: Path) -> Path:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise ModelError(
                f"LoRA {str(source)!r} is no safetensors file, and others can hold code; convert it first."
            )
        return source
    if not source.is_dir():
        raise ModelError(f"LoRA {str(source)!r} does not exist; give a safetensors file, or the folder of one.")
    found = sorted(source.glob("*.safetensors"))
    for name in (DIFFUSERS_FILE, PEFT_FILE):  # a run's folder holds other files too
        if source / name in found:
            return source / name
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"LoRA folder {str(source)!r} holds {names} of safetensors files; name the one that is meant.")
    return found[0]


def _load_peft(network: nn.Module, path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    settings = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"{path.parent / 'adapter_config.json'} is of a {settings.get('peft_type')} adapter; give a LoRA."
        )
    try:
        tensors = {k.removeprefix("base_model.model."): v for k, v in read_tensors(path).items()}
    except RunError as error:
        raise ModelError(f"LoRA {str(path)!r} cannot be read: {error}") from None
    inject_adapter_in_model(LoraConfig.from_pretrained(str(path.parent)), network, GIVEN)
    result: Any = set_peft_model_state_dict(network, tensors, GIVEN)
    missing = [key for key in result.missing_keys if f".{GIVEN}" in key]
    if unknown := [*result.unexpected_keys, *missing]:
        raise ModelError(f"LoRA {str(path)!r} does not fit: {len(unknown)} of its tensors, such as {unknown[0]}.")


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What diffusers only logs where a file does not fit, and would go on."""
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if any(words in text for words in ("unexpected keys", "missing keys", "filter out")):
                said.append(text)

    handler, logger = Listen(logging.WARNING), logging.getLogger("diffusers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level, logging.WARNING))  # also where the user has silenced it
    try:
        yield said
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
