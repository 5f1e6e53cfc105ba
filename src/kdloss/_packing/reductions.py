"""From a per-token tensor to the scalar that is descended.

The caller chooses the denominator. `normalizer=None` takes the local count. A trainer that accumulates micro-batches or
averages gradients over ranks passes the count of the whole optimizer step (divided by the world size where the wrapper
averages), so that the parts sum to the whole exactly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.agreement import check_group, in_step
from kdloss._distributed.collectives import all_ranks, global_sum
from kdloss._docs import documented

from .layout import SEQUENCES, Layout, one_or_nan, segment_sum, trained_tokens
from .texts import PACKING_ARGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

Reduction = Literal["token_mean", "sequence_mean"]
REDUCTIONS = get_args(Reduction)


def token_mean(
    x: Tensor,  # (T,) or any shape
    *,
    loss_mask: Tensor,  # as x, bool
    normalizer: float | Tensor | None = None,
) -> Tensor:  # ()
    """Sum over trained tokens, divided by a token count: sum of x_t over loss_mask_t, / normalizer.

    Args:
        x: values per token, of any shape.
        loss_mask: bool, the shape of `x`, True at trained tokens. Values at other tokens, NaN included, reach neither
            the result nor the gradient.
        normalizer: the denominator in tokens, a number or a 0-dim tensor, detached. None: the trained tokens of `x`.
            The batch size here gives the mean over sequences of their token sums.

    Returns:
        (), differentiable in `x`. 0, still attached to the graph, where the count or the normalizer is 0.

    Expected gradient:
        Unbiased for a normalizer that does not depend on the samples; the local count biases it by O(1/B).

    Raises:
        TypeError: `loss_mask` is not bool, or `x` is not floating-point.
        ValueError: shapes differ, or `normalizer` is negative, not finite or not 0-dim.

    Example:
        >>> import torch, kdloss
        >>> x, loss_mask = torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])
        >>> kdloss.token_mean(x, loss_mask=loss_mask).item()
        2.0
        >>> kdloss.token_mean(x, loss_mask=loss_mask, normalizer=8).item()  # the tokens of a whole step
        0.5
    """
    _checks.per_token("x", x, loss_mask=loss_mask)
    _checks.normalizer(normalizer)
    dtype = _checks.promoted_dtype(x)
    kept = torch.where(_checks.savable(loss_mask), x.to(dtype), x.new_zeros((), dtype=dtype))
    return TokenMean(loss_mask, normalizer, dtype)(kept)


@documented(PACKING_ARGS)
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
        x: (T,) values per token.
        {loss_mask}
        {cu_seqlens}
        normalizer: the denominator in sequences, a number or a 0-dim tensor, detached. None: the sequences with a
            trained token, on any rank of `group`.
        {group}
            |o_b| counts all parts.

    Returns:
        (), differentiable in `x`; an attached 0 where the count or the normalizer is 0. With `group` it is this rank's
        share: the shares of all ranks sum to the mean, in value and in gradient. The backward needs no collective.

    Expected gradient:
        Each token is weighted by 1/|o| of its own sampled sequence. That is a different objective from the KL or the
        expected reward, also for estimators that are unbiased token by token.

    Raises:
        TypeError: `loss_mask` is not bool, `x` is not floating-point, or `group` is not a process group.
        ValueError: shapes differ, `x` is not flat, `cu_seqlens` does not fit, or `normalizer` is negative, not finite
            or not 0-dim. With `group` also where its backend cannot carry the tensors or, on the CPU, ranks differ in
            B; on the CPU an error on one rank is raised on all.

    Example:
        >>> import torch, kdloss
        >>> x, loss_mask = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([True, True, True])
        >>> kdloss.sequence_mean(x, loss_mask=loss_mask, cu_seqlens=torch.tensor([0, 2, 3])).item()  # (2 + 8) / 2
        5.0
    """
    with in_step(group, x, agreed := {}):
        _checks.normalizer(normalizer)
        _checks.per_token("x", x, loss_mask=loss_mask)
        _checks.packed_stream("x", x, cu_seqlens)
        layout = Layout(cu_seqlens, x.shape[0])
        agreed.update({SEQUENCES: cu_seqlens.shape[0] - 1})
    kept = torch.where(_checks.savable(loss_mask), x, x.new_zeros(()))
    return SequenceMean(loss_mask, layout, normalizer, _checks.promoted_dtype(x), group)(kept)


