"""`check_model` finds what is wrong with a model, and says nothing of one that is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import VP, FromAlphasCumprod, RectifiedFlow
from scoreact.models.check import check_model
from scoreact.models.network import IntegerSteps, NetworkModel
from scoreact.models.weights import digest_of
from scoreact.recipes.gaussian import build
from scoreact.recipes.series import build as build_series
from scoreact.types import Condition

TABLE = (1 - torch.linspace(1e-3, 0.2, 50, dtype=torch.float64)).cumprod(0)
MEAN, SPREAD = 1.0, 0.5


class Epsilon(nn.Module):
    """The exact epsilon of data N(MEAN, SPREAD^2) at a step of TABLE, between the steps too; plus a trained change."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(2))
        self.register_buffer("log_snr", (TABLE.log() - torch.log1p(-TABLE)).float())
        self.log_snr: Tensor

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        left = step.floor().clamp(0, len(TABLE) - 2).long()
        level = self.log_snr[left] + (step - left) * (self.log_snr[left + 1] - self.log_snr[left])
        kept = torch.sigmoid(level)[:, None]
        noise = (1 - kept).sqrt() * (x - kept.sqrt() * MEAN) / (kept * SPREAD**2 + 1 - kept)
        return noise + self.change


class Embedded(Epsilon):
    """As a network with a table of steps."""

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        assert nn.functional.embedding(step, torch.zeros(len(TABLE), 1)).shape[1] == 1
        return super().forward(x, step)


def model(network: nn.Module | None = None, **changed: Any) -> NetworkModel:
    given: dict[str, Any] = {
        "network": network or IntegerSteps(Epsilon(), len(TABLE)), "schedule": FromAlphasCumprod(TABLE.tolist()),
        "prediction": prediction.epsilon, "shape": (2,),
    }  # fmt: skip
    return NetworkModel(**{**given, **changed})


def problems(found: list[str]) -> list[str]:
    return [line for line in found if line.startswith("problem: ")]


@pytest.mark.parametrize(
    "make",
    [model, lambda: model(IntegerSteps(Embedded(), len(TABLE), rounded=True)), lambda: build().model,
     lambda: build_series().model, lambda: model(classes=None, low=-3, high=5)],
    ids=["ddpm", "table of steps", "gaussian", "series", "range"],
)  # fmt: skip
def test_a_model_that_is_right_has_no_problem(make: Callable[[], Any]) -> None:
    mine = make().train()
    before, state = digest_of(mine), torch.get_rng_state()
    found = check_model(mine)
    assert problems(found) == []
    assert found[-1] == f"fine: {type(mine).__name__} can be fine-tuned."
    assert all(line.startswith(("fine: ", "note: ")) for line in found)
    assert digest_of(mine) == before
    assert mine.training
    assert torch.equal(torch.get_rng_state(), state)


def test_it_says_what_an_optional_member_would_buy() -> None:
    found = check_model(model())
    assert any(line.startswith("fine: has `classes`") for line in found)
    assert any(line.startswith("note: has no `export()`, which is optional and buys weights in your") for line in found)
    assert any("IntegerSteps has no `with_features`" in line for line in found)


