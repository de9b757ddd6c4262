"""A run folder as one HTML file: the result first, then samples, curves, tables, and how to repeat it.

Knows the files of a run folder and how to draw numbers, pictures and points; computes nothing that evaluation.py could.
Everything that comes from outside is escaped; pictures are embedded; the file refers to no address and runs no script.
A piece that cannot be made becomes a note that says why, so that a report never costs a run its results.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import shlex
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import Config, updated
from .evaluation import balanced, draw, transfer_table
from .policy import Policy
from .recipes import Problem
from .schedule import GRIDS
from .solvers import SAMPLERS

REFERENCE, TUNED, OPTIMUM, TRAINING = "#7a838c", "#0f62a8", "#1b7f4b", "#8ec1e6"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.edgecolor": "#9aa3ab",
    "grid.color": "#e3e6ea",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "savefig.dpi": 170,
    "savefig.bbox": "tight",
    "text.parse_math": False,  # a prompt may hold dollar signs
}
PROMPTS, COLUMNS, FRAMES, POINTS, SERIES = 10, 5, 8, 800, 6  # how much is drawn
# what reading a folder, drawing, sampling and a user's reward may raise; anything else is a mistake of this file
Expected = (OSError, ValueError, RuntimeError, LookupError, ArithmeticError)
Row = dict[str, Any]


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as far as it has come."""

    path: Path
    description: Row
    config: Row
    versions: Row
    reference: Row  # metrics of the reference, {} before they exist
    iterations: list[Row]
    evaluations: list[Row]
    result: Row  # {} while the run is unfinished
    problems: list[str]  # lines and files that could not be read

    @property
    def settings(self) -> Config:
        return updated(Config(), self.config, str(self.path / "config.json"))


def read_run(path: Path) -> Run:
    """The folder's files. Raises ValueError where there is no run; torn or missing later files become `problems`."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{str(path)!r} holds no run: config.json is missing. Give the folder that training wrote.")
    problems: list[str] = []
    config, result = _json(path / "config.json", problems), _json(path / "result.json", problems)
    rows: list[Row] = []
    lines = path / "metrics.jsonl"
    for number, line in enumerate(lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else [], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            problems.append(f"line {number} of metrics.jsonl cannot be read and is left out ({error}).")
    reference = [row for row in rows if row.get("reference")]
    evaluations = [row for row in rows if row.get("evaluation")]
    return Run(
        path,
        config.get("description") or {},
        config.get("config") or {},
        config.get("versions") or {},
        reference[-1] if reference else {},
        [row for row in rows if not row.get("reference") and not row.get("evaluation")],
        evaluations,
        result,
        problems,
    )


def _json(path: Path, problems: list[str]) -> Row:
    """The mapping in a JSON file, {} if it does not exist or is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return {}


