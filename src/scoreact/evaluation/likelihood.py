"""log p(x) of a diffusion or flow model, by its probability-flow ODE.

With y = x / alpha, s = sigma / alpha and z = y / sqrt(1 + s^2) every schedule is one path, from data to unit noise:

    dz / d ln s = f(z),   f = q eps_hat - q^2 z,   q = s / sqrt(1 + s^2),   eps_hat = -sigma score
    log p(z at the data's end) = log p(z at the noise's end) + integral of tr df/dz over ln s

The integrator is Dormand and Prince's 5(4) with its own step control. Sources: Chen et al. 2018 (1806.07366), Grathwohl et al.
2019 (FFJORD, 1810.01367: the probes), Song et al. 2021 (2011.13456, appendix D.2), Dormand & Prince 1980.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..control.policy import Policy
from ..dynamics.schedule import Schedule, time_at_log_snr
from ..models.base import Encodes, HasPriorDensity, Rounds, ScoreModel
from ..support.devices import device_of
from ..support.errors import ModelError, SettingError
from ..types import Condition, sum_over_data

EXACT = 1000  # numbers of a state up to which the trace is taken exactly
PROBES = 8
MOST_NOISE = 1e4  # of sigma / alpha, where a schedule begins at alpha = 0
LEAST_NOISE = 1e-3  # of sigma / alpha, where a schedule ends at sigma = 0 and no score exists
MAX_STEPS = 2000
CALLS = 100  # of the score to tell the time by: `bits` makes 60 to 70 at its tolerance, and nobody minds an earlier end
TIMED = 32  # states that are timed
LONG = 120.0  # seconds that are worth a word before they pass

# Dormand & Prince 1980, table 2: nodes, stages, and the difference of the two solutions
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class Likelihood:
    """log p of B samples.

    value: nats, [B] float64. standard_error: of the trace's probes, [B]; 0 where the trace is exact. calls: of the score, each
    of the whole batch. probes: of the trace; 0: it is exact.
    """

    value: Tensor
    standard_error: Tensor
    calls: int
    probes: int


def ode_log_prob(
    model: ScoreModel,
    states: Tensor,
    condition: Condition,
    *,
    tolerance: float = 1e-5,
    probes: int | None = None,
    least_noise: float = LEAST_NOISE,
    generator: torch.Generator | None = None,
) -> Likelihood:
    """log p(x | condition) of the law that the model's probability-flow ODE draws from.

    Args:
        model: any score model. Its prior is taken for normal noise of sigma(t_min), unless it has `prior_log_prob`.
        states: x at the end of the path, [B, *D]; in the precision that they have.
        condition: of the B states.
        tolerance: of a step: of the state, relative to 1 + |z|, and of log p, in nats a number of the state.
        probes: Rademacher vectors that estimate the trace, the same along every path; 0: the exact trace, at as many
            gradients a call as a state has numbers. None: exact below 1,000 numbers, else 8.
        least_noise: sigma / alpha at which the path ends, where the schedule has less. The law is that of the data with so
            much noise.
        generator: of the probes, on the model's device; seed 0 by default.

    Returns:
        log p in nats, with the probes' standard error.

    Raises:
        SettingError: a tolerance that is not positive, one probe, or states that are not finite.
        ModelError: a prior that is none of normal noise of sigma(t_min), or a score that is not finite.
    """
    if not 0 < tolerance < math.inf:
        raise SettingError(f"tolerance is {tolerance}; give a number above 0, such as 1e-4.")
    if probes is not None and (probes < 0 or probes == 1):
        raise SettingError(f"probes is {probes}; give 2 or more, which tell their own error, or 0 for the exact trace.")
    if not bool(states.isfinite().all()):
        raise SettingError("the states are not finite; leave out those that hold NaN or infinity.")
    device, dim = device_of(model), states[0].numel()
    count = (0 if dim < EXACT else PROBES) if probes is None else probes
    source = generator or torch.Generator(device).manual_seed(0)
    x = states.to(device)
    vectors = torch.randint(2, (count, 1, *x.shape[1:]), generator=source, device=device).to(x) * 2 - 1
    begin, stop = noise_range(model.schedule, least_noise)
    with in_float32(model):
        _check_prior(model, condition, begin, source)
        flow = _Flow(model, condition, vectors)
        # the scale of the path's very end, also where the path is cut before it: the law there, with a little noise
        start = float(model.schedule.alpha(torch.tensor(model.schedule.t_max, dtype=torch.float64)))
        end = _time(model.schedule, begin)
        z = x / (start * math.sqrt(1 + stop**2))
        z, trace = _integrate(flow, z, math.log(stop), math.log(begin), tolerance)
        last = z * float(model.schedule.alpha(end)) * math.sqrt(1 + begin**2)
        log_prior = _prior(model, last, condition, end)
    scale = math.log(float(model.schedule.alpha(end)) * math.sqrt(1 + begin**2))
    scale -= math.log(start * math.sqrt(1 + stop**2))
    each = log_prior.double()[:, None] + trace + dim * scale  # [B, probes or 1]
    error = each.std(1) / math.sqrt(count) if count else torch.zeros_like(each[:, 0])
    return Likelihood(each.mean(1).cpu(), error.cpu(), flow.calls, count)


def exact_seconds(model: ScoreModel, states: Tensor, condition: Condition, calls: int = CALLS) -> float:
    """Roughly how long the exact trace of these states [B, *D] takes: one of the gradients of one call, timed.

    condition: of the B states.
    """
    some = states[:TIMED].to(device_of(model))
    rows = condition[torch.arange(len(some))]
    begin, stop = noise_range(model.schedule, LEAST_NOISE)
    with torch.enable_grad():
        z = some.detach().requires_grad_()
        found = noise_hat(model, math.sqrt(begin * stop), z, rows).flatten(1)[:, 0].sum()
        torch.autograd.grad(found, z, retain_graph=True)[0].sum().item()  # the first is slower than the others
        start = time.perf_counter()
        torch.autograd.grad(found, z)[0].sum().item()
    return (time.perf_counter() - start) * calls * states[0].numel() * len(states) / len(some)


def slow_trace(model: ScoreModel, states: Tensor, condition: Condition, probes: int | None, rows: int) -> str | None:
    """A sentence where the exact trace is about to be taken and that takes long: how long, and the remedy.

    states, condition: some of the `rows` whose likelihood is asked for.
    """
    dim = states[0].numel()
    if probes or (probes is None and dim >= EXACT):
        return None
    with in_float32(model):
        seconds = exact_seconds(model, states, condition) * rows / len(states)
    few = _long(seconds * PROBES / dim)
    return None if seconds < LONG else (
        f"the exact trace of {dim} numbers takes {dim} gradients a call: about {_long(seconds)} for {rows} rows on this "
        f"machine. With {PROBES} probes (--probes {PROBES}, probes={PROBES}) it is about {few}, and every row gets a "
        "standard error."
    )  # fmt: skip


def _long(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


def noise_range(schedule: Schedule, least_noise: float) -> tuple[float, float]:
    """sigma / alpha at the noise's end of a schedule and at the data's, the latter at least `least_noise`."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    most, least = (schedule.sigma(ends) / schedule.alpha(ends)).tolist()
    return min(most, MOST_NOISE), max(least, least_noise)


