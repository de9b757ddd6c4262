"""Prompts kept out of training: which they are, that training never sees them, and what is measured on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.dynamics.schedule import VP
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.training.unseen import split, unseen_metrics
from scoreact.types import Condition

PROMPTS = [f"go {i}" for i in range(120)]


class Open(ResidualModel):
    """One blob, under any prompt."""

    def condition(self, prompts: Any) -> Condition:
        return Condition(list(prompts), torch.arange(len(prompts)) * 0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Open(GaussianMixture(VP(t_max=0.98), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None]), dim=2)


def finetune(reward: Any, prompts: list[str] = PROMPTS, **settings: Any) -> sa.Result:
    few = {
        "iterations": 4,
        "batch_size": 64,
        "reference_batches": 1,
        "steps": 4,
        "heldout_samples": 64,
        "evaluate_every": 2,
    }
    return sa.finetune(model(), reward, prompts, device="cpu", progress=False, **{**few, **settings})


def test_the_split_is_a_share_of_many_prompts_and_the_same_for_the_same_seed() -> None:
    trained, unseen = split(PROMPTS, -1, 0)
    assert len(unseen) == 12
    assert sorted(trained + unseen) == sorted(PROMPTS)
    assert [p for p in PROMPTS if p in set(trained)] == trained, "in their order"
    assert split(PROMPTS, -1, 0) == (trained, unseen)
    assert split(PROMPTS, -1, 1) != (trained, unseen)
    assert split(PROMPTS[:99], -1, 0) == (PROMPTS[:99], [])
    assert len(split([str(i) for i in range(10_000)], -1, 0)[1]) == 200
    assert split(PROMPTS, 0, 0) == (PROMPTS, [])
    assert len(split(PROMPTS[:5], 2, 0)[1]) == 2


def test_what_cannot_be_kept_out() -> None:
    with pytest.raises(sa.SettingError, match="heldout_prompts is 5, and there are 5 prompts"):
        split(PROMPTS[:5], 5, 0)
    with pytest.raises(sa.SettingError, match="2 test prompts are trained on, such as 'go 1'"):
        split(PROMPTS, -1, 0, given=["go 1", "stay", "go 2"])
    with pytest.raises(sa.SettingError, match="heldout_prompts is 5, but test prompts are given"):
        split(PROMPTS, 5, 0, given=["stay"])
    assert split(PROMPTS, -1, 0, given=["stay"]) == (PROMPTS, ["stay"])


def test_classes_are_all_that_a_model_knows() -> None:
    class Classes(nn.Module):
        classes = PROMPTS

    assert split(PROMPTS, -1, 0, Classes()) == (PROMPTS, [])
    assert len(split(PROMPTS, 12, 0, Classes())[1]) == 12


def test_the_gains_error_is_that_of_prompts_on_the_same_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, effect = torch.randn(400, generator=generator), torch.randn(50, generator=generator).repeat_interleave(8)
    condition = Condition([str(i) for i in range(50) for _ in range(8)])
    found = unseen_metrics(noise + effect, noise, condition)
    assert found["reward/heldout_prompts_gain"] == pytest.approx(float(effect.mean()), abs=1e-6)
    assert found["reward/heldout_prompts_gain_se"] == pytest.approx(float(effect[::8].std()) / 50**0.5, rel=1e-5)
    assert found["reward/heldout_prompts"] == pytest.approx(float((noise + effect).mean()), abs=1e-6)


def test_training_never_sees_them_and_the_run_says_what_they_gain(tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    before_the_report: dict[str, int] = {}

    def right(points: Tensor, prompts: list[str]) -> Tensor:
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, 0) + 1
        return points[:, 0]

    def listen(kind: str, metrics: dict[str, float]) -> None:
        if kind == "finished":
            before_the_report.update(seen)

    result = finetune(right, algorithm="ddpo", out=tmp_path / "run", iterations=6, learning_rate=2e-2, on_event=listen)
    unseen = split(PROMPTS, -1, 0)[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = [line for line in lines if line.get("evaluation")][::3]
    assert first["reward/heldout_prompts_gain"] == first["reward/heldout_prompts_gain_se"] == 0
    gain, error = last["reward/heldout_prompts_gain"], last["reward/heldout_prompts_gain_se"]
    assert gain == pytest.approx(last["reward/heldout_prompts"] - first["reward/heldout_prompts"], abs=1e-5)
    assert 0 < 4 * error < gain
    reference = next(line for line in lines if line.get("reference"))
    assert (reference["prompts/trained"], reference["prompts/heldout"]) == (108, 12)
    assert (reference["objective/pooled"], reference["objective/effective_samples"] > 10) == (1, True)
    assert sum(before_the_report[prompt] for prompt in unseen) == 4 * 64, "four looks, and no training"
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["final"]["reward/heldout_prompts_gain"] == gain
    page = (tmp_path / "run" / "report.html").read_text()
    assert "On 12 prompts that training never saw, the reward changed by" in page
    assert "reward, unseen prompts" in page
    assert "J* and KL* are pooled over prompts" in page
    assert result.final["reward/heldout_prompts_gain"] == gain


def test_a_resumed_run_keeps_the_split_and_refuses_other_prompts(tmp_path: Path) -> None:
    def right(points: Tensor) -> Tensor:
        return points[:, 0]

    def kill(kind: str, metrics: dict[str, float]) -> None:
        if kind == "checkpoint":
            raise ConnectionError("the power failed")

    settings: dict[str, Any] = {"algorithm": "ddpo", "checkpoint_every": 2}
    whole = finetune(right, out=tmp_path / "whole", **settings)
    with pytest.raises(ConnectionError):
        finetune(right, out=tmp_path / "parts", on_event=kill, **settings)
    with pytest.raises(sa.RunError, match="the run began with other prompts than the 119 given now"):
        finetune(right, PROMPTS[:-1], out=tmp_path / "parts", resume=True, **settings)
    parts = finetune(right, out=tmp_path / "parts", resume=True, **settings)
    assert parts.final == whole.final
    assert "reward/heldout_prompts_gain" in parts.final


def test_test_prompts_of_a_problem_are_measured_and_all_others_trained_on() -> None:
    seen: set[str] = set()

    def right(points: Tensor, prompts: list[str]) -> Tensor:
        seen.update(prompts)
        return points[:, 0]

    problem = sa.Problem(model(), right, PROMPTS, ["stay", "leave"])  # type: ignore[arg-type]
    result = sa.finetune(
        problem, right, iterations=1, batch_size=120, reference_batches=1, steps=2, heldout_samples=8, device="cpu",
        progress=False, algorithm="ddpo",
    )  # fmt: skip
    assert result.reference["prompts/trained"] == 120
    assert {"stay", "leave"} < seen
