"""Trust in a reward: `checked` looks at every call during training, `explain` says beforehand what is wrong with one.

Both speak in sentences that name the reward, the value and the remedy. Does not know training; does not print.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition, groups
from .base import ReturnedValueError, Reward, is_differentiable, name_of, to_tensor
from .registry import load
from .user import UserReward

SLOW = 0.05  # seconds a sample: 25,600 reward calls then take 20 minutes
SINGLES = 8  # samples scored one at a time by `explain`


class Checked:
    """A reward that is looked at on every call; `.calls` counts the samples it has scored."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name = name_of(reward)
        self.differentiable = is_differentiable(reward)
        self.calls = 0

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        if len(samples) != len(condition):
            raise RewardError(
                f"reward {self.name} got {len(samples)} samples but {len(condition)} prompts; give as many."
            )
        problem = _not_finite(f"samples for reward {self.name} contain", samples.detach(), condition)
        if problem:
            raise RewardError(f"{problem} The policy or `decode` made it, not the reward: lower the learning rate.")
        rewards = _call(self.reward, samples, condition)
        wrong = _wrong_shape(self.name, rewards, len(samples)) or _wrong_values(self.name, rewards, condition)
        if wrong:
            raise RewardError(wrong)
        if self.differentiable and torch.is_grad_enabled() and samples.requires_grad and not rewards.requires_grad:
            raise RewardError(
                f"reward {self.name} is marked differentiable but its result carries no gradient. "
                "Keep to torch operations without detach or no_grad, or remove the mark."
            )
        self.calls += len(samples)
        return rewards if self.differentiable else rewards.detach()


def checked(reward: Reward) -> Checked:
    """The reward with every call validated and counted, for use in training.

    Args:
        reward: (decoded samples [B, ...], condition of B) -> [B].

    Returns:
        The same reward. A call gives [B], float32 (float64 for float64 samples), finite, on the samples' device. It raises
        ValueError for another shape, NaN or inf (in the samples or the rewards) and values that are no numbers, and
        RuntimeError, chained, for an exception inside the reward. Each of the two looks for NaN waits for the device.
    """
    return Checked(reward)


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


def explain(
    spec: str | Callable[..., Any],
    samples: Tensor,
    condition: Condition,
    needs_gradient: bool = False,
    **options: Any,
) -> list[str]:
    """What is wrong with a reward, in plain sentences, found by running it.

    Args:
        spec: anything that `load` takes.
        samples: decoded, [B, ...]; 4 to 64 different ones.
        condition: of the B samples.
        needs_gradient: look at the gradient even if the reward does not declare one.
        options: of `load`.

    Returns:
        Lines that start with "problem: " or "note: "; the last one is a summary, starting with "fine: " if all is well.

    Raises:
        ValueError: samples and condition differ in length, or are empty.

    Looks at: loading, exceptions, type, shape, NaN and inf, dtype and device, a constant, two calls that differ, input
    changed in place, dependence on the rest of the batch, the picture's value range (a guess, and said so; a function
    that wants [-1, 1] is not recognised), the gradient (when it is declared or needed), and seconds a sample.
    """
    if len(samples) != len(condition) or not len(samples):
        raise RewardError(f"got {len(samples)} samples and {len(condition)} prompts; give as many, at least one.")
    try:
        reward = load(spec, **options)
    except ValueError as error:
        return [f"problem: {error}", "1 problem: the reward could not be loaded."]
    findings = _findings(reward, samples.detach(), condition, needs_gradient)
    problems = sum(line.startswith("problem") for line in findings)
    if problems:
        findings.append(f"{problems} problem{'s' * (problems > 1)} in reward {name_of(reward)}.")
    return findings


