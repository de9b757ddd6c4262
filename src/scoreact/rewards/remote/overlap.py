"""Scoring and sampling at the same time: a part of a batch is scored elsewhere while the next part is drawn.

A reward computed in this process is computed at once. Which of the two it is changes no random number, so the paths and
the rewards are the same. Does not know paths, policies or training.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

from ...types import Condition
from ..check import Checked
from .client import Elsewhere

T = TypeVar("T")


def ready(reward: Checked) -> None:
    """Reach a reward elsewhere now; nothing to do for others. Raises RemoteError (a ValueError)."""
    if isinstance(reward.reward, Elsewhere):
        reward.reward.ready()


class Scores:
    """The rewards of one batch, added part by part, in order."""

    def __init__(self, reward: Checked) -> None:
        self._reward = reward
        elsewhere = reward.reward if isinstance(reward.reward, Elsewhere) else None
        self._size = elsewhere.batch_size if elsewhere is not None else 0
        self.overlap = elsewhere is not None and elsewhere.overlap
        self._parts: list[Future[Tensor]] = []
        self._rows: list[tuple[int, Tensor | None]] = []  # of each part, its size and which rows of it are scored

    def parts(self, prompts: Sequence[str]) -> Iterator[Sequence[str]]:
        """The prompts in the parts in which to draw their samples: all of them unless the reward has a batch_size."""
        size = self._size or len(prompts)
        return (prompts[i : i + size] for i in range(0, len(prompts), size))

    def add(self, samples: Tensor, condition: Condition, among: tuple[int, Tensor] | None = None) -> None:
        """Score the next part's samples [b, ...]; among: (B, rows [b]) where they are these of B, whose others get nan."""
        self._rows.append((len(samples), None) if among is None else among)
        future: Future[Tensor] = Future()
        if self.overlap:
            before = self._parts[-1] if self._parts else None
            # a daemon: an interrupted program does not wait for an answer that nobody wants
            threading.Thread(target=self._score, args=(future, before, samples, condition), daemon=True).start()
        else:
            future.set_result(self._reward(samples, condition))
        self._parts.append(future)

    def _score(self, future: Future[Tensor], before: Future[Tensor] | None, x: Tensor, condition: Condition) -> None:
        try:
            if before is not None:
                before.result()  # one after another, and none after a failure
            # a counter of its own: the main thread may be counting too
            future.set_result(Checked(self._reward.reward, self._reward.failures)(x, condition))
        except BaseException as error:
            future.set_exception(error)

    def result(self) -> Tensor:
        """All rewards [B], once they are there. Raises what the first part that failed raised."""
        parts = [part.result() for part in self._parts]
        if self.overlap:
            self._reward.calls += sum(map(len, parts))
        return torch.cat([_placed(part, *rows) for part, rows in zip(parts, self._rows, strict=True)])


def _placed(rewards: Tensor, size: int, asked: Tensor | None) -> Tensor:
    """[size], nan where nobody asked."""
    if asked is None:
        return rewards
    whole = rewards.new_full((size,), torch.nan)
    whole[asked] = rewards
    return whole


def one_ahead(batches: Iterable[tuple[T, Scores]]) -> Iterator[tuple[T, Tensor]]:
    """(paths, scores) as (paths, rewards [B]), in order; while one is scored elsewhere the next is drawn."""
    waiting: list[tuple[T, Scores]] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > 1 or not batch[1].overlap:
            paths, scores = waiting.pop(0)
            yield paths, scores.result()
    for paths, scores in waiting:
        yield paths, scores.result()
