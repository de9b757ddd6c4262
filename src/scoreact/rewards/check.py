"""Rewards under suspicion: `checked` watches one during training, `uninformative` and `unsteady` say that it teaches nothing.

All speak in sentences that name the reward, the value and the remedy. Does not know training; does not print.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition, groups
from .base import ReturnedValueError, Reward, is_differentiable, name_of, to_tensor
from .failures import Failures, PartFailed, RewardRaised, SamplesNotFinite, salvaged, with_means


class Checked:
    """A reward that is looked at on every call; `.calls` counts the samples it has scored.

    failures: of samples for which it may fail, shared by all who ask it in a run.
    """

    def __init__(self, reward: Reward, failures: Failures | None = None) -> None:
        self.reward = reward
        self.name = name_of(reward)
        self.differentiable = is_differentiable(reward)
        self.calls = 0
        self.failures = failures or Failures()
        self._parts: dict[str, list[Tensor]] = {}  # of a sum, since they were last taken

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        if len(samples) != len(condition):
            raise RewardError(
                f"reward {self.name} got {len(samples)} samples but {len(condition)} prompts; give as many."
            )
        problem = _not_finite(f"samples for reward {self.name} contain", samples.detach(), condition)
        if problem:
            raise SamplesNotFinite(
                f"{problem} The policy or `decode` made it, not the reward: lower the learning rate."
            )
        followed = self.differentiable and torch.is_grad_enabled() and samples.requires_grad
        # a graph that nobody asked for, as of a reward network's own parameters, would live as long as its rewards
        with torch.set_grad_enabled(followed), unchanged(f"reward {self.name}", samples):
            rewards = self._scored(samples if followed else samples.detach(), condition)
        if followed and not rewards.requires_grad:
            raise RewardError(
                f"reward {self.name} is marked differentiable but its result carries no gradient. "
                "Keep to torch operations without detach or no_grad, or remove the mark."
            )
        self.calls += len(samples)
        return rewards if followed else rewards.detach()

    def _scored(self, samples: Tensor, condition: Condition) -> Tensor:
        if self.failures.most:
            found = salvaged(self._asked, samples, condition, self.failures)
            return with_means(found, condition, self.failures.last)
        rewards = self._asked(samples, condition)
        if wrong := _wrong_values(self.name, rewards, condition):
            raise RewardError(wrong)
        return rewards

    def _asked(self, samples: Tensor, condition: Condition) -> Tensor:
        """[B], some of them perhaps not finite; those of a sum's parts are noted."""
        reward: Any = self.reward
        if isinstance(reward, HasParts):
            parts = reward.parts(samples, condition)
            for name, values in parts.items():
                self._parts.setdefault(name, []).append(values.detach())
            return reward.total(parts)
        rewards = _call(reward, samples, condition)
        if wrong := _wrong_shape(self.name, rewards, len(samples)):
            raise RewardError(wrong)
        return rewards

    def take_parts(self) -> dict[str, float]:
        """The mean of each part of a sum, by its name, over what was scored since the last time; {} of other rewards."""
        found, self._parts = self._parts, {}
        return {name: float(torch.cat(values).nanmean()) for name, values in found.items()}


@contextmanager
def unchanged(what: str, samples: Tensor) -> Iterator[None]:
    """Code of the user's that sees samples which are used afterwards. Raises RewardError where it changed them in place,
    and RewardRaised for a `sys.exit`, which would end a run as if it had succeeded."""
    before = _fingerprint(samples)
    try:
        yield
    except SystemExit as error:
        raise RewardRaised(f"{what} called sys.exit({error.code!r}); raise an error instead.") from error
    if _fingerprint(samples) != before:
        raise RewardError(
            f"{what} changes the samples that it is given, in place, and they are used afterwards. Work on `samples.clone()`."
        )


def _fingerprint(samples: Tensor) -> tuple[int, int]:
    """Another one after a change: torch counts its own, and on a CPU numpy may have made one past it."""
    version = 0 if samples.is_inference() else samples._version
    seen = samples.detach()
    if seen.device.type != "cpu":
        return version, 0
    return version, zlib.crc32(seen.contiguous().view(torch.uint8).numpy().data)


@runtime_checkable
class HasParts(Protocol):
    """A reward that is a sum, whose parts are logged by name."""

    def parts(self, samples: Tensor, condition: Condition) -> dict[str, Tensor]: ...
    def total(self, parts: Mapping[str, Tensor]) -> Tensor: ...


def checked(reward: Reward, failures: Failures | None = None) -> Checked:
    """The reward with every call validated and counted, for use in training.

    Args:
        reward: (decoded samples [B, ...], condition of B) -> [B].
        failures: samples for which it may fail; those are asked again, then get the mean of their prompt's others. None: the
            first failure raises.

    Returns:
        The same reward. A call gives [B], float32 (float64 for float64 samples), finite, on the samples' device. It raises
        ValueError for another shape, NaN or inf (in the samples or the rewards), values that are no numbers, and samples that
        were changed in place, and RuntimeError, chained, for an exception inside the reward.
        Each of the two looks for NaN waits for the device.
    """
    return Checked(reward, failures)


