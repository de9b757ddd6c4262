"""A run's events as lines, at a terminal with a bar below them; and a finished run in a few lines. Prints.

Knows metric names; computes nothing.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .numbers import elapsed, rounded, share

HEADER = f"{'iteration':>10}  {'reward':>16}  {'KL':>8}  {'J':>16}  {'recovered':>9}  {'elapsed':>8}  {'left':>8}"


def somebody_looks() -> bool:
    """Whether output goes to a terminal or to a notebook, and not to a file or a pipe."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def reference_lines(m: Mapping[str, Any]) -> list[str]:
    """J_ref, J* and whether the estimate of J* can be trusted."""
    effective, exact = m["objective/effective_samples"], m.get("objective/J_star_exact")
    pooled = ", pooled over prompts" if m.get("objective/pooled") else ""
    estimate = (
        f"{rounded(m['objective/J_star'])} (95 %: {rounded(m['objective/J_star_low'])} to "
        f"{rounded(m['objective/J_star_high'])}), estimated from the reference's samples{pooled}"
    )
    high = m["objective/J_star_high"]
    if high is None or not math.isfinite(high):  # a file of lines holds null for what is not finite
        alone = "no prompt was drawn twice" if pooled else "a prompt with a single sample says nothing of it"
        estimate, word = "unknown", f"{alone}: raise reference_batches."
    elif m.get("objective/unsteady_reward"):
        word = "NOT to be trusted (the reward of a sample is not always the same)."
    elif m["objective/trusted"]:
        word = f"to be trusted ({effective:.0f} effective samples)."
    elif effective < 20:
        few = f"{effective:.1f} effective samples, 20 are needed"
        word = f"NOT to be trusted ({few}): raise reference_batches or kl_weight."
    else:
        word = "NOT to be trusted (its interval is wide against J* - J_ref): raise reference_batches."
    lines = []
    if "prompts/heldout" in m:
        lines = [
            f"{m['prompts/trained']:,.0f} prompts to learn from, {m['prompts/heldout']:,.0f} kept out of training."
        ]
    lines += [f"J_ref {rounded(m['objective/J_ref'], m['objective/J_ref_se'])}, the pretrained model's mean reward."]
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


def unseen_line(m: Mapping[str, Any]) -> str:
    reward = rounded(m["reward/heldout_prompts"], m["reward/heldout_prompts_se"])
    gain = rounded(m["reward/heldout_prompts_gain"], m["reward/heldout_prompts_gain_se"])
    return f"{'unseen':>10}  {reward:>16}  on prompts kept out of training; gain on the pretrained model's {gain}"


class Progress:
    """A run's events as lines; at a terminal also a bar below them. Use as a context and as `on_event`."""

    def __init__(self, iterations: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.iterations = iterations
        self.trained = 0  # iterations in this process
        self.began = False  # whether anything was measured in it
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

    def __enter__(self) -> Progress:
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
        self.began |= kind in ("reference", "evaluation", "iteration")
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
            if "reward/heldout_prompts" in m:
                self.show(unseen_line(m))
            if not self.trained:  # the look at the reference comes once; it does not count for the time left
                self._begin = time.perf_counter()
        elif kind == "guard":
            self.show(f"{'guard':>10}  {m['text']}", "yellow")
        elif kind == "interrupted":  # called from a signal handler: only os.write is safe there
            os.write(2, b"\nInterrupted: this iteration is finished and saved first; once more stops at once.\n")

    def resumed(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Say again what the run began with, before it goes on."""
        for line in history:
            if line.get("reference"):
                self.reference(line)

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


def summary_lines(history: Sequence[Mapping[str, Any]], final: Mapping[str, Any]) -> list[str]:
    """A finished run in a few lines: reward, KL, J before and after, the judge's words, costs."""
    evaluations = [line for line in history if line.get("evaluation")]
    before, after = next(iter(evaluations), final), final
    costs = next((line for line in reversed(history) if "cost/reward_calls" in line), None)
    still = [
        line for line in history if line.get("guard") == "unmoved" and line["iteration"] == history[-1]["iteration"]
    ]
    reward = rounded(after["reward/heldout"], after["reward/heldout_se"])
    reference = next((line for line in history if "objective/trusted" in line), {})
    known = "objective/J_star_exact" in reference or reference.get("objective/trusted", 1.0)
    lines = [
        f"reward     {rounded(before['reward/heldout'])} -> {reward}",
        f"J          {rounded(before['objective/J'])} -> {rounded(after['objective/J'], after['objective/J_se'])}, "
        f"{share(after.get('objective/recovered'))} of J* - J_ref recovered{'' if known else ', and J* is not to be trusted'}",
        f"path KL    {rounded(after['policy/kl'], after.get('policy/kl_se'))} nats",
    ]
    lines += [f"NOT MOVED  {line['text']}" for line in still[-1:]]
    if "reward/heldout_prompts" in after:
        change = f"{rounded(before.get('reward/heldout_prompts'))} -> {rounded(after['reward/heldout_prompts'])}"
        gain = rounded(after["reward/heldout_prompts_gain"], after["reward/heldout_prompts_gain_se"])
        lines.insert(1, f"unseen     {change}, a gain of {gain} on prompts kept out of training")
    shown = ("judge/", "sample/", "reward/heldout/", "reward/auc", "reward/sigma")
    others = [name for name in sorted(after) if name.startswith(shown)]
    width = max([10, *map(len, others)])
    lines += [f"{name:<{width}} {rounded(before.get(name))} -> {rounded(after[name])}" for name in others]
    if costs is not None:
        calls = f"{costs['cost/reward_calls']:,} reward calls, {costs['cost/network_calls']:,} network calls"
        lines.append(f"cost       {elapsed(costs['seconds'])}, {calls}")
    if looks := [line for line in evaluations if "cost/look_reward_calls" in line]:
        rewards, network = (sum(line[f"cost/look_{what}_calls"] for line in looks) for what in ("reward", "network"))
        more = f"{rewards:,} more reward calls, {network:,} more network calls"
        lines.append(f"looking    {len(looks)} evaluation{'s' * (len(looks) != 1)}: {more}")
    return lines
