"""A pretraining's events as lines. Prints; computes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .numbers import elapsed, number

FAR = 0.1  # of a spread from the data's, from which on it is said
HEADER = f"{'step':>10}  {'loss':>8}  {'held out':>9}  {'on train':>9}  {'per second':>10}  {'elapsed':>8}  {'left':>8}"


class Words:
    """Takes events of `runs.pretraining` and prints a line of each."""

    def __call__(self, kind: str, line: Mapping[str, Any]) -> None:
        if kind == "interrupted":  # called from a signal handler: only os.write is safe there
            os.write(2, b"\nInterrupted: this step is finished and saved first; once more stops at once.\n")
        elif kind == "note":
            print(f"note: {line['text']}", flush=True)
        elif kind == "begin":
            self._begin(line)
        elif kind in ("progress", "look"):
            self._line(line)
        elif kind == "path":
            print(_path(line), flush=True)
        elif kind == "finished":
            self._finished(line)

    def _begin(self, line: Mapping[str, Any]) -> None:
        shape = " x ".join(map(str, line["shape"]))
        classes = f" of {len(line['classes'])} classes" if line["classes"] else ""
        network = line["network"]
        print(f"{line['examples']:,} {line['kind']} of {shape}{classes} to learn from, {line['heldout']:,} held out")
        print(f"{network['class']}, {line['parameters']:,} parameters, on {line['device']}; {_precision(line)}")
        if line["step"]:
            print(f"goes on after step {line['step']:,}")
        print(f"\n{HEADER}", flush=True)

    def _line(self, line: Mapping[str, Any]) -> None:
        heldout, train = (number(line[name]) if name in line else "" for name in ("loss/heldout", "loss/train"))
        speed, left = number(line["examples_per_second"]), elapsed(line["left"])
        print(
            f"{line['step']:>10,}  {number(line['loss']):>8}  {heldout:>9}  {train:>9}  {speed:>10}  "
            f"{elapsed(line['seconds']):>8}  {left:>8}",
            flush=True,
        )

    def _finished(self, line: Mapping[str, Any]) -> None:
        if line["rising"]:
            print(
                f"\nThe held-out loss has risen since step {line['kept']:,}, whose weights are kept: the model began to learn "
                "examples by heart. More of them take it further."
            )


def _path(line: Mapping[str, Any]) -> str:
    """What draws the samples from now on, and what it was compared with."""
    tried = [f"{path['steps']} steps of {path['solver']}, {path['spread']:.2f}" for path in line["tried"]]
    said = (
        f"\nsamples are drawn by {line['solver']} on the grid {line['grid']} in {line['steps']} steps: their standard "
        f"deviation is {line['spread']:.2f} of the data's\n           tried: {'; '.join(tried)}"
    )
    if abs(line["spread"] - 1) > FAR:
        said += "\nnote: none of them draws the data's spread; train longer, on more data, or try more --steps."
    return said


def _precision(line: Mapping[str, Any]) -> str:
    name = "bfloat16" if line["bfloat16"] else "float32"
    speeds = line.get("examples_per_second")
    if speeds is None:
        return name
    other = "float32" if line["bfloat16"] else "bfloat16"
    return f"{name}, {number(speeds[name])} examples a second against {number(speeds[other])} in {other}"
