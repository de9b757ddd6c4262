"""How well small networks tell generated series from real ones, and what a forecaster learned from generated ones is worth.

Knows ensembles [N, C, L], all scaled by the real ones' mean and spread, channel by channel. Each score depends on the network's
start and on the rows that are drawn: take several generators. Sources: Yoon et al. 2019, TimeGAN (discriminative and predictive
score); Jeha et al. 2022, PSA-GAN (Context-FID, whose features are learned; these here are not); Dempster et al. 2020 (random
convolutions).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.errors import SettingError
from .metrics import feature_statistics, frechet_distance

BLOCKS, EVERY = 10, 5  # of the time; one in so many tests
HIDDEN, BATCH, RATE = 24, 128, 5e-3
KERNEL, DILATIONS = 5, (1, 2, 4, 8)


def blocked_split(count: int, gap: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to learn from and to test with: every fifth of ten blocks of time tests, what is nearer than `gap` is left out.

    Windows of L rows taken at every row share rows unless they are L apart: gap is L for those, and 1 for independent ones.
    """
    rows = torch.arange(count)
    test = (rows * BLOCKS // count) % EVERY == offset % EVERY
    edges = rows[test]
    apart = torch.searchsorted(edges, rows).clamp(max=len(edges) - 1)
    nearest = torch.minimum((edges[apart] - rows).abs(), (edges[(apart - 1).clamp(min=0)] - rows).abs())
    learn = rows[nearest >= max(1, gap)]
    if len(learn) < 2 or not len(edges):
        raise SettingError(f"{count} windows leave none to learn from at a gap of {gap}; give more windows.")
    return learn, edges


class _Recurrent(nn.Module):
    """A GRU over the steps of [B, C, L] and one linear layer: [B, L, outputs]."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(channels, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x.transpose(1, 2))[0])


def discriminative_score(
    real: Tensor,
    generated: Tensor,
    generator: torch.Generator,
    *,
    gap: int = 1,
    generated_gap: int = 1,
    steps: int = 200,
) -> float:
    """|accuracy - 1/2| of a recurrent classifier on rows that it did not learn from: 0 indistinguishable, 1/2 told apart.

    gap, generated_gap: as of `blocked_split`, of the real and of the generated windows. Both kinds count as much.
    """
    real, generated = _scaled(real, generated)
    offset = int(torch.randint(EVERY, (1,), generator=generator))
    parts = [blocked_split(len(x), own, offset) for x, own in ((real, gap), (generated, generated_gap))]
    learn = [x[rows] for x, (rows, _) in zip((real, generated), parts, strict=True)]
    test = [x[rows] for x, (_, rows) in zip((real, generated), parts, strict=True)]
    network = _network(real.shape[1], 1, generator)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    truth = torch.cat([torch.ones(BATCH // 2), torch.zeros(BATCH // 2)])
    for _ in range(steps):
        batch = [x[torch.randint(len(x), (BATCH // 2,), generator=generator)] for x in learn]
        logit = network(torch.cat(batch)).mean((1, 2))
        loss = F.binary_cross_entropy_with_logits(logit, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = [float((network(x).mean((1, 2)) > 0).float().mean()) for x in test]
    return abs((right[0] + 1 - right[1]) / 2 - 0.5)


def predictive_score(
    real: Tensor, generated: Tensor, generator: torch.Generator, *, sizes: bool = True, steps: int = 200
) -> float:
    """Mean absolute error, on real series, of a recurrent one-step forecaster that learned from generated ones.

    In standard deviations of the real ones. sizes: what is forecast is |x|, as the sign of a return can hardly be.
    """
    real, generated = _scaled(real, generated)
    network = _network(real.shape[1], real.shape[1], generator)
    optimizer = torch.optim.Adam(network.parameters(), RATE)

    def error(x: Tensor) -> Tensor:
        goal = x[..., 1:].transpose(1, 2)
        return (network(x[..., :-1]) - (goal.abs() if sizes else goal)).abs().mean()

    for _ in range(steps):
        loss = error(generated[torch.randint(len(generated), (BATCH,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(error(real))


def random_convolutions(x: Tensor, generator: torch.Generator, features: int = 32) -> Tensor:
    """[N, features] of series [N, C, L]: of random kernels, the mean of what is above 0 and the root mean square.

    Kernels go over all channels and have length 5, dilation 1, 2, 4 or 8, and weights of sum 0, so that a level of its own does
    not decide.
    """
    made = []
    for index in range(features // 2):
        weight = torch.randn(1, x.shape[1], KERNEL, generator=generator, dtype=torch.float64)
        weight = (weight - weight.mean(2, keepdim=True)) / (KERNEL * x.shape[1]) ** 0.5
        bias = torch.rand(1, generator=generator, dtype=torch.float64) - 0.5
        heard = F.conv1d(x.double(), weight, bias, dilation=DILATIONS[index % len(DILATIONS)])[:, 0]
        made += [heard.relu().mean(1), heard.square().mean(1).sqrt()]
    return torch.stack(made, dim=1)


def convolution_distance(real: Tensor, generated: Tensor, generator: torch.Generator, features: int = 32) -> float:
    """Frechet distance on random convolutions, each over its standard deviation in the real series; no FID.

    Between two samples of one law it is above 0: compare at equal sizes. Series have at least 33 steps.
    """
    real, generated = _scaled(real, generated)
    if real.shape[2] <= (KERNEL - 1) * DILATIONS[-1]:
        raise SettingError(f"series have {real.shape[2]} steps; give at least {(KERNEL - 1) * DILATIONS[-1] + 1}.")
    both = random_convolutions(torch.cat([real, generated]), generator, features)
    both = both / both[: len(real)].std(0)
    return frechet_distance(*feature_statistics(both[: len(real)]), *feature_statistics(both[len(real) :]))


def _scaled(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the real ones are standardised, channel by channel, float32."""
    if real.ndim != 3 or real.shape[1:] != generated.shape[1:]:
        raise SettingError(f"series have shapes {tuple(real.shape)} and {tuple(generated.shape)}; give both [N, C, L].")
    real, generated = (x.detach().cpu().double() for x in (real, generated))
    mean, spread = real.mean((0, 2), keepdim=True), real.transpose(0, 1).flatten(1).std(1)[None, :, None]
    return ((real - mean) / spread).float(), ((generated - mean) / spread).float()


def _network(channels: int, outputs: int, generator: torch.Generator) -> _Recurrent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return _Recurrent(channels, outputs)
