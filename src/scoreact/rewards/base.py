"""What a reward is, and how a value that a function returned becomes a tensor of rewards.

Knows signatures and types only; the checks that a training run needs are in `check`, the user's files in `user`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..models.base import ScoreModel
from ..support.errors import RewardError
from ..support.names import did_you_mean
from ..types import Condition

Reward = Callable[[Tensor, Condition], Tensor]  # (decoded samples [B, ...], condition of B) -> [B], larger is better
Measure = Callable[[Tensor], Tensor]  # decoded samples [B, ...] -> [B], in the measure's own unit
ClassOf = Callable[[Condition], Tensor]  # condition of B -> class indices [B], int64


@dataclass(frozen=True)
class FunctionReward:
    """A function with a name for messages and a word on its gradient.

    Args:
        function: (decoded samples [B, ...], condition of B) -> rewards [B], larger is better.
        name: for messages.
        differentiable: whether the gradient of its result with respect to the samples may be used.
    """

    function: Reward
    name: str
    differentiable: bool = False

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return self.function(samples, condition)


@runtime_checkable
class TakesModel(Protocol):
    """A reward that asks the pretrained model of its run. It is given before training changes it."""

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor: ...

    def take_model(self, model: ScoreModel) -> None:
        """Keep a frozen view or copy of this model, where none was given."""
        ...


def need_times(model: ScoreModel, times: Collection[float]) -> None:
    """Raises RewardError where one of these times is none of the model's."""
    low, high = model.schedule.t_min, model.schedule.t_max
    if outside := [t for t in times if not low <= t <= high]:
        raise RewardError(f"time {outside[0]:g} is none of the model's, which are {low:g} to {high:g}.")


def _none(samples: Tensor, condition: Condition) -> Tensor:
    raise RewardError(
        "there is no reward; give one: --reward file.py:function or a known name, or finetune(model, reward)."
    )


NO_REWARD = FunctionReward(_none, "none")
"""In the place of a reward that has to be given elsewhere."""


def _outside(samples: Tensor, condition: Condition) -> Tensor:
    raise RewardError(
        "the rewards of this run come from outside, and nothing here can ask for them: hand out samples with "
        "`scoreact sample RUN --for-update` and bring their rewards with `scoreact update RUN --rewards FILE`."
    )


OUTSIDE = FunctionReward(_outside, "outside")
"""Of a run whose rewards come later, from a market, users or an experiment."""


def outside() -> FunctionReward:
    """OUTSIDE, by its name."""
    return OUTSIDE


def is_differentiable(reward: Callable[..., Any]) -> bool:
    """Whether a reward says, by its attribute `differentiable`, that its gradient in the samples may be used; else False."""
    if isinstance(reward, functools.partial):
        return is_differentiable(reward.func)
    return bool(getattr(reward, "differentiable", False))


def is_of_batch(reward: object) -> bool:
    """Whether a reward says, by its attribute `of_batch`, that a sample's value depends on the others of its batch."""
    return bool(getattr(reward, "of_batch", False))


def name_of(function: Callable[..., Any]) -> str:
    """A name for messages: the reward's own `name`, else `module:qualified_name`, else its class."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    own = getattr(function, "name", None)
    if isinstance(own, str):
        return own
    qualified = getattr(function, "__qualname__", None)
    return f"{function.__module__}:{qualified}" if qualified else type(function).__name__


def known(what: str, wanted: str, names: Collection[str]) -> str:
    """`Did you mean 'x'? What: x, y, z.` for an error about a name that is not among `names`."""
    return f"{did_you_mean(wanted, names)} {what}: {', '.join(sorted(names)) or 'none'}.".lstrip()


class ReturnedValueError(RewardError):
    """A reward returned something that is no tensor of numbers. Its message names the reward."""


def reward_dtype(samples: Tensor) -> torch.dtype:
    """float32, or float64 for float64 samples (closed forms are compared to 1e-10 there)."""
    return torch.float64 if samples.dtype == torch.float64 else torch.float32


def to_tensor(value: object, samples: Tensor, name: str) -> Tensor:
    """A returned value as a float tensor on the samples' device; its shape is not looked at.

    Takes a tensor (its gradient is kept), a numpy array, a list or tuple of numbers, and TRL's `(rewards, info)` with
    info a dict, a list of them, or None. Result: `reward_dtype(samples)`. Raises ReturnedValueError (a ValueError) for
    anything else, naming its type.
    """
    if isinstance(value, tuple) and len(value) == 2 and _is_info(value[1]):
        value = value[0]
    if isinstance(value, list | tuple) and value and all(isinstance(entry, Tensor) for entry in value):
        tensor = torch.stack(list(value))
    elif isinstance(value, Tensor):
        tensor = value
    elif isinstance(value, list | tuple | np.ndarray | np.generic | float | int):
        tensor = _from_numbers(value, name)
    else:
        if inspect.iscoroutine(value):
            value.close()  # or Python complains that nobody awaited it
        remedy = _REMEDY.get(type(value), _MAKES_ONE if callable(value) else "Convert it at its end.")
        raise ReturnedValueError(
            f"reward {name} returned a value of type {type(value).__name__}; expected one number a sample, as a "
            f"tensor, a numpy array or a list. {remedy}"
        )
    if tensor.is_complex():
        raise ReturnedValueError(
            f"reward {name} returned complex numbers; expected real ones. Add `.real` or `.abs()`."
        )
    return tensor.to(samples.device, reward_dtype(samples))


_REMEDY: dict[type, str] = {
    type(None): "Add a `return` statement.",
    dict: "Return one of its entries.",
    str: "Parse it with `float`, one a sample.",
    types.CoroutineType: "Write `def` in the place of `async def`.",
    types.GeneratorType: "Return a list in the place of `yield`.",
    map: "Return `list(...)` of it.",
}
_MAKES_ONE = (
    "It makes a reward and is none: give what it needs as options (--reward-option NAME=VALUE), or name what it makes."
)


def _is_info(value: object) -> bool:
    """What TRL's rewards return beside the numbers."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(entry, Mapping) for entry in value)
    return value is None or isinstance(value, Mapping)


def _from_numbers(value: Any, name: str) -> Tensor:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ReturnedValueError(
            f"reward {name} returned a {type(value).__name__} whose parts have different lengths. Return one number a sample."
        ) from None
    if isinstance(value, np.ma.MaskedArray) and bool(np.ma.getmaskarray(value).any()):
        raise ReturnedValueError(f"reward {name} returned a masked array. Fill what is masked: `.filled(value)`.")
    if array.dtype.kind not in "fiub":
        other = (type(e).__name__ for e in np.ravel(array).tolist() if not isinstance(e, float | bool))
        found = next(other, "object")
        raise ReturnedValueError(
            f"reward {name} returned a {type(value).__name__} of {found}; expected numbers. Convert each with `float`."
        )
    return torch.from_numpy(np.array(array, dtype=np.float64))
