"""Chest X-rays: a finding as the reward, at kl_weight 1, judged by another classifier; what the samples teach; what is copied.

    scoreact pretrain xray --data pneumonia_mnist.npz --labels --label-dropout 0.5 --width 24 --batch-size 64 --steps 3000
    python benchmarks/health.py run --data pneumonia_mnist.npz --model xray
    python benchmarks/health.py balance --data pneumonia_mnist.npz --model xray --seeds 1
    python benchmarks/health.py table                   # of benchmarks/health.jsonl; --write puts it into the results page
    python benchmarks/health.py picture --data pneumonia_mnist.npz --model xray

The data are PneumoniaMNIST (MedMNIST v2, CC BY 4.0), which the reader downloads: 28 x 28, label 1 pneumonia, 0 none. The
network is learned with labels half of the time, so that it holds two models: of all pictures, which is tuned, and of each
class, which is what labels at pretraining give. The reward is fitted to one half of the training pictures and calibrated on
the validation pictures; the judge, a small convolutional network, is trained on the other half. A seed is that of the halves,
the judge, the training run and the samples; the pretrained network is one. Lines are kept as they are made; runs that are in
the file are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from page_tables import put
from torch import Tensor, nn

import scoreact as sa
from scoreact.dynamics import prediction
from scoreact.dynamics.grids import grid_times
from scoreact.dynamics.samplers import sampler_by_name
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.evaluation.memorisation import memorisation
from scoreact.evaluation.metrics import confidence_interval, kid
from scoreact.models.network import NetworkModel
from scoreact.recipes.own_model import PictureModel, read_model
from scoreact.rewards.class_probability import ClassProbability
from scoreact.rewards.learned import auc_of
from scoreact.sampling.draw import draw
from scoreact.support.own_data import Examples, OwnData

ROOT = Path(__file__).resolve().parents[1]
LINES, PAGE = ROOT / "benchmarks" / "health.jsonl", ROOT / "docs" / "results" / "health.md"
PICTURE = PAGE.with_suffix(".png")
MARKS = "<!-- health-table -->\n", "<!-- /health-table -->"
CLASSES = ("none", "pneumonia")
STEPS, SAMPLES = 10, 400
SETTINGS: dict[str, Any] = {
    "kl_weight": 1.0, "algorithm": "adjoint_matching", "reward_gradient": "exact", "steps": STEPS, "batch_size": 32,
    "iterations": 14, "reuse_reference": 4, "reference_batches": 8, "minibatch_size": 128, "kl_states": 0,
    "learning_rate": 2e-4, "heldout_samples": 128, "evaluate_every": 14, "average": 0.8, "decay_from": 0.4,
}  # fmt: skip


def pictures(path: Path) -> dict[str, Examples]:
    """train, val, test."""
    import numpy as np

    with np.load(path) as arrays:
        return {
            part: Examples(
                torch.from_numpy(arrays[f"{part}_images"])[:, None],
                torch.from_numpy(arrays[f"{part}_labels"]).long().flatten(),
            )
            for part in ("train", "val", "test")
        }


def of_class(examples: Examples, row: int) -> Tensor:
    assert examples.labels is not None
    return examples.floats()[examples.labels == row]


def unconditional(folder: Path) -> NetworkModel:
    """The network of all pictures: it is called without a label."""
    model = read_model(folder)
    return PictureModel(model.network, RectifiedFlow(), prediction.velocity, model.shape, None, low=-1.0, high=1.0)


def sample(model: Any, prompt: str, count: int, seed: int) -> Tensor:
    return draw(model, [prompt] * count, sampler_by_name("ddim"), grid_times("uniform", model.schedule, STEPS), seed)[1]


# --- the judge --------------------------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Three strided convolutions and a linear layer: pictures [B, 1, 28, 28] -> logits [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(32, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def trained_judge(x: Tensor, y: Tensor, seed: int, steps: int = 600) -> Judge:
    """Both classes count alike."""
    torch.manual_seed(seed)
    judge, generator = Judge(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    weight = len(y) / (2 * torch.bincount(y, minlength=2).float())
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(judge(x[rows]), y[rows], weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def auc(judge: Judge, examples: Examples) -> float:
    logits = judge(examples.floats()).diff(dim=1)[:, 0]
    assert examples.labels is not None
    return auc_of(logits[examples.labels == 1], logits[examples.labels == 0])


# --- runs -------------------------------------------------------------------------------------------------------------


class Seed:
    """What all lines of a seed share: the halves of the data, the reward and the judge."""

    def __init__(self, data: Path, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.parts = folder, seed, pictures(data)
        train = self.parts["train"]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        self.first, self.second = train[order[: len(order) // 2]], train[order[len(order) // 2 :]]
        self.reward: ClassProbability = sa.classify(
            OwnData("pictures", self.first, self.parts["val"], CLASSES), "pneumonia", seed=seed
        )
        assert self.second.labels is not None
        self.judge = trained_judge(self.second.floats(), self.second.labels, seed)

    def measures(self, x: Tensor, row: int, asked: bool = True) -> dict[str, Any]:
        """Of samples that are to be of a class. asked: of that class alone, so that they are compared with pictures of it."""
        real = of_class(self.first, row)  # which the judge has not seen
        mean, scale = real_scale(self.judge.features(real))
        theirs, own = ((self.judge.features(part) - mean) / scale for part in (real, x))
        shuffled = theirs[torch.randperm(len(theirs), generator=torch.Generator().manual_seed(0))]
        distance, error = kid(shuffled, own)
        train, held = (
            (of_class(self.parts[part], row) if asked else self.parts[part].floats()).flatten(1)
            for part in ("train", "val")
        )
        near = memorisation(train, held, x.flatten(1))
        return {
            "samples": len(x), "reward_share": float(self.reward.log_probabilities(x)[:, row].exp().mean()),
            "judge_share": float((self.judge(x).argmax(1) == row).double().mean()), "kid": distance, "kid_se": error,
            **near._asdict(),
        }  # fmt: skip

    def tune(self, row: int, out: Path | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Samples of the posterior given a class, and what the run says."""
        import dataclasses

        reward = dataclasses.replace(self.reward, target=CLASSES[row])
        torch.manual_seed(self.seed)
        start = time.process_time()
        result = sa.finetune(
            unconditional(self.folder), reward, [""], seed=self.seed, out=out, progress=False, **SETTINGS
        )
        seconds = time.process_time() - start
        x = sample(result.policy.model, "", SAMPLES, self.seed)
        said = {name.partition("/")[2]: result.final[name] for name in ("reward/heldout", "policy/kl", "objective/J")}
        said |= {name.partition("/")[2]: result.reference[name] for name in (
            "objective/J_ref", "objective/J_star", "objective/KL_star", "objective/effective_samples"
        )}  # fmt: skip
        said["reward"] = said.pop("heldout")  # `memorisation` has a number of that name
        return x, {**said, "recovered": result.final["objective/recovered"], "cpu_s": seconds}


