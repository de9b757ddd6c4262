"""A stand-in for a reward without a gradient, solved for in closed form from finished samples: `RidgeSurrogate`.

    R(x, c) ~ link(m + w . phi(x, c)),   phi = [z, z (x) q, BIAS q, l],   q the words of the prompt, a unit vector

z are features of the decoded sample under a network that nobody trained (`random_features`), standardised; l is how well
they tell the prompt (`PromptLikelihood`). w is the ridge regression's in its dual form, with one equation a sample whatever
the number of prompts:

    w = Phi^T G^-1 (y - m),   G = Phi Phi^T + ridge I,
    Phi Phi^T = Z Z^T * (1 + Q Q^T) + BIAS^2 Q Q^T + L L^T   (* entry by entry)

Its gradient costs no reward call. The posterior variance phi . phi - phi Phi^T G^-1 Phi phi says where it knows least, so where
to ask the reward (`choose`). Does not know paths or policies: rules follow it as they would follow the reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.prompt_words import bag_of_words
from ..rewards.sample_features import Pixels, random_features
from ..support import distributed
from ..support.errors import SettingError
from ..support.loading import load_named
from ..types import Condition, Metrics
from .advantage import explained_variance
from .prompt_likelihood import PromptLikelihood
from .ridge_decoder import RidgeDecoder
from .value_fit import logit_of

BIAS = 3.0  # prior standard deviation of a prompt's offset, that of the features together being 1
RIDGES = tuple(
    10 ** (0.5 * k) for k in range(-4, 3)
)  # variance of what phi cannot say over the prior variance of w . phi
LIMIT = 8.0  # of the logit of a log-probability: beyond it the reward changes by less than 4e-4
WORDS = 512  # words that are told apart; of more of them the hashes are (`bag_of_words`)


def features_by_name(name: str, samples: Tensor) -> nn.Module:
    """What a surrogate sees of decoded samples like these [B, *D]: a network, samples -> features [B, F].

    Args:
        name: "convolution" (`random_features`), "pixels", or "file.py:function". The function is called without
            arguments and returns the network, or is itself one that maps samples to features.
        samples: at least one, decoded.
    Raises:
        SettingError: the network does not take such samples, or gives no features [B, F] of them.
    """
    if name == "convolution":
        return random_features(samples)
    if name == "pixels":
        if samples.ndim != 4:
            raise SettingError(
                f"surrogate_features is 'pixels', but a sample has shape {tuple(samples.shape[1:])}; use convolution."
            )
        return Pixels()
    network = load_named(name, "surrogate_features")
    if not isinstance(network, nn.Module):
        network = network()
    if not isinstance(network, nn.Module):
        raise SettingError(
            f"surrogate_features {name!r} is a {type(network).__name__}; it has to be a torch.nn.Module that maps samples "
            "[B, ...] to features [B, F], or a function without arguments that returns one."
        )
    network = network.to(samples.device).eval().requires_grad_(False)
    try:
        with torch.no_grad():
            found = network(samples)
        shape = tuple(found.shape)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise SettingError(
            f"surrogate_features {name!r} does not take samples of shape {tuple(samples.shape)} "
            f"({' '.join(str(error).split())[:160]})."
        ) from error
    if len(shape) != 2 or shape[0] != len(samples):
        raise SettingError(
            f"surrogate_features {name!r} gives shape {shape} for {len(samples)} samples; expected [B, F]: flatten or pool "
            "what it gives."
        )
    return network


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
        likelihood: bool = False,
        decoder: RidgeDecoder | None = None,
    ) -> None:
        """Not fitted yet.

        Args:
            network: decoded samples [B, *D] -> features [B, F].
            prompts: those whose words get weights of their own.
            log_probability: kl_weight where the reward / kl_weight is a log-probability; None: the link is the identity.
            most: how many samples it remembers, the newest.
            likelihood: whether how well a sample tells its prompt is a feature.
            decoder: its own, of latents; "samples" are then latents everywhere here, and `sees` says which it wants.
        """
        self.network, self.most, self.reads_prompts = network, most, likelihood
        self.decoder = decoder
        self.words = words_of(prompts)
        self.hashes_words = len(self.words) > WORDS
        self.log_probability = log_probability
        self.seen: dict[str, Tensor] = {}  # features [n, F], words [n, Q], targets [n]; on the CPU
        # features and words of samples whose reward nobody asked, until the first fit
        self.unscored: dict[str, Tensor] = {}
        self.fitted: dict[str, Tensor] = {}  # mean, std [F]; level []; common [F], by_word [F, Q], offset [Q], told []
        self.likelihood: PromptLikelihood | None = None
        self.ridge = math.nan
        self.explained = math.nan  # share of the newest rewards' variance, by the fit that had not seen them

    def sees(self, x_data: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """Of final states [B, *D] or estimates of them what is a sample here: decoded by `decode`, or as they are."""
        return decode(x_data) if self.decoder is None else x_data

    def features(self, samples: Tensor) -> Tensor:
        """[B, F] of samples."""
        found: Tensor = self.network(samples if self.decoder is None else self.decoder(samples))
        return found

    @torch.no_grad()
    def look(self, samples: Tensor, condition: Condition) -> None:
        """Remember samples without their rewards: of the pretrained model, before the first fit."""
        for name, rows in self._described(samples, condition).items():
            self.unscored[name] = torch.cat([self.unscored.get(name, rows[:0]), rows])

    @torch.no_grad()
    def add(self, samples: Tensor, condition: Condition, rewards: Tensor) -> None:
        """Remember decoded samples and their rewards [B]."""
        if self.fitted:
            self.explained = explained_variance(self(samples, condition), rewards)
        new = {**self._described(samples, condition), "targets": distributed.gathered(self._target(rewards)).cpu()}
        self.seen = {k: torch.cat([self.seen.get(k, v[:0]), v])[-self.most :] for k, v in new.items()}

    def _described(self, samples: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Features and words of samples, of all processes, on the CPU."""
        return {
            "features": distributed.gathered(self.features(samples)).cpu(),
            "words": distributed.gathered(self.bag(condition)),
        }

    @torch.no_grad()
    def fit(self) -> Metrics:
        """Solve for w on what is remembered; the first time the ridge is chosen, by the error on every fourth sample."""
        if not self.fitted:
            self._begin()
        z, q, y = self._z(self.seen["features"]), self.seen["words"].double(), self.seen["targets"].double()
        level, scale = y.mean(), y.std().clamp(min=1e-6)
        y = (y - level) / scale
        told = self._told(z, q)
        gram = prompt_kernel(z, q, told)  # in float64 and so on the CPU: samples that are alike make it nearly singular
        if math.isnan(self.ridge):
            errors = {ridge: left_out_error(gram, y, ridge) for ridge in RIDGES}
            self.ridge = min(RIDGES, key=errors.__getitem__)
            self.explained = 1 - errors[self.ridge]
        dual = scale * ridge_solve(gram, y, self.ridge)
        weighted = dual[:, None] * z
        self.fitted |= {
            "level": level, "common": weighted.sum(0), "by_word": weighted.T @ q, "offset": BIAS**2 * (dual @ q),
            "told": dual @ told,
        }  # fmt: skip
        self.fitted = {name: tensor.to(self._device, torch.float32) for name, tensor in self.fitted.items()}
        decoded = {} if self.decoder is None else {"surrogate/decoder": float(self.decoder.share)}
        return {"surrogate/explained_variance": self.explained, "surrogate/samples": float(len(y)), **decoded}

    def _begin(self) -> None:
        """The features' scale and the prompts' likelihood, from every sample that was shown before the first fit."""
        names = ("features", "words")
        features, q = (torch.cat([self.seen[n], self.unscored.get(n, self.seen[n][:0])]).double() for n in names)
        self.unscored = {}
        self.fitted["mean"] = features.mean(0)
        self.fitted["std"] = (features.std(0) + 1e-4) * math.sqrt(features.shape[1])
        if self.reads_prompts and len(torch.unique(q, dim=0)) > 1:
            self.likelihood = PromptLikelihood(self._z(features), q)

    def _z(self, features: Tensor) -> Tensor:
        """Standardised, in float64 on the CPU."""
        mean, std = (self.fitted[name].cpu().double() for name in ("mean", "std"))
        return (features.double() - mean) / std

    def _told(self, z: Tensor, q: Tensor) -> Tensor:
        return z.new_zeros(len(z)) if self.likelihood is None else self.likelihood(z, q)

    @property
    def _device(self) -> torch.device:
        found = next(self.network.buffers(), next(self.network.parameters(), None))
        return torch.device("cpu") if found is None else found.device

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        return self.of_features(self.features(samples), condition)

    def of_features(self, features: Tensor, condition: Condition) -> Tensor:
        """The stand-in at features [B, F] of `network`: [B]."""
        f, q = self.fitted, self.bag(condition).to(features.device)
        z = (features - f["mean"]) / f["std"]
        output = f["level"] + z @ f["common"] + ((z @ f["by_word"]) * q).sum(1) + q @ f["offset"]
        if self.likelihood is not None:
            output = output + f["told"] * self.likelihood(z, q)
        if self.log_probability is None:
            return output
        return self.log_probability * F.logsigmoid(output)

    @torch.no_grad()
    def choose(self, samples: Tensor, condition: Condition, count: int) -> Tensor:
        """The `count` of samples [B, *D] whose rewards say most, as row numbers [count] in increasing order.

        One after another the sample at which the posterior variance is largest, given those seen and those chosen: greedy
        D-optimal design. Knows no reward.
        """
        new = {"features": self.features(samples).cpu(), "words": self.bag(condition)}
        # before the first fit nothing gives the features a scale but themselves
        seen = self.seen if self.fitted else {}
        words = torch.cat([seen.get("words", new["words"][:0]), new["words"]]).double()
        if self.fitted:
            z = self._z(torch.cat([seen["features"], new["features"]]))
            told = self._told(z, words)
        else:
            z = new["features"].double()
            z = (z - z.mean(0)) / ((z.std(0) + 1e-4) * math.sqrt(z.shape[1]))
            told = z.new_zeros(len(z))
        known = len(words) - len(samples)
        gram, ridge = prompt_kernel(z, words, told), RIDGES[2] if math.isnan(self.ridge) else self.ridge
        if known:  # condition on those seen
            factor = torch.linalg.cholesky(gram[:known, :known] + ridge * torch.eye(known).to(gram))
            half = torch.linalg.solve_triangular(factor, gram[:known, known:], upper=False)
            gram = gram[known:, known:] - half.T @ half
        chosen = torch.zeros(len(samples), dtype=torch.bool)
        for _ in range(count):
            best = int(gram.diagonal().masked_fill(chosen, -torch.inf).argmax())
            chosen[best] = True
            gram = gram - torch.outer(gram[:, best], gram[best]) / (gram[best, best] + ridge)
        return torch.nonzero(chosen).flatten()

    def bag(self, condition: Condition) -> Tensor:
        """q [B, Q]: the words of each prompt as a unit vector; words that are not known are left out."""
        if self.hashes_words:
            return F.normalize(bag_of_words(condition.prompts, WORDS), dim=1)
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
        told = None if self.likelihood is None else self.likelihood.tensors
        own = {"ridge": self.ridge, "explained": self.explained, "likelihood": told}
        decoder = None if self.decoder is None else self.decoder.state_dict()
        return {
            "seen": self.seen,
            "fitted": self.fitted,
            "network": self.network.state_dict(),
            "decoder": decoder,
            **own,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.fitted = dict(state["seen"]), dict(state["fitted"])
        self.ridge, self.explained = state["ridge"], state["explained"]
        told = state.get("likelihood")  # runs of 0.2 have none
        self.likelihood = None if told is None else PromptLikelihood.of(told)
        self.network.load_state_dict(state["network"])
        if self.decoder is not None:
            self.decoder.load_state_dict(state["decoder"])


def prompt_kernel(z: Tensor, q: Tensor, told: Tensor) -> Tensor:
    """Phi Phi^T [n, n] for z [n, F], q [n, Q] and l `told` [n]."""
    same = q @ q.T
    return (z @ z.T) * (1 + same) + BIAS**2 * same + torch.outer(told, told)


def ridge_solve(gram: Tensor, y: Tensor, ridge: float) -> Tensor:
    """(gram + ridge I)^-1 y, [n]."""
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)).to(gram))
    return torch.cholesky_solve(y[:, None], factor)[:, 0]


def left_out_error(gram: Tensor, y: Tensor, ridge: float) -> float:
    """Mean square of the error at every fourth sample of the fit to the others."""
    kept = torch.arange(len(y), device=y.device) % 4 > 0
    error = y[~kept] - gram[~kept][:, kept] @ ridge_solve(gram[kept][:, kept], y[kept], ridge)
    return float(error.square().mean())
