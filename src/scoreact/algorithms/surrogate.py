"""PPO's clipped objective with the Girsanov ratio (Schulman et al. 2017, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..control.transitions import Batch
from ..types import Metrics

TEMPERATURES = {"one": 0.0, "root_dimensions": 0.5, "dimensions": 1.0}  # the power of the number of data dimensions


def surrogate(log_ratio: Tensor, batch: Batch, clip_range: float, temperature: str = "one") -> tuple[Tensor, Metrics]:
    """PPO's clipped objective: T min(r A, clip(r, 1 +- clip_range sqrt(dt)) A) with r = exp(log_ratio / T), [M]; and metrics.

    The factor T in front keeps the gradient at ratio 1 whatever T is; T decides when clipping begins. A log-ratio's
    spread is |shift|, the root of twice the step's KL, so with T = 1 ("one", the exact ratio) clipping bounds that KL
    at any dimension, as the trainer's max_kl does: the default. With T the root of the dimension it bounds the mean
    shift of one number of the data, and lets the KL grow with the dimension.
    """
    heat = batch.x[0].numel() ** TEMPERATURES[temperature]
    ratio = (log_ratio / heat).exp()
    clip = (clip_range * (batch.t1 - batch.t0).sqrt()).clamp(max=0.99)
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    gain = heat * torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
    away = (ratio.detach() - 1).abs()
    return gain, {
        "policy/clip_fraction": float((away > clip).float().mean()),
        "policy/ratio_deviation": float(away.max()),
    }