def _findings(reward: Reward, samples: Tensor, condition: Condition, needs_gradient: bool) -> list[str]:
    name = name_of(reward)
    given = samples.clone()
    try:
        raw = _raw(reward, given, condition)
        first = to_tensor(raw, samples, name).detach()
    except Exception as error:
        sentence = str(error) if isinstance(error, ReturnedValueError) else _raised(name, error, samples)
        return [f"problem: {sentence}", *_works_on_bytes(reward, samples, condition)]
    findings = _about_tensor(name, raw, samples)
    if given.shape != samples.shape or bool(((given != samples) & ~(given.isnan() & samples.isnan())).any()):
        findings.append(f"problem: reward {name} changes the samples it is given. Work on `samples.clone()`.")
    if wrong := _wrong_shape(name, first, len(samples)) or _wrong_values(name, first, condition):
        return [*findings, f"problem: {wrong}"]
    started = time.perf_counter()
    try:
        second = _call(reward, samples.clone(), condition).detach()
    except (RuntimeError, ValueError) as error:
        return [*findings, f"problem: the second call failed, the first did not: {error}"]
    spread = f"values from {second.min():.4g} to {second.max():.4g}, mean {second.mean():.4g}"  # waits for the device
    seconds = (time.perf_counter() - started) / len(samples)
    if seconds > SLOW:
        findings.append(
            f"note: reward {name} takes {seconds:.2g} s a sample; 10,000 take {seconds * 10_000 / 3600:.1f} hours."
        )
    if len(samples) == 1:
        findings.append("note: one sample says little; give several to see constants and dependence on the batch.")
    ranged = _about_range(reward, samples, condition, first)
    if not ranged and len(samples) > 1 and bool((first == first[0]).all()):
        findings.append(
            f"problem: reward {name} gave all {len(samples)} samples {first[0]:.4g}; there is nothing to learn from. "
            "Check the value range it expects, or give more varied samples."
        )
    if second.shape != first.shape:
        findings.append(f"problem: a second call of reward {name} returned shape {tuple(second.shape)}. Keep no state.")
    elif _differ(first, second):
        i = int((first - second).abs().argmax())
        findings.append(
            f"problem: reward {name} is not deterministic: samples[{i}] got {first[i]:.6g}, then {second[i]:.6g}. "
            "Fix its seed, and put networks into eval mode."
        )
    else:
        findings += _about_batch(reward, samples, condition, first)
    findings += ranged
    if needs_gradient or is_differentiable(reward):
        findings += _about_gradient(reward, samples, condition)
    if not any(line.startswith("problem") for line in findings):
        scored = f"{len(samples)} samples of shape {tuple(samples.shape[1:])}"
        findings.append(f"fine: reward {name} gave {scored} {spread}, in {1e3 * seconds:.3g} ms each.")
    return findings


def _about_tensor(name: str, raw: object, samples: Tensor) -> list[str]:
    if not isinstance(raw, Tensor):
        return []
    notes = []
    if raw.dtype in (torch.float16, torch.bfloat16):
        notes.append(f"note: reward {name} returned {raw.dtype}, 2 to 3 digits; compute it in float32.")
    if raw.device != samples.device:
        notes.append(
            f"note: reward {name} returned a tensor on {raw.device}; it is copied to {samples.device} each call."
        )
    return notes


def _about_batch(reward: Reward, samples: Tensor, condition: Condition, together: Tensor) -> list[str]:
    name = name_of(reward)
    if len(samples) == 1:
        return []
    few = torch.arange(min(SINGLES, len(samples)))
    alone = []
    for i in few:
        try:
            value = _call(reward, samples[i[None]].clone(), condition[i[None]])
        except (RuntimeError, ValueError) as error:
            return [f"problem: a single sample cannot be scored: {error}"]
        if sentence := _wrong_shape(name, value, 1):
            return [f"problem: with a single sample, {sentence}"]
        alone.append(value.detach()[0])
    separate = torch.stack(alone)
    if not _differ(together[: len(few)], separate, 1e-3):
        return []
    i = int((together[: len(few)] - separate).abs().argmax())
    return [
        f"problem: reward {name} depends on the batch: samples[{i}] gets {together[i]:.6g} with the others and "
        f"{separate[i]:.6g} alone. Score each sample by itself, without means or ranks over the batch."
    ]


