"""Settings as text: their help, a file that holds them all, and the page of the documentation that lists them.

python -m scoreact.cli.settings_text > docs/settings.md
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ..support.settings import fields_of, range_of
from ..training.config import RECORDS, TRAITS, Config, rule_fields, setting_groups, users_of


def setting_help(field: dataclasses.Field[Any], default: Any) -> str:
    """What a setting is, its range, its default and the choices that use it, in one line of help."""
    # not which rules: only the rule's own are shown
    users = [", ".join(users_of(field, choice)) for choice in field.metadata["needs"] if choice not in TRAITS]
    notes = [*range_of(field), f"default {_shown(default)}", *(f"with {words}" for words in users)]
    return f"{field.metadata['help']} [{', '.join(notes)}]"


def setting_metavar(field: dataclasses.Field[Any], hint: Any) -> str:
    """int, float, str, or the known values of a choice."""
    known = field.metadata["known"]() if field.metadata["known"] else typing.get_args(hint)
    return "{" + ",".join(known) + "}" if known else str(hint.__name__).upper()


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def config_yaml(config: Config, recipe: str, options: Mapping[str, Any], reward: str | None) -> str:
    """A file for `train RECIPE --config`: every setting that the choices use, with its meaning behind it."""
    lines = [f"# scoreact train {recipe} --config THIS_FILE"]
    settings = {**config.to_dict(), **config.to_dict()["rule"]}
    for heading, fields in setting_groups(config.algorithm):
        used = [field for field, _ in fields if field.name in settings]
        if used:
            lines += ["", f"# {heading}"]
        lines += [f"{f'{f.name}: {_yaml(settings[f.name])}':<36}  # {f.metadata['help']}" for f in used]
    lines += ["", "# the problem", f"options: {_yaml(dict(options))}"]
    if reward is not None:
        lines.append(f"reward: {_yaml(reward)}")
    return "\n".join(lines)


# --- the page --------------------------------------------------------------------------------------------------------

INTRODUCTION = """# Settings

<!-- Written by `python -m scoreact.cli.settings_text`; a test holds this page to the code. Change the code, not the page. -->

A setting has one name everywhere: `--learning-rate` on the command line, `learning_rate:` in a YAML file,
`finetune(..., learning_rate=...)` in Python. `scoreact train RECIPE --print-config` writes all that a run uses, with the
recipe's own defaults; this page shows the library's.

A choice brings its own settings. One that the choice does not use is refused, with the choices that use it:
`value_steps is a setting of value network, residual, not of value linear.` Another rule also brings the settings
of the run that its paper uses. Defaults of a recipe that the choice does not use are left out.
"""
KL = (
    ("kl_weight", "What does a nat cost?",
     "The price in the objective J = reward - kl_weight x path KL, and in J*, the best J that there is. Most rules train "
     "against this price."),
    ("target_kl", "How many nats shall the run spend?",
     "Steers the price *in training* until the path KL is about this. J keeps `kl_weight`. 0 is off."),
    ("kl_limit", "When has the run failed?",
     "A rollout with a larger path KL ends the run as diverged. It is a fuse, not a target."),
    ("max_kl", "How far may one iteration go?",
     "Bounds the path KL between the policy before and after an iteration's update. A longer step is shortened."),
    ("kl_states", "Where is that step measured?",
     "At so many states. 0 turns the measuring and the bound off."),
    ("trust", "How close does the loss keep to the policy that drew the paths?",
     "Weight, in units of `kl_weight`, of the squared distance to it inside the loss."),
    ("kl_share", "How much of the price does the loss hold?",
     "Weight, in units of `kl_weight`, of the term that pulls towards the pretrained model. 0 leaves it out."),
    ("reference_kl", "Does the loss hold the price at all?", "Switches that term on or off."),
)  # fmt: skip
TRAIT_WORDS = {
    "fits_value": "rules that fit a value",
    "minimiser": "rules that take Adam steps",
    "transitions_only": "rules that learn from steps of paths",
}


def settings_page() -> str:
    """docs/settings.md: every setting of the run and of every rule, from the records."""
    from ..algorithms.registry import rules

    parts = [INTRODUCTION, _kl_table()]
    for record in RECORDS:
        title = f"{record.heading[0].upper()}{record.heading[1:]}"
        parts += [f"## {title}\n", f"{record.__doc__}\n", _table_of(fields_of(record))]
    parts.append("Some settings are used by some rules only:\n")
    for trait, words in TRAIT_WORDS.items():
        field = next(f for record in RECORDS for f, _ in fields_of(record) if trait in f.metadata["needs"])
        parts.append(f"- {words}: {', '.join(f'`{rule}`' for rule in users_of(field, trait))}")
    parts.append("\n## Settings of one rule\n")
    for name, kind in rules().items():
        parts.append(f"### {name}\n")
        if kind.defaults:
            changed = ", ".join(f"`{key}` is {value}" for key, value in kind.defaults.items())
            parts.append(f"Under this rule, unless told otherwise, {changed}.\n")
        parts.append(_table_of(rule_fields(name)))
    return "\n".join(parts)


def _kl_table() -> str:
    from ..algorithms.registry import rules

    lines = [
        "## Eight words for path KL\n",
        "The path KL is the Kullback-Leibler divergence, in nats, of the tuned model's paths from the pretrained model's. It",
        "is zero before training. Eight settings have to do with it. Each answers another question.\n",
        "| setting | question | what it does | of |",
        "| --- | --- | --- | --- |",
    ]
    for word, question, answer in KL:
        owners = ", ".join(f"`{name}`" for name in rules() if word in {f.name for f, _ in rule_fields(name)})
        lines.append(f"| `{word}` | {question} | {answer} | {owners or 'the run'} |")
    return "\n".join(lines) + (
        "\n\nTo stay closer to the pretrained model, raise `kl_weight`. To make training steadier, lower `max_kl`.\n"
    )


def _table_of(fields: Iterable[tuple[dataclasses.Field[Any], Any]]) -> str:
    lines = ["| setting | default | range | meaning | used with |", "| --- | --- | --- | --- | --- |"]
    for field, hint in fields:
        known = field.metadata["known"]() if field.metadata["known"] else typing.get_args(hint)
        span = ", ".join(f"`{word}`" for word in known) or " and ".join(range_of(field)) or KINDS[hint]
        default = f"`{_shown(field.default)}`" if field.default != "" else "empty"
        needs = field.metadata["needs"]
        users = [TRAIT_WORDS.get(choice) or ", ".join(users_of(field, choice)) for choice in needs]
        cells = [f"`{field.name}`", default, span, field.metadata["help"], "; ".join(users) or "all"]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


KINDS = {bool: "true or false", str: "text"}


if __name__ == "__main__":
    print(settings_page(), end="")
