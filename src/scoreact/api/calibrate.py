"""`sa.calibrate`: the model nearest to the pretrained one whose samples have given means of given statistics.

A round draws an ensemble, finds by how much lambda must change (`training.calibration`), and trains to R = lambda . s at
kl_weight 1 from where the policy stands. The first ensemble is the pretrained model's. The later ones are the tuned model's:
they make good what training left once it comes no nearer. A step of lambda leaves `LEAST` effective samples, so that distant
targets are approached in several.

    out/config.json, model.safetensors, ...: the run of the last round; calibration.json, calibration.png; round-1/, ...

A kill at any moment costs no more than it costs any run: see `calibration_folder`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.ensemble import Ensemble, by_default
from ..evaluation.optimum import mean_and_error
from ..models.weights import digest_of
from ..recipes.base import Problem
from ..report.calibrated import calibration_lines, draw_calibration
from ..report.progress import somebody_looks
from ..rewards.weighted_statistics import Spec, open_statistics
from ..runs.session import Event
from ..runs.source import Source
from ..support import distributed
from ..support.errors import SettingError
from ..support.files import finite
from ..training.calibration import Dual, Samples
from ..training.config import Config
from .calibrated_model import Work, origin_of
from .calibration_folder import PICTURE, CalibrationFolder, check_free_for
from .result import Result

LEAST = 100  # effective samples of a round's step; a tenth of the samples, where these are fewer than 1,000
SURE = 0.5  # share of the tolerance within which rounds end: other samples of the same policy are then within all of it
STILL = 0.8  # share of its distance to the aim that a round may leave for the next to train on to the same lambda
HALF = 0.5  # of the way to an aim: a policy that has not come so far is not trained enough, if it is so many deviations away
DEAR = 1.5  # times the least KL: a path KL above it is said


@dataclass(repr=False)
class Calibration:
    """What `calibrate` leaves.

    Args:
        result: the last round's run, with the tuned policy: `.result.sample()`, `.result.write_back(network)`.
        facts: the content of calibration.json: met, statistics (a row each), path_kl, least_kl, effective_samples, moved,
            rounds, notes.
    """

    result: Result
    facts: dict[str, Any]

    @property
    def met(self) -> bool:
        """Whether every statistic is within the tolerance of its target, on samples that nothing was decided by."""
        return bool(self.facts["met"])

    @property
    def weights(self) -> list[float]:
        """lambda that the policy was trained to."""
        return [row["weight"] for row in self.facts["statistics"]]

    @property
    def path_kl(self) -> float:
        """Of the tuned policy from the pretrained model, nats: how implausible the scenario is, from above."""
        return float(self.facts["path_kl"])

    def __str__(self) -> str:
        lines = calibration_lines(self.facts)
        return "\n".join(lines + [f"run        {self.result.out}"] * (self.result.out is not None))

    __repr__ = __str__


def calibrate(
    model: nn.Module | Problem | Source | str | Path,
    statistics: Spec | Sequence[Spec],
    targets: float | Sequence[float] | Tensor,
    *,
    tolerance: float = 0.05,
    samples: int = 4000,
    rounds: int = 6,
    also: Spec | Sequence[Spec] = (),
    prompts: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    out: str | Path | None = None,
    resume: bool = False,
    config: Config | None = None,
    progress: bool | None = None,
    on_event: Event | None = None,
    say: Callable[[str], None] | None = None,
    report: bool = True,
    command: str = "scoreact.calibrate",
    **settings: Any,
) -> Calibration:
    """Tune a model so that statistics of its samples have the means that you name, and as little else changes as can be.

    min KL(p | p_ref) with E_p[s_j] = m_j is solved by p_ref exp(sum_j lambda_j s_j) / Z, the law that training to the reward
    sum_j lambda_j s_j at kl_weight 1 has for its optimum. lambda is found by dual ascent on the pretrained model's samples, and
    corrected on the tuned model's.

    Args:
        model: an nn.Module with the members of `ScoreModel`, a `Problem`, or what `scoreact train` takes: a recipe's name, a
            model's folder, "my_model.py:build"; of a run's folder its tuned model is the one to stay near to. A module that is
            given is not changed: `result.write_back(network)` puts the outcome into it.
        statistics: one, or several: functions of samples [B, ...], or (samples, prompts), or (samples, condition), to [B] or
            [B, k]; "file.py:function", or a known reward's name. A run is opened by its folder alone where all are texts.
        targets: their means, in the statistic's unit; as many as all statistics have columns.
        tolerance: how far from its target a mean may be, in standard deviations of the statistic under the pretrained model.
        samples: of each ensemble; 4 / tolerance^2 at least.
        rounds: of training, at most; each is as long as the settings say (`iterations`, ...).
        also: other statistics, whose change is reported.
        prompts: as of `finetune`, for a module or a Problem.
        out: the run's folder, new or empty.
        resume: go on with the calibration that was interrupted in `out`, with the same model and arguments as before. It ends
            in the same bits as one that was left alone. Of one that has ended the outcome is read.
        config: of training. kl_weight is 1: lambda is in nats.
        progress: as of `finetune`, of each round.
        on_event: as of `finetune`, of each round.
        say: told a line a round.
        report: write report.html.
        command: what config.json says that the run was made by.
        settings: of training, over those of `config`.

    Returns:
        What was reached. `str()` of it is the table that `scoreact calibrate` prints. The same seed gives the same bits.

    Raises:
        SettingError: a target that no finite lambda gives, as it lies at or beyond an end that samples cannot pass; one that
            the pretrained model meets; statistics that are constant or follow from each other; settings that cannot be used.
        RewardError: a statistic that is not there or returns something else. RunExists: `out` is in use.
        RunError: `out` holds no calibration to go on with, or one of which something else was asked.
    """
    seen = _listed(statistics)
    goal = _targets(targets)
    _check(tolerance, samples, rounds, settings)
    folder = None if out is None else Path(out).expanduser()
    if resume and folder is None:
        raise SettingError("resume goes on with the calibration in a folder; give it with out.")
    if folder is not None and not resume:
        check_free_for(folder)
    origin = origin_of(model, prompts, config, settings, seen, command)
    work = Work(origin, open_statistics(seen), [*open_statistics(_listed(also)), *by_default()], samples)
    asked = {"targets": goal.tolist(), "tolerance": tolerance, "samples": samples, "rounds": rounds}
    kept = CalibrationFolder(folder, {**work.described(), **asked}, resume)
    if kept.facts is not None:
        return _ended(work, kept, report)
    shows = somebody_looks() if progress is None else progress
    tell = say or (print if shows else lambda line: None)
    before = kept.drawn(0, partial(work.draw, None, 0))
    names = work.names(before, goal)
    first = Samples(before.values(names), before.condition, names)
    whole = first.solve(goal)
    least = min(LEAST, samples / 10)
    notes = _feasible(first, names, goal, whole, least)
    allowed = tolerance * first.std
    if bool(((first.mean - goal).abs() <= allowed).all()):
        raise SettingError(
            f"the pretrained model has these means already, within the tolerance of {tolerance:g} standard deviations "
            f"({', '.join(f'{name} {m:.4g}' for name, m in zip(names, first.mean.tolist(), strict=True))}); lower it."
        )
    kept.begin(before)
    for note in notes:
        tell(f"note: {note}")
    said = set[str]()

    def hear(kind: str, line: Mapping[str, Any]) -> None:
        """What a round's run notices is said once, where its progress is not shown, which would say it."""
        if not shows and line.get("guard") == "note" and line["text"] not in said:
            said.add(line["text"])
            tell(f"note: {line['text']}")
        if on_event is not None:
            on_event(kind, dict(line))

    weights, result, done = torch.zeros(len(goal), dtype=torch.float64), None, list[dict[str, Any]]()
    here, aim, share, gap, off, stood = first, first.mean, 1.0, 0.0, 0.0, 0
    for number in range(1, rounds + 1):
        now = first.distance(here.mean, aim)
        untrained = now > HALF * gap > HALF**2
        stood = stood + 1 if now >= STILL * off else 0
        if stood > untrained:  # a policy that is far from the aim gets a second round to the same lambda
            stood = 0
            step, share = here.step(goal, least)
            weights, aim = weights + step.weights, here.mean + share * (goal - here.mean)
            now = gap = first.distance(here.mean, aim)
        off, way = now, "" if share == 1 else f", {share:.0%} of the way"
        tell(f"round {number}  lambda {_several(weights.tolist())}{way}")
        result = work.train(weights.tolist(), result, kept.round(number), progress, hear)
        drawn = kept.drawn(number, partial(work.draw, result.policy, number))
        here = Samples(drawn.values(names), drawn.condition, names)
        kl, kl_se = drawn.path_kl()
        means = here.mean.tolist()
        done.append({"weights": weights.tolist(), "share": share, "means": means, "path_kl": kl, "path_kl_se": kl_se})
        tell(f"round {number}  means {_several(means)} of {_several(goal.tolist())}, path KL {kl:.3g} nats")
        if bool(((here.mean - goal).abs() <= SURE * allowed).all()):
            break
    assert result is not None
    last = [work.draw(policy, -1) for policy in (None, result.policy)]
    facts = {
        **_outcome(last, names, goal, allowed), "tolerance": tolerance, "samples": samples, "seed": origin.config.seed,
        "rounds": done, "notes": notes, "trusted": whole.solved and whole.effective >= least,
        "least_kl": whole.kl, "least_kl_se": whole.kl_se, "effective_samples": whole.effective,
    }  # fmt: skip
    for j, row in enumerate(facts["statistics"]):
        row["weight"] = float(weights[j])
        row |= {"first_weight": float(whole.weights[j]), "first_weight_se": float(whole.weights_se[j])}
    facts["moved"] += _looked_at(result)
    assert isinstance(result.policy.model, nn.Module)
    facts["digest"] = digest_of(result.policy.model)
    if facts["trusted"] and facts["path_kl"] > DEAR * facts["least_kl"] + 0.1:
        notes.append(
            f"the policy pays {facts['path_kl']:.3g} nats for what {facts['least_kl']:.3g} would buy: training had not settled "
            f"when lambda was corrected, or {origin.config.steps} steps are few for it. Give a round more iterations than "
            f"{origin.config.iterations}, or more steps."
        )
    unsure = [row["name"] for row in facts["statistics"] if row["after_se"] > SURE * row["allowed"]]
    if unsure:
        notes.append(
            f"{', '.join(unsure)}: twice the standard error of the mean on {samples:,} samples is more than the tolerance "
            "allows, so whether the target is met is partly chance; give more samples."
        )
    facts = finite(facts)
    if folder is not None:
        draw_calibration(
            folder / PICTURE, [(name, last[0].columns[name], last[1].columns[name]) for name in names], goal.tolist()
        )
    kept.end(facts)
    kept.settle(len(done))
    result = dataclasses.replace(result, out=folder)
    if folder is not None and report:
        work.origin.report(result)
    return Calibration(result, facts)


