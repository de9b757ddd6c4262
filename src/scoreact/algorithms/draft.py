"""`draft`: the reward's own gradient, through the last K steps of sampling; also DRaFT-LV, AlignProp and ReFL.

    loss = -R(decode(x_N)) + beta sum_k 1/2 |w_k|^2,    x_{k+1} = m_k(x_k; theta) + std_k z_k

differentiated through the last K steps with their noise held fixed, x_{N-K} a constant. w_k is the control in units of
z_k. Where the gradient begins is drawn from the prior, without the steps and the reward that a rollout would add; renoise and
refl start from a rollout. last_steps = K (0: all), and by `variant`
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..control.transitions import Paths, Rows
from ..dynamics.schedule import noising
from ..dynamics.solvers import step_of
from ..support.errors import SettingError
from ..support.settings import setting
from ..types import Condition, Metrics
from .base import Rule, steps_that_act


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

    variant: Literal["draft", "alignprop", "refl"] = setting(
        "draft", "Where the reward's gradient is cut: as in DRaFT, AlignProp or ReFL"
    )
    last_steps: int = setting(0, "Number of last steps of a path that the reward's gradient may reach; 0: all", 0)
    renoise: int = setting(
        0,
        "Number of further starts of a path, by noising its end (DRaFT-LV: 2, with last_steps 1)",
        0,
        needs={"variant": ("draft", "alignprop")},
    )
    kl_share: float = setting(1.0, "Weight of the path KL, in units of kl_weight; 0 as in the papers", 0)
    recompute: bool = setting(
        False, "Whether each step is computed again for its gradient: the memory of one step, more time"
    )
    simulated: list[Tensor] = field(default_factory=list, init=False)  # rewards and KL of this iteration's paths

    def __post_init__(self) -> None:
        super().__post_init__()
        self.own_rows = self.variant != "refl" and self.renoise == 0
        if self.variant == "refl" and self.renoise:
            raise SettingError(f"renoise is {self.renoise}, but refl starts on the path itself; use renoise 0.")

    def rows_for(self, prompts: Sequence[str], ts: Tensor, generator: torch.Generator) -> Ends:
        """Starts of the last steps; what their simulation earns and pays becomes the iteration's metrics."""
        self.metrics, self.simulated = {}, []
        condition = self.policy.condition(prompts)
        x = self.policy.reference.prior(condition, generator)
        ts = ts.to(x.device)
        shape = (len(x), len(ts) - 1, *x.shape[1:])
        noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        acts = steps_that_act(self, ts)
        late, early = self._late_and_early(torch.nonzero(acts).flatten())
        first = self._first_of(late, generator)
        states = self._states(x, ts, noise, condition, acts.tolist()[:first])
        early_x, early_t = x, ts[:2].expand(len(x), 2)  # of no step
        if len(early):
            early_x, early_t = self._early_state(early, states, ts, generator)
        t = ts[first:].expand(len(x), -1)
        return Ends(
            states[-1], t, noise[:, first:], early_x, early_t, condition, tuple(acts[first:].tolist()), 1, len(early)
        )

    @torch.no_grad()
    def _states(self, x: Tensor, ts: Tensor, noise: Tensor, condition: Condition, acts: Sequence[bool]) -> Tensor:
        """The states of paths from x [B, *D] on, a step for each of `acts`: [steps + 1, B, *D]."""
        found = [x]
        for k, policy_acts in enumerate(acts):
            t0, t1 = (ts[j].expand(len(x)) for j in (k, k + 1))
            score = (self.policy.score if policy_acts else self.policy.reference_score)(t0, found[-1], condition)
            found.append(step_of(self.sde, self.solver, score, t0, t1, found[-1]).sample(noise[:, k]))
        return torch.stack(found)

    def _late_and_early(self, acting: Tensor) -> tuple[Tensor, Tensor]:
        """The steps in which the policy acts: the last K of them, and the others."""
        return acting[-self.last_steps :], acting[: -self.last_steps] if self.last_steps else acting[:0]

    def _first_of(self, late: Tensor, generator: torch.Generator) -> int:
        """The step at which the gradient begins."""
        return int(_drawn(late, 1, generator)) if self.variant == "alignprop" else int(late[0])

    @staticmethod
    def _early_state(steps: Tensor, xs: Tensor, ts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A state of each path of xs [N + 1, B, *D] before one of `steps`, and that step's times [B, 2]."""
        each = torch.arange(xs.shape[1], device=xs.device)
        e = _drawn(steps, len(each), generator)
        return xs[e, each], torch.stack([ts[e], ts[e + 1]], dim=1)

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Ends:
        """Where the gradient begins on each path, and at which earlier state its KL is looked at."""
        trajectory = paths.trajectory
        ts = trajectory.ts
        each = torch.arange(trajectory.xs.shape[1], device=ts.device)
        late, early = self._late_and_early(paths.acting)
        early_x, early_t = self._early_state(early if len(early) else late, trajectory.xs, ts, generator)
        if self.variant == "refl":
            k = _drawn(late, len(each), generator)
            t, noise = torch.stack([ts[k], ts[k + 1]], dim=1), trajectory.noise[k, each].unsqueeze(1)
            condition, share = trajectory.condition, len(late)
            return Ends(trajectory.xs[k, each], t, noise, early_x, early_t, condition, (True,), share, len(early))
        first = self._first_of(late, generator)
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
        for k in range(len(rows.acts)):
            if self.recompute and k + 1 < len(rows.acts):  # the last one's gradient is taken first, and at once
                x, paid = checkpoint(self._step, rows, k, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x, paid = self._step(rows, k, x)
            cost = cost + paid
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
        if self.own_rows:
            self._report(reward.detach(), cost.detach())
        return (self.kl_share * self.kl_weight * cost - reward).mean(), metrics

    def _step(self, rows: Ends, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The state after step k (refl: x_data_hat before it), and the path KL that the step pays, [M]."""
        t0, t1, acts = rows.t[:, k], rows.t[:, k + 1], rows.acts[k]
        score = (self.policy.score if acts else self.policy.reference_score)(t0, x, rows.condition)
        step, paid = step_of(self.sde, self.solver, score, t0, t1, x), torch.zeros(len(x), device=x.device)
        if acts and self.kl_share > 0:
            reference = self.policy.reference_score(t0, x, rows.condition)
            paid = rows.share * step.kl(step_of(self.sde, self.solver, reference, t0, t1, x))
        return self.sde.x_data_hat(t0, x, score) if self.variant == "refl" else step.sample(rows.noise[:, k]), paid

    def _report(self, reward: Tensor, kl: Tensor) -> None:
        """Metrics of all the paths that this iteration has simulated so far."""
        self.simulated.append(torch.stack([reward, kl]))
        rewards, kls = torch.cat(self.simulated, dim=1)
        self.metrics = {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std())}
        if self.kl_share > 0 and self.variant == "draft":  # else some steps of the path pay nothing in this iteration
            self.metrics["policy/kl"] = float(kls.mean())
            self.metrics["objective/J_training"] = float((rewards - self.kl_weight * kls).mean())


def _drawn(steps: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the steps, with replacement."""
    return steps[torch.randint(len(steps), (count,), generator=generator, device=steps.device)]


RULES = {"draft": DRaFT}
