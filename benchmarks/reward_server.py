"""What overlap saves when a reward is slow: seconds of a rollout whose parts are scored by a reward server.

    python benchmarks/reward_server.py                     # a reward that sleeps 1 s a request, four parts of 16 pictures

The model is the Fashion-MNIST flow of `plain`; the server is a process of its own at 127.0.0.1. Four rollouts a round, in
turn: a reward that costs nothing, the server with overlap and without, and the same samples scored alone. Rewards must be
equal to the last bit with and without overlap.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from scoreact.recipes.base import recipes
from scoreact.rewards import Reward, load
from scoreact.training.config import updated
from scoreact.training.trainer import Trainer


def slow(images: Tensor, seconds: float = 1.0) -> Tensor:
    """What the server scores with: the mean of the picture, [B], after a sleep."""
    time.sleep(seconds)
    return images.flatten(1).mean(1)


def trainer(reward: Reward, parts: int, size: int, steps: int) -> Trainer:
    recipe = recipes()["plain"]
    problem = recipe.build(**recipe.options)
    own = {"algorithm": "ctrl_pathwise", "batch_size": parts * size, "steps": steps, "value_loss": "soft"}
    config = updated(recipe.config_for(own), own)
    return Trainer(problem.model, reward, problem.prompts, problem.value_network, config)


def timed(work: Callable[[], tuple[object, Tensor]]) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    rewards = work()[1]
    return time.perf_counter() - begin, rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="that the reward sleeps, a request")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--size", type=int, default=16, help="pictures a part")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shape = options.parts, options.size, options.steps
    words = [sys.executable, "-m", "scoreact", "reward-server", f"{os.path.abspath(__file__)}:slow",
             "--option", f"seconds={options.seconds}", "--port", "0"]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[-1]
            free = trainer(lambda images, condition: images.flatten(1).mean(1), *shape)
            runs = {
                overlap: trainer(load(url, batch_size=options.size, overlap=overlap), *shape)
                for overlap in (False, True)
            }
            found: dict[str, list[float]] = {"sampling": [], "scoring": [], "one by one": [], "overlap": []}
            for _ in range(options.rounds):
                found["sampling"].append(timed(free.rollout)[0])
                without, a = timed(runs[False].rollout)
                overlapped, b = timed(runs[True].rollout)
                assert torch.equal(a, b), "overlap changed a reward"
                found["one by one"].append(without)
                found["overlap"].append(overlapped)
                pictures = torch.zeros(options.parts * options.size, 1, 28, 28)
                condition = free.policy.model.condition(free.prompts[:1] * len(pictures))
                found["scoring"].append(timed(lambda p=pictures, c=condition: (p, runs[False].reward(p, c)))[0])  # type: ignore[misc]
        finally:
            server.kill()
    print(f"{options.parts} parts of {options.size} pictures, {options.steps} steps, {torch.get_num_threads()} threads; "
          f"the reward sleeps {options.seconds:g} s a request; {options.rounds} rounds")  # fmt: skip
    for name, seconds in found.items():
        print(f"{name:<11} {median(seconds):6.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"saved       {median(found['one by one']) - median(found['overlap']):6.2f} s a rollout")


if __name__ == "__main__":
    main()
