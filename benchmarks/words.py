"""A small Stable Diffusion that writes words, and learns to write the right one: text rendering in miniature.

    pip install -e '.[diffusers,onnx]' -c constraints.txt
    pip download --no-deps rapidocr-onnxruntime==1.4.4
    unzip -jp rapidocr_onnxruntime-1.4.4-*.whl '*/ch_PP-OCRv4_rec_infer.onnx' > words/ocr.onnx
    python benchmarks/words.py pretrain words --vae-steps 1500 --denoiser-steps 5000       # ten minutes on one CPU thread
    python benchmarks/words.py look words           # needs the program tesseract
    python benchmarks/words.py train words --picture docs/results/words.png
    python benchmarks/words.py rules words --out benchmarks/words.jsonl --page docs/results/words.md

The reward is log p(word | picture) of the trained recogniser of PP-OCRv4 (Apache-2.0), by CTC, with its gradient. Judges are
a classifier of drawings and tesseract. Pictures are 16x32 pixels of a word of three letters in one of three fonts, captions
such as `the word "cat"`; those of the training set name another word in WRONG of the cases. `text_to_image.py` says what
the folder is and how it is made.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from page_tables import put
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))  # a reward's file is run without its folder on the path
from text_to_image import Task, main, other_class, tuned

from scoreact.support.files import append_line, resume_lines

HIGH, WIDE = 16, 32
WORDS = ("cat", "dog", "sun", "sky", "sea", "red", "big", "old", "ten", "box", "fly", "air")
CAPTIONS = [f'the word "{word}"' for word in WORDS]
WRONG = 0.4  # share of the training captions that name another word
JITTER = 2  # pixels from the middle at most
FONTS = [(name, size) for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif") for size in (12, 13)]


@functools.cache
def letters() -> tuple[Tensor, Tensor]:
    """Every word in every font, in the upper left corner: [words, fonts, 16, 32] in [0, 1], and heights and widths."""
    masks, sizes = [], []
    for word in WORDS:
        for name, size in FONTS:
            font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size)
            left, top, right, bottom = font.getbbox(word)
            canvas = Image.new("L", (WIDE, HIGH))
            ImageDraw.Draw(canvas).text((-left, -top), word, fill=255, font=font)
            masks.append(torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).reshape(HIGH, WIDE))
            sizes.append([bottom - top, right - left])
    shape = (len(WORDS), len(FONTS))
    return torch.stack(masks).reshape(*shape, HIGH, WIDE) / 255, torch.tensor(sizes).reshape(*shape, 2)


def draw(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings of the captions' classes [B]: [B, 3, 16, 32] in [0, 1]; font, place, ink and ground vary."""
    font = torch.randint(len(FONTS), (len(classes),), generator=generator)
    masks, sizes = (table[classes, font] for table in letters())
    room = torch.tensor([HIGH, WIDE]) - sizes - 2  # a pixel is left free on each side
    jitter = (torch.rand(len(classes), 2, generator=generator) - 0.5) * room.clamp(max=2 * JITTER)
    shift = (1 + room / 2 + jitter).round().long()
    y, x = (
        torch.arange(HIGH) - shift[:, :1],
        torch.arange(WIDE) - shift[:, 1:],
    )  # [B, 16], [B, 32]; below 0: the empty end
    inside = masks[torch.arange(len(classes))[:, None, None], y[:, :, None], x[:, None]][:, None]
    ink = 0.3 * torch.rand(len(classes), 3, 1, 1, generator=generator)
    ground = 0.75 + 0.25 * torch.rand(len(classes), 3, 1, 1, generator=generator)
    return inside * ink + (1 - inside) * ground


def lying_captions(classes: Tensor, generator: torch.Generator) -> Tensor:
    """The captions' classes [B] that a careless hand wrote beside drawings of `classes`."""
    return other_class(classes, len(CAPTIONS), WRONG, generator)


# --- readers ---------------------------------------------------------------------------------------------------------


@functools.cache
def recogniser(file: str) -> tuple[Any, list[str]]:
    """PP-OCRv4's network and its characters; number 0 is CTC's blank."""
    from scoreact.rewards.onnx_graph import OnnxModule

    network = OnnxModule(file).eval().requires_grad_(False)
    return network, ["", *network.metadata["character"].split("\n"), " "]


