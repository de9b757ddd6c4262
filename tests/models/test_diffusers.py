"""Diffusers pipelines as models, on tiny ones with random weights: against diffusers' own pipelines, schedulers and loaders."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import inspect
import json
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.cli import main as cli
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.dynamics import girsanov
from scoreact.dynamics.schedule import RectifiedFlow, ShiftedFlow
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim, step_of
from scoreact.models.base import ScoreModel
from scoreact.models.pipelines import opening
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.models.pipelines.scheduler import read_scheduler
from scoreact.recipes import pipeline as pipeline_recipe
from scoreact.training.config import Config
from scoreact.training.state import restore, state_of
from scoreact.training.trainer import Trainer
from scoreact.types import expand

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_pipelines import (  # noqa: E402
    PROMPTS,
    SIDE,
    SIZES,
    inputs,
    light,
    make,
    move,
    ours,
    spelling_tokenizer,
    theirs,
)

FAMILIES = ["sd", "sd_v", "sdxl", "sd3", "flux", "flux_guided", "wan", "ddpm"]
FLOWS = ["sd3", "flux", "flux_guided", "wan"]


# --- tiny pipelines --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return spelling_tokenizer()


@pytest.fixture
def build(tokenizer: Any) -> Callable[..., PipelineModel]:
    """(family, options) -> a model on a fresh tiny pipeline; adapters begin at rank 4 and, with `moved`, not at zero."""

    def build(name: str, moved: bool = False, **options: Any) -> PipelineModel:
        model = pipeline_model(make(name, tokenizer), **{"lora_rank": 4, **SIZES.get(name, {}), **options})
        if moved:
            move(model)
        return model

    return build


@pytest.fixture(scope="session")
def moved(tokenizer: Any) -> Callable[[str], PipelineModel]:
    """A family's model with an adapter at work, built once: for tests that leave it as it is."""

    @functools.cache
    def moved(name: str) -> PipelineModel:
        model = pipeline_model(make(name, tokenizer), lora_rank=4, **SIZES.get(name, {}))  # type: ignore[arg-type]
        move(model)
        return model

    return moved


# --- the clock -----------------------------------------------------------------------------------------------------------


def test_shifted_flow_is_the_same_path_with_another_clock() -> None:
    plain, shifted = RectifiedFlow(), ShiftedFlow(3.0)
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(shifted.alpha(t), plain.alpha(1 - shifted.sigma(t)), atol=1e-12)
    assert torch.allclose(shifted.time_at_sigma(shifted.sigma(t)), t, atol=1e-12)
    for value, slope in ((shifted.alpha, shifted.d_alpha), (shifted.sigma, shifted.d_sigma)):
        (found,) = torch.autograd.grad(value(t).sum(), t)
        assert torch.allclose(found, slope(t), atol=1e-10)
    assert float(shifted.alpha(torch.tensor(shifted.t_min))) == pytest.approx(1e-3, rel=1e-4)
    assert ShiftedFlow(1.0).t_min == pytest.approx(RectifiedFlow().t_min)


def test_the_network_sees_the_integers_of_its_table(moved: Callable[[str], PipelineModel]) -> None:
    model = moved("sd")
    knots = torch.arange(1000)
    t = (1 - (knots.double() + 1) / 1000).float()
    assert torch.equal(model.family.timestep(t), knots.float())
    between = model.family.timestep((t[:-1] + t[1:]) / 2)
    assert torch.allclose(between, knots[:-1] + 0.5, atol=1e-3)
    table = model.pipeline.scheduler.alphas_cumprod
    assert torch.allclose(model.schedule.alpha(t) ** 2, table, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_uneven_steps_of_flows_are_the_schedulers(name: str, moved: Callable[[str], PipelineModel]) -> None:
    """SD3's shift acts twice on its smallest sigma; Flux' depends on the size of the picture."""
    model = moved(name)
    scheduler = copy.deepcopy(model.pipeline.scheduler)
    if name == "flux":  # mu of 16 tokens on the line through (256, 0.5) and (4096, 1.15)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5 + 0.65 * (16 - 256) / (4096 - 256))
    else:
        scheduler.set_timesteps(4)
    ts = model.scheduler_times(4)
    assert len(ts) == 5
    assert float(ts.diff().max() - ts.diff().min()) > (0.03 if name != "flux" else -1)
    sigmas = model.schedule.sigma(ts)
    assert float((sigmas[1:] - scheduler.sigmas[1:]).abs().max()) < 1e-6
    assert float(sigmas[0]) == pytest.approx(0.999, abs=1e-6)
    assert float((model.family.timestep(ts[1:-1]) - scheduler.timesteps[1:]).abs().max()) < 1e-3


def test_a_table_that_ends_without_signal_is_accepted() -> None:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)
    assert float(scheduler.alphas_cumprod[-1]) == 0
    schedule, _ = read_scheduler(scheduler)
    assert 0 < float(schedule.alpha(torch.tensor(0.0))) < 1e-3


