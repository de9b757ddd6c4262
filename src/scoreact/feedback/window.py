"""The latest rewards that came from outside: a bounded number of them, each with its age, and what they say of J and J*.

A path that a policy v drew, with its reward R and L = log p_v / p_ref along it, stands for every policy:

    J(v) = E_v[R - beta L],   J* = beta log E_v exp((R - beta L) / beta),   J_ref = E_v[R exp(-L)] / E_v[exp(-L)]

so J* needs no samples of the pretrained model and no sample's policy need be the present one. Knows numbers; does not know
paths, files or training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..evaluation.optimum import ENOUGH, estimate_optimum, mean_and_error
from ..support.errors import SettingError
from ..types import Condition, Metrics


@dataclass(frozen=True)
class UpdatePlan:
    """How an update learns; kept with the run, so that it holds until it is changed.

    size: rewards that are remembered, the newest. half_life: number of rewards after which an older one is drawn half as
    often; 0: all alike. calls: network calls that an update may make; 0: no bound beside the run's own settings.
    """

    size: int = 512
    half_life: float = 0.0
    calls: int = 0

    def __post_init__(self) -> None:
        if self.size < FEWEST:
            raise SettingError(f"window is {self.size} rewards; give at least {FEWEST}.")
        if not 0 <= self.half_life < math.inf:
            raise SettingError(f"half_life is {self.half_life}; give a number of rewards above 0, or 0 for none.")
        if self.calls < 0:
            raise SettingError(f"calls is {self.calls}; give a number of network calls above 0, or 0 for no bound.")

    def changed(self, size: int | None, half_life: float | None, calls: int | None) -> UpdatePlan:
        """With what is given in the place of what was."""
        given: dict[str, Any] = {"size": size, "half_life": half_life, "calls": calls}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


FEWEST = 32  # rewards before the policy moves at all


@dataclass
class Window:
    """Rewards by the id of their sample, the oldest first, at most `plan.size` of them.

    received: how many rewards ever came. given: of each, how many had come before it.
    """

    plan: UpdatePlan = field(default_factory=UpdatePlan)
    rewards: dict[int, float] = field(default_factory=dict)
    given: dict[int, int] = field(default_factory=dict)
    received: int = 0

    def __len__(self) -> int:
        return len(self.rewards)

    def add(self, new: Mapping[int, float]) -> int:
        """Rewards that came together, in any order; how many old ones they drive out."""
        for number in sorted(new):
            self.rewards[number], self.given[number] = new[number], self.received
            self.received += 1
        gone = list(self.rewards)[: max(0, len(self) - self.plan.size)]
        for number in gone:
            del self.rewards[number], self.given[number]
        return len(gone)

    def ages(self) -> Tensor:
        """How many rewards came after each, [len], float64."""
        return self.received - 1 - torch.tensor(list(self.given.values()), dtype=torch.float64)

    def weights(self) -> Tensor:
        """How often each is drawn, in units of the newest one, [len]."""
        ages = self.ages()
        return torch.ones_like(ages) if self.plan.half_life == 0 else 0.5 ** (ages / self.plan.half_life)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Places [count] of samples to learn from: each once where there are as many, else all and then again."""
        weights, rows = self.weights().to(generator.device, torch.float32), torch.arange(0, device=generator.device)
        whole = torch.nonzero(weights > 0).flatten()
        while count - len(rows) >= len(whole):
            rows = torch.cat([rows, whole])
        if len(rows) < count:
            rows = torch.cat([rows, torch.multinomial(weights, count - len(rows), generator=generator)])
        return rows.cpu()

    def state_dict(self) -> dict[str, Any]:
        return {
            "size": self.plan.size, "half_life": self.plan.half_life, "calls": self.plan.calls,
            "rewards": [[i, self.rewards[i], self.given[i]] for i in self.rewards], "received": self.received,
        }  # fmt: skip

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Window:
        """The inverse of `state_dict`; a new one for an empty state."""
        if not state:
            return cls()
        found = cls(UpdatePlan(state["size"], state["half_life"], state["calls"]), received=state["received"])
        for number, reward, given in state["rewards"]:
            found.rewards[number], found.given[number] = reward, given
        return found


def worth(rewards: Tensor, log_ratios: Tensor, condition: Condition, kl_weight: float) -> Metrics:
    """J of the policies that drew the samples and J*, with 95 % intervals, from rewards [B] and log-ratios L [B] alone."""
    found = estimate_optimum(rewards.double() - kl_weight * log_ratios.double(), condition, kl_weight)
    return {
        "online/J": found["objective/J_ref"],
        "online/J_se": found["objective/J_ref_se"],
        **{f"online/{name}": found[f"objective/{name}"] for name in ("J_star", "J_star_low", "J_star_high")},
        "online/effective_samples": found["objective/effective_samples"],
    }


def below_reference(rewards: Tensor, log_ratios: Tensor, kl_weight: float) -> tuple[float, float] | None:
    """J of the policies that drew the samples, and J_ref, where J is clearly the lower one; else None."""
    weights = torch.softmax(-log_ratios.double(), 0)
    if float(1 / weights.square().sum()) < ENOUGH:
        return None
    differences = len(weights) * weights * (rewards - (weights * rewards).sum())
    j, error = mean_and_error(rewards.double() - kl_weight * log_ratios.double())
    reference, own = float((weights * rewards).sum()), mean_and_error(differences)[1]
    return (j, reference) if j + 3 * math.hypot(error, own) < reference else None
