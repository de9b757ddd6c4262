"""What a surrogate of the reward sees of a text-to-image path, by its features and by how many rewards were asked.

    python benchmarks/surrogate_features.py shapes                  # a folder of `shapes.py pretrain`; two CPU minutes
    python benchmarks/surrogate_features.py counting --few          # with few pictures: half a minute

On paths of the pretrained model (guidance 2, ten steps of DDIM with noise): a surrogate is fitted to the first pictures and
their rewards, and asked on 720 others. The figure is the share of the reward's variance among pictures of one prompt that it
explains linearly, at the picture itself and, further down, at the picture that the path is heading for at time t. The last
row of that table is the reward itself there, which the paper's value is made of. "ridge decoder": small pictures
of the latents by a regression (`--surrogate-decoder ridge`) in place of the VAE's. `--few`: of surrogates that saw as few
pictures of the pretrained model as those of `black_box.py`'s "few" do at first; mean of DRAWS draws of both.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from text_to_image import captions_of, reward
from torch import Tensor, nn

from scoreact.control.policy import Policy
from scoreact.control.ridge_decoder import RidgeDecoder
from scoreact.control.ridge_surrogate import RidgeSurrogate, features_by_name
from scoreact.control.rollout import rollout
from scoreact.dynamics.solvers import SOLVERS
from scoreact.evaluation.seen import SEEN_AT, seen
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.rewards.sample_features import random_features
from scoreact.training.config import Config
from scoreact.types import Condition

PREVIEW = "convolution and prompts, ridge decoder"
FRESH, SHOWN, ASKED = 720, 720, (48, 96, 240, 720)
FEW_SHOWN, FEW_ASKED, POOL, DRAWS = (96, 144), (32, 64, 96), 480, 8


class Encoded(nn.Module):
    """Trained features: mean and spread of each channel of the pipeline's VAE encoder, before its last layer."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.found = Tensor()
        self.encoder.conv_norm_out.register_forward_hook(lambda module, inputs, output: setattr(self, "found", output))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        self.encoder(2 * x - 1)  # type: ignore[operator]
        h = self.found.flatten(2)
        return torch.cat([h.mean(2), (h.var(2) + 1e-4).sqrt()], dim=1)


@dataclass
class Drawn:
    """Paths of the pretrained model: decoded pictures of x_data_hat at each time and at the end, and rewards."""

    model: PipelineModel
    captions: list[str]
    ts: Tensor  # [N + 1]
    pictures: list[Tensor]  # N + 1 of [B, 3, H, W]
    previews: list[Tensor]  # the same by a ridge decoder
    share: float  # of the pictures' variance, that it gives
    condition: Condition
    rewards: Tensor  # [B]


def drawn(folder: str, count: int) -> Drawn:
    model = pipeline_model(folder, lora_rank=4, guidance_scale=2.0, vae_slicing=False)
    config, captions, policy = Config(steps=10), captions_of(Path(folder)), Policy(model)
    sde, ts = config.sde(model.schedule), config.times(model.schedule)
    prompts = [captions[i % len(captions)] for i in range(count)]
    estimates: list[list[Tensor]] = [[] for _ in range(len(ts))]
    latents: list[list[Tensor]] = [[] for _ in range(len(ts))]
    for start in range(0, count, 120):
        part = model.condition(prompts[start : start + 120])
        generator = torch.Generator().manual_seed(start)
        path = rollout(policy, sde, SOLVERS["ddim"], ts, part, generator, reference_only=True)
        for k in range(len(ts) - 1):
            latents[k].append(sde.x_data_hat(ts[k].expand(len(part)), path.xs[k], path.references[k]))
        latents[-1].append(path.xs[-1])
        for found, here in zip(estimates, latents, strict=True):
            found.append(model.decode(here[-1]))
    pictures = [torch.cat(parts) for parts in estimates]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = RidgeDecoder(latents[-1][0], pictures[-1])
    some = [k for k, t in enumerate(ts.tolist()) if any(abs(t - at) < 0.05 for at in (*SEEN_AT, 1.0))]
    decoder.fit(*(torch.cat([parts[k][0] for k in some]) for parts in (latents, estimates)))
    previews = [decoder(torch.cat(parts)) for parts in latents]
    rewards = reward(pictures[-1], prompts, folder)
    return Drawn(model, captions, ts, pictures, previews, float(decoder.share), Condition(prompts), rewards)


