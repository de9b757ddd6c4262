"""One run of the arena: the problems, a rule trained within a budget, and the referee that measures every rule alike.

A budget is network calls (samples through the policy, the reference and the value network, forward passes) and reward
calls. A run iterates until the next iteration would exceed either; an iteration that turns out to is taken back, so that
no result ever used more. Held-out evaluations, the same for every rule (the problem's own SDE, solver and grid, noise
that no training saw), are not counted. Knows trainers and problems; does not know other runs or files.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import rewards
from .algorithms import find_rule
from .checkpoint import Line
from .config import Config, updated
from .evaluation import TRANSFER, balanced, draw, estimate_optimum, evaluate, recovered
from .models import device_of
from .names import known_name
from .policy import Policy
from .recipes import Problem, recipes
from .rollout import rollout
from .schedule import GRIDS
from .sde import NOISES, SDE
from .solvers import SOLVERS, sampler_by_name
from .trainer import Trainer
from .types import Condition, Metrics

TUNING_SEEDS = 10_000_000  # seeds from here on are tuning's
HELDOUT = {"bench": 20_000_003, "tune": 20_000_033}  # seeds of the referee's noise
REFERENCE_SEED = 20_000_063  # of the reference's paths that J_ref and J* come from


@dataclass(frozen=True)
class ArenaProblem:
    """A recipe with options, a reward and settings, all plain data, and its budget where none is given."""

    name: str
    recipe: str
    network_calls: int
    reward_calls: int
    differentiable: bool = False  # whether the reward has a gradient; rules that need one are skipped elsewhere
    options: dict[str, Any] = field(default_factory=dict)
    reward: str | None = None  # instead of the recipe's: as for `rewards.load`
    reward_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # fields of Config, where they depart from the recipe's
    reference_samples: int = 20_000  # for J_ref and J*

    def build(self, seed: int) -> Problem:
        """Freshly built; networks draw their first weights from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            problem = recipes()[self.recipe].build(**self.options)
        if self.reward is None:
            return problem
        reward = rewards.load(self.reward, **self.reward_options)
        return dataclasses.replace(problem, reward=reward, optimum=None)

    def config(self, settings: Mapping[str, Any]) -> Config:
        """The referee's settings: the recipe's, the problem's, and what of `settings` is no rule's own."""
        own = {f.name for f in dataclasses.fields(Config)} - {"rule", "algorithm"}
        base = updated(recipes()[self.recipe].config, {"device": "cpu", **self.settings}, self.name)
        # no rule's settings: what binds a rule does not bind the referee
        return updated(base, {**{k: v for k, v in settings.items() if k in own}, "rule": {}}, self.name)


# on pictures: half a minute of one core
PICTURES = {"batch_size": 128, "reference_batches": 5, "value": "linear"}
# on points: 60 iterations of `ctrl`
PROBLEMS = {
    problem.name: problem
    for problem in (
        ArenaProblem("gaussian-2d", "gaussian", 3_000_000, 30_720, True),
        ArenaProblem("gaussian-16d", "gaussian", 3_000_000, 30_720, True, {"dim": 16}),
        ArenaProblem("fashion-plain", "plain", 30_000, 1_536, settings=PICTURES, reference_samples=5_120),
        ArenaProblem(
            "fashion-classifier", "classifier", 30_000, 1_536, True, reference_samples=5_120,
            # at a price of 1 a nat there is next to nothing to gain: most pictures are of their class already
            settings={**PICTURES, "kl_weight": 0.1},
        ),
        ArenaProblem(
            "fashion-jpeg", "plain", 30_000, 1_536, reward="jpeg_compressibility", reference_samples=5_120,
            # beta: 80 % of the spread of the size within a class, in kB; the size is no log-probability
            settings={**PICTURES, "kl_weight": 0.04, "value_loss": "soft"},
        ),
        ArenaProblem("series", "series", 3_000_000, 30_720, True),
    )
}  # fmt: skip


def known_problem(problem: str | ArenaProblem) -> ArenaProblem:
    """The problem of this name, or the problem itself. Raises ValueError with the names there are."""
    if isinstance(problem, ArenaProblem):
        return problem
    return PROBLEMS[known_name(problem, PROBLEMS, "unknown problem")]


