"""Rewards: formulas against hand-computed values and autograd, error sentences, loading, `checked` and `explain`."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from scoreact import rewards as rw
from scoreact.rewards.examine import _about_tensor
from scoreact.types import Condition

IMAGES = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))
CONDITION = Condition(["Bag", "Boot", "Bag", "Coat", "Bag", "Boot"], metadata=[{"i": float(i)} for i in range(6)])


def condition(count: int) -> Condition:
    return Condition(["Bag"] * count)


def file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my.py"
    path.write_text(text)
    return str(path)


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_linear_value_gradient_and_dtype() -> None:
    reward = rw.Linear([1.0, -2.0, 0.5])
    x = torch.tensor([[1.0, 1.0, 2.0], [0.0, 3.0, -4.0]], dtype=torch.float64, requires_grad=True)
    values = reward(x, condition(2))
    assert values.tolist() == [0.0, -8.0]
    assert values.dtype == torch.float64
    assert reward(x.float(), condition(2)).dtype == reward(x.bfloat16(), condition(2)).dtype == torch.float32
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert torch.equal(gradient, torch.tensor([[1.0, -2.0, 0.5]] * 2, dtype=torch.float64))
    assert reward(x.reshape(2, 3, 1), condition(2)).tolist() == [0.0, -8.0]


def test_quadratic_value_by_hand() -> None:
    # x - c = (1, 2); Q(x - c) = (2 + 2, 1 + 6) = (4, 7); -1/2 (4 + 14) + (3 - 3) = -9
    reward = rw.Quadratic([[2.0, 1.0], [1.0, 3.0]], center=[0.0, 1.0], linear=[3.0, -1.0])
    assert reward(torch.tensor([[1.0, 3.0]]), condition(1)).tolist() == [-9.0]


@pytest.mark.parametrize(
    "reward",
    [
        rw.Linear([1.0, -2.0]),
        rw.Quadratic([[2.0, 1.0], [0.0, 3.0]], center=[0.5, -1.0], linear=[3.0, -1.0]),
        rw.Quadratic(0.7, center=[0.5, -1.0]),
        rw.Quadratic(-0.2, linear=[0.5, -1.0]),
    ],
)
def test_closed_forms_tell_their_coefficients(reward: rw.Linear | rw.Quadratic) -> None:
    """R(x) = a.x - 1/2 x'Qx + constant with the exposed numbers, and grad R = a - Q x, for a non-symmetric Q too."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    values = reward(x, condition(50))
    expanded = x @ reward.linear - 0.5 * torch.einsum("bi,ij,bj->b", x, reward.quadratic, x) + reward.constant
    assert torch.allclose(values, expanded, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert torch.allclose(gradient, reward.linear - x @ reward.quadratic, rtol=0, atol=1e-12)
    assert torch.equal(reward.quadratic, reward.quadratic.T)
    assert reward.differentiable


def test_quadratic_does_not_cancel_near_its_center() -> None:
    reward = rw.Quadratic(1.0, center=[1000.0, 1000.0])
    assert reward(torch.tensor([[1000.0, 1001.0]]), condition(1)).tolist() == [-0.5]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rw.Quadratic(2.0), r"quadratic=2.0 alone leaves the dimension open. Give center or linear"),
        (lambda: rw.Quadratic([[1.0, 2.0]]), r"shape \(1, 2\); expected a number or a square matrix"),
        (lambda: rw.Quadratic([[1.0]], center=[1.0, 2.0]), r"center has 2 entries but the quadratic is \[1, 1\]"),
        (lambda: rw.Linear([[1.0]]), r"linear has shape \(1, 1\); expected one number for each data dimension"),
        (lambda: rw.Linear([1.0, math.nan]), r"linear contains NaN or inf \(\[1.0, nan\]\)"),
        (lambda: rw.Linear("up"), r"linear='up' is no array of numbers"),
        (lambda: rw.Linear([1.0])(torch.zeros(2, 3), condition(2)), r"\(2, 3\) hold 3 numbers each but the reward is"),
    ],
)
def test_closed_form_errors(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --- pictures -------------------------------------------------------------------------------------------------------


def pillow_bytes(pixels: np.ndarray, quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return len(buffer.getvalue())


@pytest.mark.parametrize("quality", [75, 95])
def test_jpeg_size_is_pillows_byte_count(quality: int) -> None:
    grey = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(2)) * 1.2 - 0.1  # also outside [0, 1]
    colour = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(3))
    pixels = [np.round(np.clip(x[0].numpy(), 0, 1) * 255).astype(np.uint8) for x in grey]
    expected = [pillow_bytes(p, quality) / 1000 for p in pixels]
    assert rw.jpeg_kilobytes(grey, quality).tolist() == pytest.approx(expected, abs=1e-7)
    pixels = [np.round(x.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for x in colour]
    expected = [pillow_bytes(p, quality) / 1000 for p in pixels]
    sizes = rw.jpeg_kilobytes(colour, quality)
    assert sizes.tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(rw.load("jpeg_incompressibility", quality=quality)(colour, condition(3)), sizes)
    assert torch.equal(rw.load("jpeg_compressibility", quality=quality)(colour, condition(3)), -sizes)


def test_jpeg_of_a_batch_is_fast() -> None:
    images = torch.rand(256, 1, 28, 28)
    rw.jpeg_kilobytes(images[:1])
    started = time.perf_counter()
    rw.jpeg_kilobytes(images, 75)
    assert time.perf_counter() - started < 1.0  # 0.02 to 0.04 s measured; the margin is for a busy machine


def test_brightness_by_hand() -> None:
    grey = torch.tensor([[[[0.0, 1.0], [0.5, 0.1]]]])
    assert rw.brightness(grey).item() == pytest.approx(0.4)
    colour = torch.tensor([1.0, 0.5, 0.2]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert rw.brightness(colour).item() == pytest.approx(0.299 + 0.2935 + 0.0228)


def test_colorfulness_by_hand_and_its_gradient_on_grey() -> None:
    # two pixels, red and blue: rg = (255, 0), yb = (127.5, -255); std 127.5 and 191.25; means 127.5 and -63.75
    pixels = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 1.0]]]])
    expected = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, 63.75)
    assert rw.colorfulness(pixels).item() == pytest.approx(expected, rel=1e-6)
    grey = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    values = rw.colorfulness(grey)
    assert values.tolist() == [0.0, 0.0]
    values.sum().backward()
    assert grey.grad is not None
    assert torch.equal(grey.grad, torch.zeros_like(grey))


