"""A model tried out on a few samples: drawn, noised again, asked for their score, decoded and copied.

The half of `check` that runs the model; what is wrong comes out as sentences.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..dynamics import prediction as kinds
from ..dynamics.grids import uniform
from ..dynamics.samplers import ode
from ..dynamics.sde import SDE, noise_level
from ..support.devices import device_of
from ..types import Condition, expand
from . import base
from .base import ScoreModel
from .network import NetworkModel

COUNT = 64  # samples that are drawn, of small states
LARGE = 4096  # numbers a state from which on fewer are drawn
FEW = 8
STEPS = 20  # of the path that draws them
PLACES = 9  # times at which the score is looked at
ODD = "no model knows this"


class _Stop(Exception):
    """What comes next has nothing to run on."""


class Trial:
    """One look at a model that has all members. Each part says its lines; a part that fails ends the look."""

    def __init__(self, model: ScoreModel, name: str) -> None:
        self.model, self.name = model, name
        self.lines: list[str] = []

    def all(self, prompts: Sequence[str] | None) -> list[str]:
        with _in_eval_mode(self.model), _unguided(self.model) as guided:
            if guided:
                self.lines.append(
                    "note: guidance is set to 1 for this look, as a guided score is not that of any data."
                )
            try:
                self.schedule()
                self.prompts(prompts)
                self.prior()
                self.shape_of_score()
                self.path()
                self.repeats()
                self.denoising()
                self.sees_time()
                self.gradients()
                self.decoded()
                self.copies()
            except _Stop:
                pass
        return self.lines

    def fine(self, text: str) -> None:
        self.lines.append(f"fine: {text}")

    def problem(self, text: str) -> None:
        self.lines.append(f"problem: {text}")

    def call(self, what: str, function: Callable[[], Any], *shown: Tensor) -> Any:
        """function(), or a problem that says what it raised and ends the look."""
        try:
            return function()
        except Exception as error:
            given = "".join(f", {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in shown)
            text = " ".join(str(error).split())[:300]
            hint = ""
            if "indices" in text and "Float" in text:
                hint = (
                    " A network with a table of integer steps goes into IntegerSteps(network, steps=T, rounded=True)."
                )
            self.problem(f"{what} raised {type(error).__name__}: {text} (given{given[1:]})." + hint if shown
                         else f"{what} raised {type(error).__name__}: {text}.")  # fmt: skip
            raise _Stop from error

    # --- the parts

    def schedule(self) -> None:
        s = self.model.schedule
        t_min, t_max = float(s.t_min), float(s.t_max)
        if not 0 <= t_min < t_max <= 1:
            self.problem(
                f"the schedule runs from t_min {t_min:g} to t_max {t_max:g}; expected 0 <= t_min < t_max <= 1."
            )
            raise _Stop
        t = torch.linspace(t_min, t_max, 101, dtype=torch.float64)
        alpha, sigma = self.call("schedule.alpha or sigma", lambda: (s.alpha(t), s.sigma(t)), t)
        if not bool((alpha.isfinite() & sigma.isfinite()).all()) or bool((alpha[1:] <= 0).any() | (sigma < 0).any()):
            self.problem("alpha(t) must be positive and sigma(t) at least 0, both finite, on [t_min, t_max].")
            raise _Stop
        ratio = sigma / alpha
        if not bool((ratio[1:].diff() < 0).all()):
            self.problem(
                "sigma / alpha does not fall from t_min to t_max; times here run from 0, noise, to 1, data (a table of alphas "
                "starts with the least noisy step)."
            )
            raise _Stop
        # derivatives against differences of the functions themselves, inside
        inner, h = t[20:-20], 1e-5
        for name, f, d in (("alpha", s.alpha, s.d_alpha), ("sigma", s.sigma, s.d_sigma)):
            wanted, found = (f(inner + h) - f(inner - h)) / (2 * h), d(inner)
            off = float((found - wanted).abs().median() / wanted.abs().median().clamp(min=1e-6))
            if off > 0.02:
                self.problem(
                    f"d_{name}(t) is not the derivative of {name}(t): off by {100 * off:.3g} % at the median time."
                )
        self.fine(
            f"{type(s).__name__} runs from t = {t_min:g}, where sigma / alpha is {_number(ratio[0])}, to {t_max:g}, "
            f"where it is {_number(ratio[-1])}."
        )

    def prompts(self, prompts: Sequence[str] | None) -> None:
        classes = self.model.classes if isinstance(self.model, base.HasClasses) else None
        known = list(prompts or classes or [""])
        names = list(dict.fromkeys(known))[:8]
        self.names = names
        condition: Condition = self.call(f"condition({names!r})", lambda: self.model.condition(names))
        if not isinstance(condition, Condition) or list(condition.prompts) != names:
            self.problem(f"condition({names!r}) returned {condition!r}; expected Condition({names!r}, rows).")
            raise _Stop
        rows: Any = condition.rows
        if rows is not None and (rows.shape != (len(names),) or rows.is_floating_point()):
            self.problem(
                f"condition.rows has shape {tuple(rows.shape)}, {rows.dtype}; expected ({len(names)},) integers: the number of "
                "each sample's prompt in a table that the model keeps."
            )
            raise _Stop
        try:
            self.model.condition([ODD])
        except ValueError:
            self.fine(f"{len(known)} known prompt{'s' * (len(known) != 1)} accepted, an unknown one refused.")
        except Exception as error:
            self.problem(
                f"an unknown prompt raised {type(error).__name__}; raise ValueError with a sentence that names the prompt."
            )
        else:
            if classes is not None:
                self.problem(
                    f"`classes` lists {len(classes)} prompts, but an unknown one is accepted; raise ValueError."
                )
            else:
                self.lines.append("note: any prompt is accepted; a misspelt one will not be noticed.")

    def prior(self) -> None:
        model, device = self.model, device_of(self.model)
        count = COUNT
        for _ in range(2):
            prompts = [self.names[i % len(self.names)] for i in range(count)]
            self.condition = self.call("condition", lambda: model.condition(prompts))  # noqa: B023
            seed = torch.Generator(device).manual_seed(0)
            x = self.call("prior", lambda: model.prior(self.condition, seed))  # noqa: B023
            if isinstance(x, Tensor) and x.ndim > 1 and x[0].numel() > LARGE and count > FEW:
                count = FEW
                continue
            break
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != count:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            self.problem(f"prior returned {found} for {count} samples; expected a tensor [{count}, *D].")
            raise _Stop
        if x.dtype != torch.float32 or not bool(x.isfinite().all()):
            self.problem(
                f"prior returned {x.dtype}{'' if bool(x.isfinite().all()) else ' with NaN or inf'}; expected finite float32."
            )
            raise _Stop
        again = model.prior(self.condition, torch.Generator(device).manual_seed(0))
        if not torch.equal(x, again):
            self.problem(
                "prior gives other states for the same generator; draw with `generator=generator` and nothing else."
            )
        t = torch.tensor(float(model.schedule.t_min), dtype=torch.float64)
        sigma, spread = float(model.schedule.sigma(t)), float(x.std())
        if not sigma / 2 < spread < 2 * max(sigma, 1e-3) + float(model.schedule.alpha(t)) * spread:
            self.problem(
                f"prior has standard deviation {spread:.3g}, but at t_min the schedule has sigma {sigma:.3g}; multiply "
                "standard normal noise by sigma(t_min)."
            )
        else:
            self.fine(f"prior gives states {tuple(x.shape[1:])} of standard deviation {spread:.3g}.")
        self.x = x

    def score(self, t: Tensor | float, x: Tensor, condition: Condition | None = None) -> Tensor:
        t = torch.full((len(x),), t, device=x.device) if isinstance(t, float) else t
        condition = self.condition if condition is None else condition
        found: Tensor = self.call("score", lambda: self.model.score(t, x, condition), t, x)
        return found

    def shape_of_score(self) -> None:
        score = self.score(float(self.model.schedule.t_min), self.x)
        if not isinstance(score, Tensor) or score.shape != self.x.shape:
            found = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            self.problem(f"score returned {found} for states of shape {tuple(self.x.shape)}; expected that shape.")
            raise _Stop
        if score.dtype != torch.float32:
            self.problem(
                f"score returned {score.dtype}; end with `.float()`: steps and ratios are computed in float32."
            )

    def path(self) -> None:
        """Samples of the model's own, and whether the score is finite on the way and over the whole interval."""
        s = self.model.schedule
        sde, ts = SDE(s, noise_level(0.0)), uniform(s, STEPS).to(self.x.device)
        xs = self.call("sampling", lambda: ode(sde, self.score, ts, self.x, torch.Generator(self.x.device)))
        self.times = torch.linspace(float(s.t_min), float(s.t_max), PLACES)
        if float(s.sigma(self.times[-1:].cpu().double())) == 0:  # no score exists where the path ends without noise
            self.times[-1] = float(s.t_max) - 1e-3 * (float(s.t_max) - float(s.t_min))
        self.data = xs[-1]
        if not bool(self.data.isfinite().all()):
            bad = next(float(t) for t, x in zip(ts, xs, strict=True) if not bool(x.isfinite().all()))
            self.problem(f"a path of {STEPS} steps is NaN or inf at t = {bad:.3g}; the score is not finite before it.")
            raise _Stop
        noise = torch.randn(self.data.shape, generator=torch.Generator().manual_seed(1)).to(self.data.device)
        self.looks = []
        for t in self.times.to(self.data.device):
            row = t.expand(len(self.data))
            alpha, sigma = expand(s.alpha(row), noise), expand(s.sigma(row), noise)
            x = alpha * self.data + sigma * noise
            score = self.score(row, x)
            if not bool(score.isfinite().all()):
                self.problem(f"score is NaN or inf at t = {float(t):.3g}; it must be finite on [t_min, t_max].")
                raise _Stop
            self.looks.append((float(t), x, noise, score))
        self.fine(f"score is finite from t = {float(self.times[0]):.3g} to {float(self.times[-1]):.3g}.")

    def repeats(self) -> None:
        """Randomness, and dependence on the other samples of a batch."""
        t, x, _, score = self.looks[PLACES // 2]
        if not torch.equal(self.score(t, x), score):
            self.problem(
                "score is random: the same states get another one. Remove dropout and noise, or fix their seed."
            )
            return
        few = torch.arange(min(4, len(x)), device=x.device)
        alone = torch.cat([self.score(t, x[i[None]], self.condition[i[None]]) for i in few])
        off = float((alone - score[few]).abs().max() / score[few].abs().max().clamp(min=1e-6))
        if off > 1e-3:
            self.problem(
                f"score depends on the batch: a sample alone gets another one than among {len(x)} (by {100 * off:.2g} %). Take "
                "out batch normalisation and statistics over the batch."
            )
        elif off > 1e-5 and not (isinstance(self.model, base.BatchDependent) and self.model.batch_dependent):
            self.lines.append(
                f"note: a sample's score changes by {off:.1g} of itself with the batch around it; compute in float32, or "
                "say so with `batch_dependent`."
            )
        else:
            self.fine("a sample's score is the same in every batch.")

    def denoising(self) -> None:
        """Noise put on the model's own samples is found again, at least as well as a guess that knows mean and spread."""
        s = self.model.schedule
        kind = self.model.prediction.name if isinstance(self.model, NetworkModel) else "score"
        variance = float((self.data - self.data.mean(0)).square().mean())
        found = []
        for t, _, noise, score in self.looks:
            row = torch.tensor([t], dtype=torch.float64)
            alpha, sigma = float(s.alpha(row)), float(s.sigma(row))
            error = float((-sigma * score - noise).square().mean())
            # the best linear guess of the noise from x leaves this share of it
            limit = alpha**2 * variance / (alpha**2 * variance + sigma**2)
            # a network's own error, in what it predicts: the noise, or else the data
            slack = 0.1 if kind in ("epsilon", "score") else 0.05 * alpha**2 / (alpha**2 + sigma**2)
            found.append(((error - slack) / max(limit, 1e-9), error, limit, t))
        ratio, error, limit, t = max(found)
        if ratio > 1.5:
            where = (
                "near the noise"
                if t <= float(self.times[1])
                else "near the data"
                if t >= float(self.times[-2])
                else "midway"
            )
            self.problem(
                f"{where}, at t = {t:.3g}, the score misses the noise that was put on samples: {100 * error:.3g} % of its "
                f"square remains, where a guess from mean and spread leaves {100 * limit:.3g} %. The usual reasons: the "
                "network wants integer steps and gets t in [0, 1] (IntegerSteps(network, steps=T)); its time runs the other "
                "way (0 is noise here); its output is of another kind than `prediction`; the schedule is another than in its "
                "training; or it is not trained."
            )
        else:
            self.fine("the score finds again the noise that is put on the model's own samples, at all times looked at.")

    def sees_time(self) -> None:
        """Whether any kind of output that a network may have is the same at all times for one state."""
        x, s = self.looks[PLACES // 2][1], self.model.schedule
        inner = [float(t) for t in self.times[1:-1]]
        if isinstance(self.model, NetworkModel):
            rows = () if self.condition.rows is None else (self.condition.rows,)
            outputs = {
                "the network's output": torch.stack(
                    [self.model._predict(torch.full((len(x),), t, device=x.device), x, *rows) for t in inner]
                )
            }
            if not bool(outputs["the network's output"].any()):
                self.problem("the network's output is 0 everywhere: it is not trained, or its weights were not loaded.")
                return
        else:
            scores = [(torch.full((len(x),), t, device=x.device), self.score(t, x)) for t in inner]
            outputs = {
                f"the network's output, if it is {kind.name}": torch.stack(
                    [kinds.convert(kinds.score, kind, s, t, x, score) for t, score in scores]
                )
                for kind in (kinds.epsilon, kinds.x0, kinds.velocity, kinds.v)
            }
        for what, values in outputs.items():
            size = float(values.square().mean().sqrt())
            change = max(float((b - a).abs().max()) for a, b in pairwise(values))
            if size > 1e-3 * float(x.std()) and change < 1e-3 * size:
                self.problem(
                    f"{what}, does not depend on t. A network for integer steps rounds t in [0, 1] to 0 or 1: wrap it, "
                    "IntegerSteps(network, steps=T); otherwise t is not used."
                )
                return
        self.fine("the output depends on t.")

    def gradients(self) -> None:
        model, (t, x, _, _) = self.model, self.looks[PLACES // 2]
        few = torch.arange(min(FEW, len(x)), device=x.device)
        with torch.enable_grad():
            leaf = x[few].clone().requires_grad_(True)
            score = self.score(t, leaf, self.condition[few])
            if not score.requires_grad:
                self.problem("score carries no gradient: there is a no_grad, a detach or numpy inside.")
                raise _Stop
            trainable = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
            weight = torch.randn_like(score)
            loss = (score * weight).sum()
            found = self.call(
                "the gradient of score", lambda: torch.autograd.grad(loss, [leaf, *trainable], allow_unused=True), leaf
            )
        if found[0] is None or not self.is_slope(t, leaf.detach(), few, found[0], weight):
            self.problem(
                "the gradient of score in x is not that of its values, which value networks and guidance by a reward need; "
                "there is a detach or a rounding of x inside."
            )
        without = sum(g is None for g in found[1:])
        if trainable and without == len(trainable):
            self.problem("no trainable parameter gets a gradient from score: they do not enter it, or are detached.")
        elif without:
            self.lines.append(f"note: {without} of {len(trainable)} trainable parameters get no gradient from score.")
        if any(g is not None and not bool(g.isfinite().all()) for g in found):
            self.problem("a gradient of score is NaN or inf; look for a root, logarithm or division at zero.")

    def is_slope(self, t: float, x: Tensor, few: Tensor, gradient: Tensor, weight: Tensor) -> bool:
        """Whether a gradient of (score . weight) is the slope that differences of the score show, in a random direction."""
        if (isinstance(self.model, base.BatchDependent) and self.model.batch_dependent) or (
            isinstance(self.model, base.Rounds) and self.model.rounds
        ):
            return True  # differences of rounded scores show nothing
        step = 0.02 * float(x.std()) * torch.randn_like(x)
        condition = self.condition[few]
        change = self.score(t, x + step, condition) - self.score(t, x - step, condition)
        seen, said = (change * weight).flatten(1).sum(1), 2 * (gradient * step).flatten(1).sum(1)
        return float((seen - said).norm()) < 0.5 * max(float(seen.norm()), float(said.norm())) + 1e-6

    def decoded(self) -> None:
        few = torch.arange(min(FEW, len(self.data)), device=self.data.device)
        with torch.enable_grad():
            leaf = self.data[few].clone().requires_grad_(True)
            samples: Any = self.call("decode", lambda: self.model.decode(leaf), leaf)
        if not isinstance(samples, Tensor) or samples.ndim < 2 or len(samples) != len(few):
            found = f"shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
            self.problem(f"decode returned {found} for {len(few)} states; expected a tensor [{len(few)}, ...].")
            return
        if not samples.is_floating_point() or not bool(samples.isfinite().all()):
            wrong = "with NaN or inf" if samples.is_floating_point() else str(samples.dtype)
            self.problem(f"decode returned samples {wrong}; expected finite float32 (pictures in [0, 1], not bytes).")
            return
        low, high = float(samples.min()), float(samples.max())
        shape = tuple(samples.shape[1:])
        if len(shape) == 3 and shape[0] in (1, 3) and (low < 0 or high > 1):
            self.lines.append(
                f"note: samples {shape} look like pictures but reach from {low:.3g} to {high:.3g}; rewards for pictures expect "
                "[0, 1] (NetworkModel's low=-1, high=1 rescales)."
            )
        else:
            self.fine(f"decode gives samples {shape} from {low:.3g} to {high:.3g}.")
        if not samples.requires_grad:
            self.lines.append(
                "note: decode carries no gradient; draft, adjoint_matching and guidance by a reward need one."
            )
        if isinstance(self.model, base.HasNotes):
            self.lines += [f"note: {text}" for text in self.model.notes()]

    def copies(self) -> None:
        """A run keeps copies: the reference and the averaged weights."""
        twin = self.call("copy.deepcopy(model)", lambda: copy.deepcopy(self.model))
        t, x, _, score = self.looks[PLACES // 2]
        if not torch.equal(twin.score(torch.full((len(x),), t, device=x.device), x, self.condition), score):
            self.problem("copy.deepcopy(model) has another score than the model; all of its state must be copied.")
            return
        mine = (
            {p.data_ptr() for p in self.model.parameters() if p.requires_grad}
            if isinstance(self.model, nn.Module)
            else set()
        )
        if mine and any(p.data_ptr() in mine for p in twin.parameters() if p.requires_grad):
            self.problem(
                "copy.deepcopy(model) shares weights with the model, so that training would change the reference too."
            )
            return
        self.fine("a copy has the same score and weights of its own.")
        if isinstance(twin, base.ReadsFeatures) and not isinstance(twin, base.HasReference):  # a view shares its state
            self.features(twin)

    def features(self, twin: Any) -> None:
        try:
            twin.keep_features()
        except ValueError as error:
            self.lines.append(f"note: {error}")
            return
        t, x, _, _ = self.looks[PLACES // 2]
        row = torch.full((len(x),), t, device=x.device)
        self.call("score with features kept", lambda: twin.score(row, x, self.condition), row, x)
        found: Any = self.call("features", lambda: twin.features(row, x, self.condition), row, x)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            self.problem(
                f"features returned {type(found).__name__}; expected (features [B, F], number of states passed)."
            )
        elif found[0].ndim != 2 or len(found[0]) != len(x):
            self.problem(
                f"features returned shape {tuple(found[0].shape)} for {len(x)} states; expected ({len(x)}, F)."
            )


@contextmanager
def _in_eval_mode(model: object) -> Iterator[None]:
    """As a run has it; afterwards each module's mode is what it was."""
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _unguided(model: object) -> Iterator[bool]:
    """Guidance at 1; whether it was another."""
    if not isinstance(model, base.HasGuidance) or model.guidance_scale == 1:
        yield False
        return
    scale = model.guidance_scale
    model.guidance_scale = 1.0
    try:
        yield True
    finally:
        model.guidance_scale = scale


def _number(x: Tensor) -> str:
    return f"{float(x):.3g}" if math.isfinite(float(x)) else "infinite"
