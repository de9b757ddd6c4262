"""`rwr`: reward-weighted regression, the denoising loss on samples weighted by exp(R / beta).

    loss = E[ w(x_data, c) sum_k lambda_k |s_theta(t_k, x_k, c) - s(x_k | x_data)|^2 ],   w = exp(R / beta) / mean over c's

Fixed point: with samples of the reference (the default) exactly the tilted law p_ref exp(R / beta) / Z of each prompt, as
the batch (and its remembered rollouts) grows: the weighted samples are the tilted law's, and denoising them gives its
score whatever lambda. With samples of the policy (iterated) each iteration tilts once more, p exp(n R / beta) after n, so
it drifts to the argmax of R, held by nothing but stopping.
With `baseline` denoised the loss becomes
    E[ sum_k lambda_k ( w |d|^2 - 2 (w - b) d . (s(x_k | x_data) - s_ref) ) ],   d = s_theta - s_ref,
    b(t_k, x) = m_k + c_k (e(x) - mean of e at t_k),   e(x) = exp(R(decode(x_data_hat)) / beta) / mean over c's, at most max w
m_k and c_k the regression of w on e at that step, over earlier iterations. The minimiser is the same for any b(t, x), as
s(x_k | x_data) - s_ref has mean 0 given x_k under the reference. The noise is that of w - b: none towards the data, where the
denoised sample tells the reward and the noise of s(x_k | x_data) is greatest. A constant reward then changes nothing.
Sources: Peters & Schaal 2007 (RWR), Lee et al. 2023 (arXiv 2302.12192: samples of the pretrained model, the reward as
weight), Black et al. 2023 (arXiv 2305.13301, section 4.2: iterated, weights exp(R / beta)).
Departs from them: weights are normalised per prompt, and the rollouts of the reference are remembered (`replay`), as their
law never changes; Lee et al.'s term on pretraining data is left out. Their learning rates (1e-5) are for full
fine-tuning of Stable Diffusion and are not taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.policy import Policy
from ..control.transitions import Paths, Rows, chunks
from ..support.settings import setting
from ..types import Condition, Metrics, groups, sum_over_data
from .forward import ForwardRule, Noised

KEPT = 0.95  # share of the moments that an iteration leaves
FEW = 10  # rows of a step, with fewer of which before it a baseline is 1, the mean of the weights


@dataclass(frozen=True)
class Weighted(Rows):
    """Noised samples and their weights; with a baseline the reference's scores there too."""

    weight: Tensor  # [M]
    noised: Noised
    baseline: Tensor | None = None  # [M]
    reference: Tensor | None = None  # [M, *D]