def skips(rule: str, problem: ArenaProblem) -> str | None:
    """Why a rule does not meet a problem, or None."""
    if find_rule(rule).differentiates_reward and not problem.differentiable:
        return f"{rule} follows the reward's gradient, and the reward of {problem.name} has none."
    return None


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: everything that decides its outcome."""

    rule: str
    problem: ArenaProblem
    seed: int
    kl_weight: float
    network_calls: int
    reward_calls: int
    common: dict[str, Any] = field(default_factory=dict)  # settings of every run, the referee's too
    settings: dict[str, Any] = field(default_factory=dict)  # of this rule on this problem: tuned ones
    tuned: bool = False
    points: int = 8  # held-out evaluations on the way
    transfer_samples: int = 200
    heldout_seed: int = HELDOUT["bench"]
    yardstick: dict[str, Any] = field(default_factory=dict)  # what `measure` found

    def config(self) -> Config:
        """The settings of training. Raises ValueError for what does not fit."""
        base = updated(recipes()[self.problem.recipe].config, {"device": "cpu", **self.problem.settings})
        changes = {**self.common, **self.settings, "algorithm": self.rule, "kl_weight": self.kl_weight}
        return updated(base, {**changes, "seed": self.seed}, f"{self.rule} on {self.problem.name}")

    @property
    def key(self) -> str:
        given = {**self.common, **self.settings}
        return json.dumps([self.rule, self.problem.name, self.kl_weight, self.seed, given], sort_keys=True)


def least_calls(config: Config) -> tuple[int, int]:
    """Network and reward calls without which no iteration can be made: the paths it learns from."""
    rule = find_rule(config.algorithm)
    rollouts = (config.reference_batches if rule.critic else 0) + (not config.rule.get("reuse_reference", 0))
    return config.batch_size * config.steps * rollouts, config.batch_size * rollouts


def check_budget(job: Job) -> None:
    """Raises ValueError where not one iteration fits."""
    least = least_calls(job.config())
    for what, given, needed in zip(("network", "reward"), (job.network_calls, job.reward_calls), least, strict=True):
        if given < needed:
            raise ValueError(
                f"{given} {what} calls are too few for one iteration of {job.rule} on {job.problem.name}, which needs "
                f"more than {needed}; raise {what}_calls, or lower batch_size or reference_batches."
            )


def split_settings(
    settings: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of all runs, and those written `rule.name`, by rule. Seed, kl_weight and iterations are the arena's."""
    common: dict[str, Any] = {}
    of_rule: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        rule, dot, name = key.rpartition(".")
        if name in ("seed", "kl_weight", "iterations", "algorithm"):
            raise ValueError(
                f"{name} cannot be a setting here: the arena chooses it (seeds, kl_weights, the budget, rules)."
            )
        if dot:
            of_rule.setdefault(known_name(rule, names, "unknown rule"), {})[name] = value
        else:
            common[key] = value
    return common, of_rule


