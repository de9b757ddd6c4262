"""How far from the optimum `ram` rests, against beta, where everything is known: training error and bias told apart.

    python benchmarks/ram_bias.py                              # the fixed points alone, by quadrature: seconds
    python benchmarks/ram_bias.py --seeds 5 --out ram.jsonl --figure docs/results/ram.png     # and trained policies

One dimension, a rectified flow, 20 Euler-Maruyama steps with the noise of the reverse SDE. A policy is a score at 20 times
and 281 points, so that its law, its path KL and its J are sums, without sampling. The optimum on the grid is dynamic
programming over the same kernels. ram's fixed point s = s_ref + grad E[R | x_t] / beta, the mean over the policy's own
samples noised, is iterated to rest; where it does not come to rest, the table says so. Of a trained policy the same sums are
taken. Shares are of J_grid - J_ref; the exact score is the continuous-time optimum's, whose share is what the grid costs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from scoreact.api.start import finetune
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import RectifiedFlow, noising
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import euler_maruyama, step_of
from scoreact.evaluation.metrics import confidence_interval
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.rewards import Quadratic
from scoreact.support.files import append_line, resume_lines
from scoreact.support.workers import Workers
from scoreact.training.config import Config, updated
from scoreact.types import Condition

STEPS, POINTS, EDGE, ITERATIONS = 20, 281, 7.0, 200
BETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
LAWS: dict[str, tuple[list[float], list[float], list[float]]] = {  # weights, means, variances
    "Gaussian": ([1.0], [0.3], [0.5]),
    "mixture": ([0.5, 0.5], [-1.0, 1.0], [0.15, 0.15]),
}
REWARDS = {"linear": ([[0.0]], [1.0]), "quadratic": ([[0.9]], [0.8])}  # Q and a of a x - Q x^2 / 2
UNBIASED = ("Gaussian", "linear")  # nobody needs to train there
RULES: dict[str, dict[str, Any]] = {
    "ram": {"sampling": "sde"},
    "adjoint_matching": {},
}
TRAINED = {
    "steps": STEPS, "solver": "euler_maruyama", "iterations": 60, "batch_size": 128, "minibatch_size": 512,
    "learning_rate": 3e-3, "heldout_samples": 2, "evaluate_every": 10_000, "reference_batches": 1, "guard": "off",
    "device": "cpu",
}  # fmt: skip


class Measured(NamedTuple):
    """A policy by quadrature."""

    reward: float
    path_kl: float

    def objective(self, beta: float) -> float:
        return self.reward - beta * self.path_kl


class Line:
    """One problem on the line: kernels, rewards and laws at POINTS points and STEPS times, in float64."""

    def __init__(self, law: str, reward: str) -> None:
        weights, means, variances = (torch.tensor(v) for v in LAWS[law])
        self.base = GaussianMixture(
            RectifiedFlow(t_min=0.02, t_max=0.98), weights, means.unsqueeze(1), variances.reshape(-1, 1, 1)
        )
        self.reward = Quadratic(REWARDS[reward][0], linear=REWARDS[reward][1])
        self.sde, self.ts = SDE(self.base.schedule, noise_level(1.0)), uniform(self.base.schedule, STEPS).double()
        self.x = torch.linspace(-EDGE, EDGE, POINTS, dtype=torch.float64)
        self.width = float(self.x[1] - self.x[0])
        self.worth = self.reward(self.x.unsqueeze(1), Condition([""] * POINTS))
        law_ = self.base.double()
        self.start = self._normal(law_.log_prob(self.ts[:1].expand(POINTS), self.x.unsqueeze(1)).exp())
        self.reference = torch.stack([law_.score(t.expand(POINTS), self.x.unsqueeze(1))[:, 0] for t in self.ts[:-1]])
        self.base.float()

    def _normal(self, density: Tensor) -> Tensor:
        return density / density.sum()

    def means(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of the kernels, [STEPS, POINTS], and their standard deviations [STEPS]."""
        found = [
            step_of(self.sde, euler_maruyama, s.unsqueeze(1), t0.expand(POINTS), t1.expand(POINTS), self.x.unsqueeze(1))
            for s, t0, t1 in zip(scores, self.ts[:-1], self.ts[1:], strict=True)
        ]
        return torch.stack([step.mean[:, 0] for step in found]), torch.stack([step.std[0] for step in found])

    def kernel(self, mean: Tensor, std: Tensor) -> Tensor:
        """Probabilities [from, to]."""
        return torch.softmax(-0.5 * ((self.x - mean.unsqueeze(1)) / std) ** 2, dim=1)

    def measure(self, scores: Tensor) -> tuple[Measured, Tensor]:
        """Expected reward and path KL of the policy, and the law of its ends [POINTS]."""
        (mean, std), (base, _) = self.means(scores), self.means(self.reference)
        law, kl = self.start, 0.0
        for k in range(STEPS):
            kl += float((law * 0.5 * ((mean[k] - base[k]) / std[k]) ** 2).sum())
            law = law @ self.kernel(mean[k], std[k])
        return Measured(float(law @ self.worth), kl), law

    def optimum(self, beta: float) -> float:
        """J of the best means on these kernels: V_k(x) = max_y E V_{k+1}(y + std z) - beta (y - m(x))^2 / (2 std^2)."""
        base, std = self.means(self.reference)
        value = self.worth
        for k in reversed(range(STEPS)):
            ahead = self.kernel(self.x, std[k]) @ value
            gain = ahead - beta * 0.5 * ((self.x - base[k].unsqueeze(1)) / std[k]) ** 2
            best = gain.argmax(1).clamp(1, POINTS - 2)
            low, middle, high = (gain.gather(1, (best + i).unsqueeze(1))[:, 0] for i in (-1, 0, 1))
            bend, inner = high - 2 * middle + low, (middle >= high) & (middle >= low)
            top = middle - (high - low) ** 2 / (8 * bend.clamp(max=-1e-12))  # of the parabola through the three
            value = torch.where(inner, top, gain.amax(1))
        return float(self.start @ value)

    def fixed_point(self, beta: float) -> tuple[Tensor, float]:
        """ram's scores, and how much they still moved at last (root mean square of u sqrt(dt) along the paths)."""
        scores, left, rate = self.reference.clone(), math.inf, 0.7 * min(1.0, 2 * beta)
        unit, std = self.means(self.reference + 1)[0] - self.means(self.reference)[0], self.means(self.reference)[1]
        for _ in range(ITERATIONS):
            mean, laws = self.means(scores)[0], [self.start]
            for k in range(STEPS):
                laws.append(laws[-1] @ self.kernel(mean[k], std[k]))
            law, moves = laws.pop(), []
            for k, t in enumerate(self.ts[:-1]):
                kept, noise = noising(self.base.schedule, self.ts[-1], t)
                far = (self.x.unsqueeze(1) - kept * self.x) / noise
                posterior = torch.softmax(law.clamp(min=1e-290).log() - 0.5 * far**2, dim=1)
                covariance = posterior @ (self.x * self.worth) - (posterior @ self.x) * (posterior @ self.worth)
                moves.append(self.reference[k] + covariance * kept / noise**2 / beta - scores[k])
            squares = [(p * (m * u / w) ** 2).sum() for p, m, u, w in zip(laws, moves, unit, std, strict=True)]
            left = float(torch.stack(squares).sum() ** 0.5)
            scores = scores + rate * torch.stack(moves)
            if left < 1e-3:
                break
        return scores, left