def real_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), features.std(0) + 1e-6


def run(data: Path, folder: Path, seed: int, out: Path) -> None:
    known = {(line["seed"], line["what"], line["class"]) for line in lines(out)}
    if (seed, "teaches", "both") in known:
        return
    torch.set_num_threads(1)
    it = Seed(data, folder, seed)
    row = it.reward.facts["by_class"][1]
    add(out, {
        "seed": seed, "what": "classifiers", "class": "both", "temperature": it.reward.temperature,
        "calibration_error": row["calibration_error"], "calibration_error_before": row["calibration_error_before"],
        "reward_auc": row["auc"], "judge_auc_val": auc(it.judge, it.parts["val"]),
        "judge_auc_test": auc(it.judge, it.parts["test"]),
    })  # fmt: skip
    sets: dict[str, list[Tensor]] = {"conditional": [], "tuned": []}
    before = sample(unconditional(folder), "", 2 * SAMPLES, seed)
    conditional = read_model(folder)
    for i, name in enumerate(CLASSES):
        add(out, {"seed": seed, "what": "held out", "class": name, **it.measures(of_class(it.parts["val"], i), i)})
        add(out, {"seed": seed, "what": "pretrained", "class": name, **it.measures(before[:SAMPLES], i, asked=False)})
        sets["conditional"].append(sample(conditional, str(i), SAMPLES, seed))
        add(out, {"seed": seed, "what": "conditional", "class": name, **it.measures(sets["conditional"][i], i)})
        tuned, said = it.tune(i)
        sets["tuned"].append(tuned)
        add(out, {"seed": seed, "what": "tuned", "class": name, **it.measures(tuned, i), **said})
    add(out, {"seed": seed, "what": "teaches", "class": "both", **teaching(it, sets, before)})


