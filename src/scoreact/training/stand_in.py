"""What a run does with a surrogate of its reward: shows it what was asked, takes its word for the rest, and measures it.

Knows paths and rewards, where nan is a reward that was not asked; does not know how the surrogate is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..control.critic import Critic
from ..control.policy import Policy
from ..control.ridge_decoder import RidgeDecoder
from ..control.ridge_surrogate import RidgeSurrogate
from ..control.trajectory import Trajectory
from ..control.transitions import Paths
from ..dynamics.sde import SDE
from ..evaluation.optimum import mean_and_error
from ..evaluation.seen import SEEN_AT, seen
from ..support import distributed
from ..types import Metrics

DECODED = 0.9  # share of the pictures' variance below which a decoder loses what a reward may be about
AT_ONCE = 64  # samples that are decoded together
CELLS = 2**15  # of latents, at each time, that a decoder is solved for on; each is an equation

Decode = Callable[[Tensor], Tensor]


@torch.no_grad()
def learn_to_decode(decoder: RidgeDecoder, path: Trajectory, sde: SDE, decode: Decode) -> None:
    """Fit a decoder to what `decode` makes of the ends of the reference's paths, and of what they were heading for."""
    enough = -(-CELLS // path.xs[0, 0, 0].numel())
    few = torch.arange(min(enough, path.xs.shape[1]), device=path.xs.device)
    states = [path.xs[-1][few]]
    for at in SEEN_AT:
        k = int((path.ts[:-1] - at).abs().argmin())
        states.append(sde.x_data_hat(path.ts[k].expand(len(few)), path.xs[k][few], path.references[k][few]))
    decoder.fit(torch.cat(states), torch.cat([decode(x) for x in states]))


def lost_in_decoding(decoder: RidgeDecoder) -> str | None:
    """That a fitted decoder's pictures lack too much; None where they do not."""
    share = float(decoder.share)
    if share >= DECODED:
        return None
    return (
        f"the ridge decoder gives {share:.2f} of the variance of the pictures, and the surrogate sees nothing of the rest. "
        "surrogate_decoder full decodes as the samples are, and costs more."
    )


def show(surrogate: RidgeSurrogate, paths: Paths, decode: Decode) -> None:
    """Let the surrogate see the finished samples of these paths, and the rewards that were asked."""
    samples, condition = surrogate.sees(paths.trajectory.xs[-1], decode), paths.trajectory.condition
    asked, others = (torch.nonzero(rows).flatten() for rows in (~paths.rewards.isnan(), paths.rewards.isnan()))
    surrogate.add(samples[asked], condition[asked], paths.rewards[asked])
    if len(others) and not surrogate.fitted:
        surrogate.look(samples[others], condition[others])


@torch.no_grad()
def filled(surrogate: RidgeSurrogate, paths: Paths, decode: Decode) -> Paths:
    """The paths with the surrogate's word where the reward was not asked."""
    asked = ~paths.rewards.isnan()
    if bool(asked.all()):
        return paths
    guess = surrogate(surrogate.sees(paths.trajectory.xs[-1], decode), paths.trajectory.condition)
    return replace(paths, rewards=torch.where(asked, paths.rewards, guess))


def refit(surrogate: RidgeSurrogate, paths: Paths, decode: Decode) -> tuple[Paths, Metrics]:
    """The surrogate sees a rollout and is fitted anew; the rollout with a reward for every path, and how far it was off."""
    asked = ~paths.rewards.isnan()
    with torch.no_grad():
        guess = surrogate(
            surrogate.sees(paths.trajectory.xs[-1], decode), paths.trajectory.condition
        )  # before it has seen them
    metrics = {
        "reward/asked_mean": distributed.mean(float(paths.rewards[asked].mean())),
        "surrogate/reward": distributed.mean(float(guess[asked].mean())),
    }
    show(surrogate, paths, decode)
    metrics |= surrogate.fit()
    return filled(surrogate, paths, decode), metrics


@torch.no_grad()
def fit_anew(
    surrogate: RidgeSurrogate, paths: Paths, new: Tensor, sde: SDE, decode: Decode
) -> tuple[Metrics, list[str]]:
    """The surrogate knows these paths and no others from here on.

    Returns metrics, which say how far it was off where `new` [B], on rewards that it had not seen, and sentences for the user.
    """
    path, said = paths.trajectory, list[str]()
    if surrogate.decoder is not None and not surrogate.fitted:
        learn_to_decode(surrogate.decoder, path, sde, decode)
        said += [lost] if (lost := lost_in_decoding(surrogate.decoder)) else []
    surrogate.seen = {}
    rows = [torch.nonzero(~new).flatten().split(AT_ONCE), torch.nonzero(new).flatten().split(len(new))]
    for part in (part.to(path.xs.device) for parts in rows for part in parts if len(part)):
        surrogate.add(surrogate.sees(path.xs[-1][part], decode), path.condition[part], paths.rewards[part])
    return surrogate.fit(), said


@torch.no_grad()
def foreseen(
    surrogate: RidgeSurrogate | None,
    critic: Critic | None,
    policy: Policy,
    sde: SDE,
    path: Trajectory,
    samples: Tensor,
    rewards: Tensor,
) -> Metrics:
    """What the value or the surrogate sees of held-out paths' rewards on the way, and how far off the surrogate is at the end.

    Args:
        surrogate: of the reward; None, or one that is not fitted yet, says nothing.
        critic: whose value is asked on the way; without a fitted one it is the surrogate at the expected sample.
        policy: whose counts of calls are left as they are.
        sde: of the paths.
        path: B held-out paths.
        samples: their decoded ends [B, ...].
        rewards: of these, [B].
    """
    metrics: Metrics = {}
    condition = path.condition
    if surrogate is not None and surrogate.fitted:
        guess = surrogate(surrogate.sees(path.xs[-1], lambda x: samples), condition)
        metrics["surrogate/heldout"] = float(guess.mean())
        metrics["surrogate/bias"], metrics["surrogate/bias_se"] = mean_and_error(guess - rewards)
        metrics["surrogate/seen"], metrics["surrogate/seen_se"] = seen(guess, rewards, condition)
    value = critic.value if critic is not None and critic.fitter.fitted else None
    if value is None and (surrogate is None or not surrogate.fitted):
        return metrics
    calls = policy.network_calls, 0 if value is None else value.calls
    for at in SEEN_AT:
        k = int((path.ts[:-1] - at).abs().argmin())
        t, x, reference = path.ts[k].expand(len(condition)), path.xs[k], path.references[k]
        if value is not None:
            guess = value.of_inputs(t, value.inputs_at(t, x, condition, reference), condition)
        else:
            assert surrogate is not None
            guess = surrogate(surrogate.sees(sde.x_data_hat(t, x, reference), policy.model.decode), condition)
        metrics[f"value/seen_{at:g}"] = seen(guess, rewards, condition)[0]
    policy.network_calls = calls[0]
    if value is not None:
        value.calls = calls[1]
    return metrics
