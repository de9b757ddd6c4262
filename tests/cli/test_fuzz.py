"""Command lines, settings files and prompt files at random: a sentence or what was asked for, and nothing in between.

10,000 of them: `pytest -m slow tests/cli/test_fuzz.py -s` prints how many were taken and how many refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import string
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scoreact.algorithms.registry import rules
from scoreact.cli.main import COMMANDS, main
from scoreact.cli.parser import Parser
from scoreact.recipes.prompts import read_prompts
from scoreact.support.errors import SettingError
from scoreact.support.settings import fields_of
from scoreact.training.config import Config, rule_fields

pytestmark = pytest.mark.slow
LINES, FILES, PROMPTS, RUNS = (int(n) for n in os.environ.get("SCOREACT_FUZZ", "6000 2000 1800 200").split())  # 10,000
COUNTS: Counter[str] = Counter()
TINY = {"iterations": "1", "batch-size": "4", "steps": "2", "reference-batches": "1", "heldout-samples": "4", "device": "cpu",
        "value-steps": "1", "value-first-steps": "1", "value-batch-size": "4", "minibatch-size": "8", "kl-states": "4",
        "epochs": "1"}  # fmt: skip


def fuzz(count: int) -> Any:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # to make a failing case smaller takes minutes
    )


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    print(f"\nfuzzed: {sum(COUNTS.values())}; " + ", ".join(f"{n} {what}" for what, n in sorted(COUNTS.items())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a run, files of a user's, and folders."""
    path, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    os.chdir(path)
    (path / "mine.py").write_text(
        "def reward(x):\n    return x[:, 0]\ndef make():\n    return reward\ndef broken(x):\n    raise KeyError(x)\n"
        "async def late(x):\n    return x\nnumber = 3\n"
    )
    (path / "prompts.txt").write_text("a\nb\n")
    (path / "some.yaml").write_text("steps: 3\n")
    (path / "folder").mkdir()
    words = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    assert main(["train", "gaussian", "--option", "width=4", *words, "--out", "run"]) == 0
    yield path
    os.chdir(before)


# --- what a user may type ------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 20).map(str), st.floats(-2, 2).map(str), st.integers(-(2**70), 2**70).map(str), st.floats().map(str),
    st.sampled_from(["1e-4", "1e400", "nan", "inf", "-0", "0x10", "1_000", "²", "1,5", "1.", "+3", " 3", "½"]),
)  # fmt: skip
odd = ["", " ", "-", "--", "=", ":", "a:b", "\0", "a\nb", "é", "\ud800", "~", "/", ".", "..", "a" * 5000, "null"]
texts = st.one_of(st.text(max_size=12), st.text(string.printable, max_size=12), st.sampled_from(odd))
WORDS = (
    "gaussian|plain|nope|run|folder|mine.py|mine.py:reward|mine.py:make|mine.py:broken|mine.py:late|mine.py:number|"
    "nothing.py:x|os:path|json:dumps|prompts.txt|some.yaml|a cat|run/config.json|ctrl|ddpo|draft|ode|ddim|quadratic|linear|"
    "onnx:x|http://127.0.0.1:1|http://|a=b|width=4|dim=0|dim=2|dim=-1|width=1e9|components=0|seed=-1|width=[|model"
)
named = st.sampled_from(WORDS.split("|"))
values = st.one_of(numbers, texts, named)


def parser_of(command: str) -> Parser:
    parser = Parser(command, "")
    COMMANDS[command].arguments(parser)
    return parser


ACTIONS = {command: parser_of(command)._actions for command in COMMANDS}
FIELDS = {f.name: (f, hint) for record in (Config, *rules().values()) for f, hint in fields_of(record)}


def value_of(action: argparse.Action) -> st.SearchStrategy[str]:
    """A word that is likely right, or any."""
    name = action.dest.removeprefix("setting:")
    if name in FIELDS:
        return st.one_of(right(name), values)
    if action.type is not None and action.metavar in ("INT", "FLOAT"):
        return st.one_of(st.integers(1, 6).map(str), numbers)
    if action.choices:
        return st.one_of(st.sampled_from(list(map(str, action.choices))), values)
    return values


