"""Trackers, the real ones offline: what they wrote is read back and compared with the run's own lines."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoreact as sa
from scoreact.cli import main as cli
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.report import html
from scoreact.runs.trackers import TRACKERS, finite_numbers

SMALL: dict[str, Any] = dict(
    algorithm="ddpo", iterations=3, evaluate_every=2, batch_size=8, steps=2, reference_batches=1, heldout_samples=10,
    minibatch_size=8, device="cpu",
)  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x)


def model() -> sa.NetworkModel:
    return sa.NetworkModel(Net(), RectifiedFlow(), prediction.velocity, (1, 8, 8), low=-3, high=3)


def bright(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "write", lambda run, *_: run / "report.html")


def written(out: Path, name: str) -> list[tuple[int, float]]:
    """The iteration and value of every line of metrics.jsonl that has it."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        (row["iteration"], row[name]) for row in rows if isinstance(row.get(name), float) and math.isfinite(row[name])
    ]


NAMES = ("reward/mean", "reward/heldout", "objective/J", "learning_rate")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    sa.finetune(model(), bright, out=out, trackers=["tensorboard"], **SMALL)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for name in NAMES:
        assert len(written(out, name)) >= 2
        assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars(name)] == written(out, name)
    assert [image.step for image in events.Images("samples")] == [0, 2, 3]
    assert (events.Images("samples")[0].width, events.Images("samples")[0].height) == (4 * 112 + 6, 2 * 112 + 2)
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "iterations: 3" in text


def test_mlflow_and_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out = tmp_path / "run"
    sa.finetune(model(), bright, out=out, trackers=["mlflow"], **SMALL)
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    known = json.loads((out / "trackers.json").read_text())["mlflow"]
    for iterations in (3, 5):
        if iterations == 5:
            sa.finetune(model(), bright, out=out, resume=True, trackers=["mlflow"], **{**SMALL, "iterations": 5})
        run = client.get_run(known)
        assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
        for name in NAMES:
            found = [(m.step, pytest.approx(m.value)) for m in client.get_metric_history(known, name)]
            assert sorted(found, key=lambda pair: pair[0]) == written(out, name), "each once, also after it went on"
    assert run.data.params["algorithm"] == "ddpo"
    images = sorted(path.name for path in (tmp_path / "mlruns").rglob("samples*.png"))
    assert len(images) == 5
    experiment = client.get_experiment_by_name("scoreact")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def records(data: bytes) -> Iterator[bytes]:
    """Of wandb's file, which is a log of LevelDB's: blocks of 32 KiB, and crc, length, kind before each part of a record."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    sa.finetune(model(), bright, out=out, trackers=["wandb"], **SMALL)
    (file,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2

    rows, settings = [], {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item})
        if record.WhichOneof("record_type") == "run":
            settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    for name in NAMES:
        assert [(row["iteration"], pytest.approx(row[name])) for row in rows if name in row] == written(out, name)
    assert settings["algorithm"] == "ddpo"
    assert len(list((out / "wandb").glob("offline-run-*/files/media/images/samples*.png"))) == 3
    assert wandb.run is None


class Mine:
    """One of the user's, which breaks at the second evaluation."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def start(self, out: Path, settings: Any, resumed: bool) -> None:
        self.told.append(("start", settings["iterations"]))

    def metrics(self, iteration: int, metrics: Any) -> None:
        self.told.append(("metrics", iteration))

    def text(self, iteration: int, text: str) -> None:
        self.told.append(("text", iteration))

    def pictures(self, iteration: int, sheet: Any) -> None:
        self.told.append(("pictures", iteration))
        if iteration == 2:
            raise ConnectionError("the network is gone")

    def end(self, failed: bool) -> None:
        self.told.append(("end", failed))


def test_a_run_outlives_its_tracker(tmp_path: Path) -> None:
    good, bad = Mine(), Mine()
    good.pictures = lambda iteration, sheet: good.told.append(("pictures", iteration))  # type: ignore[method-assign]
    result = sa.finetune(model(), bright, out=tmp_path / "run", trackers=[good, bad], **SMALL)
    assert result.stopped is None
    assert good.told[0] == ("start", 3)
    assert good.told[-1] == ("end", False)
    assert [i for what, i in good.told if what == "pictures"] == [0, 2, 3]
    assert bad.told[-1] == ("pictures", 2)
    (said,) = [line["text"] for line in result.history if line.get("guard") == "tracker"]
    assert said == "Mine failed and is told nothing more: ConnectionError: the network is gone"
    assert ("text", 2) in good.told


def test_a_failed_run_is_said_to_be_one(tmp_path: Path) -> None:
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("no reward today")

    tracker = Mine()
    with pytest.raises(Exception, match="no reward today"):
        sa.finetune(model(), broken, out=tmp_path / "run", trackers=[tracker], **SMALL)
    assert tracker.told[-1] == ("end", True)


def test_trackers_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["train", "gaussian", "--tracker", "wandb", "--out", "run"]) == 2
    assert "tracker wandb needs a package of that name; `pip install 'scoreact[wandb]'`" in capsys.readouterr().err
    assert cli.main(["train", "gaussian", "--tracker", "tensorbord", "--out", "run"]) == 2
    assert "unknown tracker" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(sa.SettingError, match="give one with out"):
        sa.finetune(model(), bright, trackers=[Mine()], **SMALL)
    with pytest.raises(sa.LoadError, match="expected the methods start, metrics, text"):
        sa.finetune(model(), bright, out=tmp_path / "run", trackers=[object()], **SMALL)  # type: ignore[list-item]
    assert set(TRACKERS) == {"tensorboard", "wandb", "mlflow"}
    assert finite_numbers({"iteration": 1, "a": 2, "b": math.nan, "c": True, "d": "x"}) == {"a": 2.0}
