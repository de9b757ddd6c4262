"""Fashion-MNIST: reading, refusing, and the shipped statistics. The pictures are needed only where stated."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import struct
import urllib.error
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from scoreact import finetune
from scoreact.evaluation.metrics import frechet_distance
from scoreact.recipes.base import recipes
from scoreact.recipes.fashion_mnist import data as fashion_mnist
from scoreact.recipes.fashion_mnist import make_reference

PICTURES = Path(os.environ.get("SCOREACT_FASHION_MNIST", "absent"))  # the pictures are not part of the project
needs_pictures = pytest.mark.skipif(not PICTURES.exists(), reason="set SCOREACT_FASHION_MNIST to the pictures")
PROPERTIES = ("plain", "busy", "bright")


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Two pictures a split in the official format, with their checksums in place of the official ones."""
    rng = np.random.default_rng(0)
    files = {}
    for prefix in ("train", "t10k"):
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (2, 28, 28), dtype=np.uint8))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(np.array([3, 9], np.uint8))
    monkeypatch.setattr(fashion_mnist, "MD5", {name: hashlib.md5(data).hexdigest() for name, data in files.items()})
    monkeypatch.setattr(fashion_mnist, "SPLITS", {"train": ("train", 2), "test": ("t10k", 2)})
    return files


# --- reading


