"""Makes the shipped statistics of real Fashion-MNIST pictures: thresholds of properties, moments to compare with.

Thresholds are quartiles of each class of the train split; the moments are of judge features of test pictures, which no
network has seen. Knows the pictures and the judge; does not know any generated picture.

    scoreact pretrain reference --data PATH
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL
import torch
from safetensors.torch import save
from torch import Tensor

from ...evaluation.metrics import feature_statistics, frechet_distance, per_class_diversity
from ...rewards.image import jpeg_kilobytes
from . import classifiers as judge
from .data import CLASSES, load_pictures

JPEG_QUALITY = 75
PIXEL_SUM = 28 * 28 * 255  # of a white picture
# name -> measure, direction (1 below the threshold, -1 above), share of the train pictures of a class
PROPERTIES = {"plain": ("jpeg_bytes", 1), "busy": ("jpeg_bytes", -1), "bright": ("brightness", -1)}
SHARE = 0.25


def class_thresholds(values: Tensor, labels: Tensor, direction: int, share: float = SHARE) -> Tensor:
    """Per class the half-integer that has the share nearest to `share` on its side; integer values [N] -> [10] float64.

    Half-integers, so that no picture lies on a threshold and "has the property" is "R > log 1/2" without exception.
    """
    thresholds = []
    for label in range(len(CLASSES)):
        members = values[labels == label].double()
        quantile = float(members.quantile(share if direction > 0 else 1 - share))
        candidates = [int(quantile) + offset for offset in (-0.5, 0.5)]
        shares = [float((direction * (c - members) > 0).double().mean()) for c in candidates]
        thresholds.append(min(zip(shares, candidates, strict=True), key=lambda pair: abs(pair[0] - share))[1])
    return torch.tensor(thresholds, dtype=torch.float64)


def class_weights(labels: Tensor, within: Tensor | None = None) -> Tensor:
    """Weights [N] that give each class the same sum, proportional to `within` [N] inside a class."""
    within = torch.ones(len(labels), dtype=torch.float64) if within is None else within.double()
    total = torch.zeros(len(CLASSES), dtype=torch.float64).index_add(0, labels, within)
    return within / total[labels]


def half_frechet(features: Tensor, labels: Tensor, generator: torch.Generator, splits: int = 20) -> tuple[float, float]:
    """Frechet distance of a random half of each class to the other half: mean and deviation over the splits."""
    values = []
    for _ in range(splits):
        order = torch.randperm(len(labels), generator=generator)
        order = order[labels[order].argsort(stable=True)]  # shuffled inside each class, so every second row is a half
        halves = order[::2], order[1::2]
        (m1, c1), (m2, c2) = (feature_statistics(features[h], class_weights(labels[h])) for h in halves)
        values.append(frechet_distance(m1, c1, m2, c2))
    stacked = torch.tensor(values)
    return float(stacked.mean()), float(stacked.std())


def draw_balanced(labels: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """Indices of `count` rows, the same number of each class; None when a class has too few."""
    each = count // len(CLASSES)
    members = [(labels == label).nonzero()[:, 0] for label in range(len(CLASSES))]
    if min(len(rows) for rows in members) < each:
        return None
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:each]] for rows in members])


def measures(images: Tensor) -> dict[str, Tensor]:
    """Both measures as whole numbers: JPEG bytes and pixel sums; images uint8 [N, 28, 28] -> int64 [N]."""
    kilobytes = torch.cat(
        [jpeg_kilobytes(part[:, None].float() / 255, JPEG_QUALITY) for part in torch.split(images, 1000)]
    )
    return {"jpeg_bytes": (kilobytes.double() * 1000).round().long(), "brightness": images.flatten(1).long().sum(1)}


def make(data: str | None, scale_share: float = 0.125, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description to ship; scale = scale_share times the class's deviation of the measure."""
    generator = torch.Generator().manual_seed(seed)
    network = judge.load_classifier("judge")
    images, labels, features, values = {}, {}, {}, {}
    for split in ("train", "test"):
        images[split], labels[split] = load_pictures(data, split)
        values[split] = measures(images[split])
        with torch.no_grad():
            features[split] = network.features(images[split][:, None].float() / 255).double()

    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    everything = feature_statistics(features["test"], class_weights(labels["test"]))
    for name, (measure, direction) in {"all": ("", 0), **PROPERTIES}.items():
        unit = PIXEL_SUM if measure == "brightness" else 1
        thresholds = scales = torch.full((len(CLASSES),), torch.nan, dtype=torch.float64)
        chosen = {split: torch.ones(len(labels[split]), dtype=torch.bool) for split in labels}
        weights, agreement, kept = class_weights(labels["test"]), None, None
        if direction:
            train = values["train"][measure]
            thresholds = class_thresholds(train, labels["train"], direction)
            spread = torch.stack([train[labels["train"] == c].double().std() for c in range(len(CLASSES))])
            scales = scale_share * spread
            signed = {
                split: direction * (thresholds[labels[split]] - values[split][measure]) / scales[labels[split]]
                for split in labels
            }
            chosen = {split: signed[split] > 0 for split in labels}
            soft = signed["test"].sigmoid()
            weights = class_weights(labels["test"], soft)
            # how near the logistic is to the property: 1 - mean |sigmoid - property|, and its mass inside
            agreement = float(1 - (soft - chosen["test"].double()).abs().mean())
            kept = float(weights[chosen["test"]].sum() / weights.sum())
        rows, row_labels = features["test"][chosen["test"]], labels["test"][chosen["test"]]
        mean, covariance = feature_statistics(rows, class_weights(row_labels))
        soft_mean, soft_covariance = feature_statistics(features["test"], weights)
        half, deviation = half_frechet(rows, row_labels, generator)

        train_rows, train_labels = features["train"][chosen["train"]], labels["train"][chosen["train"]]
        scores: dict[int, float] = {}
        for count in (500, 1000, 2000, 5000, 10000):
            distances = []
            for _ in range(5):
                index = draw_balanced(train_labels, count, generator)
                if index is not None:
                    distances.append(frechet_distance(*feature_statistics(train_rows[index]), mean, covariance))
            if distances:
                scores[count] = sum(distances) / len(distances)

        guess = network.head(rows.float()).argmax(1)
        stored = {
            "thresholds": thresholds / unit,
            "scales": scales / unit,
            "mean": mean,
            "covariance": covariance,
            "soft_mean": soft_mean,
            "soft_covariance": soft_covariance,
            "within_class_distance": per_class_diversity(rows, row_labels, len(CLASSES)),
        }
        tensors |= {f"{name}.{key}": value.float().contiguous() for key, value in stored.items()}
        tensors[f"{name}.counts"] = torch.bincount(row_labels, minlength=len(CLASSES))
        described[name] = {
            "measure": measure,
            "direction": direction,
            "test_pictures": len(rows),
            "train_share": float(chosen["train"].double().mean()),
            "judge_accuracy": float((guess == row_labels).double().mean()),
            "half_frechet": half,
            "half_frechet_deviation": deviation,
            "train_frechet": {str(count): value for count, value in scores.items()},
            "frechet_of_all_to_it": frechet_distance(*everything, mean, covariance),
            "frechet_of_soft_to_it": frechet_distance(soft_mean, soft_covariance, mean, covariance),
            "logistic_agreement": agreement,
            "logistic_mass_in_property": kept,
            "thresholds": [round(x, 6) for x in (thresholds / unit).tolist()] if direction else None,
            "scales": [round(x, 6) for x in (scales / unit).tolist()] if direction else None,
        }
    description = {
        "made_by": "scoreact pretrain reference",
        "source": "Fashion-MNIST (zalandoresearch/fashion-mnist, MIT): thresholds and scales from the train split, "
        "everything else from the test split but train_frechet; classes weigh equally in all moments",
        "classes": list(CLASSES),
        "jpeg_quality": JPEG_QUALITY,
        "share": SHARE,
        "scale_share_of_standard_deviation": scale_share,
        "seed": seed,
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "test_accuracy": {
            name: judge.classifier_accuracy(judge.load_classifier(name), images["test"], labels["test"])
            for name in judge.SHIPPED
        },
        "features": features["test"].shape[1],
        "properties": described,
    }
    return tensors, description


