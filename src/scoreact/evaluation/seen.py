"""How much of the reward something sees: the share of its variance inside prompts that a guess explains linearly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import Condition, groups

SEEN_AT = (0.2, 0.4, 0.6, 0.8)  # times at which a run measures what its value sees


def seen(guess: Tensor, rewards: Tensor, condition: Condition) -> tuple[float, float]:
    """Squared correlation of a guess [B] with the rewards [B], the mean of each prompt taken off both; and its error.

    What differs between prompts is left out: it is known before a path begins, and no gradient follows it. Prompts with one
    sample say nothing. The error is that of a correlation of normal numbers, (1 - r^2) / sqrt(n), carried to r^2; at r = 0 r^2
    itself is 1 / n by chance, which the error includes. nan, nan: no two samples of a prompt, or nothing that varies.
    """
    pairs = torch.stack([guess, rewards]).cpu().double()
    free, centred = 0, torch.zeros_like(pairs)
    for rows in groups(condition).values():
        rows = rows.cpu()
        centred[:, rows] = pairs[:, rows] - pairs[:, rows].mean(1, keepdim=True)
        free += len(rows) - 1
    (gg, gr), (_, rr) = (centred @ centred.T).tolist()
    if free < 2 or not gg > 0 or not rr > 0:
        return math.nan, math.nan
    share = gr * gr / (gg * rr)
    return share, 2 * math.sqrt(share) * (1 - share) / math.sqrt(free) + 1 / free
