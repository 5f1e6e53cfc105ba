"""The gradient of the logits, from the gradients of the kept logits and of the rest: one read and one write.

    dx_v = g_k / τ at v = ids_k,   dx_v = h e^(z_v - rest) / τ elsewhere

with g the gradient of `kept` and h that of `rest`, the log-sum-exp of all other logits; `_topk_forward.py` defines
both. A program takes some consecutive blocks of one row. It writes h e^(z - rest) / τ at every column, then overwrites
the columns at the ids. So no block searches for ids, and their order does not matter.

If the rest of a row has no incoming gradient, the row is not read: zeros are written, and g at the ids.

    bytes       V logits read and V written per row, 12 K read per program; only V written if the rest was not wanted
    operations  widen, scale and subtract, scale, e^x, multiply, round; counted in `docs/kernels.md`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._row_math import (
    LOG2_E,
    body_of,
    clear_row,
    columns_of,
    end_columns,
    load_cells,
    row_offset,
    row_rate,
    store_cells,
)
from ._topk_forward import rows_of


@triton.jit(
    do_not_specialize=[
        "logits",
        "kept_gradient",
        "rest_gradient",  # lies K numbers after the one before it, so at any address
        "gradient",
        "vocab_size",
        "all_columns",
        "n_ids",
        "inner",
        "outer_stride",
        "inner_stride",
        "g_row_stride",
        "g_id_stride",
        "h_stride",
        "gradient_stride",
        "chunks",
        "blocks",
    ],
)
def kept_and_rest_backward_kernel(
    logits,  # rows (outer, inner), or None: no gradient of the rest
    ids,  # (T, K) int64, contiguous
    row_temperature,  # (T,) or None
    rest,  # (T,) float32, of whole rows
    kept_gradient,  # (T, K) float32, like the next
    rest_gradient,  # (T,)
    gradient,  # rows of all_columns, in the dtype of the logits
    temperature,
    vocab_size,
    all_columns,  # padding included
    n_ids,
    inner,
    outer_stride: tl.int64,
    inner_stride,
    g_row_stride: tl.int64,
    g_id_stride: tl.int64,
    h_stride: tl.int64,
    gradient_stride,
    chunks,  # programs per row
    blocks,  # per chunk, of lanes * width columns
    lanes: tl.constexpr,
    width: tl.constexpr,
    shifted: tl.constexpr,  # whether rows of logits may begin elsewhere between multiples of 16 bytes than out's
    block_ids: tl.constexpr,
):
    """One program per chunk of a row."""
    program = tl.program_id(0)
    row = program // chunks
    out = gradient + row.to(tl.int64) * gradient_stride
    head, cells = body_of(out, all_columns, width, shifted)
    body = out + head
    first = (program % chunks) * blocks * lanes
    last = tl.minimum(first + blocks * lanes, cells)
    whole = first + tl.maximum(last - first, 0) // lanes * lanes
    rate = row_rate(row_temperature, row, temperature)
    h = 0.0
    if logits is not None:
        h = tl.load(rest_gradient + row * h_stride)
    if h != 0:
        if logits is not None:
            shift = tl.load(rest + row)
            shift = tl.where(shift == float("-inf"), 0.0, shift)  # no mass is left: every e^(z - 0) is 0
            weight = h * rate
            row_logits = logits + row_offset(row, inner, outer_stride, inner_stride)
            for start in range(first, whole, lanes):
                x = load_cells(row_logits + head, start, cells, lanes, width, False, shifted)
                dx = tl.exp2((x * rate - shift) * LOG2_E) * weight
                if head + (start + lanes) * width > vocab_size:  # only in padding and in the block before it
                    dx = tl.where(head + columns_of(start, lanes, width) < vocab_size, dx, 0.0)
                store_cells(body, start, cells, dx, lanes, width, False)
            if whole < last:
                x = load_cells(row_logits + head, whole, cells, lanes, width, True, shifted)
                dx = tl.exp2((x * rate - shift) * LOG2_E) * weight
                dx = tl.where(head + columns_of(whole, lanes, width) < vocab_size, dx, 0.0)
                store_cells(body, whole, cells, dx, lanes, width, True)
            column = end_columns(head, cells, width, 4 * width)  # of the ends, which the first program has
            at_end = (column < all_columns) & (first == 0)
            end = tl.load(row_logits + column, mask=at_end, other=0.0)
            d_end = tl.exp2((end.to(tl.float32) * rate - shift) * LOG2_E) * weight
            d_end = tl.where(column < vocab_size, d_end, 0.0)
            tl.store(out + column, d_end.to(out.dtype.element_ty), mask=at_end)
    else:
        clear_row(out, all_columns, head, cells, first, last, lanes, width)
    tl.debug_barrier()  # the loops above also wrote at the ids, and must finish first
    for start in range(0, n_ids, block_ids):
        k = start + tl.arange(0, block_ids)
        value = tl.load(ids + row.to(tl.int64) * n_ids + k, mask=k < n_ids, other=-1)
        place = value - head
        mine = (place >= first * width) & (place < last * width)
        mine = mine | ((first == 0) & ((place < 0) | (place >= cells * width)))
        here = mine & (value >= 0) & (value < vocab_size)
        g = tl.load(kept_gradient + row * g_row_stride + k * g_id_stride, mask=here, other=0.0)
        d_id = tl.where(g == 0, 0.0, g * rate)  # a row that takes no part may have any temperature
        tl.store(out + value, d_id.to(out.dtype.element_ty), mask=here)


def backward(
    kept_gradient: Tensor,  # (..., K) float32, like the next
    rest_gradient: Tensor,  # (...,)
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (..., K) int64
    row_temperature: Tensor | None,  # (...,)
    rest: Tensor,  # (...,) from the forward; of whole rows if the logits are a slice of them
    temperature: float,
    vocab_size: int,
    with_rest: bool,
    *,
    out: Tensor | None = None,  # (T, V) of unit column stride
) -> Tensor:
    """The gradient of the logits, in their shape and dtype; contiguous unless `out` is given."""
    n_ids = ids.shape[-1]
    flat, taus = rows_of(ids, row_temperature)
    g, h, lse = kept_gradient.reshape(flat.shape), rest_gradient.reshape(-1), rest.reshape(-1).contiguous()
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    rows = gradient.view(-1, gradient.shape[-1]) if out is None else out
    with _launch.on_device(logits):
        for place, piece in _launch.pieces(logits):
            if piece.rows == 0:
                continue
            launch = _launch.backward(piece.rows, rows.shape[1], logits.dtype)
            target = rows[place]
            kept_and_rest_backward_kernel[(piece.rows * launch.chunks,)](
                piece.x if with_rest else None,
                flat[place],
                None if taus is None else taus[place],
                lse[place],
                g[place],
                h[place],
                target,
                temperature,
                vocab_size,
                rows.shape[1],
                n_ids,
                piece.inner,
                *piece.strides,
                g.stride(0),
                g.stride(1),
                h.stride(0),
                rows.stride(0),
                launch.chunks,
                launch.blocks,
                launch.lanes,
                launch.width,
                with_rest and _launch.shifted(piece.x, target, launch.width),
                _launch.block_labels(n_ids),
                num_warps=launch.warps,
            )
    return gradient


def backward_in_torch(
    kept_gradient: Tensor,  # (T, K)
    rest_gradient: Tensor,  # (T,)
    logits: Tensor,  # (T, V)
    ids: Tensor,
    row_temperature: Tensor | None,
    rest: Tensor,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
) -> Tensor:
    """The same algorithm in torch, with all blocks of all rows side by side."""
    rate = torch.full_like(rest, temperature) if row_temperature is None else row_temperature.to(rest)
    rate = rate.reciprocal()[:, None]
    dx = torch.zeros(logits.shape[0], logits.shape[1] + 1, device=logits.device)  # the last is for ids that match none
    if with_rest:
        h = rest_gradient[:, None]
        shift = rest.masked_fill(rest == -torch.inf, 0)[:, None]
        dz = torch.exp(logits[:, :vocab_size].float() * rate - shift) * (h * rate)
        dx[:, :vocab_size] = torch.where(h == 0, 0, dz)
    nowhere = (ids < 0) | (ids >= vocab_size)
    at_ids = torch.where(kept_gradient == 0, 0, kept_gradient * rate)
    return dx.scatter_(-1, ids.masked_fill(nowhere, logits.shape[1]), at_ids)[:, :-1].to(logits.dtype)
