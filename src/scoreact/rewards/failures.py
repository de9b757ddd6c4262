"""Rewards that fail for some samples: asked again, then left out and counted, up to a limit that the user sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..support.errors import RewardError, ScoreactError
from ..types import Condition, groups

Score = Callable[[Tensor, Condition], Tensor]  # samples [B, ...] -> rewards [B], of which some may be NaN or inf


class RewardRaised(ScoreactError, RuntimeError):
    """An exception inside a reward; the message names the reward, what it raised and what it was given."""


class PartFailed(RewardError):
    """A part of a summed reward that is not finite; the message names it."""


class SamplesNotFinite(RewardError):
    """Samples with NaN or inf, which the policy or `decode` made."""


@dataclass
class Failures:
    """How many samples a reward may fail for in a run, and for how many it has.

    Args:
        most: the limit; 0 lets the first failure end the run.
    """

    most: int = 0
    count: int = 0
    last: str = ""  # why, of the last one
    told: int = 0

    def add(self, number: int, why: str) -> None:
        self.count, self.last = self.count + number, why
        if self.count > self.most:
            raise RewardError(f"{why} It has failed for {self.count} samples; reward_failures allows {self.most}.")

    def news(self) -> str | None:
        """A sentence on failures that were not told yet."""
        if self.count == self.told:
            return None
        self.told = self.count
        return (
            f"the reward failed for {self.count} samples so far, of {self.most} that reward_failures allows. They teach "
            f"nothing: each got the mean of its prompt's others. The last time: {self.last}"
        )


def salvaged(score: Score, samples: Tensor, condition: Condition, failures: Failures, tries: int = 2) -> Tensor:
    """The rewards [B]; NaN, and counted, of samples for which the reward fails again.

    A batch that raises is asked for in halves, so that every other sample is scored; one sample alone, and samples with NaN,
    `tries` times.
    """
    try:
        values = score(samples, condition)
    except (RewardRaised, PartFailed) as error:
        if len(samples) == 1:
            if tries > 1:
                return salvaged(score, samples, condition, failures, tries - 1)
            failures.add(1, str(error))
            return torch.full((1,), torch.nan, device=samples.device)
        halves = torch.arange(len(samples), device=samples.device).chunk(2)
        return torch.cat([salvaged(score, samples[rows], condition[rows], failures, tries) for rows in halves])
    finite = values.isfinite()
    bad, good = torch.nonzero(~finite).flatten(), torch.nonzero(finite).flatten()
    if not len(bad):
        return values
    if values.requires_grad:  # the gradient at a NaN is one too: the others' without it
        values = torch.full_like(values.detach(), torch.nan)
        if len(good):
            values = values.index_copy(0, good, score(samples[good], condition[good]))
    if tries > 1:
        again = salvaged(score, samples[bad], condition[bad], failures, tries - 1)
        return values.index_copy(0, bad, again.to(values.dtype))
    failures.add(len(bad), f"It returned NaN or inf for prompt {condition.prompts[int(bad[0])]!r}.")
    return values.index_fill(0, bad, torch.nan)


def with_means(rewards: Tensor, condition: Condition, last: str) -> Tensor:
    """Rewards [B] with the mean of the prompt's others, or of all, in the place of NaN; without a gradient there."""
    good = ~rewards.isnan()
    if bool(good.all()):
        return rewards
    if not bool(good.any()):
        raise RewardError(f"the reward failed for all {len(rewards)} samples of a batch. {last}")
    known = rewards.detach()
    means = torch.full_like(known, float(known[good].mean()))
    for index in groups(condition).values():
        rows = index.to(rewards.device)
        own = rows[good[rows]]
        if len(own):
            means[rows] = known[own].mean()
    return torch.where(good, rewards, means)
