"""The search for a rule's settings before a comparison (Optuna's TPE, or a grid), and the files that it leaves for `bench`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..algorithms.registry import find_rule
from ..support.errors import SettingError
from ..support.files import Line, append_line, finite, resume_lines, write_json
from ..support.workers import Workers
from ..training.config import Config
from .budget import check_budget, counts, split_settings
from .problems import HELDOUT, TUNING_SEEDS, ArenaProblem, Job, check_used, known_problem, skips
from .referee import yardsticks
from .run import run_one


def search_space(rule: str, config: Config) -> dict[str, Any]:
    """What is searched for a rule: name -> (low, high, "log" or "linear") or a list of choices.

    The same few settings of the run for every rule, and the rule's own `search`: those that its choices use.
    """
    kind, whole = find_rule(rule), config.minibatch_size
    space: dict[str, Any] = {
        "average": [0.0, 0.5, 0.7, 0.9, 0.95],
        "warmup": sorted({0, 1, config.warmup}),
        "learning_rate": (config.learning_rate / 10, config.learning_rate * 10, "log"),
        "epochs": [1, 2, 4],
        # small ones: more optimiser steps for the same network calls
        "minibatch_size": sorted({whole, max(2, whole // 4), max(2, whole // 16)}, reverse=True),
        "max_kl": (0.05, 2.0, "log"),
        "value_learning_rate": (config.value_learning_rate / 2, config.value_learning_rate * 5, "log"),
    }
    # less than the defaults: at a fixed budget that buys iterations. name -> the least, and the parts of the default
    cheaper: dict[str, tuple[int, tuple[int, ...]]] = {
        "batch_size": (8, (1, 4, 8, 16, 32)), "kl_states": (32, (1, 8)), "reference_batches": (1, (1, 2, 4)),
        "value_batch_size": (2, (1, 2, 4, 8)), "value_steps": (2, (1, 2, 4)), "value_first_steps": (2, (1, 2, 4)),
    }  # fmt: skip
    if not kind.fits_value:
        del cheaper["reference_batches"]  # not counted: they only measure
    for name, (least, parts) in cheaper.items():
        whole = getattr(config, name)
        space[name] = sorted({max(min(least, whole), whole // part) for part in parts}, reverse=True)
    for name in {"reference_batches", "value_steps"} & set(cheaper):  # more of them where a batch is small
        space[name] = [2 * getattr(config, name), *space[name]]
    idle = {f.name for f, _ in config.unused()}
    space = {name: choices for name, choices in {**space, **kind.search}.items() if name not in idle}
    current = {**config.to_dict(), **config.rule}
    for name, choices in space.items():
        if name not in current:
            raise SettingError(f"{rule} searches {name!r}, which is no setting of it; known: {', '.join(config.rule)}.")
        if isinstance(choices, list) and current[name] not in choices:
            space[name] = [current[name], *choices]
    return space


def tune(
    rule: str,
    problem: str | ArenaProblem,
    trials: int | None = None,
    seeds: int = 2,
    network_calls: int | None = None,
    reward_calls: int | None = None,
    out: str | Path = "tuned",
    jobs: int = 1,
    *,
    settings: Mapping[str, Any] | None = None,
    start: str | Path | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    kl_weight: float | None = None,
    on_trial: Callable[[Line, int, int], None] | None = None,
) -> Line:
    """Search a rule's settings for the highest mean held-out J at the budget; write OUT/RULE.PROBLEM.json.

    The first of `trials` (20) is the defaults, then come those that `start`, a folder like `out`, holds of the rule on
    whatever problem, the others are Optuna's TPE. With `grid`, setting -> values, every combination of its values is
    tried instead, and nothing else: for models where a trial takes minutes. kl_weight: the problem's own where None.
    Seeds and held-out noise are none of `bench`'s. A killed search continues: trials in
    OUT/RULE.PROBLEM.trials.jsonl are not run again. Returns what the file says.
    Raises SettingError for names, numbers and combinations that cannot be used.
    """
    try:
        import optuna
    except ImportError:
        raise ImportError("optuna is needed for tune; `pip install 'scoreact[tune]'`.") from None
    find_rule(rule)
    where = known_problem(problem)
    if grid and (trials is not None or start is not None):
        raise SettingError("a grid says itself what is tried; leave out trials and start, or leave out the grid.")
    for name, number in (("trials", 20 if trials is None else trials), ("seeds", seeds)):
        if number < 1:
            raise SettingError(f"{name} is {number}; it must be at least 1.")
    if reason := skips(rule, where):
        raise SettingError(reason)
    common, of_rule = split_settings(settings or {}, [rule])
    common = {**common, **of_rule.get(rule, {})}
    price = where.config(common).kl_weight if kl_weight is None else kl_weight
    base = Job(
        rule, where, TUNING_SEEDS, price, network_calls or where.network_calls,
        reward_calls or where.reward_calls, common, transfer_samples=0, points=1, heldout_seed=HELDOUT["tune"],
    )  # fmt: skip
    check_used([base], {}, {rule: common})
    check_budget(base)
    earlier = found_before(start, rule)
    config = base.config()
    first = _combinations(grid, base) if grid else [{}, *earlier]
    space = (
        {name: list(dict.fromkeys(given[name] for given in first)) for name in grid}
        if grid
        else search_space(rule, config)
    )
    count = len(first) if grid else 20 if trials is None else trials
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / tuned_name(rule, where.name)).with_suffix(".trials.jsonl")
    budget = counts((base.network_calls, base.reward_calls))
    asked = {"budget": budget, "seeds": seeds, "common": common}
    if kl_weight is not None:
        asked["kl_weight"] = price
    known = {json.dumps(line["settings"], sort_keys=True): line for line in resume_lines(log)
             if line["asked"] == json.loads(json.dumps(asked))}  # fmt: skip
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=6))
    current = {**config.to_dict(), **config.rule}
    for given in first:
        study.enqueue_trial(_inside(space, {**current, **given}), skip_if_exists=True)
    lines: list[Line] = []
    with Workers(min(jobs, seeds)) as workers:
        for number in range(count):
            trial = study.ask()
            chosen = {name: _suggest(trial, name, range_) for name, range_ in space.items()}
            line = known.get(json.dumps(finite(chosen), sort_keys=True))
            if line is None:
                yardstick = yardsticks(folder, [where], common, 0, HELDOUT["tune"], workers)[where.name]
                runs = [
                    dataclasses.replace(base, seed=TUNING_SEEDS + k, settings=chosen, yardstick=yardstick)
                    for k in range(seeds)
                ]
                found = [outcome for _, outcome in workers.map(run_one, [(job,) for job in runs])]
                failed = [outcome["failed"] for outcome in found if "failed" in outcome]
                mean = None if failed else statistics.mean(outcome["J"] for outcome in found)
                line = {"settings": chosen, "J": mean, "failed": failed, "asked": asked,
                        "recovered": None if failed else statistics.mean(o["recovered"] for o in found)}  # fmt: skip
                append_line(log, line)
            if line["J"] is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, line["J"])
            lines.append(line)
            if on_trial is not None:
                on_trial(line, number + 1, count)
    good = [line for line in lines if line["J"] is not None]
    if not good:
        raise RuntimeError(f"all {count} trials of {rule} on {where.name} failed; the last: {lines[-1]['failed'][0]}")
    best = max(good, key=lambda line: float(line["J"]))
    result = {
        "rule": rule, "problem": where.name, "settings": best["settings"], "J": best["J"], "recovered": best["recovered"],
        "defaults": None if grid else lines[0], "trials": count, "seeds": seeds, "budget": budget, "common": common,
        "kl_weight": price, "space": space,
    }  # fmt: skip
    write_json(folder / tuned_name(rule, where.name), finite(result))
    return result


def _combinations(grid: Mapping[str, Sequence[Any]], base: Job) -> list[dict[str, Any]]:
    """Every combination of a grid's values once, as the rule's settings have them. SettingError for what it does not use."""
    for name, values in grid.items():
        if not values:
            raise SettingError(f"the grid has no value of {name}; give one at least.")
    found = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        check_used([base], {}, {base.rule: given})
        config = dataclasses.replace(base, settings=given).config()
        current = {**config.to_dict(), **config.rule}
        found.append({name: current[name] for name in grid})
    return [given for k, given in enumerate(found) if given not in found[:k]]  # 1e-3 and 0.001 are one value


def _inside(space: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Settings moved into the ranges that are searched; a number between two choices becomes the nearer one."""
    moved = {}
    for name, choices in space.items():
        value = current[name]
        if isinstance(choices, tuple):
            moved[name] = type(choices[0])(min(max(value, choices[0]), choices[1]))
        elif value in choices or isinstance(value, str | bool):
            moved[name] = value if value in choices else choices[0]
        else:
            moved[name] = min(choices, key=lambda choice: abs(choice - value))
    return moved


