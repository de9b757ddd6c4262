"""Several processes on one run: each draws its share of a batch, gradients are averaged, process 0 writes.

Started by `torchrun --nproc_per_node N -m scoreact train ...` or `accelerate launch`; alone, every function here does nothing.
Nothing but tensors is sent. Knows processes; does not know what is trained.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ProcessLost


def start() -> None:
    """Join the group that the launcher's environment describes, once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def world() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around whatever all processes do at once: one that has gone is named as such."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"another of this run's {world()} processes ended or hangs, so process {rank()} cannot go on; what that one "
            "said is the reason."
        ) from error


def average(tensors: Iterable[Tensor | None]) -> None:
    """Each tensor becomes its mean over the processes, in place."""
    if world() > 1:
        for tensor in tensors:
            if tensor is not None:
                with _together():
                    dist.all_reduce(tensor)
                tensor /= world()


def mean(value: float) -> float:
    """Of a number, over the processes."""
    if world() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    average([found])
    return float(found)


def gathered(x: Tensor) -> Tensor:
    """The processes' rows one after the other; x [B, ...] of one shape everywhere."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    with _together():
        dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def first(flag: bool) -> bool:
    """What process 0 says."""
    if world() == 1:
        return flag
    found = torch.tensor(float(flag))
    same([found])
    return bool(found)


@torch.no_grad()
def same(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes process 0's, in place."""
    if world() > 1:
        for tensor in tensors:
            with _together():
                dist.broadcast(tensor, 0)
