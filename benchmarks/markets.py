"""Five shares as windows of 64 daily returns: what GARCH, EGARCH, a pretrained model and its samples reweighted get right.

    python benchmarks/markets.py run --data stocks.csv --work markets --out benchmarks/markets.jsonl
    python benchmarks/markets.py table --out benchmarks/markets.jsonl --page docs/results/markets.md
    python benchmarks/markets.py figure --data stocks.csv --work markets --out docs/results/markets.png
    python benchmarks/markets.py run --packaged indices --work indices --out benchmarks/markets_indices.jsonl
    python benchmarks/markets.py table --out benchmarks/markets_indices.jsonl --mark indices --page docs/results/markets.md

`stocks.csv`: a column of levels a share and one of dates. The first 80 % of the days are learned from, of which `pretrain`
keeps its last tenth out to choose its weights by; the rest is used to test value at risk alone. `run` pretrains once; then, a
seed each, it draws from every law and measures; then it reweights samples of the pretrained model to the law of minimum KL with
the real windows' statistics, and to scenarios. Resumable: what is in the files is not made again. Needs `arch`.
The floor: as many windows of the real days as there are without overlap, drawn anew with replacement, against all; for the
networks' scores, every other tenth of the time against the rest.
GARCH and EGARCH: Student's errors, a fit a share; the standardised residuals of a day are drawn together (filtered historical
simulation), which keeps the correlations.
`--packaged`: tables that `arch` ships, written as a csv into `--work`: `indices`, S&P 500 and NASDAQ, 1999 to 2018; `vix`, the
CBOE's index of volatility of 2014 to 2018. Of them nothing is reweighted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page_tables import put
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.samplers import SAMPLERS
from scoreact.evaluation.metrics import confidence_interval
from scoreact.evaluation.optimum import estimate_optimum
from scoreact.evaluation.series_scores import convolution_distance, discriminative_score, predictive_score
from scoreact.evaluation.stylised_facts import fact_distances, marginal_distance, series_facts
from scoreact.evaluation.value_at_risk import christoffersen, expected_shortfall, kupiec, value_at_risk
from scoreact.recipes.own_model import own_recipe
from scoreact.report.series_figures import draw_facts
from scoreact.sampling.draw import draw
from scoreact.support.own_data import read_data
from scoreact.training.calibration import Samples
from scoreact.training.config import Config
from scoreact.types import Condition

WINDOW, LAGS, LEARN = 64, 20, 0.8
SAMPLES, SEEDS, LEVEL = 1000, 5, 0.99
PRETRAIN: dict[str, Any] = {"steps": 1000, "width": 16, "bfloat16": "no", "seed": 0}
PATH: dict[str, Any] = {"solver": "euler_maruyama", "grid": "log_snr", "steps": 40}
PATHS: tuple[dict[str, Any], ...] = (
    *({"solver": "ddim", "grid": "uniform", "steps": steps} for steps in (10, 40)),
    *({"solver": "euler_maruyama", "grid": "log_snr", "steps": steps} for steps in (20, 40, 160)),
)  # more steps tell the model's own spread from what few of them add
STRESS, TARGET = (0.95, 0.99), 0.5  # levels of value at risk, and how likely the scenario makes a loss beyond it
ENOUGH = 100  # effective samples
SHOCK, WIDTH, DAYS = -0.08, 0.02, 5  # log-return of the last share over the last days of a window, and how exactly
BETAS = (4.0, 1.0)  # kl_weight
MARKS = ("<!-- markets -->\n", "<!-- /markets -->\n")
PACKAGED = {"indices": ("sp500", "nasdaq"), "vix": ("vix",)}  # of arch.data
LAWS = ("floor", "GARCH", "EGARCH", "pretrained", "reweighted")
ROWS = {
    "std": "std, log ratio", "kurtosis": "excess kurtosis", "tail_losses": "tail exponent of losses",
    "tail_gains": "tail exponent of gains", "acf": "autocorrelation of r", "acf_abs": "autocorrelation of \\|r\\|",
    "leverage": "leverage effect", "correlation": "correlations of shares", "marginal": "marginals, Wasserstein",
    "convolution": "Frechet, random convolutions", "discriminative": "discriminative score", "predictive": "predictive score",
}  # fmt: skip


# --- data --------------------------------------------------------------------------------------------------------------


class Market:
    """Real returns: `learn` [C, days] and `test` [C, days]; `windows` [N, C, 64] of `learn`, at every day."""

    def __init__(self, path: Path, work: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        work.mkdir(parents=True, exist_ok=True)
        self.csv = work / "learn.csv"
        self.csv.write_text("\n".join(lines[: 1 + round(LEARN * (len(lines) - 1))]) + "\n", encoding="utf-8")
        days = self._days(path)
        known = self._days(self.csv)
        self.learn, self.test = known, days[:, known.shape[1] :]
        self.windows = self.learn.unfold(1, WINDOW, 1).transpose(0, 1)
        self.columns = read_data(self.csv, window=WINDOW, values="returns").columns

    @staticmethod
    def _days(path: Path) -> Tensor:
        data = read_data(path, window=4, values="returns")
        return torch.cat(
            [torch.cat([part.values[0], part.values[1:, :, -1].T], 1) for part in (data.train, data.heldout)], 1
        )

    def resampled(self, generator: torch.Generator) -> Tensor:
        """As many windows as there are without overlap, with replacement."""
        count = self.learn.shape[1] // WINDOW
        return self.windows[torch.randint(len(self.windows), (count,), generator=generator)]

    def halves(self) -> tuple[Tensor, Tensor]:
        """The windows that lie in every other tenth of the time, and those in the rest."""
        tenths = self.learn[:, : self.learn.shape[1] // 10 * 10].unflatten(1, (10, -1)).unfold(2, WINDOW, 1)
        parts = [tenths[:, k::2].permute(1, 2, 0, 3).flatten(0, 1) for k in (0, 1)]
        return parts[0], parts[1]


def packaged(name: str, path: Path) -> None:
    """Levels that `arch` ships, as a csv: the days that all columns have."""
    columns = {}
    for index in PACKAGED[name]:
        frame = import_module(f"arch.data.{index}").load()
        columns[index] = frame["Adj Close" if "Adj Close" in frame else index].dropna()
    days = sorted(set.intersection(*(set(column.index) for column in columns.values())))
    rows = [",".join([f"{day:%Y-%m-%d}", *(repr(float(column[day])) for column in columns.values())]) for day in days]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([",".join(["date", *columns]), *rows]) + "\n", encoding="utf-8")


# --- GARCH and EGARCH --------------------------------------------------------------------------------------------------


class Garch:
    """A volatility model a share, fitted by `arch`, whose residuals of one day are drawn together."""

    def __init__(self, returns: Tensor, kind: str) -> None:
        from arch import arch_model

        self.kind, self.scale = kind, 100.0  # arch fits percents
        self.mean, self.parameters, residuals, self.variance = [], [], [], []
        for series in (self.scale * returns.double()).numpy():
            form = {"vol": kind, "p": 1, "o": int(kind == "EGARCH"), "q": 1}
            fit = arch_model(series, mean="Constant", dist="t", **form).fit(disp="off")
            p = fit.params
            self.mean.append(p["mu"])
            self.parameters.append([p["omega"], p["alpha[1]"], p.get("gamma[1]", 0.0), p["beta[1]"]])
            residuals.append(fit.std_resid)
            self.variance.append(fit.conditional_volatility**2)
        self.residuals = np.stack(residuals)  # [C, days]
        self.mean = np.array(self.mean)
        self.parameters = np.array(self.parameters).T

    def next(self, variance: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The next day's variance, arch's parametrisation; [..., C]."""
        omega, alpha, gamma, beta = self.parameters
        if self.kind == "GARCH":
            return omega + alpha * variance * z**2 + beta * variance
        return np.exp(omega + alpha * (np.abs(z) - math.sqrt(2 / math.pi)) + gamma * z + beta * np.log(variance))

    def windows(self, count: int, seed: int, burn: int = 250) -> Tensor:
        """[count, C, 64] independent windows, from paths that began `burn` days earlier at the mean variance."""
        rng = np.random.default_rng(seed)
        variance = np.broadcast_to(np.mean(self.variance, axis=1), (count, len(self.mean)))
        days = []
        for _ in range(burn + WINDOW):
            z = self.residuals[:, rng.integers(self.residuals.shape[1], size=count)].T
            days.append(self.mean + np.sqrt(variance) * z)
            variance = self.next(variance, z)
        return torch.from_numpy(np.stack(days[burn:], axis=2) / self.scale)

    def ahead(self, days: Tensor, level: float) -> Tensor:
        """One-day-ahead value at risk of the equally weighted shares, day by day over [C, days] that follow the fit's."""
        variance = self.next(np.array([v[-1] for v in self.variance]), self.residuals[:, -1])
        found = []
        for day in (self.scale * days.double()).numpy().T:
            laws = (self.mean[:, None] + np.sqrt(variance)[:, None] * self.residuals).mean(0)
            found.append(-np.quantile(laws, 1 - level) / self.scale)
            variance = self.next(variance, (day - self.mean) / np.sqrt(variance))
        return torch.tensor(found)


