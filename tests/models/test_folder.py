"""A pipeline's folder, in the forms in which people have them: what is loaded of it, and what is said where it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import scoreact as sa
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.runs.source import find_recipe, open_source
from scoreact.support.files import write_tensors

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_pipelines import inputs, make, spelling_tokenizer, vae  # noqa: E402

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    make("sd", spelling_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "sd"))


def opened(folder: Path, **options: Any) -> PipelineModel:
    return pipeline_model(folder, lora_rank=2, **options)


def refused(said: str, source: Any, **options: Any) -> None:
    with pytest.raises(sa.ModelError, match=said):
        pipeline_model(source, **options)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not ...}))


# --- weights files -------------------------------------------------------------------------------------------------------


def test_of_two_precisions_the_one_that_plain_diffusers_loads(folder: Path) -> None:
    make("sd", spelling_tokenizer()).to(torch.float16).save_pretrained(folder, variant="fp16")
    model = opened(folder)
    assert model.family.dtype == torch.float32
    assert any("also holds weights of variant fp16" in note for note in model.notes())
    assert opened(folder, variant="fp16").family.dtype == torch.float16
    refused("variant is 'bf16', but pipeline .* has fp16", folder, variant="bf16")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_one_variant_alone(sharded: bool, tmp_path: Path) -> None:
    pipeline = make("sd", spelling_tokenizer()).to(torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16", **({"max_shard_size": "300KB"} if sharded else {}))
    assert (len(list((tmp_path / "unet").glob("*.safetensors"))) > 1) is sharded
    model = opened(tmp_path)
    assert model.family.dtype == torch.float16
    weight = model.family.denoiser.conv_in.weight
    assert torch.equal(weight, pipeline.unet.conv_in.weight)
    (tmp_path / "unet" / "diffusion_pytorch_model.other.safetensors").write_bytes(
        next((tmp_path / "unet").glob("*.safetensors")).read_bytes()
    )
    if not sharded:
        (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").rename(
            tmp_path / "vae" / "diffusion_pytorch_model.other.safetensors"
        )
        refused(r"no plain ones .*unet: fp16, other; vae: other\); say which with --option variant=NAME", tmp_path)


def test_each_component_is_opened_in_its_own_dtype(folder: Path) -> None:
    diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").to(torch.bfloat16).save_pretrained(folder / "unet")
    model = opened(folder)
    found = {
        name: next(getattr(model.family.pipeline, name).parameters()).dtype for name in ("unet", "vae", "text_encoder")
    }
    assert found == {"unet": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.float32}
    t, x, condition = inputs(model)
    assert bool(torch.isfinite(model.score(t, x, condition)).all())


def test_pickles_are_not_read(folder: Path) -> None:
    for part in ("unet", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_suffix(".bin"))
        refused(rf"{part}/.*\.bin of pipeline .* is a pickle, which can run code; write safetensors once", folder)
        file.with_suffix(".bin").rename(file)


def test_a_safety_checker_that_is_not_there_is_not_missed(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert opened(folder).family.pipeline.safety_checker is None


def test_code_of_a_folder_is_not_run(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('run')")
    edit(folder / "model_index.json", _class_name=["mine", "Mine"])
    refused(r"brings code of its own \(mine.py\), which is not run", folder)


def test_damaged_folders_are_answered_in_a_sentence(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    refused("cannot open pipeline .*Give a folder with a model_index.json", folder)
    (folder / "model_index.json").write_text("{")
    refused("cannot open pipeline", folder)


def test_single_files_are_told_what_to_become(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"model.diffusion_model.time_embed.0.weight": torch.zeros(4, 4)})
    for source in (file, tmp_path):
        refused("is a single file, and a pipeline is a folder; .*from_single_file.*save_pretrained", source)
        assert find_recipe(str(source)).options["path"] == str(source)
    refused("none.ckpt' does not exist; give the folder of a pipeline", tmp_path / "none.ckpt")


# --- names -----------------------------------------------------------------------------------------------------------------


def test_hub_names_are_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("org/model-1.0").options["path"] == "org/model-1.0"
    assert open_source("org/model-1.0").recipe.name == "pipeline"
    (tmp_path / "org").mkdir()
    with pytest.raises(sa.SettingError, match=r"unknown recipe 'org/model-1\.0'"):  # a misspelt folder
        find_recipe("org/model-1.0")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(sa.SettingError, match=r"run is the folder of a run; go on with `scoreact resume run`"):
        find_recipe("run")


@pytest.mark.slow
def test_a_hub_model_in_the_cache_is_opened_offline(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own: the cache's place is read when huggingface_hub is imported."""
    place = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    code = "from scoreact.models.pipelines.opening import pipeline_model as m; print(m('org/tiny').shape)"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "(4, 8, 8)" in found.stdout, found.stderr


# --- configurations and components --------------------------------------------------------------------------------------


def test_a_pipeline_that_says_no_size_is_given_one(folder: Path) -> None:
    for size in (None, ...):
        edit(folder / "unet" / "config.json", sample_size=size)
        refused("the unet's configuration says no sample_size; give height and width", folder)
        refused("says no sample_size", folder, height=16)
        assert opened(folder, height=16, width=12).shape == (4, 8, 6)
    edit(folder / "unet" / "config.json", sample_size=[8, 12])
    assert opened(folder).shape == (4, 8, 12)
    for size in (0, -8, True, 16.0):
        refused(f"height is {size!r}; expected a whole number", folder, height=size)


def test_a_pixel_model_keeps_the_size_that_it_was_tuned_at(tmp_path: Path) -> None:
    """Its own call has no size: plain diffusers draws what the configuration says."""
    model = pipeline_model(make("ddpm", spelling_tokenizer()), lora_rank=2, height=16, width=12)
    model.save(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    images = plain(num_inference_steps=1, output_type="np").images
    assert images.shape[1:3] == model.decode(inputs(model)[1]).shape[2:] == (16, 12)


def test_inputs_that_no_call_gives_are_refused() -> None:
    small = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    scheduler = make("ddpm", spelling_tokenizer()).scheduler
    network = diffusers.UNet2DModel(num_class_embeds=10, **small)
    refused(
        "this UNet2DModel takes class labels .num_class_embeds is 10., which no call of a DDIMPipeline gives it; wrap the",
        diffusers.DDIMPipeline(unet=network, scheduler=scheduler),
    )
    network = diffusers.UNet2DModel(class_embed_type="timestep", **small)
    refused("takes class labels", diffusers.DDIMPipeline(unet=network, scheduler=scheduler))
    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.register_to_config(time_cond_proj_dim=32)
    refused("takes the guidance as an input .a latent consistency model.", pipeline)
    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    refused("takes embeddings beside the prompt's .an IP-Adapter's.", pipeline)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    refused("DiTPipeline is not supported", diffusers.DiTPipeline(transformer=dit, vae=vae(), scheduler=scheduler))


def test_models_that_take_a_picture_too_are_refused() -> None:
    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.register_to_config(in_channels=9)
    refused("the unet takes 9 channels and the vae makes 4: a model that also takes a picture or a mask", pipeline)


@pytest.mark.parametrize(
    ("name", "part"),
    [("sd", "tokenizer"), ("sd", "text_encoder"), ("sd", "vae"), ("sdxl", "text_encoder_2"), ("flux", "tokenizer_2")],
)
def test_a_component_that_is_missing_is_named(name: str, part: str) -> None:
    pipeline = make(name, spelling_tokenizer())
    setattr(pipeline, part, None)
    refused(f"has no {part}, without which it draws nothing", pipeline)
