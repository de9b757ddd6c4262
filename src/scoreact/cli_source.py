"""What the commands share: words parsed, and the recipe or run folder that is meant. Refusals are ValueErrors."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from .config import Config, updated
from .names import known_name, nearest

if TYPE_CHECKING:
    from .policy import Policy
    from .recipes import Problem, Recipe


# --- parsing ---------------------------------------------------------------------------------------------------------


class Formatter(argparse.HelpFormatter):
    """Shows the first spelling of an option only."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        return name if action.nargs == 0 else f"{name} {self._format_args(action, action.dest.upper())}"


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError with a sentence, and names the nearest option for an unknown one."""

    def __init__(self, command: str, about: str) -> None:
        prog = f"scoreact {command}"
        super().__init__(prog, description=about, formatter_class=Formatter, allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        if message.endswith(": expected one argument"):
            message = f"{message.removeprefix('argument ').split('/')[0].split(':')[0]} needs a value"
        raise ValueError(f"{message}; `{self.prog} --help` says more.")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(words)
        for word in unknown:
            if word.startswith("-"):
                name = word.split("=")[0]
                known = [option for action in self._actions for option in action.option_strings]
                close = nearest(name, known, 0.5)
                if close:
                    raise ValueError(f"unknown option {name}; did you mean {close}?")
                self.error(f"unknown option {name}")
        if unknown:
            self.error(f"unexpected word {unknown[0]!r}")
        return options


def whole(low: int) -> Callable[[str], int]:
    """A whole number of at least `low`, for argparse."""

    def convert(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")
        return int(text)

    return convert


def assignments(words: Sequence[str], flag: str) -> dict[str, Any]:
    """`name=value` words as a mapping; values are read as YAML."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} got {word!r}; expected name=value.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name] = value
    return found


# --- recipes and runs ------------------------------------------------------------------------------------------------


def find_recipe(name: str | None) -> Recipe:
    from .recipes import recipes
    from .recipes.pipeline import HUB

    known = recipes()
    if name is None:
        raise ValueError(f"give a recipe; known: {', '.join(known)}.")
    if name in HUB or (Path(name) / "model_index.json").is_file():  # a diffusers pipeline
        path = name if name in HUB else str(Path(name).resolve())
        recipe = known["pipeline"]
        return dataclasses.replace(recipe, options={**recipe.options, "path": path})
    return known[known_name(name, known, "unknown recipe")]


def recipe_options(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's build options with some changed; ValueError for an unknown name or a value of another type."""
    options = dict(recipe.options)
    for name, value in given.items():
        if name not in options:
            known_name(name, options, f"recipe {recipe.name} has no option")
        default = options[name]
        if isinstance(default, float) and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):  # YAML reads 1e-4 as a string
                value = float(value)
        if default is not None and type(value) is not type(default):
            raise ValueError(
                f"option {name} of recipe {recipe.name} is {value!r} ({type(value).__name__}); "
                f"expected {type(default).__name__}, such as {default!r}."
            )
        options[name] = value
    return options


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a recipe, or a run folder with its settings and perhaps trained weights."""

    recipe: Recipe
    options: dict[str, Any]
    config: Config
    reward: str | None = None
    reward_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None

    def build(self) -> Problem:
        """The pretrained problem, freshly built: the same weights for the same seed."""
        import torch

        from . import rewards

        # first: what is wrong with it is said before a large model is loaded
        reward = None if self.reward is None else rewards.load(self.reward, **self.reward_options)
        torch.manual_seed(self.config.seed)  # networks that a recipe makes draw their first weights from it
        problem = self.recipe.build(**self.options)
        if reward is None or self.reward is None:
            return problem
        labels = {**problem.labels, "reward": self.reward}
        return dataclasses.replace(problem, reward=reward, optimum=None, labels=labels)  # J* was the other reward's

    def description(self, command: str) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "options": self.options,
            "reward": self.reward,
            "reward_options": dict(self.reward_options),
            "command": command,
        }


def open_run(folder: Path) -> Source:
    """The recipe, reward and settings a run was made with. ValueError for a folder that is no such run."""
    from .checkpoint import read_run

    content = read_run(folder)
    described = content.get("description")
    described = described if isinstance(described, dict) else {}
    if not isinstance(described.get("recipe"), str):
        raise ValueError(
            f"{folder} was made from Python, not by a recipe; continue it there, with finetune(resume=True)."
        )
    recipe = find_recipe(described["recipe"])
    return Source(
        recipe,
        recipe_options(recipe, described.get("options") or {}),
        updated(Config(), content["config"], str(folder / "config.json")),
        described.get("reward"),
        described.get("reward_options") or {},
        folder,
    )


def open_source(name: str) -> Source:
    """A run folder, or a recipe by name."""
    if (Path(name) / "config.json").is_file():
        return open_run(Path(name))
    pipeline = (Path(name) / "model_index.json").is_file()
    if not pipeline and (Path(name).is_dir() or os.sep in name):
        return open_run(Path(name))  # says what is missing
    recipe = find_recipe(name)
    return Source(recipe, dict(recipe.options), recipe.config)


def load_policy(source: Source, weights: str) -> tuple[Policy, Problem, str]:
    """The run's policy beside its reference on the run's device, the problem, and which weights were found."""
    from torch import nn

    from .assembly import choose_device
    from .checkpoint import load_weights
    from .policy import Policy

    problem = source.build()
    assert isinstance(problem.model, nn.Module)
    model = problem.model.to(choose_device(source.config.device)).eval()
    policy = Policy(model, act_until=source.config.act_until)
    if source.folder is None:
        return policy, problem, "pretrained"
    final, best = source.folder / "model.safetensors", source.folder / "best" / "model.safetensors"
    path = best if weights == "best" or not final.exists() else final
    if not path.exists():
        raise ValueError(
            f"{source.folder} holds no trained weights yet; finish it with `scoreact resume {source.folder}`."
        )
    load_weights(problem.model, path)
    return policy, problem, "best" if path == best else "final"


def new_folder(recipe: str) -> Path:
    """runs/RECIPE-001, or the first number that is free."""
    number = 1
    while (folder := Path("runs") / f"{recipe}-{number:03d}").exists():
        number += 1
    return folder
