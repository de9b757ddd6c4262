"""Runs opened again: sampled, measured, steered, continued."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..control.policy import Policy
from ..dynamics.samplers import BY_SAMPLE, SAMPLERS, sampler_by_name
from ..dynamics.sde import SDE
from ..dynamics.solvers import SOLVERS
from ..evaluation.evaluate import evaluate, gain_of, paired_rewards, share_of, transfer_table
from ..evaluation.optimum import recovered
from ..models.base import HasGuidance
from ..models.weights import digest_of, load_weights, reference_digest_of, write_back
from ..recipes.base import Problem
from ..report import html
from ..report.card import evaluation_of
from ..rewards.base import is_of_batch
from ..rewards.check import checked
from ..runs.checkpoint import load_checkpoint, look_at_weights, read_run
from ..runs.record import Record, read_record
from ..runs.source import (
    REFERENCE,
    Source,
    load_value,
    source_of_run,
    stored_config,
    tuned_weights,
    weights_file,
)
from ..sampling.draw import balanced, seeded, seeds_of
from ..sampling.particles import Steered
from ..sampling.steering import Steering
from ..support.devices import choose_device, device_of
from ..support.errors import RunError, SettingError
from ..support.files import Line, finite, read_lines, write_json
from ..support.own_data import OwnData
from ..support.seeds import checked_seed
from ..training.config import Config, updated
from ..types import Metrics
from .copies import copies_of
from .export import export
from .learns_online import LearnsOnline
from .result import AT_ONCE, Result, guided, noise_of, plotted
from .start import problem_of, train_problem


def open_run(
    folder: str | Path,
    model: nn.Module | Problem | Callable[[], nn.Module | Problem] | None = None,
    reward: str | Callable[..., Any] | None = None,
    prompts: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
) -> SavedRun:
    """A run folder, to sample, measure, steer, continue.

    model: for runs that were made from Python, the model as it was before them, a Problem, or a function that makes one;
    the command line's runs say themselves how theirs is built. reward, prompts: likewise; metadata of prompts are not kept.
    Raises RunError for a folder that is no run, or one whose model only Python has.
    """
    folder = Path(folder)
    content = read_run(folder)
    if model is None:
        return SavedRun(source_of_run(folder))
    made = model() if callable(model) and not isinstance(model, nn.Module) else model
    described = content.get("description") or {}
    names = prompts or (() if isinstance(made, Problem) else described.get("prompts", ()))
    problem = problem_of(made, reward, names, needs_reward=False)
    return SavedRun(Given(problem, stored_config(folder, content), folder, described.get("start")))


class Given:
    """A `Source` whose problem was made in Python: every `build` is a copy of what it was when the run was opened."""

    def __init__(self, problem: Problem, config: Config, folder: Path, start: Mapping[str, str] | None) -> None:
        self.problem = dataclasses.replace(problem, model=copy.deepcopy(problem.model))
        self.config, self.folder, self.start = config, folder, start
        self._check_reference()

    def build(self) -> Problem:
        return dataclasses.replace(self.problem, model=copy.deepcopy(self.problem.model))

    def start_weights(self) -> dict[str, Tensor] | None:
        """The policy's, where it did not start as the reference."""
        if self.start is None or self.start["reference"] == "tuned":
            return None
        return tuned_weights(Path(self.start["run"]))

    def _check_reference(self) -> None:
        """The model is the one that the run started from; where training changed it, the run has kept what it was."""
        digest = read_run(self.folder).get("reference_digest")
        kept, model = self.folder / REFERENCE, self.problem.model
        assert isinstance(model, nn.Module)
        if digest is None or digest == reference_digest_of(Policy(model).reference):
            return
        if kept.is_file():
            load_weights(model, kept)
        if digest != reference_digest_of(Policy(model).reference):
            raise RunError(
                f"{self.folder} started from another pretrained model than this one; build it as before that run."
            )


