"""Rewards for videos: shifts against known ones, flickering against VBench's formula, and what a still is worth."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import scoreact as sa
from scoreact import rewards as rw
from scoreact.rewards.video import shift
from scoreact.support.errors import RewardError
from scoreact.types import Condition

SIDE, FRAMES = 16, 9


def scored(name: str, videos: Tensor, **options: float) -> Tensor:
    return rw.load(name, **options)(videos, Condition([""] * len(videos)))


def texture(count: int, side: int, band: float, seed: int = 0) -> Tensor:
    """Random pictures that continue at the opposite side, without frequencies far above `band` cycles a pixel: float64."""
    noise = torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    f = torch.fft.fftfreq(side, dtype=torch.float64)
    low = torch.exp(-(f[:, None] ** 2 + f**2) / (2 * band**2))
    found: Tensor = torch.fft.ifft2(torch.fft.fft2(noise) * low).real
    return 0.5 + 0.1 * found / found.std()


def shifts(count: int, most: float) -> Tensor:
    return most * (2 * torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1)


def disc(path: Tensor, radius: float = 2.5) -> Tensor:
    """A red disc on grey with its centre at [F, 2] pixels: [1, 3, F, 16, 16]."""
    grid = torch.arange(SIDE) + 0.5
    x, y = grid - path[:, 0, None, None], grid[:, None] - path[:, 1, None, None]
    inside = (0.5 + radius - (x**2 + y**2).sqrt()).clamp(0, 1)
    colour, ground = torch.tensor([0.9, 0.2, 0.1])[:, None, None, None], 0.15
    return (inside * colour + (1 - inside) * ground)[None]


def moving(speed: float) -> Tensor:
    """To the right, about the middle."""
    x = SIDE / 2 + speed * (torch.arange(FRAMES) - (FRAMES - 1) / 2)
    return disc(torch.stack([x, torch.full((FRAMES,), SIDE / 2)], dim=1))


@pytest.mark.parametrize("most", [0.5, 6.0])
def test_known_shifts_are_found_to_a_thousandth_of_a_pixel(most: float) -> None:
    pictures, by = texture(64, SIDE, 0.15), shifts(64, most)
    found = rw.phase_correlation(pictures, shift(pictures, by), taper=0)
    assert float((found - by).abs().max()) < 1e-3


def test_a_scene_that_enters_and_leaves_the_frame() -> None:
    """Crops of a larger scene: nothing continues at the opposite side, so the window has to hide the borders."""
    scene, by = texture(64, 64, 0.15), shifts(64, 2.0)
    first, second = scene[..., :32, :32], shift(scene, by)[..., :32, :32]
    error = {taper: float((rw.phase_correlation(first, second, taper) - by).abs().mean()) for taper in (0.0, 0.25)}
    assert error[0.25] < 0.05 < error[0.0]


def test_a_disc_before_a_plain_ground() -> None:
    by = torch.tensor([[0.3, 0.0], [0.0, -0.7], [1.25, 0.5], [-2.1, 1.6]])
    start = torch.tensor([8.0, 8.0])
    clips = [disc(torch.stack([start, start + d])) for d in by]
    first, second = (torch.cat([clip[:, :, frame] for clip in clips]) for frame in (0, 1))
    assert float((rw.phase_correlation(first, second) - by).abs().max()) < 0.05


def test_frames_without_contrast_and_the_same_frame_have_not_moved() -> None:
    blank, picture = torch.full((2, 3, SIDE, SIDE), 0.3), texture(2, SIDE, 0.15).float()
    assert rw.phase_correlation(blank, blank).tolist() == [[0, 0], [0, 0]]
    assert float(rw.phase_correlation(picture, picture).abs().max()) < 1e-6


def test_the_shift_has_the_gradient_of_its_definition() -> None:
    """Along a random direction in the pixels, against central differences."""
    pictures, by = texture(8, SIDE, 0.15), shifts(8, 1.3)
    moved = shift(pictures, by).requires_grad_()
    along, step = texture(8, SIDE, 0.15, seed=2), 1e-5
    for axis in (0, 1):
        (gradient,) = torch.autograd.grad(rw.phase_correlation(pictures, moved)[:, axis].sum(), moved)
        ends = [rw.phase_correlation(pictures, moved.detach() + sign * step * along)[:, axis] for sign in (1, -1)]
        assert torch.allclose((gradient * along).sum((1, 2, 3)), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)


def test_temporal_flickering_is_that_of_vbench() -> None:
    """(255 - mean over pairs of the mean |difference| of 8-bit frames) / 255."""
    videos = torch.rand(3, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    frames = (videos * 255).round().transpose(1, 2)
    apart = [[float((b - a).abs().mean()) for a, b in itertools.pairwise(video)] for video in frames]
    ours = scored("temporal_flickering", (videos * 255).round() / 255)
    assert ours.tolist() == pytest.approx([(255 - sum(pairs) / len(pairs)) / 255 for pairs in apart], abs=1e-6)


def test_smoothness_alone_is_maximised_by_a_still_and_the_two_sided_reward_is_not() -> None:
    speeds = (0.0, 0.25, 0.5, 1.0, 1.25)
    clips = torch.cat([moving(speed) for speed in speeds])
    flickering = scored("temporal_flickering", clips)
    parts = rw.SmoothMotion().parts(clips, Condition([""] * len(clips)))
    smooth = parts["consistency"] * parts["steadiness"]
    for one_sided in (flickering, smooth):
        assert float(one_sided[0]) == pytest.approx(1, abs=1e-5)
        assert int(one_sided.argmax()) == 0
    assert bool((flickering.diff() < 0).all())
    both = scored("smooth_motion", clips)
    assert float(both[0]) < 1e-4
    assert bool((both[:4].diff() > 0.1).all())
    assert float(both[3]) > 0.9
    assert float(parts["motion"][4]) == 1
    assert float(both[4] - both[3]) < 0.05  # beyond the target more is not better


def test_what_shakes_dissolves_or_changes_colour_has_less() -> None:
    noise = torch.randn(FRAMES, 2, generator=torch.Generator().manual_seed(0))
    way = torch.stack([4 + torch.arange(FRAMES), torch.full((FRAMES,), 8)], dim=1)
    smooth = disc(way.float())
    fading = 0.15 + (smooth - 0.15) * torch.tensor([1.0, 0.4]).repeat(5)[:FRAMES, None, None]
    turning = smooth.clone()
    turning[:, :, 1::2] = smooth[:, :, 1::2].flip(1)  # blue in every other frame
    clips = torch.cat([smooth, disc(way + 0.8 * noise), fading, turning])
    parts = rw.SmoothMotion().parts(clips, Condition([""] * 4))
    total = scored("smooth_motion", clips)
    assert bool((total[1:] < total[0] - 0.15).all())
    assert float(parts["steadiness"][1]) < 0.2 < 0.95 < float(parts["steadiness"][0])
    assert bool((parts["consistency"][2:] < parts["consistency"][0] - 0.15).all())


def test_it_does_not_matter_where_things_move_to() -> None:
    clip = moving(0.8)
    turned = torch.cat(
        [clip, clip.flip(2), clip.flip(4), clip.transpose(3, 4)]
    )  # backwards in time, mirrored, downwards
    found = scored("smooth_motion", turned)
    assert torch.allclose(found, found[:1], atol=1e-4)


def test_its_gradient_sets_a_slow_shape_going() -> None:
    """Along the gradient in the speed the reward rises as finite differences say."""
    speed = torch.tensor(0.4, requires_grad=True)
    offset = torch.arange(FRAMES) - (FRAMES - 1) / 2

    def value(speed: Tensor) -> Tensor:
        path = torch.stack([SIDE / 2 + speed * offset, torch.full((FRAMES,), SIDE / 2)], dim=1)
        return scored("smooth_motion", disc(path))[0]

    (slope,) = torch.autograd.grad(value(speed), speed)
    step = 0.01
    rise = float(value(speed.detach() + step) - value(speed.detach() - step)) / (2 * step)
    assert float(slope) == pytest.approx(rise, rel=0.1)
    assert rise > 0.5


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(RewardError, match=r"expected \[B, 1 or 3, frames, H, W\]"):
        scored("smooth_motion", torch.rand(2, 3, 16, 16))
    with pytest.raises(RewardError, match="2 frames; this reward needs 3"):
        scored("smooth_motion", torch.rand(2, 3, 2, 16, 16))
    with pytest.raises(RewardError, match="Divide them by 255"):
        scored("temporal_flickering", torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8))
    for option, value in (("target", 0.0), ("tolerance", -1.0), ("target", math.inf), ("taper", 0.6)):
        with pytest.raises(RewardError, match=f"{option} is {value}"):
            rw.load("smooth_motion", **{option: value})


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{"algorithm": "draft"}, {"algorithm": "ctrl_pathwise", "value": "residual"}])
def test_a_video_pipeline_is_tuned_to_it(rule: dict[str, str]) -> None:
    """A tiny WanPipeline by LoRA, the reward's gradient going through its VAE."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from tiny_pipelines import SIZES, make, spelling_tokenizer

    from scoreact.models.pipelines.opening import pipeline_model

    torch.manual_seed(0)
    model = pipeline_model(make("wan", spelling_tokenizer()), lora_rank=2, **SIZES["wan"])
    small = {
        "iterations": 1,
        "batch_size": 2,
        "minibatch_size": 2,
        "steps": 2,
        "reference_batches": 1,
        "heldout_samples": 2,
    }
    result = sa.finetune(model, "smooth_motion", ["a cat", "two dogs"], guard="off", **small, **rule)
    assert {"reward/heldout/consistency", "reward/heldout/steadiness", "reward/heldout/motion"} <= set(result.final)
    assert result.history[-1]["iteration"] == 1
