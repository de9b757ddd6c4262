"""The picture of a calibration: what was said against what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_reliability(bins: Sequence[Mapping[str, float]], path: Path, what: str = "real") -> None:
    """A point a bin with one standard error, over the diagonal on which all would lie.

    bins: of `calibration`. what: the probability is of being that.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.errorbar(
        [b["said"] for b in bins], [b["found"] for b in bins], [b["found_se"] for b in bins], fmt="o", markersize=4
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel=f"probability of being {what}, as said", ylabel=f"share that was {what}")
    axes.set_aspect("equal")
    figure.savefig(path, dpi=120)
