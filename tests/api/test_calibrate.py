"""`calibrate`: a trained run against the closed form, what it leaves, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.api import calibrated_model
from scoreact.api.calibration_folder import begun
from scoreact.dynamics.schedule import VP
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.report import html
from scoreact.support.files import read_lines, read_tensors

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


# --- kills -------------------------------------------------------------------------------------------------------------


def test_a_mean_that_is_not_known_to_the_tolerance_is_said() -> None:
    """A statistic that spreads more after training than before, on few samples and on many."""

    def rare(x: Tensor) -> Tensor:
        return torch.sigmoid((x[:, 0] - 1.5) / 0.1)

    rare.differentiable = True  # type: ignore[attr-defined]
    said = []
    for samples in (450, 4000):
        found = sa.calibrate(gaussian(), rare, 0.45, tolerance=0.1, samples=samples, rounds=1, report=False, **QUICK)
        assert found.facts["statistics"][0]["std"] > 1.2 * found.facts["statistics"][0]["std_before"]
        said.append([note for note in found.facts["notes"] if "partly chance" in note])
    assert "rare: twice the standard error of the mean on 450 samples is more than the tolerance" in said[0][0]
    assert said[1] == []


def test_where_training_stands_still_lambda_is_corrected_in_the_third_round() -> None:
    """A policy that has not come half of the way gets one round more to the same lambda, and no third."""
    still: dict[str, Any] = TINY | {"learning_rate": 1e-9, "report": False}
    found = sa.calibrate(gaussian(), shift, 1.6, tolerance=0.2, samples=2000, rounds=4, **still)
    first, second, third, fourth = (row["weights"][0] for row in found.facts["rounds"])
    assert first == second
    assert third == fourth == pytest.approx(2 * first, rel=0.2), "the policy being where it was"


def two_rounds(out: Path, resume: bool = False, **how: Any) -> sa.Calibration:
    """Two rounds of a module, whatever they reach."""
    settings: dict[str, Any] = {
        "tolerance": 0.2,
        "samples": 200,
        "rounds": 2,
        **CRITIC,
        "iterations": 2,
        "report": True,
    }
    return sa.calibrate(gaussian(), shift, 30.0, out=out, resume=resume, **settings | {"learning_rate": 0.05} | how)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], Any], patch: tuple[Any, str, Callable[..., Any]] | None = None) -> None:
    """Run in a fork of this process, which has to die of it; patch: an object's attribute, there alone."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            if patch is not None:
                setattr(*patch)
            work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def on_call(number: int, of: Callable[..., Any]) -> Callable[..., Any]:
    """`of`, deadly when it is called for this time."""
    calls = 0

    def called(*words: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            die()
        return of(*words, **how)

    return called


def left_by(folder: Path) -> dict[str, Any]:
    """All that a calibration leaves, but for its seconds."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): read_tensors(path) for path in sorted(folder.glob("**/*.safetensors"))
    }
    found["facts"] = json.loads((folder / "calibration.json").read_text())
    for path in sorted(folder.glob("**/metrics.jsonl")):
        lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(path)]
        found[str(path.relative_to(folder))] = lines
    found["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def at(kind: str) -> dict[str, Any]:
    return {"on_event": lambda event, line: event == kind and die()}


def said(words: str) -> dict[str, Any]:
    return {"say": lambda line: line.startswith(words) and die()}


KILLS: dict[str, tuple[dict[str, Any], tuple[Any, str, Callable[..., Any]] | None]] = {
    "nothing is trained": (said("round 1  lambda"), None),
    "before a checkpoint": (at("reference"), None),
    "in a round": (at("iteration"), None),
    "its samples are not drawn": ({}, (calibrated_model, "ensemble_of", die)),
    "between rounds": (said("round 1  means"), None),
    "the last one is over": (said("round 2  means"), None),
    "as it moves up": ({}, (Path, "rename", on_call(4, Path.rename))),
    "in the report": ({}, (html, "write", die)),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a POSIX kill")
@pytest.mark.parametrize(
    ("kills", "report"),
    [
        (["in a round", "between rounds", "as it moves up"], False),
        pytest.param(list(KILLS), True, marks=pytest.mark.slow),
    ],
)
def test_one_that_is_killed_ends_in_the_same_bits(kills: list[str], report: bool, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    left_alone = two_rounds(whole, report=report)
    assert len(left_alone.facts["rounds"]) == 2
    for number, place in enumerate(kills):
        how, patch = KILLS[place]
        killed(partial(two_rounds, cut, number > 0, report=report, **how), patch)
        assert begun(cut)
        assert (cut / "config.json").exists() == (place == "in the report")
    again = two_rounds(cut, True, report=report)
    assert again.facts == left_alone.facts
    assert same(left_by(cut), left_by(whole))
    assert "ensembles" not in left_by(whole)["files"]
    assert torch.equal(again.result.sample(count=3), left_alone.result.sample(count=3))
    assert again.result.out == cut


def test_what_is_no_calibration_to_go_on_with_is_said(tmp_path: Path) -> None:
    how: dict[str, Any] = {"rounds": 1, "iterations": 1, "report": False}
    with pytest.raises(sa.SettingError, match="give it with out"):
        sa.calibrate(gaussian(), shift, 1.0, resume=True)
    with pytest.raises(sa.RunError, match="holds no calibration to go on with"):
        two_rounds(tmp_path / "run", resume=True, **how)
    done = two_rounds(tmp_path / "run", **how)
    assert two_rounds(tmp_path / "run", resume=True, **how).facts == done.facts
    with pytest.raises(sa.RunExists):
        two_rounds(tmp_path / "run", **how)
    text = re.escape("was begun with something else: learning_rate 0.05 -> 0.1. Give the same")
    with pytest.raises(sa.RunError, match=text):
        two_rounds(tmp_path / "run", resume=True, **how, learning_rate=0.1)
    other, settings = gaussian(), CRITIC | how | {"learning_rate": 0.05, "samples": 200, "tolerance": 0.2}
    nn.init.ones_(next(other.parameters()))
    with pytest.raises(sa.RunError, match=re.escape("statistics ['shift'] -> ['right']; model ")):
        sa.calibrate(other, right, 30.0, out=tmp_path / "run", resume=True, **settings)


def test_a_round_that_the_guard_stopped_is_not_trained_on(tmp_path: Path) -> None:
    how: dict[str, Any] = {"rounds": 1, "iterations": 4, "evaluate_every": 1, "guard": "stop", "learning_rate": 2.0}
    stopped = two_rounds(tmp_path / "run", report=False, max_kl=50.0, **how)
    assert stopped.result.stopped
    assert stopped.result.history[-1]["iteration"] < 4
    again = two_rounds(tmp_path / "run", resume=True, report=False, max_kl=50.0, **how)
    assert again.result.stopped == stopped.result.stopped
    assert torch.equal(again.result.sample(count=3), stopped.result.sample(count=3))


# --- refusals ----------------------------------------------------------------------------------------------------------


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
