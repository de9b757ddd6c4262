"""Every page's code runs as it stands there, and every `scoreact` command line is one that the command line takes.

Python blocks of a page run one after another in one temporary folder and one namespace. A block that opens with `# name.py`
is a file: it is written first, then imported. Comments before a block say what is special: `<!-- skip: reason -->` (needs the
hub, a GPU, weights or an environment that are not here), `<!-- run by: tests/... -->` (a test of its own runs it),
`<!-- printed -->` (what the block before prints: words equal, numbers near).

Command lines are parsed all, and run in the same folder where that takes seconds: small settings are appended.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scoreact.cli import main as cli
from scoreact.cli.parser import Parser
from scoreact.report import html

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# every block that does not run, by page: a new one has to be named here
SKIPPED = {
    "docs/howto/reward-server.md": ["needs an environment of its own"],
    "docs/reference/rewards.md": [
        "needs published weights",
        "needs published weights",
    ],
}
# pages whose blocks a test of its own runs
OWN_TEST = {"docs/models.md": "tests/docs/test_models.py"}
SMALL = {
    "train": "--iterations 2 --batch-size 16 --reference-batches 1 --heldout-samples 16 --steps 4 --device cpu",
    "sample": "--count 4 --steps 4",
    "evaluate": "--samples 16 --steps 4 --solver ddim",
}


@dataclass(frozen=True)
class Block:
    """A fenced block with the comments that stand before it."""

    text: str
    language: str
    marks: tuple[str, ...]
    line: int

    @property
    def file(self) -> str | None:
        found = re.match(r"# (\w+\.py)\b", self.text)
        return found[1] if found and self.language == "python" else None

    @property
    def skip(self) -> str | None:
        return self.mark("skip:")

    @property
    def run_by(self) -> str | None:
        return self.mark("run by:")

    def mark(self, start: str) -> str | None:
        return next((mark.removeprefix(start).strip() for mark in self.marks if mark.startswith(start)), None)


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, also those inside a list."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"((?:^ *<!--[^\n]*-->\n)*)^( *)```(\w+)\n(.*?)^\2```", text, re.MULTILINE | re.DOTALL):
        marks = tuple(re.findall(r"<!-- *(.*?) *-->", found[1]))
        body = "".join(line.removeprefix(found[2]) for line in found[4].splitlines(keepends=True))
        yield Block(body, found[3], marks, text[: found.start(3)].count("\n") + 1)


def commands(page: Path) -> list[str]:
    """The `scoreact ...` lines of the page's indented code, continued lines joined, comments off."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).replace("\\\n", " ")
    found = re.findall(r"^ {4,}(scoreact [^\n]*)", text, re.MULTILINE)
    return [re.sub(r"\s{2,}#.*|\s# .*", "", line).strip() for line in found]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    """Those that run here."""
    if name(page) in OWN_TEST:
        return []
    found = [block for block in blocks(page) if block.language == "python"]
    return [block for block in found if block.skip is None and block.run_by is None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, first on the path; modules that its files became are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.fixture
def one_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than all else that a page does: only the page of all commands draws its runs'."""
    if name(request.getfixturevalue("page")) != "docs/reference/commands.md":
        monkeypatch.setattr(html, "write", lambda folder, *_: folder / "report.html")


def furnish(page: Path, folder: Path) -> None:
    """The page's files, and what it takes for granted: prompts, a pipeline."""
    for block in python_blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
    text = page.read_text(encoding="utf-8")
    if "prompts.txt" in text:
        (folder / "prompts.txt").write_text("a cat\ntwo dogs\n")


def run_blocks(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    furnish(page, folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    runs, printed = python_blocks(page), ""
    for block in blocks(page):
        if "printed" in block.marks:
            same_but_for_noise(printed, block.text)
        if block not in runs:
            continue
        capsys.readouterr()
        if block.file is not None:
            importlib.import_module(block.file.removesuffix(".py"))
        else:
            exec(compile(block.text, f"{name(page)}, line {block.line}", "exec"), namespace)
        printed = capsys.readouterr().out


def same_but_for_noise(found: str, said: str) -> None:
    """Equal words; numbers within a tenth and 0.1 of each other, but for the seconds of a run."""
    number = r"[-+]?\d[\d,]*\.?\d*"
    cleaned = [re.sub(rf"cost\s+{number} (s|min|h),", "cost", text).strip() for text in (found, said)]
    words = [re.sub(r"\s+", " ", re.sub(number, "#", text)) for text in cleaned]
    assert words[0] == words[1]
    values = [[float(n.replace(",", "")) for n in re.findall(number, text)] for text in cleaned]
    for mine, theirs in zip(*values, strict=True):
        assert mine == pytest.approx(theirs, rel=0.1, abs=0.1), f"{theirs} on the page, {mine} now"


@pytest.mark.usefixtures("one_report")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name)
def test_the_python_of_a_page_runs(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(page, folder, capsys)


def test_what_another_test_runs_is_in_it() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.run_by is not None:
                assert page.name in (ROOT / block.run_by).read_text(encoding="utf-8"), f"line {block.line}"


def test_what_does_not_run_is_named() -> None:
    found = {name(page): [block.skip for block in blocks(page) if block.skip is not None] for page in PAGES}
    assert {page: reasons for page, reasons in found.items() if reasons} == SKIPPED


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Of the pages that the site does not hold: it checks its own."""
    for place, _, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(#([^)]*))?\)", page.read_text(encoding="utf-8")):
        assert (ROOT / place).is_file(), place
        titles = re.findall(r"^#+ (.*)$", (ROOT / place).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def parsed(line: str) -> tuple[str, Any]:
    """The command's name and options. Raises ValueError for what the command line does not take."""
    words = shlex.split(line)[1:]
    if words[0] == "pretrain" or words[0] == "COMMAND":
        return words[0], None
    command, rest = cli.command_of(words)
    parser = Parser(command, "")
    cli.COMMANDS[command].arguments(parser)
    return command, parser.parse([word for word in rest if word not in ("--help", "-h")])


ALL = [(page, line) for page in PAGES for line in dict.fromkeys(commands(page))]


def test_there_are_commands() -> None:
    assert len(ALL) > 60
    assert {"README.md", "CONTRIBUTING.md", "docs/reference/commands.md"} <= {name(page) for page, _ in ALL}


@pytest.mark.parametrize(
    ("page", "line"), ALL, ids=lambda value: name(value) if isinstance(value, Path) else value[:60]
)
def test_a_command_line_is_taken(page: Path, line: str) -> None:
    parsed(line)


def test_a_command_line_that_is_not_taken() -> None:
    with pytest.raises(ValueError, match="did you mean --reward-option"):
        parsed("scoreact train plain --reward-options strength=50")


SMALL_ONES = re.compile(r"scoreact (train|sample|check \w+) gaussian")
OWN_MODELS = re.compile(r"scoreact (train|check model) \w+\.py:")


def pages_with(pattern: re.Pattern[str]) -> list[Path]:
    return [page for page in PAGES if any(pattern.match(line) for line in commands(page))]


@pytest.mark.usefixtures("one_report")
@pytest.mark.parametrize("page", pages_with(SMALL_ONES), ids=name)
def test_the_small_commands_of_a_page_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the page's order, so that what looks at `runs/gaussian-001` finds it."""
    furnish(page, folder)
    ran = 0
    for line in commands(page):
        words = small_form(line, folder)
        if words is not None and not OWN_MODELS.match(line):
            assert cli.main(words) == 0, f"{shlex.join(words)}: {capsys.readouterr()}"
            ran += 1
    assert ran, "no command of the page was run"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages_with(OWN_MODELS) if name(page) not in OWN_TEST], ids=name)
def test_the_commands_on_an_own_model_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    furnish(page, folder)
    for line in commands(page):
        words = shlex.split(line)[1:]
        if OWN_MODELS.match(line):
            small = shlex.split(SMALL["train"]) if words[0] == "train" else []
            assert cli.main([*words, *small]) == 0, f"{line}: {capsys.readouterr()}"


def small_form(line: str, folder: Path) -> list[str] | None:
    """The command with small settings where it takes seconds here; None where it does not."""
    words = shlex.split(line)[1:]
    command, subject = words[0], words[1] if len(words) > 1 else ""
    if "--help" in words or command == "recipes":
        return words
    if command == "check":
        place = folder / words[2].partition(":")[0]
        known = words[2] == "gaussian" or place.is_file() or words[2].startswith("runs/gaussian")
        return words if known and "plain" not in words else None
    if subject != "gaussian" and not (subject.startswith("runs/gaussian") and (folder / subject).is_dir()):
        return None
    if "--config" in words or "--from" in words or (command == "resume" and "--iterations" in words):
        return replaced(words, ["--iterations", "3"])  # the run's own settings are small already
    return replaced(words, shlex.split(SMALL.get(command, "")))


def replaced(words: list[str], others: list[str]) -> list[str]:
    """The words with other values of some options."""
    kept, names, left_out = [], {word for word in others if word.startswith("--")}, False
    for word in words:
        left_out = word in names or (left_out and not word.startswith("--"))
        kept += [] if left_out else [word]
    return [*kept, *others]