def _ended(work: Work, kept: CalibrationFolder, report: bool) -> Calibration:
    """Of a calibration whose rounds are over."""
    assert kept.path is not None
    assert kept.facts is not None
    kept.settle(len(kept.facts["rounds"]))
    weights = [row["weight"] for row in kept.facts["statistics"]]
    result = work.train(weights, None, kept.path, progress=False, on_event=None)
    if report and not (kept.path / "report.html").is_file():
        work.origin.report(result)
    return Calibration(result, kept.facts)


# --- what is given -----------------------------------------------------------------------------------------------------


def _listed(statistics: Spec | Sequence[Spec]) -> list[Spec]:
    return [statistics] if isinstance(statistics, str) or callable(statistics) else list(statistics)


def _targets(targets: float | Sequence[float] | Tensor) -> Tensor:
    """[k], finite."""
    found = torch.as_tensor(targets, dtype=torch.float64).flatten()
    if not len(found) or not bool(found.isfinite().all()):
        raise SettingError(f"targets are {found.tolist()}; give a finite number for each statistic.")
    return found


def _check(tolerance: float, samples: int, rounds: int, settings: Mapping[str, Any]) -> None:
    if not 0 < tolerance < math.inf:
        raise SettingError(f"tolerance is {tolerance}; give standard deviations above 0, such as 0.05.")
    if samples < 4 / tolerance**2:
        raise SettingError(
            f"samples is {samples}, whose mean is known to {1 / math.sqrt(max(samples, 1)):.2g} standard deviations: too "
            f"little for a tolerance of {tolerance:g}. Give at least {math.ceil(4 / tolerance**2)}, or a larger tolerance."
        )
    distributed.start()
    if distributed.world() > 1:
        raise SettingError(f"{distributed.world()} processes were started, and a calibration works in one; start one.")
    if rounds < 1:
        raise SettingError(f"rounds is {rounds}; give at least 1.")
    if settings.get("kl_weight", 1.0) != 1.0 or settings.get("target_kl", 0.0) != 0.0:
        name = "kl_weight" if settings.get("kl_weight", 1.0) != 1.0 else "target_kl"
        raise SettingError(f"{name} is {settings[name]}, but lambda is what sets the path KL here; leave it out.")


