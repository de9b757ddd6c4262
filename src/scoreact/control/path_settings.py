"""The settings of a path, the arguments of `rollout`. Not in that file: the command line reads them without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..support.settings import setting


def _solvers() -> Iterable[str]:
    from ..dynamics.solvers import SOLVERS

    return SOLVERS


def _grids() -> Iterable[str]:
    from ..dynamics.grids import GRIDS

    return GRIDS


@dataclass(frozen=True)
class PathSettings:
    """How paths are drawn in training and in evaluation."""

    heading: ClassVar[str] = "paths"

    steps: int = setting(10, "Number of steps of a path in training", 1)
    grid: str = setting(
        "uniform",
        "How a path's times lie between noise (t = 0) and data (t = 1); or log_snr:C0,C1,... of a search",
        known=_grids,
        own=True,
    )
    solver: str = setting("ddim", "Numerical scheme that takes a step in training", known=_solvers)
    noise: Literal["noise_level", "constant", "flow_grpo"] = setting(
        "noise_level", "Family of the noise g(t) that a path receives while it is generated"
    )
    noise_scale: float = setting(
        1.0,
        "Size of that noise: eta of noise_level (1: the reverse SDE, memoryless), g of constant, a of flow_grpo",
        0,
        above=True,
    )
    act_until: float = setting(
        1.0,
        "Time, from 0 to 1, until which the tuned model acts; the pretrained one takes the later steps",
        0,
        1,
        above=True,
    )
    exploration: Literal["none", "gaussian", "epsilon_greedy"] = setting(
        "none", "Randomness of the actions beyond the noise of the path itself"
    )
    exploration_scale: float = setting(
        0.1,
        "Standard deviation in units of sigma(t) (gaussian), or share of steps by the pretrained model (epsilon_greedy)",
        0,
        needs={"exploration": ("gaussian", "epsilon_greedy")},
    )
