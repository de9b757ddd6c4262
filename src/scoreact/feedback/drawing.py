"""What raters are to see: samples of a model now and of its reference, put into tasks.

Sample i of a prompt comes from (seed, prompt, i), as those of `scoreact sample`; a store that is added to goes on with i.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..control.policy import Policy
from ..dynamics.samplers import sampler_by_name
from ..models.weights import digest_of, reference_digest_of
from ..sampling.draw import balanced, draw, seeds_of
from ..support.devices import device_of
from ..support.errors import FeedbackError
from ..training.config import Config
from .choosing import Chosen
from .store import Store, StoredSample

WIDER = 4  # times as many pairs are drawn as asked, where they are chosen
# (prompts of P pairs, their decoded samples [P, *D] twice, how many to ask) -> which of them, and how each was chosen
ChoosePairs = Callable[[Sequence[str], Tensor, Tensor, int], list[tuple[int, Chosen]]]
SIZES = {"pair": 2, "rank": 4, "thumbs": 1, "scores": 1}  # samples a task


@dataclass(frozen=True)
class Drawing:
    """How tasks are drawn.

    Args:
        kind: Of the tasks: pair, rank, thumbs or scores.
        against: "reference", tuned against pretrained, or "itself", all by the model now.
        noise: Of those that are compared: "other", or "same" for both models (`against` reference).
        seed: Of the noise and of the prompts' order.
        at_once: Tasks drawn together.
    """

    kind: str = "pair"
    against: str = "reference"
    noise: str = "other"
    seed: int = 0
    at_once: int = 8

    def members(self) -> list[tuple[bool, int]]:
        """Of each of a task's samples whether it is the reference's, and the number of its noise within the task."""
        size = SIZES[self.kind]
        if self.against == "itself" or size == 1:
            return [(False, i) for i in range(size)]
        half = size // 2
        shift = 0 if self.noise == "same" else half
        return [(False, i) for i in range(half)] + [(True, i + shift) for i in range(half)]


def tasks_of(store: Store, kind: str, drew: Callable[[StoredSample], bool]) -> int:
    """How many tasks of a kind there are whose first sample is such a one."""
    own = {sample.id for sample in store.samples() if drew(sample)}
    return sum(json.loads(row[0])[0] in own for row in store.rows("SELECT samples FROM tasks WHERE kind = ?", kind))


def draw_tasks(
    store: Store, policy: Policy, config: Config, prompts: Sequence[str], count: int, how: Drawing,
    model: str, tuned: bool = True, choose: ChoosePairs | None = None,
) -> Iterator[int]:  # fmt: skip
    """Draw samples with the settings of training and ask for `count` comparisons of them; yields how many there are so far.

    Args:
        store: Where samples and tasks go.
        policy: The model now, beside its reference.
        config: Solver, steps, grid and noise.
        prompts: Each comes equally often, in random order.
        count: Tasks.
        how: What is compared.
        model: The text that the store keeps with each sample: a run's folder, a recipe.
        tuned: Whether the policy is more than its reference.
        choose: Of pairs, which are asked of `WIDER` times as many that are drawn; all that are drawn by default.

    Raises:
        ValueError: Before anything is drawn, for a prompt that the model does not know.
    """
    members = how.members()
    width = 1 + max(number for _, number in members)
    device, sde, ts = device_of(policy.model), config.sde(policy.schedule), config.times(policy.schedule)
    policy.model.condition(list(dict.fromkeys(prompts)))
    digests = {False: digest_of(policy.model), True: reference_digest_of(policy.reference)}  # type: ignore[arg-type]
    last = store.rows("SELECT prompt, MAX(number) FROM samples WHERE seed = ? GROUP BY prompt", how.seed)
    following = Counter({row[0]: row[1] + 1 for row in last if row[1] is not None})
    order = torch.Generator().manual_seed(how.seed + sum(following.values()))
    wider, at_once = (1, how.at_once) if choose is None else (WIDER, WIDER * how.at_once)
    names = balanced(prompts, wider * count, order)
    for start in range(0, len(names), wider * at_once):
        some = names[start : start + wider * at_once]
        firsts = []
        for prompt in some:
            firsts.append(following[prompt])
            following[prompt] += width
        drawn: dict[bool, Any] = {}
        for reference in sorted({of_reference for of_reference, _ in members}):
            own = [number for of_reference, number in members if of_reference == reference]
            asked = [prompt for prompt in some for _ in own]
            seeds = [
                seeds_of(how.seed, [prompt], first + number)[0]
                for prompt, first in zip(some, firsts, strict=True) for number in own
            ]  # fmt: skip
            network = policy.reference if reference else policy
            xs, decoded = draw(network, asked, sampler_by_name(config.solver), ts, seeds, device, sde.noise)
            _check_shape(decoded.shape[1:])
            drawn[reference] = iter(zip(xs[-1].cpu(), decoded.cpu(), strict=True))
        shown = [[next(drawn[reference]) for reference, _ in members] for _ in some]
        picks: list[tuple[int, Chosen]] = [(row, "random") for row in range(len(some))]
        if choose is not None:
            left, right = (torch.stack([pair[side][1] for pair in shown]) for side in (0, 1))
            picks = choose(some, left, right, len(some) // wider)
        with store.transaction():
            for row, chosen in picks:
                ids, prompt, first = [], some[row], firsts[row]
                for (reference, number), (state, sample) in zip(members, shown[row], strict=True):
                    ids.append(store.add_sample(
                        sample, prompt, state, source="tuned" if tuned and not reference else "reference", model=model,
                        digest=digests[reference], seed=how.seed, number=first + number, solver=config.solver,
                        steps=config.steps,
                    ))  # fmt: skip
                store.add_task(ids, how.kind, chosen)
        yield (start + len(some)) // wider


def _check_shape(shape: Sequence[int]) -> None:
    """Raises FeedbackError for samples that the page cannot show."""
    if len(shape) not in (1, 2) and not (len(shape) in (3, 4) and shape[0] in (1, 3)):
        raise FeedbackError(
            f"samples of shape {list(shape)} cannot be shown; the page takes series [length] or [channels, length], pictures "
            "[1 or 3, H, W] and videos [1 or 3, frames, H, W]."
        )