def test_a_scheduler_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EDMEulerScheduler.*DDIMScheduler"):
        read_scheduler(diffusers.EDMEulerScheduler())


# --- against diffusers' own pipelines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_equals_the_pipeline(
    name: str, moved: Callable[[str], PipelineModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise, prompts, guidance, steps and decoder as theirs, with an adapter at work: the same pictures."""
    model = moved(name)
    x = model.prior(model.condition(PROMPTS), torch.Generator().manual_seed(2))
    if name == "ddpm":
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    scheduler, options = model.pipeline.scheduler, {}
    ts = model.scheduler_times(4)
    if name in FLOWS:  # theirs begins at sigma = 1; here both at 0.999
        start = float(1 - ts[0])
        if name.startswith("flux"):
            options["sigmas"] = (1 - ts[:-1]).tolist()
        else:
            monkeypatch.setattr(scheduler, "sigma_max", start)
            ts[1:] = model.scheduler_times(4)[1:]
    expected = theirs(name, model.pipeline, x, 4, **options)
    found = ours(model, x, ts)
    assert expected.std() > 0.02
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-4
    off = ours(model.reference(), x, ts)
    assert float((off - expected).abs().max()) > 1e-3  # the adapter does something


@pytest.mark.parametrize("name", FAMILIES)
def test_members_of_a_score_model(name: str, moved: Callable[[str], PipelineModel]) -> None:
    model = moved(name)
    assert isinstance(model, ScoreModel)
    t, x, condition = inputs(model)
    unit = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(x, unit, rtol=2e-3)  # theirs begin with unit noise; a flow here at sigma 0.999
    score = model.score(t, x, condition)
    assert score.shape == x.shape
    assert score.dtype == torch.float32
    assert score.requires_grad
    leaf = x.clone().requires_grad_(True)
    samples = model.decode(leaf)
    low, high = float(samples.detach().min()), float(samples.detach().max())
    assert samples.shape == (
        (3, 3, 5, 32, 32) if name == "wan" else (3, 3, *((8, 8) if name == "ddpm" else (SIDE, SIDE)))
    )
    assert 0 <= low < high <= 1
    (gradient,) = torch.autograd.grad(samples.mean(), leaf)
    assert float(gradient.flatten(1).norm(dim=1).min()) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_does_not_depend_on_its_batch(name: str, moved: Callable[[str], PipelineModel]) -> None:
    model = moved(name)
    t, x, condition = inputs(model)
    with torch.no_grad():
        together = model.score(t, x, condition)
        alone = torch.cat([model.score(t[i], x[i], condition[i]) for i in torch.arange(3).split(1)])
        decoded = model.decode(x)
        decoded_alone = torch.cat([model.decode(x[i : i + 1]) for i in range(3)])
    assert float((together - alone).abs().max()) < 1e-5 * float(together.abs().max())
    assert float((decoded - decoded_alone).abs().max()) < 1e-5


def test_with_fixed_rows_a_call_a_sample_has_the_same_bits_in_every_batch(build: Callable[..., PipelineModel]) -> None:
    model = build("sd", moved=True, rows_per_call=2)
    t, x, condition = inputs(model)
    with torch.no_grad():
        together = model.score(t, x, condition)
        for index in (torch.tensor([2]), torch.tensor([1, 0]), torch.tensor([0, 2, 1])):
            assert torch.equal(model.score(t[index], x[index], condition[index]), together[index])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "wan"])
def test_guidance_is_linear_between_two_prompts(name: str, build: Callable[..., PipelineModel]) -> None:
    model = build(name, moved=True, guidance_scale=4.0, negative_prompt="bad")
    t, x, condition = inputs(model)
    with torch.no_grad():
        model.guidance_scale = 1.0
        positive = model.score(t, x, condition)
        negative = model.score(t, x, model.condition(["bad"] * 3))
        model.guidance_scale = 4.0
        guided = model.score(t, x, condition)
    expected = negative + 4 * (positive - negative)
    assert float((positive - negative).abs().max()) > 1e-4
    assert float((guided - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(("name", "scale"), [("sd", 0.0), ("sd", 0.5), ("sdxl", 0.0), ("sd3", 0.7), ("wan", 0.0)])
def test_a_scale_up_to_one_guides_nothing_as_in_diffusers(
    name: str, scale: float, build: Callable[..., PipelineModel]
) -> None:
    """Turbo models are called with 0: the prompt alone then, and one call of the denoiser."""
    model = build(name, guidance_scale=scale)
    assert any("guides nothing" in note for note in model.notes()) is (scale > 0)
    t, x, condition = inputs(model)
    rows = []
    model.family.denoiser.register_forward_hook(lambda module, given, output: rows.append(len(output[0])))
    with torch.no_grad():
        found = model.score(t, x, condition)
        assert not torch.allclose(found, model.score(t, x, model.condition(["two dogs"] * 3)))
        model.guidance_scale = 1.0
        assert torch.equal(found, model.score(t, x, condition))
        assert rows == [3, 3, 3]
        if name in ("sd", "sdxl"):
            expected = theirs(name, model.pipeline, x, 3, guidance_scale=scale)
            assert float((ours(model, x, model.scheduler_times(3)) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sd", {"guidance_scale": 1.0, "negative_prompt": "ugly"}, "negative_prompt is 'ugly', but StableDiffusionPipeline at"),
        ("sd", {"guidance_scale": 0.0, "negative_prompt": "ugly"}, "at guidance_scale 0 takes none; raise guidance_scale"),
        ("ddpm", {"negative_prompt": "ugly"}, "negative_prompt is 'ugly', but a DDIMPipeline takes none; leave it out"),
        ("flux_guided", {"negative_prompt": "ugly"}, "negative_prompt is 'ugly', but a FluxPipeline takes none"),
        ("ddpm", {"guidance_scale": 5.0}, "guidance_scale is 5, but this DDIMPipeline has nothing that it would guide"),
        ("flux", {"guidance_scale": 4.0}, "guidance_scale is 4, but this FluxPipeline has nothing that it would guide"),
        ("sd", {"guidance_scale": -1.0}, "guidance_scale is -1.0; expected a number of at least 0"),
        ("sd", {"guidance_scale": float("nan")}, "guidance_scale is nan; expected a number"),
        ("sd", {"guidance_scale": 0.0, "guidance_rescale": 0.7}, "but guidance_scale 0 guides nothing"),
    ],
)  # fmt: skip
def test_guidance_without_effect_is_refused(name: str, options: dict[str, Any], said: str, build: Any) -> None:
    with pytest.raises(sa.ModelError, match=said):
        build(name, **options)


def test_flux_takes_its_guidance_as_an_input(build: Callable[..., PipelineModel]) -> None:
    for name, matters in (("flux_guided", True), ("flux", False)):
        model = build(name)
        assert model.guidance_scale == 3.5  # the pipeline's own
        t, x, condition = inputs(model)
        with torch.no_grad():
            before = model.score(t, x, condition)
            model.guidance_scale = 1.0
            assert torch.equal(before, model.score(t, x, condition)) is not matters


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_last_step(name: str, moved: Callable[[str], PipelineModel]) -> None:
    """A flow's lands on the data with sigma 0 and no noise; a table's ends at its cleanest entry."""
    model = moved(name)
    _, x, condition = inputs(model)
    sde = SDE(model.schedule, noise_level(1.0))
    t0, t1 = torch.full((3,), 0.9), torch.full((3,), model.schedule.t_max)
    with torch.no_grad():
        score = model.score(t0, x, condition)
    step = step_of(sde, ddim, score, t0, t1, x)
    assert bool(torch.isfinite(step.mean).all())
    if name == "sd3":
        assert float(step.std.max()) == 0
        assert torch.allclose(step.mean, sde.x_data_hat(t0, x, score), atol=1e-5)
    else:
        assert 0 < float(step.std.max()) < float(model.schedule.sigma(t1)[0]) + 1e-6


def test_no_scheduler_is_ever_stepped(build: Callable[..., PipelineModel]) -> None:
    model = build("sd3")
    scheduler = model.family.pipeline.scheduler
    before = scheduler.timesteps.clone(), scheduler.sigmas.clone()
    ours(model, inputs(model)[1], model.scheduler_times(3))
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    assert torch.equal(scheduler.timesteps, before[0])
    assert torch.equal(scheduler.sigmas, before[1])


def test_each_prompt_is_encoded_once(build: Callable[..., PipelineModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("sd")
    calls = []
    encode = model.family.encode
    monkeypatch.setattr(
        model.family, "encode", lambda prompts, negative: calls.append(prompts) or encode(prompts, negative)
    )
    first = model.condition(["a cat", "two dogs", "a cat"])
    again = copy.deepcopy(model).condition(["two dogs", "a bird"])
    assert calls == [["a cat", *["two dogs"] * 7], ["a bird"] * 8], "always eight together: the last call is filled up"
    assert first.rows is not None
    assert again.rows is not None
    assert first.rows.tolist() == [0, 1, 0]
    assert again.rows.tolist() == [1, 2]  # copies share the table, so conditions may travel between them


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("sd", {"guidance_rescale": 0.7}),
        ("sd_v", {"guidance_rescale": 1.0}),
        ("sdxl", {"guidance_rescale": 0.3}),
        ("sdxl", {"clip_skip": 1}),
        ("sdxl", {"original_size": (24, 40)}),
        ("sdxl", {"crops_coords_top_left": (7, 3)}),
        ("sdxl", {"target_size": (20, 12)}),
        ("sd3", {"clip_skip": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_arguments_of_the_pipelines_own_call(
    name: str, given: dict[str, Any], build: Callable[..., PipelineModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn as diffusers draws with the same argument; without it the pictures are others."""
    model = build(name, moved=True, **{k: list(v) if isinstance(v, tuple) else v for k, v in given.items()})
    x = model.prior(model.condition(PROMPTS), torch.Generator().manual_seed(2))
    ts = model.scheduler_times(2)
    if name == "sd3":
        monkeypatch.setattr(model.pipeline.scheduler, "sigma_max", float(1 - ts[0]))
        ts[1:] = model.scheduler_times(2)[1:]
    found = ours(model, x, ts)
    assert float((found - theirs(name, model.pipeline, x, 2, **given)).abs().max()) < 1e-4
    assert float((found - theirs(name, model.pipeline, x, 2)).abs().max()) > 3e-4
    assert model.family.call_options().items() >= given.items()


def test_clip_skip_of_stable_diffusion(build: Callable[..., PipelineModel]) -> None:
    """As theirs, or refused where theirs fails: diffusers 0.42 asks transformers 5 for a part that it has no more."""
    model = build("sd", clip_skip=1)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    try:
        expected = theirs("sd", model.pipeline, x, 2, clip_skip=1)
    except AttributeError:
        with pytest.raises(sa.ModelError, match="clip_skip is 1, and the pipeline's own encode_prompt fails with it"):
            model.condition(PROMPTS)
    else:
        assert float((ours(model, x, model.scheduler_times(2)) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("flux", {"clip_skip": 1}, r"clip_skip is 1, but FluxPipeline has no such argument \(it has max_sequence_length\)"),
        ("sd", {"max_sequence_length": 16}, "max_sequence_length is 16, but StableDiffusionPipeline has no such argument"),
        ("ddpm", {"guidance_rescale": 0.5}, "has no such argument .it has none of its kind"),
        ("sd3", {"original_size": [8, 8]}, "original_size is .8, 8., but StableDiffusion3Pipeline has no such argument"),
        ("sdxl", {"original_size": 512}, "original_size is 512; expected two whole numbers, height and width"),
        ("sd", {"guidance_rescale": 1.5}, "guidance_rescale is 1.5; expected a number from 0"),
        ("sd", {"guidance_rescale": 0.5, "guidance_scale": 1.0}, "but guidance_scale 1 guides nothing"),
        ("sd", {"clip_skip": "one"}, "clip_skip is 'one'; expected a whole number of at least 1"),
        ("sd", {"lora_targets": ["to_q", "to_w"]}, "lora_targets names 'to_w', but no linear layer .* Did you mean"),
        ("sd", {"lora_targets": []}, "lora_targets is empty"),
    ],
)  # fmt: skip
def test_arguments_that_a_pipeline_would_not_use_are_refused(
    name: str, given: dict[str, Any], said: str, build: Callable[..., PipelineModel]
) -> None:
    with pytest.raises(sa.ModelError, match=said):
        build(name, **given)


# --- the adapter, the reference and copies -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sd3", "wan", "ddpm"])
def test_with_the_adapter_off_it_is_the_original_bit_for_bit(
    name: str, build: Callable[..., PipelineModel], moved: Callable[[str], PipelineModel]
) -> None:
    model, original = moved(name), build(name, full=True)
    t, x, condition = inputs(model)
    original.condition(PROMPTS)
    with torch.no_grad():
        expected = original.score(t, x, condition)
        assert torch.equal(model.reference().score(t, x, condition), expected)
        assert not torch.equal(model.score(t, x, condition), expected)
        assert torch.equal(model.reference().score(t, x, condition), expected)
    assert list(model.reference().parameters()) == []


def test_parameters_are_the_adapters_alone(build: Callable[..., PipelineModel]) -> None:
    model = build("sd")
    state = model.trainable_state()
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in state.values()}
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in state)
    trained = {p for p in model.family.denoiser.parameters() if p.requires_grad}
    assert trained == set(model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    full = build("sd", full=True)
    assert set(full.parameters()) == set(full.family.denoiser.parameters())


def test_a_copy_has_its_own_adapter_on_the_same_network(build: Callable[..., PipelineModel]) -> None:
    model = build("sd", moved=True)
    t, x, condition = inputs(model)
    active = model.family.active
    frozen = copy.deepcopy(copy.deepcopy(model).requires_grad_(False))
    assert model.family.active == active  # the plain pipeline still draws with the first
    with torch.no_grad():
        before = model.score(t, x, condition)
        assert torch.equal(frozen.score(t, x, condition), before)
        move(model)
        assert torch.equal(frozen.score(t, x, condition), before)
        assert not torch.equal(model.score(t, x, condition), before)
    assert [name for name, _ in frozen.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())  # acting for another view does not thaw or freeze
    assert frozen.family is model.family
    size = sum(p.numel() for p in model.family.denoiser.parameters())
    del frozen
    gc.collect()
    assert sum(p.numel() for p in model.family.denoiser.parameters()) < size
    with torch.no_grad():
        assert bool(torch.isfinite(model.score(t, x, condition)).all())


def test_what_is_shared_moves_along(build: Callable[..., PipelineModel]) -> None:
    """float64 stands for another device here: the adapter's parameters stay the very ones inside the network."""
    model = build("sd")
    model.score(*inputs(model))
    before = set(model.parameters())
    model.double()
    assert set(model.parameters()) == before
    networks = [p for module in model.family.modules() for p in module.parameters()]
    assert before <= set(networks)
    tables = [*model.family.table.at(torch.tensor([0])).values(), *model.family.negative.values()]
    assert {p.dtype for p in [*networks, *tables]} == {torch.float64}
    assert len(tables) == 2


def test_a_pipeline_that_outlives_its_model_keeps_the_adapter(build: Callable[..., PipelineModel]) -> None:
    model = build("sd", moved=True)
    x = inputs(model)[1]
    expected = theirs("sd", model.pipeline, x, 2)
    pipeline = model.pipeline
    del model
    gc.collect()
    assert torch.equal(theirs("sd", pipeline, x, 2), expected)


def test_an_adapter_of_the_pipelines_own_belongs_to_the_reference(tokenizer: Any, tmp_path: Path) -> None:
    first = pipeline_model(make("sd", tokenizer), lora_rank=2)
    move(first)
    first.save(tmp_path)
    pipeline = make("sd", tokenizer)
    pipeline.load_lora_weights(tmp_path)
    model = pipeline_model(pipeline, lora_rank=4)
    t, x, condition = inputs(model)
    first.condition(PROMPTS)
    with torch.no_grad():
        expected = first.score(t, x, condition)
        assert torch.allclose(model.reference().score(t, x, condition), expected, atol=1e-6)
        move(model)
        assert torch.allclose(model.reference().score(t, x, condition), expected, atol=1e-6)
        assert not torch.allclose(model.score(t, x, condition), expected, atol=1e-3)
    trained = {p for p in model.family.denoiser.parameters() if p.requires_grad}
    assert trained == set(model.parameters())  # their adapter acts, frozen


def test_recomputed_activations_belong_to_the_adapter_of_the_forward_pass(build: Callable[..., PipelineModel]) -> None:
    """Gradient checkpointing runs the network again in the backward pass, when the policy's adapter is on."""
    found = {}
    for checkpointing in (False, True):
        model = build("sd", moved=True, gradient_checkpointing=checkpointing)
        t, x, condition = inputs(model)
        x.requires_grad_(True)
        loss = (
            model.score(t, x, condition).square().mean() + 3 * model.reference().score(t, x, condition).square().mean()
        )
        found[checkpointing] = torch.autograd.grad(loss, [x, *model.parameters()])
    for plain, recomputed in zip(found[False], found[True], strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6 + 1e-5 * float(plain.abs().max()))


# --- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_the_ratio_before_the_first_update_is_one_in_bfloat16(
    compute: torch.dtype, full: bool, build: Callable[..., PipelineModel]
) -> None:
    """A network in bfloat16 under float32 mathematics, asked again in other batches than the rollout's."""
    model = build("sd", dtype=torch.bfloat16, compute_dtype=compute, full=full, rows_per_call=2)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    policy, sde = Policy(model, model.reference()), SDE(model.schedule, noise_level(1.0))
    condition = model.condition(PROMPTS)
    ts = model.scheduler_times(3)
    path = rollout(policy, sde, ddim, ts, condition, torch.Generator().manual_seed(0))
    assert path.xs.dtype == path.actions.dtype == torch.float32
    for k in range(3):
        for index in (torch.tensor([2]), torch.tensor([1, 0]), torch.arange(3)):
            t0, t1, x = ts[k].expand(len(index)), ts[k + 1].expand(len(index)), path.xs[k][index]
            with torch.no_grad():
                score = policy.score(t0, x, condition[index])
            now = step_of(sde, ddim, score, t0, t1, x)
            shift = (now.mean - path.means[k][index]) / expand(now.std, x)
            assert float(girsanov.log_ratio(shift, path.noise[k][index]).abs().max()) == 0.0
    assert not model.batch_dependent


