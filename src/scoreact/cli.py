"""The command line: `scoreact COMMAND ...`. Reads words, calls the library, turns every error into one sentence.

A command is a function that adds its arguments to a parser and one that runs; both are in COMMANDS. torch and what
needs it are imported inside commands, so that `scoreact --help` answers at once. Exit status: 0, 1 (the run failed, or
a check found a problem), 2 (the input cannot be used), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait actively halve a small machine

from . import cli_bench as arena
from . import cli_look as look
from . import cli_output as output
from . import cli_server as server
from .cli_source import (
    Parser,
    Source,
    assignments,
    find_recipe,
    new_folder,
    open_run,
    recipe_options,
    whole,
)
from .config import Config, fields_of, read, rule_fields, updated
from .names import known_name

HEADINGS = {  # the first setting of each group of `train --help`
    "algorithm": "the run",
    "steps": "paths",
    "learning_rate": "policy update",
    "value": "value network",
    "heldout_samples": "evaluation and limits",
}


class Failed(Exception):
    """A run that started and could not end; its message says what to do. Exit status 1."""


# --- train, resume ---------------------------------------------------------------------------------------------------


def train_arguments(parser: Parser, config: Config | None = None) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="`scoreact recipes` lists them")
    add = parser.add_argument_group("what and where").add_argument
    add(
        "--config", metavar="FILE", help="settings as YAML or JSON, or a run's config.json; the command line goes first"
    )
    add("--out", metavar="DIR", help="folder of the run, new or empty [default runs/RECIPE-001, -002, ...]")
    add("--reward", metavar="SPEC", help="instead of the recipe's: my.py:function, module:function, http://HOST:PORT, or "
        "a known name")  # fmt: skip
    add("--reward-option", action="append", default=[], metavar="NAME=VALUE", help="an option of that reward")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the recipe [listed below]")
    add("--prompts", metavar="FILE", help="of a pipeline: a text file, one prompt a line; one prompt; file.py:function")
    add("--tensorboard", action="store_true", help="write TensorBoard events too")
    add("--print-config", action="store_true", help="write the settings as YAML and train nothing")

    def setting(field: dataclasses.Field[Any], hint: Any, text: str) -> None:
        add(
            *dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"]),
            dest=f"setting:{field.name}", default=None, metavar=output.setting_metavar(field, hint), help=text,
        )  # fmt: skip

    config = config or Config()
    for field, hint in fields_of(Config):
        if field.name in HEADINGS:
            add = parser.add_argument_group(HEADINGS[field.name]).add_argument
        setting(field, hint, output.setting_help(field, getattr(config, field.name)).replace("%", "%%"))
    shown = set()
    for name in [config.algorithm, *known_rules()]:  # the other rules' settings are taken too, and not shown
        add = parser.add_argument_group(f"the rule: {name}").add_argument
        for field, hint in rule_fields(name):
            if field.name not in shown:
                shown.add(field.name)
                own = name == config.algorithm
                text = output.setting_help(field, config.rule[field.name]) if own else argparse.SUPPRESS
                setting(field, hint, text.replace("%", "%%"))


def known_rules() -> dict[str, type]:
    from .algorithms import rules

    return dict(rules())


def train_help(words: Sequence[str]) -> str:
    """The help of `train`, with the recipe's own defaults if its name is among the words."""
    plain = Parser("train", COMMANDS["train"].about)
    train_arguments(plain)
    plain.usage = "scoreact train RECIPE [options]"
    known = plain.parse_known_args(words)[0]
    changes = {"algorithm": algorithm} if (algorithm := getattr(known, "setting:algorithm")) else {}
    if known.recipe is None:
        parser = Parser("train", COMMANDS["train"].about)
        train_arguments(parser, updated(Config(), changes))
        parser.usage = plain.usage
        return parser.format_help() + "\nDefaults differ by recipe: `scoreact train RECIPE --help` shows them.\n"
    recipe = find_recipe(known.recipe)
    parser = Parser("train", f"{recipe.name}: {recipe.summary}")
    train_arguments(parser, updated(recipe.config, changes))
    parser.usage = f"scoreact train {recipe.name} [options]"
    options = [f"  --option {key}={value}" for key, value in recipe.options.items()]
    return parser.format_help() + "\n".join(
        ["\noptions of this recipe, with their defaults:", *(options or ["  none"]), ""]
    )


