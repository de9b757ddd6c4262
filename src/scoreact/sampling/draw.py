"""Samples of a model: the same seed gives two models the same noise.

Sample i of a prompt comes from (seed, prompt, i), whatever else is drawn; two seeds share nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dynamics.samplers import BY_SAMPLE, Sampler
from ..dynamics.sde import SDE, Noise, noise_level
from ..models.base import ScoreModel
from ..support.seeds import checked_seed, derived
from ..types import Condition

Generators = torch.Generator | Sequence[torch.Generator]  # one for all, or one for each sample, or each so many


def balanced(prompts: Sequence[str], count: int, generator: torch.Generator, each: int = 1) -> list[str]:
    """`count` prompts: every one equally often, the remainder drawn without replacement, in random order.

    each: how often one that is drawn stands there at least, one after the other (but for the last, if `count` is no multiple).
    """
    if each > 1:
        return [p for p in balanced(prompts, -(-count // each), generator) for _ in range(each)][:count]
    device = generator.device
    whole = torch.arange(len(prompts), device=device).repeat(count // len(prompts))
    rest = torch.randperm(len(prompts), generator=generator, device=device)[: count % len(prompts)]
    index = torch.cat([whole, rest])
    return [prompts[i] for i in index[torch.randperm(count, generator=generator, device=device)].tolist()]


def seeds_of(seed: int, prompts: Sequence[str], first: int = 0, each: int = 1) -> list[int]:
    """Seeds for samples of prompts, `each` of them a sample: those of (seed, prompt, how often the prompt came before).

    first: the number of a prompt's first sample. No two of a prompt are the same, with torch's 32 bits on the CPU too.
    """
    checked_seed(seed)
    before: Counter[str] = Counter()
    found: list[int] = []
    for prompt in prompts:
        start = derived(seed, prompt) + (first + before[prompt]) * each
        found += range(start, start + each)
        before[prompt] += 1
    return found


def seeded(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def prior_of(model: ScoreModel, condition: Condition, generator: Generators) -> Tensor:
    """The model's prior, [B, *D]; with G generators each draws B / G rows."""
    if isinstance(generator, torch.Generator):
        return model.prior(condition, generator)
    rows = torch.arange(len(condition)).reshape(len(generator), -1)
    return torch.cat([model.prior(condition[own], g) for own, g in zip(rows, generator, strict=True)])


@torch.no_grad()
def draw(
    model: ScoreModel,
    prompts: Sequence[str],
    sampler: Sampler,
    ts: Tensor,
    seed: int | Sequence[int],
    device: torch.device | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """States [N + 1, B, *D] and decoded samples of one path a prompt. The same seed gives two models the same noise.

    seed: of all, or one for each: a sample is then the same whatever it is drawn with, to rounding.
    noise: of samplers that have any; noise_level(1) by default.
    """
    xs = draw_states(model, prompts, sampler, ts, seed, device, noise)
    return xs, model.decode(xs[-1])


@torch.no_grad()
def draw_states(
    model: ScoreModel,
    prompts: Sequence[str],
    sampler: Sampler,
    ts: Tensor,
    seed: int | Sequence[int],
    device: torch.device | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """The states of `draw` alone, [N + 1, B, *D], for who decodes them one after the other."""
    if (
        not isinstance(seed, int) and sampler not in BY_SAMPLE
    ):  # one of the user's takes a generator, and shares its steps
        paths = [draw_states(model, [p], sampler, ts, s, device, noise) for p, s in zip(prompts, seed, strict=True)]
        return torch.cat(paths, dim=1)
    place = device or torch.device("cpu")
    generators = seeded([seed] if isinstance(seed, int) else seed, place)
    source: Any = generators[0] if isinstance(seed, int) else generators
    condition = model.condition(prompts)
    x = prior_of(model, condition, source)
    sde = SDE(model.schedule, noise or noise_level(1.0))
    return sampler(sde, lambda t, state: model.score(t, state, condition), ts.to(x.device), x, source)
