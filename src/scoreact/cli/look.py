"""The commands that look at something: sample, evaluate, report, check. They train nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.source import Source, find_recipe, load_policy, open_run, open_source, recipe_options
from ..support.names import known_name
from .parser import Parser, assignments, whole
from .screen import rounded, table, waiting, write_samples

if TYPE_CHECKING:
    from torch import Tensor

    from ..control.policy import Policy
    from ..recipes.base import Problem


# --- looking at runs -------------------------------------------------------------------------------------------------


def write_report(source: Source) -> int:
    from ..report import html as report

    assert source.folder is not None
    with waiting("report"):
        path = report.write(source.folder, source.build())
    print(f"report     {path}")
    return 0


def report_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)


def report(options: argparse.Namespace) -> int:
    return write_report(open_run(options.run))


def sample_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="RUN_DIR|RECIPE")
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="[default: all of the run's]")
    parser.add_argument("--count", type=whole(1), default=8, metavar="INT", help="samples a prompt [default 8]")
    parser.add_argument("--steps", type=whole(1), default=20, metavar="INT", help="steps of a path [default 20]")
    parser.add_argument("--solver", default="ddim", metavar="NAME", help="known name or file.py:name [default ddim]")
    parser.add_argument(
        "--noise-level", type=float, default=1.0, metavar="FLOAT", help="eta of a noisy solver [default 1]"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="INT", help="same seed, same noise [default 0]")
    parser.add_argument("--reference", action="store_true", help="the pretrained model, on the same noise")
    parser.add_argument("--weights", choices=["final", "best"], default="final", help="of the run [default final]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="[default RUN_DIR/samples, or samples]")
    steer = parser.add_argument_group("steering, without training; with --reference the pretrained model").add_argument
    steer(
        "--steer",
        choices=["value", "interpolate", "best_of", "smc"],
        help="by the run's value network; between pretrained and tuned; by the reward, at the end or along the path",
    )
    steer("--strength", type=float, default=1.0, metavar="FLOAT", help="of value, and of interpolate [default 1]")
    steer("--particles", type=whole(1), default=8, metavar="INT", help="of best_of and smc, a sample [default 8]")


def sample(options: argparse.Namespace) -> int:
    import torch

    from ..dynamics.grids import GRIDS
    from ..dynamics.samplers import sampler_by_name
    from ..dynamics.sde import noise_level
    from ..sampling.draw import draw
    from ..support.devices import device_of

    sampler = sampler_by_name(options.solver)
    source = open_source(options.source)
    policy, problem, weights = load_policy(source, options.weights)
    model = policy.reference if options.reference else policy
    prompts = [p for p in options.prompts or problem.prompts for _ in range(options.count)]
    model.condition(prompts[:: options.count])  # an unknown prompt is said before any work
    grid = "uniform" if source.config.grid == "random" else source.config.grid
    ts = GRIDS[grid](model.schedule, options.steps, None)
    device = device_of(policy.model)
    noise, parts = noise_level(options.noise_level), []
    kind = "pretrained" if options.reference else weights
    if options.steer:
        with waiting("sampling"):
            decoded = _steered(options, source, policy, problem, weights, prompts, ts)
        kind += f"-{options.steer}-" + (
            f"{options.strength:g}" if options.steer in ("value", "interpolate") else f"{options.particles}"
        )
    else:
        with waiting("sampling"):
            for start in range(0, len(prompts), 256):
                some = prompts[start : start + 256]
                parts.append(draw(model, some, sampler, ts, options.seed + start, device, noise)[1].cpu())
        decoded = torch.cat(parts)
    name = f"{kind}-{options.solver.rpartition(':')[2]}-{options.steps}-seed{options.seed}"
    columns = options.count if len(prompts) > options.count else max(1, round(options.count**0.5))
    folder = options.out or (source.folder / "samples" if source.folder else Path("samples"))
    for path in write_samples(decoded, prompts, columns, folder, name):
        print(path)
    return 0


def _steered(
    options: argparse.Namespace,
    source: Source,
    policy: Policy,
    problem: Problem,
    weights: str,
    prompts: list[str],
    ts: Tensor,
) -> Tensor:
    """Decoded samples of a way of steering; says what it gave and what it cost."""
    import torch

    from ..dynamics.sde import NOISES, SDE, noise_level
    from ..rewards.check import checked
    from ..runs.source import load_value
    from ..sampling.steering import Steering
    from ..support.devices import device_of

    config, method = source.config, options.steer
    if method == "interpolate" and options.reference:
        raise ValueError("interpolate is the pretrained model at --strength 0; leave out --reference.")
    if method in ("value", "interpolate") and source.folder is None:
        raise ValueError(f"--steer {method} needs a run, not a recipe; train one, or use best_of or smc.")
    reward = checked(problem.reward)
    value, kl_weight, until = None, config.kl_weight, config.act_until
    path = (
        None if source.folder is None else source.folder / ("best" if weights == "best" else "") / "value.safetensors"
    )
    if path is not None and (method == "value" or (method == "smc" and path.is_file())):
        value, kl_weight = load_value(path, problem.value_network, config, policy, reward)
    steering = Steering(
        method, policy, reward, SDE(policy.schedule, noise_level(options.noise_level)), options.solver, kl_weight,
        options.strength, options.particles, "reference" if options.reference else "policy", value,
        SDE(policy.schedule, NOISES[config.noise](config.noise_scale)), until,
    )  # fmt: skip
    device = device_of(policy.model)
    size = max(1, 256 // (options.particles if method in ("best_of", "smc") else 1))
    found = [
        steering(prompts[start : start + size], ts, torch.Generator(device).manual_seed(options.seed + start))
        for start in range(0, len(prompts), size)
    ]
    rewards = torch.cat([part.rewards for part in found])
    calls = [sum(getattr(part.calls, kind) for part in found) for kind in ("network", "value", "reward")]
    error = float(rewards.std()) / len(rewards) ** 0.5 if len(rewards) > 1 else None
    print(f"reward     {rounded(float(rewards.mean()), error)}")
    print("cost       {:,} network calls, {:,} value calls, {:,} reward calls".format(*calls))
    if method == "smc":
        least = sum(part.effective * len(part.rewards) for part in found) / len(rewards)
        print(f"particles  {100 * least:.0f} % of them effective where fewest, steered by "
              f"{'the value network' if value is not None else 'the reward of the estimated sample'}")  # fmt: skip
    return torch.cat([part.samples for part in found]).cpu()


def evaluate_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path)
    parser.add_argument("--samples", type=whole(2), metavar="INT", help="samples a row [default heldout_samples]")
    parser.add_argument(
        "--steps", type=whole(1), nargs="+", default=[5, 10, 20, 50], metavar="INT", help="[default 5 10 20 50]"
    )
    parser.add_argument(
        "--solver",
        nargs="+",
        default=["ddim", "ode", "dpm_solver_pp_2m"],
        metavar="NAME",
        help="[default ddim ode dpm_solver_pp_2m]",
    )
    parser.add_argument("--seed", type=whole(0), default=1, metavar="INT", help="of the noise [default 1]")
    parser.add_argument("--weights", choices=["final", "best"], default="final", help="of the run [default final]")


def evaluate(options: argparse.Namespace) -> int:
    from ..dynamics.grids import GRIDS
    from ..dynamics.samplers import SAMPLERS, sampler_by_name
    from ..dynamics.sde import NOISES, SDE
    from ..dynamics.solvers import SOLVERS
    from ..evaluation.evaluate import evaluate, transfer_table
    from ..evaluation.optimum import recovered
    from ..rewards.check import checked
    from ..support.devices import device_of
    from ..support.files import read_lines, write_json

    for name in options.solver:
        SAMPLERS.setdefault(name, sampler_by_name(name))  # a user's solver is known by its address from here on
    source = open_run(options.run)
    config = source.config
    policy, problem, weights = load_policy(source, options.weights)
    reward, device = checked(problem.reward), device_of(policy.model)
    samples = options.samples or config.heldout_samples
    noise = NOISES[config.noise](config.noise_scale)
    schedule = policy.model.schedule
    grid = "uniform" if config.grid == "random" else config.grid
    with waiting("evaluation"):
        heldout = evaluate(
            policy, SDE(schedule, noise), SOLVERS[config.solver],
            GRIDS[grid](schedule, config.steps, None), reward, problem.prompts, config.kl_weight,
            samples, options.seed, problem.judge, problem.features, device,
        )  # fmt: skip
        rows = [(solver, steps) for solver in options.solver for steps in options.steps]
        transfer = transfer_table(policy, reward, problem.prompts, samples, options.seed, grid, rows, device, noise)
    for line in read_lines(options.run / "metrics.jsonl"):
        if line.get("reference"):
            heldout["objective/recovered"] = recovered(heldout["objective/J"], line)
    write_json(
        options.run / "evaluation.json",
        {"weights": weights, "samples": samples, "seed": options.seed, "heldout": heldout, "transfer": transfer},
    )
    print(f"{weights} weights, {samples} samples, as trained ({config.solver}, {config.steps} steps):")
    for name, value in heldout.items():
        if not name.endswith("_se"):
            print(f"  {name:<26} {rounded(value, heldout.get(f'{name}_se'))}")
    cells = [
        [f"{row['solver']}", f"{row['steps']}"]
        + [rounded(float(row[f"{who}reward"]), float(row[f"{who}reward_se"])) for who in ("reference_", "")]
        for row in transfer
    ]
    print("\nmean reward with other solvers and steps, same noise for both:")
    print("\n".join(table(["solver", "steps", "pretrained", "tuned"], cells)))
    print(f"\n{options.run / 'evaluation.json'}")
    return 0


# --- checks ----------------------------------------------------------------------------------------------------------


def check_arguments(parser: Parser) -> None:
    parser.add_argument("what", metavar="{reward,recipe,run}")
    parser.add_argument("name", metavar="SPEC|RECIPE|RUN_DIR")
    parser.add_argument(
        "--recipe", default="gaussian", metavar="RECIPE", help="whose samples a reward gets [default gaussian]"
    )
    parser.add_argument("--samples", type=whole(1), default=16, metavar="INT", help="how many [default 16]")
    parser.add_argument("--gradient", action="store_true", help="the reward's gradient is needed")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the reward or recipe")


def check(options: argparse.Namespace) -> int:
    """Print findings; 1 if any is a problem."""
    known_name(options.what, CHECKS, "unknown kind of check")
    lines = CHECKS[options.what](options)
    print("\n".join(lines))
    return int(any(line.startswith("problem") for line in lines))


def check_reward(options: argparse.Namespace) -> list[str]:
    from ..rewards.check import explain

    recipe = find_recipe(options.recipe)
    problem = Source(recipe, dict(recipe.options), recipe.config).build()
    decoded, condition = _few_samples(problem, options.samples)
    what = f"note: tried on {len(decoded)} samples of shape {tuple(decoded.shape[1:])} of recipe {recipe.name}."
    given = assignments(options.option, "--option")
    return [what, *explain(options.name, decoded, condition, options.gradient, **given)]


def check_recipe(options: argparse.Namespace) -> list[str]:
    from ..rewards.check import explain

    recipe = find_recipe(options.name)
    problem = Source(recipe, recipe_options(recipe, assignments(options.option, "--option")), recipe.config).build()
    decoded, condition = _few_samples(problem, options.samples)
    lines = explain(problem.reward, decoded, condition, options.gradient)
    if not bool(decoded.isfinite().all()):
        lines.append("problem: the model's samples are not all finite.")
    if problem.judge is not None:
        lines += [f"note: {name} {rounded(value)}" for name, value in problem.judge(decoded, condition).items()]
    return lines


def check_run(options: argparse.Namespace) -> list[str]:
    """Whether a run can be read, continued and sampled from."""
    from ..runs.checkpoint import load_checkpoint

    folder = Path(options.name)
    source = open_run(folder)
    lines = []
    try:
        iteration, _ = load_checkpoint(folder / "checkpoints")
        lines.append(f"fine: the checkpoint of iteration {iteration} of {source.config.iterations} can be read.")
    except ValueError as error:
        lines.append(f"problem: {error}")
    try:
        lines.append(f"fine: the {load_policy(source, 'final')[2]} weights fit recipe {source.recipe.name}.")
    except ValueError as error:
        lines.append(f"problem: {error}")
    return lines


CHECKS = {"reward": check_reward, "recipe": check_recipe, "run": check_run}


def _few_samples(problem: Problem, count: int) -> tuple[Any, Any]:
    from torch import nn

    from ..dynamics.grids import uniform
    from ..dynamics.samplers import sampler_by_name
    from ..sampling.draw import draw

    model = problem.model
    assert isinstance(model, nn.Module)
    prompts = [problem.prompts[i % len(problem.prompts)] for i in range(count)]
    ts = uniform(model.schedule, 10)
    return draw(model.eval(), prompts, sampler_by_name("ddim"), ts, 0)[1].detach(), model.condition(prompts)
