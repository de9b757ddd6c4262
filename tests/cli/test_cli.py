"""The command line: its help, its sentences and statuses, and a run from `train` to `resume`. All in this process."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, rand, tensor

from scoreact import __version__
from scoreact.algorithms.registry import rules
from scoreact.api.saved_run import open_run
from scoreact.cli import main as cli
from scoreact.cli import train
from scoreact.evaluation.optimum import estimate_optimum
from scoreact.report.numbers import elapsed, rounded, share
from scoreact.report.progress import reference_lines
from scoreact.runs import session as run
from scoreact.runs.samples import Drawn, thumbnails, write_samples
from scoreact.support.files import read_lines
from scoreact.support.settings import fields_of
from scoreact.training.config import Config, rule_fields
from scoreact.types import Condition

Said = tuple[int, str, str]
TINY = ["--batch-size", "32", "--heldout-samples", "16", "--value-steps", "2", "--value-first-steps", "2",
        "--reference-batches", "1", "--option", "width=8"]  # fmt: skip

REWARDS = """
import os, signal
from pathlib import Path

def first(x):
    return x[:, 0]

def column(x):
    return x[:, :1]

def nan(x):
    return x[:, 0] * float("nan")

def broken(x):
    raise KeyError("no such thing")

calls = 0

def interrupted(x):
    global calls
    calls += 1
    for number in filter(None, os.environ.get("INTERRUPT", "").split()):
        if calls == 4:  # what could be learned, the reference, the first evaluation, then the first iteration
            os.kill(os.getpid(), int(number))
    return x[:, 0]

def fails_later(x):
    global calls
    calls += 1
    return x[:, 0] * (float("nan") if calls > 4 else 1)
