"""Samples of a model that is learned from data, as one picture: pictures in rows, vectors and series beside the data.

Draws and samples; knows no run folders.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..dynamics.grids import grid_times
from ..dynamics.samplers import SAMPLERS
from ..models.base import HasPath
from ..models.network import NetworkModel
from ..runs.films import as_picture
from ..runs.samples import sheet, thumbnails
from ..sampling.draw import draw
from ..support.devices import device_of
from ..support.own_data import OwnData
from .figures import REFERENCE, STYLE, TUNED

PATH: dict[str, Any] = {"solver": "dpm_solver_pp_2m", "grid": "uniform", "steps": 20}  # of pictures
SEED = 0
ROWS, COLUMNS = 10, 8  # pictures; a row a class
POINTS, LINES, PANELS = 1000, 8, 6  # vectors, series, and what is shown of each


def samples_of(model: NetworkModel, count: int) -> Tensor:
    """Decoded samples, about `count`, as many of each class, by the path that suits the model."""
    names = list(model.classes)[:ROWS]
    prompts = [name for name in names for _ in range(max(1, count // len(names)))]
    path = {**PATH, **(model.suited_path if isinstance(model, HasPath) else {})}
    ts = grid_times(path["grid"], model.schedule, path["steps"])
    return draw(model, prompts, SAMPLERS[path["solver"]], ts, SEED, device_of(model))[1].cpu()


def sheet_of(data: OwnData) -> Callable[[NetworkModel, Path], None]:
    """What draws a model of these data into a PNG file."""

    def save(model: NetworkModel, path: Path) -> None:
        was = model.use_bfloat16
        model.use_bfloat16 = False  # the same pictures whether or not the processor has bfloat16
        try:
            model_sheet(model, data, path)
        finally:
            model.use_bfloat16 = was

    return save


def model_sheet(model: NetworkModel, data: OwnData, path: Path) -> None:
    """Draw samples of a model, beside examples where those are no pictures, into a PNG file."""
    if data.kind == "pictures":
        pictures = thumbnails(samples_of(model, COLUMNS * ROWS if model.conditional else COLUMNS**2))
        whole = sheet(pictures, COLUMNS) if len(pictures) > 1 else as_picture(pictures[0])
        whole.save(path)
        return
    import matplotlib

    with matplotlib.rc_context(STYLE):
        draw_beside = _series if data.kind == "series" else _vectors
        draw_beside(model, data).savefig(path)


def _spread(values: Tensor, count: int) -> Tensor:
    """At most `count` of them, evenly spread: neighbours may be windows of the same time."""
    return values[torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()]


def _series(model: NetworkModel, data: OwnData) -> Figure:
    """A few of the data above a few samples; a column a channel."""
    samples, real = samples_of(model, LINES)[:LINES], _spread(data.heldout.values, LINES)
    channels = min(PANELS, real.shape[1])
    figure = Figure(figsize=(max(6.0, 3.2 * channels), 4.6), layout="constrained")
    every = figure.subplots(2, channels, sharex=True, sharey="col", squeeze=False)
    for row, (title, batch, color) in enumerate((("data", real, REFERENCE), ("model", samples, TUNED))):
        for channel in range(channels):
            axes = every[row][channel]
            axes.plot(batch[:, channel].T.numpy(), color=color, linewidth=0.9, alpha=0.7)
            name = data.columns[channel] if data.columns else f"channel {channel + 1}" if channels > 1 else ""
            axes.set(title=f"{title} {name}".strip())
    return figure


def _vectors(model: NetworkModel, data: OwnData) -> Figure:
    """Points in the plane, or a histogram a column."""
    samples, real = samples_of(model, POINTS), _spread(data.train.values, POINTS)
    names = data.columns or tuple(f"column {i + 1}" for i in range(real.shape[1]))
    if real.shape[1] == 2:
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        for axes, title, points, color in zip(
            figure.subplots(1, 2, sharex=True, sharey=True), ("data", "model"), (real, samples), (REFERENCE, TUNED),
            strict=True,
        ):  # fmt: skip
            axes.scatter(*points.T.numpy(), s=5, alpha=0.5, linewidth=0, color=color)
            axes.set(title=title, xlabel=names[0], ylabel=names[1])
        return figure
    panels = min(PANELS, real.shape[1])
    figure = Figure(figsize=(max(4.0, 2.6 * panels), 2.8), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, panels, squeeze=False)[0]):
        low, high = torch.cat([real[:, i], samples[:, i]]).quantile(torch.tensor([0.001, 0.999])).tolist()
        for values, title, color in ((real, "data", REFERENCE), (samples, "model", TUNED)):
            axes.hist(
                values[:, i].numpy(), 40, (low, high + 1e-6), density=True, histtype="step", color=color, label=title
            )
        axes.set(title=names[i])
        axes.legend()
    return figure
