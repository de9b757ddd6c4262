"""Anomaly scores of a model, a recipe or a run: a function for rows, and a detector with the names of PyOD.

Works inside scikit-learn's and PyOD's tools, and needs neither.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..control.policy import Policy
from ..evaluation.anomaly_scores import NEED_NORMAL, NormalSamples, ScoreSettings, raw_scores
from ..evaluation.likelihood import TIMED, slow_trace, states_of, tuned_of
from ..feedback.discriminate import sample_shape
from ..models.base import HasClasses, ScoreModel
from ..runs.source import open_source
from ..support.errors import SettingError
from .result import Result
from .saved_run import SavedRun

Samples = np.ndarray | Tensor | Sequence[Any]


def score(
    model: Any,
    samples: Samples,
    method: str = "path",
    *,
    prompts: str | Sequence[str] | None = None,
    reference: Any = None,
    normal: Samples | None = None,
    weights: str = "final",
    **settings: Any,
) -> np.ndarray:
    """How abnormal each sample is to a model; larger is more abnormal.

    Args:
        model: a run's folder, a recipe, a pretrained model's folder, `my_model.py:build`, a `SavedRun`, a `Result`, or a model.
        samples: [N, *D] as the model draws them (pictures in [0, 1] or uint8, vectors and series in the data's unit), or the
            same flattened, [N, d].
        method: path, bits, complexity, typicality, ratio, posterior, reconstruction, norms or scoped.
        prompts: the class of all samples or of each, by name or by number from 0. Needed where the model has several.
        reference: of `ratio`, any of the kinds of `model`, with its classes or unconditional; by default what the run was tuned
            from.
        normal: samples that `typicality`, `norms` and `scoped` compare with; of the first prompt, where `prompts` is a list.
        weights: of a run, final or best.
        settings: levels=10, noises=2, least_noise=0.0, seed=0; probes=None and tolerance=1e-3 of `bits`.

    Returns:
        [N] float64. `bits`, `path` and `complexity` are in bits a number of the sample, `ratio` and `posterior` in nats.

    Raises:
        SettingError: samples or prompts that are not the model's, or a method without what it needs.
    """
    needs = method in NEED_NORMAL
    if needs and normal is None:
        raise SettingError(f"method {method} compares with normal samples; give some, normal=... (--normal).")
    if normal is not None and not needs:
        raise SettingError(f"method {method} makes no use of normal samples; leave them out.")
    plan, judged = ScoreSettings(method, **settings), _Judged(model, reference, weights)
    raw, _ = judged.raw(plan, samples, prompts)
    return (
        NormalSamples(method, judged.raw(plan, normal, _first(prompts))[0] if normal is not None else raw)
        .scores(raw)
        .numpy()
    )


def score_with_error(
    model: Any, samples: Samples, say: Callable[[str], None] | None = None, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """`score` by the method bits, and the standard error of its probes; 0 where the trace is exact. say: told if it is slow."""
    prompts, weights = how.pop("prompts", None), how.pop("weights", "final")
    raw, error = _Judged(model, None, weights).raw(ScoreSettings("bits", **how), samples, prompts, say)
    assert error is not None
    return raw[:, 0].numpy(), error.numpy()


def _first(prompts: str | Sequence[str] | None) -> str | None:
    return prompts if prompts is None or isinstance(prompts, str) else prompts[0]


class _Judged:
    """A model opened, its reference, and the shape of its samples."""

    def __init__(self, model: Any, reference: Any = None, weights: str = "final") -> None:
        self.model = opened(model, weights)
        self.reference = opened(reference) if reference is not None else None
        if self.reference is None and isinstance(self.model, Policy):
            self.reference = self.model.reference
        inner = tuned_of(self.model)
        self.classes = list(inner.classes) if isinstance(inner, HasClasses) else [""]
        self.shape = sample_shape(inner)

    def raw(
        self,
        plan: ScoreSettings,
        samples: Samples,
        prompts: str | Sequence[str] | None,
        say: Callable[[str], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        rows = self.rows(samples)
        names = self.names(prompts, len(rows))
        if plan.method == "bits":
            some = states_of(self.model, rows[:TIMED])
            slow = slow_trace(self.model, some, self.model.condition(names[:TIMED]), plan.probes, len(rows))
            if slow is not None:
                (say or functools.partial(warnings.warn, stacklevel=4))(slow)
        return raw_scores(plan, self.model, self.reference, rows, names)

    def rows(self, samples: Samples) -> Tensor:
        """[N, *D] float32; uint8 divided by 255."""
        given = samples if isinstance(samples, Tensor) else torch.from_numpy(np.array(samples))
        found = given.float() / 255 if given.dtype == torch.uint8 else given.float()
        if found.ndim < 2 or not len(found) or math.prod(found.shape[1:]) != math.prod(self.shape):
            raise SettingError(
                f"the samples have shape {tuple(found.shape)}; the model draws {self.shape}, so give [N, ...]."
            )
        if not bool(found.isfinite().all()):
            raise SettingError("some sample holds NaN or infinity; leave it out, or fill it in.")
        return found.reshape(len(found), *self.shape)

    def names(self, prompts: str | Sequence[str] | None, count: int) -> list[str]:
        if prompts is None:
            if len(self.classes) > 1:
                raise SettingError(
                    f"the model has the classes {', '.join(self.classes)}; say which one is normal (prompt, --prompt), or the "
                    "class of each sample."
                )
            return self.classes * count
        names = [prompts] * count if isinstance(prompts, str) else list(prompts)
        if len(names) != count:
            raise SettingError(
                f"there are {len(names)} prompts for {count} samples; give one for each, or one for all."
            )
        numbered = all(name.isdigit() and int(name) < len(self.classes) for name in names)
        return [self.classes[int(name)] for name in names] if numbered and not set(names) & set(self.classes) else names


def opened(model: Any, weights: str = "final") -> ScoreModel:
    """A name, folder, run or result as a model; of a run the policy, which knows its reference."""
    run = SavedRun(open_source(str(model))) if isinstance(model, str | Path) else model
    if isinstance(run, SavedRun):
        policy = run.policy(weights)
        return policy if run.source.folder is not None else policy.model
    return model.policy if isinstance(model, Result) else model


class DiffusionDetector:
    """An anomaly detector around a diffusion model, with the names of PyOD's detectors. It trains no network.

    `fit` scores the training samples and keeps the threshold that `contamination` of them exceed. Attributes after it:
    `decision_scores_` [N], `threshold_`, `labels_` [N] (1: abnormal).

    Args:
        model: as of `score`.
        method: as of `score`.
        contamination: the share of abnormal samples among those that `fit` gets, above 0 and at most 0.5.
        prompt: the normal class, of a model that has several.
        reference: as of `score`.
        levels: as of `score`.
        noises: as of `score`.
        least_noise: as of `score`.
        probes: as of `score`.
        tolerance: as of `score`.
        seed: as of `score`.

    Raises:
        SettingError: in `fit`: a contamination out of range, or what `score` refuses.
    """

    def __init__(
        self,
        model: Any,
        method: str = "path",
        contamination: float = 0.1,
        prompt: str | None = None,
        reference: Any = None,
        levels: int = 10,
        noises: int = 2,
        least_noise: float = 0.0,
        probes: int | None = None,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        self.model, self.method, self.contamination, self.prompt = model, method, contamination, prompt
        self.reference, self.levels, self.noises, self.least_noise = reference, levels, noises, least_noise
        self.probes, self.tolerance, self.seed = probes, tolerance, seed

    def fit(self, X: Samples, y: object = None) -> DiffusionDetector:
        """Score normal samples, or such among which `contamination` are abnormal. y is not used."""
        if not 0 < self.contamination <= 0.5:
            raise SettingError(f"contamination is {self.contamination}; give a share above 0 and at most 0.5.")
        judged = _Judged(self.model, self.reference)
        raw, _ = judged.raw(self._plan(), X, self.prompt)
        self._judged, self._normal = judged, NormalSamples(self.method, raw)
        self.n_features_in_ = math.prod(judged.shape)
        self.classes_ = np.array([0, 1])
        self.decision_scores_ = self._normal.scores(raw).numpy()
        self.threshold_ = float(np.quantile(self.decision_scores_, 1 - self.contamination))
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(int)
        return self

    def decision_function(self, X: Samples) -> np.ndarray:
        """Scores of samples [N, ...]: [N], larger is more abnormal."""
        if not hasattr(self, "threshold_"):
            raise SettingError("this detector is not fitted; call fit with normal samples first.")
        raw, _ = self._judged.raw(self._plan(), X, self.prompt)
        return self._normal.scores(raw).numpy()

    def predict(self, X: Samples) -> np.ndarray:
        """1 for abnormal samples, those above the threshold, 0 for others: [N]."""
        return (self.decision_function(X) > self.threshold_).astype(int)

    def predict_proba(self, X: Samples, method: str = "linear") -> np.ndarray:
        """Probabilities of normal and abnormal, [N, 2]: no calibrated ones, but scores brought to [0, 1].

        method: linear, between the least and the greatest training score; unify, the error function of the training scores'
        mean and spread (Kriegel et al. 2011).
        """
        found, train = self.decision_function(X), self.decision_scores_
        if method == "linear":
            abnormal = (found - train.min()) / max(float(np.ptp(train)), 1e-12)
        elif method == "unify":
            away = (found - train.mean()) / max(float(train.std()) * math.sqrt(2), 1e-12)
            abnormal = torch.erf(torch.from_numpy(away)).numpy()
        else:
            raise SettingError(f"method is {method!r}; known: linear, unify.")
        abnormal = abnormal.clip(0, 1)
        return np.stack([1 - abnormal, abnormal], 1)

    def fit_predict(self, X: Samples, y: object = None) -> np.ndarray:
        """`fit`, then the training samples' labels: [N]."""
        return self.fit(X).labels_

    def _plan(self) -> ScoreSettings:
        return ScoreSettings(
            self.method, self.levels, self.noises, self.least_noise, self.probes, self.tolerance, self.seed
        )

    # what scikit-learn's tools ask of an estimator

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments that it was made with. deep: not used, none is an estimator."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> DiffusionDetector:
        """Change arguments by name; `fit` uses them."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise SettingError(f"unknown parameter {name!r}; known: {', '.join(known)}.")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"DiffusionDetector({self.model!r}, method={self.method!r})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags  # only scikit-learn asks

        return Tags(
            estimator_type="outlier_detector",
            target_tags=TargetTags(required=False),
            input_tags=InputTags(three_d_array=True),
        )
