"""The command `facts`: stylised facts of a learned series model's samples, of a run's that tuned one, beside the data's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..support.errors import SettingError
from ..support.seeds import LARGEST
from .parser import Parser, whole

if TYPE_CHECKING:
    from torch import Tensor

LAGS, ENOUGH = 20, 100  # rows ahead; rows that are worth measuring


def facts_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("source", metavar="RUN_DIR|MODEL", help="a model that `pretrain --window` learned, or a run that tuned one")
    add("--data", type=Path, metavar="PATH", help="the table [default the one that the model was learned from]")
    add("--samples", type=whole(20), default=1000, metavar="INT", help="windows to draw [default 1000]")
    add("--steps", type=whole(1), metavar="INT", help="steps of a path [default those of training]")
    add("--solver", metavar="NAME", help="known name or file.py:name [default that of training]")
    add("--grid", metavar="NAME", help="times of the steps, as of train --grid [default that of training]")
    add("--seed", type=whole(0, LARGEST), default=0, metavar="INT", help="of the samples [default 0]")
    add("--out", type=Path, default=Path("facts.png"), metavar="FILE", help="the picture [default facts.png]")


def facts(options: argparse.Namespace) -> int:
    """Print a table, write the picture."""
    from ..api.saved_run import SavedRun
    from ..recipes.own_model import is_own_model, read_about
    from ..report.numbers import side_by_side
    from ..report.progress import waiting
    from ..report.series_figures import draw_facts
    from ..runs.source import open_source
    from ..support.own_data import read_data
    from ..training.config import updated

    source = open_source(options.source)
    folder = Path(source.recipe.name)
    about = read_about(folder) if is_own_model(folder) else {}
    if about.get("kind") != "series":
        raise SettingError(
            f"{options.source} is no model of series from `scoreact pretrain`; give one, or a run of one."
        )
    length, values = about["shape"][1], about.get("values", "levels")
    if values != "returns":
        raise SettingError(
            f"{folder} was learned of levels, or by an older version, and these are facts of returns: pretrain with --values "
            "returns."
        )
    if length <= LAGS:
        raise SettingError(
            f"{folder} has windows of {length} rows, and facts look {LAGS} rows ahead: pretrain with a longer --window."
        )
    data = read_data(options.data or about["data"], window=length, values=values, columns=about["columns"])
    run = SavedRun(source)
    if options.grid is not None:
        run.config = updated(run.config, {"grid": options.grid})
    rows, later = (len(part) + length - 1 for part in (data.train, data.heldout))
    laws: dict[str, Tensor] = {"real": data.train.values}
    if later >= ENOUGH:
        laws["held out"] = data.heldout.values
    with waiting("facts"):
        for name, reference in (("pretrained", True), *((("tuned", False),) if source.folder is not None else ())):
            drawn = run.sample(
                count=options.samples,
                steps=options.steps,
                solver=options.solver,
                seed=options.seed,
                reference=reference,
            )
            laws[name] = drawn.cpu()
        draw_facts(laws, options.out, LAGS)
    columns = [numbers(law) for law in laws.values()]
    print(
        "\n".join(
            side_by_side(["mean over columns", *laws], [[name, *(c[name] for c in columns)] for name in columns[0]])
        )
    )
    shown = "held out are those after them" if later >= ENOUGH else f"the {later} held out are too few to measure"
    print(f"\nreal are {rows:,} rows, {rows // length} windows without overlap; {shown}.\npicture    {options.out}")
    return 0


def numbers(law: Tensor) -> dict[str, str]:
    """What the table says of windows [N, C, L] of returns."""
    from ..evaluation.stylised_facts import series_facts
    from ..evaluation.value_at_risk import expected_shortfall, value_at_risk

    found = series_facts(law, LAGS)
    together = law.double().mean(1).flatten()
    channels = law.shape[1]
    apart = (float(found.correlation.sum()) - channels) / max(1, channels * (channels - 1))
    return {
        "standard deviation": f"{float(found.std.mean()):.4f}",
        "excess kurtosis": f"{float(found.kurtosis.mean()):.2f}",
        "tail exponent, losses": f"{float(found.tail_losses.mean()):.2f}",
        "tail exponent, gains": f"{float(found.tail_gains.mean()):.2f}",
        "autocorrelation of r, lag 1": f"{float(found.acf[:, 0].mean()):.3f}",
        "autocorrelation of |r|, lag 1": f"{float(found.acf_abs[:, 0].mean()):.3f}",
        f"autocorrelation of |r|, lag {LAGS}": f"{float(found.acf_abs[:, -1].mean()):.3f}",
        "leverage, lags 1 to 5": f"{float(found.leverage[:, :5].mean()):.3f}",
        "correlation of two columns": f"{apart:.3f}" if channels > 1 else "",
        "value at risk 99 %, equal weights": f"{value_at_risk(together):.4f}",
        "expected shortfall 99 %": f"{expected_shortfall(together):.4f}",
    }
