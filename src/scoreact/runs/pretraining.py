"""Pretraining as a folder: a model learned from the user's data, with checkpoints, a held-out loss, resuming and stopping.

The folder is a recipe of its own (`recipes/own_model.py`) from the first look on. Never prints: `on_event` tells.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..dynamics import prediction
from ..dynamics.schedule import RectifiedFlow
from ..models.network import NetworkModel
from ..recipes.own_model import (
    ABOUT,
    WEIGHTS,
    about_model,
    make_model,
    make_network,
    read_about,
    to_states,
    write_model,
)
from ..sampling.spread import measured_paths, nearest_path
from ..support.devices import bfloat16_pays, choose_device
from ..support.errors import RunError, RunExists, SettingError
from ..support.files import add_to_digest, append_line, truncate_lines
from ..support.folders import LOCK, FolderLock
from ..support.own_data import Examples, OwnData
from ..training.pretrain import Pretrainer, denoising_error, open_ended_average, open_ended_rate
from .checkpoint import checkpoints, clear, load_checkpoint, save_checkpoint
from .stopping import Interrupt

MINUTES = 10.0  # of training, where neither these nor steps are given
FIRST_LOOKS, LOOK_EVERY, SPARSER = (100, 250), 500, 2000  # steps; looks grow rarer from SPARSER on
LOOKED_AT, TIMES = 256, 4  # examples in a held-out loss, and times each
SAVE_SECONDS = 120.0  # between checkpoints, at least
TELL_SECONDS = 10.0  # between words of progress, at first
OWN = {ABOUT, WEIGHTS, "metrics.jsonl", "samples.png", "checkpoints", LOCK}  # files of a pretraining
SPREAD = {"pictures": 1.0, "vectors": 1.8, "series": 1.8}  # of the times: a picture is decided in their middle
RISES = 1.02  # the held-out loss over its lowest, from which on it is said to rise

Event = Callable[[str, Mapping[str, Any]], None]
"""(kind, line): note, begin, progress, look, interrupted, path, finished."""


@dataclass(frozen=True)
class PretrainPlan:
    """How a model is learned. A run that goes on has the plan that it began with.

    width: of the network, a multiple of 8; None: one that suits the data. bfloat16: auto (where it is the faster), yes or no.
    flip: mirror pictures at random. device: auto, cpu, cuda.
    """

    batch_size: int = 128
    learning_rate: float = 1e-3
    width: int | None = None
    label_dropout: float = 0.1
    flip: bool = False
    bfloat16: str = "auto"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        whole = (("batch_size", self.batch_size, 2), ("seed", self.seed, 0), ("width", self.width or 8, 8))
        for name, value, low in whole:
            if not low <= value < 2**32:
                raise SettingError(f"{name} is {value}; give a whole number from {low} to {2**32 - 1}.")
        if self.width is not None and self.width % 8:
            raise SettingError(f"width is {self.width}; give a multiple of 8.")
        if not 0 < self.learning_rate < math.inf:
            raise SettingError(f"learning_rate is {self.learning_rate}; give a number above 0, such as 1e-3.")
        if not 0 <= self.label_dropout < 1:
            raise SettingError(f"label_dropout is {self.label_dropout}; give a share from 0 to below 1.")
        if self.bfloat16 not in ("auto", "yes", "no"):
            raise SettingError(f"bfloat16 is {self.bfloat16!r}; known: auto, yes, no.")


class Pretraining:
    """A network at pretraining in a folder.

    Args:
        out: the folder, new or empty; with `resume` one that pretraining was at work in.
        data: to learn from, and held out.
        plan: how; None: of a run that goes on its own, else the defaults.
        source: what model.json says of where the data come from.
        sheet: draws samples of a model into a file, at every look.
        on_event: told of everything that happens.
        resume: go on from the last checkpoint.
    """

    def __init__(
        self,
        out: Path,
        data: OwnData,
        plan: PretrainPlan | None = None,
        *,
        source: str = "",
        sheet: Callable[[NetworkModel, Path], None] | None = None,
        on_event: Event = lambda kind, line: None,
        resume: bool = False,
    ) -> None:
        self.out, self.data, self._tell, self._sheet = out, data, on_event, sheet
        self._interrupt = Interrupt(lambda: self._tell("interrupted", {}))
        if not resume:
            _check_free(out)
        out.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(out)
        try:
            if not resume:
                _check_free(out)  # still
                clear(out)
            self._start(plan, source, resume)
        except BaseException:
            self._lock.release()
            raise

    def _start(self, plan: PretrainPlan | None, source: str, resume: bool) -> None:
        digest = _digest(self.data)
        notes: list[str] = []
        state: dict[str, Any] = {}
        if resume:
            self.about = read_about(self.out)
            kept = PretrainPlan(**self.about["plan"])
            if plan is not None and plan != kept:
                changed = [n for n, value in asdict(kept).items() if asdict(plan)[n] != value]
                values = ", ".join(str(asdict(kept)[name]) for name in changed)
                raise RunError(
                    f"{self.out} was begun with another {', '.join(changed)} ({values}); give the same, or leave it out."
                )
            if self.about["data_digest"] != digest:
                raise RunError(f"{self.out} was begun with other data than these; give the same, or another name.")
            self.plan = kept
            _, state = load_checkpoint(self.out / "checkpoints", problems=notes)
        else:
            self.plan = plan or PretrainPlan()
            self.about = {**about_model(self.data, self.plan.width), "plan": asdict(self.plan), "data": source}
            self.about |= {"data_digest": digest, "examples": len(self.data.train), "versions": _versions()}
        device = choose_device(self.plan.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)
            network = make_network(self.about).to(device)
        examples = _on(self.data.train, device)
        if not resume:
            self.about["parameters"] = sum(p.numel() for p in network.parameters())
            self.about |= self._precision(network, examples)
        self.pretrainer = Pretrainer(
            network, examples.values, examples.labels, RectifiedFlow(), prediction.velocity, rate=open_ended_rate(),
            keep=open_ended_average(), states=to_states(self.about, self.plan.flip), batch_size=self.plan.batch_size,
            learning_rate=self.plan.learning_rate, label_dropout=self.plan.label_dropout, spread=SPREAD[self.about["kind"]],
            bfloat16=self.about["bfloat16"], seed=self.plan.seed,
        )  # fmt: skip
        self.best: dict[str, Any] = {"loss": math.inf, "step": 0, "network": {}}
        self.seconds = 0.0  # of training, in all processes
        self._losses: list[float] = []  # since the last look
        self._pace = {"examples_per_second": math.nan, "left": math.nan}
        if resume:
            self.pretrainer.restore(state["pretrainer"])
            self.best, self.seconds, self._losses = state["best"], state["seconds"], state["losses"]
            truncate_lines(self.out / "metrics.jsonl", self.pretrainer.step)
        self._looks = [
            _on(_some(part), device) for part in (self.data.heldout, self.data.train)
        ]  # the same ones at every look
        for note in [*self.data.notes, *notes]:
            self._tell("note", {"text": note})
        self._tell(
            "begin",
            {**self.about, "step": self.pretrainer.step, "heldout": len(self.data.heldout), "device": str(device)},
        )

    def _precision(self, network: nn.Module, examples: Examples) -> dict[str, Any]:
        """Which precision is the faster here, measured on a copy, or which one was asked for."""
        if self.plan.bfloat16 != "auto":
            return {"bfloat16": self.plan.bfloat16 == "yes"}
        if not (bfloat16_pays() or examples.values.device.type == "cuda"):
            return {"bfloat16": False}
        speeds = [self._speed(copy.deepcopy(network), examples, bfloat16) for bfloat16 in (False, True)]
        faster = speeds[1] > 1.1 * speeds[0]
        return {"bfloat16": faster, "examples_per_second": {"float32": speeds[0], "bfloat16": speeds[1]}}

    def _speed(self, network: nn.Module, examples: Examples, bfloat16: bool) -> float:
        trial = Pretrainer(
            network, examples.values, examples.labels, RectifiedFlow(), prediction.velocity, rate=open_ended_rate(),
            keep=open_ended_average(), states=to_states(self.about), batch_size=self.plan.batch_size, bfloat16=bfloat16,
        )  # fmt: skip
        trial.advance()
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            trial.advance()  # which waits for its loss
            taken.append(time.perf_counter() - begin)
        return self.plan.batch_size / min(taken)

    @property
    def step(self) -> int:
        return self.pretrainer.step

    def run(self, steps: int | None = None, minutes: float | None = None) -> NetworkModel:
        """Train until `steps` in all are made, or for `minutes` of this call; 10 of them where neither is given.

        Returns:
            The averaged model, at the step whose held-out loss was the lowest.

        Raises:
            Diverged: the loss is not finite. KeyboardInterrupt: after a signal, once all is saved.
        """
        try:
            self._interrupt.listen()
            return self._run(steps, MINUTES if steps is None and minutes is None else minutes)
        except KeyboardInterrupt:
            saved = checkpoints(self.out / "checkpoints")
            word = f"Step {int(saved[0].name)}" if saved else "Nothing"
            raise KeyboardInterrupt(f"{word} is saved; the same command with --resume-or-start goes on.") from None
        finally:
            self._interrupt.cease()
            self._lock.release()

    def _run(self, steps: int | None, minutes: float | None) -> NetworkModel:
        begin = told = saved = now = time.monotonic()
        before, first = self.seconds, self.step
        until = math.inf if minutes is None else begin + 60 * minutes
        last = math.inf if steps is None else steps
        while self.step < last and now < until:
            self._losses.append(self.pretrainer.advance()["loss"])
            now = time.monotonic()
            self.seconds = before + now - begin
            a_step = (now - begin) / (self.step - first)
            left = max(0.0, min(until - now, (last - self.step) * a_step))
            self._pace = {"examples_per_second": self.plan.batch_size / a_step, "left": left}
            if _looks_at(self.step):
                self._look(keep=True)
                told = time.monotonic()
            asked = self._interrupt.asked
            if now - saved > SAVE_SECONDS or asked:
                self._save()
                saved = now
            if asked:
                raise KeyboardInterrupt
            if now - told > min(60.0, max(TELL_SECONDS, 0.05 * (now - begin))):
                told = now
                loss = sum(self._losses) / max(1, len(self._losses))
                self._tell("progress", {"step": self.step, "loss": loss, "seconds": self.seconds, **self._pace})
        self._save()
        line = self._look(keep=False)  # an end by the clock is no part of what a run that goes on depends on
        if line["loss/heldout"] <= self.best["loss"]:
            weights, kept = self.pretrainer.averaged.state_dict(), self.step
        else:
            weights, kept = self.best["network"], self.best["step"]
        network = self._write(weights, kept)
        self._choose_path(make_model(self.about, network.to(self.pretrainer.device)).eval())
        self._write(weights, kept)
        rising = line["loss/heldout"] > RISES * self.best["loss"]
        self._tell("finished", {**line, "kept": kept, "rising": rising})
        return make_model(self.about, network.to(self.pretrainer.device)).eval()

    def _choose_path(self, model: NetworkModel) -> None:
        """How training and sampling are to draw from the model: measured, but for pictures, of which few steps tell most."""
        if self.about["kind"] == "pictures" or self.step < FIRST_LOOKS[0]:
            return
        rows = self.data.train
        states = to_states(self.about)(rows.values, torch.Generator())
        tried = measured_paths(model, states, rows.labels)
        self.about["path"] = nearest_path(tried)
        self._tell("path", {**self.about["path"], "tried": tried})

    # --- looking ---------------------------------------------------------------------------------------------------------

    def _look(self, keep: bool) -> dict[str, Any]:
        """Held-out and training loss of the averaged network, a sheet of samples, and the model's files."""
        heldout, trained = (self._error(examples) for examples in self._looks)
        line = {
            "step": self.step, "iteration": self.step, "loss": sum(self._losses) / max(1, len(self._losses)),
            "loss/heldout": heldout, "loss/train": trained, "seconds": self.seconds,
        }  # fmt: skip
        append_line(self.out / "metrics.jsonl", line)
        if keep:
            self._losses = []
            if heldout < self.best["loss"]:
                weights = {name: tensor.clone() for name, tensor in self.pretrainer.averaged.state_dict().items()}
                self.best = {"loss": heldout, "step": self.step, "network": weights}
            self._write(self.best["network"], self.best["step"])
        if self._sheet is not None:
            self._sheet(make_model(self.about, self.pretrainer.averaged), self.out / "samples.png")
        self._tell("look", {**line, **self._pace})
        return line

    @torch.no_grad()
    def _error(self, examples: Examples) -> float:
        """The loss of the averaged network, under the same times and noise at every look."""
        generator = torch.Generator().manual_seed(1)
        device = self.pretrainer.device
        total, rows = 0.0, len(examples)
        states = to_states(self.about)  # unmirrored, so that they draw nothing
        for _ in range(TIMES):
            # one time from each of as many equal shares of the law of times
            place = (torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)) / rows
            normal = torch.special.ndtri(place.clamp(1e-4, 1 - 1e-4))
            noise = torch.randn(examples.values.shape, generator=generator)
            for own in torch.arange(rows).split(self.plan.batch_size):
                part = examples[own.to(device)]
                with torch.autocast(device.type, torch.bfloat16, enabled=self.about["bfloat16"]):
                    error = denoising_error(
                        self.pretrainer.averaged, RectifiedFlow(), prediction.velocity, states(part.values, generator),
                        part.labels, normal[own].to(device), noise[own].to(device), SPREAD[self.about["kind"]],
                    )  # fmt: skip
                total += float(error) * len(own)
        return total / (TIMES * rows)

    # --- files -----------------------------------------------------------------------------------------------------------

    def _write(self, weights: Mapping[str, Tensor], step: int) -> nn.Module:
        """The folder's model: the weights of a step; the network with them."""
        network = make_network(self.about)
        network.load_state_dict(weights)
        write_model(self.out, {**self.about, "step": step, "seconds": round(self.seconds, 1)}, network)
        return network

    def _save(self) -> None:
        state = {
            "pretrainer": self.pretrainer.state(), "best": self.best, "seconds": self.seconds, "losses": self._losses,
        }  # fmt: skip
        if not (self.out / ABOUT).is_file():
            self._write(self.pretrainer.averaged.state_dict(), self.step)
        save_checkpoint(self.out / "checkpoints", self.step, state)