def run_one(job: Job) -> Line:
    """Train within the budget; the line of results. Raises ValueError when not one iteration fits."""
    begin = time.perf_counter()
    problem = job.problem.build(job.seed)
    config, referee = job.config(), job.problem.config({**job.common, "kl_weight": job.kl_weight})
    trainer = Trainer(problem.model, problem.reward, problem.prompts, problem.value_network, config)
    reference = optimum_of(job.yardstick, problem, job.kl_weight)
    trainer.reference = reference
    budget = job.network_calls, job.reward_calls
    # CPU seconds: other processes on the machine do not enter
    clock = time.process_time if trainer.device.type == "cpu" else time.perf_counter
    seconds, start = 0.0, job.yardstick["start"]

    def policy() -> Policy:
        return Policy(trainer.average.model, trainer.policy.reference, trainer.config.act_until)  # type: ignore[arg-type]

    def point(found: Metrics) -> Line:
        network, reward = spent(trainer)
        return {
            "iteration": trainer.iteration, "network_calls": network, "reward_calls": reward, "seconds": seconds,
            "J": found["objective/J"], "J_se": found["objective/J_se"], "reward": found["reward/heldout"],
            "kl": found["policy/kl"], "diversity": found["sample/diversity"],
            "recovered": recovered(found["objective/J"] - start["objective/J"], reference),
        }  # fmt: skip

    def look(judge: bool = False) -> Metrics:
        return heldout(policy(), problem, referee, job.heldout_seed, judge)

    curve = [{**point(start), "network_calls": 0, "reward_calls": 0}]
    began = clock()
    if trainer.algorithm.critic or config.rule.get("reuse_reference", 0):
        trainer.look_at_reference()
        seconds = clock() - began
        curve.append(point(start))  # calls spent, and the policy still where it was
    stopped: str | None = None
    costs: list[tuple[int, int]] = []
    while True:
        before = spent(trainer)
        if costs and any(s + min(c) > b for s, c, b in zip(before, zip(*costs, strict=True), budget, strict=True)):
            break
        kept = {name: p.detach().clone() for name, p in trainer.average.model.state_dict().items()}
        began = clock()
        try:
            metrics = trainer.iterate()
        except (ValueError, RuntimeError, ArithmeticError) as error:
            if not costs:
                raise
            stopped = f"diverged at iteration {len(costs) + 1}: {' '.join(str(error).split())}"
            _take_back(trainer, kept, before, len(costs))
            break
        after = spent(trainer)
        if any(s > b for s, b in zip(after, budget, strict=True)):
            if not costs:
                raise ValueError(
                    f"{job.rule} on {job.problem.name} needs {after[0]} network calls and {after[1]} reward calls for its "
                    f"first iteration, but the budget is {budget[0]} and {budget[1]}; raise it, or lower batch_size."
                )
            _take_back(trainer, kept, before, len(costs))
            break
        seconds += clock() - began
        costs.append((after[0] - before[0], after[1] - before[1]))
        trainer.config = dataclasses.replace(trainer.config, iterations=_planned(trainer, after, budget, costs[-3:]))
        if metrics.get("policy/kl", 0.0) > config.kl_limit:
            stopped = f"diverged at iteration {trainer.iteration}: path KL is {metrics['policy/kl']:.1f} nats"
            break
        share = max(s / b for s, b in zip(after, budget, strict=True))
        if share >= sum(p["iteration"] > 0 for p in curve) / job.points + 1 / job.points:
            curve.append(point(look()))
    try:
        final = look(judge=True)
        last = point(final)
    except ValueError as error:  # weights that are not finite: what was seen last counts
        stopped, final, last = stopped or str(error), {}, {**curve[-1], **counts(spent(trainer)), "seconds": seconds}
    curve = [p for p in curve if p["iteration"] < trainer.iteration] + [last]
    return {
        "rule": job.rule, "problem": job.problem.name, "kl_weight": job.kl_weight, "seed": job.seed,
        "key": job.key, "tuned": job.tuned, "settings": {**job.common, **job.settings}, "config": config.to_dict(),
        "budget": counts(budget), "yardstick": {**reference, "start": start, "transfer": job.yardstick["transfer"]},
        "iterations": trainer.iteration, "curve": curve, "final": final,
        **{k: last[k] for k in ("recovered", "J", "reward", "kl", "diversity", "network_calls", "reward_calls", "seconds")},
        "transfer": {} if not final else transfer(policy(), problem, referee, job.transfer_samples, job.heldout_seed),
        "stopped": stopped, "wall_seconds": time.perf_counter() - begin,
    }  # fmt: skip


def spent(trainer: Trainer) -> tuple[int, int]:
    """Network calls (policy, reference, value) and reward calls so far."""
    return trainer.policy.network_calls + trainer.value.value.calls, trainer.reward.calls


def _take_back(trainer: Trainer, weights: Mapping[str, Tensor], before: tuple[int, int], iteration: int) -> None:
    """The averaged weights, counts and iteration as they were: what the result is made of."""
    trainer.average.model.load_state_dict(weights)
    trainer.policy.network_calls, trainer.reward.calls = before[0] - trainer.value.value.calls, before[1]
    trainer.iteration = iteration