def _time(schedule: Schedule, noise: float) -> Tensor:
    """Where sigma / alpha is `noise`; [], float64."""
    return time_at_log_snr(schedule, torch.tensor(-2 * math.log(noise), dtype=torch.float64))


def tuned_of(model: ScoreModel) -> ScoreModel:
    """Of a policy the tuned model, which has the optional members; of any other model itself."""
    return model.model if isinstance(model, Policy) else model


@contextlib.contextmanager
def in_float32(model: ScoreModel) -> Iterator[None]:
    """A network that may run in bfloat16 does not in here: a likelihood has no digits to lose."""
    both = (model.model, model.reference) if isinstance(model, Policy) else (model,)
    some: list[Any] = [m for m in both if isinstance(m, Rounds) and hasattr(m, "use_bfloat16")]
    before = [m.use_bfloat16 for m in some]
    try:
        for m in some:
            m.use_bfloat16 = False
        yield
    finally:
        for m, value in zip(some, before, strict=True):
            m.use_bfloat16 = value


def noise_hat(model: ScoreModel, noise: float, y: Tensor, condition: Condition) -> Tensor:
    """eps_hat = -sigma score of y = x / alpha, [B, *D], where sigma / alpha is `noise`."""
    t = _time(model.schedule, noise)
    alpha, sigma = float(model.schedule.alpha(t)), float(model.schedule.sigma(t))
    return -sigma * model.score(t.to(y).expand(len(y)), alpha * y, condition)


