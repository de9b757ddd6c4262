"""The settings of a run: one flat record, its checks, and its YAML and JSON form. Recipes give other defaults.

The settings stand beside what they set: paths and the value in `control`, the run, the update and the watch in
`run_settings`, a rule's own in its file. Here they become one record, in which every setting has a name of its own.
A choice (an update rule, a form of the value, ...) brings its own settings: those of another are refused where a user
gives them, and have their default where a recipe or an older run does.

Imports of torch, directly or through other parts, stand inside functions: `scoreact --help` reads this module, and torch
takes seconds to import.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..control.path_settings import PathSettings
from ..control.surrogate_settings import SurrogateSettings
from ..control.value_settings import ValueSettings
from ..support.errors import SettingError
from ..support.settings import Above, checked_setting, fields_of, nearest_or_known, unmet
from ..support.text import parsed_json, parsed_yaml, read_text
from .run_settings import RunSettings, UpdateSettings, WatchSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..algorithms.base import Rule
    from ..dynamics.schedule import Schedule
    from ..dynamics.sde import SDE

Field = dataclasses.Field[Any]

RECORDS = (RunSettings, PathSettings, UpdateSettings, ValueSettings, SurrogateSettings, WatchSettings)
# attributes of a rule that decide which settings it uses
TRAITS = ("fits_value", "differentiates_reward", "minimiser", "transitions_only")


@dataclass(frozen=True)
class Config(WatchSettings, SurrogateSettings, ValueSettings, UpdateSettings, PathSettings, RunSettings):
    """Everything that decides the outcome of a run besides the model, the reward and the prompts.

    Frozen: `updated` makes another. Settings that the choices do not use hold their default. Raises SettingError.
    """

    def __post_init__(self) -> None:
        for f, hint in fields_of(Config):
            object.__setattr__(self, f.name, checked_setting(f, hint, getattr(self, f.name)))
        object.__setattr__(self, "rule", _checked_rule(self.algorithm, self.rule))
        values = _flat(self)
        for f, choice in self.unused():
            if values[f.name] != f.default:
                raise SettingError(_not_used(f, choice, values))
        if ":" in self.grid:
            from ..dynamics.grids import grid_by_name

            grid_by_name(self.grid)
        if self.value_replay > 1 and self.value_loss == "martingale":
            raise SettingError(
                f"value_replay is {self.value_replay} but value_loss {self.value_loss!r} is on-policy; "
                "use value_replay 1, or value_loss soft or log_probability."
            )
        if self.scored_samples > self.batch_size:
            raise SettingError(
                f"scored_samples is {self.scored_samples}, more than the {self.batch_size} samples of a rollout (batch_size); "
                "lower it, or take 0 for all of them."
            )
        if self.value not in ("network", "linear") and self.value_loss == "log_probability":
            raise SettingError(
                f"value is {self.value!r} but value_loss log_probability needs value network or linear; or use soft."
            )

    def unused(self) -> list[tuple[Field, str]]:
        """The settings that the choices do not use, each with the choice because of which it is not used."""
        fields = _fields(self.algorithm)
        found = _unused(self.algorithm, _flat(self))
        return [(fields[name], choice) for name, choice in found.items()]

    @property
    def surrogate(self) -> bool:
        """Whether a surrogate stands in for the reward: under the rule's gradient, or in the value."""
        return bool(_flat(self)["surrogate"])

    def uses(self, name: str) -> bool:
        """Whether the setting of this name, of the run or of its rule, does anything with these choices."""
        return name in _fields(self.algorithm) and all(f.name != name for f, _ in self.unused())

    def to_dict(self) -> dict[str, Any]:
        """The settings that are used, for JSON: those of the run by name, the rule's own as a dictionary `rule`."""
        idle = {f.name for f, _ in self.unused()}
        whole = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in idle}
        return {**whole, "rule": {name: value for name, value in self.rule.items() if name not in idle}}

    def times(self, schedule: Schedule, generator: torch.Generator | None = None, steps: int | None = None) -> Tensor:
        """The times of a path, [steps + 1], increasing.

        Args:
            schedule: of the model.
            generator: draws the times where `grid` is random; without one they are uniform, so that two models can be
                compared on the same times.
            steps: another number of steps than training's.
        """
        from ..dynamics.grids import grid_times

        return grid_times(self.grid, schedule, steps or self.steps, generator)

    def sde(self, schedule: Schedule) -> SDE:
        """The SDE of a model with this schedule, under the noise of training."""
        from ..dynamics.sde import NOISES, SDE

        return SDE(schedule, NOISES[self.noise](self.noise_scale))


def rule_fields(algorithm: str) -> list[tuple[Field, Any]]:
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