# --- what the pretrained model misses ------------------------------------------------------------------------------------


def statistics_of(samples: Tensor, spread: Tensor) -> Tensor:
    """Of windows [B, C, L], whose channels have these standard deviations: [B, 6], means over channels and days.

    Of z = r / std: z^2; the share of |z| beyond 3, softly; |z_t z_(t + k)| at lags 1, 5, 20; and z_t z_(t + k)^2 over lags 1
    to 5 with z cut at 5.
    """
    z = samples / spread.reshape(1, -1, 1)
    size, cut = z.abs(), z.clamp(-5, 5)
    columns = [z.square().mean((1, 2)), torch.sigmoid((size - 3) / 0.2).mean((1, 2))]
    columns += [(size[..., :-k] * size[..., k:]).mean((1, 2)) for k in (1, 5, 20)]
    lever = [(cut[..., :-k] * cut[..., k:].square()).mean((1, 2)) for k in range(1, 6)]
    return torch.stack([*columns, torch.stack(lever).mean(0)], dim=1)


# --- measuring -----------------------------------------------------------------------------------------------------------


def portfolio(x: Tensor) -> Tensor:
    """The equally weighted shares: [..., C, L] -> [..., L]."""
    return x.double().mean(-2)


def nearest(samples: Tensor, windows: Tensor, spread: Tensor) -> float:
    """The median over samples of the largest correlation with a window that was learned from."""
    a, b = ((x.double() / spread.reshape(1, -1, 1)).flatten(1) for x in (samples, windows))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return float((a @ b.T).amax(1).median())


