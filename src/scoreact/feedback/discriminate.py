"""A reward made of data: how much likelier a sample is in the data than among the model's own samples.

    R(x, c) = log p_data(phi | c) / p_model(phi | c),   phi frozen features

At kl_weight 1 and the exact ratio the tilted law p_model exp(R) has the data's law of phi, and is the nearest such law to the
model's. Made of real examples and of samples that the model draws with the steps and the solver that it is to be tuned for.
Source: DRL (arXiv 2606.19162), with the ridge and the held-out figures added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..dynamics.grids import grid_times
from ..dynamics.samplers import sampler_by_name
from ..evaluation.metrics import auc_interval
from ..models.base import HasClasses, ScoreModel, rows_among
from ..models.weights import digest_of
from ..rewards.learned import LearnedReward, need_empty, save_learned
from ..rewards.sample_features import Features, open_features
from ..sampling.draw import balanced, draw
from ..support.devices import device_of
from ..support.errors import SettingError
from ..support.own_data import Examples, OwnData, read_data, split_off
from ..support.seeds import derived
from .log_ratio import Head, Sides, calibration, cross_validated, fit_head
from .reliability import draw_reliability

AT_ONCE = 256  # samples that are drawn together
FEWEST = 50  # real examples of a class
KINDS = {1: "vectors", 2: "series", 3: "pictures"}  # by the dimensions of a sample


@dataclass(frozen=True)
class Plan:
    """How samples are drawn and the head is fitted, as in `discriminate`."""

    samples: int = 6000
    steps: int = 10
    solver: str = "ddim"
    grid: str = "uniform"
    ridge: float | None = None
    clip: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 2 * FEWEST:
            raise SettingError(f"samples is {self.samples}; give at least {2 * FEWEST}, better thousands.")
        if self.ridge is not None and not 0 < self.ridge < float("inf"):
            raise SettingError(f"ridge is {self.ridge}; give a number above 0, or none for the cross-validated one.")
        if not 0 < self.clip < float("inf"):
            raise SettingError(f"clip is {self.clip}; give a number of nats above 0.")


def discriminate(
    model: ScoreModel,
    data: str | Path | OwnData | Tensor | np.ndarray,
    out: str | Path | None = None,
    *,
    features: str = "convolution",
    features_options: Mapping[str, Any] | None = None,
    labels: bool | str | None = None,
    onto: LearnedReward | None = None,
    **plan: Any,
) -> LearnedReward:
    """Fit a reward that says how much likelier a sample is among the data than among the model's own.

    Args:
        model: the pretrained model; or one that was tuned, with `onto` the reward that it was tuned to.
        data: what `read_data` takes, a folder of pictures or of a folder a class, an .npz, a table; or what it returned; or
            examples [N, *D] like the model's samples, without labels.
        out: a new folder for the reward, which `scoreact train --reward` and `load_reward` take. None: nothing is written.
        features: what the reward sees, as of `open_features`; features_options: its options.
        labels: True, or the name of the array or column: a head a class, of the model's own classes. Left out: where the model
            has classes.
        onto: the new logit is added to that reward's: its next round.
        plan: samples=6000, of the model, and real ones at most; steps=10, solver="ddim", grid="uniform" of its paths, as it
            will be tuned; ridge=None, chosen by cross-validation; clip=6.0 nats; seed=0.

    Returns:
        The reward. Its `facts` say the held-out AUC with its interval, the calibration, the ridge and what it was made of.

    Raises:
        SettingError: data that do not fit the model, or too few. RewardError: features that do not fit the samples.
        RunExists: `out` holds something.
    """
    settings = Plan(**plan)
    if isinstance(data, Tensor | np.ndarray):
        data, labels = examples_given(data), labels or False
    if out is not None:
        need_empty(Path(out))
    classes = _classes(model, labels)
    if onto is not None and onto.classes != classes:
        raise SettingError(
            f"reward {onto.name} is of the classes {list(onto.classes)}, this one of {list(classes)}; give labels as then."
        )
    shape = sample_shape(model)
    found = (
        data
        if isinstance(data, OwnData)
        else examples_like(data, shape, labels if isinstance(labels, str) else bool(classes))
    )
    rows = _rows(found, classes)
    _check_fit(found, shape, classes, rows[0])
    phi = onto.features if onto is not None else open_features(features, shape, features_options)
    generator = torch.Generator().manual_seed(settings.seed)
    kept = torch.randperm(len(found.train), generator=generator)[: settings.samples]
    fitted = _sides(model, phi, found.train[kept], rows[0][kept], classes, settings, "fit")
    heldout = _sides(model, phi, found.heldout, rows[1], classes, settings, "held out")
    ridge, table = (settings.ridge, []) if settings.ridge is not None else cross_validated(fitted, generator)
    head = fit_head(fitted, ridge)
    reward = _reward(head, phi, classes, settings, Path(out).name if out is not None else "discriminator")
    logits = head.logits(heldout)
    facts = _facts(logits, heldout.real, ridge, table, settings, found, model, len(fitted))
    if onto is not None:
        reward = dataclasses.replace(onto.plus(reward), name=reward.name)
        facts["onto"] = onto.name
    values = reward.clipped(reward.logits(heldout.features, heldout.rows))
    reward = dataclasses.replace(reward, real=values[heldout.real].float(), facts=facts)
    if out is not None:
        save_learned(reward, Path(out))
        draw_reliability(facts["calibration"], Path(out) / "reliability.png")
    return reward


def _classes(model: ScoreModel, labels: bool | str | None) -> tuple[str, ...]:
    """Those that get a head each; () for one head."""
    known = tuple(model.classes) if isinstance(model, HasClasses) else ()
    if labels is None:
        return known if len(known) > 1 else ()
    if not labels:
        return ()
    if len(known) < 2:
        raise SettingError("labels are given, and this model has no classes to draw them by; leave labels out.")
    return known


@torch.no_grad()
def sample_shape(model: ScoreModel) -> tuple[int, ...]:
    """*D of a decoded sample."""
    prompts = list(model.classes)[:1] if isinstance(model, HasClasses) and model.classes else [""]
    state = model.prior(model.condition(prompts), torch.Generator(device_of(model)).manual_seed(0))
    return tuple(model.decode(state).shape[1:])


def examples_like(data: str | Path, shape: tuple[int, ...], labels: bool | str) -> OwnData:
    """The data, pictures of a folder at the model's own size."""
    kind = KINDS.get(len(shape))
    if kind is None:
        raise SettingError(
            f"a sample of this model has shape {shape}, which no data file holds; give pictures or series."
        )
    path = Path(data).expanduser()
    folder, square = path.is_dir(), len(shape) == 3 and shape[1] == shape[2]
    try:
        return read_data(
            path, kind=None if folder else kind, labels=labels, size=shape[1] if folder and square else None
        )
    except SettingError as error:
        if labels is not True:
            raise
        raise SettingError(
            f"{error} (This model has classes, so labels are looked for; --no-labels, or labels=False, fits one head for all.)"
        ) from None


