"""A model of the user's own data: its law, its folder, going on where it ended, and what is done with it afterwards."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scoreact as sa
from scoreact.cli.main import main
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.samplers import SAMPLERS
from scoreact.recipes.own_model import about_model, make_network, read_about, read_model
from scoreact.runs import pretraining
from scoreact.runs.checkpoint import load_checkpoint
from scoreact.runs.source import find_recipe, recipe_options, source_of_run
from scoreact.sampling.draw import draw
from scoreact.support.devices import bfloat16_pays
from scoreact.support.errors import RunError, RunExists, SettingError
from scoreact.support.files import read_lines, read_tensors, write_tensors
from scoreact.support.own_data import read_data

SMALL = {"width": 8, "batch_size": 16, "bfloat16": "no"}
REWARD = "def first(samples):\n    return samples.flatten(1)[:, 0]\n"


def vectors(path: Path, count: int = 2000) -> tuple[Path, np.ndarray, np.ndarray]:
    """Two classes of correlated points in another unit, as a table; the points and their classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    points = rng.normal(size=(count, 2)) @ np.array([[3.0, 2.0], [0.0, 0.1]]) + np.where(labels, 10, -10)[:, None]
    lines = [f"{a:.6f},{b:.6f},{'xy'[i]}" for (a, b), i in zip(points, labels, strict=True)]
    (path / "own.csv").write_text("a,b,kind\n" + "\n".join(lines))
    return path / "own.csv", points, labels


def pictures(path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(path / "own.npz", images=rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), labels=np.arange(40) % 2)
    return path / "own.npz"


def series(path: Path) -> Path:
    levels = np.exp(np.random.default_rng(0).normal(size=(120, 2)).cumsum(0) / 50)
    (path / "series.csv").write_text("a,b\n" + "\n".join(f"{100 * a:.6f},{b:.6f}" for a, b in levels))
    return path / "series.csv"


def test_the_law_of_a_table_is_learned_class_by_class_in_its_own_unit(tmp_path: Path) -> None:
    path, points, labels = vectors(tmp_path)
    sa.pretrain(
        tmp_path / "mine", path, labels="kind", steps=600, batch_size=256, width=64, bfloat16="no", progress=False
    )
    assert main(["check", "model", str(tmp_path / "mine")]) == 0
    model = read_model(tmp_path / "mine").eval()
    assert model.classes == ("x", "y")
    for place, name in enumerate(model.classes):
        found = draw(model, [name] * 1000, SAMPLERS["heun"], uniform(model.schedule, 60), 0)[1].double().numpy()
        wanted = points[labels == place]
        for degree in (1, 2):  # means; second moments about the data's mean, of every pair of coordinates
            a, b = ((x - wanted.mean(0)) if degree == 2 else x for x in (found, wanted))
            moments = [np.einsum("ni,nj->nij", x, x).reshape(len(x), -1) if degree == 2 else x for x in (a, b)]
            error = np.sqrt(sum(m.var(0) / len(m) for m in moments))
            assert (abs(moments[0].mean(0) - moments[1].mean(0)) < 4 * error).all()


