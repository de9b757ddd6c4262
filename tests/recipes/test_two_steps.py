"""The recipe `two-steps`: what ships with it, and that it starts under its own rule and under another."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scoreact import finetune
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.recipes.base import recipes
from scoreact.recipes.fashion_mnist import data
from scoreact.recipes.fashion_mnist.recipe import model
from scoreact.recipes.fashion_mnist.two_steps import real_distance
from scoreact.sampling.draw import balanced, draw
from scoreact.training.config import updated

PICTURES = Path(os.environ.get("SCOREACT_FASHION_MNIST", "absent"))  # the pictures are not part of the project


def test_the_shipped_examples_are_as_many_of_each_class() -> None:
    features, rows = data.example_features()
    assert features.shape == (2000, 96)
    assert torch.bincount(rows).tolist() == [200] * 10
    far = torch.cdist(features, torch.stack([features[rows == row].mean(0) for row in range(10)]))
    assert float((far.argmin(1) == rows).double().mean()) > 0.8  # a class's examples are near each other


def test_more_steps_and_the_right_prompts_are_nearer() -> None:
    pretrained, reward = model(), real_distance()
    prompts = balanced(data.CLASSES, 100, torch.Generator().manual_seed(0))
    condition, others = pretrained.condition(prompts), pretrained.condition(prompts[1:] + prompts[:1])
    two, twelve = (
        draw(pretrained, prompts, sampler_by_name("ddim"), uniform(pretrained.schedule, steps), 0)[1]
        for steps in (2, 12)
    )
    few, more, wrong = (float(reward(*of).mean()) for of in ((two, condition), (twelve, condition), (twelve, others)))
    assert wrong < few < more < 0.5
    two.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(two, condition).mean(), two)
    moved = two.detach() + 0.1 * gradient / float(gradient.norm())
    risen = float(reward(moved, condition).double().mean()) - few
    assert risen == pytest.approx(0.1 * float(gradient.norm()), rel=0.1)


@pytest.mark.parametrize("algorithm", ["draft", "ctrl"])
def test_it_starts_under_its_own_rule_and_another(algorithm: str) -> None:
    recipe = recipes()["two-steps"]
    config = updated(recipe.config_for({"algorithm": algorithm}), {"algorithm": algorithm})
    small = replace(config, iterations=1, batch_size=20, reference_batches=1, heldout_samples=20, device="cpu")
    result = finetune(recipe.build(), config=small, progress=False)
    assert {"reward/heldout", "judge/recall", "judge/coverage", "judge/frechet"} <= set(result.final)


@pytest.mark.skipif(not PICTURES.exists(), reason="set SCOREACT_FASHION_MNIST to the pictures")
@pytest.mark.slow
def test_the_shipped_examples_can_be_made_again() -> None:
    from scoreact.recipes.fashion_mnist.make_reference import make_examples

    made, (features, rows) = make_examples(str(PICTURES)), data.example_features()
    assert torch.equal(made["classes"].long(), rows)
    torch.testing.assert_close(made["features"].float(), features, rtol=0.01, atol=0.01)
