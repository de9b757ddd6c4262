"""Rewards computed elsewhere: by a reward server over HTTP, or by another Python in a process of its own.

`Elsewhere` is the Reward; `Http` and `Child` carry its bytes. A request is a safetensors record, the answer JSON; nothing
is pickled. Does not know who asks, nor when (`overlap` does).
"""

from __future__ import annotations

import contextlib
import http.client
import inspect
import json
import re
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from shutil import which
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors.torch import save
from torch import Tensor

from ...support.errors import RewardError
from ...types import Condition
from ..base import ReturnedValueError, known, reward_dtype, to_tensor

BACKOFF, LONGEST = 0.5, 8.0  # seconds before the second attempt, doubling from there; the longest of these waits
OTHER_PYTHON = re.compile(r"(.+?:\w+)@(.+)")  # file.py:name@/path/to/python
MOST = 64 * 2**20  # bytes of an answer: a number a sample is some twenty
TAIL = 400  # characters of a child's stderr that an error shows


class RemoteError(ReturnedValueError):
    """A reward elsewhere gave no rewards. Its message names the place and the remedy."""


def request(samples: Tensor, condition: Condition) -> bytes:
    """Samples [B, ...] and the condition's prompts and metadata as one safetensors record; float32, or float64 as it is."""
    plain = {"prompts": list(condition.prompts), "metadata": [dict(entry) for entry in condition.metadata]}
    try:
        text = json.dumps(plain)
    except TypeError as error:
        raise RemoteError(f"metadata cannot be sent to a reward elsewhere ({error}). Keep to plain values.") from None
    numbers = samples.detach().to("cpu", reward_dtype(samples)).contiguous()
    return save({"samples": numbers}, {"condition": text})


class Transport(Protocol):
    """Carries requests. Both methods raise RemoteError; `open` may be called again and does nothing then."""

    name: str

    def open(self) -> None: ...
    def exchange(self, body: bytes) -> Any: ...


class Elsewhere:
    """A reward behind a transport: samples [B, ...], condition of B -> float tensor [B] on the samples' device.

    batch_size: samples a request; a trainer samples its batch in these parts, so that one is scored while the next is
    drawn (0: all at once, and the paths are those of the same reward computed here). overlap False: every part is
    scored before the next is drawn, with the same paths and rewards. The condition's rows are not sent.
    """

    differentiable = False

    def __init__(self, transport: Transport, batch_size: int, overlap: bool) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 0:
            raise RewardError(f"batch_size is {batch_size!r}; give a whole number, 0 for all samples at once.")
        self.transport, self.name = transport, transport.name
        self.batch_size, self.overlap = batch_size, bool(overlap)
        self._one_at_a_time = threading.Lock()

    def ready(self) -> None:
        """Reach the server or start the child now, so that a mistake is said before the first sample."""
        with self._one_at_a_time:
            self.transport.open()

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        with self._one_at_a_time:
            self.transport.open()
            size = self.batch_size or len(samples)
            rows = torch.arange(len(samples)).split(size)
            return torch.cat([self._ask(x, condition[i]) for x, i in zip(samples.split(size), rows, strict=True)])

    def _ask(self, samples: Tensor, condition: Condition) -> Tensor:
        answer = self.transport.exchange(request(samples, condition))
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(samples):
            what = f"{len(rewards)} rewards" if isinstance(rewards, list) else repr(rewards)[:80]
            raise RemoteError(
                f"reward {self.name} returned {what} for {len(samples)} samples; expected one number a sample."
            )
        return to_tensor(rewards, samples, self.name)


# --- HTTP ------------------------------------------------------------------------------------------------------------


