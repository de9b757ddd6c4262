"""Settings: every range, type and unknown key is refused in a sentence with the value and the remedy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from scoreact.algorithms.registry import rules
from scoreact.support.errors import SettingError
from scoreact.support.settings import fields_of
from scoreact.training.config import TRAITS, Config, from_stored, read, rule_fields, updated, usable

# each with settings under which those that need a choice are used
USED: dict[str, dict[str, Any]] = {
    "exploration_scale": {"exploration": "gaussian"},
    "value_replay": {"value_loss": "soft"},
    "reward_gradient": {"algorithm": "adjoint_matching"},
    "surrogate_target": {"algorithm": "adjoint_matching", "reward_gradient": "surrogate"},
    "surrogate_features": {"algorithm": "ctrl_pathwise", "value": "surrogate"},
    "surrogate_decoder": {"value": "surrogate"},
    "surrogate_prompts": {"value": "surrogate"},
    "scored_samples": {"algorithm": "draft", "reward_gradient": "surrogate"},
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
    assert HINTS[name] in (int, float, str, bool) or typing.get_args(HINTS[name])


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
    assert f"at most {high}" in refusal(**{field.name: high + 1})
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
        assert getattr(Config(**{**USED.get(field.name, {}), field.name: value}), field.name) == value


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
        match=r"^settings: unknown key 'zzz'\. Known: algorithm, rule, seed, .*, trust, .*, advantage\.$",
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
        match=r"^settings: transitions is a setting of ctrl_pathwise, not of ctrl\. Leave out transitions 7, or set "
        r"algorithm to ctrl_pathwise\.$",
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


# --- which settings the choices use ----------------------------------------------------------------------------------

WITHOUT_VALUE = {"algorithm": "ddpo"}
NETWORK_ONLY = ("value_learning_rate", "value_steps", "value_first_steps", "value_batch_size", "value_weight_decay")
# choices, a setting that they do not use, and the sentence's end
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *(
        ({"value": "linear"}, {name: 3}, "of value network, residual, not of value linear.")
        for name in NETWORK_ONLY
    ),
    ({"value": "linear"}, {"value_inputs": "x"}, "of value network, not of value linear."),
    ({"value": "residual"}, {"value_inputs": "x"}, "of value network, not of value residual."),
    ({"value": "surrogate"}, {"value_inputs": "x"}, "of value network, not of value surrogate."),
    *(
        (WITHOUT_VALUE, {name: value}, "of ctrl, ctrl_pathwise, ctrl_trpo, dpok, q_learning, not of ddpo.")
        for name, value in [("value", "linear"), ("value_loss", "soft"), ("value_replay", 1), ("value_steps", 3)]
    ),
    ({"algorithm": "ctrl_pathwise"}, {"clip_range": 0.5}, "of ctrl, ddpo, dpok, flow_grpo, not of ctrl_pathwise."),
    ({"algorithm": "ctrl_pathwise"}, {"trace": 0.5}, "of ctrl, ctrl_trpo, q_learning, not of ctrl_pathwise."),
    ({"algorithm": "ctrl_pathwise"}, {"ratio_weight": 0.5}, "of ctrl, ctrl_trpo, not of ctrl_pathwise."),
    ({"algorithm": "ctrl_pathwise"}, {"advantage": "gae"}, "of ctrl, ctrl_trpo, not of ctrl_pathwise."),
    ({"algorithm": "ctrl_pathwise"}, {"loss_clamp": 2.0}, "of form clamped_displacement, not of form regression."),
    ({"algorithm": "ctrl_pathwise"}, {"displacement_clamp": 2.0}, "of form clamped_displacement, not of form regression."),
    ({"ratio_weight": 0.0}, {"clip_range": 2.0}, "of ratio_weight above 0, not of ratio_weight 0.0."),
    *(
        ({"algorithm": "ctrl_trpo"}, {name: 3}, ", rwr, not of ctrl_trpo.")
        for name in ("learning_rate", "epochs", "minibatch_size", "accumulate", "max_gradient_norm", "kl_states")
    ),
    *(({"algorithm": "rwr"}, {name: 3}, ", q_learning, not of rwr.") for name in ("max_kl", "kl_states")),
    ({"kl_states": 0}, {"max_kl": 0.3}, "of kl_states above 0, not of kl_states 0."),
    ({}, {"exploration_scale": 0.3}, "of exploration gaussian, epsilon_greedy, not of exploration none."),
    ({}, {"reward_gradient": "surrogate"}, "of adjoint_matching, draft, not of ctrl."),
    ({"algorithm": "draft"}, {"surrogate_target": "logit"},
     "of reward_gradient surrogate, value surrogate, not of reward_gradient exact."),
    ({"value": "linear"}, {"scored_samples": 4},
     "of reward_gradient surrogate, value surrogate, not of value linear."),
    ({"value": "surrogate"}, {"value_steps": 4}, "of value network, residual, not of value surrogate."),
    ({"guard": "off"}, {"least_diversity": 0.3}, "of guard warn, stop, not of guard off."),
    ({"guard": "off"}, {"patience": 3}, "of guard warn, stop, not of guard off."),
    ({"algorithm": "ddpo", "estimator": "score_function"}, {"clip_range": 3},
     "of estimator importance, not of estimator score_function."),
    ({"algorithm": "flow_grpo"}, {"window_until": 0.3}, "of window above 0, not of window 0."),
    ({"algorithm": "flow_grpo", "window": 2}, {"window_iterations": 3},
     "of window_order sliding, not of window_order random."),
    ({"algorithm": "diffusion_nft", "old_most": 0}, {"old_rise": 0.1}, "of old_most above 0, not of old_most 0.0."),
    ({"algorithm": "dpo", "pairs_file": "a"}, {"labels": "hard"}, "of no pairs_file, not of pairs_file a."),
    ({"algorithm": "dpo", "pairs": "all"}, {"rounds": 3}, "of pairs random, not of pairs all."),
    ({"algorithm": "draft", "variant": "refl"}, {"renoise": 2}, "of variant draft, alignprop, not of variant refl."),
    ({"algorithm": "rwr", "samples": "policy"}, {"replay": 3}, "of samples reference, not of samples policy."),
    ({"algorithm": "rwr", "samples": "policy"}, {"baseline": "denoised"}, "of samples reference, not of samples policy."),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "given", "said"), REFUSED, ids=lambda part: str(part)[:60])
def test_what_a_choice_does_not_use_is_refused_where_it_is_given(
    choices: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    [(name, value)] = given.items()
    with pytest.raises(SettingError) as caught:
        updated(Config(), {**choices, **given}, "mine.yaml")
    text = str(caught.value)
    assert text.startswith(f"mine.yaml: {name} is a setting of ")
    assert f"{said} Leave out {name} " in text
    assert str(value) in text
    assert text.endswith(".")
    assert ", or " in text.partition("Leave out")[2], "what to do instead"
    config = updated(Config(), choices)
    assert not config.uses(name)
    assert name not in {**config.to_dict(), **config.to_dict()["rule"]}


@pytest.mark.parametrize(("choices", "given"), [row[:2] for row in REFUSED], ids=lambda part: str(part)[:60])
def test_what_a_choice_does_not_use_is_dropped_where_nobody_gave_it(
    choices: dict[str, Any], given: dict[str, Any]
) -> None:
    """As settings of all runs of a comparison, and as an old run's config.json had them."""
    assert updated(Config(), usable(Config(), {**choices, **given})) == updated(Config(), choices)
    assert from_stored({**choices, **given}) == updated(Config(), choices)


