"""Rewards of a batch: leave-one-out against brute force, measures against scipy and formulas, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

import scoreact as sa
from scoreact.dynamics.schedule import VP
from scoreact.evaluation.metrics import vendi_score
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.recipes.gaussian import build
from scoreact.report.progress import summary_lines
from scoreact.report.words import warnings
from scoreact.rewards import checked, explain, product, weighted_sum
from scoreact.rewards.base import is_of_batch
from scoreact.rewards.batch import BatchReward, pairs
from scoreact.rewards.registry import OF_A_BATCH, load
from scoreact.rewards.weighted_statistics import open_statistic
from scoreact.runs.record import read_record
from scoreact.support.own_data import read_data
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


softly.differentiable = True  # type: ignore[attr-defined]


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


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[1].get("classes") is not sign])
def test_the_gradient_in_the_samples(name: str, options: dict[str, Any]) -> None:
    """Against differences; that of the mean is what rules follow."""
    reward = made(name, options)
    assert reward.differentiable
    x = X.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda samples: reward(samples, here(9)), (x,), eps=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bandwidth": 0.7}])
def test_samples_that_are_alike_have_a_gradient_too(options: dict[str, Any]) -> None:
    """The kernel is singular there, and x log x has no slope at 0."""
    x = torch.eye(3).repeat_interleave(torch.tensor([2, 3, 4]), 0)[:, :2].add(0.1).double().requires_grad_(True)
    found = torch.autograd.grad(made("vendi", options)(x, here(9)).mean(), x)[0]
    assert bool(found.isfinite().all())


def test_the_gradient_goes_through_features() -> None:
    pictures = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
    reward = made("energy_distance", {"reference": torch.rand(20, 1, 8, 8), "features": "pixels"})
    found = torch.autograd.grad(checked(reward)(pictures, here(6)).mean(), pictures)[0]
    fields = found.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # four fields a side, and a pixel counts as its field
    assert torch.allclose(fields, fields[..., :1].expand_as(fields), atol=1e-8)
    assert float(found.abs().max()) > 1e-4


@pytest.mark.parametrize(("name", "options"), CASES[:2] + CASES[4:6])
def test_of_a_mean_over_pairs_it_is_the_measures_own(name: str, options: dict[str, Any]) -> None:
    """So a batch of any size gives E F's gradient without bias."""
    reward, x = made(name, options), X.double().requires_grad_(True)
    found = torch.autograd.grad(reward(x, here(9)).mean(), x)[0]
    assert torch.allclose(found, torch.autograd.grad(reward.measure(reward.seen(x))[0], x)[0])
    assert float(found.abs().max()) > 1e-3


def labelled(tmp_path: Path, names: tuple[str, str] = ("left", "right")) -> tuple[Path, Tensor, list[int]]:
    """Two blobs in a file, each a class."""
    x, rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(3)), [i % 2 for i in range(200)]
    x = x + torch.tensor([[-4.0, 0.0], [4.0, 0.0]])[rows]
    np.savez(tmp_path / "blobs.npz", train_values=x.numpy(), train_labels=np.array([names[i] for i in rows]))
    return tmp_path / "blobs.npz", x, rows


@pytest.mark.parametrize("name", ["mmd", "energy_distance"])
def test_samples_are_compared_with_their_own_class(tmp_path: Path, name: str) -> None:
    """Right samples under the other prompts are as near as ever without labels, and far with them."""
    path, x, rows = labelled(tmp_path)
    prompts = ["left" if i == 0 else "right" for i in rows[:40]]
    right, wrong = Condition(prompts), Condition(prompts[1:] + prompts[:1])
    blind, seeing = (load(name, reference=str(path), labels=labels) for labels in (False, True))
    assert float(blind(x[:40], right).mean()) == pytest.approx(float(blind(x[:40], wrong).mean()))
    near, far = (float(seeing(x[:40], prompts).mean()) for prompts in (right, wrong))
    assert near > -0.02
    assert far < -0.2


def joint(x: Tensor, rows: Sequence[int], size: float) -> np.ndarray[Any, Any]:
    return np.concatenate([x.double().numpy(), size * np.eye(2)[list(rows)]], axis=1)


def test_the_joint_distance_by_its_formula(tmp_path: Path) -> None:
    """sqrt(|x - y|^2 + 2 (3 spread)^2 [another class]), a pair of classes as often as their shares say; scipy has the means."""
    path, x, rows = labelled(tmp_path)
    reward = made("energy_distance", {"reference": str(path), "labels": True})
    kept = read_data(path, labels=True).train
    assert kept.labels is not None
    real, labels = kept.floats(), kept.labels.numpy()
    size = 3 * float(real.double().std(0).norm())
    y, few = joint(real, labels.tolist(), size), [*range(0, 30, 2), *range(1, 11, 2)]  # fifteen and five
    mine, own = joint(x[few], [rows[i] for i in few], size), np.array([rows[i] for i in few])
    share, wanted = np.bincount(own) / len(own), 0.0
    for a in (0, 1):
        for b in (0, 1):
            same = [pdist(z[c == a]).mean() if a == b else cdist(z[c == a], z[c == b]).mean()
                    for z, c in ((mine, own), (y, labels))]  # fmt: skip
            wanted += share[a] * share[b] * (sum(same) - 2 * cdist(mine[own == a], y[labels == b]).mean())
    prompts = Condition([("left", "right")[i] for i in own])
    assert float(reward(x[few], prompts).mean()) == pytest.approx(wanted, rel=1e-5)
    alone = reward(x[[0, 1, 2]], Condition(["left", "right", "left"]))  # one sample of a class: it has no pair
    assert bool(alone.isfinite().all())


