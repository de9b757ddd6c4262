"""Pretraining: fit a network to data by denoising score matching, the step before any reward.

Knows the forward process and the regression target; does not know rewards or rollouts.
Loss: E |network(x_t, t, c) - target|^2 with t logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1) and the
target of the chosen prediction; labels dropped with probability 0.1 for classifier-free guidance (Ho & Salimans 2022);
weights averaged (Karras et al. 2022).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics import prediction as kinds
from ..dynamics.prediction import Prediction
from ..dynamics.schedule import Schedule
from ..support.errors import Diverged
from ..types import Metrics, expand

WARM_UP = 200  # steps
Curve = Callable[[int], float]  # of steps made


def denoising_error(
    network: nn.Module,
    schedule: Schedule,
    prediction: Prediction,
    x_data: Tensor,
    label: Tensor | None,
    normal: Tensor,
    noise: Tensor,
    spread: float = 1.0,
) -> Tensor:
    """Mean squared error of the network's output at the times sigmoid(spread normal), under noise of x_data's shape.

    normal: [B]. spread: 1 for pictures; 1.8 makes the times about uniform.
    """
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.sigmoid(spread * normal)
    x = expand(schedule.alpha(t), x_data) * x_data + expand(schedule.sigma(t), x_data) * noise
    target = kinds.convert(kinds.epsilon, prediction, schedule, t, x, noise)
    output = network(x, t) if label is None else network(x, t, label)
    return (output.float() - target).square().mean()


def denoising_loss(
    network: nn.Module,
    schedule: Schedule,
    prediction: Prediction,
    x_data: Tensor,
    label: Tensor | None,
    generator: torch.Generator,
    spread: float = 1.0,
) -> Tensor:
    """Mean squared error of the network's output at random times. x_data [B, *D], label [B] or None; scalar."""
    normal = torch.randn(len(x_data), generator=generator, device=x_data.device)
    noise = torch.randn(x_data.shape, generator=generator, device=x_data.device)
    return denoising_error(network, schedule, prediction, x_data, label, normal, noise, spread)


def cosine(steps: int) -> Curve:
    """A rate that warms up and falls to 0 over `steps`."""
    return lambda step: min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def half_life(steps: int) -> Curve:
    """How much of an average a step keeps: it follows the steps so far at first, then the last ones, half within `steps`."""
    return lambda step: min(0.5 ** (1 / steps), (step + 1) / (step + 10))


def open_ended_rate(constant: int = 5000) -> Curve:
    """A rate that warms up, stays for `constant` steps and falls as 1 / sqrt(step); it knows no end, so a run can go on."""
    return lambda step: min(1.0, (step + 1) / WARM_UP) / math.sqrt(max(1.0, step / constant))


def open_ended_average(exponent: float = 6.94) -> Curve:
    """The average with weights proportional to step^exponent (Karras et al. 2024, arXiv 2312.02696): always the last tenth."""
    return lambda step: (1 - 1 / (step + 1)) ** (exponent + 1)


class Pretrainer:
    """A network at pretraining, one step after the other; its state can be saved and taken up again bit for bit.

    `averaged` is the copy to ship.

    Args:
        network: (x [B, *D], t [B], label [B]) -> [B, *D], or without label; trained in place.
        data: [N, *D], in any form that `states` makes the model's states of.
        labels: [N] integers; `network.config["classes"]` stands for "no class". None: the network gets none.
        rate, keep: of the steps made: what the learning rate is multiplied by, and the share of the average that is kept.
        states: rows of the data -> the model's states; called with the generator that draws all else.
        spread: of the times, as of `denoising_error`.
        bfloat16: autocast.
        seed: of rows, times and noise.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Tensor,
        labels: Tensor | None,
        schedule: Schedule,
        prediction: Prediction = kinds.velocity,
        *,
        rate: Curve,
        keep: Curve,
        states: Callable[[Tensor, torch.Generator], Tensor] = lambda rows, generator: rows,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        label_dropout: float = 0.1,
        spread: float = 1.0,
        bfloat16: bool = False,
        seed: int = 0,
    ) -> None:
        self.network, self.data, self.labels, self.states = network, data, labels, states
        self.schedule, self.prediction, self.rate, self.keep = schedule, prediction, rate, keep
        self.batch_size, self.learning_rate, self.label_dropout = batch_size, learning_rate, label_dropout
        self.spread, self.bfloat16 = spread, bfloat16
        self.device = next(network.parameters()).device
        self.generator = torch.Generator(device=self.device).manual_seed(seed)
        self.averaged = copy.deepcopy(network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0
        network.train()

    def advance(self) -> Metrics:
        """One step. Raises Diverged when the loss is not finite."""
        rate = self.learning_rate * self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(self.data), (self.batch_size,), generator=self.generator, device=self.device)
        label = None
        if self.labels is not None:
            label = self.labels[index].clone()
            dropped = torch.rand(self.batch_size, generator=self.generator, device=self.device) < self.label_dropout
            label[dropped] = self.network.config["classes"]  # type: ignore[index]
        x_data = self.states(self.data[index], self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = denoising_loss(
                self.network, self.schedule, self.prediction, x_data, label, self.generator, self.spread
            )
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"pretraining loss is {value} at step {self.step}; lower learning_rate ({self.learning_rate})."
            )
        self.optimizer.step()
        keep = self.keep(self.step)
        with torch.no_grad():
            for mean, weight in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(weight, 1 - keep)
        self.step += 1
        return {"loss": value, "gradient_norm": float(norm), "learning_rate": rate}

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on besides the arguments: nested dicts of tensors and numbers."""
        optimizer = self.optimizer.state_dict()["state"]
        return {
            "step": self.step, "generator": self.generator.get_state(), "network": dict(self.network.state_dict()),
            "averaged": dict(self.averaged.state_dict()), "optimizer": {str(i): dict(s) for i, s in optimizer.items()},
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same network and arguments."""
        self.step = int(state["step"])
        self.generator.set_state(state["generator"].cpu())
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        own = self.optimizer.state_dict()
        own["state"] = {int(i): dict(moments) for i, moments in state["optimizer"].items()}
        self.optimizer.load_state_dict(own)


def fit_denoiser(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    schedule: Schedule,
    prediction: Prediction = kinds.velocity,
    *,
    steps: int = 20_000,
    stop_after: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    label_dropout: float = 0.1,
    average_halflife: int = 500,
    bfloat16: bool = False,
    seed: int = 0,
    on_step: Callable[[int, Metrics, nn.Module], None] | None = None,
) -> nn.Module:
    """Train `network` in place and return the averaged copy, the one to ship.

    images [N, *D] scaled as the model's states; labels [N] integers; `network.config["classes"]` stands for "no class".
    The learning rate warms up over 200 steps and falls to 0 along a cosine over `steps`; `stop_after` ends the training
    earlier on that curve. `on_step(step, metrics, averaged)` is called after every step. Raises Diverged when the loss is not
    finite.
    """
    pretrainer = Pretrainer(
        network, images, labels, schedule, prediction, rate=cosine(steps), keep=half_life(average_halflife),
        batch_size=batch_size, learning_rate=learning_rate, label_dropout=label_dropout, bfloat16=bfloat16, seed=seed,
    )  # fmt: skip
    for step in range(steps if stop_after is None else min(stop_after, steps)):
        metrics = pretrainer.advance()
        if on_step is not None:
            on_step(step, metrics, pretrainer.averaged)
    return pretrainer.averaged
