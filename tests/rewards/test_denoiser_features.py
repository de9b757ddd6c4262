"""A pretrained model's own features of noised samples: what they are, their gradient, and refusals of another model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.network import NetworkModel
from scoreact.models.residual_mlp import ResidualMLP
from scoreact.models.weights import reference_digest_of
from scoreact.rewards.sample_features import Features, open_described, open_features
from scoreact.support.errors import RewardError


def a_model(seed: int = 0, network: torch.nn.Module | None = None) -> NetworkModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = network or ResidualMLP(dim=3, classes=2, width=16)
        for p in network.parameters():  # its last layers begin at 0
            p.data += 0.1 * torch.randn_like(p)
    return NetworkModel(network, RectifiedFlow(), prediction.velocity, (3,), ["one", "two"], low=-2, high=2)


def seen_by(model: NetworkModel, times: list[float]) -> Features:
    found = open_features("denoiser", (3,), {"times": times, "model": reference_digest_of(model)})
    found.take_model(model)
    return found


PROMPTS = ["one", "two", "two", "two"]


def test_they_are_the_networks_of_the_encoded_and_noised_sample() -> None:
    model, x = a_model(), torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    found = seen_by(model, [0.2, 0.7])(x, PROMPTS)
    generator, parts = torch.Generator().manual_seed(0), []
    for time in (0.2, 0.7):  # of the rectified flow: time z + (1 - time) e
        state = time * (4 * x - 2) + (1 - time) * torch.randn(3, generator=generator)
        label = torch.tensor([0, 1, 1, 1])
        parts.append(model.network.with_features(state, torch.full((4,), time), label)[1])  # type: ignore[operator]
    torch.testing.assert_close(found, torch.cat(parts, 1))
    assert not torch.allclose(found, seen_by(model, [0.2, 0.7])(x, PROMPTS[::-1]))  # the prompt is read


def test_a_sample_has_the_same_in_every_batch_and_a_gradient() -> None:
    features = seen_by(a_model(), [0.5])
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = features(x, PROMPTS)
    torch.testing.assert_close(features(x[2:3], PROMPTS[2:3]), found[2:3])
    (slope,) = torch.autograd.grad(found.sum(), x)
    step = 1e-2 * torch.eye(3)[0]
    measured = (features(x.detach() + step, PROMPTS) - features(x.detach() - step, PROMPTS)).sum(1) / 2e-2
    torch.testing.assert_close(slope[:, 0], measured, rtol=1e-2, atol=1e-2)


def test_training_does_not_move_them_and_a_stored_one_wants_the_same_model() -> None:
    model, x = a_model(), torch.rand(4, 3)
    features = seen_by(model, [0.5])
    before, untrained = features(x, PROMPTS), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert torch.equal(features(x, PROMPTS), before)
    again = open_described(features.described(), "reward.json")
    with pytest.raises(RewardError, match="and has no model here"):
        again(x, PROMPTS)
    with pytest.raises(RewardError, match="by another pretrained model than this NetworkModel"):
        again.take_model(model)
    again.take_model(untrained)
    assert torch.equal(again(x, PROMPTS), before)


def test_what_has_none_is_refused_in_a_sentence() -> None:
    model = a_model()
    with pytest.raises(RewardError, match="of samples with their prompts"):
        seen_by(model, [0.5])(torch.rand(4, 3))
    with pytest.raises(RewardError, match=r"time 1\.5 is none of the model's"):
        seen_by(model, [1.5])
    with pytest.raises(RewardError, match="times is empty"):
        seen_by(model, [])
    with pytest.raises(RewardError, match="has no `with_features`"):
        seen_by(a_model(network=torch.nn.Linear(3, 3)), [0.5])
    mixture: Any = GaussianMixture(RectifiedFlow(), torch.ones(1), torch.zeros(1, 3), torch.eye(3)[None])
    with pytest.raises(RewardError, match="GaussianMixture shows no features of its own"):
        seen_by(mixture, [0.5])


def test_of_a_pipeline_they_are_its_denoisers_without_the_adapter() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from tiny_pipelines import make, move, spelling_tokenizer

    from scoreact.models.pipelines.opening import pipeline_model

    model: Any = pipeline_model(make("sd", spelling_tokenizer()), lora_rank=2)
    x = torch.rand(2, 3, 16, 16).requires_grad_()
    features = open_features("denoiser", (3, 16, 16), {"times": [0.5], "model": reference_digest_of(model)})
    features.take_model(model)
    found = features(x, ["a cat", "a dog"])
    move(model)
    torch.testing.assert_close(features(x, ["a cat", "a dog"]), found)
    assert found.shape == (2, 32)
    assert bool(torch.autograd.grad(found.sum(), x)[0].any())
