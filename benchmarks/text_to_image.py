"""Small Stable Diffusions, trained here in minutes on drawings with lying captions: what shapes.py and counting.py share.

A task's folder is an ordinary `StableDiffusionPipeline` (UNet, AutoencoderKL, CLIP text encoder) of 32x32 pictures, made
from configs and trained on its drawings. Like captions of the web, some of those of the training set lie. So the pretrained
model draws well and listens badly, and what it should become is known: p(picture | a caption that is true). The reward is
log p(caption | picture) of a small classifier; alignment is measured by a second one of another architecture and seed,
which no training sees. The folder holds both, and the captions (a line each, a line's number is its class).

Imports nothing of scoreact at its top: `peer_trl.py` loads the reward in an environment without it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 32


Scorer = Callable[[Tensor, Sequence[str], str], Tensor]  # pictures, their captions, the task's folder -> [B]


@dataclass(frozen=True)
class Task:
    """What the pictures show, and what is said of them. Classes [B] are places in `captions`."""

    captions: Sequence[str]
    draw: Callable[[Tensor, torch.Generator], Tensor]  # classes [B] -> [B, 3, H, W] in [0, 1]
    lying_captions: Callable[[Tensor, torch.Generator], Tensor]  # classes drawn -> classes that the captions name
    parts: Mapping[str, Callable[[Tensor], Tensor]]  # what a caption says, part by part: classes -> the part's number
    shown: Sequence[str]  # captions of a picture before and after
    size: tuple[int, int] = (SIDE, SIDE)  # height and width, multiples of 8
    classifier_steps: int = 600
    batch_norm: bool = False  # in the classifiers
    emphasis: float = 0.0  # extra weight, in the VAE's loss, of a pixel whose colour is not the ground's
    reward: Scorer | None = None  # None: `reward`, of the folder's classifier
    readers: Mapping[str, Scorer] = field(default_factory=dict)  # judges beside the folder's: what they find right

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Drawings of `count` random classes."""
        return self.draw(torch.randint(len(self.captions), (count,), generator=generator), generator)


def other_class(classes: Tensor, count: int, share: float, generator: torch.Generator) -> Tensor:
    """Of `classes` [B], below `count`, a share replaced by any other."""
    lies = torch.rand(len(classes), generator=generator) < share
    other = torch.randint(1, count, (len(classes),), generator=generator)
    return torch.where(lies, (classes + other) % count, classes)


# --- the classifiers: one rewards, the other judges ------------------------------------------------------------------


def _classifier(
    widths: Sequence[int], kernel: int, activation: type[nn.Module], classes: int, batch_norm: bool
) -> nn.Sequential:
    """log p(class | picture), [B, 3, H, W] in [0, 1] -> [B, classes]; the first pictures, or the weights, fix the size."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        norm = [nn.BatchNorm2d(after)] if batch_norm else []
        layers += [nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2), *norm, activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(classes), nn.LogSoftmax(1))


def rewarding(classes: int, batch_norm: bool = False) -> nn.Sequential:
    return _classifier((24, 48), 5, nn.SiLU, classes, batch_norm)


def judging(classes: int, batch_norm: bool = False) -> nn.Sequential:
    return _classifier((16, 32, 64), 3, nn.ReLU, classes, batch_norm)


def train_classifier(task: Task, classifier: nn.Module, seed: int, steps: int) -> float:
    """On noisy, dimmed, blurred drawings; returns its accuracy on clean ones it has not seen."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        classes = torch.randint(len(task.captions), (128,), generator=generator)
        pictures = task.draw(classes, generator)
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = torch.lerp(pictures, blurred, torch.rand(128, 1, 1, 1, generator=generator))
        noise = torch.randn(pictures.shape, generator=generator)
        pictures = (pictures + 0.15 * torch.rand(128, 1, 1, 1, generator=generator) * noise).clamp(0, 1)
        # smoothing bounds the reward: 0.1 spread over the classes is log p of about -5.5 at the least
        loss = F.cross_entropy(classifier(pictures), classes, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    with torch.no_grad():
        classes = torch.arange(len(task.captions)).repeat(40)
        return float((classifier(task.draw(classes, generator)).argmax(1) == classes).float().mean())


@functools.cache
def captions_of(folder: str) -> list[str]:
    return (Path(folder) / "captions.txt").read_text().splitlines()


@functools.cache
def load_classifier(path: str) -> nn.Sequential:
    """The folder's `reward.safetensors` or `judge.safetensors`."""
    weights = load_file(path)
    make = judging if Path(path).stem == "judge" else rewarding
    classifier = make(len(captions_of(str(Path(path).parent))), batch_norm="1.running_mean" in weights)
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False)


