"""How a rule's loss becomes a change of weights: Adam with a bound on the path KL of the step, or natural gradients.

Knows gradients and parameters; does not know what the loss means. Sources: Kingma & Ba 2015; Schulman et al. 2015
(TRPO); Martens 2010 (Gauss-Newton products with conjugate gradients).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.base import Rule
from ..control.transitions import Batch, Rows, has_moved
from ..support import distributed
from ..support.errors import Diverged, ModelError, SettingError
from ..types import Metrics

Shift = Callable[[Batch], Tensor]  # transitions -> (policy - behaviour) / std there, [M, *D]


class StepKL:
    """Path KL of the policy from where it was when this was made, nats, at up to `size` states of a batch."""

    def __init__(self, shift: Shift, batch: Batch, size: int) -> None:
        index = torch.linspace(0, len(batch) - 1, min(size, len(batch)), device=batch.t0.device).long()
        self.shift, self.batch = shift, batch[index]
        with torch.no_grad():
            self.start: Tensor | float = shift(self.batch) if has_moved(shift, self.batch) else 0.0

    def __call__(self) -> float:
        with torch.no_grad():
            moved = self.shift(self.batch) - self.start
        return distributed.mean(float(self.batch.steps * 0.5 * moved.flatten(1).square().sum(1).mean()))


TRIES = 6


def backtrack(
    parameters: Sequence[nn.Parameter], before: Sequence[Tensor], measure: Callable[[], float], limit: float
) -> tuple[float, float]:
    """Go back towards `before` until measure() <= limit; (share of the step kept, measure there).

    The KL is quadratic in the step to first order, which gives the share to try; at most `TRIES`, then the step is dropped.
    """
    after = [p.detach().clone() for p in parameters]
    share, value = 1.0, measure()
    for _ in range(TRIES):
        if value <= limit:
            return share, value
        share *= min(0.9 * (limit / value) ** 0.5, 0.7) if value < float("inf") else 0.1
        with torch.no_grad():
            for p, a, b in zip(parameters, before, after, strict=True):
                p.copy_(a + share * (b - a))
        value = measure()
    with torch.no_grad():
        for p, a in zip(parameters, before, strict=True):
            p.copy_(a)
    return 0.0, 0.0


@dataclass
class AdamSteps:
    """`epochs` sweeps of Adam over minibatches; afterwards the step is shortened to path KL <= max_kl (nats).

    It is measured at `kl_states` states; with 0 the step is neither measured nor bounded.
    The bound holds whatever the reward's scale, so that one bad batch cannot throw the policy away. `accumulate` minibatches
    make one optimiser step.
    """

    parameters: list[nn.Parameter]
    learning_rate: float = 1e-3
    epochs: int = 2
    minibatch_size: int = 2048
    accumulate: int = 1
    max_kl: float = 0.5
    max_gradient_norm: float = 1e6
    beta2: float = 0.99
    kl_states: int = 512
    left: Callable[[], float] = lambda: math.inf  # network calls that the step may still make

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.learning_rate, betas=(0.9, self.beta2))

    def __call__(self, algorithm: Rule, batch: Rows, generator: torch.Generator, rate: float) -> Metrics:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        before = [p.detach().clone() for p in self.parameters]
        step_kl = (
            StepKL(algorithm.shift, batch, self.kl_states) if isinstance(batch, Batch) and self.kl_states else None
        )
        metrics: Metrics = {}
        norm = torch.zeros(())
        kept = 0 if step_kl is None else (TRIES + 1) * min(self.kl_states, len(batch))  # of the calls, for the bound
        for _ in range(self.epochs):
            parts = list(batch.minibatches(self.minibatch_size, generator))
            for number, minibatch in enumerate(parts):
                if self.left() < len(minibatch) + kept:
                    raise SettingError(_too_few(len(minibatch) + kept - self.left()))
                loss, metrics = algorithm.loss(minibatch)
                if not bool(torch.isfinite(loss)):
                    raise Diverged(
                        f"the policy's loss is {loss.item()}; lower the learning rate ({self.learning_rate}) or max_kl "
                        f"({self.max_kl}), or clip the reward."
                    )
                (loss * len(minibatch) / min(len(batch), self.accumulate * self.minibatch_size)).backward()
                ends = number + 1 == len(parts) or self.left() < len(parts[number + 1]) + kept
                if (number + 1) % self.accumulate == 0 or ends:
                    distributed.average(p.grad for p in self.parameters)
                    norm = nn.utils.clip_grad_norm_(self.parameters, self.max_gradient_norm)
                    if not bool(torch.isfinite(norm)):
                        raise Diverged(
                            f"the policy's gradient is not finite (loss {loss.item():.4g}); lower the learning rate "
                            f"({self.learning_rate}) or max_kl ({self.max_kl}), or clip the reward."
                        )
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if ends:
                    break
            if self.left() < min(self.minibatch_size, len(batch)) + kept:
                break
        metrics["policy/gradient_norm"] = float(norm)
        if step_kl is not None:
            metrics["policy/step_share"], metrics["policy/step_kl"] = backtrack(
                self.parameters, before, step_kl, self.max_kl
            )
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _too_few(missing: float) -> str:
    return (
        f"an update may make {missing:,.0f} network calls fewer than its first minibatch and its bound need; raise calls, or "
        "lower minibatch_size, kl_states or batch_size."
    )


@dataclass
class NaturalGradient:
    """One natural-gradient step: solve (F + damping) s = -gradient by conjugate gradients, then a line search.

    F is the Gauss-Newton matrix of the path KL, E sum_k J_k^T J_k with J_k the Jacobian of the control, times kl_weight:
    the curvature of the cost itself, so that share 1 is the minimiser of the loss's quadratic model.
    """

    parameters: list[nn.Parameter]
    max_kl: float = 0.5
    damping: float = 1e-4
    cg_steps: int = 20
    states: int = 4096

    def __call__(self, algorithm: Rule, batch: Rows, generator: torch.Generator, rate: float) -> Metrics:
        assert isinstance(batch, Batch)  # the Fisher matrix is that of the transitions
        shift = algorithm.shift
        loss, metrics = algorithm.loss(batch)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])
        if not bool(torch.isfinite(gradient).all()):
            raise Diverged(
                f"the policy's gradient is not finite (loss {loss.item()}); clip the reward or lower max_kl."
            )
        order = torch.randperm(len(batch), generator=generator, device=batch.t0.device)[: self.states]
        try:
            direction = self._solve(shift, batch[order], algorithm.kl_weight, -gradient)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise ModelError(
                "natural gradients need second derivatives, and a part of this model has none "
                f"({' '.join(str(error).split())[:160]}). Where it is fused attention: of a pipeline give the option "
                "twice_differentiable=true; compute your own in torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
            ) from error
        before = [p.detach().clone() for p in self.parameters]
        start = loss.item()
        step_kl = StepKL(shift, batch, len(batch))
        scale = rate
        for _ in range(8):
            self._move(before, scale * direction)
            with torch.no_grad():
                value = algorithm.loss(batch)[0].item()
            kl = step_kl()
            if kl <= self.max_kl and value < start:
                break
            scale *= min(0.5, 0.9 * (self.max_kl / kl) ** 0.5) if kl > 0 else 0.5
        else:
            scale, kl = 0.0, 0.0
            self._move(before, torch.zeros_like(direction))
        return {
            **metrics,
            "policy/step_kl": kl,
            "policy/step_share": scale,
            "policy/gradient_norm": float(gradient.norm()),
        }

    def _move(self, before: Sequence[Tensor], step: Tensor) -> None:
        with torch.no_grad():
            for p, start, part in zip(
                self.parameters, before, step.split([p.numel() for p in self.parameters]), strict=True
            ):
                p.copy_(start + part.view_as(p))

    def _solve(self, shift: Shift, batch: Batch, kl_weight: float, target: Tensor) -> Tensor:
        """Conjugate gradients on (kl_weight F + damping trace-scale) s = target."""
        output = shift(batch)
        probe = torch.zeros_like(output, requires_grad=True)
        # J^T probe, linear in the probe: differentiating it once more gives J s without forward mode
        vjp = torch.autograd.grad(output, self.parameters, probe, create_graph=True)
        flat_vjp = torch.cat([v.flatten() for v in vjp])
        factor = kl_weight * batch.steps / len(batch)

        def product(s: Tensor) -> Tensor:
            (jvp,) = torch.autograd.grad(flat_vjp, probe, s, retain_graph=True)
            parts = torch.autograd.grad(output, self.parameters, jvp, retain_graph=True)
            return factor * torch.cat([p.flatten() for p in parts])

        # damping relative to the curvature along the gradient: free of units
        unit = target / target.norm().clamp(min=1e-30)
        damping = self.damping * float(unit @ product(unit))
        solution = torch.zeros_like(target)
        residual = target.clone()
        direction = residual.clone()
        squared = residual @ residual
        for _ in range(self.cg_steps):
            if float(squared) < 1e-20:
                break
            curved = product(direction) + damping * direction
            step = squared / (direction @ curved)
            solution += step * direction
            residual -= step * curved
            new = residual @ residual
            direction = residual + (new / squared) * direction
            squared = new
        return solution.detach()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise SettingError(f"a natural-gradient step keeps no state, got {sorted(state)}.")


class Average:
    """Exponential average of parameters over iterations, the weights that are evaluated and shipped."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise SettingError(f"the average's decay must lie in [0, 1), got {decay}.")
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """Move towards `model`; over the first iterations a plain mean, so that the start is soon forgotten."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        with torch.no_grad():
            for mean, p in zip(self.model.parameters(), model.parameters(), strict=True):
                if p.requires_grad:
                    mean.lerp_(p, 1 - decay)
