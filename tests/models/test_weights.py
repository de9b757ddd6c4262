"""Tuned weights go back into the user's own network; a digest tells weights apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import FromAlphasCumprod, RectifiedFlow
from scoreact.models.network import IntegerSteps, NetworkModel
from scoreact.models.weights import digest_of, reference_digest_of, write_back
from scoreact.support.errors import ModelError


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, width), nn.Linear(width, 2)
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("cache", torch.randn(2), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(torch.cat([x, t[:, None]], 1)))
        return output


def model(network: nn.Module) -> NetworkModel:
    table = (1 - torch.linspace(1e-3, 0.2, 20, dtype=torch.float64)).cumprod(0).tolist()
    return NetworkModel(IntegerSteps(network, 20), FromAlphasCumprod(table), prediction.epsilon, (2,))


@pytest.fixture
def three() -> tuple[Net, NetworkModel, NetworkModel]:
    """The user's network, the model around it, and a tuned copy with other weights everywhere."""
    torch.manual_seed(0)
    network = Net()
    original = model(network)
    tuned = copy.deepcopy(original)
    with torch.no_grad():
        for tensor in tuned.state_dict().values():
            tensor.add_(1)
    return network, original, tuned


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.parametrize("place", ["nothing", "the model", "the network", "a layer", "another network"])
def test_tuned_weights_go_where_they_are_wanted(place: str, three: tuple[Net, NetworkModel, NetworkModel]) -> None:
    network, original, tuned = three
    mine = copy.deepcopy(network)
    inner = tuned.network.network
    assert isinstance(inner, Net)
    target, count, expected = {
        "nothing": (None, 5, (network, inner)),
        "the model": (original, 5, (network, inner)),
        "the network": (network, 5, (network, inner)),
        "a layer": (network.first, 2, (network.first, inner.first)),
        "another network": (mine, 5, (mine, inner)),
    }[place]
    assert not same(*expected)  # type: ignore[arg-type]
    assert write_back(tuned, original, target) == count  # type: ignore[arg-type]
    assert same(*expected)  # type: ignore[arg-type]
    if place in ("a layer", "another network"):
        assert not same(network.second, inner.second), "what was not asked for stays"


def test_the_targets_type_stays(three: tuple[Net, NetworkModel, NetworkModel]) -> None:
    mine = Net().half()
    assert write_back(three[2], three[1], mine) == 5
    assert mine.first.weight.dtype == torch.float16
    assert torch.equal(mine.first.weight, three[2].network.network.first.weight.half())  # type: ignore[union-attr]


def test_what_does_not_fit_is_said(three: tuple[Net, NetworkModel, NetworkModel]) -> None:
    _, original, tuned = three
    wide = Net(5)
    before = digest_of(wide)
    with pytest.raises(ModelError, match=r"nearest, 'network.network', differs: first.weight is \(4, 3\) in the tuned"):
        write_back(tuned, original, wide)
    assert digest_of(wide) == before
    with pytest.raises(ModelError, match=r"second\.bias is there in the tuned model alone"):
        write_back(tuned, original, nn.ModuleDict({"first": nn.Linear(3, 4)}))
    with pytest.raises(ModelError, match="ReLU has no weights to write to"):
        write_back(tuned, original, nn.ReLU())
    pair = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(ModelError, match="Linear fits 'a' and 'b' of the tuned model alike"):
        write_back(copy.deepcopy(pair), pair, nn.Linear(2, 2))


def test_a_digest_sees_every_weight_and_nothing_else() -> None:
    torch.manual_seed(0)
    net = NetworkModel(Net(), RectifiedFlow(), prediction.velocity, (2,))
    before = digest_of(net)
    assert digest_of(copy.deepcopy(net)) == before
    assert reference_digest_of(net) == before
    net.network.cache.add_(1)  # type: ignore[operator, union-attr]
    net.requires_grad_(False).eval()
    assert digest_of(net) == before, "a cache is no weight"
    for name, tensor in net.state_dict().items():
        kept = tensor.clone()
        tensor.view(-1)[-1] += 1e-6
        assert digest_of(net) != before, name
        tensor.copy_(kept)
    assert digest_of(net) == before
    assert digest_of(net.bfloat16()) != before
