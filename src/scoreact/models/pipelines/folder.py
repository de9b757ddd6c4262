"""A pipeline's folder: which of its weights files are loaded, in which dtypes, and what it says of its licence.

Only safetensors are read, and no code from a folder is run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from ...support.errors import ModelError, RunError
from ...support.files import check_sums

# diffusion_pytorch_model.fp16-00001-of-00002.safetensors, model.safetensors, and where older versions wrote the variant
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.([^.-]+))?(?:-\d+-of-\d+)?(?:\.([^.-]+))?\.(?:safetensors|bin|pt|pth|ckpt)"
)
SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_folder(source: str, dtype: torch.dtype | None, variant: str) -> tuple[Any, list[str]]:
    """A pipeline from a folder or the hub, each network in its stored dtype unless another is wanted.

    Args:
        source: a folder with a model_index.json, or a hub id.
        dtype: of all networks; None: their own.
        variant: of the weights files, such as fp16; "": the files without one, or the only one that there is.

    Returns:
        The pipeline, and what a user should know of the choice.

    Raises:
        ModelError: nothing of this kind is there, or it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    path = Path(source).expanduser()
    if path.is_file() or (path.suffix in SINGLE and not path.is_dir()):
        raise _single_file(path)
    try:
        folder = path if path.is_dir() else _downloaded(source, variant)
        if not (folder / "model_index.json").is_file() and (
            files := [f for f in folder.iterdir() if f.suffix in SINGLE]
        ):
            raise _single_file(sorted(files)[0])
        check_sums(folder)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if isinstance(index.get("_class_name"), list):
            raise ModelError(f"pipeline {source!r} brings code of its own ({index['_class_name'][0]}.py), which is not run; "
                             "load it in Python and give the pipeline itself.")  # fmt: skip
        named = {name: kind for name, kind in index.items() if isinstance(kind, list)}
        # saved without it (Stable Diffusion 3 needs no T5), and opened only when told so
        without: dict[str, Any] = {name: None for name, kind in named.items() if kind == [None, None]}
        if "safety_checker" in named and not (folder / "safety_checker").is_dir():  # nothing here asks it
            without |= {"safety_checker": None, "requires_safety_checker": False}
        parts = [folder / name for name in named if name not in without and (folder / name).is_dir()]
        chosen, notes = _variant(parts, variant, source)
        if dtype is None:
            own = {part.name: _stored_dtype(part, chosen) for part in parts}
            denoiser = own.get("unet") or own.get("transformer") or torch.float32
            types: Any = {"default": denoiser, **{name: kind for name, kind in own.items() if kind is not None}}
        else:
            types = dtype
        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=types, variant=chosen or None, use_safetensors=True, **without
        )
    except (ModelError, RunError):
        raise
    except Exception as error:  # whatever diffusers, transformers and their readers make of a damaged or foreign folder
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"cannot open pipeline {source!r}: {reason or type(error).__name__}. Give a folder with a model_index.json, or a "
            "hub id."
        ) from error
    return pipeline, notes


def _downloaded(source: str, variant: str) -> Path:
    """Of a hub id: the folder in the cache, quietly where the hub cannot be reached."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return Path(DiffusionPipeline.download(source, variant=variant or None))
    finally:
        logging.set_verbosity(before)


def _single_file(path: Path) -> ModelError:
    if not path.exists():
        return ModelError(f"{str(path)!r} does not exist; give the folder of a pipeline, or a hub id.")
    return ModelError(
        f"{str(path)!r} is a single file, and a pipeline is a folder; make one of it with diffusers, once: "
        f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained('folder'), of its own pipeline's class."
    )


def _variant(parts: list[Path], wanted: str, source: str) -> tuple[str, list[str]]:
    """Which variant of the weights is loaded, and a word about those that are not.

    As in diffusers a component without that variant is loaded from its plain files.
    """
    held: dict[str, set[str]] = {}
    for part in parts:
        files = {path.name: found for path in part.iterdir() if (found := WEIGHTS.fullmatch(path.name))}
        if files and not any(name.endswith(".safetensors") for name in files):
            raise ModelError(
                f"{part.name}/{min(files)} of pipeline {source!r} is a pickle, which can run code; write safetensors once, if "
                f"you trust it: DiffusionPipeline.from_pretrained({source!r}).save_pretrained('folder')."
            )
        held[part.name] = {found[1] or found[2] or "" for name, found in files.items() if name.endswith(".safetensors")}
    held = {name: found for name, found in held.items() if found}
    known = {variant for found in held.values() for variant in found} - {""}
    if wanted:
        if wanted not in known:
            have = ", ".join(sorted(known)) or "none"
            raise ModelError(
                f"variant is {wanted!r}, but pipeline {source!r} has {have}; leave it out, or name one of these."
            )
        return wanted, []
    only = [name for name, found in held.items() if "" not in found]  # that plain diffusers would not find
    if not only:
        note = f"The folder also holds weights of variant {', '.join(sorted(known))}; those without a variant are used."
        return "", [note] if known else []
    common = sorted(set.intersection(*(held[name] for name in only)))
    if len(common) != 1:
        have = "; ".join(f"{name}: {', '.join(sorted(held[name]))}" for name in only)
        raise ModelError(
            f"pipeline {source!r} has weights of several variants and no plain ones ({have}); say which with "
            "--option variant=NAME, or variant=NAME in Python."
        )
    return common[0], []


def _stored_dtype(part: Path, variant: str) -> torch.dtype | None:
    """Of most of a component's numbers, in the files that are loaded; diffusers itself would make everything float32.

    None: it has no weights.
    """
    from safetensors import safe_open

    files = {path: found for path in part.iterdir() if (found := WEIGHTS.fullmatch(path.name))}
    files = {path: found for path, found in files.items() if path.suffix == ".safetensors"}
    named = [path for path, found in files.items() if (found[1] or found[2] or "") == variant]
    sizes: Counter[str] = Counter()
    for path in named or [path for path, found in files.items() if not (found[1] or found[2])]:
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                entry = file.get_slice(name)
                sizes[entry.get_dtype()] += torch.Size(entry.get_shape()).numel()
    return DTYPES.get(sizes.most_common(1)[0][0], torch.float32) if sizes else None


def licence_of(folder: Path) -> str | None:
    """What a pipeline's folder says of its licence: in its card's head, its configuration, or the first line of a licence
    file; None where it says nothing."""
    card = folder / "README.md"
    if card.is_file() and (text := card.read_text(encoding="utf-8", errors="replace")).startswith("---"):
        head = yaml.safe_load(text.split("---")[1])
        if isinstance(head, dict) and head.get("license"):
            return str(head.get("license_name") or head["license"])
    index = folder / "model_index.json"
    if index.is_file() and (said := json.loads(index.read_text(encoding="utf-8")).get("license")):
        return str(said)
    for path in sorted(folder.glob("LICEN[SC]E*")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line[:80] for line in lines if line), path.name)
    return None