"""


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """say("train", "gaussian", ...) -> (status, stdout, stderr), in an empty folder that holds rewards.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)

    def call(*words: str) -> Said:
        capsys.readouterr()
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def sentence(said: Said, status: int) -> str:
    """The one line on stderr of a call that ended with this status."""
    found, _, err = said
    assert found == status, said
    assert err.count("\n") == 1, "one sentence, one line"
    assert err.startswith("scoreact: ")
    assert err.rstrip()[-1] in ".?`"
    assert "Traceback" not in err
    return err.removeprefix("scoreact: ").rstrip()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tiny finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = subprocess.run(
        [sys.executable, "-m", "scoreact", "train", "gaussian", "--iterations", "2", *TINY, "--evaluate-every", "1",
         "--checkpoint-every", "1", "--out", str(folder)],
        capture_output=True, text=True, timeout=120, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.fixture
def a_run(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_the_overview_names_every_command(say: Callable[..., Said], words: list[str]) -> None:
    status, out, err = say(*words)
    assert (status, err) == (0, "")
    for command in ("recipes", "train", "resume", "sample", "evaluate", "report", "check", "pretrain"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(say: Callable[..., Said], command: str) -> None:
    status, out, err = say(command, "--help")
    assert (status, err) == (0, "")
    assert f"usage: scoreact {command}" in out


def test_version(say: Callable[..., Said]) -> None:
    assert say("--version") == (0, f"scoreact {__version__}\n", "")


def test_recipes_are_listed_with_their_summaries(say: Callable[..., Said]) -> None:
    status, out, _ = say("recipes")
    assert status == 0
    assert any(line.startswith("gaussian ") and "closed form" in line for line in out.splitlines())


def test_train_help_shows_every_setting_with_the_recipes_default(say: Callable[..., Said]) -> None:
    out = " ".join(say("train", "gaussian", "--help")[1].split())
    for field, _ in [*fields_of(Config), *rule_fields(Config().algorithm)]:
        assert f"--{field.name.replace('_', '-')} " in out
        # a line break may fall anywhere, even behind a hyphen
        assert field.metadata["help"].replace(" ", "") in out.replace(" ", "")
    assert "takes a step in training [default euler_maruyama]" in out, "the recipe's, not Config's ddim"
    assert "[above 0, default 0.5]" in out, "kl_weight of the recipe"
    assert "--option mixture_seed=0" in out
    assert "takes a step in training [default ddim]" in " ".join(say("train", "--help")[1].split())


def test_the_overview_does_not_import_torch() -> None:
    code = "import sys; from scoreact.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


# --- words that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tain", "unknown command 'tain'; known: recipes, train, .* Did you mean 'train'\\?"),
        ("train", "give a recipe; known: .*gaussian.*\\."),
        ("train gausian", "unknown recipe 'gausian'; known: .* Did you mean 'gaussian'\\?"),
        ("train gaussian --itertions 5", "unknown option --itertions; did you mean --iterations\\?"),
        ("train gaussian --batch_sise=5", "unknown option --batch_sise; did you mean --batch_size\\?"),
        ("train gaussian --qqqqqqqq", "unknown option --qqqqqqqq; `scoreact train --help` says more\\."),
        ("train gaussian --iter 5", "unknown option --iter; did you mean --iterations\\?"),
        ("train gaussian extra", "unexpected word 'extra'; .*"),
        ("train gaussian --batch-size", "--batch-size needs a value; .*"),
        ("train gaussian --batch-size 1", "batch_size is 1; it must be at least 2 .*"),
        ("train gaussian --batch_size many", "batch_size is 'many' \\(str\\); expected int .*"),
        ("train gaussian --batch-size 2.5", "batch_size is '2.5' \\(str\\); expected int .*"),
        ("train gaussian --learning-rate fast", "learning_rate is 'fast'; expected a number .*"),
        ("train gaussian --learning-rate=-1e-3", "learning_rate is -0.001; it must be above 0 .*"),
        ("train gaussian --solver eulr", "solver is 'eulr'; known: .* Did you mean 'euler_maruyama'\\?"),
        ("train gaussian --device tpu9", "device is 'tpu9'; known: auto, cpu, .*"),
        ("train gaussian --option dmi=3", "recipe gaussian has no option 'dmi'; known: .* Did you mean 'dim'\\?"),
        (
            "train gaussian --option dim=two",
            "option dim of recipe gaussian is 'two' \\(str\\); expected int, such as 2\\.",
        ),
        ("train gaussian --option dim", "--option got 'dim'; expected name=value\\."),
        ("train gaussian --option reward=cubic", "reward is 'cubic'; known: linear, quadratic\\."),
        ("train gaussian --config none.yaml", "config file 'none.yaml' does not exist\\. .*"),
        ("train gaussian --reward brightnes", "unknown reward 'brightnes'\\. Did you mean 'brightness'\\? .*"),
        ("train gaussian --reward none.py:f", "reward file 'none.py' does not exist .*"),
        ("train gaussian --reward rewards.py:frst", ".*/rewards.py has no 'frst'\\. Did you mean 'first'\\? .*"),
        ("train gaussian --reward-option a=1", "--reward-option needs --reward; .*"),
        ("resume", "the following arguments are required: RUN_DIR; .*"),
        ("resume nowhere", "nowhere is no run folder: it has no config.json\\."),
        ("report nowhere", "nowhere is no run folder: it has no config.json\\."),
        ("evaluate nowhere", "nowhere is no run folder: it has no config.json\\."),
        (
            "sample nowhere/else",
            "cannot open pipeline 'nowhere/else': .*Give a folder with a model_index.json, or a hub id\\.",
        ),
        ("sample gausian", "unknown recipe 'gausian'; .*"),
        ("sample gaussian --solver eulr", "unknown solver 'eulr'\\. Known: .* Did you mean 'euler_maruyama'\\?"),
        ("sample gaussian --steps 0", "argument --steps: expected a whole number of at least 1, got '0'; .*"),
        ("sample gaussian --count few", "argument --count: expected a whole number of at least 1, got 'few'; .*"),
        ("sample gaussian --weights worst", "argument --weights: invalid choice: 'worst' .*"),
        ("check", "the following arguments are required: .*"),
        (
            "check rewrd x",
            "unknown kind of check 'rewrd'; known: data, reward, model, recipe, run\\. Did you mean 'reward'\\?",
        ),
        ("check recipe gausian", "unknown recipe 'gausian'; .*"),
        ("pretrain juge", "scoreact pretrain juge needs --data, .* Did you mean 'judge'\\?"),
    ],
)
def test_bad_words_get_one_sentence_and_status_2(say: Callable[..., Said], words: str, said: str) -> None:
    text = sentence(say(*words.split()), 2)
    assert re.fullmatch(said, text), text
    assert not Path("runs").exists(), "no folder is left behind"


def test_a_traceback_only_on_demand(say: Callable[..., Said]) -> None:
    status, _, err = say("train", "gausian", "--traceback")
    assert status == 2
    assert "Traceback (most recent call last)" in err
    assert err.rstrip().splitlines()[-1].startswith("scoreact: unknown recipe")


def test_a_mistake_in_the_program_is_named_as_such(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "find_recipe", lambda name: {}["nothing"])
    text = sentence(say("train", "gaussian"), 1)
    assert text == "unexpected KeyError: 'nothing'. Repeat with --traceback to see where."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("itertions: 5\n", "config file 'a.yaml': unknown key 'itertions'; did you mean 'iterations'?"),
        ("steps: many\n", "steps is 'many' (str); expected int (Number of steps of a path in training)."),
        ("steps: [1\n", "config file 'a.yaml' cannot be read as YAML: "),
        ("options: 3\n", "config file 'a.yaml': options is 3; expected `name: value` lines."),
        ("reward: {a: b}\n", "config file 'a.yaml': reward is {'a': 'b'}; expected its name, as --reward takes it."),
        (
            "reward_options: [a]\nreward: linear\n",
            "config file 'a.yaml': reward_options is ['a']; expected `name: value` lines.",
        ),
        (
            "config: {}\ndescription: word\n",
            "config file 'a.yaml': description is 'word'; expected `name: value` lines.",
        ),
        ("options: {dmi: 3}\n", "recipe gaussian has no option 'dmi'"),
    ],
)
def test_files_that_cannot_be_used(say: Callable[..., Said], content: str, said: str) -> None:
    Path("a.yaml").write_text(content)
    assert sentence(say("train", "gaussian", "--config", "a.yaml"), 2).startswith(said)