def _classes(prompts: Sequence[str], folder: str) -> Tensor:
    known = captions_of(folder)
    return torch.tensor([known.index(prompt) for prompt in prompts])


def reward(images: Tensor, prompts: Sequence[str], folder: str) -> Tensor:
    """log p(caption | picture) of the folder's classifier: [B, 3, H, W] in [0, 1] and captions -> [B], nats."""
    found = load_classifier(f"{folder}/reward.safetensors")(images)
    return found.gather(1, _classes(prompts, folder)[:, None]).squeeze(1)


reward.differentiable = True  # type: ignore[attr-defined]


def aligned(task: Task, images: Tensor, prompts: Sequence[str], folder: str) -> dict[str, Tensor]:
    """Whether the held-out judge sees what the caption says, booleans [B]: all of it and each part; then other judges."""
    classes = _classes(prompts, folder)
    with torch.no_grad():
        found = load_classifier(f"{folder}/judge.safetensors")(images).argmax(1)
    parts = {name: of(found) == of(classes) for name, of in task.parts.items()}
    others = {name: of(images, prompts, folder) for name, of in task.readers.items()}
    return {"caption": found == classes, **parts, **others}


# --- the pipeline ----------------------------------------------------------------------------------------------------


def tokenizer(captions: Sequence[str], folder: Path) -> Any:
    """CLIP's, with one token a word of the captions."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges: dict[str, str] = {}  # pair -> what it becomes
    known = sorted({word for caption in captions for word in re.findall("[a-z]+", caption)})
    marks = sorted({c for caption in captions for c in caption} - {*letters, " "})
    for word in known:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[f"{parts[0]} {parts[1]}"] = parts[0] + parts[1]
            parts[:2] = [parts[0] + parts[1]]

    def longest(pair: str) -> int:
        return max(len(word) for word in known if word.startswith(merges[pair].removesuffix("</w>")))

    first = sorted(merges, key=longest, reverse=True)  # the earlier line wins: else "red" takes the "re" out of "three"
    tokens = [*letters, *(f"{c}</w>" for c in letters), *marks, *(f"{c}</w>" for c in marks), *merges.values()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(first) + "\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=8)


def untrained(task: Task, folder: Path) -> Any:
    """The pipeline with random weights."""
    import diffusers
    import transformers

    words, (high, wide) = tokenizer(task.captions, folder / "tokenizer"), (side // 4 for side in task.size)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=8, projection_dim=64, bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32), latent_channels=4, norm_num_groups=8, sample_size=max(task.size), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=high if high == wide else (high, wide), block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=2, cross_attention_dim=64, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_vae(task: Task, vae: Any, steps: int) -> float:
    """Reconstruction with a trace of KL; sets the scale that gives latents unit variance. Returns the mean absolute error."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    error = torch.zeros(())
    for _ in range(steps):
        pictures = task.random(32, generator) * 2 - 1
        contrast = (pictures - pictures.flatten(2).median(2).values[..., None, None]).abs() / 2
        weight = 1 + task.emphasis * contrast
        posterior = vae.encode(pictures).latent_dist
        again = vae.decode(posterior.sample(generator=generator)).sample
        error = (again - pictures).abs()
        squares = (again - pictures).square()
        loss = (weight * error).mean() + (weight * squares).mean() + 1e-4 * posterior.kl().mean() / 16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pictures = task.random(512, generator) * 2 - 1
        vae.register_to_config(scaling_factor=1 / float(vae.encode(pictures).latent_dist.mean.std()))
    return float(error.detach().mean()) / 2