def test_official_files_in_a_folder_are_read(small: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in small.items():
        (tmp_path / name).write_bytes(data)
    images, labels = fashion_mnist.load_pictures(tmp_path, "test")
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [3, 9]
    expected = np.frombuffer(gzip.decompress(small["t10k-images-idx3-ubyte.gz"])[16:], np.uint8).reshape(2, 28, 28)
    assert (images.numpy() == expected).all()


def test_npz_is_read(small: dict[str, bytes], tmp_path: Path) -> None:
    pictures = np.arange(2 * 784, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    np.savez(tmp_path / "a.npz", train_images=pictures, train_labels=np.array([0, 1], np.uint8))
    images, labels = fashion_mnist.load_pictures(str(tmp_path / "a.npz"), "train")
    assert (images.numpy() == pictures).all()
    assert labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"lacks .*test_images.*expected train_images"):
        fashion_mnist.load_pictures(tmp_path / "a.npz", "test")


def test_download_once_into_the_cache_and_from_the_second_site(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if url.startswith(fashion_mnist.SITES[0]):
            raise urllib.error.URLError("down")
        return io.BytesIO(small[url.rsplit("/", 1)[1]])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setenv("SCOREACT_CACHE", str(tmp_path))
    _, labels = fashion_mnist.load_pictures(None, "train")
    assert labels.tolist() == [3, 9]
    assert len(asked) == 4  # images and labels, each from both sites
    fashion_mnist.load_pictures(None, "train")
    assert len(asked) == 4
    assert sorted(path.name for path in (tmp_path / "fashion_mnist").iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]


# --- refusing, each with a remedy


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setenv("SCOREACT_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"Name or service.*Without a network: bring the four \.gz files"):
        fashion_mnist.load_pictures(None, "train")


def test_a_wrong_download_is_not_kept(small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"<html>sign in</html>"))
    monkeypatch.setenv("SCOREACT_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="the file's MD5 is not"):
        fashion_mnist.load_pictures(None, "train")
    assert list((tmp_path / "fashion_mnist").iterdir()) == []


def test_wrong_paths_and_files_are_named(small: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown split 'valid'\. Known: train, test"):
        fashion_mnist.load_pictures(tmp_path, "valid")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz does not exist\. Give an \.npz"):
        fashion_mnist.load_pictures(tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError, match=r"has no train-images-idx3-ubyte\.gz\. Put the official file there"):
        fashion_mnist.load_pictures(tmp_path)
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"is not an \.npz file"):
        fashion_mnist.load_pictures(tmp_path / "text.npz")
    pictures = np.zeros((3, 28, 28), np.uint8)
    np.savez(tmp_path / "three.npz", train_images=pictures, train_labels=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"\(3, 28, 28\).*expected uint8 \(2, 28, 28\)"):
        fashion_mnist.load_pictures(tmp_path / "three.npz")
    np.savez(tmp_path / "ten.npz", train_images=pictures[:2], train_labels=np.array([1, 10], np.uint8))
    with pytest.raises(ValueError, match="labels run from 1 to 10; expected 0 to 9"):
        fashion_mnist.load_pictures(tmp_path / "ten.npz")
    for name, data in small.items():
        (tmp_path / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"is damaged: its MD5 is not .*Delete it"):
        fashion_mnist.load_pictures(tmp_path)


# --- what the statistics are made with


@pytest.mark.parametrize("direction", [1, -1])
def test_thresholds_leave_a_quarter_on_their_side_and_none_on_them(direction: int) -> None:
    values = torch.arange(2000) // 30  # ties, as byte counts have: a class has three pictures a value, 0.015 of it
    labels = torch.arange(2000) % 10
    thresholds = make_reference.class_thresholds(values, labels, direction)
    for label in range(10):
        members = values[labels == label]
        share = (direction * (thresholds[label] - members) > 0).double().mean().item()
        assert share == pytest.approx(0.25, abs=0.0076)
        assert thresholds[label].item() % 1 == 0.5


def test_class_weights_sum_to_one_in_every_class() -> None:
    labels = torch.tensor([*range(10), 3, 3, 3])
    weights = make_reference.class_weights(labels, torch.arange(1, 14))
    sums = torch.zeros(10, dtype=torch.float64).index_add(0, labels, weights)
    torch.testing.assert_close(sums, torch.ones(10, dtype=torch.float64))
    assert weights[10] / weights[3] == pytest.approx(11 / 4)


def test_halves_of_a_class_are_disjoint_and_equal_laws_are_near() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 10
    features = torch.randn(2000, 3, generator=generator) + 5 * labels[:, None]
    mean, deviation = make_reference.half_frechet(features, labels, generator)
    assert 0 < mean < 0.05
    assert 0 < deviation < 0.05


def test_measures_are_bytes_and_pixel_sums() -> None:
    black, noise = torch.zeros(28, 28), torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(0))
    got = make_reference.measures(torch.stack([black, noise]).to(torch.uint8))
    assert got["brightness"].tolist() == [0, int(noise.sum())]
    assert got["jpeg_bytes"].dtype == torch.int64
    assert got["jpeg_bytes"][1] > 2 * got["jpeg_bytes"][0] > 0


# --- the shipped statistics


def test_reference_holds_every_property_in_its_shape() -> None:
    real = fashion_mnist.reference()
    assert set(real) == {"all", *PROPERTIES}
    for name, pictures in real.items():
        width = len(pictures.mean)
        assert pictures.covariance.shape == pictures.soft_covariance.shape == (width, width)
        assert pictures.counts.sum() == (10_000 if name == "all" else pytest.approx(2500, abs=200))
        assert pictures.within_class_distance.shape == (10,)
        assert (pictures.within_class_distance > 0).all()
        assert torch.linalg.eigvalsh(pictures.covariance.double()).min() > -1e-5
        assert 64 <= width <= 128


def test_thresholds_and_scales_are_sane() -> None:
    real = fashion_mnist.reference()
    assert (real["plain"].thresholds < real["busy"].thresholds).all()
    assert ((real["plain"].thresholds > 450) & (real["busy"].thresholds < 750)).all()  # bytes; an empty JPEG has 300
    assert ((real["bright"].thresholds > 0.05) & (real["bright"].thresholds < 0.8)).all()
    for name in PROPERTIES:
        gap = (real["busy"].thresholds - real["plain"].thresholds) if name != "bright" else real[name].thresholds
        assert ((real[name].scales > 0) & (real[name].scales < gap / 2)).all()


def test_log_prob_is_the_logistic_and_holds_is_more_than_even() -> None:
    plain, busy = fashion_mnist.reference()["plain"], fashion_mnist.reference()["busy"]
    label = torch.tensor([4])
    at = plain.thresholds[label].double()
    assert plain.log_prob(at, label).exp().item() == pytest.approx(0.5)
    below = at - 2 * plain.scales[label]
    assert plain.log_prob(below, label).exp().item() == pytest.approx(1 / (1 + np.exp(-2)), rel=1e-6)
    assert plain.holds(below, label).item()
    assert not busy.holds(below, label).item()
    assert busy.log_prob(below, label) < np.log(0.5)
    assert fashion_mnist.reference()["all"].holds(at, label).item()
    assert fashion_mnist.reference()["all"].log_prob(at, label).item() == 0


def test_a_property_is_farther_from_the_rest_than_real_pictures_are_from_each_other() -> None:
    real = fashion_mnist.reference()
    for name in PROPERTIES:
        distance = frechet_distance(real["all"].mean, real["all"].covariance, real[name].mean, real[name].covariance)
        assert distance > 1.5 * real[name].half_frechet
        scores = [real[name].train_frechet[count] for count in sorted(real[name].train_frechet)]
        assert scores == sorted(scores, reverse=True)  # the finite-sample part of the distance shrinks with the count
        assert distance > 1.5 * scores[-1]


def test_assets_are_small_and_described() -> None:
    folder = resources.files("scoreact") / "assets"
    for name in ("judge", "classifier", "fashion_mnist_reference"):
        assert len((folder / f"{name}.safetensors").read_bytes()) < 1_000_000
    described = json.loads((folder / "fashion_mnist_reference.json").read_text())
    assert described["jpeg_quality"] == 75
    assert described["classes"] == list(fashion_mnist.CLASSES)


@needs_pictures
@pytest.mark.slow
def test_the_shipped_statistics_can_be_made_again() -> None:
    tensors, _ = make_reference.make(str(PICTURES))
    for name, pictures in fashion_mnist.reference().items():
        for key in ("thresholds", "scales", "mean", "covariance", "soft_mean", "within_class_distance"):
            torch.testing.assert_close(
                tensors[f"{name}.{key}"], getattr(pictures, key), rtol=1e-4, atol=1e-4, equal_nan=True
            )


def test_a_run_of_the_main_job_has_nothing_to_warn_of_at_its_start(tmp_path: Path) -> None:
    """What is decoded of noise, to learn the samples' shape, is no sample out of its range."""
    problem = recipes()["plain"].build()
    settings = replace(
        recipes()["plain"].config, iterations=1, batch_size=20, reference_batches=1, heldout_samples=20, device="cpu"
    )
    result = finetune(problem, config=settings, out=tmp_path / "run", report=False)
    said = [line["text"] for line in result.history if "text" in line and line["iteration"] == 0]
    assert not [text for text in said if "declared as low" in text]
