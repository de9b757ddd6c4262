"""What a diffusers scheduler stands for: a schedule and a kind of prediction. It is read once and never stepped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...dynamics import prediction as kinds
from ...dynamics.prediction import FLOW, Prediction
from ...dynamics.schedule import FromAlphasCumprod, Schedule, ShiftedFlow
from ...support.errors import ModelError

TABLE_PREDICTIONS = {"epsilon": kinds.epsilon, "v_prediction": kinds.v, "sample": kinds.x0}


def _is_flow(config: Mapping[str, Any]) -> bool:
    name = str(config.get("_class_name", ""))
    return name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def read_scheduler(scheduler: Any, tokens: int = 0) -> tuple[Schedule, Prediction]:
    """The schedule and the kind of prediction that a diffusers scheduler stands for. tokens: of one sample (Flux' shift)."""
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    if _is_flow(config):
        return ShiftedFlow(_shift(config, tokens)), FLOW
    kind = config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod") or kind not in TABLE_PREDICTIONS:
        raise ModelError(
            f"scheduler {type(scheduler).__name__} (prediction_type {kind!r}) has no table that is known here; load the "
            "pipeline with a DDIMScheduler, DDPMScheduler or FlowMatchEulerDiscreteScheduler made from its config."
        )
    table = scheduler.alphas_cumprod.double()
    # a table rescaled to zero terminal SNR ends in 0, where no score exists
    table = torch.where(table > 0, table, table[table > 0].min() / 2)
    return FromAlphasCumprod(table.tolist()), TABLE_PREDICTIONS[kind]


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """Of the sigmas; with dynamic shifting exp(mu) or mu, mu linear in the number of tokens (diffusers' calculate_shift)."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
