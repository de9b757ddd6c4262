"""Returns and advantages on a time grid, written per unit time so that the number of steps does not matter.

Knows rewards, costs and values of one batch of paths; does not know networks. Shapes: per step [N, B], per state
[N + 1, B]. Sources: Schulman et al. 2016 (GAE, arXiv 1506.02438), Jia & Zhou 2022 (its continuous-time form).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.devices import in_double
from ..types import Metrics


def returns_to_go(rewards: Tensor, costs: Tensor) -> Tensor:
    """R - the costs of this step and all later ones, at every state: rewards [B], costs [N, B] -> [N + 1, B]."""
    later = costs.flip(0).cumsum(0).flip(0)
    return rewards - torch.cat([later, torch.zeros_like(rewards).unsqueeze(0)])


def gae(values: Tensor, costs: Tensor, later_costs: Tensor, ts: Tensor, trace: float) -> Tensor:
    """Advantages A_k = V_{k+1} - V_k - costs_k + the later TD errors, each discounted by trace^(time from t_{k+1}).

    values [N + 1, B] with the rewards in the last row, costs [N, B] of the step itself, later_costs [N, B] what the
    same step costs as a later one (the sampled log-ratio, a control variate, may stand for its mean there), ts [N + 1],
    trace in [0, 1]: 0 one-step increments, 1 the whole return. Returns [N, B].
    """
    increments = values[1:] - values[:-1]
    advantages = torch.empty_like(increments)
    carried = torch.zeros_like(increments[0])
    for k in reversed(range(len(increments))):
        advantages[k] = increments[k] - costs[k] + carried
        dt = float(ts[k + 1] - ts[k])
        carried = trace**dt * (increments[k] - later_costs[k] + carried) if trace > 0 else torch.zeros_like(carried)
    return advantages


def standardised_per_step(advantages: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over the batch at every step, [N, B] (the authors' published code)."""
    mean, std = advantages.mean(1, keepdim=True), advantages.std(1, keepdim=True)
    return (advantages - mean) / (std + 1e-8)


def control_variate(advantages: Tensor, candidates: Tensor, most: Tensor) -> Tensor:
    """The coefficients in [0, most] of mean-zero candidates that explain most of the advantages, by least squares.

    advantages [N, B], candidates [N, C, B], most [C] -> [N, C]. A useless candidate gets a small coefficient by itself.
    """
    batch = advantages.shape[1]
    centred = advantages - advantages.mean(1, keepdim=True)
    gram = candidates @ candidates.mT / batch
    ridge = 1e-3 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    gram = gram + ridge.reshape(-1, 1, 1) * torch.eye(gram.shape[1], device=gram.device)
    moments = torch.einsum("ncb,nb->nc", candidates, centred) / batch
    return torch.linalg.solve(gram, moments).clamp(min=0).minimum(most)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(return - V) / Var(return); 1 is perfect, 0 as good as a constant. Any equal shapes."""
    total = returns.var()
    return float(1 - (returns - values).var() / total) if float(total) > 0 else float("nan")


def slope(values: Tensor, returns: Tensor, paths: Tensor) -> Metrics:
    """The slope of returns on V, its standard error, and how good V is; all [M], paths telling whose state each is.

    Above 1 V's gradient promises less than following it brings at once: V is the optimal value, which varies less than the
    policy's, or its fit is shrunk. At the optimum the slope is 1. The error is that of clusters: the states of a path
    share their return. No slope where V is the same everywhere.
    """
    values, returns = in_double(values), in_double(returns)
    metrics = {"value/explained_variance": explained_variance(values, returns)}
    x, y = values - values.mean(), returns - returns.mean()
    spread = float(x.square().sum())
    if spread > 0:
        found = float((x * y).sum()) / spread
        _, place = paths.to(x.device).unique(return_inverse=True)
        pulls = torch.zeros_like(x).index_add_(0, place, x * (y - found * x))  # of each path on the slope
        metrics |= {"value/slope": found, "value/slope_error": float(pulls.norm()) / spread}
    return metrics


def believed(fit: Metrics, limit: float = 6.0) -> float:
    """The slope of the returns on V, as far as it is further from 1 than its standard error; in 1 / limit to limit."""
    found, error = fit.get("value/slope", 1.0), fit.get("value/slope_error", 0.0)
    gain = 1 + math.copysign(max(abs(found - 1) - error, 0.0), found - 1)
    return min(max(gain, 1 / limit), limit)