def test_a_pretraining_that_was_broken_off_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pictures(tmp_path)
    monkeypatch.setattr(pretraining, "FIRST_LOOKS", (10,))
    whole = sa.pretrain(tmp_path / "whole", path, labels=True, steps=20, progress=False, flip=True, **SMALL)
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 0.0)

    def kill(kind: str, line: object) -> None:
        if kind == "look":  # at step 10, whose look is written and whose checkpoint is not
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        sa.pretrain(tmp_path / "parts", path, labels=True, steps=20, progress=False, flip=True, on_event=kill, **SMALL)
    assert pretraining.checkpoints(tmp_path / "parts" / "checkpoints")[0].name == "00000009"
    sa.pretrain(tmp_path / "parts", path, labels=True, steps=15, progress=False, resume=True)  # an end, extended
    parts = sa.pretrain(tmp_path / "parts", path, labels=True, steps=20, progress=False, resume=True)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, parts.network.state_dict()[name]), name
    bests = [load_checkpoint(tmp_path / name / "checkpoints")[1]["best"] for name in ("whole", "parts")]
    assert bests[0]["step"] == bests[1]["step"] == 10
    assert bests[0]["loss"] == bests[1]["loss"]
    looks = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    losses = [{line["step"]: line["loss/heldout"] for line in lines} for lines in looks]
    assert losses[1] == {**losses[0], 15: losses[1][15]}


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = series(tmp_path)
    words = [
        "pretrain", "mine", "--data", str(path), "--window", "8", "--resume-or-start", "--width", "8", "--batch-size", "16",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "scoreact.cli.main", *words, "--minutes", "5"], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as here: two threads add in another order
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:1] == ["100"]:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume-or-start goes on" in said
    saved = int(pretraining.checkpoints(tmp_path / "mine" / "checkpoints")[0].name)
    parts = sa.pretrain(tmp_path / "mine", path, window=8, steps=saved + 3, resume=True, progress=False)
    plan = {"width": 8, "batch_size": 16, "bfloat16": "yes" if read_about(tmp_path / "mine")["bfloat16"] else "no"}
    whole = sa.pretrain(tmp_path / "whole", path, window=8, steps=saved + 3, progress=False, **plan)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, parts.network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("make", "options", "shape"),
    [
        (lambda path: vectors(path)[0], {"labels": "kind"}, (2,)),
        (pictures, {}, (3, 8, 8)),
        (series, {"window": 8, "values": "returns"}, (2, 8)),
    ],
)
def test_a_learned_model_is_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path],
    options: dict[str, object], shape: tuple[int, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    sa.pretrain("mine", make(tmp_path), steps=3, progress=False, **SMALL, **options)
    Path("r.py").write_text(REWARD)
    small = [
        "--iterations",
        "1",
        "--batch-size",
        "8",
        "--steps",
        "4",
        "--heldout-samples",
        "8",
        "--reference-batches",
        "2",
    ]
    assert main(["train", "mine", "--reward", "r.py:first", "--no-report", *small]) == 0
    run = Path("runs/mine-001")
    assert json.loads((run / "config.json").read_text())["description"]["recipe"] == str(tmp_path / "mine")
    if not options:
        assert main(["train", "mine", "--reward", "r.py:first", "--no-report", "--option", "lora_rank=2", *small]) == 0
    assert main(["sample", str(run), "--count", "2"]) == 0
    assert main(["sample", "mine", "--no-reward", "--count", "2", "--out", "drawn"]) == 0
    assert tuple(json.loads(Path("drawn/index.json").read_text())["shape"][1:]) == shape
    with Image.open("mine/samples.png") as picture:
        assert min(picture.size) > 20
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / run), "--samples", "8"]) == 0  # from another folder
    capsys.readouterr()
    with pytest.raises(SettingError, match="mine has no option"):
        recipe_options(find_recipe(str(tmp_path / "mine")), {"width": 3})
    assert find_recipe(str(tmp_path / "mine")).build().model.shape == shape, "every option has a default"


def test_scores_see_the_class_and_samples_have_the_datas_unit(tmp_path: Path) -> None:
    model = sa.pretrain(tmp_path / "mine", series(tmp_path), window=8, steps=3, progress=False, **SMALL)
    levels = np.loadtxt(tmp_path / "series.csv", delimiter=",", skiprows=1)
    states = torch.zeros(1, 2, 8)
    # the middle of the states is that of the windows, column by column
    learned = torch.from_numpy(np.stack([levels[i : i + 8].T for i in range(101)])).float()
    torch.testing.assert_close(model.decode(states)[0], learned.mean((0, 2))[:, None].expand(2, 8))
    torch.testing.assert_close(
        model.decode(states + 1) - model.decode(states), learned.std((0, 2))[None, :, None] + 0 * states
    )


def test_looks_are_as_many_in_each_doubling() -> None:
    looks = [step for step in range(1, 2**16) if pretraining._looks_at(step)]
    assert looks[:6] == [100, 250, 500, 1000, 1500, 2000]
    for first in (2000, 4000, 8000, 16000, 32000):
        assert sum(first <= step < 2 * first for step in looks) == 4, first


def test_what_is_kept_is_the_best_of_the_held_out_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "LOOK_EVERY", 50)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "few.npy", rng.normal(size=(24, 2)).astype(np.float32))
    said: dict[str, dict] = {}
    sa.pretrain(
        tmp_path / "mine", tmp_path / "few.npy", steps=250, progress=False, width=64, batch_size=64, bfloat16="no",
        learning_rate=3e-3, on_event=lambda kind, line: said.update({kind: dict(line)}),
    )  # fmt: skip
    lines = {line["step"]: line["loss/heldout"] for line in read_lines(tmp_path / "mine" / "metrics.jsonl")}
    best = min(lines, key=lambda step: lines[step])
    assert said["finished"]["rising"]
    assert lines[250] > 1.02 * lines[best]
    assert said["finished"]["kept"] == read_about(tmp_path / "mine")["step"] == best < 250


