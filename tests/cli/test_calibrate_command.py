"""`scoreact calibrate`: its words, its table and its exit status."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from scoreact.cli.main import main

SMALL = (
    "--tolerance 0.2 --samples 100 --rounds 2 --iterations 1 --batch-size 16 --steps 3 --heldout-samples 16 "
    "--reference-batches 1 --value-steps 1 --value-first-steps 1 --option width=8 --no-report --device cpu"
)


def test_from_words_to_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text("def first(x):\n    return x[:, 0]\ndef both(x):\n    return x.square()\n")
    words = "--statistic my.py:first --target -1.5 --statistic my.py:both --target 2,3 --also my.py:first "
    words += "--solver euler_maruyama"
    assert main(shlex.split(f"calibrate gaussian {words} --out run {SMALL}")) == 1, "not reached"
    printed = capsys.readouterr().out
    assert "round 1  lambda" in printed
    assert printed.count("3 steps of euler_maruyama on the grid uniform draw") == 1
    assert main(shlex.split(f"calibrate gaussian {words} --out run --resume-or-start {SMALL}")) == 1
    assert capsys.readouterr().out.strip() in printed, "the outcome of one that has ended"
    assert main(shlex.split(f"calibrate gaussian {words} --out run --resume-or-start {SMALL} --seed 1")) == 2
    assert "was begun with something else: seed 0 -> 1" in capsys.readouterr().err
    assert [row["target"] for row in json.loads(Path("run/calibration.json").read_text())["statistics"]] == [-1.5, 2, 3]
    described = json.loads(Path("run/config.json").read_text())["description"]
    assert described["command"].startswith("scoreact calibrate gaussian")
    assert described["reward_options"]["statistics"] == [
        f"{tmp_path.resolve()}/my.py:{name}" for name in ("first", "both")
    ]
    assert main(shlex.split("sample run --count 2 --out drawn")) == 0
    assert (
        main(shlex.split(f"calibrate run --statistic my.py:first --target 1 {SMALL.replace('--option width=8', '')}"))
        == 1
    )
    assert json.loads(Path("runs/gaussian-001/config.json").read_text())["description"]["start"]["reference"] == "tuned"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--target 1", "no --statistic is given"),
        ("--statistic a.py:f", "1 of --statistic and 0 of --target"),
        ("--statistic a.py:f --target x", "expected a number"),
        ("--statistic a.py:f --target 1", "a.py"),
        ("--statistic a.py:f --target 1 --resume-or-start", "--resume-or-start needs --out"),
        ("--statistic brightness --target 1 --kl-weight 2", "unknown option --kl-weight"),
    ],
)
def test_words_that_are_refused(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "gaussian", *shlex.split(words)]) == 2
    assert text in capsys.readouterr().err
