"""Agreement of ranks on errors: an error on one rank is raised on all, and so is a mismatch between ranks.

Also the checks that a process group fits its tensors, which every rank makes before a collective and not inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kdloss import _checks


def in_step(group: ProcessGroup | None, x: object) -> AbstractContextManager[dict[str, Any]]:
    """This rank's checks stand inside: what one rank raises, all raise, and so where they differ in what they put in.

    A rank that raised by itself would leave the others waiting in the next collective. Telling one another takes a
    collective that waits, so it is left out where other checks of values are: off the CPU and under `torch.compile`.

    Args:
        group: None: nothing is told.
        x: the first argument of the checked function, a tensor or what came in its place.
    """
    if group is None or torch.compiler.is_compiling():
        return nullcontext({})
    like = x if isinstance(x, Tensor) else torch.empty(0)
    check_group(group, like)
    return _told(group) if _checks.value_checks_allowed(like) else nullcontext({})


@contextmanager
def _told(group: ProcessGroup) -> Iterator[dict[str, Any]]:
    agreed: dict[str, Any] = {}
    error = None
    try:
        yield agreed
    except (TypeError, ValueError) as caught:
        error = caught
    told = gather_objects((None if error is None else (isinstance(error, TypeError), str(error)), agreed), group)
    if error is not None:
        raise error
    for rank, (failed, _) in enumerate(told):
        if failed is not None:
            raise (TypeError if failed[0] else ValueError)(f"on rank {rank} of the group: {failed[1]}")
    for name in sorted({name for _, theirs in told for name in theirs}):
        same(name, [theirs.get(name) for _, theirs in told])


def check_group(group: object, x: Tensor, name: str = "group") -> None:
    """`group` is a process group that this process is in and that takes tensors like `x`; None is passed over."""
    if group is None or torch.compiler.is_compiling():
        return
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    check_backend("the tensors", x, group)


def check_backend(name: str, x: Tensor, group: ProcessGroup) -> None:
    """The group's backend can carry `x`: found here, on every rank, and not inside a collective."""
    if torch.compiler.is_compiling():
        return
    kinds = [device.type for device in group._device_types]
    if x.device.type not in kinds:
        raise ValueError(
            f"group must have a backend for {name} on {x.device.type}, got one for {', '.join(kinds)} "
            f"({dist.get_backend(group)}): nccl takes CUDA tensors, gloo takes tensors of the CPU"
        )


def gather_objects(mine: Any, group: ProcessGroup) -> list[Any]:
    found = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def same(name: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        which = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
        raise ValueError(f"{name} must be the same on every rank of the group, got {which}")
