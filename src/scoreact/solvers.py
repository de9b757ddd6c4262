"""Discretisations of the SDE. A *solver* returns the Gaussian kernel of one step; a *sampler* a whole path of states.

Solvers (Euler-Maruyama, the DDIM family) have a density, so policies can be compared by ratio. Samplers (Heun,
DPM-Solver++, adaptive, anything foreign) return only states: they serve sampling, evaluation, and rules without ratio.
Sources: Song et al. 2021 (DDIM, 2010.02502), Ho et al. 2020 (DDPM), Karras et al. 2022 (Heun), Lu et al. 2022
(DPM-Solver++, 2211.01095), Bogacki & Shampine 1989 (the adaptive pair).
The deterministic samplers solve dy/ds = -sigma score in y = x / alpha, s = sigma / alpha, where every schedule is EDM.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .names import nearest
from .schedule import time_at_log_snr
from .sde import SDE, noise_level, ode_gain
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
    left = (sigma1**2 - std**2).clamp(min=0).sqrt()
    mean = expand(alpha1, x) * sde.x_data_hat(t0, x, s) - expand(left * sigma0, x) * s
    return Transition(mean, std)


SOLVERS: dict[str, Solver] = {"euler_maruyama": euler_maruyama, "ddim": ddim}


# --- samplers: whole paths of states xs [N + 1, B, *D] at the times ts [N + 1], xs[0] = x ---------------------------


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """One time for every sample, where x lives: [] -> [B]."""
    return t.to(x.device).expand(len(x))


def _levels(sde: SDE, ts: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at ts, [N + 1], in float64 on the CPU: as scalars they neither promote nor synchronise x."""
    ts = ts.double().cpu()
    return sde.schedule.alpha(ts), sde.schedule.sigma(ts)


