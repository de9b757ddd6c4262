"""The look at the pretrained model before training: its paths, J_ref and J*, and whether its rewards can teach anything.

Where a critic, a surrogate or a rule learns from these paths, it does so here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..control.transitions import Paths
from ..evaluation.optimum import estimate_optimum, optimal_kl
from ..rewards.base import is_of_batch
from ..rewards.check import uninformative, unsteady
from ..rewards.remote.overlap import one_ahead
from ..support import distributed
from ..support.errors import SettingError
from ..types import Condition, Metrics
from .critic_price import measured
from .stand_in import filled, learn_to_decode, lost_in_decoding, show

if TYPE_CHECKING:
    from .trainer import Trainer

AGAIN = 4  # samples of the reference whose rewards are asked for once more


def look_at_reference(trainer: Trainer) -> Metrics:
    """J_ref and J* from the reference's paths; where nothing learns from them, they only measure."""
    beta, surrogate, critic = trainer.config.kl_weight, trainer.surrogate, trainer.algorithm.critic
    rewards, prompts = [], []
    shown: tuple[Tensor, Tensor, Condition] | None = None  # of the first samples: their ends and rewards
    # a policy that starts elsewhere did not draw the reference's paths
    reused = 0 if trainer.starts_elsewhere else trainer.config.rule.get("reuse_reference", 0)
    waiting: list[Paths] = []  # for the surrogate's first fit
    spent = trainer.policy.network_calls, trainer.reward.calls
    for trajectory, r in one_ahead(trainer.draw(True) for _ in range(trainer.config.reference_batches)):
        largest = float(r[~r.isnan()].max())
        for choice, remedy in (("value_loss", "soft"), ("surrogate_target", "reward")):
            if getattr(trainer.config, choice) in ("log_probability", "logit") and largest > 0:
                raise SettingError(
                    f"reward {trainer.reward.name} reached {largest:.3g}, so it is no log-probability; "
                    f"use {choice} {remedy}."
                )
        if shown is None:
            few = torch.nonzero(~r.isnan()).flatten()[:AGAIN]
            shown = trajectory.xs[-1][few], r[few], trajectory.condition[few]
        rewards.append(r)
        prompts += list(trajectory.condition.prompts)
        trainer.guard.remember(trainer.policy.model.decode, trajectory.xs[-1], trainer.config.heldout_samples)
        paths = Paths(trajectory, r)
        if surrogate is not None:
            if surrogate.decoder is not None and len(rewards) == 1:
                learn_to_decode(surrogate.decoder, trajectory, trainer.sde, trainer.policy.model.decode)
                trainer.notes += filter(None, [lost_in_decoding(surrogate.decoder)])
            show(surrogate, paths, trainer.policy.model.decode)
        if surrogate is not None and (critic is not None or len(waiting) < reused):
            waiting.append(paths)
        elif surrogate is None:
            _learn_from(trainer, paths, reused)
    if critic is None and surrogate is None and not reused:
        trainer.policy.network_calls, trainer.reward.calls = spent
    asked = ~torch.cat(rewards).isnan()
    found = distributed.gathered(torch.cat(rewards)[asked])
    number = {prompt: i for i, prompt in enumerate(trainer.prompts)}
    rows = torch.tensor([number[prompt] for prompt in prompts], device=asked.device)[asked]
    condition = Condition([trainer.prompts[row] for row in distributed.gathered(rows).tolist()])
    metrics = estimate_optimum(found, condition, beta) | optimal_kl(found, condition, beta)
    of_batch = is_of_batch(trainer.reward.reward)
    if of_batch or (shown is not None and not _is_of_a_sample(trainer, *shown, float(found.std()))):
        metrics["objective/trusted"], metrics["objective/unsteady_reward"] = 0.0, 1.0
    if (nothing := uninformative(trainer.reward.name, found, condition)) is not None:
        trainer.notes.append(nothing)
    if trainer.unseen:
        metrics |= {"prompts/trained": float(len(trainer.prompts)), "prompts/heldout": float(len(trainer.unseen))}
    if surrogate is not None:
        metrics |= surrogate.fit()
        for paths in waiting:
            _learn_from(trainer, filled(surrogate, paths, trainer.policy.model.decode), reused)
    if trainer.optimum is not None:
        metrics["objective/J_star_exact"] = trainer.optimum(beta)
        # KL* = -dJ* / dbeta
        below, above = trainer.optimum(0.999 * beta), trainer.optimum(1.001 * beta)
        metrics["objective/KL_star_exact"] = (below - above) / (0.002 * beta)
    return metrics


@torch.no_grad()
def _is_of_a_sample(trainer: Trainer, x_end: Tensor, rewards: Tensor, condition: Condition, spread: float) -> bool:
    """Whether a few samples get the same rewards by themselves as among others; noted where they do not."""
    asked: list[Tensor] = []

    def reward() -> None:
        samples = trainer.policy.model.decode(x_end)
        asked.extend([samples, trainer.heldout_reward(samples, condition)])

    trainer.prices = measured(trainer, x_end, condition, reward)
    samples, few = asked
    again = few
    if unsteady(trainer.reward.name, rewards, few, again, spread) is None:
        return True
    again = trainer.heldout_reward(samples, condition)  # noise, or the others'?
    trainer.notes += filter(None, [unsteady(trainer.reward.name, rewards, few, again, spread)])
    return False


def _learn_from(trainer: Trainer, paths: Paths, reused: int) -> None:
    """Paths of the reference: the critic's first, and those of the first `reused` iterations."""
    if trainer.algorithm.critic is not None:
        trainer.algorithm.critic.remember(paths)
    if len(trainer.saved) < reused:
        trainer.saved.append(paths)
