"""The commands `bench` and `tune`: words in, the arena's tables out. Everything else is in `arena` and `tuning`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.errors import SettingError
from .parser import Parser, assignments, positive, whole

if TYPE_CHECKING:
    from ..arena.problems import ArenaProblem


def bench_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--rules", nargs="+", metavar="RULE", help="update rules [all of them]")
    add(
        "--problems",
        nargs="+",
        metavar="NAME",
        help="problems [gaussian-2d]; or a pipeline's folder, or my_model.py:build",
    )
    add("--seeds", type=whole(1), default=5, metavar="INT", help="runs of each, seeds 0, 1, ... [5]")
    add(
        "--out",
        type=Path,
        default=Path("arena"),
        metavar="DIR",
        help="results; runs that it holds are not repeated [arena]",
    )
    add("--jobs", type=whole(1), default=1, metavar="INT", help="processes, one thread each [1]")
    add("--kl-weights", nargs="+", type=positive, default=[], metavar="BETA",
        help="prices of KL, several for the frontier [the problem's own]")  # fmt: skip
    add("--tuned", type=Path, metavar="DIR", help="use the settings that `scoreact tune` left there")
    add("--points", type=whole(1), default=8, metavar="INT", help="held-out evaluations of a run [8]")
    add("--transfer-samples", type=whole(0), default=200, metavar="INT", help="samples a solver and step count [200]")
    add("--retry", action="store_true", help="repeat runs that failed")
    add("--table", action="store_true", help="run nothing; write tables and plots of DIR anew")
    _shared(parser)


def tune_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--rule", nargs="+", required=True, metavar="RULE", help="update rules, one search each")
    add(
        "--problem",
        nargs="+",
        required=True,
        metavar="NAME",
        help="problems, one search each; or a pipeline's folder, or my_model.py:build",
    )
    add("--trials", type=whole(1), metavar="INT", help="settings to try, the defaults first [20]")
    add("--grid", action="append", default=[], metavar="NAME=V,V",
        help="try these values of a setting, and with others every combination, instead of searching")  # fmt: skip
    add("--seeds", type=whole(1), default=2, metavar="INT", help="runs of each, on seeds that bench never uses [2]")
    add("--kl-weight", type=positive, metavar="BETA", help="price of KL [the problem's own]")
    add("--out", type=Path, default=Path("tuned"), metavar="DIR", help="RULE.PROBLEM.json goes there [tuned]")
    add(
        "--start",
        type=Path,
        metavar="DIR",
        help="try what an earlier search left there of the rule, on any problem, first",
    )
    add("--jobs", type=whole(1), default=1, metavar="INT", help="processes, one thread each [1]")
    _shared(parser)


def _shared(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--network-calls",
        type=whole(1),
        metavar="INT",
        help="budget of a run: policy, reference and value [the problem's]",
    )
    add("--reward-calls", type=whole(1), metavar="INT", help="budget of a run [the problem's]")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of all runs, or RULE.NAME of one rule's",
    )
    add = parser.add_argument_group("of a problem of your own").add_argument
    add("--reward", metavar="SPEC", help="my.py:function, module:function, or a known name")
    add("--reward-option", action="append", default=[], metavar="NAME=VALUE", help="an option of that reward")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the pipeline or of build")
    add("--prompts", metavar="FILE", help="of a pipeline: a file of prompts, or one prompt")
    add("--reference-samples", type=whole(2), default=None, metavar="INT",
        help="of the pretrained model, for J_ref and J* [960]")  # fmt: skip


def _problems(options: argparse.Namespace, names: Sequence[str]) -> list[ArenaProblem]:
    """The arena's own by name; anything else as `scoreact train` takes it, with what the command line says of it."""
    from ..arena.problems import PROBLEMS, known_problem, own_problem

    given = {
        "--reward": options.reward, "--reward-option": options.reward_option, "--option": options.option,
        "--prompts": options.prompts, "--reference-samples": options.reference_samples,
    }  # fmt: skip
    own = [name for name in names if name not in PROBLEMS and (Path(name).is_dir() or ":" in name)]
    if not own and (unused := [flag for flag, value in given.items() if value]):
        raise SettingError(
            f"{unused[0]} says something of a problem of your own, and {', '.join(names)} are the arena's; leave it out, or "
            "name a pipeline's folder or my_model.py:build."
        )
    build = assignments(options.option, "--option")
    if options.prompts is not None:
        build["prompts"] = options.prompts
    more = {} if options.reference_samples is None else {"reference_samples": options.reference_samples}
    return [
        own_problem(name, options.reward, build, assignments(options.reward_option, "--reward-option"), **more)
        if name in own
        else known_problem(name)
        for name in names
    ]


