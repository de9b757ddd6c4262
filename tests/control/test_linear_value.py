"""Values linear in a model's features: closed forms they must reach, paths left out, what is counted, refusals, resumes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.control.linear_value import FOLDS, LinearHead, RidgeFit
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.trajectory import Trajectory
from scoreact.control.transitions import Paths
from scoreact.control.value import KNOTS, ValueNetwork
from scoreact.control.value_fit import Sample
from scoreact.dynamics import prediction
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import VP, RectifiedFlow
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.network import NetworkModel
from scoreact.models.unet import UNet
from scoreact.runs.session import Event
from scoreact.runs.source import load_value
from scoreact.support.files import read_tensors, write_tensors
from scoreact.training.assembly import build_critic, build_value
from scoreact.training.config import Config, updated, usable
from scoreact.types import Condition, Metrics

BETA = 0.5
SLOPE = torch.tensor([0.8, -0.6])
VARIANCE = float(SLOPE.square().sum())


class Normal(GaussianMixture):
    """Standard normal data, whose features are the state: then V of a linear reward is linear in them, gate and all."""

    def __init__(self, mean: Tensor | None = None, variance: float = 1.0) -> None:
        where = torch.zeros(2) if mean is None else mean
        super().__init__(VP(t_max=0.999), torch.ones(1), where[None], variance * torch.eye(2)[None])

    def keep_features(self) -> None:
        self.asked = True

    def features(self, t: Tensor, x: Tensor, condition: Condition) -> tuple[Tensor, int]:
        return x, 0


def fitted(
    loss: str,
    policy: Policy,
    paths: int,
    generator: torch.Generator,
    outcome: Any = lambda x: x @ SLOPE,
    batches: int = 3,
) -> RidgeFit:
    """On the policy's own paths."""
    sde = SDE(policy.schedule, noise_level(1.0))
    fit = RidgeFit(
        ValueNetwork(LinearHead(sde.schedule), sde, policy, log_sigmoid=beta_of(loss)), BETA, loss, replay=99
    )
    for _ in range(batches):
        path = rollout(policy, sde, ddim, uniform(sde.schedule, 400), Condition([""] * paths), generator)
        fit.add(sample(fit.value, path, outcome(path.xs[-1])))
    fit.fit(generator)
    return fit


def beta_of(loss: str) -> float | None:
    return BETA if loss == "log_probability" else None


def sample(value: ValueNetwork, path: Trajectory, rewards: Tensor) -> Sample:
    paths = Paths(path, rewards)
    keep = paths.acting
    t, x, condition = paths.states(keep)
    later = BETA * (path.controls * path.noise + path.controls.square() / 2).flatten(2).sum(2)
    later = later.flip(0).cumsum(0).flip(0)[keep].flatten()
    return Sample(t, value.inputs_at(t, x, condition), rewards.repeat(len(keep)) - later, condition, later)


