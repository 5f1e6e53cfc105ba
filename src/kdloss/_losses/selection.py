"""The k-th largest value of each sequence, exactly, without sorting and without reading a value on the host.

Floats are mapped to integers of the same order, which are read in digits of 8 bits from the top. For each digit a
histogram of 256 counts per sequence says in which bin the k-th largest is; only the values in that bin go on to the
next digit. After 4 digits of float32, or 8 of float64, the integer is known, and so is the float, to the bit.

If ranks hold parts of the values, their histograms are summed: one all-gather of 256 counts per sequence for each
digit, however many tokens a rank holds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdloss._distributed.collectives import ordered_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BINS = 256


def kth_largest(
    x: Tensor,  # (N, T) float32 or float64
    kept: Tensor,  # (T,) bool: the values that count
    ids: Tensor,  # (T,) int64: the sequence of each value
    rank: Tensor,  # (N, B) int64: 1 is the largest
    group: ProcessGroup | None,
) -> Tensor:  # (N, B)
    """Of each row and sequence the value of `rank`, over all ranks of `group`. NaN counts as the largest.

    Undefined where `rank` is 0 or above the number of values that count.
    """
    rows, sequences = rank.shape
    key, width = _ordered(x), 8 * x.element_size()
    found = torch.zeros_like(rank)
    kept = kept.expand_as(x)
    base = (torch.arange(rows, device=x.device)[:, None] * sequences + ids) * _BINS
    for shift in range(width - 8, -8, -8):
        digit = (key >> shift) & (_BINS - 1)
        counts = rank.new_zeros(rows * sequences * _BINS)
        counts = counts.index_add(0, (base + digit).flatten(), kept.flatten().to(torch.int64))
        counts = counts if group is None else ordered_sum(counts, group)
        counts = counts.reshape(rows, sequences, _BINS)
        at_least = counts.flip(-1).cumsum(-1).flip(-1)  # values whose digit is this one or a larger one
        chosen = ((at_least >= rank[..., None]).sum(-1) - 1).clamp(min=0)
        place = chosen[..., None]
        rank = rank - (at_least.gather(-1, place) - counts.gather(-1, place)).squeeze(-1)
        kept = kept & (digit == chosen.index_select(1, ids))
        found = (found << 8) | chosen
    return _float(found, x.dtype)


def _ordered(x: Tensor) -> Tensor:
    """int64 whose lowest 32 or 64 bits, read without a sign, are in the order of the floats; NaN is the largest."""
    x = torch.where(x.isnan(), x.new_full((), math.nan), x) + 0.0  # one NaN, and one zero
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    # a negative float has the larger bits the smaller it is
    top = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, ~bits, bits ^ top).to(torch.int64)


def _float(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_ordered`."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    if integer == torch.int32:  # to the range of int32, with the same bits
        key = torch.where(key >= 2**31, key - 2**32, key)
    key = key.to(integer)
    return torch.where(key < 0, key ^ torch.iinfo(integer).min, ~key).view(dtype)
