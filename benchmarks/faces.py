"""A third party's trained DDPM of 64x64 faces, tuned by low-rank adapters: the first model here that none of us made.

    python benchmarks/faces.py sample WEIGHTS --out faces.png
    python benchmarks/faces.py train WEIGHTS --reward hair --picture before_after.png
    python benchmarks/faces.py show RUN --picture before_after.png     # of a run of scoreact train, which goes on after a kill
    python benchmarks/faces.py train --tiny        # the same with small random weights: seconds, and no file

WEIGHTS: `ddpm_64_uint8.safetensors`, wangjia184/diffusion_model (63 million parameters, MIT), every tensor as bytes with an
affine code: value = code x scale + low. The pictures that it was trained on have unclear rights, so nothing of it ships.
It takes every command too: `scoreact train benchmarks/faces.py:build --option weights=WEIGHTS --option lora_rank=8
--reward benchmarks/faces.py:hair`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.grids import GRIDS
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.dynamics.schedule import FromAlphasCumprod
from scoreact.models.network import IntegerSteps, NetworkModel
from scoreact.support.names import known_name
from scoreact.types import Condition, Metrics

STEPS, START = (
    300,
    285,
)  # of the schedule; from index 299, whose alphas_cumprod is 3e-9, two thirds of the samples are black
WIDTHS, TINY = (64, 128, 256, 512), (8, 16, 16, 16)


# --- the network -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with the time between: [B, before, H, W] -> [B, after, H, W]."""

    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(8, before, 1e-3), nn.Conv2d(before, after, 3, padding=1)
        self.emb = nn.Linear(time, after)
        self.n2, self.c2 = nn.GroupNorm(8, after, 1e-3), nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.c1(F.silu(self.n1(x))) + self.emb(F.silu(time))[:, :, None, None]
        output: Tensor = self.c2(F.silu(self.n2(h))) + self.skip(x)
        return output


class Attention(nn.Module):
    """One head over positions. What it adds to is the normalised input, as this network was trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.n = nn.GroupNorm(8, width, 1e-3)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x).flatten(2).transpose(1, 2)
        h = h + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return h.transpose(1, 2).reshape(x.shape)


class Resampling(nn.Module):
    """A step to half the side (padded at the right and at the bottom alone) or to twice."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up, self.c = up, nn.Conv2d(width, width, 3, 1 if up else 2, 1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1))
        output: Tensor = self.c(x)
        return output


class Faces(nn.Module):
    """(x [B, 3, S, S] in [-1, 1], step [B] of 300) -> the noise in x."""

    def __init__(self, widths: Sequence[int] = WIDTHS, time: int = 256) -> None:
        super().__init__()
        self.half = time // 2
        self.time = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept, before = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(2):
                self.down.append(self._block(before, width, time, level >= 2))
                kept.append(before := width)
            if level < len(widths) - 1:
                self.down.append(nn.ModuleList([Resampling(width, up=False)]))
                kept.append(width)
        self.mid = nn.ModuleList([Residual(before, before, time), Attention(before), Residual(before, before, time)])
        for level, width in reversed(list(enumerate(widths))):
            for j in range(3):
                block = self._block(before + kept.pop(), width, time, level >= 2)
                before = width
                if j == 2 and level > 0:
                    block.append(Resampling(width, up=True))
                self.up.append(block)
        self.norm, self.last = nn.GroupNorm(8, before, 1e-3), nn.Conv2d(before, 3, 3, padding=1)

    @staticmethod
    def _block(before: int, after: int, time: int, attention: bool) -> nn.ModuleList:
        return nn.ModuleList([Residual(before, after, time), *([Attention(after)] if attention else [])])

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.with_features(x, step)[0]

    def with_features(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Its output, and the means of the middle block's channels, [B, F]."""
        frequencies = torch.exp(-math.log(10_000) * torch.arange(self.half, device=x.device) / (self.half - 1))
        angles = step[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))

        def through(block: nn.Module, h: Tensor) -> Tensor:
            for layer in block.children():
                h = layer(h, time) if isinstance(layer, Residual) else layer(h)
            return h

        h = self.first(x)
        kept = [h]
        for block in self.down:
            h = through(block, h)
            kept.append(h)
        middle = h = through(self.mid, h)
        for block in self.up:
            h = through(block, torch.cat([h, kept.pop()], dim=1))
        return self.last(F.silu(self.norm(h))), middle.mean((2, 3))


