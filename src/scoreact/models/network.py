"""Any network as a `ScoreModel`: prior, class names as prompts, guidance, decoding; and a wrapper for integer time steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics import prediction as kinds
from ..dynamics.prediction import Prediction
from ..dynamics.schedule import Schedule, step_number
from ..support.devices import tensor_cores
from ..support.errors import ModelError
from ..support.names import did_you_mean
from ..types import Condition
from .base import HasFeatures
from .feature_memory import FeatureMemory

SLACK = 0.05  # of the declared range: what a denoiser's error moves a value beyond its end is not worth a word
MANY = 0.01  # the share of values further out than that from which on the range was declared wrongly


class NetworkModel(nn.Module):
    """A diffusion or flow model around a network of your own, unconditional or class-conditional.

    Args:
        network: (x [B, *D], t [B] in [0, 1]) -> [B, *D] of kind `prediction`; with `classes` (x, t, label [B]), where label
            len(classes) means "no class". One that wants integer steps goes into `IntegerSteps`. With a method
            `with_features` (see `HasFeatures`) it has a value by `value="linear"`.
        schedule: alpha(t) and sigma(t) that the network was trained with, t = 0 at noise and 1 at data.
        prediction: what the network's output is, one of `dynamics.prediction`.
        shape: of one state, D.
        classes: names of the labels 0, 1, ...; they are the prompts. None: unconditional, the only prompt is "".
        guidance_scale: 1 is the conditional model, w the score s_none + w (s_class - s_none) (Ho & Salimans 2022). Another
            one than 1 needs a network that was trained with the label for "no class" too.
        low: the least value of the data. Given with `high`, `decode` rescales [low, high] to [0, 1] and cuts off what lies
            beyond; left out, samples are decoded as they are.
        high: the greatest value of the data.
        bfloat16: run the network in bfloat16 where that is the faster of the two; state in and score out stay float32.
        rows_per_call: states that the network sees at once, always that many (the last call is filled up with repeats): a
            sample's score then has the same bits in every batch, which convolutions and attention do not promise, and memory
            is bounded. None: as many as are asked for.

    Raises:
        ModelError: a range with one end or none inside, no class at all, guidance without classes, or no rows a call.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        shape: Sequence[int],
        classes: Sequence[str] | None = None,
        *,
        guidance_scale: float = 1.0,
        low: float | None = None,
        high: float | None = None,
        bfloat16: bool = False,
        rows_per_call: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(prediction, Prediction):
            raise ModelError(
                f"prediction is {prediction!r}; give one of dynamics.prediction, such as prediction.epsilon."
            )
        if (low is None) != (high is None):
            raise ModelError(f"low is {low} and high is {high}; give both ends of the data's range, or neither.")
        if low is not None and high is not None and not low < high:
            raise ModelError(f"low is {low} and high is {high}; low must be the smaller.")
        if isinstance(classes, str) or (classes is not None and not len(classes)):
            raise ModelError(f"classes is {classes!r}; give a list of names, or None for an unconditional model.")
        if classes is None and guidance_scale != 1.0:
            raise ModelError(
                f"guidance_scale is {guidance_scale}, but there are no classes to guide to; leave it at 1."
            )
        if rows_per_call is not None and rows_per_call < 1:
            raise ModelError(f"rows_per_call is {rows_per_call}; give at least 1, or None for any number.")
        self.network = network
        self._schedule = schedule
        self.prediction = prediction
        self.shape = tuple(shape)
        self.conditional = classes is not None
        self.classes = ("",) if classes is None else tuple(classes)
        self.guidance_scale = guidance_scale
        self.low, self.high = low, high
        self.use_bfloat16 = bfloat16
        self.rows_per_call = rows_per_call
        self.memory: FeatureMemory | None = None
        self._cut = _Cut()

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def batch_dependent(self) -> bool:
        """In bfloat16 the last bits of a sample's score depend on the batch around it."""
        return self.use_bfloat16

    @property
    def rounds(self) -> bool:
        """Whether it computes in less than float32, which costs path KL by rounding alone."""
        return self.use_bfloat16

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """sigma(t_min) times standard normal noise, [B, *D]."""
        noise = torch.randn(len(condition), *self.shape, generator=generator, device=self.device)
        sigma = self.schedule.sigma(torch.tensor(self.schedule.t_min))
        return noise * float(sigma)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Class names to labels, kept as the condition's rows.

        Args:
            prompts: B names out of `classes`; of an unconditional model B times "".

        Raises:
            ModelError: a prompt that is no class, with the nearest one that is.
        """
        index = {name: i for i, name in enumerate(self.classes)}
        for prompt in prompts:
            if prompt not in index and not self.conditional:
                raise ModelError(f"unknown prompt {prompt!r}; this model is unconditional, its only prompt is ''.")
            if prompt not in index:
                known = ", ".join(self.classes)
                raise ModelError(
                    f"unknown prompt {prompt!r}; this model knows: {known}.{did_you_mean(prompt, self.classes)}"
                )
        if not self.conditional:
            return Condition(list(prompts))
        return Condition(list(prompts), torch.tensor([index[p] for p in prompts], device=self.device))

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        label = () if condition.rows is None else (condition.rows,)
        if self.memory is None:
            output = self._predict(t, x, *label)
        else:
            output, features = self._with_features(t, x, *label)
            self.memory.add(t, x, condition, features)
        if self.guidance_scale != 1.0 and label:
            none = self._predict(t, x, torch.full_like(label[0], len(self.classes)))
            output = none + self.guidance_scale * (output - none)
        return kinds.convert(self.prediction, kinds.score, self.schedule, t, x, output)

    def _calls(self, *given: Tensor) -> Iterator[tuple[list[Tensor], int]]:
        """What each call of the network gets, and how many of its rows are not there to fill it up."""
        count, size = len(given[0]), self.rows_per_call
        if size is None:
            yield list(given), count
            return
        for start in range(0, count, size):
            rows = torch.arange(start, start + size, device=given[0].device).clamp(max=count - 1)
            yield [x[rows] for x in given], count - start

    def _predict(self, t: Tensor, x: Tensor, *label: Tensor) -> Tensor:
        return torch.cat([self._one_call(*given)[:count] for given, count in self._calls(t, x, *label)])

    def _one_call(self, t: Tensor, x: Tensor, *label: Tensor) -> Tensor:
        with self._computing(x.device.type):
            output: Any = self.network(x, t, *label)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(
                f"the network returned {found} for states of shape {tuple(x.shape)}; expected a tensor of that shape. Wrap "
                "the network in a module that returns only the prediction."
            )
        if torch.is_grad_enabled() and not output.requires_grad and self._wants_gradient(x):
            raise ModelError(
                "the network's output carries no gradient, so it cannot be trained; take out `detach`, `no_grad` or numpy."
            )
        return output.float()

    def _computing(self, device: str) -> contextlib.AbstractContextManager[Any]:
        """In bfloat16; else in float32 without TF32, torch's default for convolutions, which rounds as float16 does."""
        return torch.autocast(device, torch.bfloat16) if self.use_bfloat16 else tensor_cores(False)

    def _wants_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.network.parameters())

    def _with_features(self, t: Tensor, x: Tensor, *label: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.network, HasFeatures)  # `keep_features` has looked
        outputs, features = [], []
        for (t_part, x_part, *rest), count in self._calls(t, x, *label):
            with self._computing(x_part.device.type):
                output, seen = self.network.with_features(x_part, t_part, *rest)
            outputs.append(output[:count].float())
            features.append(seen[:count].float())
        return torch.cat(outputs), torch.cat(features)

    def keep_features(self) -> None:
        """Remember from now on the features of every state whose score is asked for. Raises ModelError if there are none."""
        if not isinstance(self.network, HasFeatures):
            raise ModelError(
                f"{type(self.network).__name__} has no `with_features`, so there is nothing that a linear value could read; "
                "give it one (output and features [B, F]), or use value network."
            )
        self.memory = FeatureMemory()

    def features(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, int]:
        """The network's own features at (t [B], x [B, *D]): [B, F], and for how many states a pass had to be made."""

        def make(t: Tensor, x: Tensor, condition: Condition) -> Tensor:
            return self._with_features(t, x, *(() if condition.rows is None else (condition.rows,)))[1]

        if x.requires_grad or self.memory is None:
            return make(t, x, condition), len(x)
        return self.memory.recall(t, x, condition, make)

    def decode(self, x: Tensor) -> Tensor:
        """The states as they are, or, where the data's range was declared, rescaled from it to [0, 1] and cut to that."""
        if self.low is None or self.high is None:
            return x
        self._cut.look(x, self.low, self.high)
        return ((x - self.low) / (self.high - self.low)).clamp(0, 1)

    def encode(self, samples: Tensor) -> Tensor:
        """Samples as the states that they are decoded from."""
        return samples if self.low is None or self.high is None else self.low + (self.high - self.low) * samples

    def notes(self) -> list[str]:
        """That more of what was decoded lay outside the declared range than a denoiser's error explains."""
        return [] if self.low is None or self.high is None else self._cut.notes(self.low, self.high)


