"""`NetworkModel` around networks of one's own: integer steps, no classes, a declared range."""

from __future__ import annotations

import copy
import pickle
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact.dynamics import prediction
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import FromAlphasCumprod, RectifiedFlow, step_number
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.models.base import HasFeatures, HasNotes
from scoreact.models.network import IntegerSteps, NetworkModel
from scoreact.support.errors import ModelError

STEPS = 50
BETAS = torch.linspace(1e-3, 0.2, STEPS, dtype=torch.float64)
TABLE = (1 - BETAS).cumprod(0)
MEAN, SPREAD = 1.0, 0.5


class Epsilon(nn.Module):
    """The exact epsilon of data N(MEAN, SPREAD^2) at integer steps of TABLE: what a DDPM trained on them would be."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        self.seen.append(step)
        assert torch.equal(step.long().to(step.dtype), step)
        kept = TABLE[step.long()].float()[:, None]
        return (1 - kept).sqrt() * (x - kept.sqrt() * MEAN) / (kept * SPREAD**2 + 1 - kept) + self.weight


def ancestral(network: nn.Module, x: Tensor, noises: list[Tensor]) -> list[Tensor]:
    """Ho et al. 2020, Algorithm 2, with the posterior's variance; as a DDPM's own code would do it."""
    states = [x]
    for step in range(STEPS - 1, 0, -1):
        kept, before, beta = TABLE[step], TABLE[step - 1], BETAS[step]
        epsilon = network(x, torch.full((len(x),), step))
        x = ((x - beta / (1 - kept).sqrt() * epsilon) / (1 - beta).sqrt()).float()
        x = x + ((1 - before) / (1 - kept) * beta).sqrt().float() * noises[STEPS - 1 - step]
        states.append(x)
    return states


@pytest.mark.parametrize("rounded", [False, True])
def test_our_ddim_is_ancestral_sampling_of_the_table(rounded: bool, generator: torch.Generator) -> None:
    network = Epsilon()
    model = NetworkModel(
        IntegerSteps(network, STEPS, rounded), FromAlphasCumprod(TABLE.tolist()), prediction.epsilon, (2,)
    )
    condition = model.condition([""] * 500)
    x = model.prior(condition, generator)
    noises = [torch.randn(x.shape, generator=generator) for _ in range(STEPS - 1)]
    with torch.no_grad():
        expected = ancestral(network, x, noises)
    network.seen.clear()
    ts, sde = uniform(model.schedule, STEPS - 1), SDE(model.schedule, noise_level(1.0))
    found = [x]
    with torch.no_grad():
        for (t0, t1), noise in zip(pairwise(ts), noises, strict=True):
            rows = t0.expand(len(x)), t1.expand(len(x))
            score = lambda t, state: model.score(t, state, condition)  # noqa: E731
            found.append(ddim(sde, score, *rows, found[-1]).sample(noise))
    assert [int(step[0]) for step in network.seen] == list(range(STEPS - 1, 0, -1))
    assert network.seen[0].dtype == (torch.int64 if rounded else torch.float32)
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).abs().max()) < 1e-5
    assert abs(float(found[-1].mean()) - MEAN) < 0.05
    assert abs(float(found[-1].std()) - SPREAD) < 0.05


@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_a_step_is_an_integer_at_the_tables_times_alone(steps: int) -> None:
    knots = 1 - torch.arange(steps, 0, -1) / steps
    wanted = torch.arange(steps - 1, -1, -1)
    assert torch.equal(step_number(knots, steps), wanted.float())
    assert torch.equal(step_number(knots, steps, rounded=True), wanted)
    between = knots[:-1] + 0.4 / steps
    assert torch.allclose(step_number(between, steps), wanted[:-1] - 0.4, atol=1e-3)
    assert torch.equal(step_number(between, steps, rounded=True), wanted[:-1])
    assert torch.equal(step_number(torch.ones(1), steps), torch.zeros(1)), "there is no step after the cleanest"


class Seeing(nn.Module):
    """(x, t) or (x, t, label) -> velocity, and features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, *label: Tensor) -> Tensor:
        return self.with_features(x, t, *label)[0]

    def with_features(self, x: Tensor, t: Tensor, *label: Tensor) -> tuple[Tensor, Tensor]:
        shift = sum(k[:, None].float() for k in label) + t[:, None]
        return self.layer(x) + shift, torch.cat([x, shift], 1)