def test_measured_rewards_agree_with_autograd() -> None:
    x = torch.rand(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for name in ("brightness", "colorfulness"):
        reward = rw.load(name)
        assert rw.is_differentiable(reward)
        assert torch.autograd.gradcheck(lambda images, reward=reward: reward(images, condition(2)), x)
    assert not rw.is_differentiable(rw.load("jpeg_compressibility"))


def test_logistic_threshold_is_a_log_probability_per_class() -> None:
    measured = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 0.0])
    thresholds = {"Bag": 2.0, "Boot": 1.0, "Coat": 4.0}
    at = torch.tensor([2.0, 1.0, 2.0, 4.0, 2.0, 1.0])
    below = rw.logistic_threshold(lambda x: measured, thresholds, scale=0.5)(IMAGES, CONDITION)
    above = rw.logistic_threshold(lambda x: measured, thresholds, scale=0.5, direction=-1)(IMAGES, CONDITION)
    assert torch.allclose(below, -torch.log1p(torch.exp(-(at - measured) / 0.5)), atol=1e-6)
    assert torch.allclose(below.exp() + above.exp(), torch.ones(6), atol=1e-6)
    assert below[2].item() == pytest.approx(math.log(0.5))
    by_index = rw.logistic_threshold(
        lambda x: measured, [2.0, 1.0, 4.0], 0.5, class_of=rw.class_by_prompt(["Bag", "Boot", "Coat"])
    )
    assert torch.equal(by_index(IMAGES, CONDITION), below)
    one = rw.logistic_threshold(lambda x: measured, 2.0, 0.5)(IMAGES, CONDITION)
    assert one[1].item() == pytest.approx(-math.log1p(math.exp(2.0)))


def test_logistic_threshold_keeps_the_measures_gradient() -> None:
    reward = rw.logistic_threshold(rw.brightness, 0.4, 0.1)
    assert reward.differentiable
    assert not rw.logistic_threshold(rw.jpeg_kilobytes, 0.4, 0.1).differentiable
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda images: reward(images, condition(2)), x)


