"""A run that goes on from rewards which come from outside: late, in any order, one update of fixed cost at a time.

    online/00000003.safetensors   paths that were handed out, with everything a rule needs to learn from them later
    checkpoints/00000041          the policy after update 41, and the rewards that it remembers

An update is an iteration of the run. Its paths are drawn from the window of the latest rewards, whichever policy drew them,
so the rule has to be one that an older policy's paths lead to the same optimum (`Rule.off_policy`); the others are refused.
A kill loses the update that was at work: the same call makes it again, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..algorithms.registry import rules
from ..control.rollout import rollout
from ..control.trajectory import Trajectory
from ..control.transitions import Paths
from ..rewards.learned import LearnedReward
from ..runs.checkpoint import checkpoints
from ..runs.session import Outcome, Session
from ..support import distributed
from ..support.errors import FeedbackError, RunError, SettingError
from ..support.files import UNREADABLE, read_stored, read_tensors, write_tensors
from ..support.seeds import derived
from ..training.config import Config, rule_class
from ..training.loop import check_kl
from ..training.optim import AdamSteps
from ..training.stand_in import fit_anew
from ..training.trainer import Trainer
from ..types import Condition, Metrics
from .window import FEWEST, Window, below_reference, worth

FOLDER = "online"  # of a run's: the paths that were handed out
AT_ONCE = 256  # paths that are drawn together
WAITING = 4  # times the window: how many later samples a sample's reward may wait for


@dataclass(frozen=True)
class HandedOut:
    """Samples that wait for their rewards.

    Args:
        ids: of each, B whole numbers; what `update` knows them by.
        prompts: B of them.
        samples: decoded, [B, ...] on the CPU.
    """

    ids: Sequence[int]
    prompts: Sequence[str]
    samples: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Updated:
    """What an update came to: metrics as a line of metrics.jsonl has them, and sentences for the user."""

    metrics: Metrics
    notes: Sequence[str]


def check_off_policy(config: Config) -> None:
    """Raises SettingError for settings with which a run cannot learn from late rewards."""
    kind = rule_class(config.algorithm)
    able = [name for name, rule in rules().items() if rule.off_policy and rule.minimiser == "adam"]
    if not (kind.off_policy and kind.minimiser == "adam"):
        why = (
            "takes natural gradients, whose network calls no budget bounds"
            if kind.off_policy
            else "learns from the present policy's samples alone, and late rewards are of an older one's"
        )
        raise SettingError(
            f"{config.algorithm} {why}; rules that learn online: {', '.join(able)}. Start a run of one of them, also from "
            "another run (`scoreact train --from RUN --algorithm ctrl --reward outside`)."
        )
    if config.value == "residual":
        raise SettingError(
            "value residual asks the reward by itself, and online nobody answers it; start a run with value network, linear or "
            "surrogate."
        )
    if config.grid == "random":
        raise SettingError("grid is random, and paths of different times are no batch; start a run with grid uniform.")


def by_id(pairs: Iterable[tuple[int, float | None]]) -> dict[int, float]:
    """Rewards by their samples' ids, the missing ones left out. Raises FeedbackError for two of a sample that differ."""
    found: dict[int, float] = {}
    for number, reward in pairs:
        if reward is None:
            continue
        value = float(reward)
        if found.setdefault(int(number), value) != value and not math.isnan(value):  # NaN is refused later
            raise FeedbackError(
                f"sample {number} has two rewards, {found[int(number)]:g} and {value:g}; give one, such as their mean."
            )
    return found


