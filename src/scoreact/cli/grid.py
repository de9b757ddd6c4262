"""The command `grid`: the time grid and noise level at which a sampler of few steps is nearest to what it should draw."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..support.errors import SettingError
from ..support.seeds import LARGEST, derived
from .parser import Parser, whole

if TYPE_CHECKING:
    from ..evaluation.grid_search import Measure
    from ..models.base import ScoreModel
    from ..recipes.base import Problem

FINE = 50  # steps of heun, where the model's own samples are the standard
MOST = 2048  # numbers of a sample that are their own features


def grid_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("source", metavar="RUN_DIR|RECIPE", help="a run, a recipe, a pipeline, or my_model.py:build")
    add("--steps", type=whole(2), required=True, metavar="INT", help="steps of a path")
    add("--solver", default="ode", metavar="NAME", help="known name or file.py:name [default ode]")
    add("--data", type=Path, metavar="PATH",
        help="real examples to be near to, as of pretrain --data [default: the model's own samples of many steps]")  # fmt: skip
    add("--tries", type=whole(1), default=40, metavar="INT", help="grids that are tried [default 40]")
    add("--samples", type=whole(2), default=1000, metavar="INT", help="samples a try [default 1000]")
    add("--seed", type=whole(0, LARGEST), default=0, metavar="INT", help="of the search and its noise [default 0]")
    add("--weights", choices=["final", "best"], default="final", help="of a run [default final]")


def grid(options: argparse.Namespace) -> int:
    """Search, and say by what words `train`, `sample` and `evaluate` take what was found."""
    from ..api.saved_run import SavedRun
    from ..dynamics.samplers import sampler_by_name
    from ..evaluation.grid_search import search_grid
    from ..recipes.base import need_prompts
    from ..report.numbers import side_by_side
    from ..report.progress import waiting
    from ..runs.source import open_source
    from ..support.devices import device_of

    sampler_by_name(options.solver)
    source = open_source(options.source)
    if "weights" in options.given and source.folder is None:
        raise SettingError(f"--weights {options.weights} is of a run; leave it out.")
    run = SavedRun(source)
    need_prompts(run.problem, "train with some, and name the run")
    model = run.policy(options.weights).model
    with waiting("grid"):
        measure = frechet_to(options, run.problem, model)
        found = search_grid(
            model, run.problem.prompts, measure, options.steps, options.solver, tries=options.tries,
            samples=options.samples, seed=options.seed, device=device_of(model),
        )  # fmt: skip
    rows = [*found.named, *([] if found.best in found.named else [found.best])]
    cells = [[t.grid, "" if t.noise_level is None else f"{t.noise_level:g}", f"{t.value:.4g}"] for t in rows]
    whose = options.data or f"the model's own samples ({FINE} steps of heun)"
    print(f"Frechet distance to {whose}, {options.samples} samples of noise that the search did not see:")
    print("\n".join(side_by_side(["grid", "noise level", "distance"], cells)))
    noise = "" if found.best.noise_level is None else f" --noise-level {found.best.noise_level:g}"
    words = f"--steps {options.steps} --solver {options.solver} --grid {found.best.grid}{noise}"
    print(f"\nbest: scoreact sample {options.source} {words}")
    return 0


def frechet_to(options: argparse.Namespace, problem: Problem, model: ScoreModel) -> Measure:
    """The Frechet distance to real examples or to the model's own fine samples, in the problem's features or the samples."""
    import torch

    from ..dynamics.grids import uniform
    from ..dynamics.samplers import SAMPLERS
    from ..evaluation.metrics import feature_statistics, frechet_distance
    from ..rewards.energy import RealStates
    from ..sampling.draw import balanced, draw
    from ..support.devices import device_of

    def features(samples: torch.Tensor) -> torch.Tensor:
        if problem.features is not None:
            return problem.features(samples)
        if samples[0].numel() > MOST:
            raise SettingError(
                f"a sample has {samples[0].numel():,} numbers, too many to be its own features, and {options.source} names "
                "none; call search_grid from Python with a measure of yours."
            )
        return samples.flatten(1).cpu()

    if options.data is not None:
        real = RealStates(options.data, model).data.train.floats()
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(options.seed))[:10_000]
        parts = [features(part) for part in real[order].split(500)]
    else:
        names = balanced(problem.prompts, options.samples, torch.Generator().manual_seed(options.seed))
        ts = uniform(model.schedule, FINE)
        parts = []
        for start in range(0, options.samples, 256):
            noise = derived(options.seed, "fine", start)
            drawn = draw(model, names[start : start + 256], SAMPLERS["heun"], ts, noise, device_of(model))[1]
            parts.append(features(drawn))
    mean, covariance = feature_statistics(torch.cat(parts))

    def measure(samples: torch.Tensor, condition: object) -> float:
        return float(frechet_distance(*feature_statistics(features(samples)), mean, covariance))

    return measure
