"""`finetune`: the quick way in, from a model and a reward to a tuned policy."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..evaluation.evaluate import Features, Judge
from ..feedback.online import OnlineSession, check_off_policy
from ..models.base import HasPath, HasReference, ScoreModel
from ..models.weights import digest_of
from ..recipes.base import Problem, need_prompts
from ..recipes.prompts import check_texts, give_metadata
from ..report import html
from ..report.progress import Progress, somebody_looks, summary_lines
from ..rewards.base import NO_REWARD, OUTSIDE
from ..rewards.registry import load as load_reward
from ..runs.checkpoint import read_run
from ..runs.session import Event, Session
from ..runs.source import (
    Source,
    stored_config,
    tuned_weights,
)
from ..runs.trackers import Tracker
from ..support import distributed
from ..support.errors import SettingError
from ..training.config import Config, updated
from ..training.loop import Hook
from ..training.trainer import Trainer
from ..types import Metrics
from .result import Result

# models that an earlier call has trained, and the digest of what they were before it
_trained: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def finetune(
    model: nn.Module | Problem,
    reward: str | Callable[..., Any] | None = None,
    prompts: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    *,
    value_network: Callable[[], nn.Module] | None = None,
    config: Config | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    start_from: str | Path | None = None,
    start_reference: str = "first",
    judge: Judge | None = None,
    features: Features | None = None,
    optimum: Callable[[float], float] | None = None,
    progress: bool | None = None,
    on_event: Event | None = None,
    hooks: Sequence[Hook] = (),
    trackers: Sequence[str | Tracker] = (),
    report: bool = True,
    **settings: Any,
) -> Result:
    """Fine-tune a pretrained model to a reward, by continuous-time reinforcement learning.

    `model` is trained in place. What the call is for is `Result.policy`: the average of the weights over training, which also
    is what is evaluated and saved; `Result.write_back` puts it into your own network.

    Args:
        model: An nn.Module with the members of `ScoreModel` (see docs: Your own model), or a `Problem`, which brings reward,
            prompts, value network, judge, features and optimum along where they are not given here.
        reward: Everything that `scoreact train --reward` takes: a known name, "file.py:function", the address of a reward
            server, f(images), f(images, prompts), f(images, prompts, metadata) or f(samples, condition), each returning one
            number a sample [B], larger is better.
        prompts: What samples are drawn for, a list or a mapping {prompt: metadata}, such as `read_prompts` makes of a file.
            Left out: the model's own `classes`, or [""] for a model without any.
        value_network: Makes the value's network (input, t [B], condition) -> [B]. Left out: an MLP on flattened states.
        config: All settings at once; `settings` change single ones (learning_rate=1e-4, ...; the settings page lists them).
        out: The run's folder, new or empty: settings, metrics, checkpoints, weights and report.html, as the command line's.
        resume: Continue the run in `out` from its last checkpoint, with the model as it was before that run, the same reward
            and the same settings (those of the run, where none are given). More `iterations` than planned extend it.
        accept_changes: Resume although files that the run depends on, or its config.json, were edited since.
        start_from: A run whose tuned weights this one starts from. start_reference: "first", so that path KL is still counted
            from that run's pretrained model, or "tuned", so that its outcome is the new pretrained model.
        judge: (decoded samples [B, ...], condition) -> metrics that the reward does not know.
        features: (decoded samples [B, ...]) -> [B, F], in which diversity and drift are measured.
        optimum: kl_weight -> J* in closed form, where there is one.
        progress: Print what happens. Left out: in a terminal and in a notebook.
        on_event: Told (kind, metrics) of everything that happens.
        hooks: Told of each iteration, with the trainer; see `Hook`.
        trackers: tensorboard, wandb, mlflow, file.py:Class, or objects with the methods of `Tracker`.
        report: Write report.html into `out`, which takes seconds.

    Raises:
        SettingError: For a setting that cannot be used. RewardError, LoadError, ModelError: For a reward or model that cannot.
        RunExists: When `out` is in use. RunError: When a run cannot be continued.
        Diverged: When training cannot go on. (All of them are a ScoreactError.)
    """
    if start_from is None and start_reference != "first":
        raise SettingError(f"start_reference is {start_reference!r}, which belongs to start_from; give that too.")
    problem = problem_of(model, reward, prompts, value_network, judge, features, optimum)
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise SettingError("resume continues the run in a folder; give it with out.")
    extend = False
    if resume and folder is not None:
        stored = stored_config(folder, read_run(folder))
        config = stored if config is None else config
        extend = settings.get("iterations", config.iterations) != stored.iterations
    config = updated(config or usual_config(problem.model), settings)
    said = []
    if value_network is not None and not (config.uses("value") and config.value in ("network", "residual")):
        of = f"value {config.value}" if config.uses("value") else config.algorithm
        said = [f"value_network is given, and {of} uses none: it does nothing here."]
    description: dict[str, Any] = {"made_by": "scoreact.finetune", "prompts": list(problem.prompts)}
    if isinstance(reward, str):
        description["reward"] = reward
    start = None
    if start_from is not None:
        start = _start(problem.model, Path(start_from), start_reference, resume)
        description["start"] = {"run": str(Path(start_from).resolve()), "reference": start_reference}
    return train_problem(
        problem, config, folder, resume=resume, extend=extend, start=start, description=description, progress=progress,
        on_event=on_event, hooks=hooks, trackers=trackers, said=said, report=report, accept_changes=accept_changes,
    )  # fmt: skip


def usual_config(model: object) -> Config:
    """The default settings; of a model that says how it is drawn from, with that path."""
    return updated(Config(), model.suited_path) if isinstance(model, HasPath) else Config()


def train_source(
    source: Source, command: str, *, resume: bool = False, extend: bool = False, on_event: Event | None = None,
    trackers: Sequence[str | Tracker] = (), problem: Problem | None = None, accept_changes: bool = False,
) -> Result:  # fmt: skip
    """Train what a recipe or the user's file describes, in `source.folder`; without a report, which the caller writes."""
    return train_problem(
        problem or source.build(), source.config, source.folder, resume=resume, extend=extend, start=source.start_weights(),
        description=source.description(command), progress=False, on_event=on_event, trackers=trackers, report=False,
        accept_changes=accept_changes,
    )  # fmt: skip