def setting_groups(algorithm: str) -> Iterator[tuple[str, list[tuple[Field, Any]]]]:
    """Heading and settings of each record, the run's in the order of its parts, the rule's last."""
    for record in RECORDS:
        yield record.heading, fields_of(record)
    yield f"the rule: {algorithm}", rule_fields(algorithm)


# --- changes ---------------------------------------------------------------------------------------------------------


def updated(
    config: Config,
    changes: Mapping[str, Any],
    source: str = "settings",
    below: Mapping[str, Any] | None = None,
) -> Config:
    """The config with some settings changed, its own or its rule's.

    Another choice brings its own settings and defaults: of what `config` holds, the settings that it does not use return
    to their default. Another algorithm also brings the settings of the run that its paper uses (`Rule.defaults`).

    Args:
        config: what is changed.
        changes: settings by name; `rule` may hold the rule's own.
        source: where the changes come from, for the messages.
        below: changes that `changes` go before, as a file's under the command line. Those that are not used are left
            out where `changes` hold a choice, and refused like the others where they hold none.
    Raises:
        SettingError: a key is unknown (with the nearest known), a value is not accepted, or a setting is not used by the
            choices (with those that use it).
    """
    if below:
        if _choices() & changes.keys():
            kept = usable(config, {**below, **changes}, source)
            below = {name: value for name, value in kept.items() if name in below}
        rules = [part["rule"] for part in (below, changes) if isinstance(part.get("rule"), Mapping)]
        changes = {**below, **changes, **({"rule": {k: v for part in rules for k, v in part.items()}} if rules else {})}
    values = _merged(config, changes, source)
    idle = _unused(values["algorithm"], _flat_of(values))
    given = {*changes, *(changes["rule"] if isinstance(changes.get("rule"), Mapping) else ())}
    fields = _fields(values["algorithm"])
    for name, choice in idle.items():
        if name in given:
            raise SettingError(f"{source}: {_not_used(fields[name], choice, _flat_of(values))}")
        if name in values:
            values[name] = fields[name].default
        else:
            values["rule"][name] = fields[name].default
    return Config(**values)


def usable(config: Config, changes: Mapping[str, Any], source: str = "settings") -> dict[str, Any]:
    """`changes` without the settings that the choices of `config` and of `changes` do not use, and other rules' own.

    For settings that nobody gives by hand for this rule: those of a run's file, of all rules of a comparison, of a search.
    """
    algorithm = str(changes.get("algorithm", config.algorithm))
    fields, foreign = _fields(algorithm), _owners()
    known = {name: value for name, value in changes.items() if name in fields or name not in foreign}
    if isinstance(known.get("rule"), Mapping):
        known["rule"] = {k: v for k, v in known["rule"].items() if k in fields or k not in foreign}
    values = _merged(config, known, source)
    idle = _unused(values["algorithm"], _flat_of(values))
    kept = {name: value for name, value in known.items() if name not in idle}
    if isinstance(kept.get("rule"), Mapping):
        kept["rule"] = {name: value for name, value in kept["rule"].items() if name not in idle}
    return kept


def from_stored(content: Mapping[str, Any], source: str = "config.json") -> Config:
    """The settings in a run's config.json, whichever version wrote it.

    Earlier versions stored settings that the run's choices did not use; these are left out.
    """
    return updated(Config(), usable(Config(), content, source), source)


