"""The proof table: every rule against problems whose optimum is known in closed form, over seeds, with intervals.

    python benchmarks/proof.py --jobs 2 --out proof.jsonl      # all 240 runs; exits 1 if a floor is missed
    python benchmarks/proof.py --quick                         # 4 problems, 2 seeds, a few minutes

Data from a Gaussian mixture, a linear or quadratic reward, VP, Euler-Maruyama on a uniform grid. One set of settings a
rule serves all problems. Two yardsticks, both from the exact continuous-time optimum s* (the tilted mixture's score):
`exact` is s* itself on the grid; `grid` is s_ref + f_k (s* - s_ref) with the factor f_k of each step fitted to the
grid, because 10 Euler-Maruyama steps are so coarse that s* overpays for controls whose effect the grid forgets (up to
twice the KL). recovered = (J - J_ref) / (J_yardstick - J_ref), all measured on the same 20,000 noise paths, which no
training saw; it may exceed 1, as neither is the best policy. `ceiling` is the exact share for beta log E_ref exp(R /
beta) of the grid's own reference samples, which no kernel whatever can exceed. `KL` is the path KL over that of
`exact`: it must not be more than 1.2; less is no fault where J is higher (there 2 % of J's gain is 30 % of KL). `KL*` is the
path KL over that of the continuous-time optimum, -dJ*/dbeta, which no grid enters.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from scoreact.api.start import finetune
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import Schedule
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import euler_maruyama, step_of
from scoreact.evaluation.metrics import confidence_interval
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.recipes.gaussian import linear_reward, mixture, quadratic_reward
from scoreact.rewards import Quadratic
from scoreact.support.files import append_line, resume_lines
from scoreact.support.workers import Workers
from scoreact.training.config import Config, updated
from scoreact.types import Condition

RULES = ("ctrl", "ctrl_pathwise", "ctrl_trpo")
FLOORS = {"ctrl": 0.95, "ctrl_pathwise": 0.90, "ctrl_trpo": 0.90}  # of the mean over seeds
MOST_KL = 1.20
SAMPLES = 20_000
EVALUATION_SEED = 77_000_001

SETTINGS: dict[str, Any] = {
    "iterations": 40, "batch_size": 512, "solver": "euler_maruyama", "gradient_at": "next", "value_steps": 30,
    "value_batch_size": 1024, "device": "cpu",
}  # fmt: skip
# where a rule departs from the defaults of `Config`
RULE_SETTINGS: dict[str, dict[str, Any]] = {
    # the ratio's noise grows with the dimension: a smaller weight, more steps, and larger ones
    "ctrl": {"ratio_weight": 0.3, "iterations": 60, "learning_rate": 3e-3},
    "ctrl_pathwise": {},
    "ctrl_trpo": {"ratio_weight": 0.3},
}


@dataclass(frozen=True)
class Case:
    """One problem: which reward on which mixture, on which grid, at which price of KL."""

    reward: str
    dim: int
    steps: int
    kl_weight: float
    components: int = 4
    mixture_seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.reward}, d = {self.dim}, N = {self.steps}, beta = {self.kl_weight:g}"

    def parts(self) -> tuple[GaussianMixture, Quadratic, GaussianMixture]:
        """The reference, the reward, and the exact optimum."""
        base = mixture(self.dim, self.components, self.mixture_seed)
        reward = (linear_reward if self.reward == "linear" else quadratic_reward)(self.dim, self.mixture_seed)
        optimum, _ = base.tilted(reward.linear, reward.quadratic, self.kl_weight, reward.constant)
        return base, reward, optimum


@functools.cache
def optimal_kl(case: Case) -> float:
    """KL of the tilted law, -dJ*/dbeta, nats: what the optimum spends in continuous time."""
    base, reward, _ = case.parts()
    below, above = (
        base.tilted(reward.linear, reward.quadratic, scale * case.kl_weight, reward.constant)[1]
        for scale in (0.999, 1.001)
    )
    return (below - above) / (0.002 * case.kl_weight)


def cases(mixture_seed: int, components: int, quick: bool) -> list[Case]:
    grid = product(("linear", "quadratic"), (2, 16), (10,) if quick else (10, 20), (0.5,) if quick else (0.5, 2.0))
    return [Case(*row, components=components, mixture_seed=mixture_seed) for row in grid]


@dataclass(frozen=True)
class Measured:
    """Means over the evaluation's paths."""

    reward: float
    path_kl: float
    ceiling: float  # beta log E exp(R / beta) of these samples

    def objective(self, kl_weight: float) -> float:
        return self.reward - kl_weight * self.path_kl


