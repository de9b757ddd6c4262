"""What a pretrained denoiser makes inside of a decoded sample that noise was added to, as features of the sample.

    phi(x, c) = h(t, alpha(t) z + sigma(t) e, c) of each time, joined,      z the state that decodes to x

h is what the model `ReadsFeatures` shows. The noise e is the same for every sample and every call, so that phi is a function of
the sample, with a gradient. The model is the run's own: a reward keeps its digest, and another model is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.base import Encodes, HasReference, ReadsFeatures, ScoreModel
from ..models.weights import reference_digest_of
from ..support.devices import device_of
from ..support.errors import ModelError, RewardError
from ..types import expand
from .base import need_times

TIMES = (0.25, 0.5, 0.75)


class DenoiserFeatures:
    """phi above.

    Args:
        times: of the noise levels, between the model's t_min and t_max.
        model: digest of the pretrained weights that it is of; "" where that is whatever model is given.

    Calling: decoded samples [B, *D] and their B prompts -> [B, F]. Raises RewardError where there is no model or no prompt.
    """

    def __init__(self, times: Sequence[float] = TIMES, model: str = "") -> None:
        if not times:
            raise RewardError("times is empty; give at least one.")
        self.times, self.digest = [float(t) for t in times], model
        self.model: ScoreModel | None = None

    def take_model(self, model: ScoreModel) -> None:
        """A frozen view or copy of this pretrained model is asked, as it is now. Does nothing where there is one already."""
        if self.model is not None:
            return
        need_times(model, self.times)
        if self.digest and reference_digest_of(model) != self.digest:
            raise RewardError(
                f"the reward sees samples by another pretrained model than this {type(model).__name__}; train the model that "
                "it was fitted with, or fit a reward anew."
            )
        kept = model.reference() if isinstance(model, HasReference) else copy.deepcopy(model)
        if not isinstance(kept, ReadsFeatures):
            raise RewardError(f"{type(model).__name__} shows no features of its own; use others, such as convolution.")
        if not isinstance(model, HasReference):  # of a view the state is shared
            try:
                kept.keep_features()
            except ModelError as error:
                raise RewardError(f"features denoiser: {error}") from None
        if isinstance(kept, nn.Module):
            kept.requires_grad_(False).eval()
        self.model = kept

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        model = self.model
        if model is None:
            raise RewardError(
                "the reward sees samples by its pretrained model's own features, and has no model here; use it to train or to "
                "evaluate that model."
            )
        if len(prompts) != len(samples):
            raise RewardError(
                "features denoiser are of samples with their prompts, which are not known here; use others."
            )
        assert isinstance(model, ReadsFeatures)  # `take_model` has looked
        home = device_of(model)
        x = samples.to(home, torch.float32)
        x = model.encode(x) if isinstance(model, Encodes) else x
        condition = model.condition(prompts)
        generator, found = torch.Generator().manual_seed(0), []
        for time in self.times:
            t = torch.full((len(x),), time, device=home)
            noise = torch.randn(x.shape[1:], generator=generator).to(x)
            state = expand(model.schedule.alpha(t), x) * x + expand(model.schedule.sigma(t), x) * noise
            found.append(model.features(t, state, condition)[0].float())
        return torch.cat(found, 1)
