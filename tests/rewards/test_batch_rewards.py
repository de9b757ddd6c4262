"""Rewards of a batch: leave-one-out against brute force, measures against scipy and formulas, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.schedule import VP
from scoreact.evaluation.metrics import vendi_score
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.gaussian import build
from scoreact.rewards import checked, explain, product, weighted_sum
from scoreact.rewards.base import is_of_batch
from scoreact.rewards.batch import BatchReward, pairs
from scoreact.rewards.registry import OF_A_BATCH, load
from scoreact.rewards.weighted_statistics import open_statistic
from scoreact.types import Condition

REAL = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
X = 1.5 * torch.randn(9, 3, generator=torch.Generator().manual_seed(2)) + 0.3
TINY: dict[str, Any] = {
    "iterations": 1, "batch_size": 16, "steps": 3, "heldout_samples": 16, "reference_batches": 1, "value_steps": 1,
    "value_first_steps": 1, "kl_weight": 1.0, "progress": False,
}  # fmt: skip


def sign(samples: Tensor) -> Tensor:
    return (samples[:, 0] > 0).long() + (samples[:, 1] > 0).long()


def softly(samples: Tensor) -> Tensor:
    return samples.softmax(1)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("diversity", {}),
    ("diversity", {"bandwidth": 0.7}),
    ("vendi", {}),
    ("vendi", {"bandwidth": 0.7}),
    ("mmd", {"reference": REAL}),
    ("energy_distance", {"reference": REAL}),
    ("sliced_wasserstein", {"reference": REAL, "projections": 7}),
    ("coverage", {"classes": sign}),
    ("coverage", {"classes": softly}),
]


def fresh() -> Any:
    torch.manual_seed(0)
    return build(width=8).model


def here(count: int) -> Condition:
    return Condition([""] * count)


def made(name: str, options: dict[str, Any]) -> BatchReward:
    found = load(name, **options)
    assert isinstance(found, BatchReward)
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_sample_gets_what_it_adds(name: str, options: dict[str, Any]) -> None:
    """n F(S) - (n - 1) F(S without i), each F measured by itself."""
    reward, n = made(name, options), len(X)

    def f(samples: Tensor) -> float:
        return float(reward.measure(reward.seen(samples))[0])

    keep = torch.arange(n)
    wanted = [n * f(X) - (n - 1) * f(X[keep != i]) for i in range(n)]
    assert reward(X, here(n)).tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert max(wanted) - min(wanted) > 1e-3


@pytest.mark.parametrize(("name", "options"), CASES[:2] + CASES[4:6])
def test_the_mean_is_the_unbiased_measure(name: str, options: dict[str, Any]) -> None:
    """Of a mean over pairs the jackknife is the measure itself."""
    reward = made(name, options)
    assert float(reward(X, here(9)).mean()) == pytest.approx(float(reward.measure(reward.seen(X))[0]), abs=1e-6)


def test_distances_against_scipy() -> None:
    """On the line; scipy's energy distance counts the pairs of a sample with itself, ours does not."""
    x, y = X[:, :1], REAL[:, :1]
    n, m = len(x), len(y)
    own, theirs = pdist(x).mean(), pdist(y).mean()
    biased = stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    found = made("energy_distance", {"reference": y})
    assert -float(found.measure(x.double())[0]) == pytest.approx(biased - own / n - theirs / m, rel=1e-5)
    line = made("sliced_wasserstein", {"reference": y, "projections": 1})
    assert -float(line.measure(x.double())[0]) == pytest.approx(stats.wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-5)


def test_mmd_by_its_formula() -> None:
    """Gretton et al. 2012, eq. 3, written out."""
    width, x, y = 0.9, X.double(), REAL.double()

    def k(a: Tensor, b: Tensor) -> float:
        return float((-(a - b).square().sum() / (2 * width**2)).exp())

    def pairs(a: Tensor) -> float:
        found = [k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j]
        return sum(found) / len(found)

    across = sum(k(p, q) for p in x for q in y) / (len(x) * len(y))
    found = made("mmd", {"reference": REAL, "bandwidth": width}).measure(x)[0]
    assert -float(found) == pytest.approx(pairs(x) + pairs(y) - 2 * across, abs=1e-10)


def test_effective_numbers() -> None:
    """The Vendi score is that of the metrics, also with more features than samples; m classes, each as often, count as m."""
    for x in (X, X[:, :2], X.T):
        assert float(made("vendi", {}).measure(x.double())[0]) == pytest.approx(vendi_score(x))
    assert made("vendi", {})(X[:5, :3].T, here(3)).tolist() != [1.0] * 3
    whole = made("coverage", {"classes": sign}).measure(torch.eye(3).repeat(4, 1).double())[0]
    assert float(whole) == pytest.approx(3)


def test_the_gradient_of_the_mean_is_that_of_the_measure() -> None:
    """E sum_i R_i grad log p(x_i) / n = grad E F(S): samples at -1 or 1, p = sigmoid(a), F = mean squared distance of pairs."""
    a = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    p, n = torch.sigmoid(a), 4
    wanted = torch.autograd.grad(4 * 2 * p * (1 - p), a)[0]  # E (x - x')^2
    found = torch.zeros((), dtype=torch.float64)
    reward = BatchReward(lambda x: pairs(torch.cdist(x, x).square()), "squares")
    for batch in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * n):
        right = batch > 0
        logs = torch.where(right, p.detach().log(), (1 - p.detach()).log()).sum().exp()
        slope = torch.where(right, 1 - p.detach(), -p.detach())  # grad log p(x_i)
        found = found + logs * (reward(batch.unsqueeze(1), here(n)) * slope).mean()
    assert float(found) == pytest.approx(float(wanted), abs=1e-10)


