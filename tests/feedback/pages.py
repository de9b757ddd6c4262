"""What the tests of the page share: a store with samples to compare, an HTTP client that sends what it is told, a browser."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scoreact.feedback.store import Store

# what a test starts as root, without a network, must not look for one
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def store_of(
    folder: Path, tasks: int, kind: str = "pair", shape: Sequence[int] = (3, 8, 8), prompt: str = "a cat"
) -> Store:
    """Tasks of a kind on samples of their own, of plain colour or of plain height."""
    store = Store(folder / "preferences.db", synced=False)
    size = {"pair": 2, "rank": 4}.get(kind, 1)
    with store.transaction():
        for i in range(tasks):
            values = [(i * size + j + 1) / (tasks * size + 1) for j in range(size)]
            numbers = [store.add_sample(torch.full(tuple(shape), v), f"{prompt} {i + 1}") for v in values]
            store.add_task(numbers, kind)
    return store


class Client:
    """Keeps one connection to a page's server."""

    def __init__(self, url: str) -> None:
        self.place = url.split("/")[2]
        self.connection = http.client.HTTPConnection(self.place, timeout=20)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of one request, whose path and headers are sent as they are."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, path, body, names)
        answer = self.connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}

    def post(self, path: str, rater: str = "ann", **body: Any) -> Any:
        """The answer to a POST that is well."""
        content = json.dumps({"rater": rater, **body}).encode()
        status, answer, _ = self.ask("POST", f"/api/{path}", content, Content_Type="application/json")
        assert status == 200, answer
        return json.loads(answer)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's, in Debian's Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()