def train_denoiser(task: Task, pipeline: Any, steps: int, rate: float = 2e-3) -> float:
    """UNet and text encoder on noised latents of drawings, captions dropped at 10 %. Returns the last losses' mean."""
    generator = torch.Generator().manual_seed(2)
    text, unet, vae, alphas = pipeline.text_encoder, pipeline.unet, pipeline.vae, pipeline.scheduler.alphas_cumprod
    ids = pipeline.tokenizer([*task.captions, ""], padding="max_length", return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    with torch.no_grad():
        drawn = torch.randint(len(task.captions), (8192,), generator=generator)
        encoded = [vae.encode(task.draw(part, generator) * 2 - 1).latent_dist.mean for part in drawn.split(256)]
        latents = torch.cat(encoded) * vae.config.scaling_factor
        captions = task.lying_captions(drawn, generator)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(latents), (64,), generator=generator)
        caption = torch.where(torch.rand(64, generator=generator) < 0.1, len(task.captions), captions[rows])
        timestep = torch.randint(len(alphas), (64,), generator=generator)
        alpha = alphas[timestep].reshape(-1, 1, 1, 1)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = alpha.sqrt() * latents[rows] + (1 - alpha).sqrt() * noise
        predicted = unet(noisy, timestep, encoder_hidden_states=text(ids)[0][caption]).sample
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return sum(losses[-200:]) / len(losses[-200:])


def for_older_transformers(task: Task, folder: Path) -> None:
    """Write tokenizer and text encoder as every version of transformers reads them.

    Version 5 leaves the prefix `text_model.` away, and version 4 then draws such weights at random, with a warning only.
    """
    tokenizer(task.captions, folder / "tokenizer")
    path = str(folder / "text_encoder" / "model.safetensors")
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def pretrain(task: Task, folder: Path, vae_steps: int, denoiser_steps: int, classifier_steps: int) -> None:
    """Everything that the folder holds, from seeds."""
    begin = time.process_time()

    def say(text: str) -> None:
        print(f"{time.process_time() - begin:5.0f} s  {text}", flush=True)

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.txt").write_text("\n".join(task.captions) + "\n")
    for name, make, seed in (("reward", rewarding, 10), ("judge", judging, 20)):
        if name == "reward" and task.reward is not None:
            continue
        classifier = make(len(task.captions), task.batch_norm)
        accuracy = train_classifier(task, classifier, seed, classifier_steps)
        save_file(classifier.state_dict(), str(folder / f"{name}.safetensors"))
        say(f"{name}: accuracy {accuracy:.3f} on new drawings")
    pipeline = untrained(task, folder)
    say(f"VAE: mean absolute error {train_vae(task, pipeline.vae, vae_steps):.3f} of a pixel in [0, 1]")
    pipeline.vae.requires_grad_(False)
    say(f"denoiser: loss {train_denoiser(task, pipeline, denoiser_steps):.3f}")
    pipeline.save_pretrained(str(folder))
    for_older_transformers(task, folder)


# --- reinforcement learning ------------------------------------------------------------------------------------------

GUIDANCE = 2.0  # of every picture here: weak, and the same before and after


