"""Whether a run in a folder may go on: the same settings, files, model and number of processes; and its plan extended.

Knows what a run folder and a checkpoint say; does not train. Of the code that a run depends on it sees the files that were
named, not what these import, and no function that was given from Python.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.weights import reference_digest_of
from ..rewards.learned import ABOUT, NUMBERS
from ..support import distributed
from ..support.errors import RunError
from ..support.files import digest_of_file, read_tensors, write_json
from ..training.config import Config, from_stored
from ..training.trainer import Trainer
from .source import REFERENCE


def check_settings(out: Path, stored: Mapping[str, Any], config: Config, extend: bool) -> None:
    """The settings are those that the run was started with, but for the iterations where it is extended."""
    theirs, mine = from_stored(stored["config"]).to_dict(), config.to_dict()
    same = {"iterations"} if extend else set()
    changed = [f"{k} {theirs.get(k)!r} -> {mine[k]!r}" for k in mine if theirs.get(k) != mine[k] and k not in same]
    if changed:
        raise RunError(
            f"{out} was started with other settings: {'; '.join(changed)}. Resume with the same, or start a new run."
        )


ACCEPT = "Undo that, or go on all the same with --accept-changes (accept_changes=True)."
ASIDE = ("command", "made_by", "prompts")  # of a description: what decides nothing, and texts that may look like paths


def named_files(described: Mapping[str, Any]) -> dict[str, str]:
    """Path -> digest of every file that a description or settings name: of a reward, a rule, a model, prompts, weights."""
    found: dict[str, str] = {}

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            for entry in value.values():
                look(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                look(entry)
        elif isinstance(value, str):
            place = value.rpartition("@")[0] if value.rpartition("@")[0].count(":") else value  # file.py:name@/a/python
            name = "" if place.startswith("onnx:") else place.rpartition(":")[0]
            module = getattr(sys.modules.get(name), "__file__", None)
            # of the folder of a reward
            inside = [os.path.join(value, file) for file in (ABOUT, NUMBERS)] if os.path.isdir(value) else []
            for path in (place, place.removeprefix("onnx:"), name, module or "", *inside):
                if os.path.isfile(path):
                    found[str(Path(path).resolve())] = digest_of_file(Path(path))

    look({name: value for name, value in described.items() if name not in ASIDE})
    return found


def check_files(out: Path, theirs: Mapping[str, str], accept: bool) -> tuple[dict[str, str], list[str]]:
    """The files that the run depends on, path -> digest, are as they were; their digests now, and what there is to say.

    Raises RunError where they are not, unless that is accepted.
    """
    now = {path: digest_of_file(Path(path)) if os.path.isfile(path) else "" for path in theirs}
    changed = [f"{path} {'was edited' if now[path] else 'is gone'}" for path in theirs if now[path] != theirs[path]]
    return now, _accepted(out, changed, accept)


def check_record(out: Path, stored: Mapping[str, Any], state: Mapping[str, Any], accept: bool) -> list[str]:
    """config.json says what it said when the checkpoint was made; what there is to say. stored: its content."""
    if "settings" not in state:  # made by an earlier version
        return []
    theirs = {**state["description"], **from_stored(state["settings"]).to_dict()}
    mine = {**(stored.get("description") or {}), **from_stored(stored["config"]).to_dict()}
    aside = {*ASIDE, *(["iterations"] if stored.get("extended") else [])}
    changed = [
        f"{name} of config.json was edited ({theirs.get(name)!r} -> {mine.get(name)!r})"
        for name in {**theirs, **mine} if name not in aside and theirs.get(name) != mine.get(name)
    ]  # fmt: skip
    return _accepted(out, changed, accept)


def _accepted(out: Path, changed: list[str], accept: bool) -> list[str]:
    if changed and not accept:
        raise RunError(f"since the last checkpoint of {out} was made, {'; '.join(changed)}. {ACCEPT}")
    return [f"{text}, and the run goes on with it." for text in changed]


def check_processes(out: Path, theirs: int | None) -> None:
    """As many as before: each has its share of the paths that are kept, and counts its own calls."""
    mine = distributed.world()
    if theirs not in (None, mine):  # None: made by an earlier version, which did not write it
        start = f"`torchrun --nproc_per_node {theirs} -m scoreact resume {out}`"
        raise RunError(
            f"{out} is a run of {theirs} processes, and {mine} would go on with it; start as many: "
            f"{start if theirs != 1 else f'`scoreact resume {out}` without torchrun'}."
        )


def check_reference(out: Path, theirs: str | None, mine: str, trainer: Trainer) -> tuple[str, list[str]]:
    """The reference is the model that the run started from, also where the user's own was trained by an earlier call.

    theirs, mine: digests of the run's and of the trainer's. Returns the trainer's, into which the run's pretrained weights are
    put where that is needed, and what there is to say.
    """
    if theirs in (None, mine):  # None: made by version 0.1.0, which did not write it
        return mine, []
    kept = out / REFERENCE
    if kept.is_file():
        trainer.put_reference(read_tensors(kept))
        mine = reference_digest_of(trainer.policy.reference)
    if theirs != mine:
        raise RunError(
            f"{out} started from another pretrained model (digest {str(theirs)[:12]}, and this one's is {mine[:12]}): "
            "it was trained by an earlier call, or has other weights. Build it anew, as before the run."
        )
    return mine, [
        f"The model that was given is not the pretrained one that this run began with: its weights were taken from {kept.name}."
    ]


def write_extension(out: Path, stored: Mapping[str, Any], trainer: Trainer) -> str:
    """Rewrite the plan in config.json; the rates follow the new plan from here on. Returns a sentence for the user."""
    before, after = int(stored["config"]["iterations"]), trainer.config.iterations
    if after <= trainer.iteration:
        raise RunError(
            f"{out} has made {trainer.iteration} iterations already; give more than that to extend it, not {after}."
        )
    steps = [*stored.get("extended", ()), {"at": trainer.iteration, "from": before, "to": after}]
    write_json(out / "config.json", {**stored, "config": trainer.config.to_dict(), "extended": steps})
    (out / "result.json").unlink(missing_ok=True)
    return (
        f"Extended from {before} to {after} iterations: the learning rates go on at {trainer.rate():.2g} of their full "
        f"size and fall to 0 at iteration {after}."
    )
