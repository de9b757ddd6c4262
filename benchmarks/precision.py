"""Half precision: what it costs in path KL, and what is learned with it. On the small trained pipeline of `shapes.py`.

    python benchmarks/shapes.py pretrain shapes
    python benchmarks/precision.py shapes                      # what precision.jsonl lacks, then its table
    python benchmarks/precision.py shapes --seeds 5 --ways float32 "bfloat16, computed in float32"
    python benchmarks/precision.py --page docs/howto/pipelines.md     # runs nothing

Path KL by rounding: of 24 captions at the rule's steps, by a change of the weights as large as one step of the optimiser
(`training.rounding`). Gain: the reward on 240 pictures from the same noise before and after, drawn in the precision that was
trained in; seeds differ in the adapter's first weights, the rollouts and the pictures. The reward is a black box to `ctrl`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shapes
import text_to_image
import torch
from few_steps import cell
from page_tables import put
from torch import Tensor

import scoreact as sa
from scoreact import rewards
from scoreact.control.policy import Policy
from scoreact.dynamics.grids import GRIDS
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim
from scoreact.models.pipelines import casting
from scoreact.models.pipelines.model import PipelineModel
from scoreact.models.pipelines.opening import pipeline_model
from scoreact.models.value_networks import Encoder
from scoreact.support.files import append_line, resume_lines
from scoreact.training.config import updated
from scoreact.training.rounding import rounding_kl

RESULTS = Path(__file__).with_suffix(".jsonl")
STEPS, RATE = 10, 4e-3
MARKS = ("<!-- precision -->\n", "<!-- /precision -->\n")
RULES: dict[str, dict[str, Any]] = {
    "ctrl": {
        "algorithm": "ctrl", "value": "residual", "value_loss": "martingale", "kl_weight": 0.1,
        "iterations": 4, "batch_size": 48, "minibatch_size": 48, "kl_states": 48, "learning_rate": RATE, "average": 0.5,
        "warmup": 0, "epochs": 1, "value_first_steps": 10, "value_steps": 5, "value_batch_size": 96,
    },
    "draft": {
        "algorithm": "draft", "last_steps": 5, "kl_weight": 0.01, "iterations": 9, "batch_size": 32, "minibatch_size": 16,
        "learning_rate": 1e-2,
    },
}  # fmt: skip
EVERYWHERE = {"steps": STEPS, "reference_batches": 1, "heldout_samples": 24, "evaluate_every": 100, "device": "cpu"}

# --- ways to compute: the dtype that weights are stored in, and what is done with them -------------------------------


def tf32(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product of TF32 as a GPU makes it: of factors rounded to 11 bits, summed in float32."""

    def rounded(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return product(rounded(x), rounded(weight.float()), bias)


def one_product(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return tf32(product, x, weight, bias)


def two_products(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return casting.in_two_parts(functools.partial(tf32, product), x, weight, bias)


def opened(folder: Path, way: str, seed: int) -> PipelineModel:
    stored = {"float16": torch.float16, "float32": torch.float32, "bfloat16 under autocast": torch.float32}
    dtype = stored.get(way, torch.bfloat16)
    compute = dtype if way in ("bfloat16", "float16") else torch.float32
    torch.manual_seed(seed)  # of the adapter's first weights
    model = pipeline_model(
        str(folder), lora_rank=8, guidance_scale=text_to_image.GUIDANCE, vae_slicing=False, dtype=dtype, compute_dtype=compute,
    )  # fmt: skip
    if way == "bfloat16 under autocast":
        model.family.compute_dtype, model.family.autocast = torch.bfloat16, True
    casting.multiply = EMULATED.get(way, MULTIPLY)
    return model


MULTIPLY = casting.multiply
EMULATED = {"bfloat16, products in TF32": one_product, "bfloat16, two products in TF32": two_products}
WAYS = ["float32", "bfloat16", "bfloat16 under autocast", "float16", *EMULATED, "bfloat16, computed in float32"]
TRAINED = ["float32", "bfloat16", "bfloat16, computed in float32"]

# --- measuring -------------------------------------------------------------------------------------------------------


def floor(folder: Path, way: str) -> dict[str, Any]:
    """Path KL by rounding."""
    model = opened(folder, way, 0)
    ts = GRIDS["uniform"](model.schedule, STEPS, None)
    condition, generator = model.condition(shapes.CAPTIONS), torch.Generator().manual_seed(0)
    found = rounding_kl(Policy(model), SDE(model.schedule, noise_level(1.0)), ddim, ts, condition, generator, RATE)
    return {"kl": found}


def rewards_of(model: Any, folder: Path, seed: int) -> Tensor:
    """Of 10 pictures a caption, [240]."""
    pictures = text_to_image.look(shapes.TASK, model, folder, 10, STEPS, 100 + seed)[1]
    return shapes.reward(pictures, [caption for caption in shapes.CAPTIONS for _ in range(10)], str(folder))


BEFORE: dict[tuple[str, int], Tensor] = {}  # of the reference


def run(folder: Path, rule: str, way: str, seed: int) -> dict[str, Any]:
    model = opened(folder, way, seed)
    config = updated(sa.Config(), {**EVERYWHERE, **RULES[rule], "seed": seed})
    begin = time.process_time()
    result = sa.finetune(
        model, rewards.load(shapes.reward, folder=str(folder)), shapes.CAPTIONS, config=config,
        value_network=lambda: Encoder(model.shape[0], classes=len(shapes.CAPTIONS)),
    )  # fmt: skip
    seconds = time.process_time() - begin
    if (way, seed) not in BEFORE:
        BEFORE[way, seed] = rewards_of(result.policy.reference, folder, seed)
    before = BEFORE[way, seed]
    gains = rewards_of(result.policy.model, folder, seed) - before
    row = {
        "before": float(before.mean()), "gain": float(gains.mean()), "error": float(gains.std()) / math.sqrt(len(gains)),
        "path_kl": result.final["policy/kl"], "rounding": result.reference.get("policy/kl_rounding", 0.0),
        "seconds": seconds, "paths": config.iterations * config.batch_size,
    }  # fmt: skip
    if way == "bfloat16, computed in float32":  # what plain diffusers draws with the exported adapter
        result.policy.model.family.compute_dtype = torch.bfloat16
        row["gain_in_plain_diffusers"] = float((rewards_of(result.policy.model, folder, seed) - before).mean())
    return row


# --- the table -------------------------------------------------------------------------------------------------------


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: the floors, and what each rule gains in each way; gains in pairs of equal seeds beside float32's."""
    floors = {row["way"]: row for row in found if row["what"] == "floor"}
    lines = ["| denoiser | path KL by rounding, nats |", "| --- | ---: |"]
    lines += [f"| {way} | {floors[way]['kl']:.2g} |" for way in WAYS if way in floors]
    head = ["rule, paths", "denoiser", "seeds", "gain", "less float32's", "path KL", "by rounding", "CPU s"]
    lines += ["", f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(head) - 2)}"]
    for rule in RULES:
        by = {way: {row["seed"]: row for row in found if (row["what"], row["way"]) == (rule, way)} for way in TRAINED}
        for way, rows in by.items():
            if not rows:
                continue
            name = f"`{rule}`, {next(iter(rows.values()))['paths']}" if way == TRAINED[0] else ""
            pairs = [row["gain"] - by[TRAINED[0]][seed]["gain"] for seed, row in rows.items() if seed in by[TRAINED[0]]]
            less = "" if way == TRAINED[0] else cell(pairs, 3)
            refused = all(row["path_kl"] == 0 for row in rows.values())
            gain = "0, every step refused" if refused else cell([row["gain"] for row in rows.values()], 3)
            kl, rounding, seconds = (
                statistics.fmean(row[name] for row in rows.values()) for name in ("path_kl", "rounding", "seconds")
            )
            lines.append(
                f"| {name} | {way} | {len(rows)} | {gain} | {less} | {kl:.2f} | {rounding:.2g} | {seconds:.0f} |"
            )
            plain = [row["gain_in_plain_diffusers"] for row in rows.values() if "gain_in_plain_diffusers" in row]
            if plain:
                lines.append(f"| | its adapter, drawn with in bfloat16 | {len(plain)} | {cell(plain, 3)} | | | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of `benchmarks/shapes.py pretrain`")
    parser.add_argument("--rules", nargs="*", choices=tuple(RULES), default=list(RULES))
    parser.add_argument("--ways", nargs="*", choices=tuple(TRAINED), default=list(TRAINED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this page; runs nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = resume_lines(options.out)
    wanted = [("floor", way, 0) for way in WAYS]
    wanted += [
        (rule, way, seed) for seed in range(options.seeds) for rule in options.rules for way in reversed(options.ways)
    ]
    if options.page is None and options.folder is None:
        parser.error("give the folder of `shapes.py pretrain`, or --page.")
    for what, way, seed in wanted if options.page is None else []:
        if any((row["what"], row["way"], row["seed"]) == (what, way, seed) for row in found):
            continue
        row = floor(options.folder, way) if what == "floor" else run(options.folder, what, way, seed)
        found.append({"what": what, "way": way, "seed": seed, **row})
        append_line(options.out, found[-1])
    shown = table(found)
    print(shown)
    if options.page is not None:
        put(shown, options.page, MARKS)


if __name__ == "__main__":
    main()
