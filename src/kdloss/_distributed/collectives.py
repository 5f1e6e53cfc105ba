"""Collectives without gradient: `gather`, and the sums and counts made from it.

`gather` all-gathers a few values per row (or per sequence). Results are merged in rank order, so every rank holds the
same bits. Collectives are torch's functional ones, which run eagerly and under `torch.compile`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kdloss import _checks

from .agreement import check_group, in_step
from .vocab_shard import VocabShard


def global_token_count(
    loss_mask: Tensor,  # any shape, bool
    *,
    group: ProcessGroup | None = None,
) -> Tensor:  # () int64
    """Trained tokens of all ranks: the `normalizer` of one data-parallel step, or of one micro-batch of it.

    Args:
        loss_mask: bool, of this rank's tokens. A rank may have none.
        group: the ranks to count. None: all of them, or this process alone where torch.distributed is not in use.

    Returns:
        () int64, the same on every rank. Divide it by the world size under wrappers that average gradients.

    Raises:
        TypeError: `loss_mask` is not bool, or `group` no process group.
    """
    with in_step(all_ranks(group), loss_mask):
        _checks.tensors(loss_mask=loss_mask)
        _checks.boolean(loss_mask=loss_mask)
    return global_sum(loss_mask.sum(), group)


def gather(x: Tensor, group: ProcessGroup | VocabShard) -> Tensor:
    """`x` of every rank, (ranks, *x.shape) in rank order, without gradient. One collective; all have one shape."""
    if isinstance(group, VocabShard):
        size, name = group.size, group.group_name
    else:
        size, name = group.size(), group.group_name
    if x.numel() == 0:  # on every rank, as shapes are the same
        return x.new_empty(size, *x.shape)
    ops = torch.ops._c10d_functional
    found = ops.wait_tensor(ops.all_gather_into_tensor(x.detach().contiguous(), size, name))
    return found.view(size, *x.shape)  # type: ignore[no-any-return]


def ordered_sum(x: Tensor, group: ProcessGroup | VocabShard) -> Tensor:
    """The sum of `x` over the ranks, added in their order, so that it is the same to the bit on each."""
    parts = gather(x, group).unbind(0)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def all_ranks(group: ProcessGroup | None) -> ProcessGroup | None:
    """`group`, or that of all ranks where there are any."""
    return dist.group.WORLD if group is None and dist.is_available() and dist.is_initialized() else group


def global_sum(count: Tensor, group: ProcessGroup | None) -> Tensor:
    """Over `group`, or over all ranks where there are any."""
    group = all_ranks(group)
    if group is None:
        return count
    check_group(group, count)
    return ordered_sum(count.reshape(1), group).squeeze(0)
