"""A black box on a text-to-image pipeline: how much each rule gains for its reward calls, network calls, CPU time and path KL.

    python benchmarks/black_box.py shapes --peer peer/bin/python --out benchmarks/black_box-shapes.jsonl
    python benchmarks/black_box.py shapes --out benchmarks/black_box-shapes.jsonl --table      # of the runs that are there
    python benchmarks/black_box.py shapes --out benchmarks/black_box-shapes.jsonl --table --page docs/results/black-box.md

`shapes` is a folder of `shapes.py pretrain` or `counting.py pretrain`; `peer_trl.py` says how to make the peer's environment.
Every run is a process of its own with one thread in float32, on the same weights, captions, reward, guidance, ten steps and
LoRA rank. Each rule has TRIALS settings on seed 0; the one that gains most goes on to the other seeds, and with few rewards
the one that is at DDPO's end with the fewest network calls. What a rule gains is the reward of 240 held-out pictures less that
of the pretrained model's, both drawn as the rule draws in training and outside its clock.
"DDPO's end" is what TRL's best setting gains in all its epochs, on average over the seeds. A cost to reach it is read off
between two looks on the straight line; a run that does not reach it counts as infinite. The path KL of TRL's policy is that
of its saved adapter under our ten steps. Resumable: runs that are in the file are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from page_tables import put
from trl_side_by_side import HELDOUT, Bench, Run, own, peer

EPOCHS, LOOK = 40, 8  # of DDPO: 1,280 paths, and a look every 8 epochs
INFINITE = math.inf

SURROGATE: Run = {
    "algorithm": "ctrl_pathwise", "value": "surrogate", "kl_weight": 0.1, "act_until": 0.7, "kl_states": 64,
    "reference_batches": 3, "minibatch_size": 48,
}  # fmt: skip
FEW: Run = {
    **SURROGATE, "scored_samples": 16, "iterations": 4, "evaluate_every": 1, "batch_size": 48, "reuse_reference": 1,
}  # fmt: skip
RIDGE = {"surrogate_decoder": "ridge"}  # else the VAE
EQUAL: Run = {**SURROGATE, "iterations": 20, "evaluate_every": 4, "average": 0.5, "reference_batches": 6}
TRIALS: dict[str, list[Run]] = {
    "trl": [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2, 3e-2)],
    "few": [
        {**FEW, **decoder, "reference_batches": first, "learning_rate": rate, "max_kl": most}
        for first, decoder in ((2, RIDGE), (3, RIDGE), (2, {}))
        for rate, most in ((4e-3, 0.5), (1e-2, 2.0))
    ],
    "equal": [{**EQUAL, "learning_rate": rate, "batch_size": 48} for rate in (2e-3, 4e-3)],
    "ddpo": [{"algorithm": "ddpo", "minibatch_size": 32, "learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3, 8e-3)],
    "flow_grpo": [
        {"algorithm": "flow_grpo", "minibatch_size": 32, "group_size": 4, "learning_rate": r}
        for r in (1e-3, 2e-3, 4e-3, 8e-3)
    ],
    "draft": [
        {"algorithm": "draft", "last_steps": 5, "kl_weight": 0.01, "learning_rate": rate, "iterations": 30}
        for rate in (1e-2,)
    ],
}
NAMES = {
    "trl": "TRL 0.23.1 `DDPOTrainer`", "few": "`ctrl_pathwise --value surrogate`, few rewards",
    "equal": "`ctrl_pathwise --value surrogate`, as many rewards", "ddpo": "`ddpo`", "flow_grpo": "`flow_grpo`",
    "draft": "`draft`, with the reward's gradient",
}  # fmt: skip


def plan(rule: str, folder: str, trial: Run, seed: int, adapters: str) -> Run:
    """What one run is."""
    looking = {"epochs": EPOCHS, "heldout": HELDOUT, "look": LOOK, "seed": seed}
    if rule == "trl":
        rate = trial["learning_rate"]
        return peer(folder, **looking, learning_rate=rate, save=f"{adapters}/{Path(folder).name}-{rate:g}-{seed}")
    return own(folder, trial, **looking)


def points(rule: str, found: Run) -> list[dict[str, float]]:
    """At each look: the gain, and what was spent until then."""
    start, table = found["looks"][0][1], []
    for number, (seconds, reward) in enumerate(found["looks"]):
        if rule == "trl":
            paths = 32.0 * LOOK * number
            reward_calls, network_calls, kl = paths, 20 * paths, found["path_kl"] if paths else 0.0
        else:
            reward_calls, network_calls, kl = found["costs"][number]
        row = {"gain": reward - start, "cpu": seconds, "rewards": reward_calls, "network": network_calls, "kl": kl}
        table.append(row)
    return table


def reached(table: list[dict[str, float]], target: float, cost: str) -> float:
    """The cost at which the gain is `target`."""
    for before, after in itertools.pairwise(table):
        if after["gain"] >= target:
            share = (target - before["gain"]) / (after["gain"] - before["gain"])
            return before[cost] + max(0.0, share) * (after[cost] - before[cost])
    return INFINITE


def add_path_kl(run: Run, found: Run) -> None:
    """TRL does not know its own."""
    if run["who"] == "trl":
        found["path_kl"] = path_kl(run["folder"], run["save"])


def path_kl(folder: str, adapter: str) -> float:
    """Of a policy that diffusers' form of an adapter makes, to the pipeline without it: nats, 240 held-out paths."""
    import torch
    from text_to_image import captions_of

    from scoreact.control.policy import Policy
    from scoreact.dynamics.solvers import SOLVERS
    from scoreact.evaluation.evaluate import evaluate
    from scoreact.models.pipelines.opening import pipeline_model
    from scoreact.training.config import Config

    model = pipeline_model(folder, lora=adapter, lora_reference="base", guidance_scale=2.0, vae_slicing=False)
    config = Config(steps=10)
    ts, sde = config.times(model.schedule), config.sde(model.schedule)

    def nothing(samples: Any, condition: Any) -> Any:
        return torch.zeros(len(samples))

    found = evaluate(Policy(model), sde, SOLVERS["ddim"], ts, nothing, captions_of(folder), 1.0, HELDOUT, 1_000_003)
    return found["policy/kl"]


