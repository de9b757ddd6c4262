"""Runs opened again, from Python and from the command line, a model of the user's own file included."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.api.result import Sampled
from scoreact.cli import main as cli
from scoreact.control.policy import Policy
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.sampling.steering import METHODS

MODEL = """
import torch
import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.mlp import MLP

class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = MLP(2, 2, width)

    def forward(self, x, t, label):
        return self.body(x, t)

def build(width=8, prompts=""):
    torch.manual_seed(0)
    names = [prompts] if prompts else ["a", "b"]
    return sa.NetworkModel(Net(width), RectifiedFlow(), prediction.velocity, (2,), names, low=-4, high=4)

def problem():
    return sa.Problem(build(), reward=lambda samples, condition: samples[:, 0], prompts=["b"], labels={"problem": "mine"})

def left(x):
    return -x[:, 0]

def needs(something):
    return build()
"""
SMALL = ["--iterations", "2", "--batch-size", "16", "--steps", "3", "--value-steps", "1", "--value-first-steps", "2",
         "--value-batch-size", "16", "--reference-batches", "1", "--heldout-samples", "8", "--minibatch-size", "32",
         "--device", "cpu"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Path:
    words = ["train", "my_model.py:build", "--reward", "my_model.py:left", "--option", "width=12", "--out", "run"]
    assert cli.main([*words, *SMALL]) == 0
    return folder / "run"


def test_a_model_of_ones_own_goes_all_the_way(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """train, sample, evaluate, steer, report, check, resume, and from another folder."""
    (run.parent / "elsewhere").mkdir()
    monkeypatch.chdir(run.parent / "elsewhere")
    capsys.readouterr()
    for words in (
        ["sample", str(run), "--count", "2"],
        ["sample", str(run), "--count", "2", "--steer", "best_of", "--particles", "2"],
        ["evaluate", str(run), "--samples", "4", "--steps", "2", "--solver", "ode"],
        ["report", str(run)],
        ["check", "run", str(run)],
        ["resume", str(run)],
        ["resume", str(run), "--iterations", "3"],
    ):
        assert cli.main(words) == 0, words
    said = capsys.readouterr().out
    assert "build: " in said or "my_model: build of my_model.py" in said
    assert len(list((run / "samples").iterdir())) == 2
    content = json.loads((run / "config.json").read_text())
    assert content["description"]["recipe"] == f"{run.parent / 'my_model.py'}:build"
    assert content["description"]["options"]["width"] == 12


def test_a_problem_brings_its_reward_and_prompts(folder: Path) -> None:
    assert cli.main(["train", "my_model.py:problem", *SMALL, "--out", "run"]) == 0
    opened = sa.open_run("run")
    assert opened.problem.prompts == ["b"]
    assert opened.sample(count=3).shape == (3, 2)
    assert opened.problem.labels["problem"] == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my_model.py:build"], "my_model has no reward of its own; give --reward file.py:function"),
        (["my_model.py:bild"], "my_model.py has no 'bild'. Did you mean 'build'"),
        (["my_model.py:needs", "--reward", "my_model.py:left"], "needs a value for something; give each a default"),
        (["my_model.py:left", "--reward", "my_model.py:left"], "needs a value for x; give each a default"),
        (
            ["my_model.py:build", "--option", "with=3"],
            "recipe my_model has no option 'with'; known: width, prompts, lora_rank, lora_targets. Did you",
        ),
        (["gone.py:build"], "model file 'gone.py' does not exist"),
        (["gaussian", "--from-reference", "tuned"], "--from-reference does nothing without --from"),
        (["gaussian", "--prompts", "a cat"], "recipe gaussian has prompts of its own"),
    ],
)
def test_what_cannot_be_trained_is_a_sentence(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *words, *SMALL, "--out", "run"]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
    assert not (folder / "run").exists()


def test_prompts_of_ones_own_model(folder: Path) -> None:
    words = ["my_model.py:build", "--reward", "my_model.py:left", "--prompts", "a red thing"]
    assert cli.main(["train", *words, *SMALL, "--out", "run"]) == 0
    assert sa.open_run("run").problem.prompts == ["a red thing"]
    (folder / "prompts.txt").write_text("a red thing\n\na red thing\n")
    assert cli.main(["sample", "run", "--prompts", "prompts.txt", "--count", "2"]) == 0
    (index,) = (folder / "run" / "samples").glob("*/index.json")
    assert [entry["prompt"] for entry in json.loads(index.read_text())["samples"]] == ["a red thing"] * 2
    assert cli.main(["sample", "run", "--negative-prompt", "blue"]) == 2


def test_an_opened_run_says_what_it_is(run: Path) -> None:
    opened = sa.open_run(run)
    assert opened.config.steps == 3
    assert opened.final == [line for line in opened.history if line.get("evaluation")][-1]
    assert opened.reference["objective/J_star"] > opened.reference["objective/J_ref"]
    final, best = opened.policy(), opened.policy("best")
    assert opened.policy() is final
    stored = torch.cat([p.flatten() for p in final.model.parameters()])  # type: ignore[union-attr]
    assert torch.equal(torch.cat([p.flatten() for p in opened.policy().model.parameters()]), stored)  # type: ignore[union-attr]
    assert best.model is not final.model
    found = opened.evaluate(samples=4, solvers=["ode"], steps=[2, 3])
    assert json.loads((run / "evaluation.json").read_text())["heldout"] == pytest.approx(found["heldout"], nan_ok=True)
    assert [row["steps"] for row in found["transfer"]] == [2, 3]
    steered = opened.steer("best_of", ["a"], count=3, particles=4)
    assert steered.samples.shape == (3, 2)
    assert steered.calls.reward == 12
    assert opened.check() == [
        "fine: the checkpoint of iteration 2 of 2 can be read.", "fine: the final weights fit the model.",
        "fine: 5 files of weights are whole and finite.",
    ]  # fmt: skip
    assert opened.report().is_file()


def test_guidance_is_another_for_a_while(run: Path) -> None:
    opened = sa.open_run(run)
    before = opened.sample(count=2)
    guided = opened.sample(count=2, guidance_scale=3.0)
    assert torch.equal(before, opened.sample(count=2)), "and put back"
    assert opened.policy().model.guidance_scale == 1.0  # type: ignore[union-attr]
    assert guided.shape == before.shape


def test_a_run_from_python_needs_its_model(tmp_path: Path, folder: Path) -> None:
    space: dict[str, Any] = {}
    exec((folder / "my_model.py").read_text(), space)
    build: Callable[[], Any] = space["build"]
    settings = {"iterations": 2, "batch_size": 16, "steps": 3, "value_first_steps": 2, "value_steps": 1,
                "reference_batches": 1, "heldout_samples": 8, "device": "cpu", "learning_rate": 0.05}  # fmt: skip
    model = build()
    result = sa.finetune(model, space["left"], out="mine", **settings)
    with pytest.raises(sa.RunError, match=r"was made from Python, and only Python has its model; open it there"):
        sa.open_run("mine")
    for given in (build(), build, model):  # `model` has been trained: the run has kept what it was
        opened = sa.open_run("mine", given, space["left"])
        assert torch.equal(opened.sample(count=2), result.sample(count=2))
        assert torch.equal(opened.sample(count=2, reference=True), result.sample(count=2, reference=True))
    longer = opened.resume(iterations=4)
    assert longer.history[-1]["iteration"] == 4
    assert torch.equal(opened.sample(count=2), longer.sample(count=2))
    own = space["Net"](8)
    opened.write_back(own)
    assert torch.equal(own.body.last.weight, longer.policy.model.network.body.last.weight)  # type: ignore[union-attr]


def test_a_run_goes_on_from_another_by_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its settings, reward and options are those of the run where nothing else is said."""
    assert cli.main(["train", "--from", "run", "--out", "second", "--iterations", "1"]) == 0
    content = json.loads(Path("second/config.json").read_text())
    assert content["description"]["start"] == {"run": str(run), "reference": "first"}
    assert content["description"]["options"]["width"] == 12
    assert content["config"]["batch_size"] == 16
    rows = [json.loads(line) for line in Path("second/metrics.jsonl").read_text().splitlines()]
    kls = [row["policy/kl"] for row in rows if row.get("evaluation")]
    assert kls[0] == 0
    assert kls[1] == pytest.approx(sa.open_run("run").final["policy/kl"], rel=1e-4)
    assert cli.main(["train", "--from", "run", "--from-reference", "tuned", "--out", "third", "--iterations", "2"]) == 0
    assert cli.main(["resume", "third", "--iterations", "3"]) == 0
    assert cli.main(["train", "gaussian", "--from", "run", "--out", "fourth"]) == 2
    assert "its weights fit no other model" in capsys.readouterr().err


