"""Small pictures of latents for next to nothing, by a map that is solved for in closed form: `RidgeDecoder`.

    pixels of a cell ~ W [u, 1, silu(A u + a)],   u the cell's 3 x 3 neighbourhood, A and a random, W a ridge regression

A value that looks at decode(x_data_hat) decodes at every state, and differentiates it; at the size of Stable Diffusion a VAE
costs several times what the denoiser does. What the surrogate's features see of a large picture is averaged down to about SIDE
pixels anyway. W is fitted once, to pictures that the pipeline's own decoder makes of the first paths of the pretrained model,
finished ones and those they were heading for. It needs no weights, no reward call and no steps.
Source of the features: Rahimi & Recht 2007.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rewards.sample_features import SIDE
from ..support import distributed
from ..support.errors import SettingError

HIDDEN = 512  # random functions of a neighbourhood
SCALE = 1.5  # of A: its rows times latents of unit variance have this standard deviation
RIDGE = 1e-3  # in units of the functions' mean square
ROWS = 2**17  # neighbourhoods that are held at once


def cell_size(latents: Tensor, pictures: Tensor) -> tuple[int, int]:
    """(p, k): a cell of the latents [B, C, H, W] becomes p x p pixels, each the mean of k x k of the pictures [B, c, h, w].

    The small picture has about SIDE pixels a side, and no fewer than the latents have.
    Raises SettingError where the one is not a picture of the other.
    """
    across, rest = divmod(pictures.shape[-1], latents.shape[-1]) if latents.ndim == pictures.ndim == 4 else (0, 0)
    if across < 1 or rest or pictures.shape[2] != across * latents.shape[2]:
        raise SettingError(
            f"surrogate_decoder is ridge, which maps latents [C, H, W] to pictures of a whole multiple of their size; here "
            f"{tuple(latents.shape[1:])} become {tuple(pictures.shape[1:])}. Set surrogate_decoder to full."
        )
    wanted = max(1, min(pictures.shape[2:]) // SIDE)
    k = max(d for d in range(1, across + 1) if across % d == 0 and d <= wanted)
    return across // k, k


class RidgeDecoder(nn.Module):
    """Latents [B, C, H, W] -> small pictures [B, c, p H, p W], zero until `fit`. A and a come from torch's generator."""

    weight: Tensor  # W
    share: Tensor  # [] of the small pictures' variance that W gave where it was fitted

    def __init__(self, latents: Tensor, pictures: Tensor) -> None:
        """For latents and decoded pictures of these shapes, at least one of each."""
        super().__init__()
        channels, device = latents.shape[1], latents.device
        self.p, self.k = cell_size(latents, pictures)
        self.hidden = nn.Conv2d(channels, HIDDEN, 3, padding=1).requires_grad_(False)
        nn.init.normal_(self.hidden.weight, std=SCALE / (9 * channels) ** 0.5)
        nn.init.normal_(self.hidden.bias, std=0.5)  # type: ignore[arg-type]
        outputs, seen = pictures.shape[1] * self.p**2, 9 * channels + 1 + HIDDEN
        self.register_buffer("weight", torch.zeros(outputs, seen))
        self.register_buffer("share", torch.zeros(()))
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        around = 9 * x.shape[1]
        near = self.weight[:, :around].reshape(len(self.weight), -1, 3, 3)
        far = self.weight[:, around + 1 :, None, None]
        cells = F.conv2d(x, near, self.weight[:, around], padding=1) + F.conv2d(F.silu(self.hidden(x)), far)
        return F.pixel_shuffle(cells, self.p)

    @torch.no_grad()
    def fit(self, latents: Tensor, pictures: Tensor) -> None:
        """Solve for W from latents [B, C, H, W] and what they decode to."""
        size = len(self.weight.T) + len(self.weight) + 1
        moments = torch.zeros(size, size, dtype=torch.float64)  # of functions, pixels and 1
        for rows in torch.arange(len(latents)).split(max(1, ROWS // latents[0, 0].numel())):
            x, small = latents[rows], F.avg_pool2d(pictures[rows], self.k)
            around = F.unfold(x, 3, padding=1)
            cells = [around, torch.ones_like(around[:, :1]), F.silu(self.hidden(x)).flatten(2)]
            cells += [F.pixel_unshuffle(small, self.p).flatten(2), cells[1]]
            table = torch.cat(cells, dim=1).transpose(0, 1).flatten(1).cpu().double()
            moments += table @ table.T / (len(latents) * around.shape[2])
        distributed.average([moments])
        seen, pixels, level = moments.split([len(self.weight.T), len(self.weight), 1])
        gram, cross = seen[:, : len(seen)], seen[:, len(seen) : -1]
        solved = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram), cross)
        self.weight.copy_(solved.T)
        square, mean = pixels[:, len(seen) : -1].diagonal(), level[0, len(seen) : -1]
        error = square - 2 * (solved * cross).sum(0) + (solved * (gram @ solved)).sum(0)
        self.share.fill_(float(1 - error.sum() / (square - mean.square()).sum().clamp(min=1e-12)))
