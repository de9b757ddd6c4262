"""The contract: what a model must have to be fine-tuned, and what it may have. Any data shape.

`ScoreModel` is what every model must have. Each other protocol here is one optional member: what it looks like, and what
a model that has it buys. Whoever uses one asks `isinstance(model, HasReference)`; nothing else in the package looks for
members by name. `scoreact check model FILE.py:FUNCTION` says which of them a model has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..dynamics.schedule import Schedule
from ..support.devices import HasDevice as HasDevice
from ..support.errors import SettingError
from ..types import Condition

if TYPE_CHECKING:
    from .gaussian_mixture import GaussianMixture


@runtime_checkable
class ScoreModel(Protocol):
    """What every model has: a schedule, a prior, prompts to conditions, a score, and a decoder. Any data shape.

    A trainable model is also an `nn.Module`; its parameters with requires_grad are what training changes. B is the number
    of samples, *D the shape of one state.
    """

    @property
    def schedule(self) -> Schedule:
        """alpha(t), sigma(t), their derivatives, and the interval [t_min, t_max]; t is 0 at noise and 1 at data."""
        ...

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """The states that sampling starts from.

        Args:
            condition: of the B samples.
            generator: the only source of randomness; on the model's device.

        Returns:
            States at t_min, [B, *D] float32.
        """
        ...

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Turn prompts into what `score` is asked under.

        Args:
            prompts: B strings that the model knows; a model without prompts knows "".

        Returns:
            The condition of B samples, in the order of the prompts.

        Raises:
            ValueError: a prompt that the model does not know, which the message names.
        """
        ...

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """grad log p_t(x | condition): guidance and the kind of prediction live in here.

        Args:
            t: times in [t_min, t_max], [B] float32; a batch may hold different ones.
            x: states, [B, *D] float32.
            condition: of the B samples.

        Returns:
            The score, [B, *D] float32, differentiable in x and in the trainable parameters.
        """
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Final states to what a reward sees.

        Args:
            x: states at t_max, [B, *D] float32.

        Returns:
            Pictures in [0, 1], series, points: [B, ...]. Rules that follow the reward's gradient differentiate it.
        """
        ...


# --- what a model may have -----------------------------------------------------------------------------------------------


@runtime_checkable
class Encodes(Protocol):
    """The inverse of `decode`, for rules and rewards that learn from real data. Without it the data are taken as states."""

    def encode(self, samples: Tensor) -> Tensor:
        """Samples as `decode` gives them, [B, ...], to the states at t_max that it takes, [B, *D]."""
        ...


@runtime_checkable
class HasReference(Protocol):
    """A frozen view of the pretrained model. It saves the copy that a run otherwise keeps beside the model."""

    def reference(self) -> ScoreModel:
        """The pretrained model: its score must stay what it was before training, whatever becomes of this one."""
        ...


@runtime_checkable
class StartsElsewhere(Protocol):
    """Says that its first weights are not its reference's, such as those of an adapter that the user brought. A run then
    evaluates both before training, and learns nothing from the reference's paths as if they were its own."""

    @property
    def starts_elsewhere(self) -> bool:
        """Whether the model before training is another than its reference."""
        ...


@runtime_checkable
class HasPath(Protocol):
    """Says how it is drawn from well: `solver`, `grid` and `steps` of training and of sampling, where a user gives none."""

    @property
    def suited_path(self) -> Mapping[str, Any]:
        """Settings by name."""
        ...


@runtime_checkable
class HasClasses(Protocol):
    """The prompts a model knows, where they can be listed. Unknown ones are then refused with the list, and a value network
    can be made without asking the user for a prompt."""

    @property
    def classes(self) -> Sequence[str]:
        """Every prompt that `condition` accepts."""
        ...


