"""The training loop: rollout, reward, prepare, minimise; and around it evaluation, checkpoints, resume and stopping.

The loop itself is `Trainer.iterate`. Devices live here. Never prints: `on_event` tells whoever wants to.
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
from torch import Tensor, nn

from . import __version__, checkpoint, distributed
from .algorithms import acting_steps, states
from .assembly import build_minimiser, build_rule, build_value, check_ratio, choose_device, exploration_of, value_fit
from .config import Config, updated
from .evaluation import Features, Judge, balanced, estimate_optimum, evaluate, recovered
from .guard import Guard, KLPrice, has_kl_term, optimal_kl, reprice, sees_kl
from .models import ScoreModel
from .optim import AdamSteps, Average, Diverged
from .policy import Policy
from .rewards import Checked, Reward, checked
from .rewards.overlap import Scores, one_ahead, ready
from .rollout import Trajectory, rollout
from .rounding import rounding_kl
from .schedule import GRIDS
from .sde import NOISES, SDE
from .solvers import SOLVERS
from .types import Condition, Metrics
from .value import Sample

EVALUATION_SEED = 1_000_003  # held-out noise: never a training seed's stream
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
    trainer = Trainer(model, reward, prompts, value_network, config, judge, features, optimum, on_event)
    return trainer.run(None if out is None else Path(out), resume, dict(description or {}), tensorboard)


class Trainer:
    """One run. Every random number comes from `self.generator` (training) or a fixed evaluation seed."""

    def __init__(
        self,
        model: ScoreModel,
        reward: Reward,
        prompts: Sequence[str],
        value_network: Callable[[], nn.Module] | None,
        config: Config,
        judge: Judge | None = None,
        features: Features | None = None,
        optimum: Callable[[float], float] | None = None,
        on_event: Event | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; training needs an nn.Module with parameters to train.")
        if not prompts:
            raise ValueError("prompts is empty; give at least one (use [''] for an unconditional model).")
        self.config = config
        distributed.start()
        if config.batch_size % distributed.world():
            raise ValueError(
                f"batch_size is {config.batch_size}, which {distributed.world()} processes cannot share; take a multiple."
            )
        self.device = choose_device(config.device)
        model.to(self.device).eval()
        self.policy = Policy(model, act_until=config.act_until)
        if not self.policy.trainable():
            raise ValueError(f"{type(model).__name__} has no parameter with requires_grad; nothing could be trained.")
        distributed.same(self.policy.trainable())
        self.prompts = list(prompts)
        self.reward: Checked = checked(reward)
        ready(self.reward)  # one elsewhere that is not there is said now
        self.heldout_reward: Checked = checked(reward)  # counted apart: the cost of looking, not of learning
        self.features, self.optimum, self.on_event = features, optimum, on_event
        self.guard = Guard(
            config.kl_weight, config.guard, config.target_kl, config.least_diversity, config.patience, features, judge
        )
        self.price = KLPrice(config.target_kl)  # used with target_kl > 0 only
        self.best_iteration: int | None = None
        self.sde = SDE(model.schedule, NOISES[config.noise](config.noise_scale))
        self.solver = SOLVERS[config.solver]
        self.exploration = exploration_of(config, self.sde)
        self.generator = torch.Generator(device=self.device).manual_seed(self._seed())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # initial weights of the value network: a seed gives the same run
            value = build_value(config, self.policy, self.sde, value_network, self._reward_of_state)
            self.value = value_fit(config, value.to(self.device))
            self.algorithm = build_rule(config, self.policy, self.sde, self.value, self.reward, self.prompts)
        self.average = Average(model, config.average)
        self.minimise = build_minimiser(config, self.algorithm)
        if distributed.world() > 1 and not isinstance(self.minimise, AdamSteps):
            raise ValueError(
                f"{config.algorithm} takes natural gradients, which one process makes alone; start one only."
            )
        self.iteration = 0
        self.history: list[dict[str, Any]] = []
        self.reference: Metrics = {}
        self.start: Metrics = {}  # held-out J before the first update
        self.final: Metrics = {}
        self.seconds = 0.0
        self.saved: list[tuple[Trajectory, Tensor]] = []  # the reference's paths that the first iterations learn from
        self.out: Path | None = None
        self._interrupted = False
        self._writer: Any = None

    # --- the loop -----------------------------------------------------------------------------------------------

    def iterate(self) -> Metrics:
        """One iteration: rollout, reward, prepare, minimise, average."""
        rate = self.rate()
        drawn: Metrics = {}
        reused = bool(self.saved)
        if self.algorithm.own_rows:
            batch = self.algorithm.rows_for(self._batch_of_prompts(), self.grid(), self.generator)
        else:
            trajectory, rewards = self.saved.pop() if self.saved else self.rollout()
            batch = self.algorithm.prepare(trajectory, rewards, self.generator, rate)
            drawn = {name: distributed.mean(value) for name, value in self._drawn(trajectory, rewards).items()}
        if self.iteration == 0 and self.exploration is None:
            check_ratio(self.algorithm, batch)
        metrics = self.minimise(self.algorithm, batch, self.generator, rate)
        self.average.update(self.policy.model)  # type: ignore[arg-type]
        self.algorithm.moved()
        self.iteration += 1
        if not reused and sees_kl(self.algorithm) and "policy/kl" in drawn:
            self._steer_kl(drawn["policy/kl"], 1)
        if self.config.target_kl > 0:
            drawn["policy/kl_weight"] = self.algorithm.kl_weight
        return {
            **drawn,
            **self.algorithm.metrics,
            **metrics,
            "learning_rate": self.config.learning_rate * rate,
            "cost/network_calls": distributed.world() * self.policy.network_calls,
            "cost/value_calls": distributed.world() * self.value.value.calls,
            "cost/reward_calls": distributed.world() * self.reward.calls,
        }

    def _seed(self) -> int:
        """Of this process' random numbers: no process draws what another does, and one alone draws as ever."""
        return self.config.seed + 7_919_000 * distributed.rank()

    def _steer_kl(self, kl: float, iterations: int) -> None:
        """Towards target_kl by another price of a nat in training; J and J* stay those of kl_weight."""
        if self.config.target_kl > 0:
            price = self.config.kl_weight * self.price.update(kl, iterations)
            reprice(price, self.algorithm, self.value, self.minimise)

    def _drawn(self, trajectory: Trajectory, rewards: Tensor) -> Metrics:
        """What a rollout says of the policy that drew it."""
        metrics = {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std())}
        if self.algorithm.reads_reference and bool(trajectory.acts.any()):  # otherwise nobody knows the path KL
            kl = trajectory.path_kl()
            metrics["policy/kl"] = float(kl.mean())
            metrics["objective/J_training"] = float((rewards - self.config.kl_weight * kl).mean())
        return metrics

    def grid(self) -> Tensor:
        """The times of a path, [steps + 1]; another draw each time where the grid is random."""
        return GRIDS[self.config.grid](self.policy.model.schedule, self.config.steps, self.generator)

    def _batch_of_prompts(self) -> list[str]:
        """Prompts of this process' part of a batch."""
        return balanced(self.prompts, self.config.batch_size // distributed.world(), self.generator)

    def _reward_of_state(self, x_data: Tensor, condition: Condition) -> Tensor:
        return self.reward(self.policy.model.decode(x_data), condition)

    def rollout(self) -> tuple[Trajectory, Tensor]:
        """Paths of a batch of prompts, and their rewards [B]."""
        trajectory, scores = self.draw()
        return trajectory, scores.result()

    def draw(self, reference_only: bool = False) -> tuple[Trajectory, Scores]:
        """Paths of a batch of prompts; a reward elsewhere scores a part of them while the next is drawn."""
        names, ts = self._batch_of_prompts(), self.grid()
        behaviour = self.policy if reference_only else self.algorithm.behaviour()
        stochastic = None if reference_only else self.algorithm.stochastic_steps(self.config.steps, self.generator)
        paths, scores = [], Scores(self.reward)
        for part in scores.parts(names):
            trajectory = rollout(
                behaviour, self.sde, self.solver, ts, self.policy.model.condition(part), self.generator,
                self.exploration, reference_only, stochastic, self.algorithm.reads_reference,
            )  # fmt: skip
            scores.add(self.policy.model.decode(trajectory.xs[-1]), trajectory.condition)
            paths.append(trajectory)
        if behaviour is not self.policy:  # one place counts the calls
            self.policy.network_calls += behaviour.network_calls
            behaviour.network_calls = 0
        whole = paths[0] if len(paths) == 1 else Trajectory.join(paths, self.policy.model.condition(names))
        return whole, scores

    def rate(self) -> float:
        """The learning rates' factor: a linear warm-up, a plateau, a linear fall to the run's end."""
        c = self.config
        left = (c.iterations - self.iteration) / max(1.0, c.iterations * (1 - c.decay_from))
        return min(1.0, (self.iteration + 1) / (c.warmup + 1), left)

    def look_at_reference(self) -> Metrics:
        """J_ref and J* from the reference's paths; a critic learns from them too, for other rules they only measure."""
        rewards, prompts = [], []
        spent = self.policy.network_calls, self.reward.calls
        for trajectory, r in one_ahead(self.draw(True) for _ in range(self.config.reference_batches)):
            if self.config.value_loss == "log_probability" and float(r.max()) > 0:
                raise ValueError(
                    f"reward {self.reward.name} reached {float(r.max()):.3g}, so it is no log-probability; use value_loss soft."
                )
            rewards.append(r)
            prompts += list(trajectory.condition.prompts)
            self.guard.remember(self.policy.model.decode, trajectory.xs[-1], self.config.heldout_samples)
            if self.algorithm.critic:
                self._remember(trajectory, r)
            if len(self.saved) < self.config.rule.get("reuse_reference", 0):
                self.saved.append((trajectory, r))
        if not self.algorithm.critic:
            self.policy.network_calls, self.reward.calls = spent
        beta, found = self.config.kl_weight, distributed.gathered(torch.cat(rewards))
        rows = distributed.gathered(torch.tensor([self.prompts.index(prompt) for prompt in prompts]))
        prompts = [self.prompts[row] for row in rows.tolist()]
        metrics = estimate_optimum(found, Condition(prompts), beta) | optimal_kl(found, Condition(prompts), beta)
        if self.optimum is not None:
            metrics["objective/J_star_exact"] = self.optimum(beta)
            # KL* = -dJ* / dbeta
            below, above = self.optimum(0.999 * beta), self.optimum(1.001 * beta)
            metrics["objective/KL_star_exact"] = (below - above) / (0.002 * beta)
        return metrics

    @torch.no_grad()
    def _remember(self, trajectory: Trajectory, rewards: Tensor) -> None:
        keep = acting_steps(trajectory)
        if len(keep) == 0:
            raise ValueError(
                "no step of the path has noise, so there is no action to learn; raise noise_scale or steps."
            )
        seen = torch.unique(torch.cat([keep, keep + 1]))  # where steps start, and where they lead
        seen = seen[seen < len(trajectory.references)]
        t, x, condition = states(trajectory, seen)
        features = self.value.value.features(t, x, condition, trajectory.references[seen].flatten(0, 1))
        self.value.add(Sample(t, features, rewards.repeat(len(seen)), condition))

    def evaluate(self) -> Metrics:
        """The averaged policy on held-out noise, against J_ref and J*."""
        c = self.config
        ts = GRIDS[c.grid](
            self.policy.model.schedule, c.steps, torch.Generator(self.device).manual_seed(EVALUATION_SEED)
        )
        metrics = evaluate(
            self._averaged(), self.sde, self.solver, ts, self.heldout_reward, self.prompts, c.kl_weight,
            c.heldout_samples, EVALUATION_SEED, self._look_at_samples, self.features, self.device,
        )  # fmt: skip
        start = self.start.setdefault("objective/J", metrics["objective/J"])  # same noise: errors cancel
        metrics["objective/recovered"] = recovered(metrics["objective/J"] - start, self.reference)
        return metrics

    def _look_at_samples(self, samples: Tensor, condition: Condition) -> Metrics:
        return self.guard.look_at_samples(samples, condition, first=self.iteration == 0)

    # --- a whole run --------------------------------------------------------------------------------------------

    def run(self, out: Path | None, resume: bool, description: dict[str, Any], tensorboard: bool = False) -> Result:
        """Everything from the first look at the reference to the final evaluation; see `finetune`."""
        self._open(out, resume, description)
        if tensorboard and self.out is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.out / "tensorboard"))
        stopped: str | None = None
        begin = time.perf_counter() - self.seconds
        previous = _catch_signals(self)
        try:
            if not self.reference:
                self.reference = self.look_at_reference() | self._rounding()
                self._record("reference", {"reference": True, **self.reference})
                self.final = self.evaluate()
                self.guard.start = dict(self.final)
                self._record("evaluation", {"evaluation": True, **self.final})
                if self.config.target_kl > 0 and not has_kl_term(self.algorithm):
                    self._say_no_kl_term()
            while self.iteration < self.config.iterations and stopped is None:
                metrics = self.iterate()
                self.seconds = time.perf_counter() - begin
                self._record("iteration", {"seconds": self.seconds, **metrics})
                last = self.iteration == self.config.iterations
                if metrics.get("policy/kl", 0.0) > self.config.kl_limit:
                    raise Diverged(
                        f"path KL is {metrics['policy/kl']:.1f} nats, over kl_limit {self.config.kl_limit:g}, at iteration "
                        f"{self.iteration}; lower learning_rate or max_kl. The best weights so far are kept."
                    )
                if last or self.iteration % self.config.evaluate_every == 0:
                    stop = self._look(metrics)
                    stopped = (stop or "process 0 ended it") if distributed.first(stop is not None) else None
                self._interrupted = distributed.first(self._interrupted)
                if self.out is not None and (last or stopped or self.iteration % self.config.checkpoint_every == 0):
                    self._checkpoint()
                if self._interrupted and not last:
                    if self.out is not None:
                        self._checkpoint()
                    raise KeyboardInterrupt(f"stopped after iteration {self.iteration}")
        except Diverged as error:
            self._write_result(str(error))
            raise
        finally:
            _restore_signals(previous)
            if self._writer is not None:
                self._writer.close()
        return self._finish(stopped)

    def _look(self, training: Metrics) -> str | None:
        """Evaluate, keep the best weights, say what the guard finds; a sentence when the run had better stop."""
        before, self.final = self.final, self.evaluate()
        self._record("evaluation", {"evaluation": True, **self.final})
        rewards = [line["reward/mean"] for line in self.history if "reward/mean" in line]
        rises = bool(rewards) and rewards[-1] > rewards[max(0, len(rewards) - 1 - self.config.evaluate_every)]
        findings, stop, best = self.guard.look(self.final, before, self.reference, rises)
        for finding in findings:
            self._record("guard", finding.line())
        if best:
            self.best_iteration = self.iteration
        if best and self.out is not None:
            (self.out / "best").mkdir(exist_ok=True)
            self._write_weights(self.out / "best")
        if not sees_kl(self.algorithm) and "policy/kl" in self.final:
            self._steer_kl(self.final["policy/kl"], self.config.evaluate_every)
        return stop

    def _rounding(self) -> Metrics:
        """What rounding alone costs, where the model's network has less than float32; said where it stops all learning."""
        c, model = self.config, self.policy.model
        if not getattr(model, "rounds", False):
            return {}
        generator = torch.Generator(self.device).manual_seed(EVALUATION_SEED)
        ts = GRIDS[c.grid](model.schedule, c.steps, generator)
        condition = model.condition(balanced(self.prompts, min(8, c.heldout_samples), generator))
        found = rounding_kl(self.policy, self.sde, self.solver, ts, condition, generator, c.learning_rate)
        if found > c.max_kl:
            text = (
                f"rounding alone costs {found:.2g} nats of path KL, more than max_kl ({c.max_kl:g}), so that every step of the "
                "policy is refused; compute in float32 or float16, or with less guidance."
            )
            self._record("guard", {"guard": "rounding", "text": text})
        return {"policy/kl_rounding": found}

    def _say_no_kl_term(self) -> None:
        text = (
            f"target_kl is {self.config.target_kl:g}, but {self.config.algorithm} with these settings has no KL term that "
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
            self._averaged(), self.history, self.reference, self.final, stopped, self.out, self.best_iteration
        )

    def _write_result(self, stopped: str | None) -> None:
        if self.out is not None:
            result: dict[str, Any] = {
                "final": self.final,
                "reference": self.reference,
                "stopped": stopped,
                "seconds": self.seconds,
            }
            said = [{k: v for k, v in line.items() if k != "evaluation"} for line in self.history if "guard" in line]
            result |= {"iterations": self.iteration, "best_iteration": self.best_iteration, "guard": said}
            checkpoint.write_json(self.out / "result.json", result)

    def _averaged(self) -> Policy:
        """The averaged weights beside the same reference: what is evaluated and returned."""
        return Policy(self.average.model, self.policy.reference, self.config.act_until)  # type: ignore[arg-type]

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
            "platform": platform.platform(), "threads": torch.get_num_threads(), "device": str(self.device),
        }  # fmt: skip
        checkpoint.write_json(
            record, {"description": description, "config": self.config.to_dict(), "versions": versions}
        )

    def _restore(self, out: Path) -> None:
        stored = checkpoint.read_run(out)["config"]
        mine = self.config.to_dict()
        changed = [f"{k} {stored.get(k)!r} -> {mine[k]!r}" for k in mine if stored.get(k) != mine[k]]
        if changed:
            raise ValueError(
                f"{out} was started with other settings: {'; '.join(changed)}. Resume with the same, or start a new run."
            )
        self.iteration, state = checkpoint.load(out / "checkpoints", self.device)
        self.load_state_dict(state)
        if distributed.rank() > 0:  # the checkpoint's is process 0's
            self.generator.manual_seed(self._seed() + self.iteration)
        if self.out is not None:
            checkpoint.truncate_lines(out / "metrics.jsonl", self.iteration)
        self.history = checkpoint.read_lines(out / "metrics.jsonl")

    def _checkpoint(self) -> None:
        assert self.out is not None
        checkpoint.save(self.out / "checkpoints", self.iteration, self.state_dict())
        self._tell("checkpoint", {"iteration": self.iteration})

    def _write_weights(self, folder: Path) -> None:
        """The averaged policy's, and those of the value network that can steer its sampling."""
        checkpoint.write_tensors(folder / "model.safetensors", self._weights())
        export = getattr(self.average.model, "export", None)
        if callable(export):
            export(folder)  # in the form that the model's own library loads
        if self.algorithm.critic and self.value.fitted:
            price = torch.tensor(self.value.kl_weight)  # what a nat cost when it was fitted
            checkpoint.write_tensors(
                folder / "value.safetensors", {**self.value.value.state_dict(), "kl_weight": price}
            )

    def _weights(self) -> dict[str, Tensor]:
        trained = {name for name, p in self.policy.model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
        return {name: p for name, p in self.average.model.named_parameters() if name in trained}

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs, as nested tensors and plain values."""
        return {
            "policy": {n: p for n, p in self.policy.model.named_parameters() if p.requires_grad},  # type: ignore[attr-defined]
            "average": self._weights(),
            "average_updates": self.average.updates,
            "minimiser": self.minimise.state_dict(),
            "rule": self.algorithm.state_dict(),
            "value": self.value.value.state_dict(),
            "value_optimizer": self.value.optimizer.state_dict(),
            "value_fitted": self.value.fitted,
            "memory": [
                {
                    "t": s.t,
                    "features": s.features,
                    "target": s.target,
                    "later_costs": s.later_costs,
                    "prompts": list(s.condition.prompts),
                }
                for s in self.value.memory
            ],
            "saved": [
                {"rewards": r, "prompts": list(path.condition.prompts), **path.tensors()} for path, r in self.saved
            ],
            "generator": self.generator.get_state(),
            "network_calls": self.policy.network_calls,
            "value_calls": self.value.value.calls,
            "reward_calls": self.reward.calls,
            "reference": self.reference,
            "start": self.start,
            "final": self.final,
            "guard": self.guard.state_dict(),
            "best_iteration": self.best_iteration,
            "price": [self.price.log_factor, self.price.error, self.algorithm.kl_weight],
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` took. Raises ValueError when the checkpoint is another model's."""
        checkpoint.load_parameters(self.policy.model, state["policy"])  # type: ignore[arg-type]
        checkpoint.load_parameters(self.average.model, state["average"])
        self.average.updates = state["average_updates"]
        self.minimise.load_state_dict(_optimizer_state(state["minimiser"]))
        self.algorithm.load_state_dict(state["rule"])
        try:
            self.value.value.load_state_dict(state["value"])
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's value network is another one: {' '.join(str(error).split())}") from None
        self.value.optimizer.load_state_dict(_optimizer_state(state["value_optimizer"]))
        self.value.fitted = state["value_fitted"]
        self.value.memory = [
            Sample(s["t"], s["features"], s["target"], self.policy.model.condition(s["prompts"]), s["later_costs"])
            for s in state["memory"]
        ]
        self.saved = [
            (Trajectory.of(entry, self.policy.model.condition(entry["prompts"])), entry["rewards"])
            for entry in state["saved"]
        ]
        self.generator.set_state(state["generator"].cpu())
        self.policy.network_calls, self.reward.calls = state["network_calls"], state["reward_calls"]
        self.value.value.calls = state["value_calls"]
        self.reference, self.start, self.final = state["reference"], state["start"], state["final"]
        self.guard.load_state_dict(state["guard"])
        self.best_iteration = state["best_iteration"]
        self.price.log_factor, self.price.error, price = state["price"]
        if price != self.algorithm.kl_weight:
            # what the value remembers was stored at that price already
            memory, self.value.memory = self.value.memory, []
            reprice(price, self.algorithm, self.value, self.minimise)
            self.value.memory = memory
        self.seconds = state["seconds"]

    def _record(self, kind: str, metrics: Mapping[str, Any]) -> None:
        line = {"iteration": self.iteration, **metrics}
        self.history.append(line)
        if self.out is not None:
            checkpoint.append_line(self.out / "metrics.jsonl", line)
        if self._writer is not None:
            for name, value in metrics.items():
                if isinstance(value, float | int):
                    self._writer.add_scalar(name, value, self.iteration)
        self._tell(kind, line)

    def _tell(self, kind: str, metrics: Mapping[str, Any]) -> None:
        if self.on_event is not None:
            self.on_event(kind, dict(metrics))


def _optimizer_state(state: Any) -> Any:
    """JSON made the parameter numbers strings; torch wants integers."""
    if not state:
        return state
    return {**state, "state": {int(k): v for k, v in state["state"].items()}}


def _catch_signals(trainer: Trainer) -> dict[int, Any]:
    """The first SIGINT or SIGTERM asks for a checkpoint at the iteration's end; the second acts at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        if trainer._interrupted:
            raise KeyboardInterrupt
        trainer._interrupted = True
        trainer._tell("interrupted", {})

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