def judged(task: Task, pictures: Tensor, prompts: Sequence[str], folder: Path) -> dict[str, float]:
    """Shares that the judges find right with 95 % intervals, the reward, and its spread between pictures of one caption."""
    rewards = (task.reward or reward)(pictures, prompts, str(folder)).detach()
    within = rewards.reshape(len(task.captions), -1).var(1).mean().sqrt()
    row = {"reward": float(rewards.mean()), "reward_within": float(within)}
    for name, right in aligned(task, pictures, prompts, str(folder)).items():
        share = float(right.float().mean())
        row[name], row[f"{name}_interval"] = share, 1.96 * math.sqrt(share * (1 - share) / len(right))
    return row


def table(task: Task, rows: Mapping[str, dict[str, float]]) -> str:
    lines = [f"| held-out judge sees | {' | '.join(rows)} |", "| --- " * (1 + len(rows)) + "|"]
    for name in ("caption", *task.parts, *task.readers):
        cells = [f"{row[name]:.3f} ± {row[f'{name}_interval']:.3f}" for row in rows.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, label in (("reward", "reward, nats"), ("reward_within", "its standard deviation within a caption")):
        lines.append(f"| {label} | {' | '.join(f'{row[name]:.3f}' for row in rows.values())} |")
    return "\n".join(lines)


def look(task: Task, model: Any, folder: Path, each: int, steps: int, seed: int = 0) -> tuple[dict[str, float], Tensor]:
    """`each` samples a caption, in the captions' order, by `steps` steps of DDIM with noise: judged, and the pictures."""
    from scoreact.dynamics.grids import GRIDS
    from scoreact.dynamics.samplers import sampler_by_name
    from scoreact.sampling.draw import draw as sample

    prompts = [caption for caption in task.captions for _ in range(each)]
    ts = GRIDS["uniform"](model.schedule, steps, None)
    parts = [prompts[start : start + 240] for start in range(0, len(prompts), 240)]
    drawn = [
        sample(model, part, sampler_by_name("ddim"), ts, seed + number)[1].detach() for number, part in enumerate(parts)
    ]
    pictures = torch.cat(drawn)
    return judged(task, pictures, prompts, folder), pictures


def look_at(task: Task, folder: Path, each: int, guidance: float) -> None:
    """Print what the judges see in drawings, in drawings that went through the VAE, and in the model's pictures."""
    import diffusers

    from scoreact.models.pipelines.opening import pipeline_model

    classes = torch.arange(len(task.captions)).repeat_interleave(each)
    drawings = task.draw(classes, torch.Generator().manual_seed(3))
    prompts = [task.captions[c] for c in classes]
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        codes = [vae.encode(part * 2 - 1).latent_dist.mean for part in drawings.split(120)]
        again = torch.cat([vae.decode(code).sample for code in codes]) / 2 + 0.5
    rows = {
        "drawings": judged(task, drawings, prompts, folder),
        "drawings through the VAE": judged(task, again.clamp(0, 1), prompts, folder),
    }
    model = pipeline_model(str(folder), guidance_scale=guidance, vae_slicing=False)
    rows[f"pictures at guidance {guidance:g}"], _ = look(task, model, folder, each, SETTINGS["steps"])
    print(table(task, rows))


def tuned(
    task: Task, folder: Path, out: Path | None, each: int, settings: dict[str, Any], quiet: bool = False
) -> tuple[dict[str, Any], dict[str, tuple[dict[str, float], Tensor]]]:
    """Fine-tune an adapter of rank 8 to the reward: costs, and the held-out judge's view and pictures before and after."""
    import scoreact as sa
    from scoreact import rewards
    from scoreact.models.pipelines.opening import pipeline_model
    from scoreact.models.value_networks import Encoder
    from scoreact.training.config import updated

    config = updated(sa.Config(), settings, below=SETTINGS)
    torch.manual_seed(config.seed)  # of the adapter's initial weights
    model = pipeline_model(str(folder), lora_rank=8, guidance_scale=GUIDANCE, vae_slicing=False)
    begin = time.process_time()

    def show(kind: str, metrics: dict[str, float]) -> None:
        if kind in ("iteration", "evaluation", "guard") and not quiet:
            kept = ("iteration", "reward/mean", "reward/heldout", "policy/kl", "objective/J", "objective/recovered")
            words = [f"{name} {metrics[name]:.3g}" for name in kept if name in metrics]
            print(f"{time.process_time() - begin:5.0f} s  {kind}  {'  '.join(words)}  {metrics.get('text', '')}")

    result = sa.finetune(
        model, rewards.load(task.reward or reward, folder=str(folder)), task.captions, config=config, out=out,
        on_event=show, value_network=lambda: Encoder(model.shape[0], classes=len(task.captions)), progress=False,
    )  # fmt: skip
    looks = [line for line in result.history if "cost/reward_calls" in line]
    costs = {
        "cpu": time.process_time() - begin, "kl": result.final["policy/kl"], "stopped": result.stopped,
        "reward_calls": looks[-1]["cost/reward_calls"], "network_calls": looks[-1]["cost/network_calls"],
    }  # fmt: skip
    views = {"before": look(task, result.policy.reference, folder, each, config.steps)}
    views["after"] = look(task, result.policy.model, folder, each, config.steps)
    return costs, views


def train(
    task: Task, folder: Path, out: Path | None, picture: Path | None, each: int, settings: dict[str, Any]
) -> None:
    """Fine-tune to the reward, and print the held-out judge's view before and after."""
    from scoreact.report.figures import gallery

    costs, views = tuned(task, folder, out, each, settings)
    print(
        f"\nCPU seconds {costs['cpu']:.0f}; path KL {costs['kl']:.2f} nats; {costs['reward_calls']:.0f} reward calls; "
        f"{costs['stopped'] or 'ran to its end'}"
    )
    print(table(task, {name: row for name, (row, _) in views.items()}))
    if picture is not None:
        rows = [task.captions.index(caption) for caption in task.shown]
        index = torch.tensor([row * each + j for row in rows for j in range(8)])
        shown = [views[name][1][index] for name in ("before", "after")]
        gallery(task.shown, *shown).savefig(picture, dpi=60, bbox_inches="tight")


SETTINGS: dict[str, Any] = {  # the reward has a gradient, which is the shortest way
    "algorithm": "draft", "last_steps": 5, "steps": 10, "iterations": 30, "batch_size": 32, "minibatch_size": 16,
    "reference_batches": 8, "learning_rate": 1e-2, "kl_weight": 0.01, "heldout_samples": 120, "evaluate_every": 30,
}  # fmt: skip


def main(task: Task, about: str) -> None:
    """The commands `pretrain`, `look` and `train` of a task's file."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("pretrain")
    first.add_argument("folder", type=Path)
    first.add_argument("--vae-steps", type=int, default=500)
    first.add_argument("--denoiser-steps", type=int, default=2000)
    first.add_argument("--classifier-steps", type=int, default=task.classifier_steps)
    second = commands.add_parser("train")
    second.add_argument("folder", type=Path)
    second.add_argument("--out", type=Path, help="the run's folder; its adapter loads in plain diffusers")
    second.add_argument("--picture", type=Path, help="a PNG of pictures before and after, from the same noise")
    second.add_argument("--each", type=int, default=30, help="pictures a caption that the judge sees")
    second.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="as of scoreact train")
    third = commands.add_parser("look", help="what the judges see in drawings and in the model's pictures")
    third.add_argument("folder", type=Path)
    third.add_argument("--each", type=int, default=30, help="pictures a caption")
    third.add_argument("--guidance", type=float, default=GUIDANCE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "pretrain":
        pretrain(task, arguments.folder, arguments.vae_steps, arguments.denoiser_steps, arguments.classifier_steps)
    elif arguments.command == "look":
        look_at(task, arguments.folder, arguments.each, arguments.guidance)
    else:
        settings = {name: yaml.safe_load(value) for name, value in (s.split("=", 1) for s in arguments.setting)}
        train(task, arguments.folder, arguments.out, arguments.picture, arguments.each, settings)
