"""A whole run: a trainer at work in a folder, with evaluation, the guard, checkpoints, resume and stopping around its loop.

Never prints: `on_event` tells whoever wants to.
"""

from __future__ import annotations

import errno
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.base import Exports, HasNotes, HasReference
from ..models.weights import reference_digest_of
from ..support import distributed
from ..support.errors import Diverged, RunError, SettingError
from ..support.files import Line, append_line, read_lines, truncate_lines, write_json, write_tensors
from ..support.folders import FolderLock
from ..training.guard import nothing_steers, rounded_away, unmoved
from ..training.kl_price import has_kl_term, sees_kl
from ..training.loop import Hook, Stop, check_finite, training_loop
from ..training.state import restore, state_of
from ..training.trainer import Trainer
from ..types import Metrics
from . import resuming
from .checkpoint import check_free, clear, load_checkpoint, read_run, save_checkpoint
from .record import is_whole
from .rollback import LastGood
from .samples import sheet, thumbnails
from .source import REFERENCE
from .stopping import Interrupt
from .trackers import Tracker, finite_numbers, flat, make_trackers

Event = Callable[[str, Metrics], None]
"""(kind, line): reference, evaluation, iteration, guard, checkpoint, interrupted, stopped, finished; line: its metrics."""


@dataclass
class Outcome:
    """What a session leaves besides its files."""

    history: list[Line]  # the lines of metrics.jsonl
    reference: Metrics  # J_ref, J*
    final: Metrics  # the last held-out evaluation
    stopped: str | None  # why the run ended early
    best_iteration: int | None = None  # of the weights in best/


