"""One suite for every rule there is: nothing without a reward, repeatable, resumable, on any model, towards the optimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_problem import needed
from torch import Tensor, nn

from scoreact.algorithms.registry import rules
from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.control.transitions import Batch
from scoreact.dynamics import girsanov, prediction
from scoreact.dynamics.schedule import Cosine, RectifiedFlow
from scoreact.models.network import NetworkModel
from scoreact.models.value_networks import VectorValue
from scoreact.rewards.base import FunctionReward
from scoreact.training.config import Config, updated, usable
from scoreact.training.trainer import Trainer
from scoreact.types import Condition, Metrics

NAMES = list(rules())
BY_REWARD = [name for name in NAMES if name != "dxmi"]  # which learns from data

# 40 iterations of 256 paths on the two-dimensional mixture at 10 Euler-Maruyama steps, where the exact continuous-time
# policy recovers 0.76: settings, and the share that must be recovered. ddpo's fixed point is the argmax of the reward:
# its reward must pass the optimum's (-0.09), whatever the KL
TOWARDS: dict[str, tuple[dict[str, Any], float]] = {
    "ctrl": ({}, 0.7),
    "ctrl_pathwise": ({}, 0.7),
    "ctrl_trpo": ({}, 0.7),
    "q_learning": ({}, 0.65),
    "adjoint_matching": ({"learning_rate": 4e-3}, 0.65),
    "draft": ({}, 0.65),
    "dpok": ({"learning_rate": 4e-3, "later_costs": True}, 0.65),
    "flow_grpo": ({"noise": "noise_level", "noise_scale": 1.0, "advantage_scale": "none", "learning_rate": 4e-3,
                   "epochs": 3}, 0.6),
    "rwr": ({"learning_rate": 5e-3, "minibatch_size": 512}, 0.6),
    "dpo": ({"learning_rate": 5e-3, "minibatch_size": 128, "rounds": 4}, 0.6),
    "diffusion_nft": ({"learning_rate": 5e-3, "minibatch_size": 512}, 0.4),
    "ram": ({"learning_rate": 5e-3, "minibatch_size": 512}, 0.4),
    "ddpo": ({"learning_rate": 2e-3}, -0.05),
}  # fmt: skip
SMALL: dict[str, Any] = {
    "iterations": 4, "batch_size": 32, "steps": 4, "kl_weight": 0.5, "value_steps": 3, "value_first_steps": 5,
    "value_batch_size": 32, "reference_batches": 2, "heldout_samples": 64, "minibatch_size": 64, "evaluate_every": 2,
    "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip


class Series(nn.Module):
    """A velocity for series [B, 1, 12] of three classes: not a picture, not a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(4, 8)
        self.into, self.out = nn.Conv1d(2, 8, 5, padding=2), nn.Conv1d(8, 1, 5, padding=2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        inputs = torch.cat([x, t.reshape(-1, 1, 1).expand_as(x)], dim=1)
        result: Tensor = self.out(torch.nn.functional.silu(self.into(inputs) + self.label(label).unsqueeze(2)))
        return result


class Classes(nn.Module):
    """A value of series and class."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.label = VectorValue(24, 16), nn.Embedding(4, 1)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.rows is not None
        value: Tensor = self.net(x, t, condition) + self.label(condition.rows)[:, 0]
        return value


def series_model(schedule: Any) -> NetworkModel:
    """With classes and guidance."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = Series()
    return NetworkModel(
        network, schedule, prediction.velocity, (1, 12), ("a", "b", "c"), guidance_scale=2.0, low=-1, high=1
    )


LEVEL = FunctionReward(lambda x, c: x[:, :, 6:].mean((1, 2)), "level", differentiable=True)


FOLDER: list[Path] = []  # where real examples lie, for the rule that learns from them


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> Iterator[None]:
    FOLDER.append(tmp_path)
    yield
    FOLDER.clear()


def settings_of(rule: str) -> dict[str, Any]:
    """Of a run of a few iterations."""
    return {**SMALL, "algorithm": rule, **needed(rule, FOLDER[0], (1, 12), ("a", "b", "c"))}


def train(rule: str, out: Path | None = None, reward: Any = LEVEL, schedule: Any = None, **settings: Any) -> Result:
    """A few iterations on the series."""
    run = {k: settings.pop(k) for k in ("resume", "on_event") if k in settings}
    config = updated(Config(), {**usable(Config(), settings_of(rule)), **settings})
    return finetune(
        series_model(schedule or RectifiedFlow()), reward, ["a", "b", "c"], value_network=Classes, config=config,
        out=out, **run,
    )  # fmt: skip


def weights(result: Result) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.policy.model.parameters()])  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", NAMES)
def test_ratio_is_one_before_the_first_update(rule: str) -> None:
    config = updated(Config(), usable(Config(), settings_of(rule)))
    trainer = Trainer(series_model(RectifiedFlow()), LEVEL, ["a", "b", "c"], Classes, config)
    trainer.look_at_reference()
    if rule not in BY_REWARD:  # and draws its own paths
        assert not rules()[rule].transitions_only
        return
    rows = trainer.algorithm.prepare(trainer.rollout(), trainer.generator, 1.0)
    if not isinstance(rows, Batch):
        assert not rules()[rule].transitions_only
        return
    with torch.no_grad():
        assert float(girsanov.log_ratio(trainer.algorithm.shift(rows), rows.noise).abs().max()) < 1e-5
        for p in trainer.policy.trainable():
            p.add_(0.05)
        assert float(girsanov.log_ratio(trainer.algorithm.shift(rows), rows.noise).abs().max()) > 1e-3


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Cosine()], ids=["rectified_flow", "cosine"])
@pytest.mark.parametrize("rule", NAMES)
def test_learns_on_series_with_classes_guidance_and_any_schedule(rule: str, schedule: Any) -> None:
    before = torch.cat([p.detach().flatten() for p in series_model(schedule).parameters()])
    result = train(rule, schedule=schedule, iterations=2)
    assert bool(weights(result).isfinite().all())
    assert not torch.equal(weights(result), before)
    assert all(math.isfinite(v) for k, v in result.final.items() if k.startswith(("reward", "policy", "objective/J")))


