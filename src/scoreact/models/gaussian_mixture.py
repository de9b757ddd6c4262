"""The exact yardstick: data from a Gaussian mixture, its score at every time, and the optimum for linear-quadratic rewards.

With memoryless noise the optimum of J is the mixture tilted by exp(R / beta); for R(x) = a.x - x'Qx / 2 + const it is again
a Gaussian mixture, so the optimal score, J* and the terminal law are closed form (design, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..dynamics.schedule import Schedule
from ..support.devices import in_double
from ..support.errors import ModelError
from ..types import Condition


class GaussianMixture(nn.Module):
    """sum_i w_i N(m_i, S_i) in d dimensions, with full covariances. Nothing to train: a reference, or an oracle.

    Args:
        schedule: of the noising path.
        weights: positive, [K]; they are divided by their sum.
        means: [K, d].
        covariances: symmetric positive definite, [K, d, d].

    Raises:
        ValueError: shapes that do not fit, a weight that is not positive, a covariance that is not positive definite.
    """

    def __init__(self, schedule: Schedule, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        count, dim = means.shape
        if weights.shape != (count,) or covariances.shape != (count, dim, dim):
            raise ModelError(
                f"weights {tuple(weights.shape)} and covariances {tuple(covariances.shape)} do not fit means "
                f"{tuple(means.shape)}; expected {(count,)} and {(count, dim, dim)}."
            )
        if not bool((weights > 0).all()):
            raise ModelError(f"mixture weights must be positive, got {weights.tolist()}.")
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances.double())
        if not bool((eigenvalues > 0).all()):
            raise ModelError(f"covariances must be positive definite; smallest eigenvalue {eigenvalues.min():.3g}.")
        self._schedule = schedule
        self.register_buffer("weights", (weights / weights.sum()).float())
        self.register_buffer("means", means.float())
        self.register_buffer("eigenvalues", eigenvalues.float())
        self.register_buffer("eigenvectors", eigenvectors.float())
        self.weights: Tensor
        self.means: Tensor
        self.eigenvalues: Tensor  # [K, d]
        self.eigenvectors: Tensor  # [K, d, d], columns

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    @property
    def dim(self) -> int:
        """d, the numbers in one state."""
        return int(self.means.shape[1])

    @property
    def covariances(self) -> Tensor:
        """S_i, [K, d, d]."""
        return (self.eigenvectors * self.eigenvalues.unsqueeze(1)) @ self.eigenvectors.mT

    # --- the model contract -------------------------------------------------------------------------------------

    def prior(self, condition: Condition, generator: torch.Generator) -> Tensor:
        """Exact samples at t_min, [B, d]: no initialisation error enters a comparison with the closed form."""
        t = torch.full((len(condition),), self.schedule.t_min, device=self.means.device)
        x_data = self.sample(len(condition), generator)
        noise = torch.randn(x_data.shape, generator=generator, device=x_data.device)
        return self.schedule.alpha(t).unsqueeze(1) * x_data + self.schedule.sigma(t).unsqueeze(1) * noise

    def prior_log_prob(self, x: Tensor, condition: Condition) -> Tensor:
        """log p at t_min of x [B, d]: [B], nats."""
        return self.log_prob(x.new_full((len(x),), self.schedule.t_min), x)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return Condition(list(prompts))

    def score(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        """grad log p_t(x) at t [B], x [B, d]: [B, d]. No condition is needed; every prompt means the same."""
        whitened, variance, log_weight = self._components(t, x)
        responsibility = torch.softmax(log_weight, dim=1)  # [B, K]
        pulled = responsibility.unsqueeze(2) * whitened / variance
        return -pulled.flatten(1) @ self._basis().mT

    def decode(self, x: Tensor) -> Tensor:
        return x

    def exact_law(self) -> GaussianMixture:
        """Itself."""
        return self

    # --- closed forms -------------------------------------------------------------------------------------------

    def _basis(self) -> Tensor:
        """The eigenvectors of all components side by side, [d, K d]."""
        return self.eigenvectors.transpose(0, 1).flatten(1)

    def _components(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per component at time t: centred x in the eigenbasis [B,K,d], variances [B,K,d], log(w_i N_i(x)) [B,K]."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        # one matrix product for all components: this is most of what a small problem costs
        means = torch.einsum("kd,kde->ke", self.means, self.eigenvectors)
        whitened = (x @ self._basis()).unflatten(1, self.means.shape) - alpha.reshape(-1, 1, 1) * means
        variance = alpha.reshape(-1, 1, 1) ** 2 * self.eigenvalues + sigma.reshape(-1, 1, 1) ** 2
        log_normal = -0.5 * (whitened**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return whitened, variance, self.weights.log() + log_normal

    def log_prob(self, t: Tensor, x: Tensor) -> Tensor:
        """log p_t(x) at t [B], x [B, d]: [B], nats."""
        return torch.logsumexp(self._components(t, x)[2], dim=1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact samples of the data, [count, d]; the generator is on the model's device."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, generator=generator, device=self.means.device)
        scaled = noise * self.eigenvalues[component].sqrt()
        return self.means[component] + torch.einsum("bde,be->bd", self.eigenvectors[component], scaled)

    def tilted(
        self, linear: Tensor, quadratic: Tensor, kl_weight: float, constant: float = 0.0
    ) -> tuple[GaussianMixture, float]:
        """The law p exp(R / beta) / Z for R(x) = a.x - x'Qx / 2 + constant, and J* = beta log Z. Computed in float64.

        Args:
            linear: a, [d].
            quadratic: Q, [d, d], symmetric, with S^-1 + Q / beta positive definite.
            kl_weight: beta, positive, in units of the reward per nat.
            constant: in units of the reward.

        Returns:
            The optimum as a mixture, and J* in units of the reward.

        Raises:
            ValueError: kl_weight is not positive, or exp(R / beta) has no finite mean.
        """
        if kl_weight <= 0:
            raise ModelError(f"kl_weight must be positive, got {kl_weight}.")
        a, q = in_double(linear) / kl_weight, in_double(quadratic) / kl_weight
        means, covariances = in_double(self.means), in_double(self.covariances)
        precision = torch.linalg.inv(covariances)
        new_precision = precision + q
        if not bool((torch.linalg.eigvalsh(new_precision) > 0).all()):
            raise ModelError("exp(R / kl_weight) has no finite mean under this mixture: raise kl_weight or Q.")
        new_covariances = torch.linalg.inv(new_precision)
        pull = torch.einsum("kde,ke->kd", precision, means) + a
        new_means = torch.einsum("kde,ke->kd", new_covariances, pull)
        log_z = (
            in_double(self.weights).log()
            + 0.5 * (torch.logdet(new_covariances) - torch.logdet(covariances))
            + 0.5 * torch.einsum("kd,kd->k", pull, new_means)
            - 0.5 * torch.einsum("kd,kde,ke->k", means, precision, means)
        )
        total = torch.logsumexp(log_z, 0)
        mixture = GaussianMixture(self.schedule, (log_z - total).exp(), new_means, new_covariances)
        return mixture.to(self.means.device), kl_weight * float(total) + constant
