"""Guarding a run against its own reward: drift from the reference, the price of path KL, and what looks wrong.

Knows held-out metrics and samples; does not know networks, optimisers or files. Three parts: `KLPrice` steers the path KL
to a target, `optimal_kl` says how many nats the optimum itself spends, and `Guard` compares held-out evaluations with the
pretrained model's and puts what it finds into sentences.
Sources: Ziegler et al. 2019 (adaptive KL weight, arXiv 1909.08593), Gao, Schulman & Hilton 2022 (overoptimisation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..evaluation.evaluate import Features, Judge
from ..evaluation.metrics import feature_statistics, frechet_distance
from ..rewards.check import unchanged
from ..types import Condition, Metrics
from .config import Config

SMALL = 64  # numbers a sample: up to here the samples are their own features
SLACK = 1.5  # path KL over this many times what the optimum needs is waste
BLIND = 0.05  # share of the reward's variance below which a surrogate's gradient is not worth following
MOVED = 0.01  # nats of path KL, from which on a policy is another than the pretrained model
NOISE = 3.0  # standard errors beyond which a change is one
PARTS = 5  # of the jackknife that gives the judge's noise
PLAIN = ("start", "judge_parts", "judge_noise", "floor", "falling", "active", "best_is_clean")  # stored as they are
# in a judge's metric names: the larger the worse, the larger the better; metrics with none of these words are not watched
WORSE = ("error", "distance", "frechet", "fid", "kid", "loss", "artifact")
BETTER = ("property", "accuracy", "precision", "recall", "coverage", "quality", "aesthetic", "preference", "score")


class Finding(NamedTuple):
    """One thing that looks wrong: its kind, or the judge's metric; its value and the limit it passed."""

    kind: str
    text: str
    value: float
    limit: float

    def line(self) -> dict[str, Any]:
        """As a metrics line."""
        return {"guard": self.kind, "text": self.text, "guard/value": self.value, "guard/limit": self.limit}


