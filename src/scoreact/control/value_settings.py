"""The settings of the value and of its fit. Not in `value_fit`: the command line reads them without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..support.settings import setting

FITS = {"fits_value": (True,)}  # used by update rules that fit a value
DESCENDS = {**FITS, "value": ("network", "residual")}  # the others are solved for, without steps


@dataclass(frozen=True)
class ValueSettings:
    """Which value an update rule with a critic fits, and how."""

    heading: ClassVar[str] = "value"

    value: Literal["network", "linear", "residual", "surrogate"] = setting(
        "network",
        "V: a network; linear in the model's features; the expected sample's reward plus a network, or by a surrogate",
        needs=FITS,
    )
    value_loss: Literal["martingale", "soft", "log_probability"] = setting(
        "martingale",
        "What V is: the policy's mean return; the optimal value; the same for rewards that are log-probabilities",
        needs=FITS,
    )
    value_inputs: Literal["x", "x_data_hat", "both"] = setting(
        "both",
        "What the network sees: the state x, the sample that the pretrained model expects (x_data_hat), or both",
        needs={**FITS, "value": ("network",)},
    )
    value_learning_rate: float = setting(
        2e-3, "Learning rate of the value network (AdamW)", 0, above=True, needs=DESCENDS
    )
    value_steps: int = setting(
        15, "Number of optimiser steps of the value network in each iteration", 0, needs=DESCENDS
    )
    value_first_steps: int = setting(
        120,
        "Number of optimiser steps of the value network before the first update, on the pretrained model's paths",
        0,
        needs=DESCENDS,
    )
    value_batch_size: int = setting(
        256, "Number of states in one optimiser step of the value network", 1, needs=DESCENDS
    )
    value_replay: int = setting(
        1, "Number of rollouts that V is fitted to; more than 1 needs value_loss soft or log_probability", 1, needs=FITS
    )
    value_weight_decay: float = setting(0.0, "Weight decay of the value network (AdamW)", 0, needs=DESCENDS)
