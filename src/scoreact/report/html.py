"""A run folder as one HTML file: the result first, then samples, curves, tables, and how to repeat it.

The words are in summary.py, the drawing in figures.py, the measuring in evaluation.py. Text is escaped, pictures
are embedded, no outside address, no script. A piece that cannot be made becomes a note that says why.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
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
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..control.policy import Policy
from ..dynamics.grids import GRIDS
from ..dynamics.samplers import SAMPLERS
from ..dynamics.sde import NOISES
from ..evaluation.evaluate import TRANSFER, transfer_table
from ..models.base import HasExactLaw, ScoreModel
from ..models.weights import load_weights
from ..recipes.base import Problem
from ..runs.record import Record, Row, read_json, read_record, value
from ..sampling.draw import balanced, draw
from ..support.devices import choose_device, device_of
from ..support.files import write_json
from ..support.settings import fields_of
from ..training.config import Config, rule_fields
from . import figures
from .figures import CURVES, Curve
from .numbers import aligned, duration, number
from .words import before_training, headline, warnings, what_happened

PROMPTS, COLUMNS, FRAMES, POINTS, SERIES = 10, 5, 8, 800, 6  # how much is drawn
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
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
    return f'<figure class="{kind}"><div>{image}</div><figcaption>{html.escape(caption)}</figcaption></figure>\n'


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


def _cards(run: Record) -> str:
    """The main numbers, large."""
    first, last = (run.evaluations or [{}])[0], (run.evaluations or [{}])[-1]
    done = (run.iterations or [{}])[-1]
    best = "objective/J_star_exact" if "objective/J_star_exact" in run.reference else "objective/J_star"

    def change(before: float, after: float) -> str:
        return f"{number(before)} → {number(after)}"

    cards = (
        ("held-out reward", change(before_training(run, "reward/heldout")[0], value(last, "reward/heldout"))),
        ("objective J", change(before_training(run, "objective/J")[0], value(last, "objective/J"))),
        ("possible: J_ref → J*", change(value(run.reference, "objective/J_ref"), value(run.reference, best))),
        ("path KL (nats)", number(value(last, "policy/kl"))),
        ("diversity", change(value(first, "sample/diversity"), value(last, "sample/diversity"))),
        ("reward calls", number(done.get("cost/reward_calls"))),
        ("training time", duration(value(run.result or done, "seconds"))),
        ("iterations", f"{done.get('iteration', 0)} of {run.config.get('iterations', '?')}"),
    )
    inside = "".join(f"<div><span>{html.escape(name)}</span><b>{html.escape(text)}</b></div>" for name, text in cards)
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
    found = [path for path in (run.path / "model.safetensors", run.path / "best/model.safetensors") if path.is_file()]
    if not found:
        raise ValueError("no weights are saved yet; they come with the first evaluation.")
    if not isinstance(problem.model, nn.Module):
        raise ValueError(f"{type(problem.model).__name__} is no nn.Module, so saved weights cannot be put into it.")
    policy = Policy(problem.model.to(choose_device("auto")).eval(), act_until=run.settings.act_until)
    load_weights(problem.model, found[0])
    return policy


def _draw(run: Record, model: ScoreModel, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Times, states and decoded samples with training's solver and steps; the same noise for every model."""
    config = run.settings
    ts = GRIDS[_grid(config)](model.schedule, config.steps, None)
    noise = NOISES[config.noise](config.noise_scale)
    device = device_of(model)
    xs, decoded = draw(model, names, SAMPLERS[config.solver], ts, config.seed + 1, device, noise)
    return ts, xs, decoded


def _grid(config: Config) -> str:
    """A random grid would differ between before and after."""
    return "uniform" if config.grid == "random" else config.grid