class Online:
    """What hands out samples of a run and learns from their rewards. The folder is locked while it is at work, and not between.

    Args:
        make: a trainer of the run as it was before its first iteration; called where the folder holds another state than the
            last one seen.
        config: the run's settings.
        folder: of the run.
    """

    def __init__(self, make: Callable[[], Trainer], config: Config, folder: Path) -> None:
        check_off_policy(config)
        self.make, self.config, self.folder = make, config, folder
        self._session: OnlineSession | None = None
        self._seen = ""

    def hand_out(self, prompts: Sequence[str]) -> HandedOut:
        """Draw a sample of the policy for each prompt, 2 x steps network calls each, and keep its path."""
        with self._at_work() as session:
            trainer, files = session.trainer, self._files()
            number = max(files, default=-1) + 1
            first = HandedPaths.of(files[number - 1]).ids.stop if files else session.online.get("next", 0)
            policy, model = trainer.averaged(), trainer.policy.model
            generator = torch.Generator(trainer.device).manual_seed(derived(self.config.seed, "handed out", number))
            ts, parts = self.config.times(model.schedule), []
            for start in range(0, len(prompts), AT_ONCE):
                condition = model.condition(prompts[start : start + AT_ONCE])
                parts.append(
                    rollout(policy, trainer.sde, trainer.solver, ts, condition, generator, trainer.exploration)
                )
            whole = Trajectory.join(parts, model.condition(prompts))
            samples = model.decode(whole.xs[-1]).detach().cpu()
            path = self.folder / FOLDER / f"{number:08d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            about = {"first": str(first), "iteration": str(trainer.iteration), "prompts": json.dumps(list(prompts))}
            write_tensors(path, whole.tensors(), about)
        return HandedOut(range(first, first + len(prompts)), list(prompts), samples)

    def update(
        self,
        rewards: Mapping[int, float],
        window: int | None = None,
        half_life: float | None = None,
        calls: int | None = None,
        made: LearnedReward | None = None,
    ) -> Updated:
        """Remember rewards by their samples' ids, and move the policy on by one iteration.

        made: what gave them, where it was made anew: all samples that are remembered get its rewards.
        Nothing is remembered where anything is refused.
        """
        with self._at_work() as session:
            begin = time.perf_counter()
            memory = Window.of(session.online)
            memory.plan = memory.plan.changed(window, half_life, calls)
            if memory.plan.half_life and self.config.surrogate:
                raise SettingError(
                    f"half_life is {memory.plan.half_life:g}, and a surrogate of the reward remembers all of a window alike; "
                    "take 0, and a smaller window."
                )
            batches = {number: HandedPaths.of(path) for number, path in self._files().items()}
            known = set(session.online.get("rewarded", ()))
            new, said = self._sorted(rewards, batches, memory, known)
            pushed = memory.add(new)
            metrics: Metrics = {
                "online/rewards": float(len(new)), "online/window": float(len(memory)),
                "online/age": float(memory.ages().mean()), "online/dropped": float(pushed),
                "online/late": float(len(rewards) - len(new)),
            }  # fmt: skip
            if len(memory) < FEWEST:
                said.append(f"{len(memory)} rewards are remembered; the policy moves from {FEWEST} on.")
            else:
                metrics |= self._learn(session, memory, batches, set(new), made, said)
            kept = {i for batch in batches.values() if self._waits(batch, batches, memory) for i in batch.ids}
            session.online = {
                **memory.state_dict(), "rewarded": sorted((known | set(new)) & kept),
                "next": max(batch.ids.stop for batch in batches.values()),
            }  # fmt: skip
            session.finish({**metrics, "seconds": session.seconds + time.perf_counter() - begin}, said)
            for number, batch in batches.items():
                if not kept & set(batch.ids) and number != max(batches):  # the newest says where the ids go on
                    batch.path.unlink()
        return Updated(metrics, said)

    # --- what there is -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[OnlineSession]:
        """The run as its folder has it, which nobody else changes meanwhile."""
        if distributed.world() > 1:
            raise SettingError("one process learns online; start without torchrun.")
        session = self._session if self._seen == self._stamp() else None
        if session is not None:
            session.take()
        self._session = None  # what fails half-way is read anew
        try:
            if session is None:
                session = OnlineSession(self.make(), self.folder, resume=True)
                session.put_weights()
            yield session
            self._session, self._seen = session, self._stamp()
        finally:
            if session is not None:
                session.release()

    def _stamp(self) -> str:
        """Of the newest checkpoint."""
        newest = checkpoints(self.folder / "checkpoints")
        return f"{newest[0].name} {(newest[0] / 'state.json').stat().st_mtime_ns}" if newest else ""

    def _files(self) -> dict[int, Path]:
        return {int(path.stem): path for path in sorted((self.folder / FOLDER).glob("[0-9]*.safetensors"))}

    def _waits(self, batch: HandedPaths, batches: Mapping[int, HandedPaths], memory: Window) -> bool:
        """Whether one of its samples is remembered, or may still be rewarded."""
        newest = max(other.ids.stop for other in batches.values())
        return batch.ids.stop + WAITING * memory.plan.size > newest or any(i in memory.rewards for i in batch.ids)

    def _sorted(
        self, rewards: Mapping[int, float], batches: Mapping[int, HandedPaths], memory: Window, known: set[int]
    ) -> tuple[dict[int, float], list[str]]:
        """The rewards that are new, and what is said of the others. Raises FeedbackError for what cannot be right."""
        if not rewards:
            raise FeedbackError("no reward is given; bring some for the samples that were handed out.")
        end = max((batch.ids.stop for batch in batches.values()), default=0)
        there = {i for batch in batches.values() for i in batch.ids}
        new, again, late = dict[int, float](), 0, 0
        c = self.config
        logarithms = (c.uses("value_loss") and c.value_loss == "log_probability") or (
            c.uses("surrogate_target") and c.surrogate_target == "logit"
        )
        for number, reward in rewards.items():
            if not 0 <= number < end:
                raise FeedbackError(
                    f"sample {number} was never handed out; ids go from 0 to {end - 1}."
                    if end
                    else f"sample {number} was never handed out, nor any other; draw some with `scoreact sample --for-update`."
                )
            if not math.isfinite(reward):
                raise FeedbackError(
                    f"the reward of sample {number} is {reward}; give a finite number, or leave it out."
                )
            if logarithms and reward > 0:
                raise FeedbackError(
                    f"the reward of sample {number} is {reward:g}, and this run takes rewards for log-probabilities, which are "
                    "0 at most; bring those, or start a run with value_loss soft, or with surrogate_target reward."
                )
            if number in memory.rewards and memory.rewards[number] != reward:
                raise FeedbackError(
                    f"sample {number} has the reward {memory.rewards[number]:g} already, and {reward:g} is another; give one "
                    "reward a sample, such as their mean."
                )
            if number in known:
                again += 1
            elif number not in there:
                late += 1
            else:
                new[number] = float(reward)
        if not new:
            raise FeedbackError(
                f"none of {len(rewards)} rewards is new: {again} were given before, {late} came too late for their paths."
            )
        said = [f"{again} rewards were given before and count once."] * bool(again)
        said += [f"{late} rewards came too late, as their paths are kept no longer."] * bool(late)
        return new, said

    def _learn(
        self, session: OnlineSession, memory: Window, batches: Mapping[int, HandedPaths], new: set[int],
        made: LearnedReward | None, said: list[str],
    ) -> Metrics:  # fmt: skip
        """One iteration on paths of the window. new: ids of the samples whose rewards came just now. made: as of `update`."""
        trainer, c = session.trainer, self.config
        wanted = list(memory.rewards)
        paths, condition, drawn_at = self._paths(wanted, batches, trainer)
        if made is not None:
            ends, decode = paths.xs[-1].split(AT_ONCE), trainer.policy.model.decode
            rows = torch.arange(len(wanted)).split(AT_ONCE)
            anew = torch.cat([made(decode(x), paths.condition[i]).cpu() for x, i in zip(ends, rows, strict=True)])
            memory.rewards = dict(zip(wanted, anew.tolist(), strict=True))
        values = torch.tensor(list(memory.rewards.values()), dtype=torch.float32)
        log_ratios = paths.log_ratio_to_reference().cpu()
        metrics = worth(values, log_ratios, condition, c.kl_weight)
        if made is not None:
            metrics["reward/auc"] = made.auc(values[[number in new for number in wanted]])
        metrics["online/lag"] = float(trainer.iteration - drawn_at.mean())
        rows = memory.draw(c.batch_size, trainer.generator).to(trainer.device)
        before, policy = trainer.policy.network_calls, trainer.policy
        assert isinstance(trainer.minimise, AdamSteps)
        most, values = memory.plan.calls or math.inf, values.to(trainer.device)
        trainer.minimise.left = lambda: most - (policy.network_calls - before)
        if trainer.surrogate is not None:
            fresh = torch.tensor([number in new for number in wanted])
            found = fit_anew(trainer.surrogate, Paths(paths, values), fresh, trainer.sde, policy.model.decode)
            metrics |= found[0]
            said += found[1]
        metrics |= trainer.learn(Paths(paths.paths(rows), values[rows]))
        metrics["cost/update_network_calls"] = float(policy.network_calls - before)
        check_kl(trainer, metrics)
        if (below := below_reference(values.cpu(), log_ratios, c.kl_weight)) is not None:
            said.append(
                f"J of the samples remembered is {below[0]:.3g}, and the pretrained model's {below[1]:.3g}: by these rewards "
                "it is the better one. If the rewards have moved, a smaller window forgets sooner."
            )
        return metrics

    def _paths(
        self, wanted: Sequence[int], batches: Mapping[int, HandedPaths], trainer: Trainer
    ) -> tuple[Trajectory, Condition, Tensor]:
        """The paths of these samples in their order, and at which iteration each was drawn."""
        place = {number: i for i, number in enumerate(wanted)}
        parts, order, prompts, drawn_at = list[Trajectory](), list[int](), list[str](), list[int]()
        for batch in batches.values():
            rows = [i for i, number in enumerate(batch.ids) if number in place]
            if rows:
                names = [batch.prompts[i] for i in rows]
                stored = batch.path_of(trainer.policy.condition(batch.prompts), trainer.device)
                parts.append(stored.paths(torch.tensor(rows)))
                order += [place[batch.ids[i]] for i in rows]
                prompts += names
                drawn_at += [batch.iteration] * len(rows)
        back = torch.tensor(order).argsort()
        names = [prompts[i] for i in back.tolist()]
        whole = Trajectory.join(parts, trainer.policy.condition(prompts)).paths(back.to(trainer.device))
        return whole, Condition(names), torch.tensor(drawn_at, dtype=torch.float64)[back]


