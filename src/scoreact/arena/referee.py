"""The referee measures every rule alike: the problem's own SDE, solver and grid, on noise that no training saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..control.policy import Policy
from ..control.rollout import rollout
from ..dynamics.samplers import sampler_by_name
from ..dynamics.sde import SDE
from ..dynamics.solvers import SOLVERS
from ..evaluation.evaluate import TRANSFER, evaluate
from ..evaluation.optimum import estimate_optimum
from ..recipes.base import Problem
from ..rewards.check import checked
from ..sampling.draw import balanced, draw
from ..support.devices import device_of
from ..support.errors import SettingError
from ..support.files import Line, write_json
from ..support.workers import Workers
from ..training.config import Config
from ..types import Condition, Metrics
from .problems import ArenaProblem

REFERENCE_SEED = 20_000_063  # of the reference's paths that J_ref and J* come from


def heldout(policy: Policy, problem: Problem, config: Config, seed: int, judge: bool = False) -> Metrics:
    """Held-out metrics by the problem's own SDE, solver and grid, whatever the rule trained with."""
    sde, ts = _sde_and_grid(policy, config, seed)
    return evaluate(
        policy, sde, SOLVERS[config.solver], ts, checked(problem.reward), problem.prompts, config.kl_weight,
        config.heldout_samples, seed, problem.judge if judge else None, problem.features, device_of(policy.model),
    )  # fmt: skip


def _sde_and_grid(policy: Policy, config: Config, seed: int) -> tuple[SDE, Tensor]:
    schedule = policy.reference.schedule
    ts = config.times(schedule, torch.Generator().manual_seed(seed))
    return config.sde(schedule), ts


@torch.no_grad()
def transfer(policy: Policy, problem: Problem, config: Config, samples: int, seed: int) -> dict[str, float]:
    """Mean reward with other solvers and step counts than training's, {"ddim 20": ...}; {} for no samples."""
    if samples == 0:
        return {}
    names = balanced(problem.prompts, samples, torch.Generator().manual_seed(seed))
    found = {}
    for solver, steps in TRANSFER:
        ts = config.times(policy.schedule, steps=steps)
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
        found += checked(built.reward)(policy.decode(path.xs[-1]), condition).tolist()
    return {
        "rewards": found,
        "prompts": names,
        "start": heldout(policy, built, config, heldout_seed, judge=True),
        "transfer": transfer(policy, built, config, transfer_samples, heldout_seed),
    }


def yardsticks(
    folder: Path,
    problems: Sequence[ArenaProblem],
    common: Mapping[str, Any],
    transfer_samples: int,
    heldout_seed: int,
    workers: Workers,
) -> dict[str, Line]:
    """`measure` of each problem by name, kept in yardsticks/NAME.json: measured once for all rules, anew for other settings.

    Raises SettingError where the folder knows another problem of that name, or one cannot be measured.
    """
    (folder / "yardsticks").mkdir(exist_ok=True)
    found: dict[str, Line] = {}
    todo = []
    for problem in problems:
        path = folder / "yardsticks" / f"{problem.name}.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if stored is not None and stored["problem"] != json.loads(json.dumps(asdict(problem))):
            raise SettingError(f"{folder} knows another problem named {problem.name}; rename it, or give another out.")
        if stored is not None and stored.get("settings", common) == json.loads(json.dumps(common)):
            found[problem.name] = stored
        else:
            todo.append(problem)
    tasks = [(problem, common, transfer_samples, heldout_seed) for problem in todo]
    for index, outcome in workers.map(measure, tasks):
        problem = todo[index]
        if "failed" in outcome:
            raise SettingError(f"problem {problem.name} cannot be measured: {outcome['failed']}")
        found[problem.name] = {"problem": asdict(problem), "settings": dict(common), **outcome}
        write_json(folder / "yardsticks" / f"{problem.name}.json", found[problem.name])
    return found


def optimum_of(yardstick: Mapping[str, Any], problem: Problem, kl_weight: float) -> Metrics:
    """J_ref and J* (`objective/J_star_exact` where the problem has a closed form) for a price of KL.

    objective/J_star is the estimate on the referee's own grid, which no policy can exceed there.
    """
    found = estimate_optimum(torch.tensor(yardstick["rewards"]), Condition(yardstick["prompts"]), kl_weight)
    if problem.optimum is not None:
        found["objective/J_star_exact"] = problem.optimum(kl_weight)
    return found
