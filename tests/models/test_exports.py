"""What a pipeline's training leaves, opened by plain diffusers in a fresh process: it draws what the policy drew."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.samplers import SAMPLERS
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.support.files import read_tensors, write_tensors

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_pipelines import make, move, ours, spelling_tokenizer  # noqa: E402

STEPS = 3
# as docs/howto/pipelines.md and export.md say: an adapter by load_lora_weights or by peft, else the folder `pipeline`
PLAIN = """
import json, sys
from pathlib import Path
import diffusers, peft, torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
pictures = {}
for kind, base in json.loads(Path("runs.json").read_text()).items():
    run = Path("runs") / kind
    if (run / "pipeline").is_dir():
        pipe = diffusers.DiffusionPipeline.from_pretrained(run / "pipeline")
    elif (run / "adapter_config.json").is_file():
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, run).base_model.model
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(run)
    pipe.set_progress_bar_config(disable=True)
    if "ddpm" in base:
        seeded = torch.Generator().manual_seed(2)
        images = pipe(batch_size=3, generator=seeded, num_inference_steps=3, output_type="np").images
        pictures[kind] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    else:
        noise = load_file("noise.safetensors")["noise"]
        prompts = ["a cat", "two dogs", "a cat"]
        drawn = pipe(prompts, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="pt")
        pictures[kind] = drawn.images.contiguous()
