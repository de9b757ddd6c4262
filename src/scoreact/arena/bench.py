"""The arena: update rules on problems over seeds at equal budgets, measured by one referee; results that can be resumed.

A run is in `arena_run`, its processes in `workers`, the search for settings in `tuning`, statistics and tables in
`arena_report`. Knows files and which runs are wanted; prints nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..algorithms.registry import find_rule
from ..support.errors import SettingError
from ..support.files import Line, append_line, resume_lines, write_json
from ..support.workers import Workers
from .budget import check_budget, split_settings
from .problems import HELDOUT, TUNING_SEEDS, ArenaProblem, Job, check_used, known_problem, skips
from .referee import yardsticks
from .run import run_one
from .tables import report
from .tuning import keep_tuned, tuned_settings


def bench(
    rules: Sequence[str],
    problems: Sequence[str | ArenaProblem],
    seeds: int = 5,
    network_calls: int | None = None,
    reward_calls: int | None = None,
    out: str | Path = "arena",
    jobs: int = 1,
    *,
    kl_weights: Sequence[float] = (),
    tuned: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    points: int = 8,
    transfer_samples: int = 200,
    retry: bool = False,
    on_line: Callable[[Line, int, int], None] | None = None,
) -> list[Line]:
    """Run rules x problems x kl_weights x seeds at one budget; write results.jsonl, table.md, summary.json and plots.

    network_calls, reward_calls: of a run; the problem's own where None. kl_weights: the problem's own if empty; several
    make the frontier. tuned: a folder of `tune`, whose settings are used where it has them. settings: of all runs, or
    {"rule.name": value} of one rule's. Runs that `out` holds already are not repeated (failed ones only with `retry`).
    on_line: (line, finished, wanted) after each run. Returns the lines of this call's runs.
    Raises ValueError for names, numbers and settings that cannot be used.
    """
    chosen = [known_problem(p) for p in problems]
    for rule in rules:
        find_rule(rule)
    if not rules or not chosen:
        raise SettingError("give at least one rule and one problem.")
    if not 1 <= seeds <= TUNING_SEEDS:
        raise SettingError(f"seeds is {seeds}; it must be from 1 to {TUNING_SEEDS} (the others are tuning's).")
    if points < 1:
        raise SettingError(f"points is {points}; a curve needs at least 1.")
    if transfer_samples < 0:
        raise SettingError(f"transfer_samples is {transfer_samples}; it must be at least 0 (none).")
    folder = Path(out)
    common, of_rule = split_settings(settings or {}, rules)
    wanted: list[Job] = []
    for seed in range(seeds):
        for problem in chosen:
            for rule in dict.fromkeys(rules):
                if skips(rule, problem):
                    continue
                found = tuned_settings(tuned, rule, problem.name)
                own = {**(found or {}), **of_rule.get(rule, {})}
                for kl_weight in dict.fromkeys(map(float, kl_weights or [problem.config(common).kl_weight])):
                    job = Job(
                        rule, problem, seed, kl_weight, network_calls or problem.network_calls,
                        reward_calls or problem.reward_calls, common, own, found is not None, points, transfer_samples,
                    )  # fmt: skip
                    check_budget(job)
                    wanted.append(job)
    check_used(wanted, common, of_rule)
    _open(folder, network_calls, reward_calls, common, points, transfer_samples)
    if tuned is not None:
        keep_tuned(Path(tuned), folder / "tuned", rules, [p.name for p in chosen])
    done = {line["key"]: line for line in resume_lines(folder / "results.jsonl")}
    done = {k: v for k, v in done.items() if not ("failed" in v and (retry or v.get("killed")))}
    lines = [done[job.key] for job in wanted if job.key in done]
    todo = [job for job in wanted if job.key not in done]
    with Workers(min(jobs, max(1, len(todo)))) as workers:
        missing = {job.problem.name: job.problem for job in todo}
        known = list(missing.values())
        found = yardsticks(folder, known, common, transfer_samples, HELDOUT["bench"], workers)
        ready = [dataclasses.replace(job, yardstick=found[job.problem.name]) for job in todo]
        for index, outcome in workers.map(run_one, [(job,) for job in ready]):
            job = ready[index]
            named = {"rule": job.rule, "problem": job.problem.name, "kl_weight": job.kl_weight, "seed": job.seed}
            lines.append({**named, "key": job.key, **outcome})
            append_line(folder / "results.jsonl", lines[-1])
            if on_line is not None:
                on_line(lines[-1], len(lines), len(wanted))
    report(folder)
    return lines


def _open(folder: Path, network: int | None, reward: int | None, common: Any, points: int, samples: int) -> None:
    """One folder, one budget and one set of common settings: else its lines could not be compared."""
    mine = {"network_calls": network, "reward_calls": reward, "settings": common, "points": points,
            "transfer_samples": samples}  # fmt: skip
    record = folder / "bench.json"
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, mine)
        return
    stored = json.loads(record.read_text(encoding="utf-8"))
    changed = [f"{k} {stored.get(k)!r} -> {mine[k]!r}" for k in mine if stored.get(k) != mine[k]]
    if changed:
        raise SettingError(
            f"{folder} was made with other settings: {'; '.join(changed)}. Repeat with the same, or give another out."
        )
