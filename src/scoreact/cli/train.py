"""The commands that train: train and resume."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.source import (
    Source,
    find_recipe,
    new_folder,
    open_source,
    recipe_options,
    short_name,
    source_of_run,
    weights_file,
)
from ..support.errors import RewardError, RunError, SettingError
from ..support.settings import fields_of
from ..training.config import Config, from_stored, read, rule_fields, setting_groups, updated
from .errors import warn
from .parser import Parser, assignments, whole
from .running import run_training
from .settings_text import config_yaml, setting_help, setting_metavar

if TYPE_CHECKING:
    from ..recipes.base import Recipe

TRACKER: dict[str, Any] = {
    "action": "extend", "nargs": "+", "default": [], "metavar": "NAME", "help": "tensorboard, wandb, mlflow or my.py:Class",
}  # fmt: skip
ACCEPT: dict[str, Any] = {
    "action": "store_true", "help": "go on although files that the run depends on, or its config.json, were edited since",
}  # fmt: skip
NO_REPORT: dict[str, Any] = {
    "action": "store_true", "help": "leave out report.html, which takes seconds; `scoreact report RUN_DIR` writes it",
}  # fmt: skip
ABOUT = "Fine-tune a recipe's model to its reward, or to yours."


def train_arguments(parser: Parser, config: Config | None = None) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE",
        help="a name of `scoreact recipes`, a pipeline's folder, or your own model: my_model.py:build",
    )  # fmt: skip
    add = parser.add_argument_group("what and where").add_argument
    add(
        "--config", metavar="FILE", help="settings as YAML or JSON, or a run's config.json; the command line goes first"
    )
    add("--out", metavar="DIR", help="folder of the run, new or empty [default runs/RECIPE-001, -002, ...]")
    add("--reward", metavar="SPEC", help="instead of the recipe's: my.py:function, module:function, http://HOST:PORT, or "
        "a known name")  # fmt: skip
    add("--reward-option", action="append", default=[], metavar="NAME=VALUE", help="an option of that reward")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the recipe [listed below]")
    add("--prompts", metavar="FILE", help="of a pipeline: a text file, one prompt a line; a .jsonl, "
        ".json, .csv, .tsv or .parquet file with a column `prompt`; one prompt; file.py:function")  # fmt: skip
    add(
        "--from", dest="start", metavar="RUN", help="start from the tuned weights of another run, and with its settings"
    )
    add("--from-reference", choices=["first", "tuned"], default="first", help="the pretrained model that path KL is counted "
        "from: that run's own, or its outcome [default first]")  # fmt: skip
    parser.belongs("from_reference", "start")
    add("--tracker", **TRACKER)
    add("--resume-or-start", action="store_true", help="for jobs that are queued again: go on with the run in --out where it "
        "has saved something, else start it")  # fmt: skip
    add("--accept-changes", **ACCEPT)
    add("--no-report", **NO_REPORT)
    add("--print-config", action="store_true", help="write the settings as YAML and train nothing")
    setting_arguments(parser, config)


def setting_arguments(parser: Parser, config: Config | None = None, taken: Collection[str] = ()) -> None:
    """An option a setting, with the defaults of these; but for names that mean something else here."""

    def setting(field: dataclasses.Field[Any], hint: Any, text: str) -> None:
        group.add_argument(
            *dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"]),
            dest=f"setting:{field.name}", default=None, metavar=setting_metavar(field, hint), help=text,
        )  # fmt: skip

    config = config or Config()
    shown = set(taken)
    for heading, fields in setting_groups(config.algorithm):
        group = parser.add_argument_group(heading)
        for field, hint in fields:
            if field.name in taken:
                continue
            shown.add(field.name)
            default = config.rule[field.name] if field.name in config.rule else getattr(config, field.name)
            setting(field, hint, setting_help(field, default).replace("%", "%%"))
    group = parser.add_argument_group("other rules")
    for name in known_rules():  # their settings are taken too, and not shown
        for field, hint in rule_fields(name):
            if field.name not in shown:
                shown.add(field.name)
                setting(field, hint, argparse.SUPPRESS)


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
    parser = Parser("train", f"{short_name(recipe)}: {recipe.summary}")
    train_arguments(parser, updated(recipe.config_for(changes), changes))
    parser.usage = f"scoreact train {recipe.name} [options]"
    options = [f"  --option {key}={value}" for key, value in recipe.options.items()]
    return parser.format_help() + "\n".join(
        ["\noptions of this recipe, with their defaults:", *(options or ["  none"]), ""]
    )


def source_with(name: str, words: Sequence[str], flag: str) -> Source:
    """What `open_source` finds, with options of its recipe. SettingError for a run, which has its own."""
    source = open_source(name)
    if not words:
        return source
    if source.folder is not None:
        raise SettingError(f"{flag} is of a recipe, and {name} is a run, which has its own; leave it out.")
    given = assignments(words, flag, text_options(source.recipe))
    return dataclasses.replace(source, options=recipe_options(source.recipe, {**source.options, **given}))


def train_source(options: argparse.Namespace) -> Source:
    """The recipe's defaults (or the settings of the run to start from), then the file, then the command line."""
    base = _base(options)
    recipe = base.recipe
    content, config = read(options.config) if options.config else {}, base.config
    if isinstance(content.get("config"), dict):  # a run's config.json: repeat that run
        described = _lines(content, "description", options.config)
        own = described.get("recipe", recipe.name) == recipe.name
        config = from_stored(content["config"], f"config file {options.config!r}")
        content = {k: described.get(k) for k in ("reward", "reward_options", "options")} if own else {}
    in_file = _lines(content, "options", options.config)
    reward = options.reward or content.get("reward") or base.reward
    if reward is not None and not isinstance(reward, str):
        raise SettingError(
            f"config file {options.config!r}: reward is {reward!r}; expected its name, as --reward takes it."
        )
    reward_options = (
        {} if options.reward else _lines(content, "reward_options", options.config) or dict(base.reward_options)
    )
    content = {key: value for key, value in content.items() if key not in ("options", "reward", "reward_options")}
    build_options = recipe_options(
        recipe, {**base.options, **in_file, **assignments(options.option, "--option", text_options(recipe))}
    )
    if options.prompts is not None:
        if any(word.startswith("prompts=") for word in options.option):
            raise SettingError("--prompts and --option prompts are both given; leave one.")
        build_options["prompts"] = _own_prompts(recipe, options.prompts)
    for name in ("prompts", "test_prompts"):
        given = build_options.get(name)
        if isinstance(given, str) and given not in ("", base.options.get(name)):
            build_options[name] = _found(given)
    if recipe.name == "pipeline" and build_options["lora"] is not None:
        build_options["lora"] = str(Path(build_options["lora"]).expanduser().resolve())
    settings = {
        key.removeprefix("setting:"): _typed(key.removeprefix("setting:"), value)
        for key, value in vars(options).items()
        if key.startswith("setting:") and value is not None
    }
    if ":" in str(settings.get("algorithm", "")):
        settings["algorithm"] = _portable(settings["algorithm"])
    if config is recipe.config:
        config = recipe.config_for({**content, **settings})
    source = f"config file {options.config!r}" if options.config else "settings"
    given = {**content, **settings}
    config = updated(config, settings, source, below=content)
    for key, value in assignments(options.reward_option, "--reward-option").items():
        file = Path(value).expanduser() if isinstance(value, str) else None  # by its full path, as the reward itself
        reward_options[key] = str(file.resolve()) if file is not None and file.exists() else value
    if reward_options and reward is None:
        raise SettingError("--reward-option needs --reward; options of the recipe are given with --option.")
    if reward is None and recipe.needs_reward:
        raise RewardError(
            f"recipe {recipe.name} has no reward of its own; give --reward file.py:function or a known name."
        )
    if reward is not None:
        reward = _portable(reward)
        # another reward need not be a log-probability
        if config.value_loss == "log_probability" and "value_loss" not in given:
            config = updated(config, {"value_loss": "soft"})
        if config.surrogate_target == "logit" and "surrogate_target" not in given:
            config = updated(config, {"surrogate_target": "reward"})
    return Source(recipe, build_options, config, reward, reward_options, None, base.start)