save_file(pictures, "pictures.safetensors")
"""


def with_adapter(pipeline: Any, encoder: bool = False) -> Any:
    pipeline.unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"]), "first")
    if encoder:
        pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "first")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for network in (pipeline.unet, pipeline.text_encoder):
            for name, p in network.named_parameters():
                if "lora_" in name:
                    p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return pipeline


def compiled(pipeline: Any) -> Any:
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    pipeline.vae = torch.compile(pipeline.vae, backend="eager")
    return pipeline


def compiled_inside(pipeline: Any) -> Any:
    pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block, backend="eager")
    pipeline.unet.down_blocks[0].compile(backend="eager")
    return pipeline


def parallel(pipeline: Any) -> Any:
    pipeline.unet = torch.nn.DataParallel(pipeline.unet)
    return pipeline


def fused_projections(pipeline: Any) -> Any:
    pipeline.fuse_qkv_projections()
    return pipeline


def fused_adapter(pipeline: Any) -> Any:
    with_adapter(pipeline).fuse_lora()
    return pipeline


def disabled_adapter(pipeline: Any) -> Any:
    with_adapter(pipeline).unet.disable_adapters()
    return pipeline


def pixels(pipeline: Any) -> Any:
    return diffusers.DDPMPipeline(unet=pipeline.unet, scheduler=diffusers.DDPMScheduler())


KINDS: dict[str, tuple[str, Callable[[Any], Any], dict[str, Any]]] = {
    "plain": ("sd", lambda pipeline: pipeline, {}),
    "kohya": ("sd", lambda pipeline: pipeline, {}),  # forms of `scoreact export --format`
    "peft": ("sd", lambda pipeline: pipeline, {}),
    "compiled": ("sd", compiled, {}),
    "compiled_full": ("sd", compiled, {"full": True}),
    "compiled_inside": ("sd", compiled_inside, {}),
    "parallel": ("sd", parallel, {}),
    "with_adapter": ("sd", lambda pipeline: with_adapter(pipeline, encoder=True), {}),
    "fused_adapter": ("sd", fused_adapter, {}),
    "disabled_adapter": ("sd", disabled_adapter, {}),
    "fused_projections": ("sd", fused_projections, {}),
    "fused_projections_full": ("sd", fused_projections, {"full": True}),
    "ddpm": ("ddpm", pixels, {}),
    "ddpm_full": ("ddpm", pixels, {"full": True}),
}


QUICK = ("plain", "compiled", "with_adapter", "fused_projections", "ddpm")
Drawn = dict[str, tuple[Tensor, Tensor, list[str]]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Drawn]:
    """Quick kinds or the others -> by kind: the policy's pictures, plain diffusers' by what was left, and what was said."""

    @functools.cache
    def drawn(quick: bool) -> Drawn:
        return drawn_by(tmp_path_factory, [kind for kind in KINDS if (kind in QUICK) is quick])

    return drawn


def drawn_by(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> Drawn:
    place = tmp_path_factory.mktemp("exports")
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    write_tensors(place / "noise.safetensors", {"noise": noise})
    bases = {name: place / name for name in ("sd", "ddpm")}
    make("sd", spelling_tokenizer()).save_pretrained(bases["sd"])
    expected, said = {}, {}
    for kind in kinds:
        name, change, options = KINDS[kind]
        guidance = {"guidance_scale": 2.0} if name == "sd" else {}
        pipeline = change(make(name, spelling_tokenizer()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)  # of the adapter's first weights
            model = pipeline_model(pipeline, **guidance, **options)
        move(model)
        if name == "sd":
            expected[kind] = ours(model, noise, model.scheduler_times(STEPS))
        else:
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(3, 3, 8, 8, generator=generator)
            condition, sde = model.condition([""] * 3), SDE(model.schedule, noise_level(1.0))
            with torch.no_grad():
                score = lambda t, x, m=model, c=condition: m.score(t, x, c)  # noqa: E731
                path = SAMPLERS["ddim"](sde, score, model.scheduler_times(STEPS), x, generator)
                expected[kind] = model.decode(path[-1])
        said[kind] = model.notes()
        averaged = copy.deepcopy(model)  # that a run exports
        if kind in ("kohya", "peft"):
            averaged.save(place / "runs" / kind, kind)
        else:
            averaged.export(place / "runs" / kind)
    (place / "runs.json").write_text(json.dumps({kind: str(bases[KINDS[kind][0]]) for kind in kinds}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "were not used" not in done.stderr
    assert "newly initialized" not in done.stderr
    found = read_tensors(place / "pictures.safetensors")
    return {kind: (expected[kind], found[kind], said[kind]) for kind in kinds}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in KINDS]
)
def test_a_fresh_process_draws_the_policys_pictures(kind: str, drawn: Callable[[bool], Drawn]) -> None:
    expected, found, said = drawn(kind in QUICK)[kind]
    assert float((found - expected).abs().max()) < 1e-4
    if KINDS[kind][0] == "sd":
        same = float((drawn(True)["plain"][0] - expected).abs().max()) < 1e-4
        assert same is (kind not in ("with_adapter", "fused_adapter", "compiled_full", "fused_projections_full"))
    words = {
        "compiled": "compiled",
        "parallel": "wrapped",
        "fused_projections": "taken apart",
        "fused_adapter": "beside them",
    }
    for name, word in words.items():
        assert any(word in note for note in said) is kind.startswith(name)


def test_every_tensor_keeps_its_type(tmp_path: Path) -> None:
    """Video transformers keep norms and embeddings in float32 beside bfloat16; a folder may hold its VAE in float32."""
    make("wan", spelling_tokenizer()).save_pretrained(tmp_path / "whole")
    types = {"transformer": torch.bfloat16, "default": torch.float32}
    half = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "whole", torch_dtype=types)
    half.save_pretrained(tmp_path / "mixed")
    before = types_in(tmp_path / "mixed")
    assert {torch.bfloat16, torch.float32} == set(before["transformer"].values())
    for full in (False, True):
        model = pipeline_model(tmp_path / "mixed", full=full, lora_rank=2, height=32, width=32, frames=5)
        assert next(model.pipeline.vae.parameters()).dtype == torch.float32
        model.save(tmp_path / f"{full}", "pipeline")
        assert types_in(tmp_path / f"{full}") == before


def types_in(folder: Path) -> dict[str, dict[str, torch.dtype]]:
    files = {path.parent.name: read_tensors(path) for path in folder.glob("*/*.safetensors")}
    return {part: {name: tensor.dtype for name, tensor in tensors.items()} for part, tensors in files.items()}


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_adapters_act_where_projections_were_fused(name: str) -> None:
    """The attention asked the fused ones, and adapters on the others got no gradient."""
    pipeline = make(name, spelling_tokenizer())
    network = pipeline.unet if name == "sd" else pipeline.transformer
    network.fuse_qkv_projections()
    small = {"height": 32, "width": 32, "frames": 5} if name == "wan" else {"height": 16, "width": 16}
    model = pipeline_model(pipeline, lora_rank=2, **small)  # type: ignore[arg-type]
    move(model)
    condition = model.condition(["a cat"])
    x = model.prior(condition, torch.Generator().manual_seed(0))
    model.score(torch.full((1,), 0.5), x, condition).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_networks_that_training_cannot_go_through_are_refused() -> None:
    def refused(pipeline: Any, said: str) -> None:
        with pytest.raises(sa.ModelError, match=said):
            pipeline_model(pipeline)

    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.conv_in.to(torch.float8_e4m3fn)
    refused(
        pipeline, "the unet's weight conv_in.weight is float8_e4m3fn .quantised or cast.; open the pipeline in float32"
    )
    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused(pipeline, "the pipeline's unet has hooks")
    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.to("meta")
    refused(pipeline, "is not in memory .offloaded.; open the pipeline without offloading")
