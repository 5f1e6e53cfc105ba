"""Divergences of rows of two sets of logits, and their gradient: what the kernels compute, and the kernels.

    c = softcap(logit_scale (x + bias)) on each side,   log q = r (c - m) - log s,   log p likewise of the teacher
    d = log p - log q,   r = 1 / τ

`_divergences/rows.py` has the table of values F and of G = q dF/dq, and the same mathematics in torch. There are three
kernels, each with one program per row, or several if rows are few:

    state      reads both rows once: (m, s) of either side, and the value of a KL, which needs nothing else:
               w = sum e_p (r (c_p - m_p) - r (c_q - m_q)),   KL(p || q) = w / s_p - log s_p + log s_q
               merged like a row's state (`_row_math.py`): if the maxima change, w changes by s_p times the change in d
    mixture    reads both rows again, for JSD and the skewed forms, whose mixture needs the complete log q and log p:
               the value and sum_v G_v
    gradient   reads both rows, writes dx = f r c'(x) (G - q sum_v G_v), with f the incoming gradient of the row

The splits of a row give a state or two sums each; one more program per row merges them in a fixed tree.

    bytes       state and mixture: both rows; gradient: both rows, and the student's written
    operations  state: two exponentials and some 20 more per pair of logits; mixture and gradient: three or four, a
                short series for log(1 + x), and some 40 more. While 2 + 2 bytes arrive at 4.3 TB/s, a multiprocessor
                has time for 27 per pair

So the KLs are bound by memory, and the mixtures nearly as much by arithmetic.

If ranks hold a slice of each row, `state` gives the values of the slice, and the other two take (m, log s) of whole
rows as input. They sum the slice's terms, and those of the value may be below 0.

A logit of -inf is a mass of 0. It gives 0 in a term 0 log 0, and +inf where a mass is divided by it. A mass that
float32 rounds to 0 counts as 0. A row with NaN, with +inf or with nothing but -inf is NaN in value and gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._row_math import LOG2_E, capped, capped_slope, load_tile, log_of, row_rate, tile_columns

# Beyond this, sigmoid(t) is 0 or 1 and softplus(t) is 0 or t in float32.
SATURATED = tl.constexpr(1e4)


@triton.jit
def side(x, bias, column, inside, logit_scale, softcap):
    """c of one side from x in some columns; undefined where they are not `inside`."""
    value = x.to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return capped(value, logit_scale, softcap)


@triton.jit
def finite(m):
    """The maximum to subtract; 0 while there is no mass."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def weighted(e, first, second):
    """e (first - second), and 0 where there is no mass."""
    return tl.where(e > 0, e * (first - second), 0.0)


@triton.jit
def fold_pair(m_of, s_of, m_to, s_to, w, of, to, rate, with_value: tl.constexpr):
    """The states (n,) of both sides after one more block (n, E), and w of KL(of || to)."""
    top_of, top_to = tl.maximum(m_of, tl.max(of, 1)), tl.maximum(m_to, tl.max(to, 1))
    base_of, base_to = finite(top_of), finite(top_to)
    d_of, d_to = (of - base_of[:, None]) * rate, (to - base_to[:, None]) * rate
    e_of, e_to = tl.exp2(d_of * LOG2_E), tl.exp2(d_to * LOG2_E)
    moved_of, moved_to = (m_of - base_of) * rate, (m_to - base_to) * rate
    a = tl.exp2(moved_of * LOG2_E)
    if with_value:
        w = tl.where(a > 0, a * w, 0.0) + weighted(a * s_of, moved_of, moved_to)
        w += tl.sum(weighted(e_of, d_of, d_to), 1)
    s_of = a * s_of + tl.sum(e_of, 1)
    s_to = tl.exp2(moved_to * LOG2_E) * s_to + tl.sum(e_to, 1)
    return top_of, s_of, top_to, s_to, w