class Changed(nn.Module):
    """The right model with one member replaced: what a user may get wrong."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        self.inner = model()
        self.members = members

    @property
    def schedule(self) -> Any:
        return self.members.get("schedule", self.inner.schedule)

    def prior(self, *given: Any) -> Any:
        return self.members.get("prior", self.inner.prior)(*given)

    def condition(self, *given: Any) -> Any:
        return self.members.get("condition", self.inner.condition)(*given)

    def score(self, *given: Any) -> Any:
        found = self.inner.score(*given)
        return self.members["score"](found, *given) if "score" in self.members else found

    def decode(self, *given: Any) -> Any:
        return self.members.get("decode", self.inner.decode)(*given)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.members["copy"](self) if "copy" in self.members else self.renewed()

    def renewed(self) -> Any:
        new = Changed(**self.members)
        new.load_state_dict(self.state_dict())
        return new


@dataclasses.dataclass(frozen=True)
class Wrong(VP):
    def d_alpha(self, t: Tensor) -> Tensor:
        return -super().d_alpha(t)


class Reversed(RectifiedFlow):
    def alpha(self, t: Tensor) -> Tensor:
        return 1.001 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t


def plain_tensor() -> nn.Module:
    mine = model()
    mine.table = torch.ones(3)
    return mine


def cut(score: Tensor, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
    return torch.where(t[:, None] > 0.9, torch.nan, score)


class Bare:
    """No nn.Module, with all members."""

    def __init__(self) -> None:
        self.inner = model()
        self.schedule, self.prior, self.condition = self.inner.schedule, self.inner.prior, self.inner.condition
        self.score, self.decode = self.inner.score, self.inner.decode


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no member": (lambda: nn.Linear(2, 2), "Linear has no `score`: score(t, x, condition) -> grad log"),
    "no module": (Bare, "Bare is no nn.Module"),
    "nothing to train": (lambda: model().requires_grad_(False), "no parameter has requires_grad"),
    "half": (lambda: model().half(), "parameters to train are torch.float16"),
    "left behind": (plain_tensor, "`table` is a plain tensor, which `.to(device)` leaves behind"),
    "steps not wrapped, cut": (lambda: model(Floored()), "the network's output, does not depend on t"),
    "steps not wrapped, smooth": (lambda: model(Epsilon()), "the network wants integer steps and gets t in [0, 1]"),
    "a table of steps": (lambda: model(IntegerSteps(Embedded(), 50)), "rounded=True"),
    "another kind": (lambda: model(prediction=prediction.v), "its output is of another kind"),
    "time backwards": (lambda: model(Backwards()), "its time runs the other way"),
    "0 everywhere": (lambda: model(Zero()), "output is 0 everywhere"),
    "wrong shape": (lambda: model(Doubled()), "returned shape (64, 4) for states of shape (64, 2)"),
    "schedule's ends": (lambda: Changed(schedule=VP(t_max=2.0)), "runs from t_min 0 to t_max 2"),
    "schedule's slope": (lambda: Changed(schedule=Wrong()), "d_alpha(t) is not the derivative"),
    "schedule backwards": (lambda: Changed(schedule=Reversed()), "does not fall from t_min to t_max"),
    "prior's shape": (lambda: Changed(prior=lambda c, g: torch.randn(2, generator=g)), "prior returned shape (2,)"),
    "prior's type": (lambda: Changed(prior=lambda c, g: torch.randn(len(c), 2, generator=g).double()), "float64; expected"),
    "prior's size": (lambda: Changed(prior=lambda c, g: 9 * torch.randn(len(c), 2, generator=g)), "standard deviation 9"),
    "prior's chance": (lambda: Changed(prior=lambda c, g: torch.randn(len(c), 2)), "other states for the same generator"),
    "prompts": (lambda: Changed(condition=lambda p: Condition(["?"])), "condition(['']) returned"),
    "rows": (lambda: Changed(condition=lambda p: Condition(list(p), torch.rand(len(p), 3))), "condition.rows has shape (1, 3)"),
    "unknown prompt": (lambda: listed(lambda p: Condition(list(p))), "but an unknown one is accepted"),
    "unknown prompt's error": (lambda: listed(lambda p: Condition([{"": ""}[q] for q in p])), "prompt raised KeyError"),
    "score's type": (lambda: Changed(score=lambda s, *_: s.double()), "score returned torch.float64"),
    "score's shape": (lambda: Changed(score=lambda s, *_: s[:, :1]), "score returned shape (64, 1)"),
    "score's end": (lambda: Changed(score=cut), "is NaN or inf at t = 0.9"),
    "chance": (lambda: Changed(score=lambda s, *_: s + 0.01 * torch.randn_like(s)), "score is random"),
    "batch": (lambda: Changed(score=lambda s, *_: s - s.mean(0)), "score depends on the batch"),
    "no gradient": (lambda: Changed(score=lambda s, *_: s.detach()), "score carries no gradient"),
    "x detached": (lambda: model(Detached()), "gradient of score in x is not that of its values"),
    "weights detached": (lambda: Changed(score=lambda s, t, x, c: s.detach() + 0 * x), "no trainable parameter gets"),
    "decode's shape": (lambda: Changed(decode=lambda x: x.sum()), "decode returned shape () for 8 states"),
    "decode's type": (lambda: Changed(decode=lambda x: x.byte()), "decode returned samples torch.uint8"),
    "copy shares": (lambda: Changed(copy=lambda m: m), "shares weights with the model"),
    "copy differs": (lambda: Changed(copy=lambda m: reset(m.renewed())), "has another score than the model"),
    "copy fails": (lambda: Changed(copy=lambda m: {}[0]), "copy.deepcopy(model) raised KeyError"),
}  # fmt: skip


class Floored(Epsilon):
    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return super().forward(x, step.floor())


class Backwards(Epsilon):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t * (len(TABLE) - 1))


class Zero(Epsilon):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0 * super().forward(x, t)


class Doubled(Epsilon):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).repeat(1, 2)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = IntegerSteps(Epsilon(), len(TABLE))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.inner(x.detach(), t)
        return output


def listed(condition: Any) -> nn.Module:
    mine = Changed(condition=condition)
    mine.classes = [""]  # type: ignore[assignment]
    return mine


def reset(mine: Any) -> Any:
    mine.inner.network.network.change.data.add_(1)
    return mine


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    make, said = FAULTS[fault]
    found = check_model(make())
    assert any(said in line for line in problems(found)), "\n".join(found)
    count = len(problems(found))
    assert found[-1].startswith(f"{count} problem{'s' * (count > 1)} in model ")


def test_a_layer_with_a_members_name_is_a_problem() -> None:
    mine = Changed()
    mine.reference = nn.Linear(1, 1)
    found = check_model(mine)
    if any(
        line.startswith("note: has no `reference()`") for line in found
    ):  # Python 3.12 and later do not take it for one
        return
    assert (
        "problem: `reference` is a Linear, but the contract has a method of that name; rename the submodule." in found
    )


def test_guidance_and_mode_are_put_back(tmp_path: Path) -> None:
    class Labelled(Epsilon):
        def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, step) + 0.3 * (label == 2)[:, None]

    network = nn.ModuleList([IntegerSteps(Labelled(), len(TABLE))])[0]
    mine = model(network, classes=["a", "b"], guidance_scale=7.5).train()
    found = check_model(mine, ["b"])
    assert problems(found) == []
    assert any("guidance is set to 1 for this look" in line for line in found)
    assert mine.guidance_scale == 7.5
    assert "fine: 1 known prompt accepted, an unknown one refused." in found
