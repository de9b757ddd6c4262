"""The small text-to-image tasks: drawings and captions, the folder they write, and how the comparison counts."""

from __future__ import annotations

import importlib
import itertools
import math
import subprocess
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


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path[:] = before


@pytest.fixture
def shapes() -> Any:
    return importlib.import_module("shapes")


@pytest.fixture
def counting() -> Any:
    return importlib.import_module("counting")


@pytest.fixture
def common() -> Any:
    return importlib.import_module("text_to_image")


@pytest.fixture
def side() -> Any:
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


def components(mask: torch.Tensor) -> int:
    """Of a picture's pixels [S, S], connected sidewards and upwards, by flooding."""
    left = {(int(i), int(j)) for i, j in mask.nonzero()}
    count = 0
    while left:
        count, front = count + 1, [left.pop()]
        while front:
            i, j = front.pop()
            near = left & {(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)}
            left -= near
            front.extend(near)
    return count


def test_dots_are_as_many_as_the_caption_says(counting: Any, generator: torch.Generator) -> None:
    """Counted as connected regions that are not grey; their colour is the caption's."""
    classes = torch.arange(20).repeat(10)
    pictures = counting.draw(classes, generator)
    assert pictures.shape == (200, 3, 32, 32)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
    coloured = pictures.amax(1) - pictures.amin(1) > 0.35  # a colour's spread is 0.51 at least
    assert [components(mask) for mask in coloured] == [int(c) % 5 + 1 for c in classes]
    mean = (pictures * coloured[:, None]).sum((2, 3)) / coloured.sum((1, 2))[:, None]
    palette = torch.tensor(list(counting.COLOURS.values()))
    assert torch.equal(torch.cdist(mean, palette).argmin(1), classes // 5)
    words = [counting.CAPTIONS[c].split() for c in (0, 6, 19)]
    assert words == [["one", "red", "dot"], ["two", "yellow", "dots"], ["five", "blue", "dots"]]


def test_dots_lie_apart_and_inside(counting: Any, generator: torch.Generator) -> None:
    radius = 2.4 + 0.6 * torch.rand(2000, generator=generator)
    places = counting.places(radius, generator)
    apart = torch.cdist(places, places)[:, *torch.triu_indices(5, 5, 1)].amin(1) - 2 * radius
    assert float(apart.min()) > 1.5  # where five find no room, the fullest of the tries is nearly free
    assert float((apart > counting.GAP - 0.01).float().mean()) > 0.99
    assert float((places - radius[:, None, None]).min()) >= 1
    assert float((places + radius[:, None, None]).max()) <= 31


def test_counts_lie_and_colours_do_not(counting: Any, generator: torch.Generator) -> None:
    classes = torch.randint(20, (20_000,), generator=generator)
    captions = counting.lying_captions(classes, generator)
    assert torch.equal(captions // 5, classes // 5)
    wrong = float((captions != classes).float().mean())
    assert wrong == pytest.approx(counting.WRONG, abs=4 * math.sqrt(0.25 / 20_000))
    assert len(((captions - classes)[captions != classes] % 5).unique()) == 4  # any other number


@pytest.mark.parametrize("task", ["shapes", "counting"])
def test_a_caption_is_a_token_a_word(common: Any, task: str, tmp_path: Path) -> None:
    captions = importlib.import_module(task).CAPTIONS
    words = common.tokenizer(captions, tmp_path)
    ids = [tuple(words(caption).input_ids) for caption in captions]
    assert {len(row) for row in ids} == {5}  # start, three words, end
    assert len(set(ids)) == len(captions)


@pytest.mark.parametrize("task", ["shapes", "counting"])
def test_reward_is_the_classifiers_log_probability(
    common: Any, task: str, generator: torch.Generator, tmp_path: Path
) -> None:
    module = importlib.import_module(task)
    torch.manual_seed(0)
    classifier = common.rewarding(len(module.CAPTIONS), module.TASK.batch_norm)
    classifier(torch.rand(64, 3, 32, 32, generator=generator))  # moves the running means, if there are any
    classifier.eval()
    common.save_file(classifier.state_dict(), str(tmp_path / "reward.safetensors"))
    (tmp_path / "captions.txt").write_text("\n".join(module.CAPTIONS) + "\n")
    pictures = torch.rand(3, 3, 32, 32, generator=generator, requires_grad=True)
    found = module.reward(pictures, [module.CAPTIONS[i] for i in (5, 0, 19)], folder=str(tmp_path))
    logits = classifier[:-1](pictures).detach()  # without the last layer
    expected = [float(logits[i, c] - logits[i].logsumexp(0)) for i, c in enumerate((5, 0, 19))]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), pictures)
    assert float(gradient.abs().max()) > 0


