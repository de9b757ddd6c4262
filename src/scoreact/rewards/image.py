"""Rewards for pictures: JPEG size, brightness, colourfulness, a soft threshold on any measure, a classifier's class.

Pictures are [B, 1 or 3, H, W] in [0, 1]. A *measure* is samples -> [B] in its own unit; a *reward* also sees the
condition. JPEG sizes are Pillow's (libjpeg-turbo's) byte counts: exact, but another build of the encoder may differ by
some bytes. Sources: Black et al. 2023 (DDPO, arXiv 2305.13301) for compressibility; Hasler & Suesstrunk 2003,
"Measuring colourfulness in natural images", for colorfulness; ITU-R BT.601 for luma.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..support.errors import RewardError
from ..support.names import did_you_mean
from ..types import Condition
from .base import ClassOf, FunctionReward, Measure, is_differentiable, name_of, reward_dtype


def jpeg_kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """Size of each picture as a JPEG file, in kB (1000 bytes). [B, 1 or 3, H, W] -> [B], float32, no gradient.

    Rounded to 8 bits (values outside [0, 1] are clipped), encoded as greyscale or RGB with Pillow's defaults for the
    rest (4:2:0, no optimisation). Raises ValueError for NaN, whole-number pictures, another shape or quality.
    """
    check_images(images)
    _check_quality(quality)
    if not images.isfinite().all():
        raise RewardError("images contain NaN or inf, which have no JPEG; look at what `decode` returned.")
    pixels = to_bytes(images)
    arrays = (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1).contiguous()).numpy()
    sizes = []
    for array in arrays:  # a thread pool was measured on 2 cores: slower for small pictures, even for large
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=quality)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


def to_bytes(images: Tensor) -> Tensor:
    """Rounded to 8 bits, values outside [0, 1] clipped: uint8 on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def pictures(images: Tensor) -> list[Image.Image]:
    """[B, 1 or 3, H, W] in [0, 1], clipped and rounded to 8 bits, as B RGB pictures."""
    check_images(images)
    return [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in to_bytes(images).expand(-1, 3, -1, -1)]


def brightness(images: Tensor) -> Tensor:
    """Mean luma in [0, 1]: 0.299 R + 0.587 G + 0.114 B, or the grey value. [B, 1 or 3, H, W] -> [B], differentiable."""
    check_images(images)
    x = images.to(reward_dtype(images))
    if x.shape[1] == 1:
        return x.mean((1, 2, 3))
    return x.mean((2, 3)) @ x.new_tensor([0.299, 0.587, 0.114])


def colorfulness(images: Tensor) -> Tensor:
    """Hasler & Suesstrunk's M = sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2). [B, 3, H, W] -> [B].

    rg = R - G, yb = (R + G) / 2 - B on the scale 0 to 255: 0 is grey, 15 slightly, 33 moderately, 82 highly colourful.
    Differentiable; where a root's argument is 0 its gradient is taken as 0. Raises ValueError for one channel.
    """
    check_images(images)
    if images.shape[1] != 3:
        raise RewardError(f"colorfulness needs 3 channels; images have shape {tuple(images.shape)}. Give RGB pictures.")
    red, green, blue = (255 * images.to(reward_dtype(images))).flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1)  # [B, 2, H W]
    spread = opponents.var(2, correction=0).sum(1)
    level = opponents.mean(2).square().sum(1)
    return _root(spread) + 0.3 * _root(level)


for _measure in (brightness, colorfulness):
    _measure.differentiable = True  # type: ignore[attr-defined]


def of_measure(measure: Measure, name: str | None = None) -> FunctionReward:
    """The measure itself as a reward, in its own unit."""
    return FunctionReward(lambda x, condition: measure(x), name or name_of(measure), is_differentiable(measure))


def jpeg_incompressibility(quality: int = 95) -> FunctionReward:
    """R = size in kB as a JPEG: more detail is better."""
    _check_quality(quality)
    return FunctionReward(lambda x, condition: jpeg_kilobytes(x, quality), "jpeg_incompressibility")


def jpeg_compressibility(quality: int = 95) -> FunctionReward:
    """R = -(size in kB as a JPEG): plainer is better."""
    _check_quality(quality)
    return FunctionReward(lambda x, condition: -jpeg_kilobytes(x, quality), "jpeg_compressibility")


