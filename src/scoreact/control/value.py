"""Value networks V(t, x, c) = E[R - beta/2 int_t^1 |u|^2 ds | X_t = x] and their gradients. `value_fit` fits them.

Three forms. `ResidualValue`: c_skip(t) R(x_data_hat, c) + c_out(t) F, the paper's, which spends a reward call on each state
and each gradient; `surrogate_value` has a stand-in in R's place. `ValueNetwork` alone: F only, seeing x and the reference's
x_data_hat; its gradient with respect to x passes through the reference, whose Jacobian is the posterior covariance of
the data, and so stays on the data's manifold.
Sources: Zhao et al. 2025 (section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..dynamics.sde import SDE
from ..models.base import ChoosesInputs, HasRowsPerCall, SaysIfCounted
from ..support.errors import SettingError
from ..types import Condition, expand
from .policy import Policy

KNOTS = 11  # of a standard deviation over time


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
        if isinstance(network, ChoosesInputs):  # one on the reference's own features can see nothing else
            inputs = network.inputs
        if inputs not in ("x_data_hat", "x", "both", "features"):
            raise SettingError(f"value inputs {inputs!r} unknown. Known: x_data_hat, x, both.")
        self.network = network
        self.sde = sde
        self._policy = (policy,)  # in a tuple: its parameters are not this module's
        self.inputs = inputs
        self.log_sigmoid = log_sigmoid
        self.counted = network.counted if isinstance(network, SaysIfCounted) else True
        self.calls = 0  # samples through the value network, training and gradients included
        if log_sigmoid is not None:
            self.log_spread = nn.Parameter(torch.zeros(KNOTS))  # log(s / scale), linear between even times
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.shift: Tensor
        self.scale: Tensor

    def inputs_at(self, t: Tensor, x: Tensor, condition: Condition, reference: Tensor | None = None) -> Tensor:
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

    def of_inputs(self, t: Tensor, features: Tensor, condition: Condition) -> Tensor:
        """V for inputs from `inputs_at`: [B]."""
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
        return self.of_inputs(t, self.inputs_at(t, x, condition), condition)

    def gradient(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """V [B] and grad_x V [B, *D], both without graph; no more rows at a time than the reference's network takes."""
        reference = self._policy[0].reference
        size = (reference.rows_per_call if isinstance(reference, HasRowsPerCall) else None) or len(x)
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
    wrapper). `of_inputs` needs inputs "x_data_hat".
    """

    def __init__(
        self, network: nn.Module, sde: SDE, policy: Policy, terminal: Callable[[Tensor, Condition], Tensor]
    ) -> None:
        super().__init__(network, sde, policy, inputs="x_data_hat")
        if self.inputs != "x_data_hat":
            raise SettingError(
                f"a residual value needs x_data_hat, but its network sees {self.inputs}; use value network."
            )
        self.terminal = terminal

    def of_inputs(self, t: Tensor, features: Tensor, condition: Condition) -> Tensor:
        return self.of_rewards(t, features, condition, self.terminal(features, condition))

    def of_rewards(self, t: Tensor, features: Tensor, condition: Condition, rewards: Tensor) -> Tensor:
        """V [B] where the rewards [B] of x_data_hat are known already."""
        self.calls += len(t)
        angle = 0.5 * math.pi * t
        learned = self.shift + self.scale * self.network(features, t, condition).float()
        return angle.sin() * rewards + angle.cos() * learned
