"""Vectors of words, and the values that tell many prompts apart by them."""

from __future__ import annotations

import random

import pytest
import torch

from scoreact.models.prompt_words import bag_of_words
from scoreact.models.value_networks import Encoder
from scoreact.types import Condition

WORDS = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "nrst"]


def test_inner_products_are_those_of_the_sets_of_words() -> None:
    """In the mean over pairs: words that fall together cancel, though 80 words share 16 places."""
    draw = random.Random(0)
    pairs = [[draw.sample(WORDS, 5) for _ in range(2)] for _ in range(3000)]
    for pair in pairs:
        pair[1][:2] = pair[0][:2]
    first, second = (bag_of_words([" ".join(pair[i]) for pair in pairs], 16) for i in range(2))
    shared = torch.tensor([len(set(a) & set(b)) / (len(set(a)) * len(set(b))) ** 0.5 for a, b in pairs])
    products = (first * second).sum(1)
    error = float((products - shared).std()) / len(pairs) ** 0.5
    assert float(products.mean()) == pytest.approx(float(shared.mean()), abs=4 * error)
    assert 0.3 < float(products.mean()) < 0.6
    assert float(first.square().sum(1).mean()) == pytest.approx(1.0, abs=0.05)


def test_letters_size_order_and_repeats_do_not_matter() -> None:
    one, other = bag_of_words(["A Cat on a cat", "on cat a"], 64)
    assert torch.equal(one, other)
    assert float(one.norm()) == pytest.approx(1.0)
    assert bag_of_words(["", " "], 64).count_nonzero() == 2, "no words are a word"
    assert int(bag_of_words(["cat"], 2**20).abs().argmax()) == 0x9E5E43A8 % 2**20, "crc32: the same in every process"


def test_an_encoder_of_words_is_of_one_size_and_knows_prompts_it_never_saw() -> None:
    network = Encoder(channels=4, classes=10_000, words=256)
    assert sum(p.numel() for p in network.parameters()) < 200_000
    torch.nn.init.normal_(network.offset.weight)
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    row = torch.tensor([9_999, 20_000])
    known, new = network(x[:1].expand(2, -1, -1, -1), t, Condition(["a red boat", "boat red a"], row))
    assert known == new
    found = network(x[:1].expand(2, -1, -1, -1), t, Condition(["a red boat", "two dogs"], row))
    assert found[0] != found[1]


def test_an_encoder_of_classes_takes_a_prompt_beyond_them_for_their_average() -> None:
    network = Encoder(channels=4, classes=3)
    x, t = torch.randn(1, 4, 8, 8).expand(3, -1, -1, -1), torch.full((3,), 0.5)
    torch.nn.init.normal_(network.offset.weight)
    values = network(x, t, Condition(["a", "b", "c"], torch.tensor([3, 4, 700])))
    assert bool((values == values[0]).all())
    known = network(x, t, Condition(["a", "b", "c"], torch.tensor([0, 1, 2])))
    assert known.unique().numel() == 3
    torch.testing.assert_close(values[0], known.mean())  # a new network's picture says nothing yet
    assert network.unknown(Condition(["a", "b", "d"], torch.tensor([2, 3, 700]))) == ["b", "d"]
