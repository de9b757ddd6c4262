"""Heartbeats: an abnormal rhythm as the reward, at kl_weight 1, judged by another classifier.

    python benchmarks/heartbeats.py run --data ecg5000_train.txt
    python benchmarks/heartbeats.py table --write              # of benchmarks/heartbeats.jsonl, into docs/results/health.md
    python benchmarks/heartbeats.py picture --data ecg5000_train.txt

ECG5000's training file: 500 beats of 140 numbers, class 1 normal, all others abnormal. The model learns 150 normal and 44
abnormal beats without their labels, as vectors. The reward is fitted to half of those with labels, and calibrated on the other
half. The judge, a random forest, learns half of the other 306 beats; the rest is the yardstick and the test. A seed is of
everything, from the split to the pretraining.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from page_tables import put
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.grids import grid_times
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.evaluation.memorisation import memorisation
from scoreact.evaluation.metrics import confidence_interval
from scoreact.recipes.own_model import read_model
from scoreact.rewards.class_probability import ClassProbability
from scoreact.sampling.draw import draw
from scoreact.support.own_data import Examples, OwnData

ROOT = Path(__file__).resolve().parents[1]
LINES, PAGE = ROOT / "benchmarks" / "heartbeats.jsonl", ROOT / "docs" / "results" / "health.md"
PICTURE = PAGE.with_name("heartbeats.png")
MARKS = "<!-- heartbeats -->\n", "<!-- /heartbeats -->"
CLASSES = ("normal", "abnormal")
RARE, LEARNED, STEPS, SAMPLES = 44, 150, 20, 400
SETTINGS: dict[str, Any] = {
    "algorithm": "adjoint_matching", "reward_gradient": "exact", "steps": STEPS, "batch_size": 128,
    "iterations": 20, "reference_batches": 4, "minibatch_size": 512, "kl_states": 0, "learning_rate": 5e-4,
    "heldout_samples": 256, "evaluate_every": 20, "average": 0.8, "decay_from": 0.4,
}  # fmt: skip


class Seed:
    """Split, pretrained model, reward and judge of a seed."""

    def __init__(self, data: Path, seed: int, folder: Path) -> None:
        from sklearn.ensemble import RandomForestClassifier

        self.seed = seed
        table = torch.from_numpy(np.loadtxt(data).astype(np.float32))
        values, labels = table[:, 1:], (table[:, 0] != 1).long()
        generator = torch.Generator().manual_seed(seed)
        groups = [torch.nonzero(labels == k).flatten() for k in (0, 1)]
        groups = [rows[torch.randperm(len(rows), generator=generator)] for rows in groups]
        cuts = (LEARNED, RARE)
        known = [rows[:cut] for rows, cut in zip(groups, cuts, strict=True)]
        others = [rows[cut:] for rows, cut in zip(groups, cuts, strict=True)]

        def part(rows: list[Tensor], first: int) -> Examples:
            """Every other one of each class."""
            chosen = torch.cat([r[first::2] for r in rows])
            return Examples(values[chosen], labels[chosen])

        fit, held = part(known, 0), part(known, 1)
        self.learned = Examples(torch.cat([fit.values, held.values]), torch.cat([fit.labels, held.labels]))  # type: ignore[list-item]
        self.judged, self.test = part(others, 0), part(others, 1)
        self.reward: ClassProbability = sa.classify(
            OwnData("vectors", fit, held, CLASSES), "abnormal", features="values", seed=seed
        )
        self.folder = folder / f"seed-{seed}"
        np.savez(folder / f"{seed}.npz", data=self.learned.values.numpy())
        sa.pretrain(
            self.folder, folder / f"{seed}.npz", kind="vectors", steps=1500, batch_size=64, seed=seed, progress=False
        )
        self.forest = lambda examples: RandomForestClassifier(
            300, class_weight="balanced", random_state=seed, min_samples_leaf=3
        ).fit(examples.values.numpy(), examples.labels.numpy())
        self.judge = self.forest(self.judged)

    def auc(self, forest: Any) -> float:
        from sklearn.metrics import roc_auc_score

        assert self.test.labels is not None
        return float(roc_auc_score(self.test.labels.numpy(), forest.predict_proba(self.test.values.numpy())[:, 1]))

    def of_class(self, examples: Examples, row: int) -> Tensor:
        return examples.values[examples.labels == row]

    def sample(self, model: Any) -> Tensor:
        return draw(
            model, [""] * SAMPLES, sampler_by_name("ddim"), grid_times("uniform", model.schedule, STEPS), self.seed
        )[1]

    def measures(self, x: Tensor, row: int, asked: bool = True) -> dict[str, Any]:
        """asked: x is to be of the class `row`, so that it is compared with beats of it."""
        real = self.of_class(self.test, row) if asked else self.test.values
        learned = self.of_class(self.learned, row) if asked else self.learned.values
        held = real[: len(learned)]
        return {
            "samples": len(x), "reward_share": float(self.reward.log_probabilities(x)[:, row].exp().mean()),
            "judge_share": float((self.judge.predict(x.numpy()) == row).mean()), **memorisation(learned, held, x)._asdict(),
        }  # fmt: skip


def run(data: Path, seed: int, out: Path) -> None:
    import dataclasses

    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        it = Seed(data, seed, Path(folder))
        found: list[dict[str, Any]] = []
        facts = it.reward.facts["by_class"][1]
        found.append({"what": "classifiers", "class": "both", "reward_auc": facts["auc"], "judge_auc": it.auc(it.judge),
                      "calibration_error": facts["calibration_error"]})  # fmt: skip
        before = it.sample(read_model(it.folder))
        made = []
        for row, name in enumerate(CLASSES):
            found.append({"what": "held out", "class": name, **it.measures(it.of_class(it.test, row), row)})
            found.append({"what": "pretrained", "class": name, **it.measures(before, row, asked=False)})
            reward = dataclasses.replace(it.reward, target=name)
            result = sa.finetune(
                read_model(it.folder), reward, [""], seed=seed, progress=False, kl_weight=1.0, **SETTINGS
            )
            made.append(it.sample(result.policy.model))
            found.append({
                "what": "tuned", "class": name, **it.measures(made[-1], row), "kl": result.final["policy/kl"],
                "recovered": result.final["objective/recovered"],
            })  # fmt: skip
        found.append({"what": "teaches", "class": "both", **taught(it, made, before)})
    seconds = time.process_time() - start
    with out.open("a", encoding="utf-8") as file:
        for line in found:
            kept = {
                k: round(v, 5) if isinstance(v, float) else v
                for k, v in {"seed": seed, **line, "cpu_s": seconds}.items()
            }
            file.write(json.dumps(kept) + "\n")


def taught(it: Seed, made: list[Tensor], before: Tensor) -> dict[str, float]:
    """AUC on real test beats of a forest that learned from real or from generated ones."""
    labels = torch.cat([torch.full((len(x),), k) for k, x in enumerate(made)])
    guessed = it.reward.log_probabilities(before).argmax(1)
    sets = {"real": it.learned, "pretrained": Examples(before, guessed), "tuned": Examples(torch.cat(made), labels)}
    return {f"{name}_auc": it.auc(it.forest(examples)) for name, examples in sets.items()}


# --- what is shown ----------------------------------------------------------------------------------------------------

NAMES = {"held out": "real, held out", "pretrained": "pretrained, all beats", "tuned": "tuned to log p(class)"}


def over_seeds(rows: list[dict[str, Any]], name: str, digits: int = 2) -> str:
    """Mean over seeds and half width of Student's 95 % interval."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return "-"
    mean, half = confidence_interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def table(rows: list[dict[str, Any]]) -> str:
    def of(what: str, name: str = "both") -> list[dict[str, Any]]:
        return [row for row in rows if row["what"] == what and row["class"] == name]

    seeds = len({row["seed"] for row in rows})
    text = [
        f"{seeds} seeds, of everything: means and 95 % intervals of Student's t over them.", "",
        "| class | beats | its probability, reward's classifier | its share, judge | path KL, nats | share "
        "of J\\* - J_ref | training is closer |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name in CLASSES:
        for what, said in NAMES.items():
            own = of(what, name)
            near = "-" if what == "held out" else over_seeds(own, "to_training")
            cells = [over_seeds(own, key) for key in ("reward_share", "judge_share", "kl", "recovered")]
            text.append(f"| {name} | {said} | {' | '.join(cells)} | {near} |")
    said = {key: over_seeds(of("classifiers"), key, 3) for key in ("reward_auc", "judge_auc", "calibration_error")}
    text += [
        "",
        f"The reward's classifier: AUC {said['reward_auc']}, expected calibration error {said['calibration_error']}. The "
        f"judge: AUC {said['judge_auc']}.",
        "", "| a forest that learned from | AUC on real test beats |", "| --- | ---: |",
    ]  # fmt: skip
    for key, what in (
        ("real", "the real beats that the model learned from, with their labels"),
        ("pretrained", "the pretrained model's, with the labels of the reward's classifier"),
        ("tuned", "beats tuned to each class"),
    ):
        text.append(f"| {what} | {over_seeds(of('teaches'), f'{key}_auc', 3)} |")
    return "\n".join(text) + "\n"


def picture(data: Path) -> None:
    """Seed 0: beats of the pretrained model, tuned to each class, and real ones."""
    import dataclasses

    from matplotlib.figure import Figure

    with tempfile.TemporaryDirectory() as folder:
        it = Seed(data, 0, Path(folder))
        rows = {"pretrained": it.sample(read_model(it.folder))}
        for name in CLASSES:
            reward = dataclasses.replace(it.reward, target=name)
            result = sa.finetune(read_model(it.folder), reward, [""], seed=0, progress=False, kl_weight=1.0, **SETTINGS)
            rows[f"tuned to {name}"] = it.sample(result.policy.model)
    rows |= {f"real, {name}": it.of_class(it.test, row) for row, name in enumerate(CLASSES)}
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, 5, sharey=True), rows.items(), strict=True):
        axes.plot(x[:15].T, linewidth=0.6, color="#0f62a8", alpha=0.6)
        axes.set_title(name, fontsize=9)
        axes.set(xticks=[])
    figure.savefig(PICTURE, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "picture"])
    parser.add_argument("--data", type=Path, help="ecg5000_train.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--write", action="store_true", help="put the table into the results page")
    options = parser.parse_args()
    lines = (
        [json.loads(t) for t in options.out.read_text(encoding="utf-8").splitlines()] if options.out.is_file() else []
    )
    if options.what == "run":
        for seed in options.seeds:
            if not any(line["seed"] == seed for line in lines):
                run(options.data, seed, options.out)
    elif options.what == "picture":
        picture(options.data)
    else:
        print(table(lines), end="")
        if options.write:
            put(table(lines), PAGE, MARKS)


if __name__ == "__main__":
    main()
