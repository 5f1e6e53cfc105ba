"""What kernels over rows of logits share: a logit, the state of a row, and how rows are read and written.

    c = softcap(logit_scale * x),   z = rate * c,   rate = 1 / temperature

A row's state is (m, s, u), in terms of c, so that the temperature costs nothing per element:

    m = max c,   s = sum_v e_v,   u = sum_v (c_v - m) e_v,   e_v = e^(rate (c_v - m))
    logp = rate (c_label - m) - log s,   entropy = log s - rate u / s

The maximum is subtracted before the rate is applied, so logits far from zero lose no digits. Without any mass (every c
is -inf) the state is (-inf, 0, 0), and merging it changes nothing. A whole row without mass has NaN results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class LogitTransform(NamedTuple):
    """What turns x, a logit or a product with a head, into c: c = softcap(logit_scale (x + bias))."""

    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, bias: Tensor | None, logit_scale: float, softcap: float | None) -> LogitTransform:
        """With a contiguous bias, as the kernels read it."""
        return cls(None if bias is None else bias.contiguous(), logit_scale, softcap)

    @property
    def numbers(self) -> tuple[float | None, float | None]:
        """(logit_scale, softcap) as the kernels take them, where None skips the step."""
        return None if self.logit_scale == 1 else self.logit_scale, self.softcap


class State(NamedTuple):
    """Per row: the labels, the temperature, and the float32 state that its softmax follows from."""

    columns: Tensor  # (T, K) int64; -100 is ignored, a label past the columns of the logits is in another shard
    temperature: float  # of every row
    row_temperature: Tensor | None  # (T,) one per row instead
    maximum: Tensor  # (T,) m
    peak: Tensor  # (T,) 1 / s, or s itself until the last slice is folded
    mean: Tensor | None  # (T,) rate u / s, likewise u until then; not read without an entropy

    @classmethod
    def empty(cls, columns: Tensor, temperature: float, row_temperature: Tensor | None, *, with_entropy: bool) -> State:
        """The state before any logit is read. Its zeros remain in rows that take no part."""
        shape, device = columns.shape[:1], columns.device
        maximum, peak, mean = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(3))
        state = cls(columns, temperature, row_temperature, maximum, peak, mean if with_entropy else None)
        return state.contiguous()

    def contiguous(self) -> State:
        """With contiguous labels and temperatures, as the kernels read them."""
        taus = self.row_temperature
        return self._replace(
            columns=self.columns.contiguous(), row_temperature=None if taus is None else taus.contiguous()
        )


LOG2_E = tl.constexpr(1.4426950408889634)
# 0 times this is 0, where 0 times -inf would be NaN
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def tanh(x):
    """In float32, accurate to a few roundings; the GPU's own instruction is accurate to 11 bits only."""
    square = x * x
    # an odd polynomial, fitted for the smallest relative error on |x| < 0.55, where the quotient would cancel
    series = ((0.01645875908434391 * square - 0.05268414318561554) * square + 0.13320942223072052) * square
    near = x + x * (square * (series - 0.33332958817481995))
    t = tl.exp2(tl.minimum(x * (-2 * LOG2_E), 100.0))  # from 2^100 on 1 + t = t, and inf / inf would be NaN
    return tl.where(tl.abs(x) > 0.55, (1 - t) / (1 + t), near)


@triton.jit
def capped(x, logit_scale, softcap):
    """c = softcap(logit_scale * x) in float32; None skips a step."""
    c = x.to(tl.float32)
    if logit_scale is not None:
        c = c * logit_scale
    if softcap is not None:
        c = softcap * tanh(c * (1.0 / softcap))
    return c


@triton.jit
def capped_slope(c, logit_scale, softcap):
    """dc/dx = logit_scale * (1 - tanh²), where tanh is c / softcap."""
    slope = tl.full(c.shape, 1.0, tl.float32)
    if softcap is not None:
        t = c * (1.0 / softcap)
        slope = 1 - t * t
    if logit_scale is not None:
        slope = slope * logit_scale
    return slope


