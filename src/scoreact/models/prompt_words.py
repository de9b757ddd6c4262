"""Prompts as vectors of their words, of one size whatever their number: what a value tells many prompts apart by.

Words are hashed with a sign (Weinberger et al. 2009, arXiv 0902.2206), so that words that fall together cancel on average:
the inner product of two prompts is, in the mean over hashes, that of their sets of words.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

MANY = 64  # prompts: up to here each has parameters of its own, beyond it its words do


def bag_of_words(prompts: Sequence[str], size: int) -> Tensor:
    """q [B, size] float32 on the CPU: each prompt's different words, in lower case, over the root of their number."""
    found = torch.zeros(len(prompts), size)
    for row, prompt in enumerate(prompts):
        places, signs = _hashed(prompt, size)
        found[row].index_add_(0, places, signs)
    return found


@functools.lru_cache(maxsize=16_384)
def _hashed(prompt: str, size: int) -> tuple[Tensor, Tensor]:
    words = sorted(set(prompt.lower().split())) or [""]
    hashes = [zlib.crc32(word.encode()) for word in words]  # the same in every process, as `hash` is not
    signs = [(1.0 if h >> 31 else -1.0) / math.sqrt(len(words)) for h in hashes]
    return torch.tensor([(h & 0x7FFFFFFF) % size for h in hashes]), torch.tensor(signs)
