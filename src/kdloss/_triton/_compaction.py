"""The rows that take part, gathered from the stream of all tokens and scattered back, each in one pass.

    order      trained (T,) -> the trained rows first, in order, then the others: a permutation, so its size is static
    take       hidden (T, D) at `rows` (N,) -> (N, D); a row without a label gives 0
    put back   (N, D) float32, times a number on the device -> (T, D) in the dtype of hidden, 0 elsewhere

Compared with torch's operations, in bytes for half-precision hidden states:

    order      T (1 + 8 + 8) beside the prefix sum, instead of a stable sort of T keys
    take       4 N D instead of 8 N D (`index_select`, then a mask: unlabelled rows may hold NaN, and 0 * NaN is not 0)
    put back   2 T D + 6 N D instead of 2 T D + 14 N D (scale, round, then `index_copy_`)

Each is a copy and does no arithmetic worth counting. Distinct rows never write to the same place, so results do not
depend on the order of programs. Without a bound on the trained tokens, their number decides shapes, and finding it
waits for the device (`nonzero`). `order` serves the bounded case, where nothing may wait (CUDA graphs).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device

_TOKENS, _WIDTH = 1024, 2048


def order(trained: Tensor, count: int) -> Tensor:
    """The first `count` of all rows, (min(count, T),) int64, ordered so that the `trained` (T,) ones come first."""
    rows = torch.empty(min(count, trained.shape[0]), dtype=torch.int64, device=trained.device)
    trained = trained.contiguous()  # flattening a mask of one axis makes no copy, so it may be strided
    if rows.numel():
        with on_device(trained):
            order_kernel[(triton.cdiv(trained.shape[0], _TOKENS),)](
                trained, trained.cumsum(0), rows, trained.shape[0], rows.shape[0], block=_TOKENS, num_warps=4
            )
    return rows


def take(hidden: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of hidden (T, D) in `dtype`, (N, D); 0 where the labels in columns (T, K) are all ignored."""
    count, width = rows.shape[0], hidden.shape[1]
    out = torch.empty(count, width, dtype=dtype, device=hidden.device)
    if out.numel():
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        block = min(_WIDTH, triton.next_power_of_2(width))
        take_kernel[count, triton.cdiv(width, block)](
            hidden,
            rows,
            columns,
            out,
            hidden.stride(0),
            width,
            columns.shape[1],
            block=block,
            block_labels=triton.next_power_of_2(max(1, columns.shape[1])),
            num_warps=4,
        )
    return out


def put_back(x: Tensor, rows: Tensor, tokens: int, dtype: torch.dtype, factor: Tensor | None) -> Tensor:
    """x (N, D) float32 times `factor` (), at `rows` of a (T, D) tensor in `dtype` that is 0 elsewhere."""
    make = torch.empty if rows.shape[0] == tokens else torch.zeros  # T distinct rows are all rows
    out = make(tokens, x.shape[1], dtype=dtype, device=x.device)
    if x.numel():
        block = min(_WIDTH, triton.next_power_of_2(x.shape[1]))
        put_back_kernel[x.shape[0], triton.cdiv(x.shape[1], block)](
            x, rows, factor, out, x.shape[1], block=block, num_warps=4
        )
    return out


@triton.jit(do_not_specialize=["total_rows", "count"])
def order_kernel(trained, prefix, rows, total_rows, count, block: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = t < total_rows
    seen = tl.load(prefix + t, mask=inside, other=0)
    total = tl.load(prefix + total_rows - 1)
    place = tl.where(tl.load(trained + t, mask=inside, other=0) != 0, seen - 1, total + t - seen)
    tl.store(rows + place, t, mask=inside & (place < count))


@triton.jit(do_not_specialize_on_alignment=["K"])
def take_kernel(hidden, rows, columns, out, row_stride, D, K, block: tl.constexpr, block_labels: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    k = tl.arange(0, block_labels)
    labelled = tl.max(tl.load(columns + row * K + k, mask=k < K, other=-1), axis=0) >= 0
    d = tl.program_id(1) * block + tl.arange(0, block)
    x = tl.load(hidden + row * row_stride + d, mask=(d < D) & labelled, other=0.0)
    tl.store(out + place * D + d, x.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def put_back_kernel(x, rows, factor, out, D, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    d = tl.program_id(1) * block + tl.arange(0, block)
    x = tl.load(x + place * D + d, mask=d < D)
    if factor is not None:
        x *= tl.load(factor)
    tl.store(out + row * D + d, x.to(out.dtype.element_ty), mask=d < D)
