"""Rewards for text in pictures: how much of a wanted text a reader reads, and the probability that it is read, with a gradient.

The wanted text of a sample is the `text` of its metadata, else what a pattern finds in its prompt. A recogniser is an ONNX
network that gives, at each place from left to right, the probabilities of an alphabet and of "nothing new" (PaddleOCR's
form); the probability of a text is the sum over all ways to place it (CTC). Sources: Liu et al. 2025, Flow-GRPO, arXiv
2505.05470 (flow_grpo, `ocr.py`) for the accuracy of a text; Graves et al. 2006 for CTC; rapidocr-onnxruntime (`ch_ppocr_rec`)
for what the recogniser is given.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import which
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import name_of, reward_dtype
from .image import check_images, pictures
from .onnx_graph import OnnxModule
from .user import UserReward, adapt, from_spec

QUOTED = r'"([^"]*)"'  # what a prompt puts between its first two double quotes
HEIGHT = 48  # pixels, of a line of text as PaddleOCR's recognisers get it
PACKAGE, WEIGHTS = "rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"
PAGE_HEIGHT = 48  # pixels; tesseract reads lower pictures badly

Reader = Callable[[list[Image.Image]], Sequence[str]]  # B RGB pictures -> B strings


class OCR:
    """R = 1 - min(distance, n) / n: how well the wanted text can be read. In [0, 1].

    distance: Levenshtein's, of what the reader reads to that text of n letters, both in lower case and without spaces;
    0 where the text is part of what is read. Samples [B, 1 or 3, H, W] in [0, 1] -> [B], float32, without a gradient.

    Args:
        reader: a function of a list of B RGB PIL pictures -> B strings, or 'file.py:function', 'module:function'; or
            'rapidocr' (the recogniser of an installed package), 'onnx:FILE' (a recogniser), 'tesseract' (the program).
        pattern: a regular expression whose first group in the prompt is the wanted text.

    Raises RewardError for a prompt without such a text and for a reader that does not return B strings.
    """

    name = "ocr"
    differentiable = False

    def __init__(self, reader: str | Reader, pattern: str = QUOTED) -> None:
        if isinstance(reader, str):
            reader = _reader(reader)
        found = from_spec(reader, {}) if isinstance(reader, str) else adapt(reader, name_of(reader))
        if not isinstance(found, UserReward):
            raise RewardError(
                f"reader {reader!r} is a reward; give a function of a list of pictures that returns strings."
            )
        self.reader, self.pattern = found, checked_pattern(pattern)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        wanted = wanted_texts(condition, self.pattern)
        seen: Any = pictures(samples)  # a reader is found and called as a reward is, but gets PIL pictures
        read = self.reader.raw(seen, condition)
        if not isinstance(read, list | tuple) or [type(x) for x in read] != [str] * len(samples):
            raise RewardError(
                f"reader {self.reader.name} returned {read!r:.100} for {len(samples)} pictures; give one string each."
            )
        scores = [accuracy(text, target) for text, target in zip(read, wanted, strict=True)]
        return torch.tensor(scores, dtype=reward_dtype(samples), device=samples.device)


class OCRLogProbability:
    """R = log p(wanted text | picture) by a recogniser; with kl_weight 1 the optimum is the model's posterior given the text.

    Upper and lower case and spaces count. Samples [B, 1 or 3, H, W] in [0, 1], each one line of text, -> [B], float32, with
    a gradient.

    Args:
        path: the recogniser's ONNX file; by default that of the installed package rapidocr-onnxruntime.
        pattern: a regular expression whose first group in the prompt is the wanted text.
        width: pixels that pictures 48 high are stretched to; 0 keeps their aspect. A place takes eight pixels, and a text
            needs a place for each letter and one more between two equal ones.
        batch_size: pictures at a time.
    """

    name = "ocr_log_probability"
    differentiable = True

    def __init__(self, path: str = "", pattern: str = QUOTED, width: int = 0, batch_size: int = 16) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise RewardError(f"reward {self.name}: batch_size is {batch_size!r}; give a whole number of at least 1.")
        self.recogniser, self.pattern = TextRecogniser(path, width), checked_pattern(pattern)
        self.batch_size = batch_size

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        texts = wanted_texts(condition, self.pattern)
        parts = range(0, len(samples), self.batch_size)
        scores = [
            self.recogniser.log_probability(samples[i : i + self.batch_size], texts[i : i + self.batch_size])
            for i in parts
        ]
        return torch.cat(scores).to(reward_dtype(samples))


class TextRecogniser:
    """A network that reads one line of text: an ONNX file whose metadata hold its alphabet, in PaddleOCR's form.

    Args:
        path: the file; by default that of the installed package rapidocr-onnxruntime (PP-OCRv4, 10.9 MB, Apache-2.0).
        width: as of `OCRLogProbability`.
    """

    def __init__(self, path: str = "", width: int = 0) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 0:
            raise RewardError(f"width is {width!r}; give a number of pixels, 0 to keep the pictures' aspect.")
        self.file = str(_weights(path))
        self.network = OnnxModule(self.file).eval().requires_grad_(False)
        self.width = width
        letters = self.network.metadata.get("character")
        if letters is None or len(self.network.inputs) != 1 or len(self.network.outputs) != 1:
            raise RewardError(
                f"{self.file} is no recogniser of text: its metadata hold no alphabet (`character`). "
                f"The file's {self.network.ports()}"
            )
        self.alphabet = ["", *letters.split("\n"), " "]  # place 0: nothing new

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Of each letter of the alphabet at each place: [B, 1 or 3, H, W] in [0, 1] -> [places, B, letters], float32."""
        check_images(images)
        self.network.to(images.device)
        x = images.float().expand(-1, 3, -1, -1).flip(1)  # blue first, as its authors read files
        wide = self.width or max(round(HEIGHT * x.shape[-1] / x.shape[-2]), 8)
        x = F.interpolate(x, (HEIGHT, wide), mode="bilinear", antialias=True)
        found = self.network({self.network.inputs[0].name: 2 * x - 1})[self.network.outputs[0].name]
        if found.ndim != 3 or found.shape[2] not in (len(self.alphabet), len(self.alphabet) - 1):
            raise RewardError(
                f"{self.file} gave shape {tuple(found.shape)}; expected (pictures, places, {len(self.alphabet)}), "
                "the letters of its alphabet."
            )
        return found.transpose(0, 1).clamp_min(torch.finfo(found.dtype).tiny).log()

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The likeliest letter of each place, joined: [B, 1 or 3, H, W] in [0, 1] -> B strings."""
        rows = self.log_probabilities(images).argmax(-1).T.tolist()
        return ["".join(self.alphabet[letter] for letter, _ in itertools.groupby(row)) for row in rows]

    def log_probability(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """log p(text | picture): [B, 1 or 3, H, W] in [0, 1] and B texts -> [B], float32.

        Raises RewardError for a letter that is not in the alphabet and a text that has no room in the picture.
        """
        index = {letter: i for i, letter in reversed(list(enumerate(self.alphabet)))}
        for text in texts:
            unknown = [letter for letter in text if letter not in index]
            if unknown or not text:
                raise RewardError(
                    f"the recogniser cannot read {text!r}: it does not know {''.join(unknown) or 'no text'!r}."
                )
        found = self.log_probabilities(images)
        for text in texts:
            needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))
            if needed > len(found):
                raise RewardError(
                    f"the text {text!r} needs {needed} places, and pictures of {tuple(images.shape[2:])} have {len(found)}. "
                    f"Give wider pictures, or the option width={8 * needed} or more."
                )
        targets = torch.tensor([index[letter] for text in texts for letter in text])
        lengths = torch.tensor([len(text) for text in texts])
        places = torch.full((len(texts),), len(found))
        return -F.ctc_loss(found, targets.to(found.device), places, lengths, reduction="none")


# --- readers ---------------------------------------------------------------------------------------------------------


def _reader(name: str) -> str | Reader:
    if name == "tesseract":
        return tesseract
    if name == "rapidocr" or name.startswith("onnx:"):
        recogniser = TextRecogniser(name.removeprefix("rapidocr").removeprefix("onnx:"))

        def rapidocr(images: list[Image.Image]) -> list[str]:
            return [recogniser.read(_tensor(image))[0] for image in images]

        return rapidocr
    return name


def tesseract(images: list[Image.Image]) -> list[str]:
    """What the program tesseract reads in pictures of one line each, which are enlarged where they are small."""
    program = which("tesseract")
    if program is None:
        raise RewardError(
            "the program tesseract is not installed; Debian has it as tesseract-ocr and tesseract-ocr-eng."
        )
    texts = []
    for image in images:
        times = -(-PAGE_HEIGHT // image.height)
        file = io.BytesIO()
        image.resize((times * image.width, times * image.height), Image.Resampling.BICUBIC).save(file, format="PNG")
        done = subprocess.run(
            [program, "stdin", "stdout", "--psm", "7", "-l", "eng"],
            input=file.getvalue(), capture_output=True, env={**os.environ, "OMP_THREAD_LIMIT": "1"}, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RewardError(f"tesseract failed: {done.stderr.decode(errors='replace').strip()[:200]}")
        texts.append(done.stdout.decode().strip())
    return texts


def _tensor(image: Image.Image) -> Tensor:
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 255


def _weights(path: str) -> Path:
    """The recogniser's file: the path, or where the installed package keeps its own."""
    if path:
        file = Path(path).expanduser()
    else:
        package = importlib.util.find_spec(PACKAGE)  # found, not imported
        places = [] if package is None else package.submodule_search_locations or []
        file = next((Path(place) / WEIGHTS for place in places), Path(WEIGHTS))
    if not file.is_file():
        missing = f"the file {path!r} does not exist" if path else "no recogniser of text is installed"
        raise RewardError(
            f"{missing}. `pip install --no-deps rapidocr-onnxruntime==1.4.4` brings one (Apache-2.0, 11 MB), "
            f"as {PACKAGE}/{WEIGHTS}; or give the path of its file."
        )
    return file


