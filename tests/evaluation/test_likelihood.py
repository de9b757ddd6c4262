"""log p by the probability-flow ODE: closed forms, an integrator of another library, counting, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from scoreact.control.policy import Policy
from scoreact.dynamics import prediction
from scoreact.dynamics.schedule import EDM, VE, VP, Cosine, FromAlphasCumprod, RectifiedFlow, Schedule, ShiftedFlow
from scoreact.evaluation.likelihood import (
    bits_per_dim,
    dequantised,
    is_eight_bit,
    log_slope,
    ode_log_prob,
    states_of,
)
from scoreact.models.gaussian_mixture import GaussianMixture
from scoreact.models.network import NetworkModel
from scoreact.recipes.gaussian import mixture
from scoreact.support.errors import ModelError, SettingError
from scoreact.types import Condition, expand

TABLE = torch.linspace(1e-4, 0.02, 1000).neg().add(1).cumprod(0).tolist()
SCHEDULES = [
    VP(), RectifiedFlow(), Cosine(), VE(), EDM(), ShiftedFlow(3.0), FromAlphasCumprod(TABLE),
    FromAlphasCumprod(TABLE, to_data=True),
]  # fmt: skip
LAW = mixture(2, 4, 0)


def on(schedule: Schedule) -> GaussianMixture:
    return GaussianMixture(schedule, LAW.weights, LAW.means, LAW.covariances)


def some(count: int) -> Tensor:
    """Points of the law and beyond it."""
    return 1.3 * LAW.sample(count, torch.Generator().manual_seed(1))


class Asked(nn.Module):
    """A network of one kind of prediction that knows the mixture's score."""

    def __init__(self, law: GaussianMixture, kind: prediction.Prediction) -> None:
        super().__init__()
        self.law, self.kind = law, kind

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return prediction.convert(prediction.score, self.kind, self.law.schedule, t, x, self.law.score(t, x))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_closed_form_on_every_schedule(schedule: Schedule) -> None:
    model, x = on(schedule), some(12)
    found = ode_log_prob(model, x, model.condition([""] * 12))
    exact = model.log_prob(torch.full((12,), schedule.t_max), x).double()
    assert found.probes == 0
    assert not found.standard_error.any()
    assert torch.allclose(found.value, exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "kind", [prediction.epsilon, prediction.x0, prediction.v, prediction.velocity], ids=lambda k: k.name
)
def test_the_closed_form_of_every_prediction(kind: prediction.Prediction) -> None:
    law, x = on(VE(sigma_max=5000.0)), some(8)  # the prior's normal noise is the law's, to 1e-3
    model = NetworkModel(Asked(law, kind), law.schedule, kind, (2,))
    found = ode_log_prob(model, x, model.condition([""] * 8))
    assert torch.allclose(found.value, law.log_prob(torch.ones(8), x).double(), atol=1e-3, rtol=0)


def test_probes_say_their_own_error() -> None:
    model, x = on(VP()), some(40)
    found = ode_log_prob(model, x, model.condition([""] * 40), probes=16, tolerance=1e-3)
    off = (found.value - model.log_prob(torch.full((40,), 0.999), x).double()) / found.standard_error
    assert found.probes == 16
    assert float(found.standard_error.min()) > 1e-3
    assert 0.5 < float(off.square().mean().sqrt()) < 2


class Bent(nn.Module):
    """The mixture's score and a change of which nobody knows the law."""

    def __init__(self, law: GaussianMixture) -> None:
        super().__init__()
        self.law, self.prior, self.prior_log_prob = law, law.prior, law.prior_log_prob
        self.schedule, self.condition, self.decode = law.schedule, law.condition, law.decode
        self.strength = nn.Parameter(torch.tensor(0.5))

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        return self.law.score(t, x) + self.strength * torch.tanh(x.flip(1) + x)