def few(folder: str) -> None:
    """At t = 0.6."""
    paths = drawn(folder, 2 * POOL)
    k, fresh = int((paths.ts - 0.6).abs().argmin()), torch.arange(POOL, 2 * POOL)
    print(f"| pictures, rewards | {' | '.join(f'{n}, {a}' for n in FEW_SHOWN for a in FEW_ASKED)} |")
    print(f"| --- | {' | '.join(['---:'] * len(FEW_SHOWN) * len(FEW_ASKED))} |")
    for name, shown in (("the VAE", paths.pictures), ("the ridge decoder", paths.previews)):
        shares: dict[tuple[int, int], list[float]] = {}
        for draw in range(DRAWS):
            order = torch.randperm(POOL, generator=torch.Generator().manual_seed(draw))
            for count, asked in itertools.product(FEW_SHOWN, FEW_ASKED):
                surrogate = RidgeSurrogate(random_features(shown[-1], draw), paths.captions, likelihood=True)
                rows, others = order[:asked], order[asked:count]
                surrogate.add(shown[-1][rows], paths.condition[rows], paths.rewards[rows])
                if len(others):
                    surrogate.look(shown[-1][others], paths.condition[others])
                surrogate.fit()
                guess = surrogate(shown[k][fresh], paths.condition[fresh])
                share = seen(guess, paths.rewards[fresh], paths.condition[fresh])[0]
                shares.setdefault((count, asked), []).append(share)
        print(f"| {name} | {' | '.join(f'{sum(each) / DRAWS:.2f}' for each in shares.values())} |", flush=True)
    print(f"\nthe ridge decoder gives {paths.share:.3f} of the variance of the VAE's pictures")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of `shapes.py pretrain` or `counting.py pretrain`")
    parser.add_argument("--few", action="store_true", help="one table, of surrogates that saw few pictures")
    arguments = parser.parse_args()
    folder = arguments.folder
    torch.set_num_threads(1)
    if arguments.few:
        return few(folder)
    paths = drawn(folder, SHOWN + FRESH)
    model, captions, ts, pictures, previews = paths.model, paths.captions, paths.ts, paths.pictures, paths.previews
    rewards = paths.rewards
    fresh = torch.arange(SHOWN, SHOWN + FRESH)
    condition, true = paths.condition, rewards[fresh]

    def fitted(name: str, asked: int) -> RidgeSurrogate:
        features = (
            Encoded(model.pipeline.vae)
            if name.startswith("trained")
            else features_by_name(name.split()[0], pictures[-1][:2])
        )
        surrogate, shown = RidgeSurrogate(features, captions, likelihood="prompts" in name), looked_at(name)[-1]
        rows, others = torch.arange(asked), torch.arange(asked, SHOWN)
        surrogate.add(shown[rows], condition[rows], rewards[rows])
        if len(others):
            surrogate.look(shown[others], condition[others])
        surrogate.fit()
        return surrogate

    def looked_at(name: str) -> list[Tensor]:
        return previews if name == PREVIEW else pictures

    def sees(name: str, asked: int, k: int) -> str:
        surrogate, shown = made[name, asked], looked_at(name)[k]
        guess = torch.cat([surrogate(shown[i], condition[i]) for i in fresh.split(240)])
        return f"{seen(guess, true, condition[fresh])[0]:.2f}"

    names = (
        "pixels",
        "convolution",
        "trained (VAE encoder)",
        "pixels and prompts",
        "convolution and prompts",
        "trained and prompts",
        PREVIEW,
    )
    made = {(name, asked): fitted(name, asked) for name in names for asked in ASKED}
    print(f"| rewards asked | {' | '.join(map(str, ASKED))} |\n| --- | {' | '.join(['---:'] * len(ASKED))} |")
    for name in names:
        print(f"| {name} | {' | '.join(sees(name, asked, -1) for asked in ASKED)} |")
    times = range(1, 9)
    print(
        f"\n| at t | {' | '.join(f'{float(ts[k]):.1f}' for k in times)} |\n| --- | {' | '.join(['---:'] * len(times))} |"
    )
    for name, asked in (
        *((name, asked) for name in ("convolution and prompts", PREVIEW) for asked in (48, 720)),
        ("convolution", 720),
    ):
        print(f"| {name}, {asked} rewards | {' | '.join(sees(name, asked, k) for k in times)} |")
    cells = [
        f"{seen(reward(pictures[k][fresh], condition[fresh].prompts, folder), true, condition[fresh])[0]:.2f}"
        for k in times
    ]
    print(f"| the reward itself | {' | '.join(cells)} |")
    print(f"\nthe ridge decoder gives {paths.share:.3f} of the variance of the VAE's pictures")


if __name__ == "__main__":
    main()