class _Cut:
    """How much of what was decoded lay outside the declared range. Counted on the device: no call waits for it."""

    def __init__(self) -> None:
        self.values = 0
        self.seen: tuple[Tensor, Tensor, Tensor] | None = None  # values out by more than SLACK, the lowest, the highest

    @torch.no_grad()
    def look(self, x: Tensor, low: float, high: float) -> None:
        slack = SLACK * (high - low)
        outside, lowest, highest = ((x < low - slack) | (x > high + slack)).sum(), x.detach().min(), x.detach().max()
        if self.seen is not None and self.seen[0].device == x.device:
            outside = self.seen[0] + outside
            lowest, highest = torch.minimum(self.seen[1], lowest), torch.maximum(self.seen[2], highest)
            self.values += x.numel()
        else:
            self.values = x.numel()
        self.seen = (outside, lowest, highest)

    def notes(self, low: float, high: float) -> list[str]:
        if self.seen is None:
            return []
        outside, lowest, highest = (float(found) for found in self.seen)
        share = outside / max(self.values, 1)
        if not share > MANY:
            return []
        return [
            f"{100 * share:.3g} % of the decoded values lay outside the range declared as low={low:g}, high={high:g}, by more "
            f"than {100 * SLACK:g} % of it (they reach from {lowest:.3g} to {highest:.3g}), and were cut to its ends, which "
            "the reward cannot see; declare the range that the data have, or leave low and high out."
        ]