@pytest.mark.parametrize("rule", NAMES)
def test_the_same_seed_gives_the_same_weights(rule: str) -> None:
    torch.manual_seed(1)
    first = train(rule, iterations=2)
    torch.manual_seed(2)
    again, other = train(rule, iterations=2), train(rule, iterations=2, seed=1)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("rule", NAMES)
def test_a_killed_run_resumes_to_the_same_weights(rule: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(kind: str, metrics: Metrics) -> None:
        if kind == "iteration" and metrics["iteration"] == 3:
            raise Killed

    whole = train(rule, tmp_path / "whole")
    with pytest.raises(Killed):
        train(rule, tmp_path / "cut", on_event=kill)
    resumed = train(rule, tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.final == resumed.final


@pytest.mark.parametrize("rule", BY_REWARD)
def test_without_a_reward_the_policy_stays_at_the_reference(rule: str, train_on_mixture: Callable[..., Result]) -> None:
    """Rewards are all zero. What is left is the update's noise: a small part of where a reward takes the same run."""

    def path_kl(scale: float) -> float:
        reward = FunctionReward(lambda x, c: scale * x.sum(1), "sum", differentiable=True)
        settings = {**TOWARDS[rule][0], "iterations": 4, "batch_size": 128, "heldout_samples": 500}
        return train_on_mixture(reward, width=32, algorithm=rule, **settings).final["policy/kl"]

    without, with_reward = path_kl(0.0), path_kl(2.0)
    print(f"{rule}: path KL {without:.5f} without a reward, {with_reward:.5f} with one")
    assert without < 0.2 * with_reward


def test_every_rule_has_a_floor() -> None:
    assert set(TOWARDS) == set(BY_REWARD)


@pytest.mark.slow
@pytest.mark.parametrize("rule", BY_REWARD)
def test_approaches_the_optimum_that_it_should(rule: str, train_on_mixture: Callable[..., Result]) -> None:
    settings, floor = TOWARDS[rule]
    result = train_on_mixture(algorithm=rule, heldout_samples=4000, iterations=40, **settings)
    found = result.final["reward/heldout" if rule == "ddpo" else "objective/recovered"]
    print(f"{rule}: recovered {result.final['objective/recovered']:.3f}, reward {result.final['reward/heldout']:.3f}")
    assert found > floor
