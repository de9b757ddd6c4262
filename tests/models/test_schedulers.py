"""What diffusers' schedulers stand for: the pictures that plain diffusers draws with each, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.prediction import convert, score, x0
from scoreact.dynamics.samplers import SAMPLERS
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.models.pipelines.scheduler import FLOWS, MUST_BE, READ, STEPPING, TABLES, read_scheduler

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers.configuration_utils import register_to_config  # noqa: E402
from tiny_pipelines import PROMPTS, make, spelling_tokenizer, theirs  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
ONE = {"solver_order": 1}
STEPS = 5


def scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler").from_config(config)


def drawn(model: PipelineModel, x: Tensor, sampler: str, noise: float, generator: torch.Generator) -> Tensor:
    """Pictures by a sampler of ours from the unit noise x, at five of the scheduler's own times."""
    condition = model.condition(PROMPTS[: len(x)])
    sde = SDE(model.schedule, noise_level(noise))
    with torch.no_grad():
        path = SAMPLERS[sampler](
            sde, lambda t, x: model.score(t, x, condition), model.scheduler_times(STEPS), model.family.starting_noise * x,
            generator,
        )  # fmt: skip
        return model.decode(path[-1])


# --- on latents, by every scheduler whose step is also ours ------------------------------------------------------------


BETAS = torch.linspace(1e-3, 0.02, 500).tolist()
LATENT = [
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False}, "ode", 0),
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": True}, "ode", 0),
    ("DDIM", {"clip_sample": False, "timestep_spacing": "trailing"}, "ode", 0),
    ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction"}, "ode", 0),
    ("DDIM", {"clip_sample": False, "prediction_type": "sample"}, "ode", 0),
    ("DDIM", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}, "ode", 0),
    ("DDIM", {"clip_sample": False, "trained_betas": BETAS, "num_train_timesteps": len(BETAS)}, "ode", 0),
    ("DDIM", {"clip_sample": False, **ZERO}, "ode", 0),
    ("DDPM", {"clip_sample": False}, "ddim", 1),
    ("DDPM", {"clip_sample": True}, "ddim", 1),
    ("DDPM", {"clip_sample": True, "clip_sample_range": 0.5, "prediction_type": "v_prediction"}, "ddim", 1),
    ("EulerDiscrete", {"timestep_spacing": "leading"}, "ode", 0),
    ("EulerDiscrete", {"timestep_spacing": "trailing"}, "ode", 0),
    ("EulerDiscrete", {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}, "ode", 0),
    ("EulerDiscrete", ZERO, "ode", 0),
    ("EulerAncestralDiscrete", {"timestep_spacing": "leading"}, "ddim", 1),
    ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}, "ddim", 1),
    ("DPMSolverMultistep", {}, "dpm_solver_pp_2m", 0),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}, "dpm_solver_pp_2m", 0),
    ("DPMSolverMultistep", ONE, "ode", 0),
    ("DPMSolverSinglestep", ONE, "ode", 0),
    ("UniPCMultistep", {**ONE, "disable_corrector": list(range(9))}, "ode", 0),
    ("UniPCMultistep", {**ONE, "disable_corrector": list(range(9)), "final_sigmas_type": "sigma_min"}, "ode", 0),
    ("DEISMultistep", ONE, "ode", 0),
    ("HeunDiscrete", {"timestep_spacing": "leading"}, "heun", 0),
    ("HeunDiscrete", {"timestep_spacing": "leading", "clip_sample": True}, "heun", 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "sampler", "noise"), LATENT, ids=[f"{n}-{'-'.join(map(str, c))}" for n, c, _, _ in LATENT]
)
def test_the_pictures_of_each_accepted_scheduler(name: str, config: dict[str, Any], sampler: str, noise: float) -> None:
    pipelines = [make("sd", spelling_tokenizer()) for _ in range(2)]
    for pipeline in pipelines:
        pipeline.scheduler = scheduler(name, **{**SD, **config})
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seeded = torch.Generator().manual_seed(3)
        expected = theirs("sd", pipelines[1], x, STEPS, guidance_scale=1.0, generator=seeded)
    model = pipeline_model(pipelines[0], guidance_scale=1.0, lora_rank=2)
    found = drawn(model, x, sampler, noise, torch.Generator().manual_seed(3))
    assert float(expected.std()) > 0.01
    assert float((found - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("config", [{}, {"clip_sample": False}, {"beta_schedule": "squaredcos_cap_v2"}], ids=str)
def test_the_pictures_of_a_pixel_ddpm(config: dict[str, Any]) -> None:
    """DDPMScheduler's own settings clip the estimate of the data, as google/ddpm-* do; its noise is replayed."""
    network = make("ddpm", spelling_tokenizer()).unet
    plain = diffusers.DDPMPipeline(unet=network, scheduler=scheduler("DDPM", **config))
    plain.set_progress_bar_config(disable=True)
    expected = theirs("ddpm", plain, torch.zeros(3), STEPS)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, 8, 8, generator=generator)
    model = pipeline_model(plain, lora_rank=2)
    assert float((drawn(model, x, "ddim", 1, generator) - expected).abs().max()) < 1e-4
    t, condition = torch.full((3,), 0.2), model.condition([""] * 3)
    with torch.no_grad():
        data = convert(score, x0, model.schedule, t, 3 * x, model.score(t, 3 * x, condition)).abs()
    assert (float(data.max()) < 1 + 1e-5) is config.get("clip_sample", True), (
        "policies and paths see the clipped estimate"
    )


@pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverMultistep", "FlowMatchHeunDiscrete"])
def test_the_clock_of_a_flow(name: str) -> None:
    """Wan's own scheduler is a UniPC on flow's sigmas: the same sigmas at the same times of the network."""
    shift = {"shift": 3.0} if name.startswith("Flow") else {"flow_shift": 3.0}
    flow = {} if name.startswith("Flow") else {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipeline = make("wan", spelling_tokenizer())
    pipeline.scheduler = scheduler(name, **shift, **flow)
    model = pipeline_model(pipeline, lora_rank=2, height=32, width=32, frames=5)
    theirs = scheduler(name, **shift, **flow)
    theirs.set_timesteps(STEPS)
    ts = model.scheduler_times(STEPS)
    assert len(ts) == STEPS + 1
    sigmas, times = theirs.sigmas.unique().flip(0), theirs.timesteps.float().unique().flip(0)
    assert float((model.schedule.sigma(ts)[1:] - sigmas[1:]).abs().max()) < 1e-5
    assert float((model.family.timestep(ts[:-1]) - times).abs().max()) < 1.01  # steps of a table are whole numbers


def test_where_the_estimate_is_clipped_it_has_no_gradient() -> None:
    _, kind = read_scheduler(scheduler("DDPM"))
    schedule = read_scheduler(scheduler("DDPM", clip_sample=False))[0]
    t, x = torch.full((2,), 0.5), torch.tensor([[0.0], [30.0]])
    output = torch.zeros(2, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(convert(kind, score, schedule, t, x, output).sum(), output)
    assert gradient[0] != 0
    assert gradient[1] == 0


# --- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "at_data"),
    [
        ("DDPM", {}, True), ("DDIM", {"clip_sample": False}, True), ("PNDM", {}, False),
        ("PNDM", {"set_alpha_to_one": True}, True),
        ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "final_sigmas_type": "zero"}, False),  # another class' field
        ("UniPCMultistep", {"final_sigmas_type": "sigma_min"}, False), ("DEISMultistep", {}, False), ("HeunDiscrete", {}, True),
    ],
)  # fmt: skip
def test_a_path_ends_where_the_schedulers_does(name: str, config: dict[str, Any], at_data: bool) -> None:
    schedule, _ = read_scheduler(scheduler(name, **config))
    end = torch.tensor(schedule.t_max, dtype=torch.float64)
    table = scheduler(name, **config).alphas_cumprod
    assert float(schedule.sigma(end)) == pytest.approx(0 if at_data else float((1 - table[0]).sqrt()), rel=1e-4)
    assert float(schedule.alpha(torch.tensor(1 - 1 / len(table))) ** 2) == pytest.approx(float(table[0]), rel=1e-4)


