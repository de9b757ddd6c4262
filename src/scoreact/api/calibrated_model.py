"""What is calibrated: a problem that can be built as often as wanted, each time with other weights of its statistics."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..control.policy import Policy
from ..dynamics.solvers import SOLVERS
from ..evaluation.ensemble import Ensemble, ensemble_of
from ..models.weights import reference_digest_of
from ..recipes.base import Problem
from ..rewards.weighted_statistics import Spec, Statistic, WeightedStatistics
from ..runs.resuming import named_files
from ..runs.session import Event
from ..runs.source import Source, open_source
from ..support.devices import choose_device, device_of
from ..support.errors import SettingError
from ..support.seeds import derived
from ..training.config import Config, updated
from .calibration_folder import begun_round, ended_early
from .result import Result
from .start import problem_of, train_problem, usual_config


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


@dataclass
class Work:
    """Draws ensembles of a model that is calibrated, and trains it, a round at a time."""

    origin: GivenModel | NamedModel
    statistics: list[Statistic]
    also: list[Statistic]
    samples: int
    reference: Policy | None = None
    prompts: Sequence[str] = ()

    def pretrained(self) -> Policy:
        """The pretrained model, which is the reference of every round."""
        if self.reference is None:
            problem = self.origin.build([])
            assert isinstance(problem.model, nn.Module)
            policy_of_it = Policy(problem.model.to(choose_device(self.origin.config.device)).eval())
            self.reference, self.prompts = Policy(policy_of_it.reference, policy_of_it.reference), problem.prompts
            if self.samples < 20 * len(self.prompts):
                raise SettingError(
                    f"samples is {self.samples} for {len(self.prompts)} prompts, and each needs 20 for a Z of its own; give at "
                    f"least {20 * len(self.prompts)}, or fewer prompts."
                )
        return self.reference

    def described(self) -> dict[str, Any]:
        """All that decides what comes of it beside its numbers: flat, of a file that is named its digest."""
        told = {k: v for k, v in self.origin.description([]).items() if k not in ("command", "made_by")}
        names = {"statistics": [one.name for one in self.statistics], "also": [one.name for one in self.also]}
        model = {"model": reference_digest_of(self.pretrained().reference)}
        return {**told, **self.origin.config.to_dict(), **names, **model, **named_files(told)}

    def draw(self, policy: Policy | None, number: int) -> Ensemble:
        """An ensemble of a policy, or of the pretrained model; the same noise for the same number."""
        config, reference = self.origin.config, self.pretrained()
        policy = policy or reference
        return ensemble_of(
            policy, config.sde(policy.model.schedule), SOLVERS[config.solver], config.times(policy.model.schedule),
            [*self.statistics, *self.also], self.prompts, self.samples, derived(config.seed, "calibrate", number),
            device_of(policy.model),
        )  # fmt: skip

    def names(self, ensemble: Ensemble, goal: Tensor) -> list[str]:
        """Of the columns that are calibrated. Raises SettingError for another number of targets."""
        own = {one.name for one in self.statistics}
        names = [name for name in ensemble.columns if name.partition("[")[0] in own]
        if len(names) != len(goal):
            raise SettingError(
                f"there are {len(names)} statistics ({', '.join(names)}) and {len(goal)} targets; give one each, in order."
            )
        return names

    def train(
        self, weights: Sequence[float], before: Result | None, folder: Path | None, progress: bool | None,
        on_event: Event | None,
    ) -> Result:  # fmt: skip
        """A round, from the weights that the one before left; one that was begun goes on, one that has ended is read."""
        start = None
        if before is not None:
            assert isinstance(before.problem.model, nn.Module)
            assert isinstance(before.policy.model, nn.Module)
            trained = {name for name, p in before.problem.model.named_parameters() if p.requires_grad}
            start = {name: p.detach().clone() for name, p in before.policy.model.named_parameters() if name in trained}
        return train_problem(
            self.origin.build(weights), self.origin.config, folder, resume=begun_round(folder), extend=False, start=start,
            description=self.origin.description(weights), progress=progress, on_event=on_event, hooks=ended_early(folder),
            report=False,
        )  # fmt: skip


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
    return GivenModel(problem, _suited(config or usual_config(problem.model), settings), statistics, command)


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
