"""Before and after from the same noise, in the form that suits the samples' shape: pictures, videos, points, series.

Draws and samples; knows no files.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..control.policy import Policy
from ..dynamics.samplers import SAMPLERS
from ..models.base import HasExactLaw, ScoreModel
from ..recipes.base import Problem
from ..rewards.base import Reward
from ..runs.films import as_picture, is_video, small, write_film
from ..sampling.draw import balanced, draw, draw_states
from ..support.devices import device_of
from ..training.config import Config
from . import figures

PROMPTS, COLUMNS, FRAMES, POINTS, SERIES = 10, 5, 8, 800, 6  # how much is drawn
VIDEO_PROMPTS, VIDEO_COLUMNS, SIDE = 4, 2, 96  # rows and columns of a film, pixels of a video's longer side in it
FILM_PIXELS = 2_000_000  # in all frames of a film together, so that a GIF is of no more bytes or little more


@dataclass(frozen=True)
class Picture:
    """A figure with what a page needs to show it, and of videos the same as an animated GIF."""

    figure: Figure
    name: str
    alt: str
    caption: str
    film: bytes | None = None


def before_and_after(policy: Policy, problem: Problem, config: Config) -> list[Picture]:
    """The pretrained and the tuned model's samples, with training's solver and steps; the main picture first."""
    shown = list(problem.prompts[:PROMPTS])
    alt = "Samples before and after training, from the same noise"
    shape = _draw(policy.reference, shown[:1], config)[2].shape[1:]
    if is_video(shape):
        return [_videos(policy, problem, config, shape)]
    if shape == (2,):
        return [_points(policy, problem, config)]
    names = [name for name in shown for _ in range(COLUMNS)]
    ts, paths, before = _draw(policy.reference, names, config)
    _, tuned_paths, after = _draw(policy, names, config)
    if len(shape) != 3 or shape[0] not in (1, 3):
        caption = f"{min(len(before), SERIES)} samples; a colour is the same noise on both sides."
        return [Picture(figures.series(before[:SERIES], after[:SERIES]), "samples", alt, caption)]
    caption = "A row a prompt. Each picture on the right starts from the same noise as its partner on the left."
    if len(problem.prompts) > len(shown):
        caption += f" The first {len(shown)} of {len(problem.prompts)} prompts."
    frames = torch.linspace(0, len(ts) - 1, min(FRAMES, len(ts))).round().long()
    pairs = ((policy.reference, paths), (policy.model, tuned_paths))
    strips = torch.stack([model.decode(xs[frames.to(xs.device), 0]) for model, xs in pairs])
    film = f"One denoising of “{textwrap.shorten(shown[0], 60)}”, from noise (t = 0) to picture (t = 1)."
    return [
        Picture(figures.gallery(shown, before, after), "samples", alt, caption),
        Picture(figures.film_strip(ts[frames].tolist(), strips), "filmstrip", "One denoising, before and after", film),
    ]


def _videos(policy: Policy, problem: Problem, config: Config, shape: Sequence[int]) -> Picture:
    """A film, and some frames of the first column. One video is decoded at a time, and only a small copy of it is kept."""
    shown = list(problem.prompts[:VIDEO_PROMPTS])
    high, wide = (size * SIDE // max(shape[2:]) + 8 for size in shape[2:])
    most = max(2, FILM_PIXELS // (high * wide * len(shown) * 2 * VIDEO_COLUMNS))
    rows: list[list[Tensor]] = []
    for number, prompt in enumerate(shown):
        row: list[Tensor] = []
        for model in (policy.reference, policy):
            xs = _states(model, [prompt] * VIDEO_COLUMNS, config, config.seed + 1 + number)
            row += [small(_decode(model, x), SIDE, most) for x in xs[-1].split(1)]
        rows.append(row)

    def frame(number: int) -> Image.Image:
        pictures = torch.stack([torch.stack([video[:, number] for video in row]) for row in rows]) / 255
        return as_picture(figures.canvas(pictures.expand(-1, -1, 3, -1, -1), 4, 24).permute(2, 0, 1))

    file = io.BytesIO()
    count = rows[0][0].shape[1]
    write_film(frame, count, file, "GIF")
    kept = torch.linspace(0, count - 1, min(FRAMES, count)).round().long()
    pairs = [
        [(video[:, kept].transpose(0, 1) / 255).expand(-1, 3, -1, -1) for video in row[::VIDEO_COLUMNS]] for row in rows
    ]
    caption = (
        f"A row a prompt ({'; '.join(textwrap.shorten(prompt, 40) for prompt in shown)}): left of the gap before, right of it "
        "after training, from the same noise."
    )
    if len(problem.prompts) > len(shown):
        caption += f" The first {len(shown)} of {len(problem.prompts)} prompts."
    if count < shape[1]:
        caption += f" {count} of {shape[1]} frames."
    figure = figures.video_strips(shown, torch.stack([torch.stack(pair) for pair in pairs]))
    return Picture(figure, "samples", "Videos before and after training, from the same noise", caption, file.getvalue())


def _points(policy: Policy, problem: Problem, config: Config) -> Picture:
    """2-D samples before and after, and of the optimum p_ref exp(R / beta) / Z where the problem knows it."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    names = balanced(problem.prompts, POINTS, generator)
    pairs = (("before", policy.reference), ("after", policy.model))
    clouds = [(title, _draw(model, names, config)[2].cpu()) for title, model in pairs]
    law = problem.model.exact_law() if isinstance(problem.model, HasExactLaw) else None
    parts: list[Any] = [getattr(problem.reward, name, None) for name in ("linear", "quadratic")]
    memoryless = (config.noise, config.noise_scale) == ("noise_level", 1.0)  # with other noise the optimum is another
    if memoryless and law is not None and all(part is not None for part in parts):
        optimum = law.tilted(parts[0], parts[1], config.kl_weight)[0].cpu()
        clouds.append(("optimum, closed form", optimum.sample(POINTS, generator)))
    caption = f"{POINTS} samples each, before and after from the same noise. Lines: equal reward."
    figure = figures.scatter(clouds, _at_first_prompt(problem.reward, problem.model, problem.prompts))
    return Picture(figure, "samples", "Samples before and after training", caption)


def _at_first_prompt(reward: Reward, model: ScoreModel, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
    def of(points: Tensor) -> Tensor:
        with torch.no_grad():
            return reward(points, model.condition([prompts[0]] * len(points)))

    return of


@torch.no_grad()
def _decode(model: ScoreModel, x: Tensor) -> Tensor:
    """The only one of a batch."""
    return model.decode(x)[0]


def _states(model: ScoreModel, names: Sequence[str], config: Config, seed: int) -> Tensor:
    ts, noise = config.times(model.schedule), config.sde(model.schedule).noise
    return draw_states(model, names, SAMPLERS[config.solver], ts, seed, device_of(model), noise)


def _draw(model: ScoreModel, names: Sequence[str], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Times, states and decoded samples; the same noise for every model."""
    ts, noise = config.times(model.schedule), config.sde(model.schedule).noise
    xs, decoded = draw(model, names, SAMPLERS[config.solver], ts, config.seed + 1, device_of(model), noise)
    return ts, xs, decoded
