"""CONTRIBUTING's rule does what the page says, and what is wrong with one is said. (`test_pages.py` runs the page itself.)"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from scoreact.cli import main as cli

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = {re.match(r"# (\w+\.py)\n", block)[1]: block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}  # type: ignore[index]
COMMANDS = re.findall(r"^    scoreact (.*)$", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the page's files."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(start: str) -> list[str]:
    """The page's command that starts so."""
    return shlex.split(next(line for line in COMMANDS if line.startswith(start)))


def test_the_rule_trains(folder: Path) -> None:
    command = words("train gaussian --algorithm reinforce.py:Reinforce")
    assert cli.main([*command, "--batch-size", "64", "--heldout-samples", "200", "--out", "run"]) == 0
    content = json.loads((folder / "run" / "config.json").read_text())["config"]
    assert content["rule"] == {"ratio_weight": 1.0}
    assert content["learning_rate"] == 3e-4, "the rule's own default"
    assert json.loads((folder / "run" / "result.json").read_text())["final"]["objective/recovered"] > 0.1
    assert cli.main(["resume", "run"]) == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gone.py:Rule", "algorithm file 'gone.py' does not exist (looked in "),
        ("reinforce.py:Rainforce", "reinforce.py has no 'Rainforce'. Did you mean 'Reinforce'? It has: Reinforce."),
        ("reinforce.py:setting", "expected a subclass of scoreact.algorithms.Rule"),
        ("broken.py:Rule", "broken.py cannot be run: SyntaxError: "),
        ("empty.py:Empty", "has no prepare and no loss of its own"),
        ("clash.py:Clash", "has a setting 'steps', which is one of the run; give it another name."),
    ],
)
def test_a_rule_that_cannot_be_used(spec: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.py").write_text("def x(:\n")
    (folder / "empty.py").write_text("from scoreact.algorithms import Rule\n\n\nclass Empty(Rule):\n    pass\n")
    text = FILES["reinforce.py"].replace("ratio_weight: float = setting(1.0", "steps: float = setting(1.0")
    (folder / "clash.py").write_text(text.replace("Reinforce", "Clash"))
    assert cli.main(["train", "gaussian", "--algorithm", spec, "--out", "run"]) == 2
    assert said in capsys.readouterr().err