def right(name: str) -> st.SearchStrategy[str]:
    """A value that the setting takes, as text."""
    f, hint = FIELDS[name]
    known = (
        typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal
        else f.metadata["known"] and f.metadata["known"]()
    )
    if known:
        return st.sampled_from([str(k) for k in known])
    if hint is bool:
        return st.sampled_from(["true", "false", "True", "yes", "off", "1"])
    if hint is int:
        return st.integers(max(int(f.metadata["low"]), -1) if f.metadata["low"] > -math.inf else 0, 9).map(str)
    if hint is float:
        low = f.metadata["low"] if f.metadata["low"] > -math.inf else 0
        return st.floats(low, min(f.metadata["high"], low + 1)).map(lambda x: f"{x:.3g}")
    return values


@st.composite
def lines(draw: Any) -> list[str]:
    command = draw(
        st.sampled_from(["train"] * 4 + ["sample", "evaluate", "check", "report", "export", "resume", "bench", "tune"])
    )
    options = [action for action in ACTIONS[command] if action.option_strings]
    words = [command]
    if command == "check":
        words.append(draw(st.sampled_from(["reward", "model", "recipe", "run", "x"])))
    if command not in ("bench", "tune"):
        words.append(draw(st.one_of(*[st.just("gaussian" if command == "train" else "run")] * 3, values)))
    for action in draw(st.lists(st.sampled_from(options), max_size=4)) if options else ():
        words.append(draw(st.sampled_from(action.option_strings)))
        if action.nargs != 0:
            words.append(draw(value_of(action)))
    if draw(st.integers(0, 9)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(values))
    if command == "train":
        words.append("--print-config")
    return words


