"""Steering at sampling time, without training: by a value's gradient, by choice among samples, by a dial on the score.

Knows models, values, rewards and kernels; does not know how they were trained. `Guided` and `Interpolated` are models,
so that every solver samples them; `best_of` chooses among the samples of any model; `smc` resamples particles between
the steps of any kernel. All aim at the optimum p_ref exp(R / beta) / Z (design, section 2).
Sources: Song et al. 2021 (guidance), Stiennon et al. 2020 and Beirami et al. 2024 (best of N, arXiv 2401.01879),
Doucet, de Freitas & Gordon 2001 and Wu et al. 2023 (twisted particles, arXiv 2306.17775), Singhal et al. 2025 (steering
by intermediate rewards, arXiv 2501.06848).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..control.policy import Policy
from ..dynamics.samplers import sampler_by_name
from ..dynamics.sde import SDE
from ..dynamics.solvers import SOLVERS
from ..rewards.base import Reward
from ..support.errors import SettingError
from .draw import Generators, prior_of
from .guided import Calls, Guided, Interpolated, RewardOfEstimate, Value
from .particles import Steered, best_of, smc

METHODS = ("value", "interpolate", "best_of", "smc")


@dataclass
class Steering:
    """A method with its settings, ready to draw: `steering(prompts, ts, generator)`; what `scoreact sample --steer` does.

    method: value, interpolate, best_of or smc. base: whose samples are steered, reference or policy (interpolate has both).
    sde, solver: of sampling, the solver by name; smc needs one with kernels. strength: of value and interpolate.
    particles: of best_of and smc, a sample. value: of value and smc; smc does without (`RewardOfEstimate`).
    value_sde, until: the SDE that the value belongs to, and the time up to which it was fitted.
    """

    method: str
    policy: Policy
    reward: Reward
    sde: SDE
    solver: str = "ddim"
    kl_weight: float = 1.0
    strength: float = 1.0
    particles: int = 8
    base: str = "policy"
    value: Value | None = None
    value_sde: SDE | None = None
    until: float = math.inf

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingError(f"steering by {self.method!r} is unknown. Known: {', '.join(METHODS)}.")
        if self.method == "smc" and self.solver not in SOLVERS:
            raise SettingError(f"smc weighs the steps of a path, so solver {self.solver} will not do; use ddim.")
        if self.method == "value" and self.value is None:
            raise SettingError("steering by value needs a value network; give one, or use best_of or smc.")

    def __call__(self, prompts: Sequence[str], ts: Tensor, generator: Generators) -> Steered:
        own = Interpolated(self.policy, 1.0 if self.base == "policy" else 0.0)
        if self.method == "best_of":
            sampler = sampler_by_name(self.solver)
            return best_of(own, self.reward, sampler, self.sde, ts, prompts, self.particles, generator)
        if self.method == "smc":
            estimate = RewardOfEstimate(self.policy, self.sde, self.reward)
            value = self.value if self.value is not None else estimate
            until = self.until if self.value is not None else math.inf
            proposal = own if self.base == "policy" else None
            found = smc(
                self.policy, value, self.reward, self.sde, SOLVERS[self.solver], ts, prompts, self.particles,
                self.kl_weight, generator, proposal, until=until,
            )  # fmt: skip
            if self.value is None:  # counted as the rewards that they are
                found.calls.value, found.calls.reward = 0, found.calls.reward + estimate.calls
            return found
        model = self.model()
        calls, before = Calls(), self.policy.network_calls
        with torch.no_grad():
            condition = model.condition(prompts)
            x, source = prior_of(model, condition, generator), cast(torch.Generator, generator)
            sampler = sampler_by_name(self.solver)
            x = sampler(self.sde, lambda t, x: model.score(t, x, condition), ts.to(x.device), x, source)[-1]
            decoded = model.decode(x)
            calls.network = self.policy.network_calls - before
            calls.value = model.calls.value if isinstance(model, Guided) else 0
            # for whoever looks at the outcome: steering itself asks no reward
            return Steered(decoded, x, self.reward(decoded, condition), calls)

    def model(self) -> Guided | Interpolated:
        """The steered model, of the methods that change the score."""
        if self.method == "interpolate":
            return Interpolated(self.policy, self.strength)
        assert self.value is not None
        sde = self.value_sde or self.sde
        return Guided(self.policy, self.value, sde, self.kl_weight, self.strength, self.base, self.until)
