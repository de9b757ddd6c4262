"""Tuned weights in the forms that others load, and others' adapters to start from: by what plain diffusers and peft draw."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import scoreact as sa
from scoreact.models.pipelines.formats import acting_layers
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import licence_of, pipeline_model
from scoreact.report import html
from scoreact.support.files import read_tensors, write_tensors

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_pipelines import PROMPTS, SIZES, inputs, light, make, move, ours, spelling_tokenizer, theirs  # noqa: E402

FORMS = [
    *(("sd", form) for form in ("diffusers", "kohya", "peft", "pipeline")),
    *(("sdxl", form) for form in ("diffusers", "kohya")),
    ("sd3", "diffusers"), ("sd3", "peft"), ("flux", "diffusers"), ("wan", "pipeline"), ("ddpm", "peft"),
]  # fmt: skip
Opened = Callable[..., PipelineModel]


@pytest.fixture
def opened() -> Opened:
    """(family, options) -> a fresh model with the same adapter at zero for the same options, or `moved` from it."""

    def opened(name: str, moved: bool = True, **options: Any) -> PipelineModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            source = options.pop("pipeline", None) or make(name, spelling_tokenizer())
            model = pipeline_model(source, **{**SIZES.get(name, {}), **options})
        if moved:
            move(model)
        return model

    return opened


def loaded(name: str, folder: Path, form: str, component: str = "unet") -> Any:
    """A fresh pipeline with what the folder holds, by the loaders of diffusers and peft alone."""
    plain = make(name, spelling_tokenizer())
    if form in ("diffusers", "kohya"):
        plain.load_lora_weights(folder)
    elif form == "peft":
        network = peft.PeftModel.from_pretrained(getattr(plain, component), folder)
        setattr(plain, component, network.base_model.model)
    else:
        plain = diffusers.DiffusionPipeline.from_pretrained(folder)
        plain.set_progress_bar_config(disable=True)
    return plain


def noise(name: str, model: PipelineModel) -> Tensor:
    x = inputs(model)[1]
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) if name == "ddpm" else x


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- written ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_what_is_saved_draws_the_policys_pictures(name: str, form: str, opened: Opened, tmp_path: Path) -> None:
    model = opened(name, lora_rank=2)
    x = noise(name, model)
    flow = name in ("sd3", "flux", "wan")  # theirs begins at sigma = 1, where the policy has no score
    expected = theirs(name, model.pipeline, x, 2) if flow else ours(model, x, model.scheduler_times(2))
    model.save(tmp_path / "out", form, {"reward": "brightness"})
    found = theirs(name, loaded(name, tmp_path / "out", form, model.family.component), x, 2)
    assert apart(found, expected) < 1e-4
    assert apart(theirs(name, make(name, spelling_tokenizer()), x, 2), expected) > 1e-3
    if form != "pipeline":
        (file,) = (tmp_path / "out").glob("*.safetensors")
        with safe_open(file, "pt") as opened_file:
            assert opened_file.metadata()["reward"] == "brightness"


def test_a_merged_pipeline_has_the_types_of_its_source(opened: Opened, tmp_path: Path) -> None:
    """float16 with its VAE, which here runs in float32; and a whole network trained in float32."""
    make("sd", spelling_tokenizer()).to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    for full in (False, True):
        model = pipeline_model(str(tmp_path / "half"), full=full, lora_rank=2)
        move(model)
        model.save(tmp_path / f"out{full}", "pipeline")
        files = {path.parent.name: read_tensors(path) for path in (tmp_path / f"out{full}").glob("*/*.safetensors")}
        assert set(files) == {"unet", "vae", "text_encoder"}
        assert {t.dtype for tensors in files.values() for t in tensors.values() if t.is_floating_point()} == {
            torch.float16
        }
        unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / f"out{full}" / "unet")
        want = model.network or model.family.denoiser
        t, state, text = torch.tensor([400.0]), torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)
        with torch.no_grad():
            got = unet(state, t, encoder_hidden_states=text).sample
            with model.family.acting(model._adapters()):
                assert apart(got, want.float()(state, t, encoder_hidden_states=text).sample) < 0.01


@pytest.mark.parametrize("form", ["diffusers", "pipeline"])
def test_what_a_pipeline_came_with_is_saved_too(form: str, opened: Opened, tmp_path: Path) -> None:
    """An adapter on other layers and of another rank and scale than the new one, and one on the text encoder."""
    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"]), "first")
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj"]), "first")
    shaken(pipeline.unet, pipeline.text_encoder)
    model = opened("sd", pipeline=pipeline, lora_rank=2, lora_targets=["to_q", "to_k"])
    x = inputs(model)[1]
    expected, reference = (ours(m, x, model.scheduler_times(2)) for m in (model, model.reference()))
    assert apart(reference, expected) > 1e-3
    assert apart(reference, theirs("sd", make("sd", spelling_tokenizer()), x, 2)) > 1e-3
    model.save(tmp_path, form)
    assert apart(theirs("sd", loaded("sd", tmp_path, form), x, 2), expected) < 1e-4
    assert apart(ours(model, x, model.scheduler_times(2)), expected) == 0, "saving changes nothing"


def test_a_pipeline_with_an_adapter_is_trained_in_full_without_it(opened: Opened, tmp_path: Path) -> None:
    """Around trained weights it would be trained, and saved under names where nothing finds it."""
    pipeline = make("sd", spelling_tokenizer())
    pipeline.unet.add_adapter(peft.LoraConfig(r=3, target_modules=["to_q"]), "first")
    shaken(pipeline.unet)
    x = inputs(opened("sd"))[1]
    expected = theirs("sd", pipeline, x, 2)
    model = opened("sd", moved=False, pipeline=pipeline, full=True)
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_parameters())
    model.save(tmp_path)
    assert apart(theirs("sd", loaded("sd", tmp_path, "pipeline"), x, 2), expected) < 1e-4


def shaken(*networks: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for network in networks:
            for name, p in network.named_parameters():
                if "lora_" in name:
                    p.copy_(0.2 * torch.randn(p.shape, generator=generator))


def test_forms_that_do_not_hold_the_weights_are_refused(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(sa.ModelError, match="of a StableDiffusionPipeline tuned in full there are: pipeline"):
        opened("sd", full=True).save(tmp_path, "peft")
    with pytest.raises(
        sa.ModelError, match="form is 'kohya'; of a FluxPipeline tuned by LoRA there are: diffusers, peft"
    ):
        opened("flux").save(tmp_path, "kohya")
    pipeline = make("sd", spelling_tokenizer())
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "first")
    model = opened("sd", pipeline=pipeline)
    for form in ("peft", "kohya"):
        with pytest.raises(sa.ModelError, match=f"an adapter on a text encoder too, which {form}'s form does not hold"):
            model.save(tmp_path, form)


@pytest.mark.parametrize("form", ["diffusers", "peft", "pipeline"])
def test_dora(form: str, opened: Opened, tmp_path: Path) -> None:
    """A magnitude a layer: it starts as the base, copies have magnitudes of their own, and others read it."""
    model = opened("sd", moved=False, lora_rank=2, use_dora=True)
    x = inputs(model)[1]
    ts, base = model.scheduler_times(2), theirs("sd", make("sd", spelling_tokenizer()), inputs(model)[1], 2)
    assert apart(ours(model, x, ts), base) < 1e-4
    assert sum("lora_magnitude_vector" in name for name, _ in model.named_parameters()) == len(
        acting_layers(model.family.denoiser, model._adapters())
    )
    move(model)
    expected, second = ours(model, x, ts), copy.deepcopy(model)
    assert apart(expected, base) > 1e-3
    assert apart(ours(second, x, ts), expected) < 1e-6
    move(second)
    assert apart(ours(model, x, ts), expected) < 1e-6
    assert apart(ours(model.reference(), x, ts), base) < 1e-4
    model.save(tmp_path, form)
    assert apart(theirs("sd", loaded("sd", tmp_path, form), x, 2), expected) < 1e-4
    with pytest.raises(sa.ModelError, match="diffusers drops what kohya's form calls dora_scale"):
        model.save(tmp_path / "kohya", "kohya")
    with pytest.raises(sa.ModelError, match="use_dora makes a new adapter, and full trains other weights"):
        opened("sd", use_dora=True, full=True)


# --- read ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(opened: Opened, tmp_path: Path) -> Path:
    """A folder with an adapter of rank 3 in each form, of scale 2 where the form has one."""
    model = opened("sd", lora_rank=3)
    for form in ("diffusers", "kohya", "peft"):
        model.save(tmp_path / form, form)
    file = tmp_path / "kohya" / "lora.safetensors"
    tensors = {k: 2 * t if k.endswith(".alpha") else t for k, t in read_tensors(file).items()}
    write_tensors(file, tensors)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6}))
    return tmp_path


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("reference", ["lora", "base"])
def test_training_starts_from_a_given_adapter(
    form: str, reference: str, opened: Opened, mine: Path, tmp_path: Path
) -> None:
    model = opened("sd", moved=False, lora=mine / form, lora_reference=reference)
    x = inputs(model)[1]
    ts = model.scheduler_times(2)
    base = theirs("sd", make("sd", spelling_tokenizer()), x, 2)
    given = theirs("sd", loaded("sd", mine / form, form), x, 2)
    assert apart(given, base) > 1e-2
    assert apart(ours(model, x, ts), given) < 1e-4
    assert apart(ours(model.reference(), x, ts), given if reference == "lora" else base) < 1e-4
    assert model.starts_elsewhere == (reference == "base")
    ranks = {len(p) for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {16 if reference == "lora" else 3}
    move(model)
    expected = ours(model, x, ts)
    assert apart(expected, given) > 1e-3
    model.save(tmp_path / "out")
    assert apart(theirs("sd", loaded("sd", tmp_path / "out", "diffusers"), x, 2), expected) < 1e-4
    layers = acting_layers(model.family.denoiser, model._adapters())
    assert {len(parts["lora_A"]) for parts in layers.values()} == {19 if reference == "lora" else 3}


def test_the_adapter_is_looked_for_in_a_runs_folder_and_named_by_its_file(opened: Opened, mine: Path) -> None:
    write_tensors(mine / "diffusers" / "model.safetensors", {"x": torch.zeros(1)})  # as a run leaves it
    whole = opened("sd", moved=False, lora=mine / "diffusers")
    file = opened("sd", moved=False, lora=mine / "diffusers" / "pytorch_lora_weights.safetensors")
    x = inputs(whole)[1]
    assert apart(ours(whole, x, whole.scheduler_times(2)), ours(file, x, file.scheduler_times(2))) == 0


def test_adapters_that_cannot_be_used_are_refused(opened: Opened, mine: Path, tmp_path: Path) -> None:
    def refused(said: str, lora: Path, name: str = "sd", **options: Any) -> None:
        with pytest.raises(sa.ModelError, match=said):
            opened(name, lora=lora, **options)

    refused("does not exist; give a safetensors file, or the folder of one", tmp_path / "gone")
    (tmp_path / "old.bin").write_bytes(b"x")
    refused("is no safetensors file, and others can hold code", tmp_path / "old.bin")
    (tmp_path / "empty").mkdir()
    refused("holds none of safetensors files", tmp_path / "empty")
    refused("diffusers loads no LoRA into DDIMPipeline; give one of peft's form", mine / "kohya", "ddpm")
    refused("does not fit this pipeline's unet", mine / "diffusers", "sdxl")
    write_tensors(tmp_path / "other.safetensors", {"unet.nothing.lora_A.weight": torch.zeros(2, 4)})
    refused(r"(does not fit|would be used in part only|has nothing for)", tmp_path / "other.safetensors")
    tensors = read_tensors(mine / "diffusers" / "pytorch_lora_weights.safetensors")
    name = next(iter(tensors)).replace("lora_A", "lora_B").rpartition(".lora")[0]
    more = {**tensors, f"{name}.lora_C.weight": torch.zeros(2, 2)}
    write_tensors(tmp_path / "more.safetensors", more)
    refused("would be used in part only", tmp_path / "more.safetensors")
    kohya = read_tensors(mine / "kohya" / "lora.safetensors")
    layer = next(iter(kohya)).partition(".")[0]
    write_tensors(tmp_path / "dora.safetensors", {**kohya, f"{layer}.dora_scale": torch.ones(1, 16)})
    refused("would be used in part only: .*dora", tmp_path / "dora.safetensors")
    refused("lora_reference is 'bse'; known: lora", mine / "peft", lora_reference="bse")
    refused("full trains the weights themselves", mine / "peft", lora_reference="base", full=True)
    refused("the given adapter is trained, of its own rank", mine / "peft", lora_reference="base", lora_rank=8)
    with pytest.raises(sa.ModelError, match="no adapter is given with lora"):
        opened("sd", lora_reference="base")
    pipeline = make("sd", spelling_tokenizer())
    pipeline.load_lora_weights(mine / "kohya")
    refused("this pipeline has an adapter already", mine / "peft", pipeline=pipeline)


def test_an_adapter_on_the_text_encoder_is_the_references_too(opened: Opened, tmp_path: Path) -> None:
    pipeline = make("sd", spelling_tokenizer())
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "first")
    shaken(pipeline.text_encoder)
    opened("sd", pipeline=pipeline).save(tmp_path)
    with pytest.raises(sa.ModelError, match="changes a text encoder too, which policy and reference share"):
        opened("sd", lora=tmp_path, lora_reference="base")
    model = opened("sd", moved=False, lora=tmp_path)
    x = inputs(model)[1]
    given = theirs("sd", loaded("sd", tmp_path, "diffusers"), x, 2)
    assert apart(ours(model.reference(), x, model.scheduler_times(2)), given) < 1e-4


def test_a_run_from_a_given_adapter_counts_from_the_reference(
    opened: Opened, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Path KL before training: that of the given adapter from the base, or none."""
    monkeypatch.setattr(html, "write", lambda folder, *_: folder / "report.html")  # drawing takes longer than training
    settings: dict[str, Any] = dict(
        algorithm="ddpo", iterations=1, batch_size=4, steps=2, reference_batches=1, heldout_samples=4, minibatch_size=8,
        accumulate=1, max_kl=100.0, kl_limit=1e6, guard="off", learning_rate=0.01, device="cpu",
    )  # fmt: skip
    for reference in ("lora", "base"):
        model = opened("sd", moved=False, lora=mine / "peft", lora_reference=reference, guidance_scale=1.0)
        result = sa.finetune(model, light, PROMPTS[:2], out=tmp_path / reference, **settings)
        looks = [line for line in result.history if line.get("evaluation")]
        if reference == "lora":
            assert looks[0]["policy/kl"] == 0
        else:
            assert [line["iteration"] for line in looks] == [0, 0, 1]
            assert looks[0]["policy/kl"] == 0
            assert looks[1]["policy/kl"] > 0.1
        x = inputs(model)[1]
        expected = ours(result.policy.model, x, model.scheduler_times(2))
        plain = loaded("sd", tmp_path / reference, "diffusers")
        assert apart(theirs("sd", plain, x, 2, guidance_scale=1.0), expected) < 1e-4


# --- what the base says ----------------------------------------------------------------------------------------------


def test_the_licence_is_where_the_pipeline_says_it(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "LICENSE").write_text("\n  Some Licence 1.0\nmore\n")
    assert licence_of(tmp_path) == "Some Licence 1.0"
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    assert licence_of(tmp_path) == "openrail++"