class Sides:
    """The runs of each rule, at its best setting."""

    def __init__(self, bench: Bench, folder: str, seeds: int, adapters: str, made: bool) -> None:
        self.bench, self.folder, self.seeds, self.adapters, self.made = bench, folder, seeds, adapters, made

    def run(self, rule: str, trial: Run, seed: int) -> list[dict[str, float]]:
        run = plan(rule, self.folder, trial, seed, self.adapters)
        if self.made and not self.bench.knows(run):
            raise LookupError
        return points(rule, self.bench(run))

    def target(self) -> float:
        """What DDPO gains in all, on average over its seeds: "DDPO's end"."""
        return statistics.fmean(run[-1]["gain"] for run in self.best("trl"))

    def best(self, rule: str) -> list[list[dict[str, float]]]:
        """Of every seed that was run, at the setting that is best on seed 0."""
        target = self.target() if rule == "few" else 0.0

        def worth(run: list[dict[str, float]]) -> tuple[float, float]:
            return (-reached(run, target, "network") if rule == "few" else 0.0, run[-1]["gain"])

        trials = []
        for trial in TRIALS[rule]:
            try:
                trials.append((worth(self.run(rule, trial, 0)), trial))
            except LookupError:
                continue
        if not trials:
            return []
        trial = max(trials, key=lambda pair: pair[0])[1]
        runs = []
        for seed in range(self.seeds):
            try:
                runs.append(self.run(rule, trial, seed))
            except LookupError:
                break
        return runs


