"""Fashion-MNIST: the pictures (from the user's file or the official site) and the statistics shipped with the package.

Source: Xiao, Rasul, Vollgraf 2017 (arXiv 1708.07747), github.com/zalandoresearch/fashion-mnist, MIT licence; file
names, class names and checksums from there. The pictures are not part of this package. `reference()` needs no
pictures: it reads what `scoreact pretrain reference` computed from them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...support.errors import SettingError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SITES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # split -> (file prefix, pictures)


def cache_folder() -> Path:
    """Where downloads are kept: $SCOREACT_CACHE, else $XDG_CACHE_HOME/scoreact, else ~/.cache/scoreact."""
    if own := os.environ.get("SCOREACT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scoreact"


def load_pictures(path: str | os.PathLike[str] | None = None, split: str = "train") -> tuple[Tensor, Tensor]:
    """Pictures and labels of one split: images uint8 [N, 28, 28] (0 is the black background), labels int64 [N] in 0..9.

    path: an .npz with {train,test}_{images,labels}; or a folder with the official .gz files; or None to download those
    once into `cache_folder()`. Raises FileNotFoundError or ValueError with what to do instead.
    """
    if split not in SPLITS:
        raise SettingError(f"unknown split {split!r}. Known: {', '.join(SPLITS)}.")
    if path is None:
        folder = cache_folder() / "fashion_mnist"
        download(folder, [name for name in MD5 if name.startswith(SPLITS[split][0])])
        images, labels = _from_folder(folder, split)
    elif (source := Path(path)).is_dir():
        images, labels = _from_folder(source, split)
    elif source.is_file():
        images, labels = _from_npz(source, split)
    else:
        raise FileNotFoundError(
            f"{source} does not exist. Give an .npz, a folder with the official .gz files, or no path."
        )
    count = SPLITS[split][1]
    if images.shape != (count, 28, 28) or labels.shape != (count,) or images.dtype != np.uint8:
        raise SettingError(
            f"{path}: {split} images {images.dtype} {images.shape} and labels {labels.shape}; expected uint8 "
            f"({count}, 28, 28) and ({count},). Use the official files, or no path to download them."
        )
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise SettingError(f"{path}: labels run from {labels.min()} to {labels.max()}; expected 0 to 9.")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def download(folder: Path, names: list[str]) -> None:
    """Fetch the named official files into the folder unless they are there; each is checked against its MD5."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = folder / name
        if target.exists():
            continue
        failures = []
        for site in SITES:
            try:
                with urllib.request.urlopen(site + name, timeout=60) as reply:
                    content: bytes = reply.read()
            except (urllib.error.URLError, OSError) as error:
                failures.append(f"{site}: {error}")
                continue
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[name]:
                failures.append(f"{site}: the file's MD5 is not {MD5[name]}")
                continue
            partial = target.with_suffix(".part")
            partial.write_bytes(content)
            partial.replace(target)
            break
        else:
            raise ConnectionError(
                f"could not download {name} ({'; '.join(failures)}). Without a network: bring the four .gz files of "
                f"github.com/zalandoresearch/fashion-mnist into {folder}, or give `path` the folder or .npz with them."
            )


