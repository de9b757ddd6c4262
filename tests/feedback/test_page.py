"""The page's server, asked over HTTP: what it hands out and keeps, and whom it turns away."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from pages import Client, store_of
from PIL import Image

from scoreact.feedback.answers import read_answers
from scoreact.feedback.leases import TaskQueue
from scoreact.feedback.page import MOST_BYTES, PageServer
from scoreact.feedback.store import Store
from scoreact.support.errors import FeedbackError

Serve = Callable[..., Client]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(store, ...) -> a client of its page."""
    servers, clients = [], []

    def start(store: Store, questions: tuple[str, ...] = ("better",), host: str = "127.0.0.1", **how: object) -> Client:
        server = PageServer(TaskQueue(store, questions, **{"repeats": 0.0, **how}), host)  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        client = Client(f"//127.0.0.1:{urlsplit(server.url).port}")
        clients.append(client)
        client.token = server.token  # type: ignore[attr-defined]
        return client

    yield start
    for client in clients:
        client.connection.close()
    for server in servers:
        server.stop()


def answer_all(client: Client, rater: str = "ann") -> int:
    """Answer until nothing is left."""
    found, done = client.post("state", rater), 0
    while found["tasks"]:
        first = found["tasks"][0]
        found = client.post("answer", rater, task=first["task"], question=first["question"], answer="left",
                            milliseconds=5, key=f"{done}")  # fmt: skip
        done += 1
    return done


def test_what_is_answered_is_kept_and_counted(serve: Serve, tmp_path: Path) -> None:
    store = store_of(tmp_path, 5)
    client = serve(store, ("fits", "looks"))
    before = client.post("state")
    asked = [(entry["task"], entry["question"]) for entry in before["tasks"]]
    assert asked == [(task, question) for task in (1, 2, 3) for question in ("fits", "looks")]
    assert before["tasks"][0]["asks"] == "Which one fits the prompt better?"
    assert (before["answered"], before["left"], before["drawing"]) == (0, 5, False)
    assert answer_all(client) == 10
    after = client.post("state")
    assert (after["answered"], after["left"], after["seconds"]) == (10, 0, 0.005)
    assert client.post("undo")["undone"]
    assert client.post("summary")["left"]["count"] == 9
    assert Counter(read_answers(store).task.tolist()) == {1: 2, 2: 2, 3: 2, 4: 2, 5: 1}


def test_pictures_films_and_series_arrive(serve: Serve, tmp_path: Path) -> None:
    store = store_of(tmp_path, 1)
    film, series, both = torch.rand(3, 5, 4, 6), torch.linspace(0, 1, 5000), torch.rand(2, 6)
    for sample in (film, series, both):
        store.add_task([store.add_sample(sample, "")], "thumbs")
    client = serve(store)
    assert client.ask("GET", "/samples/1.png")[1] == (store.folder / "000001.png").read_bytes()
    (tmp_path / "film.png").write_bytes(client.ask("GET", "/samples/3.png")[1])
    with Image.open(tmp_path / "film.png") as found:
        assert (found.n_frames, found.size) == (5, (6, 4))
        found.seek(2)
        assert torch.equal(torch.from_numpy(np.array(found)).permute(2, 0, 1), (255 * film[:, 2]).round().byte())
    values = json.loads(client.ask("GET", "/samples/4.json")[1])
    assert not values["point"]
    assert 1000 < len(values["lines"][0]) <= 2000
    assert torch.allclose(torch.tensor(json.loads(client.ask("GET", "/samples/5.json")[1])["lines"]), both)
    shown = [entry["samples"][0]["url"] for entry in client.post("state")["tasks"]]
    assert shown[1:] == ["/samples/3.png", "/samples/4.json"]


