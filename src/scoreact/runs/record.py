"""A run folder read with patience: what it holds as far as it has come, torn or damaged files named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..support.files import sort_lines
from ..training.config import Config, from_stored
from .checkpoint import read_run

Row = dict[str, Any]  # a metrics line
# what a line of each kind has, whichever version wrote it; one of no kind is an iteration's
NEEDS = {
    "reference": (
        "objective/J_ref", "objective/J_ref_se", "objective/J_star", "objective/J_star_low", "objective/J_star_high",
        "objective/effective_samples", "objective/trusted",
    ),
    "evaluation": ("reward/heldout", "reward/heldout_se", "policy/kl", "objective/J", "objective/J_se"),
    "guard": ("text",),
}  # fmt: skip


def is_whole(row: Row) -> bool:
    """Whether a line of metrics.jsonl is one that a run wrote."""
    needed = next((names for kind, names in NEEDS.items() if row.get(kind)), ("seconds",))
    kind = str if needed == NEEDS["guard"] else int | float | None  # null: it was not finite
    return isinstance(row.get("iteration"), int) and all(isinstance(row.get(name, ...), kind) for name in needed)


def value(row: Row, key: str) -> float:
    """A metric of a line, NaN where it is missing or was not finite."""
    found = row.get(key)
    return float(found) if isinstance(found, int | float) else math.nan


def column(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Iterations and values, where both are finite."""
    points = [(value(row, "iteration"), value(row, key)) for row in rows]
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


@dataclass(frozen=True)
class Lines:
    """What the curves are drawn from: the lines of metrics.jsonl."""

    iterations: list[Row]
    evaluations: list[Row]
    reference: Row


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record(Lines):
    """What a run folder holds, as far as it has come; {} for files that do not exist yet."""

    path: Path
    description: Row
    config: Row
    versions: Row
    result: Row
    problems: list[str]  # what could not be read
    guard: list[Row]  # what the guard said

    @classmethod
    def of_history(cls, history: Sequence[Row], path: Path | None, config: Config) -> Record:
        """The same of a run that may have no folder."""
        reference = [row for row in history if row.get("reference")]
        kinds = ("reference", "evaluation", "guard")
        return cls(
            iterations=[row for row in history if not any(row.get(kind) for kind in kinds)],
            evaluations=[row for row in history if row.get("evaluation")],
            reference=reference[-1] if reference else {},
            guard=[row for row in history if row.get("guard")],
            path=path or Path(),
            description={},
            config=config.to_dict(),
            versions={},
            result={"iterations": 0},
            problems=[],
        )

    @property
    def settings(self) -> Config:
        return from_stored(self.config, str(self.path / "config.json"))


def read_record(path: Path) -> Record:
    """The folder's files. Raises ValueError where there is no run; torn or damaged later files become `problems`."""
    start = read_run(path)
    problems: list[str] = []
    result = read_json(path / "result.json", problems)
    rows, damaged = sort_lines(path / "metrics.jsonl", is_whole)
    problems += [f"Line {number} of metrics.jsonl cannot be read and is left out." for number in damaged]
    reference = [row for row in rows if row.get("reference")]
    return Record(
        iterations=[row for row in rows if not any(row.get(kind) for kind in ("reference", "evaluation", "guard"))],
        evaluations=[row for row in rows if row.get("evaluation")],
        reference=reference[-1] if reference else {},
        guard=[row for row in rows if row.get("guard")],
        path=path,
        description=start.get("description") or {},
        config=start["config"],
        versions=start.get("versions") or {},
        result=result,
        problems=problems,
    )


def read_json(path: Path, problems: list[str]) -> Row:
    """The mapping in a JSON file; {} if there is none, and a problem if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise TypeError(f"it holds {type(found).__name__}, no mapping")
        return found
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({error}).")
        return {}
