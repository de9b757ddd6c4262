"""docs/howto/migrating-from-trl.md: its files and its command run as they stand there, on a tiny pipeline."""

from __future__ import annotations

import json
import random
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreact.cli import main as cli
from scoreact.recipes.pipeline import build
from scoreact.recipes.prompts import drawn_prompts

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tiny_pipelines import make, spelling_tokenizer  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "migrating-from-trl.md").read_text(encoding="utf-8")
FILES = {re.match(r"# (\w+\.py)", block)[1]: block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}  # type: ignore[index]
SHORT = shlex.split(
    "--iterations 1 --batch-size 6 --steps 2 --reference-batches 1 --heldout-samples 4 --device cpu "
    "--minibatch-size 12 --option lora_rank=2 --option guidance_scale=1.0"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the page's files and a tiny pipeline."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    make("sd", spelling_tokenizer()).save_pretrained(tmp_path / "my-pipeline")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_trains_by_the_functions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reward saw its own prompt's metadata; the run resumes from elsewhere and leaves what plain diffusers loads."""
    line = next(line for line in PAGE.splitlines() if line.startswith("    scoreact train ./my-pipeline"))
    text = FILES["my_task.py"].replace("    scores =", "    record(prompts, metadata)\n    scores =")
    text += '\n\ndef record(prompts, metadata):\n    with open("seen.jsonl", "a") as file:\n'
    text += '        print(__import__("json").dumps(list(zip(prompts, metadata))), file=file)\n'
    (folder / "my_task.py").write_text(text)
    assert cli.main([*shlex.split(line)[1:], *SHORT]) == 0
    seen = [tuple(pair) for row in (folder / "seen.jsonl").read_text().splitlines() for pair in json.loads(row)]
    channels = {"a photo of a cat": 0, "a photo of a dog": 2, "a photo of a bird": 1}
    assert {prompt for prompt, _ in seen} == set(channels)
    assert all(metadata == {"channel": channels[prompt]} for prompt, metadata in seen)
    options = json.loads((folder / "tuned" / "config.json").read_text())["description"]["options"]
    assert options["prompts"] == f"{folder / 'my_task.py'}:prompt_fn"
    pipeline = make("sd", spelling_tokenizer())
    pipeline.load_lora_weights(folder / "tuned")
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.slow
def test_the_script_trains_by_the_functions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "my-pipeline", "quick"])
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    runpy.run_path("train.py")
    pipeline = make("sd", spelling_tokenizer())
    pipeline.load_lora_weights(folder / "tuned")
    final = json.loads((folder / "tuned" / "result.json").read_text())["final"]
    assert final["policy/kl"] > 0


def test_settings_named_on_the_page_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option in the table's right column and in the notes is one of `train --help`, for ddpo where it says so."""
    assert cli.main(["train", "pipeline", "--algorithm", "ddpo", "--help"]) == 0
    told = capsys.readouterr().out
    table = PAGE[PAGE.index("## Settings") :]
    for name in set(re.findall(r"(?<!\w)--[a-z][a-z-]+", table)):
        assert name in told, name
    for name in set(re.findall(r"--option (\w+)=", PAGE)):
        assert f"--option {name}=" in told, name


def test_prompts_drawn_from_a_function() -> None:
    """Each once, with its first metadata, the same every time; nobody else's random numbers change."""

    def function() -> Any:
        number = random.randrange(4) if torch.rand(()) < 0.7 else 4
        return (f"number {number}", {"number": number}) if number else "plain"

    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), float(torch.rand(()))
    random.seed(5)
    torch.manual_seed(5)
    found = drawn_prompts(function, 200)
    assert (random.random(), float(torch.rand(()))) == expected
    order = list(drawn_prompts(function, 50))
    for seed in range(3):  # whatever came before
        random.seed(seed)
        torch.manual_seed(seed)
        assert list(drawn_prompts(function, 50)) == order
    assert {**found} == {"plain": {}, **{f"number {n}": {"number": n} for n in (1, 2, 3, 4)}}
    assert len(drawn_prompts(function, 2)) <= 2


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("my_task.py:prompts_fn", "my_task.py has no 'prompts_fn'. Did you mean 'prompt_fn'"),
        ("gone.py:prompt_fn", "prompts file 'gone.py' does not exist"),
        ("wrong.py:prompt_fn", r"wrong.py:prompt_fn returned 3; expected a prompt, or a prompt and its metadata"),
    ],
)
def test_prompt_functions_that_cannot_be_used(prompts: str, said: str, folder: Path) -> None:
    (folder / "wrong.py").write_text("def prompt_fn():\n    return 3\n")
    with pytest.raises(ValueError, match=said):
        build("my-pipeline", prompts)
