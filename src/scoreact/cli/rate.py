"""The command `rate`: samples are drawn, and people compare them on a page."""

from __future__ import annotations

import argparse
import os
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..support.errors import SettingError
from ..support.seeds import LARGEST
from .errors import EXPECTED, sentence_of, warn
from .look import named_prompts
from .parser import Parser, whole
from .train import source_with

if TYPE_CHECKING:
    from ..control.policy import Policy
    from ..feedback.drawing import ChoosePairs
    from ..feedback.page import Progressing
    from ..feedback.store import Store

MODES = {"pairs": "pair", "rank4": "rank", "thumbs": "thumbs", "scores": "scores"}


def page_arguments(parser: Parser) -> None:
    """Where the page is served."""
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST",
        help="address to listen at; one that others can reach gets a token [default 127.0.0.1]")  # fmt: skip
    parser.add_argument("--port", type=whole(0, 65535), default=8700, metavar="INT",
        help="0 takes a free one, which is printed [default 8700]")  # fmt: skip


def rate_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("source", metavar="RUN_DIR|RECIPE|FOLDER|STORE",
        help="a run, a recipe, a pipeline, a folder of pictures, or a store whose tasks are still open")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="the store; one that is there is added to [default preferences.db]")
    add("--mode", choices=list(MODES), default="pairs",
        help="what a person sees: two samples, four to rank, one for a thumb or a score of 1 to 5 [default pairs]")  # fmt: skip
    add("--pairs", type=whole(1), default=100, metavar="INT",
        help="how many of them the store is to hold; those that are there count [default 100]")  # fmt: skip
    add("--questions", nargs="+", default=["better"], metavar="NAME|TEXT",
        help="better, fits, looks (fits,looks asks both), or a question of your own [default better]")  # fmt: skip
    add(
        "--prompts", nargs="+", metavar="TEXT|FILE", help="prompts, or files as of train --prompts [default: the run's]"
    )
    add("--prompt-column", default="", metavar="NAME", help="of those files [default prompt]")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the recipe or pipeline, as of `train`")
    add("--against", choices=["reference", "itself"],
        help="what the model now is compared with [default: the reference of a run, else itself]")  # fmt: skip
    add("--noise", choices=["other", "same"], default="other", help="of model and reference [default other]")
    add("--choose", metavar="REWARD", help="of `reward fit`: four times as many pairs are drawn, those that tell it "
        "most are asked, and one in five at random")  # fmt: skip
    add("--choose-for", choices=["fit", "dpo"], default="fit", help="dpo: pairs whose winner is plain [default fit]")
    add("--choose-features", metavar="SPEC", help="your file.py:function, of a reward that sees samples by it")
    add("--raters", type=whole(1), default=1, metavar="INT", help="people who answer each [default 1]")
    add(
        "--repeats",
        type=float,
        default=0.08,
        metavar="SHARE",
        help="of what a person sees, for the second time [default 0.08]",
    )
    add("--weights", choices=["final", "best"], default="final", help="of the run [default final]")
    add("--seed", type=whole(0, LARGEST), default=0, metavar="INT", help="of the samples and of the sides [default 0]")
    page_arguments(parser)
    parser.belongs("prompt_column", "prompts")
    parser.belongs("noise", "mode", "pairs", "rank4")
    parser.belongs("against", "mode", "pairs", "rank4")
    parser.belongs("choose", "mode", "pairs")
    parser.belongs("choose_for", "choose")
    parser.belongs("choose_features", "choose")


def rate(options: argparse.Namespace) -> int:
    """Listen, draw, until Ctrl-C."""
    from ..feedback.leases import TaskQueue
    from ..feedback.page import PageServer, Progressing
    from ..feedback.store import Store
    from ..rewards.remote.server import is_loopback

    if not 0 <= options.repeats < 1:
        raise SettingError(f"--repeats is {options.repeats:g}; expected a share from 0 to below 1.")
    given = Path(options.source)
    ready = given.is_file() and given.suffix == ".db"
    if ready:
        taken = [
            name
            for name in ("out", "mode", "pairs", "prompts", "option", "against", "noise", "weights", "choose")
            if name in options.given
        ]
        if taken:
            raise SettingError(f"--{taken[0]} is for samples that are drawn, and {given} is a store; leave it out.")
    questions, progress = questions_of(options.questions), Progressing()
    with Store(given if ready else options.out or Path("preferences.db"), make=not ready) as store:
        drawing = iter(()) if ready else _drawing(options, store)
        queue = TaskQueue(store, questions, options.raters, options.repeats)
        server = PageServer(queue, options.host, options.port, progress)
        try:
            server.start()
            print(
                f"the page   {server.url}\nthe store  {store.path}\nCtrl-C stops it; the same command goes on.",
                flush=True,
            )
            if not is_loopback(options.host):
                warn("whoever has that address can answer, and it goes through the network in the clear.")
            _draw(drawing, store, progress)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.stop()
        _say_outcome(store)
    return 0


