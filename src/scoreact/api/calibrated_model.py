"""What is calibrated: a problem that can be built as often as wanted, each time with other weights of its statistics."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..recipes.base import Problem
from ..rewards.weighted_statistics import Spec, WeightedStatistics
from ..runs.source import Source, open_source
from ..training.config import Config, updated
from .result import Result
from .start import problem_of


class GivenModel:
    """A problem that was made in Python; every `build` is a copy of what it was."""

    def __init__(self, problem: Problem, config: Config, statistics: Sequence[Spec], command: str) -> None:
        self.problem = dataclasses.replace(problem, model=copy.deepcopy(problem.model), optimum=None)
        self.config, self.statistics, self.command = config, list(statistics), command

    def build(self, weights: Sequence[float]) -> Problem:
        reward = WeightedStatistics(self.statistics, weights)
        return dataclasses.replace(self.problem, model=copy.deepcopy(self.problem.model), reward=reward)

    def description(self, weights: Sequence[float]) -> dict[str, Any]:
        return {"made_by": self.command, "prompts": list(self.problem.prompts)}

    def report(self, result: Result) -> None:
        from ..report import html

        assert result.out is not None
        html.write(result.out, self.problem, result.policy)


class NamedModel:
    """A recipe, a folder or a file; the run says by itself how its model and its reward are built."""

    def __init__(self, source: Source, statistics: Sequence[Spec], command: str) -> None:
        self.source, self.config, self.command = source, source.config, command
        self.statistics = [_full_path(str(spec)) for spec in statistics]

    def _weighted(self, weights: Sequence[float]) -> Source:
        options = {"statistics": self.statistics, "weights": list(weights)}
        return dataclasses.replace(self.source, reward="statistics", reward_options=options)

    def build(self, weights: Sequence[float]) -> Problem:
        return self._weighted(weights).build()

    def description(self, weights: Sequence[float]) -> dict[str, Any]:
        return self._weighted(weights).description(self.command)

    def report(self, result: Result) -> None:
        from ..report import html

        assert result.out is not None
        html.write(result.out, result.problem, result.policy)


def origin_of(
    model: nn.Module | Problem | Source | str | Path, prompts: Sequence[str] | Mapping[str, Mapping[str, Any]],
    config: Config | None, settings: Mapping[str, Any], statistics: Sequence[Spec], command: str,
) -> GivenModel | NamedModel:  # fmt: skip
    if isinstance(model, str | Path):
        model = open_source(str(model))
    if isinstance(model, Source):
        source = dataclasses.replace(model, config=_suited(config or model.config, settings))
        if source.folder is not None:  # of a run its outcome is what to stay near to
            start = {"run": str(source.folder.resolve()), "reference": "tuned"}
            source = dataclasses.replace(source, folder=None, start=start)
        if all(isinstance(spec, str) for spec in statistics) and not prompts:
            return NamedModel(source, statistics, command)
        return GivenModel(_with_prompts(source.build(), prompts), source.config, statistics, command)
    problem = _with_prompts(model, prompts)
    return GivenModel(problem, _suited(config or Config(), settings), statistics, command)


def _with_prompts(model: nn.Module | Problem, prompts: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> Problem:
    return problem_of(model, None, prompts, needs_reward=False)


def _full_path(spec: str) -> str:
    """So that the run can be opened from another folder."""
    place, colon, name = spec.rpartition(":")
    path = Path(place).expanduser()
    if colon and path.is_file():
        return f"{path.resolve()}:{name}"
    return str(Path(spec).expanduser().resolve()) if Path(spec).expanduser().is_dir() else spec


def _suited(config: Config, settings: Mapping[str, Any]) -> Config:
    """The settings of training: kl_weight 1, and no form of the value that only fits a log-probability."""
    own: dict[str, Any] = {"kl_weight": 1.0}
    if config.target_kl:
        own["target_kl"] = 0.0
    if config.value_loss == "log_probability" and "value_loss" not in settings:
        own["value_loss"] = "soft"
    if config.surrogate_target == "logit" and "surrogate_target" not in settings:
        own["surrogate_target"] = "reward"
    return updated(config, {**settings, **own})