@dataclass(frozen=True)
class HandedPaths:
    """Paths of one hand-out: where they are, their samples' ids and prompts, and after how many iterations they were drawn."""

    path: Path
    ids: range
    prompts: Sequence[str]
    iteration: int

    @classmethod
    def of(cls, path: Path) -> HandedPaths:
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
            first, prompts = int(header["first"]), json.loads(header["prompts"])
            return cls(path, range(first, first + len(prompts)), prompts, int(header["iteration"]))
        except UNREADABLE as error:
            raise RunError(f"{path} cannot be read ({' '.join(str(error).split())}); restore a copy of it.") from None

    def path_of(self, condition: Condition, device: torch.device) -> Trajectory:
        return Trajectory.of(read_stored(self.path, device)[0], condition)


class OnlineSession(Session):
    """A run at work for one update after another, its lock taken and given back."""

    def take(self) -> None:
        self._take(self.folder)

    def release(self) -> None:
        self._release()

    @property
    def folder(self) -> Path:
        assert self.out is not None
        return self.out

    def wait(self) -> Outcome:
        """Save a run that has not begun, for rewards to come."""
        try:
            self._checkpoint()
            self._write_weights(self.folder)
        finally:
            self._release()
        return Outcome(self.history, {}, {}, None)

    def put_weights(self) -> None:
        """Write the weights where a kill came between a checkpoint and them."""
        path = self.folder / "model.safetensors"
        stored = read_tensors(path) if path.is_file() else {}
        mine = self.trainer.weights()
        if stored.keys() != mine.keys() or any(not torch.equal(stored[name], mine[name].cpu()) for name in mine):
            self._write_weights(self.folder)

    def finish(self, metrics: Metrics, said: Sequence[str]) -> None:
        """Record an update, and make it last: the checkpoint first, by which a kill is before or after it."""
        self.seconds = metrics["seconds"]
        self._record("iteration", metrics)
        for text in said:
            self._record("guard", {"guard": "online", "text": text})
        self._checkpoint()
        self._write_weights(self.folder)
        self._write_result(None)