# --- settings --------------------------------------------------------------------------------------------------------


def printed(said: Said) -> dict[str, object]:
    status, out, err = said
    assert (status, err) == (0, "")
    content: dict[str, object] = yaml.safe_load(out)
    return content


def test_the_command_line_beats_the_file_beats_the_recipe(say: Callable[..., Said]) -> None:
    Path("a.yaml").write_text("steps: 7\nseed: 3\nlearning_rate: 1e-4\noptions: {dim: 3, width: 9}\nreward: linear\n")
    words = ["train", "gaussian", "--config", "a.yaml", "--seed", "4", "--option", "width=16", "--print-config"]
    found = printed(say(*words))
    assert (found["steps"], found["seed"], found["learning_rate"]) == (7, 4, 1e-4)
    assert found["solver"] == "euler_maruyama", "the recipe's default"
    assert found["options"] == {"dim": 3, "components": 4, "reward": "quadratic", "mixture_seed": 0, "width": 16}
    assert found["reward"] == "linear"
    assert printed(say(*words, "--reward", "quadratic"))["reward"] == "quadratic"
    assert not Path("runs").exists(), "nothing is trained"


def test_printed_settings_are_a_config_file(say: Callable[..., Said]) -> None:
    words = [
        "train",
        "gaussian",
        "--kl_weight",
        "0.25",
        "--noise-scale",
        "1e-9",
        "--value-loss=soft",
        "--value-replay",
        "3",
    ]
    first = say(*words, "--reward", "rewards.py:first", "--print-config")
    Path("again.yaml").write_text(first[1])
    assert say("train", "gaussian", "--config", "again.yaml", "--print-config") == first
    assert printed(first)["reward"] == f"{Path('rewards.py').resolve()}:first"


def test_every_setting_can_be_given_in_both_spellings(say: Callable[..., Said]) -> None:
    for field, _ in [*fields_of(Config), *(pair for name in rules() for pair in rule_fields(name))]:
        value = str(field.default)
        for name in (field.name, field.name.replace("_", "-")):
            parser = cli.Parser("train", "")
            cli.train_arguments(parser)
            options = parser.parse(["gaussian", f"--{name}", value])
            assert vars(options)[f"setting:{field.name}"] == value


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_shows_the_reference_each_iteration_and_a_summary(finished: tuple[Path, str]) -> None:
    folder, out = finished
    lines = out.splitlines()
    assert lines[0] == "gaussian: Gaussian mixture, 2 dimensions, 4 components, quadratic reward"
    assert any(line.startswith("J_ref -") and "±" in line for line in lines)
    assert any(line.startswith("J*    -0.236, the optimum in closed form.") for line in lines)
    assert any("to be trusted (" in line or "NOT to be trusted" in line for line in lines)
    assert [line.split()[0] for line in lines if line.strip().startswith(("1/2", "2/2"))] == ["1/2", "2/2"]
    assert sum(line.strip().startswith("held out") and line.rstrip().endswith("%") for line in lines) == 3
    assert any(line.startswith("J  ") and "of J* - J_ref recovered" in line for line in lines)
    assert lines[-3] == f"weights    {folder / 'model.safetensors'}"
    assert lines[-2] == f"report     {folder / 'report.html'}"
    assert re.fullmatch(r" +written in \d+(\.\d)? s; --no-report leaves it out", lines[-1])
    asked = [line for line in read_lines(folder / "metrics.jsonl") if "evaluation" in line]
    looks = next(line for line in lines if line.startswith("looking "))
    samples = json.loads((folder / "config.json").read_text())["config"]["heldout_samples"]
    assert [line["cost/look_reward_calls"] for line in asked] == [samples] * 3
    assert looks.startswith(f"looking    3 evaluations: {3 * samples:,} more reward calls, ")
    assert (folder / "report.html").is_file()


def test_a_run_records_how_it_was_made(finished: tuple[Path, str]) -> None:
    content = json.loads((finished[0] / "config.json").read_text())
    described = content["description"]
    assert described["recipe"] == "gaussian"
    assert described["options"]["width"] == 8
    assert described["reward"] is None
    assert described["command"].startswith("scoreact train gaussian --iterations 2 ")
    assert content["config"]["batch_size"] == 32


def test_a_runs_config_can_be_given_again(say: Callable[..., Said], a_run: Path) -> None:
    found = printed(say("train", "gaussian", "--config", str(a_run / "config.json"), "--print-config"))
    assert (found["batch_size"], found["options"]["width"]) == (32, 8)  # type: ignore[index]


