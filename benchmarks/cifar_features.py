"""Features of colour pictures for a discriminator: a small classifier of CIFAR-10, trained in half a minute on a GPU.

    python benchmarks/cifar_features.py cifar --device cuda        # folders cifar/train/CLASS, cifar/test/CLASS of 32x32 JPEG
    scoreact reward discriminate MODEL --data cifar/train --features benchmarks/cifar_features.py:of --steps 4 --out real

The weights are written beside where it is called, as `cifar_features.safetensors`; `of` reads them there.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, WIDTH, BATCH = Path("cifar_features.safetensors"), 64, 512


def block(before: int, after: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Twice(nn.Module):
    """Two blocks beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(width, width), block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.blocks(x)
        return output


class Classifier(nn.Module):
    """Pictures [B, 3, 32, 32] in [0, 1] -> logits [B, 10]."""

    def __init__(self, w: int = WIDTH) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(3, w), block(w, 2 * w, True), Twice(2 * w), block(2 * w, 4 * w, True), block(4 * w, 4 * w, True),
            Twice(4 * w),
        )  # fmt: skip
        self.head = nn.Linear(4 * w, 10)

    def features(self, x: Tensor) -> Tensor:
        """[B, 4 w]."""
        return self.body(2 * x - 1).amax((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.features(x))
        return output


@functools.cache
def trained() -> Classifier:
    network = Classifier()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval().requires_grad_(False)


def of(samples: Tensor, prompts: Sequence[str] = ()) -> Tensor:
    return trained().to(samples.device).features(samples)


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [N, 3, 32, 32] and classes [N], in the order of names."""
    files = [(path, i) for i, kind in enumerate(sorted(folder.iterdir())) for path in sorted(kind.glob("*.jpg"))]
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.tensor([i for _, i in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=16)
    options = parser.parse_args()
    begin, device = time.perf_counter(), options.device
    (x, y), (x_test, y_test) = ([part.to(device) for part in read(options.folder / name)] for name in ("train", "test"))
    torch.manual_seed(0)
    network = Classifier().to(device)
    batch = min(BATCH, len(x))
    steps = options.epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), device=device)
        shown = F.pad(x[rows].float() / 255, (2,) * 4, mode="reflect")
        down, right = torch.randint(0, 5, (2,)).tolist()
        shown = shown[:, :, down : down + 32, right : right + 32]
        if torch.rand(()) < 0.5:
            shown = shown.flip(-1)
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(network(shown), y[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        hits = torch.cat([network(part.float() / 255).argmax(1) for part in x_test.split(500)]) == y_test
    save_file({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, WEIGHTS)
    print(f"accuracy {float(hits.float().mean()):.4f} after {time.perf_counter() - begin:.0f} s; {WEIGHTS}")


if __name__ == "__main__":
    main()
