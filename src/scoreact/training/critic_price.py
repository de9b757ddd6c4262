"""Which critic a run has, what it sees and what another would cost: measured before the first update, said, not acted upon.

The paper's value asks the reward at the sample that every state is heading for; a surrogate asks it at the ends of paths alone.
Which is better depends on what the surrogate sees and on the reward's price beside the denoiser's. The first is the same
wherever a seed runs. A choice by the second would make a seed's weights depend on the machine, so the user makes it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..support.devices import device_of
from ..types import Condition, Metrics

if TYPE_CHECKING:
    from .trainer import Trainer

AT = "0.6"  # where on the way it is said what the value sees, of `evaluation.seen.SEEN_AT`


class Prices(NamedTuple):
    """Seconds a sample."""

    reward: float  # decoding included
    path: float  # the pretrained model's, all its steps


def seconds(of: Callable[[], object], device: torch.device) -> float:
    """What a call takes; what was asked of a GPU before and in it is waited for."""

    def wait() -> None:
        torch.zeros((), device=device).item()  # a copy to the host comes after all that was asked before it

    wait()
    began = time.perf_counter()
    of()
    wait()
    return time.perf_counter() - began


@torch.no_grad()
def measured(trainer: Trainer, x_end: Tensor, condition: Condition, reward: Callable[[], object]) -> Prices:
    """Of a few finished states x_end [B, *D]; reward: decodes and rewards these. Counts no network call."""
    policy, device = trainer.policy, device_of(trainer.policy.model)
    t = torch.full((len(x_end),), 0.5, device=x_end.device)
    calls = policy.network_calls
    network = seconds(lambda: policy.reference_score(t, x_end, condition), device)
    policy.network_calls = calls
    return Prices(seconds(reward, device) / len(x_end), trainer.config.steps * network / len(x_end))


def which_critic(trainer: Trainer, found: Metrics) -> str | None:
    """A sentence on the critic of a run whose value is made of the reward or of its surrogate; None of any other.

    found: the first evaluation.
    """
    c, prices = trainer.config, trainer.prices
    if trainer.algorithm.critic is None or c.value not in ("surrogate", "residual") or prices is None:
        return None
    states = c.batch_size * c.steps
    price = f"A reward takes {brief(prices.reward)} here, decoding included, and a path {brief(prices.path)}"
    asking = f"{brief(states * prices.reward)} beside {brief(c.batch_size * prices.path)} for its paths"
    if c.value == "residual":
        return (
            f"The value is made of the reward itself, which is asked at every state, at least {states:,} times an iteration: "
            f"{asking}. {price}. --value surrogate asks it at the ends of paths alone."
        )
    share = found.get(f"value/seen_{AT}", math.nan)
    asked = c.scored_samples or c.batch_size
    return (
        f"The value is made of the reward's surrogate, which sees {share:.2f} of the reward's variance at t = {AT} and asks "
        f"{asked:,} rewards an iteration. {price}: --algorithm ctrl --value residual asks the reward itself at every state, at "
        f"least {states:,} times an iteration, {asking}. That pays where the surrogate sees next to nothing and rewards are "
        "cheap."
    )


def brief(span: float) -> str:
    """Seconds to two digits."""
    if span >= 60:
        return f"{span / 60:.2g} min" if span < 6000 else f"{span / 3600:.2g} h"
    if span >= 1:
        return f"{span:.2g} s"
    return f"{1000 * span:.0f} ms" if span >= 0.0095 else f"{1000 * span:.2g} ms"
