"""A small text-to-video model of moving balls, trained here in minutes on clips of which many are poor.

    python benchmarks/moving_shapes.py balls              # one CPU thread; writes a folder that `build` opens
    scoreact check model benchmarks/moving_shapes.py:build --option folder=balls

Clips have 8 frames of 16x16 and captions such as "a red ball moving left". Like clips of the web, those of the training set
often show no such thing: in STILL of them the ball stands, in SHAKING of them it shakes on its way. So the pretrained model
draws the right ball and moves it badly. The judge tracks the ball by its colour and shares nothing with any reward.

The denoiser is the package's own `UNet` on pixels, with the frames as channels, and predicts the clip: a network narrower than
the noise cannot predict the noise. Wan's VAE at tiny size had learned the background alone after 140 CPU seconds.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.network import NetworkModel
from scoreact.models.unet import UNet
from scoreact.training.pretrain import fit_denoiser

SIDE, FRAMES = 16, 8
GROUND, SPREAD = 0.2, 0.25  # of a pixel
COLOURS = {"red": (0.95, 0.15, 0.15), "blue": (0.3, 0.4, 1.0)}
WAYS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # x to the right, y downwards
CAPTIONS = [f"a {colour} ball moving {way}" for colour in COLOURS for way in WAYS]
STILL, SHAKING = 0.45, 0.3  # shares of the training clips
SHAKE = 0.8  # pixels, the standard deviation of a shaking clip's places about the way
CLIPS = 6000  # of the training set


def draw(classes: Tensor, generator: torch.Generator, still: float = 0.0, shaking: float = 0.0) -> Tensor:
    """Clips of the captions' classes [B]: [B, 3, FRAMES, SIDE, SIDE] in [0, 1].

    still, shaking: shares of clips in which the ball stands, or shakes. Place, size, speed and background vary.
    """
    count = len(classes)

    def uniform(low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    size, shade, ground, speed = uniform(2.3, 2.9), uniform(0.85, 1.0), uniform(0.1, 0.2), uniform(0.8, 1.3)
    kind = torch.rand(count, generator=generator)
    stands, shakes = kind < still, (kind >= still) & (kind < still + shaking)
    way = torch.tensor(list(WAYS.values()))[classes % len(WAYS)] * torch.where(stands, 0, speed)[:, None]
    travel = (FRAMES - 1) * way  # [B, 2]
    low, high = size[:, None] + 0.3, SIDE - 0.3 - size[:, None]
    start = uniform(low - travel.clamp(max=0), high - travel.clamp(min=0), 2)
    path = start[:, None] + way[:, None] * torch.arange(FRAMES)[:, None]  # [B, F, 2]
    noise = SHAKE * torch.randn(path.shape, generator=generator)
    path = torch.where(shakes[:, None, None], path + noise, path).clamp(low[:, None], high[:, None])
    grid = torch.arange(SIDE) + 0.5
    x, y = grid - path[..., 0, None, None], grid[:, None] - path[..., 1, None, None]  # [B, F, 1, S], [B, F, S, 1]
    inside = (0.5 + size[:, None, None, None] - (x**2 + y**2).sqrt()).clamp(0, 1)[:, None]
    colour = torch.tensor(list(COLOURS.values()))[classes // len(WAYS)] * shade[:, None]
    return inside * colour[..., None, None, None] + (1 - inside) * ground[:, None, None, None, None]


# --- the judge -------------------------------------------------------------------------------------------------------


def track(clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The coloured shape in [B, 3, F, H, W]: centre [B, F, 2] in pixels, area [B, F] in pixels, mean colour [B, F, 3].

    A pixel counts by how far its largest channel is above its smallest: grounds are grey.
    """
    chroma = clips.amax(1) - clips.amin(1)
    weight = (chroma - 0.15).clamp(0, 0.35) / 0.35  # [B, F, H, W]
    area = weight.sum((2, 3))
    known = area.clamp(min=1e-6)
    y = torch.arange(clips.shape[3]) + 0.5
    x = torch.arange(clips.shape[4]) + 0.5
    centre = torch.stack([(weight.sum(2) * x).sum(2), (weight.sum(3) * y).sum(2)], dim=2) / known[..., None]
    colour = (clips * weight[:, None]).sum((3, 4)).permute(0, 2, 1) / known[..., None]
    return centre, area, colour


