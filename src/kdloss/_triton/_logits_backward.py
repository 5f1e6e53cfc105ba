"""The gradient of the logits, from the gradients of log-probs and entropies: one read and one write.

    dx = softcap'(x) * rate * (sum_k g_k onehot_k - p (sum_k g_k + h (log p + entropy)))
    p = e^(rate (c - m)) / s,   log p + entropy = rate (c - m) - rate u / s

with g the gradient of the log-probs and h that of the entropy; `_row_math.py` defines the rest. A program takes some
consecutive blocks of one row. Every logit costs one exponential and a multiply-add with two values of its row. The
program then writes the columns of its labels again, now with g. It adds up all g of one label in their order, so a
label given twice is rounded once, and no block has to search for labels. Blocks are of cells of the gradient
(`_row_math.py`). The first program of a row also has the ends of the row.

A row is not read if its incoming gradient is 0 or all of its labels are ignored: its zeros are written.

The logits may be a slice of their rows, with m, s and u of whole rows. The label `vocab_size` is then in another slice:
it counts in sum_k g_k and adds no onehot_k here.

    bytes       V logits read and V written per row; some 20 + 12 K per program for the values of its row
    operations  widen, subtract, scale, e^x, multiply, round; with an entropy also clamp and multiply-add; counted in
                `docs/kernels.md`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._logits_forward import IGNORE_INDEX
from ._row_math import (
    LOG2_E,
    State,
    body_of,
    capped,
    capped_slope,
    clear_row,
    columns_of,
    end_columns,
    load_cells,
    row_offset,
    row_rate,
    store_cells,
)


@triton.jit
def owned(label, head, first, last, cells, vocab_size, width: tl.constexpr):
    """Which labels are columns that this program writes: in its cells, or at the ends if it is the first."""
    place = label - head
    mine = (place >= first * width) & (place < last * width)
    mine = mine | ((first == 0) & ((place < 0) | (place >= cells * width)))
    return mine & (label >= 0) & (label < vocab_size)


@triton.jit
def incoming(
    gradient,
    columns,
    row,
    n_labels,
    row_stride,
    label_stride,
    part,
    head,
    first,
    last,
    cells,
    vocab_size,
    width: tl.constexpr,
    block_labels: tl.constexpr,
):
    """(sum of the gradients of a row's labels, whether any is not 0, whether there is a label, how many are `owned`).

    All sums over threads are taken here, where none of them has branched off: elsewhere ptxas spilled.
    """
    total, active, labelled, mine = 0.0, 0, 0, 0
    for start in range(0, n_labels, block_labels):
        k = start + tl.arange(0, block_labels)
        label = tl.load(columns + row.to(tl.int64) * n_labels + k, mask=k < n_labels, other=-100)
        labelled += tl.sum((label != -100).to(tl.int32), 0)
        if gradient is not None:
            inside = (label >= 0) & (label < vocab_size + part)
            g = tl.load(gradient + row.to(tl.int64) * row_stride + k * label_stride, mask=inside, other=0.0)
            total += tl.sum(g.to(tl.float32), 0)
            active += tl.sum((g != 0).to(tl.int32), 0)
            mine += tl.sum(owned(label, head, first, last, cells, vocab_size, width).to(tl.int32), 0)
    return total, active > 0, labelled > 0, mine


@triton.jit
def slope_of(x, softcap, m, rate, offset, share, extra, with_entropy: tl.constexpr):
    """dx = softcap'(x) * (e^(rate d) * (offset + share * d) + extra),   d = c - m."""
    c = capped(x, None, softcap)
    d = c - m
    dx = tl.exp2(d * (rate * LOG2_E))
    if with_entropy:
        # e^-1e4 is 0 already, and 0 times -inf would be NaN
        dx = dx * (offset + share * tl.maximum(d, -1e4 / rate)) + extra
    else:
        dx = dx * offset + extra
    if softcap is not None:
        dx = dx * capped_slope(c, None, softcap)
    return dx


@triton.jit(
    do_not_specialize=[
        "logits",
        "gradient",
        "vocab_size",
        "all_columns",
        "inner",
        "outer_stride",
        "inner_stride",
        "g_row_stride",
        "g_label_stride",
        "h_stride",
        "gradient_stride",
        "chunks",
        "blocks",
    ],
    do_not_specialize_on_alignment=["n_labels"],
)
def backward_kernel(
    logits,  # rows (outer, inner)
    columns,  # (T, K) int64 labels, contiguous
    row_temperature,  # (T,) or None
    maximum,  # (T,) float32, like the next two, from the forward
    peak,
    mean,  # or None: no gradient of the entropy
    logp_gradient,  # (T, K) or None
    entropy_gradient,  # (T,) or None
    gradient,  # rows of all_columns, in the dtype of the logits
    temperature,
    softcap,  # or None
    vocab_size,
    all_columns,  # padding included
    n_labels,
    inner,
    outer_stride: tl.int64,
    inner_stride,
    g_row_stride,
    g_label_stride: tl.int64,
    h_stride,
    gradient_stride,
    chunks,  # programs per row
    blocks,  # per chunk, of lanes * width columns
    lanes: tl.constexpr,
    width: tl.constexpr,
    shifted: tl.constexpr,  # whether rows of logits may begin elsewhere between multiples of 16 bytes than out's
    block_labels: tl.constexpr,
    part: tl.constexpr,  # whether the label vocab_size is in another slice of the row, rather than in none
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
    total, active, labelled, n_owned = incoming(
        logp_gradient,
        columns,
        row,
        n_labels,
        g_row_stride,
        g_label_stride,
        part,
        head,
        first,
        last,
        cells,
        vocab_size,
        width,
        block_labels,
    )
    h = 0.0
    if entropy_gradient is not None:
        h = tl.load(entropy_gradient + row.to(tl.int64) * h_stride).to(tl.float32)
        h = tl.where(labelled, h, 0.0)
        active = active | (h != 0)
    if active:
        rate = row_rate(row_temperature, row, temperature)
        m = tl.load(maximum + row)
        weight = -tl.load(peak + row) * rate
        offset = total * weight
        share = 0.0
        if entropy_gradient is not None:
            offset = (total - h * tl.load(mean + row)) * weight
            share = h * rate * weight
        row_logits = logits + row_offset(row, inner, outer_stride, inner_stride)
        with_entropy: tl.constexpr = entropy_gradient is not None
        for start in range(first, whole, lanes):
            x = load_cells(row_logits + head, start, cells, lanes, width, False, shifted)
            dx = slope_of(x, softcap, m, rate, offset, share, 0.0, with_entropy)
            if head + (start + lanes) * width > vocab_size:  # only in padding and in the block before it
                dx = tl.where(head + columns_of(start, lanes, width) < vocab_size, dx, 0.0)
            store_cells(body, start, cells, dx, lanes, width, False)
        if whole < last:
            x = load_cells(row_logits + head, whole, cells, lanes, width, True, shifted)
            dx = slope_of(x, softcap, m, rate, offset, share, 0.0, with_entropy)
            dx = tl.where(head + columns_of(whole, lanes, width) < vocab_size, dx, 0.0)
            store_cells(body, whole, cells, dx, lanes, width, True)
        column = end_columns(head, cells, width, 4 * width)  # of the ends, which the first program has
        at_end = (column < all_columns) & (first == 0)
        end = tl.load(row_logits + column, mask=at_end, other=0.0)
        d_end = slope_of(end, softcap, m, rate, offset, share, 0.0, with_entropy)
        d_end = tl.where(column < vocab_size, d_end, 0.0)
        tl.store(out + column, d_end.to(out.dtype.element_ty), mask=at_end)
        if logp_gradient is not None:
            g_row = logp_gradient + row.to(tl.int64) * g_row_stride
            if n_owned > 0:  # rare: K labels over all chunks
                tl.debug_barrier()  # the loop above also wrote at the labels, and must finish first
                for start in range(0, n_labels, block_labels):
                    k = start + tl.arange(0, block_labels)
                    label = tl.load(columns + row.to(tl.int64) * n_labels + k, mask=k < n_labels, other=-100)
                    here = owned(label, head, first, last, cells, vocab_size, width)
                    g = tl.zeros([block_labels], tl.float32)
                    for other in range(n_labels):
                        same = label == tl.load(columns + row.to(tl.int64) * n_labels + other)
                        g += tl.where(same, tl.load(g_row + other * g_label_stride).to(tl.float32), 0.0)
                    at_label = tl.load(row_logits + label, mask=here, other=0.0)
                    changed = slope_of(at_label, softcap, m, rate, offset, share, g * rate, with_entropy)
                    tl.store(out + label, changed.to(out.dtype.element_ty), mask=here)
    else:
        clear_row(out, all_columns, head, cells, first, last, lanes, width)


def backward(
    logp_gradient: Tensor | None,  # (T, K)
    entropy_gradient: Tensor | None,  # (T,)
    logits: Tensor,  # (..., V)
    state: State,  # from the forward
    softcap: float | None,
    vocab_size: int,
    *,
    out: Tensor | None = None,  # (T, V) of unit column stride
    part: bool = False,
) -> Tensor:
    """The gradient of the logits, in their shape and dtype; contiguous unless `out` is given."""
    n_labels = state.columns.shape[1]
    taus = None if state.row_temperature is None else state.row_temperature.float()
    columns, temperature, taus, maximum, peak, mean = state._replace(row_temperature=taus).contiguous()
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    rows = gradient.view(-1, gradient.shape[-1]) if out is None else out
    block_labels = _launch.block_labels(n_labels)
    with _launch.on_device(logits):
        for place, piece in _launch.pieces(logits):
            if piece.rows == 0:
                continue
            launch = _launch.backward(piece.rows, rows.shape[1], logits.dtype)
            target = rows[place]
            g = None if logp_gradient is None else logp_gradient[place]
            h = None if entropy_gradient is None else entropy_gradient[place]
            backward_kernel[(piece.rows * launch.chunks,)](
                piece.x,
                columns[place],
                None if taus is None else taus[place],
                maximum[place],
                peak[place],
                None if h is None or mean is None else mean[place],
                g,
                h,
                target,
                temperature,
                softcap,
                vocab_size,
                rows.shape[1],
                n_labels,
                piece.inner,
                *piece.strides,
                0 if g is None else g.stride(0),
                0 if g is None else g.stride(1),
                0 if h is None else h.stride(0),
                rows.stride(0),
                launch.chunks,
                launch.blocks,
                launch.lanes,
                launch.width,
                _launch.shifted(piece.x, target, launch.width),
                block_labels,
                1 if part else 0,
                num_warps=launch.warps,
            )
    return gradient


def backward_in_torch(
    logp_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
    logits: Tensor,  # (T, V)
    state: State,  # of labels inside the vocabulary
    softcap: float | None,
    vocab_size: int,
) -> Tensor:
    """The same algorithm in torch, with all blocks of all rows side by side."""
    columns, temperature, row_temperature, maximum, peak, mean = state
    ignored = columns == IGNORE_INDEX
    g = (
        torch.zeros_like(columns, dtype=torch.float32)
        if logp_gradient is None
        else logp_gradient.masked_fill(ignored, 0)
    )
    h = torch.zeros_like(maximum) if entropy_gradient is None else entropy_gradient.masked_fill(ignored.all(-1), 0)
    skipped = ((g == 0).all(-1) & (h == 0))[:, None]
    rate = torch.full_like(maximum, temperature) if row_temperature is None else row_temperature.float()
    rate = rate.reciprocal()[:, None].masked_fill(skipped, 0)

    x = logits[:, :vocab_size].float().masked_fill(skipped, 0)
    c = x if softcap is None else softcap * torch.tanh(x / softcap)
    d = (c - maximum[:, None]) * rate
    slope = g.sum(-1, keepdim=True)
    if entropy_gradient is not None:
        assert mean is not None
        slope = slope + h[:, None] * (d.clamp(min=-1e4) - mean[:, None])
    dz = -torch.exp(d) * peak[:, None] * slope
    for label, value in zip(columns.clamp(min=0).unbind(-1), g.unbind(-1), strict=True):
        dz = dz.scatter_add(-1, label[:, None], value[:, None])
    dx = dz * rate
    if softcap is not None:
        dx = dx * (1 - (c / softcap).square())
    padding = logits.shape[-1] - vocab_size
    return torch.nn.functional.pad(dx.masked_fill(skipped, 0).to(logits.dtype), (0, padding))
