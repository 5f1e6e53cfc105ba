"""Products of some rows with a whole head, forward and backward: the matmuls of what takes rows a chunk at a time.

A half-precision head is widened a slice at a time: a float32 copy of all of it may be larger than the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of a half-precision head that are widened at a time: 16 MiB of float32.
_SLICE_ENTRIES = 2**22


def head_product_(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias` into `out` (n, V), in its dtype, which is that of hidden (n, D)."""
    for columns, part in _slices(weight, out.dtype):
        torch.mm(hidden, part.T, out=out[:, columns])
    return out if bias is None else out.add_(bias.to(out.dtype))


def times_head(gradient: Tensor, weight: Tensor) -> Tensor:
    """`gradient @ weight`, (n, D), in the dtype of the gradient (n, V)."""
    out = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for columns, part in _slices(weight, gradient.dtype):
        out.addmm_(gradient[:, columns], part)
    return out


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `dtype`: whole where it is in it already, else slice after slice."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(256, _SLICE_ENTRIES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        columns = slice(start, start + step)
        yield columns, weight[columns].to(dtype)