def load(weights: str, network: Faces) -> Faces:
    """The network with the weights of the file, bytes turned into numbers."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        code = json.loads(file.metadata()["affine"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  no mapping
    for name, (scale, low) in code.items():
        tensors[name] = tensors[name] * scale + low
    network.load_state_dict(tensors)
    return network


def alphas_cumprod() -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, with s = 0.008 and betas in [1e-4, 0.9999]: [300] float64."""
    level = torch.cos((torch.arange(STEPS + 1, dtype=torch.float64) / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - level[1:] / level[:-1]).clamp(1e-4, 0.9999)).cumprod(0)


def build(weights: str = "", tiny: bool = False, rows: int = 8) -> sa.Problem:
    """The model, with what judges its pictures. tiny: a small network with random weights instead of the file's.

    rows: of a call of the network; a GPU takes 32 in the time of 8.
    """
    if tiny:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, side = Faces(TINY, time=32), 16
    elif weights:
        network, side = load(weights, Faces()), 64
    else:
        raise SystemExit("give the weights' file, or tiny for small random ones.")
    schedule = FromAlphasCumprod(alphas_cumprod().tolist(), t_min=1 - (START + 1) / STEPS)
    network = IntegerSteps(network.eval(), STEPS)
    shape, ends = (3, side, side), {"low": -1, "high": 1}
    model = NetworkModel(network, schedule, prediction.epsilon, shape, rows_per_call=rows, **ends)
    return sa.Problem(model, judge=judge, labels={"problem": f"faces of {side}x{side} pixels"})


# --- what the pictures can be judged by ------------------------------------------------------------------------------

COLOURS = {  # of hair, sRGB
    "black": (0.13, 0.11, 0.14), "brown": (0.42, 0.27, 0.20), "blonde": (0.93, 0.82, 0.55), "orange": (0.89, 0.55, 0.29),
    "red": (0.72, 0.22, 0.22), "pink": (0.93, 0.62, 0.72), "purple": (0.52, 0.38, 0.66), "blue": (0.36, 0.48, 0.78),
    "green": (0.44, 0.63, 0.45), "white": (0.87, 0.87, 0.91), "skin": (0.97, 0.86, 0.80),
}  # fmt: skip
SPREAD = 12.0  # of a colour's pixels, in units of Lab


def lab(images: Tensor) -> Tensor:
    """sRGB [B, 3, ...] in [0, 1] -> CIE L*a*b* under D65, in which distances are those that people see."""
    linear = torch.where(images > 0.04045, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, images / 12.92)
    to_xyz = images.new_tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) / images.new_tensor([[0.9505], [1.0], [1.089]])
    xyz = torch.einsum("ij,bj...->bi...", to_xyz, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], dim=1)


def named(images: Tensor) -> Tensor:
    """How much a pixel is of each colour, [B, 11, H, W]: the posterior of equal Gaussians around the colours in Lab."""
    palette = lab(images.new_tensor(list(COLOURS.values())).T[None])[0].T  # [11, 3]
    distance = (lab(images).unsqueeze(1) - palette[None, :, :, None, None]).square().sum(2)
    return torch.softmax(-distance / (2 * SPREAD**2), dim=1)


def part(images: Tensor, rows: tuple[float, float], columns: tuple[float, float]) -> Tensor:
    """A window, its ends as shares of the side."""
    side = images.shape[-1]
    return images[..., int(rows[0] * side) : int(rows[1] * side), int(columns[0] * side) : int(columns[1] * side)]


HAIR, FACE = ((0.08, 0.36), (0.25, 0.75)), ((0.58, 0.80), (0.36, 0.64))  # rows and columns


