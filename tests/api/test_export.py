"""A run exported: what plain diffusers, peft and the user's own network make of it, and what its card says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import scoreact as sa
from scoreact.cli import main as cli
from scoreact.report import html

NETWORK = """
import torch
import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.network import IntegerSteps

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.register_buffer("offset", torch.ones(2))

    def forward(self, x, t):
        return self.body(x) + self.offset * t[:, None]

def build():
    torch.manual_seed(0)
    return sa.NetworkModel(IntegerSteps(Net(), 1000), RectifiedFlow(), prediction.velocity, (2,))

def left(x):
    return -x[:, 0]
"""
SMALL = ["--iterations", "2", "--batch-size", "4", "--steps", "2", "--reference-batches", "1", "--heldout-samples", "8",
         "--minibatch-size", "8", "--max-kl", "100", "--algorithm", "ddpo", "--learning-rate", "0.02", "--guard", "off",
         "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline that says its licence, and a run of it from the command line."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from tiny_pipelines import make, spelling_tokenizer

    folder = tmp_path_factory.mktemp("export")
    make("sd", spelling_tokenizer()).save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: openrail++\n---\n")
    (folder / "rewards.py").write_text("def bright(images):\n    return 100 * images.mean((1, 2, 3))\n")
    (folder / "prompts.txt").write_text("cat\ndog\n")
    words = [
        "train",
        str(folder / "base"),
        "--reward",
        f"{folder}/rewards.py:bright",
        "--prompts",
        f"{folder}/prompts.txt",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write", lambda run, *_: run / "report.html")  # drawing takes longer than training
        options = ["--option", "guidance_scale=3", "--option", "lora_rank=2", "--option", "negative_prompt=bad"]
        assert cli.main([*words, *SMALL, *options, "--out", str(folder / "run")]) == 0
    return folder


def pictures(pipeline: Any, x: Tensor) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(["cat", "dog"], latents=x.clone(), num_inference_steps=3, guidance_scale=3.0, negative_prompt=["bad"] * 2,
                     output_type="pt")  # fmt: skip
    return found.images


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft", "pipeline"])
def test_an_export_draws_the_policys_pictures_by_the_lines_of_its_card(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_pipelines import ours

    out = tmp_path / "out"
    assert cli.main(["export", str(folder / "run"), "--format", form, "--out", str(out)]) == 0
    assert "README.md says how to load it" in capsys.readouterr().out
    policy = sa.open_run(folder / "run").policy()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = ours(policy.model, x, policy.model.scheduler_times(3), ["cat", "dog"])
    card = (out / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("\n```")[0]
    loading, call = lines.rsplit("\n", 1)
    named: dict[str, Any] = {}
    exec(loading, named)
    assert float((pictures(named["pipe"], x) - expected).abs().max()) < 1e-4
    before = ours(policy.reference, x, policy.model.scheduler_times(3), ["cat", "dog"])
    assert float((before - expected).abs().max()) > 1e-3
    assert call == ('found = pipe("a prompt", num_inference_steps=2, guidance_scale=3.0, height=16, width=16, '
                    "negative_prompt='bad').images[0]")  # fmt: skip
    exec(call, named)
    assert cli.main(["export", str(folder / "run"), "--format", form, "--out", str(out)]) == 2
    assert "is not empty, and an export never overwrites" in capsys.readouterr().err


def test_the_card_and_the_header_say_what_it_is(folder: Path) -> None:
    run = sa.open_run(folder / "run")
    out = run.export()
    assert out == folder / "run" / "export-diffusers"
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert len(header.pop("digest")) == 64
    kl = run.final["policy/kl"]
    assert header == {
        "format": "pt", "base_model": str(folder / "base"), "rank": "2", "alpha": "2", "algorithm": "ddpo", "kl_weight": "1.0",
        "reward": f"{folder}/rewards.py:bright", "path_kl": str(kl), "guidance_scale": "3.0", "steps": "2", "sampler": "ddim",
        "noise_scale": "1.0", "iterations": "2", "weights": "final", "made_by": f"scoreact {sa.__version__}",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    row = re.search(r"^\| held-out reward \| (\S+) ± (\S+) \| (\S+) ± (\S+) \|$", card, re.MULTILINE)
    assert row is not None
    looks = [run.history[1], run.final]
    expected = [n for line in looks for n in (line["reward/heldout"], 1.96 * line["reward/heldout_se"])]
    assert [float(n) for n in row.groups()] == pytest.approx(expected, rel=0.01)
    for text in ("license: openrail++", "Of the base model: openrail++.", "counted from the base model.", "ddim, 2 steps",
                 "the sampler of training", "What the reward does not see", "negative prompt | bad"):  # fmt: skip
        assert text in card, text


def test_a_picture_is_the_same_whatever_else_is_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(name: str, *words: str) -> tuple[list[dict[str, Any]], list[bytes]]:
        out = tmp_path / name
        assert cli.main(["sample", str(folder / "run"), *words, "--out", str(out)]) == 0
        index = json.loads((out / "index.json").read_text())
        assert [(out / sheet).is_file() for sheet in index["sheets"]] == [True]
        return index["samples"], [(out / entry["file"]).read_bytes() for entry in index["samples"]]

    (tmp_path / "more.txt").write_text("two birds\ncat\ndog\n")
    monkeypatch.setattr("scoreact.api.result.AT_ONCE", 4)
    entries, files = sampled("all", "--prompts", str(tmp_path / "more.txt"), "--count", "3")
    assert [(e["prompt"], e["sample"]) for e in entries] == [
        (p, i) for p in ("two birds", "cat", "dog") for i in range(3)
    ]
    assert len(set(files)) == 9
    monkeypatch.setattr("scoreact.api.result.AT_ONCE", 256)
    own, few = sampled("few", "--count", "2")
    assert [(e["prompt"], e["sample"]) for e in own] == [("cat", 0), ("cat", 1), ("dog", 0), ("dog", 1)]
    assert few == [files[3], files[4], files[6], files[7]]
    one, single = sampled("one", "--prompts", "dog", "--first", "2", "--count", "1")
    assert single == [files[8]]
    assert one[0]["reward"] == pytest.approx(entries[8]["reward"], abs=1e-4)
    pixels = np.asarray(Image.open(tmp_path / "one" / "00000.png"), dtype=float)
    assert one[0]["reward"] == pytest.approx(100 * pixels.mean() / 255, abs=0.2), "the reward is brightness"
    from_python = sa.open_run(folder / "run").sample(["dog"], 1, first=2)
    assert np.abs(from_python[0].permute(1, 2, 0).numpy() * 255 - pixels).max() <= 0.5 + 1e-3
    assert "reward" not in sampled("none", "--prompts", "dog", "--count", "1", "--no-reward")[0][0]
    (folder / "rewards.py").rename(folder / "good.py")
    try:
        (folder / "rewards.py").write_text("def bright(images):\n    raise RuntimeError('the server is gone')\n")
        capsys.readouterr()
        assert "reward" not in sampled("broken", "--prompts", "dog", "--count", "1")[0][0]
        assert "note: the index is without rewards" in capsys.readouterr().err
    finally:
        (folder / "good.py").rename(folder / "rewards.py")


def test_how_much_of_the_gain_survives(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(folder / "run"), "--survey", "--samples", "6"]) == 0
    said = capsys.readouterr().out
    run = sa.open_run(folder / "run")
    kept = json.loads((folder / "run" / "survey.json").read_text())
    rows = {row["change"]: row for row in kept["rows"]}
    assert list(rows) == [
        "as trained", "guidance 1", "guidance 4.5", "twice the steps", "solver ode", "solver dpm_solver_pp_2m",
    ]  # fmt: skip
    assert all(name in said for name in rows)
    # each row is what `evaluate` finds with that sampler and that guidance
    policy = run.policy()
    for change, scale, solver, steps in (
        ("guidance 1", 1.0, "ddim", 2), ("guidance 4.5", 4.5, "ddim", 2), ("twice the steps", 3.0, "ddim", 4),
        ("solver ode", 3.0, "ode", 2),
    ):  # fmt: skip
        policy.model.guidance_scale = scale
        (found,) = run.evaluate(6, [solver], [steps])["transfer"]
        for name in ("reward", "reference_reward", "gain", "gain_se"):
            assert rows[change][name] == pytest.approx(found[name], abs=1e-4), (change, name)
    policy.model.guidance_scale = 3.0
    own, other = rows["as trained"], rows["solver ode"]
    if own["share"] is not None:
        assert own["share"] == pytest.approx(1)
        assert own["share_se"] == pytest.approx(0, abs=1e-6)
        assert other["share"] == pytest.approx(other["gain"] / own["gain"])
    out = run.export(out=tmp_path / "with")
    assert "## How much of the gain survives" in (out / "README.md").read_text()
    assert "twice the steps" in html._survey(run.record, policy)
    with torch.no_grad():
        next(policy.model.parameters()).add_(1)
    assert "of other weights than the final ones" in html._survey(run.record, policy)
    assert cli.main(["evaluate", str(folder / "run"), "--survey", "--steps", "3"]) == 2
    assert "--survey has solvers, steps and a grid of its own" in capsys.readouterr().err


def test_a_run_starts_from_an_export(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, named from where it stands; the run is opened from elsewhere, and exports both as one."""
    from tiny_pipelines import ours

    first = sa.open_run(folder / "run")
    first.export("peft", tmp_path / "mine")
    monkeypatch.setattr(html, "write", lambda run, *_: run / "report.html")
    monkeypatch.chdir(tmp_path)
    words = ["train", str(folder / "base"), "--reward", f"{folder}/rewards.py:bright", "--prompts", "cat", *SMALL]
    words += ["--option", "lora=mine", "--option", "guidance_scale=3", "--option", "negative_prompt=bad"]
    assert cli.main([*words, "--option", "lora_rank=1", "--out", "second"]) == 0
    monkeypatch.chdir(folder)
    second = sa.open_run(tmp_path / "second")
    assert second.problem.labels["lora"] == f"from {tmp_path}/mine; path KL is counted from the pipeline with it"
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    ts = first.policy().model.scheduler_times(2)
    start, reference = (ours(model, x, ts, ["cat"]) for model in (first.policy().model, second.policy().reference))
    assert float((start - reference).abs().max()) < 1e-4
    with safe_open(second.export(out=tmp_path / "both") / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["rank"], header["lora"]) == ("3", f"{tmp_path}/mine")
    assert "with the LoRA that was given" in (tmp_path / "both" / "README.md").read_text()


