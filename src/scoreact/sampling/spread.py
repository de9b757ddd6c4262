"""Which path draws samples as spread as the data are.

A step of DDIM leaves out what the state does not tell of the sample, so that few of them draw too little of the standard
deviation: least of what is near to noise, as series of returns are. Euler-Maruyama over the log-SNR draws too much where its
steps are few. All paths here are memoryless, so that training to a reward tilts the law.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dynamics.grids import grid_times
from ..dynamics.samplers import SAMPLERS
from ..models.base import HasClasses, ScoreModel
from ..support.devices import device_of
from .draw import draw_states, seeds_of

PATHS: tuple[dict[str, Any], ...] = (
    {"solver": "ddim", "grid": "uniform", "steps": 10},
    {"solver": "euler_maruyama", "grid": "log_snr", "steps": 20},
    {"solver": "euler_maruyama", "grid": "log_snr", "steps": 30},
    {"solver": "euler_maruyama", "grid": "log_snr", "steps": 40},
)  # the cheapest first
NEAR = 0.05  # of a spread, from the data's: near enough
SAMPLES, LARGE, NUMBERS = 1000, 256, 4096  # samples of small states, of large ones, and numbers in them together
ROWS = 100  # samples at a time: their whole paths are in memory


def spread_of(states: Tensor, labels: Tensor | None = None) -> float:
    """The root mean square over coordinates of the standard deviation of states [N, *D]; within classes, given labels [N]."""
    rows = states.double().flatten(1)
    total, count = 0.0, 0
    for own in (rows[labels == c] for c in labels.unique()) if labels is not None else (rows,):
        if len(own) > 1:
            total, count = total + float(own.var(0).mean()) * (len(own) - 1), count + len(own) - 1
    return (total / count) ** 0.5


def measured_paths(model: ScoreModel, states: Tensor, labels: Tensor | None = None) -> list[dict[str, Any]]:
    """The spread that PATHS draw, as a share of the data's, up to the first that is near enough.

    Args:
        model: whose samples are drawn, from a seed of its own.
        states: the data as the model's states, [N, *D].
        labels: places in the model's classes, [N]; the samples have them in the data's shares.

    Returns:
        The paths that were tried, each with its `spread`; see `nearest_path`.
    """
    count = max(LARGE, min(SAMPLES, NUMBERS // states[0].numel()))
    own, prompts = None, [""] * count
    if labels is not None and isinstance(model, HasClasses):
        own = labels[torch.linspace(0, len(labels) - 1, count).round().long()].cpu()
        prompts = [model.classes[i] for i in own.tolist()]
    seeds, goal = seeds_of(0, prompts), spread_of(states, labels)
    found = []
    for path in PATHS:
        times = grid_times(path["grid"], model.schedule, path["steps"])
        parts = [
            draw_states(
                model, prompts[k : k + ROWS], SAMPLERS[path["solver"]], times, seeds[k : k + ROWS], device_of(model)
            )
            for k in range(0, count, ROWS)
        ]
        drawn = torch.cat([part[-1].cpu() for part in parts])
        found.append({**path, "spread": spread_of(drawn, own) / goal})
        if abs(found[-1]["spread"] - 1) <= NEAR:
            break
    return found


def nearest_path(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """Of paths with their spread, the one whose spread is nearest to the data's."""
    return min(tried, key=lambda path: abs(path["spread"] - 1) if math.isfinite(path["spread"]) else math.inf)