class _Flow:
    """f and the trace of df/dz at ln s, [B, *D] and [B, probes or 1] float64."""

    def __init__(self, model: ScoreModel, condition: Condition, vectors: Tensor) -> None:
        self.model, self.condition, self.vectors, self.calls = model, condition, vectors, 0

    def __call__(self, log_noise: float, z: Tensor) -> tuple[Tensor, Tensor]:
        s = math.exp(log_noise)
        root = math.sqrt(1 + s**2)
        q, dim = s / root, z[0].numel()
        self.calls += 1
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            found = noise_hat(self.model, s, root * z, self.condition)
            if not bool(found.isfinite().all()):
                raise ModelError(f"the score is not finite for some sample where sigma / alpha is {s:.3g}.")
            traces = []
            if len(self.vectors):
                for i, vector in enumerate(self.vectors):
                    product = torch.autograd.grad(
                        found, z, vector.expand_as(z), retain_graph=i + 1 < len(self.vectors)
                    )[0]
                    traces.append(sum_over_data((product * vector).double()))
            else:
                total = z.new_zeros(len(z), dtype=torch.float64)
                flat = found.flatten(1)
                for i in range(dim):
                    row = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=i + 1 < dim)[0]
                    total += row.flatten(1)[:, i].double()
                traces = [total]
        return q * found.detach() - q**2 * z.detach(), q * torch.stack(traces, 1) - dim * q**2