class Session(Hook):
    """A trainer at work, in a folder or without one: the hook that evaluates, records and saves.

    out: the run's folder, new or empty; with `resume` that of a run to be continued, and with `extend` it may be one that was
    planned for fewer iterations. accept_changes: go on although files or config.json were edited. description: what the
    folder's config.json says of where the model came from. notes: sentences for the user, recorded first.
    """

    def __init__(
        self,
        trainer: Trainer,
        out: Path | None = None,
        *,
        resume: bool = False,
        extend: bool = False,
        accept_changes: bool = False,
        description: Mapping[str, Any] | None = None,
        on_event: Event | None = None,
        hooks: Sequence[Hook] = (),
        trackers: Sequence[str | Tracker] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.trainer, self.on_event, self.hooks = trainer, on_event, tuple(hooks)
        self.out = out if distributed.rank() == 0 else None  # one process writes
        self.history: list[Line] = []
        self.final, self.seconds = Metrics(), 0.0
        self.online: dict[str, Any] = {}  # what `feedback.online` remembers
        self.best_iteration: int | None = None
        self._said: set[str] = set()  # the model's notes
        self._looked_at = 0  # the iteration of the last evaluation
        self._saved_at = time.monotonic()
        self._last_good = LastGood(self.out)
        self._interrupt = Interrupt(lambda: self._tell("interrupted", {}))
        self._trackers = make_trackers(trackers) if distributed.rank() == 0 else []  # refused before a folder is made
        if self._trackers and out is None:
            raise SettingError("trackers keep their files in the run's folder; give one with out.")
        self._notes = list(notes)  # said before anything else
        self.digest = reference_digest_of(trainer.policy.reference)
        self._lock: FolderLock | None = None
        self.description = dict(description or {})
        self.files = resuming.named_files({**self.description, **trainer.config.to_dict()})  # that the run depends on
        try:
            if out is not None and resume:
                self._restore(out, extend, accept_changes)
            elif self.out is not None:
                self._begin(self.out)
            for tracker in self._trackers:
                assert out is not None
                told = {k: v for k, v in (description or {}).items() if isinstance(v, str)}
                about = {k: v for k, v in told.items() if k not in ("command", "made_by")}
                tracker.start(out, {**about, **flat(trainer.config.to_dict())}, resume)
        except BaseException:
            self._release()
            raise

    def run(self) -> Outcome:
        """Everything from the first look at the reference to the final evaluation, once.

        Raises Diverged when training cannot go on, KeyboardInterrupt after a signal, once the iteration is finished and saved.
        """
        try:
            return self._run()
        finally:
            self._release()

    def _run(self) -> Outcome:
        trainer = self.trainer
        self._started = time.perf_counter() - self.seconds
        try:
            self._interrupt.listen()
            heard = {line.get("text") for line in self.history}  # by who resumes the run
            for note in self._notes:
                if note not in heard:
                    self._record("guard", {"guard": "note", "text": note})
            if not trainer.reference:
                self._say_notes(of_models=False)  # which have decoded nothing but probes yet
                self._look_at_reference()
                self._checkpoint()
                self._end_if_asked()
            trainer.notes.clear()  # those of the start were said by the process that began the run
            stop = self.after(trainer) if self._due and self._looked_at != trainer.iteration else None
            stop = stop or training_loop(trainer, [self, *self.hooks])
            if stop is not None and self._looked_at != trainer.iteration:  # a hook's own end, between two evaluations
                self._look()
                self._checkpoint()
        except Diverged as error:
            self._write_result(str(error))
            self._track("end", True)
            raise
        except BaseException:
            self._track("end", True)
            raise
        finally:
            self._interrupt.cease()
        outcome = self._finish(stop.reason if stop is not None else None)
        self._track("end", False)
        return outcome

    # --- the hook -----------------------------------------------------------------------------------------------

    def _say_notes(self, of_models: bool = True) -> None:
        """What the trainer noticed and what the model itself has to say, each sentence once."""
        if (failed := self.trainer.failures.news()) is not None:
            self.trainer.notes.append(failed)
        while self.trainer.notes:
            self._record("guard", {"guard": "note", "text": self.trainer.notes.pop(0)})
        for model in (self.trainer.policy.model, self.trainer.policy.reference) if of_models else ():
            for note in model.notes() if isinstance(model, HasNotes) else ():
                kind = re.sub(r"[-\d.]+", "", note)  # the same words with other figures are no news
                if kind not in self._said:
                    self._said.add(kind)
                    self._record("guard", {"guard": "model", "text": note})

    def iteration(self, trainer: Trainer, metrics: Metrics) -> None:
        self.seconds = time.perf_counter() - self._started
        self._record("iteration", {"seconds": self.seconds, **metrics})

    def mended(self, trainer: Trainer, error: Exception) -> bool:
        state, text = self._last_good.go_back(trainer, error) or ({}, "")
        if not text:
            return False
        self.final, self._looked_at = state["final"], state["looked_at"]
        self.history = [line for line in self.history if line["iteration"] <= trainer.iteration]
        if self.out is not None:
            truncate_lines(self.out / "metrics.jsonl", trainer.iteration, is_whole)
        self._record("guard", {"guard": "rollback", "text": text})
        return True

    def after(self, trainer: Trainer) -> Stop | None:
        self._end_if_asked()
        c, stopped = trainer.config, None
        last = trainer.iteration == c.iterations
        if self._due:
            stop = self._look()
            stopped = (stop or "process 0 ended it") if distributed.first(stop is not None) else None
        late = 0 < 60 * c.checkpoint_minutes <= time.monotonic() - self._saved_at
        if last or stopped or late or trainer.iteration % c.checkpoint_every == 0:
            self._checkpoint()
        return None if stopped is None else Stop(stopped)

    @property
    def _due(self) -> bool:
        """Whether an evaluation belongs to this iteration."""
        c, done = self.trainer.config, self.trainer.iteration
        return done > 0 and (done == c.iterations or done % c.evaluate_every == 0)

    def _end_if_asked(self) -> None:
        """Save and leave, before the evaluation that may be due: a resumed run makes it first."""
        if distributed.first(self._interrupt.asked):
            self._checkpoint()
            raise KeyboardInterrupt(f"stopped after iteration {self.trainer.iteration}")

    def _look_at_reference(self) -> None:
        """J_ref, J* and the first evaluation, before any update."""
        trainer, c = self.trainer, self.trainer.config
        trainer.reference = trainer.look_at_reference() | (rounding := trainer.rounding())
        if (text := rounded_away(rounding, c)) is not None:
            self._record("guard", {"guard": "rounding", "text": text})
        self._record("reference", {"reference": True, **trainer.reference})
        self.final = trainer.evaluate(of_reference=trainer.starts_elsewhere)
        trainer.guard.start = dict(self.final)
        self._record("evaluation", {"evaluation": True, **self.final})
        if (finding := trainer.guard.blind(self.final)) is not None and c.guard != "off":
            trainer.guard.active = [finding.kind]  # said once
            self._record("guard", finding.line())
        if trainer.starts_elsewhere:
            self.final = trainer.evaluate()
            self._record("evaluation", {"evaluation": True, **self.final})
        self._say_notes()
        if c.target_kl > 0 and not has_kl_term(trainer.algorithm):
            self._record("guard", {"guard": "target_kl", "text": nothing_steers(c)})

    def _look(self) -> str | None:
        """Evaluate, keep the best weights, say what the guard finds; a sentence when the run had better stop."""
        trainer = self.trainer
        before, self.final = self.final, check_finite(trainer.evaluate(), trainer.iteration)
        self._looked_at = trainer.iteration
        self._record("evaluation", {"evaluation": True, **self.final})
        rewards = [line["reward/mean"] for line in self.history if "reward/mean" in line]
        rises = bool(rewards) and rewards[-1] > rewards[max(0, len(rewards) - 1 - trainer.config.evaluate_every)]
        findings, stop, best = trainer.guard.look(self.final, before, trainer.reference, rises)
        for finding in findings:
            self._record("guard", finding.line())
        self._say_notes()
        if trainer.guard.mode != "off" and 2 * trainer.iteration >= trainer.config.iterations > trainer.iteration:
            self._say_unmoved()
        if best:
            self.best_iteration = trainer.iteration
        if best and self.out is not None:
            (self.out / "best").mkdir(exist_ok=True)
            self._write_weights(self.out / "best")
        if not sees_kl(trainer.algorithm) and "policy/kl" in self.final:
            trainer.steer_kl(self.final["policy/kl"], trainer.config.evaluate_every)
        return stop

    def _say_unmoved(self) -> None:
        """Once, and in the end again if it is still so."""
        made = [line for line in self.history if "learning_rate" in line]
        text = unmoved(self.final, self.trainer.reference, made, self.trainer.config)
        early = all(line.get("guard") != "unmoved" for line in self.history)
        if text is not None and (early or self.trainer.iteration >= self.trainer.config.iterations):
            self._record("guard", {"guard": "unmoved", "text": text})

    def _finish(self, stopped: str | None) -> Outcome:
        if self._looked_at == self.trainer.iteration:
            self._say_unmoved()
        if self.out is not None:
            self._write_weights(self.out)
        self._write_result(stopped)
        if stopped:
            self._tell("stopped", {})
        self._tell("finished", self.final)
        return Outcome(self.history, self.trainer.reference, self.final, stopped, self.best_iteration)

    def _write_result(self, stopped: str | None) -> None:
        if self.out is not None:
            said = [{k: v for k, v in line.items() if k != "evaluation"} for line in self.history if "guard" in line]
            result = {
                "final": self.final, "reference": self.trainer.reference, "stopped": stopped, "seconds": self.seconds,
                "iterations": self.trainer.iteration, "best_iteration": self.best_iteration, "guard": said,
            }  # fmt: skip
            write_json(self.out / "result.json", result)

    # --- files --------------------------------------------------------------------------------------------------

    def _begin(self, out: Path) -> None:
        """A new folder with config.json, and the pretrained weights where training overwrites the only copy of them."""
        check_free(out)
        out.mkdir(parents=True, exist_ok=True)
        self._take(out)
        check_free(out)  # still
        clear(out)
        versions = {
            "scoreact": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "threads": torch.get_num_threads(), "device": str(self.trainer.device),
        }  # fmt: skip
        if not isinstance(self.trainer.policy.model, HasReference):
            write_tensors(out / REFERENCE, self.trainer.pretrained())
        content = {"description": self.description, "config": self.trainer.config.to_dict(), "versions": versions}
        write_json(out / "config.json", {**content, "reference_digest": self.digest})

    def _take(self, out: Path) -> None:
        """Keep other processes from the folder until the run ends."""
        self._lock = FolderLock(out)
        if self._lock.missing:
            self._notes.append(
                f"{out} cannot be locked ({self._lock.missing}): see to it that no other process runs in it."
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _restore(self, out: Path, extend: bool, accept: bool) -> None:
        trainer, stored, problems = self.trainer, read_run(out), list[str]()
        if self.out is not None:
            self._take(out)
        resuming.check_settings(out, stored, trainer.config, extend)
        trainer.iteration, state = load_checkpoint(out / "checkpoints", trainer.device, problems)
        self._notes += [f"{problem} The run goes on from iteration {trainer.iteration}." for problem in problems]
        self._looked_at, self.online = state.get("looked_at", trainer.iteration), state.get("online", {})
        resuming.check_processes(out, state.get("processes"))
        self._notes += resuming.check_record(out, stored, state, accept)
        self.digest, notes = resuming.check_reference(out, state.get("digest"), self.digest, trainer)
        self._notes += notes
        try:
            self.final, self.best_iteration, self.seconds = state["final"], state["best_iteration"], state["seconds"]
            restore(trainer, state)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise RunError(
                f"the checkpoint of iteration {trainer.iteration} in {out} is incomplete ({type(error).__name__}: {error}): "
                "it was changed, or is another version's. Start the run anew."
            ) from error
        self.files, notes = resuming.check_files(out, state.get("files", {}), accept)
        self._notes += notes
        self.description = stored.get("description") or {}
        if distributed.rank() > 0:  # the checkpoint's is process 0's
            trainer.generator.manual_seed(trainer.process_seed() + trainer.iteration)
        if self.out is not None:
            damaged, copy = truncate_lines(out / "metrics.jsonl", trainer.iteration, is_whole, state.get("lines"))
            self._notes += [
                f"Line {number} of metrics.jsonl is damaged and left out; {copy.name} keeps the file as it was."
                for number in damaged
            ]
        self.history = read_lines(out / "metrics.jsonl", is_whole)
        if extend and self.out is not None:
            self._notes.append(resuming.write_extension(self.out, stored, trainer))

    def _checkpoint(self) -> None:
        own = {
            "final": self.final, "best_iteration": self.best_iteration, "seconds": self.seconds, "digest": self.digest,
            "processes": distributed.world(), "looked_at": self._looked_at, "lines": len(self.history), "online": self.online,
            "files": self.files, "settings": self.trainer.config.to_dict(), "description": self.description,
        }  # fmt: skip
        state = {**state_of(self.trainer), **own}
        self._last_good.keep(self.trainer.iteration, state)
        if self.out is None:
            return
        save_checkpoint(self.out / "checkpoints", self.trainer.iteration, state)
        self._saved_at = time.monotonic()
        self._tell("checkpoint", {"iteration": self.trainer.iteration})

    def _write_weights(self, folder: Path) -> None:
        """The averaged policy's, and those of the value network that can steer its sampling."""
        write_tensors(folder / "model.safetensors", self.trainer.weights())
        if isinstance(self.trainer.average.model, Exports):
            self.trainer.average.model.export(folder)  # in the form that the model's own library loads
        if self.trainer.algorithm.critic and self.trainer.value.fitted:
            price = torch.tensor(self.trainer.value.kl_weight)  # what a nat cost when it was fitted
            write_tensors(folder / "value.safetensors", {**self.trainer.value.value.state_dict(), "kl_weight": price})

    def _record(self, kind: str, metrics: Mapping[str, Any]) -> None:
        line = {"iteration": self.trainer.iteration, **metrics}
        self.history.append(line)
        if self.out is not None:
            append_line(self.out / "metrics.jsonl", line)
        self._tell(kind, line)
        if numbers := finite_numbers(metrics):
            self._track("metrics", self.trainer.iteration, numbers)
        if "text" in metrics:
            self._track("text", self.trainer.iteration, metrics["text"])
        seen = self.trainer.seen
        if kind == "evaluation" and self._trackers and seen is not None and seen.ndim == 4 and seen.shape[1] in (1, 3):
            self._track("pictures", self.trainer.iteration, sheet(thumbnails(seen), 4))

    def _track(self, what: str, *words: Any) -> None:
        """Tell every tracker. One that fails is left out from then on, with a word: a run outlives them."""
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*words)
            except Exception as error:
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split())[:200]
                text = f"{type(tracker).__name__} failed and is told nothing more: {type(error).__name__}: {reason}"
                self._record("guard", {"guard": "tracker", "text": text})

    def _tell(self, kind: str, metrics: Mapping[str, Any]) -> None:
        if self.on_event is not None:
            try:
                self.on_event(kind, dict(metrics))
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                self.on_event = None  # nobody reads what it prints: end as after a signal
                self._interrupt.ask()
