"""Tiny pipelines trained: every family by four rules, saved, loaded in plain diffusers, resumed; values on their features."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.api.result import guided
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.value import ResidualValue, ValueNetwork
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.models.pipelines.features import feature_width
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.models.weights import digest_of
from scoreact.recipes.pipeline import SETTINGS, build
from scoreact.support import files as checkpoint
from scoreact.training.config import Config, updated, usable
from scoreact.training.trainer import Trainer

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_pipelines import PROMPTS, SIZES, inputs, light, make, move, spelling_tokenizer, theirs  # noqa: E402

FAMILIES = ["sd", "sdxl", "sd3", "flux_guided", "wan", "ddpm"]
RULES = ["ctrl", "ddpo", "flow_grpo", "draft"]
SHORT = Config(
    iterations=2, batch_size=4, steps=2, heldout_samples=2, reference_batches=1, minibatch_size=8, kl_weight=0.1,
    kl_states=4, max_kl=100, kl_limit=1e6, value_steps=2, value_first_steps=2, value_batch_size=8, average=0.5,
    evaluate_every=2, checkpoint_every=1, guard="off", device="cpu",
)  # fmt: skip


def tiny(name: str, **options: Any) -> PipelineModel:
    """A fresh model of a family; the same weights for the same name."""
    given = {"lora_rank": 2, "rows_per_call": 4, **SIZES.get(name, {}), **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # of the adapter's first weights
        return pipeline_model(make(name, spelling_tokenizer()), **given)


@pytest.mark.parametrize("name", ["sd", "ddpm"])
def test_the_digest_is_of_the_pretrained_weights(name: str) -> None:
    model = tiny(name)
    before = model.reference_digest()
    assert before == tiny(name, full=True).reference_digest(), "an adapter is no part of the pretrained weights"
    second = copy.deepcopy(model)
    with torch.no_grad():
        for p in [*model.parameters(), *second.parameters()]:
            p.add_(1)
    assert model.reference_digest() == before == model.reference().reference_digest()
    assert digest_of(model) != digest_of(tiny(name))
    weight = next(p for n, p in model.family.denoiser.named_parameters() if "base_layer" in n)
    weight.data.view(-1)[0] += 1e-3
    assert model.reference_digest() != before


def test_the_digest_of_a_trained_network_is_another() -> None:
    model = tiny("ddpm", full=True)
    reference, before = model.reference(), model.reference_digest()
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert model.reference_digest() != before == reference.reference_digest()


# --- every family, rule, kind of weights and guidance --------------------------------------------------------------------


def cell(name: str, rule: str, full: bool, guidance: float, slow: bool = True) -> Any:
    words = f"{name}-{rule}-{'full' if full else 'lora'}-{guidance:g}"
    return pytest.param(name, rule, full, guidance, id=words, marks=[pytest.mark.slow] if slow else [])


QUICK = [("sd3", "ctrl", False, 4.0), ("ddpm", "draft", True, 1.0)]
GRID = [
    (name, rule, full, guidance)
    for name, rule, full, guidance in itertools.product(FAMILIES, RULES, (False, True), (1.0, 4.0))
    if not (name == "ddpm" and guidance > 1)  # has no prompt to be guided by
]


@pytest.mark.parametrize(
    ("name", "rule", "full", "guidance"), [cell(*entry, slow=entry not in QUICK) for entry in GRID]
)
def test_trained_saved_loaded_and_resumed(name: str, rule: str, full: bool, guidance: float, tmp_path: Path) -> None:
    """A killed run that goes on ends in the very weights of one that was left alone; plain diffusers draws with them."""
    rate = 1e-3 if full else 2e-2
    settings = updated(SHORT, {"algorithm": rule, "learning_rate": rate, "iterations": 2, "epochs": 1})

    def train(out: str, killed: bool = False, resume: bool = False) -> sa.Result:
        def kill(kind: str, metrics: dict[str, float]) -> None:
            if kind == "checkpoint" and killed:
                raise ConnectionError("the power failed")

        model = tiny(name, full=full, guidance_scale=guidance)
        return sa.finetune(model, light, PROMPTS[:2], config=settings, out=tmp_path / out, on_event=kill, resume=resume)

    result = train("whole")
    with pytest.raises(ConnectionError):
        train("parts", killed=True)
    train("parts", resume=True)
    whole, parts = (checkpoint.read_tensors(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    model = result.policy.model
    assert isinstance(model, PipelineModel)
    options = {} if name == "ddpm" else {"guidance_scale": guidance}
    x = inputs(model)[1]
    expected = theirs(name, model.pipeline, x, 2, **options)
    plain = make(name, spelling_tokenizer())
    before = theirs(name, plain, x, 2, **options)
    if (tmp_path / "whole" / "pipeline").is_dir():
        without = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
        plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "whole" / "pipeline", **without)
        plain.set_progress_bar_config(disable=True)
    else:
        plain.load_lora_weights(tmp_path / "whole")
    assert float((theirs(name, plain, x, 2, **options) - expected).abs().max()) < 1e-5
    assert float((before - expected).abs().max()) > 1e-4


@pytest.mark.slow
def test_a_broken_torchvision_is_named(tmp_path: Path) -> None:
    """One made for another torch breaks diffusers and transformers when they are imported; in a process of its own."""
    for folder, name, text in (
        ("torchvision", "__init__.py", 'raise RuntimeError("operator torchvision::nms does not exist")'),
        ("torchvision-0.28.0.dist-info", "METADATA", "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    code = "from scoreact.models.pipelines.opening import pipeline_model; pipeline_model('anything')"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert "ImportError: torchvision is installed but broken (operator torchvision::nms" in found.stderr
    assert "pip uninstall torchvision" in found.stderr


@pytest.mark.parametrize("name", ["sd", "sd3", "wan", "ddpm"])
def test_a_sample_is_encoded_as_the_autoencoder_says(name: str) -> None:
    """Latents are standardised as diffusers standardises them: decoding the encoded is what its autoencoder makes again."""
    model = tiny(name)
    frames = () if name != "wan" else (5,)
    x = torch.rand(2, 3, *frames, *model.shape[-2:]).repeat_interleave(2, -1).repeat_interleave(2, -2)
    if name == "ddpm":
        samples = x[..., : model.shape[-2], : model.shape[-1]]
        torch.testing.assert_close(model.decode(model.encode(samples)), samples)
        return
    vae = model.pipeline.vae
    with torch.no_grad():
        latents = vae.encode(2 * x - 1).latent_dist.mode()
        again = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        states = model.encode(x)
        torch.testing.assert_close(model.decode(states), again, rtol=1e-4, atol=1e-4)
    if name == "sd":
        torch.testing.assert_close(states, latents * vae.config.scaling_factor)


def test_targets_of_the_adapter_and_slicing_of_the_decoder() -> None:
    model = tiny("sd", lora_targets=["to_q"])
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in model.trainable_state()} == {"to_q"}
    assert model.family.pipeline.vae.use_slicing
    whole = tiny("sd", vae_slicing=False)
    assert not whole.family.pipeline.vae.use_slicing
    x = inputs(model)[1]
    assert torch.allclose(model.decode(x), whole.decode(x), atol=1e-5)


def test_training_the_same_model_again_starts_where_it_is() -> None:
    """Its path KL is counted from the pretrained model, at the start too: the first run's is not forgotten."""
    model = tiny("sd", guidance_scale=1.0)
    assert not model.starts_elsewhere
    assert not tiny("sd", use_dora=True).starts_elsewhere
    move(model)
    assert model.starts_elsewhere
    settings = updated(SHORT, {"algorithm": "ddpo", "learning_rate": 1e-4, "iterations": 1, "epochs": 1})
    result = sa.finetune(model, light, PROMPTS[:2], config=settings)
    looks = [line for line in result.history if line.get("evaluation")]
    assert [line["iteration"] for line in looks] == [0, 0, 1]
    assert looks[0]["policy/kl"] == 0
    assert looks[1]["policy/kl"] > 0.1


