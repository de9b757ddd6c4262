"""Side by side with TRL 0.23.1 on the folder of `shapes.py pretrain` or `counting.py pretrain`: speed and memory, progress.

    python benchmarks/trl_side_by_side.py shapes --peer peer/bin/python --out side.jsonl equal alignprop progress
    python benchmarks/trl_side_by_side.py shapes --out side.jsonl          # the tables of what is there

`peer_trl.py` says how to make the peer's environment. Every run is a process of its own with one thread in float32, on
the same weights, captions, reward, samples, steps, guidance, LoRA rank and number of updates. Measured is CPU time (user
and system), since a machine may be shared, from the start of training on; loading is left out on both sides. `equal` and
`alignprop` alternate the two systems in pairs. `progress` gives both a few settings on one seed, and counts the CPU seconds
that ours needs to gain as much held-out reward as the peer's best rate gains in all its epochs; each side draws the held-out
pictures as it draws in training, and the time of looking at them is left out. Resumable: runs that are in the file are not
run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = dict[str, Any]

BASE: Run = {"epochs": 5, "samples": 32, "minibatch": 16, "steps": 10, "guidance": 2.0, "learning_rate": 3e-4}
TRL_CLIP = 1e-4  # its default, of a ratio of means over the latent's numbers
EQUAL_DDPO: Run = {  # the same rule in our settings
    "algorithm": "ddpo", "temperature": "dimensions", "clip_range": TRL_CLIP / (1 / BASE["steps"]) ** 0.5,
    "accumulate": BASE["steps"],
}  # fmt: skip
EQUAL_DRAFT: Run = {  # AlignPropTrainer always computes each step again for its gradient
    "algorithm": "draft", "last_steps": 0, "kl_share": 0.0, "accumulate": 2, "recompute": True,
}  # fmt: skip
PEER_RATES = {"ddpo": (1e-3, 3e-3, 1e-2, 3e-2), "alignprop": (3e-4, 1e-3, 3e-3)}
GRADIENT: dict[str, list[Run]] = {  # rules that follow the reward's gradient, as AlignProp does
    "draft": [
        {"algorithm": "draft", "last_steps": 5, "learning_rate": rate, "iterations": 20, "kl_share": 0.0}
        for rate in (5e-3, 1e-2, 1.5e-2)
    ],
    "adjoint_matching": [
        {"algorithm": "adjoint_matching", "minibatch_size": 80, "learning_rate": rate, "iterations": 10}
        for rate in (2e-3, 4e-3, 1e-2)
    ],
}
# of `progress`: each rule's settings, tried on the first seed; the best goes on to the others
OURS: dict[str, list[Run]] = {
    "draft": [{"algorithm": "draft", "last_steps": 5, "learning_rate": 2e-2, "iterations": 12, "kl_share": 0.0}],
    "ddpo": [{"algorithm": "ddpo", "minibatch_size": 32, "learning_rate": rate} for rate in (2e-3, 4e-3)],
}
HELDOUT, LOOK = 240, 4  # pictures looked at, every LOOK epochs of `progress`


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ours(run: Run) -> Run:
    """One run of scoreact, in this process."""
    import torch
    from text_to_image import captions_of, reward

    import scoreact as sa
    from scoreact import rewards
    from scoreact.models.pipelines.opening import pipeline_model
    from scoreact.models.value_networks import Encoder
    from scoreact.training.config import Config, usable

    torch.set_num_threads(1)
    torch.manual_seed(run["seed"])  # of the adapter's initial weights
    model = pipeline_model(
        run["folder"], lora_rank=4, guidance_scale=run["guidance"], vae_slicing=False,
    )  # fmt: skip
    captions = captions_of(run["folder"])
    found: Run = {"rewards": [], "cpu": [], "cpu_before": 0.0, "looks": [], "costs": []}
    begin, now = cpu_seconds(), 0.0  # now: CPU seconds of training so far
    spent = (0.0, 0.0)  # calls of the reward and of the network so far

    def note(kind: str, metrics: dict[str, float]) -> None:
        nonlocal begin, now, spent
        if kind == "evaluation":
            found["looks"].append((now, metrics["reward/heldout"]))
            found["costs"].append((*spent, metrics["policy/kl"]))
            begin = cpu_seconds() - now  # looking is not training
        elif kind in ("reference", "iteration"):
            now = cpu_seconds() - begin
        if kind == "reference":
            found["cpu_before"] = now  # the first look at the reference, before the first iteration
        elif kind == "iteration":
            found["rewards"].append(metrics["reward/mean"])
            found["cpu"].append(now)
            spent = metrics["cost/reward_calls"], metrics["cost/network_calls"]

    settings = {
        "batch_size": run["samples"], "minibatch_size": run["minibatch"], "steps": run["steps"], "seed": run["seed"],
        "iterations": run["epochs"], "learning_rate": run["learning_rate"], "reference_batches": 1, "epochs": 1,
        "warmup": 0, "decay_from": 1.0, "average": 0.0, "guard": "off", "heldout_samples": run.get("heldout", 2),
        "evaluate_every": run.get("look", 10**6),
        "kl_states": 0, "kl_weight": 0.1, "kl_limit": 1e9, "value_inputs": "x_data_hat",
        "value_batch_size": 128,
    }  # fmt: skip
    given = usable(Config(), {**settings, **run["settings"]})
    sa.finetune(
        model, rewards.load(reward, folder=run["folder"]), captions, on_event=note, **given,
        value_network=lambda: Encoder(model.shape[0], classes=len(captions)),
    )  # fmt: skip
    return found


def peer(folder: str, **changes: Any) -> Run:
    return {"who": "trl", "folder": folder, **BASE, "trainer": "ddpo", "clip_range": TRL_CLIP, **changes}


def own(folder: str, settings: Run, **changes: Any) -> Run:
    return {"who": "scoreact", "folder": folder, **BASE, "settings": settings, **changes}


class Bench:
    """Runs, each in a process of its own, remembered in a file of JSON lines."""

    def __init__(self, out: Path, python: str | None, finish: Callable[[Run, Run], None] | None = None) -> None:
        """finish: told what was run and what was found, before it is remembered."""
        self.out, self.python, self.finish = out, python, finish
        lines = out.read_text().splitlines() if out.exists() else []
        self.known = {self._key(line["run"]): line["found"] for line in map(json.loads, lines)}

    @staticmethod
    def _key(run: Run) -> str:
        return json.dumps(run, sort_keys=True)

    def knows(self, run: Run) -> bool:
        return self._key(run) in self.known

    def __call__(self, run: Run) -> Run:
        if self.knows(run):
            return self.known[self._key(run)]
        here = Path(__file__).resolve().parent
        if run["who"] == "trl":
            if self.python is None:
                raise SystemExit("give --peer PYTHON, that of an environment with trl 0.23.1; peer_trl.py says how.")
            words = [self.python, str(here / "peer_trl.py"), json.dumps(run)]
        else:
            words = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(run)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{run} failed:\n{done.stderr[-3000:]}")
        found: Run = json.loads(done.stdout.splitlines()[-1])
        if self.finish is not None:
            self.finish(run, found)
        with self.out.open("a") as file:
            file.write(json.dumps({"run": run, "found": found}) + "\n")
        self.known[self._key(run)] = found
        label = run.get("settings", {}).get("algorithm", run.get("trainer"))
        print(
            f"{run['who']} {label} seed {run['seed']} rate {run['learning_rate']}: {found['cpu'][-1]:.0f} CPU s, "
            f"last rewards {statistics.fmean(found['rewards'][-5:]):.3f}", flush=True,
        )  # fmt: skip
        return found


# --- the parts -------------------------------------------------------------------------------------------------------


def equal(bench: Bench, folder: str, trainer: str, settings: Run, pairs: int) -> list[tuple[Run, Run]]:
    """Alternating runs of the same rule on both sides: peer, ours, peer, ours, ..."""
    return [(bench(peer(folder, trainer=trainer, seed=s)), bench(own(folder, settings, seed=s))) for s in range(pairs)]


def equal_table(name: str, found: list[tuple[Run, Run]]) -> list[str]:
    """Samples per CPU second of the iterations themselves, and of all that training starts with; peak memory."""
    samples = BASE["samples"] * BASE["epochs"]
    lines = [
        f"| {name}, {len(found)} pairs | TRL | scoreact | median of the ratios | all ratios |",
        "|---|---|---|---|---|",
    ]

    def row(label: str, of: Callable[[Run], float], unit: str) -> str:
        theirs, mine = ([of(run) for run in side] for side in zip(*found, strict=True))
        ratios = [m / t for t, m in zip(theirs, mine, strict=True)]
        cells = [f"{statistics.median(side):.3g} {unit}" for side in (theirs, mine)]
        every = ", ".join(f"{r:.2f}" for r in sorted(ratios))
        return f"| {label} | {' | '.join(cells)} | {statistics.median(ratios):.2f} | {every} |"

    lines.append(row("iterations", lambda run: samples / (run["cpu"][-1] - run["cpu_before"]), "samples / CPU s"))
    lines.append(row("with ours' look at the reference", lambda run: samples / run["cpu"][-1], "samples / CPU s"))
    lines.append(row("peak memory", lambda run: run["peak_rss_mib"], "MiB"))
    return lines


def gains(run: Run) -> list[tuple[float, float]]:
    """(CPU seconds, held-out reward above the start's) at each look."""
    start = run["looks"][0][1]
    return [(seconds, reward - start) for seconds, reward in run["looks"]]


def seconds_to(run: Run, target: float) -> float:
    """CPU seconds until the gain is `target`, between two looks on the straight line; inf: never."""
    points = gains(run)
    for (before, low), (after, high) in itertools.pairwise(points):
        if high >= target:
            return before + (after - before) * (target - low) / (high - low)
    return float("inf")


def progress(
    bench: Bench, folder: str, trainer: str, rules: dict[str, list[Run]], seeds: int, epochs: int
) -> list[str]:
    """The peer's best rate sets the target; ours' best settings of each rule are timed to it, over seeds."""
    looking = {"epochs": epochs, "heldout": HELDOUT, "look": LOOK}

    def gain(run: Run) -> float:
        return gains(bench(run))[-1][1]

    def row(name: str, runs: list[Run], times: list[float]) -> str:
        ends = [gain(run) for run in runs]
        found = [bench(run) for run in runs]
        cells = [
            name, ", ".join("never" if s == float("inf") else f"{s:.0f}" for s in times),
            f"{statistics.median(theirs) / statistics.median(times):.1f}",
            f"{statistics.fmean(ends):+.3f} ({min(ends):+.3f} to {max(ends):+.3f})",
            f"{statistics.fmean(run['looks'][0][1] for run in found):.3f}",
            f"{statistics.median(run['cpu'][-1] for run in found):.0f}",
            f"{statistics.median(run['peak_rss_mib'] for run in found):.0f}",
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    tried = [peer(folder, trainer=trainer, seed=0, learning_rate=r, **looking) for r in PEER_RATES[trainer]]
    rival = max(tried, key=gain)
    rivals = [{**rival, "seed": seed} for seed in range(seeds)]
    target = statistics.fmean(gain(run) for run in rivals)
    theirs = [min(seconds_to(bench(run), target), bench(run)["cpu"][-1]) for run in rivals]
    lines = [
        f"| {seeds} seeds, {epochs} epochs of {BASE['samples']}, target +{target:.3f} | CPU s to the target, by seed "
        "| TRL / ours, medians | gain in held-out reward (range) | start | CPU s in all | MiB |",
        "|---|---|---|---|---|---|---|",
        row(f"TRL {trainer}, rate {rival['learning_rate']:g}", rivals, theirs),
    ]
    for settings in rules.values():
        chosen = max((own(folder, s, seed=0, **looking) for s in settings), key=gain)
        runs = [{**chosen, "seed": seed} for seed in range(seeds)]
        name = " ".join(str(v) if k == "algorithm" else f"{k}={v}" for k, v in chosen["settings"].items())
        lines.append(row(name, runs, [seconds_to(bench(run), target) for run in runs]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of `shapes.py pretrain` or `counting.py pretrain`")
    parser.add_argument("parts", nargs="+", choices=["equal", "alignprop", "progress", "gradient"])
    parser.add_argument("--peer", metavar="PYTHON", help="of the peer's environment; only for runs not yet in --out")
    parser.add_argument("--out", type=Path, default=Path("trl_side_by_side.jsonl"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20, help="of `progress` and `gradient`")
    arguments = parser.parse_args()
    bench, folder = Bench(arguments.out, arguments.peer), arguments.folder
    for part in arguments.parts:
        if part == "equal":
            lines = equal_table("DDPO", equal(bench, folder, "ddpo", EQUAL_DDPO, arguments.pairs))
        elif part == "alignprop":
            lines = equal_table("AlignProp", equal(bench, folder, "alignprop", EQUAL_DRAFT, arguments.pairs))
            keeping = equal(bench, folder, "alignprop", {**EQUAL_DRAFT, "recompute": False}, arguments.pairs)
            lines += ["", *equal_table("AlignProp, ours keeping all steps", keeping)]
        elif part == "progress":
            lines = progress(bench, folder, "ddpo", OURS, arguments.seeds, arguments.epochs)
        else:
            lines = progress(bench, folder, "alignprop", GRADIENT, arguments.seeds, arguments.epochs)
        print("\n" + "\n".join(lines) + "\n", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        line = ours(json.loads(sys.argv[2]))
        print(json.dumps({**line, "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
    else:
        main()
