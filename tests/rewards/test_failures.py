"""Rewards that fail, change what they see, keep graphs or end the program: what a run makes of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoreact import rewards as rw
from scoreact.api.result import Result
from scoreact.api.start import finetune
from scoreact.recipes.gaussian import build
from scoreact.rewards.check import checked
from scoreact.rewards.failures import Failures, RewardRaised
from scoreact.support.errors import RewardError
from scoreact.types import Condition

X = torch.arange(8.0).reshape(8, 1)
TWO = Condition(["a", "b"] * 4)
SMALL: dict[str, Any] = {
    "iterations": 2, "batch_size": 16, "steps": 3, "heldout_samples": 16, "reference_batches": 1, "device": "cpu",
    "kl_weight": 0.5, "solver": "euler_maruyama", "algorithm": "flow_grpo",
}  # fmt: skip


def train(reward: Any, **settings: Any) -> Result:
    return finetune(build(width=8), reward, progress=False, **{**SMALL, **settings})


# --- samples for which it fails ------------------------------------------------------------------------------------------


class Flaky:
    """The first number of a sample; `bad` samples raise or give NaN, the first `times` times that they are asked for."""

    def __init__(self, bad: list[float], times: int, raises: bool) -> None:
        self.bad, self.left, self.raises, self.asked = bad, {value: times for value in bad}, raises, 0

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        self.asked += len(samples)
        values = samples.flatten().clone()
        for i, value in enumerate(values.tolist()):
            if self.left.get(value, 0) > 0:
                self.left[value] -= 1
                if self.raises:
                    raise OSError("busy")
                values[i] = torch.nan
        return values


@pytest.mark.parametrize("raises", [True, False])
def test_what_fails_is_asked_again_then_left_out_and_counted(raises: bool) -> None:
    failures = Failures(2)
    once = checked(Flaky([3.0], 1, raises), failures)
    assert once(X, TWO).tolist() == X.flatten().tolist()  # it came the second time
    assert failures.count == 0
    always = Flaky([3.0, 4.0], 99, raises)
    # of b 1, 5, 7 remain, of a 0, 2, 6
    assert checked(always, failures)(X, TWO).tolist() == pytest.approx([0, 1, 2, 13 / 3, 8 / 3, 5, 6, 7])
    assert failures.count == 2
    assert always.asked < 60
    told = str(failures.news())
    assert told.startswith("the reward failed for 2 samples so far, of 2 that reward_failures allows.")
    assert failures.news() is None
    with pytest.raises(RewardError, match="It has failed for 3 samples; reward_failures allows 2"):
        checked(Flaky([5.0], 99, raises), failures)(X, TWO)
    with pytest.raises((RewardError, RewardRaised), match=r"busy|returned NaN"):
        checked(Flaky([5.0], 1, raises))(X, TWO)  # without the setting the first one ends it


def test_where_all_fail_nothing_is_made_up() -> None:
    with pytest.raises(RewardError, match="failed for all 8 samples of a batch"):
        checked(Flaky(X.flatten().tolist(), 99, False), Failures(100))(X, TWO)


def test_a_gradient_that_is_nan_goes_nowhere() -> None:
    def root(samples: Tensor, condition: Condition) -> Tensor:
        return (samples.flatten() - 1).sqrt()  # NaN at 0, and so is its gradient

    root.differentiable = True  # type: ignore[attr-defined]
    x = X.clone()
    x[1] = 1.5
    x.requires_grad_(True)
    found = checked(root, Failures(5))(x, TWO)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert float(gradient[0]) == 0


def test_a_run_goes_on_and_says_it() -> None:
    asked = [0]

    def moody(images: Tensor) -> Tensor:
        asked[0] += 1
        if asked[0] % 3 == 0:
            raise OSError("busy")
        values = images.sum(1).clone()
        values[images[:, 0] > 1.5] = torch.nan
        return values

    with pytest.raises((RewardError, RewardRaised)):
        train(moody)
    result = train(moody, reward_failures=1000)
    counted = [line["cost/reward_failures"] for line in result.history if "cost/reward_failures" in line]
    assert 0 < counted[0] <= counted[1]
    said = [line["text"] for line in result.history if line.get("guard") == "note"]
    assert any(text.startswith("the reward failed for ") for text in said)


# --- parts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"algorithm": "draft", "last_steps": 2}])
def test_parts_of_a_sum_are_logged_by_name(settings: dict[str, Any]) -> None:
    first, second = rw.Linear([1.0, 0.0]), rw.Linear([0.0, 1.0])
    result = train(rw.weighted_sum({"light": (1.0, first), "size": (2.0, second)}), **settings)
    drawn = next(line for line in result.history if "reward/mean" in line)
    assert drawn["reward/mean/light"] + 2 * drawn["reward/mean/size"] == pytest.approx(drawn["reward/mean"], abs=1e-5)
    last = result.final
    assert last["reward/heldout/light"] + 2 * last["reward/heldout/size"] == pytest.approx(
        last["reward/heldout"], abs=1e-5
    )
    assert "reward/heldout/light" in str(result)


@pytest.mark.parametrize(
    "combine", [lambda a, b: rw.weighted_sum({"fine": (1.0, a), "broken": (0.1, b)}), lambda a, b: rw.product([a, b])]
)
def test_nan_names_its_part(combine: Callable[[Any, Any], Any]) -> None:
    def broken(images: Tensor) -> Tensor:
        return images.flatten() / 0 * 0

    with pytest.raises(RewardError, match=r"broken \(a part of .*\) returned NaN for sample 0 of 8"):
        checked(combine(rw.Linear([1.0]), rw.load(broken)))(X, TWO)
    with pytest.raises(RewardError, match="returned NaN"):  # which is below no threshold
        rw.threshold(rw.load(broken), 0.0)(X, TWO)


# --- what a reward must not do --------------------------------------------------------------------------------------------


def doubled(images: Tensor) -> Tensor:
    return images.mul_(2).sum(1)


def doubled_in_numpy(images: Tensor) -> Any:
    array = images.numpy()
    array *= 2
    return array.sum(1)


@pytest.mark.parametrize("reward", [doubled, doubled_in_numpy])
def test_a_change_in_place_is_noticed(reward: Callable[..., Any]) -> None:
    x = X.clone()
    with pytest.raises(RewardError, match=r"changes the samples that it is given.*Work on `samples.clone\(\)`"):
        checked(rw.load(reward))(x, TWO)


def test_so_it_is_of_judges_and_features() -> None:
    def judge(samples: Tensor, condition: Condition) -> dict[str, float]:
        samples.zero_()
        return {"judge/quality": 1.0}

    def features(samples: Tensor) -> Tensor:
        return samples.add_(1)

    with pytest.raises(RewardError, match="the judge changes the samples"):
        train(rw.Linear([1.0, 0.0]), judge=judge)
    with pytest.raises(RewardError, match="features changes the samples"):
        train(rw.Linear([1.0, 0.0]), features=features)


def test_a_graph_that_nobody_asked_for_is_not_kept() -> None:
    network = nn.Linear(2, 1)

    def learned(samples: Tensor, condition: Condition) -> Tensor:
        return network(samples)[:, 0]  # type: ignore[no-any-return]

    for differentiable in (False, True):
        learned.differentiable = differentiable  # type: ignore[attr-defined]
        assert not checked(learned)(torch.zeros(8, 2), TWO).requires_grad
    assert checked(learned)(torch.zeros(8, 2, requires_grad=True), TWO).requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(learned, algorithm="ctrl", value_steps=2, value_first_steps=2)


def test_sys_exit_does_not_end_a_run_as_if_all_were_well() -> None:
    def leaves(images: Tensor) -> Tensor:
        sys.exit(0)

    with pytest.raises(RewardRaised, match="leaves raised SystemExit: 0"):
        train(leaves)

    def judge(samples: Tensor, condition: Condition) -> dict[str, float]:
        sys.exit(0)

    with pytest.raises(RewardRaised, match=r"the judge called sys.exit\(0\)"):
        train(rw.Linear([1.0, 0.0]), judge=judge)
