"""Update rules. Each is two functions: `prepare` (a trajectory and rewards -> rows) and `loss` (a minibatch of them).

One file a rule, found by the `RULES` it defines; its settings are the fields made by `setting`. A rule knows policies,
values and advantages; it does not know optimisers, devices or files.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from .. import girsanov
from ..config import Config, fields_of, setting
from ..names import did_you_mean
from ..policy import Policy
from ..prediction import PREDICTIONS, convert
from ..rollout import Trajectory, step_of
from ..schedule import Schedule
from ..sde import SDE
from ..solvers import Solver, module_at
from ..types import Condition, Metrics, expand
from ..value import ValueFit

CHUNK = 1024  # rows at a time outside of the loss: bounds the memory of a network call or a graph
TEMPERATURES = {"one": 0.0, "root_dimensions": 0.5, "dimensions": 1.0}  # the power of the number of data dimensions


@dataclass(frozen=True)
class Rows:
    """What a `loss` looks at: a field that is a tensor, a Condition or Rows has one row an item; others are shared."""

    def __len__(self) -> int:
        return len(next(v for v in vars(self).values() if isinstance(v, Tensor)))

    def __getitem__(self, index: Tensor) -> Self:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {name: v[index] for name, v in values.items() if isinstance(v, Tensor | Condition | Rows)}
        return type(self)(**{**values, **rows})

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Self]:
        """Every row once, in random order, `size` at a time (the last may be smaller)."""
        device = next(v for v in vars(self).values() if isinstance(v, Tensor)).device
        for index in torch.split(torch.randperm(len(self), generator=generator, device=device), size):
            yield self[index]


@dataclass(frozen=True)
class Batch(Rows):
    """Transitions of a batch of paths, flattened: M = acting steps x paths. What most rules look at."""

    t0: Tensor  # [M]
    t1: Tensor  # [M]
    x: Tensor  # [M, *D] state at t0
    noise: Tensor  # [M, *D] the step's standard normal
    mean: Tensor  # [M, *D] of the behaviour's kernel
    std: Tensor  # [M]
    control: Tensor  # [M, *D] behaviour against reference, in units of the noise (u sqrt(dt))
    advantage: Tensor  # [M]
    target: Tensor  # [M, *D] where a rule wants the control to be; what it means is the rule's
    condition: Condition
    steps: int  # acting steps a path: a sum over a path is `steps` times the mean over transitions


@dataclass
class Rule:
    """What the trainer needs of a rule, and what it gives it. A rule overrides `prepare` and `loss`, and says what it is.

    reward: decoded samples [B, ...] and condition -> [B], counted; only rules that ask for its gradient call it.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}  # settings of the run (fields of Config) that its paper uses
    search: ClassVar[Mapping[str, Any]] = {}  # own settings worth tuning: (low, high, "log" or "linear"), or choices
    kl_term: ClassVar[bool] = True  # kl_weight holds it to the reference (where a setting of its own does not end that)
    critic: ClassVar[bool] = False  # fits `value`; the reference's first paths then teach it
    reads_reference: ClassVar[bool] = True  # False: rollouts need not ask the pretrained model, and report no path KL
    differentiates_reward: ClassVar[bool] = False
    transitions_only: ClassVar[bool] = True  # its rows are a Batch, so that a step's path KL can be bounded
    minimiser: ClassVar[str] = "adam"  # or natural_gradient

    policy: Policy
    sde: SDE
    solver: Solver
    value: ValueFit | None = None
    kl_weight: float = 1.0
    reward: Callable[[Tensor, Condition], Tensor] | None = None
    metrics: Metrics = field(default_factory=dict)  # of the last `prepare`
    own_rows: bool = False  # True: `rows_for` instead of a rollout, rewards and `prepare`

    def __post_init__(self) -> None:
        """Settings that are names, checked also where a rule is made by hand. Raises ValueError with the known ones."""
        for f, hint in fields_of(type(self)):
            known, given = typing.get_args(hint), getattr(self, f.name)
            if typing.get_origin(hint) is Literal and given not in known:
                raise ValueError(f"unknown {f.name} {given!r}. Known: {', '.join(known)}.")

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

    def prepare(self, trajectory: Trajectory, rewards: Tensor, generator: torch.Generator, rate: float) -> Rows:
        """What to learn from paths and their rewards [B]; `rate` in (0, 1] scales learning rates. No graph is kept."""
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
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}.")


@functools.cache
def rules() -> dict[str, type[Rule]]:
    """Every rule by name: the `RULES` of each module in this package."""
    found: dict[str, type[Rule]] = {}
    for module in pkgutil.iter_modules(__path__):
        found.update(importlib.import_module(f"{__name__}.{module.name}").RULES)
    return found