def _feasible(first: Samples, names: Sequence[str], goal: Tensor, whole: Dual, least: float) -> list[str]:
    """Sentences on targets that the pretrained model's samples do not reach. Raises SettingError where nothing can."""
    beyond = first.beyond(goal)
    for name, text, bounded in zip(names, beyond, first.bounded(goal), strict=True):
        if bounded:
            raise SettingError(
                f"the target of {name} is {text}, and several samples share that end, as of a share or a count that nothing "
                "passes: only an infinite lambda would give it. Give a target between the ends."
            )
    count, notes = len(first.values), []
    out = [f"{name} {text}" for name, text in zip(names, beyond, strict=True) if text]
    if out:
        notes.append(
            f"no sample of {count:,} of the pretrained model lies past the target of {'; '.join(out)}: no finite lambda gives "
            "it on these samples, and it is approached in rounds. A target that no model can have is approached without an end."
        )
    elif not whole.solved:
        notes.append(
            f"no finite lambda gives {_several(goal.tolist())} together on {count:,} samples of the pretrained model, though "
            "each alone is within their reach: they are approached in rounds."
        )
    elif whole.effective < least:
        notes.append(
            f"{count:,} samples of the pretrained model are worth {whole.effective:.0f} at the targets, too few to trust "
            f"lambda and its KL ({least:.0f} are needed): they are approached in rounds. More samples would tell more."
        )
    return notes