def interval(values: list[float]) -> str:
    """Mean and half width of its 95 % interval by Student's t."""
    t = {2: 12.7, 3: 4.3, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(len(values), 1.96)
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    return f"{statistics.fmean(values):+.3f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def number(value: float) -> str:
    return "never" if value == INFINITE else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def table(sides: Sides, rules: list[str]) -> list[str]:
    """What each rule gains in all, and what it spends until DDPO's end: medians over the seeds."""
    theirs = sides.best("trl")
    target = sides.target()
    kl = statistics.fmean(run[-1]["kl"] for run in theirs)
    lines = [
        f"DDPO's end: a gain of {target:+.3f} on average over {len(theirs)} seeds, at a path KL of {kl:.1f} nats. Costs until "
        "a run has gained that: medians over seeds.",
        "",
        "| rule | seeds | gain in all | reward calls in all | path KL in all | reward calls to DDPO's end | network calls "
        "| CPU s | path KL there |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rule in rules:
        runs = theirs if rule == "trl" else sides.best(rule)
        if not runs:
            continue
        if rule == "trl":  # its end is where it ends, as some seeds do not gain the mean
            spent = [runs[0][-1][cost] for cost in ("rewards", "network")]
            spent += [statistics.median(run[-1][cost] for run in runs) for cost in ("cpu", "kl")]
        else:
            spent = [
                statistics.median(reached(run, target, cost) for run in runs)
                for cost in ("rewards", "network", "cpu", "kl")
            ]
        last = [run[-1] for run in runs]
        cells = [
            NAMES[rule], str(len(runs)), interval([row["gain"] for row in last]),
            number(statistics.median(row["rewards"] for row in last)),
            f"{statistics.fmean(row['kl'] for row in last):.2g}", *(number(cost) for cost in spent[:3]),
            "never" if spent[3] == INFINITE else f"{spent[3]:.2g}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def made(folder: str, out: Path, seeds: int = 5) -> str:
    """The table of the runs in a file."""
    return "\n".join(table(Sides(Bench(out, None), folder, seeds, "adapters", True), list(TRIALS)))


COLOURS = {
    "trl": "#7a838c",
    "few": "#0f62a8",
    "equal": "#8ec1e6",
    "ddpo": "#b8860b",
    "flow_grpo": "#a0522d",
    "draft": "#1b7f4b",
}


def draw(sides: Sides, rules: list[str], path: Path) -> None:
    """Gain over reward calls and over path KL, a line a seed; TRL knows its path KL at the end only."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for rule in rules:
        for number, run in enumerate(sides.best(rule)):
            label = NAMES[rule].replace("`", "") if number == 0 else None
            axes[0].plot(
                [r["rewards"] for r in run[1:]], [r["gain"] for r in run[1:]], ".-", color=COLOURS[rule], label=label
            )
            known = run[-1:] if rule == "trl" else run[1:]
            axes[1].plot([r["kl"] for r in known], [r["gain"] for r in known], ".-", color=COLOURS[rule])
    axes[0].set(xscale="log", xlabel="reward calls", ylabel="gain in held-out reward, nats")
    axes[1].set(xscale="log", xlabel="path KL, nats")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--peer", metavar="PYTHON", help="of the peer's environment; only for runs not yet in --out")
    parser.add_argument("--out", type=Path, required=True, help="the runs, as JSON lines")
    parser.add_argument("--rules", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--adapters", default="adapters", help="where TRL's adapters are kept for their path KL")
    parser.add_argument("--table", action="store_true", help="run nothing; of the runs that are there")
    parser.add_argument("--page", type=Path, help="put the table between the task's marks of this page")
    parser.add_argument("--picture", type=Path, help="a PNG of the gains over reward calls and path KL")
    arguments = parser.parse_args()
    sides = Sides(
        Bench(arguments.out, arguments.peer, add_path_kl), arguments.folder, arguments.seeds, arguments.adapters,
        arguments.table,
    )  # fmt: skip
    if not arguments.table:
        for rule in arguments.rules:
            sides.best(rule)
    found = "\n".join(table(sides, arguments.rules))
    print(found)
    if arguments.page is not None:
        name = Path(arguments.folder).name
        put(f"{found}\n", arguments.page, (f"<!-- {name} -->\n", f"<!-- /{name} -->"))
    if arguments.picture is not None:
        draw(sides, arguments.rules, arguments.picture)


if __name__ == "__main__":
    main()
