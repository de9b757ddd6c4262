"""A run on a device without float64, such as Apple's: iterations, evaluations, samplers, steering (`other_device`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from other_device import strict_device
from torch import Tensor, nn

import scoreact as sa
from scoreact.api.saved_run import steered
from scoreact.dynamics import prediction
from scoreact.dynamics.samplers import SAMPLERS
from scoreact.dynamics.schedule import VP
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.evaluation.evaluate import transfer_table
from scoreact.evaluation.metrics import (
    feature_statistics,
    frechet_distance,
    kid,
    mean_pairwise_distance,
    neighbours,
    vendi_score,
)
from scoreact.rewards import checked, load
from scoreact.sampling.steering import METHODS, Steering
from scoreact.support.devices import choose_device
from scoreact.training.config import Config, updated, usable

TINY = {
    "iterations": 2, "batch_size": 8, "steps": 3, "reference_batches": 1, "heldout_samples": 8, "minibatch_size": 16,
    "value_steps": 1, "value_first_steps": 1, "value_batch_size": 8, "evaluate_every": 1, "kl_states": 8, "epochs": 1,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor, *label: Tensor) -> Tensor:
        return self.with_features(x, t, *label)[0]

    def with_features(self, x: Tensor, t: Tensor, *label: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([x, t[:, None]], 1)
        return self.layer(seen), torch.cat([seen, seen.sin()], 1)


def left(x: Tensor) -> Tensor:
    return -x[:, 0]


left.differentiable = True  # type: ignore[attr-defined]


def trained(device: str = "auto", **settings: Any) -> sa.Result:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sa.NetworkModel(Net(), VP(), prediction.epsilon, (2,), ["a", "b"])
    config = updated(Config(), settings, below=usable(updated(Config(), settings), {**TINY, "device": device}))
    return sa.finetune(model, left, config=config, progress=False)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], bool]]:
    with strict_device(monkeypatch) as found:
        yield found


def test_the_device_is_as_strict_as_it_should_be(on_device: Callable[[Tensor], bool]) -> None:
    there = torch.ones(3, device="mps")
    assert choose_device("auto") == there.device == torch.device("mps")
    assert on_device(there + 1)
    assert on_device(nn.Linear(3, 2).to("mps")(there))
    assert not on_device(there.cpu().double() + torch.ones(3))
    for refused in (
        lambda: there.double(), lambda: there + torch.ones(3), lambda: there.numpy(), lambda: torch.ones(1).double().to("mps"),
        lambda: torch.rand(3, device="mps", generator=torch.Generator()), lambda: torch.linalg.eigvalsh(there[:, None] * there),
        lambda: there.new_zeros(3, dtype=torch.float64),
    ):  # fmt: skip
        with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
            refused()


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "ctrl"},
        {"algorithm": "ctrl_pathwise", "value": "linear"},
        {"algorithm": "ctrl_pathwise", "value": "surrogate", "value_loss": "soft"},
        {"algorithm": "ctrl_trpo"},
        {"algorithm": "ddpo", "exploration": "epsilon_greedy", "grid": "log_snr"},
        {"algorithm": "draft", "reward_gradient": "surrogate"},
        {"algorithm": "diffusion_nft"},
    ],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_a_run(settings: dict[str, Any], on_device: Callable[[Tensor], bool]) -> None:
    result = trained(**settings)
    assert all(on_device(p) for p in result.policy.model.parameters())
    assert len([line for line in result.history if "reward/heldout" in line]) >= 2
    reward = checked(load(left))
    assert len(transfer_table(result.policy, reward, ["a"], 4, rows=[("ode", 2)], device=torch.device("mps"))) == 1


def test_samplers_and_steering_give_what_the_cpu_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(device: str) -> list[Tensor]:
        result = trained(device, algorithm="ddpo")
        found = [result.sample(["a"], 3, solver=name, steps=4) for name in SAMPLERS]
        for method in METHODS:
            steering = Steering(
                method, result.policy, checked(load(left)), SDE(result.policy.schedule, noise_level(1.0)),
                value=lambda t, x, condition: x.sum(1), particles=3,
            )  # fmt: skip
            found.append(steered(steering, ["a", "b", "a"], result.times(result.policy, 3), 0).samples.cpu())
        return found

    expected = everything("cpu")
    with strict_device(monkeypatch):
        found = everything("auto")
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, atol=1e-4)


def test_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))

    def everything(real: Tensor, made: Tensor) -> list[float]:
        apart = neighbours(real, made, 3)
        return [
            frechet_distance(*feature_statistics(real), *feature_statistics(made)), kid(real, made, 4)[0],
            mean_pairwise_distance(made), vendi_score(made), apart.precision, apart.recall, apart.density, apart.coverage,
        ]  # fmt: skip

    expected = everything(*features)
    with strict_device(monkeypatch):
        found = everything(*features.to("mps"))
    assert found == pytest.approx(expected, rel=1e-5)
