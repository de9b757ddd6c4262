"""The settings of a run: one flat typed record, its checks, and its YAML/JSON form. Recipes give other defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..support.errors import SettingError
from ..support.settings import checked_setting, fields_of, nearest_or_known, setting

if TYPE_CHECKING:
    from ..algorithms.base import Rule


def _rules() -> Iterable[str]:
    from ..algorithms.registry import rules

    return rules()


def _solvers() -> Iterable[str]:
    from ..dynamics.solvers import SOLVERS

    return SOLVERS


def _grids() -> Iterable[str]:
    from ..dynamics.grids import GRIDS

    return GRIDS


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run besides the model, the reward and the prompts."""

    algorithm: str = setting("ctrl", "update rule, or your own: file.py:Class", known=_rules)
    rule: dict[str, Any] = field(default_factory=dict)  # the rule's own settings; complete once checked
    seed: int = setting(0, "seed of every random number of the run", 0)
    iterations: int = setting(40, "iterations: one rollout, one update each", 1)
    batch_size: int = setting(512, "paths a rollout (samples)", 2)
    reference_batches: int = setting(
        4, "rollouts of the reference first, for J_ref and J*; the value learns from them too", 1
    )
    kl_weight: float = setting(1.0, "beta: nats of path KL cost this much reward each", 0, above=True)

    steps: int = setting(10, "steps of a path in training", 1)
    grid: str = setting("uniform", "time grid", known=_grids)
    solver: str = setting("ddim", "kernel of a step in training", known=_solvers)
    noise: Literal["noise_level", "constant", "flow_grpo"] = setting(
        "noise_level", "family of the diffusion coefficient"
    )
    noise_scale: float = setting(
        1.0,
        "its parameter: eta of noise_level (1 = reverse SDE, memoryless), g of constant, a of flow_grpo",
        0,
        above=True,
    )
    act_until: float = setting(
        1.0, "time from which the pretrained model acts: late steps decide little and cost most KL", 0, 1, above=True
    )
    exploration: Literal["none", "gaussian", "epsilon_greedy"] = setting("none", "exploration beyond the SDE's noise")
    exploration_scale: float = setting(
        0.1, "standard deviation of the action noise times sigma(t), or the probability of a reference step", 0
    )

    learning_rate: float = setting(2e-3, "policy learning rate (Adam)", 0, above=True)
    epochs: int = setting(2, "sweeps over a rollout's transitions an iteration", 1)
    minibatch_size: int = setting(2048, "transitions a forward and backward pass", 1)
    accumulate: int = setting(1, "minibatches an optimiser step", 1)
    warmup: int = setting(3, "iterations over which learning rates rise", 0)
    decay_from: float = setting(0.5, "share of the run after which learning rates fall linearly to 0 at its end", 0, 1)
    max_kl: float = setting(
        0.5, "most path KL (nats) one iteration may move the policy; longer steps are shortened", 0, above=True
    )
    kl_states: int = setting(512, "states at which the path KL of an iteration's step is measured; 0: no bound", 0)
    max_gradient_norm: float = setting(1e6, "gradient clipping", 0, above=True)
    average: float = setting(
        0.9, "decay per iteration of the averaged weights, which are evaluated and saved", 0, 0.9999
    )

    value: Literal["network", "linear", "residual", "surrogate"] = setting(
        "network",
        "V = F; F linear in the pretrained network's features, solved for; or c_skip R(x_data_hat) + c_out F with the "
        "reward itself (counted) or a learned stand-in",
    )
    value_loss: Literal["martingale", "soft", "log_probability"] = setting(
        "martingale", "mean return of the policy; the optimal value; the same when the reward is a log-probability"
    )
    value_inputs: Literal["x", "x_data_hat", "both"] = setting("both", "what the value network sees")
    value_learning_rate: float = setting(2e-3, "value learning rate (AdamW)", 0, above=True)
    value_steps: int = setting(15, "value steps an iteration", 0)
    value_first_steps: int = setting(120, "value steps on the reference's paths, before the first update", 0)
    value_batch_size: int = setting(256, "states a value step", 1)
    value_replay: int = setting(
        1, "rollouts kept for the value's fit (more than 1 is sound with value_loss soft only)", 1
    )
    value_weight_decay: float = setting(0.0, "weight decay of the value network", 0)

    heldout_samples: int = setting(512, "paths of a held-out evaluation", 2)
    evaluate_every: int = setting(10, "iterations between held-out evaluations", 1)
    checkpoint_every: int = setting(10, "iterations between checkpoints", 1)
    kl_limit: float = setting(50.0, "path KL (nats) at which the run stops as diverged", 0, above=True)
    patience: int = setting(4, "evaluations with falling held-out J and rising training reward before the run stops", 1)
    guard: Literal["off", "warn", "stop"] = setting(
        "warn",
        "watch held-out J, path KL, diversity and the judge: say what looks wrong and keep best/ free of it, or stop",
    )
    least_diversity: float = setting(
        0.5, "share of the pretrained model's diversity under which the guard speaks", 0, 1
    )
    target_kl: float = setting(
        0.0, "path KL (nats) towards which the price of KL in training is steered; 0 keeps kl_weight. J keeps it too", 0
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")

    def __post_init__(self) -> None:
        for f, hint in fields_of(Config):
            object.__setattr__(self, f.name, checked_setting(f, hint, getattr(self, f.name)))
        object.__setattr__(self, "rule", _checked_rule(self.algorithm, self.rule))
        if self.value_replay > 1 and self.value_loss == "martingale":
            raise ValueError(
                f"value_replay is {self.value_replay} but value_loss {self.value_loss!r} is on-policy; "
                "use value_replay 1, or value_loss soft or log_probability."
            )
        if self.value not in ("network", "linear") and self.value_loss == "log_probability":
            raise ValueError(
                f"value is {self.value!r} but value_loss log_probability needs value network or linear; or use soft."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def rule_fields(algorithm: str) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The settings of an update rule."""
    return fields_of(rule_class(algorithm))


def rule_class(algorithm: str) -> type[Rule]:
    """The update rule of this name; SettingError where a user's own has a setting that is one of the run."""
    from ..algorithms.registry import find_rule

    kind = find_rule(algorithm)
    clash = {f.name for f, _ in fields_of(kind)} & {f.name for f, _ in fields_of(Config)}
    if clash:
        raise SettingError(
            f"algorithm {algorithm!r} has a setting {min(clash)!r}, which is one of the run; give it another name."
        )
    return kind


def _checked_rule(algorithm: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"rule is {given!r}; expected the settings of {algorithm} as `name: value` lines.")
    own = {f.name: (f, hint) for f, hint in rule_fields(algorithm)}
    for key in given:
        if key not in own:
            raise ValueError(f"{algorithm} has no setting {key!r}{nearest_or_known(key, own)}")
    return {name: checked_setting(f, hint, given.get(name, f.default)) for name, (f, hint) in own.items()}


def updated(config: Config, changes: Mapping[str, Any], source: str = "settings") -> Config:
    """The config with some fields changed, its own or its rule's; unknown keys raise ValueError with the nearest known.

    Another algorithm brings its own defaults, of the rule and of the run (`Rule.defaults`), where `changes` say nothing.
    """
    from ..algorithms.registry import rules

    algorithm = changes.get("algorithm", config.algorithm)
    kind = rule_class(str(algorithm))
    own = [f.name for f in dataclasses.fields(Config)]
    of_rule = [f.name for f, _ in rule_fields(algorithm)]
    for key in changes:
        if key not in own and key not in of_rule:
            others = [name for name in rules() if key in [f.name for f, _ in rule_fields(name)]]
            if others:
                raise ValueError(f"{source}: {key} is a setting of {', '.join(others)}, not of {algorithm}.")
            raise ValueError(f"{source}: unknown key {key!r}{nearest_or_known(key, [*own, *of_rule])}")
    base: dict[str, Any] = {"rule": dict(config.rule)}
    if algorithm != config.algorithm:
        base = {**kind.defaults, "rule": {}}
    rule = changes.get("rule", base["rule"])
    if isinstance(rule, Mapping):
        rule = {**rule, **{key: value for key, value in changes.items() if key in of_rule}}
    ours = {key: value for key, value in changes.items() if key in own}
    return dataclasses.replace(config, **{**base, **ours, "rule": rule})


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