def _samples(run: Record, problem: Problem, policy: Policy) -> str:
    """Before and after from the same noise, in the form that suits the samples' shape."""
    shown = list(problem.prompts[:PROMPTS])
    shape = _draw(run, policy.reference, shown[:1])[2].shape[1:]
    if shape == (2,):
        return _points(run, problem, policy)
    names = [name for name in shown for _ in range(COLUMNS)]
    ts, paths, before = _draw(run, policy.reference, names)
    _, tuned_paths, after = _draw(run, policy, names)
    alt = "Samples before and after training, from the same noise"
    if len(shape) != 3 or shape[0] not in (1, 3):
        caption = f"{min(len(before), SERIES)} samples; a colour is the same noise on both sides."
        return _figure(run, figures.series(before[:SERIES], after[:SERIES]), "samples", alt, caption, "wide")
    caption = "A row a prompt. Each picture on the right starts from the same noise as its partner on the left."
    if len(problem.prompts) > len(shown):
        caption += f" The first {len(shown)} of {len(problem.prompts)} prompts."
    frames = torch.linspace(0, len(ts) - 1, min(FRAMES, len(ts))).round().long()
    pairs = ((policy.reference, paths), (policy.model, tuned_paths))
    strips = torch.stack([model.decode(xs[frames.to(xs.device), 0]) for model, xs in pairs])
    film = f"One denoising of “{textwrap.shorten(shown[0], 60)}”, from noise (t = 0) to picture (t = 1)."
    return _figure(run, figures.gallery(shown, before, after), "samples", alt, caption, "wide") + _figure(
        run, figures.film_strip(ts[frames].tolist(), strips), "filmstrip", "One denoising, before and after", film
    )


def _points(run: Record, problem: Problem, policy: Policy) -> str:
    """2-D samples before and after, and of the optimum p_ref exp(R / beta) / Z where the problem knows it."""
    config, generator = run.settings, torch.Generator().manual_seed(run.settings.seed + 1)
    names = balanced(problem.prompts, POINTS, generator)
    pairs = (("before", policy.reference), ("after", policy.model))
    clouds = [(title, _draw(run, model, names)[2].cpu()) for title, model in pairs]
    law = problem.model.exact_law() if isinstance(problem.model, HasExactLaw) else None
    parts: list[Any] = [getattr(problem.reward, name, None) for name in ("linear", "quadratic")]
    memoryless = (config.noise, config.noise_scale) == ("noise_level", 1.0)  # with other noise the optimum is another
    if memoryless and law is not None and all(part is not None for part in parts):
        clouds.append(
            (
                "optimum, closed form",
                law.tilted(parts[0], parts[1], config.kl_weight)[0].cpu().sample(POINTS, generator),
            )
        )

    def reward(points: Tensor) -> Tensor:
        with torch.no_grad():
            return problem.reward(points, problem.model.condition([problem.prompts[0]] * len(points)))

    caption = f"{POINTS} samples each, before and after from the same noise. Lines: equal reward."
    return _figure(
        run, figures.scatter(clouds, reward), "samples", "Samples before and after training", caption, "wide"
    )


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
            policy, problem.reward, problem.prompts, min(200, config.heldout_samples), 1, _grid(config), rows, device,
            NOISES[config.noise](config.noise_scale),
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
    """Every setting with its meaning; a star marks what differs from the library's default."""
    fields = {f.name: f for f, _ in fields_of(Config)}
    settings = {name: setting for name, setting in run.config.items() if name != "rule"}
    with contextlib.suppress(ValueError, KeyError):  # a rule of the user's own that is not here any more
        fields |= {f.name: f for f, _ in rule_fields(run.config["algorithm"])}
    rows = []
    for name, setting in {**settings, **run.config.get("rule", {})}.items():
        known = fields.get(name)
        changed = known is None or setting != known.default
        rows.append([name, f"{setting}{' *' if changed else ''}", known.metadata["help"] if known else ""])
    table = _table(("setting", "value (* not the default)", "meaning"), rows)
    return f"<details><summary>All settings</summary>{table}</details>\n"


def _origin(run: Record) -> str:
    """Commands to repeat and to use the run, what it was, and the versions that made it."""
    made_by, folder = run.description.get("command"), shlex.quote(str(run.path))
    made_by = shlex.join(map(str, made_by)) if isinstance(made_by, list) else made_by
    verbs = ("resume", "sample", "evaluate", "report")
    text = "\n".join(
        [str(made_by or "# made from Python: no command"), *(f"scoreact {verb} {folder}" for verb in verbs)]
    )
    rows = [(str(k), v if isinstance(v, str) else json.dumps(v)) for k, v in run.description.items() if k != "command"]
    rows += [("seed", str(run.config.get("seed", "n/a"))), *((str(k), str(v)) for k, v in run.versions.items())]
    return f"<pre>{html.escape(text)}</pre>\n" + _table((), rows)


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
        _piece("Judge", _judged, found),
        f"<h2>How to repeat it</h2>{_piece('Origin', _origin, found)}{_piece('Settings', _configuration, found)}",
    ]
    template = resources.files("scoreact").joinpath("assets/report.html").read_text(encoding="utf-8")
    path = found.path / "report.html"
    title = f"scoreact: {subject or found.path.name}"
    path.write_text(Template(template).substitute(title=html.escape(title), body="\n".join(body)), encoding="utf-8")
    return path
