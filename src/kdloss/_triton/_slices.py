"""One slice of the vocabulary: folded into the rows' states forward, turned into its own gradient backward.

A product of hidden states with some rows of the head has just written x (N, width) float32. These two kernels do all
the rest:

    fold       c = softcap(logit_scale (x + bias)),  state <- state merged with that of c,  c at the labels kept
               after the last slice: logp = rate (c_label - m) - log s,   entropy = log s - mean
    gradient   p = e^(rate (c - m)) / s
               dx = rate c'(x) (sum_k g_k (onehot_k - p) - h p (rate (c - m) - mean))

with the state (m, s, u) of `_row_math.py`, mean = rate u / s, and g, h the incoming gradients of log-probs and entropy.
`rows` maps rows of x to rows of the stream, all T tokens. Labels, temperatures, states and results are read and written
in the stream, so no value per row has to be gathered first.

A program of `fold` has one row of the slice, in blocks of (lanes, 4) logits, as in `_logits_forward.py`. There are no
atomics, so the same shapes give the same bits. A program of `gradient` has `BLOCKS` blocks of one row.

    bytes       fold: 4 per logit read, 12 per row and slice read and written
                gradient: 4 per logit read, 2 or 4 written
    operations  beside the 2 D and 4 D per logit of the products; counted in `docs/kernels.md`

In either direction the product writes each float32 logit once and a kernel reads it once. Forward that is 8 bytes
against 2 D operations. At 4.3 TB/s and 790 TFLOP/s the two take equally long at D = 735, so hidden sizes below about
that are bound by memory. Programs of `fold` never split a row: if rows are few, the product reads the whole head
meanwhile, D / 2 times the bytes of a row.

The same algorithm in torch is `_logprobs/hidden_op.py`, slice by slice in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._row_math import (
    LOG2_E,
    body_of,
    capped,
    capped_slope,
    clear_row,
    columns_of,
    empty_state,
    end_columns,
    entropy_of,
    fold,
    label_logp,
    load_cells,
    mean_of,
    merge,
    merge_all,
    row_rate,
    store_cells,
)

# Chosen by arithmetic, not measured: 16 logits per thread are in flight, as in `_launch.py`.
LANES, WIDTH, WARPS = 1024, 4, 8
GRADIENT_LANES, BLOCKS = 512, 4
LABELS_AT_A_TIME = 32


@triton.jit
def logit_of(value, bias, column, inside, logit_scale, softcap):
    """c of the products at some columns of the vocabulary, with a bias where they are `inside` the slice."""
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return capped(value, logit_scale, softcap)


@triton.jit
def logits_of_cells(
    x,
    bias,
    start,
    cells,
    logit_scale,
    softcap,
    lanes: tl.constexpr,
    width: tl.constexpr,
    masked: tl.constexpr,
    shifted: tl.constexpr,
    bias_shifted: tl.constexpr,
):
    """c of the products in some cells (lanes, width); -inf past the last cell if `masked`. x is the first cell."""
    value = load_cells(x, start, cells, lanes, width, masked, shifted)
    if bias is not None:
        value += load_cells(bias, start, cells, lanes, width, masked, bias_shifted)
    c = capped(value, logit_scale, softcap)
    if masked:
        c = tl.where((start + tl.arange(0, lanes) < cells)[:, None], c, float("-inf"))
    return c


@triton.jit
def labelled(columns, row, n_labels, block_labels: tl.constexpr):
    """Whether a row has a label."""
    found = 0
    for start in range(0, n_labels, block_labels):
        k = start + tl.arange(0, block_labels)
        found += tl.sum((tl.load(columns + row * n_labels + k, mask=k < n_labels, other=-100) >= 0).to(tl.int32), 0)
    return found > 0


@triton.jit(do_not_specialize=["x", "start", "size", "x_stride"], do_not_specialize_on_alignment=["n_labels"])
def fold_kernel(
    x,  # (N, size) float32, rows contiguous and x_stride apart
    rows,  # (N,) int64, distinct
    columns,  # (T, K) int64 inside the vocabulary, -100 ignored
    bias,  # (V,) or None
    row_temperature,  # (T,) or None
    logp,  # (T, K) float32, like all that follow; until the last slice, c at the labels seen so far
    entropy,  # (T,) or None
    maximum,  # (T,): m
    peak,  # (T,): s, and 1 / s after the last slice
    mean,  # (T,): u, and rate u / s after the last slice; None without entropy
    temperature,
    logit_scale,  # or None
    softcap,  # or None
    start,  # first column of the slice
    size,
    n_labels,
    x_stride,
    first: tl.constexpr,  # whether this is the first slice
    last: tl.constexpr,  # or the last
    lanes: tl.constexpr,
    width: tl.constexpr,
    shifted: tl.constexpr,  # whether the bias of the slice may begin elsewhere between multiples of 4 than rows of x
    block_labels: tl.constexpr,
):
    row = tl.load(rows + tl.program_id(0))
    if labelled(columns, row, n_labels, block_labels):
        rate = row_rate(row_temperature, row, temperature)
        x += tl.program_id(0).to(tl.int64) * x_stride
        m, s, u = empty_state(lanes)
        head, cells = body_of(x, size, width, shifted)
        whole = cells // lanes * lanes
        body = x + head
        body_bias = bias
        if bias is not None:
            body_bias = bias + start + head
        for block in range(0, whole, lanes):
            c = logits_of_cells(
                body, body_bias, block, cells, logit_scale, softcap, lanes, width, False, False, shifted
            )
            m, s, u = fold(m, s, u, c, rate, entropy is not None)
        if whole < cells:
            c = logits_of_cells(body, body_bias, whole, cells, logit_scale, softcap, lanes, width, True, False, shifted)
            m, s, u = fold(m, s, u, c, rate, entropy is not None)
        place = end_columns(head, cells, width, lanes)
        end = tl.load(x + place, mask=place < size, other=0.0)
        c_end = logit_of(end, bias, start + place, place < size, logit_scale, softcap)
        c_end = tl.where(place < size, c_end, float("-inf"))
        m, s, u = fold(m, s, u, c_end[:, None], rate, entropy is not None)
        m, s, u = merge_all(m, s, u, rate, entropy is not None)
        if not first:
            before = tl.load(mean + row) if entropy is not None else 0.0
            m, s, u = merge(tl.load(maximum + row), tl.load(peak + row), before, m, s, u, rate, entropy is not None)
        for label_start in range(0, n_labels, block_labels):
            k = label_start + tl.arange(0, block_labels)
            mine = k < n_labels
            label = tl.load(columns + row * n_labels + k, mask=mine, other=-100)
            inside = (label >= start) & (label < start + size)
            value = tl.load(x + (label - start), mask=inside, other=0.0)
            c_label = logit_of(value, bias, label, inside, logit_scale, softcap)
            if not first:
                c_label = tl.where(inside, c_label, tl.load(logp + row * n_labels + k, mask=mine, other=0.0))
            if last:
                c_label = tl.where(label >= 0, label_logp(c_label, m, s, rate), 0.0)
            if not first:
                tl.debug_barrier()  # all threads have read the state, here and above, before any writes it
            tl.store(logp + row * n_labels + k, c_label, mask=mine)
        tl.store(maximum + row, m)
        if last:
            tl.store(peak + row, tl.div_rn(1.0, s))
            if entropy is not None:
                average = mean_of(s, u, rate)
                tl.store(mean + row, average)
                tl.store(entropy + row, entropy_of(s, average))
        else:
            tl.store(peak + row, s)
            if entropy is not None:
                tl.store(mean + row, u)
    else:
        for label_start in range(0, n_labels, block_labels):
            k = label_start + tl.arange(0, block_labels)
            tl.store(logp + row * n_labels + k, tl.zeros([block_labels], tl.float32), mask=k < n_labels)
        tl.store(maximum + row, 0.0)
        tl.store(peak + row, 1.0)
        if entropy is not None:
            tl.store(mean + row, 0.0)
            tl.store(entropy + row, 0.0)


@triton.jit
def slope_of_row(c, rate, m, top, average, total, h, with_entropy: tl.constexpr):
    """-p (sum_k g_k + h (log p + entropy)), with 0 where c is -inf."""
    d = c - m
    p = tl.exp2(d * (rate * LOG2_E)) * top
    slope = total + tl.zeros_like(p)
    if with_entropy:
        slope += h * (tl.maximum(d * rate, -1e4) - average)  # e^-1e4 is 0 already, and 0 * -inf would be NaN
    return -p * slope


@triton.jit(
    do_not_specialize=["x", "out", "start", "size", "x_stride", "out_stride"],
    do_not_specialize_on_alignment=["n_labels"],
)
def gradient_kernel(
    x,  # (M, size) float32
    places,  # (N,) int64, rows of x; None: the first N
    rows,  # (N,) int64, rows of the stream
    columns,
    bias,
    row_temperature,
    maximum,
    peak,
    mean,  # or None, like entropy_gradient
    logp_gradient,  # (T, K) float32, undefined where the label is ignored
    entropy_gradient,  # (T,) float32, undefined without a label
    out,  # (N, size), rows contiguous and out_stride apart
    temperature,
    logit_scale,
    softcap,
    start,
    size,
    n_labels,
    x_stride,
    out_stride,
    blocks: tl.constexpr,  # per program, of lanes * width columns
    lanes: tl.constexpr,
    width: tl.constexpr,
    shifted: tl.constexpr,  # whether rows of x, or the bias, may begin elsewhere between multiples of 4 than out's
    block_labels: tl.constexpr,
):
    tl.static_assert(blocks <= 4)
    tl.static_assert(block_labels < 256)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    out += place * out_stride
    head, cells = body_of(out, size, width, shifted)
    first = tl.program_id(1) * blocks * lanes
    last = tl.minimum(first + blocks * lanes, cells)
    body = out + head
    total = 0.0
    wanted = 0
    n_found = 0
    near = 0  # a byte for each block of this program: not 0 if there is a label in it
    for label_start in range(0, n_labels, block_labels):
        k = label_start + tl.arange(0, block_labels)
        label = tl.load(columns + row * n_labels + k, mask=k < n_labels, other=-100)
        g = tl.load(logp_gradient + row * n_labels + k, mask=label >= 0, other=0.0)
        total += tl.sum(g, 0)
        wanted += tl.sum((g != 0).to(tl.int32), 0)
        n_found += tl.sum((label >= 0).to(tl.int32), 0)
        away = label - (start + head + first * width)
        inside = (away >= 0) & (away < (last - first) * width)
        block = tl.where(inside, away, 0).to(tl.int32) // (lanes * width)
        near = near | tl.sum(tl.where(inside, 1 << (8 * block), 0), 0)
    h = 0.0
    if entropy_gradient is not None:
        if n_found > 0:
            h = tl.load(entropy_gradient + row)
        wanted += tl.where(h != 0, 1, 0)

    if wanted > 0:
        x += (place if places is None else tl.load(places + place)) * x_stride
        rate = row_rate(row_temperature, row, temperature)
        m = tl.load(maximum + row)
        top = tl.load(peak + row)
        average = tl.load(mean + row) if entropy_gradient is not None else 0.0
        body_bias = bias
        if bias is not None:
            body_bias = bias + start + head
        for begin in range(first, last, lanes):
            c = logits_of_cells(
                x + head, body_bias, begin, cells, logit_scale, softcap, lanes, width, True, shifted, shifted
            )
            dz = slope_of_row(c, rate, m, top, average, total, h, entropy_gradient is not None)
            if near & 255 != 0:  # rare: K labels over V columns
                column = start + head + columns_of(begin, lanes, width)
                dz = add_labels(dz, column, columns, logp_gradient, row, n_labels)
            near = near >> 8
            dx = dz * rate * capped_slope(c, logit_scale, softcap)
            store_cells(body, begin, cells, dx, lanes, width, True)
        here = end_columns(head, cells, width, 4 * width)  # of the ends, which the first program has
        at_end = (here < size) & (first == 0)
        end = tl.load(x + here, mask=at_end, other=0.0)
        c_end = logit_of(end, bias, start + here, at_end, logit_scale, softcap)
        d_end = slope_of_row(c_end, rate, m, top, average, total, h, entropy_gradient is not None)
        if (first == 0) & (cells * width < size):  # most slices have no ends
            d_end = add_labels(d_end, start + here, columns, logp_gradient, row, n_labels)
        d_end *= rate * capped_slope(c_end, logit_scale, softcap)
        tl.store(out + here, d_end.to(out.dtype.element_ty), mask=at_end)
    else:
        clear_row(out, size, head, cells, first, last, lanes, width)


@triton.jit
def add_labels(dz, column, columns, gradient, row, n_labels):
    """dz + sum_k g_k onehot_k, one label after the other."""
    for k in range(n_labels):
        label = tl.load(columns + row * n_labels + k)
        g = tl.load(gradient + row * n_labels + k, mask=label >= 0, other=0.0)
        dz += tl.where(column == label, g, 0.0)
    return dz
