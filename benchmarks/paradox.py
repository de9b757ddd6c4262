"""Simple pictures are likely: bits of pictures that the shipped Fashion-MNIST model has never seen, beside its own test set's.

    python benchmarks/paradox.py run --data fashion_mnist.npz
    python benchmarks/paradox.py table --write docs/results/anomalies.md
    python benchmarks/paradox.py table --data fashion_mnist.npz --picture docs/results/paradox.png

The model is asked without a class. Written digits are scikit-learn's, 8 x 8 scaled to 28 x 28 and sharpened. Lines are kept in
benchmarks/paradox.jsonl, a kind of pictures each, with every picture's numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from page_tables import put
from torch import Tensor

import scoreact as sa
from scoreact.evaluation.anomaly_scores import png_bits
from scoreact.models.network import NetworkModel
from scoreact.rewards.learned import auc_of

LINES = Path(__file__).with_suffix(".jsonl")
MARKS = ("<!-- paradox -->\n", "<!-- /paradox -->\n")
COUNT, PLAN = 100, {"levels": 6, "noises": 2}
METHODS = {"path": "path", "complexity": "complexity", "typicality": "typicality", "coarse": "path, noise from 1"}


def kinds(data: Path) -> dict[str, Tensor]:
    """100 pictures of each kind, [100, 1, 28, 28] in [0, 1] at 8 bits."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    with np.load(data) as arrays:
        rows = torch.randperm(len(arrays["test_images"]), generator=generator)[: 2 * COUNT]
        clothes, others = (torch.from_numpy(arrays["test_images"])[rows][:, None].float() / 255).split(COUNT)
    digits = torch.from_numpy(load_digits().images[:COUNT]).float()[:, None] / 16
    level = torch.rand(COUNT, 1, 1, 1, generator=generator)
    place = torch.randint(4, 20, (COUNT, 2), generator=generator)
    square = torch.zeros(COUNT, 1, 28, 28)
    for picture, (top, left) in zip(square, place.tolist(), strict=True):
        picture[:, top : top + 5, left : left + 5] = 1
    made = {
        "clothes, its own test set": clothes,
        "clothes, upside down": others.flip(2),
        "clothes, inverted": 1 - others,
        "clothes, in blocks of 7 pixels": F.interpolate(F.avg_pool2d(others, 7), 28),
        "clothes, at a quarter of the contrast": others / 4,
        "written digits": (3 * F.interpolate(digits, 28, mode="bilinear") - 1).clamp(0, 1),
        "a white square on black": square,
        "one grey": level.expand(COUNT, 1, 28, 28),
        "noise": torch.rand(COUNT, 1, 28, 28, generator=generator),
    }
    return {name: (x.contiguous() * 255).round() / 255 for name, x in made.items()}


def unlabelled() -> NetworkModel:
    from scoreact.recipes.fashion_mnist.recipe import model

    own = model()
    return NetworkModel(own.network, own.schedule, own.prediction, own.shape, low=own.low, high=own.high)


def run(data: Path) -> None:
    torch.set_num_threads(1)
    model = unlabelled()
    lines = []
    for name, x in kinds(data).items():
        found = {
            "path": sa.score(model, x, "path", **PLAN),
            "coarse": sa.score(model, x, "path", least_noise=1.0, **PLAN),
            "png": png_bits(x).numpy(),
        }
        lines.append({"kind": name, **{key: np.round(value, 4).tolist() for key, value in found.items()}})
        print(name, flush=True)
    LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))


def figures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind its mean bits and the AUROC of each method against the model's own test set."""
    own = lines[0]
    usual = statistics.fmean(own["path"])

    def scores(line: dict[str, Any]) -> dict[str, np.ndarray]:
        path, png = np.array(line["path"]), np.array(line["png"])
        return {
            "path": path,
            "complexity": path - png,
            "typicality": abs(path - usual),
            "coarse": np.array(line["coarse"]),
        }

    rows, normal = [], scores(own)
    for line in lines:
        row = {"kind": line["kind"], "bits": statistics.fmean(line["path"]), "png": statistics.fmean(line["png"])}
        if line is not own:
            row |= {m: auc_of(torch.from_numpy(s), torch.from_numpy(normal[m])) for m, s in scores(line).items()}
        rows.append(row)
    return rows


def table(lines: list[dict[str, Any]]) -> str:
    text = [
        f"| {len(lines[0]['path'])} pictures of each kind | bits a pixel, path | bits a pixel, PNG | AUROC: "
        + " | ".join(METHODS.values())
        + " |",
        "| --- |" + " ---: |" * (2 + len(METHODS)),
    ]
    for row in figures(lines):
        cells = [f"{row[m]:.2f}" if m in row else "" for m in METHODS]
        text.append(f"| {row['kind']} | {row['bits']:.2f} | {row['png']:.2f} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def draw(lines: list[dict[str, Any]], data: Path, path: Path) -> None:
    """Bits of the model against those of a PNG file, a point a picture, and some of each kind in its colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes, shown = figure.subplots(1, 2, width_ratios=(1.5, 1))
    pictures = kinds(data)
    for i, line in enumerate(lines):
        axes.plot(line["path"], line["png"], ".", color=f"C{i}", markersize=5, alpha=0.7)
        shown.text(-4, 28 * i + 14, line["kind"], color=f"C{i}", ha="right", va="center", fontsize=8)
    axes.set(xlabel="bits a pixel by the model: more is less likely", ylabel="bits a pixel of the PNG file")
    shown.axis("off")
    shown.imshow(torch.cat([torch.cat(list(x[:6, 0]), 1) for x in pictures.values()]), cmap="gray", vmin=0, vmax=1)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--data", type=Path, help="fashion_mnist.npz")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.what == "run":
        run(options.data)
        return
    lines = [json.loads(text) for text in LINES.read_text(encoding="utf-8").splitlines()]
    print(table(lines), end="")
    if options.picture:
        draw(lines, options.data, options.picture)
    if options.write:
        put(table(lines), options.write, MARKS)


if __name__ == "__main__":
    main()
