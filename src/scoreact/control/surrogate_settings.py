"""The settings of the reward's stand-in. Not in `ridge_surrogate`: the command line reads them without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..support.settings import setting

STANDS_IN = {"surrogate": (True,)}  # used where a surrogate stands in for the reward
OWN_FEATURES = ("convolution", "pixels")  # that need no network of the user's


def _features() -> Iterable[str]:
    return OWN_FEATURES


@dataclass(frozen=True)
class SurrogateSettings:
    """What a surrogate of the reward sees, and how often the reward itself is asked."""

    heading: ClassVar[str] = "surrogate of the reward"

    surrogate_target: Literal["reward", "logit"] = setting(
        "reward",
        "What the surrogate is fitted to: the reward; or its logit, for rewards that are log-probabilities",
        needs=STANDS_IN,
    )
    surrogate_features: str = setting(
        "convolution",
        "What the surrogate sees of a sample: untrained convolutions, pixels, or your network as file.py:function",
        known=_features,
        own=True,
        needs=STANDS_IN,
    )
    surrogate_decoder: Literal["auto", "full", "ridge"] = setting(
        "auto",
        "How a value decodes states: as samples are; to small pictures by a ridge regression; auto: that of large ones",
        needs={"fits_value": (True,), "value": ("surrogate",)},
    )
    surrogate_prompts: bool = setting(
        True,
        "Whether the surrogate sees how well a sample tells its prompt among the pretrained model's",
        needs=STANDS_IN,
    )
    scored_samples: int = setting(
        0,
        "Number of samples of a rollout whose reward is asked, where it tells the surrogate most; 0: all",
        0,
        needs=STANDS_IN,
    )
