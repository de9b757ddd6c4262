"""Settings as text: their help, and a file that holds them all."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from ..support.settings import fields_of
from ..training.config import Config, rule_fields


def setting_help(field: dataclasses.Field[Any], default: Any) -> str:
    """What a setting is, its range and its default, in one line of help."""
    low, high, above = field.metadata["low"], field.metadata["high"], field.metadata["above"]
    bounds = [f"{'above' if above else 'at least'} {low:g}"] * (low > -math.inf)
    bounds += [f"at most {high:g}"] * (high < math.inf)
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{field.metadata['help']} [{', '.join([*bounds, f'default {shown}'])}]"


def setting_metavar(field: dataclasses.Field[Any], hint: Any) -> str:
    """int, float, str, or the known values of a choice."""
    known = field.metadata["known"]() if field.metadata["known"] else typing.get_args(hint)
    return "{" + ",".join(known) + "}" if known else str(hint.__name__).upper()


def config_yaml(config: Config, recipe: str, options: Mapping[str, Any], reward: str | None) -> str:
    """A file for `train RECIPE --config`: every setting with its meaning behind it."""

    def value(content: Any) -> str:
        return yaml.safe_dump(content, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()

    lines = [f"# scoreact train {recipe} --config THIS_FILE"]
    settings = {**config.to_dict(), **config.rule}
    for field, _ in [*fields_of(Config), *rule_fields(config.algorithm)]:
        setting = f"{field.name}: {value(settings[field.name])}"
        lines.append(f"{setting:<36}  # {field.metadata['help']}")
    lines.append(f"options: {value(dict(options))}")
    if reward is not None:
        lines.append(f"reward: {value(reward)}")
    return "\n".join(lines)