def test_the_judge_is_asked_for_each_part(common: Any, counting: Any, tmp_path: Path) -> None:
    """A judge that sees class 7, "three yellow dots", in every picture."""
    judge = common.judging(20)
    with torch.no_grad():
        judge(torch.rand(1, 3, 32, 32))  # fixes the size
        judge[-2].weight.zero_()
        judge[-2].bias.copy_(torch.eye(20)[7])
    common.save_file(judge.state_dict(), str(tmp_path / "judge.safetensors"))
    (tmp_path / "captions.txt").write_text("\n".join(counting.CAPTIONS) + "\n")
    prompts = ["three yellow dots", "three blue dots", "two yellow dots", "one red dot"]
    found = common.aligned(counting.TASK, torch.rand(4, 3, 32, 32), prompts, str(tmp_path))
    assert {name: right.tolist() for name, right in found.items()} == {
        "caption": [True, False, False, False],
        "count": [True, True, False, False],
        "colour": [True, False, True, False],
    }


def test_a_reward_file_is_found_from_elsewhere(tmp_path: Path) -> None:
    """As `scoreact train --reward benchmarks/counting.py:reward` runs it: its folder is not on the path."""
    code = "from scoreact import rewards; import sys; print(rewards.load(sys.argv[1]).differentiable)"
    place = f"{BENCHMARKS / 'counting.py'}:reward"
    done = subprocess.run([sys.executable, "-c", code, place], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_text_encoder_is_stored_under_the_names_of_every_version(common: Any, shapes: Any, tmp_path: Path) -> None:
    """Older transformers want the prefix; the current one gives the same embeddings with it as without."""
    torch.manual_seed(0)
    pipeline = common.untrained(shapes.TASK, tmp_path)
    pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder")
    common.for_older_transformers(shapes.TASK, tmp_path)
    names = list(common.load_file(str(tmp_path / "text_encoder" / "model.safetensors")))
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


def test_a_word_is_drawn_whole(generator: torch.Generator) -> None:
    """As much ink as its letters have in one of the fonts, a free pixel at each edge, and places that differ."""
    words = importlib.import_module("words")
    classes = torch.arange(12).repeat(40)
    pictures = words.draw(classes, generator)
    assert pictures.shape == (480, 3, 16, 32)
    ground = pictures[:, :, :1, :1]
    edges = torch.cat([pictures[:, :, [0, -1]].flatten(2), pictures[:, :, :, [0, -1]].flatten(2)], 2)
    assert torch.equal(edges, ground.flatten(2).expand_as(edges))
    ink = (ground - pictures).sum((2, 3))[:, 0] / (ground - pictures).amax((2, 3))[:, 0]
    masks = words.letters()[0][classes]  # [B, fonts, 16, 32]
    expected = masks.sum((2, 3)) / masks.amax((2, 3))
    assert float((ink[:, None] / expected - 1).abs().amin(1).max()) < 1e-4
    left = (pictures != ground).any(1).any(1).float().argmax(1)
    assert len(left.unique()) > 4


def test_a_words_probability_is_that_of_all_its_spellings(generator: torch.Generator) -> None:
    """CTC: the sum over all rows of characters that, with repetitions and blanks left out, are the word."""
    words = importlib.import_module("words")
    found = torch.rand(3, 4, 3, generator=generator, dtype=torch.float64).softmax(2)
    wanted = [[1, 2], [2], [1, 1]]
    expected = []
    for row, word in zip(found, wanted, strict=True):
        ways = [
            way
            for way in itertools.product(range(3), repeat=4)
            if [c for c, before in zip(way, (0, *way), strict=False) if c and c != before] == word
        ]
        expected.append(math.log(sum(math.prod(float(row[t, c]) for t, c in enumerate(way)) for way in ways)))
    assert words.log_spelled(found, wanted).tolist() == pytest.approx(expected, abs=1e-6)
