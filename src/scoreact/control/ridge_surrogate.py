"""A stand-in for a reward without a gradient, solved for in closed form from finished samples: `RidgeSurrogate`.

    R(x, c) ~ link(m + w . phi(x, c)),   phi = [z, z (x) q, BIAS q],   q the words of the prompt, a unit vector

z are features of the decoded sample under a network that nobody trained (`random_features`), standardised. w is the ridge
regression's in its dual form, with one equation a sample whatever the number of prompts:

    w = Phi^T (Phi Phi^T + ridge I)^-1 (y - m),   Phi Phi^T = Z Z^T * (1 + Q Q^T) + BIAS^2 Q Q^T   (* entry by entry)

Its gradient costs no reward call. Does not know paths or policies: rules follow it as they would follow the reward.
Source of the features: Rahimi & Recht 2007, in their convolutional form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support import distributed
from ..types import Condition, Metrics
from .advantage import explained_variance
from .value_fit import logit_of

BIAS = 3.0  # prior standard deviation of a prompt's offset, that of the features together being 1
RIDGES = tuple(
    10 ** (0.5 * k) for k in range(-4, 3)
)  # variance of what phi cannot say over the prior variance of w . phi
LIMIT = 8.0  # of the logit of a log-probability: beyond it the reward changes by less than 4e-4
SIDE = 64  # pixels: larger pictures are averaged down to about this


class RandomConvolution(nn.Module):
    """Pictures [B, C, H, W] -> mean and root mean square of 64 random channels, mean slopes and level, [B, 131].

    Smooth and averaged over positions: a surrogate is followed by its gradient, and with maxima or ReLU that is many
    times noisier where it explains the reward no better.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 7, stride=2, padding=3), nn.SiLU(), nn.Conv2d(32, 64, 3, padding=1), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, max(1, min(x.shape[2:]) // SIDE))
        h = self.layers(x).flatten(2)
        slopes = [(x.diff(dim=axis).square() + 1e-6).sqrt().mean((1, 2, 3)) for axis in (3, 2)]
        sizes = (h.square().mean(2) + 1e-4).sqrt()
        return torch.cat([h.mean(2), sizes, torch.stack([*slopes, x.mean((1, 2, 3))], dim=1)], dim=1)


class RandomLayer(nn.Module):
    """Anything else [B, *D] -> its numbers and 128 smooth random functions of them."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 128), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([x, self.layers(x)], dim=1)


def random_features(samples: Tensor, seed: int = 0) -> nn.Module:
    """An untrained network on decoded samples like these: samples [B, *D] -> [B, F]. The same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        picture = samples.ndim == 4
        network = RandomConvolution(samples.shape[1]) if picture else RandomLayer(samples[0].numel())
    return network.to(samples.device).requires_grad_(False)


def words_of(prompts: Sequence[str]) -> dict[str, int]:
    """A number for each word of the prompts, in order of appearance."""
    return {word: i for i, word in enumerate(dict.fromkeys(w for prompt in prompts for w in _words(prompt)))}


def _words(prompt: str) -> list[str]:
    return prompt.lower().split() or [""]


class RidgeSurrogate:
    """Fitted to all samples ever added (the newest `most` of them). Called like a reward: (samples, condition) -> [B].

    log_probability: the reward / kl_weight is a log-probability; its logit is what is regressed, and the link is
    kl_weight log sigmoid.
    """

    differentiable = True
    name = "surrogate"

    def __init__(
        self,
        network: nn.Module,
        prompts: Sequence[str],
        log_probability: float | None = None,
        most: int = 3072,
    ) -> None:
        """Not fitted yet.

        Args:
            network: decoded samples [B, *D] -> features [B, F].
            prompts: those whose words get weights of their own.
            log_probability: kl_weight where the reward / kl_weight is a log-probability; None: the link is the identity.
            most: how many samples it remembers, the newest.
        """
        self.network, self.most = network, most
        self.words = words_of(prompts)
        self.log_probability = log_probability
        self.seen: dict[str, Tensor] = {}  # features [n, F], words [n, Q], targets [n]; on the CPU
        self.fitted: dict[str, Tensor] = {}  # mean, std [F]; level []; common [F], by_word [F, Q], offset [Q]
        self.ridge = math.nan
        self.explained = math.nan  # share of the newest rewards' variance, by the fit that had not seen them

    @torch.no_grad()
    def add(self, samples: Tensor, condition: Condition, rewards: Tensor) -> None:
        """Remember decoded samples and their rewards [B]."""
        if self.fitted:
            self.explained = explained_variance(self(samples, condition), rewards)
        new = {
            "features": distributed.gathered(self.network(samples)).cpu(),
            "words": distributed.gathered(self.bag(condition)),
            "targets": distributed.gathered(self._target(rewards)).cpu(),
        }
        self.seen = {k: torch.cat([self.seen.get(k, v[:0]), v])[-self.most :] for k, v in new.items()}

    @torch.no_grad()
    def fit(self) -> Metrics:
        """Solve for w on what is remembered; the first time the ridge is chosen, by the error on every fourth sample."""
        features, q, y = (self.seen[name].double() for name in ("features", "words", "targets"))
        if not self.fitted:
            self.fitted["mean"] = features.mean(0)
            self.fitted["std"] = (features.std(0) + 1e-4) * math.sqrt(features.shape[1])
        z = (features - self.fitted["mean"].to(features)) / self.fitted["std"].to(features)
        level, scale = y.mean(), y.std().clamp(min=1e-6)
        y = (y - level) / scale
        gram = prompt_kernel(z, q)  # in float64 and so on the CPU: samples that are alike make it nearly singular
        if math.isnan(self.ridge):
            errors = {ridge: left_out_error(gram, y, ridge) for ridge in RIDGES}
            self.ridge = min(RIDGES, key=errors.__getitem__)
            self.explained = 1 - errors[self.ridge]
        dual = scale * ridge_solve(gram, y, self.ridge)
        weighted = dual[:, None] * z
        self.fitted |= {
            "level": level, "common": weighted.sum(0), "by_word": weighted.T @ q, "offset": BIAS**2 * (dual @ q),
        }  # fmt: skip
        device = next(self.network.buffers(), next(self.network.parameters(), level)).device
        self.fitted = {name: tensor.to(device, torch.float32) for name, tensor in self.fitted.items()}
        return {"surrogate/explained_variance": self.explained, "surrogate/samples": float(len(y))}

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        f, q = self.fitted, self.bag(condition).to(samples.device)
        z = (self.network(samples) - f["mean"]) / f["std"]
        output = f["level"] + z @ f["common"] + ((z @ f["by_word"]) * q).sum(1) + q @ f["offset"]
        if self.log_probability is None:
            return output
        return self.log_probability * F.logsigmoid(output)

    def bag(self, condition: Condition) -> Tensor:
        """q [B, Q]: the words of each prompt as a unit vector; words that are not known are left out."""
        found = torch.zeros(len(condition), len(self.words))
        for row, prompt in enumerate(condition.prompts):
            for word in _words(prompt):
                if word in self.words:
                    found[row, self.words[word]] = 1.0
        return F.normalize(found, dim=1)

    def _target(self, rewards: Tensor) -> Tensor:
        if self.log_probability is None:
            return rewards
        return logit_of(rewards / self.log_probability).clamp(-LIMIT, LIMIT)

    def state_dict(self) -> dict[str, Any]:
        own = {"ridge": self.ridge, "explained": self.explained}
        return {"seen": self.seen, "fitted": self.fitted, "network": self.network.state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.fitted = dict(state["seen"]), dict(state["fitted"])
        self.ridge, self.explained = state["ridge"], state["explained"]
        self.network.load_state_dict(state["network"])


def prompt_kernel(z: Tensor, q: Tensor) -> Tensor:
    """Phi Phi^T [n, n] for z [n, F] and q [n, Q]."""
    same = q @ q.T
    return (z @ z.T) * (1 + same) + BIAS**2 * same


def ridge_solve(gram: Tensor, y: Tensor, ridge: float) -> Tensor:
    """(gram + ridge I)^-1 y, [n]."""
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)).to(gram))
    return torch.cholesky_solve(y[:, None], factor)[:, 0]


def left_out_error(gram: Tensor, y: Tensor, ridge: float) -> float:
    """Mean square of the error at every fourth sample of the fit to the others."""
    kept = torch.arange(len(y), device=y.device) % 4 > 0
    error = y[~kept] - gram[~kept][:, kept] @ ridge_solve(gram[kept][:, kept], y[kept], ridge)
    return float(error.square().mean())
