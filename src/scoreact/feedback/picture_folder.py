"""Pictures that are there already, from whatever model, put into tasks: a folder with their prompts."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..support.errors import FeedbackError
from ..support.text import parsed_json, read_text
from .drawing import SIZES, Drawing
from .store import Store

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_PIXELS = 4096 * 4096
IN_VAIN = 1000  # draws one after the other of what was asked already, after which there is nothing new


LISTS = ("index.json", "metadata.jsonl", "metadata.csv")


def holds_pictures(folder: Path) -> bool:
    """Whether a folder is one of pictures, and no pipeline or run."""
    if not folder.is_dir() or any((folder / name).exists() for name in ("config.json", "model_index.json")):
        return False
    files = list(folder.iterdir())
    weights = any(path.suffix in (".safetensors", ".ckpt") for path in files)
    return not weights and any(path.suffix.lower() in PICTURES or path.name in LISTS for path in files)


def read_pictures(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder, each with its prompt.

    Prompts are those of `index.json` (as `scoreact sample` writes it), of `metadata.jsonl` or `metadata.csv` (columns
    `file_name` and `prompt`, `text` or `caption`), else of NAME.txt beside NAME.png; a picture without any has the prompt "".
    Raises FeedbackError for a folder without pictures, and for a list that names what is not in it.
    """
    listed = _listed(folder)
    if listed is None:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        beside = [path.with_suffix(".txt") for path in files]
        listed = [(f.name, read_text(t).strip() if t.is_file() else "") for f, t in zip(files, beside, strict=True)]
    found = [(inside(folder, name, "the list"), prompt) for name, prompt in listed]
    if not found:
        raise FeedbackError(f"{folder} holds no pictures ({', '.join(PICTURES)}); give a run, a recipe or a pipeline.")
    return found


def _listed(folder: Path) -> list[tuple[str, str]] | None:
    """Names and prompts of a list in the folder; None where there is none."""
    index, lines, table = (folder / name for name in LISTS)
    if index.is_file():
        content = parsed_json(read_text(index), str(index))
        entries = content.get("samples") if isinstance(content, dict) else None
        rows = [entry for entry in entries or [] if isinstance(entry, dict) and "file" in entry]
        rows = [{"file_name": entry["file"], "prompt": entry.get("prompt", "")} for entry in rows]
        place = index
    elif lines.is_file():
        texts = [text for text in read_text(lines).split("\n") if text.strip()]
        rows, place = [parsed_json(text, f"{lines}, line {i}") for i, text in enumerate(texts, 1)], lines
    elif table.is_file():
        rows, place = list(csv.DictReader(io.StringIO(read_text(table)))), table
    else:
        return None
    found = []
    for number, row in enumerate(rows, 1):
        name = row.get("file_name") if isinstance(row, dict) else None
        prompt = next((row[key] for key in ("prompt", "text", "caption") if key in row), "") if name else ""
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise FeedbackError(
                f"{place}, row {number}: expected file_name and prompt, both texts; got {json.dumps(row)[:80]}."
            )
        found.append((name, prompt))
    return found


def add_pictures(store: Store, folder: Path, count: int, how: Drawing) -> Iterator[int]:
    """Ask for `count` comparisons of pictures of one prompt each; yields how many there are so far.

    Pairs are drawn at random, none twice, and no picture a second time before the others of its prompt. It ends early where
    the folder gives no more different ones. Raises FeedbackError where no prompt has enough pictures.
    """
    by_prompt: dict[str, list[Path]] = {}
    for path, prompt in read_pictures(folder):
        by_prompt.setdefault(prompt, []).append(path)
    size, chance = SIZES[how.kind], random.Random(how.seed)
    groups = {prompt: paths for prompt, paths in by_prompt.items() if len(paths) >= size}
    if not groups:
        raise FeedbackError(
            f"no prompt in {folder} has {size} pictures, so none can be compared ({len(by_prompt)} prompts); give more, or "
            "rate single ones: --mode thumbs."
        )
    rows = store.rows("SELECT id, model, prompt FROM samples WHERE source = 'given'")
    known = {(row["model"], row["prompt"]): row["id"] for row in rows}
    asked = {frozenset(json.loads(row[0])) for row in store.rows("SELECT samples FROM tasks WHERE kind = ?", how.kind)}
    decks: dict[str, list[Path]] = {prompt: [] for prompt in groups}
    done = refused = 0
    while done < count and refused < IN_VAIN:
        prompt = list(groups)[(done + refused) % len(groups)]
        if len(decks[prompt]) < size:
            decks[prompt] = chance.sample(groups[prompt], len(groups[prompt]))
        chosen = [decks[prompt].pop() for _ in range(size)]
        keys = [(str(path.resolve()), prompt) for path in chosen]
        with store.transaction():
            for key, path in zip(keys, chosen, strict=True):
                if key not in known:
                    known[key] = store.add_sample(picture_of(path), prompt, model=key[0])
            ids = [known[key] for key in keys]
            if frozenset(ids) in asked:
                refused += 1
                continue
            asked.add(frozenset(ids))
            store.add_task(ids, how.kind)
        done, refused = done + 1, 0
        yield done


def picture_of(source: Path | bytes, name: str = "") -> torch.Tensor:
    """A file's or its content's picture, [1 or 3, H, W] in [0, 1]; `name` is what errors call it.

    Raises FeedbackError for what is no picture, or one too large.
    """
    name = name or str(source)
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise FeedbackError(
                    f"{name} has {image.width} x {image.height} pixels; at most {MOST_PIXELS:,} are taken."
                )
            pixels = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FeedbackError):
            raise
        raise FeedbackError(f"{name} cannot be read as a picture ({error}); take it out.") from None
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 255


def inside(folder: Path, name: str, lister: str) -> Path:
    """A file that a list names. Raises FeedbackError for one that is not there, or not in the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise FeedbackError(f"{lister} names {name!r}, which is no file in {folder}; correct it.")
    return path
