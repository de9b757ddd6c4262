"""`finetune` as a user calls it: any reward, any problem, its folder, its words, and which weights are the tuned ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.mlp import MLP
from scoreact.models.unet import UNet

SMALL: dict[str, Any] = {
    "iterations": 2, "batch_size": 16, "steps": 3, "kl_weight": 0.5, "value_steps": 1, "value_first_steps": 2,
    "value_batch_size": 16, "reference_batches": 1, "heldout_samples": 8, "minibatch_size": 32, "device": "cpu",
}  # fmt: skip


class Labelled(nn.Module):
    """A network of one's own: (x, t, label)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP(2, 2, 16)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.body(x, t)


def points(seed: int = 0) -> tuple[sa.NetworkModel, Labelled]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Labelled()
    model = sa.NetworkModel(network, RectifiedFlow(), prediction.velocity, (2,), ["a", "b"], low=-4, high=4)
    return model, network


def pictures() -> sa.NetworkModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(widths=(8,), classes=2)
    return sa.NetworkModel(network, RectifiedFlow(), prediction.velocity, (1, 8, 8), ["cat", "dog"], low=-1, high=1)


def evaluations_of(result: sa.Result) -> list[dict[str, Any]]:
    return [line for line in result.history if line.get("evaluation")]


def by_image(images: Tensor) -> Tensor:
    return images.flatten(1).mean(1)


def by_prompt(images: Tensor, prompts: list[str]) -> list[float]:
    assert set(prompts) <= {"cat", "dog"}
    return [float(image.mean()) for image in images]


def by_metadata(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    assert len(prompts) == len(metadata) == len(images)
    return images.flatten(1).mean(1).numpy(), {}


def by_condition(samples: Tensor, condition: Any) -> Tensor:
    assert len(condition) == len(samples)
    return samples.flatten(1).mean(1)


@pytest.mark.parametrize("reward", [by_image, by_prompt, by_metadata, by_condition, "brightness"])
def test_every_shape_of_reward_trains(reward: Any) -> None:
    result = sa.finetune(pictures(), reward, **SMALL)
    assert result.final["reward/heldout"] == pytest.approx(result.final["reward/heldout"])
    assert len([line for line in result.history if "reward/mean" in line]) == 2


@pytest.mark.parametrize("reward", [by_image, by_condition])
def test_a_rule_that_wants_the_gradient_finds_it_without_a_mark(reward: Any) -> None:
    settings = {k: v for k, v in SMALL.items() if not k.startswith("value_") and k != "minibatch_size"}
    result = sa.finetune(pictures(), reward, algorithm="draft", **settings)
    assert result.history[-1]["iteration"] == 2
    with pytest.raises(sa.SettingError, match=r"draft follows the reward's gradient, but reward .*by_prompt has none"):
        sa.finetune(pictures(), by_prompt, algorithm="draft", **settings)


def test_a_file_and_its_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def left(x):\n    return -x[:, 0]\n")
    result = sa.finetune(points()[0], f"{tmp_path / 'mine.py'}:left", **SMALL)
    assert result.sample(count=2).shape == (4, 2), "two prompts, the model's own classes"


def test_the_same_folder_as_the_command_lines(tmp_path: Path) -> None:
    result = sa.finetune(points()[0], by_image, out=tmp_path / "run", **SMALL)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
        "report.html",
        "best",
        "checkpoints",
    } <= names
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Before and after" in page
    assert result.out == tmp_path / "run"
    with pytest.raises(sa.RunExists, match="is not empty"):
        sa.finetune(points()[0], by_image, out=tmp_path / "run", **SMALL)


def test_it_speaks_when_asked_and_only_then(capsys: pytest.CaptureFixture[str]) -> None:
    sa.finetune(points()[0], by_image, **SMALL)
    assert capsys.readouterr().out == "", "not into a pipe"
    result = sa.finetune(points()[0], by_image, progress=True, **SMALL)
    said = capsys.readouterr().out
    assert "J_ref" in said
    assert "held out" in said
    assert "path KL" in said
    assert str(result).splitlines()[0].startswith("reward     ")


def test_a_result_shows_itself() -> None:
    result = sa.finetune(points()[0], by_image, **SMALL)
    page = result._repr_html_()
    assert "<b>Held-out reward" in page
    assert "data:image/png;base64," in page
    figure = result.plot()
    assert len(figure.axes) >= 2
    one, other = (result.sample(["a"], 5, seed=3, reference=r) for r in (False, True))
    assert one.shape == other.shape == (5, 2)
    assert not torch.equal(one, other)
    assert torch.equal(one, result.sample(["a"], 5, seed=3))


