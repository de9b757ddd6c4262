"""A reward behind HTTP, for a training run in another process: `GET /health` and `POST /score`, loopback by default.

A request is a safetensors record and its answer JSON (`rewards.remote` writes and reads them); nothing is unpickled or run.
One scoring at a time; requests that wait together are scored together. NaN and inf are passed on: judging them is the
client's. There is no authentication. Does not print: `log` tells whoever wants to.
"""

from __future__ import annotations

import ipaddress
import json
import platform
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ... import __version__
from ...support.errors import RewardError
from ...types import Condition
from ..base import Reward, name_of, to_tensor
from .child import read_request

SILENCE = 60.0  # seconds without a byte after which a request is given up
MEGABYTE = 2**20


@dataclass
class ScoringJob:
    """A request that waits for its rewards [B]."""

    samples: Tensor  # [B, ...]
    condition: Condition
    rewards: Future[Tensor] = field(default_factory=Future)


class Scorer:
    """One scoring at a time, of at most `batch_size` samples (0: any number); waiting requests are taken together."""

    def __init__(self, reward: Reward, batch_size: int, device: torch.device) -> None:
        self.reward, self.batch_size, self.device = reward, batch_size, device
        self.name = name_of(reward)
        self.calls = 0  # samples scored
        self._waiting: list[ScoringJob] = []
        self._list, self._scoring = threading.Lock(), threading.Lock()

    def score(self, samples: Tensor, condition: Condition) -> Tensor:
        """Rewards [B] of samples [B, ...]. Raises what the reward raises, and ValueError for another number of them."""
        job = ScoringJob(samples, condition)
        with self._list:
            self._waiting.append(job)
        with self._scoring:  # whoever comes first scores for those who came meanwhile
            while not job.rewards.done():
                self._score(self._next())
        return job.rewards.result()

    def _next(self) -> list[ScoringJob]:
        """The first who wait, as many as fit, all with samples of one shape and dtype."""
        jobs: list[ScoringJob] = []
        with self._list:
            first, count = self._waiting[0].samples, 0
            while self._waiting:
                samples = self._waiting[0].samples
                count += len(samples)
                alike = samples.shape[1:] == first.shape[1:] and samples.dtype == first.dtype
                if jobs and (count > self.batch_size or not alike):
                    break
                jobs.append(self._waiting.pop(0))
        return jobs

    @torch.no_grad()
    def _score(self, jobs: list[ScoringJob]) -> None:
        samples = torch.cat([job.samples for job in jobs]).to(self.device)
        prompts = [prompt for job in jobs for prompt in job.condition.prompts]
        # without metadata in one request the others' have no row to stand in
        metadata = [entry for job in jobs for entry in job.condition.metadata or [{}] * len(job.condition)]
        condition = Condition(prompts, None, metadata if any(job.condition.metadata for job in jobs) else ())
        try:
            size = self.batch_size or len(samples)
            rows = torch.arange(len(samples)).split(size)
            found = [self._rewards(x, condition[i]) for x, i in zip(samples.split(size), rows, strict=True)]
        except Exception as error:
            if len(jobs) > 1:  # an error is the one's whose samples caused it
                for job in jobs:
                    self._score([job])
            else:
                jobs[0].rewards.set_exception(error)
            return
        for job, rewards in zip(jobs, torch.cat(found).split([len(job.samples) for job in jobs]), strict=True):
            self.calls += len(rewards)
            job.rewards.set_result(rewards)

    def _rewards(self, samples: Tensor, condition: Condition) -> Tensor:
        rewards = to_tensor(self.reward(samples, condition), samples, self.name).cpu()
        if rewards.shape[:1] != samples.shape[:1]:
            raise RewardError(
                f"reward {self.name} returned shape {tuple(rewards.shape)} for {len(samples)} samples; "
                f"expected ({len(samples)},)."
            )
        return rewards


class Refused(Exception):
    """A request that is not scored: status and sentence."""


class Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = SILENCE

    def do_GET(self) -> None:
        self._answer(self._health)

    def do_POST(self) -> None:
        self._answer(self._score)

    def _answer(self, work: Callable[[], dict[str, Any]]) -> None:
        """The work's result with status 200; an error as {"error": one sentence} with its status."""
        try:
            self._check_host()
            status, content = 200, work()
        except Refused as error:
            status, content = error.args[0], {"error": error.args[1]}
        except Exception as error:
            said = str(error) if isinstance(error, ValueError) else f"raised {type(error).__name__}: {error}"
            status, content = 500, {"error": " ".join(said.split())}
        self._send(status, content)

    def _send(self, status: int, content: dict[str, Any]) -> None:
        if "error" in content:
            self.server.log(f"{self.command} {self.path!r}: {status}, {content['error']}")
        body = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError as error:
            self.server.log(f"an answer could not be sent: {error}")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong (no such method, no HTTP), in our form."""
        self.command, self.path = getattr(self, "command", None) or "?", getattr(self, "path", "?")
        self._send(code, {"error": message or self.responses[code][0]})

    def _check_host(self) -> None:
        """A page in a browser can make any name point here: a loopback server answers to loopback names only."""
        name = self.headers.get("Host", "localhost")
        if is_loopback(self.server.host) and not is_loopback(urlsplit(f"//{name}").hostname or ""):
            raise Refused(403, f"this server is for loopback addresses, not for host {name!r}.")

    def _health(self) -> dict[str, Any]:
        if self.path != "/health":
            raise Refused(404, f"there is nothing to GET at {self.path!r}; there are GET /health and POST /score.")
        scorer = self.server.scorer
        return {
            "ready": scorer is not None, "name": self.server.name, "calls": scorer.calls if scorer is not None else 0,
            "batch_size": self.server.batch_size, "max_bytes": self.server.max_bytes,
            "versions": {"scoreact": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip

    def _score(self) -> dict[str, Any]:
        if self.path != "/score":
            raise Refused(404, f"there is nothing to POST to at {self.path!r}; there are GET /health and POST /score.")
        if self.headers.get("Content-Type") != "application/octet-stream":  # a browser sends it only where allowed
            raise Refused(415, "the Content-Type is not application/octet-stream.")
        scorer = self.server.scorer
        if scorer is None:
            raise Refused(503, f"reward {self.server.name} is still being loaded.")
        try:
            samples, prompts, metadata = read_request(self._body())
        except ValueError as error:
            raise Refused(400, str(error)) from None
        return {"rewards": scorer.score(torch.from_numpy(samples), Condition(prompts, None, metadata)).tolist()}

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None or not length.isascii() or not length.isdigit():
            raise Refused(411, f"Content-Length is {length!r}; give the number of bytes.")
        if len(length) > 18 or int(length) > self.server.max_bytes:
            raise Refused(413, f"the body has {length[:18]} bytes; at most {self.server.max_bytes} are taken.")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, f"the body did not arrive in {SILENCE:g} s.") from None
        if len(body) != int(length):
            raise Refused(400, f"the body has {len(body)} bytes, not the {length} of Content-Length.")
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Requests that went well are not worth a line."""


class RewardServer(ThreadingHTTPServer):
    """Listens from the start and answers 503 until `start` was given the reward. port 0: a free one, see `.url`."""

    daemon_threads = True

    def __init__(
        self,
        name: str,
        host: str = "127.0.0.1",
        port: int = 0,
        batch_size: int = 64,
        max_bytes: int = 1024 * MEGABYTE,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name, self.host, self.batch_size, self.max_bytes, self.log = name, host, batch_size, max_bytes, log
        self.scorer: Scorer | None = None
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}"

    def start(self, reward: Reward, device: torch.device) -> None:
        """Score with `reward` from now on, on samples on `device`."""
        self.scorer = Scorer(reward, self.batch_size, device)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's affair."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host; a name other than localhost may be anybody."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
