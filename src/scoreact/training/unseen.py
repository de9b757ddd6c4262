"""Prompts that training never sees, and what the policy's rewards on them are beside the pretrained model's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..evaluation.optimum import mean_and_error
from ..models.base import HasClasses
from ..support.errors import SettingError
from ..types import Condition, Metrics, groups

FROM, SHARE, MOST = 100, 10, 200  # by default: of so many prompts or more, one in so many, so many at most


def split(
    prompts: Sequence[str], wanted: int, seed: int, model: object = None, given: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Prompts to learn from, and prompts that training never sees; the same for the same seed.

    Args:
        prompts: all of the run's.
        wanted: how many to keep out; -1: a tenth where there are `FROM` or more, `MOST` at most. A model whose prompts are all
            that it knows (classes) has none that it could be asked for later: then -1 keeps none out.
        seed: of the draw.
        model: whose prompts they are.
        given: prompts that are kept out anyway, being no part of `prompts`.

    Raises:
        SettingError: too few prompts would be left; or `given` and `wanted` both say what is kept out, or are trained on.
    """
    if given:
        if wanted > 0:
            raise SettingError(f"heldout_prompts is {wanted}, but test prompts are given; leave out one of the two.")
        if both := sorted(set(given) & set(prompts)):
            raise SettingError(
                f"{len(both)} test prompts are trained on, such as {both[0]!r}; take them out of one list."
            )
        return list(prompts), list(dict.fromkeys(given))
    if wanted < 0:
        closed = isinstance(model, HasClasses) and set(prompts) <= set(model.classes)
        wanted = min(len(prompts) // SHARE, MOST) if len(prompts) >= FROM and not closed else 0
    if wanted >= len(prompts):
        raise SettingError(
            f"heldout_prompts is {wanted}, and there are {len(prompts)} prompts; leave some to learn from."
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    out = set(order[:wanted])
    return [p for i, p in enumerate(prompts) if i not in out], [prompts[i] for i in sorted(out)]


def digest(trained: Sequence[str], unseen: Sequence[str]) -> str:
    """Tells a run's prompts from others."""
    return hashlib.sha256("\0".join([*trained, "\0", *unseen]).encode()).hexdigest()


def unseen_metrics(rewards: Tensor, reference: Tensor, condition: Condition) -> Metrics:
    """Mean reward on unseen prompts and its gain on the reference's, on the same noise.

    rewards, reference [B]. The errors are those of the mean over prompts like these: a prompt's samples hang together.
    """
    found: Metrics = {}
    parts = list(groups(condition).values())
    for name, values in (("reward/heldout_prompts", rewards), ("reward/heldout_prompts_gain", rewards - reference)):
        found[name], found[f"{name}_se"] = mean_and_error(torch.stack([values[rows].mean() for rows in parts]))
    return found