def _lines(content: Mapping[str, Any], key: str, file: str | None) -> dict[str, Any]:
    """The mapping at a key of a file, empty where there is none."""
    found = content.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise SettingError(f"config file {file!r}: {key} is {found!r}; expected `name: value` lines.")
    return dict(found)


def _base(options: argparse.Namespace) -> Source:
    """What the command line changes: a recipe with its defaults, or a run that this one starts from."""
    if options.start is None:
        recipe = find_recipe(options.recipe)
        return Source(recipe, dict(recipe.options), recipe.config)
    run = source_of_run(Path(options.start))
    weights_file(Path(options.start))  # that there are none yet is said now
    if options.recipe is not None and find_recipe(options.recipe).name != run.recipe.name:
        raise SettingError(
            f"{options.start} is a run of {run.recipe.name}, and its weights fit no other model; leave {options.recipe!r} out."
        )
    start = {"run": str(Path(options.start).resolve()), "reference": options.from_reference}
    return dataclasses.replace(run, folder=None, start=start)


def _own_prompts(recipe: Recipe, given: str) -> str:
    """Those of a pipeline, or of a model of the user's whose function has a parameter `prompts`."""
    if "prompts" not in recipe.options:
        raise SettingError(
            f"recipe {short_name(recipe)} has prompts of its own; --prompts is for pipelines, and for functions of "
            "your own that have a parameter `prompts`."
        )
    return given


