"""What kernels over rows of logits share: a logit, the state of a row, and where a row begins.

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


@triton.jit
def _quad(x, column, step: tl.constexpr, stride, bound):
    """x at `column` (n,) and at the next three columns `step` apart: (n, 4), with 0 from `bound` on."""
    place = x + column.to(tl.int64) * stride
    apart = tl.full([], step, tl.int64) * stride
    a = tl.load(place, mask=column < bound, other=0.0)
    b = tl.load(place + apart, mask=column < bound - step, other=0.0)
    c = tl.load(place + 2 * apart, mask=column < bound - 2 * step, other=0.0)
    d = tl.load(place + 3 * apart, mask=column < bound - 3 * step, other=0.0)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [column.shape[0], 4])


@triton.jit
def tile_columns(start, lanes: tl.constexpr, width: tl.constexpr):
    """The columns (lanes, width) of a tile that begins at `start`: `width` consecutive ones per lane."""
    return start + tl.arange(0, lanes)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def load_tile(x, start, stride, bound, lanes: tl.constexpr, width: tl.constexpr, aligned: tl.constexpr):
    """x at the columns of a tile, (lanes, width), with 0 from `bound` on.

    A lane's logits belong to one thread. If rows are `aligned`, one instruction loads 16 bytes of them. Otherwise
    Triton would spread a lane over several threads and then exchange values between them, so each logit is loaded by
    itself.
    """
    lane = start + tl.arange(0, lanes) * width
    if aligned:
        column = tile_columns(start, lanes, width)
        tile = tl.load(x + column, mask=column < bound, other=0.0)
    elif width == 4:
        tile = _quad(x, lane, 1, stride, bound)
    else:
        tl.static_assert(width == 8)
        even, odd = _quad(x, lane, 2, stride, bound), _quad(x + stride, lane, 2, stride, bound - 1)
        tile = tl.reshape(tl.join(even, odd), [lanes, 8])
    return tile


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
