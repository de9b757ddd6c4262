"""The command `pretrain`: a model of the user's own data, or what ships with the package made anew."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..support.errors import SettingError
from ..support.names import did_you_mean
from .parser import Parser, positive, whole

if TYPE_CHECKING:
    from ..support.own_data import OwnData

SHIPPED = {
    "fashion-mnist": "scoreact.recipes.fashion_mnist.make_checkpoint",
    "judge": "scoreact.recipes.fashion_mnist.classifiers",
    "reference": "scoreact.recipes.fashion_mnist.make_reference",
}
ABOUT = "Learn a model of your own data: pictures, vectors or series."


def data_arguments(add: Callable[..., Any]) -> None:
    """How a user's data are read."""
    add("--labels", nargs="?", const=True, default=False, metavar="NAME", help="learn the classes: the folders' names, the "
        "array `labels`, the column `label`; or the array or column NAME")  # fmt: skip
    add("--kind", metavar="KIND", help="pictures, vectors or series, where the file does not say")
    add("--size", type=whole(1), metavar="INT", help="scale and cut pictures to a square of so many pixels")
    add(
        "--window",
        type=whole(1),
        metavar="INT",
        help="a table's rows are times; an example is so many of them in a row",
    )
    add("--values", default="levels", metavar="NAME", help="of a window: levels, or returns, the logarithm of each level over "
        "the one before [default levels]")  # fmt: skip
    add("--columns", type=_names, default=(), metavar="A,B", help="of a table, those to read [every one of numbers]")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def data_of(options: argparse.Namespace, path: str) -> OwnData:
    from ..support.own_data import read_data

    return read_data(
        path, kind=options.kind, labels=options.labels, size=options.size, window=options.window, values=options.values,
        columns=options.columns,
    )  # fmt: skip


def pretrain_arguments(parser: Parser) -> None:
    parser.usage = "scoreact pretrain NAME --data FOLDER|FILE [options]"
    parser.epilog = f"Of what ships with the package: scoreact pretrain {{{','.join(SHIPPED)}}} --help"
    parser.add_argument("name", metavar="NAME", help="the model's folder, new or empty")
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="PATH", help="a folder of pictures, an .npz or .npy, a .csv, .tsv or .txt")
    data_arguments(add)
    parser.belongs("values", "window")
    add = parser.add_argument_group("training").add_argument
    add("--minutes", type=positive, metavar="FLOAT", help="train for so long [default 10 where no --steps are given]")
    add("--steps", type=whole(1), metavar="INT", help="train for so many steps in all")
    add(
        "--resume-or-start",
        action="store_true",
        help="go on with the model in NAME where it has saved something, else start",
    )
    add("--batch-size", type=whole(2), metavar="INT", help="examples a step [default 128]")
    add("--learning-rate", type=positive, metavar="FLOAT", help="of AdamW [default 0.001]")
    add("--width", type=whole(8), metavar="INT", help="channels of the network, a multiple of 8 [as suits the data]")
    add(
        "--label-dropout",
        type=float,
        metavar="FLOAT",
        help="share of examples learned without their class [default 0.1]",
    )
    parser.belongs("label_dropout", "labels")
    add("--flip", action="store_true", default=None, help="mirror pictures at random")
    add(
        "--bfloat16",
        metavar="NAME",
        help="auto (where it is the faster, as measured at the start), yes or no [default auto]",
    )
    add("--seed", type=whole(0), metavar="INT", help="of weights, examples, times and noise [default 0]")
    add("--device", metavar="NAME", help="auto, cpu, cuda [default auto]")


def pretrain_shipped(words: Sequence[str]) -> int:
    """Hand the words on to the module that makes what ships with the package."""
    importlib.import_module(SHIPPED[words[0]]).main(list(words[1:]))
    return 0


def pretrain(options: argparse.Namespace) -> int:
    """Learn a model, and say what can be done with it."""
    name, folder = options.name, Path(options.name).expanduser()
    if options.data is None:
        raise SettingError(
            f"scoreact pretrain {name} needs --data, a folder of pictures, an .npz or a .csv; or, of what ships, one of "
            f"{', '.join(SHIPPED)}.{did_you_mean(name, SHIPPED)}"
        )
    _check_name(name)
    from ..api.new_model import pretrain as learn
    from ..runs.pretraining import PretrainPlan, can_resume

    resume = options.resume_or_start and can_resume(folder)
    plan = {n: value for n in PretrainPlan.__dataclass_fields__ if (value := getattr(options, n)) is not None}
    learn(
        folder, options.data, kind=options.kind, labels=options.labels, size=options.size, window=options.window,
        values=options.values, columns=options.columns, minutes=options.minutes, steps=options.steps, resume=resume,
        progress=True, **plan,
    )  # fmt: skip
    print(f"\nmodel      {folder / 'model.safetensors'}, described in model.json\nsamples    {folder / 'samples.png'}")
    print(f"next       scoreact train {name} --reward my_reward.py:function\n           scoreact sample {name}")
    return 0


def _check_name(name: str) -> None:
    """Refuse a folder whose name `scoreact train` would take for something else."""
    from ..recipes.base import recipes
    from ..recipes.pipeline import HUB

    if name in recipes() or name in HUB:
        raise SettingError(f"{name} is the name of a ready-made run; give the model another, or a folder: ./{name}.")
    if ":" in name:
        raise SettingError(f"name is {name!r}; give a folder without a colon.")
