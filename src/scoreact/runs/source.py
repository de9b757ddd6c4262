"""Where a model comes from: a recipe, a pipeline, the user's own file, or a run folder; and how each is built.

torch is imported inside functions: the command line reads names with this module before it needs any of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.errors import ModelError, RewardError, RunError, SettingError
from ..support.folders import made_folder
from ..support.loading import is_spec, load_named
from ..support.names import known_name
from ..support.seeds import LARGEST
from ..training.config import Config, from_stored

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..control.policy import Policy
    from ..control.value import ValueNetwork
    from ..recipes.base import Problem, Recipe
    from ..rewards.base import Reward
    from ..types import Condition

LORA: dict[str, Any] = {"lora_rank": 0, "lora_targets": ""}  # options of every model of the user's own
REFERENCE = "reference.safetensors"  # in a run's folder: the pretrained weights of what is trained


@dataclass(frozen=True)
class Source:
    """A problem that can be built as often as wanted, with the settings for it.

    folder: of the run that it belongs to, where it belongs to one. start: the run whose weights the policy starts from, and
    which model is then the reference, "first" (that run's own) or "tuned" (its outcome).
    """

    recipe: Recipe
    options: dict[str, Any]
    config: Config
    reward: str | None = None
    reward_options: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    start: Mapping[str, str] | None = None  # {"run": folder, "reference": first or tuned}

    def build(self) -> Problem:
        """The problem with its reference's weights, freshly built: the same weights for the same seed."""
        import torch

        from ..rewards.registry import load

        # first: what is wrong with it is said before a large model is loaded
        reward = None if self.reward is None else load(self.reward, **self.reward_options)
        torch.manual_seed(self.config.seed)  # networks that a recipe makes draw their first weights from it
        problem = self.recipe.build(**self.options)
        if self.start is not None and self.start["reference"] == "tuned":
            put_tuned(problem.model, Path(self.start["run"]), self.folder)
        if reward is None or self.reward is None:
            return problem
        labels = {**problem.labels, "reward": self.reward}
        return dataclasses.replace(problem, reward=reward, optimum=None, labels=labels)  # J* was the other reward's

    def start_weights(self) -> dict[str, Tensor] | None:
        """The policy's, where it does not start as the reference."""
        if self.start is None or self.start["reference"] == "tuned":
            return None
        return tuned_weights(Path(self.start["run"]))

    def description(self, command: str) -> dict[str, Any]:
        """What config.json says of it; `open_source` reads it back."""
        start = {} if self.start is None else {"start": dict(self.start)}
        return {
            "recipe": self.recipe.name, "options": self.options, "reward": self.reward,
            "reward_options": dict(self.reward_options), "command": command, **start,
        }  # fmt: skip


# --- names -----------------------------------------------------------------------------------------------------------


def find_recipe(name: str | None) -> Recipe:
    """A ready-made run by name, a model of `pretrain` or a pipeline by its folder (or hub name), or file.py:function.

    Raises SettingError with the known names, LoadError for a file that is not there or fails.
    """
    from ..recipes.base import recipes
    from ..recipes.own_model import is_own_model, own_recipe
    from ..recipes.pipeline import HUB

    known = recipes()
    if name is None:
        raise SettingError(f"give a recipe; known: {', '.join(known)}. Or a pipeline's folder, or my_model.py:build.")
    if is_own_model(Path(name)):
        return _with_lora(own_recipe(Path(name)))
    if name in HUB or _is_hub_id(name) or _is_pipeline(Path(name)):
        path = str(Path(name).resolve()) if Path(name).exists() else name
        recipe = known["pipeline"]
        return dataclasses.replace(recipe, options={**recipe.options, "path": path})
    if (Path(name) / "config.json").is_file():
        raise SettingError(
            f"{name} is the folder of a run; go on with `scoreact resume {name}`, or start another from its weights with "
            f"--from {name}."
        )
    return user_recipe(name) if is_spec(name) else known[known_name(name, known, "unknown recipe")]


def _is_hub_id(name: str) -> bool:
    """organisation/model, where nothing of that name, nor its folder, is here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).parent.exists()


def _is_pipeline(path: Path) -> bool:
    """A diffusers pipeline, or what is taken for one: its opening says what is wrong with a single file of weights."""
    single = (".safetensors", ".ckpt")
    if path.is_file():
        return path.suffix in single
    holds = path.is_dir() and not (path / "config.json").exists()
    return holds and ((path / "model_index.json").is_file() or any(file.suffix in single for file in path.iterdir()))


def user_recipe(spec: str) -> Recipe:
    """The user's own function as a recipe: it returns a model or a Problem, and its parameters are the options."""
    from torch import nn

    from ..recipes.base import Problem, Recipe

    place, _, name = spec.rpartition(":")
    path = Path(place).expanduser()
    spec = f"{path.resolve()}:{name}" if path.is_file() else spec  # so that the run can be opened from another folder
    function = load_named(spec, "model")
    if not callable(function):
        raise ModelError(f"{spec} is {type(function).__name__}; expected a function that returns a model or a Problem.")
    parameters = inspect.signature(function).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    added = {} if set(LORA) & set(own) else LORA
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if needed:
        raise ModelError(
            f"{spec} needs a value for {', '.join(needed)}; give each a default, and change it with --option."
        )

    def build(**options: Any) -> Problem:
        adapters = {name: options.pop(name, default) for name, default in added.items()}
        made = function(**options)
        problem = made if isinstance(made, Problem) else Problem(made)
        if not isinstance(problem.model, nn.Module):
            raise ModelError(
                f"{spec} returned {type(made).__name__}; expected an nn.Module with the members of ScoreModel, or a Problem. "
                f"`scoreact check model {spec}` says more."
            )
        problem = dataclasses.replace(problem, labels={"problem": f"{name} of {Path(place).name}", **problem.labels})
        return _with_adapters(problem, **adapters)

    return Recipe(spec, f"{name} of {Path(place).name}", build, Config(), {**own, **added})


def _with_lora(recipe: Recipe) -> Recipe:
    """A recipe whose model may get low-rank adapters."""

    def build(**options: Any) -> Problem:
        adapters = {name: options.pop(name, default) for name, default in LORA.items()}
        return _with_adapters(recipe.build(**options), **adapters)

    return dataclasses.replace(recipe, build=build, options={**recipe.options, **LORA})


def _with_adapters(problem: Problem, lora_rank: int = 0, lora_targets: str = "") -> Problem:
    """The problem with low-rank adapters on its model, where a rank is given. lora_targets: names with commas between."""
    from ..models.lora import lora

    if lora_rank == 0:
        if lora_targets:
            raise SettingError(f"option lora_targets is {lora_targets!r}, but lora_rank is 0; give a rank, such as 8.")
        return problem
    names = [name.strip() for name in lora_targets.split(",")] if lora_targets else None
    model: Any = problem.model
    labels = {**problem.labels, "adapters": f"low-rank adapters of rank {lora_rank}"}
    return dataclasses.replace(problem, model=lora(model, lora_rank, names), labels=labels)


def short_name(recipe: Recipe) -> str:
    """Of a recipe, for a folder: my_model of /path/my_model.py:build, my-model of /path/my-model."""
    return Path(recipe.name.rpartition(":")[0]).stem if is_spec(recipe.name) else Path(recipe.name).name


def recipe_options(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's build options with some changed; SettingError for an unknown name or a value of another type."""
    options = dict(recipe.options)
    for name, value in given.items():
        if name not in options:
            known_name(name, options, f"recipe {short_name(recipe)} has no option")
        default = options[name]
        if isinstance(default, float) and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):  # YAML reads 1e-4 as a string
                value = float(value)
        if default is not None and type(value) is not type(default):
            raise SettingError(
                f"option {name} of recipe {short_name(recipe)} is {value!r} ({type(value).__name__}); "
                f"expected {type(default).__name__}, such as {default!r}."
            )
        if not is_spec(recipe.name):  # of the user's own function only the type is known
            _check_number(f"option {name} of recipe {short_name(recipe)}", value, default)
        options[name] = value
    return options


def _check_number(what: str, value: Any, default: Any) -> None:
    """Numbers are finite; counts, whose defaults are above 0, are too; seeds begin at 0."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"{what} is {value}; expected a finite number.")
    if isinstance(default, int) and not isinstance(default, bool):
        low = min(default, 1)
        if not low <= value <= LARGEST:
            raise SettingError(f"{what} is {value}; expected a whole number from {low} to {LARGEST}.")


def source_of_run(folder: Path) -> Source:
    """The recipe, reward and settings a run was made with. RunError for a folder that is no such run."""
    from ..recipes.own_model import is_own_model
    from .checkpoint import read_run

    if is_own_model(folder):
        raise RunError(
            f"{folder} is no run, it is a model that pretraining made; train it with `scoreact train {folder}`, or go on with "
            f"`scoreact pretrain {folder} --data ... --resume-or-start`."
        )
    content = read_run(folder)
    described = content.get("description")
    described = described if isinstance(described, dict) else {}
    if not isinstance(described.get("recipe"), str):
        raise RunError(
            f"{folder} was made from Python, and only Python has its model; open it there: "
            f"scoreact.open_run({str(folder)!r}, model=..., reward=...)."
        )
    recipe = find_recipe(described["recipe"])
    return Source(
        recipe,
        recipe_options(recipe, described.get("options") or {}),
        stored_config(folder, content),
        described.get("reward"),
        described.get("reward_options") or {},
        folder,
        described.get("start"),
    )


def stored_config(folder: Path, content: Mapping[str, Any]) -> Config:
    """The settings in a run's config.json."""
    return from_stored(content["config"], str(folder / "config.json"))


def open_source(name: str) -> Source:
    """A run folder, or what `find_recipe` takes."""
    if (Path(name) / "config.json").is_file():
        return source_of_run(Path(name))
    from ..recipes.own_model import is_own_model

    model = is_own_model(Path(name)) or _is_pipeline(Path(name)) or _is_hub_id(name)
    if not model and not is_spec(name) and (Path(name).is_dir() or os.sep in name):
        return source_of_run(Path(name))  # says what is missing
    recipe = find_recipe(name)
    return Source(recipe, dict(recipe.options), recipe.config)


@contextlib.contextmanager
def new_folder(recipe: Recipe) -> Iterator[Path]:
    """runs/RECIPE-001, or the first number that is free: made here, and removed at the end if nothing was put into it."""
    if os.environ.get("RANK", "0") != "0":  # of several processes the first writes
        yield Path("runs") / short_name(recipe)
        return
    with made_folder(Path("runs"), lambda number: f"{short_name(recipe)}-{number:03d}") as folder:
        yield folder


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_file(folder: Path, which: str = "final") -> tuple[Path, str]:
    """A run's trained weights and which they are, "final" or "best"; the best of a run that has not ended.

    Raises RunError where there are none yet.
    """
    if which not in ("final", "best"):
        raise SettingError(f"weights is {which!r}; known: final, best.")
    final, best = folder / "model.safetensors", folder / "best" / "model.safetensors"
    path = best if which == "best" or not final.exists() else final
    if not path.exists():
        raise RunError(f"{folder} holds no trained weights yet; finish it with `scoreact resume {folder}`.")
    return path, "best" if path == best else "final"


def tuned_weights(folder: Path) -> dict[str, Tensor]:
    """The final weights of a run by name."""
    from ..support.files import read_tensors

    return read_tensors(weights_file(folder)[0])


def put_tuned(model: object, folder: Path, own: Path | None = None) -> None:
    """Make the outcome of a run the pretrained model, before training begins; `own`: the run that has kept a copy of it."""
    from torch import nn

    from ..models.base import HasReference
    from ..models.weights import load_parameters
    from ..support.files import read_tensors

    if isinstance(model, HasReference):
        raise ModelError(
            f"the reference of {type(model).__name__} is the model without its adapter, so the outcome of {folder} cannot be "
            "one; start with the first reference (--from-reference first), or tune what that run left merged or written back."
        )
    assert isinstance(model, nn.Module)
    kept = None if own is None else own / REFERENCE
    load_parameters(model, read_tensors(kept) if kept is not None and kept.is_file() else tuned_weights(folder))


def build_policy(source: Source, weights: str = "final") -> tuple[Policy, Problem, str]:
    """The policy beside its reference on the run's device, the problem, and which weights were found.

    Without a folder the weights are the reference's own, "pretrained".
    """
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
    path, found = weights_file(source.folder, weights)
    load_weights(problem.model, path)
    return policy, problem, found


def load_value(
    path: Path,
    make: Callable[[], nn.Module] | None,
    config: Config,
    policy: Policy,
    reward: Reward,
    prompts: Sequence[str] = (),
) -> tuple[ValueNetwork, float]:
    """The value network that a run left as value.safetensors, and the price of a nat at which it was fitted.

    Raises RunError when the file is missing, damaged or another network's.
    """
    import torch

    from ..support.files import read_tensors
    from ..training.assembly import build_value

    if not path.is_file():
        raise RunError(
            f"{path} does not exist: this run's rule fits no value ({config.algorithm}), or none is saved yet; use another "
            "way of steering, or train with ctrl or ctrl_pathwise."
        )
    if config.value == "surrogate":
        raise RunError(
            f"{path} is a value surrogate, made of a fit to the run's rewards that is not kept beside it; steer by smc or "
            "best_of, which ask the reward, or train with value network, residual or linear."
        )
    tensors = read_tensors(path)
    kl_weight = float(tensors.pop("kl_weight", torch.tensor(config.kl_weight)))
    sde = config.sde(policy.schedule)

    def reward_of_state(x_data: Tensor, condition: Condition) -> Tensor:
        return reward(policy.decode(x_data), condition)

    value = build_value(config, policy, sde, make, reward_of_state, prompts)
    try:
        value.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{path} is another network's: {' '.join(str(error).split())}") from None
    if value.log_sigmoid is not None:
        value.log_sigmoid = kl_weight
    device = next((p.device for p in policy.parameters()), torch.device("cpu"))
    return value.to(device).requires_grad_(False).eval(), kl_weight


def need_reward(source: Source, problem: Problem) -> None:
    """Raises RewardError where a problem has no reward and none was named."""
    from ..rewards.base import NO_REWARD

    if problem.reward is NO_REWARD:
        raise RewardError(
            f"{short_name(source.recipe)} has no reward of its own; give --reward file.py:function or a known name."
        )
