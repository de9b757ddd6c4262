"""`flow_grpo`: group-relative advantages, clipped ratio, KL to the reference, flow SDE; a few SDE steps only.

    J = E[ sum_k min(r_k A, clip(r_k, 1 +- eps) A) - beta KL(p_theta(. | x_k, c) || p_ref(. | x_k, c)) ]
    A = (R - mean of its group) / std of its group, a group being the batch's samples of one prompt
    KL_k = |mean - mean_ref|^2 / (2 g^2 dt);  g = a sqrt(sigma / (1 - sigma)), Config's noise "flow_grpo", a = 0.7

`window`: only so many neighbouring steps are drawn from the SDE and learned from, the others from the ODE; at a random
place among the first (Flow-GRPO-Fast) or sliding from noise to data as training goes on (MixGRPO: window 4, sliding,
25 iterations a place, window_until 1). `ratio_norm`: GRPO-Guard's ratio, log r' = std (log r + |shift|^2 / 2)
= std shift . z, which has mean 0, and the policy's loss divided by dt.
Sources: Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470, section 4), Li et al. 2025 (MixGRPO, arXiv 2507.21802), Wang et
al. 2025 (GRPO-Guard, arXiv 2510.22319, eq. 8 and 12).
Fixed point: `dpok`'s with beta times the reward's standard deviation in beta's place (beta itself with advantage_scale
"none"), so the tilted law of that weight to first order in 1 / beta, if the noise is memoryless (other noise leaves the
prior's bias); a window leaves out the ODE steps' gradient, and ratio_norm weighs the reward of step k by std_k / dt_k:
with either it is elsewhere.
Departs from it: ratios and KL are sums over the data (the published code averages, `temperature="dimensions"`, and
leaves dt out of the KL); the clip range is per square root of unit time (theirs, 1e-4 with averages and 10 steps, is
3e-4); a group's samples start from different noise. Their learning rate (3e-4, LoRA on SD3.5) is not taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.transitions import Batch, Paths
from ..dynamics import girsanov
from ..support.errors import SettingError
from ..support.settings import Above, setting
from ..types import Condition, Metrics, groups, sum_over_data
from .base import Rule
from .ddpo import with_advantages
from .surrogate import surrogate

WINDOW = {"window": Above(0)}


@dataclass
class FlowGRPO(Rule):
    """Settings of the rule; clip_range and temperature as in `ddpo`, kl_weight is beta.

    advantage_scale: "group" is the paper, "batch" its published code, "none" leaves advantages in the reward's units.
    window: SDE steps a rollout, 0 is all of them. window_until: they lie in this first share of the steps.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "noise": "flow_grpo", "noise_scale": 0.7}

    search: ClassVar[Mapping[str, Any]] = {
        "clip_range": (0.1, 3.0, "log"), "advantage_scale": ["group", "batch", "none"],
        "noise": ["flow_grpo", "noise_level"], "noise_scale": [0.5, 0.7, 1.0],
    }  # fmt: skip

    clip_range: float = setting(
        1.0, "Distance from 1 at which a step's ratio is clipped, per square root of unit time", 0, above=True
    )
    temperature: Literal["one", "root_dimensions", "dimensions"] = setting(
        "one", "What the log-ratio is divided by: 1, the root of the number of data dimensions, or that number"
    )
    advantage_clip: float = setting(
        5.0, "Largest advantage, in the units that advantage_scale leaves it", 0, above=True
    )
    advantage_scale: Literal["group", "batch", "none"] = setting(
        "group",
        "What advantages are divided by: the reward's standard deviation in the group, in the batch, or nothing",
    )
    reference_kl: bool = setting(True, "Whether the loss holds kl_weight times the KL of each step to the reference")
    ratio_norm: bool = setting(False, "GRPO-Guard: log-ratios of mean 0, and the policy's loss per unit time")
    window: int = setting(
        0, "Number of neighbouring steps drawn with noise, the others without; 0: all of them with noise", 0
    )
    window_until: float = setting(
        0.5, "Share of the steps, from the first on, in which the window lies", 0, 1, above=True, needs=WINDOW
    )
    window_order: Literal["random", "sliding"] = setting(
        "random",
        "The window's place: drawn for each rollout, or sliding from noise to data again and again",
        needs=WINDOW,
    )
    window_iterations: int = setting(
        25, "Number of iterations that a sliding window stays", 1, needs={**WINDOW, "window_order": ("sliding",)}
    )
    rollouts: int = 0  # so far: where a sliding window is

    def compares_samples(self) -> bool:
        return True

    def stochastic_steps(self, steps: int, generator: torch.Generator) -> Tensor | None:
        """[steps] bool with `window` neighbours true, or None for all."""
        if self.window == 0:
            return None
        last = max(self.window, round(self.window_until * steps))
        if last > steps:
            raise SettingError(f"window is {self.window} but a path has {steps} steps; lower window or raise steps.")
        places = last - self.window + 1
        if self.window_order == "random":
            start = int(torch.randint(places, (1,), generator=generator, device=generator.device))
        else:
            start = self.rollouts // self.window_iterations % places
        self.rollouts += 1
        index = torch.arange(steps)
        return (index >= start) & (index < start + self.window)

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Batch:
        """The same advantage at every SDE step of a path."""
        return with_advantages(paths, self.advantages(paths.rewards, paths.trajectory.condition), self.advantage_clip)

    def advantages(self, rewards: Tensor, condition: Condition) -> Tensor:
        """(R - mean) / std of each sample's group, [B]; 0 in a group of one or of equal rewards."""
        advantages = torch.empty_like(rewards)
        for index in groups(condition).values():
            rows = index.to(rewards.device)
            group = rewards[rows]
            scale = 1.0
            if self.advantage_scale != "none":
                spread = group if self.advantage_scale == "group" else rewards
                scale = float(spread.std(correction=0)) + 1e-4
            advantages[rows] = (group - group.mean()) / scale
        return advantages

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """beta |w|^2 / 2 - clipped ratio x advantage, summed over a path's SDE steps, mean over paths."""
        shift = self.shift(batch)
        log_ratio = girsanov.log_ratio(shift, batch.noise)
        if self.ratio_norm:
            log_ratio = batch.std * sum_over_data(shift * batch.noise)
        gain, metrics = surrogate(log_ratio, batch, self.clip_range, self.temperature)
        if self.ratio_norm:
            gain = gain / (batch.t1 - batch.t0)
        cost = self.kl_weight * girsanov.kl(batch.control + shift) if self.reference_kl else 0.0
        moved = float(batch.steps * girsanov.kl(shift.detach()).mean())
        return batch.steps * (cost - gain).mean(), {**metrics, "policy/kl_to_behaviour": moved}

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollouts = state["rollouts"]


RULES = {"flow_grpo": FlowGRPO}