def test_classifier_alignment_is_the_log_probability_and_freezes_the_classifier() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3))
    reward = rw.ClassifierAlignment(network, rw.class_by_prompt(["Bag", "Boot", "Coat"]))
    x = IMAGES.clone().requires_grad_(True)
    values = reward(x, CONDITION)
    rows = network(IMAGES).softmax(1).log()
    assert torch.allclose(values, rows[torch.arange(6), torch.tensor([0, 1, 0, 2, 0, 1])], atol=1e-6)
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rw.jpeg_kilobytes(IMAGES * math.nan), "images contain NaN or inf, which have no JPEG"),
        (lambda: rw.jpeg_kilobytes(IMAGES[0]), r"shape \(1, 12, 12\); expected \[B, 1 or 3, H, W\]"),
        (lambda: rw.jpeg_kilobytes(IMAGES.byte()), r"images are torch.uint8; expected floats in \[0, 1\]. Divide"),
        (lambda: rw.jpeg_compressibility(quality=0), "quality is 0; give a whole number from 1 to 100"),
        (lambda: rw.colorfulness(IMAGES), r"needs 3 channels; images have shape \(6, 1, 12, 12\)"),
        (lambda: rw.logistic_threshold(rw.brightness, 0.5, 0.0), "scale is 0.0; give a positive number"),
        (lambda: rw.logistic_threshold(rw.brightness, 0.5, 1.0, 0), "direction is 0; give 1 to reward a measure below"),
        (lambda: rw.logistic_threshold(rw.brightness, [0.5, 1], 1.0), "2 thresholds need class_of"),
        (lambda: rw.logistic_threshold(rw.brightness, [], 1.0), "must be finite: one number, one a class"),
        (lambda: rw.class_by_prompt(["Bag"])(CONDITION), "prompt 'Boot' is none of the reward's classes. Known: Bag"),
        (
            lambda: rw.logistic_threshold(rw.brightness, [0.5], 1.0, class_of=lambda c: torch.tensor([0] * 5 + [3]))(
                IMAGES, CONDITION
            ),
            "class_of returned 3; the classes are 0 to 0",
        ),
        (
            lambda: rw.logistic_threshold(rw.brightness, [0.5], 1.0, class_of=lambda c: torch.zeros(6))(
                IMAGES, CONDITION
            ),
            r"class_of returned shape \(6,\), torch.float32 for 6 samples; expected \(6,\) whole numbers",
        ),
        (
            lambda: rw.ClassifierAlignment(lambda x: x, rw.class_by_prompt(["Bag"]))(IMAGES, CONDITION),
            r"classifier returned shape \(6, 1, 12, 12\) for 6 samples; expected \(6, classes\)",
        ),
    ],
)
def test_image_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- combinations ---------------------------------------------------------------------------------------------------


def test_combinations_by_hand() -> None:
    a, b = rw.Linear([1.0]), rw.Quadratic(2.0, center=[1.0])  # at x = 0, 2, 4: a = 0, 2, 4 and b = -1, -1, -9
    x, c = torch.tensor([[0.0], [2.0], [4.0]]), condition(3)
    total = rw.weighted_sum({"up": (2.0, a), "near": (0.5, b)})
    assert total(x, c).tolist() == [-0.5, 3.5, 3.5]
    assert {k: v.tolist() for k, v in total.parts(x, c).items()} == {"up": [0, 2, 4], "near": [-1, -1, -9]}
    assert rw.product([a, b])(x, c).tolist() == [0.0, -2.0, -36.0]
    assert rw.threshold(a, 2.0)(x, c).tolist() == [0.0, 1.0, 1.0]
    assert rw.clip(a, 1.0, 3.0)(x, c).tolist() == [1.0, 2.0, 3.0]
    assert rw.normalise(a, 1.0, 4.0)(x, c).tolist() == [-0.25, 0.25, 0.75]
    jpeg = rw.jpeg_compressibility()
    for combined in (total, rw.product([a, b]), rw.clip(a, 0, 1), rw.normalise(a, 0, 1)):
        assert combined.differentiable
    for combined in (rw.weighted_sum({"a": (1, a), "j": (1, jpeg)}), rw.product([a, jpeg]), rw.threshold(a, 0)):
        assert not combined.differentiable
    assert not rw.clip(jpeg, 0, 1).differentiable
    assert total.name == "2 up + 0.5 near"


