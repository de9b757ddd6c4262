"""What a run must keep to go on as if it had never stopped: out of a trainer, and back into one.

Knows every part's state; does not know files (`runs.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..control.critic import Critic
from ..control.trajectory import Trajectory
from ..control.transitions import Paths
from ..control.value_fit import Sample
from ..models.weights import load_parameters
from ..support.errors import RunError
from .kl_price import reprice
from .trainer import Trainer
from .unseen import digest


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that an exact continuation needs, as nested tensors and plain values."""
    return {
        "policy": {n: p for n, p in trainer.policy.model.named_parameters() if p.requires_grad},  # type: ignore[attr-defined]
        "average": trainer.weights(),
        "average_updates": trainer.average.updates,
        "minimiser": trainer.minimise.state_dict(),
        "rule": trainer.algorithm.state_dict(),
        "surrogate": {} if trainer.surrogate is None else trainer.surrogate.state_dict(),
        "value": trainer.critic.value.state_dict(),
        "value_fit": trainer.critic.fitter.state_dict(),
        "memory": [
            {
                "t": s.t,
                "features": s.features,
                "target": s.target,
                "later_costs": s.later_costs,
                "rewards": s.rewards,
                "prompts": list(s.condition.prompts),
            }
            for s in trainer.critic.fitter.memory
        ],
        "saved": [
            {
                "rewards": paths.rewards,
                "prompts": list(paths.trajectory.condition.prompts),
                **paths.trajectory.tensors(),
            }
            for paths in trainer.saved
        ],
        "generator": trainer.generator.get_state(),
        "network_calls": trainer.policy.network_calls,
        "value_calls": trainer.critic.value.calls,
        "reward_calls": trainer.reward.calls,
        "slowed": trainer.slowed,
        "reward_failures": [trainer.failures.count, trainer.failures.told],
        "reference": trainer.reference,
        "start": trainer.start,
        "guard": trainer.guard.state_dict(),
        "prompts": digest(trainer.prompts, trainer.unseen),
        "unseen": {} if trainer.unseen_rewards is None else {"rewards": trainer.unseen_rewards},
        "schedule": schedule_of(trainer),
        "price": [trainer.price.log_factor, trainer.price.error, trainer.algorithm.kl_weight],
    }


def schedule_of(trainer: Trainer) -> list[float]:
    """alpha and sigma at the start, the middle and the end of the model's path, as they are now."""
    schedule = trainer.policy.model.schedule
    t = torch.linspace(schedule.t_min, schedule.t_max, 3)
    return [*schedule.alpha(t).tolist(), *schedule.sigma(t).tolist()]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put back what `state_of` took.

    Args:
        trainer: one just made with the same model, reward and settings.
        state: of `state_of`, or as a checkpoint gives it back.
    Raises: ValueError when the state is another model's, or another value network's.
    """
    critic, condition = trainer.critic, trainer.policy.model.condition
    mine = digest(trainer.prompts, trainer.unseen)
    if state.get("prompts", mine) != mine:  # earlier versions did not keep it
        raise RunError(
            f"the run began with other prompts than the {len(trainer.prompts) + len(trainer.unseen)} given now; give those, in "
            "their order, or start a new run."
        )
    theirs, now = state.get("schedule"), schedule_of(trainer)  # earlier versions did not keep it
    if theirs is not None and not torch.allclose(torch.tensor(theirs), torch.tensor(now), rtol=1e-4, atol=1e-6):
        raise RunError(
            f"the run began with another schedule: alpha and sigma at the path's start, middle and end were "
            f"{_numbers(theirs)} and are {_numbers(now)}. Give the model as it was, or start a new run."
        )
    trainer.unseen_rewards = state.get("unseen", {}).get("rewards")
    load_parameters(trainer.policy.model, state["policy"])  # type: ignore[arg-type]
    load_parameters(trainer.average.model, state["average"])
    trainer.average.updates = state["average_updates"]
    trainer.minimise.load_state_dict(_optimizer_state(state["minimiser"]))
    trainer.algorithm.load_state_dict(state["rule"])
    if trainer.surrogate is not None:
        trainer.surrogate.load_state_dict(state["surrogate"])
    if trainer.algorithm.critic is not None:  # of others earlier versions stored a value by settings that nobody reads
        _restore_value(critic, state)
    trainer.price.log_factor, trainer.price.error, price = state["price"]
    if price != trainer.algorithm.kl_weight:
        reprice(price, trainer.algorithm)  # before the memory is back, which was stored at this price
    critic.fitter.memory = [
        Sample(s["t"], s["features"], s["target"], condition(s["prompts"]), s["later_costs"], s.get("rewards"))
        for s in state["memory"]
    ]
    trainer.saved = [
        Paths(Trajectory.of(entry, condition(entry["prompts"])), entry["rewards"]) for entry in state["saved"]
    ]
    trainer.generator.set_state(state["generator"].cpu())
    trainer.policy.network_calls, trainer.reward.calls = state["network_calls"], state["reward_calls"]
    trainer.failures.count, trainer.failures.told = state.get("reward_failures", [0, 0])  # earlier versions had none
    trainer.slowed = state.get("slowed", 1.0)
    critic.value.calls = state["value_calls"]
    trainer.reference, trainer.start = state["reference"], state["start"]
    trainer.guard.load_state_dict(state["guard"])


def _restore_value(critic: Critic, state: Mapping[str, Any]) -> None:
    try:
        critic.value.load_state_dict(state["value"])
    except RuntimeError as error:
        raise RunError(f"the checkpoint's value network is another one: {' '.join(str(error).split())}") from None
    fit = state["value_fit"]
    if "optimizer" in fit:
        fit = {**fit, "optimizer": _optimizer_state(fit["optimizer"])}
    critic.fitter.load_state_dict(fit)


def _optimizer_state(state: Any) -> Any:
    """JSON made the parameter numbers strings; torch wants integers."""
    if not state:
        return state
    return {**state, "state": {int(k): v for k, v in state["state"].items()}}