def examples_given(values: Tensor | np.ndarray) -> OwnData:
    """Examples [N, *D] that are there already. Raises SettingError for none, and for NaN."""
    found = torch.as_tensor(values).detach().cpu().float()
    kind, whole = KINDS.get(found.ndim - 1), bool(found.isfinite().all())
    if kind is None or not len(found) or not whole:
        text = "" if whole else " and hold NaN or infinity"
        raise SettingError(
            f"data have shape {tuple(found.shape)}{text}; expected finite numbers [N, D], [N, channels, L] or [N, C, H, W]."
        )
    return OwnData(kind, *split_off(Examples(found)))


def _rows(data: OwnData, classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The row of the head of every example, to learn from and held out."""
    if not classes:
        return tuple(torch.zeros(len(part), dtype=torch.int64) for part in (data.train, data.heldout))  # type: ignore[return-value]
    assert data.train.labels is not None
    assert data.heldout.labels is not None
    where = torch.tensor(list(rows_among(data.classes, classes).values()))
    return where[data.train.labels], where[data.heldout.labels]


def _check_fit(data: OwnData, shape: tuple[int, ...], classes: tuple[str, ...], rows: Tensor) -> None:
    if tuple(data.train.values.shape[1:]) != shape:
        raise SettingError(
            f"the data are {data.kind} of shape {tuple(data.train.values.shape[1:])}, and the model draws {shape}; give data "
            "of the model's size and channels."
        )
    counts = torch.bincount(rows, minlength=max(1, len(classes)))
    if int(counts.min()) < FEWEST:
        which = f"class {classes[int(counts.argmin())]!r} has" if classes else "there are"
        raise SettingError(
            f"{which} {int(counts.min())} examples to learn from, too few to tell the data from the model; give "
            f"at least {FEWEST}" + (", or leave labels out." if classes else ".")
        )


def _sides(
    model: ScoreModel, phi: Features, real: Examples, rows: Tensor, classes: tuple[str, ...], plan: Plan, what: str
) -> Sides:
    """Real examples beside as many samples of the model."""
    generator = torch.Generator().manual_seed(derived(plan.seed, what))
    names = list(classes) or list(model.classes if isinstance(model, HasClasses) and model.classes else [""])
    prompts = balanced(names, len(real), generator)
    ts = grid_times(plan.grid, model.schedule, plan.steps)
    parts = [phi.in_parts(part.floats()) for part in _parts(real)]
    for number, start in enumerate(range(0, len(prompts), AT_ONCE)):
        some = prompts[start : start + AT_ONCE]
        seed = derived(plan.seed, what, number)
        _, samples = draw(model, some, sampler_by_name(plan.solver), ts, seed, device_of(model))
        parts.append(phi.in_parts(samples).cpu())
    own = torch.tensor([classes.index(p) for p in prompts]) if classes else torch.zeros(len(prompts), dtype=torch.int64)
    features = torch.cat(parts).double()
    if not bool(features.isfinite().all()):
        raise SettingError(
            f"features {phi.spec} of {int((~features.isfinite().all(1)).sum())} of the examples or samples are not finite."
        )
    is_real = torch.arange(len(features)) < len(real)
    return Sides(features, is_real, torch.cat([rows, own]), max(1, len(classes)))


def _parts(examples: Examples) -> list[Examples]:
    return [examples[slice(start, start + AT_ONCE)] for start in range(0, len(examples), AT_ONCE)]


def _reward(head: Head, phi: Features, classes: tuple[str, ...], plan: Plan, name: str) -> LearnedReward:
    return LearnedReward(phi, head.mean.float(), head.weight.float(), head.bias.float(), classes, plan.clip, name=name)


def _facts(
    logits: Tensor, real: Tensor, ridge: float, table: Sequence[Mapping[str, float]], plan: Plan, data: OwnData,
    model: ScoreModel, count: int,
) -> dict[str, Any]:  # fmt: skip
    auc, half = auc_interval(logits[real], logits[~real])
    bins, off = calibration(logits, real)
    return {
        "made_by": "scoreact reward discriminate",
        "ridge": ridge,
        "ridges": list(table),
        "auc": auc,
        "auc_half_width": half,
        "calibration": bins,
        "calibration_error": off,
        "fitted_on": count,
        "held_out": len(logits),
        "plan": dataclasses.asdict(plan),
        "model_digest": digest_of(model) if isinstance(model, nn.Module) else None,
        "notes": list(data.notes),
    }
