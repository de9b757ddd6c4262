"""Whether a run can learn at all, looked at before any reward is asked for: groups to compare, weights that act, gradients.

Leaves weights and random numbers as they were. Knows rules and policies; does not know rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..algorithms.base import Rule, steps_that_act
from ..control.policy import Policy
from ..dynamics.sde import SDE
from ..dynamics.solvers import Solver, step_of
from ..sampling.draw import balanced
from ..support import distributed
from ..support.devices import device_of
from ..support.errors import ModelError, SettingError
from ..types import Condition, expand
from .config import Config

OVERSHOT = 1.5  # times the spread of normal data, above which steps are too few
LOOKS = 3  # times and prompts at which the model is asked, one state each
Look = tuple[Tensor, Tensor, Condition]  # t [1], x [1, *D]


def check_groups(rule: Rule, config: Config, prompts: Sequence[str]) -> list[str]:
    """Every sample of a batch has what the rule compares it with; a word where that is so of a part only.

    Raises SettingError where nothing could be learned: a batch is that of one process.
    """
    name, size, each = config.algorithm, config.batch_size // distributed.world(), config.group_size
    where = f"a batch of {size}" + (" in each process" if distributed.world() > 1 else "")
    if size < 2:
        raise SettingError(
            f"{where} (batch_size {config.batch_size}, {distributed.world()} processes) leaves nothing to compare a sample "
            f"with; take a batch_size of {2 * distributed.world()} or more."
        )
    if size % each:
        raise SettingError(f"group_size is {each}, which {where} is no multiple of; take another batch_size.")
    if not rule.compares_samples():
        return []
    names = balanced(prompts, size, torch.Generator().manual_seed(0), each)  # not the run's numbers
    alone = sum(count == 1 for count in Counter(names).values())
    remedy = (
        f"Set group_size to 2 or more (fewer prompts in a batch), or batch_size to {2 * len(prompts) * distributed.world()} "
        "or more."
    )
    if alone == size:
        raise SettingError(
            f"{name} compares the samples of a prompt with each other, but {where} has one of each ({len(prompts)} prompts, "
            f"group_size {each}): every advantage would be 0. {remedy}"
        )
    if alone:
        return [
            f"{name} compares the samples of a prompt with each other: of {where}, {alone} are the only ones of their prompt, "
            f"and teach it nothing. {remedy}"
        ]
    return []


def check_steps(rule: Rule, config: Config, sde: SDE) -> list[str]:
    """Solver, schedule and noise make steps that are finite, and none that ends where a score is asked for and none exists.

    A word where the steps are so few that they draw far too much spread. Raises SettingError.
    """
    ts, schedule = config.times(sde.schedule), sde.schedule
    name, pair, t0, t1 = (
        type(schedule).__name__,
        f"solver {config.solver} with {type(schedule).__name__}",
        ts[:-1],
        ts[1:],
    )
    x = torch.ones_like(t0).unsqueeze(1)
    with torch.no_grad():
        step = step_of(sde, rule.solver, x, t0, t1, x)
    bad = torch.nonzero(~(step.mean.flatten(1).isfinite().all(1) & step.std.isfinite())).flatten()
    if len(bad):
        begin, end = float(t0[bad[0]]), float(t1[bad[0]])
        alpha, sigma = float(schedule.alpha(t0[bad[:1]])), float(schedule.sigma(t0[bad[:1]]))
        raise SettingError(
            f"{pair} has no finite step from t = {begin:.3g} to {end:.3g}, where alpha is {alpha:.3g} and sigma {sigma:.3g} at "
            "first; take a schedule that begins and ends inside (t_min 0.001, t_max 0.999), or another solver or noise."
        )
    noisy = float(step.std[-1]) > 0 and float(t0[-1]) < config.act_until
    if noisy and float(schedule.sigma(t1[-1:])) == 0 and getattr(rule, "gradient_at", "") == "next":
        raise SettingError(
            f"{pair}: the last step, from t = {float(t0[-1]):.3g}, has noise ({float(step.std[-1]):.2g}) and ends where sigma "
            f"is 0. There is no score there, and {config.algorithm} asks for one (gradient_at next). Take "
            f"solver ddim, whose last step has no noise; {name}(t_max=0.999); or gradient_at state."
        )
    spread = normal_spread(sde, rule.solver, ts)
    if spread <= OVERSHOT:
        return []
    return [
        f"{config.steps} steps of {config.solver} on the grid {config.grid} draw {spread:.3g} times the standard deviation "
        "that normal data have; take more steps, or solver ddim."
    ]


@torch.no_grad()
def normal_spread(sde: SDE, solver: Solver, ts: Tensor) -> float:
    """The spread of samples of N(0, 1) data drawn with the exact score by steps at the times ts [N + 1], over the true one."""
    variance = (sde.schedule.alpha(ts) ** 2 + sde.schedule.sigma(ts) ** 2).unsqueeze(1)
    step = step_of(sde, solver, -1 / variance[:-1], ts[:-1], ts[1:], torch.ones_like(variance[:-1]))
    found = variance[0]
    for factor, std in zip(step.mean, step.std, strict=True):
        found = factor**2 * found + std**2
    return float((found / variance[-1]).sqrt())


def check_weights(rule: Rule, config: Config, policy: Policy, sde: SDE, prompts: Sequence[str]) -> list[str]:
    """The trained weights act and get gradients: moved, they change the score, and each has a gradient there.

    A word on those of which only a part does. Asks the model for `3 LOOKS` states, which are not counted.

    Raises ModelError where moving them changes nothing or none of them gets a gradient; SettingError where the policy acts
    in no step.
    """
    ts = config.times(sde.schedule)
    acting = steps_that_act(rule, ts) if rule.transitions_only else ts[:-1] < policy.act_until
    if not bool(acting.any()):
        raise SettingError(
            f"the tuned model would act in none of the {config.steps} steps: the first begins at t = {float(ts[0]):.3g}, and "
            f"act_until is {config.act_until:g}. Raise act_until or steps."
        )
    model = policy.model
    assert isinstance(model, nn.Module)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    looks = _looks(policy, ts[:-1][acting], prompts)
    before = [p.detach().clone() for p in trained.values()]
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            with torch.no_grad():
                start = [model.score(*look) for look in looks]
                _move(trained.values(), torch.Generator(device).manual_seed(1))
            changed, reached, met = False, set[str](), set[str]()
            for look, was in zip(looks, start, strict=True):
                with torch.enable_grad():
                    score = model.score(*look)
                changed = changed or not torch.equal(score.detach(), was)
                for name, gradient in _gradients(score, trained).items():
                    met.add(name)
                    if bool(gradient.any()):
                        reached.add(name)
        finally:
            with torch.no_grad():
                for p, old in zip(trained.values(), before, strict=True):
                    p.copy_(old)
    _refuse(type(model).__name__, len(trained), changed, bool(met), bool(reached))
    return [
        *_without(
            trained, [name for name in trained if name not in met], "do not enter the score, or are detached in it"
        ),
        *_without(trained, [name for name in trained if name in met - reached], "have a gradient of exactly 0"),
        *_rounded(trained, config),
    ]


def _looks(policy: Policy, times: Tensor, prompts: Sequence[str]) -> list[Look]:
    """States of the size that they have at the first, the middle and the last of the times, each of another prompt."""
    model = policy.model
    generator = torch.Generator(device_of(model)).manual_seed(0)
    found = []
    for i in range(LOOKS):
        condition = model.condition([prompts[i * (len(prompts) - 1) // (LOOKS - 1)]])
        x = model.prior(condition, generator)
        t = times[i * (len(times) - 1) // (LOOKS - 1)].reshape(1).to(x)
        size = (model.schedule.alpha(t) ** 2 + model.schedule.sigma(t) ** 2).sqrt()
        found.append((t, expand(size, x) * torch.randn(x.shape, generator=generator, device=x.device), condition))
    return found


def _move(weights: Iterable[Tensor], generator: torch.Generator) -> None:
    """Clearly, also those that begin at 0, as half of an adapter does."""
    for p in weights:
        noise = torch.randn(p.shape, generator=generator, device=generator.device).to(p)
        p += (0.05 * p.detach().float().square().mean().sqrt().to(p) + 0.005) * noise


def _gradients(score: Tensor, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a random sum of the score, by name; nothing of weights that it does not depend on."""
    if not score.requires_grad:
        return {}
    weight = torch.randn(score.shape, generator=torch.Generator().manual_seed(2)).to(score)
    found = torch.autograd.grad((score * weight).sum(), list(trained.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(trained, found, strict=True) if gradient is not None}


def _refuse(model: str, count: int, changed: bool, met: bool, reached: bool) -> None:
    if not met:
        raise ModelError(
            f"the score of {model} carries no gradient of any of the {count} trained tensors, so nothing could be learned: "
            "there is a no_grad, a detach or numpy inside, or the network goes past them."
        )
    if not changed:
        raise ModelError(
            f"moving all {count} trained tensors of {model} does not change its score: outputs are cached, or the network "
            "computes with other weights than those that have requires_grad."
        )
    if not reached:
        raise ModelError(
            f"the gradient of the score of {model} is exactly 0 in all {count} trained tensors, so nothing could be learned: "
            "they are multiplied by 0 (an adapter of scale 0), or their gradient underflows (compute in float32)."
        )


def _without(trained: Mapping[str, Tensor], names: Sequence[str], why: str) -> list[str]:
    if not names:
        return []
    share = sum(trained[name].numel() for name in names) / sum(p.numel() for p in trained.values())
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"{len(names)} of the {len(trained)} trained tensors ({share:.1%} of the numbers) will not be trained: they {why}: "
        f"{few}. Leave them out (requires_grad, the adapters' targets) where this is meant."
    ]


def _rounded(trained: Mapping[str, Tensor], config: Config) -> list[str]:
    """Weights of a format in which a step of Adam is lost."""
    if not config.uses("learning_rate"):
        return []
    lost, numbers = 0, sum(p.numel() for p in trained.values())
    for p in trained.values():
        if p.dtype in (torch.float16, torch.bfloat16):
            lost += int((p.detach() + config.learning_rate == p.detach()).sum())
    if not lost:
        return []
    return [
        f"in {lost / numbers:.0%} of the trained numbers a step of learning_rate {config.learning_rate:g} rounds to nothing, "
        "as they are float16 or bfloat16; keep trained weights in float32, or raise learning_rate."
    ]
