"""Does tuning help to find anomalies? One class is normal, all others are abnormal; before and after, beside PyOD's detectors.

    python benchmarks/anomalies.py run fashion --data fashion_mnist.npz --tuned 2
    scoreact pretrain work/xray --data pneumonia_mnist.npz --labels --label-dropout 0.5 --width 24 --batch-size 64 --steps 3000
    python benchmarks/anomalies.py run xray --data pneumonia_mnist.npz --work work --tuned 3
    python benchmarks/anomalies.py run ecg --data ecg5000_train.txt --work work
    python benchmarks/anomalies.py run broad --data ecg5000_train.txt --work work
    python benchmarks/anomalies.py table                                          # of the measured lines; runs nothing
    python benchmarks/anomalies.py table --write docs/results/anomalies.md --picture docs/results/anomalies.png

fashion: the shipped model of ten kinds of clothes is asked for each class in turn. xray: a model of pictures with and without
pneumonia is asked for those without. ecg: a model of normal heartbeats alone. Tuned is to the log-ratio of real normal
examples to the model's own (`scoreact reward discriminate`). broad: a model of normal and abnormal heartbeats without their
labels is what ratios are taken to; the networks are of vectors, and other abnormal beats are the test. A line of
benchmarks/anomalies.jsonl is a data set, a detector, a seed and a class; a line that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from page_tables import put

import scoreact as sa
from scoreact.evaluation.metrics import confidence_interval
from scoreact.models.network import NetworkModel
from scoreact.recipes.own_model import read_model
from scoreact.support.own_data import Examples, OwnData

LINES = Path(__file__).with_suffix(".jsonl")
MARKS = ("<!-- anomalies -->\n", "<!-- /anomalies -->\n")
EACH = {"fashion": 12, "xray": 150, "ecg": None, "broad": None}  # test examples of a class at most
TRAIN = 1000  # examples of the normal class that a baseline learns from
PLAN: dict[str, Any] = {"levels": 6, "noises": 2}
COARSE = 1.0  # of sigma / alpha: finer is texture
TITLES = {
    "fashion": "Fashion-MNIST", "xray": "Chest X-rays", "ecg": "Heartbeats", "broad": "Heartbeats, with a broad reference",
}  # fmt: skip
NAMES = {
    "path": "path", "coarse": "path, noise from 1", "typicality": "typicality", "complexity": "complexity",
    "norms": "norms", "scoped": "scoped", "posterior": "posterior, noise from 1, of a model that knows the classes",
    "wide": "path, the broad model", "narrow": "ratio, model of normal beats against the broad one",
    "real": "ratio, the broad model tuned to real normal beats", "real_reward": "minus that reward",
    "classified": "ratio, the broad model tuned to log p(normal)", "classified_reward": "minus that reward's log p",
    "after": "path, tuned", "after_coarse": "path, noise from 1, tuned", "ratio": "ratio, tuned against pretrained",
    "reward": "minus the reward that was tuned to", "fine_reward": "minus a reward of samples in 20 steps of heun",
    "IForest": "PyOD IForest", "KNN": "PyOD KNN", "ECOD": "PyOD ECOD", "AutoEncoder": "PyOD AutoEncoder",
}  # fmt: skip
TUNED: dict[str, Any] = {
    "algorithm": "adjoint_matching", "steps": 10, "iterations": 16, "batch_size": 48, "minibatch_size": 48, "epochs": 1,
    "reference_batches": 4, "heldout_samples": 48, "evaluate_every": 16, "kl_weight": 0.3, "learning_rate": 2e-4,
    "max_kl": 0.5, "average": 0.8,
}  # fmt: skip


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
        self.name, self.prompts = name, {0: ""}
        if name in ("ecg", "broad"):
            table = np.loadtxt(path).astype(np.float32)
            every, kinds = table[:, 1:], (table[:, 0] != 1).astype(int)
            every = every if name == "broad" else every[:, None]
            normal, odd = (np.random.default_rng(0).permutation(np.flatnonzero(kinds == k)) for k in (0, 1))
            known = odd[:104] if name == "broad" else odd[:0]
            train, train_labels = every[normal[:212]], np.zeros(212, int)
            self.mixed = (
                every[np.concatenate([normal[:212], known])],
                np.array(["normal"] * 212 + ["abnormal"] * len(known)),
            )
            rest = np.concatenate([normal[212:], odd[len(known) :]])
            test, labels = every[rest], kinds[rest]
        else:
            with np.load(path) as arrays:
                test, labels = arrays["test_images"][:, None], arrays["test_labels"].flatten()
                train, train_labels = arrays["train_images"][:, None], arrays["train_labels"].flatten()
            self.prompts = {c: str(c) for c in (range(10) if name == "fashion" else [0])}
        rows = np.random.default_rng(1)
        pick = [rows.permutation(np.flatnonzero(labels == c))[: EACH[name]] for c in np.unique(labels)]
        self.test, self.labels = test[np.concatenate(pick)], labels[np.concatenate(pick)]
        self.train = {c: train[np.flatnonzero(train_labels == c)[:TRAIN]] for c in self.prompts}

    def lines(self, detector: str, seed: int, scores: dict[int, np.ndarray], **more: Any) -> list[dict[str, Any]]:
        """A line a normal class, of scores of all test examples."""
        return [
            {"data": self.name, "detector": detector, "seed": seed, "class": c,
             **figures(s[self.labels == c], s[self.labels != c]), **more}
            for c, s in scores.items()
        ]  # fmt: skip

    def scored(self, model: Any, method: str, normal: int = 0, **how: Any) -> dict[int, np.ndarray]:
        """Of all test examples, as of each normal class. normal: examples of the class that the method compares with."""
        return {
            c: sa.score(model, self.test, method, prompts=prompt or None,
                        **({"normal": self.train[c][:normal]} if normal else {}), **how)
            for c, prompt in self.prompts.items()
        }  # fmt: skip


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
                for c in task.prompts:
                    flat = [x.reshape(len(x), -1).astype(np.float32) for x in (task.train[c], task.test)]
                    flat = [x / 255 if task.test.dtype == np.uint8 else x for x in flat]
                    scores[c] = np.asarray(make(seed).fit(flat[0]).decision_function(flat[1]))
                kept.add(task.lines(name, seed, scores, cpu_seconds=time.process_time() - cpu))
                print(name, seed, flush=True)


def pretrained(task: Task, path: Path, work: Path) -> tuple[Callable[[], NetworkModel], Path]:
    """What makes the model, and the file of its real examples."""
    if task.name == "fashion":
        from scoreact.recipes.fashion_mnist.recipe import model as shipped

        return shipped, path
    folder, data = work / task.name, work / f"{task.name}.npz"
    if task.name == "xray":
        return lambda: read_model(folder), path
    np.savez(data, data=task.train[0])
    if not (folder / "model.json").exists():
        sa.pretrain(folder, data, kind="series", steps=1500, batch_size=32, width=32, progress=False)
    return lambda: read_model(folder), data


def posterior(by_class: dict[int, np.ndarray], numbers: int, normal: list[int]) -> dict[int, np.ndarray]:
    """`sa.score(..., "posterior")` of path scores as of every class, in bits a number."""
    log_p = np.stack(list(by_class.values())) * -numbers * np.log(2)
    return {c: np.logaddexp.reduce(np.delete(log_p, c, 0), axis=0) - log_p[c] for c in normal}


def before(task: Task, kept: Kept, model: NetworkModel, work: Path) -> None:
    """The methods that no tuning goes before."""

    def said(detector: str, make: Callable[[], dict[int, np.ndarray]]) -> None:
        if not kept.has(task.name, detector, 0):
            cpu = time.process_time()
            kept.add(task.lines(detector, 0, make(), cpu_seconds=time.process_time() - cpu))
            print(detector, flush=True)

    def path() -> dict[int, np.ndarray]:
        return stored(work / f"{task.name}-path.npz", lambda: task.scored(model, "path", **PLAN))

    def coarse(every: bool) -> dict[int, np.ndarray]:
        prompts = {c: str(c) for c in range(len(model.classes))} if every else task.prompts
        return {
            c: sa.score(model, task.test, "path", prompts=p or None, least_noise=COARSE, **PLAN)
            for c, p in prompts.items()
        }

    def typicality() -> dict[int, np.ndarray]:
        return {
            c: abs(path()[c] - sa.score(model, task.train[c][:40], "path", prompts=p or None, **PLAN).mean())
            for c, p in task.prompts.items()
        }

    said("path", path)
    several = len(model.classes) > 1
    if not kept.has(task.name, "coarse", 0):
        cpu, found = time.process_time(), coarse(several)
        seconds = time.process_time() - cpu
        kept.add(task.lines("coarse", 0, {c: found[c] for c in task.prompts}, cpu_seconds=seconds))
        if several:
            kept.add(
                task.lines("posterior", 0, posterior(found, task.test[0].size, list(task.prompts)), cpu_seconds=seconds)
            )
    said("typicality", typicality)
    if task.test.dtype == np.uint8:
        from scoreact.evaluation.anomaly_scores import png_bits

        png = png_bits(torch.from_numpy(task.test).float() / 255).numpy()
        said("complexity", lambda: {c: s - png for c, s in path().items()})
    normal = 60 if task.name == "fashion" else 100
    said("norms", lambda: task.scored(model, "norms", normal, levels=6))
    said("scoped", lambda: task.scored(model, "scoped", normal, levels=4, noises=1))


def stored(file: Path, make: Callable[[], dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """Scores that several parts need, measured once."""
    if not file.exists():
        np.savez(file, **{str(c): s for c, s in make().items()})
    with np.load(file) as arrays:
        return {int(c): arrays[c] for c in arrays.files}


def tuned(task: Task, kept: Kept, make: Callable[[], NetworkModel], data: Path, work: Path, seeds: int) -> None:
    """A reward of real normal examples, the model tuned to it, and both of their scores, a seed at a time."""
    path = stored(work / f"{task.name}-path.npz", lambda: task.scored(make(), "path", **PLAN))
    how: dict[str, Any] = {"samples": 1000 if task.test.dtype == np.uint8 else 200}
    how |= {"features": "classifier", "ridge": 0.1} if task.name == "fashion" else {"features": "convolution"}
    x = torch.from_numpy(task.test).float() / (255 if task.test.dtype == np.uint8 else 1)

    def low(reward: Any) -> dict[int, np.ndarray]:
        model = make()
        names = {c: model.classes[c] for c in task.prompts}
        with torch.no_grad():
            return {c: -reward(x, model.condition([name] * len(x))).numpy() for c, name in names.items()}

    for seed in range(seeds):
        if task.name == "ecg" and not kept.has(task.name, "fine_reward", seed):
            fine = sa.discriminate(make(), data, seed=seed, **{**how, "steps": 20, "solver": "heun"})
            kept.add(task.lines("fine_reward", seed, low(fine), auc=fine.facts["auc"]))
        cpu = time.process_time()
        if all(kept.has(task.name, detector, seed) for detector in ("reward", "after")):
            continue
        reward = sa.discriminate(make(), data, seed=seed, **{"steps": 10, **how})
        if not kept.has(task.name, "reward", seed):
            kept.add(task.lines("reward", seed, low(reward), auc=reward.facts["auc"]))
        if kept.has(task.name, "after", seed):
            continue
        result = sa.finetune(make(), reward, config=sa.Config(), progress=False, seed=seed, **TUNED)
        after = task.scored(result.policy, "path", **PLAN)
        cost = {"cpu_seconds": time.process_time() - cpu, "auc": reward.facts["auc"],
                **{k: result.final[k] for k in ("policy/kl", "reward/auc") if k in result.final}}  # fmt: skip
        # the same noise in both: their difference is `sa.score(..., "ratio")`, in bits a number
        ratio = {c: after[c] - path[c] for c in path}
        coarse = task.scored(result.policy, "path", least_noise=COARSE, **PLAN)
        kept.add(
            task.lines("ratio", seed, ratio)
            + task.lines("after_coarse", seed, coarse)
            + task.lines("after", seed, after, **cost)
        )
        print("after", seed, cost, flush=True)


def labelled(values: np.ndarray, names: np.ndarray, seed: int) -> OwnData:
    """A fifth of each class is held out to calibrate by."""
    order = np.random.default_rng(seed).permutation(len(values))
    order = order[np.argsort(names[order], kind="stable")]
    x, y = torch.from_numpy(values[order]), torch.from_numpy((names[order] == "normal").astype(int))
    held = torch.arange(len(order)) % 5 == 0
    return OwnData("vectors", Examples(x[~held], y[~held]), Examples(x[held], y[held]), ("abnormal", "normal"))


def broad(task: Task, kept: Kept, work: Path, seeds: int) -> None:
    """Ratios to a model of normal and abnormal beats, which is told no labels: of a model of normal beats alone, and of itself
    tuned to a reward. A seed is of everything, also of both pretrainings."""
    normal, mixed = work / "broad-normal.npz", work / "broad-mixed.npz"
    np.savez(normal, data=task.train[0])
    np.savez(mixed, data=task.mixed[0], labels=task.mixed[1])
    for seed in range(seeds):
        if kept.has(task.name, "classified", seed):
            continue
        cpu, folders = time.process_time(), [work / f"broad-{name}-{seed}" for name in ("narrow", "broad")]
        for folder, data in zip(folders, (normal, mixed), strict=True):
            if not (folder / "model.json").exists():
                sa.pretrain(folder, data, kind="vectors", steps=1500, batch_size=64, seed=seed, progress=False)
        narrow, wide = str(folders[0]), str(folders[1])
        found = {
            "path": sa.score(narrow, task.test, "path", **PLAN),
            "coarse": sa.score(narrow, task.test, "path", least_noise=COARSE, **PLAN),
            "wide": sa.score(wide, task.test, "path", **PLAN),
            "narrow": sa.score(narrow, task.test, "ratio", reference=wide, **PLAN),
        }
        rewards = {
            "real": sa.discriminate(
                read_model(folders[1]), normal, features="values", samples=200, steps=20, solver="heun", seed=seed
            ),
            "classified": sa.classify(labelled(*task.mixed, seed), "normal", features="values", seed=seed),
        }
        for name, reward in rewards.items():
            with torch.no_grad():
                found[f"{name}_reward"] = -reward(
                    torch.from_numpy(task.test), read_model(folders[1]).condition([""] * len(task.test))
                ).numpy()
            result = sa.finetune(
                read_model(folders[1]),
                reward,
                config=sa.Config(),
                progress=False,
                seed=seed,
                **{**TUNED, "kl_weight": 1.0},
            )
            found[name] = sa.score(result.policy, task.test, "ratio", **PLAN)
        cpu = time.process_time() - cpu
        kept.add([line for name, s in found.items() for line in task.lines(name, seed, {0: s}, cpu_seconds=cpu)])
        print(
            "broad",
            seed,
            {name: round(figures(s[task.labels == 0], s[task.labels != 0])["auroc"], 3) for name, s in found.items()},
            flush=True,
        )


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
    for data in TITLES:
        some = next((x for x in lines if x["data"] == data), None)
        if some is None:
            continue
        text += [
            f"**{TITLES[data]}**, {some['normal']} normal and {some['abnormal']} abnormal test examples a class:", "",
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
                    for b in lines if (b["data"], b["detector"], b["class"]) == (data, "path", x["class"])
                )
                for seed in sorted({x["seed"] for x in lines if (x["data"], x["detector"]) == (data, other)})
            ]  # fmt: skip
            if len(gain) > 1:
                mean, half = confidence_interval(torch.tensor(gain))
                text += [
                    "",
                    f"AUROC of `{NAMES[other]}` less that of `path` before, {len(gain)} seeds: {mean:+.3f} ± {half:.3f}.",
                ]
        text.append("")
    return "\n".join(text)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """AUROC of every detector, a point a class, over seeds the mean."""
    from matplotlib.figure import Figure

    sets = [data for data in TITLES if any(x["data"] == data for x in lines)]
    figure = Figure(figsize=(12, 3.6 * math.ceil(len(sets) / 2)), layout="constrained")
    places = figure.subplots(math.ceil(len(sets) / 2), 2, squeeze=False).flatten()
    for axes in places[len(sets) :]:
        axes.axis("off")
    for axes, data in zip(places, sets, strict=False):
        rows = rows_of(lines, data)
        for y, (detector, _, means) in enumerate(reversed(rows)):
            own = [x for x in lines if (x["data"], x["detector"]) == (data, detector)]
            points = [statistics.fmean(x["auroc"] for x in own if x["class"] == c) for c in {x["class"] for x in own}]
            axes.plot(points, [y] * len(points), "o", color="#8ec1e6", markersize=4)
            axes.plot(means["auroc"][0], y, "|", color="#0f62a8", markersize=16, markeredgewidth=2)
        axes.set_yticks(
            range(len(rows)), [NAMES[d].partition(", of a model")[0] for d, _, _ in reversed(rows)], fontsize=8
        )
        axes.set(xlabel="AUROC", title=TITLES[data], xlim=(0, 1.02))
        axes.axvline(0.5, color="#bbbbbb", linewidth=0.8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("task", choices=list(EACH))
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--seeds", type=int, default=5, help="of PyOD's detectors")
    run.add_argument("--tuned", type=int, default=5, help="seeds of tuning")
    run.add_argument(
        "--parts", nargs="+", choices=["baselines", "before", "tuned"], default=["baselines", "before", "tuned"]
    )
    run.add_argument("--work", type=Path, default=Path("anomalies"), help="where models and scores are kept")
    show = commands.add_parser("table")
    show.add_argument("--write", type=Path, help="put the table between the marks of this page")
    show.add_argument("--picture", type=Path)
    options = parser.parse_args()
    kept = Kept(LINES)
    if options.command == "run":
        torch.set_num_threads(1)
        options.work.mkdir(parents=True, exist_ok=True)
        task = Task(options.task, options.data)
        if "baselines" in options.parts:
            baselines(task, kept, options.seeds)
        if options.task == "broad":
            broad(task, kept, options.work, options.tuned)
            return
        make, data = pretrained(task, options.data, options.work)
        if "before" in options.parts:
            before(task, kept, make(), options.work)
        if "tuned" in options.parts:
            tuned(task, kept, make, data, options.work, options.tuned)
        return
    print(table(kept.lines), end="")
    if options.picture:
        draw(kept.lines, options.picture)
    if options.write:
        put(table(kept.lines), options.write, MARKS)


if __name__ == "__main__":
    main()