def places(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Times, states that are likely then, and alpha."""
    t = torch.linspace(0.1, 0.95, 64)
    return t, torch.randn(64, 2, generator=generator), Normal().schedule.alpha(t)


def test_the_mean_return_of_normal_data(generator: torch.Generator) -> None:
    """E[a x_1 | x_t] = alpha a x_t, and its gradient."""
    base = Normal()
    fit = fitted("martingale", Policy(base, base), 400, generator)
    t, x, alpha = places(generator)
    value, gradient = fit.value.gradient(t, x, Condition([""] * 64))
    assert torch.allclose(value, alpha * (x @ SLOPE), atol=0.1)
    assert float((value - alpha * (x @ SLOPE)).square().mean()) < 1e-3
    assert torch.allclose(gradient, alpha[:, None] * SLOPE, atol=0.06)


def test_a_slope_that_is_not_the_gates(generator: torch.Generator) -> None:
    """Data of variance 9: E[a x_1 | x_t] = 9 alpha / (9 alpha^2 + sigma^2) a x_t, which alpha alone cannot follow."""
    base = Normal(variance=9.0)
    fit = fitted("martingale", Policy(base, base), 400, generator)
    t, x, alpha = places(generator)
    exact = 9 * alpha / (9 * alpha**2 + 1 - alpha**2)
    _, gradient = fit.value.gradient(t, x, Condition([""] * 64))
    found = gradient @ SLOPE / VARIANCE
    constant = float((exact * alpha).sum() / alpha.square().sum())  # the best multiple of alpha
    assert float((found - exact).square().mean()) < 0.5 * float((constant * alpha - exact).square().mean())


@pytest.mark.parametrize("tilted", [False, True])
def test_the_optimal_value_whatever_policy_drew_the_paths(tilted: bool, generator: torch.Generator) -> None:
    """V* = alpha a x + (1 - alpha^2) |a|^2 / (2 beta), from the reference's paths and from the optimum's, all return alike."""
    base = Normal()
    policy = Policy(Normal(SLOPE / BETA) if tilted else base, base)
    fit = fitted("soft", policy, 400, generator)
    t, x, alpha = places(generator)
    x = x + tilted * alpha[:, None] * SLOPE / BETA  # where that policy goes
    value, gradient = fit.value.gradient(t, x, Condition([""] * 64))
    exact = alpha * (x @ SLOPE) + (1 - alpha**2) * VARIANCE / (2 * BETA)
    assert float((value - exact).square().mean()) < 0.015  # of 1: 400 steps draw 0.9 of the variance
    assert torch.allclose(gradient, alpha[:, None] * SLOPE, atol=0.12)
    first = torch.cat([s.target[: s.paths] for s in fit.memory])
    assert float(first.std()) < 0.15 if tilted else float(first.std()) > 0.8


@pytest.mark.parametrize("moved", [0.0, 0.5])
def test_a_log_probability_whose_logit_is_normal(moved: float, generator: torch.Generator) -> None:
    """V = beta log E sigmoid(l), l = a x_1 + b: normal given the state, so by quadrature; whatever policy drew the paths."""
    base = Normal()

    def outcome(x: Tensor) -> Tensor:
        return BETA * nn.functional.logsigmoid(2 * (x @ SLOPE) - 1)

    fit = fitted("log_probability", Policy(Normal(moved * SLOPE), base), 400, generator, outcome)
    t, x, alpha = places(generator)
    z = torch.randn(20_000, generator=generator)
    logits = 2 * (alpha * (x @ SLOPE))[:, None] - 1 + 2 * ((1 - alpha**2) * VARIANCE).sqrt()[:, None] * z
    exact = BETA * logits.sigmoid().mean(1).log()
    with torch.no_grad():
        value = fit.value(t, x, Condition([""] * 64))
    assert float((value - exact).square().mean()) < 1e-3
    assert float(exact.std()) > 0.25


def test_what_is_left_out_does_not_see_its_own_path(generator: torch.Generator) -> None:
    """Nor when the path is remembered twice, as those that `reuse_reference` learns from are."""
    base = Normal()
    fit = fitted("martingale", Policy(base, base), 40, generator, batches=1)
    fit.memory *= 2
    fit.fit(generator)
    before, [kept, _] = fit.outside, fit.memory
    target = kept.target.clone()
    target[torch.arange(len(target)) % 40 == 7] += 100
    fit.memory = [replace(kept, target=target)] * 2
    fit.fit(generator)
    moved = torch.stack(
        [(new - old).abs().reshape(-1, 40).max(0).values for new, old in zip(fit.outside, before, strict=True)]
    )
    assert torch.equal(moved[0], moved[1])
    assert float(moved[0, 7]) == 0
    same = int((moved[0] == 0).sum())  # its own fold's paths, the others all see it
    assert 40 // FOLDS // 2 < same < 2 * 40 // FOLDS


def test_a_useless_feature_is_not_believed(generator: torch.Generator) -> None:
    """Returns of nothing but noise: the error of paths left out chooses a ridge that leaves next to no gradient."""
    base = Normal()
    noise = fitted(
        "martingale", Policy(base, base), 64, generator, lambda x: torch.randn(len(x), generator=generator), 1
    )
    real = fitted("martingale", Policy(base, base), 64, generator, batches=1)
    t, x, _ = places(generator)
    none, some = (fit.value.gradient(t, x, Condition([""] * 64))[1].norm() for fit in (noise, real))
    assert float(none) < 0.35 * float(some)
    assert noise.ridge > real.ridge


# --- on a network, in a run ----------------------------------------------------------------------------------------------


def pictures() -> NetworkModel:
    torch.manual_seed(0)
    network = UNet(widths=(8, 16), classes=2)
    nn.init.normal_(network.head.weight, std=0.05)
    return NetworkModel(network, RectifiedFlow(), prediction.velocity, (1, 8, 8), ["cat", "dog"], low=-1, high=1)


def bright(images: Tensor, condition: Condition) -> Tensor:
    return 4 * images.mean((1, 2, 3)) + torch.tensor([float(name == "dog") for name in condition.prompts])


def train(out: Path | None = None, on_event: Event | None = None, **settings: Any) -> Result:
    given = dict(
        algorithm="ctrl_pathwise", value="linear", value_loss="soft", value_replay=8, iterations=4, batch_size=16, steps=5,
        reference_batches=3, minibatch_size=16, heldout_samples=8, evaluate_every=2, checkpoint_every=2, device="cpu",
    )  # fmt: skip
    config = updated(Config(), usable(Config(), {**given, **settings}))
    return finetune(
        pictures(), bright, ["cat", "dog"], config=config, out=out, resume=bool(out and out.exists()), on_event=on_event
    )


def test_the_unet_says_what_it_saw() -> None:
    network = pictures().network
    assert isinstance(network, UNet)
    x, t, label = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])
    output, features = network.with_features(x, t, label)
    assert torch.equal(output, network(x, t, label))
    assert features.shape == (3, 24)
    assert not torch.allclose(features, network.with_features(x.roll(1, 0), t, label)[1], atol=1e-3)


def test_the_features_come_with_the_score_and_a_gradient_takes_a_pass() -> None:
    model = pictures()
    policy = Policy(model)
    value = build_value(Config(value="linear"), policy, SDE(model.schedule, noise_level(1.0)), None, lambda x, c: x)
    t, x, condition = torch.full((4,), 0.5), torch.randn(4, 1, 8, 8), model.condition(["cat", "dog"] * 2)
    policy.reference_score(t, x, condition)
    features = value.inputs_at(t, x, condition)
    assert policy.network_calls == 4
    assert torch.allclose(features, policy.reference.network.with_features(x, t, condition.rows)[1])  # type: ignore[union-attr, operator, arg-type]
    value.inputs_at(t, x + 1, condition)
    assert policy.network_calls == 8
    head = value.network
    assert isinstance(head, LinearHead)
    head.begin([Sample(t, features, torch.zeros(4), condition)])
    head.weight = torch.randn(head.weight.shape)
    _, gradient = value.gradient(t, x, condition)
    assert policy.network_calls == 12
    assert value.calls == 0
    direction = torch.randn(x.shape)
    ends = [value(t, x + sign * 1e-2 * direction, condition) for sign in (1, -1)]
    assert torch.allclose((gradient * direction).flatten(1).sum(1), (ends[0] - ends[1]) / 2e-2, rtol=0.02, atol=1e-3)


def test_a_prompt_that_the_fit_never_saw_has_no_offset() -> None:
    model = pictures()
    head = LinearHead(model.schedule)
    t, features = torch.full((2,), 0.5), torch.randn(2, 24)
    head.begin([Sample(t, features, torch.zeros(2), model.condition(["cat", "cat"]))])
    assert head.weight.shape == (2 * 24 + 2 * 1 + KNOTS,)
    phi = head.basis(features, t, model.condition(["cat", "dog"]))
    assert phi[:, 48].tolist() == [1, 0]


@pytest.mark.parametrize("rule", ["ctrl_pathwise", "ctrl", "ctrl_trpo", "dpok", "q_learning"])
def test_every_rule_with_a_critic_takes_it(rule: str) -> None:
    last: Metrics = {}
    loss = "martingale" if rule == "q_learning" else "soft"
    replay = 1 if rule == "q_learning" else 8
    train(algorithm=rule, iterations=2, value_loss=loss, value_replay=replay, on_event=lambda kind, m: last.update(m))
    assert last["cost/value_calls"] == 0
    assert last["value/explained_variance"] > 0.2
    assert last["value/ridge"] > 0


@pytest.mark.slow  # as other critics are tested to do by default
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")

    def die(kind: str, metrics: Metrics) -> None:
        if kind == "iteration" and metrics["iteration"] == 3:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        train(tmp_path / "cut", on_event=die)
    resumed = train(tmp_path / "cut")
    for name, parameter in whole.policy.model.network.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(parameter, resumed.policy.model.network.state_dict()[name])  # type: ignore[attr-defined]
    assert whole.final == resumed.final


def test_a_saved_value_is_the_runs_own(tmp_path: Path) -> None:
    """Of the size that the fit gave it, for steering."""
    config = Config(value="linear", value_loss="soft")
    train(tmp_path / "run")
    model = pictures()
    policy = Policy(model)
    value, price = load_value(tmp_path / "run" / "value.safetensors", None, config, policy, bright)
    assert price == config.kl_weight
    t, x, condition = torch.full((4,), 0.5), torch.randn(4, 1, 8, 8), model.condition(["cat", "dog"] * 2)
    assert float(value(t, x, condition).std()) > 0.05
    assert not torch.equal(value(t, x, condition), value(t, x, model.condition(["cat"] * 4)))
    state = read_tensors(tmp_path / "run" / "value.safetensors")
    write_tensors(tmp_path / "other.safetensors", {**state, "network.weight": state["network.weight"][1:]})
    with pytest.raises(
        ValueError, match=r"is another network's: .* 62 weights where 24 features and 2 prompts have 63"
    ):
        load_value(tmp_path / "other.safetensors", None, config, policy, bright)


def test_models_without_features_are_told() -> None:
    base = GaussianMixture(VP(), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    sde = SDE(base.schedule, noise_level(1.0))
    with pytest.raises(ValueError, match="value is 'linear', but GaussianMixture has no features of its own"):
        build_value(Config(value="linear"), Policy(base, base), sde, None, lambda x, c: x)
    model = pictures()
    model.network = nn.Flatten()
    with pytest.raises(ValueError, match="Flatten has no `with_features`"):
        build_value(Config(value="linear"), Policy(model, model), sde, None, lambda x, c: x)


def test_the_settings_choose_the_fit() -> None:
    model = pictures()
    config = Config(value="linear", value_loss="log_probability", value_replay=7)
    policy, sde = Policy(model), SDE(model.schedule, noise_level(1.0))
    value = build_value(config, policy, sde, None, lambda x, c: x)
    fit = build_critic(config, value, policy, sde).fitter
    assert isinstance(fit, RidgeFit)
    assert fit.replay == 7
    assert value.log_sigmoid == config.kl_weight


def test_many_prompts_are_told_apart_by_their_words(generator: torch.Generator) -> None:
    """500 prompts of five words each, every word worth something: the fit has 128 columns for them, and knows new prompts."""
    draw = random.Random(0)
    words = [f"{a}{b}" for a in "bdfgklmn" for b in "aeiou"]
    worth = dict(zip(words, torch.randn(len(words), generator=generator).tolist(), strict=True))
    prompts = [" ".join(draw.sample(words, 5)) for _ in range(700)]
    base = Normal()
    sde, x = SDE(base.schedule, noise_level(1.0)), torch.randn(700, 2, generator=generator)
    fit = RidgeFit(ValueNetwork(LinearHead(sde.schedule), sde, Policy(base, base)), BETA, "martingale")
    mean = torch.tensor([sum(worth[word] for word in prompt.split()) for prompt in prompts])
    t = torch.full((700,), 0.5)
    seen, new = torch.arange(500), torch.arange(500, 700)
    condition = Condition(prompts, torch.arange(700))
    fit.add(Sample(t[seen], x[seen], (mean + x @ SLOPE)[seen], condition[seen]))
    fit.fit(generator)
    assert len(fit.head.weight) == 2 * 2 + 2 * 128 + KNOTS
    value = fit.value.of_inputs(t[new], x[new], condition[new])
    target = (mean + x @ SLOPE)[new]
    assert float((value - target).square().mean()) < 0.3 * float(target.var())
