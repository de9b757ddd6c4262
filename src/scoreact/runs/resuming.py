"""Whether a run in a folder may go on as it is asked to: the same settings, as many processes; and its plan extended.

Knows what a run folder and a checkpoint say; does not train.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.weights import reference_digest_of
from ..support import distributed
from ..support.errors import RunError
from ..support.files import read_tensors, write_json
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