class SequenceMean:
    """`sequence_mean` of several per-token tensors, all 0 at untrained tokens."""

    def __init__(
        self,
        loss_mask: Tensor,
        layout: Layout,
        normalizer: float | Tensor | None,
        dtype: torch.dtype,
        group: ProcessGroup | None,
    ) -> None:
        trained = trained_tokens(loss_mask, layout, group)
        self._weights = trained.clamp(min=1).reciprocal().index_select(0, layout.ids)  # (T,) 1 / |o_b|
        # NaN is not 0, where cu_seqlens does not fit
        self._denominator = denominator(normalizer, (trained != 0).sum, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        # in the dtype for long sums, which the weights have
        return self._denominator.divide((x * self._weights).sum().to(_checks.promoted_dtype(x)))


class TokenMean:
    """`token_mean` of several per-token tensors, all 0 at untrained tokens. The count is over all ranks of `group`."""

    def __init__(
        self,
        loss_mask: Tensor,
        normalizer: float | Tensor | None,
        dtype: torch.dtype,
        group: ProcessGroup | None = None,
    ) -> None:
        def count() -> Tensor:
            return loss_mask.sum() if group is None else global_sum(loss_mask.sum(), group)

        self._denominator = denominator(normalizer, count, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._denominator.divide(x.sum())


@documented(PACKING_ARGS)
def global_sequence_count(
    loss_mask: Tensor,  # (T,) bool
    *,
    cu_seqlens: Tensor,  # (B + 1,)
    group: ProcessGroup | None = None,
    split_group: ProcessGroup | None = None,
) -> Tensor:  # () int64
    """Sequences with a trained token, of all ranks: the `normalizer` of "sequence_mean" in a data-parallel step.

    Args:
        loss_mask: (T,) bool, True at trained tokens of this rank. A rank may have none.
        {cu_seqlens}
            They are this rank's.
        group: the ranks to count. None: all of them, or this process alone where torch.distributed is not in use.
        split_group: the ranks that each hold a part of every one of this rank's sequences, all of them in `group`. A
            sequence then counts once, whichever parts its trained tokens are in. None: sequences are whole.

    Returns:
        () int64, the same on every rank. Divide it by the world size under wrappers that average gradients.

    Raises:
        TypeError: `loss_mask` is not bool, or a group is not a process group.
        ValueError: shapes differ or `cu_seqlens` does not fit. With groups also where a backend cannot carry the
            tensors or, on the CPU, ranks of `split_group` differ in B; on the CPU an error on one rank is raised on
            all.

    Example:
        >>> import torch, kdloss
        >>> loss_mask, cu_seqlens = torch.tensor([True, True, False, True]), torch.tensor([0, 2, 3, 4])
        >>> kdloss.global_sequence_count(loss_mask, cu_seqlens=cu_seqlens).item()
        2
    """
    ranks = all_ranks(group)
    with in_step(ranks, loss_mask, {}):
        _checks.boolean(loss_mask=loss_mask)
        _checks.packed_stream("loss_mask", loss_mask, cu_seqlens)
        check_group(split_group, loss_mask, "split_group")
    with in_step(ranks, loss_mask, {}):  # once more: an error in here is raised on the ranks of one split_group only
        ones = torch.ones_like(loss_mask, dtype=torch.float32)
        trained = segment_sum(ones, loss_mask=loss_mask, cu_seqlens=cu_seqlens, group=split_group)
    count = (trained != 0).sum()
    # one of the ranks that share sequences counts them
    counts = split_group is None or split_group.rank() == 0
    return global_sum(count if counts else torch.zeros_like(count), group)


class Denominator(NamedTuple):
    """A denominator that may divide several totals."""

    divisor: float | Tensor  # a tensor is not 0
    empty: Tensor | None = None  # () bool: the quotient is 0, also of a total that is not finite
    zero: Tensor | None = None  # () that quotient, shared, where `empty` is given

    def divide(self, total: Tensor) -> Tensor:
        """The total (), divided; an attached 0 where the denominator is 0."""
        if not isinstance(self.divisor, Tensor) and self.divisor == 0:
            return torch.where(torch.zeros_like(total, dtype=torch.bool), total, 0)
        quotient = (total / self.divisor).to(total.dtype)
        return quotient if self.empty is None or self.zero is None else torch.where(self.empty, self.zero, quotient)


def denominator(normalizer: float | Tensor | None, count: Callable[[], Tensor], dtype: torch.dtype) -> Denominator:
    """`normalizer`, or the local `count`, which is called where `normalizer` is None.

    A total over nothing is 0 already, so a count of 0 needs no choice. `dtype` is that of the totals.
    """
    if normalizer is None:
        return Denominator(count().clamp(min=1))
    if not isinstance(normalizer, Tensor):
        return Denominator(normalizer)
    normalizer = normalizer.detach().to(dtype)
    # a denominator that is refused on the CPU is NaN elsewhere; the root of a negative one is NaN, which is not < inf
    valid = normalizer.sqrt() < math.inf
    # == 0 and not > 0, which is False for NaN: a NaN normalizer must give NaN
    empty = normalizer == 0
    return Denominator((normalizer + empty) * one_or_nan(valid), empty, normalizer.new_zeros(()))
