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
    operations  `docs/kernels.md` has the instructions of each kernel per pair of logits

The KLs are bound by memory. The 31 instructions of a pair in the JSD's mixture, in bfloat16, are

     2    unpack                                8    the series of log2(1 + x)
     4    log2 q and log2 p                     2    `larger`: a choice, and the series' product
     2    their clamps, for masses of 0         4    the sums of q log2(q / m) and p log2(p / m)
     2    d, and the log-odds t                 3    exponentials: q, p, and the ratio 2^-|t|
     2    -|t|, and the sign of t               2    loads, addresses, the loop

Everything is computed in base 2, so that no exponential needs a factor of its own, and neither shares nor log 2 are
multiplied before the end. The sums take `larger` of every pair, and d of the pairs that have it, under a predicate. `q`
and `p` could come from one exponential and the ratio. That takes more instructions, and a small share would cost them
their digits.

If ranks hold a slice of each row, `state` gives the values of the slice, and the other two take (m, log s) of whole
rows as input. They sum the slice's terms, and those of the value may be below 0.

A logit of -inf is a mass of 0. It gives 0 in a term 0 log 0, and +inf where a mass is divided by it. A mass that
float32 rounds to 0 counts as 0. A row with NaN, with +inf or with nothing but -inf is NaN in value and gradient.
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
    end_columns,
    load_cells,
    log_of,
    row_rate,
    store_cells,
)

# Beyond this, sigmoid(t) is 0 or 1 and softplus(t) is 0 or t in float32.
SATURATED = tl.constexpr(1e4)
LOG_2 = tl.constexpr(0.6931471805599453)


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
    return e * tl.where(e > 0, first - second, 0.0)


@triton.jit
def fold_pair(m_of, s_of, m_to, s_to, w, of, to, rate, with_value: tl.constexpr):
    """The states (n,) of both sides after one more block (n, E), and w of KL(of || to) in units of log 2."""
    rate2 = rate * LOG2_E + tl.zeros_like(s_of)
    top_of, top_to = tl.maximum(m_of, tl.max(of, 1)), tl.maximum(m_to, tl.max(to, 1))
    base_of, base_to = finite(top_of), finite(top_to)
    d_of, d_to = (of - base_of[:, None]) * rate2[:, None], (to - base_to[:, None]) * rate2[:, None]
    e_of, e_to = tl.exp2(d_of), tl.exp2(d_to)
    moved_of, moved_to = (m_of - base_of) * rate2, (m_to - base_to) * rate2
    a = tl.exp2(moved_of)
    s_before = a * s_of
    if with_value:
        w = tl.where(a > 0, a * w, 0.0) + weighted(s_before, moved_of, moved_to)
        w += tl.sum(weighted(e_of, d_of, d_to), 1)
    s_of = s_before + tl.sum(e_of, 1)
    s_to = tl.exp2(moved_to) * s_to + tl.sum(e_to, 1)
    return top_of, s_of, top_to, s_to, w


@triton.jit
def merge_pair(m_of, s_of, m_to, s_to, w, rate, with_value: tl.constexpr):
    """One state () from those of lanes (n,)."""
    rate2 = rate * LOG2_E
    top_of, top_to = tl.max(m_of, 0), tl.max(m_to, 0)
    moved_of, moved_to = (m_of - finite(top_of)) * rate2, (m_to - finite(top_to)) * rate2
    a = tl.exp2(moved_of)
    if with_value:
        w = tl.sum(tl.where(a > 0, a * w, 0.0) + weighted(a * s_of, moved_of, moved_to), 0)
    else:
        w = 0.0
    return top_of, tl.sum(a * s_of, 0), top_to, tl.sum(tl.exp2(moved_to) * s_to, 0), w


@triton.jit
def log2_1p(x):
    """log2(1 + x) / x for 0 <= x <= 1, off by 2e-7 of itself: a fit of degree 8 that makes log2(2) exactly 1."""
    series = -0.04204043745994568 + 0.0074095344170928 * x
    series = 0.112052783370018 + series * x
    series = -0.1964838057756424 + series * x
    series = 0.27536478638648987 + series * x
    series = -0.3583434522151947 + series * x
    series = 0.4806855022907257 + series * x
    series = -0.7213398814201355 + series * x
    return 1.4426950216293335 + series * x