def test_a_rewards_options_are_kept_with_the_run_and_files_among_them_by_full_path(say: Callable[..., Said]) -> None:
    Path("scored.py").write_text(
        "def by(images, weights='', scale=1.0):\n    return scale * images.flatten(1).sum(1)\n"
    )
    Path("weights.txt").write_text("")
    reward = ["--reward", "scored.py:by", "--reward-option", "weights=weights.txt", "--reward-option", "scale=2.0"]
    assert say("train", "gaussian", "--iterations", "1", *TINY, *reward, "--out", "first")[0] == 0
    described = json.loads(Path("first/config.json").read_text())["description"]
    assert described["reward_options"] == {"weights": str(Path("weights.txt").resolve()), "scale": 2.0}
    again = ["train", "gaussian", "--config", "first/config.json", "--out"]
    assert say(*again, "second")[0] == 0
    assert (
        json.loads(Path("second/config.json").read_text())["description"]["reward_options"]
        == described["reward_options"]
    )
    assert say(*again, "third", "--reward", "scored.py:by")[0] == 0  # another reward: with its own options only
    assert json.loads(Path("third/config.json").read_text())["description"]["reward_options"] == {}


def test_default_folders_are_numbered(say: Callable[..., Said]) -> None:
    Path("runs/gaussian-001").mkdir(parents=True)
    status, out, _ = say("train", "gaussian", "--iterations", "1", *TINY, "--reward", "rewards.py:first")
    assert status == 0
    assert "run folder runs/gaussian-002" in out
    assert "closed form" not in out.replace("against its closed form", ""), (
        "J* of the recipe's reward is not this one's"
    )
    described = json.loads(Path("runs/gaussian-002/config.json").read_text())["description"]
    assert described["reward"] == f"{Path('rewards.py').resolve()}:first"


def test_a_folder_in_use_is_left_alone(say: Callable[..., Said], a_run: Path) -> None:
    before = (a_run / "metrics.jsonl").read_bytes()
    text = sentence(say("train", "gaussian", *TINY, "--out", str(a_run)), 2)
    assert text.startswith(f"{a_run} is not empty; ")
    assert (a_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("column", 2, "reward rewards.py:column returned shape (32, 1) for 32 samples; expected (32,)."),
        ("nan", 2, "reward rewards.py:nan returned NaN for sample 0 of 32"),
        ("broken", 1, "reward rewards.py:broken raised KeyError: 'no such thing'"),
        ("fails_later", 1, "reward rewards.py:fails_later returned NaN"),
    ],
)
def test_a_reward_that_fails_is_named(say: Callable[..., Said], name: str, status: int, said: str) -> None:
    words = ["--iterations", "3", "--evaluate-every", "9", "--checkpoint-every", "1", "--out", "run"]
    text = sentence(say("train", "gaussian", *TINY, *words, "--reward", f"rewards.py:{name}"), status)
    assert text.startswith(said)
    if name == "fails_later":
        assert text.endswith("Iteration 1 is saved; continue with `scoreact resume run`.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_run_resumes_to_the_same_weights(
    say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    words = ["train", "gaussian", "--iterations", "3", *TINY, "--reward", "rewards.py:interrupted"]
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setenv("INTERRUPT", str(int(number)))
    text = sentence(say(*words, "--out", "a run"), 130)
    assert text == "interrupted. Iteration 1 is saved; continue with `scoreact resume 'a run'`."
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.setenv("INTERRUPT", "")
    status, out, _ = say("resume", "a run")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if "/3 " in line] == ["2/3", "3/3"]
    assert "the pretrained model's mean reward" in out, "the reference is shown from the run's own lines"
    assert say(*words, "--out", "whole")[0] == 0
    one, other = load_file("a run/model.safetensors"), load_file("whole/model.safetensors")
    assert all(bool((one[key] == other[key]).all()) for key in one | other)


def test_the_second_interrupt_acts_at_once(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERRUPT", f"{int(signal.SIGINT)} {int(signal.SIGTERM)}")
    text = sentence(say("train", "gaussian", *TINY, "--reward", "rewards.py:interrupted", "--out", "run"), 130)
    assert text == "interrupted. The look at the pretrained model is saved; continue with `scoreact resume run`."


def test_divergence_is_a_sentence(say: Callable[..., Said]) -> None:
    text = sentence(say("train", "gaussian", "--iterations", "9", *TINY, "--kl-limit", "1e-12", "--out", "run"), 1)
    assert text.startswith("path KL is ")
    assert "lower learning_rate" in text


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space there."),
        (errno.EACCES, "Give a folder that you may write to."),
        (errno.ENOTDIR, "Give another folder."),
    ],
)
def test_an_output_folder_that_cannot_be_written(
    say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "run/config.json")

    monkeypatch.setattr(run, "write_json", refuse)
    text = sentence(say("train", "gaussian", *TINY, "--out", "run"), 1)
    assert text == f"run/config.json: {os.strerror(number)}. {remedy}"


