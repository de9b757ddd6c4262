"""Change of measure between two policies along one path, in the discrete form that is exact for Gaussian kernels.

A *shift* is the difference of two kernels' means in units of the step's noise; for Euler-Maruyama d sqrt(dt) with
d = gain / g (s_new - s_old). All functions sum over the data dimensions, never average.
Source: Girsanov's theorem; Zhao et al. 2025, section 3.
"""

from __future__ import annotations

from torch import Tensor

from ..types import sum_over_data


def log_ratio(shift: Tensor, noise: Tensor) -> Tensor:
    """log p_new / p_old of steps drawn with the old policy: shift . z - |shift|^2 / 2. [B, *D] twice -> [B], nats."""
    return sum_over_data(shift * noise - 0.5 * shift**2)


def kl(shift: Tensor) -> Tensor:
    """KL of one step, |shift|^2 / 2 (= 1/2 |u|^2 dt). [B, *D] -> [B], nats."""
    return 0.5 * sum_over_data(shift**2)


def stochastic_cost(shift: Tensor, noise: Tensor) -> Tensor:
    """log p_policy / p_reference of steps drawn with the policy: |shift|^2 / 2 + shift . z. [B, *D] twice -> [B].

    Its mean is `kl(shift)`. As a cost it has the same mean as the running cost, and at the optimum the return
    R - beta sum(stochastic_cost) is constant along every path: the zero-variance control variate.
    """
    return sum_over_data(shift * noise + 0.5 * shift**2)