def logistic_threshold(
    measure: Measure,
    thresholds: float | Sequence[float] | Tensor | Mapping[str, float],
    scale: float,
    direction: int = 1,
    class_of: ClassOf | None = None,
) -> FunctionReward:
    """R = log sigmoid(direction (threshold[c] - measure(x)) / scale): log-probability of a property given the sample.

    The property is "measure below the threshold" for direction 1, "above" for -1, blurred over `scale` (in the
    measure's unit; probability 1/2 at the threshold). With kl_weight 1 the optimum is the model's posterior given it.
    thresholds: one number, {prompt: number}, or [C] numbers with `class_of` (condition -> [B] int64).
    Differentiable when the measure says so. Raises ValueError for a bad scale, direction, or unknown class.
    """
    if not 0 < scale < float("inf"):
        raise RewardError(f"scale is {scale}; give a positive number in the measure's unit.")
    if direction not in (1, -1):
        raise RewardError(f"direction is {direction}; give 1 to reward a measure below the threshold, -1 above it.")
    table = list(thresholds.values()) if isinstance(thresholds, Mapping) else thresholds
    values = torch.as_tensor(table, dtype=torch.float64)
    if values.ndim > 1 or not values.numel() or not values.isfinite().all():
        raise RewardError(f"thresholds {thresholds} must be finite: one number, one a class, or {{prompt: number}}.")
    if isinstance(thresholds, Mapping):
        class_of = class_by_prompt(list(thresholds))
    elif values.ndim == 1 and class_of is None:
        raise RewardError(f"{len(values)} thresholds need class_of (condition -> [B]); or give {{prompt: threshold}}.")

    def reward(samples: Tensor, condition: Condition) -> Tensor:
        measured = measure(samples)
        at = values.to(measured)
        if values.ndim == 1 and class_of is not None:
            at = at[_classes(class_of, condition, len(values)).to(at.device)]
        return F.logsigmoid(direction * (at - measured) / scale)

    return FunctionReward(reward, f"logistic_threshold({name_of(measure)})", is_differentiable(measure))


class ClassifierAlignment:
    """R = log p(class | image) by a classifier of images: how well a sample is what its condition asked for.

    classifier: images [B, C, H, W] -> logits [B, classes]. A module is put into eval mode and its parameters are
    frozen (on the caller's object): the reward must neither change between calls nor be trained.
    class_of: condition -> class indices [B], int64; see `class_by_prompt`. Differentiable with respect to the images.
    Raises ValueError when an index is not one of the classifier's classes, or the logits are not [B, classes].
    """

    name = "classifier_alignment"
    differentiable = True

    def __init__(self, classifier: Measure, class_of: ClassOf) -> None:
        if isinstance(classifier, nn.Module):
            classifier.eval().requires_grad_(False)
        self.classifier = classifier
        self.class_of = class_of

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        logits = self.classifier(samples)
        if logits.ndim != 2 or len(logits) != len(samples):
            raise RewardError(
                f"the classifier returned shape {tuple(logits.shape)} for {len(samples)} samples; expected "
                f"({len(samples)}, classes). Return one row of logits a sample."
            )
        classes = _classes(self.class_of, condition, logits.shape[1]).to(logits.device)
        return -F.cross_entropy(logits.to(reward_dtype(logits)), classes, reduction="none")


def class_by_prompt(names: Sequence[str]) -> ClassOf:
    """condition -> index of each prompt in `names`, [B] int64. Raises ValueError naming a prompt that is not there."""
    index = {name: i for i, name in enumerate(names)}

    def class_of(condition: Condition) -> Tensor:
        for prompt in condition.prompts:
            if prompt not in index:
                raise RewardError(f"prompt {prompt!r} is none of the reward's classes. Known: {', '.join(names)}.")
        return torch.tensor([index[prompt] for prompt in condition.prompts], dtype=torch.int64)

    return class_of


def read_class_names(file: str) -> list[str]:
    """The lines of a file, one a class, in the order of a classifier's outputs; synonyms are separated by commas."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise RewardError(f"the file of class names {file!r} does not exist (looked in {Path.cwd()}).")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def class_index(names: Sequence[str], wanted: str) -> int:
    """The class of that name, a whole line or one of its synonyms. Raises RewardError for none, and for more than one."""
    found = _by_synonym(names).get(wanted.strip().lower(), [])
    if len(found) != 1:
        problem = (
            f"stands for the classes {', '.join(map(str, found))}; give the number" if found else "is none of them"
        )
        raise RewardError(f"class {wanted!r} {problem}.{did_you_mean(wanted.lower(), _by_synonym(names))}")
    return found[0]


def class_by_name(names: Sequence[str]) -> ClassOf:
    """condition -> the class that each prompt names, as `class_index` finds it, [B] int64."""
    return lambda condition: torch.tensor([class_index(names, prompt) for prompt in condition.prompts])


@functools.lru_cache(maxsize=8)
def _synonyms(names: tuple[str, ...]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        for word in {name.lower(), *(part.strip().lower() for part in name.split(","))}:
            found.setdefault(word, []).append(i)
    return found


def _by_synonym(names: Sequence[str]) -> dict[str, list[int]]:
    return _synonyms(tuple(names))


def _classes(class_of: ClassOf, condition: Condition, count: int) -> Tensor:
    classes = class_of(condition)
    if classes.shape != (len(condition),) or classes.is_floating_point():
        raise RewardError(
            f"class_of returned shape {tuple(classes.shape)}, {classes.dtype} for {len(condition)} samples; "
            f"expected ({len(condition)},) whole numbers."
        )
    outside = classes[(classes < 0) | (classes >= count)]
    if len(outside):
        raise RewardError(f"class_of returned {int(outside[0])}; the classes are 0 to {count - 1}.")
    return classes.long()


def _root(x: Tensor) -> Tensor:
    """sqrt with gradient 0 at 0, where autograd's is inf and turns into NaN."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise RewardError(f"images have shape {tuple(images.shape)}; expected [B, 1 or 3, H, W].")
    if not images.is_floating_point():
        raise RewardError(f"images are {images.dtype}; expected floats in [0, 1]. Divide them by 255.")


def _check_quality(quality: int) -> None:
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise RewardError(f"quality is {quality!r}; give a whole number from 1 to 100.")
