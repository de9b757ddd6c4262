"""One run of the arena: the problems, a rule trained within a budget, and the referee that measures every rule alike.

A budget is network calls (samples through the policy, the reference and the value network, forward passes) and reward
calls. A run iterates until the next iteration would exceed either; an iteration that turns out to is taken back, so that
no result ever used more. Held-out evaluations, the same for every rule (the problem's own SDE, solver and grid, noise
that no training saw), are not counted. Knows trainers and problems; does not know other runs or files.
"""

from __future__ import annotations

import dataclasses
import time

from ..evaluation.optimum import recovered
from ..recipes.base import Problem
from ..support.errors import SettingError
from ..support.files import Line
from ..training.loop import Hook, Stop, training_loop
from ..training.trainer import Trainer
from ..types import Metrics
from .budget import counts, planned_iterations, spent, take_back
from .problems import Job
from .referee import heldout, optimum_of, transfer


class WithinBudget(Hook):
    """Ends a run where its next iteration would exceed the budget; one that did is taken back. Draws the curve meanwhile."""

    def __init__(self, job: Job, trainer: Trainer, problem: Problem) -> None:
        self.job, self.problem = job, problem
        self.referee = job.problem.config({**job.common, "kl_weight": job.kl_weight})
        self.reference = optimum_of(job.yardstick, problem, job.kl_weight)
        self.start: Metrics = job.yardstick["start"]
        self.budget = job.network_calls, job.reward_calls
        # CPU seconds: other processes on the machine do not enter
        self.clock = time.process_time if trainer.device.type == "cpu" else time.perf_counter
        self.seconds = 0.0
        self.costs: list[tuple[int, int]] = []  # network and reward calls of each iteration
        self.over = False
        self.curve = [{**self.point(trainer, self.start), "network_calls": 0, "reward_calls": 0}]

    def point(self, trainer: Trainer, found: Metrics) -> Line:
        """A held-out evaluation beside what was spent by then."""
        network, reward = spent(trainer)
        return {
            "iteration": trainer.iteration, "network_calls": network, "reward_calls": reward, "seconds": self.seconds,
            "J": found["objective/J"], "J_se": found["objective/J_se"], "reward": found["reward/heldout"],
            "kl": found["policy/kl"], "diversity": found["sample/diversity"],
            "recovered": recovered(found["objective/J"] - self.start["objective/J"], self.reference),
        }  # fmt: skip

    def look(self, trainer: Trainer, judge: bool = False) -> Metrics:
        """The referee's held-out evaluation of the averaged policy."""
        return heldout(trainer.averaged(), self.problem, self.referee, self.job.heldout_seed, judge)

    def look_at_reference(self, trainer: Trainer) -> None:
        """What a rule with a critic learns first, at its cost."""
        began = self.clock()
        trainer.look_at_reference()
        self.seconds = self.clock() - began
        self.curve.append(self.point(trainer, self.start))  # calls spent, and the policy still where it was

    def before(self, trainer: Trainer) -> Stop | None:
        self.spent, self.finished = spent(trainer), False
        if self.costs:
            least = map(min, zip(*self.costs, strict=True))
            if any(s + c > b for s, c, b in zip(self.spent, least, self.budget, strict=True)):
                return Stop()
        self.kept = {name: p.detach().clone() for name, p in trainer.average.model.state_dict().items()}
        self.began = self.clock()
        return None

    def iteration(self, trainer: Trainer, metrics: Metrics) -> None:
        job, after = self.job, spent(trainer)
        self.over = any(s > b for s, b in zip(after, self.budget, strict=True))
        if self.over:
            if not self.costs:
                raise SettingError(
                    f"{job.rule} on {job.problem.name} needs {after[0]} network calls and {after[1]} reward calls for its "
                    f"first iteration, but the budget is {self.budget[0]} and {self.budget[1]}; raise it, or lower batch_size."
                )
            self._take_back(trainer)
            return
        self.seconds += self.clock() - self.began
        self.finished = True
        self.costs.append((after[0] - self.spent[0], after[1] - self.spent[1]))
        planned = planned_iterations(trainer, after, self.budget, self.costs[-3:])
        trainer.config = dataclasses.replace(trainer.config, iterations=planned)

    def failed(self, trainer: Trainer, error: Exception) -> Stop | None:
        if self.over:
            return Stop() if self.costs else None
        if not self.costs:
            return None
        said = " ".join(str(error).split())
        if self.finished:  # its path KL is what went too far
            return Stop(f"diverged at iteration {trainer.iteration}: {said}")
        self._take_back(trainer)
        return Stop(f"diverged at iteration {len(self.costs) + 1}: {said}")

    def after(self, trainer: Trainer) -> Stop | None:
        if self.over:
            return Stop()
        share = max(s / b for s, b in zip(spent(trainer), self.budget, strict=True))
        if share >= sum(p["iteration"] > 0 for p in self.curve) / self.job.points + 1 / self.job.points:
            self.curve.append(self.point(trainer, self.look(trainer)))
        return None

    def _take_back(self, trainer: Trainer) -> None:
        take_back(trainer, self.kept, self.spent, len(self.costs))


def run_one(job: Job) -> Line:
    """Train within the budget; the line of results. Raises ValueError when not one iteration fits."""
    begin = time.perf_counter()
    problem, config = job.problem.build(job.seed), job.config()
    trainer = Trainer(problem.model, problem.reward, problem.prompts, problem.value_network, config)
    hook = WithinBudget(job, trainer, problem)
    trainer.reference = hook.reference
    if trainer.algorithm.critic or trainer.surrogate is not None or config.rule.get("reuse_reference", 0):
        hook.look_at_reference(trainer)
    stop = training_loop(trainer, [hook])
    stopped = stop.reason if stop is not None else None
    try:
        final = hook.look(trainer, judge=True)
        last = hook.point(trainer, final)
    except ValueError as error:  # weights that are not finite: what was seen last counts
        seen = {**hook.curve[-1], **counts(spent(trainer)), "seconds": hook.seconds}
        stopped, final, last = stopped or str(error), {}, seen
    curve = [p for p in hook.curve if p["iteration"] < trainer.iteration] + [last]
    samples = job.transfer_samples
    return {
        "rule": job.rule, "problem": job.problem.name, "kl_weight": job.kl_weight, "seed": job.seed,
        "key": job.key, "tuned": job.tuned, "settings": {**job.common, **job.settings}, "config": config.to_dict(),
        "budget": counts(hook.budget),
        "yardstick": {**hook.reference, "start": hook.start, "transfer": job.yardstick["transfer"]},
        "iterations": trainer.iteration, "curve": curve, "final": final,
        **{k: last[k] for k in ("recovered", "J", "reward", "kl", "diversity", "network_calls", "reward_calls", "seconds")},
        "transfer": transfer(trainer.averaged(), problem, hook.referee, samples, job.heldout_seed) if final else {},
        "stopped": stopped, "wall_seconds": time.perf_counter() - begin,
    }  # fmt: skip