# --- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_when_asked_for(dtype: torch.dtype, build: Callable[..., PipelineModel]) -> None:
    """Natural gradients need them, and fused attention has none; a finite difference of the gradient knows them too."""
    model = build("sd", moved=True, twice_differentiable=True, dtype=dtype)
    t, x, condition = inputs(model)
    x.requires_grad_(True)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def slope(x: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(model.score(t, x, condition).square().mean(), x, create_graph=True)
        return found

    (product,) = torch.autograd.grad((slope(x) * direction).sum(), x)
    step = 1e-2 * direction
    difference = (slope(x + step) - slope(x - step)).detach() / 2e-2
    assert float((product - difference).abs().max()) < 0.02 * float(product.abs().max())


SETTINGS = {
    "iterations": 2, "batch_size": 4, "steps": 3, "solver": "ddim", "heldout_samples": 4, "reference_batches": 1,
    "minibatch_size": 8, "kl_weight": 0.1, "device": "cpu", "learning_rate": 1e-3, "value_steps": 2,
    "value_first_steps": 2, "average": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd", {"rows_per_call": 4}),
        ("sd3", {}),
        pytest.param("sd", {"full": True}, marks=pytest.mark.slow),
        pytest.param("sdxl", {}, marks=pytest.mark.slow),
        pytest.param("flux_guided", {}, marks=pytest.mark.slow),
        pytest.param("wan", {}, marks=pytest.mark.slow),
        pytest.param("ddpm", {}, marks=pytest.mark.slow),
    ],
)
def test_training_changes_the_trainable_weights_alone(
    name: str, options: dict[str, Any], build: Callable[..., PipelineModel]
) -> None:
    """By ctrl; with a fixed number of rows a call the trainer's own check of the start-up ratio is passed too."""
    model = build(name, **options)
    frozen = {
        p: p.detach().clone() for part in model.family.modules() for p in part.parameters() if not p.requires_grad
    }
    start = {name: p.clone() for name, p in model.trainable_state().items()}
    result = sa.finetune(model, light, PROMPTS[:2], config=Config(**SETTINGS))  # type: ignore[arg-type]
    assert all(torch.equal(p, before) for p, before in frozen.items())
    moved = model.trainable_state()
    assert sum(not torch.equal(moved[name], start[name]) for name in start) > len(start) / 2
    averaged = result.policy.model
    assert isinstance(averaged, PipelineModel)
    assert averaged.family is model.family
    assert result.final["policy/kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_equal(dtype: torch.dtype, build: Callable[..., PipelineModel]) -> None:
    def trainer() -> Trainer:
        return Trainer(build("sd", dtype=dtype), light, PROMPTS[:2], None, Config(**SETTINGS))  # type: ignore[arg-type]

    whole, first, second = trainer(), trainer(), trainer()
    for run in (whole, first):
        run.look_at_reference()
        run.iterate()
    state = copy.deepcopy(state_of(first))
    whole.iterate()
    restore(second, state)
    second.iteration = 1  # the checkpoint's number
    second.iterate()
    expected, found = state_of(whole), state_of(second)
    for part in ("policy", "average"):
        assert all(torch.equal(expected[part][name], found[part][name]) for name in expected[part])
    assert not all(torch.equal(expected["policy"][name], state["policy"][name]) for name in state["policy"])


@pytest.mark.slow
def test_the_example_runs(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """examples/images.py on a tiny pipeline from a folder; what it saves loads in plain diffusers."""
    make("sd", tokenizer).save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["images.py", "tiny", "1"])
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "images.py"))
    assert "iteration   1  reward/heldout" in capsys.readouterr().out
    pipeline = diffusers.DiffusionPipeline.from_pretrained("tiny")
    pipeline.load_lora_weights("brighter")
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu(name: str, build: Callable[..., PipelineModel]) -> None:
    """The same score as on the CPU, and training in bfloat16 with float32 weights."""
    model = build(name, moved=True)
    t, x, condition = inputs(model)
    with torch.no_grad():
        expected = model.score(t, x, condition)
        model.to("cuda")
        found = model.score(t.cuda(), x.cuda(), model.condition(PROMPTS)).cpu()
        assert model.decode(x.cuda()).device.type == "cuda"
    assert float((found - expected).abs().max()) < 1e-2 * float(expected.abs().max())  # TF32 convolutions
    small = build(name, dtype=torch.bfloat16, rows_per_call=4, gradient_checkpointing=True)
    settings = Config(**{**SETTINGS, "device": "cuda"})  # type: ignore[arg-type]
    result = sa.finetune(small, light, PROMPTS[:2], config=settings)
    assert result.final["policy/kl"] > 0
    assert all(p.device.type == "cuda" and p.dtype == torch.float32 for p in small.parameters())


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan"])
def test_a_saved_adapter_loads_in_plain_diffusers(name: str, tokenizer: Any, moved: Any, tmp_path: Path) -> None:
    model = moved(name)
    copy.deepcopy(model)  # another adapter that must not be saved
    model.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    x = inputs(model)[1]
    expected = theirs(name, model.pipeline, x, 2)
    plain = make(name, tokenizer)
    without = theirs(name, plain, x, 2)
    plain.load_lora_weights(tmp_path)
    assert float((theirs(name, plain, x, 2) - expected).abs().max()) < 1e-5
    assert float((without - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "how"), [("sd", "full"), ("sd", "merged"), ("ddpm", "merged")])