@triton.jit
def mixed(q, p, odds, rest_bits, teacher_bits):
    """(q, p, d, larger, first, w) from log2 q and log2 p, for the mixture m = (1 - omega) q + omega p.

    log2(q / m) and log2(p / m) are larger - d and larger where the teacher's part of m is the larger one (`first`), and
    larger and larger + d elsewhere. w is the student's share of m. The numbers of bits are -log2(1 - omega) and
    -log2 omega, and odds is log2(omega / (1 - omega)). No term has the size of a large number of bits if its result has
    not: with a share of 1e-30, a JSD is of the order of 1e-30, and still has its digits.
    """
    q, p = tl.maximum(q, -SATURATED), tl.maximum(p, -SATURATED)  # so that a mass of 0 gives 0 in every product
    d = p - q
    t = d + odds
    ratio = tl.exp2(-tl.abs(t))  # of the smaller part of m to the larger one
    first = t > 0
    bits = log2_1p(ratio) * ratio
    larger = tl.where(first, teacher_bits, rest_bits) - bits
    # the quotient by 1 + ratio would take two instructions more
    return tl.exp2(q), tl.exp2(p), d, larger, first, tl.where(first, ratio, 1.0) * tl.exp2(-bits)


@triton.jit
def add_mixture(found, slope, kind: tl.constexpr, q, p, odds, rest_bits, teacher_bits):
    """The two sums that `write_sums` takes, after more columns. To leave a sum as it is costs no instruction."""
    q, p, d, larger, first, w = mixed(q, p, odds, rest_bits, teacher_bits)
    if kind == "skewed_reverse_kl":
        found += q * larger
        found = tl.where(first, found - q * d, found)
        slope += q * w
    else:
        found += p * larger
        found = tl.where(first, found, found + p * d)
        if kind == "generalized_jsd":
            slope += q * larger
            slope = tl.where(first, slope - q * d, slope)
        else:
            slope += p * w
    return found, slope


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
        kl = w * LOG_2 / s_of - log_of_s + log_to_s
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
def write_sums(found, slope, row, value, total, omega, rest, kind: tl.constexpr, part: tl.constexpr):
    """Write a mixture's value and sum of G, from the sums of its terms; only the value of a whole row is at least 0."""
    if kind == "generalized_jsd":
        slope = slope * LOG_2 * rest
        found = found * LOG_2 * omega + slope
    elif kind == "skewed_forward_kl":
        found, slope = found * LOG_2, -slope
    else:
        found = found * LOG_2
        slope = found - slope
    if not part:
        found = tl.where(found < 0, 0.0, found)
    tl.store(value + row, found)
    tl.store(total + row, slope)


@triton.jit
def side_of_cells(
    x,
    bias,
    start,
    head,
    cells,
    logit_scale,
    softcap,
    lanes: tl.constexpr,
    width: tl.constexpr,
    masked: tl.constexpr,
    shifted: tl.constexpr,  # x
    bias_shifted: tl.constexpr,
):
    """c of one side in some cells of a row, (lanes, width); -inf past the last cell if `masked`."""
    value = load_cells(x + head, start, cells, lanes, width, masked, shifted)
    if bias is not None:
        value += load_cells(bias + head, start, cells, lanes, width, masked, bias_shifted)
    c = capped(value, logit_scale, softcap)
    if masked:
        c = tl.where((start + tl.arange(0, lanes) < cells)[:, None], c, float("-inf"))
    return c


@triton.jit
def side_of_ends(x, bias, column, inside, logit_scale, softcap):
    """c of one side in the ends of a row (n,); -inf where they are not `inside`."""
    value = tl.load(x + column, mask=inside, other=0.0)
    return tl.where(inside, side(value, bias, column, inside, logit_scale, softcap), float("-inf"))


