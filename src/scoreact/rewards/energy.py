"""An energy that is learned while a sampler is: low where the data are, high where the samples are. Minus it is a reward.

    loss = mean E(real) - mean E(samples) + gamma (mean E(real)^2 + mean E(samples)^2)

At given laws its minimiser is E = (q - p) / (2 gamma (q + p)), p the data's density and q the samples': 0 once they agree.
Source: Yoon et al. 2024 (DxMI, arXiv 2407.00626), section 4, and their published code for the penalty gamma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import Encodes, HasClasses, ScoreModel
from ..models.mlp import MLP
from ..models.value_networks import Encoder
from ..support.devices import device_of
from ..support.errors import SettingError
from ..support.own_data import OwnData, read_data
from ..types import Condition, Metrics

KINDS = {1: "vectors", 2: "series", 3: "pictures"}  # by the dimensions of a state


class RealStates:
    """Real examples as the states that a model's sampler should end with, and the prompts that they belong to."""

    def __init__(self, path: str | Path, model: ScoreModel) -> None:
        """path: everything that `read_data` takes. Raises SettingError where the data do not fit the model."""
        names = list(model.classes) if isinstance(model, HasClasses) else []
        wanted = model.prior(model.condition(names[:1] or [""]), torch.Generator(device_of(model))).shape[1:]
        kind = KINDS.get(len(wanted))
        self.data = read_data(path, kind=kind, labels=len(names) > 1)
        values = self.data.train.floats()
        self.states = model.encode(values) if isinstance(model, Encodes) else values
        if self.states.shape[1:] != wanted:
            raise SettingError(
                f"{path} holds examples of shape {tuple(values.shape[1:])}; the model's states are {tuple(wanted)}."
            )
        with torch.no_grad():
            again = model.decode(self.states[:8].to(device_of(model))).cpu()
        if again.shape != values[:8].shape or not torch.allclose(again, values[:8], atol=1e-2):
            raise SettingError(
                f"the examples of {path} are no states of the model: decoding them gives others. Give the model a method "
                "encode(samples) -> states, the inverse of decode."
            )
        self.prompts = _prompts_of(self.data, names, path) if len(names) > 1 else [(names or [""])[0]] * len(values)

    def draw(self, count: int, model: ScoreModel, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """`count` of them at random, on the generator's device."""
        index = torch.randint(len(self.states), (count,), generator=generator, device=generator.device).cpu()
        return self.states[index].to(generator.device), model.condition([self.prompts[i] for i in index.tolist()])


def _prompts_of(data: OwnData, names: Sequence[str], path: str | Path) -> list[str]:
    """The model's prompt of each example: by the class's name, or by its number where all classes are numbers."""
    order = {name: name for name in names} | {str(i): name for i, name in enumerate(names)}
    for name in data.classes:
        if name not in order:
            raise SettingError(
                f"{path} has the class {name!r}, which the model does not know; it knows {', '.join(names)} (or 0, 1, ... in "
                "this order)."
            )
    assert data.train.labels is not None
    return [order[data.classes[i]] for i in data.train.labels.tolist()]


class VectorEnergy(nn.Module):
    """(x [B, ...] flattened, t [B], condition) -> [B]; a class is seen as one number of 0 or 1 each. Zero at first."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.classes = classes if classes > 1 else 0
        self.net = MLP(inputs + self.classes, 1, 128, 2, zero_last=True)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen = x.flatten(1)
        if self.classes and condition.rows is not None:
            seen = torch.cat([seen, nn.functional.one_hot(condition.rows.to(x.device), self.classes).to(x)], dim=1)
        energy: Tensor = self.net(seen, t)[:, 0]
        return energy


def energy_network(model: ScoreModel, shape: Sequence[int]) -> nn.Module:
    """A small network (x, t, condition) -> [B] for states of this shape: convolutions for pictures, else an MLP."""
    classes = len(model.classes) if isinstance(model, HasClasses) else 1
    if len(shape) == 3:
        return Encoder(channels=shape[0], classes=classes)
    return VectorEnergy(int(torch.tensor(shape).prod()), classes)


class Energy(nn.Module):
    """E of states at the end of a path, and, for a rule that wants a value of one network, of those before it.

    Args:
        network: (x [B, *D], t [B], condition) -> [B].
        penalty: gamma.
        rate: learning rate (Adam).
        timed: whether the network is told the time of a state; otherwise every state is taken for finished.

    `calls` counts the states it was asked about.
    """

    def __init__(self, network: nn.Module, penalty: float = 1.0, rate: float = 1e-3, timed: bool = False) -> None:
        super().__init__()
        self.network, self.penalty, self.timed, self.calls = network, penalty, timed, 0
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=rate)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """E [B] of states x at times t [B]; 1 is the path's end."""
        self.calls += len(x)
        energy: Tensor = self.network(x, t if self.timed else torch.ones_like(t), condition)
        return energy.float()

    def separate(self, real: tuple[Tensor, Condition], fake: tuple[Tensor, Condition]) -> Metrics:
        """One step on the loss above, at the end of paths."""
        low, high = (self(x, x.new_ones(len(x)), condition) for x, condition in (real, fake))
        self.descend(low.mean() - high.mean() + self.penalty * (low.square().mean() + high.square().mean()))
        return {"energy/real": float(low.detach().mean()), "energy/samples": float(high.detach().mean())}

    def descend(self, loss: Tensor) -> None:
        """One step of Adam."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What must survive a resume."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "calls": self.calls}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; the optimiser's numbers may have become texts on the way."""
        self.network.load_state_dict(state["network"])
        optimizer, self.calls = state["optimizer"], state["calls"]
        self.optimizer.load_state_dict({**optimizer, "state": {int(k): v for k, v in optimizer["state"].items()}})