def hair(images: Tensor, prompts: Sequence[str] = (), colour: str = "blue") -> Tensor:
    """log p(a pixel of the hair has the colour, and none of three of the face): [B, 3, H, W] in [0, 1] -> [B], nats.

    A picture tinted as a whole is paid no more than one without the colour. As a log-probability it has the model's posterior
    for its optimum at kl_weight 1.
    """
    shares = named(images)[:, list(COLOURS).index(known_name(colour, COLOURS, "unknown colour"))]
    found, elsewhere = (part(shares, *window).mean((1, 2)) for window in (HAIR, FACE))
    return (0.99 * found + 0.01).log() + 3 * (1 - 0.99 * elsewhere).log()


def bright(images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    """Mean luminance in tenths: [B, 3, H, W] -> [B]."""
    weights = images.new_tensor([0.2126, 0.7152, 0.0722])[:, None, None]
    return 10 * (images * weights).sum(1).mean((1, 2))


REWARDS: dict[str, Callable[..., Tensor]] = {"hair": hair, "bright": bright}
for function in REWARDS.values():
    function.differentiable = True  # type: ignore[attr-defined]


def judge(samples: Tensor, condition: Condition) -> Metrics:
    """What no reward is paid for: whether the face is still skin, the contrast, and fine detail (of which noise has most)."""
    shares = named(samples)
    skin = part(shares[:, list(COLOURS).index("skin")], *FACE).mean()
    detail = (samples - F.avg_pool2d(F.pad(samples, (1, 1, 1, 1), mode="replicate"), 3, 1)).square().mean().sqrt()
    return {
        "judge/skin": float(skin),
        "judge/contrast": float(samples.std((1, 2, 3)).mean()),
        "judge/detail": float(detail),
    }


def hair_of(images: Tensor) -> list[str]:
    """The colour that most of the hair's pixels are nearest to, a name for each picture."""
    nearest = part(named(images), *HAIR).argmax(1).flatten(1)
    return [list(COLOURS)[int(row.mode().values)] for row in nearest]


# --- looking ---------------------------------------------------------------------------------------------------------


def draw(model: Any, count: int, steps: int, seed: int, device: str) -> Tensor:
    """Pictures [count, 3, S, S] by `steps` stochastic steps of DDIM, some at a time, on the CPU."""
    from scoreact.sampling.draw import draw as sample

    ts = GRIDS["uniform"](model.schedule, steps, None)
    parts = [
        sample(model, [""] * min(16, count - start), sampler_by_name("ddim"), ts, seed + start, device)[1]
        .detach()
        .cpu()
        for start in range(0, count, 16)
    ]
    return torch.cat(parts)


def noise_missed(model: NetworkModel, pictures: Tensor) -> dict[int, float]:
    """Mean square of (predicted - true noise) at a few indices, on the model's own pictures noised anew."""
    generator, found = torch.Generator().manual_seed(1), {}
    for step in (5, 50, 100, 150, 200, 285):
        kept = alphas_cumprod()[step].float()
        noise = torch.randn(pictures.shape, generator=generator)
        noisy = kept.sqrt() * (2 * pictures - 1) + (1 - kept).sqrt() * noise
        with torch.no_grad():
            predicted = model.network(noisy, torch.full((len(noisy),), 1 - (step + 1) / STEPS))
        found[step] = float((predicted - noise).square().mean())
    return found


def save(path: Path, *rows: Tensor) -> None:
    """Rows of pictures, twice as large, as one PNG."""
    from PIL import Image

    grid = torch.cat([torch.cat(list(F.pad(row, (1, 1, 1, 1), value=1.0)), dim=2) for row in rows], dim=1)
    pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    Image.fromarray(pixels).save(path, optimize=True)


def mean(values: Tensor) -> str:
    """With half of its 95 % interval."""
    return f"{float(values.mean()):.3f} ± {1.96 * float(values.std()) / math.sqrt(len(values)):.3f}"


def sample(problem: sa.Problem, count: int, steps: int, seed: int, out: Path) -> None:
    model: Any = problem.model
    begin = time.process_time()
    pictures = draw(model, count, steps, seed, "cpu")
    seconds = time.process_time() - begin
    save(out, *pictures.split(8))
    print(f"{count} pictures in {out}; {seconds / count / steps:.3f} CPU s a picture and step")
    print("hair: " + ", ".join(hair_of(pictures)))
    errors = noise_missed(model, pictures[:8])
    print("mean square of the noise missed, by index: " + ", ".join(f"{i} {e:.4f}" for i, e in errors.items()))


# --- training --------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {  # half of the steps carry the gradient; at a rate of 1e-3 the first step cost 62 nats of path KL
    "algorithm": "draft", "last_steps": 5, "steps": 10, "iterations": 8, "batch_size": 8, "minibatch_size": 8,
    "reference_batches": 4, "heldout_samples": 16, "evaluate_every": 8, "learning_rate": 6e-5, "kl_weight": 1.0,
    "average": 0.5, "warmup": 0,
}  # fmt: skip


