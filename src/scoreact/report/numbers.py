"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number(x: object) -> str:
    """Three significant digits, thousands separated; n/a for what was not measured."""
    if not isinstance(x, int | float) or (isinstance(x, float) and math.isnan(x)):
        return "n/a"
    if isinstance(x, int) or not math.isfinite(x):
        return f"{x:,}"
    if x != 0 and not 1e-4 <= abs(x) < 1e12:
        return f"{x:.2e}"
    return f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x)))) if x else 2}f}"


def aligned(values: Sequence[float]) -> list[str]:
    """One number of decimals for a column: what three significant digits of its largest number need."""
    largest = max((abs(x) for x in values if math.isfinite(x)), default=0.0)
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 2
    return [f"{x:,.{decimals}f}" if math.isfinite(x) else "n/a" for x in values]


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def rounded(value: float | None, error: float | None = None) -> str:
    """Four significant digits, `± standard error` behind; a dash for what is not there."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"
    return text if error is None or math.isnan(error) else f"{text} ± {error:.2g}"


def share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.0f} %"


def elapsed(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def survey_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a survey: what is changed, rewards, gain and its share, with halves of 95 % intervals."""

    def cell(row: Mapping[str, Any], name: str, scale: float = 1.0) -> str:
        value, error = row.get(name), row.get(f"{name}_se")
        if value is None or error is None or math.isnan(value):
            return "-"
        return f"{number(scale * value)} ± {number(scale * 1.96 * error)}"

    names = ("reference_reward", "reward", "gain")
    cells = [[str(row["change"]), *(cell(row, name) for name in names), cell(row, "share", 100)] for row in rows]
    return ["changed", "before", "after", "gain", "% of the gain"], cells


def copies_cells(found: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of how near samples are to the training data; see `evaluation.memorisation`."""
    cells = [
        [
            name, f"{row['generated']:.3g}", f"{row['heldout']:.3g}",
            *(f"{row[word]:.3f} ± {row[f'{word}_half_width']:.3f}" for word in ("closer", "to_training")),
            f"{100 * row['copies']:.1f} %",
        ]
        for name, row in found.items()
    ]  # fmt: skip
    return ["", "sample", "held-out", "sample is closer", "training is closer", "very near"], cells


def side_by_side(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [header, *rows]
    ]
