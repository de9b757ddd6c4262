"""Motion by reinforcement learning on a small video model, with a reward that a still wins and one that it does not.

    python benchmarks/moving_shapes.py balls
    python benchmarks/motion.py run --folder balls --out benchmarks/motion.jsonl
    python benchmarks/motion.py table --out benchmarks/motion.jsonl --write docs/results/video.md
    python benchmarks/motion.py film --folder balls --picture docs/results/video.gif

`moving_shapes.py` says what the model and the judge are. Every arm has the same model, captions, sampler (DDIM with noise,
STEPS steps) and network calls (policy and reference, one a clip and pass), and one setting. Those of `draft` were chosen by
looking at five of them on seeds 0 and 1; `surrogate` and `residual`, of `ctrl_pathwise`, were tried on seed 10, which is not
shown, and left as they were; `network`, of it too, and `ddpo` had one try. `draft` and `residual` follow the reward's own
gradient or ask it along the path; the others know rewards of finished clips alone. The judge sees SEEN clips drawn as in
training, before and after from the same noise. Runs in the file are not run again. `film` shows the runs of seed 0, whose
weights are beside the model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from moving_shapes import CAPTIONS, build, judged
from page_tables import put
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import scoreact as sa
from scoreact import rewards
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.evaluation.metrics import confidence_interval
from scoreact.models.base import ScoreModel
from scoreact.report.figures import canvas
from scoreact.runs.films import as_picture, small, write_film
from scoreact.sampling.draw import draw
from scoreact.support.files import append_line, resume_lines
from scoreact.training.config import updated
from scoreact.types import Condition

MARKS = ("<!-- video -->\n", "<!-- /video -->\n")
STEPS, SEEN, CALLS = 10, 128, 12_000
COMMON: dict[str, Any] = {
    "solver": "ddim", "steps": STEPS, "batch_size": 32, "minibatch_size": 32, "iterations": 1000, "evaluate_every": 1000,
    "heldout_samples": 16, "reference_batches": 1, "device": "cpu", "guard": "off",
}  # fmt: skip
DRAFT: dict[str, Any] = {"algorithm": "draft", "last_steps": 4, "kl_weight": 1e-5, "learning_rate": 1e-3}
PATHWISE: dict[str, Any] = {
    "algorithm": "ctrl_pathwise", "kl_weight": 1e-2, "learning_rate": 4e-3, "kl_states": 64, "max_kl": 5.0, "kl_limit": 5000,
    "average": 0.5,
}  # fmt: skip
SURROGATE: dict[str, Any] = {**PATHWISE, "value": "surrogate", "reference_batches": 3}
FAR: dict[str, Any] = {"kl_weight": 1e-3, "learning_rate": 2e-3, "max_kl": 50.0}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # the reward, and the rule's settings
    "draft": ("smooth_motion", DRAFT),
    "draft, one-sided": ("temporal_flickering", DRAFT),
    "draft, priced": ("smooth_motion", {**DRAFT, "kl_weight": 1e-4}),
    "surrogate": ("smooth_motion", {**SURROGATE, **FAR}),
    "surrogate, priced": ("smooth_motion", {**SURROGATE, "act_until": 0.7}),
    "residual": ("smooth_motion", {**PATHWISE, "value": "residual"}),
    "network": ("smooth_motion", {**PATHWISE, "value": "network", "value_loss": "soft"}),
    "ddpo": ("smooth_motion", {"algorithm": "ddpo", "learning_rate": 1e-3}),
}
SHOWN = {
    "before": None,
    "flickering alone": "draft, one-sided",
    "smooth motion": "draft, priced",
    "as a black box": "surrogate",
}  # groups of columns of the film
COLUMNS, FACTOR = 2, 3  # of clips a group; pixels a pixel
MEASURES = {
    "good": 2,
    "moves": 2,
    "identity": 2,
    "direction": 2,
    "speed": 2,
    "smooth_motion": 3,
    "temporal_flickering": 3,
}


class Budget(sa.Hook):
    """Ends a run at CALLS network calls."""

    def after(self, trainer: Any) -> sa.Stop | None:
        return sa.Stop("the calls are spent.") if trainer.policy.network_calls >= CALLS else None


def clips(model: ScoreModel, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Drawn as in training, the captions in turn."""
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    config = updated(sa.Config(), COMMON)
    ts, noise = config.times(model.schedule), config.sde(model.schedule).noise
    return draw(model, prompts, sampler_by_name(config.solver), ts, seed, noise=noise)[1], prompts


def look(model: ScoreModel, seed: int) -> dict[str, float]:
    """The judge's measures and both rewards, means over SEEN clips."""
    drawn, prompts = clips(model, SEEN, 1000 + seed)
    found = {name: float(value.float().mean()) for name, value in judged(drawn, prompts).items()}
    for name in ("smooth_motion", "temporal_flickering"):
        found[name] = float(rewards.load(name)(drawn, Condition(prompts)).mean())
    return found