def test_another_integrator_finds_the_same() -> None:
    """torchdiffeq's dopri5 in (x, t) itself."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    schedule = Cosine()
    model, x = Bent(on(schedule)).double(), some(4).double()
    condition = model.condition([""] * 4)
    found = ode_log_prob(model, x, condition)

    def rate(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at, time = state[0].detach().requires_grad_(), t.expand(4)
            kappa = schedule.d_alpha(time) / schedule.alpha(time)
            gain = schedule.sigma(time) * (kappa * schedule.sigma(time) - schedule.d_sigma(time))
            drift = expand(kappa, at) * at + expand(gain, at) * model.score(time, at, condition)
            trace = sum(torch.autograd.grad(drift[:, i].sum(), at, retain_graph=True)[0][:, i] for i in range(2))
        return drift.detach(), trace

    times = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    ends, traces = torchdiffeq.odeint(rate, (x, torch.zeros(4).double()), times, rtol=1e-6, atol=1e-6)
    theirs = model.prior_log_prob(ends[-1], condition) + traces[-1]
    assert torch.allclose(found.value, theirs, atol=1e-3, rtol=0)
    assert float((found.value - model.law.log_prob(times[:1].expand(4), x)).abs().max()) > 0.05  # it did change the law


def test_a_policy_is_asked_as_it_acts() -> None:
    model, x = Bent(on(VP())), some(4)
    policy = Policy(model)
    with torch.no_grad():
        model.strength += 1
    tuned = ode_log_prob(policy, x, policy.condition([""] * 4), tolerance=1e-3)
    before = ode_log_prob(policy.reference, x, policy.condition([""] * 4), tolerance=1e-3)
    assert torch.equal(tuned.value, ode_log_prob(model, x, model.condition([""] * 4), tolerance=1e-3).value)
    assert float((tuned.value - before.value).abs().max()) > 0.05
    assert policy.network_calls == 4 * tuned.calls


def test_the_density_of_samples_in_another_unit() -> None:
    """Samples in [0, 1] of a Gaussian in [-1, 1]: the change of variables is in the slope."""
    law = GaussianMixture(VE(), torch.ones(1), torch.zeros(1, 3), 0.04 * torch.eye(3)[None])
    model = NetworkModel(Asked(law, prediction.epsilon), law.schedule, prediction.epsilon, (3,), low=-1, high=1)
    samples = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    states = states_of(model, samples)
    found = ode_log_prob(model, states, model.condition([""] * 6)).value + log_slope(model, samples)
    wanted = torch.distributions.Normal(0.5, math.sqrt(0.04 + 1e-4) / 2).log_prob(samples).sum(1)
    assert torch.allclose(found, wanted.double(), atol=1e-3)


def test_bits_of_a_uniform_law() -> None:
    """256 levels, each as likely: 8 bits a pixel, by the density of dequantised pixels."""
    levels = torch.randint(256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    samples = levels / 255
    moved = dequantised(samples, torch.Generator().manual_seed(0))
    assert torch.equal((moved * 255).round().long(), levels)
    assert 0.2 < float((moved * 255 - levels).std()) < 0.4
    density = torch.full((5,), 16 * math.log(255 / 256), dtype=torch.float64)  # from -1/510 to 1 + 1/510
    assert torch.allclose(bits_per_dim(density, 16, eight_bit=True), torch.full((5,), 8.0).double())
    assert is_eight_bit(samples)
    assert not is_eight_bit(moved.clamp(0, 1))


class Elsewhere(nn.Module):
    """A model that starts from noise of twice the schedule's size."""

    def __init__(self, law: GaussianMixture) -> None:
        super().__init__()
        self.law, self.schedule, self.condition, self.decode = law, law.schedule, law.condition, law.decode

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        return 2 * torch.randn(len(condition), 2, generator=generator)

    def score(self, t: Tensor, x: Tensor, condition: Condition) -> Tensor:
        return self.law.score(t, x)


def test_what_is_refused() -> None:
    model, x = on(VP()), some(3)
    condition = model.condition([""] * 3)
    with pytest.raises(SettingError, match="probes is 1; give 2 or more"):
        ode_log_prob(model, x, condition, probes=1)
    with pytest.raises(SettingError, match="tolerance is 0"):
        ode_log_prob(model, x, condition, tolerance=0.0)
    with pytest.raises(SettingError, match="not finite"):
        ode_log_prob(model, x * math.nan, condition)
    with pytest.raises(ModelError, match=r"standard deviation .*prior_log_prob"):
        ode_log_prob(Elsewhere(model), x, condition)
    network = NetworkModel(nn.Identity(), VP(), prediction.epsilon, (2,), low=-1, high=1)
    with pytest.raises(SettingError, match="no states of the model"):
        states_of(network, torch.full((2, 2), 3.0))