def test_the_remedy_of_a_refusal_is_taken() -> None:
    """What the sentence says is done: leaving it out, and each other choice."""
    for choices, given, _ in REFUSED:
        with pytest.raises(SettingError) as caught:
            updated(Config(), {**choices, **given})
        remedy = str(caught.value).rpartition(", or ")[2].removesuffix(".")
        if remedy.startswith("set algorithm to "):
            other = {"algorithm": remedy.removeprefix("set algorithm to ")}
        elif " to " in remedy:
            choice, _, word = remedy.removeprefix("set ").partition(" to ")
            other = {**choices, choice: word}
        elif " above " in remedy:
            other = {**choices, remedy.removeprefix("set ").partition(" above ")[0]: 1}
        else:
            other = {**choices, remedy.removeprefix("leave ").removesuffix(" empty"): ""}
        assert updated(Config(), {**other, **given}).uses(next(iter(given))), (choices, given, remedy)


def test_every_need_names_a_choice_that_there_is() -> None:
    for rule in rules():
        names = {f.name for f, _ in [*fields_of(Config), *rule_fields(rule)]} | {*TRAITS, "surrogate"}
        for f, _ in [*fields_of(Config), *rule_fields(rule)]:
            assert set(f.metadata["needs"]) <= names


def test_no_more_samples_are_scored_than_drawn() -> None:
    said = refusal(value="surrogate", scored_samples=9, batch_size=8)
    assert said.startswith("scored_samples is 9, more than the 8 samples of a rollout (batch_size); lower it")
    assert Config(value="surrogate", scored_samples=8, batch_size=8).scored_samples == 8


