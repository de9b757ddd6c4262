"""Score matching as a reward: minus the error with which a model denoises the sample.

    R(x) = -mean over t and noise e of |e_hat(alpha x + sigma e) - e|^2 / d,       e_hat = -sigma score

Large where the model knows such samples. Up to weights over t it is the variational bound of log p_model(x). The noise is the
same for every sample and every call, so that R is a function of the sample, with a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.base import Encodes, ScoreModel
from ..support.errors import RewardError
from ..support.loading import load_named
from ..types import Condition, expand
from .base import need_times


class ScoreMatching:
    """R above.

    Args:
        model: the model that denoises, or my_model.py:build, which returns it. Left out: the pretrained model of the run.
        times: the noise levels, by their times, between the model's t_min and t_max.
        draws: noises a time.
        seed: of the noise.

    Calling: decoded samples [B, *D] and the condition of B -> [B]. Raises RewardError where there is no model, and for times
    outside of the model's. Samples are taken for states where the model has no `encode`.
    """

    name = "score_matching"
    differentiable = True

    def __init__(
        self, model: ScoreModel | str | None = None, times: Sequence[float] = (0.3, 0.5, 0.7, 0.9), draws: int = 4,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if not times or draws < 1:
            raise RewardError(f"times are {list(times)} and draws {draws}; give at least one of each.")
        self.times, self.draws, self.seed = [float(t) for t in times], draws, seed
        self.model: ScoreModel | None = None
        if model is not None:
            self.take_model(load_named(model, "model")() if isinstance(model, str) else model)

    def take_model(self, model: ScoreModel) -> None:
        """A frozen copy of this model denoises, where none was given."""
        if self.model is not None:
            return
        need_times(model, self.times)
        kept = copy.deepcopy(model)
        if isinstance(kept, nn.Module):
            kept.requires_grad_(False).eval()
        self.model = kept

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        model = self.model
        if model is None:
            raise RewardError(
                "score_matching has no model; give one, ScoreMatching(model) or --reward-option model=FILE:FN."
            )
        if isinstance(model, nn.Module):
            model.to(samples.device)
        x = model.encode(samples) if isinstance(model, Encodes) else samples
        condition = model.condition(condition.prompts)
        generator = torch.Generator().manual_seed(self.seed)
        total = x.new_zeros(len(x))
        for time in self.times:
            t = torch.full((len(x),), time, device=x.device)
            alpha, sigma = expand(model.schedule.alpha(t), x), expand(model.schedule.sigma(t), x)
            for _ in range(self.draws):
                noise = torch.randn(x.shape[1:], generator=generator).to(x)
                found = -sigma * model.score(t, alpha * x + sigma * noise, condition)
                total = total + (found - noise).square().flatten(1).mean(1)
        return -total / (len(self.times) * self.draws)