def text_options(recipe: Recipe) -> set[str]:
    return {name for name, default in recipe.options.items() if isinstance(default, str)}


def _found(prompts: str) -> str:
    """A file of prompts by its full path, so that the run can be opened from another folder."""
    from ..recipes.prompts import check_spelling

    path = os.path.expanduser(prompts)
    if os.path.isfile(path):
        return str(Path(path).resolve())
    check_spelling(prompts)
    return _portable(prompts)


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
    if place == "onnx":
        return f"onnx:{Path(name).expanduser().resolve()}"
    path = Path(place).expanduser()
    folder = Path(spec).expanduser()
    if (folder / "reward.json").is_file():  # of `scoreact reward`; its module asks for torch
        return str(folder.resolve())
    return f"{path.resolve()}:{name}" if colon and path.suffix == ".py" and path.is_file() else spec


def train(options: argparse.Namespace) -> int:
    source = train_source(options)
    if options.print_config:
        print(config_yaml(source.config, source.recipe.name, source.options, source.reward))
        return 0
    if options.tracker:
        from ..runs.trackers import make_trackers

        make_trackers(options.tracker)  # what is not installed is said now
    if options.accept_changes and not options.resume_or_start:
        raise SettingError("--accept-changes is for runs that go on; leave it out, or add --resume-or-start.")
    if options.resume_or_start:
        if not options.out:
            raise SettingError("--resume-or-start needs --out, the folder that is looked into.")
        return start_or_go_on(source, Path(options.out), options)
    with contextlib.nullcontext(Path(options.out)) if options.out else new_folder(source.recipe) as out:
        return run_training(
            dataclasses.replace(source, folder=out), options.command, trackers=options.tracker, report=not options.no_report
        )  # fmt: skip


def start_or_go_on(source: Source, out: Path, options: argparse.Namespace) -> int:
    """Train into a folder, or resume the run that it holds."""
    from ..runs.checkpoint import checkpoints

    if checkpoints(out / "checkpoints"):
        return go_on(source, out, options)
    return run_training(
        dataclasses.replace(source, folder=out), options.command, trackers=options.tracker, report=not options.no_report
    )  # fmt: skip


def resume_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument(
        "--iterations", metavar="INT", type=whole(1), help="extend the run to so many; rates go on and fall to 0 there"
    )
    parser.add_argument("--tracker", **TRACKER)
    parser.add_argument("--no-report", **NO_REPORT)
    parser.add_argument("--accept-changes", **ACCEPT)


def go_on(source: Source, out: Path, options: argparse.Namespace) -> int:
    """Resume the run that the same command has started."""
    from ..runs.checkpoint import read_run
    from ..runs.resuming import check_settings

    run = source_of_run(out)
    theirs, mine = run.description(""), source.description("")
    changed = [f"{name} {theirs.get(name)!r} -> {mine.get(name)!r}" for name in mine if theirs.get(name) != mine[name]]
    if changed:
        raise RunError(
            f"{out} was started with another command: {'; '.join(changed)}. Give the same, or another --out."
        )
    check_settings(out, read_run(out), source.config, extend=False)
    options.run, options.iterations = out, None
    return resume(options)


def resume(options: argparse.Namespace) -> int:
    source, out = source_of_run(options.run), options.run
    planned = source.config.iterations
    extend = options.iterations not in (None, planned)
    if extend:
        source = dataclasses.replace(source, config=updated(source.config, {"iterations": options.iterations}))
    elif (out / "result.json").is_file():
        from ..runs.record import read_json

        problems: list[str] = []
        stopped = read_json(out / "result.json", problems).get("stopped")
        for problem in problems:
            warn(f"{problem} It is made anew.")
        if stopped:
            raise RunError(
                f"{out} stopped by itself ({str(stopped).rstrip('.')}), so there is nothing to resume; `--iterations` with "
                f"more than {planned} goes on all the same."
            )
        print(f"{out} has finished its {planned} iterations; only its summary and report are made anew. "
              "`--iterations` with more of them extends it.")  # fmt: skip
    return run_training(
        source,
        options.command,
        resuming=True,
        extend=extend,
        trackers=options.tracker,
        accept_changes=options.accept_changes,
        report=not options.no_report,
    )
