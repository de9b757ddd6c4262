"""What cannot learn is said before any reward is asked for, and the look leaves no trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.dynamics import prediction
from scoreact.dynamics.samplers import SAMPLERS
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.lora import lora
from scoreact.models.mlp import MLP
from scoreact.models.network import NetworkModel
from scoreact.report.words import headline, what_happened
from scoreact.runs.record import read_record
from scoreact.sampling.draw import draw
from scoreact.support.errors import ModelError, SettingError
from scoreact.training.config import Config, updated
from scoreact.training.guard import unmoved
from scoreact.training.learnable import check_groups
from scoreact.training.trainer import Trainer
from scoreact.types import Condition

CLASSES = [f"class {i}" for i in range(8)]
SMALL: dict[str, Any] = {"batch_size": 8, "steps": 3, "device": "cpu", "heldout_samples": 8, "reference_batches": 1}


class Labelled(nn.Module):
    """A network of the simplest kind for pairs of numbers, with classes or without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MLP(2, 4, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.second(self.first(x, t))  # type: ignore[no-any-return]


def model(network: nn.Module | None = None, classes: list[str] | None = None) -> NetworkModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        schedule = RectifiedFlow(t_max=0.98)
        return NetworkModel(network or Labelled(), schedule, prediction.velocity, (2,), classes=classes)


def never(samples: Tensor, condition: Condition) -> Tensor:
    raise AssertionError("the reward was asked")


def trainer(mine: nn.Module, prompts: list[str] | None = None, **settings: Any) -> Trainer:
    return Trainer(mine, never, prompts or [""], None, updated(Config(), {**SMALL, "algorithm": "ddpo", **settings}))  # type: ignore[arg-type]


# --- steps -------------------------------------------------------------------------------------------------------------


def test_steps_that_draw_far_too_much_are_said() -> None:
    path = {"solver": "euler_maruyama", "grid": "log_snr"}
    (said,) = trainer(model(), **path, steps=6).notes
    factor = re.match(r"6 steps of euler_maruyama on the grid log_snr draw (\S+) times the standard", said)
    assert factor is not None
    mixture = GaussianMixture(RectifiedFlow(t_max=0.98), torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    times = updated(Config(), {**path, "steps": 6}).times(mixture.schedule)
    drawn = draw(mixture, [""] * 4000, SAMPLERS["euler_maruyama"], times, 0)[0][-1]
    true = float((mixture.schedule.alpha(times[-1]) ** 2 + mixture.schedule.sigma(times[-1]) ** 2).sqrt())
    assert float(factor[1]) == pytest.approx(float(drawn.std()) / true, rel=0.04)
    assert trainer(model(), **path, steps=20).notes == []


# --- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [{"algorithm": "flow_grpo"}, {"algorithm": "diffusion_nft"}, {"algorithm": "dpo"},
     {"algorithm": "rwr", "samples": "policy"}],
    ids=lambda rule: rule["algorithm"],
)  # fmt: skip
def test_groups_of_one_are_refused_before_a_reward_is_asked(rule: dict[str, Any]) -> None:
    mine = model(classes=CLASSES)
    with pytest.raises(SettingError, match=r"a batch of 8 has one of each \(8 prompts.*group_size.*batch_size to 16"):
        trainer(mine, CLASSES, **rule)
    assert trainer(mine, CLASSES, **rule, group_size=2).notes == []
    found = trainer(mine, CLASSES, **rule, batch_size=12).notes
    assert len(found) == 1
    assert "of a batch of 12, 4 are the only ones of their prompt" in found[0]


def test_rules_that_compare_nothing_take_single_samples() -> None:
    for rule in ({"algorithm": "ddpo"}, {"algorithm": "rwr"}):
        assert trainer(model(classes=CLASSES), CLASSES, **rule).notes == []


def test_a_batch_is_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = trainer(model(classes=CLASSES), CLASSES, algorithm="flow_grpo", batch_size=16)
    monkeypatch.setattr("scoreact.support.distributed.world", lambda: 2)
    with pytest.raises(SettingError, match=r"a batch of 8 in each process has one of each.*batch_size to 32"):
        check_groups(alone.algorithm, alone.config, CLASSES)
    with pytest.raises(SettingError, match="leaves nothing to compare a sample with; take a batch_size of 4"):
        check_groups(alone.algorithm, updated(alone.config, {"batch_size": 2}), CLASSES)