def test_running_normaliser_merges_batches_and_restores() -> None:
    x = torch.randn(60, 1, generator=torch.Generator().manual_seed(4)) * 3 + 100
    normaliser = rw.RunningNormaliser(rw.Linear([1.0]))
    before = normaliser(x, condition(60))
    assert torch.equal(before, x[:, 0])  # mean 0, std 1, and calling teaches nothing
    for part in (x[:7], x[7:8], x[8:]):
        normaliser.update(part[:, 0])
    assert normaliser.mean == pytest.approx(x.double().mean().item(), rel=1e-12)
    assert normaliser.std == pytest.approx(x.double().std(correction=0).item(), rel=1e-9)
    restored = rw.RunningNormaliser(rw.Linear([1.0]))
    restored.load_state_dict(normaliser.state_dict())
    after = restored(x, condition(60))
    assert torch.equal(after, normaliser(x, condition(60)))
    assert after.std(correction=0).item() == pytest.approx(1.0, rel=1e-5)
    restored.update(x[:, 0])
    assert restored.count == 120


def test_running_normaliser_of_a_constant_divides_by_one() -> None:
    normaliser = rw.RunningNormaliser(rw.Linear([1.0]))
    normaliser.update(torch.full((5,), 2.0))
    assert normaliser(torch.tensor([[5.0]]), condition(1)).tolist() == [3.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rw.weighted_sum({}), "weighted_sum got no rewards"),
        (lambda: rw.weighted_sum({"a": (math.inf, rw.Linear([1.0]))}), "the weight of 'a' is inf"),
        (lambda: rw.product([]), "product got no rewards"),
        (lambda: rw.clip(rw.Linear([1.0]), 2.0, 1.0), "low=2.0 and high=1.0; give low < high"),
        (lambda: rw.normalise(rw.Linear([1.0]), 0.0, 0.0), "std is 0.0; give a positive number"),
        (lambda: rw.threshold(rw.Linear([1.0]), math.nan), "at is nan; give a finite number"),
        (lambda: rw.RunningNormaliser(rw.Linear([1.0])).update(torch.tensor([math.nan])), "contain NaN or inf"),
        (lambda: rw.RunningNormaliser(rw.Linear([1.0])).load_state_dict({"mean": 1}), "state lacks count, squares"),
    ],
)
def test_combination_errors(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --- loading --------------------------------------------------------------------------------------------------------


def ours(samples, condition):
    return samples.mean((1, 2, 3)) + condition.rows if condition.rows is not None else samples.mean((1, 2, 3))


def trl(images, prompts, metadata):
    return np.array([len(p) + m["i"] for p, m in zip(prompts, metadata, strict=True)]), {"info": 1}


def with_prompts(images, prompts):
    return [float(len(p)) for p in prompts]


def only_images(images, scale=2.0):
    return (scale * images.mean((1, 2, 3))).tolist()


def tensors_in_a_list(images):
    return [image.mean() for image in images]


def with_its_own_graph(images):
    with torch.enable_grad():
        return images.mean((1, 2, 3))


def through_numpy(images):
    return images.numpy().mean((1, 2, 3))


class Awaited:
    async def __call__(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))


class Scaled:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, images):
        return self.scale * images.mean((1, 2, 3)).numpy()


def test_every_accepted_shape_of_a_function_is_called_rightly() -> None:
    mean = IMAGES.mean((1, 2, 3))
    expected = [
        (ours, mean),
        (trl, torch.tensor([3.0, 5, 5, 7, 7, 9])),
        (with_prompts, torch.tensor([3.0, 4, 3, 4, 3, 4])),
    ]
    expected += [
        (only_images, 2 * mean),
        (tensors_in_a_list, mean),
        (through_numpy, mean),
        (with_its_own_graph, mean),
        (Scaled(), mean),
        (Scaled, mean),
    ]
    samples = IMAGES.clone().requires_grad_(True)  # undeclared functions may still call .numpy() and .tolist()
    for function, values in expected:
        result = rw.load(function)(samples, CONDITION)
        assert torch.allclose(result, values), function
        assert result.dtype == torch.float32
        assert not result.requires_grad
    assert torch.allclose(rw.load(only_images, scale=3.0)(IMAGES, CONDITION), 3 * mean)
    assert torch.allclose(rw.load(Scaled, scale=3.0)(IMAGES, CONDITION), 3 * mean)
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 1), nn.Flatten(0))
    values = rw.load(network)(IMAGES, CONDITION)
    assert torch.allclose(values, network(IMAGES).detach())
    assert not values.requires_grad
    without = Condition(["Bag", "Boot"])
    assert rw.load(lambda images, prompts, metadata: [len(m) for m in metadata])(IMAGES[:2], without).tolist() == [0, 0]