class Http:
    """A reward server, as `scoreact reward-server` starts it. No proxy is used, whatever the environment says."""

    def __init__(self, url: str, time_out: float, retries: int) -> None:
        try:
            parts = urlsplit(url)
            self._port = parts.port
        except ValueError:
            parts, self._port = urlsplit("http:"), None
        if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
            raise RewardError(f"reward {url!r} is no address of a reward server. Give 'http://HOST:PORT'.")
        if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
            raise RewardError(f"retries is {retries!r}; give a whole number, 0 for one attempt only.")
        self.name, self._host, self._path = url, parts.hostname, parts.path.rstrip("/")
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._time_out, self._retries = _seconds(time_out), retries
        self._limit: int | None = None  # bytes of a request, known once the server was reached

    def open(self) -> None:
        if self._limit is not None:
            return
        health = self._ask("GET", "/health", None)
        limit = health.get("max_bytes") if isinstance(health, dict) else None
        if not isinstance(limit, int):
            raise RemoteError(f"{self.name} answers, but it is no reward server. Give the address that it printed.")
        self._limit = limit

    def exchange(self, body: bytes) -> Any:
        if self._limit is not None and len(body) > self._limit:
            raise RemoteError(
                f"a request to reward {self.name} would be {len(body)} bytes; the server takes {self._limit}. Lower the "
                "reward's option batch_size, or start the server with more --max-megabytes."
            )
        return self._ask("POST", "/score", body)

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        """The answer's JSON; another attempt after a failed connection and after 503, never after a reward's error."""
        problem = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(LONGEST, BACKOFF * 2 ** (attempt - 1)))
            connection = self._connection(self._host, self._port, timeout=self._time_out)
            try:
                status, text = self._answer(connection, method, path, body)
            except TimeoutError:
                raise RemoteError(
                    f"reward {self.name} did not answer in {self._time_out:g} s. Raise the reward's option time_out, or "
                    "lower its batch_size."
                ) from None
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
                continue
            finally:
                connection.close()
            if len(text) > MOST:
                raise RemoteError(f"reward {self.name} answered with more than {MOST:,} bytes; is it a reward server?")
            content = _json(text)
            said = content.get("error") if isinstance(content, dict) else None
            if status == 503:
                problem = said or "503 service unavailable"
                continue
            if status != 200 or content is None:
                raise RemoteError(f"reward {self.name} answered with status {status}: {said or repr(text[:80])}")
            return content
        raise RemoteError(
            f"no reward server answers at {self.name} ({problem}; attempts: {self._retries + 1}). "
            "Start it there with `scoreact reward-server`, on that port."
        )

    def _answer(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> tuple[int, bytes]:
        """Status and body, at most MOST bytes of it and one. Raises TimeoutError where the whole takes longer than time_out.

        The connection's own limit is of each wait for a byte, and a server that sends one now and then never meets it.
        """
        ends, late = time.monotonic() + self._time_out, threading.Event()
        connection.connect()
        wire = connection.sock  # a response that ends the connection takes it from there

        def give_up() -> None:
            late.set()
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, ends - time.monotonic()), give_up)
        timer.daemon = True
        timer.start()
        try:
            connection.request(method, self._path + path, body, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            text = response.read(MOST + 1)
            if response.length and len(text) <= MOST:
                raise http.client.IncompleteRead(text, response.length)
        except (OSError, http.client.HTTPException):
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
        if late.is_set():
            raise TimeoutError
        return response.status, text


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


# --- another Python --------------------------------------------------------------------------------------------------


class Child:
    """A function of a file or module, run by another Python (`child.py`, which needs numpy there and no scoreact).

    Started on first use, never a second time; it ends when this object or this process does.
    """

    def __init__(self, spec: str, python: str, time_out: float, options: Mapping[str, Any]) -> None:
        found = which(str(Path(python).expanduser()))
        if found is None:
            raise RewardError(f"reward {spec}@{python}: there is no such Python. Give the full path of its executable.")
        place = Path(spec.rpartition(":")[0]).expanduser()
        if place.suffix == ".py" and not place.is_file():
            raise RewardError(f"reward file {str(place)!r} does not exist (looked in {Path.cwd()}).")
        try:
            text = json.dumps(dict(options))
        except TypeError as error:
            raise RewardError(f"an option of reward {spec} cannot be sent ({error}). Keep to plain values.") from None
        self.name, self._time_out = f"{spec}@{python}", _seconds(time_out)
        self._command = [found, str(Path(__file__).with_name("child.py")), spec, text]
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        if self._process is not None:
            return
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
                start_new_session=True,  # Ctrl-C asks the trainer for a checkpoint; the child goes on until then
            )  # fmt: skip
        except OSError as error:
            self._stderr.close()
            raise RemoteError(f"reward {self.name} cannot be started ({error}). Give another Python.") from None
        weakref.finalize(self, _stop, self._process, self._stderr)
        self._answer(b"")

    def exchange(self, body: bytes) -> Any:
        return self._answer(len(body).to_bytes(8, "little") + body)

    def _answer(self, message: bytes) -> Any:
        """Send the message, if any, and read one; a child that takes too long is killed, which ends the reading."""
        assert self._process is not None
        process, late, size = self._process, threading.Event(), 0
        assert process.stdin is not None
        assert process.stdout is not None

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._time_out, give_up)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(message)
            process.stdin.flush()
            head = process.stdout.read(8)
            size = int.from_bytes(head, "little")
            content = _json(process.stdout.read(size)) if len(head) == 8 and size <= MOST else None
        except OSError:
            content = None
        finally:
            timer.cancel()
        if size > MOST:
            process.kill()
            raise RemoteError(f"the process of reward {self.name} answered with {size:,} bytes; {MOST:,} are taken.")
        if late.is_set():
            raise RemoteError(
                f"reward {self.name} did not answer in {self._time_out:g} s and was stopped. Raise the reward's option "
                "time_out, or lower its batch_size."
            )
        if content is None:
            raise RemoteError(f"the process of reward {self.name} ended ({_how_it_ended(process)}). {self._tail()}")
        if "error" in content:
            raise RemoteError(f"reward {self.name} {content['error']}.")
        return content

    def _tail(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, 2) - TAIL))
        text = " ".join(self._stderr.read().decode(errors="replace").split())
        return f"Its last words: {text}" if text else "It said nothing."


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return f"signal {-code}" if code < 0 else f"status {code}"


