"""`ddpo`: policy gradient on the terminal reward, by the score function or by the clipped importance ratio.

    SF:  grad J = E[ sum_k grad log p_theta(x_{k+1} | x_k, c) A ]
    IS:  grad J = E[ sum_k p_theta / p_old(x_{k+1} | x_k, c) grad log p_theta(x_{k+1} | x_k, c) A ],  clipped as in PPO
    A = clip((R - mean_c) / std_c, +- advantage_clip), statistics of the last rewards of the same prompt

Source: Black et al. 2023 (DDPO, arXiv 2305.13301, sections 4.3 and 5); clip: Schulman et al. 2017.
Fixed point: no KL holds it, so it goes on to the argmax of the reward, not to the tilted law; only stopping ends that.
Departs from it: the ratio is that of the step's Gaussian kernel, summed over the data, and the clip range is per square
root of unit time. The published code averages log-probabilities over the data (`temperature="dimensions"` here) and
clips at 1e-4: with the 50 steps and 16384 numbers of a Stable Diffusion latent that stops the true log-ratio of a step
at +-1.6, and is clip_range 1e-4 / sqrt(1/50) = 7e-4. Its learning rate (3e-4) belongs to LoRA there and is not taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.transitions import Batch, Paths
from ..dynamics import girsanov
from ..support.errors import SettingError
from ..support.settings import setting
from ..types import Condition, Metrics, groups
from .base import Rule
from .surrogate import surrogate

RATIO = {"estimator": ("importance",)}


@dataclass
class DDPO(Rule):
    """Settings of the rule.

    estimator: "score_function" is right for one step of the optimiser a rollout only (epochs 1, one minibatch).
    clip_range: per square root of unit time, the ratio of a step of length dt is clipped at 1 +- clip_range sqrt(dt).
    temperature: what the log-ratio is divided by before it is exponentiated and clipped; see `surrogate`.
    buffer_size, min_count: rewards remembered per prompt, and how many make statistics of its own; with fewer the
    batch's are taken.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1}
    search: ClassVar[Mapping[str, Any]] = {"clip_range": (0.1, 3.0, "log"), "advantage_clip": (2.0, 10.0, "log")}
    kl_term = False
    reads_reference = False

    estimator: Literal["importance", "score_function"] = setting(
        "importance", "Clipped importance ratio (DDPO-IS), or score function (DDPO-SF; one optimiser step a rollout)"
    )
    clip_range: float = setting(
        1.0,
        "Distance from 1 at which a step's ratio is clipped, per square root of unit time",
        0,
        above=True,
        needs=RATIO,
    )
    temperature: Literal["one", "root_dimensions", "dimensions"] = setting(
        "one",
        "What the log-ratio is divided by: 1, the root of the number of data dimensions, or that number",
        needs=RATIO,
    )
    advantage_clip: float = setting(5.0, "Largest advantage, in standard deviations of the reward", 0, above=True)
    buffer_size: int = setting(32, "Number of rewards that are remembered for each prompt", 2)
    min_count: int = setting(16, "Number of rewards from which on a prompt's own mean and spread are used", 2)
    buffers: dict[str, list[float]] = field(default_factory=dict)  # the last rewards of each prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_count > self.buffer_size:
            raise SettingError(f"min_count ({self.min_count}) is more than buffer_size ({self.buffer_size}); lower it.")

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Batch:
        """The same advantage at every step of a path."""
        return with_advantages(paths, self.advantages(paths.rewards, paths.trajectory.condition), self.advantage_clip)

    def advantages(self, rewards: Tensor, condition: Condition) -> Tensor:
        """(R - mean) / std of each sample's prompt, [B]; the rewards enter the prompts' buffers first."""
        advantages = torch.empty_like(rewards)
        for prompt, index in groups(condition).items():
            rows = index.to(rewards.device)
            buffer = [*self.buffers.get(prompt, []), *rewards[rows].tolist()][-self.buffer_size :]
            self.buffers[prompt] = buffer
            # float64: the rounding of a mean of equal rewards would count for something beside 1e-6
            own = torch.tensor(buffer, dtype=torch.float64)
            known = own if len(buffer) >= self.min_count else rewards.cpu().double()
            advantages[rows] = ((rewards[rows] - known.mean()) / (known.std(correction=0) + 1e-6)).to(rewards.dtype)
        return advantages

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """- ratio x advantage (or - log-probability x advantage), summed over a path's steps, mean over paths."""
        shift = self.shift(batch)
        log_ratio = girsanov.log_ratio(shift, batch.noise)
        metrics: Metrics = {}
        if self.estimator == "score_function":  # log p_old is a constant: the gradient is that of log p
            gain = log_ratio * batch.advantage
        else:
            gain, metrics = surrogate(log_ratio, batch, self.clip_range, self.temperature)
        moved = float(batch.steps * girsanov.kl(shift.detach()).mean())
        return -batch.steps * gain.mean(), {**metrics, "policy/kl_to_behaviour": moved}

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": list(self.buffers), "rewards": list(self.buffers.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffers = dict(zip(state["prompts"], map(list, state["rewards"]), strict=True))


def with_advantages(paths: Paths, advantages: Tensor, limit: float) -> Batch:
    """The acting steps of the paths, at each of them its path's advantage [B], clipped at +- limit."""
    return replace(paths.batch, advantage=advantages.clamp(-limit, limit).repeat(paths.batch.steps))


RULES = {"ddpo": DDPO}
