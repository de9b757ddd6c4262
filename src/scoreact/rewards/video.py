"""Rewards for videos [B, 1 or 3, frames, H, W] in [0, 1]: VBench's temporal flickering, and smooth motion, which no still wins.

Knows one motion a frame: a camera's, or that of one thing before a plain ground. Sources: Huang et al. 2024 (VBench, arXiv
2311.17982) for temporal flickering; Kuglin & Hines 1975, "The phase correlation image alignment method", here with the peak
found to a fraction of a pixel by Newton's method, so that it has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import FunctionReward, reward_dtype

TAPER = 0.25  # share of a side over which the window falls to 0, at either end
DAMPING, CUTOFF = 0.1, 0.2  # of weak frequencies, in mean magnitudes; of high ones, in cycles a pixel
NEWTON = 4  # steps from the pixel of the peak


def phase_correlation(first: Tensor, second: Tensor, taper: float = TAPER) -> Tensor:
    """By how much `second` is `first` shifted: [N, 2] pixels (x to the right, y downwards), of frames [N, C, H, W].

    The peak of the whitened cross-correlation, at most half a side away. Differentiable: the last Newton step carries the exact
    derivative of the peak's place, within one pixel of the highest sample. Frames without any contrast have shift 0.

    Args:
        first, second: frames of a plain background, or of a scene that moves as a whole.
        taper: share of a side that a window fades out at either end, without which what enters and leaves the frame counts as
            standing still; 0 for frames that continue at the opposite side.
    """
    height, width = first.shape[-2:]
    a, b = _centred(first, second, taper)
    cross = (torch.fft.fft2(b) * torch.fft.fft2(a).conj()).sum(1)  # [N, H, W]
    size = cross.abs()
    y, x = _frequencies(height, width, first)
    low = torch.exp(-(x.square() + y.square()) / (2 * CUTOFF**2))
    tiny = torch.finfo(size.dtype).tiny
    white = low * cross / (size + DAMPING * size.mean((1, 2), keepdim=True) + tiny)
    with torch.no_grad():
        top = torch.fft.ifft2(white).real.flatten(1).argmax(1)
        row, column = top // width, top % width
        start = torch.stack([_signed(column, width), _signed(row, height)], dim=1).to(size)
    k = 2 * math.pi * torch.stack([x.expand(height, width), y.expand(height, width)]).flatten(1)  # [2, H W]
    spectrum = white.flatten(1)

    def newton(at: Tensor, spectrum: Tensor) -> Tensor:
        """A step up r(d) = sum of Re(spectrum exp(i k.d))."""
        turned = spectrum * torch.exp(1j * (at @ k))
        slope = -(k * turned.imag[:, None]).sum(2)
        bend = torch.einsum("ik,jk,nk->nij", k, k, turned.real)  # minus the Hessian
        floor = 1e-6 * bend.diagonal(dim1=1, dim2=2).sum(1).abs().clamp(min=1e-6)
        bend = bend + floor[:, None, None] * torch.eye(2, dtype=size.dtype, device=size.device)
        return at + torch.linalg.solve(bend, slope)

    at = start
    with torch.no_grad():
        for _ in range(NEWTON):
            at = torch.minimum(torch.maximum(newton(at, spectrum), start - 1), start + 1)
    moved = newton(at, spectrum)
    return torch.where((moved - start).abs().amax(1, keepdim=True) <= 1, moved, at)  # else no peak of its own there


def shift(frames: Tensor, by: Tensor) -> Tensor:
    """Frames [N, C, H, W] moved by [N, 2] pixels, to a fraction: each frequency is turned; what leaves comes in opposite."""
    y, x = _frequencies(frames.shape[-2], frames.shape[-1], frames)
    turn = torch.exp(-2j * math.pi * (x * by[:, 0, None, None] + y * by[:, 1, None, None]))
    return torch.fft.ifft2(torch.fft.fft2(frames) * turn[:, None]).real


def temporal_flickering() -> FunctionReward:
    """R = 1 - mean |frame - next frame|, VBench's temporal flickering, in [0, 1]; differentiable. A still has 1, the most."""

    def reward(videos: Tensor, condition: Condition) -> Tensor:
        check_videos(videos, 2)
        x = videos.to(reward_dtype(videos))
        return 1 - x.diff(dim=2).abs().flatten(1).mean(1)

    return FunctionReward(reward, "temporal_flickering", differentiable=True)


