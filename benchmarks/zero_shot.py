"""How well a classifier of ImageNet and a sentence encoder judge pictures they were not made for: CIFAR-10 without training.

    python benchmarks/zero_shot.py --path efficientnet-lite0-57934424.pth --classes imagenet_classes.txt \\
        --encoder FOLDER/sentence-transformers__all-MiniLM-L6-v2 --data cifar10.npz

--data: a file of `test_images` [N, 32, 32, 3] uint8 and `test_labels` [N]. Zero-shot: of ten prompts, one a class, the one
with the largest reward `zero_shot`. Neighbours: the commonest class of the five nearest of the other
pictures, by the classifier's features and by the pixels: what the features are worth as a judge. Intervals: 95 %, over the
pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoreact.rewards import ZeroShot

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FORMS = ("{}", "a {}", "a photo of a {}")


def share(right: Tensor) -> str:
    """Of a table of truth values [N], with its 95 % interval."""
    p = float(right.double().mean())
    return f"{p:.3f} ± {1.96 * (p * (1 - p) / len(right)) ** 0.5:.3f}"


def neighbours(points: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Whether the commonest class of the k nearest others is the own one: points [N, F], labels [N] -> [N]."""
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    return labels[distances.topk(k, largest=False).indices].mode(1).values == labels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="weights of EfficientNet-Lite0")
    parser.add_argument("--classes", required=True, help="ImageNet's 1,000 names, one a line")
    parser.add_argument("--encoder", required=True, help="folder of the sentence encoder")
    parser.add_argument("--data", required=True, help="CIFAR-10 pictures, .npz")
    parser.add_argument("--count", type=int, default=500, help="pictures [default 500]")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side that the classifier sees [default 224]")
    options = parser.parse_args()
    absent = [
        place for place in (options.path, options.classes, options.encoder, options.data) if not Path(place).exists()
    ]
    if absent:
        print(f"skipped: {', '.join(absent)} not there; docs/reference/rewards.md says where they come from.")
        return 0
    torch.set_num_threads(1)
    reward = ZeroShot(options.path, options.classes, options.encoder, size=options.size)
    data = np.load(options.data)
    images = torch.from_numpy(data["test_images"][: options.count]).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(data["test_labels"][: options.count]).long()
    started = time.process_time()
    with torch.no_grad():
        features = torch.cat([reward.classifier.features(part) for part in images.split(50)])
        shown = reward.classifier.logits(features).log_softmax(1)
        fits = {
            form: torch.stack([reward.fit(shown, [form.format(name)] * len(shown)) for name in NAMES], 1)
            for form in FORMS
        }
    seconds = (time.process_time() - started) / len(images)
    seen = f"{len(images)} pictures of {tuple(images.shape[1:])}, seen at {options.size} pixels"
    print(f"{seen}, {1e3 * seconds:.0f} CPU ms each")
    for form, fit in fits.items():
        own = fit.gather(1, labels[:, None])[:, 0]
        others = (fit.sum(1) - own) / (len(NAMES) - 1)
        means = f"mean reward {float(own.mean()):.2f} of the right prompt, {float(others.mean()):.2f} of a wrong one"
        print(f"zero-shot, {form.format('...'):16} {share(fit.argmax(1) == labels)}   ({means}; chance 0.1)")
    print(f"5 neighbours by features    {share(neighbours(features, labels))}")
    print(f"5 neighbours by pixels      {share(neighbours(images.flatten(1), labels))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
