"""What a diffusers scheduler stands for: a schedule, a kind of prediction, and the noise that a path begins with.

It is read once and never stepped. Every field of its configuration is read here, or says only where and how diffusers itself
steps (a run has a grid and a solver of its own), or is refused: one that is overlooked makes other pictures.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from ...dynamics import prediction as kinds
from ...dynamics.prediction import FLOW, Prediction
from ...dynamics.schedule import FromAlphasCumprod, Schedule, ShiftedFlow
from ...support.errors import ModelError

TABLE_PREDICTIONS = {"epsilon": kinds.epsilon, "v_prediction": kinds.v, "sample": kinds.x0}
TABLES = (
    "DDIM", "DDPM", "DDIMParallel", "DDPMParallel", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep",
    "DPMSolverSinglestep", "DPMSolverSDE", "UniPCMultistep", "DEISMultistep", "SASolver", "LMSDiscrete", "HeunDiscrete",
    "KDPM2Discrete", "KDPM2AncestralDiscrete",
)  # fmt: skip
FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")

READ = frozenset((
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "clip_sample", "clip_sample_range", "set_alpha_to_one", "final_sigmas_type", "use_flow_sigmas",
    "flow_shift", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    "time_shift_type",
))  # fmt: skip
STEPPING = frozenset((
    "timestep_spacing", "steps_offset", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "sigma_min", "sigma_max", "interpolation_type", "shift_terminal", "lambda_min_clipped",  # where
    "skip_prk_steps", "solver_order", "solver_type", "solver_p", "algorithm_type", "lower_order_final", "euler_at_final",
    "disable_corrector", "predict_x0", "predictor_order", "corrector_order", "tau_func", "noise_sampler_seed",
    "variance_type",  # how
    "dynamic_thresholding_ratio", "sample_max_value",  # of thresholding, which is refused
))  # fmt: skip
MUST_BE: dict[str, tuple[Any, str]] = {
    "thresholding": (False, "it divides each sample by a quantile of its own, which is no score; set it to false"),
    "stochastic_sampling": (False, "it jumps to the data and noises anew, which is no step of a flow; set it to false"),
    "invert_sigmas": (False, "its times run from data to noise; set it to false"),
    "timestep_type": ("discrete", "its network knows times by log sigma / 4, not by steps; that is not supported"),
}
LEAST_ALPHA = 1e-3  # below it an estimate of the data by epsilon is noise


def read_scheduler(scheduler: Any, tokens: int = 0) -> tuple[Schedule, Prediction]:
    """The schedule and the kind of prediction that a diffusers scheduler stands for.

    A table ends at the data, t = 1, where the scheduler's own last step does; else at its cleanest entry.

    Args:
        scheduler: of `TABLES` or `FLOWS`.
        tokens: of one sample, which Flux' shift depends on.

    Raises:
        ModelError: another scheduler, or a field of its configuration that no schedule and no score holds.
    """
    parameters = inspect.signature(type(scheduler).__init__).parameters
    own = {field: value for field, value in scheduler.config.items() if field in parameters}  # not another class', kept
    config = {**own, "_class_name": type(scheduler).__name__}
    _check_fields(scheduler, config, {field: parameters[field].default for field in own})
    if _is_flow(config):
        return ShiftedFlow(_shift(config, tokens)), FLOW
    kind = TABLE_PREDICTIONS[config.get("prediction_type", "epsilon")]
    clips = bool(config.get("clip_sample"))
    table = scheduler.alphas_cumprod.double()
    t_min = 0.0
    if kind is kinds.epsilon:
        if config.get("rescale_betas_zero_snr") or not float(table[-1]) > 0:
            raise _refused(
                config, "has zero terminal SNR with prediction_type 'epsilon'",
                "noise in which no data are left says nothing of them; take the scheduler that the network was trained "
                "with (rescale_betas_zero_snr false, or prediction_type 'v_prediction')",
            )  # fmt: skip
        if not clips:
            t_min = int((table.sqrt() < LEAST_ALPHA).sum()) / len(table)
    # a table rescaled to zero terminal SNR ends in 0, where no score exists
    table = torch.where(table > 0, table, table[table > 0].min() / 2)
    schedule = FromAlphasCumprod(table.tolist(), t_min, to_data=_ends_at_data(scheduler, config))
    return schedule, _clipped(kind, float(config["clip_sample_range"])) if clips else kind


def starting_noise(scheduler: Any) -> float:
    """The standard deviation of the states that the scheduler begins with, as x = alpha x_data + sigma noise.

    1, or a little less: those that scale their noise by sigma / alpha begin without the share of the data.
    """
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if sigma == 1 or not hasattr(scheduler, "alphas_cumprod"):
        return 1.0
    last = float(scheduler.alphas_cumprod[-1])
    return sigma * math.sqrt(last) if last > 0 else 1.0  # sqrt(last) = 1 / sqrt(1 + (sigma / alpha)^2)


def _check_fields(scheduler: Any, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    name = config["_class_name"].removesuffix("Scheduler")
    kind = config.get("prediction_type", "epsilon")
    flow = _is_flow(config)
    if name not in (*TABLES, *FLOWS) or not (
        flow or (hasattr(scheduler, "alphas_cumprod") and kind in TABLE_PREDICTIONS)
    ):
        raise ModelError(
            f"scheduler {config['_class_name']} (prediction_type {kind!r}) has no table that is known here; load the "
            "pipeline with a DDIMScheduler, DDPMScheduler or FlowMatchEulerDiscreteScheduler made from its config."
        )
    if flow and config.get("use_flow_sigmas", True) is not True:
        raise _refused(config, "predicts a flow with use_flow_sigmas false", "set both in its scheduler_config.json")
    if not flow and config.get("use_flow_sigmas"):
        raise _refused(config, f"has use_flow_sigmas with prediction_type {kind!r}", "a flow's is 'flow_prediction'")
    if config.get("use_dynamic_shifting") and "base_shift" not in defaults:
        raise _refused(
            config, "has use_dynamic_shifting", "only FlowMatchEulerDiscreteScheduler says by how much; take that"
        )
    if config.get("clip_sample") and name.startswith("DDIM"):
        raise _refused(
            config, "has clip_sample, which clips the estimate of the data but not the noise beside it",
            "that is no score; set clip_sample to false in its scheduler_config.json, or take a DDPMScheduler made from its "
            "config, which clips both",
        )  # fmt: skip
    if config.get("timestep_spacing") == "linspace" and name.startswith(("DDIM", "DDPM", "PNDM")):
        raise _refused(
            config, "has timestep_spacing 'linspace'",
            "it then steps to other times than those at which it asks the network next; take 'leading' or 'trailing'",
        )  # fmt: skip
    for field, (wanted, why) in MUST_BE.items():
        if field in defaults and config[field] != wanted:
            raise _refused(config, f"has {field} {config[field]!r}", why)
    known = READ | STEPPING | set(MUST_BE)
    for field, default in defaults.items():
        if field not in known and config[field] != default:
            raise _refused(
                config, f"has {field} {config[field]!r}",
                f"what that does to the pictures is not known here; take its default, {default!r}, or another scheduler",
            )  # fmt: skip


def _refused(config: Mapping[str, Any], what: str, why: str) -> ModelError:
    return ModelError(f"scheduler {config['_class_name']} {what}: {why}.")


def _is_flow(config: Mapping[str, Any]) -> bool:
    name = str(config.get("_class_name", ""))
    return name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def _ends_at_data(scheduler: Any, config: Mapping[str, Any]) -> bool:
    """Whether the last step goes to sigma = 0, or to the table's cleanest entry."""
    if "final_sigmas_type" in config:
        return bool(config["final_sigmas_type"] == "zero")
    if config["_class_name"].startswith(("DEIS", "SASolver")):
        return False
    return float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1.0


def _clipped(kind: Prediction, most: float) -> Prediction:
    """With an estimate of the data within [-most, most]; its gradient is 0 where it was outside."""

    def to_data(schedule: Schedule, t: torch.Tensor, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return kind.to_data(schedule, t, x, value).clamp(-most, most)

    return dataclasses.replace(kind, to_data=to_data)


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """Of the sigmas; with dynamic shifting exp(mu) or mu, mu linear in the number of tokens (diffusers' calculate_shift)."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("flow_shift") or config.get("shift") or 1.0)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
