"""The critic: what a rule asks about the value V. It learns V from paths, and says what V and its gradient are there.

One object holds all that this takes: the value network and its fit, the policy, the SDE, the solver, and kl_weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dynamics.sde import SDE
from ..dynamics.solvers import Solver, step_of
from ..support import distributed
from ..support.errors import SettingError
from ..types import Condition, Metrics, expand
from .advantage import slope
from .policy import Policy
from .transitions import Batch, Paths, chunks, in_parts
from .value import ValueNetwork
from .value_fit import Sample, ValueFit


@dataclass
class Critic:
    """V(t, x, c), the expected reward less the later costs, learned from the paths that training draws.

    fitter: the value network, how it is fitted, and what is remembered of earlier paths.
    """

    fitter: ValueFit
    policy: Policy
    sde: SDE
    solver: Solver

    @property
    def value(self) -> ValueNetwork:
        """V itself, a function of states."""
        return self.fitter.value

    @property
    def kl_weight(self) -> float:
        """beta, what a nat of path KL costs in units of the reward; `reprice` changes it."""
        return self.fitter.kl_weight

    @torch.no_grad()
    def remember(self, paths: Paths) -> None:
        """Remember paths of the reference, which pay no costs: the return of every state is the path's reward.

        Raises ValueError when no step of the paths is an action.
        """
        if len(paths.acting) == 0:
            raise SettingError(
                "no step of the path has noise, so there is no action to learn; raise noise_scale or steps."
            )
        references = paths.trajectory.references
        seen = torch.unique(torch.cat([paths.acting, paths.acting + 1]))  # where steps start, and where they lead
        seen = seen[seen < len(references)]
        t, x, condition = paths.states(seen)
        features = self.value.inputs_at(t, x, condition, references[seen].flatten(0, 1))
        self.fitter.add(Sample(t, features, paths.rewards.repeat(len(seen)), condition))

    def fit(
        self, paths: Paths, returns: Tensor, generator: torch.Generator, rate: float = 1.0, end: bool = False
    ) -> Metrics:
        """Fit V to the returns [N + 1, B] at the states before the acting steps, which become the newest of its memory.

        Args:
            paths: the paths that the returns belong to.
            returns: of every state, in units of the reward.
            generator: draws the minibatches of the fit.
            rate: factor on the value's learning rate.
            end: fit V to the state after the last acting step too, where `force_after` asks for its gradient.
        Returns: how well the fit went, as metrics.
        """
        steps, references = paths.acting, paths.trajectory.references
        fitted = torch.cat([steps, steps[-1:] + 1]) if end else steps
        t, x, condition = paths.states(fitted)
        known = fitted[fitted < len(references)]
        scores = references[known].flatten(0, 1)
        with torch.no_grad():
            if len(known) < len(fitted):  # the path's end, where nobody has asked the reference yet
                last = torch.arange(len(scores), len(t), device=t.device)
                scores = torch.cat([scores, self.policy.reference_score(t[last], x[last], condition[last])])
            features = self.value.inputs_at(t, x, condition, scores)
            later = (returns[-1] - returns[fitted]).flatten()
            self.fitter.add(Sample(t, features, returns[fitted].flatten(), condition, later))
        return self.fitter.fit(generator, rate)

    @torch.no_grad()
    def values(self, paths: Paths, returns: Tensor) -> tuple[Tensor, Metrics]:
        """V along the paths that were fitted last, and what it explains of their returns [N + 1, B].

        Returns: V at the states before the acting steps and the return itself at the others, [N + 1, B]; and metrics.
        """
        wanted = returns[paths.acting]
        # the path's end, where it is fitted too, comes after these rows
        rows = torch.arange(wanted.numel(), device=wanted.device)
        found = torch.cat([self.fitter.values_at(-1, part) for part in chunks(rows)])
        path = rows.remainder(wanted.shape[1]) + distributed.rank() * wanted.shape[1]
        metrics = slope(*(distributed.gathered(each.flatten()).cpu() for each in (found, wanted, path)))
        values = returns.clone()
        values[paths.acting] = found.reshape(wanted.shape)
        return values, metrics

    def force_after(self, batch: Batch, noise: Tensor, shift: Tensor | None = None) -> Tensor:
        """S grad V [M, *D] where each step leads with `noise` [M, *D]: its mean is the kernel's exact policy gradient.

        shift [M, *D]: on paths that others drew, how far from theirs the policy's own step is, in units of the noise. The
        fixed point is then the optimal kernel there too.
        """
        std = expand(batch.std, noise)
        moved = noise if shift is None else noise + shift
        return std * self.gradients(batch.t1, batch.mean + std * moved, batch.condition)

    def force_at(self, batch: Batch, references: Tensor) -> Tensor:
        """The same [M, *D] in continuous time, from grad V where each step begins; references: the pretrained scores there.

        It is the shift that the optimal action s_ref + (g^2 / gain) grad V / beta makes in the solver's own kernel, times
        beta.
        """
        gradient = self.gradients(batch.t0, batch.x, batch.condition)
        action = self.sde.optimal_action(batch.t0, references, gradient, self.kl_weight)
        base, best = (
            step_of(self.sde, self.solver, score, batch.t0, batch.t1, batch.x) for score in (references, action)
        )
        return self.kl_weight * best.shift(base)

    def gradients(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        """grad_x V [M, *D] at any number of states t [M], x [M, *D]."""
        return in_parts(lambda *states: self.value.gradient(*states)[1], t, x, condition)

    def reprice(self, kl_weight: float) -> None:
        """Let a nat cost `kl_weight` from now on: V is in units of the reward, so remembered returns are counted anew."""
        ratio = kl_weight / self.kl_weight
        self.fitter.kl_weight = kl_weight
        if self.value.log_sigmoid is not None:
            self.value.log_sigmoid = kl_weight
        for i, sample in enumerate(self.fitter.memory):
            if sample.later_costs is not None:  # target = reward - later costs, and these are proportional to the price
                later = ratio * sample.later_costs
                target = sample.target + sample.later_costs - later
                self.fitter.memory[i] = replace(sample, target=target, later_costs=later)