@triton.jit
def row_rate(row_temperature, row, temperature):
    """1 / temperature, the row's own if there is one per row; NaN if it is not positive."""
    if row_temperature is not None:
        temperature = tl.load(row_temperature + row).to(tl.float32)
    return tl.where(temperature > 0, tl.div_rn(1.0, temperature), float("nan"))


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Offset of row (row // inner, row % inner), in 64 bits: T * V exceeds 2^31 in ordinary use."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


# Cells: how rows are read and written 16 bytes at a time, wherever they begin
#
# Triton loads 16 bytes at a time if it knows that the address is a multiple of 16, and that a mask is the same for all
# of them. So a row is cut into cells of 16 bytes that begin at such multiples. The loop along the row reads whole cells
# without a mask, and its last block masks whole cells. The columns before the first cell and after the last one are
# read once per row, one by one, with their own mask. Nothing outside the row is read or written.
#
# Rows of two tensors may begin at different offsets from such a multiple, as those of x[:, :-1] and of its gradient do.
# Then the cells are those of the tensor that leads: of the gradient, or of the student's logits. `load_cells` shifts
# the other one in registers. The launcher tells from addresses and strides whether any row needs that.


@triton.jit
def _place(x):
    """The address of x in elements."""
    return x.to(tl.int64) // (x.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def body_of(x, columns, width: tl.constexpr, shifted: tl.constexpr):
    """(head, cells) of the row x of `columns` elements: `cells` cells of `width` elements begin at column `head`.

    A cell begins at a multiple of `width` elements in memory. The columns before the first cell and after the last one
    are the ends of the row, at most `ends(width)` columns together. If another row is `shifted` against x, one more
    cell at either side counts as an end. Then `load_cells` reads the other row only between its first and its last
    element, too.
    """
    head = (-_place(x) & (width - 1)).to(tl.int32)
    if shifted:
        head += width
    head = tl.minimum(head, columns)
    cells = (columns - head) // width
    if shifted:
        cells = tl.maximum(cells - 1, 0)
    return head, cells


@triton.jit
def end_columns(head, cells, width: tl.constexpr, n: tl.constexpr):
    """The columns of the ends of a row, (n,), in order. Those past the last one are no columns of the row."""
    k = tl.arange(0, n)
    return tl.where(k < head, k, k + cells * width)


@triton.jit
def columns_of(start, lanes: tl.constexpr, width: tl.constexpr):
    """`width` numbers for each of `lanes` cells from cell `start` on: (lanes, width)."""
    return start * width + tl.arange(0, lanes)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def _load(x, start, cells, lanes: tl.constexpr, width: tl.constexpr, masked: tl.constexpr, fill: tl.constexpr):
    """(lanes, width) elements from x, which is aligned to a cell; `fill` from cell `cells` on if `masked`."""
    if masked:
        inside = (start + tl.arange(0, lanes) < cells)[:, None]
        found = tl.load(x + columns_of(start, lanes, width), mask=inside, other=fill)
    else:
        found = tl.load(x + columns_of(start, lanes, width))
    return found


@triton.jit
def _halves(words, element: tl.constexpr):
    """The two half-precision numbers in each of the words (n, E) int32, in order: (n, 2 E) float32."""
    if element == tl.bfloat16:  # a shift or a mask each; a conversion from bfloat16 takes half as many again
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(element, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(element, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def _funnel(low, high, shift):
    """The lower word of the 64 bits of (high, low) after a shift to the right."""
    both = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (both >> shift).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def _quarters(x):
    """The columns of (n, 4)."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _joined(a, b, c, d):
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def _shifted_words(first, second, shift, per_word: tl.constexpr):
    """The words of (first, second), each (n, 2) or (n, 4) int32, from element `shift` of the first on."""
    by_one = shift & per_word != 0
    bits = ((shift & (per_word - 1)) * 16).to(tl.uint64)
    if first.shape[1] == 4:
        a, b, c, d = _quarters(first)
        e, f, g, h = _quarters(second)
        by_two = shift & (2 * per_word) != 0
        a, b, c = tl.where(by_two, c, a), tl.where(by_two, d, b), tl.where(by_two, e, c)
        d, e, f = tl.where(by_two, f, d), tl.where(by_two, g, e), tl.where(by_two, h, f)
        a, b, c = tl.where(by_one, b, a), tl.where(by_one, c, b), tl.where(by_one, d, c)
        d, e = tl.where(by_one, e, d), tl.where(by_one, f, e)
        if per_word == 2:
            a, b, c, d = _funnel(a, b, bits), _funnel(b, c, bits), _funnel(c, d, bits), _funnel(d, e, bits)
        found = _joined(a, b, c, d)
    else:
        tl.static_assert(per_word == 2)
        a, b = tl.split(first)
        c, d = tl.split(second)
        a, b, c = tl.where(by_one, b, a), tl.where(by_one, c, b), tl.where(by_one, d, c)
        found = tl.join(_funnel(a, b, bits), _funnel(b, c, bits))
    return found


@triton.jit
def load_cells(
    x,  # the first cell
    start,  # the first of the cells to load
    cells,  # from this cell on, there is nothing to read if `masked`
    lanes: tl.constexpr,
    width: tl.constexpr,
    masked: tl.constexpr,
    shifted: tl.constexpr,  # whether x may begin anywhere; otherwise it is aligned to a cell
):
    """The numbers of some cells as float32, (lanes, width), with -inf past the last one. A thread loads a whole cell.

    If x is `shifted`, the two aligned cells that contain a cell of x are loaded, and their words are moved in
    registers: 3 to 4 instructions more per logit, and memory is still read once, as the second cell is in the cache.
    """
    element: tl.constexpr = x.dtype.element_ty
    bits: tl.constexpr = element.primitive_bitwidth
    tl.static_assert(bits == 32 or bits == 16)
    per_word: tl.constexpr = 32 // bits
    # -inf in the bits of one float32, two bfloat16 or two float16
    fill: tl.constexpr = -8388608 if bits == 32 else (-8323200 if element == tl.bfloat16 else -67044352)
    n: tl.constexpr = width // per_word
    if shifted:
        shift = (_place(x) & (width - 1)).to(tl.int32)
        words = tl.multiple_of((x - shift).to(tl.pointer_type(tl.int32), bitcast=True), 4 * n)
        first = _load(words, start, cells, lanes, n, masked, fill)
        second = _load(words + n, start, tl.where(shift == 0, 0, cells), lanes, n, True, fill)
        found = _shifted_words(first, second, shift, per_word)
    else:
        words = tl.multiple_of(x.to(tl.pointer_type(tl.int32), bitcast=True), 4 * n)
        found = _load(words, start, cells, lanes, n, masked, fill)
    if bits == 32:
        found = found.to(tl.float32, bitcast=True)
    else:
        found = _halves(found, element)
    return found


@triton.jit
def store_cells(x, start, cells, value, lanes: tl.constexpr, width: tl.constexpr, masked: tl.constexpr):
    """Write (lanes, width) to the cells from `start` on, where x is the first cell."""
    # the cast holds the attribute: a pointer that is only added to would lose it
    element: tl.constexpr = x.dtype.element_ty
    aligned = tl.multiple_of(x.to(tl.int64).to(tl.pointer_type(element)), width * (element.primitive_bitwidth // 8))
    place = aligned + columns_of(start, lanes, width)
    if masked:
        tl.store(place, value.to(element), mask=(start + tl.arange(0, lanes) < cells)[:, None])
    else:
        tl.store(place, value.to(element))


@triton.jit
def clear_row(row, columns, head, cells, first, last, lanes: tl.constexpr, width: tl.constexpr):
    """Write 0 to the cells of a row from `first` to `last`, and to its ends if `first` is 0."""
    zero = tl.zeros([lanes, width], tl.float32)
    whole = first + tl.maximum(last - first, 0) // lanes * lanes
    for start in range(first, whole, lanes):
        store_cells(row + head, start, cells, zero, lanes, width, False)
    if whole < last:
        store_cells(row + head, whole, cells, zero, lanes, width, True)
    column = end_columns(head, cells, width, 4 * width)
    zeros = tl.zeros([4 * width], row.dtype.element_ty)
    tl.store(row + column, zeros, mask=(column < columns) & (first == 0))


@triton.jit
def empty_state(n: tl.constexpr):
    """(m, s, u) of n rows, or of n lanes of one row, before any logit."""
    zero = tl.zeros([n], tl.float32)
    return zero + float("-inf"), zero, zero


@triton.jit
def fold(m, s, u, c, rate, with_entropy: tl.constexpr):
    """The state (n,) after one more block c (n, E), which is -inf where there is no logit. `rate` is a scalar or (n,).

    One exponential per element, and one per row to rescale the previous state.
    """
    top = tl.maximum(m, tl.max(c, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # without any mass, any finite number will do
    rate2 = rate * LOG2_E + tl.zeros_like(s)
    d = c - base[:, None]
    e = tl.exp2(d * rate2[:, None])
    a = tl.exp2((m - base) * rate2)
    if with_entropy:
        u = a * (u + tl.maximum(m - base, LOWEST) * s) + tl.sum(tl.maximum(d, LOWEST) * e, 1)
    s = a * s + tl.sum(e, 1)
    return top, s, u


@triton.jit
def merge(m, s, u, other_m, other_s, other_u, rate, with_entropy: tl.constexpr):
    """The merged state of two parts of the same rows, element by element; `rate` broadcasts."""
    top = tl.maximum(m, other_m)
    base = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2((m - base) * (rate * LOG2_E))
    b = tl.exp2((other_m - base) * (rate * LOG2_E))
    if with_entropy:
        u = a * (u + tl.maximum(m - base, LOWEST) * s)
        u += b * (other_u + tl.maximum(other_m - base, LOWEST) * other_s)
    return top, a * s + b * other_s, u


@triton.jit
def merge_all(m, s, u, rate, with_entropy: tl.constexpr):
    """One state () from the parts (n,) of one row: a tree whose shape depends on n alone."""
    top = tl.max(m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2((m - base) * (rate * LOG2_E))
    if with_entropy:
        u = tl.sum(a * (u + tl.maximum(m - base, LOWEST) * s), 0)
    else:
        u = tl.sum(u, 0)
    return top, tl.sum(a * s, 0), u


@triton.jit
def log_of(s):
    """log s, once per row. The float32 logarithm would be off by 2e-7, which is too much for a log-prob near 0."""
    return tl.log(s.to(tl.float64)).to(tl.float32)


@triton.jit
def mean_of(s, u, rate):
    """rate u / s, and 0 without any mass, so that merging it changes nothing."""
    return tl.where(s == 0, 0.0, tl.div_rn(u * rate, s))


@triton.jit
def entropy_of(s, mean):
    """log s - mean, and NaN without any mass, which is no distribution."""
    return tl.where(s == 0, float("nan"), log_of(s) - mean)


@triton.jit
def label_logp(c, m, s, rate):
    """The log-prob of the label whose capped logit is c."""
    return (c - m) * rate - log_of(s)
