"""Diffusers pipelines as models: Stable Diffusion 1, 2, XL, 3 and 3.5, Flux, Wan (video), unconditional UNets.

The only file that imports diffusers, transformers and peft, and that only when a pipeline is opened. It knows their
networks, prompts, tables and decoders; it never steps a scheduler (they count steps in a hidden index): alphas_cumprod,
or the shift of a flow's sigmas, is read once. `timestep` is the network's own time, T - 1 at noise and 0 at the data.
LoRA: Hu et al. 2021 (arXiv 2106.09685). Guidance: Ho & Salimans 2022.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import prediction as kinds
from ..prediction import Prediction
from ..schedule import FromAlphasCumprod, Schedule
from ..types import Condition, expand
from .feature_memory import FeatureMemory
from .value_head import FeatureValue

# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShiftedFlow:
    """Rectified flow at sigma = shift s / (1 + (shift - 1) s), s = 1 - t (Esser et al. 2024, 2403.03206, eq. 23).

    The same path as RectifiedFlow with another clock: uniform steps in this t are the uneven steps of SD3 and Flux.
    """

    shift: float = 1.0
    t_max: float = 1.0

    @property
    def t_min(self) -> float:
        """Where alpha is 1/1000, as in RectifiedFlow: at 0 the data cannot be told from the state."""
        return float(self.time_at_sigma(torch.tensor(0.999, dtype=torch.float64)))

    def _stretch(self, t: Tensor) -> Tensor:
        return 1 + (self.shift - 1) * (1 - t)

    def alpha(self, t: Tensor) -> Tensor:
        return t / self._stretch(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * (1 - t) / self._stretch(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.shift / self._stretch(t) ** 2

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.d_alpha(t)

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        """The inverse of sigma(t)."""
        return 1 - sigma / (self.shift - (self.shift - 1) * sigma)


# noise - data, whatever the clock: diffusers' flow networks do not know the shift
FLOW = Prediction(
    "flow",
    lambda schedule, t, x, value: x - expand(schedule.sigma(t), x) * value,
    lambda schedule, t, x, x_data: (x - x_data) / expand(schedule.sigma(t), x),
)
TABLE_PREDICTIONS = {"epsilon": kinds.epsilon, "v_prediction": kinds.v, "sample": kinds.x0}


def _is_flow(config: Mapping[str, Any]) -> bool:
    name = str(config.get("_class_name", ""))
    return name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def read_scheduler(scheduler: Any, tokens: int = 0) -> tuple[Schedule, Prediction]:
    """The schedule and the kind of prediction that a diffusers scheduler stands for. tokens: of one sample (Flux' shift)."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    if _is_flow(config):
        return ShiftedFlow(_shift(config, tokens)), FLOW
    kind = config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod") or kind not in TABLE_PREDICTIONS:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} (prediction_type {kind!r}) has no table that is known here; load the "
            "pipeline with a DDIMScheduler, DDPMScheduler or FlowMatchEulerDiscreteScheduler made from its config."
        )
    table = scheduler.alphas_cumprod.double()
    # a table rescaled to zero terminal SNR ends in 0, where no score exists
    table = torch.where(table > 0, table, table[table > 0].min() / 2)
    return FromAlphasCumprod(table.tolist()), TABLE_PREDICTIONS[kind]


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """Of the sigmas; with dynamic shifting exp(mu) or mu, mu linear in the number of tokens (diffusers' calculate_shift)."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


# --- families: what differs between pipelines --------------------------------------------------------------------------


class Family:
    """What every view of one pipeline shares: frozen networks, encoded prompts, the clock. A subclass a pipeline class.

    A subclass says which component is the denoiser, the latents' shape, how one prompt is encoded, and how the denoiser is
    called. Prompts are encoded once each; a Condition holds row numbers of the table, so it costs nothing to repeat.
    """

    component: ClassVar[str] = "unet"
    targets: ClassVar[Sequence[str]] = ("to_q", "to_k", "to_v", "to_out.0")
    default_guidance: ClassVar[float | None] = None  # None: the pipeline's own
    video: ClassVar[bool] = False

    def __init__(
        self,
        pipeline: Any,
        guidance_scale: float | None,
        negative_prompt: str,
        size: tuple[int | None, int | None, int | None],
        max_sequence_length: int | None,
        rows_per_call: int | None,
    ) -> None:
        self.pipeline = pipeline
        self.denoiser: Any = getattr(pipeline, self.component)
        for module in self.modules():
            module.requires_grad_(False).eval()
        self.dtype: torch.dtype = self.denoiser.dtype
        self.autocast = False
        self.twice_differentiable = False
        self.keeps_features = False  # of every state that a reference is asked about, for a value network
        if guidance_scale is None:
            guidance_scale = self.default_guidance
        if guidance_scale is None:
            guidance_scale = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
        self.guidance_scale = float(guidance_scale)
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length
        self.rows_per_call = rows_per_call
        if size[2] is not None and not self.video:
            raise ValueError(f"frames is {size[2]}, but {type(pipeline).__name__} makes pictures; leave it out.")
        self.height, self.width, self.frames = self.size(*size)
        self.shape = self.latent_shape()
        self.schedule, self.prediction = read_scheduler(pipeline.scheduler, self.tokens())
        self.steps = int(pipeline.scheduler.config.num_train_timesteps)
        self.rows: dict[str, int] = {}
        self.metadata: Mapping[str, Mapping[str, Any]] = {}  # of prompts that have any, for the reward
        self.table: dict[str, Tensor] = {}  # [P, ...] of every encoded prompt
        self.negative: dict[str, Tensor] = {}  # [1, ...]
        self.layers: list[Any] = []  # peft's, where an adapter can act
        self.adapter_config: Any = None
        self.base_adapters: list[str] = []  # that the pipeline came with: part of the pretrained model
        self._adapter_numbers = itertools.count()

    def modules(self) -> list[Any]:
        """The pipeline's networks that are used here."""
        names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", self.component)
        found = [getattr(self.pipeline, name, None) for name in names]
        return [module for module in found if module is not None]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    # of a family

    def size(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
        """Pixels and frames, the pipeline's own by default."""
        own, factor = self.denoiser.config.sample_size, self.pipeline.vae_scale_factor
        own_height, own_width = (own, own) if isinstance(own, int) else own
        return height or own_height * factor, width or own_width * factor, 1

    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return (self.denoiser.config.in_channels, _part(self.height, factor), _part(self.width, factor))

    def tokens(self) -> int:
        return 0

    def encode(self, prompt: str, negative: bool) -> dict[str, Tensor]:
        """One prompt, or the negative prompt: each tensor without a batch dimension."""
        raise NotImplementedError

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        """The network's output, [B, *D]. timestep [B] float32, x in the network's dtype."""
        raise NotImplementedError

    # of all

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Fused attention has no second derivative; the plain formula has."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH) if self.twice_differentiable else contextlib.nullcontext()

    def timestep(self, t: Tensor) -> Tensor:
        """The network's time at t, float32; at a knot of the table the very integer it was trained with."""
        if isinstance(self.schedule, ShiftedFlow):
            return self.schedule.sigma(t) * self.steps
        index = ((1 - t) * self.steps - 1).clamp(0, self.steps - 1)
        nearest = index.round()
        return torch.where((index - nearest).abs() < 1e-3, nearest, index)  # 1e-3: t is a float32

    @property
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @torch.no_grad()
    def remember(self, prompts: Sequence[str]) -> None:
        """Encode what the table lacks, one prompt at a time: an embedding must not depend on its neighbours."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.rows:
                for name, row in self._encoded(prompt).items():
                    self.table[name] = torch.cat([self.table[name], row]) if name in self.table else row
                self.rows[prompt] = len(self.rows)

    def _encoded(self, prompt: str, negative: bool = False) -> dict[str, Tensor]:
        return {
            name: row[None].to(self.device, self.dtype) for name, row in self.encode(prompt, negative).items()
        }  # fmt: skip

    def condition(self, prompts: Sequence[str]) -> Condition:
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {prompt!r} is {type(prompt).__name__}; a pipeline's prompts are strings.")
        self.remember(list(prompts))
        rows = torch.tensor([self.rows[prompt] for prompt in prompts], device=self.device)
        return Condition(list(prompts), rows, [self.metadata.get(p, {}) for p in prompts] if self.metadata else ())

    def predict(self, network: nn.Module, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """The guided prediction at (t [B], x [B, *D]), float32.

        With rows_per_call the network always sees that many rows (the last call is filled up with repeats), so that a
        sample's prediction has the same bits in every batch.
        """
        rows = self._rows(condition)
        parts = [self._predict(network, t[i], x[i], rows[i])[:count] for i, count in self._calls(x)]
        return torch.cat(parts)

    def _rows(self, condition: Condition) -> Tensor:
        """Of the table, [B]."""
        assert condition.embedding is not None  # every family's `condition` gives one
        return condition.embedding

    def _calls(self, x: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The rows of each call of the network, and how many of them are not there to fill it up."""
        size = self.rows_per_call or len(x)
        for start in range(0, len(x), size):
            yield torch.arange(start, start + size, device=x.device).clamp(max=len(x) - 1), len(x) - start

    def features(self, network: nn.Module, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """What the network makes of (t [B], x [B, *D]) inside, under the prompt alone: [B, feature_width], float32.

        Its mid-block's output (UNet) or what leaves the last block (transformer), mean over positions. The pass ends there.
        """
        parts, rows = [], self._rows(condition)
        for index, count in self._calls(x):
            with _reading(network, stop=True) as found:
                self._predict(network, t[index], x[index], rows[index], guided=False)
            parts.append(found[0][:count])
        return torch.cat(parts)

    def predict_and_features(
        self, network: nn.Module, t: Tensor, x: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """Both by the same pass."""
        with _reading(network) as found:
            output = self.predict(network, t, x, condition)
        size = self.rows_per_call or len(x)
        return output, torch.cat([part[-size:] for part in found])[: len(x)]  # guided: the prompt's half is the second

    @property
    def feature_width(self) -> int:
        """Of `features`."""
        config = self.denoiser.config
        if self.component == "unet":
            if self.denoiser.mid_block is None:
                raise ValueError("this UNet has no mid-block whose features a value could read; use the encoder.")
            return int(config.block_out_channels[-1])
        return int(config.num_attention_heads * config.attention_head_dim)

    def _predict(self, network: nn.Module, t: Tensor, x: Tensor, rows: Tensor, guided: bool = True) -> Tensor:
        timestep, state = self.timestep(t.float()), x.to(self.dtype)
        prompt = {name: table[rows] for name, table in self.table.items()}
        guided = guided and self.guides and bool(prompt)
        if guided:
            with torch.no_grad():
                self.negative = self.negative or self._encoded("", negative=True)
            timestep, state = torch.cat([timestep, timestep]), torch.cat([state, state])
            prompt = {name: torch.cat([self.negative[name].expand_as(p), p]) for name, p in prompt.items()}
        with torch.autocast(x.device.type, self.dtype, enabled=self.autocast), self.attention():
            output = self.call(network, timestep, state, prompt).float()
        output = output[:, : x.shape[1]]  # some networks also predict a variance
        if guided:
            negative, positive = output.chunk(2)
            output = negative + self.guidance_scale * (positive - negative)
        return output

    def decode(self, x: Tensor) -> Tensor:
        """Latents to pictures in [0, 1], float32 and differentiable."""
        vae = self.pipeline.vae
        config, dtype = vae.config, next(vae.parameters()).dtype

        def constant(name: str, default: float) -> Tensor:  # a number, or one a channel
            value = config.get(name)
            value = torch.tensor(default if value is None else value, device=x.device, dtype=x.dtype)
            return value if value.ndim == 0 else value.reshape(-1, *[1] * (x.ndim - 2))

        latents = x * constant("latents_std", 1.0) / constant("scaling_factor", 1.0)
        latents = latents + constant("latents_mean", 0.0) + constant("shift_factor", 0.0)
        picture: Tensor = vae.decode(latents.to(dtype), return_dict=False)[0]
        return (picture.float() / 2 + 0.5).clamp(0, 1)

    # adapters: several on the same frozen weights; which one acts is a list of names in each of peft's layers

    def add_adapter(self, config: Any = None, like: str | None = None) -> str:
        """A new adapter's name; its output is zero, or that of another one."""
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if config is not None:
            self.adapter_config = config
            found = [m for m in self.denoiser.modules() if isinstance(m, BaseTunerLayer)]
            self.base_adapters = list(found[0].active_adapters) if found else []
        name = f"scoreact_{next(self._adapter_numbers)}"
        before = self.active
        flags = {p: p.requires_grad for p in self.denoiser.parameters()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            inject_adapter_in_model(copy.deepcopy(self.adapter_config), self.denoiser, name)
        self.layers = [m for m in self.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        for p in self.denoiser.parameters():
            p.requires_grad_(flags.get(p, True))  # older versions of peft freeze the other adapters
        for p in self.adapter(name).values():
            p.data = p.data.float()  # beside a bfloat16 network too: Adam's steps would round to nothing
        if like is not None:
            source = self.adapter(like)
            for key, p in self.adapter(name).items():
                p.data.copy_(source[key].data)
        self.active = before if like is not None else [*self.base_adapters, name]
        return name

    def drop_adapter(self, name: str) -> None:
        if name in self.active:
            self.active = self.base_adapters
        for layer in self.layers:
            layer.delete_adapter(name)
        self.denoiser.peft_config.pop(name, None)

    def adapter(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters under the names that diffusers stores them with."""
        found = ((key, p) for key, p in self.denoiser.named_parameters() if f".{name}." in key)
        return {key.replace(f".{name}.", "."): p for key, p in found}

    @property
    def active(self) -> list[str]:
        """The adapters that act now."""
        return list(self.layers[0].active_adapters) if self.layers else []

    @active.setter
    def active(self, names: Sequence[str]) -> None:
        for layer in self.layers:
            layer._active_adapter = list(names)  # peft's set_adapter would also thaw and freeze weights

    @contextlib.contextmanager
    def acting(self, names: Sequence[str]) -> Iterator[None]:
        """With these adapters; afterwards with those before."""
        before = self.active
        if before == list(names):
            yield
            return
        self.active = list(names)
        try:
            yield
        finally:
            self.active = before

    def enable_checkpointing(self) -> None:
        """Keep fewer activations. Recomputing happens in the backward pass, when another adapter may act: it is put back."""
        from torch.utils.checkpoint import checkpoint

        def recompute_with_its_adapter(module: nn.Module, *inputs: Any) -> Any:
            names = self.active

            def run(*inputs: Any) -> Any:
                with self.acting(names), self.attention():
                    return module(*inputs)

            return checkpoint(run, *inputs, use_reentrant=False)

        self.denoiser.enable_gradient_checkpointing(recompute_with_its_adapter)


class _Enough(Exception):
    """Ends a forward pass of which only the features are wanted."""


@contextlib.contextmanager
def _reading(network: Any, stop: bool = False) -> Iterator[list[Tensor]]:
    """A list that fills with the features [B, F] of each of the network's passes; stop: each ends where they are read."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> None:  # [B, F, H, W] of a UNet, [B, positions, F] of a transformer
        found.append(hidden.float().mean((2, 3) if hidden.ndim == 4 else 1))
        if stop:
            raise _Enough

    if hasattr(network, "mid_block"):
        handle = network.mid_block.register_forward_hook(lambda module, inputs, output: keep(output))
    else:
        handle = network.norm_out.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))
    try:
        with contextlib.suppress(_Enough):
            yield found
    finally:
        handle.remove()


def _part(size: int, factor: int) -> int:
    if size % factor:
        raise ValueError(f"a side of {size} pixels is no multiple of {factor}; take {max(1, size // factor) * factor}.")
    return size // factor


class StableDiffusion(Family):
    """Versions 1 and 2: one text encoder."""

    def encode(self, prompt: str, negative: bool) -> dict[str, Tensor]:
        text = self.pipeline.encode_prompt(
            prompt, self.device, 1, negative, negative_prompt=self.negative_prompt or None
        )
        return {"text": text[negative][0]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(x, timestep, encoder_hidden_states=prompt["text"], return_dict=False)[0]


class StableDiffusionXL(Family):
    """Two text encoders, and the picture's size as a condition: that of a picture never cropped nor scaled."""

    def encode(self, prompt: str, negative: bool) -> dict[str, Tensor]:
        found = self.pipeline.encode_prompt(
            prompt,
            device=self.device,
            do_classifier_free_guidance=negative,
            negative_prompt=self.negative_prompt or None,
        )
        return {"text": found[negative][0], "pooled": found[2 + negative][0]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        size = (self.height, self.width)
        ids = torch.tensor([*size, 0, 0, *size], device=x.device, dtype=x.dtype).expand(len(x), -1)
        added = {"text_embeds": prompt["pooled"], "time_ids": ids}
        return network(
            x, timestep, encoder_hidden_states=prompt["text"], added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip


class StableDiffusion3(Family):
    """Versions 3 and 3.5: a flow, three text encoders of which the third may be left out."""

    component = "transformer"
    targets = (*Family.targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def tokens(self) -> int:
        return math.prod(self.shape[1:]) // self.denoiser.config.patch_size**2

    def encode(self, prompt: str, negative: bool) -> dict[str, Tensor]:
        length = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        found = self.pipeline.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=negative,
            negative_prompt=self.negative_prompt or None, **length,
        )  # fmt: skip
        return {"text": found[negative][0], "pooled": found[2 + negative][0]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x, timestep=timestep, encoder_hidden_states=prompt["text"],
            pooled_projections=prompt["pooled"], return_dict=False,
        )[0]  # fmt: skip


class Flux(Family):
    """A flow on 2 x 2 patches of latents. guidance_scale is an input of the distilled network; there is no negative prompt."""

    component = "transformer"
    targets = StableDiffusion3.targets

    def size(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
        own = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return height or own, width or own, 1

    def latent_shape(self) -> tuple[int, ...]:
        factor = 2 * self.pipeline.vae_scale_factor
        return (self.denoiser.config.in_channels // 4, 2 * _part(self.height, factor), 2 * _part(self.width, factor))

    def tokens(self) -> int:
        return math.prod(self.shape[1:]) // 4

    @property
    def guides(self) -> bool:
        return False

    def encode(self, prompt: str, negative: bool) -> dict[str, Tensor]:
        length = {} if self.max_sequence_length is None else {"max_sequence_length": self.max_sequence_length}
        text, pooled, _ = self.pipeline.encode_prompt(prompt, None, device=self.device, **length)
        return {"text": text[0], "pooled": pooled[0]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        batch, channels, high, wide = x.shape
        patches = x.reshape(batch, channels, high // 2, 2, wide // 2, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(high // 2, wide // 2, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(high // 2, device=x.device)[:, None]
        places[..., 2] = torch.arange(wide // 2, device=x.device)
        guidance = None
        if network.config.guidance_embeds:
            guidance = torch.full((batch,), self.guidance_scale, device=x.device)
        output: Tensor = network(
            hidden_states=patches.reshape(batch, -1, 4 * channels), timestep=timestep / 1000, guidance=guidance,
            pooled_projections=prompt["pooled"], encoder_hidden_states=prompt["text"],
            txt_ids=places.new_zeros(prompt["text"].shape[1], 3), img_ids=places.flatten(0, 1), return_dict=False,
        )[0]  # fmt: skip
        output = output.reshape(batch, high // 2, wide // 2, channels, 2, 2)
        return output.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class Wan(Family):
    """Video: a flow on [channels, frames, height, width]. One denoiser for all times (Wan 2.1, not the pair of 2.2)."""

    component = "transformer"
    video = True

    def size(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
        own = inspect.signature(type(self.pipeline).__call__).parameters
        return height or own["height"].default, width or own["width"].default, frames or own["num_frames"].default

    def latent_shape(self) -> tuple[int, ...]:
        pipeline = self.pipeline
        if pipeline.config.get("boundary_ratio") is not None or pipeline.config.get("expand_timesteps"):
            raise ValueError("this Wan pipeline has two denoisers or one time a token, which are not supported yet.")
        _, patch_height, patch_width = self.denoiser.config.patch_size
        factor, every = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        if (self.frames - 1) % every:
            raise ValueError(f"frames is {self.frames}; Wan makes 1 + a multiple of {every} of them.")
        high = patch_height * _part(self.height, factor * patch_height)
        wide = patch_width * _part(self.width, factor * patch_width)
        return (self.denoiser.config.in_channels, 1 + (self.frames - 1) // every, high, wide)

    def encode(self, prompt: str, negative: bool) -> dict[str, Tensor]:
        text = self.pipeline.encode_prompt(
            prompt, self.negative_prompt or None, do_classifier_free_guidance=negative,
            max_sequence_length=self.max_sequence_length or 512, device=self.device,
        )  # fmt: skip
        return {"text": text[negative][0]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x, timestep=timestep, encoder_hidden_states=prompt["text"], return_dict=False
        )[0]  # fmt: skip


class Unconditional(Family):
    """A UNet on pixels, no prompt: every prompt means the same."""

    targets = (*Family.targets, "conv1", "conv2")  # small ones have no attention
    default_guidance = 1.0

    def size(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
        own = self.denoiser.config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        return height or own_height, width or own_width, 1

    def latent_shape(self) -> tuple[int, ...]:
        return (self.denoiser.config.in_channels, self.height, self.width)

    def remember(self, prompts: Sequence[str]) -> None:
        self.rows.update(dict.fromkeys(prompts, 0))

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(x, timestep, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        return (x / 2 + 0.5).clamp(0, 1)


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "WanPipeline": Wan,
    "DDPMPipeline": Unconditional,
    "DDIMPipeline": Unconditional,
}


# --- the model -----------------------------------------------------------------------------------------------------------


class PipelineModel(nn.Module):
    """One set of trainable weights on a pipeline, as a `ScoreModel`: an adapter, a whole denoiser, or nothing at all.

    Its parameters are what training changes, and no others. A (deep) copy has weights of its own and shares the rest: a
    second adapter on the same frozen network, or a second denoiser. `reference()` is the pretrained model without a copy.
    """

    def __init__(self, family: Family, adapter: str | None = None, network: nn.Module | None = None) -> None:
        super().__init__()
        self.family = family
        self.adapter_name = adapter
        self.network = network
        self.adapter = _tree({} if adapter is None else family.adapter(adapter))
        self.memory: FeatureMemory | None = None  # of a reference
        self._end = weakref.finalize(self, _forget, family, adapter)
        self._end.atexit = False
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineModel:
        if self.adapter_name is not None:
            new = PipelineModel(self.family, self.family.add_adapter(like=self.adapter_name))
        else:
            new = PipelineModel(self.family, network=copy.deepcopy(self.network, memo))
        for mine, theirs in zip(self.parameters(), new.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        memo[id(self)] = new
        return new

    def __copy__(self) -> PipelineModel:
        return copy.deepcopy(self)  # two views of one adapter: the first to die would take it along

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PipelineModel:
        """Move the shared networks and the prompts along (`to`, `cuda`)."""
        super()._apply(fn, recurse)
        for module in self.family.modules():
            module._apply(fn)
        for table in (self.family.table, self.family.negative):
            table.update({name: fn(rows) for name, rows in table.items()})
        return self

    # the five members of a ScoreModel

    @property
    def schedule(self) -> Schedule:
        return self.family.schedule

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """Normal noise of the variance that data of unit variance have at t_min, [B, *D]."""
        family, t = self.family, torch.tensor(self.schedule.t_min, dtype=torch.float64)
        noise = torch.randn(len(condition), *family.shape, generator=generator, device=family.device)
        return noise * float((self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2).sqrt())

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Any strings; each is encoded once and its embedding kept."""
        return self.family.condition(prompts)

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        family = self.family
        with self._acting():
            if family.keeps_features and self.memory is not None:
                output, features = family.predict_and_features(self._denoiser, t, x, condition)
                self.memory.add(t, x, condition, features)
            else:
                output = family.predict(self._denoiser, t, x, condition)
        return kinds.convert(family.prediction, kinds.score, self.schedule, t, x, output)

    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]."""
        return self.family.decode(x)

    # beyond them

    def features(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, int]:
        """The denoiser's own at (t [B], x [B, *D]), [B, F] float32, and for how many states a pass had to be made.

        A reference remembers those of the states whose score it was asked for; a gradient always takes a pass. See
        Family.features.
        """
        if x.requires_grad or self.memory is None:
            return self._features(t, x, condition), len(x)
        return self.memory.recall(t, x, condition, self._features)

    def _features(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        with self._acting():
            return self.family.features(self._denoiser, t, x, condition)

    def keep_features(self) -> None:
        """A reference remembers from now on the features of every state whose score it is asked for."""
        _ = self.family.feature_width  # says where there are none
        self.family.keeps_features = True

    def feature_value(self) -> FeatureValue:
        """A new value network on the reference's features: `finetune(..., value_network=model.feature_value)`."""
        self.keep_features()
        return FeatureValue(self.family.feature_width)

    @property
    def _denoiser(self) -> Any:
        return self.family.denoiser if self.network is None else self.network

    @property
    def rounds(self) -> bool:
        """Whether the denoiser computes in less than float32, which has a price of its own: see `rounding`."""
        return self.family.dtype != torch.float32

    @property
    def rows_per_call(self) -> int | None:
        """Of the denoiser; who keeps a graph through it had better ask for no more at a time."""
        return self.family.rows_per_call

    @property
    def device(self) -> torch.device:
        return self.family.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one state: (channels, height, width) or (channels, frames, height, width)."""
        return self.family.shape

    def _adapters(self) -> list[str]:
        return [*self.family.base_adapters, *([] if self.adapter_name is None else [self.adapter_name])]

    def _acting(self) -> contextlib.AbstractContextManager[None]:
        return self.family.acting(self._adapters())

    @property
    def guidance_scale(self) -> float:
        """1 is the conditional model. Policy, reference and average share it: a ratio compares like with like."""
        return self.family.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self.family.guidance_scale = scale

    @property
    def use_bfloat16(self) -> bool:
        """Whether a sample's score may have other last bits in another batch; the trainer then asks for no ratio of exactly 1.

        In float32 too: guidance and 1 / alpha near the noise turn a rounding of 1e-7 into log-ratios of 1e-3.
        """
        return self.family.rows_per_call is None

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, with these weights in place until another view's are asked for."""
        family = self.family
        self._end.detach()  # the pipeline may outlive this view, and needs its adapter then
        if self.network is not None:
            setattr(family.pipeline, family.component, self.network)
        else:
            family.active = self._adapters()
        return family.pipeline

    def reference(self) -> PipelineModel:
        """The pretrained model for `Policy(reference=...)`: the same weights with the adapter off, bit for bit.

        After full fine-tuning there is no way back, so there it is a frozen copy of the denoiser as it is now.
        """
        view = PipelineModel(self.family) if self.network is None else copy.deepcopy(self).requires_grad_(False)
        view.memory = FeatureMemory()
        return view

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes, by the names that diffusers stores it with: all that an average has to copy."""
        if self.adapter_name is not None:
            return {name: p.detach() for name, p in self.adapter.named_parameters()}
        return {} if self.network is None else {name: p.detach() for name, p in self.network.named_parameters()}

    def scheduler_times(self, steps: int) -> Tensor:
        """The times [N + 1] at which the pipeline's own scheduler would step, ready to be a grid; N is about `steps`."""
        family = self.family
        scheduler = copy.deepcopy(family.pipeline.scheduler)  # set_timesteps changes it
        dynamic = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        if isinstance(family.schedule, ShiftedFlow):
            if dynamic:  # mu only names the shift, which the schedule has already
                dynamic["mu"] = math.log(family.schedule.shift)
                if scheduler.config.get("time_shift_type", "exponential") != "exponential":
                    dynamic["mu"] = family.schedule.shift
                scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), **dynamic)
            else:
                scheduler.set_timesteps(steps)
            ts = family.schedule.time_at_sigma(scheduler.sigmas.double())
        else:
            scheduler.set_timesteps(steps)
            ts = 1 - (scheduler.timesteps.double() + 1) / family.steps
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
        ts = torch.cat([ts.cpu().clamp(ends[0], ends[1]), ends[1:]])
        return ts.unique().float()

    def save(self, folder: str | Path, merged: bool = False) -> None:
        """For plain diffusers: an adapter for `load_lora_weights(folder)`; a whole pipeline folder after full fine-tuning.

        merged: the whole pipeline, with the adapter added into the weights; so too where diffusers cannot load adapters.
        """
        family, folder = self.family, str(folder)
        if self.adapter_name is not None and not merged and hasattr(family.pipeline, "save_lora_weights"):
            weights = {name: p.contiguous() for name, p in self.trainable_state().items()}
            family.pipeline.save_lora_weights(folder, **{f"{family.component}_lora_layers": weights})
            return
        own = getattr(family.pipeline, family.component)
        setattr(family.pipeline, family.component, self._plain_network())
        try:
            family.pipeline.save_pretrained(folder)
        finally:
            setattr(family.pipeline, family.component, own)

    def export(self, folder: Path) -> None:
        """What a run leaves: an adapter for `load_lora_weights(folder)`, or else a pipeline in `folder / "pipeline"`."""
        adapter = self.adapter_name is not None and hasattr(self.family.pipeline, "save_lora_weights")
        self.save(folder if adapter else folder / "pipeline")

    @torch.no_grad()
    def _plain_network(self) -> nn.Module:
        """The denoiser without peft's layers. Saved with them its weights have names under which nothing is found again."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self.network is not None:
            return self.network
        plain: nn.Module = copy.deepcopy(self.family.denoiser)
        tuned: list[tuple[str, Any]] = [(name, m) for name, m in plain.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, layer in tuned:
            layer.merge(adapter_names=[a for a in self._adapters() if a in layer.lora_A])
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, layer.get_base_layer())
        plain.__dict__.pop("peft_config", None)
        return plain


def _forget(family: Family, adapter: str | None) -> None:
    if adapter is not None:
        family.drop_adapter(adapter)


def _tree(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Parameters with dotted names as a module that has them under these names."""
    root = nn.Module()
    for name, parameter in parameters.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(last, parameter)
    return root


# --- opening ---------------------------------------------------------------------------------------------------------------


def pipeline_model(
    source: Any,
    *,
    lora_rank: int = 16,
    lora_targets: Sequence[str] | None = None,
    full: bool = False,
    dtype: torch.dtype | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    gradient_checkpointing: bool = False,
    max_sequence_length: int | None = None,
    rows_per_call: int | None = None,
    vae_slicing: bool = True,
    twice_differentiable: bool = False,
) -> PipelineModel:
    """A diffusers pipeline (folder, hub id, or the object, which is changed) with weights to train: LoRA, or `full`.

    lora_targets: names of layers, the attention's projections by default; alpha is the rank. dtype: of the networks, that of
    the stored weights by default; the adapter, the state and the score are float32 all the same, and with `full` the
    weights too (the network then runs under autocast). guidance_scale, height, width, frames, max_sequence_length (of the
    prompt): the pipeline's own by default. rows_per_call: of the denoiser; see Family.predict. vae_slicing: decode one
    picture at a time. twice_differentiable: attention with second derivatives, which natural gradients (ctrl_trpo) need.
    Raises ImportError without diffusers, ValueError for a pipeline that is not supported.

    In less than float32 any change of the weights is rounded anew in every layer, which costs path KL by itself (`rounding`).
    On a tiny Stable Diffusion (256 numbers, 3 steps) 0.5 nats in bfloat16, 0.008 in float16, none in float32; guided by 4,
    25 times that. It grows with the latents' size and with the steps; a run measures its own at the start.
    """
    try:
        from diffusers import DiffusionPipeline
        from peft import LoraConfig
    except (ImportError, RuntimeError) as error:  # diffusers' own for a package that breaks when it is imported
        raise ImportError(_why_not(error)) from error
    pipeline: Any = source if isinstance(source, DiffusionPipeline) else _open(str(source), dtype)
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    family_class = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family_class is None:
        raise ValueError(f"{names[0]} is not supported; known: {', '.join(FAMILIES)}.")
    if dtype is not None:
        pipeline.to(dtype=dtype)
    family = family_class(
        pipeline, guidance_scale, negative_prompt, (height, width, frames), max_sequence_length, rows_per_call
    )
    if getattr(family.denoiser.config, "time_cond_proj_dim", None) is not None:
        raise ValueError("this UNet takes the guidance as an input (a latent consistency model); not supported yet.")
    vae = getattr(pipeline, "vae", None)
    if vae is not None:
        if family.dtype == torch.float16:
            vae.float()  # Stable Diffusion's overflows in float16
        if vae_slicing and hasattr(vae, "enable_slicing"):
            vae.enable_slicing()
    family.twice_differentiable = twice_differentiable
    if gradient_checkpointing:
        family.enable_checkpointing()
    if full:
        family.autocast = family.dtype != torch.float32
        return PipelineModel(family, network=family.denoiser.float().requires_grad_(True))
    targets = list(family.targets if lora_targets is None else lora_targets)
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}; use full=True to train all weights.")
    return PipelineModel(
        family, family.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
    )


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


def _open(source: str, dtype: torch.dtype | None) -> Any:
    """A pipeline from a folder or the hub, in the stored dtype unless another is wanted."""
    from diffusers import DiffusionPipeline

    try:
        folder = Path(source) if Path(source).is_dir() else Path(DiffusionPipeline.download(source))
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        # saved without it (Stable Diffusion 3 needs no T5), and opened only when told so
        without = {name: None for name, kind in index.items() if kind == [None, None]}
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype or _stored_dtype(folder), **without)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot open pipeline {source!r}: {reason}. Give a folder with a model_index.json, or a hub id."
        ) from error


def _stored_dtype(folder: Path) -> torch.dtype:
    """Of the denoiser's first tensor: diffusers itself would load everything as float32."""
    from safetensors import safe_open

    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for component in ("unet", "transformer"):
        for path in sorted((folder / component).glob("*.safetensors")):
            with safe_open(str(path), "pt") as file:
                name = next(iter(file.keys()))
                return known.get(file.get_slice(name).get_dtype(), torch.float32)
    return torch.float32
