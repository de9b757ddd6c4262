"""What the command line shows and writes: a run's progress, tables, pictures of samples, settings as text.

Knows metric names and file formats; decides nothing and computes nothing that evaluation.py could.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..runs.run import Result


HEADER = f"{'iteration':>10}  {'reward':>16}  {'KL':>8}  {'J':>16}  {'recovered':>9}  {'elapsed':>8}  {'left':>8}"


# --- numbers ---------------------------------------------------------------------------------------------------------


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


# --- progress --------------------------------------------------------------------------------------------------------


def reference_lines(m: Mapping[str, Any]) -> list[str]:
    """J_ref, J* and whether the estimate of J* can be trusted."""
    effective, exact = m["objective/effective_samples"], m.get("objective/J_star_exact")
    estimate = (
        f"{rounded(m['objective/J_star'])} (95 %: {rounded(m['objective/J_star_low'])} to "
        f"{rounded(m['objective/J_star_high'])}), estimated from the reference's samples"
    )
    if not math.isfinite(m["objective/J_star_high"]):
        estimate, word = "unknown", "a prompt with a single sample says nothing of it: raise reference_batches."
    elif m["objective/trusted"]:
        word = f"to be trusted ({effective:.0f} effective samples)."
    elif effective < 20:
        few = f"{effective:.1f} effective samples, 20 are needed"
        word = f"NOT to be trusted ({few}): raise reference_batches or kl_weight."
    else:
        word = "NOT to be trusted (its interval is wide against J* - J_ref): raise reference_batches."
    lines = [f"J_ref {rounded(m['objective/J_ref'], m['objective/J_ref_se'])}, the pretrained model's mean reward."]
    if exact is not None:
        lines.append(f"J*    {rounded(exact)}, the optimum in closed form.")
        return [*lines, f"      {estimate}, {word}"]
    return [*lines, f"J*    {estimate}, {word}"]


def iteration_line(m: Mapping[str, Any], iterations: int, left: float) -> str:
    done = f"{m['iteration']}/{iterations}"
    return (
        f"{done:>10}  {rounded(m.get('reward/mean')):>16}  {rounded(m.get('policy/kl')):>8}  "
        f"{rounded(m.get('objective/J_training')):>16}  {'':>9}  {elapsed(m['seconds']):>8}  {elapsed(left):>8}"
    )


def evaluation_line(m: Mapping[str, Any]) -> str:
    return (
        f"{'held out':>10}  {rounded(m['reward/heldout'], m['reward/heldout_se']):>16}  {rounded(m['policy/kl']):>8}  "
        f"{rounded(m['objective/J'], m['objective/J_se']):>16}  {share(m.get('objective/recovered')):>9}"
    )


class Screen:
    """A run's events as lines; at a terminal also a bar below them. Use as a context and as `on_event`."""

    def __init__(self, iterations: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.iterations = iterations
        self.trained = 0  # iterations in this process
        self._begin = time.perf_counter()
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("samples of the pretrained model", total=iterations)

    def __enter__(self) -> Screen:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, line: str, style: str | None = None) -> None:
        if self._bar is not None:
            self._console.print(line, style=style, markup=False)
        else:
            print(line, flush=True)

    def __call__(self, kind: str, m: Mapping[str, Any]) -> None:
        if kind == "reference":
            self.reference(m)
            self._advance("first evaluation", 0)
        elif kind == "iteration":
            self.trained += 1
            now = time.perf_counter()
            rate = (now - self._begin) / max(1, self.trained - 1)
            if self.trained == 1:  # a process's first iteration is its slowest, so the others are counted from here
                self._begin = now
            self.show(iteration_line(m, self.iterations, rate * (self.iterations - m["iteration"])))
            self._advance("training", m["iteration"])
        elif kind == "evaluation":
            self.show(evaluation_line(m), "bold")
            if not self.trained:  # the look at the reference comes once; it does not count for the time left
                self._begin = time.perf_counter()
        elif kind == "guard":
            self.show(f"{'guard':>10}  {m['text']}", "yellow")
        elif kind == "interrupted":  # called from a signal handler: only os.write is safe there
            os.write(2, b"\nInterrupted: this iteration is finished and saved first; once more stops at once.\n")

    def reference(self, m: Mapping[str, Any]) -> None:
        """J_ref and J*, then the header of the lines to come."""
        for line in [*reference_lines(m), "", HEADER]:
            self.show(line)

    def _advance(self, what: str, completed: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=completed)


def waiting(what: str) -> AbstractContextManager[Any]:
    """A spinner at a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()


def summary(result: Result) -> list[str]:
    """A finished run in a few lines: reward, KL, J before and after, the judge's words, costs."""
    evaluations = [line for line in result.history if line.get("evaluation")]
    before, after = evaluations[0], result.final
    costs = next((line for line in reversed(result.history) if "cost/reward_calls" in line), None)
    reward = rounded(after["reward/heldout"], after["reward/heldout_se"])
    lines = [
        f"reward     {rounded(before['reward/heldout'])} -> {reward}",
        f"J          {rounded(before['objective/J'])} -> {rounded(after['objective/J'], after['objective/J_se'])}, "
        f"{share(after.get('objective/recovered'))} of J* - J_ref recovered",
        f"path KL    {rounded(after['policy/kl'], after.get('policy/kl_se'))} nats",
    ]
    others = [name for name in sorted(after) if name.startswith(("judge/", "sample/"))]
    width = max([10, *map(len, others)])
    lines += [f"{name:<{width}} {rounded(before.get(name))} -> {rounded(after[name])}" for name in others]
    if costs is not None:
        calls = f"{costs['cost/reward_calls']:,} reward calls, {costs['cost/network_calls']:,} network calls"
        lines.append(f"cost       {elapsed(costs['seconds'])}, {calls}")
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [header, *rows]
    ]


# --- samples as files ------------------------------------------------------------------------------------------------


def write_samples(decoded: Tensor, prompts: Sequence[str], columns: int, folder: Path, name: str) -> list[Path]:
    """Pictures [B, C, H, W] as a PNG grid; points and series as .npy, [B, d] as .csv too. Returns the files."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    if decoded.ndim == 4 and decoded.shape[1] in (1, 3):
        path = folder / f"{name}.png"
        _grid(decoded, columns).save(path)
        return [path]
    array = decoded.cpu().numpy()
    written = [folder / f"{name}.npy"]
    np.save(written[0], array)
    if array.ndim == 2:
        written.append(folder / f"{name}.csv")
        with written[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", *(f"x{i}" for i in range(array.shape[1]))])
            writer.writerows([prompt, *row] for prompt, row in zip(prompts, array.tolist(), strict=True))
    return written


def _grid(images: Tensor, columns: int) -> Any:
    """Pictures in [0, 1] as a PIL image, small ones enlarged by a whole factor, two white pixels between."""
    import numpy as np
    from PIL import Image

    factor = max(1, 112 // images.shape[-1])
    pixels = (images.float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3)
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    canvas = np.full((channels, rows * (height + 2) - 2, columns * (width + 2) - 2), 255, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        canvas[:, top : top + height, left : left + width] = picture
    return Image.fromarray(canvas[0] if channels == 1 else canvas.transpose(1, 2, 0))
