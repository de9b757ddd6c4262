"""The training loop, one for runs and for the arena; what happens around an iteration is a `Hook`'s.

Knows when to end; does not know files, budgets or evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..support.errors import Diverged
from ..types import Metrics

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass(frozen=True)
class Stop:
    """The end of a loop before its last iteration; reason: a sentence, or None where it had simply done enough."""

    reason: str | None = None


class Hook:
    """What happens around the iterations of a training loop. Each method does nothing here; override what is wanted.

    A hook may read everything of the trainer (`trainer.policy`, `.average`, `.config`, `.iteration`, `.algorithm`). What it
    changes there, it changes in the training; what it draws, it must draw with a generator of its own, or a resumed run
    differs from an uninterrupted one.
    """

    def before(self, trainer: Trainer) -> Stop | None:
        """Told before each iteration; a Stop ends the loop there."""
        return None

    def iteration(self, trainer: Trainer, metrics: Metrics) -> None:
        """Told of each finished iteration and its metrics; `trainer.iteration` counts it already."""

    def after(self, trainer: Trainer) -> Stop | None:
        """Told after each iteration that did not diverge; a Stop ends the loop."""
        return None

    def mended(self, trainer: Trainer, error: Exception) -> bool:
        """Told of an error in an iteration, or of numbers that failed in `after`; True: the trainer is whole again, go on."""
        return False

    def failed(self, trainer: Trainer, error: Exception) -> Stop | None:
        """Told of an error in an iteration; a Stop ends the loop in peace, None lets the error go on."""
        return None


def training_loop(trainer: Trainer, hooks: Sequence[Hook]) -> Stop | None:
    """Iterate until the trainer's last iteration or a hook's Stop, which is returned.

    Raises Diverged when the path KL of an iteration passes `kl_limit`, and what an iteration raises, unless a hook mends it or
    stops there.
    """
    while trainer.iteration < trainer.config.iterations:
        if (stop := _first(hook.before(trainer) for hook in hooks)) is not None:
            return stop
        try:
            metrics = trainer.iterate()
            for hook in hooks:
                hook.iteration(trainer, metrics)
            check_kl(trainer, metrics)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            if any([hook.mended(trainer, error) for hook in hooks]):
                continue
            if (stop := _first(hook.failed(trainer, error) for hook in hooks)) is not None:
                return stop
            raise
        try:
            stop = _first([hook.after(trainer) for hook in hooks])  # a list: every hook is told
        except Diverged as error:
            if not any([hook.mended(trainer, error) for hook in hooks]):
                raise
            continue
        if stop is not None:
            return stop
    return None


def check_kl(trainer: Trainer, metrics: Metrics) -> None:
    """Raises Diverged where the path KL of the policy that drew the paths is over `kl_limit`."""
    kl, limit = metrics.get("policy/kl", 0.0), trainer.config.kl_limit
    if not kl <= limit:  # NaN is over it too
        raise Diverged(
            f"path KL is {kl:.1f} nats, over kl_limit {limit:g}, at iteration {trainer.iteration}; lower learning_rate or "
            "max_kl. The best weights so far are kept."
        )


def check_finite(evaluation: Metrics, iteration: int) -> Metrics:
    """The evaluation. Raises Diverged where its reward, path KL or J is not finite."""
    for name in ("reward/heldout", "policy/kl", "objective/J"):
        if not math.isfinite(evaluation.get(name, 0.0)):
            raise Diverged(
                f"{name} of held-out samples is {evaluation[name]} at iteration {iteration}; lower learning_rate."
            )
    return evaluation


def _first(found: Iterable[Stop | None]) -> Stop | None:
    return next((stop for stop in found if stop is not None), None)