class Rescaled(nn.Module):
    """s_ref + f_k (s* - s_ref), with one factor a step: the exact optimum, suited to a grid."""

    def __init__(self, reference: GaussianMixture, optimum: GaussianMixture, ts: Tensor) -> None:
        super().__init__()
        self.reference, self.optimum, self.ts = reference, optimum, ts
        self.moves = nn.Parameter(torch.zeros(len(ts) - 1))
        self.unit = torch.ones(len(ts) - 1)

    @property
    def schedule(self) -> Schedule:
        return self.reference.schedule

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return self.reference.prior(condition, generator)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return self.reference.condition(prompts)

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        k = int((self.ts - t[0]).abs().argmin())
        factor = 1 + self.unit[k] * self.moves[k]
        reference = self.reference.score(t, x)
        return reference + factor * (self.optimum.score(t, x) - reference)

    def decode(self, x: Tensor) -> Tensor:
        return x


def fitted(case: Case, paths: int = 2000) -> Policy:
    """The factors that maximise J on fixed noise, by L-BFGS through the whole path.

    In units of 1 / sqrt(path KL of the step) the curvature of beta KL is the same at every step.
    """
    base, reward, optimum = case.parts()
    sde, ts = SDE(base.schedule, noise_level(1.0)), uniform(base.schedule, case.steps)
    model = Rescaled(base, optimum, ts)
    policy = Policy(model, base)
    minimiser = torch.optim.LBFGS(model.parameters(), max_iter=8, line_search_fn="strong_wolfe", tolerance_change=1e-6)

    condition = base.condition([""] * paths)
    generator = torch.Generator().manual_seed(EVALUATION_SEED + 1)
    controls = rollout(policy, sde, euler_maruyama, ts, condition, generator).controls
    model.unit = 1 / (case.kl_weight * controls.square().sum(2).mean(1)).clamp(min=1e-6).sqrt()

    def loss() -> Tensor:
        generator.manual_seed(EVALUATION_SEED + 1)
        x, cost = base.prior(condition, generator), torch.zeros(paths)
        for t0, t1 in zip(ts[:-1].tolist(), ts[1:].tolist(), strict=True):
            begin, end = x.new_full((paths,), t0), x.new_full((paths,), t1)
            step = step_of(sde, euler_maruyama, policy.score(begin, x, condition), begin, end, x)
            unmoved = step_of(sde, euler_maruyama, policy.reference_score(begin, x, condition), begin, end, x)
            cost = cost + step.kl(unmoved)
            x = step.sample(torch.randn(x.shape, generator=generator))
        minimiser.zero_grad()
        negative = -(reward(x, condition) - case.kl_weight * cost).mean()
        negative.backward()  # type: ignore[no-untyped-call]
        return negative

    minimiser.step(loss)  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return policy


@functools.cache
def yardsticks(case: Case) -> tuple[Measured, Measured, Measured]:
    """The reference, the exact optimum, and the optimum suited to the grid."""
    base, reward, optimum = case.parts()
    policies = (Policy(base, base), Policy(optimum, base), fitted(case))
    reference, exact, grid = (measure(policy, case, reward) for policy in policies)
    return reference, exact, grid


