"""The command `reward-server`: words in, a running server out. Everything else is in `reward_server`."""

from __future__ import annotations

import argparse
import threading

from .errors import warn
from .parser import Parser, assignments, whole


def server_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("reward", metavar="SPEC", help="my.py:function, module:function, or a known name")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the reward")
    add("--port", type=whole(0), default=8500, metavar="INT", help="port; 0 takes a free one, which is printed [8500]")
    add("--host", default="127.0.0.1", metavar="HOST", help="address to listen at [127.0.0.1]")
    add("--open-to-network", action="store_true", help="allow a host that other machines can reach: no authentication")
    add("--batch-size", type=whole(0), default=64, metavar="INT",
        help="most samples scored at a time; requests that wait are scored together; 0: each as it comes [64]")  # fmt: skip
    add("--max-megabytes", type=whole(1), default=1024, metavar="INT", help="largest request [1024]")
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="where the reward finds its samples: auto, cpu, cuda, ... [auto]",
    )


def serve(options: argparse.Namespace) -> int:
    """Listen, load the reward, answer until Ctrl-C."""
    from ..rewards.base import is_of_batch
    from ..rewards.registry import load
    from ..rewards.remote.server import MEGABYTE, RewardServer, is_loopback
    from ..support.devices import choose_device
    from ..support.errors import RewardError

    if not is_loopback(options.host) and not options.open_to_network:
        raise ValueError(
            f"host {options.host!r} can be reached from other machines and the server has no authentication; keep to "
            "127.0.0.1 (and a tunnel), or add --open-to-network in a network that you trust."
        )
    if options.port > 65535:
        raise ValueError(f"port is {options.port}; the highest is 65535.")
    device, given = choose_device(options.device), assignments(options.option, "--option")
    try:
        server = RewardServer(
            options.reward,
            options.host,
            options.port,
            options.batch_size,
            options.max_megabytes * MEGABYTE,
            warn,
        )
    except OSError as error:
        raise ValueError(f"cannot listen at {options.host}:{options.port} ({error}). Give another --port.") from None
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            if not is_loopback(options.host):
                warn("whoever reaches this port can use the reward: there is no authentication.")
            reward = load(options.reward, **given)
            if is_of_batch(reward):
                raise RewardError(
                    f"reward {options.reward} is of samples together, and a server is asked in parts; give it to the run."
                )
            server.start(reward, device)
            print(f"reward {options.reward} on {device} at {server.url}\nCtrl-C stops it.", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"stopped after {server.scorer.calls if server.scorer is not None else 0} samples")
        finally:
            server.shutdown()
    return 0
