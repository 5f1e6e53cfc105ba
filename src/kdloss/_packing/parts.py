"""Sequences split across the ranks of a group (context parallel): results over all parts.

Each rank holds a part of every one of the same B sequences, as a packed stream with its own `cu_seqlens` (B + 1,).
A part may be empty. Where the order matters (returns, labels), parts follow one another in rank order.

Gradients follow one convention: the ranks descend the *sum* of their losses. Trainers do so when they sum gradients
over the ranks, or average them and scale the loss. Every rank gets a sum over parts, so its gradient is the sum of the
incoming gradients of all ranks: one collective forward, one backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kdloss import _checks
from kdloss._distributed.collectives import gather, ordered_sum


def sum_of_parts(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks, the same to the bit on each. Its gradient is the sum of all ranks' incoming gradients."""
    if group is None:
        return x
    if not torch.compiler.is_compiling():
        _checks.refuse_transforms("a sum over ranks", x)
    return _SumOfParts.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return ordered_sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # create_graph=True
        return (sum_of_parts if recorded else ordered_sum)(gradient, ctx.group), None


def returns_of_later_parts(head: Tensor, decay: Tensor, group: ProcessGroup) -> Tensor:
    """(B,): the return-to-go where this rank's part of each sequence ends, from the heads of the later parts.

    F_r = head_{r+1} + decay_{r+1} * F_{r+1}, and 0 on the last rank. Without gradient.

    Args:
        head: (B,) the return at the first position of this part, within the part; 0 if it is empty.
        decay: (B,) the discount across this part; 1 if it is empty.
    """
    parts = gather(torch.stack([head, decay]), group)
    following = torch.zeros_like(head)
    for rank in range(group.size() - 1, group.rank(), -1):
        following = parts[rank, 0] + parts[rank, 1] * following
    return following


def first_of_later_parts(first: Tensor, present: Tensor, otherwise: int, group: ProcessGroup) -> Tensor:
    """(B,) int64: `first` of the next rank whose part of the sequence is not empty, or `otherwise` if there is none.

    Args:
        first: (B,) int64, the first token of this rank's part.
        present: (B,) bool, whether this part has a token.
        otherwise: the value for sequences that end on this rank.
    """
    parts = gather(torch.stack([first, present.to(first.dtype)]), group)
    following = torch.full_like(first, otherwise)
    for rank in range(group.size() - 1, group.rank(), -1):
        following = torch.where(parts[rank, 1] != 0, parts[rank, 0], following)
    return following
