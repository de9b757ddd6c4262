"""The command line: `scoreact COMMAND ...`. Reads words, calls the library, turns every error into one sentence.

A command is a function that adds its arguments to a parser and one that runs; both are in COMMANDS. torch and what
needs it are imported inside commands, so that `scoreact --help` answers at once. Exit status: 0, 1 (the run failed, or
a check found a problem), 2 (the input cannot be used), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..support.names import known_name
from . import bench as arena
from . import look, preferences, rate, server
from .calibrate import calibrate, calibrate_arguments
from .check import check, check_arguments
from .errors import EXPECTED, sentence_of, warn
from .facts import facts, facts_arguments
from .grid import grid, grid_arguments
from .loop import loop, loop_arguments
from .parser import Parser
from .pretrain import ABOUT as LEARN
from .pretrain import SHIPPED, pretrain, pretrain_arguments, pretrain_shipped
from .reward import classify, classify_arguments, discriminate, discriminate_arguments, fit, fit_arguments
from .score import score, score_arguments
from .train import ABOUT, resume, resume_arguments, train, train_arguments, train_help
from .update import update, update_arguments

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait actively halve a small machine


def list_recipes(options: argparse.Namespace) -> int:
    from ..recipes.base import recipes

    found = recipes()
    width = max(map(len, found))
    for recipe in found.values():
        print(f"{recipe.name:<{width}}  {recipe.summary}")
    return 0


@dataclass(frozen=True)
class Command:
    about: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "recipes": Command("List the ready-made runs.", lambda parser: None, list_recipes),
    "train": Command(ABOUT, train_arguments, train),
    "resume": Command("Continue an interrupted run exactly where it was saved.", resume_arguments, resume),
    "sample": Command("Draw samples of a run or of a recipe's pretrained model.", look.sample_arguments, look.sample),
    "update": Command("Move a run on from rewards that came from outside.", update_arguments, update),
    "evaluate": Command(
        "Measure a run: held-out reward, KL, J, other solvers and steps.", look.evaluate_arguments, look.evaluate
    ),
    "score": Command(
        "Say how abnormal each row of a file is to a model: likelihoods and others.", score_arguments, score
    ),
    "grid": Command("Search the time grid for so many steps of a sampler.", grid_arguments, grid),
    "calibrate": Command(
        "Tune a model so that statistics of its samples have the means you name.", calibrate_arguments, calibrate
    ),
    "facts": Command("Stylised facts of series of returns, beside the data's.", facts_arguments, facts),
    "rate": Command("Let people compare samples on a page, and keep what they answer.", rate.rate_arguments, rate.rate),
    "loop": Command("People compare, a reward is fitted, a model is tuned, and again.", loop_arguments, loop),
    "preferences import": Command(
        "Add comparisons in another form to a store.", preferences.import_arguments, preferences.import_
    ),
    "preferences export": Command(
        "Write a store's comparisons for other programs.", preferences.export_arguments, preferences.export
    ),
    "export": Command(
        "Write a run's weights as other programs load them, with a model card.", look.export_arguments, look.export
    ),
    "report": Command("Write a run's report.html anew.", look.report_arguments, look.report),
    "check": Command("Say in plain sentences what is wrong with a reward, a recipe or a run.", check_arguments, check),
    "reward discriminate": Command(
        "Make a reward of data: how much likelier a sample is there than among the model's own.",
        discriminate_arguments,
        discriminate,
    ),
    "reward classify": Command(
        "Make a reward of labelled data: how probable a class is, given the sample.", classify_arguments, classify
    ),
    "reward fit": Command("Make a reward of what people answered: `rate` collects it.", fit_arguments, fit),
    "reward-server": Command(
        "Serve a reward over HTTP to runs in other processes.", server.server_arguments, server.serve
    ),
    "bench": Command("Compare update rules at equal budgets, over seeds.", arena.bench_arguments, arena.bench),
    "tune": Command("Search an update rule's settings, before `bench`.", arena.tune_arguments, arena.tune),
    "pretrain": Command(LEARN, pretrain_arguments, pretrain),
}


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: scoreact COMMAND ...",
            "",
            "Fine-tune diffusion and flow models to a reward by continuous-time RL: the score is the action.",
            "",
            *lines,
            "",
            "`scoreact COMMAND --help` says more. --version; --traceback shows where an error came from.",
            "First steps: `scoreact train gaussian`, seconds on a laptop.",
        ]
    )


def group(first: str) -> dict[str, Command]:
    """The commands of two words that begin with this one."""
    return {name: command for name, command in COMMANDS.items() if name.startswith(f"{first} ")}


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that words name, one or two of them, and the rest. Raises SettingError."""
    if group(words[0]):
        second = words[1] if len(words) > 1 else ""
        return known_name(f"{words[0]} {second}".strip(), COMMANDS, "unknown command"), list(words[2:])
    return known_name(words[0], COMMANDS, "unknown command"), list(words[1:])


def run(words: Sequence[str]) -> int:
    """One command, errors as exceptions."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from .. import __version__

        print(f"scoreact {__version__}")
        return 0
    if (commands := group(words[0])) and (len(words) == 1 or words[1] in ("-h", "--help")):
        print("\n".join(f"{name}  {command.about}" for name, command in commands.items()))
        print("\nEach has its own --help.")
        return 0
    name, rest = command_of(words)
    if name == "pretrain" and rest and rest[0] in SHIPPED:
        return pretrain_shipped(rest)
    command, parser = COMMANDS[name], Parser(name, COMMANDS[name].about)
    command.arguments(parser)
    if "-h" in rest or "--help" in rest:
        others = [word for word in rest if word not in ("-h", "--help")]
        print(train_help(others) if name == "train" else parser.format_help(), end="")
        return 0
    options = parser.parse(rest)
    options.command = shlex.join(["scoreact", *words])
    return command.run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; every error is one sentence on stderr. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± gets a question mark, not an error
    previous = interrupting()
    try:
        status = run(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        warn(f"interrupted. {error}".strip())
        return 130
    except BrokenPipeError:  # `scoreact recipes | head`
        return 1
    except Exception as error:
        if show:
            traceback.print_exc()
        text = sentence_of(error)
        if not isinstance(error, EXPECTED):
            text = f"unexpected {type(error).__name__}: {text} Repeat with --traceback to see where."
        warn(text)
        return 2 if isinstance(error, ValueError | FileExistsError) else 1
    finally:
        hush()
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupting() -> dict[int, Any]:
    """Let the signals that end a job interrupt as Ctrl-C does, but for those that are silenced; the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    return {number: signal.signal(number, signal.default_int_handler) for number in taken}


def hush() -> None:
    """Where nobody reads what is printed any more, the interpreter must not try to write the rest of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
