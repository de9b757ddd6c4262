"""A run that goes on from rewards which come from outside, late and in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ..feedback.discriminate import discriminate
from ..feedback.online import HandedOut, Online, Updated, by_id
from ..rewards.learned import LearnedReward
from ..support.errors import FeedbackError, SettingError
from ..support.own_data import OwnData
from ..training.trainer import Trainer
from .result import Sampled

if TYPE_CHECKING:
    from ..control.policy import Policy
    from ..runs.source import Source
    from .saved_run import Given


class LearnsOnline(Sampled):
    """What `SavedRun` has for it."""

    source: Source | Given
    _kept: dict[str, Policy]
    _online: Online | None = None

    @property
    def folder(self) -> Path:
        raise NotImplementedError

    def policy(self) -> Policy:
        raise NotImplementedError

    def hand_out(self, prompts: Sequence[str] | None = None, count: int = 8) -> HandedOut:
        """Samples of the present policy that `update` can learn from, whenever their rewards come.

        They are drawn as in training (its steps, solver and noise), and their paths are kept in the run's folder.

        Args:
            prompts: Left out: those of training. count: Of each prompt.

        Returns:
            Their `ids`, `prompts` and decoded `samples` [B, ...] on the CPU, in the prompts' order.

        Raises:
            SettingError: For a run whose rule cannot learn from late rewards.
        """
        return self._at_hand().hand_out(self.names(prompts, count))

    def update(
        self,
        samples: HandedOut | Sequence[int] | None = None,
        rewards: Sequence[float | None] | Tensor | None = None,
        *,
        data: str | Path | OwnData | Tensor | np.ndarray | None = None,
        count: int = 64,
        discriminator: Mapping[str, Any] | None = None,
        window: int | None = None,
        half_life: float | None = None,
        calls: int | None = None,
    ) -> Updated:
        """Move the policy on by one iteration: from rewards of samples that were handed out, by this policy or an older one; or
        towards the law of the latest data.

        Args:
            samples: What `hand_out` gave, or the ids of some samples, in any order.
            rewards: One a sample, larger is better; None where there is none yet.
            data: In place of both: the latest examples, as many as are to count, [N, *D], or what `discriminate` takes. A
                discriminator of them from the pretrained model's samples is fitted anew, `count` samples a prompt are handed
                out, and these and all that are remembered get its rewards. `kl_weight` 1 goes to the law of the data.
            count: With `data`.
            discriminator: With `data`: options of `discriminate`, such as {"features": "values", "samples": 1000}.
            window: Rewards that are remembered, the newest; at first 512. Holds until it is changed, as the next two.
            half_life: Number of rewards after which an older one is drawn half as often; at first 0, all alike.
            calls: Network calls that learning may make, drawing samples apart; at first 0, as many as the run's settings say.

        Returns:
            Its `metrics`, as metrics.jsonl has them, and `notes`, sentences on what was left out.

        Raises:
            FeedbackError: For a sample that was never handed out, a second reward of a sample that differs from the first, or
                one that is not finite. Nothing is learned then.
            SettingError: For a run whose rule cannot learn from late rewards, too few calls, and data that do not fit.
            Diverged: Where numbers fail or path KL passes `kl_limit`; the run is as it was before.
        """
        made = None
        if data is not None:
            if samples is not None or rewards is not None:
                raise SettingError("data are given, and rewards too, which the data make; leave out one of them.")
            made = self._from_data(data, discriminator or {})
            samples = self.hand_out(count=count)
            rewards = made(samples.samples, self.problem.model.condition(samples.prompts))
        elif samples is None or rewards is None:
            raise SettingError("an update needs samples with their rewards, or data; give one of them.")
        elif discriminator:
            raise SettingError("discriminator holds options for data, and none are given; leave it out.")
        ids = list(samples.ids if isinstance(samples, HandedOut) else samples)
        given = rewards.tolist() if isinstance(rewards, Tensor) else list(rewards)
        if len(ids) != len(given):
            raise FeedbackError(f"{len(ids)} samples and {len(given)} rewards are given; give one a sample, or None.")
        found = self._at_hand().update(by_id(zip(ids, given, strict=True)), window, half_life, calls, made)
        self._kept.clear()
        return found

    def _from_data(
        self, data: str | Path | OwnData | Tensor | np.ndarray, options: Mapping[str, Any]
    ) -> LearnedReward:  # fmt: skip
        """The reward of which the data's law is the optimum at kl_weight 1, for this run's sampler."""
        c = self.config
        return discriminate(
            self.policy().reference, data, **{"steps": c.steps, "solver": c.solver, "grid": c.grid, **options}
        )

    def _at_hand(self) -> Online:
        if self._online is None:
            self._online = Online(self._trainer, self.config, self.folder)
        return self._online

    def _trainer(self) -> Trainer:
        problem = self.source.build()
        assert isinstance(problem.model, nn.Module)
        return Trainer(
            problem.model, problem.reward, list(dict.fromkeys(problem.prompts)), problem.value_network, self.config,
            problem.judge, problem.features, problem.optimum, self.source.start_weights(), problem.test_prompts,
        )  # fmt: skip