@triton.jit(
    do_not_specialize=[
        "x",
        "y",
        "value",
        "total",
        "numbers",
        "size",
        "plane",
        "x_stride",
        "y_stride",
        "part_plane",
        "blocks",
        "splits",
    ]
)
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
    plane,
    x_stride,
    y_stride,
    part_plane,  # R * splits
    blocks,  # per split, of lanes * width columns
    splits,
    kind: tl.constexpr,
    lanes: tl.constexpr,
    width: tl.constexpr,
    shifted: tl.constexpr,  # whether rows of y, or a bias, may begin elsewhere between multiples of `width` than x's
):
    program = tl.program_id(0)
    row = program // splits
    x += row.to(tl.int64) * x_stride
    y += row.to(tl.int64) * y_stride
    rate = row_rate(row_temperature, row, temperature)
    zero = tl.zeros([lanes], tl.float32)
    m_of, s_of, m_to, s_to, w = zero + float("-inf"), zero, zero + float("-inf"), zero, zero
    with_value: tl.constexpr = kind == "forward_kl" or kind == "reverse_kl"
    head, cells = body_of(x, size, width, shifted)
    first = (program % splits) * blocks * lanes
    last = tl.minimum(first + blocks * lanes, cells)
    whole = first + tl.maximum(last - first, 0) // lanes * lanes
    for start in range(first, whole, lanes):
        of = side_of_cells(x, bias, start, head, cells, logit_scale, softcap, lanes, width, False, False, shifted)
        to = side_of_cells(
            y,
            teacher_bias,
            start,
            head,
            cells,
            teacher_logit_scale,
            teacher_softcap,
            lanes,
            width,
            False,
            shifted,
            shifted,
        )
        if kind == "forward_kl":  # the expectation is over the teacher
            of, to = to, of
        m_of, s_of, m_to, s_to, w = fold_pair(m_of, s_of, m_to, s_to, w, of, to, rate, with_value)
    if whole < last:
        of = side_of_cells(x, bias, whole, head, cells, logit_scale, softcap, lanes, width, True, False, shifted)
        to = side_of_cells(
            y,
            teacher_bias,
            whole,
            head,
            cells,
            teacher_logit_scale,
            teacher_softcap,
            lanes,
            width,
            True,
            shifted,
            shifted,
        )
        if kind == "forward_kl":
            of, to = to, of
        m_of, s_of, m_to, s_to, w = fold_pair(m_of, s_of, m_to, s_to, w, of, to, rate, with_value)
    if first == 0:
        column = end_columns(head, cells, width, lanes)
        inside = column < size
        end_of = side_of_ends(x, bias, column, inside, logit_scale, softcap)[:, None]
        end_to = side_of_ends(y, teacher_bias, column, inside, teacher_logit_scale, teacher_softcap)[:, None]
        if kind == "forward_kl":
            end_of, end_to = end_to, end_of
        m_of, s_of, m_to, s_to, w = fold_pair(m_of, s_of, m_to, s_to, w, end_of, end_to, rate, with_value)
    m_of, s_of, m_to, s_to, w = merge_pair(m_of, s_of, m_to, s_to, w, rate, with_value)
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


