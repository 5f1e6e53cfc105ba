"""From a per-token tensor to the scalar that is descended.

The denominator is the caller's business: `normalizer=None` takes the local count, and a trainer that accumulates
micro-batches or averages gradients over ranks passes the count of the whole optimizer step (divided by the world size
where the wrapper averages), so that the parts sum to the whole exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import check_group, in_step
from kdloss._distributed.collectives import all_ranks, global_sum

from .layout import segment_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_mean(
    x: Tensor,  # (T,) or any shape
    *,
    loss_mask: Tensor,  # as x, bool
    normalizer: float | Tensor | None = None,
) -> Tensor:  # ()
    """Sum over trained tokens, over a token count: sum of x_t over loss_mask_t, / normalizer.

    Args:
        x: per-token values of any shape; NaN or inf at untrained positions leaves no trace.
        loss_mask: bool, the shape of `x`.
        normalizer: the denominator in tokens, a number or a 0-dim tensor, detached. None: the trained tokens of `x`.
            The batch size here gives the mean over sequences of their token sums.

    Returns:
        (), differentiable in `x`. 0, still attached to the graph, where the count or the normalizer is 0.

    Expected gradient:
        Unbiased for a normalizer that does not depend on the samples; the local count biases by O(1/B).

    Raises:
        TypeError: `loss_mask` is not bool, `x` is not floating-point.
        ValueError: shapes differ, or `normalizer` is negative, not finite or not 0-dim.
    """
    _checks.per_token("x", x, loss_mask=loss_mask)
    _checks.normalizer(normalizer)
    total = torch.where(loss_mask, x.to(_checks.promoted_dtype(x)), 0).sum()
    return _divide(total, loss_mask.sum() if normalizer is None else normalizer)


def sequence_mean(
    x: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    normalizer: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # ()
    """Mean over sequences of the mean over their trained tokens (the 1/G sum 1/|o| sum of GRPO and of KDRL's J_RKL).

    (1 / normalizer) * sum over b of (1 / |o_b|) * sum over trained t of sequence b of x_t

    Args:
        x: (T,) per-token values; NaN or inf at untrained positions leaves no trace.
        loss_mask: (T,) bool.
        cu_seqlens: (B + 1,).
        normalizer: the denominator in sequences, detached. None: the sequences with a trained token, on any rank of
            `group`.
        group: the ranks that each hold a part of every sequence, as in `segment_sum`. |o_b| counts all parts.

    Returns:
        (), differentiable in `x`; an attached 0 where the count or the normalizer is 0. With `group` it is this rank's
        share: the shares of all ranks sum to the mean, in value and in gradient. The backward is no collective.

    Expected gradient:
        Each token is weighted by 1/|o| of its own sampled sequence. That is a different objective from the KL or the
        expected reward, also for estimators that are unbiased token by token.

    Raises:
        TypeError, ValueError: as `token_mean`; also where `x` is not flat or `cu_seqlens` does not fit, and with
            `group` as in `segment_sum`.
    """
    with in_step(group, x):
        _checks.tensors(x=x)
        _checks.normalizer(normalizer)
    trained = segment_sum(torch.ones_like(x), loss_mask=loss_mask, cu_seqlens=cu_seqlens, group=group)
    return mean_of_sequences(x, trained, loss_mask=loss_mask, cu_seqlens=cu_seqlens, normalizer=normalizer)


def mean_of_sequences(
    x: Tensor, trained: Tensor, *, loss_mask: Tensor, cu_seqlens: Tensor, normalizer: float | Tensor | None
) -> Tensor:
    """`sequence_mean`, where the trained tokens of each whole sequence (B,) are known."""
    means = segment_sum(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens) / trained.clamp(min=1)
    if normalizer is None:
        normalizer = (trained != 0).sum()  # of NaN too, where cu_seqlens does not fit: the mean must show it
    return _divide(means.sum(), normalizer)


def global_sequence_count(
    loss_mask: Tensor,  # (T,) bool
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    group: ProcessGroup | None = None,
    split_group: ProcessGroup | None = None,
) -> Tensor:  # () int64
    """Sequences with a trained token, of all ranks: the `normalizer` of "sequence_mean" in a data-parallel step.

    Args:
        loss_mask: (T,) bool, of this rank's tokens. A rank may have none.
        cu_seqlens: (B + 1,), of this rank.
        group: the ranks to count. None: all of them, or this process alone where torch.distributed is not in use.
        split_group: the ranks that each hold a part of every one of this rank's sequences, all of them in `group`: a
            sequence counts once, wherever its trained tokens lie. None: sequences are whole.

    Returns:
        () int64, the same on every rank. Divide it by the world size under wrappers that average gradients.

    Raises:
        TypeError: `loss_mask` is not bool, or a group is no process group.
        ValueError: shapes differ or `cu_seqlens` does not fit; with groups as in `segment_sum`.
    """
    ranks = all_ranks(group)
    with in_step(ranks, loss_mask):
        _checks.tensors(loss_mask=loss_mask)
        _checks.boolean(loss_mask=loss_mask)
        _checks.packed_stream("loss_mask", loss_mask, cu_seqlens)
        check_group(split_group, loss_mask, "split_group")
    with in_step(ranks, loss_mask):  # a second time, as ranks of one split_group fail together, and not the others
        ones = torch.ones_like(loss_mask, dtype=torch.float32)
        trained = segment_sum(ones, loss_mask=loss_mask, cu_seqlens=cu_seqlens, group=split_group)
    count = (trained != 0).sum()
    # of the ranks that share sequences one counts them
    counts = split_group is None or split_group.rank() == 0
    return global_sum(count if counts else torch.zeros_like(count), group)


def _divide(total: Tensor, normalizer: float | Tensor) -> Tensor:
    if not isinstance(normalizer, Tensor):
        return total / normalizer if normalizer > 0 else torch.where(torch.zeros_like(total).bool(), total, 0)
    normalizer = normalizer.detach().to(total)
    # NaN > 0 is False, so the test is == 0: a NaN normalizer shows
    empty = normalizer == 0
    return torch.where(empty, 0, total / torch.where(empty, 1, normalizer))