def make_neighbours(data: str | None, count: int = 2000, seed: int = 0) -> Tensor:
    """Judge features of `count` test pictures, as many of each class, in random order: [count, F] float16."""
    images, labels = load_pictures(data, "test")
    generator = torch.Generator().manual_seed(seed)
    chosen = draw_balanced(labels, count, generator)
    assert chosen is not None
    chosen = chosen[torch.randperm(count, generator=generator)]
    with torch.no_grad():
        return judge.load_classifier("judge").features(images[chosen][:, None].float() / 255).half()


def make_examples(data: str | None, count: int = 2000, seed: int = 0) -> dict[str, Tensor]:
    """Of `count` training pictures, as many of each class: training-side features [count, F] float16, and classes [count]."""
    images, labels = load_pictures(data, "train")
    chosen = draw_balanced(labels, count, torch.Generator().manual_seed(seed))
    assert chosen is not None
    with torch.no_grad():
        found = judge.load_classifier("classifier").features(images[chosen][:, None].float() / 255)
    return {"features": found.half(), "classes": labels[chosen].to(torch.uint8)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `fashion_mnist_reference.safetensors`, its `.json`, `fashion_mnist_neighbours.safetensors` and `..._examples`."""
    parser = argparse.ArgumentParser(prog="scoreact pretrain reference", description=main.__doc__)
    parser.add_argument("--data", help="an .npz or a folder with the official files; downloaded when left out")
    parser.add_argument("--out", type=Path, default=Path("src/scoreact/assets"), help="folder to write to")
    parser.add_argument("--scale", type=float, default=0.125, help="logistic scale over the class's standard deviation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    neighbours = save({"features": make_neighbours(options.data, seed=options.seed)})
    (options.out / "fashion_mnist_neighbours.safetensors").write_bytes(neighbours)
    examples = save(make_examples(options.data, seed=options.seed))
    (options.out / "fashion_mnist_examples.safetensors").write_bytes(examples)
    tensors, description = make(options.data, options.scale, options.seed)
    (options.out / "fashion_mnist_reference.safetensors").write_bytes(save(tensors))
    text = json.dumps(description, indent=1) + "\n"
    (options.out / "fashion_mnist_reference.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
