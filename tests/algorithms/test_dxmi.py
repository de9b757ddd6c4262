"""`dxmi`: it rests at the data's law and reaches it, its steps by hand, and the data that it takes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_problem import worst
from torch import Tensor, nn

from scoreact.algorithms.dxmi import DxMI
from scoreact.control.policy import Policy
from scoreact.control.rollout import rollout
from scoreact.control.trajectory import Trajectory
from scoreact.dynamics import prediction
from scoreact.dynamics.grids import uniform
from scoreact.dynamics.schedule import RectifiedFlow
from scoreact.dynamics.sde import SDE, noise_level
from scoreact.dynamics.solvers import ddim, step_of
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.mlp import ResidualModel
from scoreact.models.network import NetworkModel
from scoreact.models.unet import UNet
from scoreact.rewards.energy import Energy, RealStates
from scoreact.support.errors import SettingError
from scoreact.support.own_data import Examples, split_off
from scoreact.types import Condition

MEAN, VARIANCE, STEPS = 0.8, 0.3, 4


class ByTime(nn.Module):
    """a + b x + c x^2 with coefficients of each time of a grid: as a residual score (no c), or as an energy."""

    def __init__(self, ts: Tensor, powers: int) -> None:
        super().__init__()
        self.ts, self.coefficients = ts, nn.Parameter(torch.zeros(len(ts), powers))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        own = self.coefficients[(t.unsqueeze(1) - self.ts).abs().argmin(1)]
        result = sum(own[:, power].unsqueeze(1) * x**power for power in range(own.shape[1]))
        assert isinstance(result, Tensor)
        return result if condition is None else result[:, 0]


def line(data: Path, **settings: Any) -> tuple[DxMI, Tensor]:
    """A rule on N(0, 0.6) in one dimension and its grid; real data are N(MEAN, VARIANCE)."""
    numbers = np.random.default_rng(0).normal(size=(22_000, 1)).astype("float32")
    train = split_off(Examples(torch.from_numpy(numbers)))[0].values.numpy()
    np.save(data, MEAN + VARIANCE**0.5 * (numbers - train.mean()) / train.std())  # to the moments of the training part
    base = GaussianMixture(RectifiedFlow(t_min=0.2), torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), 0.6))
    model, ts = ResidualModel(base, 1, width=4), uniform(base.schedule, STEPS)
    model.residual = ByTime(ts, 2)  # type: ignore[assignment]
    sde = SDE(base.schedule, noise_level(1.0))
    rule = DxMI(Policy(model, base), sde, ddim, None, 1.0, None, data=str(data), **settings)
    return rule, ts


def drawn(rule: DxMI, ts: Tensor, count: int, generator: torch.Generator) -> Trajectory:
    """Paths as the rule draws them: the last step, which has no noise, is the policy's too."""
    noisy = torch.arange(len(ts) - 1) < len(ts) - 2
    return rollout(rule.policy, rule.sde, ddim, ts, Condition([""] * count), generator, stochastic=noisy)


def at_rest(rule: DxMI, ts: Tensor) -> None:
    """The last step, which has no noise here, sends what the reference brings to a law with the data's two moments."""
    model, variance = rule.policy.model, 0.04 * 0.6 + 0.64  # at t_min = 0.2
    ends = torch.tensor([[0.0], [1.0]])
    for t0, t1 in itertools.pairwise(ts):
        here, there = t0.expand(2), t1.expand(2)
        step = step_of(rule.sde, ddim, model.score(here, ends, Condition([""] * 2)), here, there, ends)
        slope, last = float((step.mean[1] - step.mean[0]).detach()), float(variance)
        variance = slope**2 * variance + float(step.std[0].detach() ** 2)
    t = ts[-2]
    more = (VARIANCE / last) ** 0.5 - slope
    with torch.no_grad():  # x_data_hat = (x + sigma^2 score) / alpha
        model.residual.coefficients[-2] = t / (1 - t) ** 2 * torch.tensor([MEAN, more])  # type: ignore[union-attr, operator]


def test_at_the_laws_of_the_data_nothing_pulls(tmp_path: Path) -> None:
    rule, ts = line(tmp_path / "data.npy", entropy=0.0, velocity=0.0, noise_rate=0.0)
    generator, found = torch.Generator().manual_seed(1), {}
    for resting in (False, True):
        if resting:
            at_rest(rule, ts)
        pulls = []
        for _ in range(20):
            path = drawn(rule, ts, 2000, generator)
            rule.energy = Energy(ByTime(ts, 3), timed=True)  # says 0 to everything
            rule.energy.separate(rule.examples.draw(2000, rule.policy.model, generator), (path.xs[-1], path.condition))
            (gradient,) = (p.grad for p in rule.energy.parameters())
            assert gradient is not None
            pulls.append(gradient[-1, 1:])  # of x and x^2
        found[resting] = worst(torch.stack(pulls))
        mean = float(torch.stack(pulls)[:, 0].mean())  # of x: the descent makes what is real low
        assert mean == pytest.approx(0.0 if resting else MEAN, abs=0.05)
        rows = states(rule, ts, 500)
        rule.energy = Energy(ByTime(ts, 3))
        gradients = torch.autograd.grad(rule.loss(rows)[0], rule.policy.trainable())
        assert not any(bool(g.any()) for g in gradients), "an energy that tells nothing apart moves nothing"
    rule.energy = Energy(ByTime(ts, 3), rate=1e-9)
    with torch.no_grad():
        rule.energy.network.coefficients[:, 1] = 1.0
    states(rule, ts, 2000)
    assert rule.metrics["energy/samples"] == pytest.approx(MEAN, abs=0.06), "the last step of its rollout is its own"
    assert found[True] < 4
    assert found[False] > 20