@triton.jit
def merge_pair(m_of, s_of, m_to, s_to, w, rate, with_value: tl.constexpr):
    """One state () from those of lanes (n,)."""
    top_of, top_to = tl.max(m_of, 0), tl.max(m_to, 0)
    moved_of, moved_to = (m_of - finite(top_of)) * rate, (m_to - finite(top_to)) * rate
    a = tl.exp2(moved_of * LOG2_E)
    if with_value:
        w = tl.sum(tl.where(a > 0, a * w, 0.0) + weighted(a * s_of, moved_of, moved_to), 0)
    else:
        w = 0.0
    return top_of, tl.sum(a * s_of, 0), top_to, tl.sum(tl.exp2(moved_to * LOG2_E) * s_to, 0), w


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, accurate to three roundings: 2 artanh(x / (2 + x)), as a series up to r^15."""
    r = x / (2 + x)
    square = r * r
    series = square * (1.0 / 13 + square * (1.0 / 15))
    series = square * (1.0 / 7 + square * (1.0 / 9 + square * (1.0 / 11) + square * series))
    return 2 * r + 2 * r * square * (1.0 / 3 + square * (1.0 / 5) + square * series)


@triton.jit
def terms(kind: tl.constexpr, q, p, log_q, log_p, omega, log_omega, log_rest):
    """(term of the value, G) in some columns."""
    if kind == "forward_kl":
        value, g = weighted(p, log_p, log_q), -p
    elif kind == "reverse_kl":
        g = -weighted(q, log_p, log_q)
        value = g
    else:
        t = log_p - log_q + (log_omega - log_rest)
        t = tl.where(t == t, tl.minimum(tl.maximum(t, -SATURATED), SATURATED), 0.0)
        decay = tl.exp2(-tl.abs(t) * LOG2_E)
        s = log1p(decay)
        a = -log_rest - tl.maximum(t, 0.0) - s
        b = -log_omega - tl.maximum(-t, 0.0) - s
        w = tl.where(t > 0, decay, 1.0) / (1 + decay)  # sigmoid(-t)
        if kind == "generalized_jsd":
            g = (1 - omega) * q * a
            value = omega * p * b + g
        elif kind == "skewed_forward_kl":
            value, g = p * b, -p * w
        else:
            value, g = q * a, q * (a - w)
    return value, g


@triton.jit
def no_distribution(log_s_q, log_s_p):
    """Whether a side of the row has no mass or NaN: its log s is then -inf or NaN, and never otherwise."""
    return (log_s_q == float("-inf")) | (log_s_q != log_s_q) | (log_s_p == float("-inf")) | (log_s_p != log_s_p)


@triton.jit
def write_state(state, row, value, total, numbers, plane, kind: tl.constexpr):
    """Write what follows from a whole row's state; `state_kernel` describes the arguments."""
    m_of, s_of, m_to, s_to, w = state
    log_of_s, log_to_s = log_of(s_of), log_of(s_to)
    if kind == "forward_kl" or kind == "reverse_kl":
        kl = w / s_of - log_of_s + log_to_s
        kl = tl.where(kl < 0, 0.0, kl)  # NaN stays
        kl = tl.where(no_distribution(log_of_s, log_to_s), float("nan"), kl)
        tl.store(value + row, kl)
        tl.store(total + row, tl.where(kl == kl, -1.0, kl) if kind == "forward_kl" else kl)
    if kind == "forward_kl":
        m_of, log_of_s, m_to, log_to_s = m_to, log_to_s, m_of, log_of_s
    tl.store(numbers + row, m_of)
    tl.store(numbers + plane + row, log_of_s)
    tl.store(numbers + 2 * plane + row, m_to)
    tl.store(numbers + 3 * plane + row, log_to_s)


@triton.jit
def write_sums(found, slope, row, value, total, part: tl.constexpr):
    """Write a mixture's value and sum of G; only the value of a whole row is clamped to at least 0."""
    if not part:
        found = tl.where(found < 0, 0.0, found)
    tl.store(value + row, found)
    tl.store(total + row, slope)


