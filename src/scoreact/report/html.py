"""A run folder as one HTML file: the result first, then samples, curves, tables, and how to repeat it.

The words are in words.py, the drawing in figures.py and pictures.py, the measuring in evaluation. Text is escaped, pictures
are embedded, no outside address, no script. A piece that cannot be made becomes a note that says why.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import json
import math
import shlex
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import nn

from ..control.policy import Policy
from ..evaluation.evaluate import TRANSFER, transfer_table
from ..models.weights import digest_of, load_weights
from ..recipes.base import Problem
from ..runs.record import Record, Row, read_json, read_record, value
from ..runs.source import weights_file
from ..support.devices import choose_device, device_of
from ..support.errors import ModelError
from ..support.files import write_json
from ..support.settings import fields_of
from ..training.config import RECORDS, setting_groups
from . import figures
from .calibrated import calibration_lines
from .figures import CURVES, Curve
from .numbers import aligned, duration, number, survey_cells
from .pictures import Picture, before_and_after
from .words import before_training, headline, warnings, what_happened

# what reading a folder, sampling, drawing and a user's reward may raise; anything else is a mistake in this file
EXPECTED = (OSError, ValueError, RuntimeError, LookupError, ArithmeticError)


# --- pieces of HTML --------------------------------------------------------------------------------------------------


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>\n'


def _piece(name: str, make: Callable[..., str], *arguments: Any) -> str:
    """One part of the report, or a note that says why it is missing."""
    try:
        return make(*arguments)
    except EXPECTED as error:
        return _note(f"{name}: not available. {type(error).__name__}: {' '.join(str(error).split())}")


def _figure(run: Record, figure: Figure, name: str, alt: str, caption: str, kind: str = "plot") -> str:
    """Write the figure as NAME.png and embed it."""
    path = run.path / f"{name}.png"
    figure.savefig(path)
    return _embedded(path.read_bytes(), "png", alt, caption, kind)


def _embedded(content: bytes, form: str, alt: str, caption: str, kind: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    image = f'<img src="data:image/{form};base64,{data}" alt="{html.escape(alt)}">'
    return f'<figure class="{kind}"><div>{image}</div><figcaption>{html.escape(caption)}</figcaption></figure>\n'


def _film(run: Record, film: bytes, picture: Picture) -> str:
    """Write the film as NAME.gif and embed it."""
    (run.path / f"{picture.name}.gif").write_bytes(film)
    return _embedded(film, "gif", picture.alt, picture.caption, "wide")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of escaped text; the columns in `numbers` are right-aligned. No header line if the header is empty."""
    right = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        marks = (' class="n"' if i in right else "" for i in range(len(cells)))
        cells_text = (f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        return f"<tr>{''.join(cells_text)}</tr>\n"

    head = f"<thead>{line(header, 'th')}</thead>" if header else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="table"><table>{head}<tbody>\n{body}</tbody></table></div>\n'


def _numbers(run: Record) -> list[tuple[str, str]]:
    """The main numbers by name."""
    first, last = (run.evaluations or [{}])[0], (run.evaluations or [{}])[-1]
    done = (run.iterations or [{}])[-1]
    best = "objective/J_star_exact" if "objective/J_star_exact" in run.reference else "objective/J_star"

    def change(before: float, after: float) -> str:
        return f"{number(before)} → {number(after)}"

    return [
        ("held-out reward", change(before_training(run, "reward/heldout")[0], value(last, "reward/heldout"))),
        *(
            [("reward, unseen prompts", change(value(first, unseen), value(last, unseen)))]
            if (unseen := "reward/heldout_prompts") in last
            else []
        ),
        ("objective J", change(before_training(run, "objective/J")[0], value(last, "objective/J"))),
        ("possible: J_ref → J*", change(value(run.reference, "objective/J_ref"), value(run.reference, best))),
        ("path KL (nats)", number(value(last, "policy/kl"))),
        ("diversity", change(value(first, "sample/diversity"), value(last, "sample/diversity"))),
        ("reward calls", number(done.get("cost/reward_calls"))),
        ("training time", duration(value(run.result or done, "seconds"))),
        ("iterations", f"{done.get('iteration', 0)} of {run.config.get('iterations', '?')}"),
    ]


def _cards(run: Record) -> str:
    """The main numbers, large."""
    inside = "".join(
        f"<div><span>{html.escape(name)}</span><b>{html.escape(text)}</b></div>" for name, text in _numbers(run)
    )
    return f'<div class="cards">{inside}</div>\n'


def _curve(run: Record, curve: Curve) -> str:
    figure = figures.curve_figure(curve, run)
    if figure is None:
        return _note(f"{curve.title}: not measured yet.")
    return _figure(run, figure, curve.name, f"{curve.title} over iterations", curve.caption)


def _costs(run: Record) -> str:
    figure = figures.cost_figure(run.iterations)
    caption = (
        "Samples through a network (the reference's included), samples rewarded, wall time. k: thousand, M: million."
    )
    return _figure(run, figure, "costs", "Costs over iterations", caption) if figure else _note("Costs: none yet.")


# --- samples ---------------------------------------------------------------------------------------------------------


def _load_policy(run: Record, problem: Problem) -> Policy:
    """The policy with the folder's final weights, or the best ones of an unfinished run. Raises ValueError without."""
    if not isinstance(problem.model, nn.Module):
        raise ModelError(f"{type(problem.model).__name__} is no nn.Module, so saved weights cannot be put into it.")
    policy = Policy(problem.model.to(choose_device("auto")).eval(), act_until=run.settings.act_until)
    load_weights(problem.model, weights_file(run.path)[0])
    return policy


def _samples(run: Record, problem: Problem, policy: Policy) -> str:
    """Before and after from the same noise."""
    found = before_and_after(policy, problem, run.settings)
    films = "".join(_film(run, picture.film, picture) for picture in found if picture.film is not None)
    kinds = ["wide", *["plot"] * (len(found) - 1)]
    pairs = zip(found, kinds, strict=True)
    return films + "".join(_figure(run, p.figure, p.name, p.alt, p.caption, kind) for p, kind in pairs)


# --- tables ----------------------------------------------------------------------------------------------------------


def _transfer(run: Record, problem: Problem, policy: Policy) -> str:
    """Reward before and after for other step counts and solvers; kept in transfer.json, made anew for other weights."""
    digest = hashlib.sha256()
    for parameter in policy.model.parameters() if isinstance(policy.model, nn.Module) else ():
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    path = run.path / "transfer.json"
    kept = read_json(path, [])
    if kept.get("weights") != digest.hexdigest():
        device = device_of(policy.model)
        config = run.settings
        rows = [(config.solver, config.steps), *(row for row in TRANSFER if row != (config.solver, config.steps))]
        table = transfer_table(
            policy, problem.reward, problem.prompts, min(200, config.heldout_samples), 1, config.grid, rows, device,
            config.sde(policy.schedule).noise,
        )  # fmt: skip
        kept = {"weights": digest.hexdigest(), "rows": table}
        write_json(path, kept)
    keys = ("reference_reward", "reference_reward_se", "reward", "reward_se", "gain", "gain_se")
    columns = [aligned([value(row, key) for row in kept["rows"]]) for key in keys]
    cells_of = [
        [str(row["solver"]), str(row["steps"]), *cells] for row, *cells in zip(kept["rows"], *columns, strict=True)
    ]
    trained = f"{run.settings.solver}, {run.settings.steps} steps"
    text = f"Mean reward and its standard error (s.e.), same noise before and after. Trained with {trained}: first row."
    table_text = _table(("solver", "steps", "before", "s.e.", "after", "s.e.", "gain", "s.e."), cells_of, range(1, 8))
    return f'<p class="soft">{html.escape(text)}</p>{table_text}'


def _survey(run: Record, policy: Policy | None) -> str:
    """What `scoreact evaluate --survey` found, where it was asked."""
    kept = read_json(run.path / "survey.json", [])
    if not kept.get("rows"):
        return ""
    title = "<h2>How much of the gain survives</h2>"
    if policy is not None and isinstance(policy.model, nn.Module) and kept.get("digest") != digest_of(policy.model):
        return title + _note(
            "survey.json is of other weights than the final ones; `scoreact evaluate --survey` makes it anew."
        )
    header, cells = survey_cells(kept["rows"])
    text = (
        f"{kept['samples']} samples a row, the same prompts and noise in all; ± is half of a 95 % interval. One thing is "
        "changed at a time from the sampler of training."
    )
    return f'{title}<p class="soft">{html.escape(text)}</p>{_table(header, cells, range(1, 5))}'


def _calibrated(run: Record, policy: Policy | None) -> str:
    """What `scoreact calibrate` reached, where it made the run."""
    kept = read_json(run.path / "calibration.json", [])
    if not kept.get("statistics"):
        return ""
    title = "<h2>Calibration</h2>"
    if policy is not None and isinstance(policy.model, nn.Module) and kept.get("digest") != digest_of(policy.model):
        return title + _note("calibration.json is of other weights than the final ones: the run was continued since.")
    text, picture = "\n".join(calibration_lines(kept)), run.path / "calibration.png"
    shown = ""
    if picture.is_file():
        shown = _embedded(
            picture.read_bytes(), "png", "Histograms of each statistic before and after", "Each statistic's law, before "
            "and after; vertical lines are means.", "wide",
        )  # fmt: skip
    return f"{title}<pre>{html.escape(text)}</pre>{shown}"


def _judged(run: Record) -> str:
    """What the reward does not know, at the first and the last evaluation; nothing for a problem without a judge."""
    rows = [run.evaluations[0], run.evaluations[-1]] if len(run.evaluations) > 1 else run.evaluations
    names = [name for name in (rows or [{}])[-1] if name.startswith("judge/") and not name.endswith("_se")]
    if not names:
        return ""

    def cell(row: Row, name: str) -> str:
        error = value(row, f"{name}_se")
        return number(value(row, name)) + (f" ± {number(error)}" if math.isfinite(error) else "")

    header = ["measure", *(f"iteration {row.get('iteration')}" for row in rows)]
    cells = [[name.removeprefix("judge/"), *(cell(row, name) for row in rows)] for name in names]
    return f"<h2>What the reward does not know</h2>{_table(header, cells, range(1, len(header)))}"


def _configuration(run: Record) -> str:
    """Every setting that the run used with its meaning, a table for each part; a star marks what is not the default."""
    stored, groups = run.config, [(record.heading, fields_of(record)) for record in RECORDS]
    with contextlib.suppress(ValueError):  # a rule of the user's own that is not here any more
        stored, groups = run.settings.to_dict(), list(setting_groups(run.config["algorithm"]))
    left, tables = {**stored, **stored.get("rule", {})}, []
    left.pop("rule", None)
    for heading, fields in groups:
        rows = []
        for field in [f for f, _ in fields if f.name in left]:
            setting = left.pop(field.name)
            rows.append([field.name, f"{setting}{'' if setting == field.default else ' *'}", field.metadata["help"]])
        tables.append(_table((heading, "value (* not the default)", "meaning"), rows) if rows else "")
    if left:
        tables.append(
            _table(("others", "value", "meaning"), [[name, str(setting), ""] for name, setting in left.items()])
        )
    return f"<details><summary>All settings</summary>{''.join(tables)}</details>\n"


def _origin(run: Record) -> str:
    """Commands to repeat and to use the run, what it was, and the versions that made it."""
    made_by, folder = run.description.get("command"), shlex.quote(str(run.path))
    made_by = shlex.join(map(str, made_by)) if isinstance(made_by, list) else made_by
    verbs = ("resume", "sample", "evaluate", "report")
    text = "\n".join(
        [str(made_by or "# made from Python: no command"), *(f"scoreact {verb} {folder}" for verb in verbs)]
    )
    rows = [
        (str(k), v if isinstance(v, str) else textwrap.shorten(json.dumps(v), 1000, placeholder=" ..."))
        for k, v in run.description.items()
        if k != "command"
    ]
    rows += [("seed", str(run.config.get("seed", "n/a"))), *((str(k), str(v)) for k, v in run.versions.items())]
    return f"<pre>{html.escape(text)}</pre>\n" + _table((), rows)


# --- in a notebook --------------------------------------------------------------------------------------------------


def snippet(run: Record, figure: Figure) -> str:
    """The outcome of a run as a piece of HTML for a notebook: a sentence, the numbers, what the guard said, a picture."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=80)
        data = base64.b64encode(file.getvalue()).decode("ascii")
    rows = [(name, text) for name, text in _numbers(run)]
    said = [f"<p>{html.escape(text)}</p>" for text in what_happened(run)]
    return (
        f"<div><p><b>{html.escape(headline(run))}</b></p>{_table((), rows)}{''.join(said)}"
        f'<img src="data:image/png;base64,{data}" alt="Samples before and after training"></div>'
    )


# --- the report ------------------------------------------------------------------------------------------------------


def write(run: Path, problem: Problem, policy: Policy | None = None) -> Path:
    """Write report.html and its PNGs into the folder `run`; returns its path.

    policy: the trained one; without it the folder's weights are put into `problem.model`, which must be untrained.
    Raises ValueError when the folder holds no run, OSError when it cannot be written.
    """
    found = read_record(Path(run))
    subject = " · ".join(str(text) for text in (found.description.get("recipe"), *problem.labels.values()) if text)
    with matplotlib.rc_context(figures.STYLE):
        curves = "".join(_piece(curve.title, _curve, found, curve) for curve in CURVES)
        curves += _piece("Costs", _costs, found)
        try:
            policy = policy or _load_policy(found, problem)
        except EXPECTED as error:
            samples = transfer = _note(f"Not available: {' '.join(str(error).split())}")
        else:
            samples = _piece("Samples", _samples, found, problem, policy)
            transfer = _piece("Steps and solvers", _transfer, found, problem, policy)
    happened = what_happened(found)
    body = [
        f"<h1>scoreact{html.escape(' · ' + subject if subject else '')}</h1>",
        f'<p class="headline">{html.escape(headline(found))}</p>',
        *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings(found)),
        _cards(found),
        "<h2>What happened</h2>" * bool(happened),
        *(f"<p>{html.escape(text)}</p>" for text in happened),
        f"<h2>Before and after</h2>{samples}",
        f'<h2>Training</h2><div class="plots">{curves}</div>',
        f"<h2>Other step counts and solvers</h2>{transfer}",
        _piece("Calibration", _calibrated, found, policy),
        _piece("Survey", _survey, found, policy),
        _piece("Judge", _judged, found),
        f"<h2>How to repeat it</h2>{_piece('Origin', _origin, found)}{_piece('Settings', _configuration, found)}",
    ]
    template = resources.files("scoreact").joinpath("assets/report.html").read_text(encoding="utf-8")
    path = found.path / "report.html"
    title = f"scoreact: {subject or found.path.name}"
    path.write_text(Template(template).substitute(title=html.escape(title), body="\n".join(body)), encoding="utf-8")
    return path
