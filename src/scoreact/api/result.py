"""What training leaves, and how anything with a policy draws samples."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..control.policy import Policy
from ..dynamics.samplers import DETERMINISTIC, sampler_by_name
from ..dynamics.sde import Noise, noise_level
from ..models.base import ScoreModel
from ..models.weights import write_back
from ..recipes.base import Problem, need_prompts
from ..report import html
from ..report.pictures import before_and_after
from ..report.progress import summary_lines
from ..runs.record import Record
from ..runs.samples import Drawn
from ..sampling.draw import draw, prior_of, seeded, seeds_of
from ..support.devices import device_of
from ..support.errors import ModelError, SettingError
from ..support.files import Line
from ..training.config import Config
from ..types import Metrics

AT_ONCE = 256  # samples drawn at a time, or as many fewer as have at most
MOST_BYTES = 2**29  # with the states of their paths, 512 MiB


class Sampled:
    """What a result and an opened run have in common: a policy that draws."""

    problem: Problem
    config: Config

    def drawn(
        self,
        policy: Policy,
        prompts: Sequence[str] | None,
        count: int,
        steps: int | None,
        solver: str | None,
        seed: int,
        reference: bool,
        noise_scale: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        first: int = 0,
    ) -> Iterator[Drawn]:
        """Decoded samples of the policy or its reference, `count` a prompt, in the prompts' order, so many at a time.

        Sample i of a prompt comes from (seed, prompt, i), counted from `first` on, and is the same whatever it is drawn with.
        """
        sampler, noise = (
            sampler_by_name(solver or self.config.solver),
            noise_of(solver or self.config.solver, noise_scale),
        )
        model: ScoreModel = policy.reference if reference else policy
        names = self.names(prompts, count)
        seeds, numbers = seeds_of(seed, names, first), [first + i for i in occurrences(names)]
        with guided(policy, guidance_scale, negative_prompt):
            model.condition(names[::count])  # an unknown prompt is said before any work
            ts, device = self.times(model, steps), device_of(policy.model)
            noise_of_one = prior_of(model, model.condition(names[:1]), seeded(seeds[:1], device))
            start, size = 0, 1 if noise_of_one.ndim == 5 else AT_ONCE  # one video says how large they are
            while start < len(names):
                some, end = names[start : start + size], start + size
                xs, decoded = draw(model, some, sampler, ts, seeds[start:end], device, noise)
                yield Drawn(decoded.cpu(), some, numbers[start:end])
                start, size = end, max(1, min(AT_ONCE, MOST_BYTES // (xs[:, 0].nbytes + decoded[0].nbytes)))

    def names(self, prompts: Sequence[str] | None, count: int) -> list[str]:
        """Prompts, or the problem's own, `count` times each."""
        if isinstance(prompts, str):
            raise SettingError(f"prompts is the text {prompts!r}; give a list of prompts, such as [{prompts!r}].")
        if not isinstance(count, int) or count < 1:
            raise SettingError(f"count is {count!r}; expected a whole number of samples a prompt, 1 at least.")
        if prompts is None:
            need_prompts(self.problem, "give some, as sample --prompts TEXT or sample(prompts=[...])")
            prompts = self.problem.prompts
        if not len(prompts):
            raise SettingError(
                "prompts is empty; give at least one ([''] for an unconditional model), or leave it out."
            )
        return [prompt for prompt in prompts for _ in range(count)]

    def draw(self, *what: Any, **how: Any) -> Tensor:
        """All of `drawn` at once: [B, ...] on the CPU."""
        return torch.cat([part.samples for part in self.drawn(*what, **how)])

    def times(self, model: ScoreModel, steps: int | None) -> Tensor:
        """The grid of training, with these steps or its own; a random one is uniform."""
        return self.config.times(model.schedule, steps=steps)


