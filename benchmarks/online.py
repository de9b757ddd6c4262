"""Rewards that turn round in the middle of a stream: how soon the policy follows, by window, and which rules may learn late.

    python benchmarks/online.py run                       # every arm and seed that online.jsonl lacks, minutes on one thread
    python benchmarks/online.py drift                     # the same stream, but the reward turns a little before every update
    python benchmarks/online.py data                      # no rewards, but examples whose law changes in the middle
    python benchmarks/online.py rules                     # which rules learn from paths that an older policy drew
    python benchmarks/online.py table --write             # the tables and the picture of docs/howto/online.md, of the lines

The stream: a Gaussian mixture in two dimensions and the reward a.x - |x|^2 / 4. In each round 64 samples of the present policy
are handed out, rewarded, and one update made. After 30 rounds a becomes -a. J is that of 1,000 fresh paths after every second
update. `share` is (J - J_ref) / (J_best - J_ref), where J_best is the J of the optimal control on the same time grid, known in
closed form; J* is that of continuous time. Arms differ in what they remember; `scratch` is a new run that begins from the
pretrained model at the change, told when that is.

`drift`: from round BEFORE on, a turns by TURN degrees a round, through half a circle. The lag of a policy is how long ago the
reward was the one that it suits best, that of least regret J_best - J; both are averaged over the drift's second half, where
the lag no longer grows.

`data`: in each round 64 examples come, 64 samples are handed out, and one `update(data=)` follows the newest examples at
kl_weight 1. They are drawn from the law that the reward LEAN . x tilts the mixture to, and after DATA_BEFORE rounds from that
of -LEAN . x, so that the best policy is known. Resumable: what stands in online.jsonl is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from page_tables import put

import scoreact as sa
from scoreact.api.saved_run import SavedRun
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.trajectory import Trajectory
from scoreact.control.transitions import Paths
from scoreact.dynamics.solvers import SOLVERS
from scoreact.evaluation.evaluate import evaluate
from scoreact.evaluation.metrics import confidence_interval
from scoreact.recipes.gaussian import build
from scoreact.rewards.closed_form import Quadratic
from scoreact.support.errors import Diverged
from scoreact.support.files import append_line, resume_lines
from scoreact.support.seeds import derived
from scoreact.training.config import Config, updated, usable
from scoreact.training.trainer import Trainer

HERE = Path(__file__).resolve().parent
LINES, PAGE, PICTURE = HERE / "online.jsonl", HERE.parent / "docs" / "howto" / "online.md", "online.png"
EACH, BEFORE, AFTER, LOOK, SEEDS, PATHS = 64, 30, 40, 2, 5, 1000
ALL = 10**6
SETTINGS: dict[str, Any] = {
    "kl_weight": 0.5, "solver": "euler_maruyama", "steps": 20, "batch_size": 128, "learning_rate": 4e-3,
    "minibatch_size": 512, "kl_states": 128, "value_learning_rate": 4e-3, "average": 0.7, "device": "cpu",
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "window 128": {"window": 128}, "window 512": {"window": 512}, "all rewards": {"window": ALL},
    "all, half-life 256": {"window": ALL, "half_life": 256}, "from scratch": {"window": 512},
}  # fmt: skip
DRIFTING = {name: ARMS[name] for name in ("window 128", "window 512", "all rewards")}
TURN = 180 / AFTER  # degrees a round
NEWEST = {"newest 256 examples": 256, "newest 1,024 examples": 1024}
LEAN, DATA_BEFORE, DATA_AFTER = (0.8, -0.6), 16, 30
COLOURS = dict(zip(ARMS, ("#8ec1e6", "#0f62a8", "#7a838c", "#1b7f4b", "#b8860b"), strict=True))
RULES: dict[str, dict[str, Any]] = {
    "ctrl": {}, "ctrl_pathwise": {"value_loss": "soft"}, "q_learning": {}, "dpok": {}, "ddpo": {}, "flow_grpo": {},
    "diffusion_nft": {}, "ram": {}, "rwr": {"samples": "policy"},
}  # fmt: skip
ITERATIONS, KEPT, AT_ONCE = 40, 512, 64  # on the reference's paths, so many of them


def problem() -> tuple[torch.nn.Module, dict[str, Quadratic]]:
    """The pretrained model, the same for every seed, and the reward before and after."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = build(width=48)
    before: Any = found.reward
    after = Quadratic(before.quadratic, linear=-before.linear)
    model: Any = found.model
    return model, {"before": before, "after": after}