def values_of(words: Sequence[str]) -> dict[str, Any]:
    """name=value words as a mapping."""
    return {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in words)}


def train(problem: sa.Problem, options: argparse.Namespace) -> None:
    """Tune adapters to a reward; print reward, path KL and judge before and after, on fresh pictures from the same noise."""
    from scoreact.training.config import updated

    torch.manual_seed(0)  # of the adapters' first weights
    plain: Any = problem.model
    model = sa.lora(plain, options.rank)
    reward = sa.load_reward(REWARDS.get(options.reward, options.reward), **values_of(options.reward_option))
    given = values_of(options.setting)
    small = {"iterations": 2, "batch_size": 4, "minibatch_size": 4, "heldout_samples": 4} if options.tiny else {}
    config = updated(sa.Config(), {**given, "device": options.device}, below={**SETTINGS, **small})
    begin = time.process_time()

    def show(kind: str, metrics: dict[str, float]) -> None:
        if kind in ("reference", "iteration", "evaluation", "guard"):
            kept = (
                "iteration", "reward/mean", "reward/heldout", "policy/kl", "objective/J", "objective/recovered",
                "objective/J_ref", "objective/J_star", "surrogate/explained_variance",
            )  # fmt: skip
            words = [f"{name} {metrics[name]:.3g}" for name in kept if name in metrics]
            print(
                f"{time.process_time() - begin:5.0f} s  {kind}  {'  '.join(words)}  {metrics.get('text', '')}",
                flush=True,
            )

    result = sa.finetune(model, reward, judge=judge, config=config, out=options.out, on_event=show, progress=False)
    seconds = time.process_time() - begin
    reference, final = result.reference, result.final
    kl, star = final.get("policy/kl", math.nan), reference["objective/J_star"]
    print(
        f"\nCPU seconds {seconds:.0f}; path KL {kl:.2f} ± {1.96 * final.get('policy/kl_se', math.nan):.2f} nats; J_ref "
        f"{reference['objective/J_ref']:.3f}; J* {star:.3f}; share recovered {final['objective/recovered']:.2f}; reward calls "
        f"{max(line.get('cost/reward_calls', 0) for line in result.history):.0f}; stopped: {result.stopped}"
    )
    compare(
        result.policy.reference, result.policy.model, reward, config.steps, options.each, options.device, options.picture
    )  # fmt: skip


def compare(
    before: Any, after: Any, reward: Callable[..., Tensor], steps: int, each: int, device: str, picture: Path | None
) -> dict[str, Any]:
    """Print what two models' fresh pictures from the same noise earn, and what the judge says of them; for a line of JSON."""
    seed = 10_000  # noise that neither training nor its evaluations saw
    views = {name: draw(which, each, steps, seed, device) for name, which in (("before", before), ("after", after))}
    found: dict[str, Any] = {"pictures": each}
    rewards = []
    for name, pictures in views.items():
        condition = Condition([""] * len(pictures))
        rewards.append(reward(pictures, condition))
        colours = hair_of(pictures)
        top = sorted({c: colours.count(c) for c in colours}.items(), key=lambda item: -item[1])
        found[name] = {
            "reward": mean(rewards[-1]), "hair by its nearest colour": ", ".join(f"{n} {c}" for c, n in top[:4]),
            **{what: f"{value:.3f}" for what, value in judge(pictures, condition).items()},
        }  # fmt: skip
    found["gain"] = mean(rewards[1] - rewards[0])
    print("\n" + table(found))
    if picture is not None:
        save(picture, *(pictures[:8] for pictures in views.values()))
    return found


