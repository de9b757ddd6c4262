"""Noise schedules: x_t = alpha(t) x_data + sigma(t) noise, with t = 0 noise and t = 1 data.

A schedule knows alpha, sigma, their time derivatives, and the interval [t_min, t_max] on which the coefficients of the
SDE are finite. It does not know about noise injected during generation (sde.py) nor about steps (solvers.py).
Sources: Song et al. 2021 (VP, VE; arXiv 2011.13456), Nichol & Dhariwal 2021 (cosine; 2102.09672), Karras et al. 2022
(EDM; 2206.00364), Liu et al. 2022 and Lipman et al. 2022 (rectified flow; 2209.03003, 2210.02747).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..support.errors import SettingError


class Schedule(Protocol):
    """x_t = alpha(t) x_data + sigma(t) noise. Four functions of t, and the interval on which they may be used.

    Each function takes times of any shape and returns a tensor of that shape, dtype and device. sigma / alpha falls from
    t_min to t_max.
    """

    @property
    def t_min(self) -> float:
        """Where sampling starts: 0, or a little later where alpha(0) is 0."""
        ...

    @property
    def t_max(self) -> float:
        """Where it ends: 1, or a little earlier where the SDE's coefficients are infinite at 1."""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data, positive after t_min."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise; 0 at most at t_max."""
        ...

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        ...

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        ...


def log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2), which rises with t.

    Args:
        schedule: any.
        t: times, any shape.

    Returns:
        The log signal-to-noise ratio, in t's shape; infinite where sigma is 0.
    """
    return 2 * (schedule.alpha(t).log() - schedule.sigma(t).log())


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = t, sigma = 1 - t (Liu et al. 2022). sigma(t_max) = 0: the last step lands on the data."""

    t_min: float = 1e-3
    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