def known(law: str, reward: str, beta: float) -> dict[str, Any]:
    """What needs no training: J of the reference and of the optimum on the grid, the shares of two scores between them."""
    line = Line(law, reward)
    tilted, star = line.base.tilted(line.reward.linear, line.reward.quadratic, beta, line.reward.constant)
    tilted = tilted.double()
    exact = torch.stack([tilted.score(t.expand(POINTS), line.x.unsqueeze(1))[:, 0] for t in line.ts[:-1]])
    scores, left = line.fixed_point(beta)
    found, best = {"reference": line.reference, "exact": exact, "ram": scores}, line.optimum(beta)
    measured = {name: line.measure(values)[0] for name, values in found.items()}
    j = {name: m.objective(beta) for name, m in measured.items()}
    return {
        "law": law, "reward": reward, "beta": beta, "J_ref": j["reference"], "J_grid": best, "J_star": star, "left": left,
        "exact": (j["exact"] - j["reference"]) / (best - j["reference"]),
        "fixed": (j["ram"] - j["reference"]) / (best - j["reference"]),
        "kl_exact": measured["exact"].path_kl, "kl_fixed": measured["ram"].path_kl,
    }  # fmt: skip


def run(law: str, reward: str, beta: float, rule: str, seed: int, about: dict[str, Any]) -> dict[str, Any]:
    """Train once, and take the trained score's sums."""
    line = Line(law, reward)
    begin = time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResidualModel(line.base, 1, width=64)
        settings = {**TRAINED, **RULES[rule], "algorithm": rule, "kl_weight": beta, "seed": seed}
        policy = finetune(model, line.reward, [""], config=updated(Config(), settings)).policy
    seconds = time.process_time() - begin
    points, condition = line.x.float().unsqueeze(1), Condition([""] * POINTS)
    with torch.no_grad():
        scores = [policy.score(t.expand(POINTS), points, condition)[:, 0].double() for t in line.ts[:-1].float()]
    measured = line.measure(torch.stack(scores))[0]
    share = (measured.objective(beta) - about["J_ref"]) / (about["J_grid"] - about["J_ref"])
    return {"law": law, "reward": reward, "beta": beta, "rule": rule, "seed": seed, "share": share, "kl": measured.path_kl,
            "seconds": seconds}  # fmt: skip


