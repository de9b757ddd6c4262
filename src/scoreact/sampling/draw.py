"""Samples of a model: the same seed gives two models the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dynamics.samplers import Sampler
from ..dynamics.sde import SDE, Noise, noise_level
from ..models.base import ScoreModel


def balanced(prompts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` prompts: every one equally often, the remainder drawn without replacement, in random order."""
    device = generator.device
    whole = torch.arange(len(prompts), device=device).repeat(count // len(prompts))
    rest = torch.randperm(len(prompts), generator=generator, device=device)[: count % len(prompts)]
    index = torch.cat([whole, rest])
    return [prompts[i] for i in index[torch.randperm(count, generator=generator, device=device)].tolist()]


@torch.no_grad()
def draw(
    model: ScoreModel,
    prompts: Sequence[str],
    sampler: Sampler,
    ts: Tensor,
    seed: int,
    device: torch.device | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """States [N + 1, B, *D] and decoded samples of one path a prompt. The same seed gives two models the same noise.

    noise: of samplers that have any; noise_level(1) by default.
    """
    generator = torch.Generator(device=device or torch.device("cpu")).manual_seed(seed)
    condition = model.condition(prompts)
    x = model.prior(condition, generator)
    sde = SDE(model.schedule, noise or noise_level(1.0))
    xs = sampler(sde, lambda t, state: model.score(t, state, condition), ts.to(x.device), x, generator)
    return xs, model.decode(xs[-1])
