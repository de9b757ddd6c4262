"""What a run of the arena may spend: network calls and reward calls."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..algorithms.registry import find_rule
from ..support.errors import SettingError
from ..support.names import known_name
from ..training.config import Config
from ..training.trainer import Trainer
from .problems import Job


def least_calls(config: Config) -> tuple[int, int]:
    """Network and reward calls without which no iteration can be made: the paths it learns from."""
    rule = find_rule(config.algorithm)
    reused = bool(config.rule.get("reuse_reference", 0))
    learns = rule.fits_value or config.reward_gradient == "surrogate" or reused
    rollouts = (config.reference_batches if learns else 0) + (not reused)
    return config.batch_size * config.steps * rollouts, config.batch_size * rollouts


def check_budget(job: Job) -> None:
    """Raises ValueError where not one iteration fits."""
    least = least_calls(job.config())
    for what, given, needed in zip(("network", "reward"), (job.network_calls, job.reward_calls), least, strict=True):
        if given < needed:
            raise SettingError(
                f"{given} {what} calls are too few for one iteration of {job.rule} on {job.problem.name}, which needs "
                f"more than {needed}; raise {what}_calls, or lower batch_size or reference_batches."
            )


def split_settings(
    settings: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of all runs, and those written `rule.name`, by rule. Seed, kl_weight and iterations are the arena's."""
    common: dict[str, Any] = {}
    of_rule: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        rule, dot, name = key.rpartition(".")
        if name in ("seed", "kl_weight", "iterations", "algorithm"):
            raise SettingError(
                f"{name} cannot be a setting here: the arena chooses it (seeds, kl_weights, the budget, rules)."
            )
        if dot:
            of_rule.setdefault(known_name(rule, names, "unknown rule"), {})[name] = value
        else:
            common[key] = value
    return common, of_rule


def spent(trainer: Trainer) -> tuple[int, int]:
    """Network calls (policy, reference, value) and reward calls so far."""
    return trainer.policy.network_calls + trainer.value.value.calls, trainer.reward.calls


def take_back(trainer: Trainer, weights: Mapping[str, Tensor], before: tuple[int, int], iteration: int) -> None:
    """The averaged weights, counts and iteration as they were: what the result is made of."""
    trainer.average.model.load_state_dict(weights)
    trainer.policy.network_calls, trainer.reward.calls = before[0] - trainer.value.value.calls, before[1]
    trainer.iteration = iteration


def counts(pair: Sequence[int]) -> dict[str, int]:
    """Network and reward calls, by name."""
    return {"network_calls": pair[0], "reward_calls": pair[1]}


def planned_iterations(
    trainer: Trainer, used: Sequence[int], budget: Sequence[int], costs: Sequence[Sequence[int]]
) -> int:
    """How many iterations the run will have, as the last ones cost: the learning rates fall to 0 at its end."""
    means = [statistics.mean(c) for c in zip(*costs, strict=True)]
    left = min((b - s) / max(c, 1) for b, s, c in zip(budget, used, means, strict=True))
    return trainer.iteration + max(1, int(left))
