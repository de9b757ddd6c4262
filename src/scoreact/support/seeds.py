"""Seeds: what a user may give, and others made of it. Knows no generator.

torch seeds its generator on the CPU with 32 bits: a larger seed would draw what a smaller one does.
"""

from __future__ import annotations

import hashlib

from .errors import SettingError

LARGEST = 2**32 - 1


def checked_seed(seed: object) -> int:
    """Raises SettingError for what is no whole number from 0 to LARGEST."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST:
        raise SettingError(f"seed is {seed!r}; expected a whole number from 0 to {LARGEST}.")
    return seed


def derived(seed: int, *parts: object) -> int:
    """Another seed, of 62 bits: the same for the same parts, and unlike that of any others."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode("utf-8", "surrogatepass")).digest()[:8]) >> 2
