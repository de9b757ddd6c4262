"""A calibration's folder: what was asked, its ensembles and rounds while it is at work, and the run that it becomes.

    calibration.json   what was asked, once it is known that it can be done; what was reached, once all rounds are over
    ensembles/         statistics of the samples drawn before the rounds and after each, until then
    round-1/, ...      the rounds' runs; at the end the last one's files move up

Who goes on after a kill walks through the rounds from the first, and finds here what was made: a kill loses what a round
made since its last checkpoint, or the samples that were being drawn, and changes no bit of what follows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..evaluation.ensemble import Ensemble
from ..runs.checkpoint import check_free, checkpoints, clear
from ..runs.record import read_json
from ..support.errors import RunError
from ..support.files import write_json
from ..training.loop import Hook, Stop
from ..training.trainer import Trainer

RECORD, PICTURE, ENSEMBLES = "calibration.json", "calibration.png", "ensembles"


class AsItEnded(Hook):
    """A round that stopped early, opened again: it does not go on."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def before(self, trainer: Trainer) -> Stop | None:
        return Stop(self.reason)


class CalibrationFolder:
    """Nothing is written where `path` is None.

    Args:
        path: a free folder, or with `resume` that of a calibration that was begun.
        asked: all that decides what comes of it, for JSON.

    Raises:
        RunError: nothing to go on with, or something else was asked there.
    """

    def __init__(self, path: Path | None, asked: Mapping[str, Any], resume: bool) -> None:
        self.path, self.asked = path, json.loads(json.dumps(asked, default=str))
        self.facts: dict[str, Any] | None = None  # once all rounds are over
        if path is not None and resume:
            kept = _read(path)
            theirs = kept.pop("asked")
            mine = self.asked
            changed = [
                f"{k} {theirs.get(k)!r} -> {mine.get(k)!r}" for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)
            ]
            if changed:
                raise RunError(
                    f"{path} was begun with something else: {'; '.join(changed)}. Give the same as then, or another out."
                )
            self.facts = kept or None

    def begin(self, before: Ensemble) -> None:
        """What was asked can be done, as the pretrained model's ensemble says, which is kept."""
        if self.path is None or begun(self.path):
            return
        self.path.mkdir(parents=True, exist_ok=True)
        clear(self.path)
        write_json(self.path / RECORD, {"asked": self.asked})
        self._keep(0, before)

    def drawn(self, number: int, draw: Callable[[], Ensemble]) -> Ensemble:
        """The ensemble after this round; 0: the pretrained model's."""
        if self.path is not None and self._ensemble(number).is_file():
            return Ensemble.read(self._ensemble(number))
        found = draw()
        if self.path is not None and begun(self.path):
            self._keep(number, found)
        return found

    def round(self, number: int) -> Path | None:
        return None if self.path is None else self.path / f"round-{number}"

    def end(self, facts: Mapping[str, Any]) -> None:
        """All rounds are over."""
        if self.path is not None:
            write_json(self.path / RECORD, {**facts, "asked": self.asked})

    def settle(self, last: int) -> None:
        """The last round's run becomes the folder's; of those before it, what was measured and the weights stay."""
        if self.path is None:
            return
        own = self.path / f"round-{last}"
        if own.is_dir():
            for entry in sorted(
                own.iterdir(), key=lambda p: p.name == "config.json"
            ):  # that makes it a run, at the end
                entry.rename(self.path / entry.name)
            own.rmdir()
        for number in range(1, last):
            shutil.rmtree(self.path / f"round-{number}" / "checkpoints", ignore_errors=True)
        shutil.rmtree(self.path / ENSEMBLES, ignore_errors=True)

    def _keep(self, number: int, ensemble: Ensemble) -> None:
        self._ensemble(number).parent.mkdir(exist_ok=True)
        ensemble.write(self._ensemble(number))

    def _ensemble(self, number: int) -> Path:
        assert self.path is not None
        return self.path / ENSEMBLES / f"{number}.safetensors"


def check_free_for(path: Path) -> None:
    """Raises RunExists for a folder in which no calibration may begin."""
    (path / f"{RECORD}.tmp").unlink(missing_ok=True)  # of one that was killed as it began
    check_free(path)


def begun(path: Path) -> bool:
    """Whether a folder holds a calibration to go on with, or one that has ended."""
    return (path / RECORD).is_file()


def begun_round(part: Path | None) -> bool:
    """Whether a round's run has saved something."""
    return part is not None and bool(checkpoints(part / "checkpoints"))


def ended_early(part: Path | None) -> list[Hook]:
    """What keeps a round that stopped early from going on; nothing for one that did not, and for one that diverged."""
    if part is None or not (part / "model.safetensors").is_file():
        return []
    stopped = read_json(part / "result.json", []).get("stopped")
    return [AsItEnded(stopped)] if stopped else []


def _read(path: Path) -> dict[str, Any]:
    problems: list[str] = []
    kept = read_json(path / RECORD, problems)
    if problems or not isinstance(kept.get("asked"), dict):
        why = problems[0].rstrip(".") if problems else f"it has no {RECORD} that says what was asked"
        raise RunError(f"{path} holds no calibration to go on with ({why}); leave resume out, and give a new folder.")
    return kept
