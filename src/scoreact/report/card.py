"""The model card of an export: what it is, what came of training and how sure that is, how to load it, its limits.

Knows a run's record and what the model says of itself; writes Markdown, reads no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..runs.record import Record, Row, read_json, value
from .numbers import number, survey_cells
from .words import before_training, warnings, what_happened

KINDS = {
    "diffusers": "A LoRA adapter of rank {rank} in diffusers' form",
    "kohya": "A LoRA adapter of rank {rank} in kohya's form",
    "peft": "A LoRA adapter of rank {rank} in peft's form",
    "pipeline": "A whole pipeline, the tuned weights merged",
    "weights": "The weights of a network",
}
NOT_STATED = "not stated"


def about(run: Record, facts: Mapping[str, Any], weights: str) -> dict[str, str]:
    """The same facts in few words, for a file's header: all of them strings."""
    c, call = run.config, facts.get("call", {})
    last = evaluation_of(run, weights)
    found = {
        "base_model": facts.get("base_model"), "rank": facts.get("rank"), "alpha": facts.get("rank"),
        "reward": run.description.get("reward"), "algorithm": c.get("algorithm"), "kl_weight": c.get("kl_weight"),
        "path_kl": last.get("policy/kl"), "guidance_scale": call.get("guidance_scale"), "steps": c.get("steps"),
        "sampler": c.get("solver"), "noise_scale": c.get("noise_scale"), "iterations": last.get("iteration"),
        "weights": weights, "lora": facts.get("lora"), "made_by": f"scoreact {__version__}",
    }  # fmt: skip
    return {name: str(fact) for name, fact in found.items() if fact is not None}


def evaluation_of(run: Record, weights: str) -> Row:
    """The held-out evaluation of the weights: the last one, or that of the best."""
    best = run.result.get("best_iteration")
    rows = [row for row in run.evaluations if weights != "best" or best is None or row.get("iteration") == best]
    return rows[-1] if rows else {}


