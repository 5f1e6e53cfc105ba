"""Cases that hang, raise, crash or loop forever, between others that pass, for the tests of `ranks.run` itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from scale_out.ranks import Ranks, on


def wait_for_the_others(ranks: Ranks) -> None:
    dist.all_reduce(torch.zeros(1), group=ranks.group)


@on(4)
def case_before(ranks: Ranks) -> None:
    wait_for_the_others(ranks)


@on(2)
def case_one_rank_does_not_come(ranks: Ranks) -> None:
    if ranks.rank == 1:
        wait_for_the_others(ranks)


@on(3)
def case_one_rank_raises(ranks: Ranks) -> None:
    """Rank 3 is already in the next case, and fails there."""
    if ranks.rank == 1:
        raise ValueError("of rank 1 alone")
    wait_for_the_others(ranks)


@on(4)
def case_one_rank_loops_forever(ranks: Ranks) -> None:
    while ranks.rank == 2:
        pass
    wait_for_the_others(ranks)


@on(4)
def case_one_rank_crashes_once(ranks: Ranks) -> None:
    wait_for_the_others(ranks)
    marker = Path(os.environ["CRASHED"])
    if ranks.rank == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    wait_for_the_others(ranks)


@on(2)
def case_one_rank_crashes_always(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    wait_for_the_others(ranks)


@on(4)
def case_after(ranks: Ranks) -> None:
    wait_for_the_others(ranks)
