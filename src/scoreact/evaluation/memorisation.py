"""Whether samples are copies of the training data: how near they are to it, beside held-out examples.

Two questions. Is a sample nearer to the training data than a held-out example is (Meehan et al. 2020, arXiv 2004.05675)? It is
where samples are smoother than the data too, without being copies. Is a sample nearer to training examples than to as many
held-out ones (Platzer & Reutterer 2021, arXiv 2104.00635)? Smoothness does not move that. Both are measures, and no proof of
privacy: a sample can give a person away without being near in this distance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support.errors import SettingError
from .metrics import _distances, _pair, auc_interval

NEAREST = 0.01  # the share of held-out examples that are taken for as near as a copy
SIDE = 32  # pixels a side at about which pictures are compared


class Memorisation(NamedTuple):
    """Distances in units of the features; shares in [0, 1]."""

    generated: float  # median distance of a sample to its nearest training example
    heldout: float  # the same of held-out examples
    closer: float  # share of pairs in which the sample is the nearer of the two; 0.5 for samples of the data's law
    closer_half_width: float  # of its 95 % interval
    to_training: (
        float  # samples whose nearest, of training and held-out examples as many of each, is a training example; 0.5
    )
    to_training_half_width: float  # of its 95 % interval, the examples being given
    copies: float  # samples as near as the nearest 1 % of the held-out examples; 0.01 for samples of the data's law


def memorisation(train: Tensor, heldout: Tensor, generated: Tensor) -> Memorisation:
    """How near samples are to the training data, beside examples that the model has not seen.

    Args:
        train: features of what the model learned from, [N, F]; of the class that was asked for, where one was.
        heldout: of examples of the same law that it did not, [M, F], M up to N.
        generated: of its samples, [G, F].

    Raises:
        SettingError: fewer than 20 held-out examples or samples, features of other sizes, NaN.
    """
    if min(len(heldout), len(generated)) < 20:
        raise SettingError(
            f"{len(heldout)} held-out examples and {len(generated)} samples are too few to compare their distances; give "
            "20 of each, better hundreds."
        )
    if len(heldout) > len(train):
        raise SettingError(
            f"{len(heldout)} held-out examples beside {len(train)} to learn from; give fewer held-out ones."
        )
    parts = len(train) // len(heldout)  # of the training data, each of as many examples as are held out
    theirs = nearest_distances(train, heldout)
    own = nearest_distances(train, generated)
    rows = torch.arange(parts * len(heldout)).reshape(-1, parts).T  # files are often sorted
    fair = torch.stack([nearest_distances(train[part], generated) for part in rows])
    beside = nearest_distances(heldout, generated)
    share = ((fair < beside).double() + (fair == beside).double() / 2).mean(0)
    closer, half_width = auc_interval(theirs, own)
    copies = float((own <= theirs.quantile(NEAREST)).double().mean())
    width = 1.96 * float(share.std()) / math.sqrt(len(share))
    return Memorisation(
        float(own.median()), float(theirs.median()), closer, half_width, float(share.mean()), width, copies
    )


def compared(samples: Tensor) -> Tensor:
    """Decoded samples [N, *D] as what distances are taken of: their values [N, F], of large pictures means of fields."""
    if samples.ndim == 4:
        samples = F.avg_pool2d(samples, max(1, min(samples.shape[2:]) // SIDE))
    return samples.flatten(1)


def nearest_distances(train: Tensor, examples: Tensor) -> Tensor:
    """Euclidean distance of each example [M, F] to its nearest of the training examples [N, F]: [M] float64."""
    train, examples = _pair(train, examples)
    return torch.cat([_distances(part, train).amin(1) for part in torch.split(examples, 200)])
