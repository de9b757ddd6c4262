"""Choosing among samples: best of N at the end, or sequential Monte Carlo between the steps of a kernel.

Sources: Stiennon et al. 2020 and Beirami et al. 2024 (best of N, arXiv 2401.01879), Doucet, de Freitas & Gordon 2001
and Wu et al. 2023 (twisted particles, arXiv 2306.17775), Singhal et al. 2025 (arXiv 2501.06848).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..control.policy import Policy
from ..dynamics import girsanov
from ..dynamics.samplers import Sampler, normal_as
from ..dynamics.sde import SDE
from ..dynamics.solvers import Solver, step_of
from ..models.base import ScoreModel
from ..rewards.base import Reward
from ..support.errors import SettingError
from .draw import Generators, prior_of
from .guided import Calls, Value, value_at


@dataclass(frozen=True)
class Steered:
    """B samples, what the reward says of them, and what they cost.

    log_z: `smc` only: log of an unbiased estimate of E exp(R / beta), [B]. effective: its least effective sample size
    over the path as a share of the particles, mean over the populations; 1 where nothing was weighted.
    """

    samples: Tensor  # [B, ...] decoded
    x: Tensor  # [B, *D]
    rewards: Tensor  # [B]
    calls: Calls
    log_z: Tensor | None = None
    effective: float = 1.0

    @classmethod
    def join(cls, parts: Sequence[Steered]) -> Steered:
        """Parts as one; `effective` is their mean by samples."""
        calls = Calls(*(sum(getattr(p.calls, kind) for p in parts) for kind in ("network", "value", "reward")))
        z = [p.log_z for p in parts if p.log_z is not None]
        rewards = torch.cat([p.rewards for p in parts])
        return cls(
            torch.cat([p.samples for p in parts]), torch.cat([p.x for p in parts]), rewards, calls,
            torch.cat(z) if z else None, sum(p.effective * len(p.rewards) for p in parts) / len(rewards),
        )  # fmt: skip


# --- choosing among samples ----------------------------------------------------------------------------------------------


@torch.no_grad()
def best_of(
    model: ScoreModel,
    reward: Reward,
    sampler: Sampler,
    sde: SDE,
    ts: Tensor,
    prompts: Sequence[str],
    count: int,
    generator: Generators,
) -> Steered:
    """The sample with the highest reward among `count`, for each prompt. KL to the model: see `best_of_kl`.

    generator: one, or, of a sampler in BY_SAMPLE, one for each candidate, those of a prompt one after the other.
    """
    if count < 1:
        raise SettingError(f"best_of needs one sample or more to choose from, got {count}.")
    calls = Calls()
    index = torch.arange(len(prompts)).repeat_interleave(count)
    condition = model.condition(prompts)[index]
    x = prior_of(model, condition, generator)
    before, source = _network_calls(model), cast(torch.Generator, generator)
    x = sampler(sde, lambda t, state: model.score(t, state, condition), ts.to(x.device), x, source)[-1]
    calls.network = _network_calls(model) - before
    decoded = model.decode(x)
    rewards = reward(decoded, condition).to(x.device)
    calls.reward = len(x)
    chosen = rewards.reshape(-1, count).argmax(1) + count * torch.arange(len(prompts), device=x.device)
    return Steered(decoded[chosen], x[chosen], rewards[chosen], calls)


def best_of_kl(count: int) -> float:
    """log N - (N - 1) / N nats: the KL of best of N to the model, an upper bound (exact where rewards have no ties)."""
    return math.log(count) - (count - 1) / count


def _network_calls(model: object) -> int:
    found = model if isinstance(model, Policy) else getattr(model, "policy", None)
    return found.network_calls if isinstance(found, Policy) else 0


# --- particles -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def smc(
    policy: Policy,
    value: Value,
    reward: Reward,
    sde: SDE,
    solver: Solver,
    ts: Tensor,
    prompts: Sequence[str],
    particles: int,
    kl_weight: float,
    generator: Generators,
    proposal: ScoreModel | None = None,
    threshold: float = 0.5,
    until: float = math.inf,
) -> Steered:
    """Sequential Monte Carlo towards p_ref exp(R / beta): `particles` paths a prompt, resampled between steps.

    The target of step k is p_ref(x_0..k) exp(V(t_k, x_k) / beta), V = R at the end, so a particle's weight grows by

        exp((V_{k+1} - V_k) / beta) p_ref(x_{k+1} | x_k) / q(x_{k+1} | x_k),     exp(V_0 / beta) at first,

    q being the kernel of the proposal's score (the reference by default: its ratio is 1). Where the effective sample size
    falls below `threshold` of the particles, a population is resampled systematically. The product of the mean weights
    between resamplings is an unbiased estimate of E_ref exp(R / beta) for any V; a good V only makes it sharp. After time
    `until`, up to which V was fitted, it is held until the reward comes. One particle a population is drawn by the last
    weights: exact as `particles` grows, biased towards q before. In steps without noise the reference acts, as its path
    is then the only one. generator: one, or one for each prompt's particles.
    """
    if particles < 1:
        raise SettingError(f"smc needs one particle or more, got {particles}.")
    if not 0 <= threshold <= 1:
        raise SettingError(f"threshold is {threshold}; expected a share of the particles in [0, 1].")
    calls, before, count = Calls(), policy.network_calls, len(prompts)
    index = torch.arange(count).repeat_interleave(particles)
    condition = policy.condition(prompts)[index]
    x = prior_of(policy.reference, condition, generator)
    populations = [generator] if isinstance(generator, torch.Generator) else generator
    ts = ts.to(x.device)

    def rows(t: Tensor) -> Tensor:
        return t.expand(len(x))

    # log-weights since the last resampling, [count, particles]; log_z collects the means at resamplings, [count]; on the
    # CPU, as not every device has float64
    log_w = torch.zeros(count, particles, dtype=torch.float64)
    now = torch.zeros_like(log_w)
    log_z = torch.zeros(count, dtype=torch.float64)
    least = torch.ones(count, dtype=torch.float64)
    for k, (t0, t1) in enumerate(itertools.pairwise(ts)):
        begin, end = rows(t0), rows(t1)
        reference = policy.reference_score(begin, x, condition)
        if k == 0 or float(t0) <= until:
            calls.value += len(x)
            then = value_at(value, begin, x, condition, reference).reshape(count, particles).cpu().double()
            log_w, now = log_w + (then - now) / kl_weight, then
        least = torch.minimum(least, _effective(log_w) / particles)
        chosen, log_w, log_z = _resampled(log_w, log_z, threshold, populations)
        rows_on = chosen.to(x.device)
        x, reference, now = x[rows_on], reference[rows_on], now.flatten()[chosen].reshape(count, particles)
        base = step_of(sde, solver, reference, begin, end, x)
        step = base
        if proposal is not None and float(base.std.max()) > 0:
            step = step_of(sde, solver, proposal.score(begin, x, condition), begin, end, x)
        noise = normal_as(x, generator)
        x = step.sample(noise)
        log_w = log_w - girsanov.stochastic_cost(step.shift(base), noise).reshape(count, particles).cpu().double()
    decoded = policy.decode(x)
    calls.reward += len(x)
    rewards = reward(decoded, condition).to(x.device)
    log_w = log_w + (rewards.reshape(count, particles).cpu().double() - now) / kl_weight
    least = torch.minimum(least, _effective(log_w) / particles)
    log_z = log_z + torch.logsumexp(log_w, 1) - math.log(particles)
    below = torch.softmax(log_w, 1).cumsum(1)
    drawn = torch.searchsorted(below, _uniform(populations, count), right=True)[:, 0].clamp(max=particles - 1)
    drawn = (drawn + particles * torch.arange(count)).to(x.device)
    calls.network = policy.network_calls - before
    return Steered(decoded[drawn], x[drawn], rewards[drawn], calls, log_z, float(least.mean()))


def _effective(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of each population, [B, K] -> [B]."""
    return (2 * torch.logsumexp(log_w, 1) - torch.logsumexp(2 * log_w, 1)).exp()