@triton.jit(
    do_not_specialize=[
        "x",
        "y",
        "value",
        "total",
        "numbers",
        "size",
        "plane",
        "x_stride",
        "y_stride",
        "part_plane",
        "blocks",
        "splits",
    ]
)
def mixture_kernel(
    x,
    y,
    bias,
    teacher_bias,
    row_temperature,
    value,
    total,
    numbers,  # read
    parts,  # (2, R, splits): the sums of each split, or None
    temperature,
    logit_scale,
    softcap,
    teacher_logit_scale,
    teacher_softcap,
    omega,  # the teacher's share
    rest,  # the student's, 1 - omega
    log_omega,
    log_rest,
    size,
    plane,
    x_stride,
    y_stride,
    part_plane,
    blocks,
    splits,
    kind: tl.constexpr,
    lanes: tl.constexpr,
    width: tl.constexpr,
    shifted: tl.constexpr,
    part: tl.constexpr,  # whether x and y are a slice of the rows
):
    program = tl.program_id(0)
    row = program // splits
    x += row.to(tl.int64) * x_stride
    y += row.to(tl.int64) * y_stride
    rate2 = row_rate(row_temperature, row, temperature) * LOG2_E
    m_q, log_s_q = tl.load(numbers + row), tl.load(numbers + plane + row)
    m_p, log_s_p = tl.load(numbers + 2 * plane + row), tl.load(numbers + 3 * plane + row)
    minus_q, minus_p = -log_s_q * LOG2_E, -log_s_p * LOG2_E
    odds, rest_bits, teacher_bits = (log_omega - log_rest) * LOG2_E, -log_rest * LOG2_E, -log_omega * LOG2_E
    values, gradients = tl.zeros([lanes, width], tl.float32), tl.zeros([lanes, width], tl.float32)
    found, slope = float("nan"), float("nan")
    if not no_distribution(log_s_q, log_s_p):
        head, cells = body_of(x, size, width, shifted)
        first = (program % splits) * blocks * lanes
        last = tl.minimum(first + blocks * lanes, cells)
        whole = first + tl.maximum(last - first, 0) // lanes * lanes
        for start in range(first, whole, lanes):
            c_q = side_of_cells(x, bias, start, head, cells, logit_scale, softcap, lanes, width, False, False, shifted)
            c_p = side_of_cells(
                y,
                teacher_bias,
                start,
                head,
                cells,
                teacher_logit_scale,
                teacher_softcap,
                lanes,
                width,
                False,
                shifted,
                shifted,
            )
            q, p = (c_q - m_q) * rate2 + minus_q, (c_p - m_p) * rate2 + minus_p
            values, gradients = add_mixture(values, gradients, kind, q, p, odds, rest_bits, teacher_bits)
        if whole < last:
            c_q = side_of_cells(x, bias, whole, head, cells, logit_scale, softcap, lanes, width, True, False, shifted)
            c_p = side_of_cells(
                y,
                teacher_bias,
                whole,
                head,
                cells,
                teacher_logit_scale,
                teacher_softcap,
                lanes,
                width,
                True,
                shifted,
                shifted,
            )
            q, p = (c_q - m_q) * rate2 + minus_q, (c_p - m_p) * rate2 + minus_p
            values, gradients = add_mixture(values, gradients, kind, q, p, odds, rest_bits, teacher_bits)
        end_values, end_gradients = tl.zeros([lanes], tl.float32), tl.zeros([lanes], tl.float32)
        if first == 0:
            column = end_columns(head, cells, width, lanes)
            inside = column < size
            end_q = side_of_ends(x, bias, column, inside, logit_scale, softcap)
            end_p = side_of_ends(y, teacher_bias, column, inside, teacher_logit_scale, teacher_softcap)
            end_q, end_p = (end_q - m_q) * rate2 + minus_q, (end_p - m_p) * rate2 + minus_p
            end_values, end_gradients = add_mixture(
                end_values, end_gradients, kind, end_q, end_p, odds, rest_bits, teacher_bits
            )
        found = tl.sum(tl.sum(values, 1) + end_values, 0)
        slope = tl.sum(tl.sum(gradients, 1) + end_gradients, 0)
    if parts is None:
        write_sums(found, slope, row, value, total, omega, rest, kind, part)
    else:
        tl.store(parts + program, found)
        tl.store(parts + part_plane + program, slope)


@triton.jit(do_not_specialize=["value", "total", "part_plane", "splits"])
def pair_sum_kernel(
    value,
    total,
    parts,
    omega,
    rest,
    part_plane,
    splits,
    kind: tl.constexpr,
    part: tl.constexpr,
    block_splits: tl.constexpr,  # at least `splits`
):
    """The sums of each row over its splits. The arguments are those of `mixture_kernel`."""
    row = tl.program_id(0)
    k = tl.arange(0, block_splits)
    place = parts + row * splits + k
    found = tl.sum(tl.load(place, mask=k < splits, other=0.0), 0)
    slope = tl.sum(tl.load(place + part_plane, mask=k < splits, other=0.0), 0)
    write_sums(found, slope, row, value, total, omega, rest, kind, part)


@triton.jit
def gradient_terms(kind: tl.constexpr, q, p, odds, rest_bits, teacher_bits, sum_g, rest):
    """G - q sum G from log2 q and log2 p."""
    if kind == "forward_kl":
        found = -tl.exp2(p) - tl.exp2(q) * sum_g
    elif kind == "reverse_kl":
        mass = tl.exp2(q)
        found = weighted(mass, q, p) * LOG_2 - mass * sum_g
    else:
        q, p, d, larger, first, w = mixed(q, p, odds, rest_bits, teacher_bits)
        a = tl.where(first, larger - d, larger)  # log2(q / m)
        if kind == "generalized_jsd":
            found = q * (a * (rest * LOG_2) - sum_g)
        elif kind == "skewed_forward_kl":
            found = -p * w - q * sum_g
        else:
            found = q * (a * LOG_2 - w - sum_g)
    return found