def by_steps(solver: Solver) -> Sampler:
    """The sampler that draws from a solver's kernels one after another."""

    def sample(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        xs = [x]
        for t0, t1 in itertools.pairwise(ts):
            transition = solver(sde, score, _rows(t0, x), _rows(t1, x), xs[-1])
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            xs.append(transition.sample(noise))
        return torch.stack(xs)

    return sample


def ode(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Deterministic DDIM: the exact step for constant epsilon, whatever noise the SDE has. Order 1, N calls."""
    return by_steps(ddim)(replace(sde, noise=noise_level(0.0)), score, ts, x, generator)


def heun(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Heun's rule in y over s (Karras et al. 2022, Algorithm 1), deterministic. Order 2, 2 N calls.

    A step that ends without noise is Euler's, alpha x_data_hat: the score is not defined there.
    """
    alpha, sigma = _levels(sde, ts)
    s = sigma / alpha
    xs = [x]
    for k in range(len(ts) - 1):
        y, ds = xs[k] / alpha[k], s[k + 1] - s[k]
        slope = -sigma[k] * score(_rows(ts[k], x), xs[k])
        x1 = alpha[k + 1] * (y + ds * slope)
        if sigma[k + 1] > 0:
            slope_end = -sigma[k + 1] * score(_rows(ts[k + 1], x), x1)
            x1 = alpha[k + 1] * (y + ds * (slope + slope_end) / 2)
        xs.append(x1)
    return torch.stack(xs)


def dpm_solver_pp_2m_sde(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Multistep data prediction with the SDE's own noise (Lu et al. 2022, Algorithm 2 and appendix B). N calls.

    With h the step in log(alpha / sigma), eta = g / sqrt(2 ode_gain) and D = x_data_hat, eta and D held over the step:
        x_1 = sigma_1 / sigma_0 e^(-eta^2 h) x + alpha_1 (1 - e^(-(1 + eta^2) h)) D + sigma_1 sqrt(1 - e^(-2 eta^2 h)) z
    and D extrapolated to the midpoint from the step before. eta = 1 is the published SDE form, eta = 0 its ODE.
    First order: the first step, and the last one if it ends without noise or there are fewer than 15.
    """
    alpha, sigma = _levels(sde, ts)
    # 1e-30: log 0 would make h infinite and 0 h undefined; at h = 70 the exponentials are 0 in float64 as well
    h = (alpha / sigma.clamp(min=1e-30)).log().diff()
    eta2 = _eta(sde, ts.double().cpu()) ** 2
    last_is_first_order = len(h) < 15 or float(sigma[-1]) == 0
    xs: list[Tensor] = [x]
    previous = x
    for k in range(len(h)):
        t0 = _rows(ts[k], x)
        data = sde.x_data_hat(t0, xs[k], score(t0, xs[k]))
        first_order = k == 0 or (k == len(h) - 1 and last_is_first_order)
        target = data if first_order else data + 0.5 * h[k] / h[k - 1] * (data - previous)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        kept = sigma[k + 1] / sigma[k] * (-eta2[k] * h[k]).exp()
        pulled = -alpha[k + 1] * torch.expm1(-(1 + eta2[k]) * h[k])
        std = sigma[k + 1] * (-torch.expm1(-2 * eta2[k] * h[k])).sqrt()
        xs.append(kept * xs[k] + pulled * target + std * noise)
        previous = data
    return torch.stack(xs)


def dpm_solver_pp_2m(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """`dpm_solver_pp_2m_sde` with eta = 0: DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2). Order 2, N calls."""
    return dpm_solver_pp_2m_sde(replace(sde, noise=noise_level(0.0)), score, ts, x, generator)


def adaptive_ode(
    sde: SDE,
    score: ScoreFn,
    ts: Tensor,
    x: Tensor,
    generator: torch.Generator,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-4,
    max_steps: int = 1000,
) -> Tensor:
    """The probability-flow ODE in y over s by Bogacki & Shampine 1989, 3(2), 3 calls a step; ts says where to look.

    A step is kept when the worst sample's root mean square of error / (atol + rtol |x|), both as x, is at most 1.
    Every time of ts ends a step: two times [t_min, t_max] are cheapest. Where the path ends without noise the last
    s < sqrt(atol) is one Euler step (error s^2 / 2 times the curvature, so of order atol): no score exists at s = 0.
    """

    def places(*levels: float) -> list[tuple[float, Tensor, Tensor]]:
        """s, t and alpha where sigma / alpha is s, for all the levels in one search."""
        ts = time_at_log_snr(sde.schedule, -2 * torch.tensor(levels, dtype=torch.float64).log())
        return list(zip(levels, ts, sde.schedule.alpha(ts), strict=True))

    def slope(place: tuple[float, Tensor, Tensor], y: Tensor) -> Tensor:
        s, t, alpha = place
        return -s * alpha * score(_rows(t.to(ts.dtype), y), alpha * y)

    alphas, sigmas = _levels(sde, ts)
    s, *stops = (sigmas / alphas).tolist()
    y, t, alpha = x / alphas[0], ts[0], alphas[0]
    xs, steps, step = [x], 0, (s - stops[-1]) / 10
    slope0 = slope((s, t, alpha), y)
    for index, stop in enumerate(stops, start=1):
        floor = stop if stop > 0 else min(s, math.sqrt(atol))
        while s > floor:
            if steps == max_steps:
                remedy = f"Raise rtol ({rtol}), atol ({atol}) or max_steps."
                raise RuntimeError(f"adaptive_ode took {steps} steps and is at t = {t:.3f} of {ts[-1]:.3f}. {remedy}")
            steps += 1
            h = min(step, s - floor)
            half, three_quarters, end = places(s - h / 2, s - 3 * h / 4, floor if h < step else s - h)
            slope1 = slope(half, y - h / 2 * slope0)
            slope2 = slope(three_quarters, y - 3 * h / 4 * slope1)
            y1 = y - h / 9 * (2 * slope0 + 3 * slope1 + 4 * slope2)
            slope3, alpha1 = slope(end, y1), end[2]
            error = alpha1 * h / 72 * (-5 * slope0 + 6 * slope1 + 8 * slope2 - 9 * slope3)
            scale = atol + rtol * torch.maximum((alpha * y).abs(), (alpha1 * y1).abs())
            size = float(((error / scale) ** 2).flatten(1).mean(1).max().sqrt())
            if not math.isfinite(size):
                raise RuntimeError(f"the score is not finite for some sample between t = {t:.3f} and {end[1]:.3f}.")
            proposal = h * min(5.0, max(0.2, 0.9 * max(size, 1e-9) ** (-1 / 3)))
            # a step cut short by ts says nothing against the longer one
            step = max(step, proposal) if size <= 1 and h < step else proposal
            if size <= 1:
                (s, t, alpha), y, slope0 = end, y1, slope3
        y, s = y - (s - stop) * slope0, stop
        xs.append(alphas[index] * y)
    return torch.stack(xs)


def foreign(fn: Callable[[ScoreFn, Tensor, Tensor], Tensor | Iterable[Tensor]]) -> Sampler:
    """A sampler from any black box fn(score, x, ts) -> the states after each step (x first or not), or the last alone.

    Its score may be called with one time for the batch, (t [], x) or (0.3, x). States that it does not give are NaN.
    Randomness is its own affair: it receives no generator.
    """
    name = getattr(fn, "__name__", repr(fn))

    def sample(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        def score_at(t: Tensor, x: Tensor) -> Tensor:
            return score(torch.as_tensor(t, dtype=ts.dtype, device=x.device).expand(len(x)), x)

        result, steps = fn(score_at, x, ts), len(ts) - 1
        if torch.is_tensor(result) and result.shape == x.shape:
            return torch.stack([x, *[torch.full_like(x, math.nan)] * (steps - 1), result])
        states = list(result)
        if len(states) == steps:
            states = [x, *states]
        if len(states) != steps + 1:
            raise ValueError(
                f"solver '{name}' returned {len(states)} states for {steps} steps; expected {steps}, "
                f"or {steps + 1} with the start, or the last state alone, of shape {tuple(x.shape)}."
            )
        for state in states:
            if state.shape != x.shape:
                raise ValueError(
                    f"solver '{name}' returned a state of shape {tuple(state.shape)}; expected {tuple(x.shape)}."
                )
        return torch.stack(states)

    return sample


SAMPLERS: dict[str, Sampler] = {
    **{name: by_steps(solver) for name, solver in SOLVERS.items()},
    "ode": ode,
    "heun": heun,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": dpm_solver_pp_2m_sde,
    "adaptive_ode": adaptive_ode,
}


def module_at(place: str) -> ModuleType:
    """A module by its dotted name or by its .py file."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    if not Path(place).is_file():
        raise ImportError(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(module.__name__, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def sampler_by_name(name: str) -> Sampler:
    """A sampler of SAMPLERS, or the user's: 'module:name' or 'file.py:name' (wrap others with by_steps or foreign)."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    place, colon, attribute = name.rpartition(":")
    if not colon:
        parts = {part: known for known in SAMPLERS for part in known.split("_")}  # 'eulr' is near to 'euler'
        near = nearest(name, SAMPLERS) or parts.get(nearest(name, parts) or "")
        hint = f" Did you mean '{near}'?" if near else ""
        raise ValueError(f"unknown solver '{name}'. Known: {', '.join(sorted(SAMPLERS))}. Or give 'module:name'.{hint}")
    try:
        found = getattr(module_at(place), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load solver '{name}': {error}. Give 'module:name' or 'file.py:name'.") from error
    if not callable(found):
        raise ValueError(f"solver '{name}' is {found!r}; expected a function (sde, score, ts, x, generator) -> states.")
    return cast(Sampler, found)
