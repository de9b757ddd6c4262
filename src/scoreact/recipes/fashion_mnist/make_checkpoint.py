"""Makes the shipped model of Fashion-MNIST: a class-conditional rectified flow in two stages of pretraining.

Stage 1 follows a cosine over 11,000 steps and ends after 3,500 of them; stage 2 starts from its averaged weights, with
an optimiser and a cosine of its own. Knows the pictures and the network; does not know rewards.

    scoreact pretrain fashion-mnist --data PATH --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...dynamics.grids import uniform
from ...dynamics.samplers import SAMPLERS
from ...dynamics.schedule import RectifiedFlow
from ...models.unet import UNet
from ...sampling.draw import draw
from ...support.errors import SettingError
from ...support.files import read_tensors, write_tensors
from ...training.pretrain import fit_denoiser
from ...types import Metrics
from .data import CLASSES, load_pictures
from .recipe import CHECKPOINT, WIDTHS, model

LOG_EVERY = 250
SHEET_COLUMNS, SHEET_STEPS, SHEET_SEED = 10, 10, 0


@dataclass(frozen=True)
class Stage:
    """One call of `fit_denoiser`: the cosine's length, where on it to end, the highest rate, the seed of its draws."""

    steps: int
    stop_after: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.stop_after <= self.steps:
            raise SettingError(
                f"steps is {self.steps}, stop_after {self.stop_after}; expected 1 <= stop_after <= steps."
            )


STAGES = (Stage(11_000, 3_500, 1e-3, 0), Stage(3_000, 3_000, 7e-4, 1))  # what made the shipped weights