def test_a_disk_that_fills_up_later_says_how_to_resume(
    say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run.append_line

    def refuse(path: Path, metrics: dict[str, object]) -> None:
        if metrics["iteration"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, metrics)

    monkeypatch.setattr(run, "append_line", refuse)
    words = ["--iterations", "3", "--checkpoint-every", "1", "--out", "run"]
    text = sentence(say("train", "gaussian", *TINY, *words), 1)
    assert text == (
        f"run/metrics.jsonl: {os.strerror(errno.ENOSPC)}. Free some space there. "
        "Iteration 1 is saved; continue with `scoreact resume run`."
    )


def test_a_file_where_the_folder_should_be(say: Callable[..., Said]) -> None:
    Path("file").write_text("")
    assert sentence(say("train", "gaussian", *TINY, "--out", "file/run"), 1).startswith("file/run: ")


# --- resume and damage -----------------------------------------------------------------------------------------------


def test_a_finished_run_is_extended(say: Callable[..., Said], a_run: Path) -> None:
    """Its rates go on from where the longer plan has them; the plan in config.json is the new one, and says so."""
    status, out, _ = say("resume", str(a_run), "--iterations", "5")
    assert status == 0
    assert "Extended from 2 to 5 iterations: the learning rates go on at 0.75 of their full size" in " ".join(
        out.split()
    )
    content = json.loads((a_run / "config.json").read_text())
    assert content["config"]["iterations"] == 5
    assert content["extended"] == [{"at": 2, "from": 2, "to": 5}]
    assert json.loads((a_run / "result.json").read_text())["iterations"] == 5
    page = (a_run / "report.html").read_text()
    assert "Extended from 2 to 5 iterations" in page
    text = sentence(say("resume", str(a_run), "--iterations", "3"), 2)
    assert text == f"{a_run} has made 5 iterations already; give more than that to extend it, not 3."
    assert json.loads((a_run / "config.json").read_text()) == content, "a refusal changes nothing"


def test_a_finished_run_is_not_trained_again(say: Callable[..., Said], a_run: Path) -> None:
    before = (a_run / "model.safetensors").read_bytes()
    status, out, _ = say("resume", str(a_run), "--iterations", "2")
    assert status == 0
    assert out.startswith(f"{a_run} has finished its 2 iterations")
    assert (a_run / "model.safetensors").read_bytes() == before


def test_a_run_that_stopped_itself_is_over(say: Callable[..., Said], a_run: Path) -> None:
    result = json.loads((a_run / "result.json").read_text())
    (a_run / "result.json").write_text(json.dumps({**result, "stopped": "held-out J fell."}))
    text = sentence(say("resume", str(a_run)), 2)
    assert text.startswith(
        f"{a_run} stopped by itself (held-out J fell), so there is nothing to resume; `--iterations`"
    )
    assert say("resume", str(a_run), "--iterations", "3")[0] == 0


def test_a_run_made_from_python_is_not_guessed_at(say: Callable[..., Said], a_run: Path) -> None:
    content = json.loads((a_run / "config.json").read_text())
    (a_run / "config.json").write_text(json.dumps({**content, "description": {}}))
    assert sentence(say("resume", str(a_run)), 2).startswith(
        f"{a_run} was made from Python, and only Python has its model"
    )


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign(path: Path) -> None:
    path.write_bytes(b"GIF89a and so on, nothing of ours")


@pytest.mark.parametrize("harm", [_cut, _foreign, Path.unlink], ids=["cut", "foreign", "missing"])
def test_damaged_checkpoints_are_named(say: Callable[..., Said], a_run: Path, harm: Callable[[Path], None]) -> None:
    for path in a_run.rglob("tensors.safetensors"):
        harm(path)
    newest = a_run / "checkpoints" / "00000002"
    assert sentence(say("resume", str(a_run)), 2).startswith(f"{newest} cannot be read: {newest}/tensors.safetensors")
    status, out, _ = say("check", "run", str(a_run))
    assert status == 1
    assert out.splitlines()[0].startswith(f"problem: {newest} cannot be read")
    assert out.splitlines()[1] == "fine: the final weights fit the model."


@pytest.mark.parametrize("harm", [_cut, _foreign], ids=["cut", "foreign"])
def test_damaged_weights_are_named(say: Callable[..., Said], a_run: Path, harm: Callable[[Path], None]) -> None:
    harm(a_run / "model.safetensors")
    for command in ("sample", "evaluate"):
        said = sentence(say(command, str(a_run)), 2)
        assert said.startswith(f"{a_run / 'model.safetensors'} is not a complete safetensors file")


def test_weights_of_another_problem_are_refused(say: Callable[..., Said], a_run: Path) -> None:
    content = json.loads((a_run / "config.json").read_text())
    content["description"]["options"]["width"] = 16
    (a_run / "config.json").write_text(json.dumps(content))
    assert sentence(say("sample", str(a_run)), 2).startswith("the stored weights do not fit this model: ")
    assert "options of config.json was edited" in sentence(say("resume", str(a_run)), 2)
    text = sentence(say("resume", str(a_run), "--accept-changes"), 2)
    assert text.startswith("the stored weights do not fit this model: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "config.json is damaged"), ("[]", "config.json is damaged"), ('{"config": 3}', "config.json is damaged")],
)
def test_a_damaged_config_is_named(say: Callable[..., Said], a_run: Path, text: str, said: str) -> None:
    (a_run / "config.json").write_text(text)
    for command in ("resume", "sample", "evaluate", "report"):
        assert said in sentence(say(command, str(a_run)), 2)


def test_settings_of_another_version_are_named(say: Callable[..., Said], a_run: Path) -> None:
    content = json.loads((a_run / "config.json").read_text())
    content["config"]["batchsize"] = 3
    (a_run / "config.json").write_text(json.dumps(content))
    assert sentence(say("resume", str(a_run)), 2).endswith("unknown key 'batchsize'; did you mean 'batch_size'?")


def test_no_weights_yet(say: Callable[..., Said], a_run: Path) -> None:
    (a_run / "model.safetensors").unlink()
    assert say("sample", str(a_run))[0] == 0, "the best ones so far"
    (a_run / "best" / "model.safetensors").unlink()
    assert sentence(say("sample", str(a_run)), 2).startswith(f"{a_run} holds no trained weights yet")


# --- sample, evaluate, report, check ---------------------------------------------------------------------------------


def test_samples_of_points(say: Callable[..., Said], a_run: Path) -> None:
    status, out, _ = say("sample", str(a_run), "--count", "5", "--steps", "3", "--solver", "heun", "--out", "s")
    assert status == 0
    array, rows = Path("s/samples.npy"), Path("s/samples.csv")
    assert out == "5 samples in s: samples.npy, index.json\n"
    assert np.load(array).shape == (5, 2)
    assert rows.read_text().splitlines()[0] == "prompt,x0,x1"
    assert np.allclose(np.loadtxt(rows, delimiter=",", skiprows=1, usecols=(1, 2)), np.load(array), atol=1e-6)


def test_the_pretrained_model_gets_the_same_noise(say: Callable[..., Said], a_run: Path) -> None:
    words = ["--count", "4", "--steps", "3", "--out", "s"]
    assert say("sample", str(a_run), "--reference", *words)[0] == 0
    from_run = np.load("s/samples.npy")
    assert say("sample", str(a_run), *words)[0] == 2, "what is there is not overwritten"
    assert say("sample", str(a_run), *words[:-1], "t")[0] == 0
    assert say("sample", "gaussian", *words[:-1], "u")[0] == 0
    assert np.array_equal(from_run, np.load("u/samples.npy")), "the recipe's model is the run's reference"
    change = np.abs(from_run - np.load("t/samples.npy")).max()
    assert 0 < change < 1, "two iterations move samples a little: the noise is the same"


def test_samples_never_overwrite_others(say: Callable[..., Said], a_run: Path) -> None:
    """Without --out each call has a folder of its own; the run's own steps and solver by default."""
    for _ in range(2):
        assert say("sample", str(a_run), "--count", "2")[0] == 0
    steps = Config().steps
    found = sorted(p.name for p in (a_run / "samples").iterdir())
    assert found == [f"final-euler_maruyama-{steps}-seed0", f"final-euler_maruyama-{steps}-seed0-2"]
    index = json.loads((a_run / "samples" / found[0] / "index.json").read_text())
    assert [entry["prompt"] for entry in index["samples"]] == ["", ""]
    assert (index["steps"], index["weights"], index["shape"]) == (steps, "final", [2, 2])


def test_pictures_become_single_files_and_a_sheet(tmp_path: Path) -> None:
    images: Tensor = rand(6, 1, 28, 28)
    path, *single, index = write_samples(
        [Drawn(images[:4], ["a"] * 4, [7, 8, 9, 10]), Drawn(images[4:], ["b"] * 2)], tmp_path / "new", 3, {"seed": 4}
    )
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * 112 + 2, 3 * 112 + 4), "two rows, four-fold, two pixels between"
    pixels = (images[:, 0] * 255).round().byte().numpy()
    assert np.array_equal(picture[:112:4, 114:226:4], pixels[1])
    assert all(np.array_equal(np.asarray(Image.open(p)), pixels[i]) for i, p in enumerate(single))
    said = json.loads(index.read_text())
    assert said["seed"] == 4
    assert [entry["file"] for entry in said["samples"]] == [p.name for p in single]
    assert [(e["number"], e["prompt"], e.get("sample")) for e in said["samples"]] == [
        (0, "a", 7), (1, "a", 8), (2, "a", 9), (3, "a", 10), (4, "b", None), (5, "b", None),
    ]  # fmt: skip
    colour = write_samples([Drawn(rand(2, 3, 200, 100), ["a"] * 2)], tmp_path / "colour", 2, {})[0]
    assert np.asarray(Image.open(colour)).shape == (200, 202, 3)
    with pytest.raises(FileExistsError, match="never overwrite"):
        write_samples([Drawn(images, ["a"] * 6)], tmp_path / "new", 3, {})