def measure(policy: Policy, case: Case, reward: Quadratic) -> Measured:
    """The same noise for every policy: same generator, same draws."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    sde = SDE(policy.reference.schedule, noise_level(1.0))
    rewards, kls = [], []
    for _ in range(SAMPLES // 2000):
        condition = policy.reference.condition([""] * 2000)
        trajectory = rollout(policy, sde, euler_maruyama, uniform(sde.schedule, case.steps), condition, generator)
        rewards.append(reward(trajectory.xs[-1], condition))
        kls.append(trajectory.path_kl())
    r = torch.cat(rewards).double()
    ceiling = case.kl_weight * float(torch.logsumexp(r / case.kl_weight, 0) - math.log(len(r)))
    return Measured(float(r.mean()), float(torch.cat(kls).double().mean()), ceiling)


def run(rule: str, case: Case, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once and measure against the reference and the two yardsticks."""
    base, reward, _ = case.parts()
    problem = {"algorithm": rule, "seed": seed, "steps": case.steps, "kl_weight": case.kl_weight}
    watching = {"heldout_samples": 2, "evaluate_every": 10_000}
    config = updated(Config(), {**problem, **watching, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the networks' initial weights
        model = ResidualModel(base, case.dim)
        begin = time.perf_counter()
        result = finetune(model, reward, [""], value_network=lambda: VectorValue(2 * case.dim), config=config)
    seconds = time.perf_counter() - begin
    reference, exact, grid = yardsticks(case)
    trained = measure(result.policy, case, reward)
    j_ref, j_exact, j_grid, j = (m.objective(case.kl_weight) for m in (reference, exact, grid, trained))
    last = [line for line in result.history if "cost/reward_calls" in line][-1]
    return {
        "rule": rule, "case": asdict(case), "seed": seed, "settings": settings,
        "recovered": (j - j_ref) / (j_exact - j_ref), "recovered_grid": (j - j_ref) / (j_grid - j_ref),
        "ceiling": (reference.ceiling - j_ref) / (j_exact - j_ref), "kl_ratio": trained.path_kl / exact.path_kl,
        "J": j, "J_ref": j_ref, "J_exact": j_exact, "J_grid": j_grid,
        "path_kl": trained.path_kl, "path_kl_exact": exact.path_kl, "path_kl_grid": grid.path_kl,
        "reward_calls": last["cost/reward_calls"], "network_calls": last["cost/network_calls"], "seconds": seconds,
    }  # fmt: skip


def key(line: dict[str, Any]) -> str:
    return json.dumps([line["rule"], line["case"], line["seed"], line["settings"]], sort_keys=True)


def table(lines: Sequence[dict[str, Any]], rules: Sequence[str], problems: Sequence[Case]) -> tuple[str, list[str]]:
    """The markdown table, and a sentence for each floor that is missed."""
    rows = ["| problem | ceiling | " + " | ".join(f"{rule}: exact | grid | KL | KL*" for rule in rules) + " |"]
    rows.append("| --- |" + " ---: |" * (1 + 4 * len(rules)))
    missed = []
    for case in problems:
        cells: list[str] = []
        ceiling = math.nan
        for rule in rules:
            mine = [line for line in lines if line["rule"] == rule and line["case"] == asdict(case)]
            if not mine:
                cells += ["", "", "", ""]
                continue
            ceiling = mine[0]["ceiling"]
            mean, half = confidence_interval([line["recovered"] for line in mine])
            kl, kl_half = confidence_interval([line["kl_ratio"] for line in mine])
            grid, grid_half = confidence_interval([line["recovered_grid"] for line in mine])
            cells += [f"{100 * mean:.1f} ± {100 * half:.1f} %", f"{100 * grid:.1f} ± {100 * grid_half:.1f} %"]
            star = sum(line["path_kl"] for line in mine) / len(mine) / optimal_kl(case)
            cells += [f"{kl:.2f} ± {kl_half:.2f}", f"{star:.2f}"]
            if not mean >= FLOORS[rule]:
                missed.append(f"{rule} on {case.name}: recovered {100 * mean:.1f} %, floor {100 * FLOORS[rule]:.0f} %")
            if not kl <= MOST_KL:
                missed.append(f"{rule} on {case.name}: path KL is {kl:.2f} of the exact optimum's, at most {MOST_KL}")
        rows.append(f"| {case.name} | {100 * ceiling:.0f} % | " + " | ".join(cells) + " |")
    return "\n".join(rows), missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--seeds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="4 problems, 2 seeds")
    parser.add_argument("--mixture-seed", type=int, default=0)
    parser.add_argument("--components", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, help="JSON lines, one a run; finished runs in it are not repeated")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings to try instead")
    parser.add_argument("--only", default="", help="only problems whose name contains this")
    arguments = parser.parse_args()
    changes = {k: json.loads(v) if v[:1] in "0123456789.-" else v for k, v in (s.split("=", 1) for s in arguments.set)}
    problems = [c for c in cases(arguments.mixture_seed, arguments.components, arguments.quick)
                if arguments.only in c.name]  # fmt: skip
    seeds = arguments.seeds or (2 if arguments.quick else 5)
    settings = {rule: {**SETTINGS, **RULE_SETTINGS[rule], **changes} for rule in RULES}
    wanted = [
        (rule, case, seed, settings[rule]) for seed in range(seeds) for rule in arguments.rules for case in problems
    ]
    done = {} if arguments.out is None else {key(line): line for line in resume_lines(arguments.out)}
    lines, todo = [], []
    for task in wanted:
        line = done.get(json.dumps([task[0], asdict(task[1]), task[2], task[3]], sort_keys=True))
        if line is None:
            todo.append(task)
        else:
            lines.append(line)
    with Workers(arguments.jobs) as workers:
        for index, line in workers.map(run, todo):
            if "failed" in line:
                sys.exit(f"{todo[index][0]} {todo[index][1].name} seed {todo[index][2]}: {line['failed']}")
            lines.append(line)
            if arguments.out is not None:
                append_line(arguments.out, line)
            shares = f"{100 * line['recovered']:.1f} %, grid {100 * line['recovered_grid']:.1f} %"
            where = f"{line['rule']} {Case(**line['case']).name} seed {line['seed']}"
            done_so_far = f"{len(lines)}/{len(wanted)} {where}: {shares}, KL {line['kl_ratio']:.2f}"
            print(f"{done_so_far}, {line['seconds']:.0f} s", file=sys.stderr, flush=True)
    text, missed = table(lines, arguments.rules, problems)
    print(text)
    print(f"\n{seeds} seeds, {max(line['reward_calls'] for line in lines)} reward calls a run at most, "
          f"{sum(line['seconds'] for line in lines) / len(lines):.0f} s a run.")  # fmt: skip
    for sentence in missed:
        print(f"MISSED: {sentence}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