def test_a_cosine_table_starts_where_epsilon_says_something() -> None:
    """Of a state whose alpha is 5e-5 its noise says nothing; a clipped estimate is bounded all the same."""
    for clips, start in ((False, 1 / 1000), (True, 0.0)):
        schedule, _ = read_scheduler(scheduler("DDPM", beta_schedule="squaredcos_cap_v2", clip_sample=clips))
        assert schedule.t_min == pytest.approx(start)


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("DDIM", {}, "DDIMScheduler has clip_sample, which clips the estimate of the data but not the noise"),
        ("DDPM", {"thresholding": True}, "DDPMScheduler has thresholding True: it divides each sample by a quantile"),
        ("UniPCMultistep", {"thresholding": True}, "has thresholding True"),
        ("DDIM", {"clip_sample": False, "timestep_spacing": "linspace"}, "it then steps to other times than"),
        ("DDIM", {"clip_sample": False, "rescale_betas_zero_snr": True}, "has zero terminal SNR with prediction_type 'eps"),
        ("EulerDiscrete", {"rescale_betas_zero_snr": True}, "has zero terminal SNR with prediction_type 'eps"),
        ("DDIM", {"clip_sample": False, "prediction_type": "other"}, "prediction_type 'other'. has no table"),
        ("DDIM", {"clip_sample": False, "prediction_type": None}, "prediction_type None. has no table"),
        ("EulerDiscrete", {"timestep_type": "continuous"}, "has timestep_type 'continuous'"),
        ("UniPCMultistep", {"use_flow_sigmas": True}, "has use_flow_sigmas with prediction_type 'epsilon'"),
        ("UniPCMultistep", {"prediction_type": "flow_prediction"}, "predicts a flow with use_flow_sigmas false"),
        ("UniPCMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True},
         "has use_dynamic_shifting"),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "it jumps to the data and noises anew"),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "its times run from data to noise"),
        ("LCM", {}, "LCMScheduler .* has no table that is known here"),
        ("TCD", {}, "TCDScheduler"), ("DDIMInverse", {}, "DDIMInverseScheduler"), ("EDMEuler", {}, "EDMEulerScheduler"),
    ],
)  # fmt: skip
def test_what_no_score_holds_is_refused(name: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(sa.ModelError, match=said):
        read_scheduler(scheduler(name, **config))


def test_a_field_that_nobody_knows_is_refused_unless_it_has_its_default() -> None:
    """As the next version of diffusers may bring one."""

    class DDIMScheduler(diffusers.DDIMScheduler):  # type: ignore[name-defined, misc]
        @register_to_config
        def __init__(self, clip_sample: bool = False, brightness: float = 0.0, **config: Any) -> None:
            super().__init__(clip_sample=clip_sample, **config)

    read_scheduler(DDIMScheduler())
    with pytest.raises(sa.ModelError, match=r"has brightness 0\.5: .*not known here; take its default, 0\.0"):
        read_scheduler(DDIMScheduler(brightness=0.5))


@pytest.mark.parametrize("name", [*TABLES, *FLOWS])
def test_every_field_of_the_known_schedulers_has_been_looked_at(name: str) -> None:
    fields = set(inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters) - {
        "self",
        "args",
        "kwargs",
    }
    assert fields <= READ | STEPPING | set(MUST_BE)