def table(rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: shares of J_grid - J_ref in percent."""
    rules = [rule for rule in RULES if any(line["rule"] == rule for line in lines)]
    text = [
        "| law, reward | beta | ram's fixed point | its KL | exact score | its KL |"
        + "".join(f" {rule}, trained |" for rule in rules)
    ]
    text.append("| --- |" + " ---: |" * (5 + len(rules)))
    for row in rows:
        fixed = f"{100 * row['fixed']:.1f} %" if row["left"] < 1e-2 else "does not come to rest"
        cells = [fixed, f"{row['kl_fixed']:.2f}", f"{100 * row['exact']:.1f} %", f"{row['kl_exact']:.2f}"]
        for rule in rules:
            key = ("law", "reward", "beta")
            mine = [line["share"] for line in lines if line["rule"] == rule and all(line[k] == row[k] for k in key)]
            mean, half = confidence_interval(mine) if len(mine) > 1 else (sum(mine), 0.0)
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f} %" if mine else "")
        text.append(f"| {row['law']}, {row['reward']} | {row['beta']:g} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def made(file: Path) -> str:
    """The table of what a run with --out has left."""
    stored = resume_lines(file)
    return table([line for line in stored if "J_grid" in line], [line for line in stored if "rule" in line])


def figure(rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Shares against beta, a panel a problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems = list(dict.fromkeys((row["law"], row["reward"]) for row in rows))
    panels, axes = pyplot.subplots(
        1, len(problems), figsize=(3.2 * len(problems), 3.0), sharey=True, layout="constrained"
    )
    for (law, reward), axis in zip(problems, axes, strict=True):
        mine = [row for row in rows if (row["law"], row["reward"]) == (law, reward)]
        axis.plot([r["beta"] for r in mine], [100 * r["exact"] for r in mine], "k:", label="exact score")
        rest = [r for r in mine if r["left"] < 1e-2]
        axis.plot([r["beta"] for r in rest], [100 * r["fixed"] for r in rest], "C3-", label="fixed point of ram")
        for rule, colour in zip(RULES, ("C1", "C0"), strict=True):
            found = [line for line in lines if (line["law"], line["reward"], line["rule"]) == (law, reward, rule)]
            if found:
                betas = sorted({line["beta"] for line in found})
                ends = [confidence_interval([ln["share"] for ln in found if ln["beta"] == b]) for b in betas]
                axis.errorbar(betas, [100 * m for m, _ in ends], [100 * h for _, h in ends], fmt="o", ms=3, color=colour,
                              label=f"{rule}, trained")  # fmt: skip
        axis.set(xscale="log", title=f"{law}, {reward} reward", xlabel="beta", ylim=(0, 110))
    axes[0].set_ylabel("share of J* - J_ref on the grid, %")
    axes[-1].legend(fontsize=7, loc="lower right")
    panels.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=0, help="trained policies a problem, rule and beta [default 0]")
    parser.add_argument("--betas", type=float, nargs="+", default=[0.2, 1.0], help="of trained policies [0.2 1]")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument(
        "--out", type=Path, help="JSON lines, one a problem or trained policy; what is there is not repeated"
    )
    parser.add_argument("--figure", type=Path, help="a picture of the table")
    arguments = parser.parse_args()
    keys = ("law", "reward", "beta", "rule", "seed")
    problems = [(law, reward, beta) for law in LAWS for reward in REWARDS for beta in BETAS]
    stored = [] if arguments.out is None else resume_lines(arguments.out)
    with Workers(arguments.jobs) as workers:
        about = {tuple(line[k] for k in keys[:3]): line for line in stored if "J_grid" in line}
        missing = [problem for problem in problems if problem not in about]
        for index, row in workers.map(known, missing):
            if "failed" in row:
                sys.exit(f"{missing[index]}: {row['failed']}")
            about[missing[index]] = row
            if arguments.out is not None:
                append_line(arguments.out, row)
        rows = [about[problem] for problem in problems]
        wanted = [
            (*p, rule, seed)
            for seed in range(arguments.seeds)
            for p in problems
            for rule in RULES
            if p[2] in arguments.betas and p[:2] != UNBIASED
        ]
        lines = [line for line in stored if "rule" in line and tuple(line[k] for k in keys) in wanted]
        done = {tuple(line[k] for k in keys) for line in lines}
        todo = [(*task, about[task[:3]]) for task in wanted if task not in done]
        for index, line in workers.map(run, todo):
            if "failed" in line:
                sys.exit(f"{todo[index][:5]}: {line['failed']}")
            lines.append(line)
            if arguments.out is not None:
                append_line(arguments.out, line)
            print(
                f"{len(lines)}/{len(wanted)} {todo[index][:5]}: {100 * line['share']:.1f} %",
                file=sys.stderr,
                flush=True,
            )
    print(table(rows, lines))
    if lines:
        print(f"\n{arguments.seeds} seeds, {sum(line['seconds'] for line in lines):.0f} CPU seconds in all.")
    if arguments.figure is not None:
        figure(rows, lines, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