def judged(clips: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """What the tracker sees of each clip, [B].

    speed: pixels a frame along the path. straight: distance of the ends by the path's length. moves: at least 0.4 pixels a
    frame on balance. identity: a shape of the caption's colour in all frames, its area within a factor of 2 of the clip's
    median. good: identity, moves, and at least 0.9 straight. direction: moves, the ends within 45 degrees of the caption's way.
    """
    centre, area, colour = track(clips)
    steps = centre.diff(dim=1)
    speed = steps.norm(dim=2).mean(1)
    ends = centre[:, -1] - centre[:, 0]
    net = ends.norm(dim=1) / steps.shape[1]
    straight = net / speed.clamp(min=1e-6)
    moves = net >= 0.4
    classes = torch.tensor([CAPTIONS.index(prompt) for prompt in prompts])
    palette = torch.tensor(list(COLOURS.values()))
    hue = nn.functional.normalize(colour, dim=2) @ nn.functional.normalize(palette, dim=1).T  # [B, F, colours]
    wanted = (classes // len(WAYS))[:, None]
    ratio = area / area.median(1, keepdim=True).values.clamp(min=1e-6)
    whole = (area >= 4) & (ratio > 0.5) & (ratio < 2)
    identity = ((hue.argmax(2) == wanted) & whole).all(1)
    way = torch.tensor(list(WAYS.values()))[classes % len(WAYS)]
    direction = (ends * way).sum(1) >= ends.norm(dim=1) * 0.5**0.5
    found = {"moves": moves, "identity": identity, "good": moves & identity & (straight >= 0.9)}
    return {"speed": speed, "straight": straight, "direction": direction & moves} | found


# --- the model -------------------------------------------------------------------------------------------------------


class ClipModel(NetworkModel):
    """A flow on clips whose frames are channels, [3 FRAMES, SIDE, SIDE]; samples are clips in [0, 1]."""

    def decode(self, x: Tensor) -> Tensor:
        """States as clips [B, 3, FRAMES, SIDE, SIDE] in [0, 1]."""
        return super().decode(x).unflatten(1, (3, FRAMES))

    def notes(self) -> list[str]:
        """None: what lies beyond the range is the network's error."""
        return []


def make_model(network: nn.Module, guidance_scale: float = 1.0) -> ClipModel:
    """States are (pixel - GROUND) / SPREAD."""
    return ClipModel(
        network, RectifiedFlow(), prediction.x0, (3 * FRAMES, SIDE, SIDE), CAPTIONS,
        guidance_scale=guidance_scale, low=-GROUND / SPREAD, high=(1 - GROUND) / SPREAD,
    )  # fmt: skip


def make_network() -> UNet:
    return UNet(channels=3 * FRAMES, classes=len(CAPTIONS), widths=(32, 64, 96))


def build(folder: str, guidance_scale: float = 1.0) -> ClipModel:
    """The model in a folder, for `scoreact train benchmarks/moving_shapes.py:build`."""
    network = make_network()
    network.load_state_dict(load_file(f"{folder}/model.safetensors"))
    return make_model(network, float(guidance_scale))


def pretrain(folder: Path, steps: int) -> None:
    """Writes model.safetensors, from seeds."""
    begin = time.process_time()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(len(CAPTIONS), (CLIPS,), generator=generator)
    states = (draw(classes, generator, STILL, SHAKING).flatten(1, 2) - GROUND) / SPREAD
    folder.mkdir(parents=True, exist_ok=True)
    losses: list[float] = []

    def seen(step: int, metrics: Any, averaged: nn.Module) -> None:
        losses.append(metrics["loss"])
        if (step + 1) % 100 == 0:
            seconds = time.process_time() - begin
            print(f"{seconds:5.0f} s  step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}", flush=True)
            save_file(averaged.state_dict(), str(folder / "model.safetensors"))

    model = make_model(make_network())
    averaged = fit_denoiser(
        model.network, states, classes, model.schedule, model.prediction, steps=steps, batch_size=32, learning_rate=2e-3,
        average_halflife=50, on_step=seen,
    )  # fmt: skip
    save_file(averaged.state_dict(), str(folder / "model.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretrain(arguments.folder, arguments.steps)


if __name__ == "__main__":
    main()
