"""The best time grid, and noise, for so many steps of a model: a plain search, which any claim about few steps must beat.

Knows models, solvers and a measure of finished samples; trains nothing. The search is a (1+1) evolution strategy with the
one-fifth rule over the log-SNRs of the inner times (`shaped_log_snr`) and the noise level, all tries on the same noise;
its winner is measured on noise that the search did not see, beside the named grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..dynamics.grids import GRIDS, grid_times, shaped_log_snr, shaped_name
from ..dynamics.samplers import DETERMINISTIC, sampler_by_name
from ..dynamics.schedule import log_snr
from ..dynamics.sde import noise_level
from ..models.base import ScoreModel
from ..sampling.draw import balanced, draw
from ..support.errors import SettingError
from ..support.seeds import derived
from ..types import Condition

Measure = Callable[[Tensor, Condition], float]
AT_ONCE = 256  # samples at a time
NAMED = tuple(name for name in GRIDS if name != "random")


@dataclass(frozen=True)
class Tried:
    """One grid and noise level, and what the measure says of its samples."""

    grid: str  # a value of the setting `grid`
    noise_level: float | None  # None: the solver has no noise
    value: float


@dataclass(frozen=True)
class FoundGrid:
    """The outcome of `search_grid`; all values but those of `tries` are from noise that the search did not see."""

    solver: str
    steps: int
    best: Tried
    named: tuple[Tried, ...]  # the known grids, each at its best noise level
    tries: tuple[Tried, ...]  # on the search's noise, in order


def search_grid(
    model: ScoreModel,
    prompts: Sequence[str],
    measure: Measure,
    steps: int,
    solver: str = "ode",
    *,
    noise_levels: Sequence[float] = (0.0, 0.5, 1.0),
    tries: int = 40,
    samples: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> FoundGrid:
    """Search the time grid, and the noise level of a solver that has one, with the smallest measure.

    Args:
        model: draws the samples.
        prompts: for which; each equally often.
        measure: (decoded samples [n, ...], their condition) -> a number; smaller is better.
        steps: N of a path, 2 or more.
        solver: name of a sampler, or the user's own.
        noise_levels: from which the search starts; of a solver with noise.
        tries: how often the measure is asked in the search, the known grids included.
        samples: n.
        seed: of the search and its noise.
        device: where the model lives; the CPU by default.

    Returns:
        The best grid, by a name that the setting `grid` takes, and the known grids measured on the same fresh noise.

    Raises:
        SettingError: fewer than two steps, or too few tries for the known grids.
    """
    if steps < 2:
        raise SettingError(f"steps is {steps}: one step has no time to place; take 2 or more.")
    sampler, noisy = sampler_by_name(solver), solver not in DETERMINISTIC
    levels: list[float | None] = [*noise_levels] if noisy else [None]
    if tries < len(NAMED) * len(levels) + 1:
        raise SettingError(
            f"tries is {tries}; the known grids alone take {len(NAMED) * len(levels)}, so take more of them."
        )
    names = balanced(prompts, samples, torch.Generator().manual_seed(seed))
    condition = model.condition(names)

    def tried(grid: str, level: float | None, noise_seed: int) -> Tried:
        ts = grid_times(grid, model.schedule, steps)
        noise = None if level is None else noise_level(level)
        parts = [
            draw(model, names[i : i + AT_ONCE], sampler, ts, derived(noise_seed, i), device, noise)[1]
            for i in range(0, samples, AT_ONCE)
        ]
        return Tried(grid, level, float(measure(torch.cat(parts), condition)))

    search, fresh = derived(seed, "search"), derived(seed, "fresh")
    found = [tried(grid, level, search) for grid in NAMED for level in levels]
    named = [min((t for t in found if t.grid == grid), key=lambda t: _rank(t.value)) for grid in NAMED]
    best = min(named, key=lambda t: _rank(t.value))
    place, spread, random = _shape(best.grid, model, steps), 1.0, np.random.default_rng(seed)
    while len(found) < tries and spread > 1e-3:
        moved = place + spread * random.normal(size=len(place)) / np.arange(1, len(place) + 1)
        move = moved.tolist()
        level = None if best.noise_level is None else abs(best.noise_level + 0.3 * spread * float(random.normal()))
        try:
            shaped_log_snr(move)(model.schedule, steps, None)
        except SettingError:  # times that do not rise
            spread *= 0.95
            continue
        found.append(tried(shaped_name(move), level if level is None else round(level, 3), search))
        better = _rank(found[-1].value) < _rank(best.value)
        if better:
            best, place = found[-1], moved
        spread *= 1.5 if better else 1.5**-0.25  # the one-fifth rule
    checked = [tried(t.grid, t.noise_level, fresh) for t in (best, *named)]
    return FoundGrid(solver, steps, min(checked, key=lambda t: _rank(t.value)), tuple(checked[1:]), tuple(found))


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _shape(grid: str, model: ScoreModel, steps: int) -> np.ndarray:
    """The coefficients, four at most, of the shaped grid that is nearest to a known one."""
    inner = log_snr(model.schedule, grid_times(grid, model.schedule, steps).double()[1:-1]).numpy()
    z = np.linspace(-1, 1, steps - 1) if steps > 2 else np.zeros(1)
    return np.polynomial.polynomial.polyfit(z, inner, min(3, steps - 2))
