"""The command `update`: rewards that came from outside move a run's policy on."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runs.source import source_of_run
from ..support.errors import SettingError
from .errors import warn
from .parser import Parser, whole

BEFORE = "[default: as before, at first {}]"


def update_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path)
    add(
        "--rewards",
        type=Path,
        metavar="FILE",
        help="a .csv with the columns id and reward, or JSON lines",
    )
    add("--data", metavar="PATH", help="instead of rewards: the latest examples, as `reward discriminate` takes them, towards "
        "whose law the policy moves")  # fmt: skip
    add("--count", type=whole(1), default=64, metavar="INT", help="with --data: samples of each prompt that are drawn [default "
        "64]")  # fmt: skip
    add("--features", metavar="SPEC", help="with --data: what tells examples from samples, as of `reward discriminate`")
    parser.belongs("count", "data")
    parser.belongs("features", "data")
    add("--samples", type=Path, metavar="FOLDER|FILE", help="of `sample --for-update`, or its index.json, where the rewards "
        "are by number or file")  # fmt: skip
    add("--window", type=whole(1), metavar="INT", help=f"newest rewards that are remembered {BEFORE.format(512)}")
    add("--half-life", type=float, metavar="FLOAT", help="rewards after which an older one is drawn half as often; 0: all "
        f"alike {BEFORE.format(0)}")  # fmt: skip
    add("--calls", type=whole(0), metavar="INT", help="network calls that an update may make; 0: as the run's settings say "
        + BEFORE.format(0))  # fmt: skip


def update(options: argparse.Namespace) -> int:
    from ..api.saved_run import SavedRun
    from ..feedback.reward_file import read_rewards
    from ..report.numbers import rounded
    from ..report.progress import waiting

    if (options.rewards is None) == (options.data is None):
        raise SettingError("give --rewards or --data, one of them.")
    if options.data is not None and options.samples is not None:
        raise SettingError("--samples is the folder that rewards are of; with --data leave it out.")
    run = SavedRun(source_of_run(options.run))
    how = {"window": options.window, "half_life": options.half_life, "calls": options.calls}
    if options.data is not None:
        own = {"features": options.features} if options.features else {}
        with waiting("update"):
            found = run.update(data=options.data, count=options.count, discriminator=own, **how)
    else:
        rewards = read_rewards(options.rewards, options.samples)
        with waiting("update"):
            found = run.update([number for number, _ in rewards], [reward for _, reward in rewards], **how)
    m = found.metrics
    print(
        f"rewards    {m['online/rewards']:.0f} new, {m['online/window']:.0f} remembered, on average {m['online/age']:.0f} old"
    )
    if "online/J" in m:
        print(f"J          {rounded(m['online/J'], m['online/J_se'])} of the policies that drew these samples")
        interval = f"95 % {m['online/J_star_low']:.3g} to {m['online/J_star_high']:.3g}"
        print(
            f"J*         {m['online/J_star']:.3g}, {interval}, carried by {m['online/effective_samples']:.0f} samples"
        )
        bound = f"; the policy moved by {m['policy/step_kl']:.3g} nats" if "policy/step_kl" in m else ""
        print(f"cost       {m['cost/update_network_calls']:,.0f} network calls{bound}")
    if "reward/auc" in m:
        print(
            f"AUC        {m['reward/auc']:.3f} of held-out examples against the samples drawn now; 0.5: not told apart"
        )
    for note in found.notes:
        warn(note)
    return 0
