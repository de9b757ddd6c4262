"""What is wrong with a reward, in sentences, before a run asks it.

Found by running it on a few samples. Does not know training; does not print.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import ReturnedValueError, Reward, is_differentiable, is_of_batch, name_of, to_tensor
from .check import _call, _raised, _wrong_shape, _wrong_values
from .registry import load
from .user import UserReward

SLOW = 0.05  # seconds a sample: 25,600 reward calls then take 20 minutes
SINGLES = 8  # samples scored one at a time by `explain`


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
    if is_of_batch(reward):
        return [
            f"note: reward {name} is of samples together: a value is what the sample adds to a measure of its batch."
        ]
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


def _differ(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether they differ by more than `tolerance` of the larger of their size and 1e-3."""
    return bool(((a - b).abs() > tolerance * a.abs().clamp_min(1e-3)).any())


def _is_picture(samples: Tensor) -> bool:
    shaped = samples.ndim == 4 and samples.shape[1] in (1, 3) and samples.is_floating_point()
    return shaped and bool(samples.min() >= 0) and bool(samples.max() <= 1)