@triton.jit(do_not_specialize=["value", "total", "numbers", "size", "plane", "part_plane", "blocks", "splits"])
def state_kernel(
    x,  # (R, V) logits of the student, or products with its head
    y,  # (R, V) of the teacher
    bias,  # (V,) or None, like the next
    teacher_bias,
    row_temperature,  # (R,) or None
    value,  # (R,) float32, written only for the KLs
    total,  # (R,) sum G, likewise
    numbers,  # (4, R) float32, `plane` apart: m and log s of the student, then of the teacher
    parts,  # (5, R, splits) states, or None if one program has the whole row
    temperature,
    logit_scale,  # or None, like the next three
    softcap,
    teacher_logit_scale,
    teacher_softcap,
    size,
    x_columns,  # columns that are safe to load: `size`, and some that have no effect
    y_columns,
    plane,
    x_stride,
    y_stride,
    part_plane,  # R * splits
    blocks,  # per split, of lanes * width columns
    splits,
    kind: tl.constexpr,
    lanes: tl.constexpr,
    width: tl.constexpr,
    aligned: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // splits
    first = (program % splits) * blocks * (lanes * width)
    x += row.to(tl.int64) * x_stride
    y += row.to(tl.int64) * y_stride
    rate = row_rate(row_temperature, row, temperature)
    zero = tl.zeros([lanes], tl.float32)
    m_of, s_of, m_to, s_to, w = zero + float("-inf"), zero, zero + float("-inf"), zero, zero
    for start in range(first, min(first + blocks * (lanes * width), size), lanes * width):
        column = tile_columns(start, lanes, width)
        inside = column < size
        of = load_tile(x, start, 1, x_columns, lanes, width, aligned)
        to = load_tile(y, start, 1, y_columns, lanes, width, aligned)
        of = tl.where(inside, side(of, bias, column, inside, logit_scale, softcap), float("-inf"))
        to = side(to, teacher_bias, column, inside, teacher_logit_scale, teacher_softcap)
        to = tl.where(inside, to, float("-inf"))
        if kind == "forward_kl":  # the expectation is over the teacher
            of, to = to, of
        m_of, s_of, m_to, s_to, w = fold_pair(
            m_of, s_of, m_to, s_to, w, of, to, rate, kind == "forward_kl" or kind == "reverse_kl"
        )
    m_of, s_of, m_to, s_to, w = merge_pair(
        m_of, s_of, m_to, s_to, w, rate, kind == "forward_kl" or kind == "reverse_kl"
    )
    if parts is None:
        write_state((m_of, s_of, m_to, s_to, w), row, value, total, numbers, plane, kind)
    else:
        parts += program
        tl.store(parts, m_of)
        tl.store(parts + part_plane, s_of)
        tl.store(parts + 2 * part_plane, m_to)
        tl.store(parts + 3 * part_plane, s_to)
        tl.store(parts + 4 * part_plane, w)


@triton.jit(do_not_specialize=["value", "total", "numbers", "plane", "part_plane", "splits"])
def pair_merge_kernel(
    row_temperature,
    value,
    total,
    numbers,
    parts,
    temperature,
    plane,
    part_plane,
    splits,
    kind: tl.constexpr,
    block_splits: tl.constexpr,  # at least `splits`
):
    """The state of each row from those of its splits. The arguments are those of `state_kernel`."""
    row = tl.program_id(0)
    k = tl.arange(0, block_splits)
    mine = k < splits
    place = parts + row * splits + k
    m_of = tl.load(place, mask=mine, other=float("-inf"))
    s_of = tl.load(place + part_plane, mask=mine, other=0.0)
    m_to = tl.load(place + 2 * part_plane, mask=mine, other=float("-inf"))
    s_to = tl.load(place + 3 * part_plane, mask=mine, other=0.0)
    w = tl.load(place + 4 * part_plane, mask=mine, other=0.0)
    rate = row_rate(row_temperature, row, temperature)
    with_value: tl.constexpr = kind == "forward_kl" or kind == "reverse_kl"
    state = merge_pair(m_of, s_of, m_to, s_to, w, rate, with_value)
    write_state(state, row, value, total, numbers, plane, kind)


@triton.jit(do_not_specialize=["value", "total", "numbers", "size", "plane", "part_plane", "blocks", "splits"])
def mixture_kernel(
    x,
    y,
    bias,
    teacher_bias,
    row_temperature,
    value,
    total,
    numbers,  # read
    parts,  # (2, R, splits): the value and sum G of each split, or None
    temperature,
    logit_scale,
    softcap,
    teacher_logit_scale,
    teacher_softcap,
    omega,
    log_omega,
    log_rest,  # log(1 - omega)
    size,
    x_columns,
    y_columns,
    plane,
    x_stride,
    y_stride,
    part_plane,
    blocks,
    splits,
    kind: tl.constexpr,
    block: tl.constexpr,
    part: tl.constexpr,  # whether x and y are a slice of the rows
):
    program = tl.program_id(0)
    row = program // splits
    x += row.to(tl.int64) * x_stride
    y += row.to(tl.int64) * y_stride
    rate = row_rate(row_temperature, row, temperature)
    m_q, log_s_q = tl.load(numbers + row), tl.load(numbers + plane + row)
    m_p, log_s_p = tl.load(numbers + 2 * plane + row), tl.load(numbers + 3 * plane + row)
    values, gradients = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    found, slope = float("nan"), float("nan")
    if not no_distribution(log_s_q, log_s_p):
        first = (program % splits) * blocks * block
        for start in range(first, min(first + blocks * block, size), block):
            column = start + tl.arange(0, block)
            inside = column < size
            c = tl.load(x + column, mask=column < x_columns, other=0.0)
            log_q = (side(c, bias, column, inside, logit_scale, softcap) - m_q) * rate - log_s_q
            c = tl.load(y + column, mask=column < y_columns, other=0.0)
            c = side(c, teacher_bias, column, inside, teacher_logit_scale, teacher_softcap)
            log_p = (c - m_p) * rate - log_s_p
            log_q, log_p = tl.where(inside, log_q, float("-inf")), tl.where(inside, log_p, float("-inf"))
            q, p = tl.exp2(log_q * LOG2_E), tl.exp2(log_p * LOG2_E)
            term, g = terms(kind, q, p, log_q, log_p, omega, log_omega, log_rest)
            values += term
            gradients += g
        found, slope = tl.sum(values, 0), tl.sum(gradients, 0)
    if parts is None:
        write_sums(found, slope, row, value, total, part)
    else:
        tl.store(parts + program, found)
        tl.store(parts + part_plane + program, slope)


@triton.jit(do_not_specialize=["value", "total", "part_plane", "splits"])
def pair_sum_kernel(
    value,
    total,
    parts,
    part_plane,
    splits,
    part: tl.constexpr,
    block_splits: tl.constexpr,  # at least `splits`
):
    """The sums of each row over its splits. The arguments are those of `mixture_kernel`."""
    row = tl.program_id(0)
    k = tl.arange(0, block_splits)
    place = parts + row * splits + k
    found = tl.sum(tl.load(place, mask=k < splits, other=0.0), 0)
    slope = tl.sum(tl.load(place + part_plane, mask=k < splits, other=0.0), 0)
    write_sums(found, slope, row, value, total, part)


@triton.jit(do_not_specialize=["factor", "total", "numbers", "size", "plane"])
def divergence_gradient_kernel(
    x,
    y,
    bias,
    teacher_bias,
    row_temperature,
    factor,  # (R,) the incoming gradient; a row where it is 0 is not read
    total,
    numbers,
    out,  # (R, size + padding) contiguous columns; may be x
    temperature,
    logit_scale,
    softcap,
    teacher_logit_scale,
    teacher_softcap,
    omega,
    log_omega,
    log_rest,
    size,
    x_columns,
    y_columns,
    out_columns,  # columns to write; the last of them may be padding
    plane,
    x_stride,
    y_stride,
    out_stride,
    span,  # columns per program, a multiple of a block
    kind: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    out += row.to(tl.int64) * out_stride
    first = tl.program_id(1) * span
    incoming = tl.load(factor + row).to(tl.float32)
    if incoming != 0:
        x += row.to(tl.int64) * x_stride
        y += row.to(tl.int64) * y_stride
        rate = row_rate(row_temperature, row, temperature)
        m_q, log_s_q = tl.load(numbers + row), tl.load(numbers + plane + row)
        m_p, log_s_p = tl.load(numbers + 2 * plane + row), tl.load(numbers + 3 * plane + row)
        sum_g = tl.load(total + row)
        for start in range(first, min(first + span, out_columns), block):
            column = start + tl.arange(0, block)
            inside = column < size
            c = tl.load(x + column, mask=column < x_columns, other=0.0)
            c = side(c, bias, column, inside, logit_scale, softcap)
            log_q = (c - m_q) * rate - log_s_q
            c_p = tl.load(y + column, mask=column < y_columns, other=0.0)
            c_p = side(c_p, teacher_bias, column, inside, teacher_logit_scale, teacher_softcap)
            log_p = (c_p - m_p) * rate - log_s_p
            log_q, log_p = tl.where(inside, log_q, float("-inf")), tl.where(inside, log_p, float("-inf"))
            q, p = tl.exp2(log_q * LOG2_E), tl.exp2(log_p * LOG2_E)
            _, g = terms(kind, q, p, log_q, log_p, omega, log_omega, log_rest)
            dx = (g - q * sum_g) * (incoming * rate) * capped_slope(c, logit_scale, softcap)
            dx = tl.where(inside, dx, 0.0)
            tl.store(out + column, dx.to(out.dtype.element_ty), mask=column < out_columns)
    else:
        for start in range(first, min(first + span, out_columns), block):
            column = start + tl.arange(0, block)
            tl.store(out + column, tl.zeros([block], out.dtype.element_ty), mask=column < out_columns)
