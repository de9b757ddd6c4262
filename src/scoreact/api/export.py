"""A run's weights for other programs: a folder with the weights, their facts in the file's header, and a model card."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..models.base import HasAdapters, Saves
from ..models.network import IntegerSteps, NetworkModel
from ..models.weights import load_weights
from ..report.card import about, model_card
from ..runs.record import read_record
from ..runs.source import Source, weights_file
from ..support.errors import ModelError, RunExists
from ..support.files import put_in_place, write_tensors

if TYPE_CHECKING:
    from .saved_run import Given

FORMATS = ("diffusers", "kohya", "peft", "pipeline", "weights")


def export(source: Source | Given, run: Path, form: str | None, out: Path | None, weights: str) -> Path:
    """See `SavedRun.export`."""
    if form is not None and form not in FORMATS:
        raise ModelError(f"format is {form!r}; known: {', '.join(FORMATS)}.")
    path, which = weights_file(run, weights)
    if isinstance(source, Source):  # nothing is scored; and weights are written in the type that they are stored in
        stored = {"dtype": ""} if source.recipe.name == "pipeline" else {}
        source = dataclasses.replace(source, reward=None, options={**source.options, **stored})
    model = source.build().model
    assert isinstance(model, nn.Module)
    formats = model.formats if isinstance(model, Saves) else ("weights",)
    form = form or formats[0]
    if form not in formats:
        raise ModelError(f"a run of a {type(model).__name__} has no form {form!r}; there are: {', '.join(formats)}.")
    folder = out or run / f"export-{form}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunExists(f"{folder} is not empty, and an export never overwrites; give another folder with out.")
    load_weights(model, path)
    record = read_record(run)
    made, target = not folder.exists(), folder
    if made:  # aside, so that a kill leaves no half export in the way of the next
        folder = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        facts = dict(model.facts()) if isinstance(model, Saves) else {}
        header = about(record, facts, which)
        if isinstance(model, Saves):
            model.save(folder, form, header)
        else:
            write_tensors(folder / "model.safetensors", _network(model).state_dict(), header)
        (folder / "README.md").write_text(model_card(record, facts, form, which, target), encoding="utf-8")
    except Exception:
        if made:
            shutil.rmtree(folder, ignore_errors=True)  # half an export is none
        raise
    if made:
        put_in_place(folder, target)
    return target


def _network(model: nn.Module) -> nn.Module:
    """The user's own, where it is inside a model of ours, with its adapters added to its weights."""
    model = model.merged() if isinstance(model, HasAdapters) else model
    network = model.network if isinstance(model, NetworkModel) else model
    return network.network if isinstance(network, IntegerSteps) else network
