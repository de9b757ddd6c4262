"""The page on which people compare: an ASGI app over a store's tasks, and the server that runs it.

A request names samples by number and never a file. On loopback only requests for a loopback name are answered (a page in a
browser can make any name point here); elsewhere only those with the token. What changes something is a POST of JSON from the
page itself. Knows no model; starlette and uvicorn are the extra `feedback`.
"""

from __future__ import annotations

import hmac
import io
import json
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from ..rewards.remote.server import is_loopback
from ..runs.films import is_video, write_video
from ..support.errors import FeedbackError
from .answers import left_share, read_answers, self_agreement
from .leases import NotLent, TaskQueue
from .store import StoredSample, load_sample

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MOST_BYTES = 16_384  # of a request's body
MOST_POINTS = 2_000  # of a series, a channel
COOKIE = "scoreact"
ASSETS = {"rate.js": "text/javascript", "rate.css": "text/css"}
QUESTIONS = {  # by name and kind of task; any other question is its own text
    "better": {
        "pair": "Which one is better?", "rank": "Choose the best, then the next best.",
        "thumbs": "Is it good?", "scores": "How good is it, from 1 to 5?",
    },
    "fits": {
        "pair": "Which one fits the prompt better?", "rank": "Choose what fits the prompt best, then next best.",
        "thumbs": "Does it fit the prompt?", "scores": "How well does it fit the prompt, from 1 to 5?",
    },
    "looks": {
        "pair": "Which one looks better?", "rank": "Choose what looks best, then next best.",
        "thumbs": "Does it look good?", "scores": "How good does it look, from 1 to 5?",
    },
}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass
class Progressing:
    """Whether more tasks are being drawn, and how many are; set by who draws, the first is shown by the page."""

    drawing: bool = False
    drawn: int = 0


def app_of(queue: TaskQueue, token: str | None = None, progress: Progressing | None = None) -> Starlette:
    """The app: `/`, `/assets/...`, `/samples/N.png` or `N.json`, and POST `/api/state`, `answer`, `undo`, `summary`.

    token: what a browser has to bring, as `/?token=...` once; None: only loopback names are answered.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, RedirectResponse, Response
    from starlette.routing import Route

    store, moving = queue.store, progress or Progressing()

    async def page(request: Request) -> Response:
        given = request.query_params.get("token")
        if token is not None and given is not None:  # out of the address, where it would stay in the history
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        return Response(_asset("rate.html"), media_type="text/html")

    async def asset(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            raise Turned(404, "there is no such file.")
        return Response(_asset(name), media_type=ASSETS[name])

    def sample(request: Request) -> Response:
        found = store.sample(request.path_params["number"])
        kept = {"Cache-Control": "private, max-age=86400, immutable"}
        form = request.path_params["form"]
        if form not in ("png", "json"):
            raise Turned(404, f"a sample has no form {form!r}.")
        if form == "json":
            return JSONResponse(_values(load_sample(found)), headers=kept)
        return Response(_png(found), media_type="image/png", headers=kept)

    def state(rater: str) -> dict[str, Any]:
        tasks = [
            {"task": lease.task.id, "kind": lease.task.kind, "prompt": lease.task.prompt, "question": question,
             "asks": QUESTIONS[question][lease.task.kind] if question in QUESTIONS else question,
             "samples": [_shown(store.sample(lease.task.samples[place])) for place in lease.shown]}
            for lease in queue.hand_out(rater) for question in lease.open
        ]  # fmt: skip
        return {"tasks": tasks, "drawing": moving.drawing, **queue.counts(rater)}

    def on_state(rater: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if "before" in body:  # the rater has changed their name
            queue.give_back(_text(body, "before", 60))
        return state(rater)

    def on_answer(rater: str, body: Mapping[str, Any]) -> dict[str, Any]:
        task, spent = _whole(body, "task"), _whole(body, "milliseconds")
        answer, question, key = (_text(body, name, 200) for name in ("answer", "question", "key"))
        queue.answer(rater, task, question, answer, spent, f"{rater} {key}")
        return state(rater)

    def on_undo(rater: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"undone": queue.undo(rater), **state(rater)}

    def on_summary(rater: str, body: Mapping[str, Any]) -> dict[str, Any]:
        answers = read_answers(store)
        if rater not in answers.raters:
            return {}
        row = answers.raters.index(rater)
        shares = {"agreement": self_agreement(answers, row), "swapped": self_agreement(answers, row, swapped=True),
                  "left": left_share(answers, row)}  # fmt: skip
        return {
            name: {"hits": s.hits, "count": s.count, "interval": s.interval} for name, s in shares.items() if s.count
        }

    def post(work: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            body = await _body(request)
            return JSONResponse(await run_in_threadpool(work, _text(body, "rater", 60), body))

        return endpoint

    async def turned(request: Request, error: Exception) -> Response:
        status = error.status if isinstance(error, Turned) else 409 if isinstance(error, NotLent) else 400
        return JSONResponse({"error": str(error)}, status)

    async def nothing(request: Request) -> Response:
        return Response(status_code=204)

    routes = [
        Route("/", page),
        Route("/favicon.ico", nothing),
        Route("/assets/{name}", asset),
        Route("/samples/{number:int}.{form}", sample),
        *[
            Route(f"/api/{name}", post(work), methods=["POST"])
            for name, work in {"state": on_state, "answer": on_answer, "undo": on_undo, "summary": on_summary}.items()
        ],
    ]
    app = Starlette(routes=routes, exception_handlers={Turned: turned, FeedbackError: turned})
    app.add_middleware(Gate, token=token)
    return app


class Turned(Exception):
    """A request that is not answered: status and sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Gate:
    """Lets through what may come in (see above), and puts the security headers on every answer."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import MutableHeaders
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(Request(scope))
        except Turned as error:
            await JSONResponse({"error": str(error)}, error.status)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise Turned(403, f"this page is for loopback addresses, not for host {host!r}.")
        if self.token is not None:
            given = request.cookies.get(COOKIE) or (
                request.query_params.get("token", "") if request.url.path == "/" else ""
            )
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise Turned(401, "open the address that `scoreact rate` has printed, with its token.")
        if request.method == "POST":
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc != host:
                raise Turned(403, f"answers come from this page, not from {origin!r}.")
            if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
                raise Turned(415, "the Content-Type is not application/json.")
        elif request.method not in ("GET", "HEAD"):
            raise Turned(405, f"{request.method} does nothing here.")


async def _body(request: Request) -> Mapping[str, Any]:
    """The request's JSON object. Turned away where it is large, or none."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise Turned(413, f"the body has more than {MOST_BYTES} bytes.")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise Turned(400, "the body is no JSON.") from None
    if not isinstance(body, dict):
        raise Turned(400, "the body is no JSON object.")
    return body