def questions_of(words: list[str]) -> list[str]:
    """Names as they are or with commas between, and questions of the user's own. SettingError for one that stands twice."""
    from ..feedback.page import QUESTIONS

    found: list[str] = []
    for word in words:
        names = word.split(",")
        found += names if all(name in QUESTIONS for name in names) else [word.strip()]
    for question in found:
        if not question or len(question) > 200 or not question.isprintable():
            raise SettingError(f"question {question[:80]!r} cannot be asked; give a text of 1 to 200 characters.")
        if found.count(question) > 1:
            raise SettingError(f"question {question!r} is given twice; give it once.")
    return found


def _drawing(options: argparse.Namespace, store: Store) -> Iterator[int]:
    """Fills the store with what is missing."""
    from ..feedback.drawing import Drawing, draw_tasks, tasks_of
    from ..feedback.picture_folder import add_pictures, holds_pictures

    kind, name, folder = MODES[options.mode], os.path.normpath(options.source), Path(options.source)
    if holds_pictures(folder):
        for unused in ("prompts", "option", "against", "noise", "weights", "choose"):
            if unused in options.given:
                raise SettingError(f"--{unused} is of a model, and {folder} is a folder of pictures; leave it out.")
        own = f"{folder.resolve()}{os.sep}"
        missing = options.pairs - tasks_of(store, kind, lambda sample: sample.model.startswith(own))
        return add_pictures(store, folder, max(0, missing), Drawing(kind, "itself", seed=options.seed))
    from ..models.weights import digest_of
    from ..recipes.base import need_prompts
    from ..runs.source import build_policy

    source = source_with(options.source, options.option, "--option")
    tuned = source.folder is not None
    against = options.against or ("reference" if tuned else "itself")
    if not tuned and against == "reference":
        raise SettingError(f"{name} is the pretrained model, its own reference; give --against itself, or a run.")
    if not tuned and "weights" in options.given:
        raise SettingError(f"--weights {options.weights} is of a run, and {name} is none; leave it out.")
    if options.noise == "same" and against == "itself":
        raise SettingError(
            "--noise same would compare a sample with itself; give --against reference, or leave it out."
        )
    policy, problem, _ = build_policy(source, options.weights)
    prompts = named_prompts(options, problem.model)
    if prompts is None:
        need_prompts(problem, "give some with --prompts TEXT or FILE")
        prompts = list(problem.prompts)
    digest = digest_of(policy.model)  # type: ignore[arg-type]
    missing = options.pairs - tasks_of(store, kind, lambda sample: (sample.model, sample.digest) == (name, digest))
    how = Drawing(kind, against, options.noise, options.seed)
    choose = None if options.choose is None else _choosing(options, policy)
    return draw_tasks(store, policy, source.config, prompts, max(0, missing), how, name, tuned, choose)


def _choosing(options: argparse.Namespace, policy: Policy) -> ChoosePairs:
    import torch

    from ..feedback.choosing import choosing_by
    from ..rewards.bradley_terry import BradleyTerryReward
    from ..rewards.learned import open_learned

    reward = open_learned(options.choose, features=options.choose_features)
    if not isinstance(reward, BradleyTerryReward):
        raise SettingError(f"--choose {options.choose} is a reward of another kind; give one of `scoreact reward fit`.")
    reward.take_model(policy.reference)
    generator = torch.Generator().manual_seed(options.seed)
    return choosing_by(reward, generator, "gap" if options.choose_for == "dpo" else "information")


def _draw(drawing: Iterator[int], store: Store, progress: Progressing) -> None:
    """Draw while people answer already. What fails then is said, and they go on with what there is."""
    progress.drawing = True
    try:
        for done in drawing:
            progress.drawn = done
    except EXPECTED as error:
        if not store.rows("SELECT 1 FROM tasks LIMIT 1"):
            raise
        warn(f"no more samples are drawn: {sentence_of(error)}")
    finally:
        progress.drawing = False
    waiting = store.rows("SELECT COUNT(*) FROM tasks WHERE given = 0")[0][0]
    print(f"{progress.drawn} drawn, {waiting} wait for an answer", flush=True)


def _say_outcome(store: Store) -> None:
    from ..feedback.answers import left_share, read_answers, self_agreement

    answers = read_answers(store)
    print(f"\n{store.rows('SELECT COUNT(*) FROM answers WHERE undone IS NULL')[0][0]} answers in {store.path}")
    for what, share in (("repeated alike", self_agreement(answers)), ("left won", left_share(answers))):
        if share.count:
            low, high = share.interval
            print(f"{what:<15} {share.hits} of {share.count}, {share.value:.2f} (95 %: {low:.2f} to {high:.2f})")
    if len(answers):
        print(f"a reward        scoreact reward fit {shlex.quote(str(store.path))} --out liking")
