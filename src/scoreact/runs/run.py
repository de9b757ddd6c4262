"""A whole run: the trainer's iterations, and around them evaluation, the guard, files, checkpoints, resume and stopping.

Never prints: `on_event` tells whoever wants to.
"""

from __future__ import annotations

import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..control.policy import Policy
from ..evaluation.evaluate import Features, Judge
from ..models.base import ScoreModel
from ..rewards.base import Reward
from ..support import distributed
from ..support.errors import Diverged
from ..support.files import append_line, read_lines, truncate_lines, write_json, write_tensors
from ..training.config import Config, updated
from ..training.kl_price import has_kl_term, sees_kl
from ..training.state import restore, state_of
from ..training.trainer import Trainer
from ..types import Metrics
from .checkpoint import load_checkpoint, read_run, save_checkpoint

Event = Callable[[str, Metrics], None]


@dataclass
class Result:
    """What a run leaves: the averaged policy, its metrics, and the optimum it is measured against."""

    policy: Policy  # model: averaged weights; reference: the pretrained model
    history: list[dict[str, Any]]  # the metrics lines
    reference: Metrics  # J_ref, J*
    final: Metrics  # the last held-out evaluation
    stopped: str | None  # why the run ended early
    out: Path | None
    best_iteration: int | None = None  # of the weights in best/


def finetune(
    model: ScoreModel,
    reward: Reward,
    prompts: Sequence[str],
    *,
    value_network: Callable[[], nn.Module] | None = None,
    config: Config | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    judge: Judge | None = None,
    features: Features | None = None,
    optimum: Callable[[float], float] | None = None,
    on_event: Event | None = None,
    description: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
    **settings: Any,
) -> Result:
    """Fine-tune `model` (an nn.Module with the members of ScoreModel) in place to `reward`; the quick way in.

    reward: (decoded samples [B, ...], condition) -> [B]. prompts: what to draw samples for. value_network: makes the
    network (input, t, condition) -> [B] of the value; an MLP on flattened states by default. settings: fields of
    Config. out: the run's folder, which must be new unless `resume`. Raises ValueError for settings, rewards and
    checkpoints that cannot be used, FileExistsError for a folder in use, Diverged when training cannot go on.
    """
    config = updated(config or Config(), settings)
    trainer = Trainer(model, reward, prompts, value_network, config, judge, features, optimum)
    run = Run(trainer, on_event)
    return run.train(None if out is None else Path(out), resume, dict(description or {}), tensorboard)