def _looks_at(step: int) -> bool:
    """As often in each doubling of the steps, from SPARSER on: a GPU makes 40 steps a second, and a look takes seconds."""
    doublings = max(0, (step // SPARSER).bit_length() - 1)
    return step in FIRST_LOOKS or step % (LOOK_EVERY << doublings) == 0


def _check_free(folder: Path) -> None:
    """Raises RunExists for a folder that holds more than what pretraining left that saved nothing."""
    found = {path.name.removesuffix(".tmp") for path in folder.iterdir()} if folder.exists() else set()
    if not found <= OWN or can_resume(folder):
        raise RunExists(f"{folder} is not empty; give a new name, or go on with --resume-or-start (resume=True).")


def can_resume(folder: Path) -> bool:
    """Whether pretraining has saved anything in a folder."""
    return bool(checkpoints(folder / "checkpoints"))


def _on(examples: Examples, device: torch.device) -> Examples:
    return Examples(examples.values.to(device), None if examples.labels is None else examples.labels.to(device))


def _some(examples: Examples) -> Examples:
    """At most LOOKED_AT, evenly spread."""
    count = min(LOOKED_AT, len(examples))
    return examples[torch.linspace(0, len(examples) - 1, count).round().long()]


def _digest(data: OwnData) -> str:
    found = hashlib.sha256("\n".join(data.classes).encode())
    for name, part in (("train", data.train), ("heldout", data.heldout)):
        add_to_digest(found, name, part.values)
        if part.labels is not None:
            add_to_digest(found, name, part.labels)
    return found.hexdigest()


def _versions() -> dict[str, str]:
    return {"scoreact": __version__, "torch": str(torch.__version__)}
