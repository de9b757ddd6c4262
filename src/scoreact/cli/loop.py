"""The command `loop`: people compare, a reward is fitted to what they answered, a model is tuned to it, and again."""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..runs.source import Source, short_name
from ..support.errors import SettingError
from ..training.config import Config, updated
from .errors import warn
from .parser import Parser, whole
from .rate import page_arguments, questions_of
from .train import NO_REPORT, setting_arguments, start_or_go_on, train_source

if TYPE_CHECKING:
    from ..feedback.page import PageServer
    from ..feedback.store import Store

OWN = {"kl_weight": 1.0}  # believes the odds of one rater
LOOK = 0.5  # seconds from one look at the answers to the next


def loop_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a name of `scoreact recipes`, a pipeline's folder, or my_model.py:build")
    add("--out", metavar="DIR", help="folder of the loop; the same command goes on with it [default loops/RECIPE]")
    add(
        "--rounds",
        type=whole(1),
        default=4,
        metavar="INT",
        help="of rating and tuning, then a last verdict [default 4]",
    )
    add("--answers", type=whole(1), default=100, metavar="INT", help="of people, in each round [default 100]")
    add("--caution", type=float, default=1.0, metavar="FLOAT", help="sigmas of the reward's uncertainty that it is lowered "
        "by [default 1]")  # fmt: skip
    add("--question", default="better", metavar="NAME|TEXT", help="better, fits, looks, or your own [default better]")
    add("--features", action="append", default=[], metavar="SPEC", help="that the reward may see, as of `reward fit`")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the recipe")
    add("--prompts", metavar="FILE", help="of a pipeline, as of `train`")
    page_arguments(parser)
    add("--no-report", **NO_REPORT)
    setting_arguments(parser, updated(Config(), OWN), ("rounds",))


def loop(options: argparse.Namespace) -> int:
    """Round after round until people have judged the last run."""
    from ..feedback.rounds import STORE, FeedbackLoop

    if not 0 <= options.caution < math.inf:
        raise SettingError(f"--caution is {options.caution:g}; give a number of sigma, 0 or more.")
    questions = questions_of([options.question])
    if len(questions) > 1:
        raise SettingError(f"--question {options.question} is several; a reward is fitted to the answers to one.")
    source = _source(options)
    out = Path(options.out) if options.out else Path("loops") / short_name(source.recipe)
    page = Page(questions, options.host, options.port)
    made = FeedbackLoop(
        source, out, page.ask, lambda tuning: _train(tuning, options), options.rounds, options.answers, options.caution,
        questions[0], options.features, lambda line: print(line, flush=True),
    )  # fmt: skip
    print(f"the loop   {out}\nCtrl-C stops it; the same command goes on.", flush=True)
    try:
        made.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("The same command goes on.") from None
    finally:
        page.stop()
    print(f"the store  {out / STORE}\nthe runs   {out}/round-N/run; more --rounds go on")
    return 0


def _source(options: argparse.Namespace) -> Source:
    """As of `train`, with a reward that is still to be fitted."""
    words = vars(options)
    for name, value in OWN.items():
        if words[f"setting:{name}"] is None:
            words[f"setting:{name}"] = str(value)
    words |= {"config": None, "start": None, "from_reference": "first", "reward": "liking", "reward_option": []}
    source = train_source(options)
    if source.config.rule.get("pairs_file"):
        raise SettingError("--pairs-file is learned from in the place of people's answers; leave it out.")
    return dataclasses.replace(source, reward=None)


def _train(source: Source, options: argparse.Namespace) -> None:
    assert source.folder is not None
    options.tracker, options.accept_changes = [], False
    start_or_go_on(source, source.folder, options)


class Page:
    """The page, from the first pair on. It stays while a model is tuned, and shows the next pairs when they are there."""

    def __init__(self, questions: list[str], host: str, port: int) -> None:
        self.questions, self.host, self.port = questions, host, port
        self.server: PageServer | None = None
        self.store: Store | None = None  # its own, which is open as long as the server

    def ask(self, store: Store) -> None:
        """Wait a moment for people."""
        if self.server is None:
            from ..feedback.leases import TaskQueue
            from ..feedback.page import PageServer, Progressing
            from ..feedback.store import Store
            from ..rewards.remote.server import is_loopback

            self.store = Store(store.path, make=False)
            queue = TaskQueue(self.store, self.questions)
            self.server = PageServer(queue, self.host, self.port, Progressing(drawing=True))
            self.server.start()
            print(f"the page   {self.server.url}", flush=True)
            if not is_loopback(self.host):
                warn("whoever has that address can answer, and it goes through the network in the clear.")
        time.sleep(LOOK)

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        if self.store is not None:
            self.store.close()
