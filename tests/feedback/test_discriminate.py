"""A reward made of data: its log-ratio and the law that tuning to it reaches, against closed forms; and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.dynamics.schedule import VP
from scoreact.feedback.discriminate import discriminate
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.fashion_mnist import data as fashion_mnist
from scoreact.recipes.fashion_mnist.recipe import model as pictures_model
from scoreact.rewards.learned import open_learned
from scoreact.sampling.draw import draw
from scoreact.support.own_data import Examples, OwnData

LINEAR = torch.tensor([1.0, -0.5])
QUADRATIC = torch.tensor([[0.6, 0.0], [0.0, 0.2]])
SUFFICIENT = "import torch\ndef squares(x):\n    return torch.cat([x, x.square()], 1)\n"


def mixture() -> GaussianMixture:
    means = torch.tensor([[1.0, 0.6], [-1.0, 0.4]])
    return GaussianMixture(VP(t_max=0.99), torch.tensor([0.4, 0.6]), means, 0.5 * torch.eye(2).repeat(2, 1, 1))


def drawn(law: GaussianMixture, count: int, seed: int) -> OwnData:
    """Real examples of a law, a tenth held out."""
    x = law.sample(count, torch.Generator().manual_seed(seed))
    return OwnData("vectors", Examples(x[count // 10 :]), Examples(x[: count // 10]))


@pytest.fixture
def squares(tmp_path: Path) -> str:
    (tmp_path / "sufficient.py").write_text(SUFFICIENT)
    return f"{tmp_path / 'sufficient.py'}:squares"


def test_the_logit_is_the_log_ratio_of_known_laws(squares: str) -> None:
    """The data's law is p exp(a.x - x'Qx / 2) / Z: the logit is that exponent less log Z, within its standard error."""
    base = mixture()
    law, log_z = base.tilted(LINEAR, QUADRATIC, 1.0)
    reward = discriminate(
        base, drawn(law, 20_000, 1), features=squares, samples=18_000, steps=25, grid="log_snr", solver="heun", ridge=1e-9,
        clip=50.0,
    )  # fmt: skip
    x, other = law.sample(2000, torch.Generator().manual_seed(2)), base.sample(2000, torch.Generator().manual_seed(3))

    def exact(points: Tensor) -> Tensor:
        return points @ LINEAR - (points @ QUADRATIC * points).sum(1) / 2 - log_z

    found = reward.logits(reward.features(x), torch.zeros(len(x), dtype=torch.int64))
    # the Fisher information of 36,000 examples, half of them real
    both = torch.cat([x, other])
    design = torch.cat([both, both.square(), torch.ones(4000, 1)], 1)
    p = exact(both).sigmoid()
    information = 36_000 * (design * (p * (1 - p))[:, None]).T @ design / 4000
    error = (design[:2000] @ torch.linalg.inv(information) * design[:2000]).sum(1).sqrt()
    z = (found - exact(x)) / error
    assert 0.1 < float(z.square().mean().sqrt()) < 2.5  # five directions of error in all
    assert float((found - exact(x)).abs().mean()) < 0.05
    assert reward.facts["calibration_error"] < 0.03
    real = drawn(law, 20_000, 1).heldout.values
    own = other[: len(real)]
    told = reward.auc(reward.clipped(reward.logits(reward.features(own), torch.zeros(len(own), dtype=torch.int64))))
    assert told == pytest.approx(reward.facts["auc"], abs=0.03)


@pytest.mark.slow
def test_tuning_at_kl_weight_1_has_the_moments_of_the_data(squares: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = mixture()
    law, _ = base.tilted(LINEAR, QUADRATIC, 1.0)
    plan: dict[str, Any] = {"samples": 18_000, "steps": 20, "grid": "log_snr", "ridge": 1e-9, "clip": 50.0}
    discriminate(base, drawn(law, 20_000, 1), tmp_path / "real", features=squares, **plan)
    result = sa.finetune(
        ResidualModel(base, dim=2), str(tmp_path / "real"), algorithm="adjoint_matching", kl_weight=1.0, steps=20,
        grid="log_snr", iterations=60, batch_size=256, minibatch_size=512, learning_rate=2e-3, epochs=1, heldout_samples=4000,
        evaluate_every=60, progress=False, reference_batches=8,
    )  # fmt: skip
    first, last = (line for line in result.history if "reward/auc" in line)
    assert first["reward/auc"] > 0.7
    assert abs(last["reward/auc"] - 0.5) < 0.25 * (first["reward/auc"] - 0.5)
    real, plain = (one.sample(4000, torch.Generator().manual_seed(5)) for one in (law, base))
    tuned = result.sample(count=4000)
    for name in ("mean", "var"):
        far, near = (float((getattr(v, name)(0) - getattr(real, name)(0)).norm()) for v in (plain, tuned))
        assert near < 0.25 * far, (name, near, far)


# --- the second round, classes, refusals ------------------------------------------------------------------------------


def pictures(count: int, seed: int = 0) -> OwnData:
    """Pictures of the shipped model itself, moved by two pixels: what the data are is up to a test."""
    names = [fashion_mnist.CLASSES[i % 10] for i in range(count)]
    model = pictures_model()
    _, x = draw(model, names, sampler_by_name("ode"), uniform(model.schedule, 2), seed)
    labels = torch.arange(count) % 10
    some = Examples(x.roll(2, 3), labels)
    return OwnData("pictures", some[: count - 200], some[count - 200 :], tuple(map(str, range(10))))


@pytest.fixture(scope="module")
def data() -> OwnData:
    return pictures(800)


def test_classes_have_heads_and_a_second_round_adds_to_the_first(data: OwnData, tmp_path: Path) -> None:
    model = pictures_model()
    plan: dict[str, Any] = {"features": "pixels", "samples": 600, "steps": 1, "ridge": 0.1}
    one = discriminate(model, data, tmp_path / "one", **plan)
    assert one.classes == fashion_mnist.CLASSES
    assert one.weight.shape == (10, 32)
    assert one.facts["auc"] > 0.9
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"reward.json", "reward.safetensors", "reliability.png"}
    two = discriminate(model, data, tmp_path / "two", onto=one, **plan)
    x, _ = data.heldout.floats(), data.heldout.labels
    condition = model.condition([fashion_mnist.CLASSES[i % 10] for i in range(200)])
    z = one.features(x)
    torch.testing.assert_close(
        two.logits(z, two.rows(condition)), 2 * one.logits(z, one.rows(condition)), rtol=1e-3, atol=1e-3
    )
    assert two.facts["onto"] == "one"
    single = discriminate(model, data, labels=False, **plan)
    assert single.weight.shape == (1, 32)
    with pytest.raises(ValueError, match="give labels as then"):
        discriminate(model, data, labels=False, onto=one, **plan)
    loaded = open_learned(tmp_path / "two")
    assert torch.equal(loaded(x, condition), two(x, condition))


def test_what_does_not_fit_is_refused_in_a_sentence(data: OwnData, tmp_path: Path) -> None:
    model = pictures_model()

    def saved(name: str, **arrays: Any) -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    grey = (255 * data.train.values[:, 0]).byte().numpy()
    labels = data.train.labels
    assert labels is not None
    colour = saved("colour.npz", images=np.repeat(grey[..., None], 3, 3), labels=labels.numpy())
    bare = saved("bare.npz", images=grey)
    few = saved("few.npz", images=grey[:300], labels=labels.numpy()[:300])
    eleven = saved("eleven.npz", images=grey, labels=labels.numpy() + 1)
    one = saved("one.npz", images=grey, labels=0 * labels.numpy())
    nan = saved(
        "nan.npz", images=np.where(np.arange(len(grey))[:, None, None] == 5, np.nan, grey / 255.0), labels=labels
    )
    for path, said in {
        colour: "of shape (3, 28, 28), and the model draws (1, 28, 28)",
        bare: "--no-labels, or labels=False, fits one head for all",
        few: "examples to learn from, too few to tell the data from the model",
        eleven: "the data have the class '10', which the model does not know (T-shirt/top, ",
        one: "holds one class, '0', which tells nothing apart",
        nan: "is not finite in example 5",
        tmp_path / "nothing.npz": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            discriminate(model, path, samples=300, steps=1, features="pixels")
    for changes, said in {
        ("samples", 20): "samples is 20; give at least 100",
        ("ridge", 0.0): "ridge is 0.0",
        ("clip", -1.0): "clip is -1.0",
        ("solver", "dim"): "dim",
        ("features", "clip"): "unknown features 'clip'",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            discriminate(model, data, **{changes[0]: changes[1]})
    with pytest.raises(ValueError, match="this model has no classes to draw them by"):
        discriminate(mixture(), drawn(mixture(), 500, 0), labels=True)
