"""How a value network is fitted: targets, losses, and what is remembered.

Sources: Zhao et al. 2025 (section 4), Jia & Zhou 2022 (martingale loss, arXiv 2108.06655).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..support import distributed
from ..support.errors import SettingError
from ..types import Condition, Metrics
from .advantage import slope
from .value import ResidualValue, ValueNetwork

LOOKS = 256  # states at which a fit is measured


# --- losses: of V at states on a path against the return from there on ---------------------------------------------------


def martingale_loss(value: Tensor, target: Tensor, kl_weight: float) -> Tensor:
    """Mean square of target - V: zero-mean martingale increments to the end of the path (Jia & Zhou 2022, eq. 18).

    Its minimiser is the mean return under the behaviour. value, target [B].
    """
    return (target - value).square().mean() / 2


def soft_loss(value: Tensor, target: Tensor, kl_weight: float, limit: float = 2.0) -> Tensor:
    """mean(exp(d) - 1 - d), d = (target - V) / beta: its minimiser is beta log E exp(target / beta).

    With target = R - beta (log-ratio to the reference from there on) the minimiser is the *optimal* value whatever
    policy drew the path, so that every path ever drawn can be used again. Beyond d = `limit` exp is continued by its
    tangent, which bounds the pull of one lucky sample. value, target [B].
    """
    d = (target - value) / kl_weight
    inside = d.clamp(max=limit)
    exponential = inside.exp() + (d - inside) * math.exp(limit)
    return kl_weight**2 * (exponential - 1 - d).mean()


def logit_of(log_p: Tensor) -> Tensor:
    """log p - log(1 - p) for log p [B] <= 0, within +-30: what float32 still tells apart."""
    return (log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-14)))).clamp(-30, 30)


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"martingale": martingale_loss, "soft": soft_loss}


@dataclass(frozen=True)
class Sample:
    """States of one trajectory and the returns from them on: what a value is fitted to."""

    t: Tensor  # [M]
    features: Tensor  # [M, ...] what the value network sees
    target: Tensor  # [M]
    condition: Condition
    later_costs: Tensor | None = None  # [M] sampled, in units of reward: the reward at the end is target + later_costs
    rewards: Tensor | None = None  # [M] of x_data_hat, where the value is made of them

    @property
    def paths(self) -> int:
        """To how many paths the states belong; they lie time by time."""
        return int((self.t == self.t[0]).sum())


@dataclass
class ValueFit:
    """Adam on a value network over the newest trajectories. One object holds what must survive a resume.

    loss: "martingale" (mean return of the policy: on-policy, replay 1), "soft" (the optimal value, from any policy's
    paths) or "log_probability" (the same for rewards that are log-probabilities, by weighted regression on their logit).
    The weights kept after each fit are the average over its steps: a value's gradient is much noisier than the value.
    """

    value: ValueNetwork
    kl_weight: float
    loss: str = "martingale"
    learning_rate: float = 2e-3
    steps: int = 30
    first_steps: int = 120
    batch_size: int = 1024
    replay: int = 1
    average: float = 0.98
    weight_decay: float = 0.0
    memory: list[Sample] = field(default_factory=list)
    fitted: bool = False

    def __post_init__(self) -> None:
        if self.loss not in (*LOSSES, "log_probability"):
            raise SettingError(f"unknown value loss {self.loss!r}. Known: {', '.join(LOSSES)}, log_probability.")
        self.parameters = [p for p in self.value.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.learning_rate, weight_decay=self.weight_decay)

    def add(self, sample: Sample) -> None:
        """Remember one trajectory's states; before the first fit nothing is forgotten (the reference's rollouts).

        A value made of R(x_data_hat) asks for it here, once a state: the fits return to each state many times.
        """
        self.memory.append(replace(sample, rewards=self._rewards(sample)))
        if self.fitted:
            del self.memory[: -self.replay]

    def fit(self, generator: torch.Generator, rate: float = 1.0) -> Metrics:
        """Take `steps` steps (`first_steps` the first time) on what is remembered, the learning rate times `rate`."""
        if not self.fitted:
            targets = torch.cat([sample.target for sample in self.memory])
            if self.loss == "log_probability":
                targets = logit_of(targets / self.kl_weight)
            self.value.shift.fill_(float(targets.mean()))
            self.value.scale.fill_(max(float(targets.std()), 1e-6))
            distributed.average([self.value.shift, self.value.scale])
        means = [p.detach().clone() for p in self.parameters]
        steps = self.steps if self.fitted else self.first_steps
        total = 0.0
        for step in range(steps):
            if not self.fitted:  # from nothing: a warm-up, a plateau and a linear fall of its own
                rate = min(1.0, (step + 1) / 30, 2 * (1 - step / steps))
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * rate
            loss = self._loss(generator)
            self.optimizer.zero_grad()
            loss.backward()
            distributed.average(p.grad for p in self.parameters)
            nn.utils.clip_grad_norm_(self.parameters, 10.0)
            self.optimizer.step()
            total += loss.item()
            with torch.no_grad():
                for mean, p in zip(means, self.parameters, strict=True):
                    mean.lerp_(p, 1 - min(self.average, (step + 1) / (step + 10)))
        with torch.no_grad():
            for mean, p in zip(means, self.parameters, strict=True):
                p.copy_(mean)
        self.fitted = True
        return {"value/loss": total / max(steps, 1)}

    @torch.no_grad()
    def slope_of_newest(self, last: int, generator: torch.Generator) -> Metrics:
        """The slope of the returns on V at `LOOKS` states of the `last` rollouts remembered: see `advantage.slope`."""
        rows, size, whole = [], max(1, LOOKS // last), len(self.memory)
        for number in range(whole - last, whole):
            sample = self.memory[number]
            index = torch.randperm(len(sample.t), generator=generator, device=sample.t.device)[:size]
            value = self.values_at(number, index)
            path = (distributed.rank() * whole + number) * 2**14 + index % sample.paths
            rows.append(torch.stack([sample.target[index], value, path.to(value)], dim=1))
        target, value, path = distributed.gathered(torch.cat(rows)).cpu().double().T
        return slope(value, target, path)

    def values_at(self, number: int, index: Tensor) -> Tensor:
        """V at rows `index` of the remembered sample `number`."""
        return self._value(self.memory[number], index)

    def _value(self, sample: Sample, index: Tensor) -> Tensor:
        at = sample.t[index], sample.features[index], sample.condition[index]
        if isinstance(self.value, ResidualValue) and sample.rewards is not None:  # earlier checkpoints have none
            return self.value.of_rewards(*at, sample.rewards[index])
        return self.value.of_inputs(*at)

    @torch.no_grad()
    def _rewards(self, sample: Sample) -> Tensor | None:
        """Of x_data_hat at the states, [M], where the value is made of them."""
        if not isinstance(self.value, ResidualValue):
            return None
        parts = torch.arange(len(sample.t), device=sample.t.device).split(self.batch_size)
        return torch.cat([self.value.terminal(sample.features[rows], sample.condition[rows]) for rows in parts])

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume besides the network and what is remembered."""
        return {"fitted": self.fitted, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fitted = state["fitted"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _loss(self, generator: torch.Generator) -> Tensor:
        """The loss at `batch_size` states of one remembered trajectory, in units of the value's scale."""
        device = self.memory[0].t.device
        draw = torch.randint(len(self.memory), (1,), generator=generator, device=device)
        sample = self.memory[int(draw)]
        index = torch.randint(len(sample.t), (self.batch_size,), generator=generator, device=device)
        if self.loss == "log_probability":
            costs = torch.zeros_like(sample.target) if sample.later_costs is None else sample.later_costs
            log_p = (sample.target + costs)[index] / self.kl_weight
            # a policy's path counts as often as the reference would have drawn it
            weight = (-costs[index] / self.kl_weight).clamp(max=1).exp()
            surprise = self.value.surprise(
                sample.t[index], sample.features[index], sample.condition[index], logit_of(log_p)
            )
            return (weight * surprise).sum() / weight.sum()
        value = self._value(sample, index)
        return LOSSES[self.loss](value, sample.target[index], self.kl_weight) / float(self.value.scale) ** 2
