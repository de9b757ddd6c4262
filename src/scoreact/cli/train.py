"""The commands that train: train and resume."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.source import Source, find_recipe, new_folder, open_run, recipe_options
from ..support.settings import fields_of
from ..training.config import Config, read, rule_fields, updated
from . import look
from .errors import Failed, sentence_of
from .parser import Parser, assignments, whole
from .screen import Screen, summary
from .settings_text import config_yaml, setting_help, setting_metavar

ABOUT = "Fine-tune a recipe's model to its reward, or to yours."
HEADINGS = {  # the first setting of each group of `train --help`
    "algorithm": "the run",
    "steps": "paths",
    "learning_rate": "policy update",
    "value": "value network",
    "heldout_samples": "evaluation and limits",
}


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
            dest=f"setting:{field.name}", default=None, metavar=setting_metavar(field, hint), help=text,
        )  # fmt: skip

    config = config or Config()
    for field, hint in fields_of(Config):
        if field.name in HEADINGS:
            add = parser.add_argument_group(HEADINGS[field.name]).add_argument
        setting(field, hint, setting_help(field, getattr(config, field.name)).replace("%", "%%"))
    shown = set()
    for name in [config.algorithm, *known_rules()]:  # the other rules' settings are taken too, and not shown
        add = parser.add_argument_group(f"the rule: {name}").add_argument
        for field, hint in rule_fields(name):
            if field.name not in shown:
                shown.add(field.name)
                own = name == config.algorithm
                text = setting_help(field, config.rule[field.name]) if own else argparse.SUPPRESS
                setting(field, hint, text.replace("%", "%%"))


def known_rules() -> dict[str, type]:
    from ..algorithms.registry import rules

    return dict(rules())


def train_help(words: Sequence[str]) -> str:
    """The help of `train`, with the recipe's own defaults if its name is among the words."""
    plain = Parser("train", ABOUT)
    train_arguments(plain)
    plain.usage = "scoreact train RECIPE [options]"
    known = plain.parse_known_args(words)[0]
    changes = {"algorithm": algorithm} if (algorithm := getattr(known, "setting:algorithm")) else {}
    if known.recipe is None:
        parser = Parser("train", ABOUT)
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
        print(config_yaml(source.config, source.recipe.name, source.options, source.reward))
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
    from ..runs.run import finetune
    from ..support.files import read_lines

    out = source.folder
    assert out is not None
    if os.environ.get("RANK", "0") != "0":  # of several processes the first speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until this process ends
    problem = source.build()
    context = problem.labels.get("problem", source.recipe.summary)
    print(f"{source.recipe.name}: {context}\nrun folder {out}\n", flush=True)
    with Screen(source.config.iterations) as screen:
        try:
            if resuming:
                for line in read_lines(out / "metrics.jsonl"):
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
            raise KeyboardInterrupt(how_to_resume(out)) from None
        except (ValueError, OSError) as error:
            if not screen.trained:
                raise
            # the input was good enough for an iteration: what fails now is the run
            raise Failed(f"{sentence_of(error)} {how_to_resume(out)}") from error
    print("\n" + "\n".join(summary(result)))
    if result.stopped:
        print(f"stopped early: {result.stopped}")
    print(f"weights    {out / 'model.safetensors'}")
    return look.write_report(dataclasses.replace(source, folder=out)) if os.environ.get("RANK", "0") == "0" else 0


def how_to_resume(out: Path) -> str:
    saved = sorted(p.name for p in (out / "checkpoints").glob("[0-9]*")) if (out / "checkpoints").is_dir() else []
    if not saved:
        return "Nothing was saved yet, so there is nothing to resume."
    return f"Iteration {int(saved[-1])} is saved; continue with `scoreact resume {shlex.quote(str(out))}`."