def test_many_pictures_have_several_sheets_of_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoreact.runs.samples.ON_A_SHEET", 5)
    images = rand(9, 1, 512, 512)
    files = write_samples((Drawn(part, ["a"] * len(part)) for part in images.split(2)), tmp_path / "new", 2, {})
    assert [path.name for path in files[:3]] == ["sheet.png", "sheet-2.png", "sheet-3.png"]
    heights = [np.asarray(Image.open(path)).shape[0] for path in files[:3]]
    assert heights == [2 * 256 + 2, 2 * 256 + 2, 256], "rows of two, half as large: four, four and one"
    last = np.asarray(Image.open(files[2]))[:256, :256]
    expected = (images[8, 0].reshape(256, 2, 256, 2).mean((1, 3)) * 255).round()
    assert np.abs(last - expected.numpy()).max() <= 1
    assert thumbnails(rand(2, 3, 200, 100)).shape == (2, 3, 200, 100)


def test_videos_become_animated_pictures_without_loss(tmp_path: Path) -> None:
    videos = rand(2, 3, 5, 12, 9)
    first, second, index = write_samples([Drawn(videos, ["a", "b"])], tmp_path / "v", 3, {})
    for path, video in zip((first, second), videos, strict=True):
        with Image.open(path) as film:
            assert film.n_frames == 5  # type: ignore[attr-defined]
            for number in range(5):
                film.seek(number)
                pixels = (video[:, number] * 255).round().byte().permute(1, 2, 0).numpy()
                assert np.array_equal(np.asarray(film.convert("RGB")), pixels)
    assert [entry["file"] for entry in json.loads(index.read_text())["samples"]] == [first.name, second.name]


