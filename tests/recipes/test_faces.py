"""The benchmark on a third party's faces: its network, schedule and rewards, and its whole course with small random weights."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scoreact.cli.main import main as cli

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def faces() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("faces")
    sys.path.remove(str(ROOT / "benchmarks"))


def test_the_schedule_is_that_of_diffusers(faces: Any) -> None:
    """Where neither end is cut: diffusers' largest beta is another, and it has no least one."""
    theirs = diffusers.DDIMScheduler(num_train_timesteps=300, beta_schedule="squaredcos_cap_v2").betas.double()
    kept = faces.alphas_cumprod()
    mine = 1 - kept[1:] / kept[:-1]
    assert float((mine - theirs[1:]).abs()[:-2].max()) < 1e-6
    assert float(kept[299]) == pytest.approx(2.7e-9, rel=0.05)
    model = faces.build(tiny=True).model
    t = torch.tensor([model.schedule.t_min], dtype=torch.float64)
    assert float(model.schedule.alpha(t) ** 2) == pytest.approx(float(kept[285]), rel=1e-6)
    assert float(faces.sa.models.network.step_number(t.float(), 300)) == 285


def test_attention_adds_to_its_normalised_input(faces: Any, generator: torch.Generator) -> None:
    layer, x = faces.Attention(16), torch.randn(2, 16, 3, 5, generator=generator)
    h = layer.n(x)
    flat = h.flatten(2)  # [B, C, P]

    def mapped(part: Any) -> Tensor:
        return torch.einsum("oc,bcp->bop", part.weight, flat) + part.bias[:, None]

    weights = torch.softmax(torch.einsum("bcp,bcr->bpr", mapped(layer.q), mapped(layer.k)) / 4, dim=2)
    found = torch.einsum("bpr,bcr->bcp", weights, mapped(layer.v))
    expected = flat + torch.einsum("oc,bcp->bop", layer.o.weight, found) + layer.o.bias[:, None]
    assert torch.allclose(layer(x).flatten(2), expected, atol=1e-6)


def test_the_network_is_the_described_one(faces: Any) -> None:
    with torch.device("meta"):
        network = faces.Faces()
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert len(shapes) == 382
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(63.2e6, rel=1e-3)
    assert shapes["up.0.0.c1.weight"] == (512, 1024, 3, 3)
    assert shapes["down.8.0.c.weight"] == (256, 256, 3, 3)
    assert shapes["up.2.2.c.weight"] == (512, 512, 3, 3)
    assert not [name for name in shapes if name.startswith(("down.3.1", "up.6.1"))], (
        "attention in the two lowest levels"
    )


def test_bytes_become_the_weights_again(faces: Any, tmp_path: Path) -> None:
    network = faces.build(tiny=True).model.network.network
    code, tensors = {}, {}
    for name, p in network.state_dict().items():
        if p.ndim == 1:
            tensors[name] = p.half()
            continue
        low, scale = float(p.min()), float(p.max() - p.min()) / 255
        code[name], tensors[name] = [scale, low], ((p - low) / scale).round().to(torch.uint8)
    path = str(tmp_path / "weights.safetensors")
    save_file(tensors, path, metadata={"affine": json.dumps(code)})
    again = faces.load(path, faces.Faces(faces.TINY, time=32)).state_dict()
    for name, p in network.state_dict().items():
        step = code[name][0] / 2 if name in code else 1e-3
        assert float((again[name] - p).abs().max()) <= 1.01 * step, name


def test_lab_has_its_known_values(faces: Any) -> None:
    """Of sRGB's white, red, blue and a grey, under D65."""
    colours = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    expected = [(100, 0, 0), (53.24, 80.09, 67.20), (32.30, 79.19, -107.86), (53.39, 0, 0)]
    found = faces.lab(colours[:, :, None, None])[:, :, 0, 0]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=0.1)


def face(faces: Any, hair: str, skin: str) -> Tensor:
    """A picture [1, 3, 64, 64] with hair in its upper half, drawn in the palette's own colours."""
    picture = torch.tensor(faces.COLOURS[skin])[:, None, None].repeat(1, 64, 64)
    picture[:, :30] = torch.tensor(faces.COLOURS[hair])[:, None, None]
    return picture[None]


def test_hair_is_paid_for_and_a_tint_is_not(faces: Any) -> None:
    right = faces.hair(face(faces, "blue", "skin"))
    assert right.shape == (1,)
    assert -0.3 < float(right) <= 0
    without = float(faces.hair(face(faces, "red", "skin")))
    assert without == pytest.approx(math.log(0.01), abs=0.1)
    assert float(faces.hair(face(faces, "blue", "blue"))) < without
    assert float(faces.hair(face(faces, "red", "skin"), colour="red")) > -0.3
    assert faces.hair_of(torch.cat([face(faces, name, "skin") for name in ("green", "black")])) == ["green", "black"]
    pictures = torch.rand(2, 3, 16, 16).requires_grad_(True)
    (slope,) = torch.autograd.grad(faces.hair(pictures).sum(), pictures)
    assert bool(slope.isfinite().all())
    assert float(slope[..., 13:, :].abs().max()) == 0, "nothing below the face is looked at"
    assert float(faces.bright(torch.ones(1, 3, 8, 8))) == pytest.approx(10, abs=1e-4)


@pytest.mark.parametrize("settings", [[], ["reward_gradient=surrogate"]])
def test_the_whole_course_with_small_random_weights(
    settings: list[str], faces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["faces.py", "train", "--tiny", "--each", "8", "--rank", "2", "--picture", str(tmp_path / "faces.png")]
    small = ["iterations=1", "steps=3", "last_steps=2", "reference_batches=2", *settings]
    for setting in small:
        words += ["--setting", setting]
    monkeypatch.setattr(sys, "argv", words)
    faces.main()
    said = capsys.readouterr().out
    assert "share recovered" in said
    assert "| 8 fresh pictures from the same noise | before | after |" in said
    assert "J* nan" not in said
    assert (tmp_path / "faces.png").stat().st_size > 100


@pytest.mark.slow
def test_a_run_is_shown_before_and_after(
    faces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "algorithm": "draft", "steps": 2, "iterations": 1, "batch_size": 4, "minibatch_size": 4, "reference_batches": 1,
        "heldout_samples": 2, "learning_rate": 1e-2, "average": 0.0, "warmup": 0, "device": "cpu",
    }  # fmt: skip
    run = f"{ROOT / 'benchmarks' / 'faces.py'}:build"
    words = ["train", run, "--option", "tiny=true", "--option", "lora_rank=2", "--out", str(tmp_path / "run")]
    words += ["--reward", f"{ROOT / 'benchmarks' / 'faces.py'}:bright", "--no-report"]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert cli(words) == 0
    line = tmp_path / "line.json"
    monkeypatch.setattr(sys, "argv", ["faces.py", "show", str(tmp_path / "run"), "--each", "4", "--line", str(line)])
    capsys.readouterr()
    faces.main()
    found = json.loads(line.read_text(encoding="utf-8"))
    assert found["before"] != found["after"]
    assert found["run"]["reward calls in training"] == "4"
    assert faces.table(found) in capsys.readouterr().out