def find_rule(name: str) -> type[Rule]:
    """A rule by name, or the user's own class as 'file.py:Class' or 'module:Class'. Raises ValueError."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        if name not in rules():
            known = ", ".join(rules())
            raise ValueError(f"algorithm is {name!r}; known: {known}, or file.py:Class.{did_you_mean(name, rules())}")
        return rules()[name]
    try:
        found = getattr(module_at(place), attribute)
    except Exception as error:  # whatever a user's file does when it is run
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"algorithm {name!r} cannot be loaded ({reason}). Give file.py:Class or module:Class."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise ValueError(f"algorithm {name!r} is {found!r}; expected a subclass of scoreact.algorithms.Rule.")
    missing = [part for part in ("prepare", "loss") if getattr(found, part) is getattr(Rule, part)]
    if missing:
        raise ValueError(
            f"algorithm {name!r} has no {' and no '.join(missing)} of its own; a rule is these two functions."
        )
    clash = {f.name for f, _ in fields_of(found)} & {f.name for f, _ in fields_of(Config)}
    if clash:
        raise ValueError(
            f"algorithm {name!r} has a setting {min(clash)!r}, which is one of the run; give it another name."
        )
    return found


@dataclass(frozen=True)
class Noised(Rows):
    """Samples noised again, M = samples x grid steps looked at. What most forward-process rules look at."""

    t0: Tensor  # [M]
    t1: Tensor  # [M] where the step from t0 would end
    x: Tensor  # [M, *D] at t0
    target: Tensor  # [M, *D] the score of x given its sample
    condition: Condition
    steps: int  # of the grid: a sum over a path is `steps` times the mean over rows


@dataclass
class ForwardRule(Rule):
    """A rule that sees samples, not how they were drawn: it noises them again and regresses the score (denoising).

    The end of a path is a sample at time e = ts[-1], little noise but some. It goes back by the noising path's own law
    (`noising`), so that regressing the score on -noise / s gives the score of the noised law of x_e, whatever e is. t are
    the times of the rollout's grid at which the policy acts: one draw a step and sample, or `draws` of them.
    """

    reads_reference = False
    transitions_only = False

    draws: int = setting(0, "steps of the grid, at random, at which each sample is denoised; 0 is all of them", 0)
    sampling: Literal["sde", "ode"] = setting("sde", "rollouts by the SDE or by its probability-flow ODE")

    def stochastic_steps(self, steps: int, generator: torch.Generator) -> Tensor | None:
        return torch.zeros(steps, dtype=torch.bool) if self.sampling == "ode" else None

    def acting_times(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """t0 and t1 of the grid's steps that are the policy's and have noise in the SDE, each [steps]."""
        keep = steps_that_act(self, ts)
        return ts[:-1][keep], ts[1:][keep]

    def times(self, ts: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        """t0 and t1 [count, K] at which to look at `count` samples, no step twice at one; the grid's number of steps."""
        t0, t1 = self.acting_times(ts)
        order = torch.rand(count, len(t0), generator=generator, device=ts.device).argsort(1)
        order = order[:, : self.draws or len(t0)]
        return t0[order], t1[order], len(t0)

    def renoised(self, x_end: Tensor, end: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x at times t [B, K] given the sample x_end [B, *D] at time `end`, and its score: noise, x, score [B, K, *D]."""
        kept, std = noising(self.sde.schedule, end, t)
        return expand(kept, noise) * x_end.unsqueeze(1) + expand(std, noise) * noise, -noise / expand(std, noise)

    def noised(
        self, x_end: Tensor, ts: Tensor, condition: Condition, generator: torch.Generator
    ) -> tuple[Noised, Tensor]:
        """Rows of the samples x_end [B, *D], and [M] which sample each is of."""
        t0, t1, steps = self.times(ts, len(x_end), generator)
        shape = (*t0.shape, *x_end.shape[1:])
        noise = torch.randn(shape, generator=generator, device=x_end.device, dtype=x_end.dtype)
        x, target = self.renoised(x_end, ts[-1], t0, noise)
        index = torch.arange(len(x_end), device=x_end.device).repeat_interleave(t0.shape[1])
        rows = Noised(t0.flatten(), t1.flatten(), x.flatten(0, 1), target.flatten(0, 1), condition[index], steps)
        return rows, index

    def error(self, weighting: str, t0: Tensor, t1: Tensor, x: Tensor, score: Tensor, other: Tensor) -> Tensor:
        """score - other [M, *D] in the units of `weighting`: a prediction's (epsilon, velocity, x0, v, score), or "kl".

        "kl": the difference of the step's means in units of its noise, u sqrt(dt), so that half its square, summed over
        a path, is the path KL.
        """
        if weighting == "kl":
            return step_of(self.sde, self.solver, score, t0, t1, x).shift(
                step_of(self.sde, self.solver, other, t0, t1, x)
            )
        kind, schedule = PREDICTIONS[weighting], self.sde.schedule
        one, two = (convert(PREDICTIONS["score"], kind, schedule, t0, x, value) for value in (score, other))
        return one - two


def noising(schedule: Schedule, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """r and s of the noising path's law back from a time `end` to earlier times t, in t's shape:

    x_t | x_end ~ N(r x_end, s^2 I),   r = alpha(t) / alpha(end),   s^2 = sigma(t)^2 - r^2 sigma(end)^2.
    """
    kept = schedule.alpha(t) / schedule.alpha(end)
    return kept, (schedule.sigma(t) ** 2 - (kept * schedule.sigma(end)) ** 2).clamp(min=0).sqrt()


def chunks(rows: Tensor) -> Sequence[Tensor]:
    """Indices of the rows of a tensor, CHUNK at a time."""
    return torch.split(torch.arange(len(rows), device=rows.device), CHUNK)


@torch.no_grad()
def in_parts(
    function: Callable[[Tensor, Tensor, Condition], Tensor], t: Tensor, x: Tensor, condition: Condition
) -> Tensor:
    """function(t [M], x [M, ...], condition) -> [M, ...], a score or a value, without gradient at any number of states."""
    return torch.cat([function(t[i], x[i], condition[i]) for i in chunks(t)])


def flatten(trajectory: Trajectory, keep: Tensor) -> Batch:
    """The transitions of the steps named by `keep` (indices into the N steps), advantage and target zero."""
    n, b = len(keep), trajectory.xs.shape[1]
    t, x, condition = states(trajectory, keep)
    return Batch(
        t0=t,
        t1=trajectory.ts[keep + 1].repeat_interleave(b),
        x=x,
        noise=trajectory.noise[keep].flatten(0, 1),
        mean=trajectory.means[keep].flatten(0, 1),
        std=trajectory.std[keep].repeat_interleave(b),
        control=trajectory.controls[keep].flatten(0, 1),
        advantage=torch.zeros_like(t),
        target=torch.zeros_like(x),
        condition=condition,
        steps=n,
    )


def acting_steps(trajectory: Trajectory) -> Tensor:
    """Indices of the steps that are actions."""
    return torch.nonzero(trajectory.acts).flatten()


def steps_that_act(rule: Rule, ts: Tensor) -> Tensor:
    """[N] bool: the same on the grid ts [N + 1], before any path is drawn."""
    t0, t1 = ts[:-1], ts[1:]
    std = step_of(rule.sde, rule.solver, torch.zeros_like(t0), t0, t1, torch.zeros_like(t0)).std
    return (std > 0) & (t0 < rule.policy.act_until)


def sampled_costs(trajectory: Trajectory, kl_weight: float) -> Tensor:
    """Costs of the steps counted as sampled log-ratios to the reference, in units of the reward, [N, B]."""
    pairs = zip(trajectory.controls, trajectory.noise, strict=True)
    return torch.stack([kl_weight * girsanov.stochastic_cost(w, z) for w, z in pairs])


def states(trajectory: Trajectory, keep: Tensor) -> tuple[Tensor, Tensor, Condition]:
    """t [M], x [M, *D] and condition of the states before the named steps, flattened."""
    b = trajectory.xs.shape[1]
    t = trajectory.ts[keep].repeat_interleave(b)
    return t, trajectory.xs[keep].flatten(0, 1), trajectory.condition[torch.arange(b).repeat(len(keep))]


def shift_of(policy: Policy, sde: SDE, solver: Solver, batch: Batch) -> Tensor:
    """(policy's mean - behaviour's mean) / std at the batch's states, [M, *D]: d sqrt(dt), exactly 0 if unchanged."""
    score = policy.score(batch.t0, batch.x, batch.condition)
    mean = step_of(sde, solver, score, batch.t0, batch.t1, batch.x).mean
    return (mean - batch.mean) / expand(batch.std, mean)


def surrogate(log_ratio: Tensor, batch: Batch, clip_range: float, temperature: str = "one") -> tuple[Tensor, Metrics]:
    """PPO's clipped objective: T min(r A, clip(r, 1 +- clip_range sqrt(dt)) A) with r = exp(log_ratio / T), [M]; and metrics.

    The factor T in front keeps the gradient at ratio 1 whatever T is; T decides when clipping begins. A log-ratio's
    spread is |shift|, the root of twice the step's KL, so with T = 1 ("one", the exact ratio) clipping bounds that KL
    at any dimension, as the trainer's max_kl does: the default. With T the root of the dimension it bounds the mean
    shift of one number of the data, and lets the KL grow with the dimension.
    """
    heat = batch.x[0].numel() ** TEMPERATURES[temperature]
    ratio = (log_ratio / heat).exp()
    clip = (clip_range * (batch.t1 - batch.t0).sqrt()).clamp(max=0.99)
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    gain = heat * torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
    away = (ratio.detach() - 1).abs()
    return gain, {
        "policy/clip_fraction": float((away > clip).float().mean()),
        "policy/ratio_deviation": float(away.max()),
    }