def train_source(options: argparse.Namespace) -> Source:
    """Recipe defaults, then the file, then the command line."""
    recipe = find_recipe(options.recipe)
    content = read(options.config) if options.config else {}
    if isinstance(content.get("config"), dict):  # a run's config.json: repeat that run
        described = content.get("description") or {}
        own = described.get("recipe", recipe.name) == recipe.name
        content = {
            **content["config"],
            **({k: described.get(k) for k in ("reward", "reward_options", "options")} if own else {}),
        }
    in_file, reward = content.pop("options", None) or {}, options.reward or content.get("reward")
    reward_options = {} if options.reward else content.get("reward_options") or {}
    content = {key: value for key, value in content.items() if key not in ("reward", "reward_options")}
    if not isinstance(in_file, dict):
        raise ValueError(f"config file {options.config!r}: options is {in_file!r}; expected `name: value` lines.")
    build_options = recipe_options(recipe, {**in_file, **assignments(options.option, "--option")})
    if options.prompts is not None:
        if "prompts" not in recipe.options:
            raise ValueError(f"recipe {recipe.name} has prompts of its own; --prompts is for pipelines.")
        path = Path(options.prompts).expanduser()
        build_options["prompts"] = str(path.resolve()) if path.is_file() else _portable(options.prompts)
    settings = {
        key.removeprefix("setting:"): _typed(key.removeprefix("setting:"), value)
        for key, value in vars(options).items()
        if key.startswith("setting:") and value is not None
    }
    if ":" in str(settings.get("algorithm", "")):
        settings["algorithm"] = _portable(settings["algorithm"])
    config = updated(recipe.config, {**content, **settings}, f"config file {options.config!r}")
    for key, value in assignments(options.reward_option, "--reward-option").items():
        file = Path(value).expanduser() if isinstance(value, str) else None  # by its full path, as the reward itself
        reward_options[key] = str(file.resolve()) if file is not None and file.exists() else value
    if reward_options and reward is None:
        raise ValueError("--reward-option needs --reward; options of the recipe are given with --option.")
    if reward is None and recipe.needs_reward:
        raise ValueError(
            f"recipe {recipe.name} has no reward of its own; give --reward file.py:function or a known name."
        )
    if reward is not None:
        reward = _portable(reward)
        if config.value_loss == "log_probability" and "value_loss" not in {**content, **settings}:
            config = updated(config, {"value_loss": "soft"})  # another reward need not be a log-probability
    return Source(recipe, build_options, config, reward, reward_options)


def _typed(name: str, text: str) -> Any:
    """A word as the setting's type where it can be read so; Config says what is wrong with the others."""
    records = [Config, *known_rules().values()]
    defaults = [f.default for record in records for f, _ in fields_of(record) if f.name == name]
    try:
        return type(defaults[0])(text) if isinstance(defaults[0], int | float) else text
    except ValueError:
        return text


def _portable(spec: str) -> str:
    """A user's file by its full path, so that the run can be resumed from another folder."""
    place, colon, name = spec.rpartition(":")
    path = Path(place).expanduser()
    return f"{path.resolve()}:{name}" if colon and path.suffix == ".py" and path.is_file() else spec


def train(options: argparse.Namespace) -> int:
    source = train_source(options)
    if options.print_config:
        print(output.config_yaml(source.config, source.recipe.name, source.options, source.reward))
        return 0
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard is needed for --tensorboard; `pip install 'scoreact[tensorboard]'`, or leave it out."
        )
    out = Path(options.out) if options.out else new_folder(source.recipe.name)
    return run_training(dataclasses.replace(source, folder=out), options.command, False, options.tensorboard)


def resume_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument("--iterations", metavar="INT", type=whole(1), help="only the run's own number is accepted")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too")


def resume(options: argparse.Namespace) -> int:
    source = open_run(options.run)
    config, out = source.config, options.run
    if options.iterations not in (None, config.iterations):
        raise ValueError(
            f"{out} was planned for {config.iterations} iterations and its learning rate falls to 0 there; a resumed "
            f"run cannot be changed to {options.iterations}. Start a new one: "
            f"`scoreact train {source.recipe.name} --config {out / 'config.json'} --iterations {options.iterations}`."
        )
    if (out / "result.json").is_file():
        stopped = json.loads((out / "result.json").read_text(encoding="utf-8")).get("stopped")
        if stopped:
            raise ValueError(f"{out} stopped by itself ({stopped.rstrip('.')}), so there is nothing to resume.")
        print(f"{out} has finished its {config.iterations} iterations; only its summary and report are made anew.")
    return run_training(source, options.command, True, options.tensorboard)


def run_training(source: Source, command: str, resuming: bool, tensorboard: bool) -> int:
    """Train, show, report."""
    from . import checkpoint
    from .run import finetune

    out = source.folder
    assert out is not None
    if os.environ.get("RANK", "0") != "0":  # of several processes the first speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until this process ends
    problem = source.build()
    context = problem.labels.get("problem", source.recipe.summary)
    print(f"{source.recipe.name}: {context}\nrun folder {out}\n", flush=True)
    with output.Screen(source.config.iterations) as screen:
        try:
            if resuming:
                for line in checkpoint.read_lines(out / "metrics.jsonl"):
                    if line.get("reference"):
                        screen.reference(line)
            result = finetune(
                problem.model,
                problem.reward,
                problem.prompts,
                value_network=problem.value_network,
                config=source.config,
                out=out,
                resume=resuming,
                judge=problem.judge,
                features=problem.features,
                optimum=problem.optimum,
                on_event=screen,
                description=source.description(command),
                tensorboard=tensorboard,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_to_resume(out)) from None
        except (ValueError, OSError) as error:
            if not screen.trained:
                raise
            # the input was good enough for an iteration: what fails now is the run
            raise Failed(f"{_sentence(error)} {_how_to_resume(out)}") from error
    print("\n" + "\n".join(output.summary(result)))
    if result.stopped:
        print(f"stopped early: {result.stopped}")
    print(f"weights    {out / 'model.safetensors'}")
    return look.write_report(dataclasses.replace(source, folder=out)) if os.environ.get("RANK", "0") == "0" else 0