@pytest.mark.parametrize("name", ["mmd", "energy_distance"])
def test_prompts_that_are_dealt_out_leave_it_unbiased(tmp_path: Path, name: str) -> None:
    """Batches of the reference set's own examples, as many of each class: 0 in the mean. By plain means over pairs two of a
    class are too rare in them, and the batch is said to be nearer than its own law."""
    path, _, _ = labelled(tmp_path)
    kept = read_data(path, labels=True).train
    assert kept.labels is not None
    reward, generator = made(name, {"reference": str(path), "labels": True}), torch.Generator().manual_seed(0)
    prompts, found = Condition(["left"] * 5 + ["right"] * 5), []
    of = [torch.nonzero(kept.labels == row).flatten() for row in (0, 1)]
    for _ in range(400):
        drawn = torch.cat([rows[torch.randint(len(rows), (5,), generator=generator)] for rows in of])
        found.append(float(reward(kept.floats()[drawn], prompts).mean()))
    values = np.array(found)
    floor = 1 / len(of[0])  # an example is drawn twice so often
    assert abs(values.mean()) < 4 * values.std() / 20 + 2 * floor


def test_numbered_classes_are_those_of_the_model(tmp_path: Path) -> None:
    path, x, rows = labelled(tmp_path, ("0", "1"))
    reward, model = made("energy_distance", {"reference": str(path), "labels": True}), fresh()
    prompts = Condition([("left", "right")[i] for i in rows[:40]])
    with pytest.raises(sa.RewardError, match=r"prompt 'left' is no class of the reference set \(0, 1\)"):
        reward(x[:40], prompts)
    by_number = reward(x[:40], Condition([str(i) for i in rows[:40]]))
    model.classes = ("right", "left")
    reward.take_model(model)
    swapped = reward(x[:40], prompts)
    model.classes = ("left", "right")
    reward.take_model(model)
    assert torch.equal(reward(x[:40], prompts), by_number)
    assert float(swapped.mean()) < float(by_number.mean()) - 0.5
    with pytest.raises(sa.RewardError, match="the reference set is a tensor"):
        made("mmd", {"reference": REAL, "labels": True})


def test_draft_follows_it(tmp_path: Path) -> None:
    """The gradient moves samples together towards the real ones, spread and all, where minibatches fit."""
    settings: dict[str, Any] = {
        k: v for k, v in TINY.items() if not k.startswith("value_") and k != "reference_batches"
    } | {"algorithm": "draft"}
    with pytest.raises(sa.SettingError, match="batch_size 16 and minibatch_size 7"):
        sa.finetune(fresh(), "diversity", **settings, minibatch_size=7)
    with pytest.raises(sa.SettingError, match="batch_size 16 and minibatch_size 13"):  # 80 starts, two of them left
        sa.finetune(fresh(), "diversity", **settings, minibatch_size=13, last_steps=1, renoise=4)
    with pytest.raises(sa.SettingError, match="gradient"):
        sa.finetune(fresh(), load("coverage", classes=sign), **settings)
    real = 0.3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(5)) + torch.tensor([0.5, 0.0])
    settings |= {"iterations": 80, "batch_size": 64, "minibatch_size": 32, "learning_rate": 1e-2, "kl_weight": 3e-3}
    found = sa.finetune(fresh(), load("energy_distance", reference=real), **settings | {"steps": 5})
    before, after = (found.sample(count=1000, seed=1, reference=reference) for reference in (True, False))
    assert after.mean(0).tolist() == pytest.approx([0.5, 0.0], abs=0.2)
    assert float(after.std(0).norm()) < 0.85 * float(before.std(0).norm())  # a mean alone would leave it


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
    ):
        settings = {k: v for k, v in TINY.items() if not (k.startswith("value_") and "algorithm" in changes)}
        with pytest.raises(sa.SettingError, match=text):
            sa.finetune(fresh(), "diversity", **(settings | changes))


def test_a_run_says_what_its_reward_is_and_goes_on_bit_for_bit(tmp_path: Any) -> None:
    whole = sa.finetune(fresh(), "diversity", out=tmp_path / "a", report=False, **(TINY | {"iterations": 3}))
    said = [line["text"] for line in whole.history if line.get("guard") == "note"]
    assert any("diversity is of samples together" in text for text in said)
    assert whole.reference["objective/trusted"] == 0
    assert any(
        line.endswith("recovered, and J* is not to be trusted") for line in summary_lines(whole.history, whole.final)
    )
    said_on_top = " ".join(warnings(read_record(tmp_path / "a")))
    assert "depends on the others of its batch" in said_on_top
    assert "reference_batches make it firmer" not in said_on_top  # no number of them does
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
