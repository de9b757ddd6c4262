"""An energy that goes on learning beside any rule: DxMI's alternating reward, apart from DxMI's own step.

    energy = AlternatingEnergy(model, "pictures.npz", steps=4)
    finetune(model, energy, config=..., hooks=[energy])

The reward is minus the energy of `rewards.energy`. It changes while the policy does, so J* has no fixed meaning.
Source: Yoon et al. 2024 (DxMI, arXiv 2407.00626).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..dynamics.grids import grid_times
from ..dynamics.samplers import sampler_by_name
from ..models.base import Encodes, ScoreModel
from ..rewards.energy import Energy, RealStates, energy_network
from ..sampling.draw import balanced, draw
from ..support.devices import device_of
from ..support.errors import SettingError
from ..support.seeds import derived
from ..training.loop import Hook, Stop
from ..types import Condition

if TYPE_CHECKING:
    from ..training.trainer import Trainer


class AlternatingEnergy(Hook):
    """A reward, and the hook that refits it: give it to `finetune` as both.

    Args:
        model: as before training; its samples are the first that the energy is told from the data.
        data: real examples, everything that `read_data` takes; with labels where the model has classes.
        steps: of the paths whose ends are the samples.
        solver: of these paths.
        grid: of these paths.
        every: iterations between two rounds of the energy.
        batch_size: real examples, and samples, of one of its steps.
        first_steps: of the energy before training.
        network: (x [B, *D], t [B], condition) -> [B]; left out: small convolutions or an MLP.
        penalty: gamma, of the squared energies.
        rate: learning rate (Adam).
        seed: of its samples and examples.

    Raises:
        SettingError: data that do not fit the model; a run that goes on from a checkpoint, which holds no energy.
    """

    differentiable = True
    name = "alternating_energy"

    def __init__(
        self,
        model: ScoreModel,
        data: str | Path,
        *,
        steps: int = 10,
        solver: str = "ddim",
        grid: str = "uniform",
        every: int = 1,
        batch_size: int = 128,
        first_steps: int = 50,
        network: nn.Module | None = None,
        penalty: float = 1.0,
        rate: float = 3e-4,
        seed: int = 0,
    ) -> None:
        self.real, self.model = RealStates(data, model), model
        self.steps, self.sampler, self.grid = steps, sampler_by_name(solver), grid
        self.every, self.batch_size, self.seed, self.rounds = every, batch_size, seed, 0
        own = energy_network(model, self.real.states.shape[1:]) if network is None else network
        self.energy = Energy(own.to(device_of(model)), penalty, rate)
        self.started = False
        for _ in range(first_steps):
            self.refit(model)

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        """Minus the energy of decoded samples, [B]."""
        x = self.model.encode(samples) if isinstance(self.model, Encodes) else samples
        return -self.energy(x, x.new_ones(len(x)), condition)

    def refit(self, model: ScoreModel) -> None:
        """One step of the energy on fresh samples of a model."""
        seed, self.rounds = derived(self.seed, self.rounds), self.rounds + 1
        generator = torch.Generator(device_of(model)).manual_seed(seed)
        names = balanced(sorted(set(self.real.prompts)), self.batch_size, torch.Generator().manual_seed(seed))
        ts = grid_times(self.grid, model.schedule, self.steps)
        with torch.no_grad():
            ends = draw(model, names, self.sampler, ts, seed, device_of(model))[0][-1]
        with torch.enable_grad():
            self.energy.separate(self.real.draw(self.batch_size, model, generator), (ends, model.condition(names)))

    def before(self, trainer: Trainer) -> Stop | None:
        """A step of the energy on the policy's samples, each `every` iterations."""
        if not self.started and trainer.iteration > 0:
            raise SettingError(
                f"the run goes on at iteration {trainer.iteration}, but no checkpoint holds its energy; start a new run."
            )
        self.started = True
        if trainer.iteration % self.every == 0:
            self.refit(trainer.policy.model)
        return None
