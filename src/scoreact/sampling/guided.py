"""Models whose score is steered at sampling time: by a value's gradient, or by a dial between reference and policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..control.policy import Policy
from ..control.value import ValueNetwork
from ..dynamics.schedule import Schedule
from ..dynamics.sde import SDE
from ..rewards.base import Reward
from ..support.errors import SettingError
from ..types import Condition, expand

Value = Callable[[Tensor, Tensor, Condition], Tensor]  # (t [B], x [B, *D], condition) -> V [B], in units of the reward


@dataclass
class Calls:
    """Samples through the networks, the value and the reward, the one place where steering counts them."""

    network: int = 0
    value: int = 0
    reward: int = 0


class _View:
    """A `ScoreModel` with the policy's prior, prompts and decoder; what its score is, a subclass says."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def schedule(self) -> Schedule:
        return self.policy.schedule

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return self.policy.prior(condition, generator)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return self.policy.condition(prompts)

    def decode(self, x: Tensor) -> Tensor:
        return self.policy.decode(x)


class Interpolated(_View):
    """s_ref + strength (s_theta - s_ref): the reference at 0, the policy at 1 (both bit for bit), beyond it above 1.

    To first order the control, and so the path KL's root, is `strength` times the policy's: the dial from the pretrained
    model to the tuned one, as guidance is from the unconditional model to the conditional.
    """

    def __init__(self, policy: Policy, strength: float) -> None:
        super().__init__(policy)
        self.strength = strength

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        if self.strength == 0:
            return self.policy.reference_score(t, x, condition)
        tuned = self.policy.score(t, x, condition)
        if self.strength == 1 or bool((t >= self.policy.act_until).all()):  # where the reference acts anyway
            return tuned
        reference = self.policy.reference_score(t, x, condition)
        return reference + self.strength * (tuned - reference)


class Guided(_View):
    """s + scale (g^2 / gain) grad V / beta: with the reference's s, the optimal value and scale 1, the optimal policy.

    base: "reference" or "policy". sde: the one that V belongs to, whose g enters whatever solver samples: for noise_level
    1 the factor is 1, also along the ODE. From `until` on nothing is added. value: a ValueNetwork or any `Value` that is
    differentiable in x.
    """

    def __init__(
        self,
        policy: Policy,
        value: Value,
        sde: SDE,
        kl_weight: float,
        scale: float = 1.0,
        base: str = "reference",
        until: float = math.inf,
    ) -> None:
        super().__init__(policy)
        if base not in ("reference", "policy"):
            raise SettingError(f"base is {base!r}; known: reference, policy.")
        self.value, self.sde, self.kl_weight, self.scale, self.base, self.until = (
            value, sde, kl_weight, scale, base, until,
        )  # fmt: skip
        self.calls = Calls()  # of the value; the policy counts its own

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        own = self.policy.reference_score if self.base == "reference" else self.policy.score
        steered = t < self.until
        if self.scale == 0 or not bool(steered.any()):
            return own(t, x, condition)
        self.calls.value += len(x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            # one look at the reference serves both
            shared = own(t, leaf, condition) if self.base == "reference" else None
            value = value_at(self.value, t, leaf, condition, shared)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        score = own(t, x, condition) if shared is None else shared.detach()
        moved = self.sde.optimal_action(t, score, self.scale * gradient, self.kl_weight)
        return torch.where(expand(steered, x), moved, score)


@dataclass
class RewardOfEstimate:
    """V = R(decoded x_data_hat of the reference): no trained value is needed, but one reward call each."""

    policy: Policy
    sde: SDE
    reward: Reward
    calls: int = 0

    def __call__(self, t: Tensor, x: Tensor, condition: Condition, reference: Tensor | None = None) -> Tensor:
        self.calls += len(x)
        if reference is None:
            reference = self.policy.reference_score(t, x, condition)
        return self.reward(self.policy.decode(self.sde.x_data_hat(t, x, reference)), condition)


def value_at(value: Value, t: Tensor, x: Tensor, condition: Condition, reference: Tensor | None) -> Tensor:
    """V there; the reference's score, where it is known already, is not asked for again."""
    if isinstance(value, ValueNetwork):
        return value.of_inputs(t, value.inputs_at(t, x, condition, reference), condition)
    if isinstance(value, RewardOfEstimate):
        return value(t, x, condition, reference)
    return value(t, x, condition)