def _how_to_resume(out: Path) -> str:
    saved = sorted(p.name for p in (out / "checkpoints").glob("[0-9]*")) if (out / "checkpoints").is_dir() else []
    if not saved:
        return "Nothing was saved yet, so there is nothing to resume."
    return f"Iteration {int(saved[-1])} is saved; continue with `scoreact resume {shlex.quote(str(out))}`."


# --- the rest --------------------------------------------------------------------------------------------------------


def list_recipes(options: argparse.Namespace) -> int:
    from .recipes import recipes

    found = recipes()
    width = max(map(len, found))
    for recipe in found.values():
        print(f"{recipe.name:<{width}}  {recipe.summary}")
    return 0


PRETRAIN = {
    "fashion-mnist": "scoreact.data.make_checkpoint",
    "judge": "scoreact.judge",
    "reference": "scoreact.data.make_reference",
}


def pretrain(words: Sequence[str]) -> int:
    """Hand the words on to the module that makes what ships with the package."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: scoreact pretrain {{{','.join(PRETRAIN)}}} ...\n\nEach has its own --help.")
        return 0
    kind = known_name(words[0], PRETRAIN, "unknown kind of pretraining")
    importlib.import_module(PRETRAIN[kind]).main(list(words[1:]))
    return 0


@dataclass(frozen=True)
class Command:
    about: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "recipes": Command("List the ready-made runs.", lambda parser: None, list_recipes),
    "train": Command("Fine-tune a recipe's model to its reward, or to yours.", train_arguments, train),
    "resume": Command("Continue an interrupted run exactly where it was saved.", resume_arguments, resume),
    "sample": Command("Draw samples of a run or of a recipe's pretrained model.", look.sample_arguments, look.sample),
    "evaluate": Command(
        "Measure a run: held-out reward, KL, J, other solvers and steps.", look.evaluate_arguments, look.evaluate
    ),
    "report": Command("Write a run's report.html anew.", look.report_arguments, look.report),
    "check": Command(
        "Say in plain sentences what is wrong with a reward, a recipe or a run.", look.check_arguments, look.check
    ),
    "reward-server": Command(
        "Serve a reward over HTTP to runs in other processes.", server.server_arguments, server.serve
    ),
    "bench": Command("Compare update rules at equal budgets, over seeds.", arena.bench_arguments, arena.bench),
    "tune": Command("Search an update rule's settings, before `bench`.", arena.tune_arguments, arena.tune),
    "pretrain": Command(
        "Make what ships with the package: fashion-mnist, judge, reference.", lambda p: None, list_recipes
    ),
}


def overview() -> str:
    lines = [f"  {name:<13} {command.about}" for name, command in COMMANDS.items()]
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


def run(words: Sequence[str]) -> int:
    """One command, errors as exceptions."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from . import __version__

        print(f"scoreact {__version__}")
        return 0
    name, rest = known_name(words[0], COMMANDS, "unknown command"), list(words[1:])
    if name == "pretrain":
        return pretrain(rest)
    command, parser = COMMANDS[name], Parser(name, COMMANDS[name].about)
    command.arguments(parser)
    if "-h" in rest or "--help" in rest:
        others = [word for word in rest if word not in ("-h", "--help")]
        print(train_help(others) if name == "train" else parser.format_help(), end="")
        return 0
    options = parser.parse(rest)
    options.command = shlex.join(["scoreact", *words])
    return command.run(options)


REMEDIES = {
    errno.ENOSPC: "Free some space there.",
    errno.EDQUOT: "Free some space there.",
    errno.EACCES: "Give a folder that you may write to.",
    errno.EPERM: "Give a folder that you may write to.",
    errno.EROFS: "Give a folder that you may write to.",
}


def _sentence(error: BaseException) -> str:
    """An error's words on one line, with a full stop."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror}. {REMEDIES.get(error.errno or 0, 'Give another folder.')}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        text = f"out of memory; lower batch_size, minibatch_size or heldout_samples ({text[:120]})"
    return text if text.endswith((".", "?", "!", "`")) else f"{text}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; every error is one sentence on stderr. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± gets a question mark, not an error
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        return run(words)
    except KeyboardInterrupt as error:
        output.warn(f"interrupted. {error}".strip())
        return 130
    except BrokenPipeError:  # `scoreact recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if show:
            traceback.print_exc()
        expected = isinstance(error, ValueError | OSError | Failed | RuntimeError | ImportError | ArithmeticError)
        text = _sentence(error)
        if not expected:
            text = f"unexpected {type(error).__name__}: {text} Repeat with --traceback to see where."
        output.warn(text)
        return 2 if isinstance(error, ValueError | FileExistsError) else 1
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
