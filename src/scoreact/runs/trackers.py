"""Trackers: where a run's numbers, sentences and pictures go besides its own files. Each library is an extra, imported late.

Who wants another gives a class with the methods of `Tracker`: `--tracker my.py:Mine`, or an instance from Python.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..support.errors import LoadError, SettingError
from ..support.files import write_json
from ..support.loading import is_spec, load_named
from ..support.names import known_name
from .record import read_json

KEPT = "trackers.json"  # in a run's folder: under which names the trackers know it


@runtime_checkable
class Tracker(Protocol):
    """Told of a run as it goes on. What a method raises ends the tracker, and not the run."""

    def start(self, out: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        """Before anything else. out: the run's folder; settings: flat, of the run; resumed: it goes on."""
        ...

    def metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """The finite numbers of a line of metrics.jsonl."""
        ...

    def text(self, iteration: int, text: str) -> None:
        """A sentence of the guard or the model."""
        ...

    def pictures(self, iteration: int, sheet: Image.Image) -> None:
        """Some held-out pictures of an evaluation, from the same noise each time."""
        ...

    def end(self, failed: bool) -> None:
        """After everything else."""
        ...


class TensorBoardTracker:
    """Events in RUN/tensorboard."""

    def start(self, out: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"))
        if not resumed:
            self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

    def metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, iteration)

    def text(self, iteration: int, text: str) -> None:
        self.writer.add_text("guard", text, iteration)

    def pictures(self, iteration: int, sheet: Image.Image) -> None:
        self.writer.add_image("samples", np.asarray(sheet.convert("RGB")), iteration, dataformats="HWC")

    def end(self, failed: bool) -> None:
        self.writer.close()


class WandbTracker:
    """Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb. WANDB_PROJECT: scoreact where it is not set."""

    def start(self, out: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        import wandb

        kept = _kept(out).get("wandb") if resumed else None
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "scoreact"), name=out.name, dir=str(out), config=dict(settings),
                id=kept, resume="allow" if kept else None,
            )  # fmt: skip
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise SettingError(f"wandb cannot start: {reason} WANDB_MODE=offline keeps everything here.") from error
        # a step of its own: wandb's must rise with each call, and a resumed run goes back to its checkpoint
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")
        _keep(out, "wandb", self.run.id)

    def metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"iteration": iteration, **metrics})

    def text(self, iteration: int, text: str) -> None:
        self.run.log({"iteration": iteration, "guard": text})

    def pictures(self, iteration: int, sheet: Image.Image) -> None:
        import wandb

        self.run.log({"iteration": iteration, "samples": wandb.Image(sheet)})

    def end(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflowTracker:
    """MLflow: at MLFLOW_TRACKING_URI, or in files beside the run's folder (`mlruns`); experiment MLFLOW_EXPERIMENT_NAME."""

    def start(self, out: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI")
        if place is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3 wants to be told
            place = (out.resolve().parent / "mlruns").as_uri()
        self.client, name = MlflowClient(place), os.environ.get("MLFLOW_EXPERIMENT_NAME", "scoreact")
        self.said: list[str] = []
        kept = _kept(out).get("mlflow") if resumed else None
        if kept is not None:
            self.run = kept
            self.client.set_terminated(kept, "RUNNING")
            return
        known = self.client.get_experiment_by_name(name)
        experiment = self.client.create_experiment(name) if known is None else known.experiment_id
        self.run = self.client.create_run(experiment, run_name=out.name).info.run_id
        self.client.log_batch(self.run, params=[Param(key, str(value)[:500]) for key, value in settings.items()])
        _keep(out, "mlflow", self.run)

    def metrics(self, iteration: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[Metric(name, x, now, iteration) for name, x in metrics.items()])

    def text(self, iteration: int, text: str) -> None:
        self.said.append(f"iteration {iteration}: {text}\n")
        self.client.log_text(self.run, "".join(self.said), "guard.txt")

    def pictures(self, iteration: int, sheet: Image.Image) -> None:
        self.client.log_image(self.run, sheet, key="samples", step=iteration)

    def end(self, failed: bool) -> None:
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
}


def make_trackers(wanted: Sequence[str | Tracker]) -> list[Tracker]:
    """Those that are meant, each not started yet. Raises SettingError for one that is not installed or not known."""
    if isinstance(wanted, str):
        raise SettingError(f"trackers is the text {wanted!r}; give a list, such as [{wanted!r}].")
    made: list[Tracker] = []
    for one in wanted:
        if not isinstance(one, str):
            made.append(one)
        elif is_spec(one):
            own: Any = load_named(one, "tracker")
            made.append(own())
        else:
            name = known_name(one, TRACKERS, "unknown tracker")
            if importlib.util.find_spec(name) is None:
                raise SettingError(f"tracker {name} needs a package of that name; `pip install 'scoreact[{name}]'`.")
            made.append(TRACKERS[name]())
        if not isinstance(made[-1], Tracker):
            raise LoadError(f"tracker {one!r} is {type(made[-1]).__name__}; expected the methods start, metrics, text, "
                            "pictures and end.")  # fmt: skip
    return made


def finite_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a line can be drawn: no words, no yes or no, no NaN."""
    numbers = {name: x for name, x in line.items() if isinstance(x, int | float) and not isinstance(x, bool)}
    return {name: float(x) for name, x in numbers.items() if math.isfinite(x) and name != "iteration"}


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run by name, a rule's own among the others."""
    own = settings.get("rule") or {}
    return {**{name: value for name, value in settings.items() if name != "rule"}, **own}


def _kept(out: Path) -> dict[str, str]:
    return read_json(out / KEPT, [])  # a damaged one: the trackers begin anew


def _keep(out: Path, name: str, known_as: str) -> None:
    write_json(out / KEPT, {**_kept(out), name: known_as})