@dataclass
class Guard:
    """Held-out evaluations against the pretrained model's, which is the first one, on the same noise and prompts.

    mode: "off" (never says anything), "warn" (says it, and keeps weights with a finding out of best/), "stop" (ends the
    run too). target_kl > 0: nats within it are free (see `score`). Whatever the price of path KL has become, J and J*
    are those of the original kl_weight.
    """

    kl_weight: float
    mode: str = "warn"
    target_kl: float = 0.0
    least_diversity: float = 0.5
    patience: int = 4
    features: Features | None = None
    judge: Judge | None = None
    start: Metrics = field(default_factory=dict)  # the first evaluation
    # the judge's metrics there, a fifth of the samples left out in turn
    judge_parts: dict[str, list[float]] = field(default_factory=dict)
    judge_noise: Metrics = field(default_factory=dict)  # their standard errors; later those of the change since then
    reference: tuple[Tensor, Tensor] | None = None  # mean and covariance of its samples' features
    floor: float | None = None  # Frechet distance of the reference to itself, another seed
    falling: int = 0  # evaluations in a row with the score falling while the training reward rose
    active: list[str] = field(default_factory=list)  # kinds of finding at the last evaluation
    best: float = -math.inf
    best_is_clean: bool = False
    others: list[Tensor] = field(default_factory=list)  # features of the reference's other samples, for the floor

    # --- samples

    def remember(self, decode: Callable[[Tensor], Tensor], x_end: Tensor, wanted: int) -> None:
        """Ends of the reference's paths from other noise; the first `wanted` give the floor of the Frechet distance."""
        missing = wanted - sum(map(len, self.others))
        points = self._points(decode(x_end[:missing])) if missing > 0 else None
        if points is not None:
            self.others.append(points)

    @torch.no_grad()
    def look_at_samples(self, samples: Tensor, condition: Condition, first: bool) -> Metrics:
        """Drift of an evaluation's samples from the pretrained model's, and the judge's metrics."""
        with unchanged("the judge", samples):
            metrics = dict(self.judge(samples, condition)) if self.judge is not None else {}
        points = self._points(samples)
        parts = self._left_out(samples, condition, metrics)
        if first:
            self.judge_parts, self.judge_noise = parts, {n: _jackknife(v, len(samples)) for n, v in parts.items()}
            self._set_reference(points)
        else:  # the same noise and prompts: what both have in common is no error of the change
            for name in parts.keys() & self.judge_parts.keys():
                change = [now - then for now, then in zip(parts[name], self.judge_parts[name], strict=True)]
                self.judge_noise[name] = _jackknife(change, len(samples))
        if self.reference is not None and points is not None and bool(points.isfinite().all()):
            # above 0: rounding, where there are fewer samples than features
            metrics["drift/frechet"] = max(0.0, frechet_distance(*self.reference, *feature_statistics(points)))
            if self.floor is not None:
                metrics["drift/frechet_floor"] = self.floor
        return metrics

    def _points(self, decoded: Tensor) -> Tensor | None:
        """Features [B, F], or the samples themselves where they are small; None: no space to measure in."""
        if len(decoded) < 2:
            return None
        if self.features is not None:
            with unchanged("features", decoded):
                return self.features(decoded).detach().cpu().double()
        return decoded.detach().cpu().flatten(1).double() if decoded[0].numel() <= SMALL else None

    def _set_reference(self, points: Tensor | None) -> None:
        if points is None or not bool(points.isfinite().all()):
            return
        self.reference = feature_statistics(points)
        if self.others:
            other = torch.cat(self.others)
            size = min(len(other), len(points))  # a Frechet distance depends on the number of samples
            self.floor = frechet_distance(*feature_statistics(points[:size]), *feature_statistics(other[:size]))
        self.others = []

    def _left_out(self, samples: Tensor, condition: Condition, whole: Metrics) -> dict[str, list[float]]:
        """The judge's watched metrics that say no error of their own, with a fifth of the samples left out in turn."""
        watched = [name for name in whole if _worse_if(name) and f"{name}_se" not in whole]
        if self.judge is None or self.mode == "off" or not watched or len(samples) < 2 * PARTS:
            return {}
        number = torch.arange(len(samples))
        found: dict[str, list[float]] = {name: [] for name in watched}
        for part in range(PARTS):
            kept = torch.nonzero(number % PARTS != part).flatten()
            metrics = self.judge(samples[kept.to(samples.device)], condition[kept])
            for name in watched:
                found[name].append(metrics[name])
        return found

    # --- evaluations

    def score(self, m: Metrics) -> float:
        """What best/ holds the most of: J; with a target, the reward less kl_weight for each nat beyond the target."""
        if self.target_kl > 0 and "policy/kl" in m:
            return m["reward/heldout"] - self.kl_weight * max(0.0, m["policy/kl"] - self.target_kl)
        return m["objective/J"]

    def look(
        self, m: Metrics, before: Metrics, reference: Metrics, reward_rises: bool
    ) -> tuple[list[Finding], str | None, bool]:
        """Of an evaluation: findings that the last one did not have, why to stop, and whether these are the best weights.

        before: the evaluation before; reference: J* and KL*; reward_rises: the training reward did since then.
        """
        j, noise = self.score(m), 2 * m["objective/J_se"]
        fell = reward_rises and j < self.score(before) - noise
        self.falling = self.falling + 1 if fell else 0
        findings = [] if self.mode == "off" else self.findings(m, reference)
        if self.mode != "off" and (unsure := self._unsure(m, before)) is not None:
            findings.append(unsure)
        clean = not findings
        if fell and self.mode != "off":
            text = (
                f"held-out {self._score_name()} fell from {self.score(before):.3g} to {j:.3g} while the training reward "
                "rose: the reward is being over-optimised. Raise kl_weight or lower learning_rate."
            )
            findings.insert(0, Finding("objective", text, j, self.score(before) - noise))
        best = (clean, j) > (self.best_is_clean, self.best)
        if best:
            self.best_is_clean, self.best = clean, j
        new = [finding for finding in findings if finding.kind not in self.active]
        self.active = [finding.kind for finding in findings]
        return new, self._stop(findings, j), best

    def _score_name(self) -> str:
        return f"reward within {self.target_kl:g} nats" if self.target_kl > 0 else "J"

    def _stop(self, findings: list[Finding], j: float) -> str | None:
        if self.mode == "off":
            return None
        if self.falling >= self.patience:
            return (
                f"held-out {self._score_name()} fell {self.falling} evaluations in a row (to {j:.3f}) while the training "
                "reward rose; the reward is being over-optimised. The best weights are in best/. Raise kl_weight or lower "
                "learning_rate."
            )
        serious = [finding.text for finding in findings if finding.kind != "objective"]
        if self.mode == "stop" and serious:
            kept = "those before that" if self.best_is_clean else "those with the highest score so far"
            return f"the guard stopped it: {serious[0]} The weights in best/ are {kept}."
        return None

    def findings(self, m: Metrics, reference: Metrics) -> list[Finding]:
        """What is wrong with an evaluation, whatever the others said."""
        found = [
            self._wasted(m, reference), self._collapsed(m), self.blind(m), self._fooled(m),
            *(self._worsened(m, name) for name in m),
        ]  # fmt: skip
        return [finding for finding in found if finding is not None]

    def _wasted(self, m: Metrics, reference: Metrics) -> Finding | None:
        """Path KL beyond what it can be good for, at the price kl_weight. Two bounds, both from J(P) = E_P R - beta KL(P):

        J(P) >= J_ref, that is KL <= (R - J_ref) / beta: beyond it the pretrained model is the better one, whatever J* is.
        KL <= KL*: by J(P) = J* - beta KL(P | P*) the frontier of reward over KL has slope beta at KL* and falls off
        after it, so every nat beyond KL* costs more than any policy can earn with it. Needs KL* exact or J* trusted;
        SLACK and the errors on both sides are allowed for.
        """
        if "policy/kl" not in m or "objective/J" not in self.start:
            return None
        kl, beta, error = m["policy/kl"], self.kl_weight, m.get("policy/kl_se", 0.0)
        free = SLACK * self.target_kl
        gained = m["reward/heldout"] - self.start["objective/J"]
        paid = gained / beta
        noise = NOISE * math.hypot(m["objective/J_se"], self.start.get("objective/J_se", 0.0)) / beta
        if kl > max(free, paid + noise):
            return Finding(
                "kl",
                f"path KL is {kl:.3g} nats, but the reward gained ({gained:.3g}) pays for {max(paid, 0.0):.3g} at "
                f"kl_weight {beta:g}: the pretrained model has the higher J. Raise kl_weight or lower learning_rate.",
                kl,
                paid,
            )
        needed, needed_error = known_kl(reference)
        if not math.isnan(needed) and kl > max(free, SLACK * needed + NOISE * math.hypot(error, needed_error)):
            return Finding(
                "kl",
                f"path KL is {kl:.3g} nats, but the optimum at kl_weight {beta:g} needs {needed:.3g}: the nats beyond cost "
                "more than they can bring. Train longer, raise kl_weight or lower learning_rate.",
                kl,
                needed,
            )
        return None

    def _collapsed(self, m: Metrics) -> Finding | None:
        now, then = m.get("sample/diversity", math.nan), self.start.get("sample/diversity", math.nan)
        if now < self.least_diversity * then:
            return Finding(
                "diversity",
                f"diversity fell to {now:.3g}, {now / then:.0%} of the pretrained model's {then:.3g} (least_diversity is "
                f"{self.least_diversity:g}): samples of a prompt are becoming alike. Raise kl_weight or set target_kl.",
                now,
                self.least_diversity * then,
            )
        return None

    def blind(self, m: Metrics) -> Finding | None:
        """A surrogate that sees nothing of the reward: its gradient is noise."""
        share, error = m.get("surrogate/seen", math.nan), m.get("surrogate/seen_se", math.nan)
        if share + NOISE * error < BLIND or share < error:
            return Finding(
                "surrogate",
                f"the surrogate sees {share:.2f} \u00b1 {error:.2f} of the reward's variance among samples of a prompt, so its "
                "gradient says next to nothing of the reward. Let it see more (surrogate_features, scored_samples, "
                "reference_batches), or take --algorithm ctrl --value residual, or a rule without a surrogate such as ddpo.",
                share,
                BLIND,
            )
        return None

    def _unsure(self, m: Metrics, before: Metrics) -> Finding | None:
        """A learned reward that rises where no answers were given: by less than its own uncertainty.

        One standard error is enough: both evaluations are of the same noise.
        """
        lower, then = m.get("reward/cautious", math.nan), before.get("reward/cautious", math.nan)
        if lower < then - m["objective/J_se"] and m["reward/heldout"] > before["reward/heldout"]:
            return Finding(
                "uncertainty",
                f"the held-out reward rose to {m['reward/heldout']:.3g}, but less one sigma of what the answers leave open it "
                f"fell from {then:.3g} to {lower:.3g}: the policy goes where no answers were given. Set --reward-option "
                "caution=1, raise kl_weight, or collect answers there (scoreact rate RUN).",
                lower,
                then,
            )
        return None

    def _fooled(self, m: Metrics) -> Finding | None:
        """A policy that pleases the surrogate more than the reward, by more than half of what the reward gained."""
        bias, error = m.get("surrogate/bias", math.nan), m.get("surrogate/bias_se", math.nan)
        gained = m.get("reward/heldout", math.nan) - self.start.get("reward/heldout", math.nan)
        limit = NOISE * error + 0.5 * max(0.0, gained)
        if bias - max(0.0, self.start.get("surrogate/bias", 0.0)) > limit:
            return Finding(
                "surrogate",
                f"by the surrogate held-out samples are worth {bias:.3g} more than by the reward, which gained {gained:.3g}: "
                "the policy follows what the surrogate does not know. Ask more rewards (scored_samples), let it see more "
                "(surrogate_features), or raise kl_weight.",
                bias,
                limit,
            )
        return None

    def _worsened(self, m: Metrics, name: str) -> Finding | None:
        """A judge's metric worse than at the start by more than the noise of the change."""
        sign, then, now = _worse_if(name), self.start.get(name, math.nan), m[name]
        then_error = self.start.get(f"{name}_se", math.nan)
        noise = NOISE * self.judge_noise.get(name, math.hypot(then_error, m.get(f"{name}_se", then_error)))
        if sign and sign * (now - then) > noise:
            return Finding(
                name,
                f"{name} worsened from {then:.3g} to {now:.3g}, beyond its noise ({noise:.2g}): the reward improves "
                "at the cost of what it does not know. Raise kl_weight or set target_kl.",
                now,
                then + sign * noise,
            )
        return None

    # --- a resume

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "best": self.best if math.isfinite(self.best) else None,
            "reference": None if self.reference is None else list(self.reference),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in PLAIN:
            setattr(self, name, state[name])
        self.best = -math.inf if state["best"] is None else state["best"]
        stored = state["reference"]
        self.reference = None if stored is None else (stored[0].cpu(), stored[1].cpu())


