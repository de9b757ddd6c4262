"""Rewards: what is wanted, as a function of decoded samples and their condition. Larger is better.

A reward is any `(samples [B, ...], condition) -> [B]`; `load` also takes names, the user's files, and functions in
the shapes that `user.adapt` lists. The optional attribute `differentiable` (default False) says that the gradient
with respect to the samples may be used. Does not know policies, costs or training.
"""

from __future__ import annotations

from .base import ClassOf, Measure, Reward, is_differentiable, name_of
from .check import Checked, checked
from .closed_form import Linear, Quadratic
from .combine import RunningNormaliser, WeightedSum, clip, normalise, product, threshold, weighted_sum
from .examine import explain
from .image import (
    ClassifierAlignment,
    brightness,
    class_by_prompt,
    colorfulness,
    jpeg_compressibility,
    jpeg_incompressibility,
    jpeg_kilobytes,
    logistic_threshold,
    of_measure,
)
from .imagenet import ImageNet, ImageNetClassifier, ZeroShot
from .ocr import OCR, OCRLogProbability, TextRecogniser
from .onnx import OnnxReward
from .registry import KNOWN, load
from .text_image import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore
from .user import UserReward, adapt
from .video import SmoothMotion, phase_correlation, temporal_flickering
from .vision_language import VQAScore

__all__ = [
    "KNOWN",
    "OCR",
    "Aesthetic",
    "CLIPScore",
    "Checked",
    "ClassOf",
    "ClassifierAlignment",
    "HPSv2",
    "ImageNet",
    "ImageNetClassifier",
    "ImageReward",
    "Linear",
    "Measure",
    "OCRLogProbability",
    "OnnxReward",
    "PickScore",
    "Quadratic",
    "Reward",
    "RunningNormaliser",
    "SmoothMotion",
    "TextRecogniser",
    "UserReward",
    "VQAScore",
    "WeightedSum",
    "ZeroShot",
    "adapt",
    "brightness",
    "checked",
    "class_by_prompt",
    "clip",
    "colorfulness",
    "explain",
    "is_differentiable",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "jpeg_kilobytes",
    "load",
    "logistic_threshold",
    "name_of",
    "normalise",
    "of_measure",
    "phase_correlation",
    "product",
    "temporal_flickering",
    "threshold",
    "weighted_sum",
]
