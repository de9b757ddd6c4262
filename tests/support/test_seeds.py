"""Seeds: which are taken, and that others made of them are apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scoreact.support.errors import SettingError
from scoreact.support.seeds import LARGEST, checked_seed, derived


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 1.0, True, "1", None, float("nan")])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(SettingError, match="expected a whole number from 0 to 4294967295"):
        checked_seed(seed)
    assert checked_seed(LARGEST) == LARGEST


def test_the_largest_seed_is_torchs_own() -> None:
    """One more, and the CPU's generator begins anew."""
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(s)) for s in (0, LARGEST, LARGEST + 1)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_derived_seeds_are_the_same_for_the_same_parts_and_apart_for_others() -> None:
    found = {derived(seed, *parts) for seed in range(300) for parts in ((), ("a",), ("b",), ("a", 1), ("a1",), (1,))}
    assert len({seed & LARGEST for seed in found}) == 1800, "in the bits that the CPU reads, too"
    assert derived(3, "a", 1) == derived(3, "a", 1)
    assert max(found) < 2**63 - LARGEST, "and there is room to count on from each"
