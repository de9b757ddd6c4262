"""What learned rewards see: the named maps, the user's own, and refusals where another map would be under a stored reward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scoreact.recipes.fashion_mnist.classifiers import load_classifier
from scoreact.rewards.sample_features import open_described, open_features, random_features

OWN = """import torch
def means(samples):
    return samples.flatten(2).mean(2)
def powers(samples, most=2):
    return torch.cat([samples.flatten(1) ** k for k in range(1, most + 1)], 1)
def network(width=5):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, width), torch.nn.Dropout())
def maps(samples):
    return samples
def broken(samples):
    return samples @ samples
def logs(samples):
    return (samples - 2).log().flatten(1)
def nothing():
    return None
table = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.mark.parametrize(("spec", "width"), [("convolution", 131), ("pixels", 32), ("values", 784), ("classifier", 96)])
def test_the_named_maps_have_a_gradient_and_no_weights_to_train(spec: str, width: int) -> None:
    features = open_features(spec, (1, 28, 28))
    samples = torch.rand(300, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    found = features(samples)
    assert found.shape == (300, width)
    assert found.dtype == torch.float64
    (gradient,) = torch.autograd.grad(found.sum(), samples)
    assert bool(gradient.isfinite().all() & gradient.any())
    torch.testing.assert_close(features.in_parts(samples), found.detach(), rtol=1e-4, atol=1e-5)
    again = open_described(features.described(), "reward.json")
    assert torch.equal(again(samples), found)


def test_they_are_what_they_are_named_after() -> None:
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(open_features("values", (1, 28, 28))(x), x.flatten(1))
    assert torch.equal(open_features("classifier", (1, 28, 28))(x), load_classifier("classifier").features(x))
    assert torch.equal(open_features("convolution", (1, 28, 28))(x), random_features(x)(x))


def test_a_function_of_samples_and_one_that_makes_a_map(own: Path) -> None:
    x = torch.rand(4, 3, 2, 2)
    torch.testing.assert_close(open_features(f"{own}:means", (3, 2, 2))(x), x.mean((2, 3)))
    powers = open_features(f"{own}:powers", (3, 2, 2), {"most": 3})
    torch.testing.assert_close(powers(x)[:, -12:], x.flatten(1) ** 3)
    made = open_features(f"{own}:network", (3, 2, 2), {"width": 7})
    assert made(x).shape == (4, 7)
    assert torch.equal(made(x), made(x))  # its dropout is off
    assert isinstance(made.function, nn.Module)
    assert not any(p.requires_grad for p in made.function.parameters())


def test_a_stored_map_is_refused_where_it_would_be_another(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    described = open_features("own.py:network", (3, 2, 2)).described()
    monkeypatch.chdir("/")
    assert open_described(described, "r", str(own) + ":network").function is not None
    plain = open_features(f"{own}:means", (3, 2, 2)).described()
    own.write_text(OWN.replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(ValueError, match="its code or its weights have changed"):
        open_described(plain, "r", f"{own}:means")
    with pytest.raises(ValueError, match=re.escape("liking/reward.json was fitted on other features than ")):
        open_described(described, "liking/reward.json", f"{own}:network")
    named: dict[str, Any] = open_features("convolution", (3, 2, 2)).described()
    with pytest.raises(ValueError, match="its code or its weights have changed"):
        open_described({**named, "digest": "0" * 64}, "r")


def test_code_that_only_a_stored_text_names_is_never_run(own: Path, tmp_path: Path) -> None:
    """A folder that was sent may name any file; it runs where its reader names one that is what it was."""
    described = open_features(f"{own}:means", (3, 2, 2)).described()
    own.write_text(OWN + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(
        ValueError, match=re.escape(f"which is code. It is run where you name it: features={own}:means")
    ):
        open_described(described, "sent/reward.json")
    assert not (tmp_path / "ran").exists()
    moved = tmp_path / "moved.py"
    moved.write_text(OWN)
    x = torch.rand(4, 3, 2, 2)
    torch.testing.assert_close(open_described(described, "r", f"{moved}:means")(x), x.mean((2, 3)))
    with pytest.raises(ValueError, match="which is no code of yours"):
        open_described(open_features("values", (3, 2, 2)).described(), "r", f"{moved}:means")


def test_what_is_no_map_is_refused_in_a_sentence(own: Path) -> None:
    for spec, said in {
        "convolutions": "unknown features 'convolutions'. Did you mean 'convolution'? Known: classifier, ",
        f"{own}:maps": "gave (3, 3, 2, 2) for 3 samples; expected floats (3, F)",
        f"{own}:broken": "do not take samples of shape (3, 2, 3) (RuntimeError: ",
        f"{own}:logs": "gave NaN or infinity",
        f"{own}:nothing": "returned a NoneType; expected a function",
        f"{own}:table": "is a int, no function",
        "classifier": "do not take samples of shape (3, 2, 3): the judge got ",
        "imagenet": "no weights were given",
    }.items():
        shape = (3, 2, 2) if "maps" in spec else (3, 2, 3)
        with pytest.raises(ValueError, match=re.escape(said)):
            open_features(spec, shape)
    with pytest.raises(ValueError, match=re.escape("cannot be made with the options {'wide': 3}")):
        open_features("convolution", (3, 2, 2), {"wide": 3})
    with pytest.raises(ValueError, match=r"are of pictures; a sample has shape \(2,\)"):
        open_features("pixels", (2,))
    with pytest.raises(ValueError, match=r"made for samples of shape \(2,\); these have \(3,\)"):
        open_features("values", (2,))(torch.rand(5, 3))