def _merged(config: Config, changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Every field of the changed config, checked one by one; settings that are not used are still as given."""
    algorithm = changes.get("algorithm", config.algorithm)
    kind = rule_class(str(algorithm))
    own = [f.name for f in dataclasses.fields(Config)]
    of_rule = [f.name for f, _ in rule_fields(algorithm)]
    for key in changes:
        if key not in own and key not in of_rule:
            if owners := _owners().get(key):
                remedy = f"Leave out {key} {changes[key]!r}, or set algorithm to {owners[0]}."
                raise SettingError(f"{source}: {key} is a setting of {', '.join(owners)}, not of {algorithm}. {remedy}")
            raise SettingError(f"{source}: unknown key {key!r}{nearest_or_known(key, [*own, *of_rule])}")
    base: dict[str, Any] = {name: getattr(config, name) for name in own}
    if algorithm != config.algorithm:
        base |= {**kind.defaults, "rule": {}}
    rule = changes.get("rule", base["rule"])
    if isinstance(rule, Mapping):
        rule = {**rule, **{key: value for key, value in changes.items() if key in of_rule}}
    values = {**base, **{key: value for key, value in changes.items() if key in own}}
    for f, hint in fields_of(Config):
        values[f.name] = checked_setting(f, hint, values[f.name])
    return {**values, "rule": _checked_rule(algorithm, rule)}


def _checked_rule(algorithm: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise SettingError(f"rule is {given!r}; expected the settings of {algorithm} as `name: value` lines.")
    own = {f.name: (f, hint) for f, hint in rule_fields(algorithm)}
    for key in given:
        if key not in own:
            raise SettingError(f"{algorithm} has no setting {key!r}{nearest_or_known(key, own)}")
    return {name: checked_setting(f, hint, given.get(name, f.default)) for name, (f, hint) in own.items()}


# --- which settings the choices use ----------------------------------------------------------------------------------


def _fields(algorithm: str) -> dict[str, Field]:
    """Every setting by name, the run's and the rule's."""
    return {f.name: f for f, _ in [*fields_of(Config), *rule_fields(algorithm)]}


@functools.cache
def _owners() -> dict[str, list[str]]:
    """Of each setting that is a rule's own, the rules that have it."""
    from ..algorithms.registry import rules

    found: dict[str, list[str]] = {}
    for rule, kind in rules().items():
        for f, _ in fields_of(kind):
            found.setdefault(f.name, []).append(rule)
    return found


def _flat_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every choice by name: the settings of the run and of its rule, and the rule's traits."""
    kind = rule_class(values["algorithm"])
    traits = {trait: getattr(kind, trait) for trait in TRAITS}
    followed = traits["differentiates_reward"] and values["reward_gradient"] == "surrogate"
    surrogate = followed or (traits["fits_value"] and values["value"] == "surrogate")
    return {**values, **values["rule"], **traits, "surrogate": surrogate}


def _flat(config: Config) -> dict[str, Any]:
    return _flat_of({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def _unused(algorithm: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Name -> the choice because of which it is not used."""
    fields = _fields(algorithm)
    found = {name: unmet(name, fields, values) for name in fields}
    return {name: choice for name, choice in found.items() if choice is not None}


@functools.cache
def _choices() -> frozenset[str]:
    """The settings on which it depends which others are used."""
    from ..algorithms.registry import rules

    records: list[type] = [Config, *rules().values()]
    needs = [f.metadata["needs"] for record in records for f, _ in fields_of(record)]
    return frozenset({"algorithm", "reward_gradient", *(choice for need in needs for choice in need)})


def _not_used(f: Field, choice: str, values: Mapping[str, Any]) -> str:
    """X is a setting of A, B, not of C; and what to do."""
    allowed, users, now = f.metadata["needs"][choice], users_of(f, choice), values[choice]
    if choice == "surrogate":
        known = "reward_gradient" if values["differentiates_reward"] else "value"
        now, remedy = f"{known} {values[known]}", f"set {known} to surrogate"
    elif choice in TRAITS:
        now, remedy = values["algorithm"], f"set algorithm to {'ctrl' if 'ctrl' in users else users[0]}"
    elif isinstance(allowed, Above):
        now, remedy = f"{choice} {_word(now)}", f"set {choice} above {allowed.low:g}"
    else:
        now = f"{choice} {_word(now)}" if now != "" else f"no {choice}"
        remedy = f"set {choice} to {_word(allowed[0])}" if allowed[0] != "" else f"leave {choice} empty"
    return (
        f"{f.name} is a setting of {', '.join(users)}, not of {now}. "
        f"Leave out {f.name} {_word(values[f.name])}, or {remedy}."
    )


def users_of(f: Field, choice: str) -> list[str]:
    """In words, the values of a choice with which a setting is used; of a rule's trait, the rules that have it."""
    from ..algorithms.registry import rules

    allowed = f.metadata["needs"][choice]
    if choice == "surrogate":
        return ["reward_gradient surrogate", "value surrogate"]
    if choice in TRAITS:
        return [name for name, kind in rules().items() if getattr(kind, choice) in allowed]
    if isinstance(allowed, Above):
        return [f"{choice} above {allowed.low:g}"]
    if allowed == ("",):
        return [f"no {choice}"]
    return [f"{choice} {_word(allowed[0])}", *map(_word, allowed[1:])]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises SettingError with the file's name and what to do."""
    path = Path(path)
    if not path.is_file():
        raise SettingError(
            f"config file {str(path)!r} does not exist. `scoreact train RECIPE --print-config` writes one."
        )
    try:
        text = read_text(path)
    except OSError as error:
        raise SettingError(f"config file {str(path)!r} cannot be read ({error.strerror}).") from None
    content = (parsed_json if path.suffix == ".json" else parsed_yaml)(text, f"config file {str(path)!r}")
    if not isinstance(content, dict):
        raise SettingError(f"config file {str(path)!r} holds {type(content).__name__}; expected `key: value` lines.")
    return content
