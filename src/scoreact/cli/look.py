"""The commands that look at something: sample, evaluate, export, report. They train nothing."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.source import open_source, source_of_run
from ..support.errors import SettingError
from ..support.seeds import LARGEST
from .errors import sentence_of
from .parser import Parser, whole
from .running import write_report

if TYPE_CHECKING:
    from ..control.policy import Policy
    from ..rewards.base import Reward
    from ..runs.samples import Drawn
    from ..runs.source import Source
    from ..types import Condition


# --- looking at runs -------------------------------------------------------------------------------------------------


def report_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)


def report(options: argparse.Namespace) -> int:
    return write_report(source_of_run(options.run))


def sample_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="RUN_DIR|RECIPE", help="a run, a recipe, a pipeline, or my_model.py:build")
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="TEXT|FILE",
        help="prompts, or files as of train --prompts [default: all of the run's]",
    )
    parser.add_argument("--prompt-column", default="", metavar="NAME", help="of those files [default prompt]")
    parser.add_argument("--count", type=whole(1), default=8, metavar="INT", help="samples a prompt [default 8]")
    parser.add_argument("--steps", type=whole(1), metavar="INT", help="steps of a path [default: the run's own]")
    parser.add_argument("--solver", metavar="NAME", help="known name or file.py:name [default: the run's own]")
    parser.add_argument(
        "--grid", metavar="NAME", help="times of the steps, as of train --grid [default: the run's own]"
    )
    parser.add_argument("--noise-level", type=float, metavar="FLOAT", help="eta of a noisy solver [default 1]")
    parser.add_argument("--guidance-scale", type=float, metavar="FLOAT", help="[default: the model's own]")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="of a pipeline [default: the model's own]")
    parser.add_argument(
        "--seed",
        type=whole(0, LARGEST),
        default=0,
        metavar="INT",
        help="sample i of a prompt comes from seed, prompt and i alone [default 0]",
    )
    parser.add_argument(
        "--first", type=whole(0), default=0, metavar="INT", help="i of a prompt's first sample [default 0]"
    )
    parser.add_argument("--no-reward", action="store_true", help="do not ask the reward for the index")
    parser.add_argument("--reference", action="store_true", help="the pretrained model, on the same noise")
    parser.add_argument("--weights", choices=["final", "best"], default="final", help="of the run [default final]")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a new or empty folder [default: a new one in RUN_DIR/samples, or in samples]",
    )
    parser.add_argument(
        "--for-update",
        action="store_true",
        help="hand out samples whose rewards `scoreact update` takes later: drawn as in training, of the present policy",
    )
    steer = parser.add_argument_group("steering, without training; with --reference the pretrained model").add_argument
    steer(
        "--steer",
        choices=["value", "interpolate", "best_of", "smc"],
        help="by the run's value network; between pretrained and tuned; by the reward, at the end or along the path",
    )
    steer("--strength", type=float, metavar="FLOAT", help="of value, and of interpolate [default 1]")
    steer("--particles", type=whole(1), metavar="INT", help="of best_of and smc, a sample [default 8]")
    parser.belongs("prompt_column", "prompts")
    parser.belongs("strength", "steer", "value", "interpolate")
    parser.belongs("particles", "steer", "best_of", "smc")


def sample(options: argparse.Namespace) -> int:
    from ..api.result import guided, noise_of, occurrences
    from ..api.saved_run import SavedRun, steered
    from ..dynamics.samplers import DETERMINISTIC, sampler_by_name
    from ..report.progress import waiting
    from ..runs.samples import Drawn, write_samples
    from ..support.folders import made_folder
    from ..training.config import updated

    if options.solver is not None:
        sampler_by_name(options.solver)
    if options.out is not None and options.out.exists() and any(options.out.iterdir()):
        raise SettingError(f"{options.out} is not empty, and samples never overwrite others; give another --out.")
    source = open_source(options.source)
    if options.for_update:
        return _hand_out(options, source)
    if options.no_reward and options.steer:
        raise SettingError(
            "--no-reward is for samples that are not steered: a steered one comes with its reward; leave it out."
        )
    if "weights" in options.given and (source.folder is None or (options.reference and not options.steer)):
        raise SettingError(
            f"--weights {options.weights} is of a run's tuned model, which draws nothing here; leave it out."
        )
    run = SavedRun(source)
    if options.grid is not None:
        run.config = updated(run.config, {"grid": options.grid})
    policy, weights = run.policy(options.weights), run.which(options.weights)
    named = named_prompts(options, run.problem.model)
    names = run.names(named, options.count)
    run.problem.model.condition(names[:: options.count])  # an unknown prompt is said before a folder is made
    solver, steps = options.solver or source.config.solver, options.steps or source.config.steps
    noise_of(solver, options.noise_level)
    kind, steering = "pretrained" if options.reference else weights, None
    if options.steer:
        steering = run.steering(
            options.steer, strength=options.strength, particles=options.particles, reference=options.reference,
            solver=solver, noise_scale=options.noise_level, weights=options.weights,
        )  # fmt: skip
        _say_unknown(steering.value, run.problem.model.condition(names))
        size = f"{steering.strength:g}" if options.steer in ("value", "interpolate") else f"{steering.particles}"
        kind += f"-{options.steer}-{size}"
    name = f"{kind}-{solver.rpartition(':')[2]}-{steps}-seed{options.seed}"
    parent = source.folder / "samples" if source.folder else Path("samples")
    columns = options.count if len(names) > options.count else max(1, round(options.count**0.5))
    about = {
        "source": options.source, "weights": kind, "solver": solver, "steps": steps, "grid": run.config.grid,
        "seed": options.seed,
        "noise_level": None if solver in DETERMINISTIC else 1.0 if options.noise_level is None else options.noise_level,
        "guidance_scale": getattr(policy.model, "guidance_scale", None) if options.guidance_scale is None
        else options.guidance_scale,
        "negative_prompt": getattr(policy.model, "negative_prompt", None) if options.negative_prompt is None
        else options.negative_prompt,
    }  # fmt: skip
    with waiting("sampling"), contextlib.ExitStack() as made:
        folder = options.out or made.enter_context(made_folder(parent, lambda n: name + (f"-{n}" if n > 1 else "")))
        if steering is not None:
            with guided(policy, options.guidance_scale, options.negative_prompt):
                found = steered(steering, names, run.times(policy, steps), options.seed, options.first)
            numbers = [options.first + i for i in occurrences(names)]
            files = write_samples([Drawn(found.samples.cpu(), names, numbers, found.rewards)], folder, columns, about)
        else:
            parts = run.drawn(
                policy, named, options.count, steps, solver, options.seed, options.reference, options.noise_level,
                options.guidance_scale, options.negative_prompt, options.first,
            )  # fmt: skip
            files = write_samples(
                parts if options.no_reward else _scored(parts, policy, run.problem.reward), folder, columns, about
            )
    if steering is not None:
        _say_steered(options.steer, found, steering.value is not None)
    print(f"{len(names)} samples in {folder}: {files[0].name}, {files[-1].name}" + (
        f" and {len(files) - 2} single files" if len(files) > 3 else ""
    ))  # fmt: skip
    return 0


HANDED_OUT = ("source", "for_update", "prompts", "prompt_column", "count", "out")  # options that are used there


def _hand_out(options: argparse.Namespace, source: Source) -> int:
    """Samples that the run can learn from later, in a folder with an index of their ids."""
    from ..api.saved_run import SavedRun
    from ..report.progress import waiting
    from ..runs.samples import Drawn, write_samples
    from ..support.folders import made_folder

    if idle := [name for name in options.given if name not in HANDED_OUT]:
        raise SettingError(
            f"--{idle[0].replace('_', '-')} does nothing with --for-update, which draws as in training; leave it out."
        )
    run = SavedRun(source)
    run.which()
    named = named_prompts(options, run.problem.model)
    with waiting("sampling"), contextlib.ExitStack() as made:
        folder = options.out or made.enter_context(
            made_folder(run.folder / "samples", lambda n: "for-update" + (f"-{n}" if n > 1 else ""))
        )
        found = run.hand_out(named, options.count)
        about = {
            "source": options.source,
            "solver": run.config.solver,
            "steps": run.config.steps,
            "grid": run.config.grid,
        }
        columns = options.count if len(found) > options.count else max(1, round(options.count**0.5))
        files = write_samples([Drawn(found.samples, found.prompts, ids=found.ids)], folder, columns, about)
    print(f"{len(found)} samples in {folder}, ids {found.ids[0]} to {found.ids[-1]}: {files[0].name}, {files[-1].name}")
    print(f"their rewards: `scoreact update {options.source} --rewards FILE`, a .csv with the columns id and reward")
    return 0


def named_prompts(options: argparse.Namespace, model: object) -> list[str] | None:
    """Those of --prompts and --prompt-column, their metadata given to the model; None where there are none."""
    from ..recipes.prompts import TABLES, check_spelling, give_metadata, read_prompts

    if options.prompts is None:
        return None
    column = options.prompt_column
    tables = [Path(text).suffix.lower() in TABLES for text in options.prompts]
    if column and not any(tables):
        raise SettingError(f"--prompt-column {column} is of a table, and --prompts names none; leave it out.")
    for text in options.prompts:
        check_spelling(text)
    read = [read_prompts(text, column if table else "") for text, table in zip(options.prompts, tables, strict=True)]
    for prompts in read:
        give_metadata(model, prompts)
        for note in prompts.notes:
            print(f"note: {note}", file=sys.stderr)
    return [prompt for prompts in read for prompt in prompts]


def _scored(parts: Iterator[Drawn], policy: Policy, asked: Reward) -> Iterator[Drawn]:
    """The same with their rewards; without, and with a word, where there is no reward or it fails."""
    import torch

    from ..rewards.base import NO_REWARD, OUTSIDE
    from ..rewards.check import checked
    from ..support.devices import device_of

    reward = None if asked in (NO_REWARD, OUTSIDE) else checked(asked)
    for part in parts:
        if reward is not None:
            try:
                with torch.no_grad():
                    rewards = reward(part.samples.to(device_of(policy.model)), policy.condition(part.prompts))
                part = dataclasses.replace(part, rewards=rewards.cpu())
            except (ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
                print(
                    f"note: the index is without rewards, for the reward failed: {sentence_of(error)}", file=sys.stderr
                )
                reward = None
        yield part


def _say_unknown(value: Any, condition: Condition) -> None:
    """Prompts that a value network was not trained with, and what it takes them for."""
    from ..models.value_networks import Encoder

    network = getattr(value, "network", None)
    if isinstance(network, Encoder) and (new := network.unknown(condition)):
        more = f" and {len(new) - 1} more prompts" if len(new) > 1 else ""
        print(
            f"note: the value network was not trained with {new[0]!r}{more}, and takes them for the average of the "
            f"{network.classes} that it knows; --steer best_of asks the reward instead.",
            file=sys.stderr,
        )


def _say_steered(method: str, found: Any, by_value: bool) -> None:
    """What steering gave and what it cost."""
    from ..report.numbers import rounded

    rewards, calls = found.rewards, found.calls
    error = float(rewards.std()) / len(rewards) ** 0.5 if len(rewards) > 1 else None
    print(f"reward     {rounded(float(rewards.mean()), error)}")
    print(f"cost       {calls.network:,} network calls, {calls.value:,} value calls, {calls.reward:,} reward calls")
    if method == "smc":
        steered_by = "the value network" if by_value else "the reward of the estimated sample"
        print(f"particles  {100 * found.effective:.0f} % of them effective where fewest, steered by {steered_by}")


def evaluate_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument("--samples", type=whole(2), metavar="INT", help="samples a row [default heldout_samples]")
    parser.add_argument("--steps", type=whole(1), nargs="+", metavar="INT", help="[default 5 10 20 50]")
    parser.add_argument(
        "--solver",
        nargs="+",
        metavar="NAME",
        help="[default ddim ode dpm_solver_pp_2m]",
    )
    parser.add_argument("--grid", metavar="NAME", help="of these rows, as of train --grid [default: the run's own]")
    parser.add_argument(
        "--survey",
        action="store_true",
        help="instead: how much of the gain survives other guidance, steps and solvers; the report then shows it",
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="what the pretrained model learned from, as of pretrain: says also whether samples are copies of it",
    )
    parser.add_argument(
        "--data-class",
        metavar="NAME",
        help="of that: the class that the run was tuned to; tuned samples are compared with examples of it alone",
    )
    parser.add_argument("--seed", type=whole(0, LARGEST), default=1, metavar="INT", help="of the noise [default 1]")
    parser.add_argument("--weights", choices=["final", "best"], default="final", help="of the run [default final]")
    parser.belongs("data_class", "data")


def evaluate(options: argparse.Namespace) -> int:
    from ..api.saved_run import SavedRun
    from ..dynamics.samplers import sampler_by_name
    from ..report.numbers import copies_cells, rounded, side_by_side, survey_cells
    from ..report.progress import waiting

    if options.survey and (options.solver or options.steps or options.grid or options.data):
        raise SettingError(
            "--survey has solvers, steps and a grid of its own, and looks at no data; leave out --solver, --steps, --grid and "
            "--data, or --survey."
        )
    solvers, steps = options.solver or ["ddim", "ode", "dpm_solver_pp_2m"], options.steps or [5, 10, 20, 50]
    for name in solvers:
        sampler_by_name(name)
    run = SavedRun(source_of_run(options.run))
    run.policy(options.weights)
    if options.survey:
        with waiting("survey"):
            found = run.survey(options.samples, options.seed, options.weights)
        print(f"{found['weights']} weights, {found['samples']} samples a row, same prompts and noise in all:\n")
        print("\n".join(side_by_side(*survey_cells(found["rows"]))))
        print(f"\n{options.run / 'survey.json'}; `scoreact report {options.run}` shows it")
        return 0
    with waiting("evaluation"):
        found = run.evaluate(
            options.samples,
            solvers,
            steps,
            options.seed,
            options.weights,
            options.grid,
            options.data,
            options.data_class,
        )
    c, heldout = run.config, found["heldout"]
    print(f"{found['weights']} weights, {found['samples']} samples, as trained ({c.solver}, {c.steps} steps):")
    for name, value in heldout.items():
        if not name.endswith("_se"):
            print(f"  {name:<26} {rounded(value, heldout.get(f'{name}_se'))}")
    cells = [
        [f"{row['solver']}", f"{row['steps']}"]
        + [rounded(float(row[f"{who}reward"]), float(row[f"{who}reward_se"])) for who in ("reference_", "")]
        for row in found["transfer"]
    ]
    print(f"\nmean reward with other solvers and steps on the grid {found['grid']}, same noise for both:")
    print("\n".join(side_by_side(["solver", "steps", "pretrained", "tuned"], cells)))
    if "memorisation" in found:
        print("\ndistance to the nearest training example, medians, and that of held-out examples:")
        print("\n".join(side_by_side(*copies_cells(found["memorisation"]))))
        print(
            "new samples of the data's law have 0.5, 0.5 and 1 %; copies have more, smooth ones in the first and third alone"
        )
    print(f"\n{options.run / 'evaluation.json'}")
    return 0


# --- leaving ---------------------------------------------------------------------------------------------------------


def export_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="diffusers, kohya, peft or pipeline (merged); weights of other models [default: what fits first]",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new or empty folder [default RUN_DIR/export-FORMAT]")
    parser.add_argument("--weights", choices=["final", "best"], default="final", help="of the run [default final]")


def export(options: argparse.Namespace) -> int:
    from ..api.saved_run import SavedRun
    from ..report.progress import waiting

    with waiting("export"):
        folder = SavedRun(source_of_run(options.run)).export(options.format, options.out, options.weights)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}; {size / 1e6:,.1f} MB")
    print(f"{folder / 'README.md'} says how to load it")
    return 0


# --- checks ----------------------------------------------------------------------------------------------------------
