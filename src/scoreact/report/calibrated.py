"""What a calibration came to, in lines and as a picture: histograms of each statistic before and after.

Knows the content of calibration.json; does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .numbers import number, side_by_side


def calibration_lines(facts: Mapping[str, Any]) -> list[str]:
    """Targets and what was reached, the price in nats, and what else moved; ± are halves of 95 % intervals."""
    rows = [
        [
            row["name"], _with(row["before"], row["before_se"]), number(row["target"]), _with(row["after"], row["after_se"]),
            number(row["weight"]), _with(row["first_weight"], row["first_weight_se"]), "yes" if row["met"] else "NO",
        ]
        for row in facts["statistics"]
    ]  # fmt: skip
    lines = side_by_side(["statistic", "before", "target", "reached", "lambda", "lambda at first", "met"], rows)
    lines += ["", f"path KL    {_with(facts['path_kl'], facts['path_kl_se'])} nats: how implausible this is, at most"]
    effective = facts["effective_samples"]
    if facts["trusted"]:
        lines.append(
            f"least KL   {_with(facts['least_kl'], facts['least_kl_se'])} nats of any law with these means, from "
            f"{facts['samples']:,} samples of the pretrained model, worth {effective:,.0f} there"
        )
    else:
        lines.append(
            f"least KL   not known: {facts['samples']:,} samples of the pretrained model are worth {effective:,.0f} at the "
            "targets"
        )
    lines += ["", "what else moved, from the same noise:"]
    cells = [
        [
            row["name"], number(row["before"]), number(row["after"]), _with(row["change"], row.get("change_se")),
            number(row["change"] / row["std_before"]) if row.get("std_before") else "",
        ]
        for row in [*_spreads(facts["statistics"]), *facts["moved"]]
    ]  # fmt: skip
    lines += side_by_side(["", "before", "after", "change", "in standard deviations"], cells)
    lines += [f"note: {note}" for note in facts["notes"]]
    if not facts["met"]:
        missed = [row["name"] for row in facts["statistics"] if not row["met"]]
        lines.append(
            f"not reached within {facts['tolerance']:g} standard deviations: {', '.join(missed)}; give more rounds or "
            "iterations, a larger tolerance, or a nearer target."
        )
    return lines


def _spreads(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The standard deviations of what was calibrated."""
    return [
        {"name": f"spread of {row['name']}", "before": row["std_before"], "after": row["std"],
         "change": row["std"] - row["std_before"]}
        for row in rows
    ]  # fmt: skip


def _with(value: float | None, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(1.96 * error)}"


def draw_calibration(path: Path, columns: Sequence[tuple[str, Tensor, Tensor]], targets: Sequence[float]) -> None:
    """Histograms, a panel a statistic (name, before [n], after [n]), over the middle 99.8 %; the target as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    from .figures import OPTIMUM, REFERENCE, STYLE, TUNED

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(columns), 3.2), layout="constrained")
        panels = figure.subplots(1, len(columns), squeeze=False)[0]
        for axes, (name, before, after), target in zip(panels, columns, targets, strict=True):
            both = torch.cat([before, after])
            low, high = (float(both.quantile(q)) for q in (0.001, 0.999))
            low, high = min(low, target), max(high, target)
            for values, color, label in ((before, REFERENCE, "before"), (after, TUNED, "after")):
                axes.hist(
                    values.numpy(), bins=50, range=(low, high), density=True, color=color, alpha=0.45, label=label
                )
                axes.axvline(float(values.mean()), color=color, linewidth=1.2)
            axes.axvline(target, color=OPTIMUM, linestyle="--", linewidth=1.4, label="target of the mean")
            axes.set(title=name, yticks=[])
            axes.legend()
        figure.savefig(path, dpi=110)
