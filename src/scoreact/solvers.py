"""Discretisations of the SDE. A *solver* returns the Gaussian kernel of one step; a *sampler* a whole path of states.

Solvers (Euler-Maruyama, the DDIM family) have a density, so policies can be compared by ratio. Samplers (Heun,
DPM-Solver++, adaptive, or anything foreign) return only states: they serve sampling, evaluation, and rules without ratio.
Sources: Song et al. 2021 (DDIM, 2010.02502), Ho et al. 2020 (DDPM), Karras et al. 2022 (Heun), Lu et al. 2022
(DPM-Solver++, 2211.01095), Bogacki & Shampine 1989 (the adaptive pair).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .sde import SDE, ode_gain
from .types import ScoreFn, expand, sum_over_data


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
Sampler = Callable[[SDE, ScoreFn, Tensor, Tensor, torch.Generator], Tensor]  # (..., ts [N+1], x, g) -> [N+1, B, *D]


def euler_maruyama(sde: SDE, score: ScoreFn, t0: Tensor, t1: Tensor, x: Tensor) -> Transition:
    """x + drift dt, g sqrt(dt). Strong order 1 for additive noise; with g = 0 the Euler step of flow matching."""
    dt = t1 - t0
    return Transition(x + sde.drift(t0, x, score(t0, x)) * expand(dt, x), sde.diffusion(t0) * dt.sqrt())


def ddim(sde: SDE, score: ScoreFn, t0: Tensor, t1: Tensor, x: Tensor) -> Transition:
    """The exact Gaussian transition given x_data_hat (Song et al. 2021, eq. 12 and 16); DDPM at noise_level 1.

    std = eta sigma_1 sqrt(1 - (alpha_0 sigma_1 / (alpha_1 sigma_0))^2) with eta = g / sqrt(2 ode_gain) at t0;
    mean = alpha_1 x_data_hat + sqrt(sigma_1^2 - std^2) epsilon_hat.
    """
    schedule = sde.schedule
    alpha0, sigma0, alpha1, sigma1 = schedule.alpha(t0), schedule.sigma(t0), schedule.alpha(t1), schedule.sigma(t1)
    s = score(t0, x)
    eta = sde.diffusion(t0) / (2 * ode_gain(schedule, t0)).clamp(min=1e-30).sqrt()
    correlation = alpha0 * sigma1 / (alpha1 * sigma0)
    std = (eta * sigma1 * (1 - correlation**2).clamp(min=0).sqrt()).minimum(sigma1)
    left = (sigma1**2 - std**2).clamp(min=0).sqrt()
    mean = expand(alpha1, x) * sde.x_data_hat(t0, x, s) - expand(left * sigma0, x) * s
    return Transition(mean, std)


SOLVERS: dict[str, Solver] = {"euler_maruyama": euler_maruyama, "ddim": ddim}


def by_steps(solver: Solver) -> Sampler:
    """The sampler that draws from a solver's kernels one after another."""

    def sample(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        xs = [x]
        for t0, t1 in zip(ts[:-1], ts[1:], strict=True):
            transition = solver(sde, score, t0.expand(len(x)), t1.expand(len(x)), xs[-1])
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            xs.append(transition.sample(noise))
        return torch.stack(xs)

    return sample
