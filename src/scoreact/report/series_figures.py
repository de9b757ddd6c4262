"""Stylised facts of several laws of returns in one picture: tails, memory of r and |r|, leverage, correlations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from ..evaluation.stylised_facts import series_facts
from .figures import OPTIMUM, REFERENCE, STYLE, TUNED

COLORS = ("#1a1d20", OPTIMUM, REFERENCE, TUNED, "#b3541e")


def draw_facts(laws: Mapping[str, Tensor], path: Path, lags: int = 20) -> None:
    """Draw laws, name -> windows [N, C, L] of returns, into a PNG file; means over channels. The first is the real one."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "savefig.dpi": 90}):
        figure = Figure(figsize=(12, 6.6), layout="constrained")
        density, survival, memory, sizes, lever, together = figure.subplots(2, 3).flat
        real = next(iter(laws.values())).double()
        mean, spread = real.mean((0, 2), keepdim=True), real.transpose(0, 1).flatten(1).std(1)[None, :, None]
        first = series_facts(real, lags)
        places = torch.triu_indices(real.shape[1], real.shape[1], 1)
        steps = range(1, lags + 1)
        for (name, x), color in zip(laws.items(), COLORS, strict=False):
            facts = series_facts(x, lags)
            z = ((x.double() - mean) / spread).flatten()
            density.hist(
                z.clamp(-8, 8).numpy(), 65, (-8.1, 8.1), density=True, histtype="step", color=color, label=name
            )
            losses = (-z[z < 0]).sort(descending=True).values
            survival.plot(losses.numpy(), (torch.arange(1, len(losses) + 1) / len(z)).numpy(), color=color)
            for axes, values in ((memory, facts.acf), (sizes, facts.acf_abs), (lever, facts.leverage)):
                axes.plot(steps, values.mean(0).numpy(), color=color)
            if name != next(iter(laws)) and len(places[0]):
                pairs = (m[places[0], places[1]].numpy() for m in (first.correlation, facts.correlation))
                together.scatter(*pairs, color=color, s=18)
        _titles(density, "returns", "standard deviations of the real ones", "density", log="y")
        density.legend()
        _titles(survival, "losses beyond x", "x, standard deviations", "share of days", log="xy")
        survival.set(xlim=(0.5, None), ylim=(1e-5, 1), xticks=[0.5, 1, 2, 5, 10])
        _titles(memory, "autocorrelation of r", "lag, days")
        _titles(sizes, "autocorrelation of |r|", "lag, days")
        _titles(lever, "leverage: r now, r² later", "lag, days")
        for axes in (memory, sizes, lever):
            axes.axhline(0, color="#9aa3ab", linewidth=0.8)
        _titles(together, "correlations of pairs", "real", "law's")
        middle = float(first.correlation.mean())
        together.axline((middle, middle), slope=1, color="#9aa3ab", linewidth=0.8)
        figure.savefig(path)


def _titles(axes: Axes, title: str, x: str, y: str = "", log: str = "") -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    for name in log:  # the style has no mathematical text, which a logarithm's own labels are
        {"x": axes.set_xscale, "y": axes.set_yscale}[name]("log")
        axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