def _integrate(
    flow: Callable[[float, Tensor], tuple[Tensor, Tensor]], z: Tensor, start: float, stop: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """z at `stop` and the integral of the trace; the worst sample decides a step's length."""
    now, h, dim = start, (stop - start) / 50, z[0].numel()
    slope, rate = flow(now, z)
    total = torch.zeros_like(rate)
    for _ in range(MAX_STEPS):
        h = min(h, stop - now)
        slopes, rates = [slope], [rate]
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            moved = z + h * sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
            found = flow(now + node * h, moved)
            slopes.append(found[0])
            rates.append(found[1])
        # the last stage stands where the fifth-order solution does
        error = h * sum(w * k for w, k in zip(ERROR, slopes, strict=True) if w)
        lost = h * sum(w * k for w, k in zip(ERROR, rates, strict=True) if w)
        size = (error / (1 + torch.maximum(z.abs(), moved.abs()))).double().square().flatten(1).mean(1).max().sqrt()
        worst = max(float(size), float(torch.as_tensor(lost).mean(1).abs().max()) / dim) / tolerance
        if not math.isfinite(worst):
            raise ModelError(f"the likelihood's path is not finite where ln(sigma / alpha) is {now:.3g}.")
        if worst <= 1:
            total = total + h * sum(w * k for w, k in zip(STAGES[-1], rates, strict=False) if w)
            z, now, slope, rate = moved, now + h, slopes[-1], rates[-1]
            if now >= stop - 1e-12:
                return z, total
        h *= min(5.0, max(0.2, 0.9 * max(worst, 1e-9) ** -0.2))
    raise ModelError(f"{MAX_STEPS} steps did not reach the noise; raise the tolerance ({tolerance:g}).")


def _prior(model: ScoreModel, x: Tensor, condition: Condition, t: Tensor) -> Tensor:
    """log p of the states that sampling starts from, [B]."""
    own = tuned_of(model)
    if isinstance(own, HasPriorDensity):
        return own.prior_log_prob(x, condition)
    sigma = float(model.schedule.sigma(t))
    return -0.5 * sum_over_data((x.double() / sigma).square() + math.log(2 * math.pi * sigma**2))


@torch.no_grad()
def _check_prior(model: ScoreModel, condition: Condition, noise: float, generator: torch.Generator) -> None:
    """A prior without a density of its own is normal noise of the schedule's size, to what a draw can tell."""
    if isinstance(tuned_of(model), HasPriorDensity):
        return
    rows = torch.zeros(64, dtype=torch.int64)
    drawn = model.prior(condition[rows], generator).double()
    wanted = float(model.schedule.sigma(_time(model.schedule, noise)))
    found, spread = float(drawn.std()), 5 / math.sqrt(2 * drawn.numel())
    if abs(found / wanted - 1) > 0.02 + spread or abs(float(drawn.mean())) > wanted * (0.02 + spread * math.sqrt(2)):
        raise ModelError(
            f"the model starts from states of mean {float(drawn.mean()):.3g} and standard deviation {found:.3g}, and its "
            f"schedule says normal noise of {wanted:.3g}; give the model a method prior_log_prob(x, condition) -> [B], their "
            "log-density."
        )


# --- samples instead of states -----------------------------------------------------------------------------------------


def states_of(model: ScoreModel, samples: Tensor) -> Tensor:
    """The states that decode to these samples, [B, *D]. Raises SettingError where the model cannot tell."""
    own = tuned_of(model)
    states = own.encode(samples) if isinstance(own, Encodes) else samples
    with torch.no_grad():
        again = model.decode(states[:8].to(device_of(model))).cpu()
    # half a step of 8 bits: what dequantising moves beyond the range is cut off again
    if again.shape != samples[:8].shape or not torch.allclose(again, samples[:8].cpu(), atol=3e-3, rtol=1e-3):
        raise SettingError(
            "the samples are no states of the model: decoding them gives others. Give the model a method encode(samples) -> "
            "states, the inverse of decode, and data of its shape and range."
        )
    return states


def log_slope(model: ScoreModel, samples: Tensor) -> Tensor:
    """log |d state / d sample| summed over a sample's numbers, [B]: log p(sample) = log p(state) + this.

    Raises SettingError where a state's number depends on several of the sample's, as in a latent space.
    """
    own = tuned_of(model)
    if not isinstance(own, Encodes):
        return torch.zeros(len(samples), dtype=torch.float64)
    with torch.enable_grad():
        given = samples.detach().clone().requires_grad_()
        encoded = own.encode(given)
        if encoded.shape != samples.shape:
            raise SettingError("the model's states are not of its samples' shape; only the states have a density.")
        sign = torch.randint(2, encoded.shape, generator=torch.Generator().manual_seed(0)).to(encoded) * 2 - 1
        slope = torch.autograd.grad(encoded.sum(), given, retain_graph=True)[0]
        mixed = torch.autograd.grad(encoded, given, sign)[0]
    if not torch.allclose(mixed, sign * slope, rtol=1e-4, atol=1e-6):
        raise SettingError("a state's number depends on several of a sample's; only the states have a density.")
    return sum_over_data(slope.abs().double().log()).cpu()


def is_eight_bit(samples: Tensor) -> bool:
    """Whether all values are multiples of 1/255 in [0, 1], as pictures read from files are."""
    levels = samples * 255
    inside = bool(((samples >= 0) & (samples <= 1)).all())
    return inside and samples.ndim == 4 and bool(((levels - levels.round()).abs() < 1e-3).all())


def dequantised(samples: Tensor, generator: torch.Generator) -> Tensor:
    """8-bit samples in [0, 1], all moved by one draw of uniform noise of a step, centred: their density bounds the bits."""
    noise = torch.rand(samples.shape[1:], generator=generator)
    return samples + (noise.to(samples) - 0.5) / 255


def bits_per_dim(log_prob: Tensor, dim: int, eight_bit: bool) -> Tensor:
    """-log2 p a number of the sample, from nats [B]; of 8-bit samples p is their levels' probability, of others a density."""
    return -log_prob / (dim * math.log(2)) + (math.log2(255) if eight_bit else 0.0)