def _about_range(reward: Reward, samples: Tensor, condition: Condition, values: Tensor) -> list[str]:
    """Heuristic: cutting [0, 1] pictures to whole numbers, as a cast to uint8 does, must change some value,
    and so must multiplying them by 255 (else the reward does not look at them)."""
    if not _is_picture(samples) or torch.equal(samples.trunc(), samples):
        return []
    try:
        cut = _call(reward, samples.trunc(), condition)
        bytes_ = _call(reward, samples * 255, condition)
    except (RuntimeError, ValueError):
        return []
    if cut.shape != values.shape or _differ(values, cut) or not _differ(values, bytes_):
        return []
    return [
        f"problem: reward {name_of(reward)} may expect pictures in 0..255: on these in [0, 1] only the whole part "
        "counts (a guess: nothing changed when fractions were cut off). Multiply by 255 and round first."
    ]


def _works_on_bytes(reward: Reward, samples: Tensor, condition: Condition) -> list[str]:
    if not _is_picture(samples):
        return []
    try:
        _raw(reward, (samples * 255).round().to(torch.uint8), condition)
    except Exception:
        return []
    return ["note: it runs on uint8 pictures in 0..255; perhaps it lacks `(images * 255).round().to(torch.uint8)`."]


def _about_gradient(reward: Reward, samples: Tensor, condition: Condition) -> list[str]:
    name = name_of(reward)
    declared = is_differentiable(reward)
    remedy = "Keep to torch operations on the samples, without detach, numpy or rounding"
    remedy += "." if declared else ", or choose a rule that needs no gradient."
    if not samples.is_floating_point():
        return [f"problem: samples are {samples.dtype}, which has no gradient. Give floats."]
    x = samples.clone().requires_grad_(True)
    trial = replace(reward, differentiable=True) if isinstance(reward, UserReward) else reward
    try:
        with torch.enable_grad():
            values = _call(trial, x, condition)
            if not values.requires_grad:
                return [f"problem: the result of reward {name} carries no gradient. {remedy}"]
            (gradient,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
    except (RuntimeError, ValueError) as error:
        return [f"problem: reward {name} cannot be differentiated: {error} {remedy}"]
    if gradient is None or not bool(gradient.any()):
        return [f"problem: the gradient of reward {name} is zero for all {len(samples)} samples. {remedy}"]
    if not gradient.isfinite().all():
        bad = ~gradient.flatten(1).isfinite().all(1)
        return [
            f"problem: the gradient of reward {name} is NaN or inf for samples[{int(bad.nonzero()[0])}]; "
            "look for a root, logarithm or division at zero there."
        ]
    if declared:
        return []
    return [f"problem: reward {name} has a gradient but does not say so. Set the function's `differentiable = True`."]


def _raw(reward: Reward, samples: Tensor, condition: Condition) -> object:
    if not isinstance(reward, UserReward):
        return reward(samples, condition)
    with torch.set_grad_enabled(reward.differentiable):
        return reward.raw(samples, condition)


def _call(reward: Reward, samples: Tensor, condition: Condition) -> Tensor:
    try:
        value = reward(samples, condition)
    except ReturnedValueError:
        raise
    except Exception as error:
        raise RuntimeError(_raised(name_of(reward), error, samples)) from error
    return to_tensor(value, samples, name_of(reward))


def _raised(name: str, error: Exception, samples: Tensor) -> str:
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


def _differ(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether they differ by more than `tolerance` of the larger of their size and 1e-3."""
    return bool(((a - b).abs() > tolerance * a.abs().clamp_min(1e-3)).any())


def _is_picture(samples: Tensor) -> bool:
    shaped = samples.ndim == 4 and samples.shape[1] in (1, 3) and samples.is_floating_point()
    return shaped and bool(samples.min() >= 0) and bool(samples.max() <= 1)
