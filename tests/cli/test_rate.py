"""`scoreact rate`: draws, serves, goes on where it was, and refuses in a sentence."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scoreact.cli import main as cli
from scoreact.feedback.answers import read_answers
from scoreact.feedback.store import Store


@pytest.fixture
def say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(list(words))
        return (status, *capsys.readouterr())

    return call


def ask(port: int, path: str, **body: object) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, json.dumps({"rater": "ann", **body}), {"Content-Type": "application/json"})
    content = json.loads(connection.getresponse().read())
    connection.close()
    return content


def person(port: int, wanted: int, said: list[object]) -> None:
    """Answers the first pair once `wanted` are left and nothing more is drawn; then ends the command as Ctrl-C does."""
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.05)
            with contextlib.suppress(OSError):
                state = ask(port, "/api/state")
                if state["left"] == wanted and not state["drawing"]:
                    first = {name: state["tasks"][0][name] for name in ("task", "question")}
                    said.append(
                        ask(port, "/api/answer", answer="left", milliseconds=1, key=secrets.token_hex(8), **first)
                    )
                    break
    finally:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Heard here, also where a shell has started the tests in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def test_a_recipe_is_rated_and_the_same_command_goes_on(say: Callable[..., tuple[int, str, str]]) -> None:
    for pairs, wanted in [(3, 3), (3, 2), (5, 3)]:  # new; again; two more
        port = free_port()
        said: list[dict[str, object]] = []
        helper = threading.Thread(target=person, args=(port, wanted, said))
        helper.start()
        status, out, err = say("rate", "gaussian", "--pairs", str(pairs), "--port", str(port), "--repeats", "0")
        helper.join()
        assert all("error" not in content for content in said)
        assert (status, err) == (0, "")
        assert f"http://127.0.0.1:{port}/" in out
        assert f"{wanted} wait for an answer" in out
    assert "\n3 answers in preferences.db" in out
    assert "scoreact reward fit preferences.db --out liking" in out
    with Store("preferences.db", make=False) as store:
        assert len(read_answers(store)) == 3
        assert {s.source for s in store.samples()} == {"reference"}
        assert [s.number for s in store.samples()] == list(range(10))


def test_refusals(say: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(pictures / "a.png")
    Store("made.db").close()
    for words, said in [
        (["gaussian", "--repeats", "1"], "--repeats is 1; expected a share"),
        (["gaussian", "--questions", "fits,fits"], "question 'fits' is given twice"),
        (["gaussian", "--questions", " "], "question '' cannot be asked"),
        (["gaussian", "--against", "reference"], "its own reference; give --against itself"),
        (["gaussian", "--noise", "same"], "would compare a sample with itself"),
        (["gaussian", "--mode", "thumbs", "--noise", "same"], "--noise does nothing without --mode pairs or rank4"),
        (["gaussian", "--weights", "best"], "is of a run, and gaussian is none"),
        (["plain", "--prompts", "a dog"], "'a dog'"),
        (["pictures", "--prompts", "a dog"], "--prompts is of a model"),
        (["pictures"], "no prompt in pictures has 2 pictures"),
        (["made.db", "--pairs", "3"], "--pairs is for samples that are drawn"),
        (["none.db"], "none.db"),
        (["gaussian", "--port", "99999"], "at most 65535"),
        (["gaussian", "--out", "none/preferences.db"], "none is no folder; make it first"),
    ]:  # fmt: skip
        status, _, err = say("rate", *words, *([] if "--port" in words else ["--port", "0"]))
        assert (status, said in err) == (2, True), (words, err)


def test_pairs_are_chosen_by_a_reward_of_answers_alone(say: Callable[..., tuple[int, str, str]]) -> None:
    status, _, error = say("rate", "gaussian", "--choose", "liking")
    assert status == 2
    assert "liking holds no reward.json" in error
    status, _, error = say("rate", "gaussian", "--mode", "thumbs", "--choose", "liking")
    assert status == 2
    assert "--choose" in error
