"""Value at risk and expected shortfall, and whether a forecast of them agrees with what happened.

Losses are minus returns. Kupiec 1995: the number of violations; Christoffersen 1998: their number, and whether one follows
another. Both are likelihood ratios, chi-squared under a right forecast; with few violations their power is small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.errors import SettingError


class RiskTest(NamedTuple):
    """A likelihood ratio and the probability of one as large under a right forecast."""

    statistic: float
    p_value: float


def value_at_risk(returns: Tensor, level: float = 0.99) -> float:
    """The loss that is passed with probability 1 - level, a number in the unit of the returns [n]."""
    _checked_level(level)
    return float(torch.quantile(-returns.double().flatten(), level))


def expected_shortfall(returns: Tensor, level: float = 0.99) -> float:
    """The mean loss among those as large as the value at risk or larger."""
    losses = -returns.double().flatten()
    return float(losses[losses >= value_at_risk(returns, level)].mean())


def kupiec(hits: Tensor, level: float = 0.99) -> RiskTest:
    """Are violations as many as forecast? hits [n], true where the loss passed the value at risk."""
    _checked_level(level)
    n, x = len(hits), int(hits.sum())
    statistic = 2 * (_log_likelihood(x, n, x / n) - _log_likelihood(x, n, 1 - level))
    return RiskTest(max(0.0, statistic), _chi2_1(statistic))


def independence(hits: Tensor) -> RiskTest:
    """Is a violation as likely after a violation as after none? hits [n] in the order of time."""
    before, after = hits[:-1].bool(), hits[1:].bool()
    counts = [(int((after & (before == state)).sum()), int((before == state).sum())) for state in (False, True)]
    apart = sum(_log_likelihood(x, n, x / n) for x, n in counts if n)
    x, n = int(after.sum()), len(after)
    statistic = 2 * (apart - _log_likelihood(x, n, x / n))
    return RiskTest(max(0.0, statistic), _chi2_1(statistic))


def christoffersen(hits: Tensor, level: float = 0.99) -> RiskTest:
    """Conditional coverage: as many violations as forecast, and independent; the sum of both ratios, chi-squared with 2."""
    statistic = kupiec(hits, level).statistic + independence(hits).statistic
    return RiskTest(statistic, math.exp(-statistic / 2))


def _log_likelihood(x: int, n: int, p: float) -> float:
    """Of x violations in n days of probability p; 0 log 0 = 0."""
    return (x * math.log(p) if x else 0.0) + ((n - x) * math.log1p(-p) if n > x else 0.0)


def _chi2_1(statistic: float) -> float:
    return math.erfc(math.sqrt(max(0.0, statistic) / 2))


def _checked_level(level: float) -> None:
    if not 0 < level < 1:
        raise SettingError(f"level is {level}; give a probability between 0 and 1, such as 0.99.")