def table(found: dict[str, Any]) -> str:
    """Of what `compare` found."""
    rows = [f"| {found['pictures']} fresh pictures from the same noise | before | after |", "| --- | ---: | ---: |"]
    rows += [f"| {what} | {found['before'][what]} | {found['after'][what]} |" for what in found["before"]]
    rows += ["", f"Gain of a picture over that of the same noise: {found['gain']}."]
    return "\n".join(rows)


def look_at_run(options: argparse.Namespace) -> None:
    """The command `show`: a run's pictures before and after, and a line of JSON."""
    run = sa.open_run(options.run)
    policy, reward = run.policy(), run.problem.reward
    found = compare(policy.reference, policy.model, reward, run.config.steps, options.each, "cpu", options.picture)
    reference, final = run.reference, run.final
    j_ref, star = reference["objective/J_ref"], reference["objective/J_star"]
    costs = [line["cost/reward_calls"] for line in run.history if "cost/reward_calls" in line]
    found["run"] = {
        "J_ref": f"{j_ref:.2f} ± {1.96 * reference['objective/J_ref_se']:.2f}", "J*": f"{star:.2f}",
        "J at the end": f"{final['objective/J']:.2f}, from {run.record.evaluations[0]['objective/J']:.2f}",
        "path KL": f"{final['policy/kl']:.2f} ± {1.96 * final['policy/kl_se']:.2f} nats",
        "reward calls in training": f"{costs[-1]:.0f}",
    }  # fmt: skip
    found["settings"] = run.config.to_dict()
    found["guard"] = [line["text"] for line in run.history if "guard" in line]
    print("; ".join(f"{what} {value}" for what, value in found["run"].items()), *found["guard"], sep="\n")
    if options.line is not None:
        options.line.write_text(json.dumps(found) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    looking, training = commands.add_parser("sample"), commands.add_parser("train")
    for command in (looking, training):
        command.add_argument("weights", nargs="?", default="", help="ddpm_64_uint8.safetensors")
        command.add_argument("--tiny", action="store_true", help="a small network with random weights instead")
    looking.add_argument("--count", type=int, default=16)
    looking.add_argument("--steps", type=int, default=10)
    looking.add_argument("--seed", type=int, default=0)
    looking.add_argument("--out", type=Path, default=Path("faces.png"))
    training.add_argument("--reward", default="hair", help=f"{', '.join(REWARDS)}, or any that scoreact train takes")
    training.add_argument("--reward-option", action="append", default=[], metavar="NAME=VALUE", help="colour=red")
    training.add_argument("--rank", type=int, default=8, help="of the adapters")
    training.add_argument("--device", default="cpu")
    training.add_argument("--rows", type=int, default=8, help="of a call of the network [8]")
    training.add_argument("--out", type=Path, help="the run's folder")
    training.add_argument(
        "--picture", type=Path, help="a PNG of eight faces before (above) and after, from the same noise"
    )
    training.add_argument("--each", type=int, default=32, help="fresh pictures that are looked at before and after")
    training.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="as of scoreact train")
    showing = commands.add_parser("show", help="what the pictures of a run of `scoreact train` are, before and after")
    showing.add_argument("run", type=Path)
    showing.add_argument("--each", type=int, default=32)
    showing.add_argument("--picture", type=Path)
    showing.add_argument("--line", type=Path, help="a file for one line of JSON")
    options = parser.parse_args()
    if options.command == "show":
        torch.set_num_threads(1)
        return look_at_run(options)
    if options.device == "cpu" if options.command == "train" else True:
        torch.set_num_threads(1)
    problem = build(options.weights, options.tiny, getattr(options, "rows", 8))
    if options.command == "sample":
        sample(problem, options.count, options.steps, options.seed, options.out)
    else:
        train(problem, options)


if __name__ == "__main__":
    main()
