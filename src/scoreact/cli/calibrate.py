"""The command `calibrate`: tune a model so that statistics of its samples have the means that are wanted."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from ..runs.source import Source, new_folder, open_source
from ..support.errors import SettingError
from ..training.config import Config, updated
from .parser import Parser, positive, whole
from .train import NO_REPORT, setting_arguments, train_source

OWN = {"kl_weight": 1.0}  # lambda is in nats
TAKEN = ("samples", "rounds", "kl_weight", "target_kl")  # names that mean something else here, or are lambda's business


def numbers(text: str) -> list[float]:
    """Numbers with commas between, for argparse."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or several with commas between, got {text!r}") from None


def calibrate_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "recipe",
        metavar="RECIPE|RUN_DIR",
        help="a recipe, a model's folder, my_model.py:build; of a run the tuned model",
    )
    add("--statistic", action="append", default=[], metavar="SPEC", help="my_stats.py:function of samples [n, ...] to [n] or "
        "[n, k], or a known reward; may be given several times")  # fmt: skip
    add("--target", action="append", default=[], type=numbers, metavar="NUMBER", help="its mean; of [n, k] k numbers with "
        "commas between; one --target for each --statistic, in their order")  # fmt: skip
    add("--tolerance", type=positive, default=0.05, metavar="FLOAT", help="how far a mean may be from its target, in standard "
        "deviations of the statistic under the pretrained model [default 0.05]")  # fmt: skip
    add("--samples", type=whole(2), default=4000, metavar="INT", help="of each ensemble [default 4000]")
    add("--rounds", type=whole(1), default=6, metavar="INT", help="of training, at most [default 6]")
    add("--also", action="append", default=[], metavar="SPEC", help="another statistic, whose change is reported")
    add("--out", metavar="DIR", help="folder of the run, new or empty [default runs/RECIPE-001, -002, ...]")
    add("--resume-or-start", action="store_true", help="for jobs that are queued again: go on with the calibration in --out "
        "where one was begun, else start it")  # fmt: skip
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the recipe")
    add("--prompts", metavar="FILE", help="of a pipeline, as of `train`")
    add("--no-report", **NO_REPORT)
    setting_arguments(parser, updated(Config(), OWN), TAKEN)


def calibrate(options: argparse.Namespace) -> int:
    """Calibrate and say what was reached; 1 where a target was not."""
    if not options.statistic:
        raise SettingError("no --statistic is given; give --statistic my_stats.py:function --target NUMBER.")
    if len(options.statistic) != len(options.target):
        raise SettingError(
            f"{len(options.statistic)} of --statistic and {len(options.target)} of --target are given; give one each."
        )
    if options.resume_or_start and not options.out:
        raise SettingError("--resume-or-start needs --out, the folder that is looked into.")
    from ..api.calibrate import calibrate as run
    from ..api.calibration_folder import begun

    source = _source(options)
    with contextlib.nullcontext(Path(options.out)) if options.out else new_folder(source.recipe) as out:
        resume = options.resume_or_start and begun(Path(out))
        try:
            found = run(
                source, options.statistic, [number for target in options.target for number in target],
                tolerance=options.tolerance, samples=options.samples, rounds=options.rounds, also=options.also, out=out,
                resume=resume, say=lambda line: print(line, flush=True), report=not options.no_report, command=options.command,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"The same command with --out {out} --resume-or-start goes on.") from None
    print(f"\n{found}")
    return 0 if found.met else 1


def _source(options: argparse.Namespace) -> Source:
    """The recipe and settings, as of `train`; of a run its outcome is what to stay near to."""
    words: dict[str, Any] = vars(options)
    words |= {"config": None, "start": None, "from_reference": "first", "reward": "statistics", "reward_option": []}
    if open_source(options.recipe).folder is not None:
        words |= {"recipe": None, "start": options.recipe, "from_reference": "tuned"}
    return train_source(options)
