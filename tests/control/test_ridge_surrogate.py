"""A reward's stand-in in closed form: normal equations, gradients it must have, words, refusals, whole runs and resumes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact.algorithms.adjoint_matching import accepted
from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.arena.problems import PROBLEMS
from scoreact.cli.parser import Parser
from scoreact.cli.train import train_arguments, train_source
from scoreact.control.ridge_surrogate import (
    BIAS,
    RidgeSurrogate,
    features_by_name,
    prompt_kernel,
    random_features,
    ridge_solve,
    words_of,
)
from scoreact.control.value_fit import logit_of
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.base import recipes
from scoreact.recipes.gaussian import mixture
from scoreact.runs.session import Event
from scoreact.training.config import Config
from scoreact.types import Condition

SLOPE = torch.tensor([0.8, -0.6])


def condition(size: int) -> Condition:
    return Condition([["red square", "red circle", "bag"][i % 3] for i in range(size)])


def fitted(samples: Tensor, rewards: Tensor, network: nn.Module | None = None, **options: Any) -> RidgeSurrogate:
    c = condition(len(samples))
    surrogate = RidgeSurrogate(network or random_features(samples), ["red square", "red circle", "bag"], **options)
    surrogate.add(samples, c, rewards)
    surrogate.fit()
    return surrogate


def test_the_dual_solves_the_normal_equations(generator: torch.Generator) -> None:
    """Independently: phi written out, and (Phi^T Phi + ridge I) w = Phi^T (y - mean)."""
    x = torch.randn(60, 5, generator=generator)
    rewards = (x @ torch.randn(5, generator=generator)).sin()
    surrogate = fitted(x, rewards, nn.Flatten())
    z = (x - x.mean(0)) / ((x.std(0) + 1e-4) * math.sqrt(5))
    q = surrogate.bag(condition(60))
    phi = torch.cat([z, torch.einsum("nf,nq->nfq", z, q).flatten(1), BIAS * q], dim=1).double()
    torch.testing.assert_close(phi @ phi.T, prompt_kernel(z, q, torch.zeros(60)).double(), atol=1e-5, rtol=1e-5)
    normal = phi.T @ phi + surrogate.ridge * torch.eye(phi.shape[1], dtype=torch.float64)
    w = torch.linalg.solve(normal, phi.T @ (rewards - rewards.mean()).double())
    expected = rewards.mean() + (phi @ w).float()
    torch.testing.assert_close(surrogate(x, condition(60)), expected, atol=1e-4, rtol=1e-4)


def test_solve_is_the_inverse(generator: torch.Generator) -> None:
    root = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(20, generator=generator, dtype=torch.float64)
    expected = torch.linalg.inv(root @ root.T + 0.3 * torch.eye(20, dtype=torch.float64)) @ y
    torch.testing.assert_close(ridge_solve(root @ root.T, y, 0.3), expected)


def test_a_linear_reward_is_found_with_its_gradient(generator: torch.Generator) -> None:
    x = torch.randn(600, 2, generator=generator)
    surrogate = fitted(x, x @ SLOPE)
    new = torch.randn(100, 2, generator=generator).requires_grad_(True)
    found = surrogate(new, condition(100))
    (gradient,) = torch.autograd.grad(found.sum(), new)
    torch.testing.assert_close(found, new @ SLOPE, atol=0.05, rtol=0.05)
    torch.testing.assert_close(gradient.mean(0), SLOPE, atol=0.03, rtol=0.03)


def test_a_log_probability_is_regressed_on_its_logit(generator: torch.Generator) -> None:
    x = torch.randn(600, 2, generator=generator)
    rewards = 0.5 * torch.nn.functional.logsigmoid(4 * x @ SLOPE)
    surrogate = fitted(x, rewards, log_probability=0.5)
    torch.testing.assert_close(surrogate.seen["targets"], logit_of(rewards / 0.5).clamp(-8, 8))
    assert float((surrogate(x, condition(600)) - rewards).abs().mean()) < 0.05
    assert float(surrogate(10 * x, condition(600)).max()) <= 0  # it stays one wherever it is asked


def test_prompts_have_their_own_weights_and_share_words(generator: torch.Generator) -> None:
    x = torch.randn(600, 2, generator=generator)
    sign = torch.tensor([1.0, 1.0, -1.0]).repeat(200)
    surrogate = fitted(x, sign * (x @ SLOPE))
    new = torch.randn(300, 2, generator=generator)
    torch.testing.assert_close(surrogate(new, condition(300)), sign[:300].clone() * (new @ SLOPE), atol=0.15, rtol=0.1)
    q = surrogate.bag(Condition(["red square", "Red circle", "bag", "", "green bag"]))
    torch.testing.assert_close(q.norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(float(q[0] @ q[1]), 0.5)
    assert torch.equal(q[2], q[4])  # a word that is not known says nothing
    assert words_of(["b a", "a", ""]) == {"b": 0, "a": 1, "": 2}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 200, 136), (2,), (3, 7), (4, 3, 3)])
def test_features_of_any_samples_are_the_same_for_a_seed(shape: tuple[int, ...], generator: torch.Generator) -> None:
    before = torch.get_rng_state()
    x = torch.rand(3, *shape, generator=generator)
    one, other = random_features(x), random_features(x)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one(x), other(x))
    assert one(x).ndim == 2
    assert not any(p.requires_grad for p in one.parameters())
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(one(x).sum(), x)
    assert bool(gradient.isfinite().all())


def test_only_the_newest_are_remembered_and_all_of_it_is_stored(generator: torch.Generator) -> None:
    x = torch.randn(50, 2, generator=generator)
    surrogate = fitted(x, x @ SLOPE, most=30)
    torch.testing.assert_close(surrogate.seen["targets"], (x @ SLOPE)[20:])
    other = RidgeSurrogate(random_features(x, seed=9), ["red square", "red circle", "bag"], most=30)
    other.load_state_dict(surrogate.state_dict())
    assert torch.equal(other(x, condition(50)), surrogate(x, condition(50)))
    for each in (surrogate, other):
        each.add(x[:10], condition(10), x[:10] @ SLOPE)
        each.fit()
    assert torch.equal(other(x, condition(50)), surrogate(x, condition(50)))


def test_accepted_paths_follow_the_tilted_law(generator: torch.Generator) -> None:
    """Normal rewards of variance v: the tilted mean is v / beta higher, for each prompt around its own mean."""
    rewards = 0.5 * torch.randn(60_000, generator=generator) + torch.tensor([0.0, 3.0]).repeat(30_000)
    rewards = rewards.clamp(max=torch.tensor([1.0, 4.0]).repeat(30_000))  # two standard deviations
    rows = accepted(rewards, Condition(["a", "b"] * 30_000), 0.5, generator)
    assert len(rows.unique()) == len(rows)
    for prompt in range(2):
        everything = rewards[prompt::2].double()
        weight = (everything / 0.5).softmax(0)
        kept = rewards[rows[rows % 2 == prompt]].double()
        error = float(kept.std()) / math.sqrt(len(kept))
        assert float(kept.mean()) == pytest.approx(float((weight * everything).sum()), abs=4 * error)


# --- where to ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("seen", [0, 25])
def test_the_samples_asked_are_those_of_the_largest_posterior_variance(
    seen: int, likelihood: bool, generator: torch.Generator
) -> None:
    """Independently: in the primal, one after another the row with the largest phi (Phi^T Phi + ridge I)^-1 phi."""
    x = torch.randn(40, 3, generator=generator)
    surrogate = RidgeSurrogate(nn.Flatten(), ["red square", "red circle", "bag"], likelihood=likelihood)
    c = condition(40)
    if seen:
        surrogate.add(x[:seen], c[torch.arange(seen)], x[:seen].sum(1))
        surrogate.fit()
    new, rows = x[seen:], torch.arange(seen, 40)
    found = surrogate.choose(new, c[rows], 6)
    scale = x[:seen] if seen else new
    z = ((x - scale.mean(0)) / ((scale.std(0) + 1e-4) * math.sqrt(3))).double()
    q = surrogate.bag(c).double()
    told = torch.zeros(40, 1).double() if surrogate.likelihood is None else surrogate.likelihood(z, q)[:, None]
    phi = torch.cat([z, torch.einsum("nf,nq->nfq", z, q).flatten(1), BIAS * q, told], dim=1)
    ridge = surrogate.ridge if seen else 0.1
    precision = ridge * torch.eye(phi.shape[1], dtype=torch.float64) + phi[:seen].T @ phi[:seen]
    chosen: list[int] = []
    for _ in range(6):
        variance = ((phi[seen:] @ torch.linalg.inv(precision)) * phi[seen:]).sum(1)
        variance[chosen] = -1
        chosen.append(int(variance.argmax()))
        precision = precision + torch.outer(phi[seen + chosen[-1]], phi[seen + chosen[-1]])
    assert found.tolist() == sorted(chosen)


def test_features_are_named_or_the_users_own(tmp_path: Path) -> None:
    pictures = torch.rand(5, 3, 32, 32)
    assert features_by_name("pixels", pictures)(pictures).shape == (5, 96)
    assert features_by_name("convolution", pictures)(pictures).shape == (5, 131)
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def means():\n    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())\n"
        "def maps():\n    return torch.nn.AdaptiveAvgPool2d(2)\n"
        "def narrow():\n    return torch.nn.Linear(3, 2)\n"
        "def text():\n    return 'clip'\n"
    )
    found = features_by_name(f"{file}:means", pictures)(pictures)
    torch.testing.assert_close(found[:, 0], pictures[:, 0, :16, :16].mean((1, 2)))
    for name, said in {
        "maps": r"gives shape \(5, 3, 2, 2\) for 5 samples; expected \[B, F\]",
        "narrow": r"does not take samples of shape \(5, 3, 32, 32\)",
        "text": "is a str; it has to be a torch.nn.Module",
    }.items():
        with pytest.raises(ValueError, match=said):
            features_by_name(f"{file}:{name}", pictures)
    with pytest.raises(ValueError, match="a sample has shape \\(2,\\); use convolution"):
        features_by_name("pixels", torch.rand(5, 2))
    with pytest.raises(ValueError, match="surrogate_features is 'convolutional'; known: convolution, pixels"):
        Config(algorithm="ctrl_pathwise", value="surrogate", surrogate_features="convolutional")


# --- whole runs -----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "algorithm": "adjoint_matching", "reward_gradient": "surrogate", "iterations": 6, "batch_size": 32, "steps": 4,
    "kl_weight": 0.5, "reference_batches": 3, "heldout_samples": 32, "minibatch_size": 64,
    "evaluate_every": 2, "checkpoint_every": 2, "device": "cpu", "learning_rate": 1e-2,
}  # fmt: skip

VALUE = {"algorithm": "ctrl_pathwise", "value": "surrogate", "reward_gradient": None}


def black_box(samples: Tensor, condition: Condition) -> Tensor:
    """No gradient can pass."""
    return torch.tensor((samples.detach() @ SLOPE).tolist())


def train(out: Path | None = None, seed: int = 0, on_event: Event | None = None, **settings: Any) -> Result:
    resume, reward = settings.pop("resume", False), settings.pop("reward", black_box)
    settings = {name: value for name, value in {**SMALL, **settings}.items() if value is not None}
    if settings["algorithm"] == "adjoint_matching" and "scored_samples" not in settings:
        settings = {"reuse_reference": 2, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResidualModel(mixture(2, 3, 0), 2, width=16)
    return finetune(model, reward, [""], out=out, resume=resume, on_event=on_event, **settings)


def weights(result: Result) -> Tensor:
    parameters = list(result.policy.model.parameters())  # type: ignore[attr-defined]
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("rule", [{}, {"algorithm": "draft"}, VALUE])
def test_a_rule_learns_from_the_gradient_of_a_reward_that_has_none(rule: dict[str, Any]) -> None:
    settings = {"batch_size": 128, "iterations": 15, "steps": 8, "evaluate_every": 15, "heldout_samples": 512, **rule}
    result = train(**settings)
    start = next(line for line in result.history if "evaluation" in line)
    assert result.final["objective/J"] > start["objective/J"] + 4 * start["objective/J_se"]
    assert result.final["objective/recovered"] > 0.5


def test_reward_calls_are_those_of_the_rollouts_alone() -> None:
    result = train()
    lines = [line for line in result.history if "cost/reward_calls" in line]
    assert lines[-1]["cost/reward_calls"] == 32 * (3 + 4)
    assert lines[-1]["surrogate/samples"] == 32 * (3 + 4)
    assert "surrogate/explained_variance" in next(line for line in result.history if "reference" in line)


@pytest.mark.parametrize("rule", [{}, {"algorithm": "draft"}, VALUE, {**VALUE, "algorithm": "ctrl"}])
def test_some_samples_of_a_rollout_are_asked(rule: dict[str, Any]) -> None:
    asked: list[int] = []

    def reward(samples: Tensor, condition: Condition) -> Tensor:
        asked.append(len(samples))
        return black_box(samples, condition)

    result = train(reward=reward, scored_samples=5, reuse_reference=None, **rule)
    last = [line for line in result.history if "cost/reward_calls" in line][-1]
    assert last["cost/reward_calls"] == last["surrogate/samples"] == 5 * (3 + 6)
    assert asked.count(5) == 3 + 6
    assert set(asked) == {4, 5, 32}  # the others are the held-out looks, and whether a reward is of its sample alone
    assert abs(last["surrogate/reward"] - last["reward/asked_mean"]) < 0.1  # linear: what 15 samples say is enough


@pytest.mark.parametrize(
    "more", [{}, {"scored_samples": 6}, {**VALUE, "scored_samples": 6}, {**VALUE, "value_loss": "soft"}]
)
def test_kill_and_resume_equals_uninterrupted(more: dict[str, Any], tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **more)

    def stop(kind: str, metrics: dict[str, float]) -> None:
        if kind == "iteration" and metrics["iteration"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", on_event=stop, **more)
    resumed = train(tmp_path / "cut", seed=7, resume=True, **more)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.final == resumed.final


def test_rules_without_a_gradient_of_the_reward_have_no_stand_in() -> None:
    result = train(algorithm="ctrl", reward_gradient=None, iterations=1)
    assert not any(name.startswith("surrogate/") for line in result.history for name in line)
    assert not Config(algorithm="ctrl").uses("reward_gradient")


def test_another_rule_on_the_main_job_has_the_other_properties_settings() -> None:
    plain, bright = recipes()["plain"], recipes()["bright"]
    assert plain.config.algorithm == "adjoint_matching"
    assert plain.config_for({"steps": 3}) is plain.config
    assert plain.config_for({"algorithm": "adjoint_matching"}) is plain.config
    assert plain.config_for({"algorithm": "ctrl"}) == bright.config == bright.config_for({"algorithm": "ctrl"})
    assert recipes()["gaussian"].config_for({"algorithm": "ddpo"}) == recipes()["gaussian"].config


def test_the_arena_compares_rules_under_the_other_properties_settings() -> None:
    problem = PROBLEMS["fashion-plain"]
    assert problem.base() == replace(problem, recipe="bright").base()
    assert problem.base().value_replay == 20


def test_another_reward_need_not_be_a_log_probability() -> None:
    def target(*words: str) -> str:
        parser = Parser("train", "")
        train_arguments(parser)
        return train_source(parser.parse(["plain", *words])).config.surrogate_target

    assert target() == "logit"
    assert target("--reward", "jpeg_compressibility") == "reward"
    assert target("--reward", "jpeg_compressibility", "--surrogate-target", "logit") == "logit"
    with pytest.raises(ValueError, match=r"reached .*, so it is no log-probability; use surrogate_target reward"):
        train(surrogate_target="logit")


def test_a_reward_that_a_surrogate_cannot_see_is_said_before_training() -> None:
    """Noise that only the sample's last bits decide."""

    def noise(samples: Tensor, condition: Condition) -> Tensor:
        return (samples.detach() * 1e4).sum(1).sin()

    said: list[str] = []

    def note(kind: str, metrics: dict[str, Any]) -> None:
        if kind == "guard":
            said.append(metrics["text"])

    result = train(reward=noise, iterations=2, heldout_samples=256, on_event=note)
    assert sum("of the reward's variance among samples of a prompt" in text for text in said) == 1
    first = next(line for line in result.history if "evaluation" in line)
    assert first["surrogate/seen"] < 0.05
    assert "value/seen_0.4" in first


