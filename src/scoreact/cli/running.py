"""A run at the command line: what it shows while it trains, its report, and how it goes on."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..runs.source import Source, need_reward, short_name
from ..support.errors import Diverged
from .errors import EXPECTED, Failed, sentence_of


def run_training(
    source: Source, command: str, *, resuming: bool = False, extend: bool = False, trackers: Sequence[str] = (),
    accept_changes: bool = False, report: bool = True,
) -> int:  # fmt: skip
    """Train, show, report."""
    from ..api.start import train_source as start
    from ..report.numbers import elapsed
    from ..report.progress import Progress, summary_lines
    from ..rewards.base import OUTSIDE
    from ..runs.record import is_whole
    from ..support.files import read_lines

    out = source.folder
    assert out is not None
    if os.environ.get("RANK", "0") != "0":  # of several processes the first speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until this process ends
    problem = source.build()
    need_reward(source, problem)
    context = problem.labels.get("problem", source.recipe.summary)
    print(f"{short_name(source.recipe)}: {context}\nrun folder {out}\n", flush=True)
    with Progress(source.config.iterations) as screen:
        try:
            if resuming:
                screen.resumed(read_lines(out / "metrics.jsonl", is_whole))
            result = start(
                source,
                command,
                resume=resuming,
                extend=extend,
                on_event=screen,
                trackers=trackers,
                problem=problem,
                accept_changes=accept_changes,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_resume(out)) from None
        except SystemExit as error:  # code of the user's that the run calls
            text = f"something that the run calls ended the program: sys.exit({error.code!r})."
            raise Failed(f"{text} {how_to_resume(out)}") from error
        except EXPECTED as error:
            if not screen.began or isinstance(error, Diverged):
                raise
            # the input was good enough to begin: what fails now is the run
            raise Failed(f"{sentence_of(error)} {how_to_resume(out)}") from error
    if problem.reward is OUTSIDE:
        print(
            f"{out} waits for rewards: `scoreact sample {out} --for-update`, then `scoreact update {out} --rewards FILE`"
        )
        return 0
    print("\n" + "\n".join(summary_lines(result.history, result.final)))
    if result.stopped:
        print(f"stopped early: {result.stopped}")
    print(f"weights    {out / 'model.safetensors'}")
    if not report or os.environ.get("RANK", "0") != "0":
        return 0
    begin = time.perf_counter()
    write_report(source)
    print(f"{'':<10} written in {elapsed(time.perf_counter() - begin)}; --no-report leaves it out")
    return 0


def write_report(source: Source) -> int:
    """Write report.html of the run anew, with a model freshly built, and say where it is."""
    from ..report import html
    from ..report.progress import waiting

    assert source.folder is not None
    with waiting("report"):
        path = html.write(source.folder, source.build())
    print(f"report     {path}")
    return 0


def how_to_resume(out: Path) -> str:
    saved = sorted(p.name for p in (out / "checkpoints").glob("[0-9]*")) if (out / "checkpoints").is_dir() else []
    if not saved:
        return (
            "Nothing was saved yet, so there is nothing to resume; the folder can be given to `scoreact train` again."
        )
    what = f"Iteration {int(saved[-1])}" if int(saved[-1]) else "The look at the pretrained model"
    return f"{what} is saved; continue with `scoreact resume {shlex.quote(str(out))}`."