class SavedRun(LearnsOnline):
    """A run folder opened again, or a recipe with its pretrained weights. The model is built on first use."""

    def __init__(self, source: Source | Given) -> None:
        self.source = source
        self.config: Config = source.config
        self._kept: dict[str, Policy] = {}
        self._problem: Problem | None = None

    def __repr__(self) -> str:
        return f"SavedRun({str(self.source.folder)!r})"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The pretrained model, the reward and the prompts."""
        if self._problem is None:
            self._problem = self.source.build()
        return self._problem

    @property
    def folder(self) -> Path:
        """The run's. Raises RunError where the source is a recipe."""
        if self.source.folder is None:
            raise RunError("this needs a run, not a recipe; train one, or leave it to best_of or smc.")
        return self.source.folder

    def which(self, weights: str = "final") -> str:
        """The weights that there are: final, best, or pretrained of a recipe."""
        return "pretrained" if self.source.folder is None else weights_file(self.folder, weights)[1]

    @property
    def record(self) -> Record:
        """What the folder's files say, read anew."""
        return read_record(self.folder)

    @property
    def history(self) -> list[Line]:
        """The lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def reference(self) -> Metrics:
        """J_ref and J*."""
        return self.record.reference

    @property
    def final(self) -> Metrics:
        """The last held-out evaluation."""
        evaluations = self.record.evaluations
        return evaluations[-1] if evaluations else {}

    def policy(self, weights: str = "final") -> Policy:
        """The tuned policy beside its reference. weights: "final", or "best" (the highest J that the guard found clean)."""
        if weights not in self._kept:
            model = copy.deepcopy(self.problem.model)
            assert isinstance(model, nn.Module)
            policy = Policy(model.to(choose_device(self.config.device)).eval(), act_until=self.config.act_until)
            if self.source.folder is not None:
                load_weights(model, weights_file(self.folder, weights)[0])
            self._kept[weights] = policy
        return self._kept[weights]

    def sample(
        self,
        prompts: Sequence[str] | None = None,
        count: int = 8,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
        reference: bool = False,
        weights: str = "final",
        **how: Any,
    ) -> Tensor:
        """Decoded samples; see `Result.sample`. weights: final or best."""
        return self.draw(self.policy(weights), prompts, count, steps, solver, seed, reference, **how)

    def plot(self, weights: str = "final") -> Figure:
        """Samples before and after, from the same noise."""
        return plotted(self.policy(weights), self.problem, self.config)

    def evaluate(
        self,
        samples: int | None = None,
        solvers: Sequence[str] = ("ddim", "ode", "dpm_solver_pp_2m"),
        steps: Sequence[int] = (5, 10, 20, 50),
        seed: int = 1,
        weights: str = "final",
        grid: str | None = None,
        data: str | Path | OwnData | None = None,
        data_class: str | None = None,
    ) -> dict[str, Any]:
        """Fresh held-out metrics as trained, and the mean reward with other solvers and steps; kept in evaluation.json.

        grid: of those, the run's own where it is left out.
        data: what the pretrained model learned from, as `pretrain` takes it: how near samples are to it.
        data_class: the class that the run was tuned to: the tuned model's samples are compared with examples of it alone.
        Returns {"weights", "samples", "seed", "grid", "heldout": metrics with standard errors, "transfer": a row a solver and
        steps}, and with data "memorisation": {"pretrained": ..., "tuned": ...}, each
        what `evaluation.memorisation.Memorisation` names.
        """
        for name in solvers:
            SAMPLERS.setdefault(name, sampler_by_name(name))  # a user's solver is known by its address from here on
        checked_seed(seed)
        policy, c = self.policy(weights), self.config
        grid = updated(c, {"grid": grid}).grid if grid is not None else c.grid
        reward, device, count = checked(self.problem.reward), device_of(policy.model), samples or c.heldout_samples
        sde = c.sde(policy.model.schedule)
        heldout = evaluate(
            policy, sde, SOLVERS[c.solver], self.times(policy.model, None), reward, self.problem.prompts,
            c.kl_weight, count, seed, self.problem.judge, self.problem.features, device,
        )  # fmt: skip
        rows = [(solver, n) for solver in solvers for n in steps]
        table = transfer_table(policy, reward, self.problem.prompts, count, seed, grid, rows, device, sde.noise)
        if self.reference:
            heldout["objective/recovered"] = recovered(heldout["objective/J"], self.reference)
        found = {
            "weights": weights_file(self.folder, weights)[1], "samples": count, "seed": seed, "grid": grid,
            "heldout": heldout, "transfer": table,
        }  # fmt: skip
        if data is not None:
            found["memorisation"] = copies_of(self, data, count, seed, weights, data_class)
        write_json(self.folder / "evaluation.json", found)
        return found

    def survey(self, samples: int | None = None, seed: int = 1, weights: str = "final") -> dict[str, Any]:
        """How much of the gain in reward survives other guidance, more steps and other solvers; kept in survey.json.

        One thing is changed at a time: guidance 1 and 1.5 times its own (where there is guidance), twice the steps, `ode`,
        `dpm_solver_pp_2m`. The same prompts and noise in every row, for the tuned and the pretrained model.

        Args:
            samples: a row; heldout_samples by default. seed: of the noise. weights: final or best.

        Returns:
            {"weights", "iteration", "samples", "seed", "digest", "rows"}; a row: what is changed, solver, steps,
            guidance_scale, reward, reference_reward, gain and share (of the first row's gain), each with its standard error.
        """
        checked_seed(seed)
        policy, c, model = self.policy(weights), self.config, self.policy(weights).model
        reward, device, count = checked(self.problem.reward), device_of(model), samples or c.heldout_samples
        names = balanced(self.problem.prompts, count, torch.Generator().manual_seed(seed))
        scale = model.guidance_scale if isinstance(model, HasGuidance) else None
        plans: list[tuple[str, str, int, float | None]] = [("as trained", c.solver, c.steps, scale)]
        if scale not in (None, 1.0):
            plans += [(f"guidance {g:g}", c.solver, c.steps, g) for g in (1.0, 1.5 * scale)]
        plans += [("twice the steps", c.solver, 2 * c.steps, scale)]
        plans += [(f"solver {s}", s, c.steps, scale) for s in ("ode", "dpm_solver_pp_2m") if s != c.solver]
        rows: list[dict[str, Any]] = []
        own: Tensor | None = None
        for change, solver, steps, guidance in plans:
            with guided(policy, guidance, None):
                tuned, before = paired_rewards(
                    policy, reward, names, solver, steps, seed, c.grid, device, c.sde(model.schedule).noise
                )
            own = tuned - before if own is None else own
            about = {"change": change, "solver": solver, "steps": steps, "guidance_scale": guidance}
            rows.append({**about, **gain_of(tuned, before), **share_of(tuned - before, own)})
        which = weights_file(self.folder, weights)[1]
        found = {
            "weights": which, "iteration": evaluation_of(self.record, which).get("iteration"), "samples": count, "seed": seed,
            "digest": digest_of(model) if isinstance(model, nn.Module) else "", "rows": rows,
        }  # fmt: skip
        write_json(self.folder / "survey.json", finite(found))
        return found

    def steering(
        self, method: str, *, strength: float | None = None, particles: int | None = None, reference: bool = False,
        solver: str = "ddim", noise_scale: float | None = None, weights: str = "final",
    ) -> Steering:  # fmt: skip
        """A way of steering at sampling time, ready to draw: value, interpolate, best_of or smc; see `Steering`.

        strength: of value and interpolate, 1 by default. particles: of best_of and smc, 8 a sample by default.
        """
        if strength is not None and method in ("best_of", "smc"):
            raise SettingError(f"strength is {strength:g}, but {method} has none; give particles.")
        if particles is not None and method in ("value", "interpolate"):
            raise SettingError(f"particles is {particles}, but {method} chooses among none; give strength.")
        strength, particles = 1.0 if strength is None else strength, 8 if particles is None else particles
        noise = noise_of(solver, noise_scale)
        if method == "interpolate" and reference:
            raise SettingError("interpolate is the pretrained model at strength 0; leave out reference.")
        policy, c, reward = self.policy(weights), self.config, checked(self.problem.reward)
        if method in ("value", "interpolate") and self.source.folder is None:
            raise SettingError(f"steering by {method} needs a run, not a recipe; train one, or use best_of or smc.")
        if method in ("best_of", "smc") and is_of_batch(self.problem.reward):
            raise SettingError(
                f"{method} weighs samples one by one, and reward {reward.name} is of samples together; use value, interpolate."
            )
        value, kl_weight = None, c.kl_weight
        if self.source.folder is not None and method in ("value", "smc"):
            path = self.folder / ("best" if self.which(weights) == "best" else "") / "value.safetensors"
            if method == "value" or (
                path.is_file() and c.value != "surrogate"
            ):  # whose fit is not kept: smc does without
                value, kl_weight = load_value(path, self.problem.value_network, c, policy, reward, self.problem.prompts)
        return Steering(
            method, policy, reward, SDE(policy.schedule, noise), solver, kl_weight, strength, particles,
            "reference" if reference else "policy", value, c.sde(policy.schedule), c.act_until,
        )  # fmt: skip

    def steer(
        self,
        method: str,
        prompts: Sequence[str] | None = None,
        count: int = 8,
        steps: int | None = None,
        seed: int = 0,
        first: int = 0,
        **how: Any,
    ) -> Steered:
        """Samples steered without training: `.samples` [B, ...], `.rewards` [B], `.calls`.

        seed, first: as of `sample`. how: see `steering`.
        """
        names = self.names(prompts, count)
        return steered(self.steering(method, **how), names, self.times(self.problem.model, steps), seed, first)

    def resume(self, iterations: int | None = None, **how: Any) -> Result:
        """Continue the run from its last checkpoint; more iterations than planned extend it. how: progress, on_event, ..."""
        config = updated(self.config, {} if iterations is None else {"iterations": iterations})
        result = train_problem(
            self.source.build(), config, self.folder, resume=True, extend=config.iterations != self.config.iterations,
            start=self.source.start_weights(), description={}, **{"progress": None, "on_event": None, **how},
        )  # fmt: skip
        self.config, self._kept, self._problem = config, {}, None
        return result

    def export(self, form: str | None = None, out: str | Path | None = None, weights: str = "final") -> Path:
        """The tuned weights for other programs, with a model card; the new folder's path.

        Args:
            form: Of a pipeline tuned by LoRA diffusers (default), kohya, peft, or pipeline (all of it, merged); of one tuned in
                full pipeline; of any other model weights, those of your own network.
            out: A folder, new or empty. Left out: `export-FORM` in the run's.
            weights: final or best.

        Raises:
            ModelError: For a form that does not hold these weights. RunExists: For a folder that holds something.
        """
        return export(self.source, self.folder, form, None if out is None else Path(out), weights)

    def report(self) -> Path:
        """Write report.html anew; its path."""
        return html.write(self.folder, self.problem, self.policy())

    def check(self) -> list[str]:
        """Whether the run can be read, continued and sampled from: sentences that begin with fine, note or problem."""
        lines, damaged = [], list[str]()
        try:
            iteration, _ = load_checkpoint(self.folder / "checkpoints", problems=damaged)
            lines += [f"problem: {text}" for text in damaged]
            lines.append(f"fine: the checkpoint of iteration {iteration} of {self.config.iterations} can be read.")
        except ValueError as error:
            lines.append(f"problem: {error}")
        try:
            self.policy()
            lines.append(f"fine: the {weights_file(self.folder)[1]} weights fit the model.")
        except ValueError as error:
            lines.append(f"problem: {error}")
        return [*lines, *[f"problem: {text}" for text in self.record.problems], *look_at_weights(self.folder)]

    def write_back(self, network: nn.Module, weights: str = "final") -> int:
        """Put the tuned weights into a network of your own; see `Result.write_back`."""
        tuned, model = self.policy(weights).model, self.problem.model
        assert isinstance(tuned, nn.Module)
        assert isinstance(model, nn.Module)
        return write_back(tuned, model, network)


def steered(steering: Steering, prompts: Sequence[str], ts: Tensor, seed: int, first: int = 0) -> Steered:
    """Steered samples of any number of prompts, so many at a time that memory suffices.

    Each comes from (seed, prompt, its number, from `first` on), as unsteered ones do; candidates of best_of are such samples.
    """
    device = device_of(steering.policy.model)
    particles = steering.particles if steering.method in ("best_of", "smc") else 1
    each = particles if steering.method == "best_of" else 1
    seeds = seeds_of(seed, prompts, first, each)
    apart = sampler_by_name(steering.solver) in BY_SAMPLE
    size, found = max(1, AT_ONCE // particles) if apart else 1, []
    for start in range(0, len(prompts), size):
        generators = seeded(seeds[start * each : (start + size) * each], device)
        found.append(steering(prompts[start : start + size], ts, generators if apart else generators[0]))
    return Steered.join(found)
