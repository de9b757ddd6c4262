"""Fine-tune a two-dimensional Gaussian mixture to a quadratic reward, where the best possible result is known. Seconds.

python examples/gaussian.py
"""

import sys

import torch

import scoreact as sa
from scoreact.dynamics.schedule import VP
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.rewards import Quadratic

KL_WEIGHT = 0.5  # beta: a nat of path KL costs this much reward

# the pretrained model: the exact score of three blobs on a circle, and a small network that may change it
angles = torch.tensor([0.5, 2.6, 4.7])
means = 1.5 * torch.stack([angles.cos(), angles.sin()], dim=1)
base = GaussianMixture(VP(t_max=0.98), torch.ones(3), means, 0.2 * torch.eye(2).repeat(3, 1, 1))
model = ResidualModel(base, dim=2)

# the reward: b.x - |x|^2 / 4, so that the optimum p_ref exp(R / beta) / Z is a mixture too
reward = Quadratic(0.5, linear=torch.tensor([0.4, 0.3]))


def best(kl_weight: float) -> float:
    """J* in closed form."""
    return base.tilted(reward.linear, reward.quadratic, kl_weight, reward.constant)[1]


def show(kind: str, metrics: dict[str, float]) -> None:
    if kind == "evaluation":
        recovered = 100 * metrics["objective/recovered"]
        print(f"iteration {metrics['iteration']:>3}  J {metrics['objective/J']:6.3f}  recovered {recovered:4.0f} %")


iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 40
torch.manual_seed(0)
result = sa.finetune(
    model, reward, [""], iterations=iterations, kl_weight=KL_WEIGHT, solver="euler_maruyama", heldout_samples=2000,
    optimum=best, on_event=show,
)  # fmt: skip
print(f"J before {result.reference['objective/J_ref']:.3f}, best possible {best(KL_WEIGHT):.3f}, ", end="")
print(f"after {result.final['objective/J']:.3f}; path KL {result.final['policy/kl']:.2f} nats")