def balance(data: Path, folder: Path, seed: int, out: Path, target: float = 0.5) -> None:
    """The share of pictures without a finding, which are the rare ones, raised to a target: minimum-KL calibration."""
    if any(line["seed"] == seed and line["what"] == "balanced" for line in lines(out)):
        return
    torch.set_num_threads(1)
    it = Seed(data, folder, seed)

    def share(samples: Tensor) -> Tensor:
        return it.reward.log_probabilities(samples)[:, 0].exp()

    share.differentiable = True  # type: ignore[attr-defined]  # its gradient is followed
    own = {name: value for name, value in SETTINGS.items() if name != "kl_weight"}
    start = time.process_time()
    found = sa.calibrate(
        unconditional(folder), share, target, tolerance=0.15, samples=200, rounds=3, prompts=[""], progress=False,
        seed=seed, **{**own, "iterations": 8, "evaluate_every": 8},
    )  # fmt: skip
    seconds = time.process_time() - start
    for name, model in (("unbalanced", unconditional(folder)), ("balanced", found.result.policy.model)):
        x = sample(model, "", 2 * SAMPLES, seed)
        rare = it.reward.log_probabilities(x).argmax(1) == 0
        said = {"path_kl": found.path_kl, "least_kl": found.facts["least_kl"], "weight": found.weights[0],
                "met": found.met, "rounds": len(found.facts["rounds"]), "cpu_s": seconds}  # fmt: skip
        line = {**it.measures(x[rare], 0), "samples": len(x), "reward_share": float(share(x).mean()),
                "judge_share": float((it.judge(x).argmax(1) == 0).double().mean())}  # fmt: skip
        add(out, {"seed": seed, "what": name, "class": "none", **line, **(said if name == "balanced" else {})})


def teaching(it: Seed, sets: dict[str, list[Tensor]], before: Tensor) -> dict[str, float]:
    """AUC on real test pictures of a classifier that learned from real or from generated pictures, as many of a class."""
    taught = {"real": [of_class(it.second, i)[:SAMPLES] for i in (0, 1)], **sets}
    found = {}
    for name, (none, some) in taught.items():
        labels = torch.cat([torch.zeros(len(none)), torch.ones(len(some))]).long()
        found[f"{name}_auc"] = auc(trained_judge(torch.cat([none, some]), labels, 1000 + it.seed), it.parts["test"])
    labels = it.reward.log_probabilities(before).argmax(1)
    found["pretrained_auc"] = auc(trained_judge(before, labels, 1000 + it.seed), it.parts["test"])
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def add(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}) + "\n")


# --- what is shown ------------------------------------------------------------------------------------------------------

NAMES = {
    "held out": "real, held out", "pretrained": "pretrained, all pictures", "conditional": "pretrained, given the label",
    "tuned": "tuned to log p(class)", "unbalanced": "pretrained", "balanced": "calibrated",
}  # fmt: skip
TAUGHT = ("real", "pretrained", "conditional", "tuned")


