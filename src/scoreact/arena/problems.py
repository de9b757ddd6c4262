"""The arena's problems, and one run of a rule on one of them as plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..algorithms.registry import find_rule
from ..recipes.base import Problem
from ..rewards.base import NO_REWARD, is_differentiable
from ..rewards.registry import load
from ..runs.source import find_recipe, recipe_options, short_name
from ..support.errors import RewardError
from ..support.names import known_name
from ..training.config import Config, updated, usable

TUNING_SEEDS = 10_000_000  # seeds from here on are tuning's
HELDOUT = {"bench": 20_000_003, "tune": 20_000_033}  # seeds of the referee's noise


@dataclass(frozen=True)
class ArenaProblem:
    """A recipe with options, a reward and settings, all plain data, and its budget where none is given.

    recipe: a name of `scoreact recipes`, a pipeline's folder, or file.py:function, as `scoreact train` takes it.
    """

    name: str
    recipe: str
    network_calls: int
    reward_calls: int
    differentiable: bool = False  # whether the reward has a gradient; rules that need one are skipped elsewhere
    options: dict[str, Any] = field(default_factory=dict)
    reward: str | None = None  # instead of the recipe's: as for `rewards.load`
    reward_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # fields of Config, where they depart from the recipe's
    reference_samples: int = 20_000  # for J_ref and J*

    def build(self, seed: int) -> Problem:
        """Freshly built; networks draw their first weights from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            recipe = find_recipe(self.recipe)
            problem = recipe.build(**recipe_options(recipe, self.options))
        if self.reward is None:
            return problem
        reward = load(self.reward, **self.reward_options)
        return dataclasses.replace(problem, reward=reward, optimum=None)

    def base(self) -> Config:
        """The recipe's settings with the problem's."""
        return updated(
            find_recipe(self.recipe).config_for(self.settings), {"device": "cpu", **self.settings}, self.name
        )

    def config(self, settings: Mapping[str, Any]) -> Config:
        """The referee's settings: the recipe's, the problem's, and what of `settings` is no rule's own."""
        own = {f.name for f in dataclasses.fields(Config)} - {"rule", "algorithm"}
        base = self.base()
        # no rule's settings: what binds a rule does not bind the referee
        changes = {**{k: v for k, v in settings.items() if k in own}, "rule": {}}
        return updated(base, usable(base, changes), self.name)


PICTURE_CALLS = 30_000, 1_536
# on pictures: half a minute of one core; the settings of all three are those of one rule, `plain` has others of its own
PICTURES = {"algorithm": "ctrl_pathwise", "batch_size": 128, "reference_batches": 5, "value": "linear"}
# on points: 60 iterations of `ctrl`
PROBLEMS = {
    problem.name: problem
    for problem in (
        ArenaProblem("gaussian-2d", "gaussian", 3_000_000, 30_720, True),
        ArenaProblem("gaussian-16d", "gaussian", 3_000_000, 30_720, True, {"dim": 16}),
        ArenaProblem("fashion-plain", "plain", *PICTURE_CALLS, settings=PICTURES, reference_samples=5_120),
        ArenaProblem(
            "fashion-classifier", "classifier", *PICTURE_CALLS, True, reference_samples=5_120,
            # at a price of 1 a nat there is next to nothing to gain: most pictures are of their class already
            settings={**PICTURES, "kl_weight": 0.1},
        ),
        ArenaProblem(
            "fashion-jpeg", "plain", *PICTURE_CALLS, reward="jpeg_compressibility", reference_samples=5_120,
            # beta: 80 % of the spread of the size within a class, in kB; the size is no log-probability
            settings={**PICTURES, "kl_weight": 0.04, "value_loss": "soft"},
        ),
        ArenaProblem("series", "series", 3_000_000, 30_720, True),
    )
}  # fmt: skip


def own_problem(
    recipe: str,
    reward: str | None = None,
    options: Mapping[str, Any] | None = None,
    reward_options: Mapping[str, Any] | None = None,
    reference_samples: int = 960,
) -> ArenaProblem:
    """A user's model and reward as a problem; its budget is that of the arena's pictures.

    Args:
        recipe: a pipeline's folder, file.py:function, or a name of `scoreact recipes`.
        reward: as for `rewards.load`; None where the recipe has one.
        options: of the recipe, such as `prompts` of a pipeline.
        reward_options: of the reward.
        reference_samples: of the pretrained model, for J_ref and J*; each costs a path and a reward call, once.
    Raises SettingError, RewardError or LoadError for what is not there.
    """
    found = find_recipe(recipe)
    used = recipe_options(found, options or {})
    if reward is None and found.needs_reward:
        raise RewardError(f"{short_name(found)} has no reward of its own; give one: file.py:function or a known name.")
    path = str(used.get("path", ""))  # of a pipeline
    name = Path(path).name if path else short_name(found)
    judged = load(reward, **(reward_options or {})) if reward is not None else found.build(**used).reward
    if judged is NO_REWARD:
        raise RewardError(f"{short_name(found)} has no reward of its own; give one: file.py:function or a known name.")
    return ArenaProblem(
        name, found.name, PICTURE_CALLS[0], PICTURE_CALLS[1], is_differentiable(judged), used, reward,
        dict(reward_options or {}), reference_samples=reference_samples,
    )  # fmt: skip


def known_problem(problem: str | ArenaProblem) -> ArenaProblem:
    """The problem of this name, or the problem itself. Raises ValueError with the names there are."""
    if isinstance(problem, ArenaProblem):
        return problem
    return PROBLEMS[known_name(problem, PROBLEMS, "unknown problem")]


def skips(rule: str, problem: ArenaProblem) -> str | None:
    """Why a rule does not meet a problem, or None."""
    if find_rule(rule).differentiates_reward and not problem.differentiable:
        return f"{rule} follows the reward's gradient, and the reward of {problem.name} has none."
    return None


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: everything that decides its outcome."""

    rule: str
    problem: ArenaProblem
    seed: int
    kl_weight: float
    network_calls: int
    reward_calls: int
    common: dict[str, Any] = field(default_factory=dict)  # settings of every run, the referee's too
    settings: dict[str, Any] = field(default_factory=dict)  # of this rule on this problem: tuned ones
    tuned: bool = False
    points: int = 8  # held-out evaluations on the way
    transfer_samples: int = 200
    heldout_seed: int = HELDOUT["bench"]
    yardstick: dict[str, Any] = field(default_factory=dict)  # what `measure` found

    def config(self) -> Config:
        """The settings of training: of those of all runs, and of tuned ones, what the rule uses.

        Raises ValueError for what does not fit.
        """
        base = self.problem.base()
        changes = {**self.common, **self.settings, "algorithm": self.rule, "kl_weight": self.kl_weight}
        return updated(base, {**usable(base, changes), "seed": self.seed}, f"{self.rule} on {self.problem.name}")

    @property
    def key(self) -> str:
        given = {**self.common, **self.settings}
        return json.dumps([self.rule, self.problem.name, self.kl_weight, self.seed, given], sort_keys=True)


def check_used(jobs: Sequence[Job], common: Mapping[str, Any], of_rule: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises SettingError where a setting of all runs is used by none of them, or one of a rule not by that rule."""
    configs = {(job.rule, job.problem.name): job.config() for job in jobs}
    for (rule, problem), config in configs.items():
        updated(config, of_rule.get(rule, {}), f"{rule} on {problem}")
    for name, value in common.items():
        if configs and not any(config.uses(name) for config in configs.values()):
            updated(next(iter(configs.values())), {name: value}, "a setting of all runs")