def test_prompts_may_be_batches_of_their_own() -> None:
    reward = made("diversity", {"by_prompt": True})
    prompts = Condition(["a", "b", "a", "b", "a", "b"])
    found = reward(X[:6], prompts)
    assert torch.allclose(found[::2], reward(X[:6:2], Condition(["a"] * 3)))
    with pytest.raises(sa.RewardError, match="the 2 of prompt 'b' is too few"):
        reward(X[:5], prompts[torch.arange(5)])


def test_what_cannot_be_of_a_batch_is_refused() -> None:
    assert all(is_of_batch(made(name, options)) for name, options in CASES)
    assert {name for name, _ in CASES} == set(OF_A_BATCH)
    diversity = load("diversity")
    both = weighted_sum({"d": (1.0, diversity), "first": (2.0, load(lambda x: x[:, 0]))})
    assert is_of_batch(both)
    assert torch.allclose(checked(both)(X, here(9)), diversity(X, here(9)) + 2 * X[:, 0])
    with pytest.raises(sa.RewardError, match="product got diversity"):
        product([diversity])
    with pytest.raises(sa.RewardError, match="a statistic is of one"):
        open_statistic("diversity")
    with pytest.raises(sa.RewardError, match="give at least 3"):
        diversity(X[:2], here(2))
    with pytest.raises(sa.RewardError, match=r"2 features and a reference example 3"):
        made("mmd", {"reference": REAL})(X[:, :2], here(9))
    assert any("of samples together" in line for line in explain("diversity", X, here(9)))
    for changes, text in (
        ({"value": "residual"}, "value residual wants the reward of single states"),
        ({"reward_failures": 3}, "reward_failures is 3"),
        ({"algorithm": "rwr", "replay": 2}, "replay is 2"),
        (
            {"algorithm": "rwr", "replay": 1, "baseline": "denoised"},
            "baseline denoised wants the reward of single states",
        ),
        ({"algorithm": "draft"}, "gradient"),
    ):
        settings = {k: v for k, v in TINY.items() if not (k.startswith("value_") and "algorithm" in changes)}
        with pytest.raises(sa.SettingError, match=text):
            sa.finetune(fresh(), "diversity", **(settings | changes))


def test_a_run_says_what_its_reward_is_and_goes_on_bit_for_bit(tmp_path: Any) -> None:
    whole = sa.finetune(fresh(), "diversity", out=tmp_path / "a", report=False, **(TINY | {"iterations": 3}))
    said = [line["text"] for line in whole.history if line.get("guard") == "note"]
    assert any("diversity is of samples together" in text for text in said)
    assert whole.reference["objective/trusted"] == 0
    how: dict[str, Any] = {"checkpoint_every": 1, "hooks": [Ends()], **TINY, "iterations": 3}
    sa.finetune(fresh(), "diversity", out=tmp_path / "b", report=False, **how)
    run = sa.open_run(tmp_path / "b", fresh(), "diversity")
    again = run.resume(report=False)
    assert again.final["reward/heldout"] == whole.final["reward/heldout"]
    with pytest.raises(sa.SettingError, match="best_of weighs samples one by one"):
        run.steering("best_of")


class Ends(sa.Hook):
    def after(self, trainer: Any) -> sa.Stop | None:
        return sa.Stop("enough") if trainer.iteration == 2 else None


MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])


def nearest(samples: Tensor) -> Tensor:
    return torch.cdist(samples, MEANS.to(samples)).argmin(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("coverage", {"classes": nearest}), ("diversity", {}), ("vendi", {"bandwidth": 1.0})]
)
def test_a_collapsed_model_is_trained_to_variety(name: str, options: dict[str, Any]) -> None:
    """Nine of ten samples come from one of three blobs. The measure rises, and so does the share of the other two."""
    torch.manual_seed(0)
    weights, covariances = torch.tensor([0.9, 0.05, 0.05]), 0.1 * torch.eye(2).repeat(3, 1, 1)
    model = ResidualModel(GaussianMixture(VP(t_max=0.98), weights, MEANS, covariances), 2, 64)
    settings: dict[str, Any] = {
        "kl_weight": 0.1, "iterations": 40, "batch_size": 128, "solver": "euler_maruyama", "heldout_samples": 256, "seed": 0
    }  # fmt: skip
    result = sa.finetune(model, load(name, **options), progress=False, **settings)
    first = next(line for line in result.history if line.get("evaluation"))
    assert result.final["reward/heldout"] > 1.3 * first["reward/heldout"]
    shares = [torch.bincount(nearest(result.sample(count=500, reference=r)), minlength=3) / 500 for r in (True, False)]
    print(
        f"\n{name} {first['reward/heldout']:.2f} -> {result.final['reward/heldout']:.2f}, {result.final['policy/kl']:.2f} nats"
    )
    print(f"shares {shares[0].tolist()} -> {shares[1].tolist()}")
    assert float(shares[0][1:].sum()) < 0.2
    assert float(shares[1][1:].min()) > 2 * float(shares[0][1:].max())