# --- a value on the denoiser's own features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_the_pretrained_network_under_the_prompt(name: str) -> None:
    """Read from the first call that diffusers' own pipeline makes of an untouched network; and alike from a guided score."""
    model = tiny(name, rows_per_call=2)
    move(model)
    x = inputs(model)[1]
    if name == "ddpm":  # draws its noise itself
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    plain = make(name, spelling_tokenizer())
    network, seen = getattr(plain, model.family.component), []
    if name in ("sd", "sdxl", "ddpm"):
        network.mid_block.register_forward_hook(lambda module, given, output: seen.append(output.mean((2, 3))))
    else:
        network.norm_out.register_forward_pre_hook(lambda module, given: seen.append(given[0].mean(1)))
    theirs(name, plain, x, 2)
    expected = seen[0][-3:]  # guided: the prompt's half is the second
    t = model.scheduler_times(2)[:1] if name in ("sd", "sdxl", "ddpm") else torch.zeros(1)  # where theirs begins
    reference = model.reference()
    with torch.no_grad():
        found, passes = reference.features(t.expand(3), x, model.condition(PROMPTS))
        assert passes == 3
        assert found.shape == (3, feature_width(model.family))
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(model.features(t.expand(3), x, model.condition(PROMPTS))[0], expected, atol=1e-3)
        model.family.keeps_features = True
        late = torch.full((3,), 0.5)  # anywhere a score exists
        reference.score(late, x, model.condition(PROMPTS))
        kept, passes = reference.features(late, x, model.condition(PROMPTS))
        assert passes == 0
        assert torch.allclose(kept, model.reference().features(late, x, model.condition(PROMPTS))[0], atol=1e-5)


