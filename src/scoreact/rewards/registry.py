"""Names for rewards: the package's own, and `load`, the one way in for every other.

A name stands for a factory whose keyword options are its signature. Rewards that need objects (a classifier, a
measure, other rewards) have no name here: build them in Python.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..support.errors import RewardError
from .base import FunctionReward, Reward, known, name_of, outside
from .batch import coverage_reward, diversity_reward, vendi_reward
from .closed_form import Linear, Quadratic
from .image import brightness, colorfulness, jpeg_compressibility, jpeg_incompressibility, of_measure
from .imagenet import ImageNet, ZeroShot
from .learned import is_learned, open_learned
from .ocr import OCR, OCRLogProbability
from .onnx import OnnxReward
from .remote.client import find
from .score_matching import ScoreMatching
from .text_image import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore
from .two_sample import energy_distance_reward, mmd_reward, sliced_wasserstein_reward
from .user import adapt, from_spec
from .video import SmoothMotion, temporal_flickering
from .vision_language import VQAScore
from .weighted_statistics import WeightedStatistics

ONNX = "onnx:"  # before the path of an ONNX file


def _brightness() -> FunctionReward:
    return of_measure(brightness, "brightness")


def _colorfulness() -> FunctionReward:
    return of_measure(colorfulness, "colorfulness")


OF_A_BATCH: dict[str, Callable[..., Reward]] = {
    "coverage": coverage_reward,
    "diversity": diversity_reward,
    "energy_distance": energy_distance_reward,
    "mmd": mmd_reward,
    "sliced_wasserstein": sliced_wasserstein_reward,
    "vendi": vendi_reward,
}
KNOWN: dict[str, Callable[..., Reward]] = {
    "aesthetic": Aesthetic,
    "brightness": _brightness,
    "clip": CLIPScore,
    "colorfulness": _colorfulness,
    "hps": HPSv2,
    "imagenet": ImageNet,
    "imagereward": ImageReward,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "linear": Linear,
    "ocr": OCR,
    "ocr_log_probability": OCRLogProbability,
    "outside": outside,
    "pickscore": PickScore,
    "quadratic": Quadratic,
    "score_matching": ScoreMatching,
    "smooth_motion": SmoothMotion,
    "temporal_flickering": temporal_flickering,
    "statistics": WeightedStatistics,
    "vqa": VQAScore,
    "zero_shot": ZeroShot,
    **OF_A_BATCH,
}


def load(spec: str | Callable[..., Any], **options: Any) -> Reward:
    """A reward by name, from the user's code, or from a function in one of the shapes of `user.adapt`.

    Args:
        spec: a name in `KNOWN`, `path/to/file.py:name`, `module:name`, `onnx:path/to/file.onnx`, the folder of a reward that
            `scoreact reward` made, or a callable; a reward that runs elsewhere is `http://HOST:PORT` of a reward server, or
            `path/to/file.py:name@/path/to/python`.
        options: of a known reward its factory's keywords, of an ONNX file those of `OnnxReward`, of a function keywords
            that are bound once, of one elsewhere those of `remote.over_http` and `remote.in_process`.

    Returns:
        A reward of samples [B, ...] and the condition of B: [B] float32 on their device (float64 for float64 samples). For
        training it wants to be wrapped in `checked`.

    Raises:
        ValueError: a name, file, module or option that is not there, or a file that fails when it is run.
    """
    if not isinstance(spec, str):
        return adapt(spec, name_of(spec), options)
    if spec.startswith(ONNX):
        return _made(functools.partial(OnnxReward, spec.removeprefix(ONNX)), spec, options)
    if spec not in KNOWN and (is_learned(spec) or Path(spec).is_dir()):
        return _made(functools.partial(open_learned, spec), spec, options)
    if (elsewhere := find(spec, options)) is not None:
        return elsewhere
    if ":" in spec:
        return from_spec(spec, options)
    if spec.endswith(".py"):
        raise RewardError(f"reward {spec!r} names a file but no function in it. Give '{spec}:name'.")
    if spec not in KNOWN:
        hint = known("Known", spec, KNOWN)
        others = "'file.py:name', 'module:name', 'onnx:FILE' or a folder of `scoreact reward`"
        raise RewardError(f"unknown reward {spec!r}. {hint} Or give {others}.")
    return _made(KNOWN[spec], spec, options)


def _made(factory: Callable[..., Reward], spec: str, options: dict[str, Any]) -> Reward:
    """What a factory gives for options that its signature has. Raises RewardError for others."""
    signature = inspect.signature(factory)
    for option in options:
        if option not in signature.parameters:
            raise RewardError(
                f"reward {spec!r} has no option {option!r}. {known('Options', option, signature.parameters)}"
            )
    try:
        signature.bind(**options)
    except TypeError as error:
        raise RewardError(f"reward {spec!r}: {error}. Options: {', '.join(signature.parameters)}.") from None
    return factory(**options)