def j_of(policy: Policy, reward: Quadratic, config: Config, paths: int = PATHS) -> dict[str, float]:
    """reward, kl and J of fresh paths, the same noise for all."""
    sde = config.sde(policy.schedule)
    found = evaluate(
        policy, sde, SOLVERS[config.solver], config.times(policy.schedule), reward, [""], config.kl_weight, paths, 77
    )
    return {"J": found["objective/J"], "reward": found["reward/heldout"], "kl": found["policy/kl"]}


def yardsticks() -> dict[str, dict[str, float]]:
    """Of each reward J_ref, J of the optimal control on the grid, and J*."""
    model, rewards = problem()
    config, base = updated(Config(), SETTINGS), model.base
    found = {}
    for name, reward in rewards.items():
        best, j_star = base.tilted(reward.linear, reward.quadratic, config.kl_weight, reward.constant)
        found[name] = {
            "J_ref": j_of(Policy(base, base), reward, config)["J"],
            "J_best": j_of(Policy(best, base), reward, config)["J"], "J_star": j_star,
        }  # fmt: skip
    return found


def stream(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run through the stream: J after every second update, samples counted from the first one handed out."""
    _, rewards = problem()
    start = BEFORE if arm == "from scratch" else 0
    sa.finetune(problem()[0], "outside", out=folder, progress=False, seed=seed, **SETTINGS)
    run: SavedRun = sa.open_run(folder, model=lambda: problem()[0])
    looks, spent, begin = [], [], time.process_time()
    for number in range(start, BEFORE + AFTER):
        reward = rewards["before" if number < BEFORE else "after"]
        handed = run.hand_out(count=EACH)
        found = run.update(handed, reward(handed.samples, None), **ARMS[arm])  # type: ignore[arg-type]
        spent.append(found.metrics.get("cost/update_network_calls", 0.0))
        if number % LOOK == LOOK - 1:
            now = j_of(run.policy(), reward, run.config)
            guessed = {name: found.metrics[f"online/{name}"] for name in ("J", "J_star", "effective_samples")}
            looks.append({"samples": EACH * (number + 1), **now, "guessed": guessed})
    return {
        "arm": arm, "seed": seed, "looks": looks, "calls": [min(spent), max(spent)],
        "most_step_kl": max(line["policy/step_kl"] for line in run.history if "policy/step_kl" in line),
        "cpu": time.process_time() - begin,
    }  # fmt: skip


def turned(number: int) -> Quadratic:
    """The drifting reward of a round."""
    before = problem()[1]["before"]
    angle = math.radians(TURN * max(0, number + 1 - BEFORE))
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return Quadratic(before.quadratic, linear=turn.to(before.linear) @ before.linear)


def best_of_rounds() -> list[dict[str, float]]:
    """Of each round's drifting reward J_ref and J of the optimal control on the grid."""
    model, config = problem()[0], updated(Config(), SETTINGS)
    base, found = model.base, []
    for number in range(BEFORE - 1, BEFORE + AFTER):  # before that it is the first of these
        reward = turned(number)
        best, _ = base.tilted(reward.linear, reward.quadratic, config.kl_weight, reward.constant)
        found.append({"J_ref": j_of(Policy(base, base), reward, config)["J"],
                      "J_best": j_of(Policy(best, base), reward, config)["J"]})  # fmt: skip
    return found


def drift(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """J by the reward of every round of the drift, after every second update in it."""
    sa.finetune(problem()[0], "outside", out=folder, progress=False, seed=seed, **SETTINGS)
    run: SavedRun = sa.open_run(folder, model=lambda: problem()[0])
    looks, begin = [], time.process_time()
    rewards = [turned(number) for number in range(BEFORE - 1, BEFORE + AFTER)]
    for number in range(BEFORE + AFTER):
        handed = run.hand_out(count=EACH)
        run.update(handed, turned(number)(handed.samples, None), **DRIFTING[arm])  # type: ignore[arg-type]
        if number >= BEFORE and number % LOOK == LOOK - 1:
            policy = run.policy()
            sde, ts = run.config.sde(policy.schedule), run.config.times(policy.schedule)
            path = rollout(
                policy,
                sde,
                SOLVERS[run.config.solver],
                ts,
                policy.condition([""] * PATHS),
                torch.Generator().manual_seed(77),
            )
            costs = run.config.kl_weight * path.path_kl()
            js = [float((reward(path.xs[-1], None) - costs).mean()) for reward in rewards]  # type: ignore[arg-type]
            looks.append({"round": number, "J": js})
    return {"drift": arm, "seed": seed, "looks": looks, "cpu": time.process_time() - begin}


def leaning(number: int) -> Quadratic:
    """The reward that tilts the mixture to the law of this round's examples."""
    sign = 1.0 if number < DATA_BEFORE else -1.0
    return Quadratic(0.0, linear=sign * torch.tensor(LEAN))


def of_data(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """J by the reward that the examples are tilted by, after every second update; of it J_ref and J of the optimal control."""
    config = updated(Config(), {**SETTINGS, "kl_weight": 1.0, "seed": seed})
    sa.finetune(problem()[0], "outside", out=folder, progress=False, config=config)
    run: SavedRun = sa.open_run(folder, model=lambda: problem()[0])
    base: Any = problem()[0].base
    generator, begin = torch.Generator().manual_seed(derived(seed, "examples")), time.process_time()
    examples, looks, marks = torch.zeros(0, 2), list[dict[str, Any]](), dict[str, dict[str, float]]()
    for number in range(DATA_BEFORE + DATA_AFTER):
        reward = leaning(number)
        law, _ = base.tilted(reward.linear, reward.quadratic, 1.0, reward.constant)
        examples = torch.cat([examples, law.sample(EACH, generator).float()])[-NEWEST[name] :]
        found = run.update(data=examples, count=EACH, window=128, discriminator={"features": "values", "samples": 1000})
        if number in (0, DATA_BEFORE):
            marks["before" if number == 0 else "after"] = {
                "J_ref": j_of(Policy(base, base), reward, config)["J"], "J_best": j_of(Policy(law, base), reward, config)["J"]
            }  # fmt: skip
        if number % LOOK == LOOK - 1:
            looks.append({
                "samples": EACH * (number + 1), **j_of(run.policy(), reward, config), "auc": found.metrics["reward/auc"]
            })  # fmt: skip
    return {"data": name, "seed": seed, "looks": looks, "of": marks, "cpu": time.process_time() - begin}


def late(rule: str, seed: int) -> dict[str, Any]:
    """J after learning from one set of the pretrained model's paths, again and again: as late as rewards can be."""
    model, rewards = problem()
    changes = {**SETTINGS, **RULES[rule], "algorithm": rule, "seed": seed, "batch_size": AT_ONCE}
    config = updated(Config(), usable(Config(), changes))
    trainer = Trainer(model, rewards["before"], [""], None, config)
    drawn = [trainer.draw(reference_only=True) for _ in range(KEPT // AT_ONCE)]
    whole = Trajectory.join([path for path, _ in drawn], trainer.policy.condition([""] * KEPT))
    values = torch.cat([scores.result() for _, scores in drawn])
    generator, begin = torch.Generator().manual_seed(seed), time.process_time()
    try:
        for _ in range(ITERATIONS):
            rows = torch.randperm(KEPT, generator=generator)[:AT_ONCE]
            trainer.learn(Paths(whole.paths(rows), values[rows]))
        found: dict[str, Any] = j_of(trainer.averaged(), rewards["before"], config)
    except (Diverged, ValueError) as error:
        found = {"J": None, "failed": str(error)[:80]}
    return {"rule": rule, "seed": seed, **found, "cpu": time.process_time() - begin}


# --- tables ----------------------------------------------------------------------------------------------------------------


def shares(
    line: dict[str, Any], of: dict[str, dict[str, float]], change: int = EACH * BEFORE
) -> Iterator[tuple[int, float]]:
    """Samples since the change, and the share of the way from J_ref to the best on the grid."""
    now = of["after"]
    for look in line["looks"]:
        if look["samples"] > change:
            yield look["samples"] - change, (look["J"] - now["J_ref"]) / (now["J_best"] - now["J_ref"])


def until(line: dict[str, Any], of: dict[str, dict[str, float]], wanted: float, change: int = EACH * BEFORE) -> float:
    """Samples from the change until the share is reached and held at the next look; inf where it is not."""
    found = list(shares(line, of, change))
    for (samples, share), (_, later) in itertools.pairwise(found):
        if min(share, later) >= wanted:
            return samples
    return float("inf")


def cell(values: list[float], form: str) -> str:
    """Mean and its 95 % interval, of one or two runs each; or in how many runs it never came to that."""
    lost = sum(value == float("inf") for value in values)
    if lost:
        return f"not in {lost} of {len(values)}"
    if len(values) < 3:
        return ", ".join(f"{value:{form}}" for value in values)
    mean, half_width = confidence_interval(values)
    return f"{mean:{form}} ± {half_width:{form}}"


def stream_table(lines: list[dict[str, Any]]) -> str:
    of = next(line["yardsticks"] for line in lines if "yardsticks" in line)
    rows = [
        "| what is remembered | seeds | share before the change | samples until 90 % of the new optimum "
        "| mean regret after it | share in the end | network calls an update |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in ARMS:
        mine = [line for line in lines if line.get("arm") == arm]
        if not mine:
            continue
        gap = of["before"]["J_best"] - of["before"]["J_ref"]
        starts = [
            (look["J"] - of["before"]["J_ref"]) / gap
            for line in mine
            for look in line["looks"]
            if look["samples"] == EACH * BEFORE
        ]
        regret = [
            statistics.fmean(
                of["after"]["J_best"] - look["J"] for look in line["looks"] if look["samples"] > EACH * BEFORE
            )
            for line in mine
        ]
        ends = [list(shares(line, of))[-1][1] for line in mine]
        calls = [min(line["calls"][0] for line in mine), max(line["calls"][1] for line in mine)]
        cells = [
            arm, str(len(mine)), cell(starts, ".2f") if starts else "", cell([until(line, of, 0.9) for line in mine], ",.0f"),
            cell(regret, ".3f"), cell(ends, ".2f"), f"{calls[0]:,.0f} to {calls[1]:,.0f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def drift_table(lines: list[dict[str, Any]]) -> str:
    of = next((line["rounds"] for line in lines if "rounds" in line), [])
    rows = [
        "| what is remembered | seeds | lag behind the drift, samples | regret | share of the optimum |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for arm in DRIFTING:
        mine = [line for line in lines if line.get("drift") == arm]
        lags, regrets, shares = list[float](), list[float](), list[float]()
        for line in mine:
            found = []
            for look in line["looks"]:
                if look["round"] < BEFORE + AFTER // 2:
                    continue
                now = look["round"] - BEFORE + 1  # the place of its reward
                behind = [best["J_best"] - j for best, j in zip(of, look["J"], strict=True)]
                suits = min(range(now + 1), key=behind.__getitem__)
                gap = of[now]["J_best"] - of[now]["J_ref"]
                found.append((EACH * (now - suits), behind[now], 1 - behind[now] / gap))
            for into, values in zip((lags, regrets, shares), zip(*found, strict=True), strict=True):
                into.append(statistics.fmean(values))
        if mine:
            cells = [arm, str(len(mine)), cell(lags, ",.0f"), cell(regrets, ".3f"), cell(shares, ".2f")]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def data_table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| what is followed | seeds | share before the change | samples until 80 % of the new optimum | until 90 % "
        "| share in the end |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    change = EACH * DATA_BEFORE
    for name in NEWEST:
        mine = [line for line in lines if line.get("data") == name]
        starts = [
            (look["J"] - line["of"]["before"]["J_ref"])
            / (line["of"]["before"]["J_best"] - line["of"]["before"]["J_ref"])
            for line in mine
            for look in line["looks"]
            if look["samples"] == change
        ]
        ends = [list(shares(line, line["of"], change))[-1][1] for line in mine]
        waits = [[until(line, line["of"], wanted, change) for line in mine] for wanted in (0.8, 0.9)]
        if mine:
            cells = [name, str(len(mine)), cell(starts, ".2f"), *(cell(w, ",.0f") for w in waits), cell(ends, ".2f")]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def rule_table(lines: list[dict[str, Any]]) -> str:
    of = next(line["yardsticks"] for line in lines if "yardsticks" in line)["before"]
    rows = ["| rule | seeds | share of the optimum | path KL, nats |", "| --- | ---: | ---: | ---: |"]
    for rule in RULES:
        mine = [line for line in lines if line.get("rule") == rule]
        if not mine:
            continue
        share = [((line["J"] or -math.inf) - of["J_ref"]) / (of["J_best"] - of["J_ref"]) for line in mine]
        if lost := sum(value < -1 for value in share):
            rows.append(f"| `{rule}` | {len(mine)} | diverged in {lost} | |")
            continue
        rows.append(
            f"| `{rule}` | {len(mine)} | {cell(share, '.2f')} | {statistics.fmean(line['kl'] for line in mine):.2f} |"
        )
    return "\n".join(rows)


def made(path: Path = LINES) -> dict[str, str]:
    """The tables of the page, of the runs in a file; those that have rows."""
    lines = resume_lines(path)
    tables = {
        "online": stream_table,
        "online-drift": drift_table,
        "online-data": data_table,
        "online-rules": rule_table,
    }
    found = {name: table(lines) for name, table in tables.items()}
    return {name: text for name, text in found.items() if text.count("\n") > 1}


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """J over the samples handed out, mean over seeds with the range of them."""
    from matplotlib.figure import Figure

    of = next(line["yardsticks"] for line in lines if "yardsticks" in line)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes: Any = figure.subplots()
    change, end = EACH * BEFORE, EACH * (BEFORE + AFTER)
    for name, (left, right) in {"before": (0, change), "after": (change, end)}.items():
        axes.plot([left, right], [of[name]["J_star"]] * 2, "k--", lw=1, label="J*" if name == "before" else None)
        axes.plot(
            [left, right], [of[name]["J_best"]] * 2, "k:", lw=1, label="best on this grid" if name == "before" else None
        )
        axes.plot(
            [left, right], [of[name]["J_ref"]] * 2, color="#bbbbbb", lw=1, label="J_ref" if name == "before" else None
        )
    for arm, colour in COLOURS.items():
        mine = [line["looks"] for line in lines if line.get("arm") == arm]
        if mine:
            x = [look["samples"] for look in mine[0]]
            ys = [[run[i]["J"] for run in mine] for i in range(len(x))]
            axes.plot(x, [statistics.fmean(y) for y in ys], color=colour, label=arm)
            axes.fill_between(x, [min(y) for y in ys], [max(y) for y in ys], color=colour, alpha=0.15, lw=0)
    axes.axvline(change, color="k", lw=0.8)
    axes.annotate(
        "the reward turns round", (change, axes.get_ylim()[0]), xytext=(4, 4), textcoords="offset points", fontsize=8
    )
    axes.set_xlabel("samples handed out")
    axes.set_ylabel("J by the reward of the moment")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=110)


PARTS: dict[str, tuple[str, dict[str, dict[str, Any]], Callable[[str, int, Path], dict[str, Any]]]] = {
    "run": ("arm", ARMS, stream),
    "drift": ("drift", DRIFTING, drift),
    "data": ("data", {name: {} for name in NEWEST}, of_data),
    "rules": ("rule", RULES, lambda rule, seed, folder: late(rule, seed)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PARTS, "table"])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--write", action="store_true", help="into the page, with its picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = resume_lines(options.out)
    if options.what == "table":
        tables = made(options.out)
        print("\n\n".join(tables.values()))
        if options.write:
            draw(lines, PAGE.parent / PICTURE)
            for name, text in tables.items():
                put(f"{text}\n", PAGE, (f"<!-- {name} -->\n", f"<!-- /{name} -->"))
        return
    if not any("yardsticks" in line for line in lines):
        append_line(options.out, {"yardsticks": yardsticks()})
    if options.what == "drift" and not any("rounds" in line for line in lines):
        append_line(options.out, {"rounds": best_of_rounds()})
    key, names, make = PARTS[options.what]
    for seed in range(options.seeds):
        for name in names:
            if any((line.get(key), line.get("seed")) == (name, seed) for line in lines):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                line = make(name, seed, Path(scratch) / "run")
            append_line(options.out, line)
            print(json.dumps({k: v for k, v in line.items() if k != "looks"}), flush=True)


if __name__ == "__main__":
    main()
