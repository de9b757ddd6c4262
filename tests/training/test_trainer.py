"""Runs: same seed same weights, kill and resume, refusals, bad rewards, divergence, interruption, early stop."""

from __future__ import annotations

import itertools
import json
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.models.weights import load_weights
from scoreact.recipes.gaussian import build, linear_reward, mixture
from scoreact.runs import checkpoint
from scoreact.runs.checkpoint import load_checkpoint, read_run
from scoreact.support.errors import SettingError
from scoreact.support.files import read_lines
from scoreact.training.config import Config, updated, usable
from scoreact.training.optim import Diverged
from scoreact.training.trainer import Trainer
from scoreact.types import Condition, Metrics

SMALL: dict[str, Any] = {
    "iterations": 6, "batch_size": 32, "steps": 4, "solver": "euler_maruyama", "kl_weight": 0.5, "value_steps": 3,
    "value_first_steps": 5, "value_batch_size": 32, "reference_batches": 2, "heldout_samples": 32, "minibatch_size": 64,
    "evaluate_every": 2, "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip


def model(seed: int = 0) -> ResidualModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResidualModel(mixture(2, 3, 0), 2, width=16)


def train(out: Path | None = None, *, tuned: ResidualModel | None = None, **settings: Any) -> Result:
    run = {k: settings.pop(k) for k in ("resume", "on_event", "judge") if k in settings}
    reward = settings.pop("reward", linear_reward(2, 0))
    inputs = 2 if settings.get("value") == "residual" else 4
    return finetune(
        tuned or model(),
        reward,
        [""],
        value_network=lambda: VectorValue(inputs, 16),
        out=out,
        **run,
        **usable(Config(), {**SMALL, **settings}),
    )


def weights(result: Result) -> Tensor:
    parameters = list(result.policy.model.parameters())  # type: ignore[attr-defined]
    return torch.cat([p.detach().flatten() for p in parameters])


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the clock's, and without the note that says what the critic costs in seconds."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "decoding included" not in line.get("text", "")]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


RULES = [
    {"algorithm": "ctrl"},
    {"algorithm": "ctrl", "gradient_at": "next", "exploration": "gaussian"},
    {"algorithm": "ctrl_pathwise", "value_loss": "soft", "value_replay": 3, "reuse_reference": 2, "grid": "random"},
    {"algorithm": "ctrl_trpo", "value": "residual"},
    {"algorithm": "ctrl_trpo", "reuse_reference": 1},
]


@pytest.mark.parametrize("rule", RULES)
def test_same_seed_same_weights(rule: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first = train(**rule)
    torch.manual_seed(2)  # nobody's business
    again, other = train(**rule), train(seed=1, **rule)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize(("reused", "drawn"), [(0, 6), (1, 5), (2, 4), (9, 4)])
@pytest.mark.parametrize("rule", [{"algorithm": "ctrl_pathwise", "value_loss": "soft"}, {"algorithm": "ctrl"}])
def test_the_first_iterations_draw_nothing_where_they_reuse_the_references_paths(
    reused: int, drawn: int, rule: dict[str, Any]
) -> None:
    result = train(reuse_reference=reused, **rule)
    spent = [line["cost/reward_calls"] for line in result.history if "cost/reward_calls" in line]
    assert spent[-1] == 32 * (SMALL["reference_batches"] + drawn)


def test_an_iteration_of_the_pathwise_rule_costs_what_it_says() -> None:
    """Ten calls of either network a path and step would be too many to lose without notice."""
    settings = {"algorithm": "ctrl_pathwise", "value_loss": "soft", "gradient_at": "next", "epochs": 1, "kl_states": 0}
    history = [
        line for line in train(**settings, transitions=10, batch_size=128).history if "cost/network_calls" in line
    ]
    spent = [{name: b[name] - a[name] for name in ("cost/network_calls", "cost/value_calls")}
             for a, b in itertools.pairwise(history)]  # fmt: skip
    paths, steps, chosen = 128, SMALL["steps"], 10
    # both networks along the paths, the reference at their ends and behind the value's gradient, the policy in the loss
    network = 2 * paths * steps + paths + chosen + chosen
    # the fit, a look at how good it is, the gradient
    value = SMALL["value_steps"] * SMALL["value_batch_size"] + 256 + chosen
    assert spent == [{"cost/network_calls": network, "cost/value_calls": value}] * 5


def test_reused_paths_cost_a_look_at_the_shift_only_where_others_drew_them() -> None:
    settings = {"algorithm": "ctrl_pathwise", "value_loss": "soft", "epochs": 1, "kl_states": 0, "gradient_at": "next"}

    def spent(reused: int) -> list[float]:
        history = [line for line in train(**settings, reuse_reference=reused).history if "cost/network_calls" in line]
        return [b["cost/network_calls"] - a["cost/network_calls"] for a, b in itertools.pairwise(history)]

    own, reusing = spent(0), spent(2)
    paths, few = 32 * SMALL["steps"], 4
    # the second iteration learns from the reference's paths, which the policy did not draw; the others from its own
    assert reusing[0] - (own[0] - 2 * paths) == paths + few
    assert [b - a for a, b in zip(own[1:], reusing[1:], strict=True)] == [few] * 4


def test_a_value_network_that_cannot_take_its_inputs_is_told_before_anything_is_spent() -> None:
    with pytest.raises(
        ValueError, match=r"cannot take value_inputs 'x', here of shape \(2,\).*or another value_inputs"
    ):
        train(value_inputs="x")


def test_files_and_result(tmp_path: Path) -> None:
    events: list[str] = []
    tuned = model()
    result = train(
        tmp_path / "run", tuned=tuned, on_event=lambda kind, _: events.append(kind),
        judge=lambda samples, condition: {"judge/mean": float(samples.mean())},
    )  # fmt: skip
    assert {
        "model.safetensors",
        "value.safetensors",
        "result.json",
        "config.json",
        "metrics.jsonl",
        "best",
        "checkpoints",
        "reference.safetensors",
        "report.html",
        "transfer.json",
    } == {p.name for p in (tmp_path / "run").iterdir() if p.suffix != ".png"}
    assert events[:4] == ["reference", "evaluation", "checkpoint", "iteration"]
    assert events[-1] == "finished"
    assert events.count("iteration") == 6
    assert events.count("checkpoint") == 4  # the look at the reference, and three times two iterations
    record = read_run(tmp_path / "run")
    assert record["description"] == {"made_by": "scoreact.finetune", "prompts": [""]}
    assert record["config"]["iterations"] == 6
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["final"] == result.final
    assert "judge/mean" in result.final
    assert stored["reference"].keys() == result.reference.keys()
    other = model(1)
    load_weights(other, tmp_path / "run" / "model.safetensors")
    assert torch.equal(weights(result), torch.cat([p.flatten() for p in other.parameters()]).detach())
    iterations = [line for line in lines(tmp_path / "run") if "reward/mean" in line]
    assert iterations[-1]["cost/reward_calls"] == 32 * (2 + 6)
    assert iterations[-1]["iteration"] == 6


def killed_at(out: Path, when: Callable[[str, Metrics], bool], rule: dict[str, Any], in_write: bool = False) -> None:
    """Run in a fork that kills itself, with SIGKILL, at the first event for which `when` holds."""
    child = os.fork()
    if child == 0:
        try:

            def die(kind: str, metrics: Metrics) -> None:
                if when(kind, metrics):
                    if not in_write:
                        os.kill(os.getpid(), signal.SIGKILL)
                    # the next checkpoint dies after its tensors, before its record
                    checkpoint.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

            train(out, on_event=die, **rule)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("in_write", [False, True])
def test_kill_and_resume_equals_uninterrupted(tmp_path: Path, rule: dict[str, Any], in_write: bool) -> None:
    whole = train(tmp_path / "whole", **rule)
    killed_at(tmp_path / "cut", lambda kind, m: kind == "iteration" and m["iteration"] == 3, rule, in_write)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert load_checkpoint(tmp_path / "cut" / "checkpoints")[0] == 2
    assert max(line["iteration"] for line in lines(tmp_path / "cut")) > 2  # to be dropped
    resumed = train(tmp_path / "cut", tuned=model(7), resume=True, **rule)  # other initial weights: all are loaded
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.final == resumed.final
    said = [line for line in lines(tmp_path / "cut") if line.get("guard") == "note"]
    assert ["its weights were taken from reference.safetensors" in line["text"] for line in said] == [True]
    assert lines(tmp_path / "whole") == [line for line in lines(tmp_path / "cut") if line not in said]
    for name in ("model.safetensors", "best/model.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = train(tmp_path / "run")
    again = train(tmp_path / "run", tuned=model(3), resume=True)
    assert torch.equal(weights(first), weights(again))
    assert first.final == again.final


def test_resume_refuses_other_settings_and_models(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"started with other settings: batch_size 32 -> 64; Resume|batch_size 32 -> 64"
    ):
        train(tmp_path / "run", resume=True, batch_size=64)
    with pytest.raises(ValueError, match="the stored weights do not fit this model"):
        train(tmp_path / "run", resume=True, tuned=ResidualModel(mixture(2, 3, 0), 2, width=24))
    with pytest.raises(FileExistsError, match="is not empty; give a new folder"):
        train(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is no run folder: it has no config.json"):
        train(tmp_path / "nowhere", resume=True)
    (tmp_path / "run" / "config.json").write_text('{"config": 3}')
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        train(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, c: x[:, :1], r"shape \(32, 1\)"),
        (lambda x, c: x[:, 0].sum(), r"shape \(\)"),
        (lambda x, c: torch.where(torch.arange(len(x)) == 3, torch.nan, x[:, 0]), "NaN"),
        (lambda x, c: x[:, 0] / 0, "inf"),
        (lambda x, c: None, "NoneType"),
    ],
)
def test_bad_rewards_are_told_in_a_sentence(reward: Callable[[Tensor, Condition], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(reward=reward)
    assert len(str(caught.value).split()) > 8


def test_divergence_is_told_and_the_best_weights_stay(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"over kl_limit 1e-06, at iteration 2; lower learning_rate"):
        train(tmp_path / "run", kl_limit=1e-6, learning_rate=0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_writes_a_checkpoint_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    whole = train(tmp_path / "whole", checkpoint_every=100)
    events: list[str] = []

    def interrupt(kind: str, metrics: Metrics) -> None:
        events.append(kind)
        if kind == "iteration" and metrics["iteration"] == 3:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match="stopped after iteration 3"):
        train(tmp_path / "run", on_event=interrupt, checkpoint_every=100)
    assert events[-3:] == ["iteration", "interrupted", "checkpoint"]
    assert signal.getsignal(number) == before
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[0] == 3
    resumed = train(tmp_path / "run", resume=True, checkpoint_every=100)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_second_interrupt_acts_at_once(tmp_path: Path) -> None:
    def interrupt(kind: str, metrics: Metrics) -> None:
        if kind in ("iteration", "interrupted") and metrics.get("iteration", 3) == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(tmp_path / "run", on_event=interrupt, checkpoint_every=100)
    assert str(caught.value) == ""
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[0] == 0  # that of the look at the reference


def test_overoptimisation_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training reward rising, held-out J falling beyond its noise, `patience` times in a row."""
    calls = iter(range(100))

    def worse(trainer: Trainer, of_reference: bool = False) -> Metrics:
        return {"objective/J": -float(next(calls)), "objective/J_se": 0.01, "objective/recovered": 0.0}

    rewards = iter(range(100))
    iterate = Trainer.iterate
    monkeypatch.setattr(Trainer, "evaluate", worse)
    monkeypatch.setattr(Trainer, "iterate", lambda self: {**iterate(self), "reward/mean": float(next(rewards))})
    result = train(tmp_path / "run", patience=2, evaluate_every=1)
    assert result.stopped is not None
    assert "held-out J fell 2 evaluations in a row" in result.stopped
    assert json.loads((tmp_path / "run" / "result.json").read_text())["stopped"] == result.stopped
    assert max(line["iteration"] for line in lines(tmp_path / "run")) == 3  # the first has no reward to compare with


def test_rates_rise_stay_and_fall() -> None:
    trainer = Trainer(
        model(), linear_reward(2, 0), [""], lambda: VectorValue(4, 16),
        Config(**{**SMALL, "iterations": 20, "warmup": 3, "decay_from": 0.5}),
    )  # fmt: skip
    found = []
    for trainer.iteration in range(20):
        found.append(trainer.rate())
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:11] == [1.0] * 7
    assert found[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    trainer.config = updated(trainer.config, {"rate_decay": 0.9})
    for trainer.iteration in (1, 15):
        assert trainer.rate() == pytest.approx(found[trainer.iteration] * 0.9**trainer.iteration)


def test_what_cannot_be_trained_is_refused() -> None:
    fixed = mixture(2, 3, 0)
    with pytest.raises(ValueError, match="GaussianMixture has no parameter with requires_grad"):
        finetune(fixed, linear_reward(2, 0), [""])
    with pytest.raises(
        TypeError, match=r"model is 'gaussian'; training needs .* is trained by `scoreact train NAME`\."
    ):
        finetune("gaussian", linear_reward(2, 0), [""])  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"prompts is the text 'cat'; give a list of prompts, such as \['cat'\]"):
        finetune(model(), linear_reward(2, 0), "cat")
    with pytest.raises(SettingError, match="no reward is given"):
        finetune(model())
    with pytest.raises(ValueError, match=r"unknown key 'learning_rat'; did you mean 'learning_rate'"):
        train(learning_rat=1.0)
    with pytest.raises(ValueError, match="device is 'gpu'; known: auto, cpu"):
        train(device="gpu")


def test_settings_that_would_do_nothing_with_these_parts() -> None:
    def made(network: Any = None, **settings: Any) -> Trainer:
        problem = build(width=8)
        small = Config(device="cpu", batch_size=8, heldout_samples=8)
        return Trainer(problem.model, linear_reward(2, 0), [""], network, updated(small, settings))

    for rule in ("draft", "diffusion_nft"):
        with pytest.raises(SettingError, match=f"exploration is 'gaussian', but {rule} draws no step from the SDE"):
            made(algorithm=rule, exploration="gaussian")
    made(algorithm="draft", exploration="gaussian", renoise=2)
    assert not made(algorithm="draft", exploration="gaussian", last_steps=2).algorithm.own_rows
    assert made(algorithm="draft", last_steps=2).algorithm.own_rows

    def own() -> VectorValue:
        network = VectorValue(2, 8)
        network.inputs = "x"  # type: ignore[assignment]
        return network

    with pytest.raises(
        SettingError, match="value_inputs is 'x_data_hat', but the value network sees 'x' by its own word"
    ):
        made(own, value_inputs="x_data_hat")
    made(own, value_inputs="x")
    notes = made(algorithm="ctrl_pathwise", reuse_reference=5, reference_batches=2).notes
    assert "reuse_reference is 5, and the 2 of reference_batches are all that is reused." in notes


def test_exploring_by_the_reference_asks_it_under_every_rule() -> None:
    """ddpo does not read the reference; epsilon-greedy acts by it all the same."""
    problem = build(width=8)
    config = updated(
        Config(device="cpu", batch_size=32, heldout_samples=8, steps=3, iterations=1),
        {"algorithm": "ddpo", "exploration": "epsilon_greedy", "exploration_scale": 0.5},
    )
    trainer = Trainer(problem.model, problem.reward, [""], None, config)
    assert bool(trainer.rollout().trajectory.xs.isfinite().all())


def test_a_random_model_is_caught_before_the_first_update() -> None:
    class Noisy(ResidualModel):
        def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
            return super().score(t, x, condition) + 0.1 * torch.rand_like(x)

    base: GaussianMixture = mixture(2, 3, 0)
    with pytest.raises(Diverged, match="before the first update log-ratios reach"):
        train(tuned=Noisy(base, 2, width=16))


def test_the_recipe_knows_its_optimum() -> None:
    problem = build()
    result = finetune(
        problem.model, problem.reward, problem.prompts, value_network=problem.value_network, optimum=problem.optimum,
        **{**SMALL, "iterations": 1, "reference_batches": 8, "batch_size": 256},
    )  # fmt: skip
    assert problem.optimum is not None
    exact = problem.optimum(0.5)
    assert result.reference["objective/J_star_exact"] == exact
    # the same noise before and after: the first evaluation is the reference's
    first = next(line for line in result.history if "evaluation" in line)
    gain = result.final["objective/J"] - first["objective/J"]
    assert result.final["objective/recovered"] == pytest.approx(gain / (exact - result.reference["objective/J_ref"]))


def test_weights_in_float16_are_not_trained() -> None:
    problem = build(width=8)
    problem.model.half()  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match="of the trained tensors are float16"):
        Trainer(problem.model, problem.reward, [""], None, Config(device="cpu"))


def test_a_run_does_not_go_on_with_another_schedule(tmp_path: Path) -> None:
    train(tmp_path / "run", iterations=2)
    other = model()
    other.base._schedule = replace(other.base.schedule, beta_max=12.0)
    with pytest.raises(ValueError, match=r"the run began with another schedule: alpha and sigma .* were .* and are .*"):
        train(tmp_path / "run", tuned=other, iterations=3, resume=True)
    assert train(tmp_path / "run", iterations=3, resume=True).history[-1]["iteration"] == 3
