"""What was written is what is read: damage to weights and edits of what a run depends on are told, and never trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scoreact import finetune
from scoreact.algorithms.dpo import read_pairs, write_pairs
from scoreact.cli import main as cli
from scoreact.cli import running
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.gaussian import mixture
from scoreact.runs.checkpoint import look_at_weights
from scoreact.runs.resuming import named_files
from scoreact.support.errors import RunError, SettingError
from scoreact.support.files import check_sums, read_lines, read_stored, read_tensors, write_sums, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64), "c": torch.zeros(0)}
WORDS = ["--iterations", "2", "--batch-size", "16", "--heldout-samples", "8", "--algorithm", "ddpo", "--device", "cpu",
         "--option", "width=8", "--checkpoint-every", "1", "--evaluate-every", "1"]  # fmt: skip


def test_every_byte_of_a_weight_file_counts(tmp_path: Path) -> None:
    """One bit of any byte turned: told, or (in a name of the header's that nobody reads) without effect."""
    path = tmp_path / "w.safetensors"
    write_tensors(path, TENSORS, {"made_by": "us"})
    tensors, header = read_stored(path)
    assert all(torch.equal(tensors[name], x) for name, x in TENSORS.items())
    assert header["made_by"] == "us"
    assert load_file(path).keys() == TENSORS.keys()  # as any other program reads it
    content, said = path.read_bytes(), list[str]()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found, _ = read_stored(path)
        except RunError as error:
            said.append(str(error))
        else:
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], x) for name, x in tensors.items())
    assert len(said) > 0.9 * len(content)
    assert all(str(path) in text and text.endswith("Restore a copy of it.") for text in said)


