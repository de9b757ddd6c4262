"""What rounding costs: nothing in float32, and in half precision what two different sets of weights really cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.trajectory import Trajectory
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.runs.session import Session
from scoreact.training.config import Config
from scoreact.training.rounding import rounding_kl
from scoreact.training.trainer import Trainer

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tiny_pipelines import SIZES, light, make, move_by, spelling_tokenizer

from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model

PROMPTS = ["a cat"] * 8


def model_in(dtype: torch.dtype, name: str = "sd", **options: Any) -> PipelineModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return pipeline_model(
            make(name, spelling_tokenizer()), lora_rank=2, rows_per_call=8, dtype=dtype,
            **{"guidance_scale": 1.0, "compute_dtype": dtype, **options},
        )  # fmt: skip


def path_of(model: PipelineModel) -> Trajectory:
    sde, ts = SDE(model.schedule, noise_level(1.0)), model.scheduler_times(2)
    return rollout(Policy(model), sde, ddim, ts, model.condition(PROMPTS), torch.Generator().manual_seed(0))


def rounding(model: PipelineModel, step: float) -> float:
    sde, ts = SDE(model.schedule, noise_level(1.0)), model.scheduler_times(2)
    condition = model.condition(PROMPTS)
    return rounding_kl(Policy(model), sde, ddim, ts, condition, torch.Generator().manual_seed(0), step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_it_is_what_half_precision_adds_to_the_path_kl(dtype: torch.dtype) -> None:
    """Measured directly: path KL of one small change in half precision, less that of the same change in float32."""
    half, exact = model_in(dtype), model_in(torch.float32)
    expected = rounding(half, 1e-4)
    for model in (half, exact):
        move_by(model, 1e-4)
    extra = float(path_of(half).path_kl().mean() - path_of(exact).path_kl().mean())
    assert extra > 0
    assert expected == pytest.approx(extra, rel=0.2)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux_guided", "wan", "ddpm"])
def test_weights_in_bfloat16_have_none_where_they_are_computed_with_in_float32(name: str) -> None:
    options = {"guidance_scale": 1.0 if name == "ddpm" else 5.0, **SIZES.get(name, {})}
    found = rounding(model_in(torch.bfloat16, name, **{**options, "compute_dtype": None}), 1e-4)
    half = rounding(model_in(torch.bfloat16, name, **options), 1e-4)
    assert half > 1e-6
    assert found < max(1e-7, 1e-4 * half)  # float32's own is 2e-8


def test_float32_has_none_and_the_weights_are_put_back() -> None:
    model = model_in(torch.float32)
    move_by(model, 0.1)
    before = {name: p.clone() for name, p in model.trainable_state().items()}
    policy = Policy(model)
    sde, ts = SDE(model.schedule, noise_level(1.0)), model.scheduler_times(2)
    found = rounding_kl(policy, sde, ddim, ts, model.condition(PROMPTS), torch.Generator().manual_seed(0), 1e-4)
    assert 0 < found < 1e-5
    assert policy.network_calls == 0
    assert all(torch.equal(p, before[name]) for name, p in model.trainable_state().items())


@pytest.mark.parametrize(
    ("dtype", "compute", "max_kl"),
    [
        (torch.bfloat16, torch.bfloat16, 1e-3),
        (torch.bfloat16, torch.float32, 1e-3),
        (torch.float32, torch.float32, 1e-9),
    ],
)
def test_a_run_measures_it_and_says_when_it_stops_all_learning(
    dtype: torch.dtype, compute: torch.dtype, max_kl: float
) -> None:
    config = Config(
        iterations=1, batch_size=2, steps=2, reference_batches=1, heldout_samples=2, value_first_steps=1, value_steps=1,
        value_batch_size=4, max_kl=max_kl, device="cpu",
    )  # fmt: skip
    said: list[Any] = []
    trainer = Trainer(model_in(dtype, compute_dtype=compute), light, ["a cat"], None, config)
    Session(trainer, on_event=lambda kind, line: said.append(line.get("text", ""))).run()
    refused = [text for text in said if "rounding alone costs" in str(text)]
    assert len(refused) == (compute == torch.bfloat16)
    assert ("policy/kl_rounding" in trainer.reference) == (dtype == torch.bfloat16)