def test_a_run_in_another_type_is_exported_in_its_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "write", lambda run, *_: run / "report.html")
    words = ["train", str(folder / "base"), "--reward", f"{folder}/rewards.py:bright", "--prompts", "cat", *SMALL]
    assert cli.main([*words, "--option", "dtype=bfloat16", "--out", str(tmp_path / "run")]) == 0
    out = sa.open_run(tmp_path / "run").export("pipeline")
    stored = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}


@pytest.mark.parametrize("options", [[], ["--option", "lora_rank=1"]])
def test_a_network_of_ones_own_gets_its_weights_back(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "write", lambda run, *_: run / "report.html")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "net_of_mine.py").write_text(NETWORK)
    words = ["train", "net_of_mine.py:build", "--reward", "net_of_mine.py:left", "--out", "run"]
    assert cli.main([*words, *SMALL, *options]) == 0
    assert cli.main(["export", "run"]) == 0
    monkeypatch.delitem(sys.modules, "net_of_mine", raising=False)
    import net_of_mine

    network = net_of_mine.Net()
    lines = (
        (tmp_path / "run" / "export-weights" / "README.md")
        .read_text()
        .partition("```python\n")[2]
        .partition("\n```")[0]
    )
    exec(lines, {"network": network})
    tuned = sa.open_run("run").policy().model
    x = torch.randn(3, 2)
    assert torch.allclose(network(x, torch.full((3,), 5.0)), tuned.network.network(x, torch.full((3,), 5.0)), atol=1e-6)
    assert not torch.equal(network.body.weight, net_of_mine.build().network.network.body.weight)
    with pytest.raises(sa.ModelError, match=r"a run of a (LoRA)?NetworkModel has no form 'peft'; there are: weights"):
        sa.open_run("run").export("peft", tmp_path / "elsewhere")
    with pytest.raises(sa.ModelError, match="format is 'lora'; known: diffusers, kohya"):
        sa.open_run("run").export("lora")
    assert not (tmp_path / "elsewhere").exists()
