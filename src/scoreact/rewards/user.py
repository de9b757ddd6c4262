"""The user's own reward: found in a file or a module, called in the shape it was written in.

Knows how to find a function and how to call it; does not judge what it returns (`check` does). Only the file or the
module that was named is executed: the file's folder is not put on the import path and no cached bytecode is read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..support.errors import RewardError
from ..support.loading import is_file, load_named, said_by
from ..types import Condition
from .base import Reward, is_differentiable, known, to_tensor

Shape = Literal["images", "images, prompts", "images, prompts, metadata", "samples, condition"]

_CONDITION_NAMES = {"condition", "conditions", "cond", "c"}
_PROMPT_NAMES = {"prompt", "prompts", "caption", "captions", "text", "texts"}
_METADATA_NAMES = {"metadata", "prompt_metadata", "meta", "info"}
_ACCEPTED = "f(samples, condition), f(images, prompts, metadata), f(images, prompts) or f(images)"


@dataclass(frozen=True)
class UserReward:
    """A user's function as a Reward: samples [B, ...], condition of B -> float tensor on the samples' device.

    Without `differentiable` the function runs on detached samples and without a graph, so that `.numpy()`, PIL and
    large networks simply work; with it, the samples come with their graph and the gradient is kept.
    """

    function: Callable[..., Any]
    shape: Shape
    name: str
    differentiable: bool = False

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        if self.differentiable:
            return to_tensor(self.raw(samples, condition), samples, self.name)
        with torch.no_grad():  # the user's function, not ours: by its own word it has no gradient to keep
            return to_tensor(self.raw(samples.detach(), condition), samples, self.name)

    def raw(self, samples: Tensor, condition: Condition) -> object:
        """What the function returns, unconverted. Prompts and metadata go in as lists of length B."""
        if self.shape == "images":
            return self.function(samples)
        if self.shape == "samples, condition":
            return self.function(samples, condition)
        prompts = list(condition.prompts)
        if self.shape == "images, prompts":
            return self.function(samples, prompts)
        return self.function(samples, prompts, list(condition.metadata) or [{} for _ in prompts])


def with_gradient(reward: Reward) -> Reward:
    """The reward with the user's unmarked functions in it taken at their word that they are torch operations: to be tried."""
    if isinstance(reward, UserReward):
        return replace(reward, differentiable=True)
    own: Any = getattr(reward, "with_gradient", None)
    return own() if own is not None else reward


def adapt(function: Callable[..., Any], name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """A function of one of the accepted shapes as a Reward.

    Shapes, told apart by the leading positional parameters that are required or bear a known name:
    one: `f(images)`; two: `f(images, prompts)` when the second is called prompt(s), caption(s) or text(s), else
    `f(samples, condition)`; three: TRL's `f(images, prompts, metadata)`, which may return `(rewards, info)`.
    Further parameters with defaults are settings, given by `options`. A class is built with the options and its
    object called; an `nn.Module` is judged by its `forward`. A two-argument function that carries the attribute
    `differentiable` is taken to be a Reward already and returned as it is. A function that needs none of these, as it is or
    with the options, makes the reward (TRL's and ddpo's `aesthetic_scorer()`): it is called once, and what it returns is taken.
    Raises ValueError for any other signature, and for options that the function does not have.
    """
    given = dict(options or {})
    if inspect.isclass(function):
        function, given = _built(function, name, given), {}
    for called in (function, getattr(function, "__call__", None)):  # noqa: B004  the method, to be looked at
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise RewardError(f"reward {name} is an `async def`, which nobody would await. Write `def`.")
    parameters = _parameters(function, name)
    named = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in given:
            if option not in named:
                raise RewardError(f"reward {name} has no option {option!r}. {known('Its parameters', option, named)}")
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known_names = _CONDITION_NAMES | _PROMPT_NAMES | _METADATA_NAMES
    leading = [p for p in positional if p.name not in given and (p.default is p.empty or p.name in known_names)]
    missing = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in given]
    if missing:
        raise RewardError(f"reward {name} needs a value for {', '.join(missing)}: give it as an option, or a default.")
    if not leading and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return adapt(_made_by(function, name, given), name)
    shape = _shape(leading, name)
    if shape == "samples, condition" and not given and hasattr(function, "differentiable"):
        return function
    declared = is_differentiable(function)
    return UserReward(functools.partial(function, **given) if given else function, shape, name, declared)


def from_spec(spec: str, options: Mapping[str, Any]) -> Reward:
    """The reward named by `path/to/file.py:name` or `module:name`. ValueError for whatever is not there."""
    found = load_named(spec, "reward")
    place, _, attribute = spec.rpartition(":")
    if not callable(found):
        raise RewardError(f"{attribute!r} in {place} is a {type(found).__name__}, no function. Name a function there.")
    return adapt(found, f"{Path(place).name if is_file(place) else place}:{attribute}", options)


def _shape(leading: list[inspect.Parameter], name: str) -> Shape:
    if len(leading) == 1:
        return "images"
    if len(leading) == 2 and leading[1].name not in _METADATA_NAMES:
        return "images, prompts" if leading[1].name in _PROMPT_NAMES else "samples, condition"
    if len(leading) == 3:
        return "images, prompts, metadata"
    found = ", ".join(p.name for p in leading)
    raise RewardError(f"reward {name} takes the positional arguments ({found}); write it as {_ACCEPTED}.")


def _parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        raise RewardError(f"reward {name} shows no signature. Wrap it in a function {_ACCEPTED}.") from None
    return list(signature.parameters.values())


def _made_by(factory: Callable[..., Any], name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The reward that a function without samples among its parameters makes."""
    try:
        made = factory(**options)
    except Exception as error:
        raise RewardError(
            f"reward {name} takes no samples, so it was called with the options {options} to make a reward, and failed "
            f"({said_by(error)}). Write it as {_ACCEPTED}, or give what it needs as options."
        ) from error
    if not callable(made):
        raise RewardError(
            f"reward {name} takes no samples and returned a {type(made).__name__}; write it as {_ACCEPTED}, or return such a "
            "function."
        )
    return made


def _built(cls: type, name: str, options: dict[str, Any]) -> Callable[..., Any]:
    try:
        built = cls(**options)
    except Exception as error:
        raise RewardError(
            f"reward class {name} could not be built with the options {options} ({said_by(error)}). "
            "Give the options that its __init__ takes."
        ) from error
    if not callable(built):
        raise RewardError(f"reward class {name} has no __call__. Add `def __call__(self, samples, condition)`.")
    return built
