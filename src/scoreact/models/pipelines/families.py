"""What differs between pipelines: Stable Diffusion 1, 2, XL, 3 and 3.5, Flux, Wan (video), unconditional UNets.

Knows their networks, prompts and decoders. `timestep` is the network's own time, T - 1 at noise and 0 at the data.
Guidance: Ho & Salimans 2022.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...dynamics.schedule import ShiftedFlow, step_number
from ...support.devices import tensor_cores
from ...support.errors import ModelError
from ...types import Condition
from .adapters import Adapters
from .formats import dtypes_of
from .prompt_table import MIB, PromptTable
from .scheduler import read_scheduler, starting_noise

SIZES = ("original_size", "crops_coords_top_left", "target_size")  # (height, width), of SDXL's micro-conditioning
INPUTS = {  # fields of a denoiser's configuration that ask for an input which its pipeline's call does not give
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "time_cond_proj_dim": "the guidance as an input (a latent consistency model)",
    "encoder_hid_dim_type": "embeddings beside the prompt's (an IP-Adapter's)",
    "addition_embed_type": "embeddings beside the prompt's",
}
TOGETHER = 8  # prompts in a call of the text encoders


class Family(Adapters):
    """What every view of one pipeline shares: frozen networks, encoded prompts, the clock. A subclass a pipeline class.

    A subclass says which component is the denoiser, the latents' shape, how one prompt is encoded, and how the denoiser is
    called. Prompts are encoded once each; a Condition holds row numbers of the table, so it costs nothing to repeat. Unless
    prompts are being encoded the text encoders are on the CPU.
    """

    component: ClassVar[str] = "unet"
    targets: ClassVar[Sequence[str]] = ("to_q", "to_k", "to_v", "to_out.0")
    default_guidance: ClassVar[float | None] = None  # None: the pipeline's own
    video: ClassVar[bool] = False
    takes_negative_prompt: ClassVar[bool] = True
    takes_prompts: ClassVar[bool] = True
    needs: ClassVar[Sequence[str]] = ("vae", "text_encoder", "tokenizer")  # components without which nothing is drawn
    gives: ClassVar[Mapping[str, str]] = {}  # fields of INPUTS, and the values whose inputs are given
    takes: ClassVar[Sequence[str]] = ()  # arguments of the pipeline's own call that can be given here too
    source: str | None = None  # the folder or hub id that it was opened from
    licence: str | None = None  # where that says it
    lora: str | None = None  # the user's own adapter

    def __init__(
        self,
        pipeline: Any,
        guidance_scale: float | None,
        negative_prompt: str,
        size: tuple[int | None, int | None, int | None],
        call: Mapping[str, Any],
        rows_per_call: int | None,
        prompt_memory: int = 1024,
    ) -> None:
        self.pipeline = pipeline
        super().__init__(getattr(pipeline, self.component))
        networks = {name: m for name, m in pipeline.components.items() if isinstance(m, nn.Module)}
        self.stored = {name: dtypes_of(m) for name, m in networks.items()}  # what they are opened in
        self._check_parts()
        for module in self.modules():
            module.requires_grad_(False).eval()
        self.dtype: torch.dtype = self.denoiser.dtype  # of the stored weights
        self.compute_dtype = self.dtype
        self.autocast = False
        self.twice_differentiable = False
        self.keeps_features = False  # of every state that a reference is asked about, for a value network
        own_scale = self.default_guidance
        if own_scale is None:
            own_scale = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
        self.guidance_scale = float(own_scale)
        self.negative_prompt = ""
        self.guide(guidance_scale, negative_prompt)
        self.call_arguments = self._checked(call)
        self.rows_per_call = rows_per_call
        if size[2] is not None and not self.video:
            raise ModelError(f"frames is {size[2]}, but {type(pipeline).__name__} makes pictures; leave it out.")
        for name, value in zip(("height", "width", "frames"), size, strict=True):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ModelError(f"{name} is {value!r}; expected a whole number of at least 1.")
        self.height, self.width, self.frames = self.size(*size)
        self.shape = self.latent_shape()
        self._check_channels()
        self.schedule, self.prediction = read_scheduler(pipeline.scheduler, self.tokens())
        self.starting_noise = starting_noise(pipeline.scheduler)
        self.steps = int(pipeline.scheduler.config.num_train_timesteps)
        self.metadata: Mapping[str, Mapping[str, Any]] = {}  # of prompts that have any, for the reward
        self.notes: list[str] = []  # of the pipeline and its prompts
        self.too_long = 0  # prompts whose ends the text encoders do not see
        self.table = PromptTable(prompt_memory)
        self.negative: dict[str, Tensor] = {}  # [1, ...]

    def _check_parts(self) -> None:
        """Raises ModelError for a pipeline with which nothing can be drawn as its own call would."""
        pipeline, network, kind = self.pipeline, self.denoiser, type(self.pipeline).__name__
        if missing := [name for name in ("scheduler", *self.needs) if getattr(pipeline, name, None) is None]:
            raise ModelError(
                f"this {kind} has no {' and no '.join(missing)}, without which it draws nothing from a prompt; open it with "
                "all of its components."
            )
        for field, what in INPUTS.items():
            value = getattr(network.config, field, None)
            if value is not None and self.gives.get(field) != value:
                raise ModelError(
                    f"this {type(network).__name__} takes {what} ({field} is {value!r}), which no call of a {kind} gives it; "
                    "wrap the network as a NetworkModel (docs/models.md), which has classes."
                )

    def _check_channels(self) -> None:
        """Raises ModelError for a network of another kind than its pipeline: one that also takes a picture, say."""
        config, vae = self.denoiser.config, getattr(self.pipeline, "vae", None)
        found = self.shape[0]
        if vae is not None:
            own = vae.config.get("latent_channels", vae.config.get("z_dim"))
            if own not in (None, found):
                raise ModelError(
                    f"the {self.component} takes {found} channels and the vae makes {own}: a model that also takes a picture "
                    "or a mask is not supported; give one that draws from a prompt alone."
                )
        out = config.get("out_channels")
        if out not in (None, config.in_channels, 2 * config.in_channels):  # twice: it also predicts a variance
            raise ModelError(
                f"the {self.component} takes {config.in_channels} channels and gives {out}; expected as many."
            )

    def modules(self) -> list[Any]:
        """The pipeline's networks that are used here."""
        return [*self._components("vae"), *self.text_encoders(), *self._components(self.component)]

    def text_encoders(self) -> list[Any]:
        """Those of the pipeline's networks that only prompts need."""
        return self._components("text_encoder", "text_encoder_2", "text_encoder_3")

    def _components(self, *names: str) -> list[Any]:
        return [part for part in (getattr(self.pipeline, name, None) for name in names) if part is not None]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def guide(self, scale: float | None = None, negative_prompt: str | None = None) -> None:
        """Set what is given. Raises ModelError for what would have no effect, or is no scale; then nothing is set."""
        kind = type(self.pipeline).__name__
        if scale is None:
            scale = self.guidance_scale
        elif isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise ModelError(
                f"guidance_scale is {scale!r}; expected a number of at least 0, of which those above 1 guide."
            )
        elif not self.takes_guidance and scale > 1:
            raise ModelError(
                f"guidance_scale is {scale:g}, but this {kind} has nothing that it would guide; leave it out."
            )
        if negative_prompt and not self.takes_negative_prompt:
            raise ModelError(f"negative_prompt is {negative_prompt!r}, but a {kind} takes none; leave it out.")
        if negative_prompt and not scale > 1:
            raise ModelError(
                f"negative_prompt is {negative_prompt!r}, but {kind} at guidance_scale {scale:g} takes none; raise "
                "guidance_scale above 1, or leave it out."
            )
        self.guidance_scale = float(scale)
        if negative_prompt is not None:
            self.negative_prompt = negative_prompt

    # of a family

    @property
    def takes_guidance(self) -> bool:
        """Whether a guidance scale changes anything."""
        return self.takes_prompts

    def size(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
        """Pixels and frames, the pipeline's own by default."""
        factor = self.pipeline.vae_scale_factor
        own_height, own_width = self._own_size(height, width)
        return height or own_height * factor, width or own_width * factor, 1

    def _own_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The denoiser's sample_size, a number or two; not looked at where height and width are both given."""
        own = getattr(self.denoiser.config, "sample_size", None)
        if own is None:
            own = getattr(self.pipeline, "default_sample_size", None)
        if own is None and (height is None or width is None):
            raise ModelError(
                f"the {self.component}'s configuration says no sample_size; give height and width, in pixels "
                "(--option height=512 --option width=512)."
            )
        own = 0 if own is None else own
        return (own, own) if isinstance(own, int) else (own[0], own[1])

    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return (self.denoiser.config.in_channels, _part(self.height, factor), _part(self.width, factor))

    def tokens(self) -> int:
        return 0

    def encode(self, prompts: str | list[str], negative: bool) -> dict[str, Tensor]:
        """What the denoiser is given of the prompts, or of the negative prompt instead: each tensor [B, ...]."""
        raise NotImplementedError

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        """The network's output, [B, *D]. timestep [B] float32, x in compute_dtype."""
        raise NotImplementedError

    # of all

    def call_options(self) -> dict[str, Any]:
        """The arguments of the pipeline's own call that make it draw as here; without those of the sampler."""
        if not self.takes_prompts:
            return {}
        found: dict[str, Any] = {"guidance_scale": self.guidance_scale, "height": self.height, "width": self.width}
        if self.video:
            found["num_frames"] = self.frames
        if self.negative_prompt and self.guides:
            found["negative_prompt"] = self.negative_prompt
        return {**found, **self.call_arguments}

    def _checked(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What is given of the arguments of the pipeline's own call. Raises ModelError for what this pipeline would not use."""
        given = {name: value for name, value in call.items() if value not in (None, 0.0)}
        for name, value in given.items():
            if name not in self.takes:
                have = f"it has {', '.join(self.takes)}" if self.takes else "it has none of its kind"
                kind = type(self.pipeline).__name__
                raise ModelError(f"{name} is {value!r}, but {kind} has no such argument ({have}); leave it out.")
            if name in SIZES:
                if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(x, int) for x in value):
                    raise ModelError(
                        f"{name} is {value!r}; expected two whole numbers, height and width, as [1024, 1024]."
                    )
                given[name] = tuple(value)
            elif name == "guidance_rescale":
                if not isinstance(value, float | int) or not 0 <= value <= 1:
                    raise ModelError(f"guidance_rescale is {value!r}; expected a number from 0 (off) to 1.")
                if not self.guides:
                    raise ModelError(f"guidance_rescale is {value:g}, but guidance_scale {self.guidance_scale:g} guides "
                                     "nothing; raise it above 1, or leave guidance_rescale out.")  # fmt: skip
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"{name} is {value!r}; expected a whole number of at least 1.")
        return given

    def given(self, *names: str) -> dict[str, Any]:
        """Of these arguments those that were given."""
        return {name: self.call_arguments[name] for name in names if name in self.call_arguments}

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Fused attention has no second derivative; the plain formula has."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH) if self.twice_differentiable else contextlib.nullcontext()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """In compute_dtype; in float32 without TF32, which rounds as float16 does."""
        dtype, device = self.compute_dtype, self.device.type
        with (
            torch.autocast(device, dtype, enabled=self.autocast),
            tensor_cores(False) if dtype == torch.float32 else contextlib.nullcontext(),
        ):
            yield

    def timestep(self, t: Tensor) -> Tensor:
        """The network's time at t, float32; at a knot of the table the very integer it was trained with."""
        if isinstance(self.schedule, ShiftedFlow):
            return self.schedule.sigma(t) * self.steps
        return step_number(t, self.steps)

    @property
    def guides(self) -> bool:
        """Whether the prediction is guided: as in diffusers by a scale above 1 alone."""
        return self.guidance_scale > 1.0

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode what the table lacks.

        An embedding must not depend on its neighbours, nor on who asked first: the encoders always see `TOGETHER` prompts, the
        last call being filled up with repeats, so that a prompt has the same bits in every batch (on the CPU).
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.table.rows]
        if not new:
            return
        self.too_long += self._count_too_long(new)
        self.table.reserve(len(new))
        with self.encoding():
            for start in range(0, len(new), TOGETHER):
                some = new[start : start + TOGETHER]
                self.table.add(some, self._encoded(some + some[-1:] * (TOGETHER - len(some))))

    @torch.no_grad()
    def _encoded(self, prompts: str | list[str], negative: bool = False) -> dict[str, Tensor]:
        try:
            found = self.encode(prompts, negative)
        except (AttributeError, IndexError) as error:  # Stable Diffusion 1's, by diffusers 0.42 beside transformers 5
            if "clip_skip" not in self.call_arguments:
                raise
            skip, reason = self.call_arguments["clip_skip"], " ".join(str(error).split())
            raise ModelError(
                f"clip_skip is {skip}, and the pipeline's own encode_prompt fails with it ({reason}); "
                "leave it out, or take versions of diffusers and transformers in which it works."
            ) from error
        return {name: rows.to(self.device, self.dtype) for name, rows in found.items()}

    @contextlib.contextmanager
    def encoding(self) -> Iterator[None]:
        """The text encoders on the denoiser's device, and quiet about ends that they cut off; afterwards on the CPU."""
        from diffusers.utils import logging

        self.put_text_encoders(self.device)
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(before)
            self.put_text_encoders(torch.device("cpu"))

    def put_text_encoders(self, device: torch.device) -> None:
        for module in self.text_encoders():
            if next(module.parameters()).device != device:
                module.to(device)

    def _tokens(self) -> tuple[Any, int]:
        """The tokenizer of the encoder that sees most of a prompt, and how many tokens those are."""
        tokenizer = self._components("tokenizer", "tokenizer_2", "tokenizer_3")[-1]
        parameters = inspect.signature(self.pipeline.encode_prompt).parameters
        if "max_sequence_length" not in parameters or "CLIP" in type(tokenizer).__name__:
            return tokenizer, int(tokenizer.model_max_length)
        return tokenizer, self.call_arguments.get("max_sequence_length") or int(
            parameters["max_sequence_length"].default
        )

    def _count_too_long(self, prompts: Sequence[str]) -> int:
        if not self._components("tokenizer", "tokenizer_2", "tokenizer_3"):
            return 0
        tokenizer, most = self._tokens()
        parts = (
            list(prompts[i : i + 256]) for i in range(0, len(prompts), 256)
        )  # its records are larger than the prompts
        return sum(len(ids) > most for part in parts for ids in tokenizer(part, verbose=False).input_ids)

    def about_prompts(self) -> list[str]:
        """What a user should know of the prompts, in sentences."""
        found, table = list(self.notes), self.table
        if self.takes_negative_prompt and 0 < self.guidance_scale < 1:
            found.append(
                f"guidance_scale {self.guidance_scale:g} guides nothing: as in diffusers only one above 1 does."
            )
        if self.too_long:
            found.append(
                f"{self.too_long} of {len(table.rows)} prompts are longer than the {self._tokens()[1]} tokens that the text "
                "encoder sees; their ends are cut off."
            )
        if table.on_disk:
            found.append(
                f"The embeddings of {len(table.rows)} prompts take {len(table.rows) * table.row_bytes / MIB:.0f} MiB "
                f"({table.row_bytes / 1024:.0f} KiB each): prompt_memory keeps {table.memory} MiB on {table.device.type}, the "
                "others are in a temporary file."
            )
        return found

    def condition(self, prompts: Sequence[str]) -> Condition:
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ModelError(f"prompt {prompt!r} is {type(prompt).__name__}; a pipeline's prompts are strings.")
        self.remember(list(prompts))
        rows = torch.tensor([self.table.rows[prompt] for prompt in prompts], device=self.device)
        return Condition(list(prompts), rows, [self.metadata.get(p, {}) for p in prompts] if self.metadata else ())

    def predict(self, network: nn.Module, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """The guided prediction at (t [B], x [B, *D]), float32.

        With rows_per_call the network always sees that many rows (the last call is filled up with repeats), so that a
        sample's prediction has the same bits in every batch.
        """
        rows = self.rows_of(condition)
        parts = [self.predict_rows(network, t[i], x[i], rows[i])[:count] for i, count in self.calls(x)]
        return torch.cat(parts)

    def rows_of(self, condition: Condition) -> Tensor:
        """Of the table, [B]."""
        assert condition.rows is not None  # every family's `condition` gives one
        return condition.rows

    def calls(self, x: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The rows of each call of the network, and how many of them are not there to fill it up."""
        size = self.rows_per_call or len(x)
        for start in range(0, len(x), size):
            yield torch.arange(start, start + size, device=x.device).clamp(max=len(x) - 1), len(x) - start

    def predict_rows(self, network: nn.Module, t: Tensor, x: Tensor, rows: Tensor, guided: bool = True) -> Tensor:
        timestep, state = self.timestep(t.float()), x.to(self.compute_dtype)
        prompt = {name: row.to(self.compute_dtype) for name, row in self.table.at(rows).items()}
        guided = guided and self.guides and bool(prompt)
        if guided:
            if not self.negative:
                with self.encoding():
                    self.negative = self._encoded("", negative=True)
            timestep, state = torch.cat([timestep, timestep]), torch.cat([state, state])
            prompt = {name: torch.cat([self.negative[name].to(p).expand_as(p), p]) for name, p in prompt.items()}
        with self.computing(), self.attention():
            output = self.call(network, timestep, state, prompt).float()
        output = output[:, : x.shape[1]]  # some networks also predict a variance
        if guided:
            negative, positive = output.chunk(2)
            output = negative + self.guidance_scale * (positive - negative)
            if share := self.call_arguments.get("guidance_rescale"):
                output = share * output * (_spread(positive) / _spread(output)) + (1 - share) * output
        return output

    def decode(self, x: Tensor) -> Tensor:
        """Latents to pictures in [0, 1], float32 and differentiable."""
        vae = self.pipeline.vae
        scale, shift = self._latent_scale(x)
        latents = x * scale + shift
        picture: Tensor = vae.decode(latents.to(next(vae.parameters()).dtype), return_dict=False)[0]
        return (picture.float() / 2 + 0.5).clamp(0, 1)

    def latents(self, samples: Tensor) -> Tensor:
        """Pictures in [0, 1] to the latents that the autoencoder makes of them, its most probable ones; differentiable."""
        vae = self.pipeline.vae
        found: Any = vae.encode((2 * samples - 1).to(next(vae.parameters()).dtype), return_dict=False)[0]
        latents: Tensor = (found if isinstance(found, Tensor) else found.mode()).to(samples.dtype)
        scale, shift = self._latent_scale(latents)
        return (latents - shift) / scale

    def _latent_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's latents are x times the one, plus the other."""
        config = self.pipeline.vae.config

        def constant(name: str, default: float) -> Tensor:  # a number, or one a channel
            value = config.get(name)
            value = torch.tensor(default if value is None else value, device=x.device, dtype=x.dtype)
            return value if value.ndim == 0 else value.reshape(-1, *[1] * (x.ndim - 2))

        scale = constant("latents_std", 1.0) / constant("scaling_factor", 1.0)
        return scale, constant("latents_mean", 0.0) + constant("shift_factor", 0.0)

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


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each sample's numbers, ready to be multiplied with x."""
    return x.std(dim=list(range(1, x.ndim)), keepdim=True)


def _part(size: int, factor: int) -> int:
    if size % factor:
        raise ModelError(f"a side of {size} pixels is no multiple of {factor}; take {max(1, size // factor) * factor}.")
    return size // factor


class StableDiffusion(Family):
    """Versions 1 and 2: one text encoder."""

    takes = ("guidance_rescale", "clip_skip")

    def encode(self, prompts: str | list[str], negative: bool) -> dict[str, Tensor]:
        text = self.pipeline.encode_prompt(
            prompts, self.device, 1, negative, negative_prompt=self.negative_prompt or None, **self.given("clip_skip")
        )
        return {"text": text[negative]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(x, timestep, encoder_hidden_states=prompt["text"], return_dict=False)[0]


class StableDiffusionXL(Family):
    """Two text encoders, and the picture's size as a condition: by default that of one never cropped nor scaled."""

    needs = ("vae", "text_encoder_2", "tokenizer_2")
    gives: ClassVar[Mapping[str, str]] = {"addition_embed_type": "text_time"}

    takes = ("guidance_rescale", "clip_skip", *SIZES)

    def encode(self, prompts: str | list[str], negative: bool) -> dict[str, Tensor]:
        found = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=negative,
            negative_prompt=self.negative_prompt or None,
            **self.given("clip_skip"),
        )
        return {"text": found[negative], "pooled": found[2 + negative]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        size = (self.height, self.width)
        defaults = {"original_size": size, "crops_coords_top_left": (0, 0), "target_size": size}
        numbers = [n for name in SIZES for n in self.call_arguments.get(name, defaults[name])]
        ids = torch.tensor(numbers, device=x.device, dtype=x.dtype).expand(len(x), -1)
        added = {"text_embeds": prompt["pooled"], "time_ids": ids}
        return network(
            x, timestep, encoder_hidden_states=prompt["text"], added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip


class StableDiffusion3(Family):
    """Versions 3 and 3.5: a flow, three text encoders of which the third may be left out."""

    needs = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    component = "transformer"
    takes = ("clip_skip", "max_sequence_length")
    targets = (*Family.targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def tokens(self) -> int:
        return math.prod(self.shape[1:]) // self.denoiser.config.patch_size**2

    def encode(self, prompts: str | list[str], negative: bool) -> dict[str, Tensor]:
        found = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=negative,
            negative_prompt=self.negative_prompt or None, **self.given(*self.takes),
        )  # fmt: skip
        return {"text": found[negative], "pooled": found[2 + negative]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x, timestep=timestep, encoder_hidden_states=prompt["text"],
            pooled_projections=prompt["pooled"], return_dict=False,
        )[0]  # fmt: skip


class Flux(Family):
    """A flow on 2 x 2 patches of latents. guidance_scale is an input of the distilled network; there is no negative prompt."""

    takes_negative_prompt = False
    needs = StableDiffusion3.needs
    takes = ("max_sequence_length",)

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

    @property
    def takes_guidance(self) -> bool:
        return bool(self.denoiser.config.guidance_embeds)

    def encode(self, prompts: str | list[str], negative: bool) -> dict[str, Tensor]:
        text, pooled, _ = self.pipeline.encode_prompt(prompts, None, device=self.device, **self.given(*self.takes))
        return {"text": text, "pooled": pooled}

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
    takes = ("max_sequence_length",)

    def size(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
        own = inspect.signature(type(self.pipeline).__call__).parameters
        return height or own["height"].default, width or own["width"].default, frames or own["num_frames"].default

    def latent_shape(self) -> tuple[int, ...]:
        pipeline = self.pipeline
        if pipeline.config.get("boundary_ratio") is not None or pipeline.config.get("expand_timesteps"):
            raise ModelError("this Wan pipeline has two denoisers or one time a token, which are not supported yet.")
        _, patch_height, patch_width = self.denoiser.config.patch_size
        factor, every = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        if (self.frames - 1) % every:
            raise ModelError(f"frames is {self.frames}; Wan makes 1 + a multiple of {every} of them.")
        high = patch_height * _part(self.height, factor * patch_height)
        wide = patch_width * _part(self.width, factor * patch_width)
        return (self.denoiser.config.in_channels, 1 + (self.frames - 1) // every, high, wide)

    def encode(self, prompts: str | list[str], negative: bool) -> dict[str, Tensor]:
        text = self.pipeline.encode_prompt(
            prompts, self.negative_prompt or None, do_classifier_free_guidance=negative,
            max_sequence_length=self.call_arguments.get("max_sequence_length", 512), device=self.device,
        )  # fmt: skip
        return {"text": text[negative]}

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x, timestep=timestep, encoder_hidden_states=prompt["text"], return_dict=False
        )[0]  # fmt: skip


class Unconditional(Family):
    """A UNet on pixels, no prompt: every prompt means the same."""

    takes_negative_prompt = False
    takes_prompts = False
    needs = ()

    targets = (*Family.targets, "conv1", "conv2")  # small ones have no attention
    default_guidance = 1.0

    def size(self, height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
        own_height, own_width = self._own_size(height, width)
        found = height or own_height, width or own_width
        if found != (own_height, own_width):  # its own call has no such arguments: it draws what the configuration says
            self.denoiser.register_to_config(sample_size=list(found))
        return *found, 1

    def latent_shape(self) -> tuple[int, ...]:
        return (self.denoiser.config.in_channels, self.height, self.width)

    def remember(self, prompts: Sequence[str]) -> None:
        self.table.rows.update(dict.fromkeys(prompts, 0))

    def call(self, network: Any, timestep: Tensor, x: Tensor, prompt: dict[str, Tensor]) -> Tensor:
        return network(x, timestep, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        return (x / 2 + 0.5).clamp(0, 1)

    def latents(self, samples: Tensor) -> Tensor:
        return 2 * samples - 1


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "WanPipeline": Wan,
    "DDPMPipeline": Unconditional,
    "DDIMPipeline": Unconditional,
}
