"""Options of the command line: one given twice and one that would do nothing are refused, of every command alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from scoreact.cli.main import COMMANDS, main
from scoreact.cli.parser import Once, Parser, assignments, positive, whole
from scoreact.support.errors import SettingError
from scoreact.training.config import read


def parser_of(command: str) -> Parser:
    parser = Parser(command, "")
    COMMANDS[command].arguments(parser)
    return parser


OPTIONS = [
    (command, action)
    for command in COMMANDS
    for action in parser_of(command)._actions
    if action.option_strings and isinstance(action, Once)
]


@pytest.mark.parametrize(("command", "action"), OPTIONS, ids=lambda x: x if isinstance(x, str) else x.option_strings[0])
def test_an_option_given_twice_is_refused(command: str, action: Once) -> None:
    value = str(next(iter(action.choices))) if action.choices else "24"
    words = [action.option_strings[0], value, action.option_strings[-1], value]
    shown = f"{float(value):g}" if action.type in (float, positive) else value
    with pytest.raises(
        ValueError, match=rf"{action.option_strings[-1]} is given twice, {shown}.* and {shown}.*; give it"
    ):
        parser_of(command).parse([*["x"] * 2, *words])
    assert len(OPTIONS) > 120, "every setting of every rule among them"


def test_the_rewards_of_a_user_who_wants_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gaussian", "--reward", "a.py:f", "--reward", "b.py:g"]) == 2
    assert "--reward is given twice, a.py:f and b.py:g" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--option width is given twice"):
        assignments(["width=1", "height=2", "width=3"], "--option")
    assert assignments(["a=1e-3", "b=[1", "c=x: y: z", "d=a: b"], "--option") == {
        "a": "1e-3", "b": "[1", "c": "x: y: z", "d": {"a": "b"}
    }  # fmt: skip
    assert assignments(["a=no", "b=12", "c=", "d='x: y'", "e=no"], "--option", "abcd") == {
        "a": "no", "b": "12", "c": "", "d": "x: y", "e": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "r", "--strength", "2"], "--strength does nothing without --steer value or interpolate"),
        (["sample", "r", "--steer", "smc", "--strength", "2"], "--strength does nothing without --steer value or"),
        (
            ["sample", "r", "--steer", "value", "--particles", "2"],
            "--particles does nothing without --steer best_of or",
        ),
        (["sample", "r", "--prompt-column", "x"], "--prompt-column does nothing without --prompts"),
        (["sample", "gaussian", "--weights", "best"], "--weights best is of a run's tuned model"),
        (["sample", "gaussian", "--steer", "smc", "--no-reward"], "--no-reward is for samples that are not steered"),
        (
            ["sample", "gaussian", "--solver", "ode", "--noise-level", "1"],
            "noise_scale is 1, but solver ode has no noise",
        ),
        (["sample", "gaussian", "--prompts", "a b", "--prompt-column", "x"], "--prompt-column x is of a table"),
        (["sample", "gaussian", "--seed", str(2**32)], "expected a whole number of at most 4294967295"),
        (["sample", "gaussian", "--seed", "²"], "expected a whole number of at least 0, got '²'"),
        (["sample", "gaussian", "--count", "9" * 5000], "expected a whole number of at least 1"),
        (["check", "run", "r", "--samples", "3"], "--samples does nothing without `scoreact check reward or recipe`"),
        (["check", "model", "gaussian", "--gradient"], "--gradient does nothing without `scoreact check reward or"),
        (["check", "recipe", "gaussian", "--recipe", "x"], "--recipe does nothing without `scoreact check reward`"),
        (["check", "run", "r", "--option", "a=1"], "--option does nothing without `scoreact check reward or model"),
        (["train", "gaussian", "--from-reference", "first"], "--from-reference does nothing without --from"),
        (
            ["train", "gaussian", "--seed", str(2**32)],
            "seed is 4294967296; it must be at least 0 and at most 4294967295",
        ),
        (
            ["train", "gaussian", "--option", "dim=0"],
            "option dim of recipe gaussian is 0; expected a whole number from 1",
        ),
        (
            ["train", "gaussian", "--option", "mixture_seed=-1"],
            "option mixture_seed of recipe gaussian is -1; expected a whole",
        ),
        (
            ["check", "recipe", "gaussian", "--option", f"mixture_seed={2**64}"],
            "expected a whole number from 0 to 4294967295",
        ),
        (["train", "series", "--option", "pin=nan"], "option pin of recipe series is nan; expected a finite number"),
        (["train", "gaussian", "--seed", "1000003"], "seed 1000003 is that of the noise that evaluations keep"),
    ],
)
def test_what_would_do_nothing_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_setting_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 3\nseed: 1\nsteps: 4\n")
    with pytest.raises(SettingError, match=r"a\.yaml.* the key 'steps' stands there twice"):
        read(tmp_path / "a.yaml")


def test_whole_numbers() -> None:
    assert whole(0)("+3") == 3
    with pytest.raises(Exception, match="at least 0, got '--3'"):
        whole(0)("--3")


def test_numbers_with_commas_may_begin_below_0() -> None:
    words = [
        "gaussian",
        "--statistic",
        "my.py:two",
        "--target",
        "-0.08,0.5",
        "--statistic",
        "my.py:one",
        "--target",
        "-1e-3",
    ]
    assert parser_of("calibrate").parse(words).target == [[-0.08, 0.5], [-0.001]]
    with pytest.raises(ValueError, match="--target needs a value"):
        parser_of("calibrate").parse(["gaussian", "--statistic", "my.py:two", "--target", "--rounds", "2"])