def test_which_weights_are_the_tuned_ones_is_one_call() -> None:
    """Into the model that was given, the network inside it, and one of the same shape: samples become the result's."""
    for kind in ("model", "network", "other"):
        model, network = points()
        result = sa.finetune(model, by_image, average=0.5, **SMALL)
        tuned = {n: p.detach().clone() for n, p in result.policy.model.named_parameters()}  # type: ignore[union-attr]
        assert any(not torch.equal(p, tuned[n]) for n, p in model.named_parameters()), (
            "the last step is not the average"
        )
        target = {"model": None, "network": network, "other": points(5)[1]}[kind]
        assert result.write_back(target) == len(tuned)
        written = model if target is None else target
        for name, p in written.named_parameters():
            assert torch.equal(p, tuned[name if kind == "model" else f"network.{name}"])
    with pytest.raises(sa.ModelError, match="Linear is no part of the model that was tuned"):
        result.write_back(nn.Linear(2, 2))


def test_a_tuned_model_is_not_taken_for_the_reference(tmp_path: Path) -> None:
    """The model object that was being tuned, as in a notebook after Ctrl-C: the run keeps its reference."""
    model = points()[0]

    def interrupt(kind: str, line: dict[str, float]) -> None:
        if kind == "iteration" and line["iteration"] == 2:
            raise KeyboardInterrupt

    more = {**SMALL, "iterations": 4, "checkpoint_every": 1, "learning_rate": 0.05}
    whole = sa.finetune(points()[0], by_image, out=tmp_path / "whole", **more)
    with pytest.raises(KeyboardInterrupt):
        sa.finetune(model, by_image, out=tmp_path / "run", on_event=interrupt, **more)
    result = sa.finetune(model, by_image, out=tmp_path / "run", resume=True)
    assert result.final == whole.final, "path KL and share recovered from the pretrained model, not from the tuned one"
    said = [line["text"] for line in result.history if line.get("guard") == "note"]
    assert said == [
        "The model that was given is not the pretrained one that this run began with: its weights were taken from "
        "reference.safetensors."
    ]
    (tmp_path / "run" / "reference.safetensors").unlink()
    with pytest.raises(sa.RunError, match="started from another pretrained model"):
        sa.finetune(model, by_image, out=tmp_path / "run", resume=True)


def test_a_model_that_an_earlier_call_has_changed_is_noticed() -> None:
    model = points()[0]
    first = sa.finetune(model, by_image, **SMALL)
    assert not any(line.get("guard") == "note" for line in first.history)
    second = sa.finetune(model, by_image, **SMALL)
    said = [line["text"] for line in second.history if line.get("guard") == "note"]
    assert len(said) == 1
    assert said[0].startswith(
        "This model was trained by an earlier call, and what it is now is taken for the pretrained model"
    )


@pytest.mark.parametrize("reference", ["first", "tuned"])
def test_a_run_starts_from_another(tmp_path: Path, reference: str) -> None:
    """With the first reference path KL goes on from where it was; with the tuned model as the new one it starts at 0."""
    more = {**SMALL, "iterations": 6, "learning_rate": 0.05, "heldout_samples": 64, "epochs": 4}
    first = sa.finetune(points()[0], by_image, out=tmp_path / "first", **more)
    assert first.final["policy/kl"] > 1e-3
    second = sa.finetune(
        points()[0], by_image, out=tmp_path / "second", start_from=tmp_path / "first", start_reference=reference, **more
    )
    evaluations = evaluations_of(second)
    start = evaluations[1 if reference == "first" else 0]
    assert start["iteration"] == 0
    if reference == "first":
        assert evaluations[0]["policy/kl"] == 0
        assert start["policy/kl"] == pytest.approx(first.final["policy/kl"], rel=1e-4)
        assert start["objective/recovered"] == pytest.approx(first.final["objective/recovered"], rel=1e-3)
    else:
        assert start["policy/kl"] == 0
        # near, not equal: a step without noise is the reference's, which now is the tuned model
        assert start["reward/heldout"] == pytest.approx(first.final["reward/heldout"], abs=0.02)
        assert start["reward/heldout"] > evaluations_of(first)[0]["reward/heldout"]
    described = json.loads((tmp_path / "second" / "config.json").read_text())["description"]["start"]
    assert described == {"run": str(tmp_path / "first"), "reference": reference}
    assert reference in (tmp_path / "second" / "report.html").read_text(encoding="utf-8")
    opened = sa.open_run(tmp_path / "second", points()[0], by_image)
    assert torch.equal(opened.sample(count=2), second.sample(count=2))
    assert torch.equal(opened.sample(count=2, reference=True), second.sample(count=2, reference=True))


def test_a_hook_is_told_and_ends_the_run() -> None:
    class Watch(sa.Hook):
        seen: list[int] = []  # noqa: RUF012  of this test

        def iteration(self, trainer: Any, metrics: dict[str, float]) -> None:
            self.seen.append(trainer.iteration)

        def after(self, trainer: Any) -> sa.Stop | None:
            return sa.Stop("enough is enough.") if trainer.iteration == 2 else None

    result = sa.finetune(points()[0], by_image, hooks=[Watch()], **{**SMALL, "iterations": 9})
    assert Watch.seen == [1, 2]
    assert result.stopped == "enough is enough."
    assert [line["iteration"] for line in result.history if line.get("evaluation")] == [0, 2], "its end is evaluated"