def over_seeds(rows: list[dict[str, Any]], name: str, scale: float = 1.0, digits: int = 2) -> str:
    """Mean over seeds and half width of Student's 95 % interval."""
    values = [scale * row[name] for row in rows if name in row]
    if not values:
        return "-"
    mean, half = confidence_interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def tables(rows: list[dict[str, Any]]) -> str:
    """All of them, of the seeds whose lines are complete."""
    whole = sorted({row["seed"] for row in rows if row["what"] == "teaches"})
    kept = [row for row in rows if row["seed"] in whole]

    def of(what: str, name: str) -> list[dict[str, Any]]:
        return [row for row in kept if row["what"] == what and row["class"] == name]

    header = [
        "class", "pictures", "its probability, reward's classifier", "its share, judge", "KID", "path KL, nats",
        "share of J\\* - J_ref", "training is closer", "sample is closer", "very near, %",
    ]  # fmt: skip
    found = [f"{len(whole)} seeds: means and 95 % intervals of Student's t over them.", "", *head(header, 2)]
    for name in CLASSES:
        for what in ("held out", "pretrained", "conditional", "tuned"):
            own = of(what, name)
            near = ["-"] * 3 if what == "held out" else [
                over_seeds(own, "to_training"), over_seeds(own, "closer"), over_seeds(own, "copies", 100, 1)
            ]  # fmt: skip
            cells = [
                name, NAMES[what], over_seeds(own, "reward_share"), over_seeds(own, "judge_share"),
                over_seeds(own, "kid", digits=1), over_seeds(own, "kl"), over_seeds(own, "recovered"), *near,
            ]  # fmt: skip
            found.append(f"| {' | '.join(cells)} |")
    classifiers, taught = of("classifiers", "both"), of("teaches", "both")
    said = {name: over_seeds(classifiers, name, digits=3) for name in classifiers[0] if name not in ("what", "class")}
    names = zip(TAUGHT, (
        "real pictures", "pretrained, all pictures, with the labels of the reward's classifier", "pretrained, given the label",
        "tuned to each class",
    ), strict=True)  # fmt: skip
    found += [
        "",
        f"The reward's classifier: AUC {said['reward_auc']} on validation pictures, expected calibration error "
        f"{said['calibration_error']} ({said['calibration_error_before']} before its temperature, {said['temperature']}). "
        f"The judge: AUC {said['judge_auc_val']} on validation and {said['judge_auc_test']} on test pictures.",
        "", *head(["a classifier that learned from", "AUC on real test pictures"], 1),
        *(f"| {what} | {over_seeds(taught, f'{name}_auc', digits=3)} |" for name, what in names),
    ]  # fmt: skip
    balanced = [row for row in rows if row["what"] in ("unbalanced", "balanced")]
    if any(row["what"] == "balanced" for row in balanced):
        found += ["", balance_table(balanced)]
    return "\n".join(found) + "\n"


def head(names: list[str], texts: int) -> list[str]:
    """A table's first two lines; the first columns hold texts."""
    return [f"| {' | '.join(names)} |", f"| {' | '.join(['---'] * texts + ['---:'] * (len(names) - texts))} |"]


def balance_table(rows: list[dict[str, Any]]) -> str:
    seeds = len({row["seed"] for row in rows if row["what"] == "balanced"})
    header = [
        "model", "its mean probability, reward's classifier", "its share, judge", "path KL, nats", "least KL",
        "KID of those without",
    ]  # fmt: skip
    found = [f"Share of pictures without a finding, target 0.5; seeds: {seeds}.", "", *head(header, 1)]
    for what in ("unbalanced", "balanced"):
        own = [row for row in rows if row["what"] == what]
        cells = [over_seeds(own, n) for n in ("reward_share", "judge_share", "path_kl", "least_kl")]
        found.append(f"| {NAMES[what]} | {' | '.join(cells)} | {over_seeds(own, 'kid', digits=1)} |")
    return "\n".join(found)


def picture(data: Path, folder: Path, path: Path, columns: int = 8) -> None:
    """Seed 0: the pretrained model, the same noise tuned to none, and real pictures without a finding."""
    from matplotlib.figure import Figure

    it = Seed(data, folder, 0)
    tuned, _ = it.tune(0)
    rows = {
        "pretrained": sample(unconditional(folder), "", SAMPLES, 0), "tuned to none": tuned,
        "real, none": of_class(it.parts["val"], 0),
    }  # fmt: skip
    figure = Figure(figsize=(columns * 0.9, 3 * 1.0), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(3, 1), rows.items(), strict=True):
        axes.imshow(torch.cat(list(x[:columns, 0]), 1), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "balance", "table", "picture"])
    parser.add_argument("--data", type=Path, help="pneumonia_mnist.npz")
    parser.add_argument("--model", type=Path, help="the folder of the pretrained model")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--write", action="store_true", help="put the table into the results page")
    options = parser.parse_args()
    if options.what in ("run", "balance"):
        for seed in range(options.seeds):
            {"run": run, "balance": balance}[options.what](options.data, options.model, seed, options.out)
    elif options.what == "picture":
        picture(options.data, options.model, PICTURE)
    else:
        found = tables(lines(options.out))
        print(found)
        if options.write:
            put(found, PAGE, MARKS)


if __name__ == "__main__":
    main()