def test_float64_samples_give_float64_rewards() -> None:
    result = rw.load(lambda images: images.flatten(1).mean(1).numpy())(IMAGES.double(), CONDITION)
    assert result.dtype == torch.float64
    assert rw.load(lambda images: [1, 2])(IMAGES[:2], condition(2)).dtype == torch.float32


def test_a_declared_gradient_is_kept() -> None:
    def bright(images):
        return images.mean((1, 2, 3))

    bright.differentiable = True
    reward = rw.load(bright)
    assert rw.is_differentiable(reward)
    x = IMAGES.clone().requires_grad_(True)
    reward(x, CONDITION).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.full_like(x, 1 / 144))

    def listed(images):
        return [image.sum() for image in images]

    listed.differentiable = True
    (gradient,) = torch.autograd.grad(rw.load(listed)(x, CONDITION).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_a_reward_object_is_returned_as_it_is() -> None:
    linear = rw.Linear([1.0])
    assert rw.load(linear) is linear
    assert rw.load("linear", linear=[2.0])(torch.tensor([[3.0]]), condition(1)).tolist() == [6.0]


def test_file_and_module_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = file(tmp_path, "def score(images, factor=1):\n    return [factor * float(i.sum()) for i in images]\n")
    reward = rw.load(f"{spec}:score", factor=2)
    assert torch.allclose(reward(IMAGES, CONDITION), 2 * IMAGES.sum((1, 2, 3)))
    assert rw.name_of(reward) == "my.py:score"
    assert not (tmp_path / "__pycache__").exists()
    file(tmp_path, "def score(images, factor=1):\n    return [factor * float(i.amin()) for i in images]\n")
    assert torch.allclose(rw.load(f"{spec}:score")(IMAGES, CONDITION), IMAGES.amin((1, 2, 3)))  # no stale copy
    (tmp_path / "my_rewards.py").write_text("def first(images):\n    return images[:, 0, 0, 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(rw.load("my_rewards:first")(IMAGES, CONDITION), IMAGES[:, 0, 0, 0])


def test_a_file_does_not_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "scoreact_neighbour.py").write_text("raise SystemExit('ran')")
    spec = file(tmp_path, "import scoreact_neighbour\ndef f(images): ...\n")
    with pytest.raises(ValueError, match=r"ModuleNotFoundError.*\(line 1\)\. Install what it imports; files beside it"):
        rw.load(f"{spec}:f")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "brightnes",
            {},
            r"unknown reward 'brightnes'. Did you mean 'brightness'\? Known: aesthetic, brightness, clip, colorfulness, "
            r".*, imagereward, .*, zero_shot. "
            r"Or give 'file.py:name', 'module:name', 'onnx:FILE' or a folder of `scoreact reward`",
        ),
        ("xyz", {}, r"unknown reward 'xyz'. Known: aesthetic, brightness"),
        ("my.py", {}, r"'my.py' names a file but no function in it. Give 'my.py:name'"),
        (":f", {}, r"':f' lacks a half. Give 'file.py:name' or 'module:name'"),
        ("jpeg_compressibility", {"qualty": 3}, r"no option 'qualty'. Did you mean 'quality'\? Options: quality"),
        ("linear", {}, r"reward 'linear': missing a required argument: 'linear'. Options: linear"),
        ("nowhere/my.py:f", {}, r"reward file 'nowhere/my.py' does not exist \(looked in .*\). Give the path of a .py"),
        (
            "no_such_module:f",
            {},
            r"module 'no_such_module' was not found. Install it, put its folder on PYTHONPATH, or",
        ),
        ("math:sinn", {}, r"math has no 'sinn'. Did you mean 'sin"),
        ("math:pi", {}, r"'pi' in math is a float, no function"),
    ],
)
def test_load_errors(spec: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rw.load(spec, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def bright(x): ...\ndef dark(x): ...\n",
            r"has no 'brigth'. Did you mean 'bright'\? It has: bright, dark",
        ),
        ("import torch\n\ndef broken(:\n", r"SyntaxError: invalid syntax \(line 3\). Correct that line"),
        ("import no_such_package\n", r"No module named 'no_such_package' \(line 1\). Install what it imports"),
        ("x = 1\nx / 0\n", r"cannot be run: ZeroDivisionError: division by zero \(line 2\). Correct that line"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(line 2\). Put the script's own part under `if __name__"),
        ("brigth = 3\n", r"'brigth' in .*my.py is a int, no function"),
    ],
)
def test_errors_inside_the_users_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rw.load(f"{file(tmp_path, text)}:brigth")


