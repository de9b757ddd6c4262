"""The command `check`: what is wrong with a reward, a model, a recipe or a run, in sentences. It trains nothing."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.source import Source, find_recipe, recipe_options, short_name, source_of_run
from ..support.errors import SettingError
from ..support.names import known_name
from .errors import sentence_of
from .parser import Parser, assignments, whole
from .pretrain import data_arguments, data_of
from .train import text_options

if TYPE_CHECKING:
    from ..recipes.base import Problem


def check_arguments(parser: Parser) -> None:
    parser.add_argument("what", metavar="{data,reward,model,recipe,run}")
    parser.add_argument("name", metavar="PATH|SPEC|RECIPE|RUN_DIR")
    parser.add_argument(
        "--recipe", default="gaussian", metavar="RECIPE", help="whose samples a reward gets [default gaussian]"
    )
    parser.add_argument("--samples", type=whole(1), default=16, metavar="INT", help="how many [default 16]")
    parser.add_argument("--gradient", action="store_true", help="the reward's gradient is needed")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the reward, model or recipe"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw 16 pictures of the model's into this PNG")
    parser.add_argument("--data", metavar="PATH", help="give the reward examples of your own data")
    data_arguments(parser.add_argument_group("data").add_argument)
    parser.belongs("data", "what", "reward")
    for name in ("labels", "kind", "size", "window", "values", "columns"):
        parser.belongs(name, "what", "data", "reward")
    parser.belongs("sheet", "what", "model")
    parser.belongs("recipe", "what", "reward")
    parser.belongs("samples", "what", "reward", "recipe")
    parser.belongs("gradient", "what", "reward", "recipe")
    parser.belongs("option", "what", "reward", "model", "recipe")


def check(options: argparse.Namespace) -> int:
    """Print findings; 1 if any is a problem."""
    known_name(options.what, CHECKS, "unknown kind of check")
    lines = CHECKS[options.what](options)
    print("\n".join(lines))
    return int(any(line.startswith("problem") for line in lines))


def check_data(options: argparse.Namespace) -> list[str]:
    """What a user's data are, and what `pretrain` would learn them with."""
    import torch

    from ..recipes.own_model import about_model, make_network

    data = data_of(options, options.name)
    shape = " x ".join(map(str, data.train.values.shape[1:]))
    lines = [f"fine: {len(data.train):,} {data.kind} of {shape} to learn from, {len(data.heldout):,} held out."]
    if data.columns:
        lines.append(f"note: the columns are {', '.join(data.columns)}.")
    if data.train.labels is not None:
        counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
        named = ", ".join(f"{name} {count:,}" for name, count in zip(data.classes, counts, strict=True))
        lines.append(f"note: {len(data.classes)} classes: {named}.")
    about = about_model(data)
    size = sum(p.numel() for p in make_network(about).parameters())
    lines.append(
        f"note: learned with {about['network']['class']}, {size:,} parameters; --width makes it smaller or larger."
    )
    return [*lines, *(f"note: {note}" for note in data.notes)]


def check_reward(options: argparse.Namespace) -> list[str]:
    from ..rewards.examine import explain

    given = assignments(options.option, "--option")
    if options.data is not None:
        if "recipe" in options.given:
            raise SettingError("--recipe and --data both give samples for the reward; leave one out.")
        decoded, condition = _few_examples(options)
        shape = tuple(decoded.shape[1:])
        what = f"note: tried on {len(decoded)} examples of shape {shape} of {options.data}."
        return [what, *explain(options.name, decoded, condition, options.gradient, **given)]
    for name in ("labels", "kind", "size", "window", "values", "columns"):
        if name in options.given:
            raise SettingError(f"--{name} does nothing without --data; leave it out, or give that too.")
    recipe = find_recipe(options.recipe)
    problem = Source(recipe, dict(recipe.options), recipe.config).build()
    decoded, condition = _few_samples(problem, options.samples)
    shape = tuple(decoded.shape[1:])
    what = f"note: tried on {len(decoded)} samples of shape {shape} of recipe {short_name(recipe)}."
    return [what, *explain(options.name, decoded, condition, options.gradient, **given)]


def check_recipe(options: argparse.Namespace) -> list[str]:
    from ..report.numbers import rounded
    from ..rewards.examine import explain

    problem = _problem(options)
    decoded, condition = _few_samples(problem, options.samples)
    lines = explain(problem.reward, decoded, condition, options.gradient)
    if not bool(decoded.isfinite().all()):
        lines.append("problem: the model's samples are not all finite.")
    if problem.judge is not None:
        lines += [f"note: {name} {rounded(value)}" for name, value in problem.judge(decoded, condition).items()]
    return lines


def check_model(options: argparse.Namespace) -> list[str]:
    """What a model has of the contract, and what is wrong with it."""
    from ..models.check import check_model as findings

    problem = _problem(options)
    found = findings(problem.model, list(problem.prompts))
    return found if options.sheet is None else [*found, _draw_sheet(problem, options.sheet)]


def _draw_sheet(problem: Problem, path: Path) -> str:
    """16 pictures in ten steps, two of each of the first prompts; what was drawn, as a line of the check."""
    from ..runs.samples import sheet, thumbnails

    prompts = [prompt for prompt in problem.prompts[:8] for _ in range(max(2, 16 // len(problem.prompts)))]
    try:
        decoded, _ = _few_samples(dataclasses.replace(problem, prompts=prompts), len(prompts))
    except Exception as error:  # the model's own, of any kind; what is wrong with it stands above
        return f"note: no sheet, as drawing fails ({sentence_of(error)})"
    if decoded.ndim != 4 or decoded.shape[1] not in (1, 3):
        return f"note: samples have shape {tuple(decoded.shape[1:])}, which no sheet shows; leave out --sheet."
    sheet(thumbnails(decoded), 4).save(path)
    return f"fine: {len(decoded)} pictures in {path}, of ten steps: {', '.join(map(repr, dict.fromkeys(prompts)))}."


def check_run(options: argparse.Namespace) -> list[str]:
    """Whether a run can be read, continued and sampled from."""
    from ..api.saved_run import SavedRun

    return SavedRun(source_of_run(Path(options.name))).check()


CHECKS = {"data": check_data, "reward": check_reward, "model": check_model, "recipe": check_recipe, "run": check_run}


def _problem(options: argparse.Namespace) -> Problem:
    recipe = find_recipe(options.name)
    return Source(
        recipe, recipe_options(recipe, assignments(options.option, "--option", text_options(recipe))), recipe.config
    ).build()


def _few_examples(options: argparse.Namespace) -> tuple[Any, Any]:
    """Of the user's data, evenly spread, with their classes as prompts."""
    import torch

    from ..types import Condition

    data = data_of(options, options.data)
    rows = torch.linspace(0, len(data.train) - 1, min(options.samples, len(data.train))).round().long()
    examples = data.train[rows]
    if examples.labels is None:
        return examples.floats(), Condition([""] * len(rows))
    return examples.floats(), Condition([data.classes[i] for i in examples.labels.tolist()], examples.labels)


def _few_samples(problem: Problem, count: int) -> tuple[Any, Any]:
    from torch import nn

    from ..dynamics.grids import uniform
    from ..dynamics.samplers import sampler_by_name
    from ..sampling.draw import draw

    model = problem.model
    assert isinstance(model, nn.Module)
    prompts = [problem.prompts[i % len(problem.prompts)] for i in range(count)]
    ts = uniform(model.schedule, 10)
    return draw(model.eval(), prompts, sampler_by_name("ddim"), ts, 0)[1].detach(), model.condition(prompts)