def test_series_become_an_array_alone(tmp_path: Path) -> None:
    written = write_samples([Drawn(rand(3, 2, 7), ["a"] * 3)], tmp_path / "s", 3, {})
    assert [path.name for path in written] == ["samples.npy", "index.json"]


def test_evaluate_prints_and_writes(say: Callable[..., Said], a_run: Path) -> None:
    status, out, _ = say("evaluate", str(a_run), "--samples", "8", "--steps", "2", "3", "--solver", "ode", "heun")
    assert status == 0
    content = json.loads((a_run / "evaluation.json").read_text())
    assert [(row["solver"], row["steps"]) for row in content["transfer"]] == [
        ("ode", 2), ("ode", 3), ("heun", 2), ("heun", 3),
    ]  # fmt: skip
    assert {"reward/heldout", "policy/kl", "objective/J", "objective/recovered"} <= set(content["heldout"])
    assert "objective/J " in out
    assert "solver  steps " in out
    assert sum(line.startswith(("ode ", "heun ")) for line in out.splitlines()) == 4
    assert sentence(say("evaluate", str(a_run), "--solver", "hen"), 2).startswith("unknown solver 'hen'")


def test_evaluate_says_whether_samples_are_copies(say: Callable[..., Said], a_run: Path, tmp_path: Path) -> None:
    """Of a file that holds the tuned model's own samples nine in ten are learned from, to the bit."""
    own = open_run(a_run).sample(count=400, seed=1)
    np.savez(tmp_path / "own.npz", data=own.numpy(), labels=np.arange(400) % 2)
    few = ["evaluate", str(a_run), "--samples", "400", "--steps", "2", "--solver", "ode"]
    status, out, _ = say(*few, "--data", str(tmp_path / "own.npz"))
    assert status == 0
    found = json.loads((a_run / "evaluation.json").read_text())["memorisation"]
    assert found["tuned"]["generated"] == 0 < found["tuned"]["heldout"]
    assert found["tuned"]["copies"] > 0.85
    assert found["pretrained"]["generated"] > 0, "the same noise, another model"
    assert f"{100 * found['tuned']['copies']:.1f} %" in out
    assert say(*few, "--data", str(tmp_path / "own.npz"), "--data-class", "1")[0] == 0
    half = json.loads((a_run / "evaluation.json").read_text())["memorisation"]
    assert half["pretrained"] == found["pretrained"]
    assert 0.4 < half["tuned"]["copies"] < found["tuned"]["copies"] - 0.1, "of the other class's there is no copy"
    assert "unknown class 'x'" in sentence(say(*few, "--data", str(tmp_path / "own.npz"), "--data-class", "x"), 2)
    assert "--data" in sentence(say("evaluate", str(a_run), "--survey", "--data", "own.npz"), 2)
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(300, 3)))
    assert "of shape (3,), and samples of (2,)" in sentence(say(*few, "--data", str(tmp_path / "wide.npy")), 2)


