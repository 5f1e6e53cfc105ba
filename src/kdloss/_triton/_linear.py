"""Log-probs from hidden states and a head on a GPU: products by cuBLAS, all else by the kernels of `_slices.py`.

    forward    for each slice of the head:  x = h @ w.T in float32;  fold x into the rows' states
    backward   for each slice of the head:  x again, or kept;  dx from it in the products' dtype;
                                            dh += dx @ w in float32;  dw of the slice = dx.T @ h, once

With N rows that take part, V the vocabulary and D the hidden size:

    operations  2 N V D forward; 6 N V D backward, 4 if the logits were kept; 4 or 2 for a frozen head
    bytes       float32 logits: 8 N V forward and 8 N V backward (written, read), or 4 if they were kept (read);
                6 N V for dx in half precision (written, read twice); 8 N D per slice for dh; the head once per product
    memory      a slice of float32 logits and one of dx (`_products.SLICE_BYTES`, and half as much), dh in float32

dx is written in the dtype that the products take. The smallest float16 number is 6e-8, so for float16 the incoming
gradients are first multiplied by a power of two, and the results divided by it in float32. The power is computed from
the incoming gradients on the device.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import triton
from torch import Tensor

from . import _launch
from ._compaction import put_back, take
from ._products import add_product_, product_, product_dtype, slices, widest_slice
from ._row_math import LogitTransform, State
from ._slices import BLOCKS, GRADIENT_LANES, LABELS_AT_A_TIME, LANES, WARPS, WIDTH, fold_kernel, gradient_kernel


def bias_rows(transform: LogitTransform, start: int, x: Tensor) -> Tensor | None:
    """The bias of a slice, beside each row of x (N, size)."""
    return None if transform.bias is None else transform.bias[start : start + x.shape[1]].expand(x.shape)


def fold_(
    logp: Tensor,  # (T, K) float32, 0 in rows that take no part
    entropy: Tensor | None,  # (T,)
    state: State,
    x: Tensor,  # (N, size) float32, products with the rows of the head from `start`
    rows: Tensor,  # (N,) of the stream
    transform: LogitTransform,
    start: int,
    *,
    first: bool,
    last: bool,
) -> None:
    """Fold one slice into the state. After the last one, the state, the log-probs and the entropies are complete."""
    n_labels = state.columns.shape[1]
    fold_kernel[(rows.shape[0],)](
        x,
        rows,
        state.columns,
        transform.bias,
        state.row_temperature,
        logp,
        entropy,
        state.maximum,
        state.peak,
        state.mean,
        state.temperature,
        *transform.numbers,
        start,
        x.shape[1],
        n_labels,
        x.stride(0),
        first,
        last,
        LANES,
        WIDTH,
        _launch.any_shifted(x, WIDTH, bias_rows(transform, start, x)),
        _launch.block_labels(n_labels, LABELS_AT_A_TIME),
        num_warps=WARPS,
    )


def gradient_(
    out: Tensor,  # (N, size), any floating dtype
    state: State,
    logp_gradient: Tensor,  # (T, K) float32, contiguous
    entropy_gradient: Tensor | None,  # (T,)
    x: Tensor,  # (M, size) float32
    places: Tensor | None,  # (N,) rows of x; None: the first N
    rows: Tensor,  # (N,) of the stream
    transform: LogitTransform,
    start: int,
) -> Tensor:
    """The gradient of the products x, into `out`, which may be x itself if every row of x is wanted."""
    n_labels = state.columns.shape[1]
    if places is None:
        shifted = _launch.any_shifted(out, WIDTH, x[: out.shape[0]], bias_rows(transform, start, out))
    else:  # any row of x may meet any row of out
        first = x[:1].expand(out.shape)
        shifted = x.stride(0) % WIDTH != 0 or _launch.any_shifted(out, WIDTH, first, bias_rows(transform, start, out))
    gradient_kernel[rows.shape[0], triton.cdiv(x.shape[1], BLOCKS * GRADIENT_LANES * WIDTH)](
        x,
        places,
        rows,
        state.columns,
        transform.bias,
        state.row_temperature,
        state.maximum,
        state.peak,
        state.mean,
        logp_gradient,
        entropy_gradient,
        out,
        state.temperature,
        *transform.numbers,
        start,
        x.shape[1],
        n_labels,
        x.stride(0),
        out.stride(0),
        BLOCKS,
        GRADIENT_LANES,
        WIDTH,
        shifted,
        _launch.block_labels(n_labels, LABELS_AT_A_TIME),
        num_warps=WARPS,
    )
    return out


def forward(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    columns: Tensor,  # (T, K) int64 inside the vocabulary, -100 ignored
    rows: Tensor,  # (N,) int64, distinct
    transform: LogitTransform,
    temperature: float,
    row_temperature: Tensor | None,  # (T,)
    kept: Tensor,  # (N, V) float32, to keep the products in, or (0, V)
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,), maximum, peak (T,), mean like entropy)."""
    state = State.empty(columns, temperature, row_temperature, with_entropy=with_entropy)
    logp = torch.zeros(columns.shape, dtype=torch.float32, device=hidden.device)
    entropy = torch.zeros_like(state.peak) if with_entropy else None
    tokens, vocab_size = hidden.shape[0], kept.shape[1]
    with _launch.on_device(hidden):
        h = take(hidden, rows, state.columns, product_dtype(hidden, weight))
        width = widest_slice(tokens, vocab_size)
        room = None if kept.shape[0] else _launch.room(rows.shape[0], width, dtype=logp.dtype, device=logp.device)
        for part in slices(tokens, vocab_size) if rows.shape[0] else ():
            x = kept[:, part] if room is None else room[:, : part.stop - part.start]
            product_(x, h, weight[part].to(h.dtype).T)
            first, last = part.start == 0, part.stop == vocab_size
            fold_(logp, entropy, state, x, rows, transform, part.start, first=first, last=last)
    if entropy is None or state.mean is None:
        return logp, logp.new_empty(0), state.maximum, state.peak, logp.new_empty(0)
    return logp, entropy, state.maximum, state.peak, state.mean