def test_without_classes_the_network_gets_no_label(generator: torch.Generator) -> None:
    network = Seeing()
    model = NetworkModel(network, RectifiedFlow(), prediction.velocity, (2,))
    condition = model.condition(["", ""])
    assert condition.rows is None
    assert condition.prompts == ["", ""]
    t, x = torch.full((2,), 0.4), model.prior(condition, generator)
    expected = prediction.convert(prediction.velocity, prediction.score, model.schedule, t, x, network(x, t))
    assert torch.equal(model.score(t, x, condition), expected)
    model.keep_features()
    model.score(t, x, condition)
    features, passes = model.features(t, x, condition)
    assert passes == 0
    assert torch.equal(features, network.with_features(x, t)[1])
    with pytest.raises(
        ModelError, match=re.escape("unknown prompt 'cat'; this model is unconditional, its only prompt is ''.")
    ):
        model.condition(["cat"])


def test_with_classes_the_label_follows_the_time(generator: torch.Generator) -> None:
    network = Seeing()
    model = NetworkModel(network, RectifiedFlow(), prediction.velocity, (2,), ["a", "b"])
    condition = model.condition(["b", "a"])
    t, x = torch.full((2,), 0.4), model.prior(condition, generator)
    value = network(x, t, torch.tensor([1, 0]))
    expected = prediction.convert(prediction.velocity, prediction.score, model.schedule, t, x, value)
    assert torch.equal(model.score(t, x, condition), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"low": 0.0}, "low is 0.0 and high is None; give both ends"),
        ({"low": 1, "high": -1}, "low must be the smaller"),
        ({"classes": []}, "classes is []; give a list of names, or None"),
        ({"classes": "cat"}, "classes is 'cat'; give a list of names"),
        ({"guidance_scale": 3.0}, "guidance_scale is 3.0, but there are no classes"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        NetworkModel(Seeing(), RectifiedFlow(), prediction.velocity, (2,), **options)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda x: {"sample": x}, "returned dict for states"),
        (lambda x: x.repeat(1, 2), "returned shape (3, 4) for states"),
    ],
)
def test_an_output_that_is_no_prediction(output: Any, said: str) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            return output(x)

    model = NetworkModel(Wrong(), RectifiedFlow(), prediction.velocity, (2,))
    with pytest.raises(ModelError, match=re.escape(said)):
        model.score(torch.full((3,), 0.5), torch.zeros(3, 2), model.condition([""] * 3))


# --- what a reward sees --------------------------------------------------------------------------------------------------


def test_nothing_is_cut_unless_a_range_is_declared() -> None:
    x = torch.tensor([[-9.0, 7.0]])
    assert torch.equal(NetworkModel(Seeing(), RectifiedFlow(), prediction.velocity, (2,)).decode(x), x)
    declared = NetworkModel(Seeing(), RectifiedFlow(), prediction.velocity, (2,), low=-1, high=3)
    assert torch.equal(declared.decode(x), torch.tensor([[0.0, 1.0]]))
    assert torch.equal(declared.decode(torch.tensor([[0.0, 2.0]])), torch.tensor([[0.25, 0.75]]))


def test_it_says_when_much_is_cut() -> None:
    model = NetworkModel(Seeing(), RectifiedFlow(), prediction.velocity, (100,), low=-1, high=1)
    assert isinstance(model, HasNotes)
    assert model.notes() == []
    inside = torch.linspace(-1.09, 1.09, 100)[None]  # a denoiser's error: 5 % of the range
    model.decode(inside)
    assert model.notes() == []
    some = inside.clone()
    some[0, 0] = -3.0
    model.decode(some)
    assert model.notes() == [], "half a percent"
    many = inside.clone()
    many[0, :4] = 4.0
    model.decode(many)
    (text,) = model.notes()
    assert text.startswith(
        "1.67 % of the decoded values lay outside the range declared as low=-1, high=1, by more than 5 %"
    )
    assert "(they reach from -3 to 4)" in text
    assert "declare the range that the data have, or leave low and high out" in text
    assert copy.deepcopy(model).notes() == [text]


