"""How abnormal samples are to a diffusion model: larger is more abnormal. Knows models and states; no files.

With y = x / alpha, s = sigma / alpha and normal noise e, most of these are made of denoising errors |e - e_hat(y + s e, s)|^2:

    log p(y)           = log N(y; 0, 1) - integral of E[ error of the model - error of N(0, 1) ] over ln s          (path)
    log p_new / p_old  = integral of E[ error of the old - error of the new ] over ln s               (ratio, posterior)

exact where a score is that of its law's own noising path (Girsanov's theorem along the noising path; Kingma et al. 2021,
2107.00630; Kong et al. 2023, 2302.03792), else bounds. Every sample meets the same noise, so its score depends on no other.
`scoped` is made of Stein's identity E[ |score|^2 + trace of its Jacobian ] = 0 over the law of every noise level.
Sources: Serra et al. 2020 (1909.11480: complexity), Nalisnick et al. 2019 (1906.02994: typicality), Graham et al. 2023
(2211.07740: reconstruction from several noise levels), Heng et al. 2024 (DiffPath, 2405.11881), Barkley et al. 2025 (SCOPED,
2510.01456), Ren et al. 2019 (1906.02845: ratio to a broad reference), Li et al. 2023 (2303.16203: posterior). Of DiffPath the
idea is taken, norms of the score over the path and their change, not the statistic; of SCOPED the parts and the density.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.base import HasClasses, ScoreModel
from ..support.devices import device_of
from ..support.errors import SettingError
from ..support.names import known_name
from ..types import Condition, expand, sum_over_data
from .likelihood import (
    LEAST_NOISE,
    bits_per_dim,
    dequantised,
    in_float32,
    is_eight_bit,
    log_slope,
    noise_hat,
    noise_range,
    ode_log_prob,
    states_of,
    tuned_of,
)

METHODS = {
    "path": "-log2 p a number of the sample, by denoising errors: levels x noises network calls",
    "bits": "-log2 p a number of the sample, by the probability-flow ODE: hundreds of network calls and gradients",
    "complexity": "path minus the bits of a PNG file: simple pictures are likely to every model",
    "typicality": "how far path is from its mean over the normal samples",
    "ratio": "log p_reference - log p_model, by the difference of their denoising errors",
    "posterior": "log odds against the class among the model's classes: path for each of them",
    "reconstruction": "log mean squared error after noise and denoising, over three noise levels",
    "norms": "Mahalanobis distance of the score's norms, and of its changes, along the path to noise",
    "scoped": "-log density of the score's squared norm and trace at each noise level among normal samples'",
}
NEED_NORMAL = ("typicality", "norms", "scoped")  # methods that compare with normal samples
MOST_NOISE = 50.0  # of s: beyond it a state of unit size tells nothing
STARTS, REBUILD_STEPS = (0.3, 1.0, 3.0), 6  # of `reconstruction`: noise levels, and steps back from each
ROUNDED = 1e-2  # of s: below it e_hat is the network's rounding
FEWEST = 20  # normal samples of `scoped`
AT_ONCE, TOGETHER = 256, 1024  # samples, and states with noise, that are scored at once


@dataclass(frozen=True)
class ScoreSettings:
    """What a score is made of.

    Args:
        method: one of METHODS.
        levels: noise levels, evenly spaced in ln s.
        noises: draws at a level, in pairs of opposite sign.
        least_noise: sigma / alpha from which on the path is looked at; 0: as little as data of this kind have. From about 1 on,
            what is fine or faint does not count. Of `bits` and `reconstruction`: not used, and refused.
        probes, tolerance: of `bits`, as of `ode_log_prob`.
        seed: of the noise.
    """

    method: str = "path"
    levels: int = 10
    noises: int = 2
    least_noise: float = 0.0
    probes: int | None = None
    tolerance: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        known_name(self.method, METHODS, "unknown method")
        if self.levels < 2 or self.noises < 1:
            raise SettingError(f"levels is {self.levels} and noises {self.noises}; give 2 levels and 1 noise or more.")
        if not 0 <= self.least_noise < MOST_NOISE:
            raise SettingError(f"least_noise is {self.least_noise:g}; give 0 or more, below {MOST_NOISE:g}.")
        if self.least_noise and self.method in ("bits", "reconstruction"):
            raise SettingError(f"method {self.method} makes no use of least_noise; leave it out, or take path.")


def noise_levels(model: ScoreModel, count: int, least_noise: float = LEAST_NOISE) -> tuple[list[float], float]:
    """s of `count` levels evenly spaced in ln s, the middles of as many intervals, and their width."""
    most, least = noise_range(model.schedule, least_noise)
    if least >= min(most, MOST_NOISE):
        raise SettingError(f"least_noise is {least_noise:g}, and the model's noise ends at {most:g}; give less.")
    width = (math.log(min(most, MOST_NOISE)) - math.log(least)) / count
    return [math.exp(math.log(least) + (i + 0.5) * width) for i in range(count)], width


def noise_draws(shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Standard normal noise in pairs of opposite sign, [count, *D]."""
    half = torch.randn(-(-count // 2), *shape, generator=generator, device=generator.device)
    return torch.stack([half, -half], 1).flatten(0, 1)[:count]


@torch.no_grad()
def denoising_errors(
    model: ScoreModel, y: Tensor, condition: Condition, levels: Sequence[float], generator: torch.Generator, noises: int
) -> Tensor:
    """|e - e_hat|^2 summed over the data, mean over the noises: [levels, B] float64. y = x / alpha, [B, *D]."""
    rows = []
    for s in levels:
        total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for some in noise_draws(y.shape[1:], noises, generator).to(y).split(max(1, TOGETHER // len(y))):
            index = torch.arange(len(y)).repeat(len(some))
            e = some.repeat_interleave(len(y), 0)
            away = e - noise_hat(model, s, y.repeat(len(some), *[1] * (y.ndim - 1)) + s * e, condition[index])
            total += sum_over_data(away.double().square()).reshape(len(some), -1).sum(0)
        rows.append(total / noises)
    return torch.stack(rows)


def path_log_prob(
    model: ScoreModel, states: Tensor, condition: Condition, *, levels: int = 10, noises: int = 2,
    least_noise: float = LEAST_NOISE, seed: int = 0,
) -> Tensor:  # fmt: skip
    """log p of states by denoising errors, [B] nats: an estimate from below, exact in the mean for exact scores.

    Args:
        model: any; no prior is used.
        states: at t_max, [B, *D].
        condition: of them.
        levels, noises: network calls of a sample are their product.
        least_noise: where the path ends. The law is that of the data with so much noise, and log p its mean over x with it.
        seed: of the noise.
    """
    y, scale = _at_data(model, states)
    ladder, width = noise_levels(model, levels, least_noise)
    found = denoising_errors(model, y, condition, ladder, _seeded(model, seed), noises)
    # the same noise for N(0, 1), whose integral is known: most of the noise's share goes
    normal = denoising_errors(_Normal(model), y, condition, ladder, _seeded(model, seed), noises)
    noise = noise_range(model.schedule, least_noise)[1] ** 2
    log_normal = -0.5 * sum_over_data((y.double().square() + noise) / (1 + noise) + math.log(2 * math.pi * (1 + noise)))
    return (log_normal - width * (found - normal).sum(0) - y[0].numel() * math.log(scale)).cpu()


class _Normal:
    """The score of data of the law N(0, 1) on another model's schedule."""

    def __init__(self, model: ScoreModel) -> None:
        self.schedule, self.prior, self.condition, self.decode = (
            model.schedule,
            model.prior,
            model.condition,
            model.decode,
        )

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        return -x / expand(self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2, x)


@torch.no_grad()
def reconstruction_error(
    model: ScoreModel, states: Tensor, condition: Condition, *, noises: int = 2, seed: int = 0
) -> Tensor:
    """Mean over noise levels and draws of the log mean squared error of x after noise and the ODE back, [B]."""
    y, _ = _at_data(model, states)
    _, least = noise_range(model.schedule, LEAST_NOISE)
    generator, found = _seeded(model, seed), []
    for start in STARTS:
        ladder = torch.linspace(math.log(start), math.log(max(least, start / 100)), REBUILD_STEPS).exp().tolist()
        for e in noise_draws(y.shape[1:], noises, generator).to(y):
            z = y + start * e
            for s, after in zip(ladder, [*ladder[1:], 0.0], strict=True):
                z = z + (after - s) * noise_hat(model, s, z, condition)
            found.append((z - y).double().square().flatten(1).mean(1).clamp(min=1e-12).log())
    return torch.stack(found).mean(0).cpu()


@torch.no_grad()
def norm_features(
    model: ScoreModel, states: Tensor, condition: Condition, *, levels: int = 10, least_noise: float = ROUNDED
) -> Tensor:
    """log mean squares of e_hat at each level of the ODE's path to noise, and of its changes, [B, 2 levels - 1] float64."""
    y, _ = _at_data(model, states)
    ladder, width = noise_levels(model, levels, least_noise)
    rows: list[Tensor] = []
    before: Tensor | None = None
    for s in ladder:
        found = noise_hat(model, s, y, condition)
        rows.append(found)
        y = y + s * (math.exp(width) - 1) * found
        if before is not None:
            rows.append((found - before) / width)
        before = found
    return torch.stack([r.double().square().flatten(1).mean(1).clamp(min=1e-12).log() for r in rows], 1).cpu()


def stein_features(
    model: ScoreModel, states: Tensor, condition: Condition, *, levels: int = 10, noises: int = 2,
    least_noise: float = ROUNDED, seed: int = 0,
) -> Tensor:  # fmt: skip
    """sigma^2 (|score|^2 + trace of its Jacobian) a number of x after noise, at each level: [B, levels] float64.

    The mean over samples of the law is 0. The trace is estimated with one Rademacher vector a draw of noise, the same for all.
    """
    y, _ = _at_data(model, states)
    ladder, _ = noise_levels(model, levels, least_noise)
    generator, rows = _seeded(model, seed), []
    for s in ladder:
        total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for e in noise_draws(y.shape[1:], noises, generator).to(y):
            vector = (torch.randint(2, e.shape, generator=generator, device=e.device) * 2 - 1).to(y)
            with torch.enable_grad():
                z = (y + s * e).requires_grad_()
                found = noise_hat(model, s, z, condition)
                product = torch.autograd.grad(found, z, vector.expand_as(z))[0]
            total += sum_over_data((found.detach().square() - s * product * vector).double())
        rows.append(total / (noises * y[0].numel()))
    return torch.stack(rows, 1).cpu()


def png_bits(samples: Tensor) -> Tensor:
    """Bits a number of each picture's PNG file without its frame, [B]; pictures [B, C, H, W] in [0, 1], 1 or 3 channels."""
    from PIL import Image

    def size(array: Tensor) -> int:
        file = io.BytesIO()
        pixels = array.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", optimize=True)
        return file.tell()

    levels = (samples.cpu() * 255).round().to(torch.uint8)
    frame = size(torch.zeros_like(levels[0]))
    return torch.tensor([8 * (size(x) - frame) / x.numel() for x in levels], dtype=torch.float64)


def _at_data(model: ScoreModel, states: Tensor) -> tuple[Tensor, float]:
    """y on the model's device, and alpha(t_max)."""
    scale = float(model.schedule.alpha(torch.tensor(model.schedule.t_max, dtype=torch.float64)))
    return states.to(device_of(model)) / scale, scale


def _seeded(model: ScoreModel, seed: int) -> torch.Generator:
    return torch.Generator(device_of(model)).manual_seed(seed)


# --- samples to scores ---------------------------------------------------------------------------------------------------


def raw_scores(
    settings: ScoreSettings, model: ScoreModel, reference: ScoreModel | None, samples: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """What a method says of samples: scores [N, 1], or features [N, F] that `Normal` makes scores of; and standard errors [N].

    Args:
        settings: the method and its numbers.
        model: whose law is normal; of `ratio` the one that is tuned or narrow.
        reference: of `ratio`, with the classes of the model or none.
        samples: as the model decodes them, [N, ...].
        prompts: N of them.

    Raises:
        SettingError: samples that the model could not have drawn, a ratio without a reference, a posterior without classes,
            complexity of no pictures.
    """
    if settings.method == "ratio" and reference is None:
        raise SettingError("method ratio compares a model with its reference; give a run, or a reference.")
    if settings.method == "posterior" and len(_classes(model) or ()) < 2:
        raise SettingError("method posterior compares the classes of a model, and this one has none; take path.")
    if settings.method == "complexity" and not is_eight_bit(samples):
        raise SettingError("method complexity compares with a PNG file; it is of 8-bit pictures. Take path.")
    parts = []
    with in_float32(model), in_float32(reference or model):
        for start in range(0, len(samples), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            parts.append(_some_scores(settings, model, reference, samples[some], list(prompts[some])))
    errors = [error for _, error in parts if error is not None]
    return torch.cat([values for values, _ in parts]), torch.cat(errors) if errors else None


def _some_scores(
    settings: ScoreSettings, model: ScoreModel, reference: ScoreModel | None, samples: Tensor, prompts: list[str]
) -> tuple[Tensor, Tensor | None]:
    method, seed, eight, given = settings.method, settings.seed, is_eight_bit(samples), settings.least_noise
    condition, dim = model.condition(prompts), samples[0].numel()
    generator = torch.Generator().manual_seed(seed)
    states = states_of(model, samples)
    numbers = {"levels": settings.levels, "noises": settings.noises, "seed": seed}
    if method == "ratio":
        assert reference is not None
        names = [""] * len(prompts) if _classes(reference) == [""] else prompts
        old = states_of(reference, samples)
        ratio = path_log_prob(
            reference, old, reference.condition(names),
            least_noise=max(given, _least_noise(reference, samples, eight)), **numbers,
        ) - path_log_prob(
            model, states, condition, least_noise=max(given, _least_noise(model, samples, eight)), **numbers
        )  # fmt: skip
        if not torch.equal(old.cpu(), states.cpu()):  # else the slopes are the same, also where nobody knows them
            ratio = ratio + log_slope(reference, samples) - log_slope(model, samples)
        return ratio[:, None], None
    if method == "posterior":
        names, least = _classes(model) or [], max(given, _least_noise(model, samples, eight))
        each = torch.stack([
            path_log_prob(model, states, model.condition([name] * len(states)), least_noise=least, **numbers)
            for name in names
        ], 1)  # fmt: skip
        own = torch.nn.functional.one_hot(torch.tensor([names.index(p) for p in prompts]), len(names)).bool()
        return (each.masked_fill(own, -math.inf).logsumexp(1) - each[own])[:, None], None
    if method == "reconstruction":
        return reconstruction_error(model, states, condition, noises=settings.noises, seed=seed)[:, None], None
    if method == "norms":
        return norm_features(model, states, condition, levels=settings.levels, least_noise=max(ROUNDED, given)), None
    if method == "scoped":
        return stein_features(model, states, condition, least_noise=max(ROUNDED, given), **numbers), None
    slope, least = log_slope(model, samples), max(given, _least_noise(model, samples, eight))
    if method == "bits":
        moved = states_of(model, dequantised(samples, generator)) if eight else states
        found = ode_log_prob(
            model, moved, condition, tolerance=settings.tolerance, probes=settings.probes, least_noise=least,
            generator=_seeded(model, seed),
        )  # fmt: skip
        return bits_per_dim(found.value + slope, dim, eight)[:, None], found.standard_error / (dim * math.log(2))
    bits = bits_per_dim(path_log_prob(model, states, condition, least_noise=least, **numbers) + slope, dim, eight)
    return (bits - png_bits(samples) if method == "complexity" else bits)[:, None], None


def _classes(model: ScoreModel) -> list[str] | None:
    """Its prompts, [""] of an unconditional model; None where they cannot be listed."""
    own = tuned_of(model)
    return list(own.classes) if isinstance(own, HasClasses) else None


def _least_noise(model: ScoreModel, samples: Tensor, eight_bit: bool) -> float:
    """The spread of a step of 8 bits, in the model's states; a network has seen no more of the data."""
    if not eight_bit:
        return LEAST_NOISE
    slope = math.exp(float(log_slope(model, samples[:1])) / samples[0].numel())
    return max(LEAST_NOISE, slope / 255 / math.sqrt(12))


class NormalSamples:
    """What normal samples look like to a method: nothing, the mean of `typicality`, the spread of `norms`, all of `scoped`."""

    def __init__(self, method: str, raw: Tensor) -> None:
        """raw: of normal samples, [N, F] of `raw_scores`. Raises SettingError for too few of them."""
        if method == "norms" and len(raw) <= 2 * raw.shape[1]:
            raise SettingError(
                f"norms fits a Gaussian to {raw.shape[1]} numbers, and there are {len(raw)} normal samples; give more than "
                f"{2 * raw.shape[1]}, or fewer levels."
            )
        if method == "scoped" and len(raw) < FEWEST:
            raise SettingError(f"scoped estimates a density of normal samples; give at least {FEWEST}, not {len(raw)}.")
        self.method, self.mean, self.raw = method, raw.mean(0), raw
        if method == "norms":
            covariance = torch.cov(raw.T)
            ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(raw.shape[1], dtype=raw.dtype)
            self.precision = torch.linalg.inv(covariance + ridge)

    def scores(self, raw: Tensor) -> Tensor:
        """[N, F] -> [N], larger is more abnormal."""
        away = raw - self.mean
        if self.method == "norms":
            return torch.einsum("nf,fg,ng->n", away, self.precision, away)
        if self.method == "scoped":  # normal kernels of Scott's width, a level at a time
            width = (self.raw.std(0) * len(self.raw) ** -0.2).clamp(min=1e-12)
            near = -0.5 * ((raw[:, None] - self.raw) / width).square()  # [N, normal, levels]
            return -near.logsumexp(1).sum(1)
        return away[:, 0].abs() if self.method == "typicality" else raw[:, 0]