def said(words: list[str]) -> tuple[int, str, str]:
    """Status, and what stood on the two streams, of a command that must end in a sentence."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main(words)
    text = err.getvalue()
    assert status in (0, 1, 2), words
    assert "Traceback" not in text, words
    assert "scoreact: unexpected " not in text.replace("unexpected word", ""), (words, text)
    if status:
        lines = [line for line in text.splitlines() if line.startswith("scoreact: ")]
        found = "problem" in out.getvalue()
        assert len(lines) == 1 or found, (words, text)
        assert found or lines[0].endswith((".", "?", "!", "`")), (words, text)
    COUNTS[f"{words[0] if words[0] in COMMANDS else 'other'} {'taken' if status == 0 else 'refused'}"] += 1
    return status, out.getvalue(), text


def small(words: list[str]) -> bool:
    """Whether a command costs little where it is taken: the run has a few weights."""
    if words[0] in ("bench", "tune"):
        return "--table" in words  # the others train for minutes
    if words[0] in ("train", "report", "export"):
        return True
    numbers = [float(word) for word in words if word.isascii() and word.replace(".", "", 1).isdigit()]
    return max(numbers, default=0) <= 20 and "plain" not in words


@fuzz(LINES)
@given(words=lines())
def test_command_lines(folder: Path, words: list[str]) -> None:
    if not small(words):
        words = [words[0], "--no-such-option", *words[1:]]
    status, out, _ = said(words)
    if status == 0 and words[0] == "train" and "--help" not in words and "-h" not in words:
        printed = yaml.safe_load(out)
        for option, value in itertools.pairwise(words):  # what was given is what is used
            name = option.removeprefix("--").replace("-", "_")
            if option.startswith("--") and name in FIELDS and name != "algorithm":
                assert same(printed[name], value), (words, printed[name])


def same(found: Any, given: str) -> bool:
    if isinstance(found, bool):
        return str(found).lower() == given.lower()
    if isinstance(found, int | float):
        return float(found) == float(given)
    return str(found) == given or os.path.basename(str(found)) == os.path.basename(given)


# --- files ---------------------------------------------------------------------------------------------------------------

PARTS = ["rule", "options", "reward", "reward_options", "config", "description"]
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.integers(), st.floats(), texts, named)
contents = st.recursive(
    scalars, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(texts, x, max_size=3)), max_leaves=5
)
keys = st.one_of(st.sampled_from(sorted(FIELDS)), st.sampled_from(PARTS), texts)


@st.composite
def files(draw: Any) -> tuple[str, bytes]:
    """A name and its bytes: settings as YAML or JSON, likely right ones among them, whole, cut or damaged."""
    ending = draw(st.sampled_from([".yaml", ".json", ".yml", ""]))
    content: Any = {}
    for key in draw(st.lists(keys, max_size=4)):
        content[key] = draw(st.one_of(right(key).map(yaml_value), contents)) if key in FIELDS else draw(contents)
    if draw(st.integers(0, 4)) == 0:
        content = {
            "config": content,
            "description": draw(st.one_of(contents, st.just({"recipe": "gaussian", "options": {}}))),
        }
    if draw(st.integers(0, 9)) == 0:
        content = draw(contents)
    text = (
        json.dumps(content) if ending == ".json" or draw(st.booleans()) else yaml.safe_dump(content, allow_unicode=True)
    )
    data = text.encode("utf-8", "surrogatepass")
    damage = draw(st.integers(0, 9))
    if damage == 0:
        data = data[: draw(st.integers(0, len(data)))]
    elif damage == 1:
        data = draw(st.binary(max_size=40))
    elif damage == 2:
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(min_size=1, max_size=3)) + data[place:]
    return f"fuzzed{ending}", data


def yaml_value(text: str) -> Any:
    """What a user who means this value writes into a file."""
    return yaml.safe_load(text) if text.isascii() and text.replace(".", "").replace("-", "").isalnum() else 1


@fuzz(FILES)
@given(file=files())
def test_settings_files(folder: Path, file: tuple[str, bytes]) -> None:
    (folder / file[0]).write_bytes(file[1])
    status, out, _ = said(["train", "gaussian", "--config", file[0], "--print-config"])
    if status == 0:
        printed, asked = yaml.safe_load(out), yaml.safe_load(file[1].decode("utf-8-sig"))
        for name, value in (asked or {}).items():
            if name in FIELDS and not isinstance(asked.get("config"), dict):
                assert printed[name] == value or str(printed[name]) == str(value) or same(printed[name], str(value)), (
                    asked,
                    printed,
                )


@st.composite
def prompt_files(draw: Any) -> tuple[str, bytes]:
    ending = draw(st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".lst", ""]))
    rows = draw(
        st.lists(
            st.dictionaries(st.one_of(st.sampled_from(["prompt", "Prompt", "tag"]), texts), contents, max_size=3),
            max_size=4,
        )
    )
    kind = draw(st.sampled_from(["text", "jsonl", "json", "csv", "tsv", "bytes"]))
    if kind == "text":
        return ending, "\n".join(draw(st.lists(texts, max_size=4))).encode("utf-8", "surrogatepass")
    if kind == "jsonl":
        return ending, "\n".join(map(json.dumps, rows)).encode()
    if kind == "json":
        return ending, json.dumps(rows).encode()
    if kind == "bytes":
        return ending, draw(st.binary(max_size=60))
    delimiter = "," if kind == "csv" else "\t"
    table = [["prompt", "tag"], *draw(st.lists(st.lists(texts, min_size=1, max_size=3), max_size=4))]
    return ending, "\n".join(delimiter.join(row) for row in table).encode("utf-8", "surrogatepass")


@fuzz(PROMPTS)
@given(file=prompt_files())
def test_prompt_files(folder: Path, file: tuple[str, bytes]) -> None:
    path = folder / f"fuzzed_prompts{file[0]}"
    path.write_bytes(file[1])
    found, error = None, ""
    try:
        found = read_prompts(path)
    except SettingError as caught:
        error = str(caught)
    if found is None:
        assert str(path) in error
        COUNTS["prompts refused"] += 1
        return
    COUNTS["prompts taken"] += 1
    assert found
    assert all(prompt == prompt.strip() and prompt and "\0" not in prompt for prompt in found)
    if file[0] in (".txt", ".lst", ""):
        kept = [
            line.strip() for line in file[1].decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        ]
        assert list(found) == list(dict.fromkeys(line for line in kept if line))


@fuzz(RUNS)
@given(data=st.data())
def test_runs_with_settings_that_are_taken(folder: Path, data: Any) -> None:
    """Trained, with a few weights: what `train` takes it also runs, or says why not."""
    number = sum(COUNTS.values())
    name = data.draw(st.sampled_from(sorted(rules())))
    own = [f.name for f, _ in rule_fields(name)]
    words = ["train", "gaussian", "--option", "width=4", "--algorithm", name, "--out", f"runs/{number}"]
    for option in data.draw(st.lists(st.sampled_from(["dim", "components", "mixture_seed"]), max_size=1)):
        words += ["--option", f"{option}={data.draw(st.sampled_from([0, -1, 1, 3, 2**64, 1.5, 'nan']))}"]
    picked = data.draw(
        st.lists(st.sampled_from([*own, *(f.name for f, _ in fields_of(Config))]), max_size=3, unique=True)
    )
    for setting in picked:
        if setting not in ("algorithm", "device"):
            words += [f"--{setting.replace('_', '-')}", data.draw(right(setting))]
    for option, value in TINY.items():
        if option.replace("-", "_") not in picked and Config().uses(option.replace("-", "_")):
            words += [f"--{option}", value]
    said(words)