# --- texts -----------------------------------------------------------------------------------------------------------


def checked_pattern(pattern: str) -> re.Pattern[str]:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise RewardError(f"pattern is {pattern!r}, which is no regular expression ({error}).") from None
    if found.groups != 1:
        raise RewardError(
            f"pattern {pattern!r} has {found.groups} groups; put the text's place into one pair of brackets."
        )
    return found


def wanted_texts(condition: Condition, pattern: re.Pattern[str]) -> list[str]:
    """A text a sample: its metadata's `text`, else what the pattern finds in its prompt. Raises RewardError for none."""
    texts = []
    for i, prompt in enumerate(condition.prompts):
        given = condition.metadata[i].get("text") if condition.metadata else None
        found = pattern.search(prompt)
        text = given if given is not None else found[1] if found is not None else ""
        if not isinstance(text, str) or not text.strip():
            where = (
                'text in double quotes; write it as: a sign that says "open"'
                if pattern.pattern == QUOTED
                else (f"text that the pattern {pattern.pattern!r} finds")
            )
            raise RewardError(f"prompt {prompt!r} has no {where}. Or give it as `text` in the prompt's metadata.")
        texts.append(text)
    return texts


def accuracy(read: str, target: str) -> float:
    """1 - min(Levenshtein distance, n) / n of two texts without spaces, in lower case; 1 where the target is in the text."""
    read, target = read.replace(" ", "").lower(), target.replace(" ", "").lower()
    if target in read:
        return 1.0
    return 1 - min(levenshtein(read, target), len(target)) / len(target)


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of one letter that turn a into b."""
    row = list(range(len(b) + 1))  # distances of the first letters of a to every beginning of b
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return row[-1]
