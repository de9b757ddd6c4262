"""A value made of the reward's surrogate at the sample that a path is heading for, solved for in closed form.

    V(t, x, c) = a(t) S(decode(x_data_hat), c) + b(t),   a, b linear between `KNOTS` times

The paper's V = c_skip(t) R(x_data_hat) + c_out(t) F with the surrogate S in R's place, and with a and b from the returns: they
say how far the estimate at t can be believed. No steps, no rate, no network. Its gradient in x passes through the surrogate,
the decoder and the reference.
Source: Zhao et al. 2025 (section 4) for the form. Departs from it: c_skip and c_out are measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics.sde import SDE
from ..support import distributed
from ..support.devices import in_double
from ..support.errors import SettingError
from ..types import Condition, Metrics
from .policy import Policy
from .ridge_surrogate import RidgeSurrogate
from .value import KNOTS, ValueNetwork, knots
from .value_fit import ValueFit

PRIOR = 8.0  # paths that say a = 1 and b = 0 at every knot


class Believed(nn.Module):
    """a and b at the knots, [KNOTS] each; `SurrogateFit` sets them."""

    a: Tensor
    b: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(KNOTS))
        self.register_buffer("b", torch.zeros(KNOTS))


class SurrogateValue(ValueNetwork):
    """V above. What it sees of a state are the surrogate's features of its decoded x_data_hat."""

    def __init__(self, surrogate: RidgeSurrogate, sde: SDE, policy: Policy) -> None:
        """surrogate: fitted before V is asked; its newest fit is V's."""
        super().__init__(Believed(), sde, policy)
        self.surrogate = surrogate
        self.inputs, self.counted = "sample features", False

    def inputs_at(self, t: Tensor, x: Tensor, condition: Condition, reference: Tensor | None = None) -> Tensor:
        """The features [B, F] of decode(x_data_hat) at (t [B], x [B, *D])."""
        policy = self._policy[0]
        if reference is None:
            reference = policy.reference_score(t, x, condition)
        surrogate = self.surrogate
        return surrogate.features(surrogate.sees(self.sde.x_data_hat(t, x, reference), policy.model.decode))

    def of_inputs(self, t: Tensor, features: Tensor, condition: Condition) -> Tensor:
        weight = knots(t)
        believed = self.network
        assert isinstance(believed, Believed)
        return (believed.a @ weight) * self.surrogate.of_features(features, condition) + believed.b @ weight


@dataclass
class SurrogateFit(ValueFit):
    """Ridge regression of the returns on S and 1 times the knots, anew in every fit.

    "martingale": V = the mean return. "soft": a return becomes itself + variance / (2 beta), the optimal value of normal
    returns; the variance around V at each knot is what b gains.
    """

    def __post_init__(self) -> None:
        if self.loss not in ("martingale", "soft"):
            raise SettingError(
                f"value_loss {self.loss} needs value network or linear; with value surrogate take martingale or soft."
            )

    @torch.no_grad()
    def fit(self, generator: torch.Generator, rate: float = 1.0) -> Metrics:
        """Solve; nothing is drawn, and `rate` is not used."""
        value = self.value
        assert isinstance(value, SurrogateValue)
        believed = value.network
        assert isinstance(believed, Believed)
        rows, targets, each = [], [], []
        for sample in self.memory:
            s = value.surrogate.of_features(sample.features, sample.condition)
            hats = knots(sample.t).T
            rows.append(in_double(torch.cat([hats * s[:, None], hats], dim=1)))
            targets.append(in_double(sample.target - s))  # what a = 1, b = 0 leaves
            # the states of a path share its noise, and count as one
            each.append(torch.full_like(targets[-1], sample.paths / len(sample.t)))
        phi, y, weight = torch.cat(rows), torch.cat(targets), torch.cat(each)
        level = phi[:, :KNOTS].square().sum(1).mean().clamp(min=1e-12)
        scale = torch.cat([phi.new_full((KNOTS,), float(level)), phi.new_ones(KNOTS)])
        gram, moment = (phi * weight[:, None]).T @ phi, phi.T @ (weight * y)
        for summed in (gram, moment):
            distributed.average([summed])
            summed *= distributed.world()
        w = torch.linalg.solve(gram + PRIOR / KNOTS * scale.diag(), moment)
        error = y - phi @ w
        believed.a.copy_(1 + w[:KNOTS])
        believed.b.copy_(w[KNOTS:])
        if self.loss == "soft":
            hats = phi[:, KNOTS:]
            variance = (hats.T @ (weight * error.square())) / (hats.T @ weight).clamp(min=1e-6)
            believed.b += (variance / (2 * self.kl_weight)).to(believed.b)
        self.fitted = True
        return {"value/loss": float((weight * error.square()).sum() / weight.sum())}

    def state_dict(self) -> dict[str, Any]:
        return {"fitted": self.fitted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fitted = state["fitted"]