def test_a_choice_that_is_not_used_counts_with_its_default() -> None:
    """kl_states 0 would end the bound; a rule with natural gradients does not read it, and its radius is a setting."""
    free = updated(Config(), {"kl_states": 0})
    assert not free.uses("max_kl")
    assert updated(free, {"algorithm": "ctrl_trpo", "max_kl": 0.3}).max_kl == 0.3


def test_settings_made_by_hand_are_checked_too() -> None:
    said = refusal(value="linear", value_steps=3)
    assert said == (
        "value_steps is a setting of value network, residual, not of value linear. "
        "Leave out value_steps 3, or set value to network."
    )
    assert refusal(algorithm="ddpo", value_steps=3).endswith("Leave out value_steps 3, or set algorithm to ctrl.")


def test_a_recipes_settings_of_another_choice_are_left_out() -> None:
    from scoreact.recipes.base import recipes

    bright = recipes()["bright"].config
    assert bright.value_steps == 10
    linear = updated(bright, {"value": "linear"})
    assert (linear.value_steps, linear.value_loss, linear.value_replay) == (15, "log_probability", 20)
    assert "value_steps" not in linear.to_dict()
    residual = updated(bright, {"value": "residual", "value_loss": "soft"})
    assert (residual.value_steps, residual.uses("value_inputs")) == (10, False), "what it shares with a network stays"
    ddpo = updated(bright, {"algorithm": "ddpo"})
    assert not [name for name in ddpo.to_dict() if name.startswith("value")]
    with pytest.raises(SettingError, match=r"^settings: value_steps is a setting of value network"):
        updated(linear, {"value_steps": 10})


