"""`scoreact loop`: a person answers over HTTP, a kill in the middle, and the same command goes on to the last verdict."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scoreact.cli import main as cli
from scoreact.feedback.answers import read_answers

COMMAND = [
    "loop", "gaussian", "--rounds", "1", "--answers", "4", "--port", "0", "--out", "loop", "--iterations", "2",
    "--batch-size", "16", "--heldout-samples", "16", "--reference-batches", "1", "--option", "width=8", "--features", "values",
    "--no-report", "--device", "cpu",
]  # fmt: skip


def ask(port: int, path: str, **body: object) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, json.dumps({"rater": "ann", **body}), {"Content-Type": "application/json"})
    content = json.loads(connection.getresponse().read())
    connection.close()
    return content


def answer(process: subprocess.Popen[str], port: int, wanted: int) -> int:
    """Answer what the page shows, until so many are given or the command has ended; how many."""
    given, deadline = 0, time.monotonic() + 60
    while given < wanted and process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for entry in ask(port, "/api/state")["tasks"][: wanted - given]:  # type: ignore[index]
                first = {name: entry[name] for name in ("task", "question")}
                said = ask(port, "/api/answer", answer="left", milliseconds=1500, key=secrets.token_hex(8), **first)
                given += "error" not in said
        time.sleep(0.1)
    return given


def start(folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "scoreact", *COMMAND],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("the page"):
            return process, int(line.rsplit(":", 1)[1].strip(" /\n"))
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_people_answer_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process, port = start(tmp_path)
    assert answer(process, port, 2) == 2
    process.send_signal(signal.SIGTERM)  # SIGINT is ignored where the tests run in the background
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted. The same command goes on." in error
    process, port = start(tmp_path)
    assert answer(process, port, 100) == 6, "two that were left, and the verdict's four"
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert "won against the pretrained model" in out
    assert len(read_answers(tmp_path / "loop" / "preferences.db")) == 8
    rows = json.loads((tmp_path / "loop" / "loop.json").read_text())["rounds"]
    assert rows[0]["won_of"] == 4
    assert [row["answers"] for row in rows] == [4, 4]
    assert rows[0]["minutes"] == pytest.approx(0.1)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    for words, said in [
        (["gaussian", "--caution", "-1"], "--caution is -1"),
        (["gaussian", "--question", "fits,looks"], "--question fits,looks is several"),
        (["gaussian", "--reward", "x"], "unknown option --reward"),
        (["gaussian", "--rounds", "0"], "at least 1"),
        (["gaussian", "--iterations", "0"], "iterations"),
        (["gaussian", "--algorithm", "dpo", "--pairs-file", "notes.txt"], "--pairs-file is learned from"),
        (["nothing"], "unknown recipe"),
        (["gaussian", "--out", "."], "is not empty and holds no loop"),
    ]:
        status = cli.main(["loop", *words])
        assert (status, said in (error := capsys.readouterr().err)) == (2, True), (words, error)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_its_price_of_a_nat_is_one_of_a_rater(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["loop", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--kl-weight FLOAT" in out
    assert "--caution" in out
