"""`draft`: the reward's own gradient, through the last K steps of sampling; also DRaFT-LV, AlignProp and ReFL.

    loss = -R(decode(x_N)) + beta sum_k 1/2 |w_k|^2,    x_{k+1} = m_k(x_k; theta) + std_k z_k

differentiated through the last K steps with their noise held fixed, x_{N-K} a constant. w_k is the control in units of
z_k. last_steps = K (0: all of them), and by `variant`
- draft: the last K steps (Clark et al. 2023, arXiv 2309.17400, algorithm 1). renoise = n adds n starts a path, drawn by
  noising its end back to t_{N-K}: DRaFT-LV is last_steps 1, renoise 2;
- alignprop: the last k, k uniform on 1..K, drawn each rollout (Prabhudesai et al. 2023, arXiv 2310.03739);
- refl: at one of the last K steps, drawn for each path, the reward of x_data_hat (Xu et al. 2023, arXiv 2304.05977,
  algorithm 1).

Fixed points, for weights not shared between steps. draft and alignprop with all steps: the optimum of E R - beta path KL
on the grid, which is the law p_ref exp(R / beta) / Z when the noise is memoryless. K < N: draft's best policy that acts
in the last K steps only (with renoise, for starts of the noising path's law beside its own). refl: each late step's
bargain of R(x_data_hat) with its own KL, which is no tilted law. Without the KL: the reward's maximum alone.
Departs from the papers, which rely on few iterations or small adapters: the KL, of the last K steps in the simulation and
of the earlier ones at one visited state a path, since the weights they share with the late ones would carry them away
(kl_share 1; 0 is the papers'); paths of the SDE, not of DDIM's ODE. From ReFL: no ReLU around the reward and no
pretraining loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..config import setting
from ..rollout import Trajectory, step_of
from ..types import Condition, Metrics
from . import Rows, Rule, acting_steps, noising


@dataclass(frozen=True)
class Ends(Rows):
    """The ends of paths, to be simulated again, k steps each; and a state of each path before its last K steps."""

    x: Tensor  # [M, *D] state before the first of the k steps
    t: Tensor  # [M, k + 1]
    noise: Tensor  # [M, k, *D]
    early_x: Tensor  # [M, *D]
    early_t: Tensor  # [M, 2] the times of that state's step
    condition: Condition
    acts: tuple[bool, ...]  # the policy's steps among the k; the reference takes the others
    share: int  # how many late steps of a path one step in the simulation stands for
    early_share: int  # how many early ones the early state stands for; 0: there are none


@dataclass
class DRaFT(Rule):
    """Settings of the rule: see the top of this file."""

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "minibatch_size": 32}
    search: ClassVar[Mapping[str, Any]] = {"variant": ["draft", "alignprop"], "last_steps": [0, 5]}
    reads_reference = False
    differentiates_reward = True
    transitions_only = False

    variant: Literal["draft", "alignprop", "refl"] = setting("draft", "whose truncation of the gradient")
    last_steps: int = setting(0, "last steps of a path that may receive the reward's gradient; 0 is all", 0)
    renoise: int = setting(0, "further starts a path, by noising its end (DRaFT-LV: 2, with last_steps 1)", 0)
    kl_share: float = setting(1.0, "weight of the path KL, in units of kl_weight; 0 is the papers'", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "refl" and self.renoise:
            raise ValueError(f"renoise is {self.renoise}, but refl starts on the path itself; use renoise 0.")

    def prepare(self, trajectory: Trajectory, rewards: Tensor, generator: torch.Generator, rate: float) -> Ends:
        """Where the gradient begins on each path, and at which earlier state its KL is looked at."""
        ts, acting = trajectory.ts, acting_steps(trajectory)
        each = torch.arange(trajectory.xs.shape[1], device=ts.device)
        late, early = acting[-self.last_steps :], acting[: -self.last_steps] if self.last_steps else acting[:0]

        def drawn(steps: Tensor, count: int) -> Tensor:
            return steps[torch.randint(len(steps), (count,), generator=generator, device=steps.device)]

        e = drawn(early if len(early) else late, len(each))
        early_x, early_t = trajectory.xs[e, each], torch.stack([ts[e], ts[e + 1]], dim=1)
        if self.variant == "refl":
            k = drawn(late, len(each))
            t, noise = torch.stack([ts[k], ts[k + 1]], dim=1), trajectory.noise[k, each].unsqueeze(1)
            condition, share = trajectory.condition, len(late)
            return Ends(trajectory.xs[k, each], t, noise, early_x, early_t, condition, (True,), share, len(early))
        first = int(drawn(late, 1)) if self.variant == "alignprop" else int(late[0])
        starts, noises = [trajectory.xs[first]], [trajectory.noise[first:].transpose(0, 1)]
        end, (kept, std) = trajectory.xs[-1], noising(self.sde.schedule, ts[-1], ts[first])
        for _ in range(self.renoise):
            fresh = torch.randn(end.shape, generator=generator, device=end.device, dtype=end.dtype)
            starts.append(kept * end + std * fresh)
            noises.append(torch.randn(noises[0].shape, generator=generator, device=ts.device, dtype=ts.dtype))
        path = each.repeat(1 + self.renoise)  # of each start
        t, acts = ts[first:].expand(len(path), -1), tuple(trajectory.acts[first:].tolist())
        x, noise, condition = torch.cat(starts), torch.cat(noises), trajectory.condition[path]
        return Ends(x, t, noise, early_x[path], early_t[path], condition, acts, 1, len(early))

    def loss(self, rows: Ends) -> tuple[Tensor, Metrics]:
        """beta KL - reward, mean over paths."""
        x, cost = rows.x, torch.zeros(len(rows), device=rows.x.device)
        for k, acts in enumerate(rows.acts):
            t0, t1 = rows.t[:, k], rows.t[:, k + 1]
            score = (self.policy.score if acts else self.policy.reference_score)(t0, x, rows.condition)
            step = step_of(self.sde, self.solver, score, t0, t1, x)
            if acts and self.kl_share > 0:
                reference = self.policy.reference_score(t0, x, rows.condition)
                cost = cost + rows.share * step.kl(step_of(self.sde, self.solver, reference, t0, t1, x))
            x = self.sde.x_data_hat(t0, x, score) if self.variant == "refl" else step.sample(rows.noise[:, k])
        if rows.early_share and self.kl_share > 0:
            t0, t1 = rows.early_t[:, 0], rows.early_t[:, 1]
            step, base = (
                step_of(self.sde, self.solver, score(t0, rows.early_x, rows.condition), t0, t1, rows.early_x)
                for score in (self.policy.score, self.policy.reference_score)
            )
            cost = cost + rows.early_share * step.kl(base)
        assert self.reward is not None
        reward = self.reward(self.policy.model.decode(x), rows.condition)
        metrics = {"policy/kl_of_simulation": float(cost.detach().mean())} if self.kl_share > 0 else {}
        return (self.kl_share * self.kl_weight * cost - reward).mean(), metrics


RULES = {"draft": DRaFT}
