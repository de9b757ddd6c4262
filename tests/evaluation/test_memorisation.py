"""How near samples are to the training data: against a planted copy, fresh samples, and distances by hand."""

from __future__ import annotations

import pytest
import torch

from scoreact.evaluation.memorisation import compared, memorisation, nearest_distances


def normal(count: int, seed: int, size: int = 6) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def test_the_distance_is_that_to_the_nearest() -> None:
    train = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = nearest_distances(train, torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 8.0]]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 5.0]).double())


def test_fresh_samples_are_as_near_as_held_out_ones() -> None:
    found = memorisation(normal(4000, 0), normal(2000, 1), normal(2000, 2))
    assert abs(found.closer - 0.5) < 2 * found.closer_half_width < 0.05
    assert found.copies == pytest.approx(0.01, abs=0.008)
    assert found.to_training == pytest.approx(0.5, abs=0.03)
    assert found.generated == pytest.approx(found.heldout, rel=0.03)


def test_planted_copies_are_found() -> None:
    train, fresh = normal(4000, 0), normal(400, 2)
    copied = torch.cat([fresh[:320], train[:80] + 0.01 * normal(80, 3)])  # a fifth, with a little noise
    found = memorisation(train, normal(2000, 1), copied)
    assert found.copies == pytest.approx(0.2 + 0.8 * 0.01, abs=0.01)
    assert found.closer == pytest.approx(0.2 + 0.8 * 0.5, abs=0.04)
    assert found.closer - 0.5 > found.closer_half_width
    # a copy is nearest to its own half of the training data always, to the other half as a fresh sample is
    assert found.to_training == pytest.approx(0.8 * 0.5 + 0.2 * 0.75, abs=0.04)
    assert memorisation(train, normal(2000, 1), train[:50]).generated == 0


def test_smooth_samples_are_near_to_the_training_data_and_as_near_to_held_out_examples() -> None:
    """Shrunk to the mean they are nearer to everything; they are no copies."""
    found = memorisation(normal(4000, 0), normal(2000, 1), 0.5 * normal(1000, 2))
    assert found.closer > 0.7
    assert abs(found.to_training - 0.5) < 0.04


def test_large_pictures_are_compared_by_fields_and_small_ones_by_pixels() -> None:
    small = torch.rand(3, 1, 28, 28)
    assert torch.equal(compared(small), small.flatten(1))
    large = torch.rand(3, 3, 64, 96)
    torch.testing.assert_close(compared(large)[0, 0], large[0, 0, :2, :2].mean())
    assert compared(large).shape == (3, 3 * 32 * 48)


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match="101 held-out examples beside 100 to learn from"):
        memorisation(normal(100, 0), normal(101, 1), normal(50, 2))
    with pytest.raises(ValueError, match="19 held-out examples and 50 samples are too few"):
        memorisation(normal(100, 0), normal(19, 1), normal(50, 2))