def measured(market: Market, samples: Tensor, seed: int, pair: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
    """Every row of the table. pair: real windows and others for the networks' scores, where those are not the samples."""
    real = market.windows.double()
    spread = real.transpose(0, 1).flatten(1).std(1)
    found = fact_distances(series_facts(real, LAGS), series_facts(samples, LAGS))
    found["marginal"] = float(marginal_distance(real, samples).mean())
    found["nearest"] = nearest(samples, market.windows, spread)
    one, other = pair or (market.windows, samples)
    gap = WINDOW if pair else 1
    found["convolution"] = convolution_distance(one, other, torch.Generator().manual_seed(seed))
    found["discriminative"] = discriminative_score(
        one, other, torch.Generator().manual_seed(seed), gap=WINDOW, generated_gap=gap, steps=100
    )
    found["predictive"] = predictive_score(one, other, torch.Generator().manual_seed(seed), steps=100)
    return found


def risk(market: Market, samples: Tensor) -> dict[str, float]:
    """Value at risk of one day, equally weighted shares, against the later years; one number for all days."""
    days, later = portfolio(samples).flatten(), portfolio(market.test)
    limit = value_at_risk(days, LEVEL)
    beyond = later[-later >= limit]
    shortfall = float(-beyond.mean()) if len(beyond) else math.nan
    return {**tested(-later > limit), "VaR": limit, "ES": expected_shortfall(days, LEVEL), "ES_later": shortfall}


def tested(hits: Tensor) -> dict[str, float]:
    return {
        "days": len(hits), "violations": int(hits.sum()), "kupiec": kupiec(hits, LEVEL).p_value,
        "christoffersen": christoffersen(hits, LEVEL).p_value,
    }  # fmt: skip


# --- running -------------------------------------------------------------------------------------------------------------


class Lines:
    """Measured lines, one a (law, seed), written as they are made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.lines = [json.loads(line) for line in text.splitlines()]

    def has(self, law: str, seed: int) -> bool:
        return any((line["law"], line["seed"]) == (law, seed) for line in self.lines)

    def add(self, law: str, seed: int, values: dict[str, Any]) -> None:
        line = {"law": law, "seed": seed, **values}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(law, seed, flush=True)


def drawn(model: Path, count: int, seed: int, path: dict[str, Any] = PATH) -> Tensor:
    """Windows of the pretrained model, by default as training draws them."""
    found = own_recipe(model).build().model
    assert isinstance(found, torch.nn.Module)
    times = Config(**path).times(found.eval().schedule)
    parts = [
        draw(found, [""] * 250, SAMPLERS[path["solver"]], times, 1000 * seed + k)[1] for k in range(-(-count // 250))
    ]
    return torch.cat(parts)[:count]


def run(market: Market, work: Path, lines: Lines, seeds: int, steps: int, reweight: bool) -> None:
    model = work / "pretrained"
    if not (model / "model.json").is_file():
        sa.pretrain(model, market.csv, window=WINDOW, values="returns", **{**PRETRAIN, "steps": steps})
    kinds = {kind: Garch(market.learn, kind) for kind in ("GARCH", "EGARCH")}
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        if not lines.has("floor", seed):
            lines.add("floor", seed, measured(market, market.resampled(generator), seed, market.halves()))
        laws: dict[str, Callable[[], Tensor]] = {kind: partial(kinds[kind].windows, SAMPLES, seed) for kind in kinds}
        laws["pretrained"] = partial(drawn, model, SAMPLES, seed)
        for name, law in laws.items():
            if not lines.has(name, seed):
                samples = law()
                lines.add(name, seed, {**measured(market, samples, seed), "risk": risk(market, samples)})
    for name, garch in kinds.items():
        if not lines.has(f"{name} ahead", 0):
            hits = -portfolio(market.test) > garch.ahead(market.test, LEVEL)
            lines.add(f"{name} ahead", 0, {"risk": tested(hits)})
    if not lines.has("later", 0):
        later = market.test.unfold(1, WINDOW, 1).transpose(0, 1)
        lines.add("later", 0, {"nearest": nearest(later, market.windows, market.learn.double().std(1))})
    for number, path in enumerate(PATHS):
        if not lines.has("path", number):
            std = series_facts(drawn(model, SAMPLES, 0, path)).std / series_facts(market.windows).std
            lines.add("path", number, {**path, "std": float(std.mean())})
    if reweight and not lines.has("shock", 0):
        scenarios(market, drawn(model, 4 * SAMPLES, 7), lines)


def scenarios(market: Market, before: Tensor, lines: Lines) -> None:
    """What the pretrained model's windows, reweighted, say of laws near to it: nothing is trained."""
    spread = market.learn.double().std(1)
    goal = statistics_of(market.windows.double(), spread).mean(0)
    weights, facts = nearest_law(statistics_of(before.double(), spread), goal)
    generator = torch.Generator().manual_seed(0)
    samples = before[torch.multinomial(weights, SAMPLES, replacement=True, generator=generator)]
    lines.add("reweighted", 0, {**measured(market, samples, 0), "risk": risk(market, samples), "nearest_law": facts})
    loss = -portfolio(before).sum(1)
    for level in STRESS:
        limit = value_at_risk(-loss, level)
        _, facts = nearest_law((loss > limit).double()[:, None], torch.tensor([TARGET]))
        p = float((loss > limit).double().mean())
        exact = TARGET * math.log(TARGET / p) + (1 - TARGET) * math.log((1 - TARGET) / (1 - p))
        lines.add(f"stress {level}", 0, {"VaR": limit, "exact_kl": exact, "nearest_law": facts})
    last = before.double()[..., -DAYS:].sum(-1)  # [n, C]
    log_likelihood = -0.5 * ((last[:, -1] - SHOCK) / WIDTH) ** 2
    stages = [
        {"kl_weight": beta, **estimate_optimum(log_likelihood, Condition([""] * len(last)), beta)} for beta in BETAS
    ]
    weights = torch.softmax(log_likelihood, 0)
    real = market.learn.double().unfold(1, DAYS, 1).sum(-1)
    slope = torch.stack([torch.cov(torch.stack([r, real[-1]]))[0, 1] for r in real]) / real[-1].var()
    lines.add("shock", 0, {
        "columns": list(market.columns), "stages": stages, "weighted": (weights @ last).tolist(),
        "effective": float(1 / weights.square().sum()),
        "regression": (real.mean(1) + slope * (weights @ last[:, -1] - real[-1].mean())).tolist(),
    })  # fmt: skip


def nearest_law(values: Tensor, goal: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Weights [n] of windows whose statistics are `values` [n, k], and what the law of minimum KL with those means is worth."""
    found = Samples(values, Condition([""] * len(values)), [str(j) for j in range(values.shape[1])]).solve(goal)
    facts = {"kl": found.kl, "kl_se": found.kl_se, "effective": found.effective, "solved": found.solved}
    return torch.softmax(values @ found.weights, 0), facts


# --- showing -------------------------------------------------------------------------------------------------------------


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: the distances from the real days, value at risk, and the scenarios."""
    by = {law: [line for line in lines if line["law"] == law] for law in dict.fromkeys(line["law"] for line in lines)}
    laws = [law for law in LAWS if law in by]
    rows = ["| distance from the real days | " + " | ".join(laws) + " |", "| --- |" + " --- |" * len(laws)]
    rows += [
        f"| {text} | " + " | ".join(_interval([x[name] for x in by[law]]) for law in laws) + " |"
        for name, text in ROWS.items()
    ]
    near = [_interval([x["nearest"] for x in by[law]]) for law in laws[1:]]
    rows.append(
        f"| nearest learned window, correlation (later years: {by['later'][0]['nearest']:.3f}) | | {' | '.join(near)} |"
    )
    days = by["GARCH"][0]["risk"]["days"]
    heads = (
        f"one-day value at risk at {LEVEL:.0%}",
        "VaR",
        f"violations in {days} days",
        "Kupiec p",
        "Christoffersen p",
        "ES",
    )
    rows += ["", f"| {' | '.join(heads)} | mean loss beyond |", "| --- |" + " --- |" * 6]
    for law in laws[1:]:
        found = [x["risk"] for x in by[law]]
        cells = [_range([x[name] for x in found], form) for name, form in RISK]
        rows.append(f"| {law}, one number for all days | " + " | ".join(cells) + " |")
    for law in ("GARCH ahead", "EGARCH ahead"):
        x = by[law][0]["risk"]
        rows.append(
            f"| {law.split()[0]}, each day anew | | {x['violations']} | {x['kupiec']:.2g} | {x['christoffersen']:.2g} | | |"
        )
    return "\n".join(rows + _paths(by.get("path", [])) + _scenarios(by)) + "\n"


RISK = (
    ("VaR", ".2%"),
    ("violations", "d"),
    ("kupiec", ".2g"),
    ("christoffersen", ".2g"),
    ("ES", ".2%"),
    ("ES_later", ".2%"),
)


def _paths(lines: list[dict[str, Any]]) -> list[str]:
    rows = [
        "",
        "| pretrained model drawn by | grid | steps | standard deviation over the real one's |",
        "| --- | --- | --- | --- |",
    ]
    return rows + [f"| {x['solver']} | {x['grid']} | {x['steps']} | {x['std']:.2f} |" for x in lines]


def _scenarios(by: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows: list[str] = []
    if "shock" in by:
        rows = ["", "| scenario | least KL | a formula's KL | worth, samples | trusted |", "| --- |" + " --- |" * 4]
    for law in ("reweighted", *(f"stress {level}" for level in STRESS)):
        for line in by.get(law, []):
            what = (
                "stylised facts of the real windows" if law == "reweighted" else f"P(loss > VaR {law[7:]}) = {TARGET:g}"
            )
            x, exact = line["nearest_law"], f"{line['exact_kl']:.2f}" if "exact_kl" in line else ""
            worth, kl = x["effective"], f"{x['kl']:.2f} ± {1.96 * x['kl_se']:.2f}"
            rows.append(f"| {what} | {kl} | {exact} | {worth:.0f} | {'yes' if worth >= ENOUGH else 'no'} |")
    for line in by.get("shock", []):
        rows += [
            "",
            f"| given {line['columns'][-1]} at {SHOCK:.0%} over {DAYS} days | " + " | ".join(line["columns"]) + " |",
        ]
        rows.append("| --- |" + " --- |" * len(line["columns"]))
        worth = f"pretrained, reweighted (worth {line['effective']:.0f} of {4 * SAMPLES:,})"
        for name, text in (("weighted", worth), ("regression", "real days, regression on the last")):
            rows.append(f"| {text} | " + " | ".join(f"{v:.1%}" for v in line[name]) + " |")
        rows += ["", "| kl_weight | worth, samples | J* trusted |", "| --- | --- | --- |"]
        for x in line["stages"]:
            worth, trusted = x["objective/effective_samples"], "yes" if x["objective/trusted"] else "no"
            rows.append(f"| {x['kl_weight']:g} | {worth:.0f} | {trusted} |")
    return rows


def _interval(values: list[float]) -> str:
    mean, half = confidence_interval(values)
    return f"{mean:.3f}" + (f" ± {half:.3f}" if len(values) > 1 else " (1 seed)")


def _range(values: list[float], form: str) -> str:
    texts = ["none" if math.isnan(x) else format(x, form) for x in sorted(values)]
    texts = list(dict.fromkeys(texts))
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def figure(market: Market, work: Path, path: Path) -> None:
    """The panels a quant looks at, of one seed."""
    laws = {"real": market.windows, "GARCH": Garch(market.learn, "GARCH").windows(SAMPLES, 0)}
    laws["pretrained"] = drawn(work / "pretrained", SAMPLES, 0)
    draw_facts(laws, path, LAGS)


def show(text: str, page: Path | None, marks: tuple[str, str]) -> None:
    """Print it, and put it between the marks of a page."""
    print(text)
    if page is not None:
        put(text, page, marks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table", "figure"])
    parser.add_argument("--data", type=Path, help="a table of levels, a column a share")
    parser.add_argument("--work", type=Path, default=Path("markets"), help="models and samples [default markets]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/markets.jsonl"))
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this page")
    parser.add_argument("--packaged", choices=PACKAGED, help="instead of --data: levels that `arch` ships")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of the samples [default {SEEDS}]")
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN["steps"], help=f"[default {PRETRAIN['steps']}]")
    parser.add_argument("--mark", default="markets", help="name of the marks in the page [default markets]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "table":
        marks = tuple(mark.replace("markets", options.mark) for mark in MARKS)
        show(table(Lines(options.out).lines), options.page, (marks[0], marks[1]))
        return 0
    if options.packaged is not None:
        options.data = options.work / f"{options.packaged}.csv"
        packaged(options.packaged, options.data)
    market = Market(options.data, options.work)
    if options.part == "run":
        run(market, options.work, Lines(options.out), options.seeds, options.pretrain_steps, options.packaged is None)
    else:
        figure(market, options.work, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