def counts(pair: Sequence[int]) -> dict[str, int]:
    """Network and reward calls, by name."""
    return {"network_calls": pair[0], "reward_calls": pair[1]}


def _planned(trainer: Trainer, used: Sequence[int], budget: Sequence[int], costs: Sequence[Sequence[int]]) -> int:
    """How many iterations the run will have, as the last ones cost: the learning rates fall to 0 at its end."""
    means = [statistics.mean(c) for c in zip(*costs, strict=True)]
    left = min((b - s) / max(c, 1) for b, s, c in zip(budget, used, means, strict=True))
    return trainer.iteration + max(1, int(left))


# --- the referee -----------------------------------------------------------------------------------------------------


def heldout(policy: Policy, problem: Problem, config: Config, seed: int, judge: bool = False) -> Metrics:
    """Held-out metrics by the problem's own SDE, solver and grid, whatever the rule trained with."""
    sde, ts = _sde_and_grid(policy, config, seed)
    return evaluate(
        policy, sde, SOLVERS[config.solver], ts, rewards.checked(problem.reward), problem.prompts, config.kl_weight,
        config.heldout_samples, seed, problem.judge if judge else None, problem.features, device_of(policy.model),
    )  # fmt: skip


def _sde_and_grid(policy: Policy, config: Config, seed: int) -> tuple[SDE, Tensor]:
    schedule = policy.reference.schedule
    ts = GRIDS[config.grid](schedule, config.steps, torch.Generator().manual_seed(seed))
    return SDE(schedule, NOISES[config.noise](config.noise_scale)), ts


@torch.no_grad()
def transfer(policy: Policy, problem: Problem, config: Config, samples: int, seed: int) -> dict[str, float]:
    """Mean reward with other solvers and step counts than training's, {"ddim 20": ...}; {} for no samples."""
    if samples == 0:
        return {}
    names = balanced(problem.prompts, samples, torch.Generator().manual_seed(seed))
    grid, found = "uniform" if config.grid == "random" else config.grid, {}
    for solver, steps in TRANSFER:
        ts = GRIDS[grid](policy.schedule, steps, None)
        _, decoded = draw(policy, names, sampler_by_name(solver), ts, seed, device_of(policy.model))
        found[f"{solver} {steps}"] = float(problem.reward(decoded, policy.condition(names)).mean())
    return found


@torch.no_grad()
def measure(problem: ArenaProblem, common: Mapping[str, Any], transfer_samples: int, heldout_seed: int) -> Line:
    """The reference on a problem, once for all runs: rewards of its samples (J_ref and J* come from them), held-out start."""
    built, config = problem.build(0), problem.config(common)
    policy = Policy(built.model, built.model).to(torch.device("cpu" if config.device == "auto" else config.device))
    sde, ts = _sde_and_grid(policy, config, REFERENCE_SEED)
    generator = torch.Generator(device=device_of(policy.model)).manual_seed(REFERENCE_SEED)
    names = balanced(built.prompts, problem.reference_samples, generator)
    found: list[float] = []
    for begin in range(0, len(names), 512):
        condition = policy.condition(names[begin : begin + 512])
        path = rollout(policy, sde, SOLVERS[config.solver], ts, condition, generator, reference_only=True)
        found += rewards.checked(built.reward)(policy.decode(path.xs[-1]), condition).tolist()
    return {
        "rewards": found,
        "prompts": names,
        "start": heldout(policy, built, config, heldout_seed, judge=True),
        "transfer": transfer(policy, built, config, transfer_samples, heldout_seed),
    }


def optimum_of(yardstick: Mapping[str, Any], problem: Problem, kl_weight: float) -> Metrics:
    """J_ref and J* (`objective/J_star_exact` where the problem has a closed form) for a price of KL.

    objective/J_star is the estimate on the referee's own grid, which no policy can exceed there.
    """
    found = estimate_optimum(torch.tensor(yardstick["rewards"]), Condition(yardstick["prompts"]), kl_weight)
    if problem.optimum is not None:
        found["objective/J_star_exact"] = problem.optimum(kl_weight)
    return found