def test_a_rollout_leaves_the_features_of_its_states() -> None:
    """No second pass for them, whatever order they are asked in; other prompts, times and states are not taken for them."""
    model = tiny("sd")
    value = ValueNetwork(model.feature_value(), SDE(model.schedule, noise_level(1.0)), policy := Policy(model))
    path = rollout(policy, value.sde, ddim, model.scheduler_times(2), model.condition(PROMPTS), torch.Generator())
    calls = policy.network_calls
    order = torch.tensor([2, 0, 1])
    t, x, condition = path.ts[:1].expand(3), path.xs[0], path.condition
    with torch.no_grad():
        together = value.inputs_at(t, x, condition)
        assert torch.equal(value.inputs_at(t, x[order], condition[order]), together[order])
        assert policy.network_calls == calls
        value.inputs_at(t + 1e-3, x, condition)
        value.inputs_at(t, x.roll(1, 3), condition)
        value.inputs_at(t[:2], x[:2], model.condition(["two dogs", "a cat"]))
        assert policy.network_calls == calls + 8
    reference = policy.reference
    assert isinstance(reference, PipelineModel)
    assert reference.memory is not None
    assert len(reference.memory) == 6


def test_what_a_reference_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoreact.models.feature_memory.LIMIT", 4)
    model = tiny("ddpm")
    model.family.keeps_features = True
    reference, (_, x, condition) = model.reference(), inputs(model)
    with torch.no_grad():
        for t in (0.2, 0.4):
            reference.score(torch.full((3,), t), x, condition)
        assert reference.memory is not None
        assert len(reference.memory) == 4
        assert [reference.features(torch.full((3,), t), x, condition)[1] for t in (0.2, 0.4)] == [2, 0]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_gradient_goes_through_the_denoiser(name: str) -> None:
    """Of a value on features, against finite differences along a direction; a pass a state, counted, in small calls."""
    model = tiny(name, rows_per_call=2)
    policy = Policy(model)
    value = ValueNetwork(model.feature_value(), SDE(model.schedule, noise_level(1.0)), policy)
    t, x, condition = inputs(model)
    with torch.no_grad():
        nn.init.normal_(value.network.net.last.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
        value(t, x, condition)  # standardises
        calls = policy.network_calls
        found, gradient = value.gradient(t, x, condition)
        assert policy.network_calls == calls + 3
        assert torch.allclose(found, value(t, x, condition), atol=1e-5)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        step = 1e-2 * direction
        slope = (value(t, x + step, condition) - value(t, x - step, condition)) / 2e-2
    assert torch.allclose((gradient * direction).flatten(1).sum(1), slope, rtol=0.03, atol=1e-3)
    assert float(gradient.flatten(1).norm(dim=1).min()) > 0


@pytest.mark.parametrize("rule", [pytest.param("ctrl", marks=pytest.mark.slow), "ctrl_pathwise"])
def test_the_features_carry_a_value(rule: str, tmp_path: Path) -> None:
    """The recipe's option: the head learns what the reward is from the reference's paths; no pass more than the encoder's."""
    make("sd3", spelling_tokenizer()).save_pretrained(tmp_path / "tiny")
    calls, explained = {}, {}
    for kind in ("encoder", "features", "linear"):
        network = "features" if kind == "features" else "encoder"
        problem = build(str(tmp_path / "tiny"), "cat", lora_rank=2, guidance_scale=1.0, value_network=network)
        changes = dict(
            algorithm=rule, batch_size=32, steps=3, reference_batches=2, kl_weight=0.1, value_batch_size=64,
            value_first_steps=150 if kind == "features" else 1, value_learning_rate=5e-3, minibatch_size=32,
            heldout_samples=4, device="cpu", value="linear" if kind == "linear" else "network",
        )  # fmt: skip
        trainer = Trainer(
            problem.model,
            lambda s, c: 100 * light(s, c),
            ["cat"],
            problem.value_network,
            updated(SETTINGS, usable(SETTINGS, changes)),
        )
        trainer.look_at_reference()
        assert trainer.policy.network_calls == 2 * 32 * 3
        metrics = trainer.iterate()
        calls[kind], explained[kind] = trainer.policy.network_calls, metrics["value/explained_variance"]
    assert calls["features"] == calls["encoder"] == calls["linear"]
    assert (
        -0.5 < explained["linear"] < explained["features"]
    )  # of paths that its fits did not see; on random weights none
    assert explained["features"] > 0.15 > explained["encoder"] + 0.1  # the encoder was not fitted
    assert metrics["policy/step_kl"] > 0


def test_what_a_value_on_features_cannot_be(tmp_path: Path) -> None:
    model = tiny("ddpm")
    sde = SDE(model.schedule, noise_level(1.0))
    with pytest.raises(ValueError, match="a residual value needs x_data_hat, but its network sees features"):
        ResidualValue(model.feature_value(), sde, Policy(model), lambda x, c: x.flatten(1).mean(1))
    model.family.denoiser.mid_block = None
    with pytest.raises(ValueError, match="no mid-block whose features a value could read"):
        model.feature_value()
    with pytest.raises(ValueError, match="value_network is 'mlp'; known: encoder, features"):
        build(str(tmp_path), "cat", value_network="mlp")


def test_the_encoder_serves_a_pipeline_without_prompts(tmp_path: Path) -> None:
    make("ddpm", spelling_tokenizer()).save_pretrained(tmp_path / "tiny")
    problem = build(str(tmp_path / "tiny"), lora_rank=2)
    network = problem.value_network()
    x = torch.zeros(2, 3, 8, 8)
    found: Tensor = network(x, torch.ones(2), problem.model.condition(["", ""]))
    assert found.shape == (2,)


def test_a_value_network_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    make("ddpm", spelling_tokenizer()).save_pretrained(tmp_path / "tiny")
    problem = replace(build(str(tmp_path / "tiny"), lora_rank=2, value_network="features"), reward=light)
    with pytest.raises(ValueError, match="value_network is 'features', but value surrogate is no network"):
        sa.finetune(problem, config=SETTINGS)
    with pytest.raises(ValueError, match="value_network is 'features', but ddpo fits no value"):
        sa.finetune(problem, config=updated(SETTINGS, {"algorithm": "ddpo"}))


def test_a_black_box_moves_a_pipeline_by_default(tmp_path: Path) -> None:
    """The recipe's own settings but small; the reward's gradient is never there."""
    make("sd", spelling_tokenizer()).save_pretrained(tmp_path / "tiny")
    problem = replace(build(str(tmp_path / "tiny"), "cat", lora_rank=2), reward=lambda s, c: 200 * light(s.detach(), c))
    small = {
        "iterations": 4, "batch_size": 16, "steps": 4, "reference_batches": 2, "heldout_samples": 32, "evaluate_every": 4,
        "learning_rate": 1e-3, "kl_weight": 0.1, "scored_samples": 8, "accumulate": 1,
        "device": "cpu", "warmup": 0, "average": 0.0,
    }  # fmt: skip
    result = sa.finetune(problem, config=updated(SETTINGS, small))
    first, last = (line for line in result.history if "evaluation" in line)
    # on the same noise; random weights have little to give: the reward's own spread is 1
    assert last["reward/heldout"] > first["reward/heldout"] + 0.05
    assert 0.05 < last["policy/kl"] < 2
    assert first["surrogate/seen"] > 0.5
    calls = [line["cost/reward_calls"] for line in result.history if "cost/reward_calls" in line]
    assert calls[-1] == 8 * (2 + 4)


def test_guidance_and_negative_prompt_are_others_for_a_while() -> None:
    """As `scoreact sample --guidance-scale --negative-prompt`; for policy and reference alike, and put back."""
    policy = Policy(tiny("sd", guidance_scale=3.0))
    t, x = torch.full((2,), 0.5), torch.randn(2, *policy.model.shape, generator=torch.Generator().manual_seed(0))
    condition = policy.condition(["a cat", "two dogs"])

    def score() -> Tensor:
        with torch.no_grad():
            return policy.score(t, x, condition)

    before = score()
    with guided(policy, None, "bad"):
        negative = score()
    with guided(policy, 5.0, None):
        stronger = score()
    policy.model.negative_prompt = "bad"
    with guided(policy, 1.0, ""):
        score()
    assert (policy.model.guidance_scale, policy.model.negative_prompt) == (3.0, "bad")
    policy.model.negative_prompt = ""
    assert float((negative - before).abs().max()) > 1e-5
    assert float((stronger - before).abs().max()) > 1e-5
    assert torch.equal(score(), before)
    with pytest.raises(
        sa.ModelError, match=r"negative_prompt is 'bad', but StableDiffusionPipeline at guidance_scale 1"
    ):
        guided(policy, 1.0, "bad").__enter__()
    assert policy.model.guidance_scale == 3.0, "a refusal changes nothing"
    with (
        pytest.raises(sa.ModelError, match="but a FluxPipeline takes none"),
        guided(Policy(tiny("flux_guided")), None, "bad"),
    ):
        pass
