"""Runs killed at random moments (SIGKILL), resumed, and held against the same run left alone: weights, checkpoint and lines.

    python benchmarks/survive.py --kills 50

Every rule on the two-dimensional mixture, a small diffusion pipeline whose adapter is exported at its end, and a calibration of
two rounds, in turn. A kill falls at a uniformly random moment of what the whole run took, start and export included; where
nothing was saved yet, the run is started anew in the same folder. Equal means every bit of model.safetensors, best/, the last
checkpoint's tensors and the export, every line of metrics.jsonl but for its seconds, and every figure that a calibration says.
POSIX only: the runs are forks of this process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file

import scoreact as sa
from scoreact.algorithms.registry import rules
from scoreact.api.calibration_folder import begun
from scoreact.api.saved_run import SavedRun
from scoreact.api.start import train_problem, train_source
from scoreact.recipes.base import recipes
from scoreact.runs.checkpoint import checkpoints
from scoreact.runs.source import open_source, source_of_run
from scoreact.support.files import read_lines
from scoreact.training.config import Config, updated, usable

SETTINGS: dict[str, Any] = {
    "iterations": 6, "batch_size": 32, "steps": 4, "kl_weight": 0.5, "value_steps": 3, "value_first_steps": 5,
    "value_batch_size": 32, "reference_batches": 2, "heldout_samples": 32, "minibatch_size": 64, "evaluate_every": 2,
    "checkpoint_every": 2, "device": "cpu",
}  # fmt: skip
OF_PIPELINE: dict[str, Any] = {
    "algorithm": "ddpo", "iterations": 4, "batch_size": 4, "steps": 3, "reference_batches": 1, "heldout_samples": 4,
    "minibatch_size": 4, "kl_states": 4, "evaluate_every": 2, "checkpoint_every": 1, "device": "cpu",
}  # fmt: skip


def run_rule(rule: str, folder: Path) -> None:
    """Start, or go on with, a run of a rule."""
    torch.manual_seed(0)
    problem, config = recipes()["gaussian"].build(width=16), usable(Config(), {**SETTINGS, "algorithm": rule})
    resume = bool(checkpoints(folder / "checkpoints"))
    train_problem(
        problem, updated(Config(), config), folder, resume=resume, extend=False, start=None, description={}, progress=False,
        on_event=None, report=False,
    )  # fmt: skip


def make_pipeline(folder: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(folder)


def run_pipeline(pipeline: Path, folder: Path) -> None:
    """Start, or go on with, a run of the pipeline, and export its adapter."""
    resume = bool(checkpoints(folder / "checkpoints"))
    if resume:
        source = source_of_run(folder)
    else:
        opened = open_source(str(pipeline))
        source = dataclasses.replace(
            opened, config=updated(opened.config, usable(opened.config, OF_PIPELINE)), reward="brightness", folder=folder,
            options={**opened.options, "lora_rank": 2},
        )  # fmt: skip
    train_source(source, "survive.py", resume=resume)
    if not (folder / "export-peft").exists():
        SavedRun(source_of_run(folder)).export("peft")


def shift(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def run_calibration(folder: Path) -> None:
    """Start, or go on with, a calibration whose target is too far for its two rounds."""
    torch.manual_seed(0)
    problem, settings = recipes()["gaussian"].build(width=16), usable(Config(), {**SETTINGS, "algorithm": "ctrl"})
    del settings["kl_weight"]
    sa.calibrate(
        problem, shift, 30.0, tolerance=0.2, samples=200, rounds=2, out=folder, resume=begun(folder), progress=False,
        report=False, **settings,
    )  # fmt: skip


def forked(work: Callable[[], None], log: Path) -> int:
    child = os.fork()
    if child == 0:
        with log.open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                work()
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        os._exit(0)
    return child


def ended(child: int, log: Path) -> bool:
    """Whether a child that is over ended by itself. Raises RuntimeError, with its last words, where it failed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(log.read_text().strip().splitlines()[-1])
    return code == 0


def left_by(folder: Path) -> dict[str, Any]:
    """All that is compared of a finished run."""
    newest = checkpoints(folder / "checkpoints")[0]
    files = [*folder.glob("*.safetensors"), *folder.glob("best/*.safetensors"), *folder.glob("export-*/*.safetensors")]
    found: dict[str, Any] = {
        str(path.relative_to(folder)): {name: x.numpy().tobytes() for name, x in load_file(path).items()}
        for path in [*files, newest / "tensors.safetensors"]
    }
    lines = read_lines(folder / "metrics.jsonl")
    if begun(folder):
        found["calibration"] = (folder / "calibration.json").read_text()
    found["lines"] = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", help="rules, pipeline or calibration [default all]")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    moments = random.Random(options.seed)
    place = Path(tempfile.mkdtemp(prefix="survive-"))
    names = options.only or [*rules(), "pipeline", "calibration"]
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("kills", "anew", "equal"), 0))
    wholes: dict[str, tuple[dict[str, Any], float]] = {}
    try:
        if "pipeline" in names:
            make_pipeline(place / "model")

        def start(name: str, folder: Path) -> int:
            others = {"pipeline": partial(run_pipeline, place / "model"), "calibration": run_calibration}
            return forked(partial(others.get(name, partial(run_rule, name)), folder), place / "log")

        for number in range(options.kills):
            name = names[number % len(names)]
            folder = place / f"{name}-{number}"
            if name not in wholes:
                begin = time.monotonic()
                ended(start(name, place / name), place / "log")
                wholes[name] = left_by(place / name), time.monotonic() - begin
            whole, seconds = wholes[name]
            while True:
                child = start(name, folder)
                time.sleep(moments.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                if not ended(child, place / "log"):
                    break
                shutil.rmtree(folder)  # it was faster than the kill
            count = counts[name]
            count["kills"] += 1
            count["anew"] += not (checkpoints(folder / "checkpoints") or begun(folder))
            try:
                ended(start(name, folder), place / "log")
                found = left_by(folder)
                differ = [part for part in whole | found if whole.get(part) != found.get(part)]
            except RuntimeError as error:
                differ = [str(error)]
            count["equal"] += not differ
            if differ:
                print(f"{name}, kill {number}: differs in {', '.join(differ)}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(
        "| run | kills | before anything was saved | equal to the uninterrupted run, bit for bit |\n| --- | --- | --- | --- |"
    )
    total = {key: sum(count[key] for count in counts.values()) for key in ("kills", "anew", "equal")}
    for name, count in [*counts.items(), ("all", total)]:
        print(f"| {name} | {count['kills']} | {count['anew']} | {count['equal']} |")
    print(json.dumps(total), file=sys.stderr)
    return int(total["equal"] != total["kills"])


if __name__ == "__main__":
    sys.exit(main())