def unmoved(final: Metrics, reference: Metrics, iterations: Sequence[Mapping[str, Any]], config: Config) -> str | None:
    """That a policy is still the pretrained model, and what to raise; None where it has moved.

    final: an evaluation; iterations: the metrics of each so far.
    """
    kl, needed = final.get("policy/kl", math.nan), known_kl(reference)[0]
    if not iterations or not kl < MOVED or kl > 0.1 * needed:
        return None
    beside = f", of {needed:.2g} that the optimum has" if needed == needed else ""
    said = f"after {len(iterations)} iterations the policy has hardly moved: path KL is {kl:.2g} nats{beside}."
    shares = sorted(line.get("policy/step_share", 1.0) for line in iterations)
    if all(line.get("policy/gradient_norm", 1.0) == 0 for line in iterations):
        return f"{said} Its gradient was 0 in every iteration: advantages vanish, as where a prompt's rewards do not differ."
    share = shares[len(shares) // 2]
    if share < 0.5:
        return f"{said} Half of the steps were shortened to {share:.0%} or less; raise max_kl ({config.max_kl:g})."
    if config.uses("learning_rate"):
        rate = f"learning_rate ({config.learning_rate:g}), tenfold for a start"
        return f"{said} Raise {rate}, or iterations ({config.iterations})."
    return f"{said} Raise max_kl ({config.max_kl:g}) or iterations ({config.iterations})."


def rounded_away(found: Metrics, config: Config) -> str | None:
    """That rounding alone costs more path KL than a step may have; None where it does not."""
    cost = found.get("policy/kl_rounding", 0.0)
    if not config.uses("max_kl") or cost <= config.max_kl:
        return None
    return (
        f"rounding alone costs {cost:.2g} nats of path KL, more than max_kl ({config.max_kl:g}), so that every step of the "
        "policy is refused; compute in float32 (of a pipeline --option compute_dtype=float32)."
    )


def nothing_steers(config: Config) -> str:
    return (
        f"target_kl is {config.target_kl:g}, but {config.algorithm} with these settings has no KL term that kl_weight could "
        "weigh, so nothing steers its path KL; the guard still watches it."
    )


def known_kl(reference: Metrics) -> tuple[float, float]:
    """KL* and its standard error, where it is exact or its estimate can be trusted; else NaN."""
    exact = reference.get("objective/KL_star_exact", math.nan)
    if exact == exact or not reference.get("objective/trusted"):
        return exact, 0.0
    return reference.get("objective/KL_star", math.nan), reference.get("objective/KL_star_se", 0.0)


def _jackknife(values: list[float], size: int) -> float:
    """Standard error of a metric of `size` samples from its values with a part left out; at least 1 / size.

    A share that is 0 in every part is still not known better than that.
    """
    parts = torch.tensor(values, dtype=torch.float64)
    return max(float(((PARTS - 1) * parts.var(correction=0)).sqrt()), 1 / size)


def _worse_if(name: str) -> int:
    """1 if the metric of a judge worsens by growing, -1 by falling, 0 if nobody knows (then it is not watched)."""
    if not name.startswith("judge/") or name.endswith("_se"):
        return 0
    if any(word in name for word in WORSE):
        return 1
    return -1 if any(word in name for word in BETTER) else 0
