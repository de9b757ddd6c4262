"""Update rules. Each is two functions: `prepare` (paths and their rewards -> rows) and `loss` (a minibatch of them).

One file a rule, found by the `RULES` it defines; its settings are the fields made by `setting`. A rule knows policies,
values and advantages; it does not know optimisers, devices or files.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..control.critic import Critic
from ..control.policy import Policy
from ..control.transitions import Batch, Paths, Rows, chunks, shift_of
from ..dynamics.sde import SDE
from ..dynamics.solvers import Solver, step_of
from ..support.errors import SettingError
from ..support.settings import fields_of
from ..types import Condition, Metrics


@dataclass
class Rule:
    """What the trainer needs of a rule, and what it gives it. A rule overrides `prepare` and `loss`, and says what it is.

    reward: decoded samples [B, ...] and condition -> [B], counted; only rules that ask for its gradient call it.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}  # settings of the run (fields of Config) that its paper uses
    search: ClassVar[Mapping[str, Any]] = {}  # own settings worth tuning: (low, high, "log" or "linear"), or choices
    kl_term: ClassVar[bool] = True  # kl_weight holds it to the reference (where a setting of its own does not end that)
    fits_value: ClassVar[bool] = False  # has a `critic`, which the reference's first paths teach already
    reads_reference: ClassVar[bool] = True  # False: rollouts need not ask the pretrained model, and report no path KL
    differentiates_reward: ClassVar[bool] = False
    transitions_only: ClassVar[bool] = True  # its rows are a Batch, so that a step's path KL can be bounded
    minimiser: ClassVar[str] = "adam"  # or natural_gradient
    off_policy: ClassVar[bool] = False  # what it learns from an older policy's paths leads to the same optimum

    policy: Policy
    sde: SDE
    solver: Solver
    critic: Critic | None = None
    kl_weight: float = 1.0
    reward: Callable[[Tensor, Condition], Tensor] | None = None
    metrics: Metrics = field(default_factory=dict)  # of the last `prepare`
    own_rows: bool = False  # True: `rows_for` instead of a rollout, rewards and `prepare`

    def __post_init__(self) -> None:
        """Settings that are names, checked also where a rule is made by hand. Raises ValueError with the known ones."""
        for f, hint in fields_of(type(self)):
            known, given = typing.get_args(hint), getattr(self, f.name)
            if typing.get_origin(hint) is Literal and given not in known:
                raise SettingError(f"unknown {f.name} {given!r}. Known: {', '.join(known)}.")

    def compares_samples(self) -> bool:
        """Whether it learns from the samples of a prompt against each other, within a batch: one alone then teaches nothing."""
        return False

    def stochastic_steps(self, steps: int, generator: torch.Generator) -> Tensor | None:
        """[steps] bool: the steps of the next rollout that are drawn from the SDE, the others from the policy's ODE.

        None: all of them.
        """
        return None

    def behaviour(self) -> Policy:
        """Whose paths the next rollout draws: the policy's own, unless the rule keeps another."""
        return self.policy

    def rows_for(self, prompts: Sequence[str], ts: Tensor, generator: torch.Generator) -> Rows:
        """Rows that need no rollout, one for each prompt of a batch, on the grid ts [N + 1]; asked for with `own_rows`."""
        raise NotImplementedError

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Rows:
        """What to learn from paths and their rewards; `rate` in (0, 1] scales a critic's learning rate. No graph is kept."""
        raise NotImplementedError

    def loss(self, rows: Any) -> tuple[Tensor, Metrics]:
        """The loss of a minibatch (to be minimised) and what to report."""
        raise NotImplementedError

    def moved(self) -> None:
        """Told after each iteration's change of the policy."""

    def shift(self, batch: Batch) -> Tensor:
        """How far the policy's mean is from the behaviour's, in units of the noise: [M, *D]."""
        return shift_of(self.policy, self.sde, self.solver, batch)

    @torch.no_grad()
    def shift_in_parts(self, batch: Batch) -> Tensor:
        """`shift` of any number of transitions, without gradient."""
        return torch.cat([self.shift(batch[rows]) for rows in chunks(batch.t0)])

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume besides the value network: nested tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise SettingError(f"{type(self).__name__} keeps no state, got {sorted(state)}.")


def steps_that_act(rule: Rule, ts: Tensor) -> Tensor:
    """[N] bool: the same on the grid ts [N + 1], before any path is drawn."""
    t0, t1 = ts[:-1], ts[1:]
    std = step_of(rule.sde, rule.solver, torch.zeros_like(t0), t0, t1, torch.zeros_like(t0)).std
    return (std > 0) & (t0 < rule.policy.act_until)