def _suggest(trial: Any, name: str, choices: Any) -> Any:
    if isinstance(choices, list):
        return trial.suggest_categorical(name, choices)
    low, high, scale = choices
    suggest = trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
    return suggest(name, low, high, log=scale == "log")


def tuned_name(rule: str, problem: str) -> str:
    """RULE.PROBLEM.json, of file.py:Class the class."""
    return f"{rule.rpartition(':')[2]}.{problem}.json"


def tuned_settings(folder: str | Path | None, rule: str, problem: str) -> dict[str, Any] | None:
    """What `tune` found, or None where it did not look."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise SettingError(f"the folder {str(folder)!r} of tuned settings does not exist; `scoreact tune` makes it.")
    found = _stored(Path(folder) / tuned_name(rule, problem))
    return found and dict(found["settings"])


def _stored(path: Path) -> dict[str, Any] | None:
    """What `tune` wrote, or None where it did not. Raises SettingError for a damaged file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"budget": {}, "kl_weight": None, **found, "settings": dict(found["settings"])}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is damaged ({error}); tune again.") from None


def searched_otherwise(folder: str | Path, rule: str, problem: str, asked: Mapping[str, Any]) -> str | None:
    """Where `tune` searched at another budget or price of KL than is asked for now, a sentence that says so.

    asked: network_calls, reward_calls and kl_weight; None is not compared.
    """
    path = Path(folder) / tuned_name(rule, problem)
    stored = _stored(path)
    if stored is None:
        return None
    then = {**stored["budget"], "kl_weight": stored["kl_weight"]}
    other = [f"{k} {then[k]:g}, now {v:g}" for k, v in asked.items() if None not in (v, then.get(k)) and v != then[k]]
    return f"{path} was searched at {'; '.join(other)}." if other else None


def found_before(folder: str | Path | None, rule: str) -> list[dict[str, Any]]:
    """The settings that a folder of `tune` holds of a rule, problem by problem in the order of their names."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise SettingError(
            f"the folder {str(folder)!r} of settings to start from does not exist; `scoreact tune` makes it."
        )
    name = rule.rpartition(":")[2] + "."
    problems = [path.name[len(name) : -len(".json")] for path in sorted(Path(folder).glob(f"{name}*.json"))]
    found = [tuned_settings(folder, rule, problem) for problem in problems]
    return [settings for settings in found if settings is not None]


def keep_tuned(source: Path, target: Path, names: Sequence[str], problems: Sequence[str]) -> None:
    """Copy what `tune` found for these rules and problems: a comparison says what it was made with."""
    if source.resolve() == target.resolve():
        return
    for name in (tuned_name(rule, problem) for rule in names for problem in problems):
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
