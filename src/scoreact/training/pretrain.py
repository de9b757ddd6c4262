"""Pretraining: fit a network to data by denoising score matching, the step before any reward.

Knows the forward process and the regression target; does not know rewards or rollouts.
Loss: E |network(x_t, t, c) - target|^2 with t logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1) and the
target of the chosen prediction; labels dropped with probability 0.1 for classifier-free guidance (Ho & Salimans 2022);
weights averaged (Karras et al. 2022).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..dynamics import prediction as kinds
from ..dynamics.prediction import Prediction
from ..dynamics.schedule import Schedule
from ..types import Metrics, expand


def denoising_loss(
    network: nn.Module,
    schedule: Schedule,
    prediction: Prediction,
    x_data: Tensor,
    label: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the network's output at a random time. x_data [B, *D], label [B]; scalar."""
    batch = len(x_data)
    t = torch.sigmoid(torch.randn(batch, generator=generator, device=x_data.device))
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * t
    noise = torch.randn(x_data.shape, generator=generator, device=x_data.device)
    x = expand(schedule.alpha(t), x_data) * x_data + expand(schedule.sigma(t), x_data) * noise
    target = kinds.convert(kinds.epsilon, prediction, schedule, t, x, noise)
    return (network(x, t, label).float() - target).square().mean()


def pretrain(
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
    earlier on that curve. `on_step(step, metrics, averaged)` is called after every step. Raises FloatingPointError when
    the loss is not finite.
    """
    device = next(network.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    averaged = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    network.train()
    for step in range(steps if stop_after is None else min(stop_after, steps)):
        rate = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        index = torch.randint(len(images), (batch_size,), generator=generator, device=device)
        label = labels[index].clone()
        dropped = torch.rand(batch_size, generator=generator, device=device) < label_dropout
        label[dropped] = network.config["classes"]  # type: ignore[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = denoising_loss(network, schedule, prediction, images[index], label, generator)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"pretraining loss is {value} at step {step}; lower learning_rate ({learning_rate})"
            )
        optimizer.step()
        # the average follows the steps so far at first, then over `average_halflife` steps
        decay = min(0.5 ** (1 / average_halflife), (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(averaged.parameters(), network.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)
        if on_step is not None:
            on_step(
                step, {"loss": value, "gradient_norm": float(norm), "learning_rate": learning_rate * rate}, averaged
            )
    return averaged