def train(
    images: Tensor,
    labels: Tensor,
    stages: Sequence[Stage],
    init: Path | None = None,
    bfloat16: bool = True,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[nn.Module, list[list[dict[str, float]]]]:
    """The averaged network after the stages, and each stage's history: step, mean loss since the line before, seconds.

    images uint8 [N, 28, 28], labels int64 [N]. Each stage starts from the averaged weights of the one before.
    """
    x = images.float().div(127.5).sub(1)[:, None]
    torch.manual_seed(0)  # initial weights
    network: nn.Module = UNet(widths=WIDTHS)
    if init is not None:
        network.load_state_dict({name: tensor.float() for name, tensor in read_tensors(init).items()})
    histories: list[list[dict[str, float]]] = []
    for number, stage in enumerate(stages):
        history: list[dict[str, float]] = []
        losses: list[float] = []
        begin = time.perf_counter()

        def on_step(
            step: int,
            metrics: Metrics,
            averaged: nn.Module,
            number: int = number,
            stage: Stage = stage,
            history: list[dict[str, float]] = history,
            losses: list[float] = losses,
            begin: float = begin,
        ) -> None:
            losses.append(metrics["loss"])
            if (step + 1) % LOG_EVERY == 0 or step + 1 == stage.stop_after:
                mean = sum(losses) / len(losses)
                history.append({"step": step + 1, "loss": mean, "seconds": time.perf_counter() - begin})
                losses.clear()
                if on_log is not None:
                    on_log(number, history[-1])

        averaged = fit_denoiser(
            network, x, labels, RectifiedFlow(), steps=stage.steps, stop_after=stage.stop_after,
            learning_rate=stage.learning_rate, seed=stage.seed, bfloat16=bfloat16, on_step=on_step,
        )  # fmt: skip
        network.load_state_dict(averaged.state_dict())
        histories.append(history)
    return network, histories


def describe(
    stages: Sequence[Stage],
    histories: Sequence[Sequence[dict[str, float]]],
    timing: str,
    torch_version: str,
    bfloat16: bool = True,
    init: str | None = None,
) -> dict[str, Any]:
    """What the .json beside the weights says. An entry of `loss`: [step, mean loss since the entry before, seconds]."""
    network = UNet(widths=WIDTHS)
    return {
        "made_by": "scoreact pretrain fashion-mnist",
        "data": "Fashion-MNIST, the 60,000 pictures of the train split (zalandoresearch/fashion-mnist, MIT licence; "
        "Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747). The weights are a product of these pictures; none is included.",
        "network": {"class": "UNet", **network.config},
        "parameters": sum(p.numel() for p in network.parameters()),
        "stored_as": "float16, the averaged weights of the last stage",
        "schedule": "RectifiedFlow",
        "prediction": "velocity",
        "pictures": "[-1, 1]",
        "batch_size": 128,
        "optimizer": "AdamW, betas 0.9 and 0.99, weight decay 0.01, gradient norm at most 1, 200 steps of warm-up",
        "label_dropout": 0.1,
        "average_halflife": 500,
        "bfloat16_autocast": bfloat16,
        "weights_seed": 0,
        "init": init,
        "torch": torch_version,
        "timing": timing,
        "stages": [
            {
                **asdict(stage),
                "loss": [[int(line["step"]), round(line["loss"], 5), round(line["seconds"])] for line in history],
            }
            for stage, history in zip(stages, histories, strict=True)
        ],
    }


def write_description(path: Path, description: dict[str, Any]) -> None:
    """JSON, each list of numbers on one line."""
    text = json.dumps(description, indent=1)
    text = re.sub(
        r"\[[\d\s.,]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )
    path.write_text(text + "\n", encoding="utf-8")


def sample_sheet(weights: Path | None = None) -> Image.Image:
    """A row a class, ten samples each by ten DDIM steps at noise level 1. Without `weights`: the shipped ones."""
    source = model(weights=None if weights is None else str(weights)).eval()
    source.use_bfloat16 = False  # the same pictures whether or not the CPU has bfloat16
    prompts = [name for name in CLASSES for _ in range(SHEET_COLUMNS)]
    decoded = draw(source, prompts, SAMPLERS["ddim"], uniform(source.schedule, SHEET_STEPS), SHEET_SEED)[1]
    twice = decoded[:, 0].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    tiles = F.pad(twice, (1, 1, 1, 1), value=1.0)
    rows, side = len(CLASSES), tiles.shape[-1]
    sheet = tiles.reshape(rows, SHEET_COLUMNS, side, side).transpose(1, 2).reshape(rows * side, SHEET_COLUMNS * side)
    return Image.fromarray((sheet * 255).round().byte().numpy())


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain the Fashion-MNIST model; without --init, --steps, --stop-after, --learning-rate or --seed in the two
    stages that made the shipped weights, else in one stage. Writes weights, their description and a sheet of samples.
    """
    parser = argparse.ArgumentParser(
        prog="scoreact pretrain fashion-mnist", description=" ".join(str(main.__doc__).split())
    )
    parser.add_argument("--data", help="an .npz or a folder with the official files; downloaded when left out")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--init", type=Path, help="weights to start from (.safetensors)")
    parser.add_argument("--steps", type=int, help="length of the learning rate's cosine [default 11000]")
    parser.add_argument("--stop-after", type=int, help="end after so many steps [default: steps]")
    parser.add_argument("--learning-rate", type=float, help="[default 0.001]")
    parser.add_argument(
        "--seed", type=int, help="of pictures, times and noise; the initial weights are always seed 0's [0]"
    )
    parser.add_argument(
        "--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="autocast [default: yes, as shipped]"
    )
    parser.add_argument("--threads", type=int, default=1, help="1 makes the weights repeatable on one machine")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    stages: Sequence[Stage] = STAGES
    own = (options.init, options.steps, options.stop_after, options.learning_rate, options.seed)
    if any(value is not None for value in own):
        steps = STAGES[0].steps if options.steps is None else options.steps
        rate = STAGES[0].learning_rate if options.learning_rate is None else options.learning_rate
        stop = steps if options.stop_after is None else options.stop_after
        stages = (Stage(steps, stop, rate, options.seed or 0),)
    images, labels = load_pictures(options.data, "train")
    options.out.mkdir(parents=True, exist_ok=True)

    def show(number: int, line: dict[str, float]) -> None:
        place = f"stage {number + 1}/{len(stages)} step {int(line['step'])}/{stages[number].stop_after}"
        print(f"{place} loss {line['loss']:.4f} {line['seconds']:.0f} s", flush=True)

    network, histories = train(images, labels, stages, options.init, options.bfloat16, show)
    weights = options.out / CHECKPOINT
    write_tensors(weights, {name: tensor.half() for name, tensor in network.state_dict().items()})
    timing = f"seconds of wall time of each stage, {options.threads} CPU thread(s), {platform.machine()}"
    init = None if options.init is None else options.init.name
    description = describe(stages, histories, timing, torch.__version__, options.bfloat16, init)
    write_description(weights.with_suffix(".json"), description)
    sample_sheet(weights).save(weights.with_suffix(".png"))
    for path in (weights, weights.with_suffix(".json"), weights.with_suffix(".png")):
        print(path)


if __name__ == "__main__":
    main()