def weights_of(folder: str, arm: str) -> Path:
    return Path(folder) / f"{arm.replace(', ', '-')}.safetensors"


def tuned(folder: str, arm: str, seed: int) -> dict[str, Any]:
    """One run: what the judge sees after it, and what it cost. The weights of seed 0 are kept."""
    reward, settings = ARMS[arm]
    torch.manual_seed(seed)
    config = updated(sa.Config(), {**COMMON, **settings, "seed": seed})
    begin = time.process_time()
    result = sa.finetune(build(folder), rewards.load(reward), CAPTIONS, config=config, hooks=[Budget()])
    seconds = time.process_time() - begin
    last = [line for line in result.history if "cost/network_calls" in line][-1]
    model: Any = result.policy.model
    if seed == 0:
        save_file(model.network.state_dict(), str(weights_of(folder, arm)))
    cost = {name: last[f"cost/{name}"] for name in ("network_calls", "reward_calls")}
    return {
        **look(model, seed), **cost, "iterations": last["iteration"], "kl": result.final["policy/kl"], "seconds": seconds,
        "reward": reward, "settings": settings,
    }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    known = {(line["arm"], line["seed"]) for line in resume_lines(options.out)}
    for seed in range(options.seeds):
        if ("before", seed) not in known:
            append_line(options.out, {"arm": "before", "seed": seed, **look(build(options.folder), seed)})
        for arm in options.arms:
            if (arm, seed) not in known:
                append_line(options.out, {"arm": arm, "seed": seed, **tuned(options.folder, arm, seed)})


def cell(values: list[float], digits: int) -> str:
    """Mean with its 95 % interval of three or more, else each of them."""
    if len(values) < 3:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    mean, half = confidence_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row an arm."""
    heads = ["", "reward", "seeds", *(name.replace("_", " ") for name in MEASURES), "path KL, nats", "network calls",
             "reward calls", "CPU s"]  # fmt: skip
    rows = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for arm in ("before", *ARMS):
        mine = [line for line in lines if line["arm"] == arm]
        if not mine:
            continue
        cells = [arm, mine[0].get("reward", ""), str(len(mine))]
        cells += [cell([line[name] for line in mine], digits) for name, digits in MEASURES.items()]
        if arm != "before":
            cells.append(cell([line["kl"] for line in mine], 1))
            costs = ("network_calls", "reward_calls", "seconds")
            cells += [f"{statistics.mean(line[name] for line in mine):,.0f}" for name in costs]
        rows.append("| " + " | ".join(cells + [""] * (len(heads) - len(cells))) + " |")
    return "\n".join(rows)


def film(folder: str, picture: Path) -> None:
    """A GIF: a row a caption, groups of columns of SHOWN, from the same noise."""
    groups = []
    for arm in SHOWN.values():
        model = build(folder)
        if arm is not None:
            model.network.load_state_dict(load_file(weights_of(folder, arm)))
        drawn, _ = clips(model, COLUMNS * len(CAPTIONS), 1000)
        side = FACTOR * drawn.shape[-1]
        groups.append([small(video, side, drawn.shape[2]) for video in drawn])

    def frame(number: int) -> Image.Image:
        rows = []
        for caption in range(0, len(CAPTIONS), 2):
            own = [videos[caption + i * len(CAPTIONS)][:, number] for videos in groups for i in range(COLUMNS)]
            rows.append(torch.stack(own) / 255)
        blocks = [canvas(part, 2) for part in torch.stack(rows).split(COLUMNS, dim=1)]
        white = torch.ones(len(blocks[0]), 16, 3)
        whole = torch.cat([piece for block in blocks for piece in (white, block)][1:], dim=1)
        return as_picture(whole.permute(2, 0, 1)).quantize(32, dither=Image.Dither.NONE)

    write_film(frame, groups[0][0].shape[1], picture, "GIF")
    print(
        f"{picture}: {picture.stat().st_size / 1000:.0f} kB; columns: {', '.join(SHOWN)}; rows: {', '.join(CAPTIONS[::2])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table", "film"])
    parser.add_argument("--folder", help="of moving_shapes.py")
    parser.add_argument("--out", type=Path, default=Path("motion.jsonl"), help="a line a run")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--picture", type=Path, help="of the film")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "run":
        run(options)
    elif options.part == "film":
        film(options.folder, options.picture)
    else:
        shown = table(resume_lines(options.out)) + "\n"
        print(shown, end="")
        if options.write:
            put(shown, options.write, MARKS)


if __name__ == "__main__":
    main()
