"""Ready-made runs. A recipe is one small file with a `RECIPE`: how to build its problem, and the settings that suit it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..models.base import HasClasses, ScoreModel, TakesPrompts
from ..rewards.base import NO_REWARD, Reward, TakesModel
from ..support.errors import SettingError
from ..training.config import Config
from ..types import Condition, Metrics


@dataclass(frozen=True)
class Problem:
    """A model, what is wanted of it, and how to look at the outcome.

    Args:
        model: An nn.Module with the members of `ScoreModel`.
        reward: (decoded samples [B, ...], condition of B) -> [B], larger is better; left out where it is given elsewhere.
        prompts: What samples are drawn for. Left out: the model's own `classes`, or [""] for a model without any.
        test_prompts: That training never sees, on which the reward is measured too. Left out: some of `prompts`
            (`heldout_prompts`).
        value_network: Makes the value's network (input, t [B], condition) -> [B]. None: an MLP on flattened states.
        judge: (decoded samples, condition) -> metrics that the reward does not know, such as the distance to real data.
        features: (decoded samples [B, ...]) -> [B, F], the space in which diversity is measured. None: the samples themselves.
        optimum: kl_weight -> J* in closed form, where there is one.
        labels: Lines of context for the report.
    """

    model: ScoreModel
    reward: Reward = NO_REWARD
    prompts: Sequence[str] = ()
    test_prompts: Sequence[str] = ()
    value_network: Callable[[], nn.Module] | None = None
    judge: Callable[[Tensor, Condition], Metrics] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    optimum: Callable[[float], float] | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.reward, TakesModel):
            self.reward.take_model(self.model)  # before training changes it
        if not self.prompts:
            object.__setattr__(
                self,
                "prompts",
                list(self.model.classes) if isinstance(self.model, HasClasses) and self.model.classes else [""],
            )


def need_prompts(problem: Problem, remedy: str) -> None:
    """Raises SettingError where nobody has given a prompt to a model that draws what one says."""
    model = problem.model
    if list(problem.prompts) == [""] and isinstance(model, TakesPrompts) and model.takes_prompts:
        raise SettingError(f"no prompts are given, and this model draws what a prompt says; {remedy}.")


@dataclass(frozen=True)
class Recipe:
    """name, one-line summary, `build(**options) -> Problem`, and default settings."""

    name: str
    summary: str
    build: Callable[..., Problem]
    config: Config
    options: dict[str, Any] = field(default_factory=dict)  # of `build`, with their defaults
    needs_reward: bool = False  # has none of its own
    other_rules: Config | None = None  # settings under another rule than `config`'s; None: those of `config`

    def config_for(self, changes: Mapping[str, Any]) -> Config:
        """The default settings that `changes` are changes of: `other_rules` where they choose another rule."""
        own = changes.get("algorithm", self.config.algorithm) == self.config.algorithm
        return self.config if own or self.other_rules is None else self.other_rules


def recipes() -> dict[str, Recipe]:
    """Every recipe by name: the `RECIPES` of each module in this package."""
    found: dict[str, Recipe] = {}
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        for recipe in getattr(
            importlib.import_module(f"{__package__}.{module.name}"), "RECIPES", ()
        ):  # helpers have none
            found[recipe.name] = recipe
    return found