@dataclass(frozen=True)
class VP:
    """Linear beta (Song et al. 2021, eq. 33): alpha = exp(-s^2 (b1 - b0) / 4 - s b0 / 2), s = 1 - t."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 0.0
    t_max: float = 0.999

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -0.25 * s**2 * (self.beta_max - self.beta_min) - 0.5 * s * self.beta_min

    def _half_beta(self, t: Tensor) -> Tensor:
        """-d log alpha / ds = d log alpha / dt."""
        return 0.5 * ((1 - t) * (self.beta_max - self.beta_min) + self.beta_min)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self._half_beta(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self._half_beta(t) / self.sigma(t)


@dataclass(frozen=True)
class Cosine:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): Nichol & Dhariwal 2021 without their offset."""

    t_min: float = 1e-3
    t_max: float = 0.999

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        # sin of 1 - t, not cos of t: near the data cos(pi t / 2) loses two digits in float32
        return torch.sin(0.5 * math.pi * (1 - t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.alpha(t)


@dataclass(frozen=True)
class VE:
    """Variance exploding: alpha = 1, sigma = sigma_max (sigma_min / sigma_max)^t (Song et al. 2021, eq. 30)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.log(self.sigma_min / self.sigma_max)


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = (a + t (b - a))^rho, a = sigma_max^(1/rho), b = sigma_min^(1/rho) (Karras et al. 2022, eq. 5).

    Uniform steps in this t are Karras' steps.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    t_min: float = 0.0
    t_max: float = 1.0

    def _ends(self) -> tuple[float, float]:
        return math.pow(self.sigma_max, 1 / self.rho), math.pow(self.sigma_min, 1 / self.rho)

    def _root(self, t: Tensor) -> Tensor:
        a, b = self._ends()
        return a + t * (b - a)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._root(t).pow(self.rho)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        a, b = self._ends()
        return self.rho * self._root(t).pow(self.rho - 1) * (b - a)


class _Coefficients(NamedTuple):
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class FromAlphasCumprod:
    """The continuous schedule through a discrete table (DDPM, Stable Diffusion): log-SNR interpolated linearly in time.

    Step i of T sits at t = 1 - (i + 1) / T, so that the table's noisiest entry is t = 0 and its cleanest t_max = 1 - 1 / T.

    Args:
        alphas_cumprod: T values in (0, 1), strictly decreasing, index 0 the least noisy.
        t_min: a later start.
        to_data: go on from the cleanest entry to the data: t_max = 1, where sigma is 0, after falling evenly from the
            entry's, and alpha^2 + sigma^2 = 1.

    Raises:
        ValueError: another shape, order or range.
    """

    alphas_cumprod: Sequence[float]
    t_min: float = 0.0
    to_data: bool = False
    t_max: float = field(init=False, default=1.0)
    _log_snr: Tensor = field(init=False, repr=False, compare=False, default=None)  # type: ignore[assignment]
    # of the last times asked for: a step asks a dozen times for its two, which small networks feel
    _last: list[tuple[Tensor, int, _Coefficients]] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alphas_cumprod, dtype=torch.float64).cpu()
        if table.ndim != 1 or len(table) < 2:
            raise SettingError(f"alphas_cumprod has shape {tuple(table.shape)}; expected one row of at least 2 values.")
        if not bool(((table > 0) & (table < 1)).all()) or not bool((table.diff() < 0).all()):
            raise SettingError("alphas_cumprod must decrease strictly and lie in (0, 1), the least noisy step first.")
        # tuple: a frozen record that compares and hashes by value
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        object.__setattr__(self, "t_max", 1.0 if self.to_data else 1.0 - 1.0 / len(table))
        object.__setattr__(self, "_log_snr", (table.log() - torch.log1p(-table)).flip(0))

    def _at(self, t: Tensor) -> _Coefficients:
        if t.requires_grad or t.is_inference():  # a graph is used once; no version to tell a change by
            return self._interpolated(t)
        for asked, version, found in self._last:
            if asked is t and version == t._version:
                return found
        found = self._interpolated(t)
        self._last[:] = [(t, t._version, found), *self._last[:2]]
        return found

    def _interpolated(self, t: Tensor) -> _Coefficients:
        knots = self._log_snr.to(device=t.device, dtype=t.dtype)
        position = (t * len(knots)).clamp(0, len(knots) - 1)
        left = position.floor().clamp(max=len(knots) - 2).long()
        rise = knots[left + 1] - knots[left]
        log_snr, slope = knots[left] + (position - left) * rise, rise * len(knots)
        kept, lost = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)  # alpha^2 and sigma^2
        alpha, sigma = kept.sqrt(), lost.sqrt()
        d_alpha, d_sigma = 0.5 * alpha * lost * slope, -0.5 * sigma * kept * slope
        if self.to_data:
            left, last = (1 - t).clamp(min=0) * len(knots), torch.sigmoid(-knots[-1]).sqrt()
            late = left < 1
            sigma, d_sigma = torch.where(late, left * last, sigma), torch.where(late, -len(knots) * last, d_sigma)
            alpha = torch.where(late, (1 - sigma**2).sqrt(), alpha)
            d_alpha = torch.where(late, -sigma * d_sigma / alpha, d_alpha)
        return _Coefficients(alpha, sigma, d_alpha, d_sigma)

    def alpha(self, t: Tensor) -> Tensor:
        return self._at(t).alpha

    def sigma(self, t: Tensor) -> Tensor:
        return self._at(t).sigma

    def d_alpha(self, t: Tensor) -> Tensor:
        return self._at(t).d_alpha

    def d_sigma(self, t: Tensor) -> Tensor:
        return self._at(t).d_sigma


def step_number(t: Tensor, steps: int, rounded: bool = False) -> Tensor:
    """The integer step of a table of alphas that a network trained on it knows a time by: (1 - t) T - 1.

    Args:
        t: times in [0, 1], [B] float32; 0 is noise.
        steps: T, the table's length.
        rounded: to the nearest step, int64. Otherwise a float, which at a knot of the table is the very integer.

    Returns:
        [B], from T - 1 at noise to 0 at t = 1 - 1 / T, the cleanest entry, and after it.
    """
    index = ((1 - t) * steps - 1).clamp(0, steps - 1)
    nearest = index.round()
    if rounded:
        return nearest.long()
    return torch.where((index - nearest).abs() < 1e-3, nearest, index)  # 1e-3: t is a float32


def time_at_log_snr(schedule: Schedule, value: Tensor) -> Tensor:
    """The times at which log_snr(t) has given values, by 60 bisections.

    Args:
        schedule: any.
        value: log signal-to-noise ratios, any shape; values beyond the ends give the ends.

    Returns:
        Times in value's shape, float64.
    """
    low = torch.full_like(value, schedule.t_min, dtype=torch.float64)
    high = torch.full_like(value, schedule.t_max, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        below = log_snr(schedule, middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def noising(schedule: Schedule, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """r and s of the noising path's law back from a time `end` to earlier times t, in t's shape:

    x_t | x_end ~ N(r x_end, s^2 I),   r = alpha(t) / alpha(end),   s^2 = sigma(t)^2 - r^2 sigma(end)^2.
    """
    kept = schedule.alpha(t) / schedule.alpha(end)
    return kept, (schedule.sigma(t) ** 2 - (kept * schedule.sigma(end)) ** 2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class ShiftedFlow:
    """Rectified flow at sigma = shift s / (1 + (shift - 1) s), s = 1 - t (Esser et al. 2024, 2403.03206, eq. 23).

    The same path as RectifiedFlow with another clock: uniform steps in this t are the uneven steps of SD3 and Flux.
    """

    shift: float = 1.0
    t_max: float = 1.0

    @property
    def t_min(self) -> float:
        """Where alpha is 1/1000, as in RectifiedFlow: at 0 the data cannot be told from the state."""
        return float(self.time_at_sigma(torch.tensor(0.999, dtype=torch.float64)))

    def _stretch(self, t: Tensor) -> Tensor:
        return 1 + (self.shift - 1) * (1 - t)

    def alpha(self, t: Tensor) -> Tensor:
        return t / self._stretch(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * (1 - t) / self._stretch(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.shift / self._stretch(t) ** 2

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.d_alpha(t)

    def time_at_sigma(self, sigma: Tensor) -> Tensor:
        """The times at which sigma(t) has these values in [0, 1]; any shape."""
        return 1 - sigma / (self.shift - (self.shift - 1) * sigma)
