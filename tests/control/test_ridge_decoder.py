"""Small pictures of latents, solved for: decoders whose pictures are known, and runs that decode with them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreact import finetune
from scoreact.api.result import Result
from scoreact.control.ridge_decoder import RidgeDecoder, cell_size
from scoreact.dynamics.prediction import epsilon
from scoreact.dynamics.schedule import VP
from scoreact.models.network import NetworkModel
from scoreact.training.assembly import build_surrogate
from scoreact.training.config import Config
from scoreact.training.stand_in import lost_in_decoding
from scoreact.types import Condition


class Upsampled(nn.Module):
    """A decoder of latents [B, 2, 4, 4] that counts what it decodes: squashed, `times` times as large a side."""

    decoded = 0  # by all of them

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        generator = torch.Generator().manual_seed(3)
        self.kernel = torch.randn(3 * 4, 2, 3, 3, generator=generator) / 2

    def forward(self, x: Tensor) -> Tensor:
        Upsampled.decoded += len(x)
        rough = F.pixel_shuffle(F.conv2d(x, self.kernel, padding=1), 2).tanh()
        return F.interpolate(rough, scale_factor=self.times / 2) / 2 + 0.5


@pytest.mark.parametrize(
    ("side", "across", "found"), [(16, 2, (2, 1)), (64, 8, (1, 8)), (128, 8, (1, 8)), (16, 8, (4, 2))]
)
def test_a_small_picture_has_about_64_pixels_and_no_fewer_than_the_latents(
    side: int, across: int, found: tuple[int, int]
) -> None:
    assert cell_size(torch.zeros(1, 4, side, side), torch.zeros(1, 3, across * side, across * side)) == found


def test_what_is_no_picture_of_the_latents_is_refused() -> None:
    for latents, pictures in (
        ((4, 8, 8), (3, 12, 12)),
        ((4, 8, 8), (3, 16, 8)),
        ((2,), (2,)),
        ((4, 3, 8, 8), (3, 3, 16, 16)),
    ):
        with pytest.raises(ValueError, match=r"surrogate_decoder is ridge.*Set surrogate_decoder to full"):
            RidgeDecoder(torch.zeros(1, *latents), torch.zeros(1, *pictures))


def test_it_decodes_others_as_the_decoder_that_it_was_fitted_to(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    decode = Upsampled(2)
    x, others = (torch.randn(3000, 2, 4, 4, generator=generator) for _ in range(2))
    found = RidgeDecoder(x, decode(x[:1]))
    found.fit(x, decode(x))
    seen, pixels = (
        [
            rows.transpose(0, 1).flatten(1).T
            for rows in (F.unfold(z, 3, padding=1), F.pixel_unshuffle(decode(z), 2).flatten(2))
        ]
        for z in (x, others)
    )
    linear = torch.linalg.lstsq(
        *(torch.cat([t, torch.ones(len(t), 1)], 1) if i == 0 else t for i, t in enumerate(seen))
    )
    left = (torch.cat([pixels[0], torch.ones(len(pixels[0]), 1)], 1) @ linear.solution - pixels[1]).square().mean()
    error = (found(others) - decode(others)).square().mean()
    assert float(error / decode(others).var()) < 0.2
    assert float(error / left) < 0.9
    # the share is of the pixels that it was fitted to, by the definition
    there = decode(x)
    pixels = F.pixel_unshuffle(there, 2).transpose(0, 1).flatten(1)
    share = 1 - (found(x) - there).square().sum() / (pixels - pixels.mean(1, keepdim=True)).square().sum()
    assert abs(float(found.share - share)) < 1e-4


def test_a_large_picture_is_averaged_first(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    decode = Upsampled(32)  # 128 pixels: p = 16, k = 2
    x = torch.randn(40, 2, 4, 4, generator=generator)
    found = RidgeDecoder(x, decode(x[:1]))
    found.fit(x, decode(x))
    assert found(x).shape == (40, 3, 64, 64)
    assert float((found(x) - F.avg_pool2d(decode(x), 2)).square().mean()) < 0.01


# --- whole runs ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.layers(torch.cat([x, t.reshape(-1, 1, 1, 1).expand_as(x[:, :1])], dim=1))
        return found


class Latent(NetworkModel):
    """An untrained network on latents whose samples are pictures."""

    def __init__(self, times: int = 4) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(Small(), VP(), epsilon, (2, 4, 4))
        self.vae = Upsampled(times)

    def decode(self, x: Tensor) -> Tensor:
        found: Tensor = self.vae(x)
        return found


def red(samples: Tensor, condition: Condition) -> Tensor:
    return samples.detach()[:, 0].mean((1, 2))


SMALL: dict[str, Any] = {
    "algorithm": "ctrl_pathwise", "value": "surrogate", "surrogate_decoder": "ridge", "scored_samples": 3, "iterations": 4,
    "batch_size": 12, "steps": 4, "reference_batches": 2, "heldout_samples": 8, "evaluate_every": 4, "checkpoint_every": 2,
    "device": "cpu", "learning_rate": 1e-2, "guard": "off",
}  # fmt: skip


def train(out: Path | None = None, on_event: Any = None, resume: bool = False, **settings: Any) -> Result:
    return finetune(Latent(), red, [""], out=out, resume=resume, on_event=on_event, **{**SMALL, **settings})


def test_a_run_decodes_what_it_shows_to_the_reward_and_what_the_map_is_fitted_to() -> None:
    decoded: list[int] = []
    result = train(on_event=lambda kind, metrics: decoded.append(Upsampled.decoded) if kind == "iteration" else None)
    lines = [line for line in result.history if "cost/reward_calls" in line]
    assert lines[-1]["cost/reward_calls"] == 3 * (2 + 4)
    assert {b - a for a, b in itertools.pairwise(decoded)} == {3}
    reference = next(line for line in result.history if "reference" in line)
    assert 0.9 < reference["surrogate/decoder"] <= 1
    full = train(surrogate_decoder="full")
    assert "surrogate/decoder" not in next(line for line in full.history if "reference" in line)


def test_a_decoder_that_loses_too_much_is_told() -> None:
    decoder = RidgeDecoder(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 8, 8))
    decoder.share.fill_(0.797)
    assert str(lost_in_decoding(decoder)).startswith("the ridge decoder gives 0.80 of the variance of the pictures")
    decoder.share.fill_(0.92)
    assert lost_in_decoding(decoder) is None


def test_kill_and_resume_equals_uninterrupted(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")

    def stop(kind: str, metrics: dict[str, float]) -> None:
        if kind == "iteration" and metrics["iteration"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", on_event=stop)
    resumed = train(tmp_path / "cut", resume=True)
    assert whole.final == resumed.final


def test_auto_takes_it_for_large_pictures_and_the_packages_own_features(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n\n\ndef pooled():\n    return torch.nn.Sequential(torch.nn.AvgPool2d(64), torch.nn.Flatten())\n"
    )

    def decoder(times: int, **settings: Any) -> RidgeDecoder | None:
        config = Config(algorithm="ctrl_pathwise", value="surrogate", **settings)
        surrogate = build_surrogate(config, Latent(times), [""])
        assert surrogate is not None
        return surrogate.decoder

    mine = {"surrogate_features": f"{file}:pooled"}
    assert decoder(4) is None
    assert decoder(32) is not None
    assert decoder(32, surrogate_decoder="full") is None
    assert decoder(32, **mine) is None
    assert decoder(4, surrogate_decoder="ridge") is not None
    with pytest.raises(ValueError, match=r"is a network of yours.*set surrogate_decoder to full"):
        decoder(32, surrogate_decoder="ridge", **mine)
    with pytest.raises(ValueError, match="surrogate_decoder is a setting of value surrogate"):
        Config(algorithm="ctrl_pathwise", value="network", surrogate_decoder="ridge")
