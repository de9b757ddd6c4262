"""Trained by `sa.calibrate` from the pretrained model of `markets.py`: stylised facts repaired, and scenarios.

    python benchmarks/market_scenarios.py run --data stocks.csv --work markets --out benchmarks/market_scenarios.jsonl
    python benchmarks/market_scenarios.py table --out benchmarks/market_scenarios.jsonl --page docs/results/markets.md

`stocks.csv` and `markets`: those of `markets.py run`. Parts, a seed each: `repair`, the shape of a window's days that the
model misses; `loss`, P(loss of a window > value at risk at 95 %) = 25 %; `shock`, a fall of the
last share by 8 % over the last five days, whose mean and spread are given, so that the law of the other shares given it stays
the model's; `tail`, on the Gaussian mixture of the recipe `gaussian`, an event of probability 0.001 made 0.25, in rounds,
and `once`, at once with as many iterations. Resumable: what is in the file is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import markets
import torch
from torch import Tensor

import scoreact as sa
from scoreact.api import calibrate
from scoreact.api.calibrate import Calibration
from scoreact.evaluation.metrics import confidence_interval
from scoreact.evaluation.value_at_risk import value_at_risk
from scoreact.recipes.base import recipes

TRAIN: dict[str, Any] = {
    "algorithm": "adjoint_matching", "reward_gradient": "exact", "learning_rate": 1e-3, "decay_from": 0.3, "average": 0.85,
    "batch_size": 64, "minibatch_size": 512, "iterations": 40, "reference_batches": 4, "heldout_samples": 256,
    "evaluate_every": 1000, **markets.PATH,
}  # fmt: skip
SAMPLES, TOLERANCE = {"repair": 800, "loss": 2000, "shock": 800, "tail": 1600}, 0.1
ROUNDS = {"repair": 6, "loss": 6, "shock": 6, "tail": 6}
SOFT = 0.03  # log-return within which a loss passes from below the limit to above, so that there is a gradient
TARGET = 0.25  # probability of a loss beyond the limit
PARTS = ("repair", "loss", "shock", "tail", "once")
LEVEL = 0.95
TAIL = {"limit": 2.3, "soft": 0.2}  # of x on the recipe gaussian, where P(x > limit) is 0.001
OF_TAIL: dict[str, Any] = {
    "algorithm": "adjoint_matching", "reward_gradient": "exact", "iterations": 20, "batch_size": 128, "steps": 20,
    "heldout_samples": 64, "reference_batches": 2, "evaluate_every": 1000,
}  # fmt: skip
SEEDS = {"repair": 1, "loss": 1, "shock": 1, "tail": 5, "once": 5}
MARKS = ("<!-- trained -->\n", "<!-- /trained -->\n")
NAMES = {
    "repair": "repair", "loss": "loss beyond VaR 95 %", "shock": "index falls by 8 % in 5 days",
    "tail": "tail of the mixture, in rounds", "once": "the same, at once",
}  # fmt: skip
STATISTICS = {
    "shape[0]": "mean \\|r\\| over root mean square", "shape[1]": "log volatility", "last_days[0]": "index over 5 days",
    "last_days[1]": "its square", "fall": "P, softly", "beyond": "P", "far": "P, softly", "past": "P",
    "other_facts[0]": "\\|r_t r_(t+1)\\|", "other_facts[1]": "\\|r_t r_(t+20)\\|", "other_facts[2]": "r_t r_(t+1)",
}  # fmt: skip


# --- statistics of windows [n, C, 64] ------------------------------------------------------------------------------------


def shape(returns: Tensor) -> Tensor:
    """Mean |r| over the root of mean r^2, and the logarithm of that root in percent; means over shares: [n, 2]."""
    root = returns.square().mean(2).sqrt()
    return torch.stack([(returns.abs().mean(2) / root).mean(1), (100 * root).log().mean(1)], dim=1)


def other_facts(returns: Tensor) -> Tensor:
    """In percent: mean |r_t r_(t + k)| at lags 1 and 20, and r_t r_(t + 1): [n, 3]."""
    r = 100 * returns
    size = r.abs()
    columns = [(size[..., :-k] * size[..., k:]).mean((1, 2)) for k in (1, 20)]
    return torch.stack([*columns, (r[..., :-1] * r[..., 1:]).mean((1, 2))], dim=1)


def fall(returns: Tensor, limit: float, soft: float = SOFT) -> Tensor:
    """1 where equal weights lose more than `limit` in a window, else 0; softly."""
    return torch.sigmoid((-returns.mean(1).sum(1) - limit) / soft)


def beyond(returns: Tensor, limit: float) -> Tensor:
    return (-returns.mean(1).sum(1) > limit).to(returns.dtype)


def last_days(returns: Tensor) -> Tensor:
    """Log-return of the last share over the last days, and its square: [n, 2]."""
    s = returns[:, -1, -markets.DAYS :].sum(1)
    return torch.stack([s, s.square()], dim=1)


def far(x: Tensor) -> Tensor:
    """Of points [n, 2]: 1 where x is past the limit, else 0; softly."""
    return torch.sigmoid((x[:, 0] - TAIL["limit"]) / TAIL["soft"])


def past(x: Tensor) -> Tensor:
    return (x[:, 0] > TAIL["limit"]).to(x.dtype)


def of_others(returns: Tensor) -> Tensor:
    """That of the other shares: [n, C - 1]."""
    return returns[:, :-1, -markets.DAYS :].sum(2)


def differentiable(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    found = partial(function, **options)
    found.differentiable, found.__name__ = True, function.__name__  # type: ignore[attr-defined]
    return found


# --- running -------------------------------------------------------------------------------------------------------------


def trained(
    model: Path | str, statistic: Callable[..., Tensor], targets: list[float], also: Callable[..., Tensor], **how: Any
) -> tuple[Calibration, dict[str, Any]]:
    """A calibration, and of it what the table says."""
    found = sa.calibrate(
        model, statistic, targets, also=also, tolerance=TOLERANCE, progress=False, report=False, say=print, **how
    )  # fmt: skip
    kept = ("met", "statistics", "path_kl", "path_kl_se", "least_kl", "least_kl_se", "effective_samples", "trusted")
    facts = {name: found.facts[name] for name in kept}
    facts["moved"] = [row for row in found.facts["moved"] if also.__name__ in row["name"]]
    facts["rounds"] = [
        {"share": r["share"], "means": r["means"], "path_kl": r["path_kl"]} for r in found.facts["rounds"]
    ]
    return found, facts


def run(market: markets.Market, work: Path, lines: markets.Lines, part: str, seed: int) -> None:
    model, how = work / "pretrained", {**TRAIN, "samples": SAMPLES[part], "rounds": ROUNDS[part], "seed": seed}
    before = markets.drawn(model, 4000, 7).double()
    if part == "repair":
        goal = shape(market.windows.double()).mean(0).tolist()
        found, facts = trained(model, differentiable(shape), goal, differentiable(other_facts), **how)
        facts["other_goal"] = other_facts(market.windows.double()).mean(0).tolist()
        samples = found.result.sample(count=markets.SAMPLES, seed=seed)
        facts["distances"] = markets.measured(market, samples.cpu(), seed)
    elif part == "shock":
        goal = [markets.SHOCK, markets.SHOCK**2 + markets.WIDTH**2]
        found, facts = trained(model, differentiable(last_days), goal, differentiable(of_others), **how)
        weights, law = markets.nearest_law(last_days(before), torch.tensor(goal))
        facts |= {"reweighted": (weights @ of_others(before)).tolist(), "reweighted_effective": law["effective"]}
        facts["columns"] = list(market.columns)
    else:
        limit = value_at_risk(before.mean(1).sum(1), LEVEL)
        statistic, hard = differentiable(fall, limit=limit), differentiable(beyond, limit=limit)
        _, facts = trained(model, statistic, [TARGET], hard, **how)
        weights, law = markets.nearest_law(fall(before, limit)[:, None], torch.tensor([TARGET]))
        facts |= {
            "limit": limit,
            "reweighted": float(weights @ beyond(before, limit)),
            "reweighted_effective": law["effective"],
        }
    lines.add(part, seed, facts)


def tail(lines: markets.Lines, part: str, seed: int) -> None:
    """An event of probability 0.001, in rounds or at once, with as many iterations, where the nearest law is known."""

    how: dict[str, Any] = {**OF_TAIL, "rounds": ROUNDS["tail"], "seed": seed}
    if part == "once":
        how |= {"rounds": 1, "iterations": ROUNDS["tail"] * OF_TAIL["iterations"]}
    least = calibrate.LEAST
    try:
        if part == "once":
            calibrate.LEAST = 0  # a round may then go all of the way, however few samples that leaves
        _, facts = trained("gaussian", differentiable(far), [TARGET], past, samples=SAMPLES["tail"], **how)
    finally:
        calibrate.LEAST = least
    exact = recipes()["gaussian"].build().model.base.sample(1_000_000, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    _, law = markets.nearest_law(far(exact.double())[:, None], torch.tensor([TARGET]))
    lines.add(part, seed, {**facts, "exact_kl": law["kl"]})


# --- showing -------------------------------------------------------------------------------------------------------------


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: what was asked for, reached and paid; and how the other shares fall with the index."""
    heads = (
        "scenario",
        "mean of",
        "before",
        "target",
        "after",
        "lambda",
        "path KL",
        "least KL",
        "worth, samples",
        "seeds",
    )
    rows = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    by = {part: [line for line in lines if line["law"] == part] for part in PARTS}
    for part, own in by.items():
        for j in range(len(own[0]["statistics"]) if own else 0):
            each = [line["statistics"][j] for line in own]
            cells = [_cell([row[name] for row in each]) for name in ("before", "target", "after", "weight")]
            whole = ["", "", "", ""]
            if j == 0:
                whole = [_cell([line[name] for line in own], 2) for name in ("path_kl", "least_kl")]
                whole += [_cell([line["effective_samples"] for line in own], 0), str(len(own))]
            rows.append(
                f"| {'' if j else NAMES[part]} | {STATISTICS[each[0]['name']]} | {' | '.join([*cells, *whole])} |"
            )
        for j in range(len(own[0]["moved"]) if own and part != "shock" else 0):
            each = [line["moved"][j] for line in own]
            goal = f"not asked for{', real ' + format(own[0]['other_goal'][j], '.4g') if part == 'repair' else ''}"
            cells = [_cell([row["before"] for row in each]), goal, _cell([row["after"] for row in each])]
            rows.append(f"| | {STATISTICS[each[0]['name']]} | {' | '.join(cells)} | | | | | |")
    if by["shock"]:
        columns = by["shock"][0]["columns"]
        rows += ["", f"| fall over 5 days as a share of {columns[-1]}'s | {' | '.join(columns[:-1])} |"]
        rows += ["| --- |" + " --- |" * (len(columns) - 1)]
        worth = by["shock"][0]["reweighted_effective"]
        trained_to = [_cell([_shares(line)[0][j] for line in by["shock"]], 2) for j in range(len(columns) - 1)]
        reweighted = [f"{share:.2f}" for share in _shares(by["shock"][0])[1]]
        rows += [
            f"| trained | {' | '.join(trained_to)} |",
            f"| reweighted, worth {worth:.0f} of 4,000 | {' | '.join(reweighted)} |",
        ]
    pairs = [(a, b) for a in by["tail"] for b in by["once"] if a["seed"] == b["seed"]]
    if pairs:
        off = [[abs(line["statistics"][0]["after"] - TARGET) for line in pair] for pair in pairs]
        cells = [_cell([x[0] for x in off], 2), _cell([x[1] for x in off], 2), _cell([x[1] - x[0] for x in off], 2)]
        rows += ["", "| distance from 25 %, in rounds | at once | difference, seed by seed |", "| --- | --- | --- |"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _shares(line: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By how much the others moved for each unit that the last share moved: trained, and reweighted."""
    index, moved = line["statistics"][0], line["moved"]
    trained_to = [row["change"] / (index["after"] - index["before"]) for row in moved]
    asked = index["target"] - index["before"]
    return trained_to, [(x - row["before"]) / asked for x, row in zip(line["reweighted"], moved, strict=True)]


def _cell(found: list[float | None], digits: int = 4) -> str:
    """Mean and half-width of the seeds; none where no samples say it. digits: 4 significant ones, or so many decimals."""
    values = [x for x in found if x is not None]
    if not values:
        return "none"
    mean, half = confidence_interval(values)
    text = format(mean, ".4g" if digits == 4 else f".{digits}f")
    return text + (f" ± {half:.2g}" if len(values) > 1 and half > 0 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("--data", type=Path, help="a table of levels, a column a share")
    parser.add_argument("--work", type=Path, default=Path("markets"), help="the model of markets.py [default markets]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", help="[default 0, 1, 2 of most parts]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/market_scenarios.jsonl"))
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = markets.Lines(options.out)
    if options.part == "table":
        markets.show(table(lines.lines), options.page, MARKS)
        return 0
    market = markets.Market(options.data, options.work) if set(options.only) - {"tail", "once"} else None
    for part in options.only:
        for seed in options.seeds or range(SEEDS[part]):
            if not lines.has(part, seed):
                tail(lines, part, seed) if part in ("tail", "once") else run(market, options.work, lines, part, seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