def test_the_precision_is_measured_where_there_is_a_choice(tmp_path: Path) -> None:
    sa.pretrain(tmp_path / "mine", pictures(tmp_path), steps=1, progress=False, width=8, batch_size=16)
    about = read_about(tmp_path / "mine")
    assert ("examples_per_second" in about) == (bfloat16_pays() or torch.cuda.is_available())
    if "examples_per_second" in about:
        speed = about["examples_per_second"]
        assert about["bfloat16"] == (speed["bfloat16"] > 1.1 * speed["float32"])
    else:
        assert about["bfloat16"] is False


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    path = pictures(tmp_path)
    out = tmp_path / "mine"
    sa.pretrain(out, path, steps=2, progress=False, **SMALL)
    with pytest.raises(RunExists, match="is not empty; give a new name, or go on"):
        sa.pretrain(out, path, steps=2, progress=False)
    with pytest.raises(RunError, match=r"another seed \(0\); give the same"):
        sa.pretrain(out, path, steps=3, progress=False, resume=True, **{**SMALL, "seed": 1})
    with pytest.raises(RunError, match="begun with other data"):
        sa.pretrain(out, path, labels=True, steps=3, progress=False, resume=True)
    with pytest.raises(RunError, match=r"go on with `scoreact pretrain .* --resume-or-start`"):
        source_of_run(out)
    with pytest.raises(SettingError, match="holds no checkpoint"):
        sa.pretrain(tmp_path / "none", path, steps=3, progress=False, resume=True)
    tensors = read_tensors(out / "model.safetensors")
    write_tensors(out / "model.safetensors", {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(RunError, match=r"is not the file that model\.json beside it names"):
        read_model(out)
    about = json.loads((out / "model.json").read_text())
    (out / "model.json").write_text(json.dumps({**about, "network": {"class": "os.system"}}))
    with pytest.raises(RunError, match=r"no description of a model of format 1 \(KeyError"):
        find_recipe(str(out))


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"width": 12}, "multiple of 8"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"bfloat16": "maybe"}, "known: auto, yes, no"),
        ({"widht": 8}, "unknown setting 'widht'"),
        ({"minutes": 0.0}, "minutes is 0.0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_unusable_plans_are_refused_before_a_folder_is_made(tmp_path: Path, plan: dict, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        sa.pretrain(tmp_path / "mine", pictures(tmp_path), progress=False, **plan)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("pretrain plain --data own.npz", "plain is the name of a ready-made run"),
        ("check data own.npz --window 5", "makes series of a table's rows"),
        ("check reward r.py:first --labels", "--labels does nothing without --data"),
        ("check reward r.py:first --data own.npz --recipe plain", "both give samples"),
        ("check run own.npz --labels", "--labels does nothing without"),
        ("pretrain a:b --data own.npz", "without a colon"),
        ("pretrain mine --data own.npz --values returns", "--values does nothing without --window"),
        ("pretrain mine --data own.npz --label-dropout 0.2", "--label-dropout does nothing without --labels"),
        ("pretrain mine --data nothing", "nothing does not exist"),
        ("pretrain", "arguments are required: NAME"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    monkeypatch.chdir(pictures(tmp_path).parent)
    Path("r.py").write_text(REWARD)
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said


def test_the_data_and_a_reward_on_them_are_looked_at_before_anything_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pictures(tmp_path).parent)
    assert main(["check", "data", "own.npz", "--labels"]) == 0
    said = capsys.readouterr().out
    about = about_model(read_data("own.npz", labels=True))
    size = sum(p.numel() for p in make_network(about).parameters())
    assert "fine: 36 pictures of 3 x 8 x 8 to learn from, 4 held out." in said
    assert "2 classes: 0 " in said
    assert f"UNet, {size:,} parameters" in said
    Path("r.py").write_text("def share(samples):\n    return samples.mean((1, 2, 3))\n")
    assert main(["check", "reward", "r.py:share", "--data", "own.npz", "--samples", "36"]) == 0
    mean = read_data("own.npz").train.floats().mean()
    found = re.search(r"mean ([\d.]+)", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(mean), abs=1e-3)


def test_an_end_by_the_clock_comes_in_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    sa.pretrain(tmp_path / "mine", vectors(tmp_path)[0], minutes=0.02, progress=False, **SMALL)
    assert time.monotonic() - begin < 30
    assert read_about(tmp_path / "mine")["seconds"] >= 1.2