@dataclass(frozen=True)
class RealPictures:
    """What real test pictures with a property look like to the judge; every class counts equally in the moments.

    The property is "measure below thresholds[class]" for direction 1, "above" for -1, and everything for 0 ("all"). As
    a reward: R = log sigmoid(direction (threshold - measure) / scale). Two versions of the moments: of the pictures
    that have the property, and of all pictures weighted by sigmoid(...) = exp(R), which is the posterior that R with
    kl_weight 1 asks for. `train_frechet[n]` is what n other real pictures with the property (of the train split) score
    against `mean` and `covariance`: what a perfect sampler would, at that n.
    """

    name: str  # all, plain, busy, bright
    measure: str  # jpeg_bytes: bytes at quality 75; brightness: mean pixel in [0, 1]; empty for all
    direction: int
    thresholds: Tensor  # [10] in the measure's unit, from the train split; NaN for all
    scales: Tensor  # [10] in the measure's unit
    counts: Tensor  # [10] int64, test pictures with the property
    mean: Tensor  # [F] judge features
    covariance: Tensor  # [F, F]
    soft_mean: Tensor  # [F]
    soft_covariance: Tensor  # [F, F]
    within_class_distance: Tensor  # [10] mean pairwise distance of judge features
    half_frechet: float  # a random half of the pictures against the other half
    train_frechet: dict[int, float]

    def log_prob(self, values: Tensor, labels: Tensor) -> Tensor:
        """log p(property | picture) from the measure's values [B] and labels [B]: [B], 0 for all."""
        if self.direction == 0:
            return torch.zeros_like(values)
        thresholds, scales = self.thresholds.to(values)[labels], self.scales.to(values)[labels]
        return logsigmoid(self.direction * (thresholds - values) / scales)

    def holds(self, values: Tensor, labels: Tensor) -> Tensor:
        """Whether the property holds: values [B] of the measure, labels [B] -> bool [B]."""
        if self.direction == 0:
            return torch.ones_like(values, dtype=torch.bool)
        return self.direction * (self.thresholds.to(values)[labels] - values) > 0


@cache
def reference() -> dict[str, RealPictures]:
    """The shipped statistics: `all`, `plain` (few JPEG bytes for its class), `busy` (many), `bright`."""
    folder = resources.files("scoreact") / "assets"
    tensors = load_tensors((folder / "fashion_mnist_reference.safetensors").read_bytes())
    described = json.loads((folder / "fashion_mnist_reference.json").read_text())["properties"]
    return {
        name: RealPictures(
            name=name,
            measure=about["measure"],
            direction=about["direction"],
            half_frechet=about["half_frechet"],
            train_frechet={int(count): value for count, value in about["train_frechet"].items()},
            **{key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")},
        )
        for name, about in described.items()
    }


@cache
def neighbour_features() -> Tensor:
    """Judge features of 2,000 real test pictures, as many of each class, in random order: [2000, F]."""
    folder = resources.files("scoreact") / "assets"
    return load_tensors((folder / "fashion_mnist_neighbours.safetensors").read_bytes())["features"].float()


def example_features() -> tuple[Tensor, Tensor]:
    """2,000 real training pictures, as many of each class: the training-side classifier's features [2000, F], and classes."""
    folder = resources.files("scoreact") / "assets"
    found = load_tensors((folder / "fashion_mnist_examples.safetensors").read_bytes())
    return found["features"].float(), found["classes"].long()


def _from_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return arrays[f"{split}_images"], arrays[f"{split}_labels"]
    except KeyError as error:
        raise SettingError(
            f"{path} lacks {error}; expected train_images, train_labels, test_images, test_labels."
        ) from None
    except (ValueError, OSError, EOFError) as error:
        raise SettingError(
            f"{path} is not an .npz file ({error}). Give one, or a folder with the official files."
        ) from None


def _from_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    prefix = SPLITS[split][0]
    images, labels = folder / f"{prefix}-images-idx3-ubyte.gz", folder / f"{prefix}-labels-idx1-ubyte.gz"
    for file in (images, labels):
        if not file.exists():
            raise FileNotFoundError(f"{folder} has no {file.name}. Put the official file there, or give no path.")
    return _read_idx(images), _read_idx(labels)


def _read_idx(path: Path) -> np.ndarray:
    """IDX: two zero bytes, type 8 (uint8), number of dimensions, each as a big-endian uint32, then the data."""
    content = path.read_bytes()
    if path.name in MD5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise SettingError(f"{path} is damaged: its MD5 is not {MD5[path.name]}. Delete it and download it again.")
    raw = gzip.decompress(content)
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(tuple(int(n) for n in shape))
