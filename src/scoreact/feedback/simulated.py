"""Raters with known utilities, to see what a fit makes of answers when the truth is known. They are no people.

They answer by the law that `preferences` fits, so that a fit can be right; what they like is any function of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import Condition
from .preferences import BOTH_BAD, FIRST, SECOND, TIE, Compared
from .store import Store, load_sample


@dataclass(frozen=True)
class SimulatedRater:
    """Answers by a utility.

    Args:
        temperature: What a unit of utility is worth in log odds; 0 is careless and answers blindly.
        side: Log odds of left between equals.
        tie: Log weight of a tie between equals; None: never.
        both_bad: Utility of a third sample that is chosen in the place of both; None: never.
        name: Of the rater.
    """

    temperature: float = 1.0
    side: float = 0.0
    tie: float | None = None
    both_bad: float | None = None
    name: str = "simulated"

    def answer(self, first: Tensor, second: Tensor, side: Tensor, generator: torch.Generator) -> Tensor:
        """Answers [A] to pairs of utilities [A] each; side: of the first, 1 left, -1 right."""
        u, v, lean = self.temperature * first, self.temperature * second, 0.5 * self.side * side
        never = torch.full_like(u, -torch.inf)
        weights = torch.stack([
            u + lean, v - lean, never if self.tie is None else self.tie + 0.5 * (u + v),
            never if self.both_bad is None else torch.full_like(u, self.both_bad),
        ], 1)  # fmt: skip
        drawn = torch.multinomial(weights.softmax(1), 1, generator=generator)[:, 0]
        return torch.tensor([FIRST, SECOND, TIE, BOTH_BAD])[drawn]


def simulate(
    raters: Sequence[SimulatedRater], utility: Tensor, first: Tensor, second: Tensor, generator: torch.Generator
) -> Compared:  # fmt: skip
    """What raters answer, in turn, to pairs of rows of utilities [N], the sides drawn at random."""
    side = 1 - 2 * torch.randint(2, first.shape, generator=generator)
    turn = torch.arange(len(first)) % len(raters)
    winner = torch.zeros_like(first)
    for r, rater in enumerate(raters):
        own = turn == r
        winner[own] = rater.answer(utility[first[own]].double(), utility[second[own]].double(), side[own], generator)
    return Compared(first, second, winner, side, turn, torch.ones(len(first), dtype=torch.float64))


def answer_store(
    store: Store, utility: Callable[[Tensor, Condition], Tensor], raters: Sequence[SimulatedRater], generator: torch.Generator
) -> int:  # fmt: skip
    """Answer every pair of a store that has no answer yet, the raters in turn; how many there were."""
    rows = store.rows("SELECT id FROM tasks WHERE kind = 'pair' AND id NOT IN (SELECT task FROM answers) ORDER BY id")
    for number, row in enumerate(rows):
        task, rater = store.task(row[0]), raters[number % len(raters)]
        samples = torch.stack([load_sample(store.sample(i)) for i in task.samples])
        first, second = utility(samples, Condition([task.prompt] * 2)).double()[:, None]
        swapped = bool(torch.randint(2, (), generator=generator))
        side = torch.tensor([-1 if swapped else 1])
        said = int(rater.answer(first, second, side, generator))
        words = {FIRST: "right" if swapped else "left", SECOND: "left" if swapped else "right", TIE: "tie"}
        shown = [1, 0] if swapped else [0, 1]
        store.add_answer(task.id, words.get(said, "both_bad"), rater.name, shown=shown)
    return len(rows)