def train_problem(
    problem: Problem,
    config: Config,
    out: Path | None,
    *,
    resume: bool,
    extend: bool,
    start: Mapping[str, Tensor] | None,
    description: Mapping[str, Any],
    progress: bool | None,
    on_event: Event | None,
    hooks: Sequence[Hook] = (),
    trackers: Sequence[str | Tracker] = (),
    report: bool = True,
    said: Sequence[str] = (),
    accept_changes: bool = False,
) -> Result:
    """said: what a user should know of what was given, for the run to show."""
    model = problem.model
    assert isinstance(model, nn.Module)
    if not resume:
        need_prompts(problem, "give --prompts FILE, or finetune(model, reward, prompts=[...])")
    named = problem.labels.get("value_network")
    if named and not config.uses("value"):
        raise SettingError(f"option value_network is {named!r}, but {config.algorithm} fits no value; leave it out.")
    if named and config.value not in ("network", "residual"):
        raise SettingError(
            f"option value_network is {named!r}, but value {config.value} is no network; set value to network, or leave it out."
        )
    noticed, start = _noticed(model, start, resume)
    noticed = [*said, *noticed]
    different = list(dict.fromkeys(problem.prompts))
    if repeats := len(problem.prompts) - len(different):
        noticed = [*noticed, f"{repeats} of {len(problem.prompts)} prompts repeat another; each counts once."]
        problem = dataclasses.replace(problem, prompts=different)
    trainer = Trainer(
        model, problem.reward, problem.prompts, problem.value_network, config, problem.judge, problem.features,
        problem.optimum, start, problem.test_prompts,
    )  # fmt: skip
    waits = problem.reward is OUTSIDE and not resume
    if waits:
        check_off_policy(config)
        if out is None:
            raise SettingError("reward outside makes a run that waits for rewards in its folder; give one with out.")
    session = (OnlineSession if waits else Session)(
        trainer, out, resume=resume, extend=extend, accept_changes=accept_changes, description=description, hooks=hooks,
        trackers=trackers, notes=noticed,
    )  # fmt: skip
    shows = somebody_looks() if progress is None else progress
    if isinstance(session, OnlineSession):
        outcome, report = session.wait(), False
    elif shows and distributed.rank() == 0:
        with Progress(config.iterations) as screen:
            if resume:
                screen.resumed(session.history)
            session.on_event = screen if on_event is None else both(screen, on_event)
            outcome = session.run()
        print("\n" + "\n".join(summary_lines(outcome.history, outcome.final)))
        if outcome.stopped:
            print(f"stopped early: {outcome.stopped}")
    else:
        session.on_event = on_event
        outcome = session.run()
    result = Result(
        trainer.averaged(), outcome.history, outcome.reference, outcome.final, outcome.stopped, out, outcome.best_iteration,
        problem, config,
    )  # fmt: skip
    if out is not None and report and distributed.rank() == 0:
        path = html.write(out, problem, result.policy)
        if shows:
            print(f"report     {path}")
    return result


