"""Two processes on one run, started as a user starts them: same weights in both, other paths, one that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from scoreact.control.linear_value import RidgeFit
from scoreact.control.value_fit import Sample
from scoreact.recipes.base import recipes
from scoreact.support import distributed
from scoreact.support.errors import ProcessLost
from scoreact.support.files import read_tensors
from scoreact.training.config import updated
from scoreact.training.trainer import Trainer
from scoreact.types import Condition

WORKER = """
from pathlib import Path

import torch

from scoreact.support import distributed
from scoreact.support.files import write_tensors
from scoreact.training.config import updated
from scoreact.recipes.base import recipes
from scoreact.training.trainer import Trainer

distributed.start()
rank, found = distributed.rank(), torch.full((2,), float(distributed.rank()))
distributed.average([None, found])
assert found.tolist() == [0.5, 0.5]
assert distributed.mean(1.0 + rank) == 1.5
assert distributed.gathered(torch.tensor([rank, rank + 10])).tolist() == [0, 10, 1, 11]
assert distributed.first(rank == 0) and not distributed.first(rank == 1)

recipe = recipes()["gaussian"]
problem = recipe.build()
torch.manual_seed(rank)
with torch.no_grad():  # as if each had made its own first weights
    problem.model.residual.last.weight.normal_(std=1e-3)
settings = {"batch_size": 32, "heldout_samples": 8, "value_first_steps": 5, "value_steps": 3, "device": "cpu", "max_kl": 1e-3}
trainer = Trainer(problem.model, problem.reward, problem.prompts, problem.value_network, updated(recipe.config, settings))
reference = trainer.look_at_reference()
shares = []
for _ in range(3):
    shares.append(torch.tensor(trainer.iterate()["policy/step_share"]))
trajectory = trainer.rollout().trajectory
weights = {f"policy.{n}": p for n, p in trainer.policy.model.named_parameters()}
weights |= {f"value.{n}": p for n, p in trainer.value.value.state_dict().items()}
weights |= {"J_star": torch.tensor(reference["objective/J_star"]), "shares": torch.stack(shares)}

settings = {"algorithm": "draft", "batch_size": 32, "heldout_samples": 8, "device": "cpu"}  # its metrics are the rule's own
drawing = Trainer(recipe.build().model, problem.reward, problem.prompts, None, updated(recipe.config, settings))
weights["said"] = torch.tensor([drawing.iterate()[name] for name in ("reward/mean", "policy/kl")])
write_tensors(Path(f"rank{rank}.safetensors"), {**weights, "paths": trajectory.xs})

recipe = recipes()["bright"]  # a value that is solved for
settings = {"value": "linear", "batch_size": 20, "reference_batches": 1, "heldout_samples": 8, "device": "cpu"}
problem = recipe.build()
linear = Trainer(problem.model, problem.reward, problem.prompts, None, updated(recipe.config, settings))
linear.look_at_reference()
linear.value.fit(linear.generator)
[sample] = linear.value.memory
seen = {"t": sample.t, "features": sample.features, "target": sample.target, "rows": sample.condition.rows}
state = {f"value.{n}": p for n, p in linear.value.value.state_dict().items()}
write_tensors(Path(f"linear{rank}.safetensors"), {**seen, **state, "ridge": torch.tensor(linear.value.ridge)})
"""


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_both_have_the_same_weights_and_draw_other_paths(tmp_path: Path) -> None:
    """Gradients of policy and value, the step's bound and J* are those of all paths; first weights are process 0's."""
    (tmp_path / "worker.py").write_text(WORKER)
    done = launch(tmp_path, "worker.py")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_tensors(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert one["paths"].shape[1] == 16
    assert not torch.equal(one.pop("paths"), two.pop("paths"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert float(one["shares"].min()) < 1  # the bound was at work


@pytest.mark.slow
def test_a_value_that_is_solved_for_is_that_of_all_paths(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    done = launch(tmp_path, "worker.py")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [read_tensors(tmp_path / f"linear{rank}.safetensors") for rank in (0, 1)]
    states = [{n[6:]: p for n, p in each.items() if n.startswith("value.")} for each in found]
    assert all(torch.equal(p, states[1][n]) for n, p in states[0].items())
    assert not torch.equal(found[0]["features"], found[1]["features"])
    recipe = recipes()["bright"]
    config = updated(recipe.config, {"value": "linear", "reference_batches": 1, "batch_size": 20, "device": "cpu"})
    problem = recipe.build()
    alone = Trainer(problem.model, problem.reward, problem.prompts, None, config).value
    alone.value.load_state_dict(states[0])
    assert isinstance(alone, RidgeFit)
    alone.fitted, alone.ridge, alone.searched = True, float(found[0]["ridge"]), 10**6
    for each in found:
        names = [problem.prompts[row] for row in each["rows"].tolist()]
        alone.memory.append(Sample(each["t"], each["features"], each["target"], Condition(names, each["rows"])))
    weight = alone.head.weight.clone()
    alone.fit(torch.Generator())
    assert float(weight.norm()) > 0.1
    torch.testing.assert_close(alone.head.weight, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_from_the_command_line(tmp_path: Path) -> None:
    words = ["--heldout-samples", "16", "--batch-size", "16", "--device", "cpu", "--checkpoint-every", "1"]
    done = launch(tmp_path, "-m", "scoreact", "train", "gaussian", *words, "--iterations", "2", "--out", "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("weights    run/model.safetensors") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "seconds" in line] == [1, 2]
    assert [line["cost/reward_calls"] for line in lines if "seconds" in line][-1] == (4 + 2) * 16
    alone = [sys.executable, "-m", "scoreact", "resume", "run"]
    done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "run is a run of 2 processes, and 1 would go on with it; start as many: `torchrun --nproc" in done.stderr
    done = launch(tmp_path, "-m", "scoreact", "train", "gaussian", "--batch-size", "15", "--out", "odd")
    assert "batch_size is 15, which 2 processes cannot share; take a multiple" in done.stderr


def test_alone_nothing_is_changed() -> None:
    x = torch.tensor([1.0, 2.0])
    distributed.start()
    distributed.average([x, None])
    distributed.same([x])
    assert x.tolist() == [1.0, 2.0]
    assert distributed.gathered(x) is x
    assert (distributed.mean(3.0), distributed.first(False), distributed.rank(), distributed.world()) == (
        3.0,
        False,
        0,
        1,
    )


def test_a_process_that_died_is_named(tmp_path: Path) -> None:
    """By the other, in our words; without a launcher, which would end both."""

    def join(rank: int) -> None:
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
        assert distributed.mean(1.0 + rank) == 1.5
        if rank == 1:
            os._exit(9)
        try:
            for work in (lambda: distributed.mean(1.0), lambda: distributed.gathered(torch.ones(1))):
                with pytest.raises(
                    ProcessLost, match="another of this run's 2 processes ended or hangs, so process 0 can"
                ):
                    work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            join(rank)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 9]