def model_card(run: Record, facts: Mapping[str, Any], form: str, weights: str, folder: Path) -> str:
    """README.md of an export.

    Args:
        run: what the run's folder holds.
        facts: of the model (`Saves.facts`): base_model, pipeline, component, rank, dtype, licence, lora, call; all may be left
            out.
        form: of the export. weights: final or best. folder: where it lies.
    """
    base, reward = (
        facts.get("base_model") or "a model of one's own",
        run.description.get("reward") or "a Python function",
    )
    kind = KINDS[form].format(rank=facts.get("rank", "?"))
    parts = [
        _front_matter(facts, form),
        f"# {Path(str(base)).name}, tuned to {reward}",
        f"{kind}: {base} fine-tuned to the reward `{reward}` by [scoreact](https://arxiv.org/abs/2502.01819) {__version__}. "
        f"These are the {weights} weights of the run.",
        "## Before and after\n\n" + _outcome(run, facts, weights),
        _survey(run, weights),
        "## How to load it\n\n```python\n" + _lines(run, facts, form, folder) + "\n```",
        "## How it was made\n\n" + _settings(run, facts),
        "## Limits\n\n" + "\n".join(f"- {text}" for text in _limits(run, facts, form)),
        "## Licence\n\n" + _licence(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: Mapping[str, Any], form: str) -> str:
    """What a model hub reads."""
    if form == "weights":
        return ""
    library = "peft" if form == "peft" else "diffusers"
    lines = [f"library_name: {library}", f"base_model: {facts['base_model']}" if facts.get("base_model") else ""]
    lines += [f"license: {facts['licence']}" if " " not in str(facts.get("licence") or " ") else "", "tags: [scoreact]"]
    return "---\n" + "\n".join(line for line in lines if line) + "\n---"


def _outcome(run: Record, facts: Mapping[str, Any], weights: str) -> str:
    first, last = (run.evaluations or [{}])[0], evaluation_of(run, weights)
    rows: list[Sequence[str]] = []
    for name, key in (("held-out reward", "reward/heldout"), ("J = reward - kl_weight x path KL", "objective/J")):
        rows.append(
            (name, _interval(*before_training(run, key)), _interval(value(last, key), value(last, f"{key}_se")))
        )
    rows.append(("path KL, nats", "0", _interval(value(last, "policy/kl"), value(last, "policy/kl_se"))))
    rows += [
        (key.partition("/")[2], *(_interval(value(row, key), value(row, f"{key}_se")) for row in (first, last)))
        for key in ("sample/diversity", *(k for k in last if k.startswith("judge/") and not k.endswith("_se")))
    ]
    if facts.get("starts_elsewhere") and len(run.evaluations) > 1 and not run.evaluations[1].get("iteration"):
        start = run.evaluations[1]
        rows.insert(1, ("held-out reward of the LoRA at the start", _interval(value(start, "reward/heldout")), ""))
        rows.insert(2, ("its path KL, nats", _interval(value(start, "policy/kl")), ""))
    note = (
        f"Of {run.config.get('heldout_samples', '?')} samples on noise that training did not see, of the prompts of training; "
        f"after iteration {last.get('iteration', '?')}. ± is half of a 95 % interval. Path KL is counted from "
        f"{facts.get('reference', 'the pretrained model')}."
    )
    return _table(("", "before", "after"), rows) + "\n\n" + note


def _survey(run: Record, weights: str) -> str:
    kept = read_json(run.path / "survey.json", [])
    if kept.get("weights") != weights or kept.get("iteration") != evaluation_of(run, weights).get("iteration"):
        return ""
    note = f"{kept['samples']} samples a row, the same prompts and noise in all; one thing is changed at a time."
    return "## How much of the gain survives\n\n" + _table(*survey_cells(kept["rows"])) + "\n\n" + note


def _interval(mean: float, error: float = math.nan) -> str:
    return number(mean) + (f" ± {number(1.96 * error)}" if math.isfinite(error) else "")


def _lines(run: Record, facts: Mapping[str, Any], form: str, folder: Path) -> str:
    """Python that loads the export."""
    if form == "weights":
        return (
            "from safetensors.torch import load_file\n\n"
            f'network.load_state_dict(load_file("{folder}/model.safetensors"))'
        )
    base, kind, component = facts.get("base_model") or "BASE_MODEL", facts["pipeline"], facts["component"]
    without = "".join(f", {name}=None" for name in facts.get("without", ()))
    opened = "{folder}" if form == "pipeline" else "{base}"
    loading = [f'pipe = {kind}.from_pretrained("{opened}"{without})'.format(folder=folder, base=base)]
    if form in ("diffusers", "kohya"):
        loading.append(f'pipe.load_lora_weights("{folder}")')
    if form == "peft":
        loading.append(f'pipe.{component} = PeftModel.from_pretrained(pipe.{component}, "{folder}").base_model.model')
    call = {"num_inference_steps": run.config.get("steps"), **facts.get("call", {})}
    words = ['"a prompt"'] * bool(facts.get("takes_prompts", True)) + [f"{k}={v!r}" for k, v in call.items()]
    imports = [f"from diffusers import {kind}"] + ["from peft import PeftModel"] * (form == "peft")
    drawn = "frames" if facts.get("video") else "images"
    return "\n".join([*imports, "", *loading, f"found = pipe({', '.join(words)}).{drawn}[0]"])


def _settings(run: Record, facts: Mapping[str, Any]) -> str:
    c, call = run.config, facts.get("call", {})
    given = run.description.get("options") or {}
    options = {k: v for k, v in given.items() if v not in (None, "", False) and k not in ("path", "lora")}
    rows: list[Sequence[object]] = [
        ("base model", facts.get("base_model") or NOT_STATED),
        ("started from", facts["lora"] if facts.get("lora") else "the base model"),
        ("reward", run.description.get("reward") or "a Python function"),
        ("update rule", c.get("algorithm")),
        *((name, c.get(name)) for name in ("kl_weight", "iterations", "batch_size", "learning_rate", "seed")),
        ("sampler in training", f"{c.get('solver')}, {c.get('steps')} steps, {c.get('noise')} {c.get('noise_scale')}"),
        *((name.replace("_", " "), setting) for name, setting in call.items()),
        ("options", ", ".join(f"{k} {v}" for k, v in options.items() if k not in call) or "the defaults"),
        ("command", f"`{run.description['command']}`" if run.description.get("command") else "made from Python"),
    ]
    return _table(("", ""), [[str(cell) for cell in row] for row in rows])


def _limits(run: Record, facts: Mapping[str, Any], form: str) -> list[str]:
    c = run.config
    found = [*warnings(run), *what_happened(run)]
    found.append(
        f"Before and after are of the sampler of training ({c.get('solver')}, {c.get('steps')} steps). "
        "With other guidance, samplers and steps the gain is another."
    )
    found.append("More reward is what was trained for. What the reward does not see may have changed with it.")
    if form == "pipeline" and facts.get("dtype") not in (None, "float32"):
        found.append(
            f"The weights are {facts['dtype']}, as the base model's: the adapter was added in float32 and rounded, so pictures "
            "differ a little from those measured. The adapter by itself (`--format diffusers`) is float32."
        )
    return found


def _licence(facts: Mapping[str, Any]) -> str:
    text = facts.get("licence")
    if not text:
        return f"Of the base model: {NOT_STATED} in its files. The tuned weights are derived from it: find it before you share."
    return f"Of the base model: {text}. The tuned weights are derived from it."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])
