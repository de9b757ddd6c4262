"""Any network (x, t, label) -> prediction as a `ScoreModel`: prior, class names as prompts, guidance, decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..dynamics import prediction as kinds
from ..dynamics.prediction import Prediction
from ..dynamics.schedule import Schedule
from ..support.names import did_you_mean
from ..types import Condition
from .feature_memory import FeatureMemory


class NetworkModel(nn.Module):
    """A class-conditional diffusion or flow model around a network.

    network: (x [B, *D], t [B], label [B]) -> [B, *D] of kind `prediction`; label len(classes) means "no class". With a method
    `with_features` (the same, and features [B, F] of what it sees) a value can be read off it.
    shape: D. guidance_scale: 1 is the conditional model, w the score s_none + w (s_class - s_none) (Ho & Salimans 2022).
    low, high: the range of the data; decoded samples lie in [0, 1]. bfloat16: run the network in bfloat16 where that
    is the faster of the two; state in and score out are float32 all the same.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        shape: Sequence[int],
        classes: Sequence[str],
        *,
        guidance_scale: float = 1.0,
        low: float = -1.0,
        high: float = 1.0,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self._schedule = schedule
        self.prediction = prediction
        self.shape = tuple(shape)
        self.classes = tuple(classes)
        self.guidance_scale = guidance_scale
        self.low, self.high = low, high
        self.use_bfloat16 = bfloat16
        self.memory: FeatureMemory | None = None

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """sigma(t_min) times standard normal noise, [B, *D]."""
        noise = torch.randn(len(condition), *self.shape, generator=generator, device=self.device)
        sigma = self.schedule.sigma(torch.tensor(self.schedule.t_min))
        return noise * float(sigma)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Class names to class indices. Raises ValueError naming an unknown one and the nearest known."""
        index = {name: i for i, name in enumerate(self.classes)}
        for prompt in prompts:
            if prompt not in index:
                known = ", ".join(self.classes)
                raise ValueError(
                    f"unknown prompt {prompt!r}; this model knows: {known}.{did_you_mean(prompt, self.classes)}"
                )
        return Condition(list(prompts), torch.tensor([index[p] for p in prompts], device=self.device))

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        assert condition.embedding is not None
        label = condition.embedding
        if self.memory is None:
            output = self._predict(t, x, label)
        else:
            output, features = self._with_features(t, x, label)
            self.memory.add(t, x, condition, features)
        if self.guidance_scale != 1.0:
            none = self._predict(t, x, torch.full_like(label, len(self.classes)))
            output = none + self.guidance_scale * (output - none)
        return kinds.convert(self.prediction, kinds.score, self.schedule, t, x, output)

    def _predict(self, t: Tensor, x: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            output: Tensor = self.network(x, t, label)
        return output.float()

    def _with_features(self, t: Tensor, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            output, features = self.network.with_features(x, t, label)  # type: ignore[operator]
        return output.float(), features.float()

    def keep_features(self) -> None:
        """Remember from now on the features of every state whose score is asked for. Raises ValueError if there are none."""
        if not callable(getattr(self.network, "with_features", None)):
            raise ValueError(
                f"{type(self.network).__name__} has no `with_features`, so there is nothing that a linear value could read; "
                "give it one (output and features [B, F]), or use value network."
            )
        self.memory = FeatureMemory()

    def features(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, int]:
        """The network's own at (t [B], x [B, *D]), [B, F], and for how many states a pass had to be made."""

        def make(t: Tensor, x: Tensor, condition: Condition) -> Tensor:
            assert condition.embedding is not None
            return self._with_features(t, x, condition.embedding)[1]

        if x.requires_grad or self.memory is None:
            return make(t, x, condition), len(x)
        return self.memory.recall(t, x, condition, make)

    def decode(self, x: Tensor) -> Tensor:
        return ((x - self.low) / (self.high - self.low)).clamp(0, 1)