def probabilities(images: Tensor, folder: str) -> tuple[Tensor, list[str]]:
    """p(character | column): pictures [B, 3, H, W] in [0, 1] -> [B, columns, characters], and the characters."""
    network, characters = recogniser(f"{folder}/ocr.onnx")
    tall = F.interpolate(images, (48, 48 * images.shape[3] // images.shape[2]), mode="bilinear", antialias=True)
    return next(iter(network({network.inputs[0].name: tall * 2 - 1}).values())), characters


def log_spelled(found: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """log p(word) by CTC, [B]: of probabilities [B, columns, characters] and the words' characters by number."""
    lengths = torch.tensor([len(word) for word in words])
    letters = torch.tensor([letter for word in words for letter in word])
    columns = torch.full((len(found),), found.shape[1])
    return -F.ctc_loss((found + 1e-9).log().transpose(0, 1), letters, columns, lengths, reduction="none")


def word_of(prompt: str) -> str:
    return prompt.split('"')[1]


def reward(images: Tensor, prompts: Sequence[str], folder: str = "words") -> Tensor:
    """log p(word | picture) of the recogniser by CTC, with its gradient: [B, 3, 16, 32] in [0, 1] -> [B], nats."""
    found, characters = probabilities(images, folder)
    return log_spelled(found, [[characters.index(letter) for letter in word_of(prompt)] for prompt in prompts])


reward.differentiable = True  # type: ignore[attr-defined]


def read(images: Tensor, prompts: Sequence[str], folder: str) -> Tensor:
    """Whether the rewarding recogniser reads the caption's word: booleans [B]."""
    with torch.no_grad():
        found, characters = probabilities(images, folder)
    lines = [
        "".join(characters[c] for c, before in zip(row, [0, *row], strict=False) if c != before)
        for row in found.argmax(2).tolist()
    ]
    return torch.tensor([line.strip() == word_of(prompt) for line, prompt in zip(lines, prompts, strict=True)])


def tesseract(images: Tensor, prompts: Sequence[str], folder: str) -> Tensor:
    """The same by tesseract, the program, which no training sees; what is no letter is left out."""
    with tempfile.TemporaryDirectory() as place:
        pages = f"{place}/pages.tif"
        roomy = F.pad(images, (8, 8, 8, 8), mode="replicate")
        large = F.interpolate(roomy, scale_factor=4, mode="bicubic").clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1)
        first, *others = [Image.fromarray(page.numpy()) for page in large]
        first.save(pages, save_all=True, append_images=others)
        command = ["tesseract", pages, "-", "--psm", "8", "-l", "eng"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [re.sub("[^A-Za-z]", "", page) for page in done.stdout.split("\f")][: len(images)]
    return torch.tensor([line == word_of(prompt) for line, prompt in zip(lines, prompts, strict=True)])


TASK = Task(
    captions=CAPTIONS, draw=draw, lying_captions=lying_captions, parts={}, size=(HIGH, WIDE), batch_norm=True, emphasis=3.0,
    reward=reward, readers={"its reader": read, "tesseract": tesseract},
    shown=CAPTIONS[:8],
)  # fmt: skip

# --- rules side by side ------------------------------------------------------------------------------------------------

SEEDS = 5
BLACK_BOX: dict[str, Any] = {"iterations": 20, "batch_size": 48, "minibatch_size": 48, "reference_batches": 6}
SURROGATE: dict[str, Any] = {
    **BLACK_BOX, "algorithm": "ctrl_pathwise", "value": "surrogate", "kl_weight": 0.1, "act_until": 0.7, "kl_states": 64,
    "average": 0.5, "evaluate_every": 20,
}  # fmt: skip
DDPO: dict[str, Any] = {
    **BLACK_BOX, "algorithm": "ddpo", "iterations": 40, "batch_size": 32, "minibatch_size": 32, "reference_batches": 1,
    "evaluate_every": 40,
}  # fmt: skip
# of each rule, tried on seed 0; the one of the highest reward goes on to the other seeds
TRIALS: dict[str, list[dict[str, Any]]] = {
    "draft": [
        {"learning_rate": 2e-3}, {"learning_rate": 5e-3, "max_gradient_norm": 1.0, "average": 0.5},
        {"learning_rate": 5e-3, "max_gradient_norm": 1.0, "average": 0.5, "last_steps": 0},
    ],
    "ctrl_pathwise": [{**SURROGATE, "learning_rate": rate} for rate in (4e-3, 2e-3, 8e-3)],
    "ddpo": [{**DDPO, "learning_rate": rate} for rate in (4e-3, 2e-3, 8e-3)],
}  # fmt: skip
NAMES = {
    "draft": "`draft`, with the reward's gradient",
    "ctrl_pathwise": "`ctrl_pathwise --value surrogate`, a black box",
    "ddpo": "`ddpo`, a black box",
}
MARKS = ("<!-- words -->\n", "<!-- /words -->\n")


class Lines:
    """Runs by rule, settings and seed, remembered in a file of JSON lines."""

    def __init__(self, out: Path, folder: Path | None) -> None:
        """folder: the task's; None: nothing is run, and what is missing is a LookupError."""
        self.out, self.folder, self.lines = out, folder, resume_lines(out)

    def __call__(self, rule: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        for line in self.lines:
            if (line["rule"], line["seed"], line["settings"]) == (NAMES[rule], seed, settings):
                return line
        if self.folder is None:
            raise LookupError
        costs, views = tuned(TASK, self.folder, None, 20, {**settings, "seed": seed}, quiet=True)
        found = {name: row for name, (row, _) in views.items()}
        self.lines.append({"rule": NAMES[rule], "seed": seed, "settings": settings, **costs, **found})
        append_line(self.out, self.lines[-1])
        print(f"{rule}, seed {seed}: {costs['cpu']:.0f} CPU s", file=sys.stderr, flush=True)
        return self.lines[-1]

    def some(self, rule: str, wanted: Sequence[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
        """Those of `wanted` settings and seeds that are there, or can be run."""
        found = []
        for settings, seed in wanted:
            try:
                found.append(self(rule, settings, seed))
            except LookupError:
                continue
        return found

    def best(self, rule: str) -> list[dict[str, Any]]:
        """Of every seed, at the settings whose reward was highest on seed 0."""
        tried = self.some(rule, [(settings, 0) for settings in TRIALS[rule]])
        if not tried:
            return []
        chosen = max(tried, key=lambda line: line["after"]["reward"])["settings"]
        return self.some(rule, [(chosen, seed) for seed in range(SEEDS)])


def summary(lines: Lines, rules: Sequence[str] = tuple(TRIALS)) -> str:
    """A row a rule: means over seeds, with 95 % intervals by Student's t."""
    from few_steps import cell

    heads = [
        "",
        "seeds",
        "judge right",
        "its reader right",
        "tesseract right",
        "reward",
        "path KL",
        "reward calls",
        "network calls",
        "CPU s",
    ]
    rows = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    seen = (("caption", 3), ("its reader", 3), ("tesseract", 3), ("reward", 2))

    def row(name: str, some: Sequence[dict[str, Any]], when: str, costs: Sequence[str]) -> None:
        views = [cell([line[when][key] for line in some], digits) for key, digits in seen]
        rows.append(f"| {name} | {len(some)} | {' | '.join([*views, *costs])} |")

    found = {rule: lines.best(rule) for rule in rules}
    row("pretrained", max(found.values(), key=len), "before", [""] * 4)
    for rule, mine in found.items():
        if mine:
            costs = [f"{sum(line[key] for line in mine) / len(mine):,.{digits}f}"
                     for key, digits in (("kl", 1), ("reward_calls", 0), ("network_calls", 0), ("cpu", 0))]  # fmt: skip
            row(NAMES[rule], mine, "after", costs)
    return "\n".join(rows)


def rules() -> None:
    """The command `rules`."""
    parser = argparse.ArgumentParser(description="Rules side by side, and their table.")
    parser.add_argument("command")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/words.jsonl"))
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--rules", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--table", action="store_true", help="of the runs that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shown = summary(Lines(options.out, None if options.table else options.folder), options.rules) + "\n"
    print(shown, end="")
    if options.page:
        put(shown, options.page, MARKS)


if __name__ == "__main__":
    rules() if sys.argv[1:2] == ["rules"] else main(TASK, __doc__)
