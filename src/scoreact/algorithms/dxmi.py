"""`dxmi`: diffusion by maximum-entropy inverse RL. An energy is learned from data, and the sampler descends it.

Each iteration, with real examples and as many paths x_0 ... x_N of the sampler, V one network for energy and value:
    one step on V:     mean V(real) - mean V(x_N) + gamma (mean V(real)^2 + mean V(x_N)^2)
    for k = N-1 .. 0:  (V(x_k) - sg[V(x_{k+1}) + bonus_k])^2,  bonus_k = b (sigmoid(h - k) - sigmoid(h - k - 1)), h = N // 2
    the sampler, at as many random states x_k:  V(x') + tau_2 |x' - x_k|^2 / (2 c_k D) - tau_1 log std_k,  x' = mean + std z
One step of back-propagation, through the last transition alone; c_k is a running mean of |x_{k+1} - x_k|^2 / D. The run's
reward is only measured: what is learned from are the data. The pretrained model holds nothing (no kl_weight).

Fixed point: where the samples' law is the data's, V is 0 and nothing pulls. The entropy and velocity terms move it from there
by tau_1 and tau_2 over the energy's curvature; with both 0 it is the data's law, as far as V sees.
Source: Yoon et al. 2024 (DxMI, arXiv 2407.00626), and their published code for the bonus, the velocity's scale and the rates
of its two CIFAR-10 runs (sampler 1e-7, noise and V 1e-5, Adam, gradient norm 0.1, batches of 128).
Departs from it: a step without noise is learned as one, where theirs has std 0.001; all steps share one learned noise level,
where theirs have one each, so that `--noise-level` draws with it afterwards; the energy sees the prompt of a model with
several; the rates, which belong to large UNets, are ten times theirs or more. The sampler's must stay far below the energy's
(1e-4 beside 1e-3 threw the Fashion-MNIST model away).

form "clamped_displacement" is the sampler's step in the published CIFAR-10 code of Score as Action (Zhao et al. 2025), the rest
as above:  clamp(<sg grad V(x_k), clamp(clamp(x', +-1) - x_k, +-0.1)>, +-1). No gradient passes a clamp: early steps, whose
noise is wide, hardly learn. That run had tau_1 = tau_2 = 0, a fixed noise, batches of 512, rates 3e-7 and 2e-5, and the
sampler's rate times 0.9995 each iteration (`rate_decay`). Its AdamW differs from Adam by a decay of 3e-9 a step, left out
here. Which settings the paper's table was made with is in no source that could be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..control.rollout import rollout
from ..control.trajectory import Trajectory
from ..control.transitions import Paths, Rows
from ..dynamics.sde import SDE
from ..dynamics.solvers import step_of
from ..rewards.energy import Energy, RealStates, energy_network
from ..support.errors import SettingError
from ..support.settings import setting
from ..types import Condition, Metrics, sum_over_data
from .base import Rule

DATA_LIMIT, MOVE_LIMIT, LOSS_LIMIT = 1.0, 0.1, 1.0  # of clamped_displacement, as published


@dataclass(frozen=True)
class States(Rows):
    """States from which the sampler takes one step more."""

    t0: Tensor  # [M]
    t1: Tensor  # [M]
    x: Tensor  # [M, *D]
    noise: Tensor  # [M, *D]
    speed: Tensor  # [M] the running mean of the step's |x' - x|^2 / D
    condition: Condition


@dataclass
class DxMI(Rule):
    """Settings of the rule: see the top of this file."""

    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1, "max_gradient_norm": 0.1, "learning_rate": 1e-5}
    search: ClassVar[Mapping[str, Any]] = {"energy_rate": (1e-4, 1e-2, "log"), "entropy": [0.0, 0.1]}
    kl_term = False
    reads_reference = False
    transitions_only = False

    data: str = setting(
        "", "Real examples: a folder of pictures, an .npz or .npy, or a table; with labels if there are classes"
    )
    form: Literal["descent", "clamped_displacement"] = setting(
        "descent", "The sampler's step: down the value; the second is the published code of Score as Action"
    )
    entropy: float = setting(0.1, "Weight of the entropy, the logarithm of a step's standard deviation (tau_1)", 0)
    velocity: float = setting(0.01, "Weight of the squared length of a step, in units of its running mean (tau_2)", 0)
    penalty: float = setting(1.0, "Weight of the squared energies, which keeps them small (gamma)", 0, above=True)
    time_bonus: float = setting(1.0, "Size of what a state's value gains with the steps that are still to come", 0)
    timed: bool = setting(False, "Whether the value is told the time of a state; without, it is the energy everywhere")
    energy_rate: float = setting(3e-4, "Learning rate of the energy and value (Adam)", 0, above=True)
    noise_rate: float = setting(1e-3, "Learning rate of the logarithm of the noise level (Adam); 0: it stays", 0)
    examples: RealStates = field(init=False)
    energy: Energy = field(init=False)
    log_noise: nn.Parameter = field(init=False)  # of the noise level, in units of the run's
    speed: Tensor = field(init=False)  # [N], empty before the first paths

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise SettingError("dxmi learns from real examples; name a folder, an .npz or a table in `data`.")
        self.own_rows = True
        model = self.policy.model
        device = next(self.policy.parameters()).device
        self.examples = RealStates(self.data, model)
        network = energy_network(model, self.examples.states.shape[1:]).to(device)
        self.energy = Energy(network, self.penalty, self.energy_rate, self.timed)
        self.log_noise, self.speed = nn.Parameter(torch.zeros((), device=device)), torch.empty(0, device=device)
        self.noise_optimizer = torch.optim.Adam([self.log_noise], lr=self.noise_rate)
        noise = self.sde.noise
        self.sde = SDE(self.sde.schedule, lambda schedule, t: noise(schedule, t) * self.log_noise.exp().to(t))

    def rows_for(self, prompts: Sequence[str], ts: Tensor, generator: torch.Generator) -> States:
        """A rollout, the energy's step and the value's on it, and states for the sampler's."""
        condition = self.policy.condition(prompts)
        begin, end = ts[:-1], ts[1:]
        with torch.no_grad():
            zero = torch.zeros_like(begin)
            noisy = step_of(self.sde, self.solver, zero, begin, end, zero).std > 0
        # a step without noise is the policy's too, by the ODE, which there is the same step
        path = rollout(self.policy, self.sde, self.solver, ts, condition, generator, None, False, noisy, False)
        moved = (path.xs[1:] - path.xs[:-1]).flatten(2).square().mean((1, 2))
        self.speed = moved if len(self.speed) == 0 else 0.99 * self.speed + 0.01 * moved
        self.metrics = {"policy/noise_factor": float(self.log_noise.detach().exp())}
        self.metrics |= self.learn_value(path, generator)
        steps, each = int((begin < self.policy.act_until).sum()), torch.arange(len(prompts), device=ts.device)
        k = torch.randint(steps, (len(prompts),), generator=generator, device=ts.device)
        x = path.xs[k, each]
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return States(path.ts[k], path.ts[k + 1], x, noise, self.speed[k], condition)

    def learn_value(self, path: Trajectory, generator: torch.Generator) -> Metrics:
        """The energy's step at the path's end against real examples, and the value's steps from there back."""
        xs, condition = path.xs, path.condition
        real = self.examples.draw(xs.shape[1], self.policy.model, generator)
        metrics, error = self.energy.separate(real, (xs[-1], condition)), torch.zeros(())
        steps = len(xs) - 1
        for k in reversed(range(steps)):
            here, there = (path.ts[i].expand(xs.shape[1]) for i in (k, k + 1))
            later = torch.tensor([steps // 2 - k, steps // 2 - k - 1.0]).sigmoid()
            with torch.no_grad():
                target = self.energy(xs[k + 1], there, condition) + self.time_bonus * float(later[0] - later[1])
            loss = (self.energy(xs[k], here, condition) - target).square().mean()
            self.energy.descend(loss)
            error = loss.detach()
        return {**metrics, "value/loss": float(error), "cost/energy_calls": float(self.energy.calls)}

    def prepare(self, paths: Paths, generator: torch.Generator, rate: float) -> States:
        raise NotImplementedError("dxmi draws its own paths (`rows_for`).")

    def loss(self, rows: States) -> tuple[Tensor, Metrics]:
        """V(x') + velocity - entropy, mean over states; or the clamped inner product."""
        score = self.policy.score(rows.t0, rows.x, rows.condition)
        step = step_of(self.sde, self.solver, score, rows.t0, rows.t1, rows.x)
        after = step.sample(rows.noise)
        if self.form == "clamped_displacement":
            value = self._clamped(rows, after)
        else:
            value = self.energy(after, rows.t1, rows.condition)
        length = sum_over_data((after - rows.x) ** 2) / (2 * rows.speed * rows.x[0].numel())
        entropy = torch.where(step.std > 0, step.std, 1.0).log()
        loss = (value + self.velocity * length - self.entropy * entropy).mean()
        return loss, {"policy/energy_after": float(value.detach().mean())}

    def _clamped(self, rows: States, after: Tensor) -> Tensor:
        with torch.enable_grad():
            x = rows.x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.energy(x, rows.t1, rows.condition).sum(), x)
        move = (after.clamp(-DATA_LIMIT, DATA_LIMIT) - rows.x).clamp(-MOVE_LIMIT, MOVE_LIMIT)
        return sum_over_data(slope * move).clamp(-LOSS_LIMIT, LOSS_LIMIT)

    def moved(self) -> None:
        """The noise's own step, on the gradient that the sampler's has left."""
        if self.noise_rate > 0:
            self.noise_optimizer.step()
        self.noise_optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {
            "energy": self.energy.state(), "log_noise": self.log_noise.detach(), "speed": self.speed,
            "noise_optimizer": self.noise_optimizer.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.energy.restore(state["energy"])
        self.speed, kept = state["speed"], state["noise_optimizer"]
        self.noise_optimizer.load_state_dict({**kept, "state": {int(k): v for k, v in kept["state"].items()}})
        with torch.no_grad():
            self.log_noise.copy_(state["log_noise"])


RULES = {"dxmi": DxMI}
