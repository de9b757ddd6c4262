"""`diffusion_nft`: on the noising process, towards the better samples and away from the worse, against an old policy.

    v+ = (1 - b) v_old + b v_theta        v- = (1 + b) v_old - b v_theta
    loss = E_t[ r |v+ - v|^2 + (1 - r) |v- - v|^2 ],   v the velocity of (x_t, x_data),  v_old drew x_data
    r = 1/2 + 1/2 clip((R - mean_c) / (C std), -1, 1),  C = advantage_clip, std over the prompt's samples
    after each iteration  theta_old <- eta theta_old + (1 - eta) theta,  eta = min(rise n, most),  n iterations so far

Its minimiser is v_old + E[(2 r - 1) (v - v_old) | x_t] / b: one step along grad_x E_old[R | x_t] / (b C std), a first-order
tilt, whatever linear form of the prediction and weight of time the loss has. weighting="adaptive" is the published code's:
x_data_hat, with |.|^2 divided by the stopped mean |x_data_hat - x_data| of the sample.

Source: Zheng et al. 2025 (DiffusionNFT, arXiv 2509.16117, section 3; published code for C = 5, b = 1, the old policy's
schedule and the KL term's form). Rollouts by the policy's ODE; any solver would do.
Fixed point: without the KL term (kl_share 0) none but the argmax of R, as every iteration tilts again. With it the loss has
kl_share beta b / (C std) |v_theta - v_ref|^2 more, in the same form, and at rest (old = theta)
s = s_ref + grad_x E_theta[R | x_t] / (beta kl_share), up to "adaptive" and the clip: the tilted law p_ref exp(R / beta) for a
Gaussian reference and a linear reward, and to first order in 1 / beta for any.
Departs from it: kl_share, the KL's weight in the reward's units, is 1 (theirs, 1e-4 beside a loss of order 1, is next to
nothing); sums over the data in place of means; their learning rate (3e-4) belongs to LoRA and is not taken.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..control.policy import Policy
from ..control.transitions import Paths, Rows, in_parts
from ..support.settings import Above, setting
from ..types import Condition, Metrics, expand, groups, sum_over_data
from .forward import ForwardRule, Noised


@dataclass(frozen=True)
class Graded(Rows):
    """Noised samples, how good each is, and what the old policy and the reference say of them."""

    optimality: Tensor  # [M] r in [0, 1]
    kl_weight: Tensor  # [M] of |v_theta - v_ref|^2
    old: Tensor  # [M, *D] score
    reference: Tensor  # [M, *D] score, zero if not asked for
    noised: Noised


@dataclass
class DiffusionNFT(ForwardRule):
    """Settings of the rule.

    mix: b. advantage_clip: C. kl_share: the KL term's weight in units of kl_weight; 0 leaves it out, and the reference's
    calls with it. old_rise, old_most: the paper's other schedule is slower at first (0.0075 after 75 iterations, 0.999).
    """

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "max_gradient_norm": 1.0}

    search: ClassVar[Mapping[str, Any]] = {
        "kl_share": (0.3, 3.0, "log"), "old_most": [0.0, 0.5],
    }  # fmt: skip

    sampling: Literal["sde", "ode"] = setting(
        "ode", "How rollouts are drawn: by the SDE, or by its probability-flow ODE (without noise)"
    )
    mix: float = setting(
        1.0, "Share of the policy in the implicit positive and negative policies (b in the paper)", 0, above=True
    )
    advantage_clip: float = setting(
        5.0,
        "Reward at which a sample counts as all bad or all good, in standard deviations from the mean",
        0,
        above=True,
    )
    kl_share: float = setting(1.0, "Weight of the distance to the reference, in units of kl_weight; 0: none", 0)
    weighting: Literal["velocity", "adaptive", "epsilon", "x0", "kl"] = setting(
        "velocity", "The squared error: of velocity, data over its size (adaptive), noise, data (x0), or the path KL's"
    )
    old_rise: float = setting(
        0.001, "Growth per iteration of the decay by which the sampling policy lags", 0, needs={"old_most": Above(0)}
    )
    old_most: float = setting(
        0.5, "Largest decay by which the sampling policy lags; 0: every rollout is the policy's own", 0, 1
    )
    old: Policy = field(init=False)  # draws the rollouts
    updates: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        model = copy.deepcopy(self.policy.model)
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
        self.old = Policy(model, self.policy.reference, self.policy.act_until)

    def compares_samples(self) -> bool:
        return True

    def behaviour(self) -> Policy:
        return self.old

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Graded:
        """Samples noised again, r, and the old policy's and the reference's scores there."""
        path = paths.trajectory
        rows, index = self.noised(path.xs[-1], path.ts, path.condition, generator)
        optimality, std = graded(paths.rewards, path.condition, self.advantage_clip)
        old = in_parts(self.old.score, rows.t0, rows.x, rows.condition)
        self.policy.network_calls += self.old.network_calls
        self.old.network_calls = 0
        reference = torch.zeros_like(old)
        if self.kl_share > 0:
            reference = in_parts(self.policy.reference_score, rows.t0, rows.x, rows.condition)
        kl_weight = self.kl_share * self.kl_weight * self.mix / (self.advantage_clip * std)
        self.metrics = {"policy/old_decay": self.decay()}
        return Graded(optimality[index], kl_weight[index], old, reference, rows)

    def loss(self, rows: Graded) -> tuple[Tensor, Metrics]:
        """The loss above, mean over steps and samples."""
        at, b = rows.noised, self.mix
        score = self.policy.score(at.t0, at.x, at.condition)
        moved, noise = self._between(rows, score, rows.old), self._between(rows, rows.old, at.target)
        positive, negative = noise + b * moved, noise - b * moved  # v+ - v and v- - v
        away = self._between(rows, score, rows.reference) if self.kl_share > 0 else torch.zeros_like(moved)
        losses = rows.optimality * self.squared(positive, positive)
        losses = losses + (1 - rows.optimality) * self.squared(negative, negative)
        losses = losses + rows.kl_weight * self.squared(away, noise)
        return losses.mean(), {
            "policy/from_old": float(sum_over_data(moved.detach() ** 2).mean()),
            "policy/from_reference": float(sum_over_data(away.detach() ** 2).mean()),
        }

    def _between(self, rows: Graded, one: Tensor, two: Tensor) -> Tensor:
        """Two scores' difference in the loss's form, [M, *D]."""
        at, form = rows.noised, "x0" if self.weighting == "adaptive" else self.weighting
        return self.error(form, at.t0, at.t1, at.x, one, two)

    def squared(self, error: Tensor, size: Tensor) -> Tensor:
        """|error|^2, [M]; "adaptive": divided by the mean |size|, without its gradient."""
        if self.weighting == "adaptive":
            error = error / expand(size.detach().flatten(1).abs().mean(1).clamp(min=1e-5), error).sqrt()
        return sum_over_data(error**2)

    def decay(self) -> float:
        """eta of the next update of the old policy."""
        return min(self.old_rise * self.updates, self.old_most)

    def moved(self) -> None:
        """theta_old <- eta theta_old + (1 - eta) theta."""
        with torch.no_grad():
            for old, new in zip(self._parameters(self.old), self._parameters(self.policy), strict=True):
                old.lerp_(new, 1 - self.decay())
        self.updates += 1

    def _parameters(self, policy: Policy) -> list[nn.Parameter]:
        """Those that training changes."""
        assert isinstance(policy.model, nn.Module)
        assert isinstance(self.policy.model, nn.Module)
        pairs = zip(policy.model.parameters(), self.policy.model.parameters(), strict=True)
        return [p for p, trained in pairs if trained.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        return {"old": self._parameters(self.old), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for old, stored in zip(self._parameters(self.old), state["old"], strict=True):
                old.copy_(stored)
        self.updates = state["updates"]


def graded(rewards: Tensor, condition: Condition, advantage_clip: float) -> tuple[Tensor, Tensor]:
    """r [B] in [0, 1], 1/2 at the mean of the prompt's samples, and the prompt's standard deviation [B]."""
    optimality, std = torch.full_like(rewards, 0.5), torch.ones_like(rewards)
    for index in groups(condition).values():
        rows = index.to(rewards.device)
        # as in the published code: equal rewards give 1/2
        std[rows] = rewards[rows].std(correction=0) + 1e-4
        advantage = (rewards[rows] - rewards[rows].mean()) / std[rows]
        optimality[rows] = 0.5 + 0.5 * (advantage / advantage_clip).clamp(-1, 1)
    return optimality, std


RULES = {"diffusion_nft": DiffusionNFT}