def noise_of(solver: str, noise_scale: float | None) -> Noise:
    """The noise of sampling, eta 1 unless told otherwise. Raises SettingError for a solver that has none."""
    if noise_scale is not None and solver in DETERMINISTIC:
        raise SettingError(
            f"noise_scale is {noise_scale:g}, but solver {solver} has no noise; leave out its noise level."
        )
    if noise_scale is not None and not 0 <= noise_scale < math.inf:
        raise SettingError(f"noise_scale is {noise_scale}; expected a number of at least 0.")
    return noise_level(1.0 if noise_scale is None else noise_scale)


def occurrences(names: Sequence[str]) -> list[int]:
    """How often each name came before."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        found.append(seen[name])
        seen[name] += 1
    return found


@contextlib.contextmanager
def guided(policy: Policy, scale: float | None, negative_prompt: str | None) -> Iterator[None]:
    """Another guidance scale and negative prompt for a while, for the policy and its reference alike.

    Raises ModelError for a model that has no such thing.
    """
    wanted = {"guidance_scale": scale, "negative_prompt": negative_prompt}
    before: list[tuple[object, str, object]] = []
    try:
        for name, value in wanted.items():
            for model in (policy.model, policy.reference) if value is not None else ():
                if not hasattr(model, name):
                    raise ModelError(f"{type(model).__name__} has no {name}; leave it out.")
                before.append((model, name, getattr(model, name)))
                setattr(model, name, value)
        yield
    finally:
        # the scale first, without which a negative prompt is refused
        for changed, name, kept in sorted(reversed(before), key=lambda entry: list(wanted).index(entry[1])):
            setattr(changed, name, kept)


@dataclass(repr=False)
class Result(Sampled):
    """What training leaves: the tuned policy beside its reference, its metrics, and the optimum it is measured against."""

    policy: Policy  # model: the tuned (averaged) weights; reference: the pretrained model
    history: list[Line]  # the lines of metrics.jsonl
    reference: Metrics  # J_ref, J*
    final: Metrics  # the last held-out evaluation
    stopped: str | None  # why the run ended early
    out: Path | None
    best_iteration: int | None  # of the weights in best/
    problem: Problem = field(repr=False)
    config: Config = field(repr=False)

    def sample(
        self,
        prompts: Sequence[str] | None = None,
        count: int = 8,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
        reference: bool = False,
        **how: Any,
    ) -> Tensor:
        """Decoded samples of the tuned model, `count` a prompt: [B, ...] on the CPU, in the prompts' order.

        Args:
            prompts: Left out: those of training. steps, solver: Left out: those of training.
            seed: Sample i of a prompt comes from (seed, prompt, i): it is the same whatever else is drawn, and two seeds share
                nothing. The same seed gives the tuned and the pretrained model (`reference=True`) the same noise.
            how: first, the number of each prompt's first sample (0); noise_scale (of a noisy solver, 1), guidance_scale,
                negative_prompt, of models that have them.
        """
        return self.draw(self.policy, prompts, count, steps, solver, seed, reference, **how)

    def plot(self) -> Figure:
        """Samples before and after training from the same noise, as a matplotlib figure."""
        return plotted(self.policy, self.problem, self.config)

    def write_back(self, network: nn.Module | None = None) -> int:
        """Put the tuned weights into your own network; returns how many tensors were written.

        network: the model that was given to `finetune`, or a network inside it (where it is left out: that model), or another
        network of the same shape. Without this call the model holds the last step of training, not the average.
        Raises ModelError when they do not fit.
        """
        tuned, model = self.policy.model, self.problem.model
        assert isinstance(tuned, nn.Module)
        assert isinstance(model, nn.Module)
        return write_back(tuned, model, network)

    def __str__(self) -> str:
        lines = [*summary_lines(self.history, self.final)]
        lines += [f"stopped early: {self.stopped}"] * (self.stopped is not None)
        return "\n".join(lines + [f"run        {self.out}"] * (self.out is not None))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """In a notebook: the outcome in a sentence, what the guard said, and the samples before and after."""
        record = Record.of_history(self.history, self.out, self.config)
        return html.snippet(record, self.plot())


def plotted(policy: Policy, problem: Problem, config: Config) -> Figure:
    import matplotlib

    from ..report.figures import STYLE

    with matplotlib.rc_context(STYLE):
        return before_and_after(policy, problem, config)[0].figure
