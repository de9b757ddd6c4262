"""A diffusers pipeline opened as a model. LoRA: Hu et al. 2021 (arXiv 2106.09685).

The only file here that imports diffusers and peft at once, and that only when a pipeline is opened.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...support.errors import ModelError
from ...support.names import did_you_mean
from .casting import compute_in_float32
from .families import FAMILIES
from .folder import licence_of, open_folder
from .formats import GIVEN, has_adapters, load_adapter, merge_adapters
from .model import PipelineModel


def pipeline_model(
    source: Any,
    *,
    lora_rank: int | None = None,
    lora_targets: str | Sequence[str] | None = None,
    use_dora: bool = False,
    lora: str | Path | None = None,
    lora_reference: str = "lora",
    full: bool = False,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    gradient_checkpointing: bool = False,
    max_sequence_length: int | None = None,
    guidance_rescale: float = 0.0,
    clip_skip: int | None = None,
    original_size: Sequence[int] | None = None,
    crops_coords_top_left: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
    rows_per_call: int | None = None,
    vae_slicing: bool = True,
    twice_differentiable: bool = False,
    prompt_memory: int = 1024,
    variant: str = "",
) -> PipelineModel:
    """A diffusers pipeline with weights to train: a LoRA adapter, or all of the denoiser.

    Args:
        source: a folder, a hub id, or the pipeline itself, which is changed.
        lora_rank: of the adapter, 16 by default; its alpha is the rank too.
        lora_targets: names of layers, whole or their ends; the attention's projections by default.
        use_dora: a direction by LoRA and a magnitude of its own for each layer (Liu et al. 2024, arXiv 2402.09353).
        lora: an adapter to start from: a safetensors file of diffusers', kohya's or peft's form, or its folder.
        lora_reference: which model is then the pretrained one. "lora": the pipeline with that adapter, and a second one is
            trained; what is saved holds both. "base": the pipeline without it, and that very adapter is trained on.
        full: train the denoiser's own weights instead; they are float32.
        dtype: of the networks; that of the stored weights by default. Adapter, state and score are float32 all the same.
        compute_dtype: of the denoiser's activations and products: float32 by default, whatever dtype is (each layer's weights
            are cast when it is called), or dtype's own, which is quicker and costs path KL by rounding alone.
        guidance_scale, negative_prompt: of classifier-free guidance; the pipeline's own scale by default.
        height, width, frames: in pixels, and of a video; the pipeline's own by default.
        gradient_checkpointing: less memory for a second forward pass.
        max_sequence_length: tokens of a prompt, of a T5; the pipeline's own by default.
        guidance_rescale, clip_skip, original_size, crops_coords_top_left, target_size: as in the pipeline's own call, of those
            that have them; the sizes are SDXL's micro-conditioning, (height, width) in pixels.
        rows_per_call: states that the denoiser sees at once, always that many, so that a sample's score has the same bits in
            every batch; None: as many as are asked for.
        vae_slicing: decode one picture at a time.
        twice_differentiable: attention with second derivatives, which natural gradients (ctrl_trpo) need.
        prompt_memory: MiB of prompts' embeddings that stay beside the denoiser; the others wait in a temporary file.
        variant: of the folder's weights files, such as "fp16"; by default those without one, or the only one there is.

    Raises:
        ImportError: diffusers or peft are missing.
        ModelError: a pipeline, a scheduler, an adapter or an option that is not supported.

    A denoiser that computes in less than float32 rounds any change of its weights anew in every layer, which costs path KL by
    itself (`rounding`). On a tiny Stable Diffusion (256 numbers, 3 steps) 0.5 nats in bfloat16, 0.008 in float16, none in
    float32; guided by 4, 25 times that. It grows with the latents' size and with the steps; a run measures its own at the
    start.
    """
    try:
        from diffusers import DiffusionPipeline
        from peft import LoraConfig
    except (ImportError, RuntimeError) as error:  # diffusers' own for a package that breaks when it is imported
        raise ImportError(_why_not(error)) from error
    pipeline: Any
    notes: list[str] = []
    if isinstance(source, DiffusionPipeline):
        if variant:
            raise ModelError(f"variant is {variant!r}, but the pipeline is open already; leave it out.")
        pipeline = source
    else:
        pipeline, notes = open_folder(str(source), dtype, variant)
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    family_class = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family_class is None:
        raise ModelError(f"{names[0]} is not supported; known: {', '.join(FAMILIES)}.")
    notes += plain_networks(pipeline)
    if dtype is not None:
        pipeline.to(dtype=dtype)
    if lora is not None:
        load_adapter(pipeline, family_class.component, lora)
    adopt = _adopts(pipeline, lora, lora_reference, full, lora_rank, lora_targets)
    family = family_class(
        pipeline,
        guidance_scale,
        negative_prompt,
        (height, width, frames),
        {
            "max_sequence_length": max_sequence_length,
            "guidance_rescale": guidance_rescale,
            "clip_skip": clip_skip,
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": target_size,
        },
        rows_per_call,
        prompt_memory,
    )
    family.source = str(source) if pipeline is not source else pipeline.config.get("_name_or_path") or None
    family.notes += notes
    family.licence = licence_of(Path(pipeline.config.get("_name_or_path") or family.source or ""))
    family.lora = None if lora is None else str(lora)
    vae = getattr(pipeline, "vae", None)
    if vae is not None:
        if family.dtype == torch.float16:
            vae.float()  # Stable Diffusion's overflows in float16
        if vae_slicing and hasattr(vae, "enable_slicing"):
            vae.enable_slicing()
    family.twice_differentiable = twice_differentiable
    family.compute_dtype = torch.float32 if compute_dtype is None else compute_dtype
    if family.compute_dtype not in (torch.float32, family.dtype):
        raise ModelError(
            f"compute_dtype is {compute_dtype}, but the weights are {family.dtype}; take torch.float32 or their own, or open "
            f"the pipeline with dtype {compute_dtype}."
        )
    if gradient_checkpointing:
        family.enable_checkpointing()
    if use_dora and (full or adopt):
        raise ModelError(f"use_dora makes a new adapter, and {'full' if full else 'lora_reference base'} trains other weights; "
                         "leave it out.")  # fmt: skip
    if full:
        merge_adapters(family.denoiser)  # around trained weights they would be trained, and saved under lost names
        family.autocast = family.compute_dtype != torch.float32
        return PipelineModel(family, network=family.denoiser.float().requires_grad_(True))
    if family.compute_dtype == torch.float32:
        compute_in_float32(family.denoiser)
    if adopt:
        return PipelineModel(family, family.adopt(GIVEN), starts_elsewhere=True)
    if use_dora and has_adapters(family.denoiser):
        raise ModelError(
            "the pipeline has an adapter, beside which DoRA's magnitudes mean nothing; leave use_dora out."
        )
    targets = list(family.targets) if lora_targets is None else known_targets(family.denoiser, lora_targets)
    rank = 16 if lora_rank is None else lora_rank
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"lora_rank must be at least 1, got {rank!r}; use full=True to train all weights.")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, use_dora=use_dora)
    return PipelineModel(family, family.add_adapter(config))


def plain_networks(pipeline: Any) -> list[str]:
    """Take off the pipeline's networks, in place, what would hide weights from training or from what is saved.

    Returns:
        A sentence for each thing that was taken off.

    Raises:
        ModelError: what cannot be taken off.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    notes = []
    for name, network in pipeline.components.items():
        if not isinstance(network, nn.Module):
            continue
        plain, off = network, []
        while isinstance(plain, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(plain, "_orig_mod"):
            off.append("compiled" if hasattr(plain, "_orig_mod") else "wrapped")
            plain = getattr(plain, "_orig_mod", None) or plain.module  # type: ignore[assignment]
        for module in list(plain.modules()):
            if module._compiled_call_impl is not None:
                module._compiled_call_impl = None
                off.append("compiled")
            for child_name, child in module.named_children():
                if hasattr(child, "_orig_mod"):
                    module._modules[child_name] = child._orig_mod  # type: ignore[assignment]
                    off.append("compiled")
        if off:
            setattr(pipeline, name, plain)
            notes.append(f"The {name} was {' and '.join(dict.fromkeys(off))}; it is used as it was before.")
        _check_weights(name, plain)
        fused = [m for m in plain.modules() if getattr(m, "fused_projections", False)]
        if fused:  # the projections that adapters act on are not called, and the fused ones are in no plain pipeline
            network = plain
            network.unfuse_qkv_projections()  # type: ignore[operator]
            for module in fused:
                module.fused_projections = False  # type: ignore[assignment]
                for part in ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv"):
                    module._modules.pop(part, None)
            notes.append(
                f"The {name}'s fused attention projections were taken apart, so that they can be trained and saved."
            )
        layers = [m for m in plain.modules() if isinstance(m, BaseTunerLayer)]
        if any(layer.merged for layer in layers):  # beside a merged adapter no other acts
            for layer in layers:
                layer.unmerge()
            notes.append(f"The {name}'s adapters, fused into its weights, act beside them again.")
        for layer in layers:
            if layer.disable_adapters:
                layer._disable_adapters, layer._active_adapter = False, []
    return notes


def _check_weights(name: str, network: nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "_hf_hook") or getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            raise ModelError(
                f"the pipeline's {name} has hooks (offloading, caching or layerwise casting), which training does not go "
                "through; open it without them: pipe.remove_all_hooks(), or a fresh from_pretrained."
            )
    for key, p in network.named_parameters():
        if p.is_meta:
            raise ModelError(
                f"the {name}'s weight {key} is not in memory (offloaded); open the pipeline without offloading."
            )
        if p.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            kind = str(p.dtype).removeprefix("torch.")
            raise ModelError(
                f"the {name}'s weight {key} is {kind} (quantised or cast); open the pipeline in float32, float16 or bfloat16."
            )


def known_targets(network: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of layers that get an adapter. Raises ModelError for one that no linear layer or convolution has: peft would
    leave it out where another is found."""
    found = [name for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    # an adapter that is there already has layers of its own around and beside the network's
    layers = [name.removesuffix(".base_layer") for name in found if ".lora_" not in name]
    named = [targets] if isinstance(targets, str) else list(targets)
    for target in named:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers if not name.endswith(".0")))
            raise ModelError(
                f"lora_targets names {target!r}, but no linear layer or convolution of the {type(network).__name__} is called "
                f"so; their names end in {', '.join(ends)}.{did_you_mean(str(target), ends)}"
            )
    if not named:
        raise ModelError("lora_targets is empty; name layers, or leave it out for the attention's projections.")
    return named


def _adopts(pipeline: Any, lora: object, reference: str, full: bool, rank: int | None, targets: object) -> bool:
    """Whether the given adapter itself is trained. Raises ModelError where it cannot be."""
    if reference not in ("lora", "base"):
        raise ModelError(f"lora_reference is {reference!r}; known: lora (the pipeline with it), base (without it).")
    if reference == "lora":
        return False
    if lora is None:
        raise ModelError("lora_reference is 'base', but no adapter is given with lora; leave it out.")
    if full:
        raise ModelError("lora_reference is 'base', but full trains the weights themselves, the adapter added to them.")
    if rank is not None or targets is not None:
        raise ModelError("with lora_reference 'base' the given adapter is trained, of its own rank and layers; leave "
                         "lora_rank and lora_targets out.")  # fmt: skip
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    if any(GIVEN in getattr(getattr(pipeline, name), "peft_config", {}) for name in encoders):
        raise ModelError(
            f"the LoRA {str(lora)!r} changes a text encoder too, which policy and reference share; use lora_reference 'lora'."
        )
    return True


def _why_not(error: Exception) -> str:
    """The sentence for diffusers that cannot be imported. The usual trap: a torchvision made for another torch."""
    if importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception as broken:
            return (
                f"torchvision is installed but broken ({broken}), and with it diffusers cannot be imported; "
                "pip uninstall torchvision, which nothing here needs."
            )
    return f"diffusers pipelines need diffusers, transformers and peft ({error}); pip install 'scoreact[diffusers]'."
