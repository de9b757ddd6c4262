"""What another Python runs to score for scoreact: requests on stdin, answers on stdout. Standard library and numpy only.

`remote.Child` starts this file by its path with an interpreter that need not have scoreact, torch or safetensors, version
3.8 or later; so nothing of the package is imported here. `read_request` is also the reward server's reader. A message
is its length in 8 bytes (little-endian) and that many bytes: a request as `remote.request` writes it, an answer as JSON.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
# the names that `user.adapt` knows
TEXTS = ("prompt", "prompts", "caption", "captions", "text", "texts")
OTHERS = ("metadata", "prompt_metadata", "meta", "info", "condition", "conditions", "cond", "c")


def read_request(body: bytes) -> tuple[np.ndarray, list[str], list[dict[str, Any]]]:
    """Samples [B, ...], prompts of B and metadata of B or none, from a safetensors record (its format's own layout).

    8 bytes: length of the header; header: JSON with dtype, shape and place of the tensor `samples`, and under
    `__metadata__` a JSON text `condition`; then the numbers. Raises ValueError, one sentence, for anything else.
    """
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > len(body) - 8:
        raise ValueError(f"the body of {len(body)} bytes is cut short or no safetensors record.")
    try:
        header = json.loads(body[8 : 8 + size])
        condition = json.loads(header["__metadata__"]["condition"])
        entry = header["samples"]
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        prompts, metadata = condition["prompts"], condition["metadata"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"the header cannot be read ({type(error).__name__}: {error}); expected a tensor `samples` and in "
            "__metadata__ a JSON text `condition` with prompts and metadata."
        ) from None
    if dtype not in DTYPES:
        raise ValueError(f"samples have dtype {dtype!r}; known: {', '.join(DTYPES)}.")
    if not (isinstance(shape, list) and shape and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"samples have shape {shape!r}; expected whole numbers above 0, the batch first.")
    count = math.prod(shape) * DTYPES[dtype].itemsize
    if (begin, end) != (0, count) or len(body) - 8 - size != count:
        raise ValueError(f"samples of shape {shape} need {count} bytes; the body holds {len(body) - 8 - size}.")
    if not (isinstance(prompts, list) and len(prompts) == shape[0] and all(isinstance(p, str) for p in prompts)):
        raise ValueError(f"got {shape[0]} samples and other prompts than that many strings.")
    if metadata != [] and not (
        isinstance(metadata, list) and len(metadata) == shape[0] and all(isinstance(m, dict) for m in metadata)
    ):
        raise ValueError(f"got {shape[0]} samples and other metadata than none or that many objects.")
    samples = np.frombuffer(body, DTYPES[dtype], offset=8 + size).reshape(shape)
    return np.require(samples, requirements=["A", "W"]), prompts, metadata


class Condition:
    """What f(samples, condition) gets: prompts, metadata, no rows."""

    def __init__(self, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        self.prompts, self.metadata, self.rows = prompts, metadata, None

    def __len__(self) -> int:
        return len(self.prompts)


def find(spec: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The function of `file.py:name` or `module:name` with its options bound; a class is built with them."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py") or "/" in place or "\\" in place:
        module = ModuleType("scoreact_user_reward")
        module.__file__ = os.path.abspath(os.path.expanduser(place))
        sys.modules[module.__name__] = module  # dataclasses look their module up
        with open(module.__file__, "rb") as file:
            exec(compile(file.read(), module.__file__, "exec", dont_inherit=True), module.__dict__)
    else:
        module = importlib.import_module(place)
    found: Any = getattr(module, name)
    inspect.signature(found).bind_partial(**options)
    built: Any = found(**options) if inspect.isclass(found) else functools.partial(found, **options)
    return built


def positional(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments it is to be given: required ones, and those that bear a known name."""
    given = function.keywords if isinstance(function, functools.partial) else {}
    parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    leading = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in given]
    names = [p.name for p in leading if p.default is p.empty or p.name in TEXTS + OTHERS]
    if not 1 <= len(names) <= 3:
        raise TypeError(f"it takes ({', '.join(names)}); write it as f(images), f(images, prompts), "
                        "f(images, prompts, metadata) or f(samples, condition)")  # fmt: skip
    return names


def numbers(value: Any) -> Any:
    """A tensor, array, list, or TRL's (rewards, info), as nested lists of floats."""
    if isinstance(value, tuple) and len(value) == 2 and (value[1] is None or isinstance(value[1], dict)):
        value = value[0]
    if isinstance(value, (list, tuple)):
        return [numbers(entry) for entry in value]
    if hasattr(value, "detach"):  # a torch tensor, wherever it lives
        value = value.detach().cpu().double().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"it returned {type(value).__name__}; expected one number a sample")
    return array.astype(np.float64).tolist()


def score(function: Callable[..., Any], body: bytes, tensor: Callable[[np.ndarray], Any]) -> Any:
    samples, prompts, metadata = read_request(body)
    names = positional(function)
    arguments: list[Any] = [tensor(samples)]
    if len(names) == 2 and names[1] not in TEXTS:
        arguments.append(Condition(prompts, metadata))
    elif len(names) > 1:
        arguments += [prompts, metadata or [{} for _ in prompts]][: len(names) - 1]
    return numbers(function(*arguments))


def said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def answer(out: BinaryIO, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    out.write(len(body).to_bytes(8, "little") + body)
    out.flush()


def main(spec: str, options: str) -> None:
    del sys.path[0]  # this file's folder: its modules' names are not the user's
    requests, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the reward prints is no answer
    try:
        function = find(spec, json.loads(options))
        positional(function)
        tensor: Callable[[np.ndarray], Any] = np.asarray
        if importlib.util.find_spec("torch") is not None:
            torch = importlib.import_module("torch")
            torch.set_grad_enabled(False)
            tensor = torch.from_numpy
    except (Exception, SystemExit) as error:
        return answer(out, {"error": f"cannot be loaded there: {said(error)}"})
    answer(out, {"ready": True})
    while len(size := requests.read(8)) == 8:
        body = requests.read(int.from_bytes(size, "little"))
        try:
            content = {"rewards": score(function, body, tensor)}
        except (Exception, SystemExit) as error:
            content = {"error": f"raised {said(error)}"}
        answer(out, content)


if __name__ == "__main__":
    main(*sys.argv[1:])