def test_a_picture_is_the_same_whatever_else_is_drawn(run: Path) -> None:
    """By (seed, prompt, number) alone, steered or not; and two seeds share nothing."""
    opened = sa.open_run(run)
    for method, solver in [
        ("", "ddim"),
        *((m, "ddim") for m in METHODS),
        ("", "adaptive_ode"),
        ("best_of", "adaptive_ode"),
    ]:

        def drawn(prompts: list[str], count: int, seed: int = 0, first: int = 0) -> Tensor:
            how: dict[str, Any] = {"steps": 3, "seed": seed, "first": first, "solver": solver}  # noqa: B023
            if not method:  # noqa: B023
                return opened.sample(prompts, count, **how)
            return opened.steer(method, prompts, count, **how).samples  # noqa: B023

        three = drawn(["a"], 3)
        for found, expected in (
            (drawn(["a"], 1), three[:1]),
            (drawn(["b", "a"], 2)[-2:], three[:2]),
            (drawn(["a"], 2, first=1), three[1:]),
        ):
            assert torch.allclose(found, expected, atol=1e-5), (method, solver)
        apart = torch.cat([three, *(drawn(["a"], 3, seed) for seed in (1, 2))])
        assert torch.pdist(apart.flatten(1)).min() > 1e-4, (method, solver)
    for wrong, said in (({"seed": -1}, "seed is -1"), ({"seed": 1.0}, "seed is 1.0"), ({"count": 0}, "count is 0"),
                        ({"prompts": []}, "prompts is empty"), ({"seed": 2**32}, "seed is 4294967296")):  # fmt: skip
        with pytest.raises(sa.SettingError, match=said):
            opened.sample(**wrong)
        if "seed" in wrong:
            with pytest.raises(sa.SettingError, match=said):
                opened.evaluate(**wrong)
    for method, how in (("smc", {"strength": 2.0}), ("value", {"particles": 2})):
        with pytest.raises(sa.SettingError, match=f"{next(iter(how))} is 2, but {method}"):
            opened.steering(method, **how)


class Fading(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.rate * x


def test_videos_are_drawn_by_so_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One first, which says how large a video and the states of its path are."""
    shape, steps = (3, 4, 8, 8), 2
    model = sa.NetworkModel(Fading(), RectifiedFlow(), prediction.velocity, shape)
    sampled = Sampled()
    sampled.problem, sampled.config = sa.Problem(model, prompts=[""]), sa.Config(steps=steps)
    policy = Policy(model)

    def parts() -> list[Tensor]:
        return [part.samples for part in sampled.drawn(policy, None, 9, None, None, 0, False)]

    whole = parts()
    assert [len(part) for part in whole] == [1, 8]
    one = 4 * math.prod(shape) * (steps + 2)  # bytes of the states at 0 ... steps and of the decoded video
    monkeypatch.setattr("scoreact.api.result.MOST_BYTES", 3 * one + 1)
    few = parts()
    assert [len(part) for part in few] == [1, 3, 3, 2]
    monkeypatch.setattr("scoreact.api.result.MOST_BYTES", 10)
    assert [len(part) for part in parts()] == [1] * 9
    assert torch.allclose(torch.cat(few), torch.cat(whole), atol=1e-6)
