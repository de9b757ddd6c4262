"""The controlled SDE:  dX = [kappa(t) X + gain(t) a] dt + g(t) dB,  the action a being a score.

Knows drift, diffusion and the control; does not know discretisation (solvers.py) nor where scores come from.
Source: Zhao et al. 2025 (Score as Action, arXiv 2502.01819), section 3; Song et al. 2021 for the family in g.
With the exact score as action every g keeps the marginals of the noising path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.errors import SettingError
from ..types import expand
from . import prediction
from .schedule import Schedule

Noise = Callable[[Schedule, Tensor], Tensor]  # (schedule, t) -> g(t) >= 0, shape of t


def kappa(schedule: Schedule, t: Tensor) -> Tensor:
    """alpha' / alpha: the linear part of the drift, for times of any shape, in that shape."""
    return schedule.d_alpha(t) / schedule.alpha(t)


def ode_gain(schedule: Schedule, t: Tensor) -> Tensor:
    """sigma (alpha' sigma / alpha - sigma') >= 0: what multiplies the score in the probability-flow ODE."""
    sigma = schedule.sigma(t)
    return sigma * (kappa(schedule, t) * sigma - schedule.d_sigma(t))


def noise_level(level: float) -> Noise:
    """g = level sqrt(2 ode_gain): 0 the ODE, 1 the reverse SDE (the paper's eta; memoryless for VP-like paths)."""
    if level < 0:
        raise SettingError(f"noise_level must be at least 0, got {level}.")
    return lambda schedule, t: level * (2 * ode_gain(schedule, t)).clamp(min=0).sqrt()


def constant(g: float) -> Noise:
    """The same noise at all times. g >= 0, in units of the state per square root of time. Raises ValueError below 0."""
    if g < 0:
        raise SettingError(f"the diffusion coefficient must be at least 0, got {g}.")
    return lambda schedule, t: torch.full_like(t, g)


def flow_grpo(a: float = 0.7) -> Noise:
    """g = a sqrt(sigma / (1 - sigma)), sigma the schedule's (Liu et al. 2025, Flow-GRPO, arXiv 2505.05470, eq. 9)."""
    if a < 0:
        raise SettingError(f"flow_grpo's a must be at least 0, got {a}.")

    def g(schedule: Schedule, t: Tensor) -> Tensor:
        # their code replaces sigma = 1 by the next time of its table, 0.9 with ten steps; at 0.999 the first
        # Euler-Maruyama step throws the state far away
        sigma = schedule.sigma(t).clamp(max=0.95)
        return a * (sigma / (1 - sigma)).sqrt()

    return g


NOISES: dict[str, Callable[[float], Noise]] = {
    "noise_level": noise_level,
    "constant": constant,
    "flow_grpo": flow_grpo,
}


@dataclass(frozen=True)
class SDE:
    """A schedule and the noise injected during generation.

    Args:
        schedule: alpha(t), sigma(t) and the interval of times.
        noise: g(t), the standard deviation of the noise added in a unit of time, such as `noise_level(1.0)`.
    """

    schedule: Schedule
    noise: Noise

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) >= 0 for times of any shape, in that shape."""
        return self.noise(self.schedule, t)

    def gain(self, t: Tensor) -> Tensor:
        """What multiplies the action in the drift, ode_gain + g^2 / 2, for times of any shape, in that shape."""
        return ode_gain(self.schedule, t) + self.diffusion(t) ** 2 / 2

    def drift(self, t: Tensor, x: Tensor, score: Tensor) -> Tensor:
        """kappa x + gain score. t [B], x and score [B, *D]."""
        return expand(kappa(self.schedule, t), x) * x + expand(self.gain(t), x) * score

    def control(self, t: Tensor, score: Tensor, reference: Tensor) -> Tensor:
        """u = gain / g (score - reference), the Girsanov integrand; infinite where g = 0. Shapes as in drift."""
        return expand(self.gain(t) / self.diffusion(t), score) * (score - reference)

    def optimal_action(self, t: Tensor, reference: Tensor, value_gradient: Tensor, kl_weight: float) -> Tensor:
        """s* = s_ref + (g^2 / gain) grad V / beta: the maximiser of the Hamiltonian. Shapes as in drift."""
        scale = self.diffusion(t) ** 2 / self.gain(t) / kl_weight
        return reference + expand(scale, reference) * value_gradient

    def x_data_hat(self, t: Tensor, x: Tensor, score: Tensor) -> Tensor:
        """Tweedie's estimate of the data, (x + sigma^2 score) / alpha. Shapes as in drift."""
        return prediction.score.to_data(self.schedule, t, x, score)