def _text(body: Mapping[str, Any], name: str, most: int) -> str:
    value = body.get(name)
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise Turned(400, f"{name} is {str(value)[:80]!r}; expected a text of at most {most} characters.")
    return value


def _whole(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise Turned(400, f"{name} is {str(value)[:80]!r}; expected a whole number of at least 0.")
    return value


# --- samples as the page shows them --------------------------------------------------------------------------------------


def _asset(name: str) -> bytes:
    return (resources.files("scoreact") / "assets" / name).read_bytes()


def _shown(sample: StoredSample) -> dict[str, Any]:
    """The address of a sample, and whether it is a picture or values to plot."""
    form = "png" if sample.picture is not None or is_video(load_sample(sample).shape) else "json"
    return {"number": sample.id, "form": form, "url": f"/samples/{sample.id}.{form}"}


def _png(sample: StoredSample) -> bytes:
    """The picture's own file; a film as an animated PNG."""
    if sample.picture is not None:
        try:
            return sample.picture.read_bytes()
        except OSError as error:
            raise Turned(404, f"sample {sample.id} cannot be read: {error.strerror}.") from None
    frames = load_sample(sample)
    if not is_video(frames.shape):
        raise Turned(404, f"sample {sample.id} is no picture.")
    content = io.BytesIO()
    write_video(frames, content)
    return content.getvalue()


def _values(sample: torch.Tensor) -> dict[str, Any]:
    """A series [length] or [channels, length] or a point [2], thinned where it is long."""
    if sample.ndim not in (1, 2):
        raise Turned(404, f"a sample of shape {list(sample.shape)} cannot be plotted.")
    lines = sample.reshape(-1, sample.shape[-1]).float()
    lines = lines[:, :: -(-lines.shape[1] // MOST_POINTS)]
    return {"point": sample.shape == (2,), "lines": lines.tolist()}


# --- the server ------------------------------------------------------------------------------------------------------------


class PageServer:
    """The app on a port, answered from a thread of its own until `stop`.

    Args:
        queue: Whose tasks are shown.
        host: To listen at; one that is no loopback address gets a token, which is part of `url`.
        port: 0 takes a free one.
        progress: Shown by the page.

    Raises:
        FeedbackError: Where the extra is not installed, or the port is taken.
    """

    def __init__(
        self, queue: TaskQueue, host: str = "127.0.0.1", port: int = 0, progress: Progressing | None = None
    ) -> None:
        try:
            import uvicorn
        except ImportError:
            raise FeedbackError("the page needs starlette and uvicorn: pip install 'scoreact[feedback]'.") from None
        self.token = None if is_loopback(host) else secrets.token_urlsafe(24)
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise FeedbackError(f"cannot listen at {host}:{port} ({error.strerror}); give another --port.") from None
        everywhere = host in ("0.0.0.0", "::")  # an address to listen at, and none to go to
        shown = socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/" + (f"?token={self.token}" if self.token else "")
        self._server = uvicorn.Server(
            uvicorn.Config(
                app_of(queue, self.token, progress), log_level="warning", access_log=False, lifespan="off", ws="none",
                http="h11", loop="asyncio", server_header=False, limit_concurrency=200,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        """Finish what is being answered, and end."""
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
