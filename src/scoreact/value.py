"""Value networks V(t, x, c) = E[R - beta/2 int_t^1 |u|^2 ds | X_t = x], their targets, losses and gradients.

Three forms. `ResidualValue`: c_skip(t) R(x_data_hat, c) + c_out(t) F, the paper's, which spends a reward call per
evaluation. `Surrogate` in R's place: a learned stand-in. `ValueNetwork` alone: F only, seeing x and the reference's
x_data_hat; its gradient with respect to x passes through the reference, whose Jacobian is the posterior covariance of
the data, and so stays on the data's manifold.
Sources: Zhao et al. 2025 (section 4), Jia & Zhou 2022 (martingale loss, arXiv 2108.06655).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .advantage import slope
from .policy import Policy
from .sde import SDE
from .types import Condition, Metrics, expand

KNOTS = 11  # of a standard deviation over time
LOOKS = 256  # states at which a fit is measured


class ValueNetwork(nn.Module):
    """V = shift + scale F(inputs, t, condition); another form where the reward is a log-probability.

    Then the logit l of exp(R / beta) is modelled as normal given the state, with mean shift + scale F and a standard
    deviation s(t), and V = beta log E sigmoid(l), by MacKay's sigmoid(mean / sqrt(1 + pi s^2 / 8)): regression on a real
    number needs far fewer samples than logistic regression on the property.

    network: (input [B, C, ...] or [B, n], t [B], condition) -> [B]. It sees `inputs`: "x_data_hat" (the reference's
    estimate), "x", or "both", joined along dimension 1. x enters times alpha / sqrt(alpha^2 + sigma^2): at t_min the state
    says nothing about the sample, and this keeps the gradient there proportional to alpha, as the true value's is.
    """

    def __init__(
        self, network: nn.Module, sde: SDE, policy: Policy, inputs: str = "both", log_sigmoid: float | None = None
    ) -> None:
        """log_sigmoid: beta for the form of log-probabilities, None for the affine one."""
        super().__init__()
        inputs = getattr(network, "inputs", inputs)  # one on the reference's own features can see nothing else
        if inputs not in ("x_data_hat", "x", "both", "features"):
            raise ValueError(f"value inputs {inputs!r} unknown. Known: x_data_hat, x, both.")
        self.network = network
        self.sde = sde
        self._policy = (policy,)  # in a tuple: its parameters are not this module's
        self.inputs = inputs
        self.log_sigmoid = log_sigmoid
        self.counted = getattr(network, "counted", True)
        self.calls = 0  # samples through the value network, training and gradients included
        if log_sigmoid is not None:
            self.log_spread = nn.Parameter(torch.zeros(KNOTS))  # log(s / scale), linear between even times
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.shift: Tensor
        self.scale: Tensor

    def features(self, t: Tensor, x: Tensor, condition: Condition, reference: Tensor | None = None) -> Tensor:
        """What the network sees at (t [B], x [B, *D]); `reference`: the reference's score there if already known."""
        if self.inputs == "features":
            return self._policy[0].reference_features(t, x, condition)
        alpha, sigma = self.sde.schedule.alpha(t), self.sde.schedule.sigma(t)
        scaled = expand(alpha / (alpha**2 + sigma**2).sqrt(), x) * x
        if self.inputs == "x":
            return scaled
        if reference is None:
            reference = self._policy[0].reference_score(t, x, condition)
        x_data_hat = self.sde.x_data_hat(t, x, reference)
        return x_data_hat if self.inputs == "x_data_hat" else torch.cat([scaled, x_data_hat], dim=1)

    def of_features(self, t: Tensor, features: Tensor, condition: Condition) -> Tensor:
        """V for inputs from `features`: [B]."""
        self.calls += len(t) if self.counted else 0
        return self.link(t, self.network(features, t, condition).float())

    def link(self, t: Tensor, output: Tensor) -> Tensor:
        """V where the network says `output`, [B]."""
        output = self.shift + self.scale * output
        if self.log_sigmoid is None:
            return output
        spread = self.scale * self.spread(t)
        return self.log_sigmoid * nn.functional.logsigmoid(output / (1 + math.pi * spread**2 / 8).sqrt())

    def spread(self, t: Tensor) -> Tensor:
        """s(t) / scale, [B]."""
        return (self.log_spread @ knots(t)).exp()

    def surprise(self, t: Tensor, features: Tensor, condition: Condition, logits: Tensor) -> Tensor:
        """-log p(logit | state) up to a constant, [B]: what the form of log-probabilities is fitted by."""
        self.calls += len(t)
        spread, output = self.spread(t), self.network(features, t, condition).float()
        return ((logits - self.shift) / self.scale - output).square() / (2 * spread**2) + spread.log()

    def forward(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """V(t, x, c): [B]."""
        return self.of_features(t, self.features(t, x, condition), condition)

    def gradient(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """V [B] and grad_x V [B, *D], both without graph; no more rows at a time than the reference's network takes."""
        size = getattr(self._policy[0].reference, "rows_per_call", None) or len(x)
        values, gradients = [], []
        for i in torch.arange(len(x), device=x.device).split(size):
            with torch.enable_grad():
                state = x[i].detach().requires_grad_(True)
                value = self(t[i], state, condition[i])
                (gradient,) = torch.autograd.grad(value.sum(), state)
            values.append(value.detach())
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)


def knots(t: Tensor) -> Tensor:
    """The hat functions of `KNOTS` even times in [0, 1] at t [B]: [KNOTS, B]; values at the knots @ them are linear between."""
    return (1 - (t * (KNOTS - 1) - torch.arange(KNOTS, device=t.device)[:, None]).abs()).clamp(min=0)


class ResidualValue(ValueNetwork):
    """V = c_skip(t) R(x_data_hat, c) + c_out(t) F with c_skip = sin(pi t / 2), c_out = cos(pi t / 2): V(1, .) = R.

    terminal: (x_data_hat [B, *D], condition) -> [B], the reward of the decoded estimate (counted by the caller's
    wrapper) or a `Surrogate`. `of_features` needs inputs "x_data_hat".
    """

    def __init__(
        self, network: nn.Module, sde: SDE, policy: Policy, terminal: Callable[[Tensor, Condition], Tensor]
    ) -> None:
        super().__init__(network, sde, policy, inputs="x_data_hat")
        if self.inputs != "x_data_hat":
            raise ValueError(
                f"a residual value needs x_data_hat, but its network sees {self.inputs}; use value network."
            )
        self.terminal = terminal

    def of_features(self, t: Tensor, features: Tensor, condition: Condition) -> Tensor:
        self.calls += len(t)
        angle = 0.5 * math.pi * t
        learned = self.shift + self.scale * self.network(features, t, condition).float()
        return angle.sin() * self.terminal(features, condition) + angle.cos() * learned


class Surrogate(nn.Module):
    """A learned stand-in for a dear or non-differentiable reward: network(x_data, t = 1, condition), [B]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_data: Tensor, condition: Condition) -> Tensor:
        value: Tensor = self.network(x_data, torch.ones(len(x_data), device=x_data.device), condition).float()
        return value


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
            raise ValueError(f"unknown value loss {self.loss!r}. Known: {', '.join(LOSSES)}, log_probability.")
        self.parameters = [p for p in self.value.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.learning_rate, weight_decay=self.weight_decay)

    def add(self, sample: Sample) -> None:
        """Remember one trajectory's states; before the first fit nothing is forgotten (the reference's rollouts)."""
        self.memory.append(sample)
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
        sample = self.memory[number]
        return self.value.of_features(sample.t[index], sample.features[index], sample.condition[index])

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
        value = self.value.of_features(sample.t[index], sample.features[index], sample.condition[index])
        return LOSSES[self.loss](value, sample.target[index], self.kl_weight) / float(self.value.scale) ** 2