def backward(
    logp_gradient: Tensor,  # (T, K), undefined where the label is ignored
    entropy_gradient: Tensor | None,  # (T,)
    state: State,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,  # (N,) int64, distinct; every row with a gradient is among them
    places: Tensor | None,  # (N,) of those rows in `kept`; None: all of `kept`, in order
    transform: LogitTransform,
    kept: Tensor,  # (M, V) or (0, V)
    needs: tuple[bool, bool, bool],  # whether hidden, weight and bias want a gradient
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden and weight in their dtypes, and of the bias in float32; (0,) for one not wanted."""
    tokens, vocab_size, count = hidden.shape[0], kept.shape[1], rows.shape[0]
    state = state.contiguous()
    g, h = logp_gradient.float(), None if entropy_gradient is None else entropy_gradient.float()
    make = torch.empty if count and vocab_size == weight.shape[0] else torch.zeros  # whether every row is written below
    dweight = make(weight.shape if needs[1] else (0,), dtype=weight.dtype, device=weight.device)
    dbias = state.peak.new_zeros(weight.shape[0] if needs[2] else 0)
    with _launch.on_device(hidden):
        picked = take(hidden, rows, state.columns, product_dtype(hidden, weight))
        unscaled = None
        if picked.dtype == torch.float16:
            factor = in_range(g, h, state, rows, transform.logit_scale, vocab_size)
            unscaled, g, h = factor.reciprocal(), g * factor, None if h is None else h * factor
        g, h = g.contiguous(), None if h is None else h.contiguous()
        width = widest_slice(tokens, vocab_size)
        space = partial(_launch.room, count, width, device=picked.device)
        room = None if kept.shape[0] else space(dtype=torch.float32)
        # float32 gradients overwrite their slice of logits, unless it is kept
        separate = space(dtype=picked.dtype) if room is None or picked.dtype != torch.float32 else room
        dh = picked.new_empty(picked.shape if needs[0] else (0,), dtype=torch.float32)
        rounds = picked.dtype != weight.dtype or unscaled is not None
        total = picked.new_empty((width, picked.shape[1]) if needs[1] and rounds else (0, 0), dtype=torch.float32)
        for part in slices(tokens, vocab_size) if count else ():
            size = part.stop - part.start
            w = weight[part].to(picked.dtype)
            x = kept[:, part] if room is None else product_(room[:, :size], picked, w.T)
            within = places if room is None else None
            dx = gradient_(separate[:, :size], state, g, h, x, within, rows, transform, part.start)
            if needs[0] and part.start == 0:
                product_(dh, dx, w)
            elif needs[0]:
                add_product_(dh, dx, w)
            if needs[1] and rounds:
                dw = product_(total[:size], dx.T, picked)
                torch.mul(dw, 1 if unscaled is None else unscaled, out=dweight[part])
            elif needs[1]:
                product_(dweight[part], dx.T, picked)
            if needs[2]:
                torch.sum(dx, 0, dtype=torch.float32, out=dbias[part])
        if unscaled is not None:
            dbias *= unscaled
        dhidden = put_back(dh, rows, tokens, hidden.dtype, unscaled) if needs[0] else hidden.new_empty(0)
    return dhidden, dweight, dbias


def in_range(g: Tensor, h: Tensor | None, state: State, rows: Tensor, logit_scale: float, vocab_size: int) -> Tensor:
    """The power of two () that brings the bound on a logit's gradient to about 2^12.

    The bound is the largest |logit_scale| / temperature * (sum_k |g_k| + |h| (1 + log V)) of all rows.
    """
    columns = state.columns[rows]
    bound = g[rows].masked_fill(columns < 0, 0).abs().sum(-1)
    unlabelled = (columns < 0).all(-1)
    if h is not None:
        bound = bound + h[rows].masked_fill(unlabelled, 0).abs() * (1 + math.log(vocab_size))
    if state.row_temperature is not None:
        bound = bound / state.row_temperature[rows].masked_fill(unlabelled, 1)
    largest = bound.amax() * (abs(logit_scale) / state.temperature) if rows.shape[0] else bound.sum()
    factor = (12 - largest.log2().ceil()).clamp(-100, 100).exp2()
    return torch.where(largest.isfinite(), factor, 1)