def test_module_named_for_a_file_points_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scoreact_mine.py").write_text("raise RuntimeError('must not run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    with pytest.raises(ValueError, match=r"was not found. Did you mean 'scoreact_mine.py:f'\?"):
        rw.load("scoreact_mine:f")


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            lambda: 0,
            {},
            r"takes no samples and returned a int; write it as f\(samples, condition\), f\(images, prompts",
        ),
        (lambda: 1 / 0, {}, r"called with the options {} to make a reward, and failed \(ZeroDivisionError"),
        (Awaited(), {}, r"is an `async def`, which nobody would await. Write `def`"),
        (Awaited().__call__, {}, r"is an `async def`"),
        (lambda a, b, c, d: 0, {}, r"takes the positional arguments \(a, b, c, d\)"),
        (lambda images, metadata: 0, {}, r"takes the positional arguments \(images, metadata\)"),
        (lambda *args: 0, {}, r"takes the positional arguments \(\)"),
        (lambda images, *, scale: 0, {}, r"needs a value for scale: give it as an option, or a default"),
        (only_images, {"scal": 1}, r"has no option 'scal'. Did you mean 'scale'\? Its parameters: images, scale"),
        (Scaled, {"size": 1}, r"could not be built with the options {'size': 1}"),
        (int, {}, r"reward class builtins:int has no __call__"),
    ],
)
def test_signature_errors(function: Callable[..., object], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rw.load(function, **options)


def test_a_function_without_samples_makes_the_reward() -> None:
    """ddpo's and TRL's form: `aesthetic_scorer()` returns f(images, prompts, metadata) -> (rewards, info)."""

    def scorer(scale: float = 1.0) -> Callable[..., object]:
        def score(images: Tensor, prompts: list[str], metadata: list[dict]) -> object:  # type: ignore[type-arg]
            return scale * images.mean((1, 2, 3)).numpy(), [{} for _ in prompts]

        return score

    def scorer_of(model: str, file: str) -> Callable[..., object]:
        return scorer(3.0 if (model, file) == ("ab", "c") else 1.0)

    mean = IMAGES.mean((1, 2, 3))
    assert torch.allclose(rw.load(scorer)(IMAGES, CONDITION), mean)
    assert torch.allclose(rw.load(scorer, scale=2.0)(IMAGES, CONDITION), 2 * mean)
    assert torch.allclose(rw.load(scorer_of, model="ab", file="c")(IMAGES, CONDITION), 3 * mean)
    with pytest.raises(ValueError, match=r"of type function; .* give what it needs as options \(--reward-option"):
        rw.load(scorer_of)(IMAGES, CONDITION)


# --- checked --------------------------------------------------------------------------------------------------------


def returning(value: object) -> rw.Checked:
    def f(images):
        return value

    f.name = "my.py:f"
    return rw.checked(rw.load(f))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(6, 1), r"my.py:f returned shape \(6, 1\) for 6 samples; expected \(6,\). Add `.squeeze\(-1\)` at"),
        (torch.zeros(6, 4, 4), r"returned shape \(6, 4, 4\) for 6 samples; expected \(6,\). Add `.flatten\(1\).mean"),
        (0.5, r"returned shape \(\) for 6 samples; expected \(6,\). Do not average over the batch"),
        ([1.0, 2.0], r"returned shape \(2,\) for 6 samples; expected \(6,\). Return one number for every sample"),
        ([0.0, 0, math.nan, 0, 0, 0], r"my.py:f returned NaN for sample 2 of 6 \(counted from 0; prompt 'Bag'\)\. Ret"),
        ([0.0, 0, 0, math.inf, -math.inf, 0], r"returned inf for sample 3 of 6 .*prompt 'Coat'\), and 1 more\."),
        ([0.0, -math.inf, 0, 0, 0, 0], r"returned -inf for sample 1 of 6"),
        ("good", r"my.py:f returned a value of type str; expected one number a sample.* Parse it with `float`"),
        ((torch.zeros(6), [{}] * 5, 3), r"returned a tuple whose parts have different lengths. Return one number"),
        (np.ma.array([1.0] * 6, mask=[0, 1, 0, 0, 0, 0]), r"returned a masked array. Fill what is masked"),
        (np.array([1.0, None] * 3, dtype=object), r"returned a ndarray of NoneType; expected numbers"),
        ((i for i in range(6)), r"of type generator; .* Return a list in the place of `yield`"),
        (map(float, range(6)), r"of type map; .* Return `list\(...\)` of it"),
        (None, r"returned a value of type NoneType; .* Add a `return` statement"),
        ({"avg": [1.0] * 6}, r"returned a value of type dict; .* Return one of its entries"),
        (["a"] * 6, r"returned a list of str; expected numbers. Convert each with `float`"),
        ([[1.0], [1.0, 2.0]], r"returned a list whose parts have different lengths"),
        (torch.zeros(6) * 1j, r"returned complex numbers; expected real ones"),
    ],
)
def test_checked_names_what_was_returned(value: object, message: str) -> None:
    reward = returning(value)
    with pytest.raises(ValueError, match=message):
        reward(IMAGES, CONDITION)
    assert reward.calls == 0