def test_a_wrapped_network_shows_features_if_it_has_some() -> None:
    assert not isinstance(IntegerSteps(Epsilon(), STEPS), HasFeatures)
    wrapped = IntegerSteps(Seeing(), STEPS)
    t, x = torch.tensor([0.0, 0.5]), torch.randn(2, 2)
    for network in (wrapped, copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert isinstance(network, HasFeatures)
        assert torch.equal(network.with_features(x, t)[1], Seeing().with_features(x, torch.tensor([49.0, 24.0]))[1])
    twin = copy.deepcopy(wrapped)
    twin.network.layer.weight.data.add_(1)  # type: ignore[union-attr, operator]
    assert not torch.equal(twin.with_features(x, t)[0], wrapped.with_features(x, t)[0]), "a copy shows its own"


class Counting(nn.Module):
    """Its output tells how many states it saw at once; features are the states themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.with_features(x, t, label)[0]

    def with_features(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        row = 10 * label[:, None] + t[:, None] + self.weight * x + 1000 * len(x)
        return row, x


def test_the_network_sees_always_as_many_states() -> None:
    def model(rows: int | None) -> NetworkModel:
        return NetworkModel(Counting(), RectifiedFlow(), prediction.score, (2,), ["a", "b"], rows_per_call=rows)

    x = torch.randn(7, 2, requires_grad=True)
    t, condition = torch.linspace(0.1, 0.9, 7), model(None).condition(["a", "b", "a", "b", "b", "a", "a"])
    plain = model(None).score(t, x, condition) - 7000
    for rows in (1, 3, 7, 16):
        fixed = model(rows)
        found = fixed.score(t, x, condition)
        assert torch.allclose(found - 1000 * rows, plain, atol=1e-2)
        assert torch.equal(torch.autograd.grad(found.sum(), x)[0], torch.ones(7, 2))
        assert torch.equal(fixed.score(t[4:], x[4:], condition[torch.arange(4, 7)]), found[4:]), "in another batch"
        fixed.keep_features()
        assert torch.equal(fixed.score(t, x.detach(), condition), found)
        features, passes = fixed.features(t, x.detach(), condition)
        assert torch.equal(features, x)
        assert passes == 0
    with pytest.raises(ModelError, match="rows_per_call is 0; give at least 1, or None for any number"):
        model(0)


@pytest.mark.parametrize("lost", ["detach", "no_grad"])
def test_an_output_without_a_gradient_is_refused_where_one_is_wanted(lost: str) -> None:
    class Lost(Seeing):
        def forward(self, x: Tensor, t: Tensor, *label: Tensor) -> Tensor:
            with torch.set_grad_enabled(lost == "detach"):
                return super().forward(x, t, *label).detach()

    model = NetworkModel(Lost(), RectifiedFlow(), prediction.velocity, (2,))
    t, x, condition = torch.full((3,), 0.5), torch.randn(3, 2), model.condition([""] * 3)
    with pytest.raises(ModelError, match="the network's output carries no gradient"):
        model.score(t, x, condition)
    model.requires_grad_(False)
    assert not model.score(t, x, condition).requires_grad, "a reference that nothing asks for"
    with pytest.raises(ModelError, match="carries no gradient"):
        model.score(t, x.requires_grad_(), condition)


class AsksForTF32(nn.Module):
    """Zero, and what torch's switch for convolutions said while it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.said: list[str] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.with_features(x, t)[0]

    def with_features(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.said.append(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
        return self.weight * x, x


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has another switch")
@pytest.mark.parametrize(("bfloat16", "said"), [(False, "ieee"), (True, "tf32")])
def test_float32_on_cuda_is_no_tf32(monkeypatch: pytest.MonkeyPatch, bfloat16: bool, said: str) -> None:
    """torch makes float32 convolutions in TF32 by default: 11 bits, so that a sample's score depends on its batch."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # the switches are there without a GPU too
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    network = AsksForTF32()
    model = NetworkModel(network, RectifiedFlow(), prediction.velocity, (2,), bfloat16=bfloat16)
    t, x, condition = torch.full((3,), 0.5), torch.ones(3, 2), model.condition([""] * 3)
    try:
        model.score(t, x, condition)
        model.features(t, x, condition)
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before
    assert network.said == [said, said]