class SmoothMotion:
    """R = consistency x steadiness x min(motion, target) / target, in [0, 1]; differentiable.

    With v the shift from a frame to the next, by phase correlation: consistency is the mean over neighbouring frames a, b, less
    their ground, of 1 - |b - a moved by v|^2 / (|a|^2 + |b|^2); steadiness is exp(-mean |v' - v|^2 / (2 tolerance^2)) over
    neighbouring shifts; motion is the mean of |v|. The first two are 1 for a still, but R of a still is 0.

    Args:
        target: pixels a frame that are enough motion; more is not better.
        tolerance: of the change of v from frame to frame, pixels; at twice as much steadiness is 0.14.
        taper: of `phase_correlation`.

    Raises:
        RewardError: a target or a tolerance that is not above 0, a taper outside [0, 0.5]; of videos: fewer than 3 frames.
    """

    name = "smooth_motion"
    differentiable = True

    def __init__(self, target: float = 1.0, tolerance: float = 0.5, taper: float = TAPER) -> None:
        for name, value in (("target", target), ("tolerance", tolerance)):
            if not 0 < value < math.inf:
                raise RewardError(f"{name} is {value}; give a positive number of pixels a frame.")
        if not 0 <= taper <= 0.5:
            raise RewardError(f"taper is {taper}; give a share of a side from 0 to 0.5.")
        self.target, self.tolerance, self.taper = target, tolerance, taper

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return self.total(self.parts(samples, condition))

    def parts(self, samples: Tensor, condition: Condition) -> dict[str, Tensor]:
        """The three factors, [B] each."""
        check_videos(samples, 3)
        batch, _, frames = samples.shape[:3]
        x = samples.to(reward_dtype(samples)).transpose(1, 2)  # [B, F, C, H, W]
        first, second = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
        v = phase_correlation(first, second, self.taper)
        a, b = _centred(first, second, self.taper)
        rest, whole = (b - shift(a, v)).square().sum((1, 2, 3)), (a.square() + b.square()).sum((1, 2, 3))
        kept = (1 - rest / whole.clamp(min=1e-8)).clamp(min=0).reshape(batch, frames - 1)
        v = v.reshape(batch, frames - 1, 2)
        change = v.diff(dim=1).square().sum(2).mean(1)
        motion = v.norm(dim=2).mean(1)
        return {
            "consistency": kept.mean(1),
            "steadiness": torch.exp(-change / (2 * self.tolerance**2)),
            "motion": motion.clamp(max=self.target) / self.target,
        }

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The product of the three."""
        return parts["consistency"] * parts["steadiness"] * parts["motion"]


def check_videos(videos: Tensor, frames: int) -> None:
    """Raises RewardError for what is no batch of videos, or has fewer frames."""
    if videos.ndim != 5 or videos.shape[1] not in (1, 3):
        raise RewardError(f"videos have shape {tuple(videos.shape)}; expected [B, 1 or 3, frames, H, W].")
    if not videos.is_floating_point():
        raise RewardError(f"videos are {videos.dtype}; expected floats in [0, 1]. Divide them by 255.")
    if videos.shape[2] < frames:
        raise RewardError(f"videos have {videos.shape[2]} frames; this reward needs {frames} at least.")


def _centred(first: Tensor, second: Tensor, taper: float) -> tuple[Tensor, Tensor]:
    """Two frames without the ground of both, under the window."""
    both = torch.stack([first, second], dim=2).flatten(2)  # [N, C, 2 H W]
    ground = both.median(2).values[..., None, None]
    height, width = first.shape[-2:]
    window = _window(height, taper, first)[:, None] * _window(width, taper, first)
    return (first - ground) * window, (second - ground) * window


def _window(size: int, taper: float, like: Tensor) -> Tensor:
    """Tukey's: 1 in the middle, a cosine to 0 over a share of either end."""
    at = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size
    edge = torch.minimum(at, 1 - at).clamp(max=taper)
    return torch.ones_like(at) if taper == 0 else 0.5 - 0.5 * torch.cos(math.pi * edge / taper)


def _frequencies(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cycles a pixel: [H, 1] and [W]."""
    y, x = (torch.fft.fftfreq(n, dtype=like.dtype, device=like.device) for n in (height, width))
    return y[:, None], x


def _signed(place: Tensor, size: int) -> Tensor:
    """Of 0 ... size - 1, as a shift of at most half of it either way."""
    return (place + size // 2) % size - size // 2
