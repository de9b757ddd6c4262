"""The commands `preferences ...`: comparisons in the forms of other programs, in and out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.source import build_policy, open_source
from .parser import Parser

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("pickapic", "imagereward", "trl", "dpo")


def import_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="what it names lies in its folder")
    add(
        "--format",
        choices=FORMS,
        required=True,
        help="columns of Pick-a-Pic, ImageReward's JSON, TRL's lines, or pairs of dpo",
    )
    add("--out", type=Path, default=Path("preferences.db"), metavar="STORE", help="to add to [default preferences.db]")
    add("--question", default="better", metavar="NAME|TEXT", help="to which these are the answers [default better]")
    add("--flip", action="store_true", help="label 1 marks the worse one")
    add("--model", metavar="RUN_DIR|RECIPE", help="that drew the states of dpo")
    parser.belongs("flip", "format", "pickapic")
    parser.belongs("model", "format", "dpo")


def import_(options: argparse.Namespace) -> int:
    from ..feedback.exchange import import_answers
    from ..feedback.store import Store

    decode: Callable[[Tensor], Tensor] | None = None
    if options.model is not None:
        decode = build_policy(open_source(options.model))[0].decode
    with Store(options.out) as store:
        count, notes = import_answers(
            store, options.file, options.format, options.question, options.flip, decode
        )  # fmt: skip
    _say(notes)
    print(f"{count} answers of {options.file} are in {options.out}")
    return 0


def export_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("store", metavar="STORE", type=Path)
    add(
        "--format",
        choices=FORMS,
        required=True,
        help="columns of Pick-a-Pic, ImageReward's JSON, TRL's lines, or pairs of dpo",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="a new file; pictures go into a folder beside it")
    add("--question", metavar="NAME|TEXT", help="only answers to this one")


def export(options: argparse.Namespace) -> int:
    from ..feedback.exchange import export_answers
    from ..feedback.store import Store

    with Store(options.store, make=False) as store:
        notes = export_answers(store, options.out, options.format, options.question)
    _say(notes)
    print(f"{options.out} is written")
    return 0


def _say(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
