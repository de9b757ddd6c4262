"""`calibrate`: a trained run against the closed form, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.dynamics.schedule import VP
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel

QUICK: dict[str, Any] = {
    "solver": "euler_maruyama", "algorithm": "adjoint_matching", "average": 0.5, "learning_rate": 5e-3, "epochs": 4,
    "batch_size": 128, "steps": 8, "heldout_samples": 64, "reference_batches": 1, "iterations": 10, "device": "cpu",
}  # fmt: skip
TINY: dict[str, Any] = QUICK | {"iterations": 1, "epochs": 1, "batch_size": 16, "steps": 3, "heldout_samples": 16}
CRITIC: dict[str, Any] = TINY | {"algorithm": "ctrl", "value_steps": 1, "value_first_steps": 2, "report": False}
STATISTICS = (
    "def shift(x):\n    return x[:, 0]\nshift.differentiable = True\ndef right(x):\n    return (x[:, 0] > 0) * 1.0\n"
)


def gaussian() -> ResidualModel:
    torch.manual_seed(0)
    covariance = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    return ResidualModel(GaussianMixture(VP(t_max=0.98), torch.ones(1), torch.zeros(1, 2), covariance), 2, 16)


def shift(x: Tensor) -> Tensor:
    return x[:, 0]


shift.differentiable = True  # type: ignore[attr-defined]


def right(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).double()


def test_a_trained_run_reaches_its_target_at_the_closed_forms_price(tmp_path: Path) -> None:
    """lambda = delta / var and KL = delta^2 / (2 var), var being that of the pretrained model's samples on this grid."""
    model = gaussian()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = sa.calibrate(model, shift, 0.8, tolerance=0.1, samples=2000, out=tmp_path / "run", also=right, **QUICK)
    assert found.met
    row = found.facts["statistics"][0]
    assert abs(row["after"] - 0.8) < 0.1 * row["std_before"]
    delta, variance = 0.8 - row["before"], row["std_before"] ** 2
    assert abs(row["first_weight"] - delta / variance) < 4 * row["first_weight_se"]
    assert abs(found.facts["least_kl"] - delta**2 / (2 * variance)) < 4 * found.facts["least_kl_se"]
    reached = (row["after"] - row["before"]) ** 2 / (2 * variance)
    assert found.path_kl == pytest.approx(reached, rel=0.1)
    assert row["std"] == pytest.approx(row["std_before"], rel=0.02), "the shape stays"
    moved = {entry["name"]: entry for entry in found.facts["moved"]}
    assert moved["right"]["change"] > 10 * moved["right"]["change_se"]
    assert {"mean of a sample", "size of a sample", "sample/diversity"} <= set(moved)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the model given is not touched"
    written = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert written["path_kl"] == found.path_kl
    assert (tmp_path / "run" / "calibration.png").stat().st_size > 1000
    assert "least KL" in str(found)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Calibration</h2><pre>statistic" in page
    assert "Histograms of each statistic" in page
    again = sa.open_run(tmp_path / "run", gaussian())
    assert torch.equal(again.sample(count=5), found.result.sample(count=5))
    assert float(again.sample(count=500)[:, 0].mean()) == pytest.approx(0.8, abs=0.2)


@pytest.mark.slow
def test_a_distant_target_is_approached_in_rounds_and_seeds_give_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "stats.py").write_text(STATISTICS)
    spec, lines = f"{tmp_path / 'stats.py'}:shift", list[str]()
    how: dict[str, Any] = {"tolerance": 0.2, "samples": 200, "rounds": 2, **CRITIC}
    runs = [sa.calibrate("gaussian", spec, 30.0, out=tmp_path / name, say=lines.append, **how) for name in ("a", "b")]
    assert runs[0].facts == runs[1].facts
    assert not runs[0].met
    assert not runs[0].facts["trusted"]
    assert "not reached within 0.2" in str(runs[0])
    assert any("no sample of 200" in line and "samples reach" in line for line in lines)
    assert all(row["share"] < 1 for row in runs[0].facts["rounds"])
    weights = [sorted((tmp_path / name).glob("**/model.safetensors")) for name in ("a", "b")]
    assert [p.read_bytes() for p in weights[0]] == [p.read_bytes() for p in weights[1]]
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.is_dir()) == ["best", "checkpoints", "round-1"]
    run = sa.open_run(tmp_path / "a")
    assert run.config.kl_weight == 1.0
    assert run.resume(iterations=2, progress=False).final["reward/heldout/shift"] != 0
    assert run.check()[0].startswith("fine")
    assert "calibration.json is of other weights" in run.report().read_text(encoding="utf-8")


def test_every_round_is_counted_from_the_pretrained_model() -> None:
    found = sa.calibrate(
        gaussian(), shift, 30.0, tolerance=0.2, samples=200, rounds=2, **CRITIC | {"learning_rate": 0.1}
    )
    reference, tuned = found.result.policy.reference, found.result.policy.model
    assert isinstance(reference, nn.Module)
    assert isinstance(tuned, nn.Module)
    pretrained = gaussian().state_dict()
    assert all(torch.equal(pretrained[name], value) for name, value in reference.state_dict().items())
    assert not all(torch.equal(pretrained[name], value) for name, value in tuned.state_dict().items())
    assert len(found.facts["rounds"]) == 2


def test_a_run_is_the_pretrained_model_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "stats.py").write_text(STATISTICS)
    how: dict[str, Any] = {"tolerance": 0.2, "samples": 100, "rounds": 1, **CRITIC}
    first = sa.calibrate("gaussian", f"{tmp_path / 'stats.py'}:shift", 1.5, out=tmp_path / "a", **how)
    sa.calibrate(tmp_path / "a", f"{tmp_path / 'stats.py'}:right", 0.2, out=tmp_path / "b", **how)
    assert torch.equal(sa.open_run(tmp_path / "b").sample(count=3, reference=True), first.result.sample(count=3))


@pytest.mark.parametrize(
    ("target", "how", "text"),
    [
        (1.2, {"statistics": right}, r"the target of right is 1.2 \(samples reach 0 to 1\).*only an infinite lambda"),
        (0.0, {"tolerance": 0.2}, "has these means already"),
        ([1.0, 2.0], {}, r"1 statistics \(shift\) and 2 targets"),
        (math.nan, {}, "targets are"),
        (1.0, {"samples": 100, "tolerance": 0.05}, "samples is 100.*Give at least 1600"),
        (1.0, {"kl_weight": 0.5}, "kl_weight is 0.5, but lambda"),
        (1.0, {"rounds": 0}, "rounds is 0"),
    ],
)
def test_what_cannot_be_calibrated_is_said(target: Any, how: dict[str, Any], text: str) -> None:
    with pytest.raises(sa.SettingError, match=text):
        sa.calibrate(
            gaussian(), **({"statistics": shift, "targets": target, "tolerance": 0.2, "samples": 200} | TINY | how)
        )


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoreact.support.distributed.world", lambda: 2)
    with pytest.raises(sa.SettingError, match="2 processes were started, and a calibration works in one"):
        sa.calibrate(gaussian(), shift, 1.0)