def test_checked_chains_an_exception() -> None:
    def f(images):
        return images.nothing

    with pytest.raises(
        RuntimeError, match=r"f raised AttributeError: .*given samples of shape \(6, 1, 12, 12\)"
    ) as info:
        rw.checked(rw.load(f))(IMAGES, CONDITION)
    assert isinstance(info.value.__cause__, AttributeError)


def test_checked_blames_the_samples_for_their_nan() -> None:
    images = IMAGES.clone()
    images[4, 0, 3, 3] = math.nan
    with pytest.raises(
        ValueError, match=r"samples for reward brightness contain NaN for sample 4 of 6 .* not the reward"
    ):
        rw.checked(rw.load("brightness"))(images, CONDITION)
    with pytest.raises(ValueError, match="got 6 samples but 2 prompts"):
        rw.checked(rw.load("brightness"))(IMAGES, condition(2))


def test_checked_counts_and_passes_values_and_gradients() -> None:
    reward = rw.checked(rw.load("brightness"))
    x = IMAGES.clone().requires_grad_(True)
    values = reward(x, CONDITION)
    reward(IMAGES[:2], condition(2))
    assert reward.calls == 8
    assert torch.equal(values, IMAGES.mean((1, 2, 3)))
    values.sum().backward()
    assert x.grad is not None
    assert reward.differentiable
    assert reward.name == "brightness"
    plain = rw.checked(lambda samples, condition: samples.mean((1, 2, 3)))
    assert not plain(x, CONDITION).requires_grad  # not declared: nobody may use it by accident
    assert rw.checked(rw.Linear([1.0]))(torch.tensor([2.0, 3.0]), condition(2)).tolist() == [2.0, 3.0]


def test_checked_refuses_a_declared_gradient_that_is_not_there() -> None:
    def f(images):
        return images.detach().mean((1, 2, 3))

    f.differentiable = True
    with pytest.raises(ValueError, match="marked differentiable but its result carries no gradient"):
        rw.checked(rw.load(f))(IMAGES.clone().requires_grad_(True), CONDITION)
    assert rw.checked(rw.load(f))(IMAGES, CONDITION).shape == (6,)


# --- explain --------------------------------------------------------------------------------------------------------


