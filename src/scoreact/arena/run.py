"""One run of the arena: the problems, a rule trained within a budget, and the referee that measures every rule alike.

A budget is network calls (samples through the policy, the reference and the value network, forward passes) and reward
calls. A run iterates until the next iteration would exceed either; an iteration that turns out to is taken back, so that
no result ever used more. Held-out evaluations, the same for every rule (the problem's own SDE, solver and grid, noise
that no training saw), are not counted. Knows trainers and problems; does not know other runs or files.
"""

from __future__ import annotations

import dataclasses
import time

from ..control.policy import Policy
from ..evaluation.optimum import recovered
from ..support.files import Line
from ..training.trainer import Trainer
from ..types import Metrics
from .budget import counts, planned_iterations, spent, take_back
from .problems import Job
from .referee import heldout, optimum_of, transfer


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
            take_back(trainer, kept, before, len(costs))
            break
        after = spent(trainer)
        if any(s > b for s, b in zip(after, budget, strict=True)):
            if not costs:
                raise ValueError(
                    f"{job.rule} on {job.problem.name} needs {after[0]} network calls and {after[1]} reward calls for its "
                    f"first iteration, but the budget is {budget[0]} and {budget[1]}; raise it, or lower batch_size."
                )
            take_back(trainer, kept, before, len(costs))
            break
        seconds += clock() - began
        costs.append((after[0] - before[0], after[1] - before[1]))
        trainer.config = dataclasses.replace(
            trainer.config, iterations=planned_iterations(trainer, after, budget, costs[-3:])
        )
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
