"""Rewards whose optimum is known in closed form on Gaussians and Gaussian mixtures: linear and quadratic.

Both are R(x) = a.x - 1/2 x'Qx + constant on the flattened sample, told by `.linear`, `.quadratic`, `.constant`:
p_ref exp(R / beta) / Z of a Gaussian mixture is then a Gaussian mixture, by completing the square. Needs
Q + beta * precision positive definite; whoever tilts checks that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import reward_dtype

Vector = Tensor | Sequence[float]
Matrix = Tensor | Sequence[Sequence[float]]


class Quadratic:
    """R(x) = -1/2 (x - center)' Q (x - center) + linear . x, differentiable; samples [B, *D] with d numbers each.

    quadratic: a symmetric [d, d], or a number q for q times the identity (then center or linear must tell d). Only
    its symmetric part matters and is kept. It may be negative: then R grows outwards.
    center, linear: [d], default zero. Result [B], float32, or float64 for float64 samples.
    Raises ValueError for shapes that do not fit each other or the samples, and for numbers that are not finite.
    """

    name = "quadratic"
    differentiable = True

    def __init__(self, quadratic: Matrix | float, center: Vector | None = None, linear: Vector | None = None) -> None:
        matrix = _numbers("quadratic", quadratic)
        vectors = {"center": _vector("center", center), "linear": _vector("linear", linear)}
        sizes = {name: len(v) for name, v in vectors.items() if v is not None}
        if matrix.ndim == 0:
            if not sizes:
                raise RewardError(f"quadratic={matrix.item()} alone leaves the dimension open. Give center or linear.")
            matrix = matrix * torch.eye(next(iter(sizes.values())), dtype=torch.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise RewardError(
                f"quadratic has shape {tuple(matrix.shape)}; expected a number or a square matrix [d, d]."
            )
        d = len(matrix)
        for name, size in sizes.items():
            if size != d:
                raise RewardError(
                    f"{name} has {size} entries but the quadratic is [{d}, {d}]; give {name} {d} entries."
                )
        zero = torch.zeros(d, dtype=torch.float64)
        self._matrix = (matrix + matrix.T) / 2
        self._center = zero if vectors["center"] is None else vectors["center"]
        self._slope = zero if vectors["linear"] is None else vectors["linear"]

    @property
    def linear(self) -> Tensor:
        """a of R = a.x - 1/2 x'Qx + constant: linear + Q center, [d], float64."""
        return self._slope + self._matrix @ self._center

    @property
    def quadratic(self) -> Tensor:
        """Q, [d, d], symmetric, float64."""
        return self._matrix

    @property
    def constant(self) -> float:
        """-1/2 center' Q center."""
        return float(-0.5 * self._center @ self._matrix @ self._center)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        x = _flat(samples, len(self._center))
        offset = x - self._center.to(x)  # not multiplied out: near the center the three terms would cancel
        return -0.5 * ((offset @ self._matrix.to(x)) * offset).sum(1) + x @ self._slope.to(x)


class Linear:
    """R(x) = linear . x, differentiable; samples [B, *D] with d numbers each, linear [d]. Rest as above."""

    name = "linear"
    differentiable = True

    def __init__(self, linear: Vector) -> None:
        vector = _vector("linear", linear)
        if vector is None:
            raise RewardError("linear is None; give the d numbers of the direction.")
        self._slope = vector

    @property
    def linear(self) -> Tensor:
        """a, [d], float64."""
        return self._slope

    @property
    def quadratic(self) -> Tensor:
        """Zeros, [d, d], float64."""
        return torch.zeros(len(self._slope), len(self._slope), dtype=torch.float64)

    @property
    def constant(self) -> float:
        """Zero."""
        return 0.0

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        x = _flat(samples, len(self._slope))
        return x @ self._slope.to(x)


def _vector(name: str, value: Vector | None) -> Tensor | None:
    if value is None:
        return None
    vector = _numbers(name, value)
    if vector.ndim != 1 or not len(vector):
        raise RewardError(f"{name} has shape {tuple(vector.shape)}; expected one number for each data dimension, [d].")
    return vector


def _numbers(name: str, value: Matrix | Vector | float) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name}={value!r} is no array of numbers ({error}); give numbers.") from error
    if not numbers.isfinite().all():
        raise RewardError(f"{name} contains NaN or inf ({numbers.flatten().tolist()[:6]}); give finite numbers.")
    return numbers


def _flat(samples: Tensor, d: int) -> Tensor:
    x = samples.flatten(1) if samples.ndim > 1 else samples[:, None]
    if x.shape[1] != d:
        raise RewardError(
            f"samples of shape {tuple(samples.shape)} hold {x.shape[1]} numbers each but the reward is for {d}; "
            f"build it with {x.shape[1]}."
        )
    return x.to(reward_dtype(samples))