def mean(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def changes_its_input(images):
    images *= 2
    return mean(images)


class Counts:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        return mean(images) + self.calls


def cast_to_bytes(images):
    pixels = np.asarray(images).astype(np.uint8)
    return pixels.reshape(len(pixels), -1).sum(1)


def needs_bytes_strictly(images):
    if images.dtype != torch.uint8:
        raise TypeError("expected bytes")
    return images.float().mean((1, 2, 3))


def rounds(images):
    return (images * 255).round().mean((1, 2, 3))


def root_of_zero(images):
    return (images - images).abs().sum((1, 2, 3)).sqrt() + mean(images)


def no_single(images):
    if len(images) == 1:
        raise ValueError("too few")
    return mean(images)


@pytest.mark.parametrize(
    ("function", "needs_gradient", "expected"),
    [
        (lambda images: mean(images)[:, None], False, r"problem: .*returned shape \(6, 1\) for 6 samples"),
        (lambda images: images.nothing, False, r"problem: .*raised AttributeError"),
        (lambda images: "x", False, r"problem: .*returned a value of type str"),
        (lambda images: (mean(images) - 2).log(), False, r"problem: .*returned NaN for sample 0 of 6"),
        (lambda images: mean(images).bfloat16(), False, r"note: .*returned torch.bfloat16, 2 to 3 digits"),
        (Counts(), False, r"problem: reward Counts is not deterministic: samples\[\d\] got \d.*, then \d"),
        (changes_its_input, False, r"problem: .*changes the samples it is given. Work on `samples.clone\(\)`"),
        (
            lambda images: mean(images) - mean(images).mean(),
            False,
            r"problem: .*depends on the batch: samples\[\d\] gets",
        ),
        (no_single, False, r"problem: a single sample cannot be scored: .*raised ValueError: too few"),
        (cast_to_bytes, False, r"problem: .*may expect pictures in 0..255.*a guess"),
        (needs_bytes_strictly, False, r"note: it runs on uint8 pictures in 0..255"),
        (lambda images: torch.ones(len(images)), False, r"problem: .*gave all 6 samples 1; there is nothing to learn"),
        (rounds, True, r"problem: the gradient of .*rounds is zero for all 6 samples.*or choose a rule"),
        (lambda images: mean(images).tolist(), True, r"problem: .*(carries no gradient|cannot be differentiated)"),
        (root_of_zero, True, r"problem: the gradient of .* is NaN or inf for samples\[0\]"),
        (mean, True, r"problem: .*has a gradient but does not say so. Set the function's `differentiable = True`"),
    ],
)
def test_explain_finds(function: Callable[..., object], needs_gradient: bool, expected: str) -> None:
    found = rw.explain(function, IMAGES, CONDITION, needs_gradient)
    assert any(re.match(expected, line) for line in found), found
    problems = [line for line in found if line.startswith("problem: ")]
    if expected.startswith("problem"):
        assert len(problems) == 1, found
    assert found[-1].startswith(f"{len(problems)} problem" if problems else "fine: "), found


@pytest.mark.parametrize("spec", ["brightness", "jpeg_compressibility", only_images, trl, "colorfulness"])
def test_explain_is_content_with_good_rewards(spec: str | Callable[..., object]) -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(6, 3, 12, 12, generator=generator) * torch.rand(6, 1, 1, 1, generator=generator)
    found = rw.explain(spec, images, CONDITION, needs_gradient=spec in ("brightness", "colorfulness"))
    assert len(found) == 1, found
    assert found[0].startswith("fine: reward ")
    assert "gave 6 samples of shape (3, 12, 12) values from" in found[0]
    assert torch.equal(images, images.clone())


def test_explain_notes_a_slow_reward_and_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoreact.rewards.examine.SLOW", 1e-3)
    found = rw.explain(lambda images: (time.sleep(2e-3 * len(images)), mean(images))[1], IMAGES, CONDITION)
    assert re.match(r"note: .*takes 0.00\d+ s a sample; 10,000 take 0.0 hours", found[0]), found
    assert found[-1].startswith("fine: ")
    assert _about_tensor("f", torch.zeros(6, device="meta"), IMAGES) == [
        "note: reward f returned a tensor on meta; it is copied to cpu each call."
    ]


def test_explain_reports_what_cannot_be_loaded() -> None:
    found = rw.explain("brightnes", IMAGES, CONDITION)
    assert found[0].startswith("problem: unknown reward 'brightnes'")
    with pytest.raises(ValueError, match="got 6 samples and 2 prompts"):
        rw.explain("brightness", IMAGES, condition(2))
    assert rw.explain("brightness", IMAGES[:1], condition(1))[0].startswith("note: one sample says little")
    assert any("carries no gradient" in line for line in rw.explain("jpeg_compressibility", IMAGES, CONDITION, True))
