"""The settings of a run: one flat typed record, its checks, and its YAML/JSON form. Recipes give other defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


def _setting(default: Any, text: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Any:
    """A field with its help text (unit included) and the range it must lie in; above: the low end itself is excluded."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "above": above})


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run besides the model, the reward and the prompts."""

    algorithm: Literal["ctrl", "ctrl_pathwise", "ctrl_trpo"] = _setting("ctrl", "update rule")
    seed: int = _setting(0, "seed of every random number of the run", 0)
    iterations: int = _setting(40, "iterations: one rollout, one update each", 1)
    batch_size: int = _setting(512, "paths a rollout (samples)", 2)
    reference_batches: int = _setting(
        4, "rollouts of the reference first, for J_ref and J*; the value learns from them too", 1
    )
    kl_weight: float = _setting(1.0, "beta: nats of path KL cost this much reward each", 0, above=True)

    steps: int = _setting(10, "steps of a path in training", 1)
    grid: Literal["uniform", "log_snr", "karras", "random"] = _setting("uniform", "time grid")
    solver: Literal["ddim", "euler_maruyama"] = _setting("ddim", "kernel of a step in training")
    noise: Literal["noise_level", "constant", "flow_grpo"] = _setting(
        "noise_level", "family of the diffusion coefficient"
    )
    noise_scale: float = _setting(
        1.0,
        "its parameter: eta of noise_level (1 = reverse SDE, memoryless), g of constant, a of flow_grpo",
        0,
        above=True,
    )
    act_until: float = _setting(
        1.0, "time from which the pretrained model acts: late steps decide little and cost most KL", 0, 1, above=True
    )
    exploration: Literal["none", "gaussian", "epsilon_greedy"] = _setting("none", "exploration beyond the SDE's noise")
    exploration_scale: float = _setting(
        0.1, "standard deviation of the action noise times sigma(t), or the probability of a reference step", 0
    )

    learning_rate: float = _setting(2e-3, "policy learning rate (Adam)", 0, above=True)
    epochs: int = _setting(2, "sweeps over a rollout's transitions an iteration", 1)
    minibatch_size: int = _setting(2048, "transitions a forward and backward pass", 1)
    accumulate: int = _setting(1, "minibatches an optimiser step", 1)
    warmup: int = _setting(3, "iterations over which learning rates rise", 0)
    decay_from: float = _setting(0.5, "share of the run after which learning rates fall linearly to 0 at its end", 0, 1)
    max_kl: float = _setting(
        0.5, "most path KL (nats) one iteration may move the policy; longer steps are shortened", 0, above=True
    )
    max_gradient_norm: float = _setting(1e6, "gradient clipping", 0, above=True)
    average: float = _setting(
        0.9, "decay per iteration of the averaged weights, which are evaluated and saved", 0, 0.9999
    )
    clip_range: float = _setting(1.0, "ratio clipping, per square root of unit time", 0, above=True)
    trace: float = _setting(1.0, "GAE's lambda per unit time", 0, 1)
    ratio_weight: float = _setting(1.0, "weight of the ratio term beside the value's gradient (ctrl)", 0)
    trust: float = _setting(0.0, "weight of the squared distance to the behaviour policy, in units of kl_weight", 0)
    advantage: Literal["gae", "standardised_value_differences"] = _setting(
        "gae", "ctrl's advantage; the second is the authors' published code"
    )
    form: Literal["regression", "clamped_displacement"] = _setting(
        "regression", "ctrl_pathwise's loss; the second is the authors' published code"
    )
    transitions: int = _setting(0, "states a rollout at which ctrl_pathwise regresses; 0 is all of them", 0)
    gradient_at: Literal["state", "next"] = _setting(
        "state", "where the value's gradient is taken: before the step, or where the step leads (exact on coarse grids)"
    )
    reuse_reference: int = _setting(
        0, "first iterations that learn from the reference's own paths instead of new ones (ctrl_pathwise only)", 0
    )
    cg_steps: int = _setting(10, "conjugate-gradient steps (ctrl_trpo)", 1)

    value: Literal["network", "residual", "surrogate"] = _setting(
        "network", "V = F; or c_skip R(x_data_hat) + c_out F with the reward itself (counted) or a learned stand-in"
    )
    value_loss: Literal["martingale", "soft", "log_probability"] = _setting(
        "martingale", "mean return of the policy; the optimal value; the same when the reward is a log-probability"
    )
    value_inputs: Literal["x", "x_data_hat", "both"] = _setting("both", "what the value network sees")
    value_learning_rate: float = _setting(2e-3, "value learning rate (AdamW)", 0, above=True)
    value_steps: int = _setting(30, "value steps an iteration", 0)
    value_first_steps: int = _setting(120, "value steps on the reference's paths, before the first update", 0)
    value_batch_size: int = _setting(1024, "states a value step", 1)
    value_replay: int = _setting(
        1, "rollouts kept for the value's fit (more than 1 is sound with value_loss soft only)", 1
    )
    value_weight_decay: float = _setting(0.0, "weight decay of the value network", 0)

    heldout_samples: int = _setting(512, "paths of a held-out evaluation", 2)
    evaluate_every: int = _setting(10, "iterations between held-out evaluations", 1)
    checkpoint_every: int = _setting(10, "iterations between checkpoints", 1)
    kl_limit: float = _setting(50.0, "path KL (nats) at which the run stops as diverged", 0, above=True)
    patience: int = _setting(
        4, "evaluations with falling held-out J and rising training reward before the run stops", 1
    )
    device: str = _setting("auto", "auto, cpu, cuda, cuda:N or mps")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Config)
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, hints[f.name], getattr(self, f.name)))
        if self.value_replay > 1 and self.value_loss == "martingale":
            raise ValueError(
                f"value_replay is {self.value_replay} but value_loss {self.value_loss!r} is on-policy; "
                "use value_replay 1, or value_loss soft or log_probability."
            )

        if self.reuse_reference and self.algorithm != "ctrl_pathwise":
            raise ValueError(
                f"reuse_reference is {self.reuse_reference} but {self.algorithm} needs its own paths; use 0."
            )
        if self.reuse_reference > self.reference_batches:
            raise ValueError(
                f"reuse_reference ({self.reuse_reference}) is more than reference_batches ({self.reference_batches})."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _checked(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """The value in its field's type, or ValueError naming field, value, and what is accepted."""
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        if value not in known:
            close = difflib.get_close_matches(str(value), known, 1, 0.4)  # eulr is short for euler_maruyama
            hint_text = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{f.name} is {value!r}; known: {', '.join(known)}.{hint_text}")
        return value
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{f.name} is {value!r}; expected a number ({f.metadata['help']}).") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(
            f"{f.name} is {value!r} ({type(value).__name__}); expected {hint.__name__} ({f.metadata['help']})."
        )
    if hint in (int, float):
        low, high, above = f.metadata["low"], f.metadata["high"], f.metadata["above"]
        if not (low < value if above else low <= value) or not value <= high:  # so written, nan is refused
            bounds = [f"{'above' if above else 'at least'} {low:g}"] * (low > -math.inf)
            bounds += [f"at most {high:g}"] * (high < math.inf)
            raise ValueError(f"{f.name} is {value}; it must be {' and '.join(bounds)} ({f.metadata['help']}).")
    return value


def updated(config: Config, changes: Mapping[str, Any], source: str = "settings") -> Config:
    """The config with some fields changed; unknown keys raise ValueError with the nearest known one."""
    known = [f.name for f in dataclasses.fields(Config)]
    for key in changes:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f". Known: {', '.join(known)}."
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    return dataclasses.replace(config, **changes)


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises ValueError with the file's name and what to do."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"config file {str(path)!r} does not exist. `scoreact train RECIPE --print-config` writes one."
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config file {str(path)!r} holds {type(content).__name__}; expected `key: value` lines.")
    return content