def _stop(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, stderr):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was never read by a child that is gone
                continue


def _seconds(time_out: float) -> float:
    if isinstance(time_out, bool) or not isinstance(time_out, int | float) or not 0 < time_out < threading.TIMEOUT_MAX:
        raise RewardError(f"time_out is {time_out!r}; give seconds above 0.")
    return float(time_out)


# --- by name ---------------------------------------------------------------------------------------------------------


def over_http(
    url: str, *, time_out: float = 300.0, retries: int = 5, batch_size: int = 0, overlap: bool = True
) -> Elsewhere:
    """The reward of the server at `url`. time_out: seconds for one answer; retries: attempts after the first."""
    return Elsewhere(Http(url, time_out, retries), batch_size, overlap)


def in_process(
    spec: str, *, time_out: float = 300.0, batch_size: int = 0, overlap: bool = True, **options: Any
) -> Elsewhere:
    """`file.py:name@/path/to/python`: that function in that Python. Options beyond those named are the function's."""
    matched = OTHER_PYTHON.fullmatch(spec)
    if matched is None:
        raise RewardError(f"reward {spec!r} names no function and Python. Give 'file.py:name@/path/to/python'.")
    return Elsewhere(Child(matched[1], matched[2], time_out, options), batch_size, overlap)


def find(spec: str, options: Mapping[str, Any]) -> Elsewhere | None:
    """The reward elsewhere that a spec names, None if it names another; nothing is reached or started yet.

    Raises ValueError for an address, Python, file or option that cannot be used.
    """
    if spec.startswith(("http://", "https://")):
        names = inspect.signature(over_http).parameters.keys() - {"url"}
        for option in options.keys() - names:
            raise RewardError(f"reward {spec!r} has no option {option!r}. {known('Options', option, names)}")
        return over_http(spec, **options)
    return in_process(spec, **options) if OTHER_PYTHON.fullmatch(spec) else None