def _uniform(populations: Sequence[torch.Generator], count: int) -> Tensor:
    """One number in [0, 1) for each of `count` populations, [count, 1] float64 on the CPU, where weights are kept."""
    each = count // len(populations)
    return torch.cat([torch.rand(each, 1, generator=g, device=g.device) for g in populations]).cpu().double()


def _resampled(
    log_w: Tensor, log_z: Tensor, threshold: float, populations: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B K] to go on with, their log-weights [B, K], log_z [B]; populations with enough effective samples stay."""
    count, particles = log_w.shape
    own = torch.arange(count * particles).reshape(count, particles)
    poor = _effective(log_w) < threshold * particles
    offset = _uniform(populations, count)
    if not bool(poor.any()):
        return own.flatten(), log_w, log_z
    chosen = systematic(torch.softmax(log_w, 1), offset) + particles * torch.arange(count)[:, None]
    mean = torch.logsumexp(log_w, 1) - math.log(particles)
    return (
        torch.where(poor[:, None], chosen, own).flatten(),
        torch.where(poor[:, None], 0.0, log_w),
        log_z + torch.where(poor, mean, 0.0),
    )


def systematic(weights: Tensor, offset: Tensor) -> Tensor:
    """Indices [B, K] of K draws by weights [B, K] (rows sum to one) at the K even points from one offset [B, 1] in [0, 1).

    Each index comes floor(K w) or ceil(K w) times, K w on average (Kitagawa 1996).
    """
    particles = weights.shape[1]
    points = (torch.arange(particles, device=weights.device) + offset) / particles
    return torch.searchsorted(weights.cumsum(1), points.to(weights.dtype), right=True).clamp(max=particles - 1)
