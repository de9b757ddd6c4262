"""The report's figures: curves over iterations, pictures, points and series, in one style.

Knows numbers, tensors and matplotlib; does not know run folders, models or HTML. Nothing is shown or printed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch import Tensor

from ..evaluation.seen import SEEN_AT
from ..runs.record import Lines, Row, column, value

REFERENCE, TUNED, OPTIMUM, TRAINING = "#7a838c", "#0f62a8", "#1b7f4b", "#8ec1e6"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa3ab",
    "grid.color": "#e3e6ea",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.5,
    "lines.linewidth": 1.8,
    "savefig.dpi": 170,
    "savefig.bbox": "tight",
    "text.parse_math": False,  # a prompt may hold dollar signs
}


@dataclass(frozen=True)
class Curve:
    """One plot over iterations; `keys` are the metrics without which there is nothing to draw."""

    name: str
    title: str
    unit: str
    caption: str
    keys: tuple[str, ...]
    draw: Callable[[Axes, Lines], None]


def _training(axes: Axes, lines: Lines, key: str) -> None:
    axes.plot(*column(lines.iterations, key), color=TRAINING, label="training rollouts")


def _heldout(axes: Axes, lines: Lines, key: str) -> None:
    """Evaluations, with 95% intervals where the standard error is known."""
    rows = [row for row in lines.evaluations if math.isfinite(value(row, key))]
    bars = [1.96 * e if math.isfinite(e := value(row, f"{key}_se")) else 0.0 for row in rows]
    if rows:
        label = "held out, 95% interval" if any(bars) else "held out"
        axes.errorbar(*column(rows, key), yerr=bars if any(bars) else None, color=TUNED, marker="o", markersize=4,
                      capsize=3, label=label)  # fmt: skip


def _level(axes: Axes, level: float, low: float, high: float, color: str, label: str) -> None:
    """A horizontal line with its band, where they are known."""
    if math.isfinite(level):
        axes.axhline(level, color=color, linestyle="--", linewidth=1.4, label=label)
    if math.isfinite(low) and math.isfinite(high):
        axes.axhspan(low, high, color=color, alpha=0.14, linewidth=0)


def _reference_level(axes: Axes, lines: Lines, label: str) -> None:
    level, error = value(lines.reference, "objective/J_ref"), value(lines.reference, "objective/J_ref_se")
    _level(axes, level, level - 1.96 * error, level + 1.96 * error, REFERENCE, label)


def _reward(axes: Axes, lines: Lines) -> None:
    _training(axes, lines, "reward/mean")
    _heldout(axes, lines, "reward/heldout")
    _reference_level(axes, lines, "before training")


def _objective(axes: Axes, lines: Lines) -> None:
    _heldout(axes, lines, "objective/J")
    _reference_level(axes, lines, "J_ref")
    estimate, exact = (value(lines.reference, f"objective/J_star{end}") for end in ("", "_exact"))
    known = [x for x in (estimate, exact) if math.isfinite(x)]
    bottom, top = min([axes.get_ylim()[0], *known]), max([axes.get_ylim()[1], *known])
    low, high = (value(lines.reference, f"objective/J_star_{end}") for end in ("low", "high"))
    if math.isfinite(exact):
        axes.axhline(exact, color=OPTIMUM, linewidth=1.4, label="J*, closed form")
        _level(axes, math.nan, low, high, OPTIMUM, "")
    else:
        _level(axes, estimate, low, high, OPTIMUM, "J*, estimated")
    room = 0.06 * (top - bottom)
    # a J* that is hardly known has a band that would flatten everything else
    axes.set_ylim(max(bottom - room, axes.get_ylim()[0]), min(top + room, axes.get_ylim()[1] + room))


def _kl(axes: Axes, lines: Lines) -> None:
    _training(axes, lines, "policy/kl")
    _heldout(axes, lines, "policy/kl")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _diversity(axes: Axes, lines: Lines) -> None:
    _heldout(axes, lines, "sample/diversity")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])


def _explained(axes: Axes, lines: Lines) -> None:
    x, y = column(lines.iterations, "value/explained_variance")
    axes.plot(x, y, color=TUNED)
    axes.axhline(0, color=REFERENCE, linewidth=1)
    axes.set_ylim(max(-1.0, min([-0.05, *y])), 1.05)  # one value of -30 would flatten the rest


def _seen(axes: Axes, lines: Lines) -> None:
    for at, color in zip(SEEN_AT, (TRAINING, TUNED, OPTIMUM, REFERENCE), strict=True):
        x, y = column(lines.evaluations, f"value/seen_{at:g}")
        axes.plot(x, y, color=color, marker="o", markersize=3, label=f"at t = {at:g}")
    axes.set_ylim(-0.02, 1.02)


CURVES = (
    Curve("reward", "Reward", "reward", "Larger is better. Grey: the model before training.",
          ("reward/mean", "reward/heldout"), _reward),
    Curve("objective", "Objective J", "J (reward units)",
          "J = reward - kl_weight * path KL, which training maximises. J* is the most that any policy can reach; "
          "bands are 95% intervals.", ("objective/J",), _objective),
    Curve("kl", "Path KL", "path KL (nats)", "How far the policy has moved from the model before training.",
          ("policy/kl",), _kl),
    Curve("diversity", "Diversity", "mean pairwise distance",
          "Mean distance of two samples of one prompt. A fall towards 0 is a collapse.",
          ("sample/diversity",), _diversity),
    Curve("value", "Value network", "explained variance",
          "Share of the returns' variance that it predicts: 1 is perfect, below 0 is worse than a constant.",
          ("value/explained_variance",), _explained),
    Curve("seen", "Reward foreseen", "share of the variance",
          "Share of the reward's variance among samples of one prompt that the value, or the reward's surrogate, sees on "
          "the way of held-out paths. t = 0 is noise and t = 1 the sample.",
          tuple(f"value/seen_{at:g}" for at in SEEN_AT), _seen),
)  # fmt: skip


def _iterations(axes: Axes, rows: Sequence[Row]) -> None:
    """The iteration axis, from 0 to the last one."""
    last = max((x for row in rows if math.isfinite(x := value(row, "iteration"))), default=1.0)
    axes.set_xlim(-0.03 * max(last, 1), 1.03 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def curve_figure(curve: Curve, lines: Lines) -> Figure | None:
    """The curve, or None while none of its metrics has a finite value."""
    rows = [*lines.iterations, *lines.evaluations]
    if not any(math.isfinite(value(row, key)) for row in rows for key in curve.keys):
        return None
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    curve.draw(axes, lines)
    axes.set(title=curve.title, xlabel="iteration", ylabel=curve.unit)
    _iterations(axes, rows)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def cost_figure(rows: Sequence[Row]) -> Figure | None:
    """Network calls, reward calls and seconds so far over iterations, or None while there are none."""
    panels = (("cost/network_calls", "network calls"), ("cost/reward_calls", "reward calls"), ("seconds", "seconds"))
    found = [(column(rows, key), unit) for key, unit in panels if column(rows, key)[0]]
    if not found:
        return None
    figure = Figure(figsize=(4.4, 3.0), layout="constrained")
    every = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, ((x, y), unit) in zip(every, found, strict=True):
        axes.plot(x, y, color=TUNED)
        axes.set_ylim(0, 1.15 * max(y) or 1)
        axes.set_ylabel(unit.replace(" ", "\n"), fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _iterations(axes, rows)
    every[0].set_title("Costs so far")
    every[-1].set_xlabel("iteration")
    figure.align_ylabels()
    return figure


# --- pictures --------------------------------------------------------------------------------------------------------


def canvas(rows: Tensor, gap: int, middle: int = 0) -> Tensor:
    """Pictures [R, C, channels, H, W] beside each other on white, [height, width, 3]; middle: a gap at half width."""
    count, columns, _, height, width = rows.shape
    canvas = torch.ones(count * (height + gap) - gap, columns * (width + gap) - gap + middle, 3)
    for i in range(count):
        for j in range(columns):
            top, left = i * (height + gap), j * (width + gap) + (middle if j >= columns / 2 else 0)
            canvas[top : top + height, left : left + width] = rows[i, j].float().cpu().clamp(0, 1).permute(1, 2, 0)
    return canvas


def _picture_axes(canvas: Tensor, width: float) -> tuple[Figure, Axes]:
    """Axes without a frame that show the canvas, `width` inches wide."""
    figure = Figure(figsize=(width, width * canvas.shape[0] / canvas.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas.numpy(), interpolation="nearest" if canvas.shape[1] < 1000 else "antialiased")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    return figure, axes


def gallery(prompts: Sequence[str], before: Tensor, after: Tensor) -> Figure:
    """A row a prompt: the reference's pictures left, the tuned model's right. before, after [R C, channels, H, W]."""
    height, width = before.shape[2:]
    gap, middle, columns = max(1, width // 14), width // 2, len(before) // len(prompts)
    rows = torch.cat([x.reshape(len(prompts), columns, *x.shape[1:]).cpu() for x in (before, after)], dim=1)
    figure, axes = _picture_axes(canvas(rows, gap, middle), 9)
    half = columns * (width + gap)
    axes.set_xticks([half / 2, half * 1.5 + middle], ["before", "after"], weight="bold", size=13)
    names = [textwrap.fill(textwrap.shorten(prompt, 60, placeholder="…"), 20) for prompt in prompts]
    axes.set_yticks([height / 2 + i * (height + gap) for i in range(len(prompts))], names, size=12)
    return figure


def film_strip(times: Sequence[float], strips: Tensor) -> Figure:
    """One denoising, [2, frames, channels, H, W]: the reference above, the tuned model below."""
    height, width = strips.shape[-2:]
    gap = max(1, width // 14)
    figure, axes = _picture_axes(canvas(strips, gap), 9)
    axes.set_xticks(
        [width / 2 + i * (width + gap) for i in range(len(times))], [f"t = {t:.2f}" for t in times], size=12
    )
    axes.set_yticks([height / 2, height * 1.5 + gap], ["before", "after"], weight="bold", size=12)
    return figure


def video_strips(prompts: Sequence[str], strips: Tensor) -> Figure:
    """Frames of a video of each prompt, [prompts, 2, frames, 3, H, W]: the reference's above the tuned model's."""
    height, width = strips.shape[-2:]
    gap = max(1, width // 14)
    figure, axes = _picture_axes(canvas(strips.flatten(0, 1), gap), 9)
    axes.set_xticks([])
    names = [textwrap.fill(textwrap.shorten(prompt, 60, placeholder="…"), 20) for prompt in prompts]
    labels = [text for name in names for text in (f"{name}\nbefore", "after")]
    axes.set_yticks([height / 2 + i * (height + gap) for i in range(len(labels))], labels, size=9)
    return figure


# --- points and series -----------------------------------------------------------------------------------------------


def scatter(clouds: Sequence[tuple[str, Tensor]], reward: Callable[[Tensor], Tensor]) -> Figure:
    """Clouds of points [B, 2] beside each other over the reward's levels; reward: points [N, 2] -> [N]."""
    figure = Figure(figsize=(3.3 * len(clouds), 3.5), layout="constrained")
    everything = torch.cat([cloud for _, cloud in clouds])
    low, high = everything.quantile(0.002, dim=0) - 0.3, everything.quantile(0.998, dim=0) + 0.3
    x, y = (torch.linspace(float(a), float(b), 60) for a, b in zip(low, high, strict=True))
    levels = reward(torch.cartesian_prod(x, y)).reshape(60, 60).T.cpu().numpy()
    every = figure.subplots(1, len(clouds), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, cloud), color in zip(every, clouds, (REFERENCE, TUNED, OPTIMUM), strict=False):
        lines = axes.contour(x.numpy(), y.numpy(), levels, 7, colors="#aab3bb", linewidths=0.8, linestyles="solid")
        axes.clabel(lines, fontsize=7)
        axes.scatter(*cloud.T.numpy(), s=6, color=color, alpha=0.6, linewidth=0)
        axes.set(title=title, xlabel="first coordinate", aspect="equal")
        axes.set(xlim=(float(low[0]), float(high[0])), ylim=(float(low[1]), float(high[1])))
        axes.grid(False)
    every[0].set_ylabel("second coordinate")
    return figure


def series(before: Tensor, after: Tensor) -> Figure:
    """A few samples [B, ...] of any shape as lines; a colour is the same noise on both sides."""
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    every = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, title, batch in zip(every, ("before", "after"), (before, after), strict=True):
        for sample in batch.float().cpu().flatten(1):
            axes.plot(sample.numpy(), linewidth=1.2, marker="o" if len(sample) < 20 else None, markersize=4)
        axes.set(title=title, xlabel="index in the sample")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    every[0].set_ylabel("value")
    return figure
