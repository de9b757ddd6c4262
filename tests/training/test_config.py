"""Settings: every range, type and unknown key is refused in a sentence with the value and the remedy."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from scoreact.algorithms.registry import rules
from scoreact.support.settings import fields_of
from scoreact.training.config import Config, read, rule_fields, updated

# each with settings under which those that need a choice are used
USED: dict[str, dict[str, Any]] = {
    "exploration_scale": {"exploration": "gaussian"},
    "value_replay": {"value_loss": "soft"},
}
HINTS = typing.get_type_hints(Config)
FIELDS = [f for f, _ in fields_of(Config)]
NUMBERS = [f for f in FIELDS if HINTS[f.name] in (int, float)]
CHOICES = [f for f in FIELDS if typing.get_args(HINTS[f.name])]


def refusal(**settings: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is what each test looks at)
        Config(**settings)
    return str(caught.value)


@pytest.mark.parametrize("name", [f.name for f in FIELDS])
def test_every_setting_says_what_it_is(name: str) -> None:
    field = next(f for f in FIELDS if f.name == name)
    assert len(field.metadata["help"]) > 5
    assert HINTS[name] in (int, float, str) or typing.get_args(HINTS[name])


@pytest.mark.parametrize("rule", list(rules()))
def test_every_setting_of_a_rule_says_what_it_is_and_has_a_good_default(rule: str) -> None:
    for field, hint in rule_fields(rule):
        assert len(field.metadata["help"]) > 5
        assert hint in (int, float, str, bool) or typing.get_args(hint)
        assert field.name not in HINTS, "one word on the command line, one meaning"
    assert updated(Config(), {"algorithm": rule}).algorithm == rule


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_numbers_below_their_range_are_refused(field: Any) -> None:
    low, above = field.metadata["low"], field.metadata["above"]
    assert math.isfinite(low), "every number of a run has a lower end"
    value = low if above else low - 1
    said = refusal(**{field.name: value})
    assert said.startswith(f"{field.name} is {HINTS[field.name](value)}; it must be ")
    assert f"{'above' if above else 'at least'} {low:g}" in said
    assert field.metadata["help"] in said


@pytest.mark.parametrize("field", [f for f in NUMBERS if not f.metadata["above"]], ids=lambda f: f.name)
def test_the_low_end_itself_is_accepted(field: Any) -> None:
    low = field.metadata["low"]
    assert getattr(Config(**{**USED.get(field.name, {}), field.name: low}), field.name) == low


@pytest.mark.parametrize("field", [f for f in NUMBERS if f.metadata["high"] < math.inf], ids=lambda f: f.name)
def test_numbers_above_their_range_are_refused(field: Any) -> None:
    high = field.metadata["high"]
    assert f"at most {high:g}" in refusal(**{field.name: high + 1})
    assert getattr(Config(**{field.name: high}), field.name) == high


def test_ranges_are_where_they_should_be() -> None:
    """Written out: a range that moves by mistake is not found by reading the range."""
    ends = {f.name: (f.metadata["low"], f.metadata["high"], f.metadata["above"]) for f in NUMBERS}
    assert ends["iterations"] == (1, math.inf, False)
    assert ends["batch_size"] == (2, math.inf, False)
    assert ends["kl_weight"] == (0, math.inf, True)
    assert ends["learning_rate"] == (0, math.inf, True)
    assert ends["steps"] == (1, math.inf, False)
    assert ends["decay_from"] == (0, 1, False)
    assert ends["average"][1] < 1


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
@pytest.mark.parametrize("value", ["many", None, True, [1]], ids=str)
def test_numbers_of_another_type_are_refused(field: Any, value: Any) -> None:
    said = refusal(**{field.name: value})
    assert said.startswith(f"{field.name} is {value!r}")
    assert "expected" in said
    assert field.metadata["help"] in said


@pytest.mark.parametrize("name", [f.name for f in NUMBERS if HINTS[f.name] is int])
def test_whole_numbers_are_not_rounded(name: str) -> None:
    assert "expected int" in refusal(**{name: 2.5})


@pytest.mark.parametrize("name", [f.name for f in NUMBERS if HINTS[f.name] is float])
def test_nan_is_refused(name: str) -> None:
    assert f"{name} is nan" in refusal(**{name: math.nan})
    assert f"{name} is inf" in refusal(**{name: math.inf})
    assert isinstance(getattr(Config(), name), float), "or two equal configs would be written differently"


@pytest.mark.parametrize("field", CHOICES, ids=lambda f: f.name)
def test_choices_name_the_known_ones_and_the_nearest(field: Any) -> None:
    known = typing.get_args(HINTS[field.name])
    said = refusal(**{field.name: "zzz"})
    assert said == f"{field.name} is 'zzz'; known: {', '.join(known)}."
    assert refusal(**{field.name: known[-1][:-1] + "_"}).endswith(f" Did you mean {known[-1]!r}?")
    for value in known:
        assert getattr(Config(**{field.name: value}), field.name) == value


def test_a_short_word_finds_a_long_name() -> None:
    assert refusal(solver="eulr").endswith("Did you mean 'euler_maruyama'?")


def test_device_is_a_word() -> None:
    assert refusal(device=0) == "device is 0 (int); expected str (Where to compute: auto, cpu, cuda, cuda:N or mps)."


def test_text_that_yaml_left_as_text_becomes_a_number() -> None:
    config = Config(learning_rate="1e-4", kl_weight=2)  # type: ignore[arg-type]
    assert (config.learning_rate, config.kl_weight) == (1e-4, 2.0)
    assert isinstance(config.kl_weight, float)


def test_replay_of_old_paths_needs_the_soft_loss() -> None:
    assert refusal(value_replay=4).startswith("value_replay is 4 but value_loss 'martingale' is on-policy; use")
    assert Config(value_replay=4, value_loss="soft").value_replay == 4


def test_updated_names_the_source_the_key_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^mine\.yaml: unknown key 'batchsize'; did you mean 'batch_size'\?$"):
        updated(Config(), {"batchsize": 3}, "mine.yaml")
    with pytest.raises(
        ValueError,
        match=r"^settings: unknown key 'zzz'\. Known: algorithm, rule, seed, .*, reuse_reference, .*, ratio_weight, advantage\.$",
    ):
        updated(Config(), {"zzz": 3})
    changed = updated(Config(), {"batch_size": 3, "steps": 4})
    assert (changed.batch_size, changed.steps, changed.seed) == (3, 4, Config().seed)


def test_a_rules_settings_are_settings() -> None:
    config = updated(Config(), {"clip_range": "0.5"})
    assert config.rule["clip_range"] == 0.5
    assert config.rule["trace"] == 1.0, "complete, so that the saved config says everything"
    assert updated(config, {"steps": 3}).rule == config.rule
    with pytest.raises(
        ValueError, match=r"^trace is 2\.0; it must be at least 0 and at most 1 \(Lambda of generalised"
    ):
        updated(config, {"trace": 2.0})
    with pytest.raises(ValueError, match=r"^ctrl has no setting 'clip_rang'; did you mean 'clip_range'\?$"):
        Config(rule={"clip_rang": 1.0})
    with pytest.raises(ValueError, match=r"^rule is 3; expected the settings of ctrl as"):
        Config(rule=3)  # type: ignore[arg-type]


def test_another_algorithm_brings_its_own_settings() -> None:
    config = updated(Config(), {"clip_range": 0.5})
    other = updated(config, {"algorithm": "ctrl_pathwise", "transitions": 7})
    assert other.rule == {**Config(algorithm="ctrl_pathwise").rule, "transitions": 7}
    with pytest.raises(
        ValueError,
        match=r"^settings: transitions is a setting of ctrl_pathwise, not of ctrl\. Leave out transitions 7, or set algorithm to ctrl_pathwise\.$",
    ):
        updated(config, {"transitions": 7})
    with pytest.raises(ValueError, match=r"^algorithm is 'ctrl_tpro'; known: .*\. Did you mean 'ctrl_trpo'\?$"):
        updated(config, {"algorithm": "ctrl_tpro"})


def test_a_config_survives_json_and_yaml(tmp_path: Path) -> None:
    config = Config(learning_rate=1e-7, grid="karras", seed=5)
    (tmp_path / "a.json").write_text(json.dumps(config.to_dict()))
    assert updated(Config(), read(tmp_path / "a.json")) == config
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-7\ngrid: karras  # a word\nseed: 5\n")
    assert updated(Config(), read(tmp_path / "a.yaml")) == config


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.yaml", None, "does not exist. `scoreact train RECIPE --print-config` writes one."),
        ("broken.yaml", "steps: [1, 2\nseed: 3", "cannot be read: while parsing"),
        ("broken.json", '{"steps": 1,', "cannot be read: Expecting property name"),
        ("list.yaml", "- 1\n- 2\n", "holds list; expected `key: value` lines."),
        ("empty.yaml", "", "holds NoneType; expected `key: value` lines."),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="config file") as caught:
        read(path)
    assert said in str(caught.value)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(ValueError, match=r"a\.yaml' cannot be read: "):
        read(tmp_path / "a.yaml")
