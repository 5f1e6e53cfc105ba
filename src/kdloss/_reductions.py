"""From a per-token tensor to the scalar that is descended.

The denominator is the caller's business: `normalizer=None` takes the local count, and a trainer that accumulates
micro-batches or averages gradients over ranks passes the count of the whole optimizer step (divided by the world size
where the wrapper averages), so that the parts sum to the whole exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _checks
from ._packing import segment_mean, segment_sum

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
        normalizer: the denominator in sequences, detached. None: the sequences with a trained token.
        group: ranks that each hold a contiguous part of every sequence. Not supported yet.

    Returns:
        (), differentiable in `x`; an attached 0 where the count or the normalizer is 0.

    Expected gradient:
        Each token is weighted by 1/|o| of its own sampled sequence. That is a different objective from the KL or the
        expected reward, also for estimators that are unbiased token by token.

    Raises:
        TypeError, ValueError: as `token_mean`; also where `x` is not flat or `cu_seqlens` does not fit.
        NotImplementedError: `group` is given.
    """
    _checks.normalizer(normalizer)
    means = segment_mean(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens, group=group)
    if normalizer is None:
        trained = segment_sum(torch.ones_like(x), loss_mask=loss_mask, cu_seqlens=cu_seqlens, group=group)
        normalizer = (trained != 0).sum()  # of NaN too, where cu_seqlens does not fit: the mean must show it
    return _divide(means.sum(), normalizer)


def _divide(total: Tensor, normalizer: float | Tensor) -> Tensor:
    if not isinstance(normalizer, Tensor):
        return total / normalizer if normalizer > 0 else torch.where(torch.zeros_like(total).bool(), total, 0)
    normalizer = normalizer.detach().to(total)
    # NaN > 0 is False, so the test is == 0: a NaN normalizer shows
    empty = normalizer == 0
    return torch.where(empty, 0, total / torch.where(empty, 1, normalizer))
