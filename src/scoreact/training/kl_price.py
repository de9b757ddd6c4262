"""The price of path KL in training, steered towards a target.

Source: Ziegler et al. 2019 (adaptive KL weight, arXiv 1909.08593).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..algorithms.base import Rule


@dataclass
class KLPrice:
    """The factor f on kl_weight that steers the path KL to `target` (nats), one multiplicative step an iteration:

        e_k = clip(log(KL_k / target), -1, 1)
        log f_{k+1} = log f_k + integral e_k + proportional (e_k - e_{k-1})

    Ziegler et al. 2019, section 2.2: beta_{k+1} = beta_k (1 + 0.1 clip(KL_k / target - 1, -0.2, 0.2)), which is the
    integral alone. Departs: the logarithm, as KL is of order 1 / beta^2 near the reference, so that the loop's gain is
    the same at any target; wider clips, as runs here have tens of iterations and not thousands; the proportional part,
    which sees the KL coming while the policy still moves. Looks several iterations apart find a policy that has answered
    already: they take the integral alone, twice. f stays within 1/`limit` and `limit`.
    """

    target: float
    integral: float = 0.15
    proportional: float = 0.3
    limit: float = 1000.0
    log_factor: float = 0.0
    error: float | None = None  # of the look before

    @property
    def factor(self) -> float:
        return math.exp(self.log_factor)

    def update(self, kl: float, iterations: int = 1) -> float:
        """The new factor, given the path KL now and how many iterations have passed since the look before."""
        error = min(1.0, max(-1.0, math.log(kl / self.target))) if kl > 0 else -1.0
        step = min(iterations, 2) * self.integral * error
        if self.error is not None and iterations == 1:
            step += self.proportional * (error - self.error)
        self.error = error
        edge = math.log(self.limit)
        self.log_factor = min(edge, max(-edge, self.log_factor + step))
        return self.factor


def reprice(kl_weight: float, rule: Rule) -> None:
    """Let training pay `kl_weight` for a nat from now on; the returns that a critic remembers are counted anew."""
    rule.kl_weight = kl_weight
    if rule.critic is not None:
        rule.critic.reprice(kl_weight)


def has_kl_term(rule: Rule) -> bool:
    """Whether kl_weight holds the rule to the reference, so that another price moves its path KL."""
    return rule.kl_term and getattr(rule, "kl_share", 1) > 0 and getattr(rule, "reference_kl", True)


def sees_kl(rule: Rule) -> bool:
    """Whether the rule's own rollouts show the policy's whole path KL; for others only held-out evaluations do."""
    everywhere = type(rule).stochastic_steps is Rule.stochastic_steps
    return rule.reads_reference and everywhere and not rule.own_rows
