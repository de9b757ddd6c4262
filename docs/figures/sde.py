"""The figure of concepts.md: paths of a one-dimensional mixture under the pretrained score and under the optimal one.

    python docs/figures/sde.py        # writes docs/figures/sde.png; a second

Everything is closed form: the optimum for a linear reward is a mixture again, whose score is exact. The noise is the same
on both sides.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from scoreact.dynamics.samplers import sampler_by_name
from scoreact.dynamics.schedule import VP
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.models.gaussian_mixture import GaussianMixture

BETA, STEPS, PATHS = 0.5, 150, 16
BEFORE, AFTER = "#4c72b0", "#dd8452"


def main() -> None:
    pretrained = GaussianMixture(
        VP(), torch.tensor([0.55, 0.45]), torch.tensor([[-1.5], [1.2]]), torch.tensor([[[0.09]], [[0.16]]])
    )
    tuned, _ = pretrained.tilted(torch.tensor([0.5]), torch.zeros(1, 1), BETA)
    ts = torch.linspace(pretrained.schedule.t_min, pretrained.schedule.t_max, STEPS + 1)
    x0 = torch.randn(PATHS, 1, generator=torch.Generator().manual_seed(3))
    plane = torch.linspace(-3.2, 3.2, 400)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    sides = (("pretrained score", pretrained, BEFORE), ("optimal score, beta = 0.5", tuned.float(), AFTER))
    for axis, (title, model, colour) in zip(axes, sides, strict=True):
        sde = SDE(model.schedule, noise_level(1.0))
        generator = torch.Generator().manual_seed(4)
        paths = sampler_by_name("euler_maruyama")(sde, model.score, ts, x0, generator)
        lines = torch.stack(list(paths)).squeeze(-1)
        axis.plot(ts, lines, color=colour, lw=0.6, alpha=0.6)
        for time, where, width in ((ts[0], -0.02, -0.12), (ts[-1], 1.02, 0.25)):
            density = model.log_prob(time.expand(len(plane)), plane[:, None]).exp()
            axis.fill_betweenx(plane, where, where + width * density, color=colour, alpha=0.5, lw=0)
        axis.set(title=title, xlabel="t: 0 is noise, 1 is data", xlim=(-0.13, 1.3), ylim=(-3.2, 3.2))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("x")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
