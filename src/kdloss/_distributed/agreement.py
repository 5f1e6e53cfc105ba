"""Agreement between ranks: an error on one rank is raised on all, and so is a mismatch between their arguments.

Also here: the checks that a process group suits the tensors. Every rank runs them before a collective, so a bad group
raises an error instead of failing inside the collective.
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


def in_step(group: ProcessGroup | None, x: object, agreed: dict[str, Any]) -> AbstractContextManager[None]:
    """Run a rank's argument checks in this context: an error on one rank is raised on all ranks.

    A rank that raised alone would leave the others waiting in the next collective. Exchanging errors takes a collective
    that waits for the host, so it is skipped where other checks of values are skipped: off the CPU and under
    `torch.compile`.

    Args:
        group: None: nothing is exchanged.
        x: the first argument of the checked function: a tensor, or the wrong object that was passed for it.
        agreed: filled inside the context. A value in it that differs between ranks raises on all ranks, too. It is no
            result of the context, because torch 2.6 does not compile one.
    """
    if group is None or torch.compiler.is_compiling():
        return nullcontext()
    like = x if isinstance(x, Tensor) else torch.empty(0)
    check_group(group, like)
    return _exchanged(group, agreed) if _checks.value_checks_allowed(like) else nullcontext()


@contextmanager
def _exchanged(group: ProcessGroup, agreed: dict[str, Any]) -> Iterator[None]:
    error = None
    try:
        yield
    except (TypeError, ValueError) as caught:
        error = caught
    found = gather_objects((None if error is None else (isinstance(error, TypeError), str(error)), agreed), group)
    if error is not None:
        raise error
    for rank, (failed, _) in enumerate(found):
        if failed is not None:
            raise (TypeError if failed[0] else ValueError)(f"on rank {rank} of the group: {failed[1]}")
    for name in sorted({name for _, theirs in found for name in theirs}):
        same(name, [theirs.get(name) for _, theirs in found])


def check_group(group: object, x: Tensor, name: str = "group") -> None:
    """Check that `group` is a process group with a backend for tensors like `x`; None passes."""
    if group is None or torch.compiler.is_compiling():
        return
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    check_backend("the tensors", x, group)


def check_backend(name: str, x: Tensor, group: ProcessGroup) -> None:
    """Check, on every rank and before any collective, that the group's backend supports the device of `x`."""
    if torch.compiler.is_compiling():
        return
    kinds = [device.type for device in group._device_types]
    if x.device.type not in kinds:
        raise ValueError(
            f"group must have a backend for {name} on {x.device.type}, got one for {', '.join(kinds)} "
            f"({dist.get_backend(group)}): nccl takes CUDA tensors, gloo takes CPU tensors"
        )


def gather_objects(mine: Any, group: ProcessGroup) -> list[Any]:
    """`mine` of every rank, in rank order."""
    found = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def same(name: str, values: list[Any]) -> None:
    """Raise unless every rank has the same value; `values` are in rank order."""
    if any(value != values[0] for value in values):
        which = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
        raise ValueError(f"{name} must be the same on every rank of the group, got {which}")