def rows_among(names: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Each class of some data with its place among a model's: by name, or by its number from 0 where all are numbers and the
    model's are not. Raises SettingError for one that the model does not know."""
    numbered = all(name.isdigit() for name in names) and not set(names) & set(classes)
    known = [str(i) for i in range(len(classes))] if numbered else list(classes)
    if unknown := [name for name in names if name not in known]:
        raise SettingError(
            f"the data have the class {unknown[0]!r}, which the model does not know ({', '.join(classes)}); name the folders "
            "or labels as the model does, by its numbers from 0, or leave labels out."
        )
    return {name: known.index(name) for name in names}


@runtime_checkable
class TakesPrompts(Protocol):
    """Says that samples are of whatever a text asks for. Training without a prompt is then refused, as it would be on ""."""

    @property
    def takes_prompts(self) -> bool:
        """Whether `condition` accepts any text and `score` reads it."""
        ...


@runtime_checkable
class ReadsFeatures(Protocol):
    """What the pretrained network makes of a state inside. It buys `value="linear"`: a value solved for in closed form on
    these features, for which far fewer rewards are needed than for a value network of its own."""

    def keep_features(self) -> None:
        """Remember from now on the features of every state whose score is asked for: the value's pass is then free.

        Raises:
            ValueError: the network has none to read.
        """
        ...

    def features(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, int]:
        """The features at (t [B], x [B, *D]).

        Returns:
            Features [B, F] float32, and for how many of the B states the network had to be called.
        """
        ...


@runtime_checkable
class HasRowsPerCall(Protocol):
    """The most states that the network takes at once. It bounds the memory of a gradient through the reference, and gives a
    sample the same bits in every batch."""

    @property
    def rows_per_call(self) -> int | None:
        """Rows of one call of the network; None: as many as are asked for."""
        ...


@runtime_checkable
class BatchDependent(Protocol):
    """Says that a sample's score may have other last bits in another batch. A run then does not insist that the ratio of
    policy to behaviour is exactly 1 before the first update; without the member it does, and stops when it is not."""

    @property
    def batch_dependent(self) -> bool:
        """Whether the batch around a sample may change the last bits of its score."""
        ...


@runtime_checkable
class Rounds(Protocol):
    """Says that the network is stored in less than float32, or computes in less. A run then measures at its start the path KL
    that rounding alone costs, and says so where that leaves nothing for the reward."""

    @property
    def rounds(self) -> bool:
        """Whether weights or products are, or may be, less than float32."""
        ...


@runtime_checkable
class HasGuidance(Protocol):
    """Classifier-free guidance (Ho & Salimans 2022) inside `score`. Samples can then be drawn at another scale."""

    guidance_scale: float  # 1 is the conditional model; w is s_none + w (s_prompt - s_none)


@runtime_checkable
class Exports(Protocol):
    """Weights in the form that the model's own library loads. A run leaves them in its folder beside its own file."""

    def export(self, folder: Path) -> None:
        """Write them into an existing folder."""
        ...


@runtime_checkable
class Saves(Protocol):
    """Weights in several forms that other programs load, and facts for a model card. It buys `scoreact export` in them."""

    @property
    def formats(self) -> Sequence[str]:
        """Of diffusers, kohya, peft, pipeline; the first is the default."""
        ...

    def save(self, folder: Path, form: str, about: Mapping[str, str]) -> None:
        """Write the tuned weights in one of these forms, `about` in the file's header."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What a model card says: base_model, licence, rank, dtype, call (arguments of the pipeline's own call), ..."""
        ...


@runtime_checkable
class HasExactLaw(Protocol):
    """A pretrained law in closed form. The report then draws the optimum p exp(R / beta) / Z beside what was reached, where
    the reward is linear or quadratic."""

    def exact_law(self) -> GaussianMixture | None:
        """The mixture that the pretrained model samples from; None where it is not known after all."""
        ...


@runtime_checkable
class HasPriorDensity(Protocol):
    """The density of its prior, where that is not normal noise of sigma(t_min). It buys the log-likelihood of samples."""

    def prior_log_prob(self, x: Tensor, condition: Condition) -> Tensor:
        """log p of the states that sampling starts from, x [B, *D]: [B], nats."""
        ...


@runtime_checkable
class HasMetadata(Protocol):
    """Metadata of prompts, which `condition` puts beside each of them for the reward to read. It buys prompts from tables, and
    from functions that return metadata."""

    metadata: Mapping[str, Mapping[str, Any]]  # of the prompts that have any; set by whoever reads the prompts


@runtime_checkable
class HasNotes(Protocol):
    """Things that a user should know about what the model has done so far. A run shows each sentence once."""

    def notes(self) -> list[str]:
        """Sentences with the value and the remedy; an empty list when there is nothing to say."""
        ...


@runtime_checkable
class HasReferenceDigest(Protocol):
    """A fingerprint of the pretrained weights that training leaves alone. A run compares it before it goes on, and needs it
    where those weights are not the module's own parameters (adapters on a shared frozen network)."""

    def reference_digest(self) -> str:
        """Hexadecimal; the same for the same pretrained weights, before and after training."""
        ...


@runtime_checkable
class HasAdapters(Protocol):
    """Weights beside frozen ones, of which training changes no others (see `models.lora`). `write_back` then puts both
    together into a network of the user's that has none."""

    def merged(self) -> nn.Module:
        """A plain model, with the adapters added to weights of its own."""
        ...


# --- what a network may have, and a value network ------------------------------------------------------------------------


@runtime_checkable
class HasFeatures(Protocol):
    """A network in `NetworkModel` that shows what it sees: what `value="linear"` reads there."""

    def with_features(self, x: Tensor, t: Tensor, *label: Tensor) -> tuple[Tensor, Tensor]:
        """Its output for (x [B, *D], t [B], label [B] of class-conditional ones), and features [B, F]."""
        ...


@runtime_checkable
class ChoosesInputs(Protocol):
    """A value network that can see only one thing. It then overrides the setting `value_inputs`."""

    inputs: str  # "x", "x_data_hat", "both" (joined along dimension 1) or "features" (of `ReadsFeatures`)


@runtime_checkable
class SaysIfCounted(Protocol):
    """A value network so cheap that its calls are not counted as network calls."""

    counted: bool  # False: not counted