def test_a_saved_pipeline_loads_in_plain_diffusers(name: str, how: str, build: Any, tmp_path: Path) -> None:
    """Weights saved with peft's layers around them would load as random ones, with a logged warning only."""
    model = build(name, moved=True, full=how == "full")
    model.save(tmp_path, None if how == "full" else "pipeline")
    x = inputs(model)[1]
    if name == "ddpm":
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    expected = ours(model, x, model.scheduler_times(3))
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert not any(".base_layer." in key for key in plain.unet.state_dict())
    assert float((theirs(name, plain, x, 3) - expected).abs().max()) < 1e-4
    assert model.family.pipeline.unet is model.family.denoiser  # put back
    again = pipeline_model(str(tmp_path), lora_rank=2)
    assert float((ours(again, x, model.scheduler_times(3)) - expected).abs().max()) < 1e-4


def test_a_folder_is_opened_in_its_own_dtype(tokenizer: Any, tmp_path: Path) -> None:
    make("sd", tokenizer).to(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = pipeline_model(tmp_path, lora_rank=2)
    assert model.family.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    t, x, condition = inputs(model)
    assert model.score(t, x, condition).dtype == torch.float32
    assert pipeline_model(tmp_path, lora_rank=2, dtype=torch.float32).family.dtype == torch.float32


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_refusals_say_what_to_do(tokenizer: Any, build: Callable[..., PipelineModel], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot open pipeline.*model_index\.json"):
        pipeline_model(tmp_path)
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**make("sd", tokenizer).components)
    with pytest.raises(
        ValueError, match="StableDiffusionImg2ImgPipeline is not supported; known: StableDiffusionPipeline"
    ):
        pipeline_model(image_to_image)
    with pytest.raises(ValueError, match="17 pixels is no multiple of 2; take 16"):
        build("sd", height=17)
    with pytest.raises(ValueError, match="frames is 3, but StableDiffusionPipeline makes pictures"):
        build("sd", frames=3)
    with pytest.raises(ValueError, match="frames is 4; Wan makes 1"):
        build("wan", frames=4)
    with pytest.raises(ValueError, match="lora_rank must be at least 1, got 0; use full=True"):
        build("sd", lora_rank=0)
    with pytest.raises(ValueError, match="prompt 3 is int"):
        build("sd").condition([3])  # type: ignore[list-item]


def test_without_diffusers_the_module_imports_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("diffusers", "transformers", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("scoreact.models.pipelines.another", opening.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match=r"pip install 'scoreact\[diffusers\]'"):
        module.pipeline_model("somewhere")


# --- the command line -------------------------------------------------------------------------------------------------

REWARD = '''
def bright(images):
    """[B, 3, H, W] in [0, 1] -> [B]."""
    return 100 * images.mean((1, 2, 3))
'''
SHORT = shlex.split(
    "--iterations 2 --batch-size 8 --steps 3 --reference-batches 1 --heldout-samples 8 --minibatch-size 8 --accumulate 1 "
    "--learning-rate 0.01 --max-kl 100 --device cpu "
    "--checkpoint-every 1 --guard off --option guidance_scale=1.0"
)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline, a reward and prompts."""
    make("sd", tokenizer).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "animals.txt").write_text("cat\n\ndog\ncat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pipeline_folder_is_trained_from_the_command_line(
    folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "pipeline", "--reward", "rewards.py:bright", "--prompts", "animals.txt", "--out", "run", *SHORT]
    words[1] = str(folder / "pipeline")
    assert cli.main(words) == 0, capsys.readouterr().err
    record = json.loads((folder / "run" / "config.json").read_text())
    assert record["description"]["recipe"] == "pipeline"
    assert "2 prompts" in capsys.readouterr().out
    assert (folder / "run" / "report.html").is_file()
    # what the run left is what plain diffusers loads
    plain = make("sd", tokenizer)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = plain(["cat", "dog"], latents=x, num_inference_steps=3, output_type="np").images
    plain.load_lora_weights(str(folder / "run"))
    after = plain(["cat", "dog"], latents=x, num_inference_steps=3, output_type="np").images
    assert abs(after - before).max() > 1e-4
    assert cli.main(["resume", "run"]) == 0
    assert cli.main(["sample", "run", "--count", "2", "--steps", "3", "--out", "drawn"]) == 0
    assert list((folder / "drawn").glob("*.png"))
    steer = ["sample", "run", "--count", "1", "--steps", "3", "--prompts", "a fox", "--out", "steered", "--steer"]
    capsys.readouterr()
    assert cli.main([*steer, "value"]) == 2
    assert "is a value surrogate, made of a fit to the run's rewards that is not kept" in capsys.readouterr().err
    assert cli.main([*steer, "smc", "--particles", "2"]) == 0
    assert "steered by the reward of the estimated sample" in capsys.readouterr().out


def test_every_parameter_of_the_recipe_is_an_option() -> None:
    parameters = inspect.signature(pipeline_recipe.build).parameters
    assert {name: p.default for name, p in parameters.items()} == pipeline_recipe.OPTIONS
    own = inspect.signature(pipeline_model).parameters
    assert set(own) - set(parameters) == {"source", "vae_slicing"}, (
        "every option of a pipeline can be given as --option"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pipeline"], "has no reward of its own; give --reward"),
        (["pipeline", "--reward", "rewards.py:bright", "--prompts", "none.txt"], "there is no such file"),
        (["gaussian", "--prompts", "animals.txt"], "recipe gaussian has prompts of its own"),
        (["pipeline", "--reward", "rewards.py:bright", "--option", "dtype=int8"], "dtype is 'int8'; known: float32"),
    ],
)
def test_words_for_pipelines_that_cannot_be_used(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "./pipeline" if words[0] == "pipeline" else words[0]
    assert cli.main(["train", place, *words[1:], "--out", "run", "--iterations", "1"]) == 2
    assert said in capsys.readouterr().err