@dataclass
class RWR(ForwardRule):
    """Settings of the rule; kl_weight is beta, the weights' temperature.

    samples: whose rollouts to learn from. replay: rollouts remembered, an iteration looks at batch_size of their samples;
    1 where the policy draws them. weighting: "kl" makes the loss the weighted path KL up to a constant.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1}

    samples: Literal["reference", "policy"] = setting(
        "reference", "Who draws: the reference (optimum: the tilted law), or the policy (drifts to the largest reward)"
    )
    weighting: Literal["kl", "epsilon", "velocity", "x0"] = setting(
        "kl", "Weight of each time: the path KL's, or that of a squared error of noise, velocity or data (x0)"
    )
    replay: int = setting(
        40, "Number of the reference's rollouts that are remembered", 1, needs={"samples": ("reference",)}
    )
    baseline: Literal["none", "denoised"] = setting(
        "none", "Control variate of the weights: none, or one by the denoised sample's reward (a reward call a row)",
        needs={"samples": ("reference",)},
    )  # fmt: skip
    memory: list[tuple[Tensor, Tensor, list[str]]] = field(default_factory=list)  # samples, rewards, prompts
    moments: Tensor | None = None  # [steps, 5] of 1, e, w, e^2, e w at each step of the grid

    def compares_samples(self) -> bool:
        return self.samples == "policy"  # the reference's are remembered, and become groups

    def behaviour(self) -> Policy:
        """The reference as a policy of its own, or the policy."""
        reference = self.policy.reference
        return self.policy if self.samples == "policy" else Policy(reference, reference)

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Weighted:
        """Weights over all that is remembered; as many of its samples as the rollout has, noised."""
        path, rewards = paths.trajectory, paths.rewards
        kept = self.replay if self.samples == "reference" else 1
        self.memory = [*self.memory, (path.xs[-1], rewards, list(path.condition.prompts))][-kept:]
        samples = torch.cat([x for x, _, _ in self.memory])
        prompts = [prompt for _, _, names in self.memory for prompt in names]
        rewards_kept, among = torch.cat([r for _, r, _ in self.memory]), Condition(prompts)
        log_weight = log_weights(rewards_kept, among, self.kl_weight)
        weight = log_weight.exp()
        chosen = torch.randperm(len(weight), generator=generator, device=weight.device)[: len(rewards)]
        condition = self.policy.condition([prompts[i] for i in chosen.tolist()])
        self.metrics = {"policy/effective_samples": float(weight.sum() ** 2 / weight.square().sum())}
        rows, index = self.noised(samples[chosen], path.ts, condition, generator)
        if self.baseline == "none":
            return Weighted(weight[chosen][index], rows)
        log_z = (rewards_kept / self.kl_weight - log_weight)[chosen][index]
        reference, rewards_there = self.denoised(rows)
        estimate = (rewards_there / self.kl_weight - log_z).clamp(max=float(log_weight.max())).exp()
        baseline = self.fitted(path.ts, rows.t0, estimate, weight[chosen][index])
        return Weighted(weight[chosen][index], rows, baseline, reference)

    @torch.no_grad()
    def denoised(self, rows: Noised) -> tuple[Tensor, Tensor]:
        """The reference's scores there, and the rewards [M] of its denoised samples."""
        assert self.reward is not None
        scores, rewards = [], []
        for part in chunks(rows.t0):
            t, x, condition = rows.t0[part], rows.x[part], rows.condition[part]
            score = self.policy.reference_score(t, x, condition)
            scores.append(score)
            rewards.append(self.reward(self.policy.model.decode(self.sde.x_data_hat(t, x, score)), condition))
        return torch.cat(scores), torch.cat(rewards)

    def fitted(self, ts: Tensor, t0: Tensor, estimate: Tensor, weight: Tensor) -> Tensor:
        """b [M] at steps from t0 [M] by the moments so far, in which these estimates and weights [M] are counted then."""
        step = torch.searchsorted(ts[:-1].contiguous(), t0)
        if self.moments is None:
            self.moments = torch.zeros(len(ts) - 1, 5, dtype=weight.dtype, device=weight.device)
        count, e, w, ee, ew = self.moments[step].T
        known = count >= FEW
        e, w, ee, ew = (part / count.clamp(min=1) for part in (e, w, ee, ew))
        slope = (ew - e * w) / (ee - e**2).clamp(min=1e-6)
        columns = torch.stack([torch.ones_like(weight), estimate, weight, estimate**2, estimate * weight], dim=1)
        self.moments = (KEPT * self.moments).index_add(0, step, columns)
        return torch.where(known, w + slope * (estimate - e), torch.ones_like(weight))

    def loss(self, rows: Weighted) -> tuple[Tensor, Metrics]:
        """Half of the loss above: summed over the grid's steps, mean over samples."""
        at = rows.noised
        score = self.policy.score(at.t0, at.x, at.condition)
        error = 0.5 * sum_over_data(self.error(self.weighting, at.t0, at.t1, at.x, score, at.target) ** 2)
        told = {"policy/denoising_error": float(error.detach().mean())}
        if rows.baseline is None or rows.reference is None:
            return at.steps * (rows.weight * error).mean(), told
        moved = self.error(self.weighting, at.t0, at.t1, at.x, score, rows.reference)
        noise = self.error(self.weighting, at.t0, at.t1, at.x, at.target, rows.reference)
        pull = (rows.weight - rows.baseline) * sum_over_data(moved * noise)
        return at.steps * (0.5 * rows.weight * sum_over_data(moved**2) - pull).mean(), told

    def state_dict(self) -> dict[str, Any]:
        if self.samples == "policy":
            return {}
        kept = {} if self.moments is None else {"moments": self.moments}
        return {"memory": [{"x": x, "rewards": r, "prompts": prompts} for x, r, prompts in self.memory], **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory = [(entry["x"], entry["rewards"], entry["prompts"]) for entry in state.get("memory", [])]
        self.moments = state.get("moments")


def log_weights(rewards: Tensor, condition: Condition, kl_weight: float) -> Tensor:
    """log of exp(R / beta) [B], divided by its mean over the samples of the same prompt."""
    found = torch.empty_like(rewards)
    for index in groups(condition).values():
        rows = index.to(rewards.device)
        found[rows] = math.log(len(rows)) + torch.log_softmax(rewards[rows] / kl_weight, 0)
    return found


RULES = {"rwr": RWR}
