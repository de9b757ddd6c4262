"""Tiny pipelines with random weights, one of each family, and what diffusers itself makes of them. What the tests share."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from scoreact.dynamics.samplers import ode
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.models.base import ScoreModel
from scoreact.models.pipelines.model import PipelineModel
from scoreact.types import Condition

SIDE = 16  # pixels; latents of 8 x 8
PROMPTS = ["a cat", "two dogs", "a cat"]
PREDICT = {"sd": "epsilon", "sd_v": "v_prediction", "sdxl": "epsilon", "ddpm": "epsilon"}


@functools.cache
def spelling_tokenizer() -> Any:
    """A CLIP tokenizer that spells: one token a letter."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        found = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    # not the near-empty tokenizer that transformers 5 makes of a wrong call
    assert len(set(found("cat").input_ids)) == 5
    return found


def clip(tokenizer: Any, kind: str = "CLIPTextModel", width: int = 16) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def t5(tokenizer: Any, kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def vae(channels: int = 4, **config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=channels, norm_num_groups=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config,
    )  # fmt: skip


def table_scheduler(prediction: str) -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip


def unet(**config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **config,
    )  # fmt: skip


def make(name: str, tokenizer: Any) -> Any:
    """The same weights for the same name, in eval mode as `from_pretrained` leaves them: T5 has dropout."""
    torch.manual_seed(0)
    pipeline = untrained(name, tokenizer)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def untrained(name: str, tokenizer: Any) -> Any:
    if name in ("sd", "sd_v"):
        return diffusers.StableDiffusionPipeline(
            vae=vae(), text_encoder=clip(tokenizer), tokenizer=tokenizer, unet=unet(cross_attention_dim=16),
            scheduler=table_scheduler(PREDICT[name]), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    if name == "sdxl":
        network = unet(
            cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )  # fmt: skip
        return diffusers.StableDiffusionXLPipeline(
            vae=vae(), text_encoder=clip(tokenizer), text_encoder_2=clip(tokenizer, "CLIPTextModelWithProjection"),
            tokenizer=tokenizer, tokenizer_2=tokenizer, unet=network, scheduler=table_scheduler("epsilon"),
            add_watermarker=False,
        )  # fmt: skip
    if name == "sd3":
        network = diffusers.SD3Transformer2DModel(
            sample_size=SIDE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=8,
        )  # fmt: skip
        encoders = [clip(tokenizer, "CLIPTextModelWithProjection") for _ in range(2)]
        return diffusers.StableDiffusion3Pipeline(
            transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.06, scaling_factor=1.5), text_encoder=encoders[0], tokenizer=tokenizer,
            text_encoder_2=encoders[1], tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
    if name.startswith("flux"):
        network = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=1, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
            guidance_embeds=name == "flux_guided",
        )  # fmt: skip
        return diffusers.FluxPipeline(
            transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae(shift_factor=0.06, scaling_factor=1.5), text_encoder=clip(tokenizer), tokenizer=tokenizer,
            text_encoder_2=t5(tokenizer), tokenizer_2=tokenizer,
        )  # fmt: skip
    if name == "wan":
        network = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=24, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        )  # fmt: skip
        decoder = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.5, 2.0, 1.0, 1.2],
        )  # fmt: skip
        return diffusers.WanPipeline(
            tokenizer=tokenizer, text_encoder=t5(tokenizer, "UMT5"), vae=decoder, transformer=network,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        )  # fmt: skip
    assert name == "ddpm"
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    return diffusers.DDIMPipeline(unet=network, scheduler=table_scheduler("epsilon"))


SIZES: dict[str, dict[str, int]] = {
    "flux": {"height": SIDE, "width": SIDE, "max_sequence_length": 16},
    "flux_guided": {"height": SIDE, "width": SIDE, "max_sequence_length": 16},
    "wan": {"height": 32, "width": 32, "frames": 5, "max_sequence_length": 16},
    "sd3": {"max_sequence_length": 16},
}


def move(model: PipelineModel) -> None:
    """Other weights, clearly seen in the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)


def inputs(model: PipelineModel, prompts: list[str] = PROMPTS) -> tuple[Tensor, Tensor, Condition]:
    """Times, states and prompts of a batch."""
    condition = model.condition(prompts)
    x = model.prior(condition, torch.Generator().manual_seed(2))
    return torch.linspace(0.2, 0.8, len(prompts)), x, condition


def theirs(name: str, pipeline: Any, x: Tensor, steps: int, **options: Any) -> Tensor:
    """What diffusers' pipeline makes of the noise x, as [B, C, (F,) H, W] in [0, 1]."""
    if name == "ddpm":
        seeded = torch.Generator().manual_seed(2)
        images = pipeline(batch_size=len(x), generator=seeded, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    sizes = {"num_frames" if k == "frames" else k: v for k, v in SIZES.get(name, {}).items()}
    if name.startswith("flux"):
        x = pipeline._pack_latents(x, *x.shape)
    found = pipeline(PROMPTS, latents=x.clone(), num_inference_steps=steps, output_type="pt", **sizes, **options)
    return found.frames.permute(0, 2, 1, 3, 4) if name == "wan" else found.images


def ours(model: ScoreModel, x: Tensor, ts: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    condition = model.condition(prompts)
    sde = SDE(model.schedule, noise_level(0.0))
    with torch.no_grad():
        xs = ode(sde, lambda t, x: model.score(t, x, condition), ts, x, torch.Generator())
        return model.decode(xs[-1])


def light(samples: Tensor, condition: Condition) -> Tensor:
    """Mean brightness of pictures or videos."""
    return samples.flatten(1).mean(1)


def move_by(model: PipelineModel, step: float) -> None:
    """Every weight that is trained, up or down by `step`."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += step * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1)
