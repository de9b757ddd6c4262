"""The benchmark on coloured shapes: its drawings and captions, the folder it writes, and how the comparison counts."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def shapes() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("shapes")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def side(shapes: Any) -> Any:
    return importlib.import_module("trl_side_by_side")


def test_drawing_shows_its_caption(shapes: Any, generator: torch.Generator) -> None:
    """Brightest pixels have the caption's colour up to the shade; the parts of the bounding box filled are the shapes'."""
    classes = torch.arange(24).repeat(20)
    pictures = shapes.draw(classes, generator)
    assert pictures.shape == (480, 3, 32, 32)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    filled = (pictures.amax(1) > 0.4).double()  # [B, S, S]; the ground is at most 0.3, a colour's largest part 0.6
    # the mean colour of what is inside, against the palette by angle: the shade does not turn it
    mean = (pictures * filled[:, None]).sum((2, 3)) / filled.sum((1, 2))[:, None]
    palette = torch.tensor(list(shapes.COLOURS.values()), dtype=mean.dtype)
    cosine = torch.nn.functional.normalize(mean, dim=1) @ torch.nn.functional.normalize(palette, dim=1).T
    assert torch.equal(cosine.argmax(1), classes // 3)
    box = filled.amax(1).sum(1) * filled.amax(2).sum(1)
    share = filled.sum((1, 2)) / box
    for shape, expected in enumerate((math.pi / 4, 1.0, 0.5)):  # circle, square, triangle
        assert float(share[classes % 3 == shape].mean()) == pytest.approx(expected, abs=0.06)


def test_captions_lie_as_often_as_stated(shapes: Any, generator: torch.Generator) -> None:
    classes = torch.randint(24, (20_000,), generator=generator)
    captions = shapes.lying_captions(classes, generator)
    wrong = float((captions != classes).float().mean())
    assert wrong == pytest.approx(shapes.WRONG, abs=4 * math.sqrt(0.25 / 20_000))
    lies = (captions - classes)[captions != classes] % 24
    assert len(lies.unique()) == 23  # any other caption


def test_a_caption_is_a_token_a_word(shapes: Any, tmp_path: Path) -> None:
    words = shapes.tokenizer(tmp_path)
    ids = [tuple(words(caption).input_ids) for caption in shapes.CAPTIONS]
    assert {len(row) for row in ids} == {5}  # start, a, colour, shape, end
    assert len(set(ids)) == 24


def test_reward_is_the_classifiers_log_probability(shapes: Any, generator: torch.Generator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = shapes.rewarding()
    shapes.save_file(classifier.state_dict(), str(tmp_path / "reward.safetensors"))
    pictures = torch.rand(3, 3, 32, 32, generator=generator, requires_grad=True)
    found = shapes.reward(pictures, [shapes.CAPTIONS[i] for i in (5, 0, 23)], folder=str(tmp_path))
    logits = classifier[:-1](pictures).detach()  # without the last layer
    expected = [float(logits[i, c] - logits[i].logsumexp(0)) for i, c in enumerate((5, 0, 23))]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), pictures)
    assert float(gradient.abs().max()) > 0


def test_text_encoder_is_stored_under_the_names_of_every_version(shapes: Any, tmp_path: Path) -> None:
    """Older transformers want the prefix; the current one gives the same embeddings with it as without."""
    torch.manual_seed(0)
    pipeline = shapes.untrained(tmp_path)
    pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder")
    shapes.for_older_transformers(tmp_path)
    names = list(shapes.load_file(str(tmp_path / "text_encoder" / "model.safetensors")))
    assert all(name.startswith("text_model.") and name.count("text_model.") == 1 for name in names)
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    ids = pipeline.tokenizer(["a red circle"], return_tensors="pt").input_ids
    assert torch.equal(again(ids)[0], pipeline.text_encoder.eval()(ids)[0])


def test_seconds_to_a_gain_lie_between_two_looks(side: Any) -> None:
    """Gains 0, 1, 0.5 and 3 after 0, 10, 20 and 40 CPU seconds."""
    run = {"looks": [(0.0, -2.0), (10.0, -1.0), (20.0, -1.5), (40.0, 1.0)]}
    assert side.gains(run) == [(0.0, 0.0), (10.0, 1.0), (20.0, 0.5), (40.0, 3.0)]
    assert side.seconds_to(run, 0.25) == 2.5
    assert side.seconds_to(run, 1.0) == 10.0
    assert side.seconds_to(run, 1.75) == 30.0
    assert side.seconds_to(run, 3.1) == math.inf


def test_a_finished_run_is_not_run_again(side: Any, tmp_path: Path) -> None:
    run, found = side.own("folder", {"algorithm": "ddpo"}, seed=3), {"rewards": [1.0], "cpu": [2.0]}
    (tmp_path / "runs.jsonl").write_text(side.json.dumps({"run": run, "found": found}) + "\n")
    bench = side.Bench(tmp_path / "runs.jsonl", None)
    assert bench(dict(reversed(run.items()))) == found
    with pytest.raises(SystemExit, match="give --peer PYTHON"):
        bench(side.peer("folder", seed=3))