def bench(options: argparse.Namespace) -> int:
    from ..algorithms.registry import rules
    from ..arena import bench as arena
    from ..arena.problems import skips
    from ..arena.tables import report
    from ..support.files import read_lines

    if options.table:
        print(report(options.out))
        return 0
    names, problems = options.rules or list(rules()), _problems(options, options.problems or ["gaussian-2d"])
    for problem in problems:
        for rule in names:
            if reason := skips(rule, problem):
                print(f"skipped: {reason}", flush=True)
            elif options.tuned is not None:
                _say_searched(options, rule, problem)
    try:
        lines = arena.bench(
            names, problems, options.seeds, options.network_calls, options.reward_calls, options.out, options.jobs,
            kl_weights=options.kl_weights, tuned=options.tuned, settings=assignments(options.set, "--set"),
            points=options.points, transfer_samples=options.transfer_samples, retry=options.retry, on_line=_say_run,
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = len(read_lines(options.out / "results.jsonl"))
        raise KeyboardInterrupt(f"{kept} runs are kept in {options.out}; the same command continues.") from None
    print("\n" + (options.out / "table.md").read_text(encoding="utf-8"))
    print(f"results    {options.out / 'results.jsonl'}\nplots      {options.out / 'plots'}")
    print(f"again      scoreact bench --out {shlex.quote(str(options.out))} --table")
    return 0 if any("failed" not in line for line in lines) else 1


def _say_searched(options: argparse.Namespace, rule: str, problem: ArenaProblem) -> None:
    """Whether the tuned settings were searched for something else."""
    from ..arena.tuning import searched_otherwise

    for kl_weight in options.kl_weights or [problem.config({}).kl_weight]:
        asked = {
            "network_calls": options.network_calls or problem.network_calls,
            "reward_calls": options.reward_calls or problem.reward_calls, "kl_weight": kl_weight,
        }  # fmt: skip
        if said := searched_otherwise(options.tuned, rule, problem.name, asked):
            print(f"note: {said}", flush=True)


def _say_run(line: dict[str, Any], finished: int, wanted: int) -> None:
    where = f"{line['rule']} on {line['problem']}, kl_weight {line['kl_weight']:g}, seed {line['seed']}"
    if "failed" in line:
        print(f"{finished}/{wanted} {where}: FAILED, {line['failed']}", flush=True)
        return
    stopped = f"; {line['stopped']}" if line["stopped"] else ""
    print(
        f"{finished}/{wanted} {where}: recovered {100 * line['recovered']:.1f} %, {line['iterations']} iterations, "
        f"{line['network_calls']:,} network and {line['reward_calls']:,} reward calls, {line['seconds']:.0f} s{stopped}",
        flush=True,
    )


def tune(options: argparse.Namespace) -> int:
    from ..arena import tuning
    from ..arena.problems import skips

    grid = _grid(options.grid)
    for problem in _problems(options, options.problem):
        for rule in options.rule:
            if reason := skips(rule, problem):
                print(f"skipped: {reason}", flush=True)
                continue
            print(f"{rule} on {problem.name}", flush=True)
            try:
                found = tuning.tune(
                    rule, problem, options.trials, options.seeds, options.network_calls, options.reward_calls, options.out,
                    options.jobs, settings=assignments(options.set, "--set"), start=options.start, grid=grid,
                    kl_weight=options.kl_weight, on_trial=_say_trial,
                )  # fmt: skip
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"finished trials are kept in {options.out}; the same command continues."
                ) from None
            defaults = (found["defaults"] or {}).get("J")
            gain = "" if defaults is None else f", the defaults {defaults:.4g}"
            print(f"  best J {found['J']:.4g}{gain}: {_words(found['settings'])}")
            print(f"  {options.out / tuning.tuned_name(rule, problem.name)}")
    return 0


def _grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """`name=value,value` words: setting -> values."""
    texts = assignments(words, "--grid", [word.partition("=")[0] for word in words])
    return {
        name: [assignments([f"{name}={value.strip()}"], "--grid")[name] for value in text.split(",")]
        for name, text in texts.items()
    }


def _say_trial(line: dict[str, Any], number: int, trials: int) -> None:
    outcome = f"FAILED, {line['failed'][0]}" if line["J"] is None else f"J {line['J']:.4g}"
    print(f"  {number}/{trials} {outcome}: {_words(line['settings'])}", flush=True)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
