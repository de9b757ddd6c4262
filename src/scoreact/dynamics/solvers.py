"""Solvers: the Gaussian kernel of one step of the SDE, which has a density, so that policies can be compared by ratio.

Sources: Song et al. 2021 (DDIM, 2010.02502), Ho et al. 2020 (DDPM). What returns whole paths is in `samplers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import ScoreFn, expand, sum_over_data
from .sde import SDE, ode_gain


def _constant(score: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A score already computed, as the score function of a one-evaluation solver."""
    return lambda t, x: score


def step_of(sde: SDE, solver: Solver, score: Tensor, t0: Tensor, t1: Tensor, x: Tensor) -> Transition:
    """The kernel of a one-evaluation solver for a score already computed at (t0 [B], x [B, *D])."""
    return solver(sde, _constant(score), t0, t1, x)


class Transition(NamedTuple):
    """The kernel N(mean, std^2 I) of one step. mean [B, *D], std [B]; std = 0 is a deterministic step."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std noise; noise standard normal, of mean's shape."""
        return self.mean + expand(self.std, noise) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at x [B, *D], summed over the data dimensions: [B]. Needs std > 0."""
        z = (x - self.mean) / expand(self.std, x)
        return -0.5 * sum_over_data(z**2 + math.log(2 * math.pi)) - self.mean[0].numel() * self.std.log()

    def shift(self, other: Transition) -> Tensor:
        """(mean - other.mean) / std, in units of the step's noise, [B, *D]; 0 where the step is deterministic.

        For Euler-Maruyama against the reference this is u sqrt(dt).
        """
        std = expand(self.std, self.mean)
        return torch.where(std > 0, (self.mean - other.mean) / std.clamp(min=1e-30), 0.0)

    def kl(self, other: Transition) -> Tensor:
        """KL(self || other) for two kernels of the same std: half the squared shift, [B], nats."""
        return 0.5 * sum_over_data(self.shift(other) ** 2)


Solver = Callable[[SDE, ScoreFn, Tensor, Tensor, Tensor], Transition]  # (sde, score, t0 [B], t1 [B], x [B, *D])


def euler_maruyama(sde: SDE, score: ScoreFn, t0: Tensor, t1: Tensor, x: Tensor) -> Transition:
    """x + drift dt, g sqrt(dt). Strong order 1 for additive noise; with g = 0 the Euler step of flow matching."""
    dt = t1 - t0
    return Transition(x + sde.drift(t0, x, score(t0, x)) * expand(dt, x), sde.diffusion(t0) * dt.sqrt())


def _eta(sde: SDE, t: Tensor) -> Tensor:
    """The noise level g / sqrt(2 ode_gain) that the SDE has at t, whatever function its g is."""
    return sde.diffusion(t) / (2 * ode_gain(sde.schedule, t)).clamp(min=1e-30).sqrt()


def ddim(sde: SDE, score: ScoreFn, t0: Tensor, t1: Tensor, x: Tensor) -> Transition:
    """The exact Gaussian transition given x_data_hat (Song et al. 2021, eq. 12 and 16); DDPM at noise_level 1.

    std = eta sigma_1 sqrt(1 - (alpha_0 sigma_1 / (alpha_1 sigma_0))^2) with eta = g / sqrt(2 ode_gain) at t0;
    mean = alpha_1 x_data_hat + sqrt(sigma_1^2 - std^2) epsilon_hat.
    """
    schedule = sde.schedule
    alpha0, sigma0, alpha1, sigma1 = schedule.alpha(t0), schedule.sigma(t0), schedule.alpha(t1), schedule.sigma(t1)
    s = score(t0, x)
    correlation = alpha0 * sigma1 / (alpha1 * sigma0)
    std = (_eta(sde, t0) * sigma1 * (1 - correlation**2).clamp(min=0).sqrt()).minimum(sigma1)
    left = sigma1**2 - std**2
    left = torch.where(
        left > 0, left.clamp(min=1e-30).sqrt(), 0.0
    )  # a root has no gradient at 0, and noise may be learned
    mean = expand(alpha1, x) * sde.x_data_hat(t0, x, s) - expand(left * sigma0, x) * s
    return Transition(mean, std)


SOLVERS: dict[str, Solver] = {"euler_maruyama": euler_maruyama, "ddim": ddim}