def _load_policy(run: Run, problem: Problem) -> Policy | None:
    """The policy with the folder's averaged weights (the best ones of an unfinished run), or None if none are saved."""
    found = [path for path in (run.path / "model.safetensors", run.path / "best/model.safetensors") if path.is_file()]
    if not found or not isinstance(problem.model, nn.Module):
        return None
    policy = Policy(problem.model)
    parameters = dict(problem.model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(found[0]).items():
            parameters[name].copy_(value)
    return policy


# --- numbers and words -----------------------------------------------------------------------------------------------


def _value(row: Row, key: str) -> float:
    """A metric, NaN where it is missing."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def number(value: object) -> str:
    """Three significant digits, thousands separated; a dash for what was not measured."""
    if value is None or isinstance(value, str | bool):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    x = float(value)  # type: ignore[arg-type]
    if not math.isfinite(x):
        return "–" if math.isnan(x) else str(x)
    if x != 0 and not 1e-4 <= abs(x) < 1e12:
        return f"{x:.2e}"
    return f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x)))) if x else 2}f}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _before(run: Run) -> tuple[float, float]:
    """Reward of the untouched model and its standard error: the evaluation at iteration 0, or J_ref (its KL is 0)."""
    if run.evaluations and run.evaluations[0].get("iteration") == 0:
        return _value(run.evaluations[0], "reward/heldout"), _value(run.evaluations[0], "reward/heldout_se")
    return _value(run.reference, "objective/J_ref"), _value(run.reference, "objective/J_ref_se")


def _trusted(run: Run) -> bool:
    """Whether the share recovered means something: J* is known, or its estimate rests on enough samples."""
    return "objective/J_star_exact" in run.reference or bool(run.reference.get("objective/trusted", False))


def headline(run: Run) -> str:
    """The outcome in a sentence, every number from the folder."""
    if not run.evaluations:
        done = run.iterations[-1] if run.iterations else {}
        reward = f"; the training reward is {number(_value(done, 'reward/mean'))}" if done else ""
        return f"No held-out evaluation yet after {len(run.iterations)} of {run.config.get('iterations', '?')} iterations{reward}."
    last = run.evaluations[-1]
    (before, before_se), after, error = _before(run), _value(last, "reward/heldout"), _value(last, "reward/heldout_se")
    interval = f"(95% interval {number(after - 1.96 * error)} to {number(after + 1.96 * error)})"
    if not math.isfinite(after):
        return f"Held-out reward is {number(last.get('reward/heldout'))} at iteration {last.get('iteration')}: the run has failed."
    if not math.isfinite(before):
        text = f"Held-out reward is {number(after)} {interval}"
    elif abs(after - before) <= 1.96 * math.hypot(error, before_se):
        text = f"Held-out reward did not change measurably: {number(before)} before, {number(after)} after {interval}"
    else:
        text = f"Held-out reward {'rose' if after > before else 'fell'} from {number(before)} to {number(after)} {interval}"
    if math.isfinite(kl := _value(last, "policy/kl")):
        text += f"; path KL {number(kl)} nats"
    share = _value(last, "objective/recovered")
    if math.isfinite(share) and _trusted(run):
        text += f"; {100 * share:.0f}% of the possible J* − J_ref recovered"
    return text + "."


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing the headline."""
    found = list(run.problems)
    done, planned = (run.iterations[-1].get("iteration", 0) if run.iterations else 0), run.config.get("iterations")
    stopped = run.result.get("stopped")
    if stopped:
        found.append(f"The run stopped early, at iteration {done} of {planned}: {stopped}")
    elif not run.result:
        found.append(f"The run is unfinished: {done} of {planned} iterations so far. `scoreact resume` continues it.")
    share = _value(run.evaluations[-1], "objective/recovered") if run.evaluations else math.nan
    if run.reference and not _trusted(run):
        left_out = f", so the share recovered ({100 * share:.0f}%) means little" if math.isfinite(share) else ""
        found.append(
            f"J* is a rough estimate{left_out}: it rests on {number(_value(run.reference, 'objective/effective_samples'))} "
            "effective samples of the reference. A larger kl_weight or more reference_batches make it firmer."
        )
    broken = [row for row in run.iterations if not math.isfinite(_value(row, "reward/mean"))]
    if broken:
        found.append(f"The training reward is not finite at iteration {broken[0].get('iteration')} and {len(broken) - 1} others.")
    return found + _overfitting(run)


def _overfitting(run: Run) -> list[str]:
    """Held-out reward below its best by more than noise while the training reward rose; J below its best."""
    rows = [row for row in run.evaluations if math.isfinite(_value(row, "reward/heldout"))]
    if len(rows) < 2:
        return []
    last = rows[-1]

    def fell(key: str) -> Row | None:
        """The best evaluation, if the last one is below it by more than the noise."""
        best = max(rows, key=lambda row: _value(row, key))
        noise = 1.96 * math.hypot(_value(best, f"{key}_se"), _value(last, f"{key}_se"))
        return best if _value(best, key) - _value(last, key) > noise else None

    def training(row: Row) -> float:
        """Mean training reward of the five iterations up to an evaluation."""
        near = [x for x in run.iterations if row["iteration"] - 5 < x.get("iteration", 0) <= row["iteration"]]
        return sum(_value(x, "reward/mean") for x in near) / len(near) if near else math.nan

    found = []
    if (best := fell("reward/heldout")) and training(last) > training(best):
        found.append(
            f"Held-out reward falls ({number(_value(best, 'reward/heldout'))} at iteration {best['iteration']}, "
            f"{number(_value(last, 'reward/heldout'))} at {last['iteration']}) while the training reward rises: the policy "
            "fits what it was trained on. Prefer the weights in best/."
        )
    if best := fell("objective/J"):
        found.append(
            f"J was highest at iteration {best['iteration']} ({number(_value(best, 'objective/J'))}, now "
            f"{number(_value(last, 'objective/J'))}); best/ holds those weights."
        )
    return found


# --- curves ----------------------------------------------------------------------------------------------------------


def _column(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Iterations and values where the value is finite."""
    points = [(_value(row, "iteration"), _value(row, key)) for row in rows]
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _heldout(axes: Axes, run: Run, key: str) -> None:
    """Evaluations with 95% intervals where the standard error is known."""
    rows = [row for row in run.evaluations if math.isfinite(_value(row, key))]
    x, y = _column(rows, key)
    errors = [_value(row, f"{key}_se") for row in rows]
    bars = [1.96 * e if math.isfinite(e) else 0.0 for e in errors]
    label = "held out, 95% interval" if any(bars) else "held out"
    axes.errorbar(x, y, yerr=bars if any(bars) else None, color=TUNED, marker="o", markersize=4, capsize=3, label=label)


def _level(axes: Axes, value: float, low: float, high: float, color: str, label: str) -> None:
    """A horizontal line with its band, where they are known."""
    if math.isfinite(value):
        axes.axhline(value, color=color, linestyle="--", linewidth=1.4, label=label)
    if math.isfinite(low) and math.isfinite(high):
        axes.axhspan(low, high, color=color, alpha=0.13, linewidth=0)


def _reference_level(axes: Axes, run: Run, label: str) -> None:
    value, error = _value(run.reference, "objective/J_ref"), _value(run.reference, "objective/J_ref_se")
    _level(axes, value, value - 1.96 * error, value + 1.96 * error, REFERENCE, label)


def _reward_curve(axes: Axes, run: Run) -> None:
    axes.plot(*_column(run.iterations, "reward/mean"), color=TRAINING, label="training rollouts")
    _heldout(axes, run, "reward/heldout")
    _reference_level(axes, run, "reference")


def _objective_curve(axes: Axes, run: Run) -> None:
    _heldout(axes, run, "objective/J")
    _reference_level(axes, run, "J_ref")
    ends = [_value(run.reference, f"objective/J_star_{end}") for end in ("low", "high")]
    exact = _value(run.reference, "objective/J_star_exact")
    _level(axes, _value(run.reference, "objective/J_star"), *ends, OPTIMUM, "J*, estimated")
    if math.isfinite(exact):
        axes.axhline(exact, color=OPTIMUM, linewidth=1.4, label="J*, closed form")


def _kl_curve(axes: Axes, run: Run) -> None:
    axes.plot(*_column(run.iterations, "policy/kl"), color=TRAINING, label="training rollouts")
    _heldout(axes, run, "policy/kl")


def _diversity_curve(axes: Axes, run: Run) -> None:
    _heldout(axes, run, "sample/diversity")
    axes.set_ylim(bottom=0)


def _value_curve(axes: Axes, run: Run) -> None:
    axes.plot(*_column(run.iterations, "value/explained_variance"), color=TUNED)
    axes.axhline(0, color=REFERENCE, linewidth=1)
    axes.set_ylim(max(-1.0, min([-0.1, *_column(run.iterations, "value/explained_variance")[1]])), 1.05)


CURVES: tuple[tuple[str, str, str, Callable[[Axes, Run], None], str], ...] = (
    ("reward", "Reward", "reward", _reward_curve, "Larger is better; the reference is the model before training."),
    ("objective", "Objective J", "J (reward units)", _objective_curve,
     "J = reward − kl_weight × path KL: what is maximised. J* is the most that any policy can reach."),
    ("kl", "Path KL to the reference", "path KL (nats)", _kl_curve, "How far the policy has moved from the reference."),
    ("diversity", "Diversity", "mean pairwise distance", _diversity_curve,
     "Mean distance of two samples of one prompt. A fall towards 0 would be a collapse."),
    ("value", "Value network", "explained variance", _value_curve,
     "Share of the returns' variance that the value network predicts: 1 is perfect, below 0 worse than a constant."),
)  # fmt: skip


def _curve(run: Run, curve: tuple[str, str, str, Callable[[Axes, Run], None], str]) -> str:
    name, title, unit, plot, caption = curve
    figure = Figure(figsize=(5.4, 3.3))
    axes = figure.add_subplot()
    plot(axes, run)
    if not axes.lines and not axes.collections:
        return _note(f"{title}: not measured yet.")
    axes.set(title=title, xlabel="iteration", ylabel=unit)
    axes.margins(x=0.03)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    return _figure(run, figure, name, f"{title} over iterations", caption)
