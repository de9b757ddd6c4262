"""A pipeline with weights to train as a `ScoreModel`."""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...dynamics import prediction as kinds
from ...dynamics.schedule import Schedule, ShiftedFlow
from ...support.errors import ModelError
from ...support.files import write_sums
from ...types import Condition
from ..feature_memory import FeatureMemory
from ..value_networks import FeatureValue
from .families import Family
from .features import feature_width, features_at, prediction_and_features
from .formats import (
    Layers,
    acting_layers,
    cast,
    dtypes_of,
    has_adapters,
    merge_adapters,
    rank_of,
    write_diffusers,
    write_kohya,
    write_peft,
)


class PipelineModel(nn.Module):
    """One set of trainable weights on a pipeline, as a `ScoreModel`: an adapter, a whole denoiser, or nothing at all.

    Its parameters are what training changes, and no others. A (deep) copy has weights of its own and shares the rest: a
    second adapter on the same frozen network, or a second denoiser. `reference()` is the pretrained model without a copy.
    """

    def __init__(
        self,
        family: Family,
        adapter: str | None = None,
        network: nn.Module | None = None,
        starts_elsewhere: bool = False,
    ) -> None:
        super().__init__()
        self.family = family
        self.adapter_name = adapter
        self.network = network
        self.trains_on = starts_elsewhere  # an adapter of the user's
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
        family, encoders = self.family, self.family.text_encoders()
        for module in family.modules():
            # an encoder stays where it is: it comes when there is a prompt to encode
            stays = any(module is encoder for encoder in encoders)
            module._apply(lambda p, stays=stays: fn(p).to(p.device) if stays else fn(p))
        family.table.apply(fn)
        family.negative = {name: fn(row) for name, row in family.negative.items()}
        return self

    # the five members of a ScoreModel

    @property
    def schedule(self) -> Schedule:
        return self.family.schedule

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """What the scheduler begins with, [B, *D]: normal, of the variance of unit data at t_min, or of the noise's alone."""
        family, t = self.family, torch.tensor(self.schedule.t_min, dtype=torch.float64)
        noise = torch.randn(len(condition), *family.shape, generator=generator, device=family.device)
        return noise * float((self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2).sqrt()) * family.starting_noise

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Any strings; each is encoded once and its embedding kept."""
        return self.family.condition(prompts)

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        family = self.family
        with self._acting():
            if family.keeps_features and self.memory is not None:
                output, features = prediction_and_features(family, self._denoiser, t, x, condition)
                self.memory.add(t, x, condition, features)
            else:
                output = family.predict(self._denoiser, t, x, condition)
        return kinds.convert(family.prediction, kinds.score, self.schedule, t, x, output)

    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] or videos [B, 3, F, H, W] in [0, 1]."""
        return self.family.decode(x)

    def encode(self, samples: Tensor) -> Tensor:
        """Pictures or videos in [0, 1] as the states that the autoencoder makes of them: nearly the inverse of `decode`."""
        return self.family.latents(samples)

    # beyond them

    @property
    def takes_prompts(self) -> bool:
        """Whether the pipeline draws what a text says."""
        return self.family.takes_prompts

    def features(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, int]:
        """The denoiser's own at (t [B], x [B, *D]), [B, F] float32, and for how many states a pass had to be made.

        A reference remembers those of the states whose score it was asked for; a gradient always takes a pass. See
        `features_at`.
        """
        if x.requires_grad or self.memory is None:
            return self._features(t, x, condition), len(x)
        return self.memory.recall(t, x, condition, self._features)

    def _features(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        with self._acting():
            return features_at(self.family, self._denoiser, t, x, condition)

    def keep_features(self) -> None:
        """A reference remembers from now on the features of every state whose score it is asked for."""
        feature_width(self.family)  # says where there are none
        self.family.keeps_features = True

    def feature_value(self) -> FeatureValue:
        """A new value network on the reference's features: `finetune(..., value_network=model.feature_value)`."""
        self.keep_features()
        return FeatureValue(feature_width(self.family))

    @property
    def _denoiser(self) -> Any:
        return self.family.denoiser if self.network is None else self.network

    @property
    def rounds(self) -> bool:
        """Whether a part of the pipeline is less than float32, or may be on its device (TF32): see `rounding`."""
        family = self.family
        return family.dtype != torch.float32 or family.device.type == "cuda"

    @property
    def starts_elsewhere(self) -> bool:
        """Whether it is another model than its reference already: an adapter of the user's, or one that was trained before."""
        return self.trains_on or any(bool(p.any()) for name, p in self.adapter.named_parameters() if "lora_B" in name)

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
        """Up to 1 it is the conditional model: only above that is anything guided, as in diffusers.

        Policy, reference and average share it: a ratio compares like with like.
        """
        return self.family.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self.family.guide(scale)

    @property
    def negative_prompt(self) -> str:
        """What guidance leads away from; shared like the guidance scale."""
        return self.family.negative_prompt

    @negative_prompt.setter
    def negative_prompt(self, prompt: str) -> None:
        self.family.guide(negative_prompt=prompt)
        self.family.negative = {}  # encoded anew when it is needed

    @property
    def batch_dependent(self) -> bool:
        """Whether a sample's score may have other last bits in another batch: where no rows_per_call fixes the batch.

        In float32 too: guidance and 1 / alpha near the noise turn a rounding of 1e-7 into log-ratios of 1e-3.
        """
        return self.family.rows_per_call is None

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, with these weights in place until another view's are asked for."""
        family = self.family
        family.put_text_encoders(family.device)  # whoever asks may call it
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

    def reference_digest(self) -> str:
        """A fingerprint of the pretrained pipeline (see `Adapters.digest`); of `full` weights, of what they are now."""
        own = self._denoiser
        return self.family.digest(own if module is self.family.denoiser else module for module in self.family.modules())

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

    @property
    def metadata(self) -> Mapping[str, Mapping[str, Any]]:
        """Of the prompts that have any, for the reward; shared by all views of the pipeline."""
        return self.family.metadata

    @metadata.setter
    def metadata(self, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        self.family.metadata = metadata

    def notes(self) -> list[str]:
        """What a user should know of the prompts."""
        return self.family.about_prompts()

    @property
    def formats(self) -> tuple[str, ...]:
        """Of `save`; the first is its default."""
        if self.network is not None:
            return ("pipeline",)
        loaded = hasattr(self.family.pipeline, "save_lora_weights")  # by diffusers
        kohya = ("kohya",) if loaded and self.family.component == "unet" else ()
        return ("diffusers", *kohya, "peft", "pipeline") if loaded else ("pipeline", "peft")

    def save(self, folder: str | Path, form: str | None = None, about: Mapping[str, str] | None = None) -> None:
        """The tuned weights as others load them; adapters that the pipeline came with are part of them.

        Args:
            folder: made where it is missing.
            form: diffusers, kohya (both for `load_lora_weights(folder)`), peft (for `PeftModel.from_pretrained(denoiser,
                folder)`) or pipeline (all of it, the adapters added into the weights); None: the first of `formats`.
            about: goes into the file's header.

        Raises:
            ModelError: a form that does not hold these weights, or that nothing reads for this pipeline.
        """
        folder, header = Path(folder), dict(about or {})
        form = form or self.formats[0]
        if form not in self.formats:
            raise ModelError(
                f"form is {form!r}; of a {type(self.family.pipeline).__name__} tuned "
                f"{'in full' if self.network is not None else 'by LoRA'} there are: {', '.join(self.formats)}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        if form == "pipeline":
            self._save_pipeline(folder)
            return
        networks = self._acting_layers()
        own = networks[self.family.component]
        if form != "diffusers" and len(networks) > 1:
            raise ModelError(
                f"the pipeline came with an adapter on a text encoder too, which {form}'s form does not hold in a way that is "
                "read everywhere; take diffusers or pipeline."
            )
        if form == "diffusers":
            write_diffusers(folder, networks, header)
        else:
            (write_kohya if form == "kohya" else write_peft)(folder, own, header)

    def export(self, folder: Path) -> None:
        """What a run leaves: an adapter for `load_lora_weights(folder)`, or else a pipeline in `folder / "pipeline"`."""
        self.save(folder if self.formats[0] == "diffusers" else folder / "pipeline")

    def facts(self) -> dict[str, Any]:
        """For a model card; `call` holds the arguments of the pipeline's own call that these weights were tuned with."""
        family, pipeline = self.family, self.family.pipeline
        found: dict[str, Any] = {
            "base_model": family.source, "licence": family.licence, "pipeline": type(pipeline).__name__,
            "component": family.component, "dtype": str(family.dtype).removeprefix("torch."),
            "call": family.call_options(), "video": family.video, "takes_prompts": family.takes_prompts,
            "starts_elsewhere": self.trains_on, "reference": "the base model",
            "without": [
                name for name, part in pipeline.components.items() if part is None and name.startswith(("text_e", "tokenizer"))
            ],
        }  # fmt: skip
        if self.adapter_name is not None:
            found["rank"] = rank_of(self._acting_layers()[family.component])
        if family.lora is not None:
            found["lora"] = family.lora
            found["reference"] += ", without the LoRA" if self.trains_on else " with the LoRA that was given"
        elif family.base_adapters:
            found["reference"] += " with the adapter that it came with"
        return found

    def _acting_layers(self) -> dict[str, Layers]:
        """Of each component that has adapters: what they are together."""
        pipeline, component = self.family.pipeline, self.family.component
        encoders = {name: getattr(pipeline, name) for name in pipeline.components if name.startswith("text_encoder")}
        found = {name: acting_layers(module) for name, module in encoders.items() if module is not None}
        return {
            component: acting_layers(self.family.denoiser, self._adapters()),
            **{name: layers for name, layers in found.items() if layers},
        }

    def _save_pipeline(self, folder: Path) -> None:
        """All components without peft's layers, each tensor in the dtype that it was opened in."""
        family, pipeline = self.family, self.family.pipeline
        own = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
        try:
            for name, module in own.items():
                stored = family.stored.get(name, {})
                source = self._denoiser if name == family.component else module
                if name == family.component or has_adapters(module) or dtypes_of(module) != stored:
                    plain = copy.deepcopy(source)
                    merge_adapters(plain, self._adapters() if name == family.component else None)
                    cast(plain, stored)
                    setattr(pipeline, name, plain)
            pipeline.save_pretrained(str(folder))
            write_sums(folder)
        finally:
            for name, module in own.items():
                setattr(pipeline, name, module)


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
