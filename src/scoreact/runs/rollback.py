"""Numbers that fail (a loss, a gradient, a ratio or a path KL): back to the last good state, once, and on with smaller steps.

Knows checkpoints and what a trainer's state is; does not know what the numbers mean.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards.failures import SamplesNotFinite
from ..support import distributed
from ..support.errors import Diverged
from ..support.files import UNREADABLE
from ..training.state import restore
from ..training.trainer import Trainer
from .checkpoint import checkpoints, join_tree, read_checkpoint, split_tree

SLOWER = 0.25  # of every later step
STATES = 2  # kept in memory: the newest may be what fails

# what they end in, a solution of a singular system among them
NUMBERS = (Diverged, SamplesNotFinite, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]

State = dict[str, Any]


class LastGood:
    """What a run may go back to: the checkpoints in its folder, or copies in memory of a run that has none."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self._kept: deque[tuple[int, dict[str, Tensor], Any]] = deque(maxlen=STATES)

    def keep(self, iteration: int, state: Mapping[str, Any]) -> None:
        """A copy of a state, outside of the device; nothing to do where a folder keeps it."""
        if self.out is None:
            tensors, rest = split_tree(state)
            self._kept.append(
                (iteration, {k: x.detach().cpu().clone() for k, x in tensors.items()}, copy.deepcopy(rest))
            )

    def go_back(self, trainer: Trainer, error: Exception) -> tuple[State, str] | None:
        """The trainer in its last good state, that state and a sentence; None where going back cannot help.

        One process, once in a run. What fails at once after a state was saved may be that state: then the one before it.
        """
        failed = isinstance(error, NUMBERS)
        if not failed or getattr(error, "hopeless", False) or trainer.slowed < 1 or distributed.world() > 1:
            return None
        states = list(self._states(trainer.device))
        if not states:
            return None
        iteration, state = next((found for found in states if found[0] < trainer.iteration), states[0])
        at = trainer.iteration
        for p in trainer.policy.trainable():
            p.grad = None
        restore(trainer, state)
        trainer.iteration, trainer.slowed = iteration, SLOWER
        return state, (
            f"numbers failed after iteration {at} ({' '.join(str(error).split()).rstrip('.')}). The run went back to iteration "
            f"{iteration} and goes on with {SLOWER:g} of every step; if they fail again, it ends."
        )

    def _states(self, device: torch.device) -> Iterator[tuple[int, State]]:
        """Newest first."""
        for iteration, tensors, rest in reversed(self._kept):
            yield iteration, join_tree(rest, {name: x.to(device) for name, x in tensors.items()})
        for path in checkpoints(self.out / "checkpoints") if self.out is not None else ():
            try:
                yield read_checkpoint(path, device)
            except UNREADABLE:
                continue