def test_groups_have_the_size_that_is_asked_for() -> None:
    found = trainer(model(classes=CLASSES), CLASSES, algorithm="flow_grpo", group_size=4)._batch_of_prompts()
    assert sorted(found.count(name) for name in set(found)) == [4, 4]
    with pytest.raises(SettingError, match="group_size is 3, which a batch of 8 is no multiple of"):
        trainer(model(classes=CLASSES), CLASSES, group_size=3)


# --- weights -----------------------------------------------------------------------------------------------------------


class Detached(Labelled):
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t).detach()


class Half(Labelled):
    """Its first part is computed without a graph."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            hidden = self.first(x, t)
        return self.second(hidden)  # type: ignore[no-any-return]


class Cached(Labelled):
    """Values once computed are kept, with the graph of weights that are still the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[float, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        found = super().forward(x, t)
        kept = self.seen.setdefault(float(x.sum()), found.detach())
        return found + (kept - found).detach()


class Scaled(Labelled):
    """An adapter beside a frozen network that nobody turned on."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.adapter = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t) + 0.0 * self.adapter(x)  # type: ignore[no-any-return]


class Past(Scaled):
    """An adapter that the network goes past."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return Labelled.forward(self, x, t)


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Detached, "carries no gradient"), (Past, "carries no gradient"), (Cached, "outputs are cached"),
     (Scaled, "does not change its score")],
)  # fmt: skip
def test_weights_that_cannot_learn_are_refused(network: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        trainer(model(network()))


def test_a_part_that_cannot_learn_is_named() -> None:
    (said,) = trainer(model(Half())).notes
    assert said.startswith("6 of the 8 trained tensors")
    assert "network.first.body.0.weight, network.first.body.0.bias, network.first.body.2.weight, ..." in said


def test_an_adapter_that_is_multiplied_by_zero_is_named() -> None:
    mine = model(Scaled())
    mine.network.second.requires_grad_(True)
    (said,) = trainer(mine).notes
    assert said.startswith("2 of the 4 trained tensors")
    assert "have a gradient of exactly 0: network.adapter.weight, network.adapter.bias." in said


def test_weights_in_which_a_step_is_lost_are_said() -> None:
    class Low(Labelled):
        def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            return super().forward(x.bfloat16(), t.bfloat16()).float()

    (said,) = trainer(model(Low().bfloat16()), learning_rate=1e-5).notes
    assert "a step of learning_rate 1e-05 rounds to nothing" in said


def test_a_policy_that_acts_nowhere_is_refused() -> None:
    with pytest.raises(SettingError, match=r"would act in none of the 3 steps: the first begins at t = 0.001"):
        trainer(model(), act_until=5e-4)


def test_all_is_said_in_a_run_too() -> None:
    said: list[str] = []
    finetune(
        model(Half()), lambda images: images.sum(1), config=updated(Config(), {**SMALL, "algorithm": "ddpo"}), iterations=1,
        on_event=lambda kind, line: said.append(line["text"]) if kind == "guard" else None,  # type: ignore[arg-type]
    )  # fmt: skip
    assert "6 of the 8 trained tensors" in said[0]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_look_leaves_no_trace(adapted: bool) -> None:
    mine = lora(model(), rank=2) if adapted else model()
    before = {name: p.detach().clone() for name, p in mine.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = trainer(mine)
    assert found.notes == []
    assert all(torch.equal(p, before[name]) for name, p in mine.state_dict().items())
    assert all(p.grad is None for p in mine.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.generator.get_state(), torch.Generator().manual_seed(0).get_state())
    assert found.policy.network_calls == 0


# --- rewards that teach nothing, and policies that learned nothing -------------------------------------------------------


def run(
    reward: Any, prompts: list[str] | None = None, out: Path | None = None, **settings: Any
) -> tuple[Result, list[str]]:
    """What a run says; `reward` sees pairs of numbers."""
    said: list[str] = []
    result = finetune(
        model(classes=prompts), reward, prompts or [""], out=out,
        config=updated(Config(), {**SMALL, "algorithm": "ddpo", "batch_size": 16, "iterations": 2, **settings}),
        on_event=lambda kind, line: said.append(str(line["text"])) if kind == "guard" else None, progress=False,
    )  # fmt: skip
    return result, said


def test_a_reward_that_teaches_nothing_is_said() -> None:
    _, said = run(lambda images: 3 + 0 * images.sum(1))
    assert "gave all 16 samples of the pretrained model 3: there is nothing to learn from" in said[0]
    assert "Its gradient was 0 in every iteration" in said[1]
    _, said = run(lambda images, prompts: [float(p[-1]) for p in prompts], CLASSES[:4])
    assert (
        "gave all samples of a prompt the same value, for each of 4 prompts: it depends on the prompt alone" in said[0]
    )


def test_a_statistic_of_the_batch_is_not_trusted() -> None:
    steady, said = run(lambda images: images.sum(1), batch_size=512, kl_weight=1.0)
    assert steady.reference["objective/trusted"] == 1
    assert not [text for text in said if "reward" in text]
    ranks, said = run(lambda images: images.sum(1).argsort().argsort() / len(images), batch_size=512, kl_weight=1.0)
    assert ranks.reference["objective/trusted"] == 0
    assert "depends on the batch: samples got values" in said[0]
    noise = torch.Generator().manual_seed(0)
    random, said = run(
        lambda images: images.sum(1) + torch.randn(len(images), generator=noise), batch_size=512, kl_weight=1.0
    )
    assert random.reference["objective/trusted"] == 0
    assert "is not deterministic: the same samples got values" in said[0]


def test_the_looks_are_no_cost_of_learning() -> None:
    asked: list[int] = []

    def counting(images: Tensor) -> Tensor:
        asked.append(len(images))
        return images.sum(1)

    result, _ = run(counting)
    costs = [line["cost/reward_calls"] for line in result.history if "cost/reward_calls" in line]
    assert costs == [16, 32]
    assert asked == [16, 4, 8, 16, 16, 8]  # the reference, a few again, before, two rollouts, after


def test_a_policy_that_has_not_moved_is_said(tmp_path: Path) -> None:
    result, said = run(lambda images: images.sum(1), out=tmp_path / "run", learning_rate=1e-7, algorithm="flow_grpo")
    assert "after 2 iterations the policy has hardly moved: path KL is" in said[-1]
    assert said[-1].endswith("Raise learning_rate (1e-07), tenfold for a start, or iterations (2).")
    assert f"NOT MOVED  {said[-1]}" in str(result)
    record = read_record(tmp_path / "run")
    assert "so that the policy has hardly moved" in headline(record)
    assert f"Iteration 2: {said[-1]}" in what_happened(record)
    moved, said = run(lambda images: images.sum(1), learning_rate=0.1)
    assert moved.final["policy/kl"] > 0.01
    assert "hardly moved" not in "".join(said)
    assert "NOT MOVED" not in str(moved)


def test_what_to_raise_is_what_held_it_back() -> None:
    lines = [{"policy/step_share": 0.05, "policy/gradient_norm": 2.0}] * 5
    config, still = Config(max_kl=0.1), {"policy/kl": 1e-4}
    assert str(unmoved(still, {}, lines, config)).endswith("shortened to 5% or less; raise max_kl (0.1).")
    natural = updated(config, {"algorithm": "ctrl_trpo"})
    assert str(unmoved(still, {}, [{}], natural)).endswith("Raise max_kl (0.1) or iterations (40).")
    # where the optimum itself is as near, nothing is wrong; unless nobody knows it
    near = {"objective/KL_star": 2e-4, "objective/trusted": 1.0}
    assert unmoved(still, near, lines, config) is None
    assert unmoved(still, {**near, "objective/trusted": 0.0}, lines, config) is not None
    assert unmoved({"policy/kl": 0.02}, {}, lines, config) is None


def test_the_headline_does_not_deny_a_paired_gain(tmp_path: Path) -> None:
    run(lambda images: images.sum(1), out=tmp_path / "run")
    record = read_record(tmp_path / "run")
    for gain, word in (
        (0.06, "rose, by "),
        (-0.06, "fell, by"),
        (0.01, "did not change measurably"),
    ):
        record.evaluations[-1].update({"reward/heldout_prompts_gain": gain, "reward/heldout_prompts_gain_se": 0.01})
        assert word in headline(record)
