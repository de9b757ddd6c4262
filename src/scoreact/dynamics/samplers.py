"""Samplers: a whole path of states. Every kernel of `solvers` makes one; the others have no density.

They serve sampling, evaluation, and rules without ratio.
Sources: Karras et al. 2022 (Heun), Lu et al. 2022 (DPM-Solver++, 2211.01095), Bogacki & Shampine 1989 (the adaptive pair).
`adaptive_ode` and `heun` solve dy/ds = -sigma score in y = x / alpha, s = sigma / alpha, where every schedule is EDM.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..support.errors import LoadError, SettingError
from ..support.loading import load_named
from ..support.names import nearest
from ..types import ScoreFn
from .schedule import time_at_log_snr
from .sde import SDE, noise_level
from .solvers import SOLVERS, Solver, _eta, ddim

NO_SIGNAL = 0.05  # an alpha below which sigma / alpha is no measure of a step; Stable Diffusion's table begins at 0.068

Sampler = Callable[[SDE, ScoreFn, Tensor, Tensor, torch.Generator], Tensor]  # (..., ts [N+1], x, g) -> [N+1, B, *D]


# --- samplers: whole paths of states xs [N + 1, B, *D] at the times ts [N + 1], xs[0] = x ---------------------------


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """One time for every sample, where x lives: [] -> [B]."""
    return t.to(x.device).expand(len(x))


def normal_as(x: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """Standard normal numbers as x [B, *D]; with a generator for every B / G samples, these do not depend on the others."""
    some = [generator] if isinstance(generator, torch.Generator) else generator
    shape = (len(x) // len(some), *x.shape[1:])
    return torch.cat([torch.randn(shape, generator=g, device=x.device, dtype=x.dtype) for g in some])


def _levels(sde: SDE, ts: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at ts, [N + 1], in float64 on the CPU: as scalars they neither promote nor synchronise x."""
    ts = ts.cpu().double()
    return sde.schedule.alpha(ts), sde.schedule.sigma(ts)


def by_steps(solver: Solver) -> Sampler:
    """The sampler that draws from a solver's kernels one after another."""

    def sample(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        xs = [x]
        for t0, t1 in itertools.pairwise(ts):
            transition = solver(sde, score, _rows(t0, x), _rows(t1, x), xs[-1])
            xs.append(transition.sample(normal_as(x, generator)))
        return torch.stack(xs)

    return sample


def ode(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Deterministic DDIM: the exact step for constant epsilon, whatever noise the SDE has. Order 1, N calls."""
    return by_steps(ddim)(replace(sde, noise=noise_level(0.0)), score, ts, x, generator)


def heun(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Heun's rule (Karras et al. 2022, Algorithm 1), deterministic. Order 2, 2 N calls.

    In y over s where the schedule begins with some signal; where alpha begins at next to nothing, so that s has no bound, in
    x / (alpha + sigma) over sigma / (alpha + sigma), which is Heun's rule of a flow's velocity. A step that ends without
    noise is Euler's, alpha x_data_hat: the score is not defined there.
    """
    alpha, sigma = _levels(sde, ts)
    flow = float(sde.schedule.alpha(torch.tensor(sde.schedule.t_min, dtype=torch.float64))) < NO_SIGNAL
    unit = alpha + sigma if flow else alpha
    s = sigma / unit

    def slope(k: int, x: Tensor) -> Tensor:
        t = _rows(ts[k], x)
        found = score(t, x)
        noise = -sigma[k] * found
        return noise - sde.x_data_hat(t, x, found) if flow else noise

    xs = [x]
    for k in range(len(ts) - 1):
        y, ds, first = xs[k] / unit[k], s[k + 1] - s[k], slope(k, xs[k])
        x1 = unit[k + 1] * (y + ds * first)
        if sigma[k + 1] > 0:
            x1 = unit[k + 1] * (y + ds * (first + slope(k + 1, x1)) / 2)
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
    eta2 = _eta(sde, ts.cpu().double()) ** 2
    last_is_first_order = len(h) < 15 or float(sigma[-1]) == 0
    xs: list[Tensor] = [x]
    previous = x
    for k in range(len(h)):
        t0 = _rows(ts[k], x)
        data = sde.x_data_hat(t0, xs[k], score(t0, xs[k]))
        first_order = k == 0 or (k == len(h) - 1 and last_is_first_order)
        target = data if first_order else data + 0.5 * h[k] / h[k - 1] * (data - previous)
        noise = normal_as(x, generator)
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
            raise SettingError(
                f"solver '{name}' returned {len(states)} states for {steps} steps; expected {steps}, "
                f"or {steps + 1} with the start, or the last state alone, of shape {tuple(x.shape)}."
            )
        for state in states:
            if state.shape != x.shape:
                raise SettingError(
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
DETERMINISTIC = frozenset({"ode", "heun", "dpm_solver_pp_2m", "adaptive_ode"})  # whatever noise the SDE has
# take a generator for each sample instead of one, and treat every sample as if it were alone; adaptive steps are shared
BY_SAMPLE = frozenset(sampler for name, sampler in SAMPLERS.items() if name != "adaptive_ode")


def sampler_by_name(name: str) -> Sampler:
    """A sampler of SAMPLERS, or the user's: 'module:name' or 'file.py:name' (wrap others with by_steps or foreign)."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    if ":" not in name:
        parts = {part: known for known in SAMPLERS for part in known.split("_")}  # 'eulr' is near to 'euler'
        near = nearest(name, SAMPLERS) or parts.get(nearest(name, parts) or "")
        hint = f" Did you mean '{near}'?" if near else ""
        raise SettingError(
            f"unknown solver '{name}'. Known: {', '.join(sorted(SAMPLERS))}. Or give 'module:name'.{hint}"
        )
    found = load_named(name, "solver")
    return found if found in SAMPLERS.values() else _looked_at(name, found)


def _looked_at(name: str, found: Any) -> Sampler:
    """The user's own, whose states are looked at. Raises LoadError for what cannot be called as a sampler is."""
    wanted = "expected a function (sde, score, ts, x, generator) -> states [N + 1, B, *D]"
    if not callable(found):
        raise LoadError(f"solver '{name}' is {found!r}; {wanted}.")
    try:
        inspect.signature(found).bind(*range(5))
    except TypeError as error:
        raise LoadError(
            f"solver '{name}' cannot be called with five arguments ({error}); {wanted}, or wrap it in `foreign`."
        ) from None
    except ValueError:  # a builtin shows no signature
        pass

    def sample(sde: SDE, score: ScoreFn, ts: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        xs = found(sde, score, ts, x, generator)
        if not isinstance(xs, Tensor) or xs.shape != (len(ts), *x.shape):
            what = f"shape {tuple(xs.shape)}" if isinstance(xs, Tensor) else type(xs).__name__
            raise LoadError(
                f"solver '{name}' returned {what} for {len(ts) - 1} steps of states {tuple(x.shape)}; {wanted}, x first."
            )
        return xs

    return sample