def test_a_video_is_seen_by_its_frames_and_their_change(generator: torch.Generator) -> None:
    pictures = torch.rand(2, 3, 16, 16, generator=generator)
    network = random_features(pictures)
    still = pictures[:, :, None].expand(-1, -1, 5, -1, -1)
    found = random_features(still)(still)
    torch.testing.assert_close(found[:, :131], network(pictures))
    torch.testing.assert_close(found[:, 131:], torch.full((2, 131), 1e-3), atol=1e-4, rtol=0)
    moving = torch.rand(2, 3, 5, 16, 16, generator=generator)
    assert float(random_features(moving)(moving)[:, 131:].max()) > 0.01


def test_many_words_are_hashed(generator: torch.Generator) -> None:
    """2,000 prompts of 1,002 words: the size stays, and what a word does is still learned."""
    prompts = [f"noun{i // 2} {'red' if i % 2 else 'blue'}" for i in range(2_000)]
    surrogate = RidgeSurrogate(nn.Flatten(), prompts)
    x = torch.randn(2_000, 2, generator=generator)
    sign = torch.tensor([1.0, -1.0]).repeat(1_000)
    c, train_rows, fresh = Condition(prompts), torch.arange(1_000), torch.arange(1_000, 2_000)
    assert surrogate.bag(c[fresh]).shape == (1_000, 512)
    surrogate.add(x[train_rows], c[train_rows], (sign * (x @ SLOPE))[train_rows])
    surrogate.fit()
    guess, true = surrogate(x[fresh], c[fresh]), (sign * (x @ SLOPE))[fresh]
    assert float(torch.corrcoef(torch.stack([guess, true]))[0, 1]) > 0.9