def test_files_without_a_digest_are_read_as_ever(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors")
    assert read_tensors(tmp_path / "old.safetensors")["a"].tolist() == [1, 1]


def test_damaged_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_pairs(path, torch.ones(2, 3), torch.zeros(2, 3), ["a", "b"])
    assert read_pairs(path)[2] == ["a", "b"]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x40")
    with pytest.raises(SettingError, match=r"pairs_file .* is damaged: its tensors are not those that were written"):
        read_pairs(path)


def test_what_another_library_wrote_has_its_digests_beside_it(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "unet" / "w.safetensors")
    check_sums(tmp_path)  # nothing is known
    write_sums(tmp_path)
    check_sums(tmp_path)
    for harm in (lambda p: save_file({"a": torch.zeros(2)}, p), Path.unlink):
        harm(tmp_path / "unet" / "w.safetensors")
        with pytest.raises(RunError, match=r"w\.safetensors is damaged or missing"):
            check_sums(tmp_path)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a reward of the user's, in a folder beside it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "r.py").write_text("def first(x):\n    return x[:, 0]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "write_report", lambda source: 0)  # as good, and dear
        words = ["train", "gaussian", *WORDS, "--reward", f"{folder}/r.py:first", "--out", str(folder / "run")]
        assert cli.main(words) == 0
    return folder


@pytest.fixture
def run(made: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of it as it was before its last iteration; the reward is put right again in the end."""
    monkeypatch.setattr(running, "write_report", lambda source: 0)
    copy = made / "copy"
    shutil.copytree(made / "run", copy)
    shutil.rmtree(copy / "checkpoints" / "00000002")
    for name in ("model.safetensors", "result.json"):
        (copy / name).unlink()
    reward = (made / "r.py").read_text()
    yield copy
    (made / "r.py").write_text(reward)
    shutil.rmtree(copy)


def edit_config(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((run / "config.json").read_text())
    change(content)
    (run / "config.json").write_text(json.dumps(content))


def of_reward(run: Path) -> None:
    (run.parent / "r.py").write_text("def first(x):\n    return -x[:, 0]\n")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (of_reward, "r.py was edited"),
        (lambda run: edit_config(run, lambda c: c["config"].update(learning_rate=0.5)),
         "learning_rate of config.json was edited (0.002 -> 0.5)"),
        (lambda run: edit_config(run, lambda c: c["description"]["options"].update(reward="linear")),
         "options of config.json was edited ({"),
        (lambda run: edit_config(run, lambda c: c["description"].update(reward=None)),
         "reward of config.json was edited ("),
    ],
    ids=["reward", "settings", "options", "reward's name"],
)  # fmt: skip
def test_a_run_does_not_go_on_with_something_else(
    run: Path, edit: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run)
    assert cli.main(["resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"scoreact: since the last checkpoint of {run} was made, ")
    assert said in err
    assert err.endswith("or go on all the same with --accept-changes (accept_changes=True).\n")
    assert cli.main(["resume", str(run), "--accept-changes"]) == 0
    notes = [line["text"] for line in read_lines(run / "metrics.jsonl") if line.get("guard") == "note"]
    assert any(said in text and text.endswith("and the run goes on with it.") for text in notes)
    capsys.readouterr()
    assert cli.main(["resume", str(run)]) == 0  # what was accepted is what is kept


def test_from_python_a_run_goes_on_after_an_edit_where_it_is_told_to(tmp_path: Path) -> None:
    def train(**more: Any) -> Any:
        torch.manual_seed(0)
        model = ResidualModel(mixture(2, 3, 0), 2, width=8)
        return finetune(model, f"{tmp_path / 'r.py'}:first", [""], out=tmp_path / "run", batch_size=16, steps=3, device="cpu",
                        reference_batches=1, heldout_samples=16, report=False, **more)  # fmt: skip

    (tmp_path / "r.py").write_text("def first(x):\n    return x[:, 0]\n")
    train(iterations=1)
    (tmp_path / "r.py").write_text("def first(x):\n    return -x[:, 0]\n")
    with pytest.raises(ValueError, match=r"r\.py was edited"):
        train(iterations=2, resume=True)
    assert train(iterations=2, resume=True, accept_changes=True).history[-1]["iteration"] == 2
    assert not (tmp_path / "run" / "report.html").exists()


def test_nothing_edited_nothing_said(run: Path, made: Path) -> None:
    assert cli.main(["resume", str(run)]) == 0
    assert not [line for line in read_lines(run / "metrics.jsonl") if line.get("guard") == "note"]
    one, other = load_file(run / "model.safetensors"), load_file(made / "run" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_files_are_found_wherever_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("r.py", "net.onnx", "p.txt", "w.bin", "rule.py", "m.py", "cat"):
        Path(name).write_text(name)
    described = {
        "recipe": f"{tmp_path}/m.py:build", "reward": "r.py:f@/usr/bin/python3", "algorithm": "rule.py:Mine",
        "options": {"prompts": str(tmp_path / "p.txt"), "more": ["onnx:net.onnx", 3, None, "x" * 5000, "a\0b"]},
        "reward_options": {"weights": "w.bin"}, "prompts": ["cat"], "command": "cat",
    }  # fmt: skip
    wanted = {str(tmp_path / name) for name in ("r.py", "net.onnx", "p.txt", "w.bin", "rule.py", "m.py")}
    assert named_files(described).keys() == wanted
    assert __file__ in named_files({"reward": f"{__name__}:f"})


def test_check_run_looks_at_every_weight(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    assert cli.main(["check", "run", str(run)]) == 0
    assert "fine: 3 files of weights are whole and finite." in capsys.readouterr().out
    best = run / "best" / "model.safetensors"
    tensors = read_tensors(best)
    write_tensors(best, {name: x / 0 for name, x in tensors.items()})
    kept = run / "reference.safetensors"
    content = kept.read_bytes()
    kept.write_bytes(content[:-2] + b"\x41\x42")
    save_file(tensors, run / "theirs.safetensors")
    found = look_at_weights(run)
    assert found[0].startswith(f"problem: {best} holds NaN or inf in {len(tensors)} of its tensors, such as ")
    assert found[1].startswith(f"problem: {kept} is damaged: ")
    assert found[2] == "note: theirs.safetensors came without a digest, so damage to it cannot be noticed."
    assert cli.main(["check", "run", str(run)]) == 1
