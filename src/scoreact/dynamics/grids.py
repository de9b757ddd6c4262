"""Time grids: N + 1 increasing times from t_min to t_max of a schedule.

Sources: Karras et al. 2022 (arXiv 2206.00364, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..support.errors import SettingError
from ..support.names import did_you_mean
from .schedule import Schedule, log_snr, time_at_log_snr

Grid = Callable[[Schedule, int, torch.Generator | None], Tensor]  # (schedule, steps, generator) -> [steps + 1], on CPU


def uniform(schedule: Schedule, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Equal steps in t.

    Args:
        schedule: gives the ends, t_min and t_max.
        steps: N.
        generator: not used; the other grids' signature.

    Returns:
        N + 1 rising times, float32 on the CPU.
    """
    return torch.linspace(schedule.t_min, schedule.t_max, steps + 1)


def _log_snr_ends(schedule: Schedule) -> tuple[float, float, bool]:
    """log-SNR at the two ends; where the path ends without noise, at sigma/alpha = 1/100 instead (third value True)."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    first, last = log_snr(schedule, ends).tolist()
    return (first, last, False) if math.isfinite(last) else (first, 2 * math.log(100.0), True)


def _grid_from_log_snr(schedule: Schedule, knots: Tensor, to_zero_noise: bool) -> Tensor:
    ts = time_at_log_snr(schedule, knots)
    ts[0] = schedule.t_min
    if to_zero_noise:
        ts = torch.cat([ts, ts.new_tensor([schedule.t_max])])
    else:
        ts[-1] = schedule.t_max
    return ts.float()


def uniform_log_snr(schedule: Schedule, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Equal steps in log(alpha^2 / sigma^2); one of them goes to zero noise where the path ends there."""
    first, last, to_zero = _log_snr_ends(schedule)
    return _grid_from_log_snr(
        schedule, torch.linspace(first, last, steps + (not to_zero), dtype=torch.float64), to_zero
    )


def karras(schedule: Schedule, steps: int, generator: torch.Generator | None = None, rho: float = 7.0) -> Tensor:
    """Equal steps in (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5)."""
    first, last, to_zero = _log_snr_ends(schedule)
    roots = torch.linspace(
        math.exp(-first / 2 / rho), math.exp(-last / 2 / rho), steps + (not to_zero), dtype=torch.float64
    )
    return _grid_from_log_snr(schedule, -2 * rho * roots.log(), to_zero)


def random(schedule: Schedule, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform steps with each inner time moved by less than half a step: a new grid every rollout, the ends fixed."""
    ts = uniform(schedule, steps)
    jitter = torch.rand(steps - 1, generator=generator, device=generator.device if generator else "cpu").cpu() - 0.5
    # 0.99: two neighbours that meet by rounding would make a step of length 0
    ts[1:-1] += 0.99 * jitter * (ts[1] - ts[0])
    return ts


GRIDS: dict[str, Grid] = {"uniform": uniform, "log_snr": uniform_log_snr, "karras": karras, "random": random}
SHAPED = "log_snr:"  # begins the name of a grid that is given by numbers


def shaped_log_snr(coefficients: Sequence[float]) -> Grid:
    """Inner times at log-SNR c_0 + c_1 z + c_2 z^2 + ..., z from -1 to 1 in equal steps; the ends are the schedule's.

    Four coefficients make any grid of up to five steps, and the same shape serves any number of steps.
    """

    def grid(schedule: Schedule, steps: int, generator: torch.Generator | None = None) -> Tensor:
        z = torch.linspace(-1, 1, steps - 1, dtype=torch.float64) if steps > 2 else torch.zeros(steps - 1).double()
        knots = sum(c * z**power for power, c in enumerate(coefficients)) + torch.zeros_like(z)
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        ts = torch.cat([ends[:1], time_at_log_snr(schedule, knots), ends[1:]]).float()
        if not bool((ts.diff() > 0).all()):
            raise SettingError(
                f"grid {shaped_name(coefficients)} has no {steps} rising times on this schedule: log-SNR "
                f"{[round(v, 2) for v in knots.tolist()]}; take a larger second number, or another first one."
            )
        return ts

    return grid


def shaped_name(coefficients: Sequence[float]) -> str:
    """The name by which `grid_by_name` finds the grid again: log_snr:-1.5,4,0.2."""
    return SHAPED + ",".join(f"{c:.4g}" for c in coefficients)


def grid_by_name(name: str) -> Grid:
    """A grid of GRIDS, or log_snr:C0,C1,... of `shaped_log_snr`. Raises SettingError."""
    if name in GRIDS:
        return GRIDS[name]
    if not name.startswith(SHAPED):
        raise SettingError(
            f"grid is {name!r}; known: {', '.join(GRIDS)}, or {SHAPED}C0,C1,... with the numbers of a "
            f"search.{did_you_mean(name, GRIDS, 0.4)}"
        )
    try:
        coefficients = [float(number) for number in name.removeprefix(SHAPED).split(",")]
    except ValueError:
        coefficients = [math.nan]
    if not all(map(math.isfinite, coefficients)):
        raise SettingError(f"grid is {name!r}; expected numbers after {SHAPED}, such as {SHAPED}-1.5,4,0.2.")
    return shaped_log_snr(coefficients)


def grid_times(name: str, schedule: Schedule, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """The times of the grid `name`, [steps + 1]; uniform where it is random and there is no generator to draw it."""
    return grid_by_name("uniform" if name == "random" and generator is None else name)(schedule, steps, generator)
