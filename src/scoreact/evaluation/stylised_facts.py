"""Stylised facts of series, chiefly of returns: what a quant looks at first.

Series are ensembles [N, C, L] of N windows with C channels and L steps. Moments are pooled over windows and steps, so that a
short window's own mean does not bias them; N = 1 is one long series. Computed in float64.
Sources: Cont 2001 (stylised facts), Hill 1975 (tail exponent), Bouchaud, Matacz & Potters 2001 (leverage).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..support.errors import SettingError

TAIL = 0.05  # the share of values that a tail exponent is read from


@dataclass(frozen=True)
class Facts:
    """Of an ensemble with C channels, at lags 1 to K.

    std [C]; kurtosis [C], in excess of the normal law's; tail_losses, tail_gains [C], exponents; acf, acf_abs, leverage [C, K];
    correlation [C, C].
    """

    std: Tensor
    kurtosis: Tensor
    tail_losses: Tensor
    tail_gains: Tensor
    acf: Tensor
    acf_abs: Tensor
    leverage: Tensor
    correlation: Tensor


def series_facts(x: Tensor, lags: int = 20) -> Facts:
    """The facts of an ensemble [N, C, L]."""
    x = _ensemble(x, lags)
    centred = x - x.mean((0, 2), keepdim=True)
    channels = [channel.flatten() for channel in centred.transpose(0, 1)]
    return Facts(
        std=centred.square().mean((0, 2)).sqrt(),
        kurtosis=excess_kurtosis(x),
        tail_losses=torch.stack([torch.tensor(tail_exponent(-c)) for c in channels]).double(),
        tail_gains=torch.stack([torch.tensor(tail_exponent(c)) for c in channels]).double(),
        acf=autocorrelation(x, lags),
        acf_abs=autocorrelation(centred.abs(), lags),
        leverage=leverage(x, lags),
        correlation=torch.corrcoef(centred.transpose(0, 1).flatten(1)).reshape(x.shape[1], x.shape[1]),
    )


def fact_distances(real: Facts, other: Facts) -> dict[str, float]:
    """By name: the mean absolute difference over channels and lags; of std, of its logarithm; 0 for the same facts."""
    found = {}
    for field in fields(Facts):
        a, b = getattr(real, field.name), getattr(other, field.name)
        found[field.name] = float(((b / a).log() if field.name == "std" else b - a).abs().mean())
    return found


def tail_exponent(values: Tensor, share: float = TAIL) -> float:
    """Hill's estimate of alpha in P(X > x) ~ x^-alpha, from the largest `share` of values [n]; its error is alpha / sqrt(k).

    k / sum_i log(x_(i) / x_(k+1)). Raises SettingError where fewer than two values, or values not above 0, make up the tail.
    """
    count = int(share * len(values))
    if count < 2:
        raise SettingError(
            f"a share of {share:g} of {len(values)} values is no tail; give more values or a larger share."
        )
    top = values.double().topk(count + 1).values
    if not float(top[-1]) > 0:
        raise SettingError(
            f"the largest {share:g} of the values reach down to {float(top[-1]):g}; a tail lies above 0."
        )
    return float(1 / (top[:-1] / top[-1]).log().mean())


def excess_kurtosis(x: Tensor) -> Tensor:
    """E (x - m)^4 / var^2 - 3, [C]."""
    x = _ensemble(x)
    centred = x - x.mean((0, 2), keepdim=True)
    return centred.pow(4).mean((0, 2)) / centred.square().mean((0, 2)).square() - 3


def autocorrelation(x: Tensor, lags: int) -> Tensor:
    """Correlation of x_t and x_(t + k) for k = 1 to `lags`, about the pooled mean and over the pooled variance: [C, lags]."""
    x = _ensemble(x, lags)
    centred = x - x.mean((0, 2), keepdim=True)
    variance = centred.square().mean((0, 2))
    return torch.stack(
        [(centred[..., :-k] * centred[..., k:]).mean((0, 2)) / variance for k in range(1, lags + 1)], dim=1
    )


def leverage(x: Tensor, lags: int) -> Tensor:
    """E[r_t r_(t + k)^2] / (E r^2)^2 for k = 1 to `lags`, times std: below 0 where losses are followed by turmoil. [C, lags].

    Bouchaud's L(k) has the unit of 1 / return; times std it has none.
    """
    x = _ensemble(x, lags)
    r = x - x.mean((0, 2), keepdim=True)
    cube = r.square().mean((0, 2)).pow(1.5)
    return torch.stack([(r[..., :-k] * r[..., k:].square()).mean((0, 2)) / cube for k in range(1, lags + 1)], dim=1)


def marginal_distance(real: Tensor, other: Tensor) -> Tensor:
    """Wasserstein's distance of each channel's values, in standard deviations of the real ones: [C]."""
    a, b = (_ensemble(x).transpose(0, 1).flatten(1).sort(1).values for x in (real, other))
    places = torch.linspace(0, 1, 2001, dtype=torch.float64)
    middles = (places[1:] + places[:-1]) / 2
    quantiles = [torch.stack([v[(middles * v.numel()).long()] for v in x]) for x in (a, b)]
    return (quantiles[0] - quantiles[1]).abs().mean(1) / a.std(1)


def _ensemble(x: Tensor, lags: int = 0) -> Tensor:
    if x.ndim != 3:
        raise SettingError(f"series have shape {tuple(x.shape)}; give [windows, channels, steps].")
    if not lags < x.shape[2]:
        raise SettingError(f"lags are {lags} and a window has {x.shape[2]} steps; give fewer lags.")
    return x.detach().cpu().double()