def uninformative(name: str, rewards: Tensor, condition: Condition) -> str | None:
    """Why the rewards [B] of different samples have nothing to teach; None where they have something."""

    def alike(values: Tensor) -> bool:
        return float(values.max() - values.min()) <= 4 * torch.finfo(torch.float32).eps * float(rewards.abs().max())

    if len(rewards) > 1 and alike(rewards):
        return (
            f"reward {name} gave all {len(rewards)} samples of the pretrained model {float(rewards[0]):.4g}: there is nothing "
            "to learn from. Check the value range that it expects, or let it tell degrees apart."
        )
    several = [rows for rows in groups(condition).values() if len(rows) > 1]
    if several and all(alike(rewards[rows.to(rewards.device)]) for rows in several):
        return (
            f"reward {name} gave all samples of a prompt the same value, for each of {len(several)} prompts: it depends on the "
            "prompt alone, so that there is nothing to learn from. Let it look at the samples."
        )
    return None


def unsteady(name: str, together: Tensor, few: Tensor, again: Tensor, spread: float) -> str | None:
    """Why a reward is no function of a sample: b samples scored among others, by themselves, and once more, each [b].

    Differences below a hundredth of the rewards' `spread`, a standard deviation, are the rounding of networks.
    """
    noise, other = float((few - again).abs().max()), float((few - together).abs().max())
    if max(noise, other) <= max(0.01 * spread, 1e-3 * float(together.abs().max())):
        return None
    if noise > 0.1 * other:
        return (
            f"reward {name} is not deterministic: the same samples got values {noise:.3g} apart (rewards spread by "
            f"{spread:.3g}). J* takes that noise for reward, and is too large. Fix its seed, and put networks into eval mode."
        )
    return (
        f"reward {name} depends on the batch: samples got values {other:.3g} apart among more others and "
        f"among {len(few)} (rewards spread by {spread:.3g}). J_ref, J* and advantages mean something else then. Score each "
        "sample by itself, without means or ranks over the batch."
    )


def _call(reward: Reward, samples: Tensor, condition: Condition) -> Tensor:
    try:
        value = reward(samples, condition)
    except (ReturnedValueError, RewardRaised, PartFailed):
        raise
    except (Exception, SystemExit) as error:
        raise RewardRaised(_raised(name_of(reward), error, samples)) from error
    return to_tensor(value, samples, name_of(reward))


def part_of(name: str, reward: Reward, samples: Tensor, condition: Condition) -> Tensor:
    """The rewards [B] of a part of another reward, finite; what is wrong with them is said by the part's name."""
    rewards = _call(reward, samples, condition)
    if wrong := _wrong_shape(name, rewards, len(samples)):
        raise RewardError(wrong)
    if wrong := _wrong_values(name, rewards, condition):
        raise PartFailed(wrong)
    return rewards


def _raised(name: str, error: BaseException, samples: Tensor) -> str:
    what = f"samples of shape {tuple(samples.shape)}, {samples.dtype} on {samples.device}"
    cure = " Add `.cpu()` before `.numpy()`." if "host memory" in str(error) else ""
    return f"reward {name} raised {type(error).__name__}: {error} (given {what}).{cure}"


def _wrong_shape(name: str, rewards: Tensor, count: int) -> str | None:
    shape = tuple(rewards.shape)
    if shape == (count,):
        return None
    if shape == (count, 1):
        cure = "Add `.squeeze(-1)` at its end."
    elif shape[:1] == (count,):
        cure = "Add `.flatten(1).mean(1)` at its end, if the mean is what you mean."
    elif shape == ():
        cure = "Do not average over the batch: one number a sample."
    else:
        cure = "Return one number for every sample, in their order."
    return f"reward {name} returned shape {shape} for {count} sample{'s' * (count != 1)}; expected ({count},). {cure}"


def _wrong_values(name: str, rewards: Tensor, condition: Condition) -> str | None:
    problem = _not_finite(f"reward {name} returned", rewards.detach(), condition)
    if problem is None:
        return None
    return f"{problem} Return a finite number there, such as a floor: look for 0/0, log(0) or an overflow."


def _not_finite(what: str, rows: Tensor, condition: Condition) -> str | None:
    """A sentence on the first of B rows [B, ...] that is not finite; None if all are."""
    finite = rows.isfinite()
    finite = finite.flatten(1).all(1) if rows.ndim > 1 else finite
    if bool(finite.all()):
        return None
    bad = (~finite).nonzero()[:, 0]
    i = int(bad[0])
    value = "NaN" if bool(rows[i].isnan().any()) else "-inf" if bool((rows[i] == -torch.inf).any()) else "inf"
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{what} {value} for sample {i} of {len(rows)} (counted from 0; prompt {condition.prompts[i]!r}){more}."