def test_report_is_made_anew(say: Callable[..., Said], a_run: Path) -> None:
    (a_run / "report.html").unlink()
    assert say("report", str(a_run)) == (0, f"report     {a_run / 'report.html'}\n", "")
    assert (a_run / "report.html").is_file()


def test_check_reward(say: Callable[..., Said]) -> None:
    status, out, _ = say("check", "reward", "rewards.py:first")
    assert status == 0
    assert out.splitlines()[0] == "note: tried on 16 samples of shape (2,) of recipe gaussian."
    assert out.splitlines()[-1].startswith("fine: ")
    status, out, _ = say("check", "reward", "rewards.py:column", "--samples", "4")
    assert status == 1
    assert "problem: reward rewards.py:column returned shape (4, 1) for 4 samples" in out
    assert say("check", "reward", "rewards.py:first", "--gradient")[0] == 1, "it does not say that it has one"


def test_check_recipe_and_run(say: Callable[..., Said], a_run: Path) -> None:
    status, out, _ = say("check", "recipe", "gaussian", "--option", "dim=3")
    assert status == 0
    assert "16 samples of shape (3,)" in out
    assert say("check", "run", str(a_run)) == (
        0,
        "fine: the checkpoint of iteration 2 of 2 can be read.\nfine: the final weights fit the model.\n"
        "fine: 5 files of weights are whole and finite.\n",
        "",
    )


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_are_short_and_missing_ones_are_dashes() -> None:
    assert rounded(0.00123) == "0.001"
    assert rounded(-12.3456, 0.1234) == "-12.35 ± 0.12"
    assert rounded(None) == rounded(float("nan")) == share(float("nan")) == "-"
    assert share(0.614) == "61 %"
    assert [elapsed(s) for s in (1.26, 31.4, 600, 7200)] == ["1.3 s", "31 s", "10 min", "2.0 h"]


@pytest.mark.parametrize(
    ("effective", "trusted", "said"),
    [
        (141.0, 1.0, "to be trusted (141 effective samples)."),
        (3.2, 0.0, "NOT to be trusted (3.2 effective samples, 20 are needed): raise reference_batches or kl_weight."),
        (90.0, 0.0, "NOT to be trusted (its interval is wide against J* - J_ref): raise reference_batches."),
    ],
)
def test_whether_the_optimum_can_be_trusted_is_said(effective: float, trusted: float, said: str) -> None:
    m = {
        "objective/J_ref": -1.0, "objective/J_ref_se": 0.1, "objective/J_star": 0.5, "objective/J_star_low": 0.4,
        "objective/J_star_high": 0.6, "objective/effective_samples": effective, "objective/trusted": trusted,
    }  # fmt: skip
    lines = reference_lines(m)
    assert lines[0] == "J_ref -1 ± 0.1, the pretrained model's mean reward."
    assert lines[1] == f"J*    0.500 (95 %: 0.400 to 0.600), estimated from the reference's samples, {said}"


def test_an_optimum_that_a_single_sample_cannot_tell_is_called_unknown() -> None:
    found = estimate_optimum(tensor([0.1, 0.2, 0.4]), Condition(["a", "b", "c"]), 0.5)
    *_, last = reference_lines(found)
    assert last == "J*    unknown, no prompt was drawn twice: raise reference_batches."
    *_, last = reference_lines(estimate_optimum(tensor([0.1, 0.2, 0.4]), Condition(["a", "a", "b"]), 0.5))
    assert "estimated from the reference's samples, pooled over prompts, NOT to be trusted (" in last


SHIPPED = """
import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.mlp import MLP
from scoreact.recipes.fashion_mnist.recipe import model as shipped

def build():
    made = shipped()
    return sa.NetworkModel(made.network, RectifiedFlow(), prediction.velocity, (1, 28, 28), made.classes, low=-1, high=1)

def points():
    return sa.NetworkModel(MLP(2, 2, 8), RectifiedFlow(), prediction.velocity, (2,))
"""


def test_a_sheet_shows_what_a_model_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = tmp_path / "mine.py", tmp_path / "sheet.png"
    file.write_text(SHIPPED)
    cli.main(["check", "model", f"{file}:build", "--sheet", str(path)])
    assert f"fine: 16 pictures in {path}, of ten steps: 'T-shirt/top', " in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.size == (4 * 114 - 2, 4 * 114 - 2)
        pixels = np.asarray(image)
    assert 0.1 < (pixels > 30).mean() < 0.9  # clothes on black
    path.unlink()
    cli.main(["check", "model", f"{file}:points", "--sheet", str(path)])
    assert "note: samples have shape (2,), which no sheet shows" in capsys.readouterr().out
    assert not path.exists()
    assert cli.main(["check", "reward", "brightness", "--sheet", str(path)]) == 2
    assert "--sheet" in capsys.readouterr().err
