"""`gaussian`: a mixture in two dimensions and a quadratic reward, where the optimum is known. Seconds."""

from __future__ import annotations

import torch

from ..dynamics.schedule import VP
from ..models.gaussian_mixture import GaussianMixture
from ..models.mlp import ResidualModel
from ..models.value_networks import VectorValue
from ..rewards.closed_form import Quadratic
from ..support.errors import SettingError
from ..training.config import Config
from .base import Problem, Recipe


def mixture(dim: int, components: int, seed: int) -> GaussianMixture:
    """A random mixture: means about 1.7 from the origin in two dimensions, full covariances, unequal weights."""
    generator = torch.Generator().manual_seed(1000 + seed)
    means = 1.2 * torch.randn(components, dim, generator=generator)
    factors = torch.randn(components, dim, dim, generator=generator) / dim**0.5
    covariances = 0.15 * torch.eye(dim) + 0.1 * factors @ factors.mT
    weights = torch.rand(components, generator=generator) + 0.5
    # t_max 0.98: a coarse grid to 0.999 would spend the whole path KL in its last step
    return GaussianMixture(VP(t_max=0.98), weights, means, covariances)


def linear_reward(dim: int, seed: int) -> Quadratic:
    """a.x with |a| = 1, a random."""
    direction = torch.randn(dim, generator=torch.Generator().manual_seed(2000 + seed))
    return Quadratic(0.0, linear=direction / direction.norm())


def quadratic_reward(dim: int, seed: int) -> Quadratic:
    """a.x - q |x|^2 / 2 with |a| = 1/2 and q = 1/2 in two dimensions, falling as sqrt(2 / dim)."""
    direction = torch.randn(dim, generator=torch.Generator().manual_seed(2000 + seed))
    return Quadratic(0.5 * (2 / dim) ** 0.5, linear=0.5 * direction / direction.norm())


def build(
    dim: int = 2, components: int = 4, reward: str = "quadratic", mixture_seed: int = 0, width: int = 128
) -> Problem:
    """dim, components, mixture_seed: of the mixture; reward: linear or quadratic; width: of the networks."""
    if reward not in ("linear", "quadratic"):
        raise SettingError(f"reward is {reward!r}; known: linear, quadratic.")
    base = mixture(dim, components, mixture_seed)
    wanted = (linear_reward if reward == "linear" else quadratic_reward)(dim, mixture_seed)
    return Problem(
        model=ResidualModel(base, dim, width),
        reward=wanted,
        prompts=[""],
        value_network=lambda: VectorValue(2 * dim, width),
        optimum=lambda kl_weight: base.tilted(wanted.linear, wanted.quadratic, kl_weight, wanted.constant)[1],
        labels={"problem": f"Gaussian mixture, {dim} dimensions, {components} components, {reward} reward"},
    )


RECIPES = [
    Recipe(
        "gaussian",
        "a 2-D Gaussian mixture and a quadratic reward, against its closed form (seconds)",
        build,
        Config(kl_weight=0.5, solver="euler_maruyama", heldout_samples=2000),
        {"dim": 2, "components": 4, "reward": "quadratic", "mixture_seed": 0, "width": 128},
    )
]
