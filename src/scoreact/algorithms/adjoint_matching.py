"""`adjoint_matching`: regress the control to the lean adjoint, the reward's gradient carried back by the reference.

    a_N = grad R(decode(x_N)),    a_k = (d m_k / d x_k)^T a_{k+1},    m_k the mean of the *reference's* step k
    loss = sum_k beta / 2 |w_k - std_k a_{k+1} / beta|^2

w_k = u sqrt(dt) is the control in units of the step's noise, x_{k+1} = m_k + std_k (w_k + z_k). By the envelope theorem
grad V_k = E[(d m_k / d x_k)^T grad V_{k+1}] under the optimal policy, so E[a_k | x_k] = grad V_k there and the loss's
minimiser is w_k = std_k E[grad V_{k+1}] / beta: the maximum of E R - beta path KL over this grid's policies, exactly,
not only as dt -> 0. Fixed point: the law p_ref exp(R / beta) / Z when the noise is memoryless (noise_scale 1); with
other noise J's optimum all the same, whose law carries the initial-value bias.

The same holds of the reference's own paths once they are drawn anew with weights exp(R / beta), the optimum's law of paths:
E[a_k | x_k] is then E_ref[exp(R / beta) a_k | x_k] / E_ref[exp(R / beta) | x_k] = grad V_k. So `reuse_reference` learns the
optimum at once from paths that are there already. `reward` may be a stand-in with a gradient (`reward_gradient` surrogate).

Source: Domingo-Enrich et al. 2024 (arXiv 2409.08861), eq. 38-42; their adjoint is -a / beta, their lambda 1 / beta.
Departs from the paper: the exact transpose of the solver's own step in place of Euler's step of the adjoint's ODE, and
so a_{k+1} where they have a_k; the reward is taken at the path's end, not after a last step without noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..control.trajectory import Trajectory
from ..control.transitions import Batch, Paths, chunks, flatten
from ..dynamics import girsanov
from ..dynamics.solvers import step_of
from ..support import distributed
from ..support.settings import setting
from ..types import Condition, Metrics, expand, groups
from .base import Rule


@dataclass
class AdjointMatching(Rule):
    """Settings of the rule.

    matched_steps: steps a path that enter the loss: half of them its last, the others drawn anew each rollout (the
    paper: 20 of 40). loss_limit: of |u - u*|^2, above which a transition has no gradient; in units of 1 / beta^2 (the
    paper: 1.6, for the gradient of its reward model). 0 is all of them, and no limit. force: 1 is the rule at its fixed
    point; a short run stops before it, and a larger multiplier brings it nearer.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "minibatch_size": 512}
    reads_reference = False  # the adjoint asks the reference at every state, after the rollout
    differentiates_reward = True

    matched_steps: int = setting(0, "Number of steps of a path in the loss, half of them its last; 0: all", 0)
    loss_limit: float = setting(0.0, "Largest |u - u*|^2 beta^2 that still has a gradient; 0: no limit", 0)
    reuse_reference: int = setting(
        0, "Number of first iterations that learn from the reference's paths; at most reference_batches", 0
    )
    force: float = setting(
        1.0, "Multiplier of the adjoint; 1: the rule at its fixed point, before which a short run stops", 0, above=True
    )

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Batch:
        """The adjoints of every path, and from them the controls to regress to."""
        # a policy's own controls are nan here: the reference was not asked
        if self.reuse_reference and bool((paths.trajectory.controls == 0).all()):
            rows = accepted(paths.rewards, paths.trajectory.condition, self.kl_weight, generator)
            counts = distributed.gathered(torch.tensor([len(rows)], device=rows.device))
            rows = rows[: int(counts.min())]  # processes step together
            paths = Paths(paths.trajectory.paths(rows), paths.rewards[rows])
        adjoints, controls = self.lean_adjoints(paths.trajectory)
        trajectory = replace(paths.trajectory, controls=controls)
        kl = trajectory.path_kl()
        self.metrics = {
            "policy/kl": float(kl.mean()),
            "objective/J_training": float((paths.rewards - self.kl_weight * kl).mean()),
        }
        keep = self._matched(paths.acting, generator)
        batch = flatten(trajectory, keep)
        target = self.force * expand(batch.std, batch.x) * adjoints[keep + 1].flatten(0, 1) / self.kl_weight
        return replace(batch, target=target, steps=len(paths.acting))

    def lean_adjoints(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """a [N + 1, B, *D] along the paths, and the controls w [N, B, *D], which cost no further network call."""
        adjoints, controls = torch.empty_like(trajectory.xs), torch.zeros_like(trajectory.controls)
        for rows in chunks(trajectory.xs[-1]):  # the graph of one step of these paths is held
            condition = trajectory.condition[rows]
            with torch.enable_grad():
                x = trajectory.xs[-1, rows].requires_grad_(True)
                assert self.reward is not None
                end = self.reward(self.policy.model.decode(x), condition)
                (adjoint,) = torch.autograd.grad(end.sum(), x)
            adjoints[-1, rows] = adjoint
            for k in reversed(range(len(controls))):
                t0, t1 = trajectory.ts[k].expand(len(rows)), trajectory.ts[k + 1].expand(len(rows))
                with torch.enable_grad():
                    x = trajectory.xs[k, rows].requires_grad_(True)
                    score = self.policy.reference_score(t0, x, condition)
                    mean = step_of(self.sde, self.solver, score, t0, t1, x).mean
                    (adjoint,) = torch.autograd.grad(mean, x, adjoint)
                adjoints[k, rows] = adjoint
                if bool(trajectory.acts[k]):
                    controls[k, rows] = (trajectory.means[k, rows] - mean.detach()) / trajectory.std[k]
        return adjoints, controls

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """beta / 2 |w - std a / beta|^2, summed over a path's steps, mean over paths."""
        shift = self.shift(batch)
        distance = girsanov.kl(batch.control + shift - batch.target)
        if self.loss_limit > 0:
            limit = self.loss_limit / (2 * self.kl_weight**2) * (batch.t1 - batch.t0)
            distance = torch.minimum(distance, limit)
        moved = girsanov.kl(shift.detach())
        return batch.steps * self.kl_weight * distance.mean(), {
            "policy/kl_to_behaviour": float(batch.steps * moved.mean())
        }

    def _matched(self, acting: Tensor, generator: torch.Generator) -> Tensor:
        """The acting steps that enter the loss, by index."""
        if self.matched_steps == 0 or self.matched_steps >= len(acting):
            return acting
        late = (self.matched_steps + 1) // 2
        early = acting[:-late]
        order = torch.randperm(len(early), generator=generator, device=acting.device)
        return torch.cat([early[order[: self.matched_steps - late]], acting[-late:]])


def accepted(rewards: Tensor, condition: Condition, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Rows of the reference's paths that are kept with probability exp((R - max R) / beta), the maximum of their prompt.

    What is kept was drawn from the optimum's law of paths, P_ref exp(R / beta) / Z: no row is there twice.
    """
    best = torch.empty_like(rewards)
    for rows in groups(condition).values():
        best[rows] = rewards[rows].max()
    coin = torch.rand(len(rewards), generator=generator, device=rewards.device)
    return torch.nonzero(coin < ((rewards - best) / kl_weight).exp()).flatten()


RULES = {"adjoint_matching": AdjointMatching}
