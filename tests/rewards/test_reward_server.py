"""Rewards elsewhere: the wire, the server's refusals, retries, another Python, overlap, and a server that is killed."""

from __future__ import annotations

import ast
import contextlib
import gc
import http.client
import json
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scoreact.api.start import finetune
from scoreact.cli import main as cli
from scoreact.control.trajectory import Trajectory
from scoreact.models.mlp import ResidualModel
from scoreact.models.value_networks import VectorValue
from scoreact.recipes.gaussian import linear_reward, mixture
from scoreact.rewards import Reward, checked, load
from scoreact.rewards.base import FunctionReward
from scoreact.rewards.remote import child, overlap
from scoreact.rewards.remote import client as remote
from scoreact.rewards.remote.client import Elsewhere, RemoteError, request
from scoreact.rewards.remote.server import RewardServer
from scoreact.training import trainer
from scoreact.training.config import Config, updated, usable
from scoreact.types import Condition

CPU = torch.device("cpu")
SAMPLES = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
CONDITION = Condition([f"prompt {i} ü" for i in range(6)], metadata=[{"i": i} for i in range(6)])


def mean(samples: Tensor, condition: Condition) -> Tensor:
    return samples.flatten(1).mean(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts."""
    monkeypatch.setattr(remote, "BACKOFF", 0.01)


@pytest.fixture
def serve() -> Iterator[Callable[..., RewardServer]]:
    """serve(reward, **settings) -> a server that answers at `.url`."""
    servers: list[RewardServer] = []

    def start(reward: Reward | None, **settings: Any) -> RewardServer:
        server = RewardServer("the reward", **settings)
        servers.append(server)
        if reward is not None:
            server.start(reward, CPU)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def at(server: RewardServer, **options: Any) -> Elsewhere:
    found = load(server.url, **options)
    assert isinstance(found, Elsewhere)
    return found


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_request_is_read_as_it_was_written(dtype: torch.dtype) -> None:
    samples = SAMPLES.to(dtype).mT  # not contiguous
    found, prompts, metadata = child.read_request(request(samples, CONDITION))
    sent = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(torch.from_numpy(found), samples.to(sent))
    assert torch.from_numpy(found).dtype == sent
    assert prompts == CONDITION.prompts
    assert metadata == CONDITION.metadata
    assert child.read_request(request(samples, Condition(["a"] * 6)))[2] == []


def test_a_longer_header_that_leaves_the_numbers_unaligned_is_read_too() -> None:
    body = request(SAMPLES, CONDITION)
    size = int.from_bytes(body[:8], "little")
    moved = (size + 3).to_bytes(8, "little") + body[8 : 8 + size] + b"   " + body[8 + size :]
    found = child.read_request(moved)[0]
    assert found.flags.aligned
    assert np.array_equal(found, SAMPLES.numpy())


def record(header: object, numbers: bytes = bytes(8)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def entry(**changes: Any) -> dict[str, Any]:
    """A good header of two float32 samples of one number, with changes."""
    condition = changes.pop("condition", {"prompts": ["a", "b"], "metadata": []})
    tensor = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8], **changes}
    return {"samples": tensor, "__metadata__": {"condition": json.dumps(condition)}}


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "header longer than the body": ((2**63).to_bytes(8, "little") + b"{}", "cut short"),
    "header is no JSON": ((4).to_bytes(8, "little") + b"\xff\xfe{}", "the header cannot be read"),
    "header is deep": (record(0)[:0] + (200_000).to_bytes(8, "little") + b"[" * 200_000, "the header cannot be read"),
    "no samples": (record({"__metadata__": entry()["__metadata__"]}), "KeyError: 'samples'"),
    "no condition": (record({"samples": entry()["samples"]}), "KeyError: '__metadata__'"),
    "a number for a header": (record(7), "the header cannot be read"),
    "dtype": (record(entry(dtype="I64")), "samples have dtype 'I64'; known: F32, F64."),
    "shape of nothing": (record(entry(shape=[])), "samples have shape []"),
    "no rows": (record(entry(shape=[0, 1], data_offsets=[0, 0]), b""), "samples have shape [0, 1]"),
    "negative shape": (record(entry(shape=[-2, -1])), "samples have shape [-2, -1]"),
    "huge shape": (record(entry(shape=[2, 2**40])), "need 8796093022208 bytes; the body holds 8"),
    "offsets elsewhere": (record(entry(data_offsets=[4, 12])), "need 8 bytes"),
    "too few numbers": (record(entry(), bytes(4)), "need 8 bytes; the body holds 4"),
    "too many numbers": (record(entry(), bytes(12)), "need 8 bytes; the body holds 12"),
    "one prompt": (record(entry(condition={"prompts": ["a"], "metadata": []})), "got 2 samples and other prompts"),
    "prompts that are numbers": (record(entry(condition={"prompts": [1, 2], "metadata": []})), "other prompts"),
    "one metadata": (record(entry(condition={"prompts": ["a", "b"], "metadata": [{}]})), "other metadata"),
}


def post(server: RewardServer, body: bytes | None, path: str = "/score", method: str = "POST", **headers: str) -> Any:
    """(status, answer) of a request as a stranger would send it."""
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(str(host), int(port), timeout=20)
    sent = {"Content-Type": "application/octet-stream", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method, path, body, sent)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def test_a_body_that_lies_is_refused_in_a_sentence(serve: Callable[..., RewardServer]) -> None:
    server = serve(mean)
    assert post(server, record(entry())) == (200, {"rewards": [0.0, 0.0]}), "the record that the others spoil"
    for name, (body, said) in LIES.items():
        status, content = post(server, body)
        assert (name, status) == (name, 400)
        assert said in content["error"], name
        assert content["error"].endswith("."), name
    assert post(server, record(entry()))[0] == 200


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(serve: Callable[..., RewardServer], tmp_path: Path) -> None:
    trap = tmp_path / "made"
    assert post(serve(mean), pickle.dumps(Trap(str(trap))))[0] == 400
    assert not trap.exists()


# --- the server's doors ----------------------------------------------------------------------------------------------


def test_it_listens_at_loopback_only_unless_told(serve: Callable[..., RewardServer]) -> None:
    server = serve(mean)
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}"


def test_doors(serve: Callable[..., RewardServer]) -> None:
    said: list[str] = []
    server = serve(mean, max_bytes=1000, log=said.append)
    good = record(entry())
    for status, part, answer in [
        (404, "POST at '/'", post(server, good, "/")),
        (404, "nothing to GET at '/score'", post(server, None, "/score", "GET")),
        (404, "'/../etc/passwd'", post(server, None, "/../etc/passwd", "GET")),
        (501, "Unsupported method ('PUT')", post(server, good, method="PUT")),
        (415, "Content-Type", post(server, good, Content_Type="text/plain")),
        (403, "not for host 'evil.example'", post(server, good, Host="evil.example")),
        (413, "at most 1000 are taken", post(server, bytes(1001))),
        (413, "at most 1000", post(server, None, Content_Length="9" * 5000)),
        (411, "Content-Length is '-5'", post(server, None, Content_Length="-5")),
        (411, "Content-Length is None", post(server, None, method="POST", Transfer_Encoding="chunked")),
    ]:
        assert answer[0] == status, answer
        assert part.replace("POST at", "POST to at") in answer[1]["error"]
    assert len(said) == 10
    assert post(server, good, Host="localhost")[0] == 200
    assert post(server, good, Host=f"127.0.0.1:{server.server_address[1]}")[0] == 200


def test_a_body_shorter_than_its_content_length(serve: Callable[..., RewardServer]) -> None:
    server = serve(mean)
    with socket.create_connection(server.server_address[:2], 20) as connection:
        head = "POST /score HTTP/1.0\r\nContent-Type: application/octet-stream\r\nContent-Length: 500\r\n\r\n"
        connection.sendall(head.encode() + record(entry()))
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert b" 400 " in answer
    assert b"not the 500 of Content-Length" in answer


def test_a_client_that_falls_silent_is_given_up(
    serve: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scoreact.rewards.remote.server.Handler.timeout", 0.5)
    server = serve(mean)
    with socket.create_connection(server.server_address[:2], 20) as connection:
        head = "POST /score HTTP/1.0\r\nContent-Type: application/octet-stream\r\nContent-Length: 500\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 408 " in connection.makefile("rb").readline()


def test_health(serve: Callable[..., RewardServer]) -> None:
    server = serve(None, batch_size=5)
    assert post(server, None, "/health", "GET")[1]["ready"] is False
    assert post(server, record(entry())) == (503, {"error": "reward the reward is still being loaded."})
    server.start(mean, CPU)
    post(server, record(entry()))
    status, health = post(server, None, "/health", "GET")
    assert status == 200
    assert (health["ready"], health["name"], health["calls"], health["batch_size"]) == (True, "the reward", 2, 5)
    assert health["versions"]["torch"] == torch.__version__


# --- scoring over HTTP -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [0, 4])
def test_rewards_are_those_of_the_function(
    serve: Callable[..., RewardServer], dtype: torch.dtype, batch_size: int
) -> None:
    seen: list[int] = []

    def function(samples: Tensor, condition: Condition) -> Tensor:
        seen.append(len(samples))
        numbers = torch.tensor(
            [float(p.split()[1]) + m["i"] for p, m in zip(condition.prompts, condition.metadata, strict=True)]
        )
        return mean(samples, condition) + numbers.to(samples.dtype) / 3

    reward = checked(at(serve(function), batch_size=batch_size))
    samples = SAMPLES.to(dtype)
    found = reward(samples, CONDITION)
    assert seen == ([4, 2] if batch_size else [6])
    assert found.dtype == dtype
    assert torch.equal(found, function(samples, CONDITION))
    assert reward.calls == 6
    assert not reward.differentiable


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.0, float("nan"), 2.0], "returned NaN for sample 1 of 3 (counted from 0; prompt 'b')"),
        ([0.0, 1.0, float("-inf")], "returned -inf for sample 2 of 3"),
        ([[0.0], [1.0], [2.0]], "returned shape (3, 1) for 3 samples; expected (3,). Add `.squeeze(-1)` at its end."),
        ([0.0, 1.0], "returned shape (2,) for 3 samples; expected (3,)."),
        (3.0, "returned shape () for 3 samples"),
        (None, "returned a value of type NoneType"),
    ],
)
def test_what_is_wrong_with_the_values_is_said_as_for_a_local_reward(
    serve: Callable[..., RewardServer], values: object, said: str
) -> None:
    reward = checked(at(serve(lambda samples, condition: values)))
    with pytest.raises(ValueError, match=r"reward http://127\.0\.0\.1") as caught:
        reward(SAMPLES[:3], Condition(["a", "b", "c"]))
    assert said in str(caught.value)


def test_an_error_of_the_reward_is_one_sentence_and_not_tried_again(serve: Callable[..., RewardServer]) -> None:
    calls: list[int] = []

    def broken(samples: Tensor, condition: Condition) -> Tensor:
        calls.append(1)
        raise KeyError("no such\nthing")

    with pytest.raises(RemoteError, match=r"answered with status 500: raised KeyError: 'no such\\nthing'"):
        checked(at(serve(broken)))(SAMPLES, CONDITION)
    assert len(calls) == 1


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    reward = checked(load(url, retries=2))
    with pytest.raises(
        RemoteError, match=r"no reward server answers at .*Connection refused; attempts: 3\)\. Start it"
    ):
        reward(SAMPLES, CONDITION)


def test_a_server_that_comes_late_is_waited_for(serve: Callable[..., RewardServer]) -> None:
    server = serve(None)
    reward = checked(at(server, retries=9))
    refused: list[str] = []

    def log(line: str) -> None:
        refused.append(line)
        if len(refused) == 3:
            server.start(mean, CPU)

    server.log = log
    assert torch.equal(reward(SAMPLES, CONDITION), mean(SAMPLES, CONDITION))
    assert len(refused) == 3
    assert "503" in refused[0]


def test_a_connection_that_breaks_is_tried_again(serve: Callable[..., RewardServer]) -> None:
    server = serve(mean)
    whole, broken = server.process_request, [0]

    def process_request(connection: Any, address: Any) -> None:
        if broken[0] < 2:
            broken[0] += 1
            server.shutdown_request(connection)
        else:
            whole(connection, address)

    server.process_request = process_request  # type: ignore[method-assign]
    assert torch.equal(at(server, retries=2)(SAMPLES, CONDITION), mean(SAMPLES, CONDITION))
    assert broken == [2]


@pytest.mark.parametrize(
    ("head", "most", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", 10**6, r"did not answer in 0\.5 s"),
        (b"HTTP/1.1 200 OK\r\n\r\n", 10**6, r"did not answer in 0\.5 s"),
        (b"HTTP/1.1 200 OK\r\nX: ", 10**6, r"did not answer in 0\.5 s"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"1" * 100, 50, "answered with more than 50 bytes"),
    ],
    ids=["a body", "a body without end", "a header", "too much"],
)
def test_an_answer_in_drops_meets_the_limit(head: bytes, most: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then, each well within the time for one: time_out is of the whole answer, and a body has a limit."""
    monkeypatch.setattr(remote, "MOST", most)
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with contextlib.suppress(OSError), connection:
            connection.sendall(head)
            while True:
                time.sleep(0.05)
                connection.sendall(b"1")

    threading.Thread(target=drip, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(RemoteError, match=said):
        load(f"http://127.0.0.1:{listener.getsockname()[1]}", time_out=0.5, retries=0)(SAMPLES, CONDITION)
    assert time.monotonic() - begin < 10
    listener.close()


def test_a_reward_that_takes_too_long(serve: Callable[..., RewardServer]) -> None:
    gate = Gate()
    reward = at(serve(gate))
    reward.ready()
    reward.transport._time_out = 0.3  # type: ignore[attr-defined]
    with pytest.raises(RemoteError, match=r"did not answer in 0\.3 s\. Raise the reward's option time_out"):
        checked(reward)(SAMPLES, CONDITION)
    assert gate.entered.wait(20)
    gate.opened.set()
    assert gate.sizes == [6], "the work is not asked for twice"


def test_a_request_over_the_servers_limit_is_not_sent(serve: Callable[..., RewardServer]) -> None:
    server = serve(mean, max_bytes=400)
    with pytest.raises(
        RemoteError, match=r"would be \d+ bytes; the server takes 400\. Lower the reward's option batch"
    ):
        at(server)(SAMPLES, CONDITION)
    assert torch.equal(at(server, batch_size=1)(SAMPLES, CONDITION), mean(SAMPLES, CONDITION))


def test_another_service_there(serve: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = at(serve(mean))
    monkeypatch.setattr("scoreact.rewards.remote.server.Handler._health", lambda self: {"hello": 1})
    with pytest.raises(RemoteError, match="it is no reward server"):
        reward(SAMPLES, CONDITION)
    reward = at(serve(mean))
    monkeypatch.undo()
    monkeypatch.setattr("scoreact.rewards.remote.server.Handler._score", lambda self: {"rewards": [1.0, 2.0]})
    with pytest.raises(RemoteError, match="returned 2 rewards for 6 samples; expected one number a sample"):
        reward(SAMPLES, CONDITION)
    monkeypatch.setattr("scoreact.rewards.remote.server.Handler._score", lambda self: {"rewards": ["a"] * 6})
    with pytest.raises(ValueError, match="expected numbers"):
        reward(SAMPLES, CONDITION)


def test_metadata_that_cannot_be_sent(serve: Callable[..., RewardServer]) -> None:
    with pytest.raises(RemoteError, match="Object of type Tensor is not JSON serializable"):
        at(serve(mean))(SAMPLES, Condition(["a"] * 6, metadata=[{"picture": SAMPLES}] * 6))


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("http://", {}, "is no address of a reward server"),
        ("http://a:b", {}, "is no address of a reward server"),
        ("http://me:secret@host:1", {}, "is no address of a reward server"),
        ("http://127.0.0.1:1/?a=b", {}, "is no address of a reward server"),
        ("http://127.0.0.1:1", {"timeout": 3}, "has no option 'timeout'. Did you mean 'time_out'?"),
        ("http://127.0.0.1:1", {"time_out": 0}, "time_out is 0; give seconds above 0."),
        ("http://127.0.0.1:1", {"retries": -1}, "retries is -1"),
        ("http://127.0.0.1:1", {"batch_size": 0.5}, "batch_size is 0.5"),
        (f"gone.py:mean@{sys.executable}", {}, "reward file 'gone.py' does not exist"),
        ("gone.py:mean@/no/such/python", {}, "there is no such Python"),
        (f"m:f@{sys.executable}", {"x": object()}, "cannot be sent"),
    ],
)
def test_a_spec_that_cannot_be_used(spec: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^(reward|time_out|retries|batch_size|an option)") as caught:
        load(spec, **options)
    assert said in str(caught.value)


# --- batches on the server -------------------------------------------------------------------------------------------


class Gate:
    """A reward whose first call waits until it is opened; notes how many samples each call got."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        self.sizes.append(len(samples))
        self.entered.set()
        assert self.opened.wait(20)
        if "bad" in condition.prompts:
            raise ValueError("a bad one.")
        return samples[:, 0]


def together(server: RewardServer, gate: Gate, requests: list[tuple[Tensor, list[str]]]) -> list[Any]:
    """What each request gets when the later ones arrive while the first is scored."""
    found: list[Any] = [None] * len(requests)

    def ask(i: int) -> None:
        samples, prompts = requests[i]
        try:
            found[i] = at(server)(samples, Condition(prompts))
        except RemoteError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    assert server.scorer is not None
    for i, thread in enumerate(threads):
        thread.start()
        if i == 0:
            assert gate.entered.wait(20)
        else:
            while len(server.scorer._waiting) < i:
                time.sleep(0.001)
    gate.opened.set()
    for thread in threads:
        thread.join(20)
    return found


def test_requests_that_wait_are_scored_together(serve: Callable[..., RewardServer]) -> None:
    gate = Gate()
    server = serve(gate, batch_size=6)
    rows = torch.arange(24.0).reshape(12, 2)
    parts = [rows[:1], rows[1:3], rows[3:6], rows[6:9], rows[9:12].double()]
    found = together(server, gate, [(x, ["a"] * len(x)) for x in parts])
    assert gate.sizes == [1, 5, 3, 3], "at most 6, and float64 apart from float32"
    for x, rewards in zip(parts, found, strict=True):
        assert torch.equal(rewards, x[:, 0])
    assert server.scorer is not None
    assert server.scorer.calls == 12


def test_an_error_is_only_the_one_requests(serve: Callable[..., RewardServer]) -> None:
    gate = Gate()
    rows = torch.arange(6.0).reshape(3, 2)
    found = together(serve(gate), gate, [(rows[:1], ["a"]), (rows[1:2], ["bad"]), (rows[2:], ["a"])])
    assert [found[0].tolist(), found[2].tolist()] == [[0.0], [4.0]]
    assert "status 500: a bad one." in found[1]


def test_a_request_over_the_batch_size_is_split(serve: Callable[..., RewardServer]) -> None:
    gate = Gate()
    gate.opened.set()
    rows = torch.arange(14.0).reshape(7, 2)
    assert torch.equal(at(serve(gate, batch_size=3))(rows, Condition(["a"] * 7)), rows[:, 0])
    assert gate.sizes == [3, 3, 1]


# --- another Python --------------------------------------------------------------------------------------------------

REWARDS = """
import os, sys, time
import numpy as np

print("noise on stdout")

def images(images):
    print("more noise")
    assert isinstance(images, np.ndarray), type(images)
    return images.reshape(len(images), -1).mean(1)

def prompts(images, prompts):
    return [float(len(p)) for p in prompts]

def trl(images, prompts, metadata):
    return np.array([m.get("i", -1) for m in metadata]), {}

def condition(x, condition):
    return [m["i"] + len(condition) for m in condition.metadata]

def scaled(images, scale=1.0):
    return scale * images[:, 0, 0]

class Built:
    def __init__(self, offset):
        self.offset = offset
    def __call__(self, images):
        return np.full((len(images), 1), self.offset)

def broken(images):
    raise KeyError("no such thing")

def nothing(images):
    pass

def dies(images):
    print("the end is near", file=sys.stderr)
    os._exit(7)

def sleeps(images):
    time.sleep(60)

def environment(images):
    import importlib.util
    return [float(importlib.util.find_spec(n) is not None) for n in ("torch", "scoreact", "safetensors")] * 2

def torch_too(images):
    import torch
    assert isinstance(images, torch.Tensor) and not torch.is_grad_enabled()
    return images.mean((1, 2))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another environment: this Python with numpy and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    real = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (real / name).exists():
            (packages / name).symlink_to(real / name)
    return str(folder / "bin" / "python")


@pytest.fixture
def there(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Elsewhere]:
    """there("name", **options) -> that reward of REWARDS in the other environment."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "mine.py").write_text(REWARDS)

    def make(name: str, **options: Any) -> Elsewhere:
        found = load(f"{tmp_path / 'mine.py'}:{name}@{python}", **options)
        assert isinstance(found, Elsewhere)
        return found

    return make


def test_the_shapes_of_a_function_in_another_python(there: Callable[..., Elsewhere]) -> None:
    means = SAMPLES.double().flatten(1).mean(1)
    reward = checked(there("images"))
    assert torch.allclose(reward(SAMPLES, CONDITION).double(), means, atol=1e-7)
    assert torch.allclose(reward(SAMPLES.double(), CONDITION), means, atol=1e-15), "the same child answers again"
    assert there("prompts")(SAMPLES, CONDITION).tolist() == [10.0] * 6
    assert there("trl")(SAMPLES, CONDITION).tolist() == [0, 1, 2, 3, 4, 5]
    assert there("trl")(SAMPLES, Condition(["a"] * 6)).tolist() == [-1.0] * 6
    assert there("condition", batch_size=4)(SAMPLES, CONDITION).tolist() == [4, 5, 6, 7, 6, 7]
    assert torch.equal(there("scaled", scale=-2.0)(SAMPLES, CONDITION), -2 * SAMPLES[:, 0, 0])
    assert there("Built", offset=3)(SAMPLES, CONDITION).shape == (6, 1), "its shape is for `checked` to judge"


def test_the_other_python_needs_none_of_our_packages(there: Callable[..., Elsewhere]) -> None:
    assert there("environment")(SAMPLES, CONDITION).tolist() == [0.0] * 6
    ast.parse(Path(child.__file__).read_text(), feature_version=(3, 8))


def test_where_the_other_python_has_torch_the_samples_are_tensors(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    reward = load(f"{tmp_path / 'mine.py'}:torch_too@{sys.executable}")
    assert torch.equal(checked(reward)(SAMPLES, CONDITION), SAMPLES.mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "broken@{} raised KeyError: 'no such thing'."),
        ("nothing", "raised TypeError: it returned NoneType; expected one number a sample."),
        ("dies", "ended (status 7). Its last words: noise on stdout the end is near"),
        ("gone", "cannot be loaded there: AttributeError: module 'scoreact_user_reward' has no attribute 'gone'."),
        ("trl", "cannot be loaded there: TypeError: got an unexpected keyword argument 'scale'."),
    ],
)
def test_what_goes_wrong_in_another_python(there: Callable[..., Elsewhere], name: str, said: str, python: str) -> None:
    reward = checked(there(name, **({"scale": 2.0} if name == "trl" else {})))
    with pytest.raises(RemoteError) as caught:
        reward(SAMPLES, CONDITION)
    assert said.format(python) in str(caught.value)
    process = reward.reward.transport._process  # type: ignore[attr-defined]
    with pytest.raises(RemoteError):
        reward(SAMPLES, CONDITION)
    assert reward.reward.transport._process is process, "nothing is started a second time"  # type: ignore[attr-defined]


def test_a_child_that_takes_too_long_is_stopped(there: Callable[..., Elsewhere]) -> None:
    reward = there("sleeps", time_out=20)
    reward.ready()
    reward.transport._time_out = 0.2  # type: ignore[attr-defined]
    with pytest.raises(RemoteError, match=r"did not answer in 0\.2 s and was stopped"):
        reward(SAMPLES, CONDITION)
    assert reward.transport._process.wait(20) == -signal.SIGKILL  # type: ignore[attr-defined]


def test_the_child_ends_with_its_reward(there: Callable[..., Elsewhere]) -> None:
    reward = there("images")
    reward(SAMPLES, CONDITION)
    process = reward.transport._process  # type: ignore[attr-defined]
    assert process.poll() is None
    del reward
    gc.collect()
    assert process.wait(20) is not None


def test_the_child_ends_when_its_parent_is_killed(python: str, tmp_path: Path) -> None:
    """Nobody is left to stop it: it sees the end of its stdin."""
    (tmp_path / "mine.py").write_text(REWARDS)
    text = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from scoreact.rewards import load\n"
        "import os\n"
        "reward = load(sys.argv[1] + ':images@' + sys.argv[2]); reward.ready()\n"
        "print(reward.transport._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    words = [sys.executable, "-c", text, str(tmp_path / "mine.py"), python, *filter(None, sys.path)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert found.returncode == -signal.SIGKILL, found.stderr
    deadline = time.monotonic() + 20
    while _alive(int(found.stdout)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(int(found.stdout))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


# --- overlap ---------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "iterations": 3, "batch_size": 32, "steps": 4, "solver": "euler_maruyama", "kl_weight": 0.5, "value_steps": 3,
    "value_first_steps": 5, "value_batch_size": 32, "reference_batches": 3, "heldout_samples": 32, "minibatch_size": 64,
    "evaluate_every": 2, "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip


class Draws:
    """How many draws have begun; others may wait for them. The copies of a model share it."""

    def __init__(self) -> None:
        self.begun, self.news = 0, threading.Condition()

    def __deepcopy__(self, memo: object) -> Draws:
        return self

    def begin(self) -> None:
        with self.news:
            self.begun += 1
            self.news.notify_all()

    def wait_for(self, count: int, seconds: float) -> bool:
        with self.news:
            return self.news.wait_for(lambda: self.begun >= count, seconds)


class Drawing(ResidualModel):
    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(mixture(2, 3, 0), 2, width=16)
        self.draws = Draws()

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        self.draws.begin()
        return super().prior(condition, generator)


def make(model: Drawing, reward: Reward, **settings: Any) -> trainer.Trainer:
    config = updated(Config(), usable(Config(), {**SMALL, **settings}))
    return trainer.Trainer(model, reward, [""], lambda: VectorValue(4, 16), config)


class Patient:
    """A server's reward that waits, in all but its last call, until the draw after the one it scores has begun."""

    def __init__(self, last: int, seconds: float) -> None:
        self.last, self.seconds, self.calls = last, seconds, 0
        self.seen: list[bool] = []
        self.draws = Draws()
        self.reward = linear_reward(2, 0)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        if self.calls < self.last:
            self.seen.append(self.draws.wait_for(self.calls + 1, self.seconds))
        return self.reward(samples, condition)


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_part_is_scored_while_the_next_is_drawn(serve: Callable[..., RewardServer], overlaps: bool) -> None:
    patient = Patient(last=4, seconds=20 if overlaps else 0.05)
    model = Drawing()
    run = make(model, at(serve(patient), batch_size=8, overlap=overlaps))
    patient.draws, model.draws.begun = model.draws, 0
    paths = run.rollout()
    assert patient.seen == [overlaps] * 3
    assert run.reward.calls == 32
    assert torch.equal(paths.rewards, patient.reward(paths.trajectory.xs[-1], paths.trajectory.condition))


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_batch_of_the_reference_is_scored_while_the_next_is_drawn(
    serve: Callable[..., RewardServer], overlaps: bool
) -> None:
    patient = Patient(last=3, seconds=20 if overlaps else 0.05)
    model = Drawing()
    run = make(model, at(serve(patient), overlap=overlaps))
    patient.draws, model.draws.begun = model.draws, 0
    run.look_at_reference()
    assert patient.seen == [overlaps] * 2
    assert run.reward.calls == 96


def outcome(reward: Reward, **settings: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Weights, and metrics without the clock's."""
    result = finetune(
        Drawing(),
        reward,
        ["a", "b", "c"],
        value_network=lambda: VectorValue(4, 16),
        **usable(Config(), {**SMALL, **settings}),
    )
    parameters = list(result.policy.model.parameters())  # type: ignore[attr-defined]
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in result.history]
    return torch.cat([p.detach().flatten() for p in parameters]), history


SOME_RULES = [
    {"algorithm": "ctrl", "exploration": "gaussian"},
    {"algorithm": "ctrl_pathwise", "value_loss": "soft", "reuse_reference": 2, "grid": "random"},
    {"algorithm": "flow_grpo"},
]


@pytest.mark.parametrize("rule", SOME_RULES, ids=lambda rule: rule["algorithm"])
def test_overlap_changes_no_bit(serve: Callable[..., RewardServer], rule: dict[str, Any]) -> None:
    server = serve(linear_reward(2, 0))
    now, then = (outcome(at(server, batch_size=8, overlap=overlaps), **rule) for overlaps in (True, False))
    assert torch.equal(now[0], then[0])
    assert now[1] == then[1]
    there, here = outcome(at(server), **rule), outcome(FunctionReward(linear_reward(2, 0), "local"), **rule)
    assert torch.equal(there[0], here[0]), "where a reward is computed changes nothing"
    assert there[1] == here[1]
    assert not torch.equal(now[0], there[0]), "parts draw their noise in another order"


def test_after_a_part_that_failed_none_is_scored(serve: Callable[..., RewardServer]) -> None:
    calls: list[int] = []

    def second_fails(samples: Tensor, condition: Condition) -> Tensor:
        calls.append(len(samples))
        if len(calls) == 2:
            raise ValueError("the second.")
        return samples[:, 0]

    run = make(Drawing(), at(serve(second_fails), batch_size=8))
    trajectory, scores = run.draw()
    with pytest.raises(RemoteError, match=r"the second\."):
        scores.result()
    for part in scores._parts[2:]:
        assert part.exception(20) is not None
    assert calls == [8, 8]
    assert len(trajectory.xs[-1]) == 32


def test_a_local_reward_is_computed_at_once_and_fails_where_it_is_added() -> None:
    main = threading.get_ident()
    threads: list[int] = []

    def function(samples: Tensor, condition: Condition) -> Tensor:
        threads.append(threading.get_ident())
        return samples[:, 0]

    scores = overlap.Scores(checked(function))
    assert list(scores.parts(["a", "b", "c"])) == [["a", "b", "c"]]
    scores.add(SAMPLES[:, 0], CONDITION)
    assert threads == [main]
    assert torch.equal(scores.result(), SAMPLES[:, 0, 0])
    with pytest.raises(RuntimeError, match="raised"):
        overlap.Scores(checked(lambda samples, condition: 1 / 0)).add(SAMPLES, CONDITION)


def test_paths_drawn_in_parts_are_joined() -> None:
    run = make(Drawing(), linear_reward(2, 0), algorithm="flow_grpo")
    parts = [run.draw()[0] for _ in range(2)]
    whole = Trajectory.join(parts, Condition(["a"] * 64))
    assert torch.equal(whole.ts, parts[0].ts)
    assert torch.equal(whole.std, parts[1].std)
    for name in ("xs", "actions", "references", "means", "controls", "noise"):
        assert torch.equal(getattr(whole, name)[:, 32:], getattr(parts[1], name))
        assert getattr(whole, name).shape[1] == 64
    assert torch.equal(whole.path_kl(), torch.cat([part.path_kl() for part in parts]))
    assert len(whole.condition) == 64


# --- the command -----------------------------------------------------------------------------------------------------

SERVED = """
import os, signal

calls = 0

def first(x):
    return x[:, 0]

def killed(x, at=5):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return x[:, 0]
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Any, str]]]:
    """command("rewards.py:first", ...) -> the process of `scoreact reward-server` and the address that it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(SERVED)
    processes = []

    def start(*words: str) -> tuple[Any, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "scoreact", "reward-server", *words], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("reward rewards.py:"), line
        return process, line.split()[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


TINY = ["--batch-size", "32", "--heldout-samples", "16", "--value-steps", "2", "--value-first-steps", "2",
        "--reference-batches", "1", "--option", "width=8", "--iterations", "6", "--checkpoint-every", "2"]  # fmt: skip


@pytest.mark.slow
def test_a_run_outlives_a_server_that_is_killed(
    command: Callable[..., tuple[Any, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    # calls: two of the reference, one of the first evaluation, then two an iteration; the tenth begins the fourth
    first, url = command("rewards.py:killed", "--option", "at=10", "--port", "0")
    words = ["train", "gaussian", *TINY, "--reward-option", "batch_size=16", "--reward-option", "retries=1"]
    assert cli.main([*words, "--reward", url, "--out", "run"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"no reward server answers at {url} (" in said
    assert "Iteration 2 is saved; continue with `scoreact resume run`." in said
    assert first.wait(20) == -signal.SIGKILL
    assert sorted(p.name for p in Path("run/checkpoints").iterdir()) == ["00000002"]

    assert cli.main(["resume", "run"]) == 2, "nobody is there yet"
    assert "no reward server answers" in capsys.readouterr().err

    second, again = command("rewards.py:first", "--port", url.rpartition(":")[2])
    assert again == url
    assert cli.main(["resume", "run"]) == 0
    assert cli.main([*words, "--reward", url, "--out", "uninterrupted"]) == 0
    found, wanted = (load_file(f"{folder}/model.safetensors") for folder in ("run", "uninterrupted"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    second.send_signal(signal.SIGINT)
    assert second.wait(20) == 0
    assert "stopped after" in second.stdout.read()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("first.py:f --host 0.0.0.0", "host '0.0.0.0' can be reached from other machines and the server has no"),
        ("first.py:f --host example.org", "host 'example.org' can be reached from other machines"),
        ("first.py:f --port 70000", "port is 70000; the highest is 65535."),
        ("first.py:f --port 0", "reward file 'first.py' does not exist"),
        ("brightnes --port 0", "Did you mean 'brightness'?"),
        ("jpeg_compressibility --option qualty=3 --port 0", "Did you mean 'quality'?"),
    ],
)
def test_a_server_that_cannot_start(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reward-server", *shlex.split(words)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_port_that_is_taken_and_an_open_one(
    serve: Callable[..., RewardServer], capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(serve(mean).server_address[1])
    assert cli.main(["reward-server", "brightness", "--port", port]) == 2
    assert "Give another --port." in capsys.readouterr().err
    assert cli.main(["reward-server", "first.py:f", "--host", "0.0.0.0", "--open-to-network", "--port", "0"]) == 2
    assert "there is no authentication" in capsys.readouterr().err
