"""`ctrl_trpo`: `ctrl`'s advantage; the step is the natural gradient inside path KL(new || behaviour) <= radius.

The rule is `ctrl` without clipping; what differs is the minimiser, `optim.NaturalGradient` (Gauss-Newton in score
space, conjugate gradients, line search).
Sources: Schulman et al. 2015 (TRPO, arXiv 1502.05477), Zhao, Tang & Yao 2023 (CPO).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..support.settings import setting
from .ctrl import CTRL


@dataclass
class CTRLTrustRegion(CTRL):
    """Settings of the rule: `ctrl`'s, with the ratio not clipped (the radius bounds it)."""

    search: ClassVar[Mapping[str, Any]] = {"ratio_weight": (0.1, 1.0, "log"), "reuse_reference": [0, 1]}
    minimiser = "natural_gradient"

    clip_range: float = float("inf")  # no setting here
    cg_steps: int = setting(20, "Number of conjugate-gradient steps that solve for the natural gradient", 1)
    # with much of it weakly curved directions are never learned (`benchmarks/proof.py --rules ctrl_trpo --set damping=0.01`)
    damping: float = setting(
        1e-4, "Damping added to the Fisher matrix, in units of its curvature along the gradient", 0
    )


RULES = {"ctrl_trpo": CTRLTrustRegion}