# --- the outcome -------------------------------------------------------------------------------------------------------


def _outcome(pair: Sequence[Ensemble], names: Sequence[str], goal: Tensor, allowed: Tensor) -> dict[str, Any]:
    """Of the pretrained and of the tuned model's ensemble, from the same noise."""
    before, after = pair
    rows, moved = [], []
    for name in before.columns:
        a, b = before.columns[name], after.columns[name]
        (was, was_se), (now, now_se), (change, change_se) = mean_and_error(a), mean_and_error(b), mean_and_error(b - a)
        spreads = {"std_before": float(a.std()), "std": float(b.std())}
        row = {"name": name, "before": was, "before_se": was_se, "after": now, "after_se": now_se, **spreads}
        if name in names:
            j = names.index(name)
            met = abs(now - float(goal[j])) <= float(allowed[j])
            rows.append({**row, "target": float(goal[j]), "allowed": float(allowed[j]), "met": met})
        else:
            moved.append({**row, "change": change, "change_se": change_se})
    kl, kl_se = after.path_kl()
    met = all(row["met"] for row in rows)
    return {"met": met, "statistics": rows, "moved": moved, "path_kl": kl, "path_kl_se": kl_se}


def _looked_at(result: Result) -> list[dict[str, Any]]:
    """Diversity and the judge's metrics, of the evaluations of the last round: its first look is at the pretrained model."""
    looks = [line for line in result.history if line.get("evaluation")]
    names = [n for n in result.final if n == "sample/diversity" or (n.startswith("judge/") and not n.endswith("_se"))]
    return [
        {"name": name, "before": looks[0][name], "after": result.final[name], "change": result.final[name] - looks[0][name]}
        for name in names if name in looks[0]
    ]  # fmt: skip


def _several(numbers: Sequence[float]) -> str:
    return ", ".join(f"{x:.4g}" for x in numbers)