class IntegerSteps(nn.Module):
    """A network that was trained on integer steps, as one of times in [0, 1]: a DDPM of your own in `NetworkModel`.

    Step i of T sits at t = 1 - (i + 1) / T, as in `FromAlphasCumprod`: T - 1 is the noisiest, at t = 0, and 0 the cleanest.

    Args:
        network: (x [B, *D], step [B], ...) -> the prediction; what follows the step (a label) is passed on as it is.
        steps: T, the length of the table of alphas that it was trained with.
        rounded: give int64 steps, as a network with an embedding table of T rows needs. Otherwise steps are float32, whole
            numbers at the table's times and between them where the sampler stops between them: N uniform steps stop at
            the table's times alone where N divides T - 1.
    """

    def __init__(self, network: nn.Module, steps: int, rounded: bool = False) -> None:
        super().__init__()
        if steps < 2:
            raise ModelError(f"steps is {steps}; give the length of the table that the network was trained with.")
        self.network = network
        self.steps = steps
        self.rounded = rounded
        if isinstance(network, HasFeatures):  # offered only where there are some
            self.with_features = self._with_features

    def forward(self, x: Tensor, t: Tensor, *rest: Tensor) -> Any:
        return self.network(x, step_number(t, self.steps, self.rounded), *rest)

    def _with_features(self, x: Tensor, t: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.network, HasFeatures)
        return self.network.with_features(x, step_number(t, self.steps, self.rounded), *rest)