def test_no_request_reaches_a_file_that_is_not_the_stores(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    store = store_of(tmp_path, 1)
    client = serve(store)
    for path in (
        "/assets/../../secret.png", "/assets/..%2f..%2fsecret.png", "/assets/%2e%2e/__init__.py", "/assets/report.html",
        "/samples/../secret.png", "/samples/..%2fsecret.png", "/samples/1.png/../../secret.png", "//etc/passwd",
        "/samples/1.safetensors", "/samples/99.png", "/samples/-1.png", "/preferences.db", "/samples/1.json/x",
    ):  # fmt: skip
        status, content, _ = client.ask("GET", path)
        assert (status in (400, 404), b"secret" in content) == (True, False), path
    store.run("UPDATE samples SET picture = '../secret.png' WHERE id = 1")
    status, content, _ = client.ask("GET", "/samples/1.png")
    assert (status, b"which is no file of" in content) == (400, True)


def test_a_page_elsewhere_cannot_use_this_one(serve: Serve, tmp_path: Path) -> None:
    """A browser may be told that any name is this address, and any page may send a form here."""
    store = store_of(tmp_path, 1)
    client = serve(store)
    answer = {"rater": "ann", "task": 1, "question": "better", "answer": "left", "milliseconds": 1, "key": "k"}
    body = json.dumps(answer).encode()
    client.post("state")
    for status, headers in [
        (403, {"Host": "evil.example", "Content_Type": "application/json"}),
        (403, {"Host": f"evil.example:{client.place.split(':')[1]}", "Content_Type": "application/json"}),
        (403, {"Origin": "http://evil.example", "Content_Type": "application/json"}),
        (403, {"Origin": "null", "Content_Type": "application/json"}),
        (403, {"Origin": "http://127.0.0.1:1", "Content_Type": "application/json"}),
        (415, {"Content_Type": "text/plain"}),
        (415, {"Content_Type": "application/x-www-form-urlencoded"}),
        (415, {}),
    ]:
        assert client.ask("POST", "/api/answer", body, **headers)[0] == status, headers
    assert client.ask("GET", "/", Host="evil.example")[0] == 403
    assert client.ask("OPTIONS", "/api/answer", Origin="http://evil.example")[0] == 405
    assert len(read_answers(store)) == 0
    status, _, headers = client.ask("GET", "/", Host="localhost:1")
    assert status == 200
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers
    own = {"Content_Type": "application/json", "Origin": f"http://{client.place}"}
    assert client.ask("POST", "/api/answer", body, **own)[0] == 200


def test_requests_that_make_no_sense_are_answered_in_a_sentence(serve: Serve, tmp_path: Path) -> None:
    client = serve(store_of(tmp_path, 2))
    client.post("state")
    good = {"rater": "ann", "task": 1, "question": "better", "answer": "left", "milliseconds": 1, "key": "k"}
    for status, changed, said in [
        (400, {"rater": 3}, "rater is '3'"), (400, {"rater": "a" * 61}, "at most 60"), (400, {"rater": "a\nb"}, "rater is"),
        (400, {"task": "1"}, "task is '1'"), (400, {"task": True}, "task is"), (400, {"milliseconds": -1}, "milliseconds"),
        (400, {"milliseconds": 1e300}, "milliseconds"), (400, {"answer": "up"}, "answer is 'up'; known"),
        (409, {"task": 99}, "task 99 is answered already"), (409, {"question": "looks"}, "answered already"),
    ]:  # fmt: skip
        body = json.dumps({**good, **changed}).encode()
        found, content, _ = client.ask("POST", "/api/answer", body, Content_Type="application/json")
        assert (found, said in json.loads(content)["error"]) == (status, True), (changed, content)
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 10_000):
        assert client.ask("POST", "/api/answer", body, Content_Type="application/json")[0] == 400
    large = client.ask("POST", "/api/answer", b" " * (MOST_BYTES + 1), Content_Type="application/json")
    assert (large[0], b"more than" in large[1]) == (413, True)
    assert client.ask("PUT", "/api/answer", b"{}")[0] == 405


def test_an_address_that_others_can_reach_wants_its_token(serve: Serve, tmp_path: Path) -> None:
    client = serve(store_of(tmp_path, 1), host="0.0.0.0")
    token = client.token  # type: ignore[attr-defined]
    assert len(token) >= 32
    for headers in ({}, {"Cookie": "scoreact=wrong"}, {"Cookie": "scoreact="}, {"Cookie": f"other={token}"}):
        for method, path in (
            ("GET", "/"),
            ("GET", "/samples/1.png"),
            ("GET", "/assets/rate.js"),
            ("POST", "/api/state"),
        ):
            assert client.ask(method, path, b'{"rater": "a"}', Content_Type="application/json", **headers)[0] == 401
    assert client.ask("GET", "/?token=wrong")[0] == 401
    assert client.ask("GET", f"/samples/1.png?token={token}")[0] == 401  # only the page takes it from the address
    status, _, headers = client.ask("GET", f"/?token={token}")
    assert (status, headers["location"]) == (303, "/")
    assert {"HttpOnly", "SameSite=strict"} <= set(headers["set-cookie"].split("; "))
    cookie = headers["set-cookie"].split(";")[0]
    assert client.ask("GET", "/", Cookie=cookie, Host="machine.example")[0] == 200
    assert client.ask("POST", "/api/state", b'{"rater": "a"}', Cookie=cookie, Content_Type="application/json")[0] == 200


def test_a_port_that_is_taken_is_said(serve: Serve, tmp_path: Path) -> None:
    store = store_of(tmp_path, 1)
    port = int(serve(store).place.split(":")[1])
    with pytest.raises(FeedbackError, match=f"cannot listen at 127.0.0.1:{port}"):
        PageServer(TaskQueue(store, ("better",)), port=port)


def answers_of_four(serve: Serve, folder: Path, tasks: int) -> float:
    """Four clients at once answer all; seconds."""
    store = Store(folder / "preferences.db", synced=False)
    numbers = [store.add_sample(torch.rand(1, 4, 4), "a cat") for _ in range(2)]
    with store.transaction():
        for _ in range(tasks):
            store.add_task(numbers)
    place = serve(store, repeats=0.05).place
    start, done = time.monotonic(), []

    def work(rater: str) -> None:
        with Client(f"//{place}") as client:
            done.append(answer_all(client, rater))

    threads = [threading.Thread(target=work, args=(rater,)) for rater in ("ann", "bob", "eve", "joe")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    found = read_answers(store)
    assert Counter(found.task[found.repeat_of < 0].tolist()) == {i + 1: 1 for i in range(tasks)}
    assert len(found) == sum(done)
    return seconds


def test_four_at_once_answer_everything_once(serve: Serve, tmp_path: Path) -> None:
    answers_of_four(serve, tmp_path, 200)


@pytest.mark.slow
def test_ten_thousand_answers(serve: Serve, tmp_path: Path) -> None:
    assert answers_of_four(serve, tmp_path, 10_000) < 600
