"""Where a model comes from: a recipe, a pipeline, or a run folder; and how a run is opened again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.names import known_name
from ..training.config import Config, updated

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..control.policy import Policy
    from ..control.value import ValueNetwork
    from ..recipes.base import Problem, Recipe
    from ..rewards.base import Reward
    from ..types import Condition


# --- recipes and runs ------------------------------------------------------------------------------------------------


def find_recipe(name: str | None) -> Recipe:
    from ..recipes.base import recipes
    from ..recipes.pipeline import HUB

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

        from ..rewards.registry import load

        # first: what is wrong with it is said before a large model is loaded
        reward = None if self.reward is None else load(self.reward, **self.reward_options)
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

    from ..control.policy import Policy
    from ..models.weights import load_weights
    from ..support.devices import choose_device

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


# --- a run's value -------------------------------------------------------------------------------------------------------


def load_value(
    path: Path, make: Callable[[], nn.Module] | None, config: Config, policy: Policy, reward: Reward
) -> tuple[ValueNetwork, float]:
    """The value network that a run left as value.safetensors, and the price of a nat at which it was fitted.

    Raises ValueError when the file is missing, damaged or another network's.
    """
    import torch

    from ..dynamics.sde import NOISES, SDE
    from ..support.files import read_tensors
    from ..training.assembly import build_value

    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: this run's rule fits no value ({config.algorithm}), or none is saved yet; use another "
            "way of steering, or train with ctrl or ctrl_pathwise."
        )
    tensors = read_tensors(path)
    kl_weight = float(tensors.pop("kl_weight", torch.tensor(config.kl_weight)))
    sde = SDE(policy.schedule, NOISES[config.noise](config.noise_scale))

    def reward_of_state(x_data: Tensor, condition: Condition) -> Tensor:
        return reward(policy.decode(x_data), condition)

    value = build_value(config, policy, sde, make, reward_of_state)
    try:
        value.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} is another network's: {' '.join(str(error).split())}") from None
    if value.log_sigmoid is not None:
        value.log_sigmoid = kl_weight
    device = next((p.device for p in policy.parameters()), torch.device("cpu"))
    return value.to(device).requires_grad_(False).eval(), kl_weight
