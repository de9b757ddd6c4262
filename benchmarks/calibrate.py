"""`calibrate` on a Gaussian mixture, where the nearest law with given means is known: lambda, the means reached, and the price.

    python benchmarks/calibrate.py --out benchmarks/calibrate.jsonl --figure docs/figures/calibrate.png     # 20 runs
    python benchmarks/calibrate.py --table --out benchmarks/calibrate.jsonl --write docs/howto/calibrate.md
    python benchmarks/calibrate.py --best --out benchmarks/calibrate.jsonl      # the share by its best policy, half a minute

The mixture of the recipe `gaussian`: two dimensions, four components. Targets: the mean of x; of |x|^2; both; the share with
x > 0, which other weights of the components and their halves give. lambda and KL in closed form are those of the exact law: the
minimum of log Z(lambda) - lambda . m, Z of the tilted mixture; of the share, of a coin. Samples come from 20 Euler-Maruyama
steps where no other number is named, whose variance is 2 to 3 % larger. `--best`: the policy that is best for the share in
continuous time, drawn in so many steps, and the lambda with which it comes to the target there. A line a run, with all that
`calibration.json` holds.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from page_tables import put
from torch import Tensor, nn

import scoreact as sa
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics.solvers import SOLVERS
from scoreact.evaluation.metrics import confidence_interval
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.recipes.gaussian import build, mixture
from scoreact.support.files import append_line, resume_lines
from scoreact.training.config import updated
from scoreact.types import Condition

MARKS = ("<!-- calibrate -->\n", "<!-- /calibrate -->\n")
SETTINGS: dict[str, Any] = {
    "solver": "euler_maruyama", "steps": 20, "iterations": 30, "batch_size": 128, "heldout_samples": 64, "guard": "off",
    "tolerance": 0.1, "samples": 1600, "reference_batches": 2,
    "evaluate_every": 1000, "device": "cpu",
}  # fmt: skip
STEPS = (10, 20, 50, 100)


def x(points: Tensor) -> Tensor:
    return points[:, 0]


def square(points: Tensor) -> Tensor:
    return points.square().sum(1)


def right(points: Tensor) -> Tensor:
    return (points[:, 0] > 0).float()


PROBLEMS: dict[str, tuple[list[Callable[[Tensor], Tensor]], list[float]]] = {
    "mean": ([x], [0.5]),
    "size": ([square], [2.2]),
    "both": ([x, square], [0.5, 2.2]),
    "share": ([right], [0.8]),
    "share in 50 steps": ([right], [0.8]),
}
OWN: dict[str, dict[str, Any]] = {"share in 50 steps": {"steps": 50}}  # settings of a problem


def log_z(base: GaussianMixture, names: Sequence[str], weights: Tensor) -> float:
    linear, quadratic = torch.zeros(2), torch.zeros(2, 2)
    for name, weight in zip(names, weights.tolist(), strict=True):
        if name == "x":
            linear[0] = weight
        else:
            quadratic = -2 * weight * torch.eye(2)
    return base.tilted(linear.double(), quadratic.double(), 1.0)[1]


def closed_form(problem: str) -> tuple[list[float], float]:
    """lambda and the KL of the nearest law, for the exact mixture."""
    base, (statistics, targets) = mixture(2, 4, 0), PROBLEMS[problem]
    names, goal = [f.__name__ for f in statistics], torch.tensor(targets, dtype=torch.float64)
    if problem.startswith("share"):
        std = base.covariances[:, 0, 0].sqrt()
        p, q = float((base.weights * torch.special.ndtr(base.means[:, 0] / std)).sum()), targets[0]
        return [math.log(q / (1 - q) * (1 - p) / p)], q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    weights, step = torch.zeros(len(goal), dtype=torch.float64), 1e-3

    def f(at: Tensor) -> float:
        return log_z(base, names, at) - float(at @ goal)

    for _ in range(15):  # Newton's, by differences
        unit = step * torch.eye(len(goal), dtype=torch.float64)
        gradient = torch.tensor([(f(weights + e) - f(weights - e)) / (2 * step) for e in unit], dtype=torch.float64)
        hessian = torch.tensor(
            [[(f(weights + a + b) - f(weights + a - b) - f(weights - a + b) + f(weights - a - b)) / (4 * step**2)
              for a in unit] for b in unit], dtype=torch.float64,
        )  # fmt: skip
        weights = weights - torch.linalg.solve(hessian, gradient)
    return weights.tolist(), -f(weights)


class BestForShare(nn.Module):
    """The mixture under the best control for R = weight on x > 0: its score plus the gradient of V = log E[exp(R) | x_t]."""

    def __init__(self, base: GaussianMixture, weight: float) -> None:
        super().__init__()
        self.base, self.weight, self.schedule = base, weight, base.schedule
        last = torch.tensor([base.schedule.t_max], dtype=torch.float64)
        self.end = base.schedule.alpha(last), base.schedule.sigma(last)  # a path ends a little before the data

    def share(self, t: Tensor, points: Tensor) -> Tensor:
        """P(x > 0 at the path's end | x_t), [B], of points [B, 2] at t [B]."""
        base, (alpha_end, sigma_end), unit = self.base, self.end, torch.eye(2, dtype=torch.float64)
        means = alpha_end * base.means.double()
        covariances = alpha_end**2 * base.covariances.double() + sigma_end**2 * unit
        alpha = (self.schedule.alpha(t) / alpha_end).reshape(-1, 1, 1)
        noise = (self.schedule.sigma(t).reshape(-1, 1, 1) ** 2 - (alpha * sigma_end) ** 2).clamp(min=1e-9)
        there = alpha[..., None] ** 2 * covariances + noise[..., None] * unit  # of a component at t
        off, inverse = points[:, None] - alpha * means, torch.linalg.inv(there)
        log_normal = -0.5 * (torch.einsum("bki,bkij,bkj->bk", off, inverse, off) + torch.logdet(there))
        gain = alpha[..., None] * torch.einsum("kij,bkjl->bkil", covariances, inverse)
        mean = means + torch.einsum("bkij,bkj->bki", gain, off)
        spread = covariances - alpha[..., None] * torch.einsum("bkij,kjl->bkil", gain, covariances)
        each = torch.special.ndtr(mean[..., 0] / spread[..., 0, 0].clamp(min=1e-9).sqrt())
        return (torch.softmax(log_normal + base.weights.log(), 1) * each).sum(1)

    def score(self, t: Tensor, points: Tensor, condition: Condition) -> Tensor:
        with torch.enable_grad():
            x = points.detach().double().requires_grad_(True)
            value = torch.log1p(math.expm1(self.weight) * self.share(t.double(), x)).sum()
            (slope,) = torch.autograd.grad(value, x)
        return self.base.score(t, points) + slope.to(points)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("_modules", "base") else getattr(self.base, name)


def best(steps: int) -> dict[str, Any]:
    """The lambda with which the best policy reaches the share in so many steps, and its path KL there; and at that of all."""
    base, goal = mixture(2, 4, 0), PROBLEMS["share"][1][0]
    config = updated(sa.Config(), {"solver": SETTINGS["solver"], "steps": steps})

    def drawn(weight: float) -> tuple[float, float]:
        path = rollout(
            Policy(BestForShare(base, weight), base), config.sde(base.schedule), SOLVERS[config.solver],
            config.times(base.schedule), base.condition([""] * 4000), torch.Generator().manual_seed(1),
        )  # fmt: skip
        return float(right(path.xs[-1]).mean()), float(path.path_kl().mean())

    low, high = 1.0, 2.0
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if drawn(middle)[0] < goal else (low, middle)
    share, kl = drawn(high)
    return {
        "best": steps,
        "weight": high,
        "share": share,
        "path_kl": kl,
        "share_of_all": drawn(closed_form("share")[0][0])[0],
    }


def run(problem: str, seed: int, figure: Path | None) -> dict[str, Any]:
    statistics, targets = PROBLEMS[problem]
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        out = Path(folder) / "run"
        found = sa.calibrate(
            build(width=64), statistics, targets, out=out, report=False, progress=False, seed=seed,
            **{**SETTINGS, **OWN.get(problem, {})},
        )  # fmt: skip
        if figure is not None:
            shutil.copy(out / "calibration.png", figure)
    return {"problem": problem, "seed": seed, "seconds": time.process_time() - begin, **found.facts}


def cell(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3g}"
    mean, half = confidence_interval(list(values))
    return f"{mean:.3f} ± {half:.3f}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a statistic; ± are halves of 95 % intervals over seeds."""
    text = [
        "| problem | mean of | before | target | reached | lambda, closed form | at first | trained to | KL, closed form "
        "| least KL | path KL | rounds | met |",
        "| --- | --- |" + " ---: |" * 11,
    ]
    for problem in PROBLEMS:
        mine = [line for line in lines if line.get("problem") == problem]
        if not mine:
            continue
        weights, kl = closed_form(problem)
        for j, weight in enumerate(weights):
            rows = [line["statistics"][j] for line in mine]
            own = [
                rows[0]["name"],
                *(cell([row[key] for row in rows]) for key in ("before",)),
                f"{rows[0]['target']:g}",
            ]
            own += [cell([row["after"] for row in rows]), f"{weight:.3f}"]
            own += [cell([row[key] for row in rows]) for key in ("first_weight", "weight")]
            whole = ["", "", "", "", ""]
            if j == 0:
                whole = [f"{kl:.3f}", *(cell([line[key] for line in mine]) for key in ("least_kl", "path_kl"))]
                rounds = [len(line["rounds"]) for line in mine]
                whole += [
                    " to ".join(map(str, dict.fromkeys((min(rounds), max(rounds))))),
                    f"{sum(line['met'] for line in mine)} of {len(mine)}",
                ]
            text.append(f"| {problem if j == 0 else ''} | " + " | ".join([*own, *whole]) + " |")
    counts = list(Counter(line["problem"] for line in lines if "problem" in line).values())
    runs = " to ".join(map(str, dict.fromkeys((min(counts), max(counts)))))
    text += ["", f"*Runs a problem, a seed each: {runs}. Where there is one, no interval is known.*"]
    text += [
        "",
        "| steps of the best policy for the share | lambda at a share of 0.8 | its path KL | share at lambda in closed form |",
    ]
    text += ["| ---: | ---: | ---: | ---: |"]
    text += [
        f"| {line['best']} | {line['weight']:.2f} | {line['path_kl']:.3f} | {line['share_of_all']:.3f} |"
        for line in lines if "best" in line
    ]  # fmt: skip
    return "\n".join(text) + "\n"


def made(file: Path) -> str:
    """The table of what a run with --out has left."""
    return table(resume_lines(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run; what is there is not repeated")
    parser.add_argument("--seeds", type=int, default=5, help="runs a problem [default 5]")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--figure", type=Path, help="histograms of the problem `both`, seed 0")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--best", action="store_true", help="draw the share's best policy in 10, 20, 50, 100 steps")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    options = parser.parse_args()
    lines = resume_lines(options.out)
    done = {(line.get("problem"), line.get("seed")) for line in lines}
    for steps in STEPS if options.best else ():
        if all(line.get("best") != steps for line in lines):
            append_line(options.out, best(steps))
    for seed in range(0 if options.table or options.best else options.seeds):
        for problem in options.problems:
            if (problem, seed) not in done:
                figure = options.figure if (problem, seed) == ("both", 0) else None
                append_line(options.out, run(problem, seed, figure))
    shown = made(options.out)
    print(shown)
    if options.write is not None:
        put(shown, options.write, MARKS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
