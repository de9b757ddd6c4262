"""Settings as text: the page of the documentation is what the records say; every help text is one short sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scoreact.algorithms.registry import rules
from scoreact.cli.settings_text import KL, config_yaml, setting_help, settings_page
from scoreact.support.settings import fields_of
from scoreact.training.config import Config, rule_fields, updated

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_what_the_code_says() -> None:
    remedy = "the page is old; write it anew by `python -m scoreact.cli.settings_text > docs/settings.md`"
    assert PAGE.read_text(encoding="utf-8") == settings_page(), remedy


def test_the_page_names_every_setting_and_the_words_for_path_kl_first() -> None:
    page = settings_page()
    for rule in rules():
        for field, _ in [*fields_of(Config), *rule_fields(rule)]:
            assert f"| `{field.name}` | " in page
    for word, _, _ in KL:
        assert page.index(f"| `{word}` |") < page.index("## The run")
    words = {f.name for rule in rules() for f, _ in [*fields_of(Config), *rule_fields(rule)]}
    assert {word for word in words if "kl" in word.split("_")} <= {word for word, _, _ in KL}


@pytest.mark.parametrize("rule", list(rules()))
def test_help_texts_are_short_and_begin_with_their_subject(rule: str) -> None:
    for field, _ in [*fields_of(Config), *rule_fields(rule)]:
        text = field.metadata["help"]
        assert len(text) <= 110, text
        assert text[0].isupper(), text
        assert not text.endswith("."), text


def test_help_says_which_choice_uses_a_setting() -> None:
    fields = {f.name: f for f, _ in fields_of(Config)}
    assert setting_help(fields["value_steps"], 15).endswith("[at least 0, default 15, with value network, residual]")
    assert setting_help(fields["kl_weight"], 0.5).endswith("(beta in the papers) [above 0, default 0.5]")


def test_a_printed_config_holds_what_is_used_by_part() -> None:
    config = updated(Config(), {"value": "linear", "exploration": "gaussian"})
    text = config_yaml(config, "gaussian", {"dim": 2}, "quadratic")
    found = yaml.safe_load(text)
    assert "value_steps" not in found
    assert found["exploration_scale"] == 0.1
    assert (found.pop("options"), found.pop("reward")) == ({"dim": 2}, "quadratic")
    assert updated(Config(), found) == config
    headings = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    assert headings[1:] == [
        "the run", "paths", "policy update", "value", "evaluation and limits", "the rule: ctrl", "the problem",
    ]  # fmt: skip
    assert "# value" not in config_yaml(updated(config, {"algorithm": "ddpo"}), "gaussian", {}, None).splitlines()