def test_an_old_runs_config_is_read() -> None:
    """As 0.1.0 wrote it for `train plain --value linear`: every field, and four of ctrl's under ctrl_pathwise."""
    from scoreact.recipes.base import recipes

    plain = updated(recipes()["plain"].config_for({"algorithm": "ctrl_pathwise"}), {"value": "linear", "seed": 3})
    old = {f.name: getattr(plain, f.name) for f in FIELDS} | {
        "value_inputs": "x_data_hat", "value_learning_rate": 3e-3, "value_steps": 10, "value_first_steps": 400,
        "value_weight_decay": 0.01,
        "rule": {**plain.rule, "clip_range": 1.0, "trace": 1.0, "ratio_weight": 1.0, "advantage": "gae"},
    }  # fmt: skip
    del old["rule"]["displacement_clamp"], old["rule"]["loss_clamp"]  # were no settings
    found = from_stored(json.loads(json.dumps(old)), "runs/a/config.json")
    assert found == plain
    assert found.to_dict() == plain.to_dict(), "so that it resumes"
    assert from_stored(json.loads(json.dumps(plain.to_dict()))) == plain
    with pytest.raises(SettingError, match=r"^runs/a/config\.json: unknown key 'value_stepz'; did you mean"):
        from_stored({"value_stepz": 3}, "runs/a/config.json")
    with pytest.raises(SettingError, match=r"^ctrl_pathwise has no setting 'forse'; did you mean 'force'"):
        from_stored({"algorithm": "ctrl_pathwise", "rule": {"forse": 1.0}})


@pytest.mark.parametrize("rule", list(rules()))
def test_what_a_config_says_of_itself_makes_it_again(rule: str) -> None:
    config = updated(Config(), {"algorithm": rule})
    assert updated(Config(), json.loads(json.dumps(config.to_dict()))) == config


def test_the_command_line_goes_before_a_file() -> None:
    file = {"value_steps": 3, "value": "network", "steps": 7}
    linear = updated(Config(), {"value": "linear"}, below=file)
    assert (linear.value, linear.steps, linear.uses("value_steps")) == ("linear", 7, False)
    ddpo = updated(Config(), {"algorithm": "ddpo"}, below={**file, "rule": {"trace": 0.5}})
    assert (ddpo.algorithm, ddpo.steps) == ("ddpo", 7)
    with pytest.raises(SettingError, match=r"^mine: value_steps is a setting of value network"):
        updated(Config(), {"seed": 3}, "mine", below={"value_steps": 3, "value": "linear"})  # the file's own mistake
    with pytest.raises(SettingError, match=r"^mine: value_steps is a setting of value network"):
        updated(Config(), {"value_steps": 3, "value": "linear"}, "mine", below=file)
    both = updated(Config(), {"rule": {"trust": 0.5}}, below={"rule": {"trace": 0.5}, "ratio_weight": 0.3})
    assert (both.rule["trust"], both.rule["trace"], both.rule["ratio_weight"]) == (0.5, 0.5, 0.3)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["uniform", "karras", "random"])
def test_times_of_a_path(grid: str) -> None:
    import torch

    from scoreact.dynamics.grids import GRIDS
    from scoreact.dynamics.schedule import RectifiedFlow

    config, schedule = Config(grid=grid, steps=6), RectifiedFlow()
    fixed = GRIDS["uniform" if grid == "random" else grid](schedule, 6, None)
    assert torch.equal(config.times(schedule), fixed)
    drawn = config.times(schedule, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, GRIDS[grid](schedule, 6, torch.Generator().manual_seed(3)))
    assert torch.equal(drawn, fixed) == (grid != "random")
    assert len(config.times(schedule, steps=4)) == 5


def test_the_sde_has_the_settings_noise() -> None:
    import torch

    from scoreact.dynamics.schedule import RectifiedFlow

    sde, t = Config(noise="constant", noise_scale=0.7).sde(RectifiedFlow()), torch.tensor([0.2, 0.5])
    assert torch.equal(sde.diffusion(t), torch.full((2,), 0.7))


def test_settings_are_read_without_torch() -> None:
    code = "import sys; from scoreact.training.config import Config, updated, RECORDS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.yaml", None, "does not exist. `scoreact train RECIPE --print-config` writes one."),
        ("broken.yaml", "steps: [1, 2\nseed: 3", "cannot be read as YAML: while parsing"),
        ("broken.json", '{"steps": 1,', "is no JSON (Expecting property name"),
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
    with pytest.raises(ValueError, match=r"a\.yaml, line 1 is not UTF-8"):
        read(tmp_path / "a.yaml")
