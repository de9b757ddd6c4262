"""`dpo`: preference pairs decide, through the denoising errors of policy and reference, with no ratio and no value.

    loss = -log sigmoid( beta [ Delta(x_w) - Delta(x_l) ] ),    Delta(x) = sum_k 1/2 E[ |e_ref|^2 - |e_theta|^2 | x ]
    e_k = gain / g (s - s(x_k | x)) sqrt(dt),  x_k = x noised to t_k, the same noise for x_w and x_l

In Wallace et al.'s letters e is an error of the noise, beta_dpo T w(t_k) is beta / 2 (gain / g sigma_k)^2 dt_k summed over
the grid's T steps, and |.|^2 is a sum over the data. Why this constant: log p_theta(x) >= const(x) - sum_k 1/2 E |e_theta|^2
(the ELBO; its gap is KL(noising path given x || policy's path given x)), so that Delta estimates log p_theta / p_ref. The
gap is zero where s_theta is the score of the noised p_theta and the SDE is memoryless (noise_level 1). Bradley and
Terry's law with R, P(w beats l) = sigmoid(R(x_w) - R(x_l)), is then met by beta log p_theta / p_ref = R + const(c).

Fixed point: with Bradley-Terry labels ("expected", "sampled", or a file's if people follow that law with R) the score of the
tilted law p_ref exp(R / beta) / Z, beta = kl_weight, whatever law the pairs were drawn from, up to the gap on a coarse
grid and the noise inside the sigmoid (`draws` 0 is least). It is not the only one: only Delta's differences are
learned, Delta itself may sink at both of a pair while the gap opens and the path KL runs away, which is what happens in
the end with the paper's loss. `consistency` c adds c beta sum_k 1/2 |e_theta|^2 of both samples, whose minimiser is the
score of the law that drew them: with pairs of the policy's own it moves no fixed point and closes the gap; with a file's
pairs it draws towards the file's law. With "hard" labels the logits grow without end, towards the argmax.

Sources: Rafailov et al. 2023 (DPO), Wallace et al. 2023 (Diffusion-DPO, arXiv 2311.12908, eq. 14).
Departs from the latter: `consistency` (0 is theirs); the expectation over noise levels is inside the sigmoid as far as
`draws` goes (theirs is one level a pair, outside: Jensen's bound); the path KL's weights, not constant ones in the noise
("epsilon" has theirs, with the same sum over the path, which at noise_level 1 is the range of log-SNR); pairs by the
reward. Their beta_dpo, 2000 to 5000 with the mean of 16384 numbers and a range of 12.4, is kl_weight 0.01 to 0.025 at
"epsilon"; their learning rate is not taken.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..control.transitions import Paths, Rows, in_parts
from ..support.errors import RunError, SettingError
from ..support.files import read_stored, write_tensors
from ..support.settings import setting
from ..types import Condition, Metrics, groups, sum_over_data
from .forward import ForwardRule


@dataclass(frozen=True)
class Pairs(Rows):
    """P pairs of samples of one prompt each, noised alike at K steps of the grid."""

    preference: Tensor  # [P] the probability that the first is the better
    difference: Tensor  # [P] sum_k 1/2 |e_ref|^2 of the first, less that of the second
    weight: Tensor  # [P, K] of each step's |e|^2 beside the path KL's
    t0: Tensor  # [P, K]
    t1: Tensor  # [P, K]
    x: Tensor  # [P, 2, K, *D]
    target: Tensor  # [P, 2, K, *D]
    condition: Condition
    steps: int


OWN_PAIRS = {"pairs_file": ("",)}


@dataclass
class DPO(ForwardRule):
    """Settings of the rule; kl_weight is beta: a reward of 1 more is worth odds of e to 1.

    pairs: which samples of a prompt are compared. rounds: of "random", a sample is in so many pairs an iteration.
    pairs_file: see `read_pairs`; no rollout is drawn and no reward asked for in training, batch_size pairs an iteration.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "minibatch_size": 64}  # rows are pairs, 2 K states each

    search: ClassVar[Mapping[str, Any]] = {"consistency": (0.1, 1.0, "log"), "rounds": [1, 2, 4]}

    pairs: Literal["random", "best_worst", "all"] = setting(
        "random",
        "Which samples of a prompt are compared: random pairs, the best with the worst, or each with each",
        needs=OWN_PAIRS,
    )
    rounds: int = setting(2, "Number of random pairs that a sample is in", 1, needs={**OWN_PAIRS, "pairs": ("random",)})
    labels: Literal["expected", "sampled", "hard"] = setting(
        "expected",
        "Who is preferred: by Bradley-Terry's probability; by a draw of it, like a person; or by the larger reward",
        needs=OWN_PAIRS,
    )
    weighting: Literal["kl", "epsilon"] = setting(
        "kl", "Weight of each time: the path KL's, or (epsilon) the same for every error of the noise, as published"
    )
    consistency: float = setting(
        0.3, "Weight of denoising both samples of a pair, in units of kl_weight; holds back the path KL", 0
    )
    pairs_file: str = setting(
        "", "Safetensors file of preferences, `chosen` and `rejected`; empty: pairs of a rollout, by the reward"
    )
    stored: tuple[Tensor, Tensor, list[str]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs_file:
            self.stored, self.own_rows = read_pairs(self.pairs_file), True
            chosen, _, prompts = self.stored
            generator = torch.Generator(next(self.policy.parameters()).device)
            shape = self.policy.prior(self.policy.condition(prompts[:1]), generator).shape[1:]
            if chosen.shape[1:] != shape:
                raise SettingError(
                    f"{self.pairs_file} holds samples of shape {tuple(chosen.shape[1:])}; the model's are {tuple(shape)}. "
                    "Store the states that its sampler ends with (before `decode`)."
                )
            self.policy.condition(sorted(set(prompts)))  # raises for a prompt that the model does not know

    def compares_samples(self) -> bool:
        return not self.pairs_file

    def rows_for(self, prompts: Sequence[str], ts: Tensor, generator: torch.Generator) -> Pairs:
        """As many of the file's pairs, at random, with the file's prompts."""
        assert self.stored is not None
        chosen, rejected, stored = self.stored
        device = generator.device
        order = torch.randperm(len(chosen), generator=generator, device=device)[: len(prompts)].cpu()
        condition = self.policy.condition([stored[i] for i in order.tolist()])
        samples = torch.stack([chosen[order], rejected[order]], dim=1).to(device)
        return self._rows(samples, torch.ones(len(order), device=device), condition, ts.to(device), generator)

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> Pairs:
        """Pairs within the prompts, who is better, and the reference's errors."""
        path, rewards = paths.trajectory, paths.rewards
        first, second = paired(self.pairs, self.rounds, rewards, path.condition, generator)
        gap = rewards[first] - rewards[second]
        preference = gap.sigmoid()
        if self.labels == "sampled":
            coin = torch.rand(gap.shape, generator=generator, device=gap.device, dtype=gap.dtype)
            preference = (coin < preference).to(gap.dtype)
        elif self.labels == "hard":
            preference = 0.5 + 0.5 * gap.sign()  # equals are a draw
        samples = path.xs[-1][torch.stack([first, second], dim=1)]
        return self._rows(samples, preference, path.condition[first], path.ts, generator)

    def _rows(
        self, samples: Tensor, preference: Tensor, condition: Condition, ts: Tensor, generator: torch.Generator
    ) -> Pairs:
        """samples [P, 2, *D], the same times and noise for both of a pair."""
        t0, t1, steps = self.times(ts, len(samples), generator)
        shape = (*t0.shape, *samples.shape[2:])
        noise = torch.randn(shape, generator=generator, device=samples.device, dtype=samples.dtype)
        both = [self.renoised(samples[:, i], ts[-1], t0, noise) for i in (0, 1)]
        x, target = torch.stack([x for x, _ in both], 1), torch.stack([s for _, s in both], 1)
        weight = torch.full_like(t0, 1.0)
        if self.weighting == "epsilon":
            weight = (self._noise_weight(*self.acting_times(ts)).mean() / self._noise_weight(t0, t1)).to(t0.dtype)
        self.metrics = {"policy/pairs": float(len(samples))}
        rows = Pairs(preference, torch.zeros_like(preference), weight, t0, t1, x, target, condition, steps)
        errors = self._errors(rows, functools.partial(in_parts, self.policy.reference_score))
        return replace(rows, difference=errors[:, 0] - errors[:, 1])

    def loss(self, rows: Pairs) -> tuple[Tensor, Metrics]:
        """-log sigmoid of the logit that the label gives, mean over pairs."""
        errors = self._errors(rows, self.policy.score)
        logit = self.kl_weight * (rows.difference - errors[:, 0] + errors[:, 1])
        losses = -rows.preference * logsigmoid(logit) - (1 - rows.preference) * logsigmoid(-logit)
        right = (logit.detach() > 0) == (rows.preference > 0.5)
        return losses.mean() + self.consistency * self.kl_weight * errors.mean(), {
            "policy/preference_accuracy": float(right.float().mean()),
            "policy/preference_logit": float(logit.detach().abs().mean()),
        }

    def _errors(self, rows: Pairs, score_of: Callable[[Tensor, Tensor, Condition], Tensor]) -> Tensor:
        """sum_k 1/2 |e_k|^2 of each sample, [P, 2]: the K steps looked at stand for all of them."""
        pairs, _, draws = shape = rows.x.shape[:3]
        index = torch.arange(pairs, device=rows.x.device).repeat_interleave(2 * draws)
        t0, t1, weight = (v.unsqueeze(1).expand(shape).flatten() for v in (rows.t0, rows.t1, rows.weight))
        x, target = rows.x.flatten(0, 2), rows.target.flatten(0, 2)
        error = self.error("kl", t0, t1, x, score_of(t0, x, rows.condition[index]), target)
        return 0.5 * rows.steps * (weight * sum_over_data(error**2)).reshape(shape).mean(2)

    def _noise_weight(self, t0: Tensor, t1: Tensor) -> Tensor:
        """|e|^2 of a step over the squared error of the noise, a number of the times alone; their shape."""
        a, b = t0.flatten(), t1.flatten()
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        kl, noise = (self.error(weighting, a, b, zero, one, zero) for weighting in ("kl", "epsilon"))
        return ((kl / noise) ** 2).reshape(t0.shape)


def paired(
    pairs: str, rounds: int, rewards: Tensor, condition: Condition, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices [P] of the first and the second of each pair; both have one prompt. Raises ValueError when none has two."""
    first: list[Tensor] = []
    second: list[Tensor] = []
    for index in groups(condition).values():
        rows = index.to(rewards.device)
        n = len(rows)
        if n < 2:
            continue
        if pairs == "best_worst":
            a, b = rewards[rows].argmax().unsqueeze(0), rewards[rows].argmin().unsqueeze(0)
            b = torch.where(a == b, (a + 1) % n, b)  # all equal: any other
        elif pairs == "all":
            a, b = torch.combinations(torch.arange(n, device=rows.device)).unbind(1)
        else:
            shuffled = [torch.randperm(n, generator=generator, device=rows.device) for _ in range(rounds)]
            a, b = torch.cat([o[: n // 2] for o in shuffled]), torch.cat([o[n // 2 : n // 2 * 2] for o in shuffled])
        first.append(rows[a])
        second.append(rows[b])
    if not first:
        raise SettingError(
            f"no prompt has two samples in a batch of {len(rewards)}; raise batch_size to at least twice the number of prompts."
        )
    return torch.cat(first), torch.cat(second)


def write_pairs(path: str | Path, chosen: Tensor, rejected: Tensor, prompts: Sequence[str]) -> None:
    """Write preferences as `read_pairs` reads them: samples [P, *D] as the model's sampler ends with, one prompt a pair."""
    write_tensors(Path(path), {"chosen": chosen, "rejected": rejected}, {"prompts": json.dumps(list(prompts))})


def read_pairs(path: str | Path) -> tuple[Tensor, Tensor, list[str]]:
    """chosen and rejected [P, *D] and the prompts, of a safetensors file whose header's metadata has `prompts` (JSON list).

    The prompts may instead be in a JSON file beside it, same name with .json: {"prompts": [...]}. Without either every
    prompt is "". Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingError(f"pairs_file {path} does not exist; write one with scoreact.algorithms.dpo.write_pairs.")
    try:
        tensors, header = read_stored(path)
    except RunError as error:
        raise SettingError(f"pairs_file {error}") from None
    for name in ("chosen", "rejected"):
        if name not in tensors:
            raise SettingError(
                f"pairs_file {path} has no tensor `{name}`, only {sorted(tensors)}; expected chosen, rejected."
            )
    chosen, rejected = tensors["chosen"].float(), tensors["rejected"].float()
    if chosen.shape != rejected.shape or chosen.ndim < 2 or len(chosen) == 0:
        raise SettingError(
            f"pairs_file {path}: chosen is {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}; expected one shape "
            "[pairs, ...] with at least one pair."
        )
    if not bool(chosen.isfinite().all() and rejected.isfinite().all()):
        raise SettingError(f"pairs_file {path} contains NaN or inf; leave those pairs out.")
    prompts = _prompts(path, header, len(chosen))
    if len(prompts) != len(chosen):
        raise SettingError(f"pairs_file {path} has {len(prompts)} prompts for {len(chosen)} pairs; give one a pair.")
    return chosen, rejected, prompts


def _prompts(path: Path, header: Mapping[str, str], count: int) -> list[str]:
    """Of the header, of the file beside, or empty ones."""
    place, beside = f"pairs_file {path}", path.with_suffix(".json")
    try:
        if "prompts" in header:
            prompts = json.loads(header["prompts"])
        elif beside.is_file():
            place = str(beside)
            prompts = json.loads(beside.read_text(encoding="utf-8"))["prompts"]
        else:
            return [""] * count
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise TypeError("it is no list of strings")
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{place}: its `prompts` cannot be read ({error}); expected a JSON list of strings."
        ) from None
    return prompts


RULES = {"dpo": DPO}
