"""The command `score`: how abnormal each row of a file is to a model, as a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..support.errors import SettingError
from ..support.seeds import LARGEST
from .parser import Parser, positive, whole

METHOD_NAMES = ("path", "bits", "complexity", "typicality", "ratio", "posterior", "reconstruction", "norms", "scoped")
RATIO = (
    "a row scores high where {model} is less likely to draw it than {reference}. Abnormal rows do if {reference} is the "
    "broader of the two, or the reward was made to tell them; others may score low."
)


def score_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("source", metavar="MODEL|RUN_DIR", help="a run, a model of pretrain, a recipe, or my_model.py:build")
    add("--data", type=Path, required=True, metavar="FILE", help="what is scored: a folder of pictures, .npz, .npy, a table; "
        "of a file with a split the held-out part, val or test")  # fmt: skip
    add("--method", choices=METHOD_NAMES, default="path", help=
        "path: bits a number by a few denoising errors; bits: by the "
        "probability-flow ODE; complexity: path less a PNG file's; typicality: away from normal ones' mean path; ratio: the "
        "reference against the model, nats; posterior: the model's other classes against --prompt, log odds; reconstruction: "
        "log error after noise and back; norms: of the score along the path; scoped: of it and its trace "
        "[default path]")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="a .csv or .jsonl, a line a row [default: printed as csv]")
    add("--prompt", metavar="CLASS", help="the class that all rows are taken for, of a model that has several")
    add("--labels", metavar="NAME", help="the array or column with the class of each row, instead of --prompt")
    add("--normal", type=Path, metavar="FILE", help="normal rows that typicality, norms and scoped compare with; of a file "
        "with a split the train part")  # fmt: skip
    add("--reference", metavar="MODEL", help="of ratio: a broader model [default: what the run was tuned from]")
    add("--levels", type=whole(2), default=10, metavar="INT", help="noise levels [default 10]")
    add("--noises", type=whole(1), default=2, metavar="INT", help="draws of noise at a level [default 2]")
    add("--least-noise", type=positive, default=0.0, metavar="FLOAT", help="sigma / alpha below which the path is not looked "
        "at: from about 1 on, texture does not count [as little as the data have]")  # fmt: skip
    add(
        "--probes",
        type=whole(0),
        metavar="INT",
        help="of the trace; 0: exact [default: exact below 1,000 numbers, else 8]",
    )
    add("--tolerance", type=positive, default=1e-3, metavar="FLOAT", help="of a step of the ODE [default 0.001]")
    add("--seed", type=whole(0, LARGEST), default=0, metavar="INT", help="of the noise [default 0]")
    add("--weights", choices=["final", "best"], default="final", help="of a run [default final]")
    parser.belongs("normal", "method", "typicality", "norms", "scoped")
    parser.belongs("reference", "method", "ratio")
    parser.belongs("probes", "method", "bits")
    parser.belongs("tolerance", "method", "bits")
    along = ("path", "complexity", "typicality", "ratio", "posterior", "norms", "scoped")
    parser.belongs("levels", "method", *along)
    parser.belongs("least_noise", "method", *along)
    parser.belongs(
        "noises", "method", "path", "complexity", "typicality", "ratio", "posterior", "reconstruction", "scoped"
    )


def score(options: argparse.Namespace) -> int:
    """Score the rows and write them in their order."""
    from ..api.detector import opened, score_with_error
    from ..api.detector import score as scored
    from ..api.saved_run import SavedRun
    from ..evaluation.likelihood import tuned_of
    from ..feedback.discriminate import sample_shape
    from ..report.progress import waiting
    from ..runs.source import open_source
    from ..support.own_data import read_rows

    if options.out is not None and options.out.suffix not in (".csv", ".jsonl"):
        raise SettingError(f"--out {options.out} ends in {options.out.suffix or 'nothing'}; give a .csv or .jsonl.")
    if options.labels is not None and options.prompt is not None:
        raise SettingError("--labels and --prompt are both given; leave one out.")
    source = open_source(options.source)
    if "weights" in options.given and source.folder is None:
        raise SettingError(f"--weights {options.weights} is of a run; leave it out.")
    run = SavedRun(source)
    shape = sample_shape(tuned_of(opened(run, options.weights)))
    rows = read_rows(options.data, shape, options.labels or False)
    how: dict[str, Any] = {"seed": options.seed, "weights": options.weights}
    how["prompts"] = rows.labels if options.labels else options.prompt
    if options.method == "bits":
        how |= {"probes": options.probes, "tolerance": options.tolerance}
    else:
        how |= {"levels": options.levels, "noises": options.noises, "reference": options.reference}
        how |= {"least_noise": options.least_noise} if options.method != "reconstruction" else {}
    for text in rows.notes:
        note(text)
    if options.method == "ratio":
        note(RATIO.format(model=options.source, reference=options.reference or "what it was tuned from"))
    errors = None
    with waiting("scoring"):
        if options.method == "bits":
            found, errors = score_with_error(run, rows.values, note, **how)
        else:
            normal = None if options.normal is None else read_rows(options.normal, shape, part="train").values
            found = scored(run, rows.values, options.method, normal=normal, **how)
    lines: list[dict[str, Any]] = []
    for i, value in enumerate(found.tolist()):
        line: dict[str, Any] = {"row": i, options.method: value}
        if errors is not None:
            line["standard_error"] = float(errors[i])
        if rows.labels is not None:
            line["label"] = rows.labels[i]
        lines.append(line)
    write_lines(lines, options.out)
    if options.out is not None:
        print(
            f"{len(lines):,} rows by {options.method}: mean {found.mean():.4g}, from {found.min():.4g} to {found.max():.4g}"
        )
        print(f"scores     {options.out}; larger is more abnormal")
    return 0


def note(text: str) -> None:
    """Beside the table, which may go to the same screen."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def write_lines(lines: list[dict[str, Any]], path: Path | None) -> None:
    """As csv, or as JSON lines where the file says so."""
    if path is not None and path.suffix == ".jsonl":
        text = "".join(json.dumps(line) + "\n" for line in lines)
    else:
        names = list(lines[0])
        rows = [",".join(names), *(",".join(_cell(line[name]) for name in names) for line in lines)]
        text = "\n".join(rows) + "\n"
    if path is None:
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    text = f"{value:.8g}" if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n') else text
