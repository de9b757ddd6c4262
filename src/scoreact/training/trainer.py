"""Training: rollout, reward, prepare, minimise, and a held-out look. The loop's body is `Trainer.iterate`.

Devices live here. Knows nothing of files: what surrounds the iterations of a run is in `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..control.policy import Policy
from ..control.rollout import rollout
from ..control.trajectory import Trajectory
from ..control.transitions import Paths, Rows
from ..control.value_fit import ValueFit
from ..dynamics.solvers import SOLVERS
from ..evaluation.evaluate import Features, Judge, evaluate, rewards_of
from ..evaluation.optimum import recovered
from ..models.base import Rounds, ScoreModel, StartsElsewhere
from ..models.weights import load_parameters
from ..rewards.base import Reward
from ..rewards.check import Checked, checked
from ..rewards.failures import Failures
from ..rewards.remote.overlap import Scores, ready
from ..sampling.draw import balanced
from ..support import distributed
from ..support.devices import choose_device
from ..support.errors import SettingError
from ..support.seeds import derived
from ..types import Condition, Metrics
from .assembly import (
    build_critic,
    build_minimiser,
    build_rule,
    build_surrogate,
    build_value,
    check_batch_reward,
    check_idle,
    check_ratio,
    check_value,
    exploration_of,
)
from .config import Config
from .critic_price import Prices, which_critic
from .guard import Guard
from .kl_price import KLPrice, reprice, sees_kl
from .learnable import check_groups, check_steps, check_weights
from .optim import AdamSteps, Average
from .reference_look import look_at_reference
from .rounding import rounding_kl
from .stand_in import foreseen, refit
from .unseen import split, unseen_metrics

EVALUATION_SEED = 1_000_003  # held-out noise: never a training seed's stream
SEEN = 8  # samples of an evaluation that are kept to be shown
TOGETHER = 4  # samples of a prompt among the reference's, where prompts are too many to be drawn as often by themselves
NATURAL_STEP = 1e-4  # of a weight, where rounding is measured under a rule whose steps have no learning rate


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
        start: Mapping[str, Tensor] | None = None,
        test_prompts: Sequence[str] = (),
    ) -> None:
        """start: weights of the policy by name, where it does not start as the reference (a run that goes on from another).
        test_prompts: that training never sees, where they are not drawn from `prompts` (`heldout_prompts`)."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; training needs an nn.Module with parameters to train.")
        if not prompts:
            raise SettingError("prompts is empty; give at least one (use [''] for an unconditional model).")
        self.config = config
        distributed.start()
        if config.batch_size % distributed.world():
            raise SettingError(
                f"batch_size is {config.batch_size}, which {distributed.world()} processes cannot share; take a multiple."
            )
        if config.scored_samples % distributed.world():
            raise SettingError(
                f"scored_samples is {config.scored_samples}, which {distributed.world()} processes cannot share; "
                "take a multiple."
            )
        if config.seed in (EVALUATION_SEED, EVALUATION_SEED + 1):
            raise SettingError(
                f"seed {config.seed} is that of the noise that evaluations keep for themselves; take another."
            )
        self.device = choose_device(config.device)
        model.to(self.device).eval()
        self.policy = Policy(model, act_until=config.act_until)
        self.starts_elsewhere = start is not None or (isinstance(model, StartsElsewhere) and model.starts_elsewhere)
        if start is not None:
            load_parameters(model, start)
        if not self.policy.trainable():
            raise SettingError(f"{type(model).__name__} has no parameter with requires_grad; nothing could be trained.")
        if half := [p for p in self.policy.trainable() if p.dtype == torch.float16]:
            raise SettingError(
                f"{len(half)} of the trained tensors are float16, in which Adam's steps overflow; make them float32 "
                "(`network.float()`), or train adapters beside them (lora_rank)."
            )
        distributed.same(self.policy.trainable())
        self.prompts, self.unseen = split(prompts, config.heldout_prompts, config.seed, model, test_prompts)
        self.unseen_rewards: Tensor | None = None  # the reference's, [B]
        self.failures = Failures(config.reward_failures)
        self.reward: Checked = checked(reward, self.failures)
        of_batch = check_batch_reward(config, self.reward)
        ready(self.reward)  # one elsewhere that is not there is said now
        self.heldout_reward: Checked = checked(
            reward, self.failures
        )  # counted apart: a cost of looking, not of learning
        self.features, self.optimum = features, optimum
        self.guard = Guard(
            config.kl_weight, config.guard, config.target_kl, config.least_diversity, config.patience, features, judge
        )
        self.price = KLPrice(config.target_kl)  # used with target_kl > 0 only
        self.sde = config.sde(model.schedule)
        self.solver = SOLVERS[config.solver]
        self.exploration = exploration_of(config, self.sde)
        self.generator = torch.Generator(device=self.device).manual_seed(self.process_seed())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # initial weights of the value network: a seed gives the same run
            self.surrogate = build_surrogate(config, model, self.prompts)
            value = build_value(
                config, self.policy, self.sde, value_network, self._reward_of_state, self.prompts, self.surrogate
            )
            self.critic = build_critic(config, value.to(self.device), self.policy, self.sde)
            self.algorithm = build_rule(config, self.critic, self.reward, self.prompts, self.surrogate)
        self.sde = self.algorithm.sde  # a rule may learn its noise
        self.notes = check_idle(config, self.algorithm)  # for the user; taken by whoever says them
        self.notes += of_batch
        self.notes += check_groups(self.algorithm, config, self.prompts)
        self.notes += check_steps(self.algorithm, config, self.sde)
        self.notes += check_weights(self.algorithm, config, self.policy, self.sde, self.prompts)
        if self.algorithm.fits_value:
            check_value(value, model, self.prompts)
        self.average = Average(model, config.average)
        self.minimise = build_minimiser(config, self.algorithm)
        if distributed.world() > 1 and not isinstance(self.minimise, AdamSteps):
            raise SettingError(
                f"{config.algorithm} takes natural gradients, which one process makes alone; start one only."
            )
        self.iteration = 0
        self.slowed = 1.0  # factor of every step, below 1 once numbers have failed
        self.reference: Metrics = {}
        self.start: Metrics = {}  # held-out J before the first update
        self.seen: Tensor | None = None  # some samples of the last evaluation
        self.parts: Metrics = {}  # means of a summed reward's parts over the last rollout
        self.prices: Prices | None = None  # of a reward and a path, once the reference was looked at
        self.saved: list[Paths] = []  # the reference's paths that the first iterations learn from

    # --- the loop -----------------------------------------------------------------------------------------------

    def iterate(self) -> Metrics:
        """One iteration: rollout, reward, prepare, minimise, average."""
        rate = self.rate()
        drawn: Metrics = {}
        reused = bool(self.saved)
        if self.algorithm.own_rows:
            self.reward.take_parts()  # those of other questions than the loss's
            batch = self.algorithm.rows_for(self._batch_of_prompts(), self.grid(), self.generator)
        else:
            paths = self.saved.pop() if self.saved else self.rollout()
            if self.surrogate is not None and not reused:
                paths, found = refit(self.surrogate, paths, self.policy.model.decode)
                drawn |= found
            batch = self.algorithm.prepare(paths, self.generator, rate)
            drawn |= {name: distributed.mean(value) for name, value in self._drawn(paths).items()}
        if self.iteration == 0 and self.exploration is None:
            check_ratio(self.algorithm, batch)
        return self._step(batch, drawn, rate, not reused)

    def learn(self, paths: Paths) -> Metrics:
        """An iteration on paths that were drawn and rewarded elsewhere, of this policy or an older one, at the full rate."""
        self.critic.fitter.memory.clear()  # these paths are all that V is to know
        batch = self.algorithm.prepare(paths, self.generator, self.slowed)
        return self._step(batch, self._drawn(paths), self.slowed, True)

    def _step(self, batch: Rows, drawn: Metrics, rate: float, own: bool) -> Metrics:
        """Minimise and average; what there is to say of the iteration. own: `drawn` is of a policy, not of the reference."""
        metrics = self.minimise(self.algorithm, batch, self.generator, rate)
        if self.algorithm.own_rows:
            parts = self.reward.take_parts().items()
            drawn |= {f"reward/mean/{name}": distributed.mean(value) for name, value in parts}
        self.average.update(self.policy.model)  # type: ignore[arg-type]
        self.algorithm.moved()
        self.iteration += 1
        if own and sees_kl(self.algorithm) and "policy/kl" in drawn:
            self.steer_kl(drawn["policy/kl"], 1)
        if self.config.target_kl > 0:
            drawn["policy/kl_weight"] = self.algorithm.kl_weight
        if self.failures.most:
            drawn["cost/reward_failures"] = self.failures.count
        return {
            **drawn,
            # the same in every process: a limit on one of them ends all or none
            **{name: distributed.mean(value) for name, value in self.algorithm.metrics.items()},
            **metrics,
            "learning_rate": self.config.learning_rate * rate,
            "cost/network_calls": distributed.world() * self.policy.network_calls,
            "cost/value_calls": distributed.world() * self.value.value.calls,
            "cost/reward_calls": distributed.world() * self.reward.calls,
        }

    def process_seed(self) -> int:
        """Of this process' random numbers: no process draws what another does, or one alone with another seed."""
        rank = distributed.rank()
        return derived(self.config.seed, "process", rank) if rank else self.config.seed

    def steer_kl(self, kl: float, iterations: int) -> None:
        """Towards target_kl by another price of a nat in training; J and J* stay those of kl_weight."""
        if self.config.target_kl > 0:
            price = self.config.kl_weight * self.price.update(kl, iterations)
            reprice(price, self.algorithm)

    def _drawn(self, paths: Paths) -> Metrics:
        """What a rollout says of the policy that drew it."""
        trajectory, rewards = paths.trajectory, paths.rewards
        metrics = {"reward/mean": float(rewards.mean()), "reward/std": float(rewards.std())}
        metrics |= {f"reward/mean/{name}": value for name, value in self.parts.items()}
        if self.algorithm.reads_reference and bool(trajectory.acts.any()):  # otherwise nobody knows the path KL
            kl = trajectory.path_kl()
            metrics["policy/kl"] = float(kl.mean())
            metrics["objective/J_training"] = float((rewards - self.config.kl_weight * kl).mean())
        return metrics

    def grid(self) -> Tensor:
        """The times of a path, [steps + 1]; another draw each time where the grid is random."""
        return self.config.times(self.policy.model.schedule, self.generator)

    def _batch_of_prompts(self, each: int = 1) -> list[str]:
        """Prompts of this process' part of a batch."""
        count = self.config.batch_size // distributed.world()
        return balanced(self.prompts, count, self.generator, min(max(each, self.config.group_size), count))

    def _reward_of_state(self, x_data: Tensor, condition: Condition) -> Tensor:
        return self.reward(self.policy.model.decode(x_data), condition)

    def rollout(self) -> Paths:
        """Paths of a batch of prompts, and their rewards."""
        self.reward.take_parts()  # those of other questions than these
        trajectory, scores = self.draw()
        rewards = scores.result()
        self.parts = self.reward.take_parts()
        return Paths(trajectory, rewards)

    def draw(self, reference_only: bool = False) -> tuple[Trajectory, Scores]:
        """Paths of a batch of prompts; a reward elsewhere scores a part of them while the next is drawn."""
        few = self.config.batch_size * self.config.reference_batches < TOGETHER * len(self.prompts)
        # prompts that are drawn once each say nothing of J*
        names, ts = self._batch_of_prompts(TOGETHER if reference_only and few else 1), self.grid()
        behaviour = self.policy if reference_only else self.algorithm.behaviour()
        stochastic = None if reference_only else self.algorithm.stochastic_steps(self.config.steps, self.generator)
        paths, scores = [], Scores(self.reward)
        for part in scores.parts(names):
            trajectory = rollout(
                behaviour, self.sde, self.solver, ts, self.policy.model.condition(part), self.generator,
                self.exploration, reference_only, stochastic,
                self.algorithm.reads_reference or self.config.exploration == "epsilon_greedy",
            )  # fmt: skip
            self._score(scores, trajectory, len(names), reference_only)
            paths.append(trajectory)
        if behaviour is not self.policy:  # one place counts the calls
            self.policy.network_calls += behaviour.network_calls
            behaviour.network_calls = 0
        whole = paths[0] if len(paths) == 1 else Trajectory.join(paths, self.policy.model.condition(names))
        return whole, scores

    def _score(self, scores: Scores, path: Trajectory, whole: int, reference_only: bool) -> None:
        """Show the reward the ends of these paths, part of a batch of `whole`: all of them, or scored_samples of the whole.

        Of the reference's the first ones, whatever they look like: J_ref and J* are made of their rewards.
        """
        x_data, condition, decode, surrogate = path.xs[-1], path.condition, self.policy.model.decode, self.surrogate
        count = self.config.scored_samples // distributed.world()
        if surrogate is None or count == 0 or count >= whole:
            scores.add(decode(x_data), condition)
            return
        share = max(1, round(count * len(x_data) / whole))
        seen = x_data if reference_only else surrogate.sees(x_data, decode)
        asked = torch.arange(share) if reference_only else surrogate.choose(seen, condition, share)
        asked = asked.to(x_data.device)
        decoded = seen is not x_data
        shown = seen[asked] if decoded else decode(x_data[asked])
        scores.add(shown, condition[asked], (len(x_data), asked))

    def rate(self) -> float:
        """The learning rates' factor: a linear warm-up, a plateau, a linear fall to the run's end, times `rate_decay`'s."""
        c = self.config
        left = (c.iterations - self.iteration) / max(1.0, c.iterations * (1 - c.decay_from))
        return self.slowed * c.rate_decay**self.iteration * min(1.0, (self.iteration + 1) / (c.warmup + 1), left)

    def look_at_reference(self) -> Metrics:
        """J_ref and J* from the reference's paths; where nothing learns from them, they only measure."""
        return look_at_reference(self)

    def evaluate(self, of_reference: bool = False) -> Metrics:
        """The averaged policy, or the reference, on held-out noise, against J_ref and J*; the first look is the start."""
        c = self.config
        ts = c.times(self.policy.model.schedule, torch.Generator(self.device).manual_seed(EVALUATION_SEED))
        policy = Policy(self.policy.reference, self.policy.reference) if of_reference else self.averaged()
        asked = self.heldout_reward.calls
        self.heldout_reward.take_parts()
        metrics = evaluate(
            policy, self.sde, self.solver, ts, self.heldout_reward, self.prompts, c.kl_weight,
            c.heldout_samples, EVALUATION_SEED, self._look_at_samples, self.features, self.device, self._watch,
        )  # fmt: skip
        metrics |= {f"reward/heldout/{name}": value for name, value in self.heldout_reward.take_parts().items()}
        if not self.start:
            self.notes += filter(None, [which_critic(self, metrics)])
        start = self.start.setdefault("objective/J", metrics["objective/J"])  # same noise: errors cancel
        metrics["objective/recovered"] = recovered(metrics["objective/J"] - start, self.reference)
        if self.unseen:
            metrics |= self._look_at_unseen(policy, ts)
        world = distributed.world()
        metrics["cost/look_network_calls"] = world * policy.network_calls
        metrics["cost/look_reward_calls"] = world * (self.heldout_reward.calls - asked)
        return metrics

    def _look_at_unseen(self, policy: Policy, ts: Tensor) -> Metrics:
        """Rewards on prompts that training never sees, beside the reference's on the same noise."""

        def rewards(policy: Policy) -> tuple[Tensor, Condition]:
            return rewards_of(
                policy, self.sde, self.solver, ts, self.heldout_reward, self.unseen, self.config.heldout_samples,
                EVALUATION_SEED + 1, self.device,
            )  # fmt: skip

        found, condition = rewards(policy)
        if self.unseen_rewards is None:
            reference = self.policy.reference
            unmoved = self.iteration == 0 and not self.starts_elsewhere
            same = unmoved or policy.model is reference
            self.unseen_rewards = found if same else rewards(Policy(reference, reference))[0]
        return unseen_metrics(found, self.unseen_rewards, condition)

    def rounding(self) -> Metrics:
        """The path KL that rounding alone costs, where a part of the model's network is less than float32; else {}."""
        c, model = self.config, self.policy.model
        if not (isinstance(model, Rounds) and model.rounds):
            return {}
        generator = torch.Generator(self.device).manual_seed(EVALUATION_SEED)
        ts = c.times(model.schedule, generator)
        step = c.learning_rate if c.uses("learning_rate") else NATURAL_STEP
        condition = model.condition(balanced(self.prompts, min(8, c.heldout_samples), generator))
        found = rounding_kl(self.policy, self.sde, self.solver, ts, condition, generator, step)
        return {"policy/kl_rounding": found}

    def _watch(self, path: Trajectory, samples: Tensor, rewards: Tensor) -> Metrics:
        critic = None if self.config.value == "residual" else self.algorithm.critic
        return foreseen(self.surrogate, critic, self.policy, self.sde, path, samples, rewards)

    def _look_at_samples(self, samples: Tensor, condition: Condition) -> Metrics:
        self.seen = samples[:SEEN].detach().cpu()
        return self.guard.look_at_samples(samples, condition, first=not self.start)

    # --- what it is made of ------------------------------------------------------------------------------------

    @property
    def value(self) -> ValueFit:
        """How the critic's value is fitted, and what it remembers."""
        return self.critic.fitter

    def averaged(self) -> Policy:
        """The averaged weights beside the same reference: what is evaluated and returned."""
        return Policy(self.average.model, self.policy.reference, self.config.act_until)  # type: ignore[arg-type]

    def pretrained(self) -> dict[str, Tensor]:
        """The reference's weights of what is trained, by name."""
        trained = {name for name, p in self.policy.model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
        reference: nn.Module = self.policy.reference  # type: ignore[assignment]
        return {name: p for name, p in reference.named_parameters() if name in trained}

    def put_reference(self, tensors: Mapping[str, Tensor]) -> None:
        """Put pretrained weights into the reference, where the model that was given had been trained before."""
        load_parameters(self.policy.reference, tensors)  # type: ignore[arg-type]

    def weights(self) -> dict[str, Tensor]:
        trained = {name for name, p in self.policy.model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]
        return {name: p for name, p in self.average.model.named_parameters() if name in trained}
