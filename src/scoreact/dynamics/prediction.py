"""What a network predicts, and its score: every kind goes through x_data_hat, so n kinds cost 2n conversions.

With x = alpha x_data + sigma noise:  epsilon = noise,  x0 = x_data,  v = alpha noise - sigma x_data
(Salimans & Ho 2022),  velocity = d_alpha x_data + d_sigma noise (flow matching, to the data),  score = -noise / sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..types import expand
from .schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """How one kind of output of a network relates to the data.

    Args:
        name: for messages and settings.
        to_data: (schedule, t [B], x [B, *D], output [B, *D]) -> the estimate of the data, [B, *D].
        from_data: (schedule, t [B], x [B, *D], estimate of the data [B, *D]) -> the output, [B, *D].
    """

    name: str
    to_data: Callable[[Schedule, Tensor, Tensor, Tensor], Tensor]
    from_data: Callable[[Schedule, Tensor, Tensor, Tensor], Tensor]


def _noise(schedule: Schedule, t: Tensor, x: Tensor, x_data: Tensor) -> Tensor:
    return (x - expand(schedule.alpha(t), x) * x_data) / expand(schedule.sigma(t), x)


def _data_from_epsilon(schedule: Schedule, t: Tensor, x: Tensor, epsilon: Tensor) -> Tensor:
    return (x - expand(schedule.sigma(t), x) * epsilon) / expand(schedule.alpha(t), x)


def _data_from_v(schedule: Schedule, t: Tensor, x: Tensor, v: Tensor) -> Tensor:
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    return (alpha * x - sigma * v) / (alpha**2 + sigma**2)


def _v_from_data(schedule: Schedule, t: Tensor, x: Tensor, x_data: Tensor) -> Tensor:
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    return (alpha * x - (alpha**2 + sigma**2) * x_data) / sigma


def _data_from_velocity(schedule: Schedule, t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    d_alpha, d_sigma = expand(schedule.d_alpha(t), x), expand(schedule.d_sigma(t), x)
    return (sigma * velocity - d_sigma * x) / (sigma * d_alpha - d_sigma * alpha)


def _velocity_from_data(schedule: Schedule, t: Tensor, x: Tensor, x_data: Tensor) -> Tensor:
    d_alpha, d_sigma = expand(schedule.d_alpha(t), x), expand(schedule.d_sigma(t), x)
    return d_alpha * x_data + d_sigma * _noise(schedule, t, x, x_data)


def _data_from_score(schedule: Schedule, t: Tensor, x: Tensor, score: Tensor) -> Tensor:
    """Tweedie: x_data_hat = (x + sigma^2 score) / alpha."""
    return (x + expand(schedule.sigma(t) ** 2, x) * score) / expand(schedule.alpha(t), x)


def _score_from_data(schedule: Schedule, t: Tensor, x: Tensor, x_data: Tensor) -> Tensor:
    return (expand(schedule.alpha(t), x) * x_data - x) / expand(schedule.sigma(t) ** 2, x)


epsilon = Prediction("epsilon", _data_from_epsilon, _noise)
x0 = Prediction("x0", lambda schedule, t, x, value: value, lambda schedule, t, x, x_data: x_data)
v = Prediction("v", _data_from_v, _v_from_data)
velocity = Prediction("velocity", _data_from_velocity, _velocity_from_data)
score = Prediction("score", _data_from_score, _score_from_data)

PREDICTIONS = {kind.name: kind for kind in (epsilon, x0, v, velocity, score)}


def convert(source: Prediction, target: Prediction, schedule: Schedule, t: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """An output of one kind as another kind, by way of the estimate of the data that both stand for.

    Args:
        source: kind of what is given, such as `epsilon`.
        target: kind of what is wanted, such as `score`.
        schedule: of the model.
        t: times, [B].
        x: states there, [B, *D].
        value: what the network said, of kind `source`, [B, *D].

    Returns:
        The same estimate as kind `target`, [B, *D]; not finite where alpha or sigma is 0 and the kind divides by it.
    """
    if source is target:
        return value
    return target.from_data(schedule, t, x, source.to_data(schedule, t, x, value))


# noise - data, whatever the clock: diffusers' flow networks do not know the shift
FLOW = Prediction(
    "flow",
    lambda schedule, t, x, value: x - expand(schedule.sigma(t), x) * value,
    lambda schedule, t, x, x_data: (x - x_data) / expand(schedule.sigma(t), x),
)