class Run:
    """A trainer at work, in a folder or without one."""

    def __init__(self, trainer: Trainer, on_event: Event | None = None) -> None:
        self.trainer, self.on_event = trainer, on_event
        self.out: Path | None = None
        self.history: list[dict[str, Any]] = []
        self.final: Metrics = {}
        self.seconds = 0.0
        self.best_iteration: int | None = None
        self._interrupted = False
        self._writer: Any = None

    def train(self, out: Path | None, resume: bool, description: dict[str, Any], tensorboard: bool = False) -> Result:
        """Everything from the first look at the reference to the final evaluation; see `finetune`."""
        trainer, c = self.trainer, self.trainer.config
        self._open(out, resume, description)
        if tensorboard and self.out is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.out / "tensorboard"))
        stopped: str | None = None
        begin = time.perf_counter() - self.seconds
        previous = _catch_signals(self)
        try:
            if not trainer.reference:
                trainer.reference = trainer.look_at_reference() | self._look_at_rounding()
                self._record("reference", {"reference": True, **trainer.reference})
                self.final = trainer.evaluate()
                trainer.guard.start = dict(self.final)
                self._record("evaluation", {"evaluation": True, **self.final})
                if c.target_kl > 0 and not has_kl_term(trainer.algorithm):
                    self._say_no_kl_term()
            while trainer.iteration < c.iterations and stopped is None:
                metrics = trainer.iterate()
                self.seconds = time.perf_counter() - begin
                self._record("iteration", {"seconds": self.seconds, **metrics})
                last = trainer.iteration == c.iterations
                if metrics.get("policy/kl", 0.0) > c.kl_limit:
                    raise Diverged(
                        f"path KL is {metrics['policy/kl']:.1f} nats, over kl_limit {c.kl_limit:g}, at iteration "
                        f"{trainer.iteration}; lower learning_rate or max_kl. The best weights so far are kept."
                    )
                if last or trainer.iteration % c.evaluate_every == 0:
                    stop = self._look()
                    stopped = (stop or "process 0 ended it") if distributed.first(stop is not None) else None
                self._interrupted = distributed.first(self._interrupted)
                if self.out is not None and (last or stopped or trainer.iteration % c.checkpoint_every == 0):
                    self._checkpoint()
                if self._interrupted and not last:
                    if self.out is not None:
                        self._checkpoint()
                    raise KeyboardInterrupt(f"stopped after iteration {trainer.iteration}")
        except Diverged as error:
            self._write_result(str(error))
            raise
        finally:
            _restore_signals(previous)
            if self._writer is not None:
                self._writer.close()
        return self._finish(stopped)

    def _look(self) -> str | None:
        """Evaluate, keep the best weights, say what the guard finds; a sentence when the run had better stop."""
        trainer = self.trainer
        before, self.final = self.final, trainer.evaluate()
        self._record("evaluation", {"evaluation": True, **self.final})
        rewards = [line["reward/mean"] for line in self.history if "reward/mean" in line]
        rises = bool(rewards) and rewards[-1] > rewards[max(0, len(rewards) - 1 - trainer.config.evaluate_every)]
        findings, stop, best = trainer.guard.look(self.final, before, trainer.reference, rises)
        for finding in findings:
            self._record("guard", finding.line())
        if best:
            self.best_iteration = trainer.iteration
        if best and self.out is not None:
            (self.out / "best").mkdir(exist_ok=True)
            self._write_weights(self.out / "best")
        if not sees_kl(trainer.algorithm) and "policy/kl" in self.final:
            trainer.steer_kl(self.final["policy/kl"], trainer.config.evaluate_every)
        return stop

    def _look_at_rounding(self) -> Metrics:
        """What rounding alone costs, said where it stops all learning."""
        found, most = self.trainer.rounding(), self.trainer.config.max_kl
        if found.get("policy/kl_rounding", 0.0) > most:
            text = (
                f"rounding alone costs {found['policy/kl_rounding']:.2g} nats of path KL, more than max_kl ({most:g}), so that "
                "every step of the policy is refused; compute in float32 or float16, or with less guidance."
            )
            self._record("guard", {"guard": "rounding", "text": text})
        return found

    def _say_no_kl_term(self) -> None:
        c = self.trainer.config
        text = (
            f"target_kl is {c.target_kl:g}, but {c.algorithm} with these settings has no KL term that "
            "kl_weight could weigh, so nothing steers its path KL; the guard still watches it."
        )
        self._record("guard", {"guard": "target_kl", "text": text})

    def _finish(self, stopped: str | None) -> Result:
        if self.out is not None:
            self._write_weights(self.out)
        self._write_result(stopped)
        if stopped:
            self._tell("stopped", {})
        self._tell("finished", self.final)
        return Result(
            self.trainer.averaged(),
            self.history,
            self.trainer.reference,
            self.final,
            stopped,
            self.out,
            self.best_iteration,
        )

    def _write_result(self, stopped: str | None) -> None:
        if self.out is not None:
            result: dict[str, Any] = {
                "final": self.final,
                "reference": self.trainer.reference,
                "stopped": stopped,
                "seconds": self.seconds,
            }
            said = [{k: v for k, v in line.items() if k != "evaluation"} for line in self.history if "guard" in line]
            result |= {"iterations": self.trainer.iteration, "best_iteration": self.best_iteration, "guard": said}
            write_json(self.out / "result.json", result)

    # --- files --------------------------------------------------------------------------------------------------

    def _open(self, out: Path | None, resume: bool, description: dict[str, Any]) -> None:
        self.out = out if distributed.rank() == 0 else None  # one process writes
        if out is None:
            return
        record = out / "config.json"
        if resume:
            self._restore(out)
            return
        if self.out is None:
            return
        if record.exists() or (out.exists() and any(out.iterdir())):
            raise FileExistsError(f"{out} is not empty; give a new folder with out, or continue that run with resume.")
        out.mkdir(parents=True, exist_ok=True)
        versions = {
            "scoreact": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "threads": torch.get_num_threads(), "device": str(self.trainer.device),
        }  # fmt: skip
        write_json(record, {"description": description, "config": self.trainer.config.to_dict(), "versions": versions})

    def _restore(self, out: Path) -> None:
        stored = read_run(out)["config"]
        mine = self.trainer.config.to_dict()
        changed = [f"{k} {stored.get(k)!r} -> {mine[k]!r}" for k in mine if stored.get(k) != mine[k]]
        if changed:
            raise ValueError(
                f"{out} was started with other settings: {'; '.join(changed)}. Resume with the same, or start a new run."
            )
        self.trainer.iteration, state = load_checkpoint(out / "checkpoints", self.trainer.device)
        self.final, self.best_iteration, self.seconds = state["final"], state["best_iteration"], state["seconds"]
        restore(self.trainer, state)
        if distributed.rank() > 0:  # the checkpoint's is process 0's
            self.trainer.generator.manual_seed(self.trainer.process_seed() + self.trainer.iteration)
        if self.out is not None:
            truncate_lines(out / "metrics.jsonl", self.trainer.iteration)
        self.history = read_lines(out / "metrics.jsonl")

    def _checkpoint(self) -> None:
        assert self.out is not None
        own = {"final": self.final, "best_iteration": self.best_iteration, "seconds": self.seconds}
        save_checkpoint(self.out / "checkpoints", self.trainer.iteration, {**state_of(self.trainer), **own})
        self._tell("checkpoint", {"iteration": self.trainer.iteration})

    def _write_weights(self, folder: Path) -> None:
        """The averaged policy's, and those of the value network that can steer its sampling."""
        write_tensors(folder / "model.safetensors", self.trainer.weights())
        export = getattr(self.trainer.average.model, "export", None)
        if callable(export):
            export(folder)  # in the form that the model's own library loads
        if self.trainer.algorithm.critic and self.trainer.value.fitted:
            price = torch.tensor(self.trainer.value.kl_weight)  # what a nat cost when it was fitted
            write_tensors(folder / "value.safetensors", {**self.trainer.value.value.state_dict(), "kl_weight": price})

    def _record(self, kind: str, metrics: Mapping[str, Any]) -> None:
        line = {"iteration": self.trainer.iteration, **metrics}
        self.history.append(line)
        if self.out is not None:
            append_line(self.out / "metrics.jsonl", line)
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, float | int):
                    self._writer.add_scalar(name, value, self.trainer.iteration)
        self._tell(kind, line)

    def _tell(self, kind: str, metrics: Mapping[str, Any]) -> None:
        if self.on_event is not None:
            self.on_event(kind, dict(metrics))


def _catch_signals(run: Run) -> dict[int, Any]:
    """The first SIGINT or SIGTERM asks for a checkpoint at the iteration's end; the second acts at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        if run._interrupted:
            raise KeyboardInterrupt
        run._interrupted = True
        run._tell("interrupted", {})

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: whoever owns it handles signals
        pass
    return previous


def _restore_signals(previous: Mapping[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