def both(first: Event, second: Event) -> Event:
    """Two listeners as one."""

    def tell(kind: str, metrics: Metrics) -> None:
        first(kind, metrics)
        second(kind, metrics)

    return tell


def problem_of(
    model: nn.Module | Problem,
    reward: str | Callable[..., Any] | None,
    prompts: Sequence[str] | Mapping[str, Mapping[str, Any]],
    value_network: Callable[[], nn.Module] | None = None,
    judge: Judge | None = None,
    features: Features | None = None,
    optimum: Callable[[float], float] | None = None,
    needs_reward: bool = True,
) -> Problem:
    """What is given, over what the problem brings. Raises SettingError where there is no reward and one is needed."""
    if isinstance(prompts, str):
        raise SettingError(f"prompts is the text {prompts!r}; give a list of prompts, such as [{prompts!r}].")
    if not isinstance(model, Problem) and not isinstance(model, nn.Module):
        raise TypeError(
            f"model is {str(model)[:60]!r}; training needs an nn.Module with the members of ScoreModel, or a Problem. What "
            "has a name or a folder, such as a recipe, is trained by `scoreact train NAME`."
        )
    check_texts(prompts)
    problem = model if isinstance(model, Problem) else Problem(model)  # type: ignore[arg-type]
    if isinstance(prompts, Mapping):
        give_metadata(problem.model, prompts)
    given: dict[str, Any] = {
        "prompts": list(prompts) or None, "value_network": value_network, "judge": judge, "features": features,
        "optimum": optimum,
    }  # fmt: skip
    if reward is not None:
        given |= {"reward": load_reward(reward), "optimum": optimum}
        problem = dataclasses.replace(problem, optimum=None)  # J* was the other reward's
    problem = dataclasses.replace(problem, **{name: value for name, value in given.items() if value is not None})
    if needs_reward and problem.reward is NO_REWARD:
        raise SettingError(
            "no reward is given; finetune(model, reward) takes a name, 'file.py:function' or a function."
        )
    return problem


def _noticed(
    model: nn.Module, start: Mapping[str, Tensor] | None, resume: bool
) -> tuple[list[str], Mapping[str, Tensor] | None]:
    """A word where this very model was trained by an earlier call, and the weights that the policy then starts from.

    A resumed run checks its reference by itself.
    """
    now = digest_of(model)
    if _trained.setdefault(model, now) == now or resume:
        return [], start
    if isinstance(model, HasReference):  # an adapter: the pretrained model is still there
        said = "This model was trained by an earlier call: the policy starts from what it is now. The reference is the same."
        return [said], start or {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return [
        "This model was trained by an earlier call, and what it is now is taken for the pretrained model: path KL and the "
        "share recovered are counted from there. To start from the pretrained model, build it anew; to go on from a run and "
        "keep its reference, give start_from."
    ], start


def _start(model: ScoreModel, run: Path, reference: str, resume: bool) -> Mapping[str, Tensor] | None:
    from ..runs.source import put_tuned

    if reference not in ("first", "tuned"):
        raise SettingError(f"start_reference is {reference!r}; known: first, tuned.")
    if reference == "first":
        return tuned_weights(run)
    if not resume:  # a resumed run has its reference
        put_tuned(model, run)
    return None
