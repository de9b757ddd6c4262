"""The command `update`: rewards that came from outside move a run's policy on."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runs.source import source_of_run
from .errors import warn
from .parser import Parser, whole

BEFORE = "[default: as before, at first {}]"


def update_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path)
    add(
        "--rewards",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .csv with the columns id and reward, or JSON lines",
    )
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

    run = SavedRun(source_of_run(options.run))
    rewards = read_rewards(options.rewards, options.samples)
    how = {"window": options.window, "half_life": options.half_life, "calls": options.calls}
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
    for note in found.notes:
        warn(note)
    return 0