@triton.jit(
    do_not_specialize=[
        "x",
        "y",
        "factor",
        "total",
        "numbers",
        "out",
        "size",
        "out_columns",
        "plane",
        "x_stride",
        "y_stride",
        "out_stride",
        "blocks",
    ]
)
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
    rest,
    log_omega,
    log_rest,
    size,
    out_columns,  # columns to write; those from `size` on are padding
    plane,
    x_stride,
    y_stride,
    out_stride,
    blocks,  # per program, of lanes * width columns
    kind: tl.constexpr,
    lanes: tl.constexpr,
    width: tl.constexpr,
    shifted: tl.constexpr,  # whether rows of x or y, or a bias, may begin elsewhere between multiples of it than out's
):
    row = tl.program_id(0)
    out += row.to(tl.int64) * out_stride
    head, cells = body_of(out, size, width, shifted)
    first = tl.program_id(1) * blocks * lanes
    last = tl.minimum(first + blocks * lanes, cells)
    whole = first + tl.maximum(last - first, 0) // lanes * lanes
    incoming = tl.load(factor + row).to(tl.float32)
    if incoming != 0:
        x += row.to(tl.int64) * x_stride
        y += row.to(tl.int64) * y_stride
        rate = row_rate(row_temperature, row, temperature)
        rate2 = rate * LOG2_E
        m_q, log_s_q = tl.load(numbers + row), tl.load(numbers + plane + row)
        m_p, log_s_p = tl.load(numbers + 2 * plane + row), tl.load(numbers + 3 * plane + row)
        minus_q, minus_p = -log_s_q * LOG2_E, -log_s_p * LOG2_E
        odds, rest_bits, teacher_bits = (log_omega - log_rest) * LOG2_E, -log_rest * LOG2_E, -log_omega * LOG2_E
        sum_g = tl.load(total + row)
        weight = incoming * rate
        for start in range(first, whole, lanes):
            c = side_of_cells(x, bias, start, head, cells, logit_scale, softcap, lanes, width, False, shifted, shifted)
            c_p = side_of_cells(
                y,
                teacher_bias,
                start,
                head,
                cells,
                teacher_logit_scale,
                teacher_softcap,
                lanes,
                width,
                False,
                shifted,
                shifted,
            )
            q, p = (c - m_q) * rate2 + minus_q, (c_p - m_p) * rate2 + minus_p
            dx = gradient_terms(kind, q, p, odds, rest_bits, teacher_bits, sum_g, rest) * weight
            store_cells(out + head, start, cells, dx * capped_slope(c, logit_scale, softcap), lanes, width, False)
        if whole < last:
            c = side_of_cells(x, bias, whole, head, cells, logit_scale, softcap, lanes, width, True, shifted, shifted)
            c_p = side_of_cells(
                y,
                teacher_bias,
                whole,
                head,
                cells,
                teacher_logit_scale,
                teacher_softcap,
                lanes,
                width,
                True,
                shifted,
                shifted,
            )
            q, p = (c - m_q) * rate2 + minus_q, (c_p - m_p) * rate2 + minus_p
            dx = gradient_terms(kind, q, p, odds, rest_bits, teacher_bits, sum_g, rest) * weight
            store_cells(out + head, whole, cells, dx * capped_slope(c, logit_scale, softcap), lanes, width, True)
        column = end_columns(head, cells, width, 4 * width)  # of the ends, which the first program has
        at_end = (column < size) & (first == 0)
        end_c = side_of_ends(x, bias, column, at_end, logit_scale, softcap)
        end_p = side_of_ends(y, teacher_bias, column, at_end, teacher_logit_scale, teacher_softcap)
        q_end, p_end = (end_c - m_q) * rate2 + minus_q, (end_p - m_p) * rate2 + minus_p
        d_end = gradient_terms(kind, q_end, p_end, odds, rest_bits, teacher_bits, sum_g, rest) * weight
        d_end *= capped_slope(end_c, logit_scale, softcap)
        tl.store(out + column, d_end.to(out.dtype.element_ty), mask=at_end)
    else:
        clear_row(out, size, head, cells, first, last, lanes, width)
    if (first == 0) & (out_columns > size):
        padding = out + size
        pad_head, pad_cells = body_of(padding, out_columns - size, width, False)
        clear_row(padding, out_columns - size, pad_head, pad_cells, 0, pad_cells, lanes, width)
