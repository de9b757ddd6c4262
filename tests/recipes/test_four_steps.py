"""The recipe `four-steps`: what ships with it, its judge, and that it starts under its own rule and under others."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from scoreact import discriminate, finetune
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.evaluation.metrics import neighbours
from scoreact.recipes.base import recipes
from scoreact.recipes.fashion_mnist import data
from scoreact.recipes.fashion_mnist.four_steps import real_judge, real_reward
from scoreact.recipes.fashion_mnist.recipe import features, model
from scoreact.sampling.draw import balanced, draw
from scoreact.training.config import updated

PICTURES = Path(os.environ.get("SCOREACT_FASHION_MNIST", "absent"))  # the pictures are not part of the project


def samples(steps: int, count: int = 200) -> tuple[torch.Tensor, list[str]]:
    pretrained = model()
    prompts = balanced(data.CLASSES, count, torch.Generator().manual_seed(0))
    ts = uniform(pretrained.schedule, steps)
    return draw(pretrained, prompts, sampler_by_name("ddim"), ts, 0)[1], prompts


def test_the_shipped_reward_tells_four_steps_from_real_pictures_and_fifty_less() -> None:
    reward, pretrained = real_reward(), model()
    assert reward.classes == data.CLASSES
    assert reward.real is not None
    few, prompts = samples(4)
    told = reward.auc(reward(few, pretrained.condition(prompts)))
    assert told == pytest.approx(reward.facts["auc"], abs=0.04)
    more, _ = samples(12)
    assert reward.auc(reward(more, pretrained.condition(prompts))) < told - 0.1
    few.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(few, pretrained.condition(prompts)).sum(), few)
    assert bool(gradient.isfinite().all() & gradient.any())


def test_what_ships_names_no_place_of_a_machine() -> None:
    about = json.loads((resources.files("scoreact") / "assets" / "fashion_mnist_real" / "reward.json").read_text())
    assert about["features"]["spec"] == "classifier"
    assert about["plan"]["steps"] == 4
    texts = [v for v in [*about.values(), *about["notes"]] if isinstance(v, str)]
    assert not [text for text in texts if text.startswith("/") or ":/" in text]


def test_the_judge_compares_with_as_many_real_pictures() -> None:
    x, prompts = samples(2, 100)
    found = real_judge()(x, model().condition(prompts))
    told = neighbours(data.neighbour_features()[:100], features(x))
    assert (found["judge/precision"], found["judge/recall"], found["judge/coverage"]) == (
        told.precision, told.recall, told.coverage,
    )  # fmt: skip
    assert found["judge/frechet"] > 20
    moments = data.reference()["all"]
    torch.testing.assert_close(data.neighbour_features().mean(0), moments.mean, atol=0.15, rtol=0)


@pytest.mark.parametrize("algorithm", ["adjoint_matching", "ctrl", "ctrl_pathwise"])
def test_it_starts_under_its_own_rule_and_another(algorithm: str) -> None:
    recipe = recipes()["four-steps"]
    config = updated(recipe.config_for({"algorithm": algorithm}), {"algorithm": algorithm})
    assert config.average == 0.8
    small = replace(
        config, iterations=1, batch_size=8, minibatch_size=32, reference_batches=1, heldout_samples=20, device="cpu"
    )
    if algorithm.startswith("ctrl"):
        assert config.value == "residual"
        small = replace(small, value_first_steps=1, value_steps=1)
    result = finetune(recipe.build(), config=small, progress=False)
    assert {"reward/auc", "judge/recall", "judge/coverage", "judge/frechet"} <= set(result.final)


@pytest.mark.skipif(not PICTURES.exists(), reason="set SCOREACT_FASHION_MNIST to the pictures")
@pytest.mark.slow
def test_the_shipped_reward_can_be_made_again() -> None:
    """Samples are drawn in bfloat16 on some machines: the same to a few percent."""
    made, shipped = discriminate(model(), PICTURES, features="classifier", steps=4, ridge=0.1), real_reward()
    torch.testing.assert_close(made.weight, shipped.weight, rtol=0, atol=0.05 * float(shipped.weight.abs().max()))
