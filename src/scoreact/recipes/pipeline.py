"""`pipeline`: a diffusers pipeline, from a folder or a hub, tuned by LoRA to a reward of the user's.

`scoreact train FOLDER`, `scoreact train sd15` and their like are this recipe with its option `path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..models.prompt_words import MANY
from ..models.value_networks import Encoder, VectorValue
from ..support.errors import SettingError
from ..training.config import Config
from .base import Problem, Recipe
from .prompts import Prompts, drawn_prompts, give_metadata, prompt_function, read_prompts

WORDS = 1024  # rows of the value's table of words, where there are many prompts
HUB = {  # short names
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "ddpm-cifar10": "google/ddpm-cifar10-32",
}

COUNTED_FROM = {"lora": "with it", "base": "without it"}


def build(
    path: str = "",
    prompts: str = "",
    prompt_column: str = "",
    lora_rank: int | None = None,
    full: bool = False,
    dtype: str = "",
    compute_dtype: str = "",
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    gradient_checkpointing: bool = False,
    rows_per_call: int | None = 8,
    twice_differentiable: bool = False,
    value_network: str = "",
    prompt_draws: int = 256,
    lora: str | None = None,
    lora_reference: str = "lora",
    lora_targets: Sequence[str] | None = None,
    use_dora: bool = False,
    max_sequence_length: int | None = None,
    guidance_rescale: float = 0.0,
    clip_skip: int | None = None,
    original_size: Sequence[int] | None = None,
    crops_coords_top_left: Sequence[int] | None = None,
    target_size: Sequence[int] | None = None,
    prompt_memory: int = 1024,
    test_prompts: str = "",
    variant: str = "",
) -> Problem:
    """See `models.pipelines.opening.pipeline_model`; dtype and compute_dtype: float32, float16 or bfloat16.

    prompts: a file (`read_prompts`, as prompt_column), one prompt, or file.py:function, which is called prompt_draws times
        (`drawn_prompts`). test_prompts: a file of prompts that training never sees.
    value_network: a small convolutional one on the latents (encoder), or a head on the denoiser's own features (features).
    """
    import torch

    from ..models.pipelines.opening import pipeline_model

    if not path:
        raise SettingError(
            "no pipeline is given; `scoreact train FOLDER` takes one, or a hub id, or one of " + ", ".join(HUB)
        )
    types = {"": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in types:
        raise SettingError(
            f"dtype is {dtype!r}; known: float32, float16, bfloat16, or nothing for the stored weights' own."
        )
    if compute_dtype not in types:
        raise SettingError(
            f"compute_dtype is {compute_dtype!r}; known: float32 (the default), or what the weights are stored in."
        )
    if value_network not in ("", "encoder", "features"):
        raise SettingError(f"value_network is {value_network!r}; known: encoder, features.")
    function = prompt_function(prompts)
    found = read_prompts(prompts, prompt_column) if function is None else drawn_prompts(function, prompt_draws, prompts)
    names = list(found)
    unseen = read_prompts(test_prompts, prompt_column) if test_prompts else Prompts()
    model = pipeline_model(
        HUB.get(path, path), lora_rank=lora_rank, full=full, dtype=types[dtype],
        compute_dtype=types[compute_dtype], guidance_scale=guidance_scale,
        negative_prompt=negative_prompt, height=height, width=width, frames=frames,
        gradient_checkpointing=gradient_checkpointing, rows_per_call=rows_per_call,
        twice_differentiable=twice_differentiable, lora=lora, lora_reference=lora_reference,
        lora_targets=lora_targets, use_dora=use_dora, max_sequence_length=max_sequence_length,
        guidance_rescale=guidance_rescale, clip_skip=clip_skip, original_size=original_size,
        crops_coords_top_left=crops_coords_top_left, target_size=target_size, prompt_memory=prompt_memory,
        variant=variant,
    )  # fmt: skip
    give_metadata(model, found)
    give_metadata(model, unseen)
    model.family.notes += [*(found.notes if isinstance(found, Prompts) else []), *unseen.notes]
    model.condition(names)  # encodes each once; a prompt's row is its class for the value network
    shape = model.shape

    def make_value_network() -> nn.Module:
        if value_network == "features":
            return model.feature_value()
        words = WORDS if len(names) > MANY else 0
        network: nn.Module = VectorValue(torch.Size(shape).numel())  # of a video
        if len(shape) == 3:
            network = Encoder(channels=shape[0], classes=len(names), words=words)
        network.inputs = "x_data_hat"  # type: ignore[assignment]  # the latents beside it say little more
        return network

    what = f"the prompt {names[0]!r}" if len(names) == 1 and names[0] else f"{len(names)} prompts"
    labels = {"problem": f"{type(model.pipeline).__name__} {path}, {what}"}
    if lora is not None:
        labels["lora"] = f"from {lora}; path KL is counted from the pipeline {COUNTED_FROM[lora_reference]}"
    if value_network:
        labels["value_network"] = value_network
    return Problem(model, prompts=names, test_prompts=list(unseen), value_network=make_value_network, labels=labels)


SETTINGS = Config(
    algorithm="ctrl_pathwise", value="surrogate", iterations=100, batch_size=32, reference_batches=4, steps=20,
    learning_rate=1e-4, epochs=1, minibatch_size=16, accumulate=4, kl_states=32, heldout_samples=64,
)  # fmt: skip
OPTIONS: dict[str, Any] = {
    "path": "", "prompts": "", "prompt_column": "", "lora_rank": None, "full": False, "dtype": "", "compute_dtype": "",
    "guidance_scale": None, "negative_prompt": "",
    "height": None, "width": None, "frames": None, "gradient_checkpointing": False, "rows_per_call": 8,
    "twice_differentiable": False, "value_network": "",
    "prompt_draws": 256, "lora": None, "lora_reference": "lora", "lora_targets": None, "use_dora": False,
    "max_sequence_length": None, "guidance_rescale": 0.0, "clip_skip": None, "original_size": None,
    "crops_coords_top_left": None, "target_size": None, "prompt_memory": 1024,
    "test_prompts": "", "variant": "",
}  # fmt: skip

RECIPES = [
    Recipe(
        "pipeline",
        "a diffusers pipeline tuned by LoRA: `scoreact train FOLDER --reward ... --prompts FILE`, or sd15, sdxl, ...",
        build,
        SETTINGS,
        OPTIONS,
        needs_reward=True,
    )
]
