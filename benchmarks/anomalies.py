"""Does tuning help to find anomalies? One class is normal, all others are abnormal; before and after, beside PyOD's detectors.

    python benchmarks/anomalies.py run fashion --data fashion_mnist.npz --seeds 3
    python benchmarks/anomalies.py run ecg --data ecg5000_train.txt --seeds 3
    python benchmarks/anomalies.py table                                          # of the measured lines; runs nothing
    python benchmarks/anomalies.py table --write docs/results/anomalies.md --picture docs/results/anomalies.png

fashion: the shipped model of ten kinds of clothes is asked for each class in turn. ecg: a model that `pretrain` makes of normal
heartbeats alone. Tuned is to the log-ratio of real examples to the model's own in ten steps of ddim (`scoreact reward
discriminate`). `after` is the tuned model's path score, `ratio` its log-ratio to the pretrained one. A line of
benchmarks/anomalies.jsonl is a data set, a detector, a seed and a class; a line that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

import scoreact as sa
from scoreact.evaluation.metrics import confidence_interval

LINES = Path(__file__).with_suffix(".jsonl")
MARKS = ("<!-- anomalies -->\n", "<!-- /anomalies -->\n")
EACH = {"fashion": 25, "ecg": 40}  # test examples of a class at most
TRAIN = 1000  # examples of the normal class that a baseline learns from
NAMES = {
    "before": "path, pretrained", "after": "path, tuned", "ratio": "ratio, tuned against pretrained",
    "typicality": "typicality, pretrained", "complexity": "complexity, pretrained", "IForest": "PyOD IForest",
    "KNN": "PyOD KNN", "ECOD": "PyOD ECOD", "AutoEncoder": "PyOD AutoEncoder",
}  # fmt: skip
TUNED = {"algorithm": "adjoint_matching", "steps": 10, "iterations": 16, "batch_size": 48, "minibatch_size": 48, "epochs": 1,
         "reference_batches": 4, "heldout_samples": 48, "evaluate_every": 16, "kl_weight": 0.3, "learning_rate": 2e-4,
         "max_kl": 0.5, "average": 0.8}  # fmt: skip


class Kept:
    """The lines of a file, and what is not yet among them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = (
            [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
        )

    def has(self, data: str, detector: str, seed: int) -> bool:
        return any((x["data"], x["detector"], x["seed"]) == (data, detector, seed) for x in self.lines)

    def add(self, lines: list[dict[str, Any]]) -> None:
        self.lines += lines
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def figures(normal: np.ndarray, abnormal: np.ndarray) -> dict[str, float]:
    """AUROC, AUPRC of the abnormal, and the share of normal ones above the score that 95 % of the abnormal exceed."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, truth = np.concatenate([normal, abnormal]), np.repeat([0, 1], [len(normal), len(abnormal)])
    return {
        "auroc": float(roc_auc_score(truth, scores)), "auprc": float(average_precision_score(truth, scores)),
        "fpr95": float((normal >= np.quantile(abnormal, 0.05)).mean()), "normal": len(normal), "abnormal": len(abnormal),
    }  # fmt: skip


class Task:
    """Test examples with their class, and for each normal class training examples and a prompt."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        if name == "fashion":
            arrays = np.load(path)
            test, labels = arrays["test_images"][:, None], arrays["test_labels"]
            train, train_labels = arrays["train_images"][:, None], arrays["train_labels"]
            self.normal_classes = list(range(10))
        else:
            table = np.loadtxt(path).astype(np.float32)
            every, kinds = table[:, 1:][:, None], (table[:, 0] != 1).astype(int)
            normal = np.random.default_rng(0).permutation(np.flatnonzero(kinds == 0))
            train, train_labels = every[normal[:212]], np.zeros(212, int)
            rest = np.concatenate([normal[212:], np.flatnonzero(kinds == 1)])
            test, labels, self.normal_classes = every[rest], kinds[rest], [0]
        rows = np.random.default_rng(1)
        pick = [
            rows.permutation(np.flatnonzero(labels == c))[: EACH[name] if name == "fashion" else None]
            for c in np.unique(labels)
        ]
        self.test, self.labels = test[np.concatenate(pick)], labels[np.concatenate(pick)]
        self.train = {c: train[np.flatnonzero(train_labels == c)[:TRAIN]] for c in self.normal_classes}

    def lines(self, detector: str, seed: int, scores: dict[int, np.ndarray], **more: Any) -> list[dict[str, Any]]:
        """A line a normal class, of scores of all test examples."""
        return [
            {"data": self.name, "detector": detector, "seed": seed, "class": c,
             **figures(s[self.labels == c], s[self.labels != c]), **more}
            for c, s in scores.items()
        ]  # fmt: skip

    def scored(self, model: Any, method: str, prompts: list[str] | None, **how: Any) -> dict[int, np.ndarray]:
        return {
            c: sa.score(model, self.test, method, prompts=None if prompts is None else prompts[c], **how)
            for c in self.normal_classes
        }


PLAN = {"levels": 6, "noises": 2}


def baselines(task: Task, kept: Kept, seeds: int) -> None:
    """PyOD's detectors on the numbers themselves, with their own settings; KNN and ECOD have no seed."""
    from pyod.models.auto_encoder import AutoEncoder
    from pyod.models.ecod import ECOD
    from pyod.models.iforest import IForest
    from pyod.models.knn import KNN

    makers: dict[str, Callable[[int], Any]] = {
        "IForest": lambda seed: IForest(random_state=seed), "KNN": lambda seed: KNN(), "ECOD": lambda seed: ECOD(),
        "AutoEncoder": lambda seed: AutoEncoder(random_state=seed, verbose=0),
    }  # fmt: skip
    for name, make in makers.items():
        for seed in range(1 if name in ("KNN", "ECOD") else seeds):
            if not kept.has(task.name, name, seed):
                scores, cpu = {}, time.process_time()
                for c in task.normal_classes:
                    flat = [x.reshape(len(x), -1).astype(np.float32) for x in (task.train[c], task.test)]
                    flat = [x / 255 if task.name == "fashion" else x for x in flat]
                    scores[c] = np.asarray(make(seed).fit(flat[0]).decision_function(flat[1]))
                kept.add(task.lines(name, seed, scores, cpu_seconds=time.process_time() - cpu))
                print(name, seed, flush=True)


def measure(task: Task, kept: Kept, seeds: int, source: Path, work: Path) -> None:
    """The pretrained model's scores, then those of a tuned one a seed."""
    if task.name == "fashion":
        from scoreact.recipes.fashion_mnist.recipe import model as shipped

        model, prompts, data = shipped, list(shipped().classes), source
        features: dict[str, Any] = {"features": "classifier", "ridge": 0.1}
    else:
        data = work / "ecg.npz"
        np.savez(data, data=task.train[0])
        if not (work / "ecg" / "model.json").exists():
            sa.pretrain(work / "ecg", data, kind="series", steps=1500, batch_size=32, width=32, progress=False)
        from scoreact.recipes.own_model import read_model

        model, prompts, features = lambda: read_model(work / "ecg"), None, {"features": "convolution"}
    before = model()
    cpu = time.process_time()
    path = task.scored(before, "path", prompts, **PLAN)
    if not kept.has(task.name, "before", 0):
        kept.add(task.lines("before", 0, path, cpu_seconds=time.process_time() - cpu))
        if task.name == "fashion":
            from scoreact.evaluation.anomaly_scores import png_bits

            png = png_bits(torch.from_numpy(task.test).float() / 255).numpy()
            kept.add(task.lines("complexity", 0, {c: s - png for c, s in path.items()}))
        mean = {
            c: sa.score(before, x[:40], "path", prompts=None if prompts is None else prompts[c], **PLAN).mean()
            for c, x in task.train.items()
        }
        kept.add(task.lines("typicality", 0, {c: abs(s - mean[c]) for c, s in path.items()}))
        print("before", flush=True)
    for seed in range(seeds):
        if kept.has(task.name, "after", seed):
            continue
        cpu = time.process_time()
        reward = sa.discriminate(
            model(), data, steps=10, samples=1500 if task.name == "fashion" else 200, seed=seed, **features
        )
        result = sa.finetune(model(), reward, config=sa.Config(), progress=False, seed=seed, **TUNED)
        tuned = task.scored(result.policy, "path", prompts, **PLAN)
        cost = {"cpu_seconds": time.process_time() - cpu, "auc": reward.facts["auc"],
                **{k: result.final[k] for k in ("policy/kl", "reward/auc") if k in result.final}}  # fmt: skip
        # the same noise in both: their difference is `sa.score(..., "ratio")`, in bits a number
        ratio = {c: tuned[c] - path[c] for c in path}
        kept.add(task.lines("after", seed, tuned, **cost) + task.lines("ratio", seed, ratio))
        print("after", seed, cost, flush=True)


def rows_of(lines: list[dict[str, Any]], data: str) -> list[tuple[str, int, dict[str, tuple[float, float]]]]:
    """Of each detector its seeds, and of each figure the mean over classes with its interval over seeds."""
    found = []
    for detector in NAMES:
        own = [x for x in lines if (x["data"], x["detector"]) == (data, detector)]
        seeds = sorted({x["seed"] for x in own})
        if own:
            means = {
                key: confidence_interval(
                    torch.tensor([statistics.fmean(x[key] for x in own if x["seed"] == s) for s in seeds])
                )
                for key in ("auroc", "auprc", "fpr95")
            }
            found.append((detector, len(seeds), means))
    return found


def table(lines: list[dict[str, Any]]) -> str:
    text = []
    for data in dict.fromkeys(x["data"] for x in lines):
        some = next(x for x in lines if x["data"] == data)
        text += [
            f"**{data}**, {some['normal']} normal and {some['abnormal']} abnormal test examples a class:", "",
            "| detector | seeds | AUROC | AUPRC | FPR95 |", "| --- | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        for detector, seeds, means in rows_of(lines, data):
            cells = [f"{m:.3f} ± {h:.3f}" if seeds > 1 else f"{m:.3f}" for m, h in means.values()]
            text.append(f"| {NAMES[detector]} | {seeds} | {' | '.join(cells)} |")
        for other in ("after", "ratio"):
            gain = [
                statistics.fmean(
                    x["auroc"] - b["auroc"]
                    for x in lines if (x["data"], x["detector"], x["seed"]) == (data, other, seed)
                    for b in lines if (b["data"], b["detector"], b["class"]) == (data, "before", x["class"])
                )
                for seed in sorted({x["seed"] for x in lines if (x["data"], x["detector"]) == (data, other)})
            ]  # fmt: skip
            if len(gain) > 1:
                mean, half = confidence_interval(torch.tensor(gain))
                text += [
                    "",
                    f"AUROC of `{NAMES[other]}` less that before tuning, {len(gain)} seeds: {mean:+.3f} ± {half:.3f}.",
                ]
        text.append("")
    return "\n".join(text)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """AUROC of every detector, a point a class, over seeds the mean."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(x["data"] for x in lines))
    figure = Figure(figsize=(4.5 * len(sets), 3.4), layout="constrained")
    for axes, data in zip(np.atleast_1d(figure.subplots(1, len(sets))), sets, strict=True):
        rows = rows_of(lines, data)
        for y, (detector, _, means) in enumerate(reversed(rows)):
            own = [x for x in lines if (x["data"], x["detector"]) == (data, detector)]
            points = [statistics.fmean(x["auroc"] for x in own if x["class"] == c) for c in {x["class"] for x in own}]
            axes.plot(points, [y] * len(points), "o", color="#8ec1e6", markersize=4)
            axes.plot(means["auroc"][0], y, "|", color="#0f62a8", markersize=16, markeredgewidth=2)
        axes.set_yticks(range(len(rows)), [NAMES[d] for d, _, _ in reversed(rows)], fontsize=8)
        axes.set(xlabel="AUROC", title=data, xlim=(None, 1.01))
        axes.axvline(0.5, color="#bbbbbb", linewidth=0.8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("task", choices=list(EACH))
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--seeds", type=int, default=5)
    run.add_argument("--work", type=Path, help="where a pretrained model is kept [default: a temporary folder]")
    show = commands.add_parser("table")
    show.add_argument("--write", type=Path, help="put the table between the marks of this page")
    show.add_argument("--picture", type=Path)
    options = parser.parse_args()
    kept = Kept(LINES)
    if options.command == "run":
        task = Task(options.task, options.data)
        baselines(task, kept, options.seeds)
        with tempfile.TemporaryDirectory() as temporary:
            work = options.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            measure(task, kept, options.seeds, options.data, work)
        return
    print(table(kept.lines), end="")
    if options.picture:
        draw(kept.lines, options.picture)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, _, rest = text.partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        options.write.write_text(before + MARKS[0] + table(kept.lines) + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