@pytest.mark.slow
def test_the_sampler_reaches_the_moments_of_the_data(tmp_path: Path) -> None:
    """Scores linear in x at each of four steps, energies quadratic: both laws have two moments, and V sees them."""
    rule, ts = line(tmp_path / "data.npy", entropy=0.0, velocity=0.0, noise_rate=0.0, time_bonus=0.0)
    rule.energy = Energy(ByTime(ts, 3), rate=0.05, timed=True)
    optimizer = torch.optim.Adam(rule.policy.trainable(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for n in range(600):
        for own, rate in ((optimizer, 0.02), (rule.energy.optimizer, 0.05)):
            own.param_groups[0]["lr"] = rate * min(1.0, 2 - n / 300)
        optimizer.zero_grad()
        rule.loss(rule.rows_for([""] * 256, ts, generator))[0].backward()
        optimizer.step()
        rule.moved()
    path = drawn(rule, ts, 20_000, torch.Generator().manual_seed(2))
    assert (float(path.xs[-1].mean()), float(path.xs[-1].var())) == pytest.approx((MEAN, VARIANCE), abs=0.04)


def states(rule: DxMI, ts: Tensor, count: int = 64) -> Any:
    return rule.rows_for([""] * count, ts, torch.Generator().manual_seed(1))


def test_the_loss_by_hand_and_its_gradients(tmp_path: Path) -> None:
    rule, ts = line(tmp_path / "data.npy", entropy=0.3, velocity=0.2)
    rows = states(rule, ts)
    with torch.no_grad():
        for p in rule.energy.parameters():
            p.add_(0.1)
    score = rule.policy.score(rows.t0, rows.x, rows.condition)
    step = step_of(SDE(rule.sde.schedule, noise_level(1.0)), ddim, score, rows.t0, rows.t1, rows.x)
    after = step.mean + step.std.unsqueeze(1) * rows.noise
    noisy = rows.t1 < 1
    wanted = rule.energy(after, torch.ones(64), rows.condition) + 0.2 * (after - rows.x)[:, 0] ** 2 / (2 * rows.speed)
    wanted = (wanted - 0.3 * torch.where(noisy, step.std, 1.0).log()).mean()
    loss, _ = rule.loss(rows)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = rule.policy.trainable()
    for found, own in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(found, own)
    assert bool(noisy.any())
    assert not bool(noisy.all())


def test_the_entropy_raises_the_noise_of_the_steps_that_have_any(tmp_path: Path) -> None:
    rule, ts = line(tmp_path / "data.npy", entropy=0.3, velocity=0.0, noise_rate=0.01)
    rows = states(rule, ts)
    rule.energy = Energy(ByTime(ts, 3))  # says 0 to everything
    rule.loss(rows)[0].backward()
    noisy = (rows.t1 < 1).float().mean()
    assert float(rule.log_noise.grad or 0) == pytest.approx(-0.3 * float(noisy), rel=1e-4)
    assert rows.speed.isfinite().all()
    rule.moved()
    assert float(rule.log_noise.detach()) == pytest.approx(0.01, rel=1e-3)
    t = torch.tensor([0.5])
    factor = rule.sde.diffusion(t) / noise_level(1.0)(rule.sde.schedule, t)
    assert factor.item() == pytest.approx(math.exp(0.01), rel=1e-4)
    still, _ = line(tmp_path / "data.npy", entropy=0.3, noise_rate=0.0)
    still.loss(states(still, ts))[0].backward()
    still.moved()
    assert float(still.log_noise.detach()) == 0


def test_the_published_step_of_score_as_action_by_hand(tmp_path: Path) -> None:
    """clamp(<grad V(x), clamp(clamp(x', +-1) - x, +-0.1)>, +-1), V at the state before the step; no gradient passes a clamp."""
    rule, ts = line(tmp_path / "data.npy", form="clamped_displacement", entropy=0.0, velocity=0.0)
    rows = states(rule, ts, 400)
    rule.energy = Energy(ByTime(ts, 3))
    with torch.no_grad():
        rule.energy.network.coefficients.copy_(torch.tensor([0.0, 4.0, 6.0]).expand(len(ts), 3))
    with torch.no_grad():
        score = rule.policy.score(rows.t0, rows.x, rows.condition)
        step = step_of(rule.sde, ddim, score, rows.t0, rows.t1, rows.x)
    total, moving = 0.0, 0
    for i in range(400):
        x, after = float(rows.x[i]), float(step.mean[i] + step.std[i] * rows.noise[i])
        move = min(max(after, -1.0), 1.0) - x
        loss = (4 + 12 * x) * min(max(move, -0.1), 0.1)
        total += min(max(loss, -1.0), 1.0)
        moving += abs(after) < 1 and abs(move) < 0.1 and abs(loss) < 1
    rule.policy.model.residual.coefficients.grad = None  # type: ignore[attr-defined, union-attr]
    loss, _ = rule.loss(rows)
    assert loss.item() == pytest.approx(total / 400, abs=1e-5)
    shift = torch.zeros(400, 1, requires_grad=True)
    inner = rule._clamped(rows, step.sample(rows.noise) + shift)
    (gradient,) = torch.autograd.grad(inner.sum(), shift)
    assert int((gradient != 0).sum()) == moving
    assert 0 < moving < 200


def test_the_value_is_learned_from_the_end_back(tmp_path: Path) -> None:
    """Steps alone, no bonus: V of each time becomes the mean of V one step later."""
    rule, ts = line(tmp_path / "data.npy", time_bonus=0.7)
    path = rollout(rule.policy, rule.sde, ddim, ts, Condition([""] * 512), torch.Generator().manual_seed(3))
    rule.energy = Energy(ByTime(ts, 1), penalty=0.5, rate=0.05, timed=True)
    found = {}
    for _ in range(200):
        found = rule.learn_value(path, torch.Generator().manual_seed(4))
    assert found["cost/energy_calls"] == 200 * 512 * (2 + 2 * STEPS)  # real and drawn; each state and the next
    values = rule.energy.network.coefficients.detach()[:, 0]
    sigmoid = [1 / (1 + math.exp(-(2 - k))) for k in range(STEPS + 1)]
    wanted = [0.7 * (sigmoid[k] - sigmoid[STEPS]) for k in range(STEPS + 1)]
    assert values.tolist() == pytest.approx(wanted, abs=0.02)  # constants tell no law from another: 0 at the end


# --- data ------------------------------------------------------------------------------------------------------------


def pictures(classes: tuple[str, ...] = ("cat", "dog")) -> NetworkModel:
    return NetworkModel(UNet(widths=(8, 8), classes=len(classes)), RectifiedFlow(), prediction.velocity, (1, 8, 8), classes,
                        low=-1, high=1)  # fmt: skip


def test_pictures_become_states_with_their_prompts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 2
    np.savez(tmp_path / "numbers.npz", images=images, labels=labels)
    np.savez(tmp_path / "names.npz", images=images, labels=np.array(["dog", "cat"])[labels])
    for name, second in (("numbers", "dog"), ("names", "cat")):
        real = RealStates(tmp_path / f"{name}.npz", pictures())
        x, condition = real.draw(500, pictures(), torch.Generator().manual_seed(0))
        assert x.shape == (500, 1, 8, 8)
        assert -1 <= float(x.min()) < -0.9 < 0.9 < float(x.max()) <= 1
        assert 150 < sum(prompt == second for prompt in condition.prompts) < 350
        found = ((x[0] + 1) * 127.5).round().byte().numpy()
        place = next(i for i in range(60) if np.array_equal(found[0], images[i]))
        assert condition.prompts[0] == (second if labels[place] else {"dog": "cat", "cat": "dog"}[second])


def test_data_that_do_not_fit_are_told_in_a_sentence(tmp_path: Path) -> None:
    rule, _ = line(tmp_path / "data.npy")
    with pytest.raises(
        SettingError, match=r"dxmi learns from real examples; name a folder, an .npz or a table in `data`"
    ):
        DxMI(rule.policy, rule.sde, rule.solver)
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "large.npz", images=images, labels=np.arange(60) % 2)
    with pytest.raises(
        SettingError, match=r"large.npz holds examples of shape \(1, 9, 9\); the model's states are \(1, 8, 8\)"
    ):
        RealStates(tmp_path / "large.npz", pictures())
    np.savez(tmp_path / "birds.npz", images=images[:, :8, :8], labels=np.array(["dog", "bird"])[np.arange(60) % 2])
    with pytest.raises(
        SettingError, match=r"birds.npz has the class 'bird', which the model does not know; it knows cat, dog"
    ):
        RealStates(tmp_path / "birds.npz", pictures())
    np.save(tmp_path / "wide.npy", np.linspace(-3, 3, 60 * 12, dtype="float32").reshape(60, 1, 12))
    model = NetworkModel(nn.Conv1d(1, 1, 1), RectifiedFlow(), prediction.velocity, (1, 12), low=-1, high=1)
    with pytest.raises(SettingError, match="are no states of the model: decoding them gives others"):
        RealStates(tmp_path / "wide.npy", model)
