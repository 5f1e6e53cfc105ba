"""Collectives without gradient: `gather`, and the sums and the count built on it.

`gather` all-gathers a few values per row or per sequence. Results are merged in rank order, so every rank holds the
same bits. The collectives are torch's functional ones, which run eagerly and under `torch.compile`.
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
    """Number of trained tokens on all ranks: the `normalizer` of a data-parallel step, or of one of its micro-batches.

        count = sum over ranks of (sum over t of loss_mask_t)

    Args:
        loss_mask: bool, of this rank's tokens, any shape. A rank may have no trained token.
        group: the ranks to count. None: all ranks, or this process alone if torch.distributed is not initialized.

    Returns:
        () int64, in tokens, the same on every rank. Under wrappers that average gradients over the ranks, divide it by
        the world size.

    Raises:
        TypeError: `loss_mask` is not bool, or `group` is not a process group.
        ValueError: `group` has no backend for the device of `loss_mask`.

    Example:
        >>> import torch, kdloss
        >>> loss_mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> count = kdloss.global_token_count(loss_mask)  # one process: its own tokens
        >>> kdloss.token_mean(torch.full((2, 3), 5.0), loss_mask=loss_mask, normalizer=count).item()
        5.0
    """
    with in_step(all_ranks(group), loss_mask, {}):
        _checks.tensors(loss_mask=loss_mask)
        _checks.boolean(loss_mask=loss_mask)
    return global_sum(loss_mask.sum(), group)


def gather(x: Tensor, group: ProcessGroup | VocabShard) -> Tensor:
    """`x` of every rank, (ranks, *x.shape) in rank order, without gradient: one all-gather of equal shapes."""
    if isinstance(group, VocabShard):
        size, name = group.size, group.group_name
    else:
        size, name = group.size(), group.group_name
    if x.numel() == 0:  # on every rank, since shapes are equal
        return x.new_empty(size, *x.shape)
    ops = torch.ops._c10d_functional
    found = ops.wait_tensor(ops.all_gather_into_tensor(x.detach().contiguous(), size, name))
    return found.view(size, *x.shape)  # type: ignore[no-any-return]


def ordered_sum(x: Tensor, group: ProcessGroup | VocabShard) -> Tensor:
    """The sum of `x` over the ranks, added in rank order, so every rank gets the same bits."""
    parts = gather(x, group).unbind(0)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def all_ranks(group: ProcessGroup | None) -> ProcessGroup | None:
    """`group`; for None the group of all ranks, or None if torch.distributed is not initialized."""
    return dist.group.WORLD if group is None and dist.is_available() and dist.is_initialized() else group


def global_sum(count: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of a 0-dim tensor over `group`. None: over all ranks, if torch.distributed is initialized."""
    group = all_ranks(group)
    if group is None:
        return count
    check_group(group, count)
    return ordered_sum(count.reshape(1), group).squeeze(0)
