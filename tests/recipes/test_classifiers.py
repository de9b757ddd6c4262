"""The judge and the classifier: loading, shapes, refusals, a small training, and the recorded accuracy."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import pytest
import torch

from scoreact.recipes.fashion_mnist import classifiers as judge
from scoreact.recipes.fashion_mnist import data as fashion_mnist

PICTURES = Path(os.environ.get("SCOREACT_FASHION_MNIST", "absent"))  # the pictures are not part of the project


def pictures(count: int = 7) -> torch.Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["judge", "classifier"])
def test_shipped_networks_load_frozen_and_small(name: str) -> None:
    network = judge.load_classifier(name)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) <= 300_000
    features, log_probs = network.features(pictures()), network.log_probs(pictures())
    assert features.shape == (7, network.config["features"])
    assert log_probs.shape == (7, 10)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(7))


def test_the_judge_and_the_classifier_differ() -> None:
    one, other = judge.load_classifier("judge"), judge.load_classifier("classifier")
    assert one.config != other.config
    assert not torch.allclose(one.log_probs(pictures()), other.log_probs(pictures()), atol=1e-2)


def test_log_probs_are_the_head_on_the_features() -> None:
    network = judge.load_classifier()
    expected = network.head(network.features(pictures())).log_softmax(1)
    torch.testing.assert_close(network.log_probs(pictures()), expected)


def test_batches_do_not_matter() -> None:
    network = judge.load_classifier()
    torch.testing.assert_close(network.features(pictures(), batch_size=2), network.features(pictures()))


def test_gradient_reaches_the_picture() -> None:
    x = pictures(2).requires_grad_()
    judge.load_classifier("classifier").log_probs(x)[:, 3].sum().backward()
    assert x.grad is not None
    assert bool((x.grad.abs().sum((1, 2, 3)) > 0).all())


def test_wrong_inputs_have_remedies(tmp_path: Path) -> None:
    network = judge.Classifier()
    with pytest.raises(ValueError, match=r"torch.uint8 \(7, 28, 28\).*images\[:, None\] / 255"):
        network.features(torch.zeros(7, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"unknown network 'jury'\. Known: judge, classifier"):
        judge.load_classifier("jury")
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Make it: `scoreact pretrain judge"):
        judge.load_classifier("judge", tmp_path / "none.safetensors")


def test_save_and_load_keep_the_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = judge.Classifier((4, 8, 8), kernel=5, stride=2, features=6)
    network(pictures())  # moves the batch statistics
    network.eval()
    judge.save_classifier(network, tmp_path / "a.safetensors", {"seed": "0"})
    loaded = judge.load_classifier("judge", tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded.features(pictures()), network.features(pictures()), rtol=0.02, atol=2e-3)


def test_augmentation_moves_and_mirrors_whole_pictures() -> None:
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[10:12, 5:9] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    out = judge.augment(image.expand(200, 28, 28), torch.Generator().manual_seed(0))
    assert out.shape == (200, 28, 28)
    seen = set()
    for picture in out:
        rows, columns = picture.nonzero(as_tuple=True)
        patch = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].tolist()
        mirrored = patch[0] == [4, 3, 2, 1]
        assert mirrored or patch[0] == [1, 2, 3, 4]
        assert len(patch) == 2
        seen.add((mirrored, int(rows.min()) - 10))
        left = int(columns.min())
        assert abs(left - (28 - 9 if mirrored else 5)) <= 2
    assert seen == {(mirrored, shift) for mirrored in (False, True) for shift in range(-2, 3)}


def test_training_learns_two_easy_classes_and_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (512,), generator=generator)
    images = torch.randint(0, 60, (512, 28, 28), generator=generator)
    images[labels == 1, 8:20] += 150
    images = images.to(torch.uint8)
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        network = judge.Classifier((4, 4, 4), stride=2, kernel=5, features=8)
        losses: list[float] = []
        judge.train_classifier(
            network,
            images,
            labels,
            epochs=4,
            batch_size=32,
            learning_rate=1e-2,
            bfloat16=False,
            on_epoch=lambda epoch, loss, losses=losses: losses.append(loss),
        )
        heads.append(network.head.weight.detach().clone())
    assert losses[-1] < 0.3 < losses[0]
    assert judge.classifier_accuracy(network, images, labels) > 0.98
    assert torch.equal(*heads)


def test_training_refuses_a_loss_that_is_not_finite() -> None:
    network = judge.Classifier((4, 4, 4), features=4)
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="training loss is nan in epoch 0; lower learning_rate"):
        judge.train_classifier(
            network, torch.zeros(8, 28, 28, dtype=torch.uint8), torch.zeros(8).long(), epochs=1, batch_size=4
        )


def test_recorded_accuracy_is_good() -> None:
    described = json.loads((resources.files("scoreact") / "assets" / "fashion_mnist_reference.json").read_text())
    assert described["test_accuracy"]["judge"] > 0.92
    assert described["test_accuracy"]["classifier"] > 0.9


@pytest.mark.skipif(not PICTURES.exists(), reason="set SCOREACT_FASHION_MNIST to the pictures")
@pytest.mark.parametrize("name", ["judge", "classifier"])
def test_recorded_accuracy_is_measured_again(name: str) -> None:
    images, labels = fashion_mnist.load_pictures(PICTURES, "test")
    described = json.loads((resources.files("scoreact") / "assets" / "fashion_mnist_reference.json").read_text())
    part = slice(None, 2000)  # seconds; two binomial deviations of the difference are 0.012
    measured = judge.classifier_accuracy(judge.load_classifier(name), images[part], labels[part])
    assert measured == pytest.approx(described["test_accuracy"][name], abs=0.015)
