"""Divergences of blocks of rows, and their gradients, in a scratch that stays in the cache.

    q = softmax(student / τ),   p = softmax(teacher / τ),   d = log p - log q,   all in float32, or float64
    F(q, p) = sum_v f(q_v, p_v),   G_v = q_v dF/dq_v,   dF/dz_v = G_v - q_v sum_u G_u

| F | value | G |
|---|---|---|
| forward_kl | sum p d | -p |
| reverse_kl | -sum q d | -q d |
| generalized_jsd | sum β p b + (1-β) q a | (1-β) q a |
| skewed_forward_kl | sum p b | -p w |
| skewed_reverse_kl | sum q a | q (a - w) |
| total_variation | 1/2 sum |p - q| | 1/2 q sign(q - p) |

with m = ω p + (1-ω) q, a = log q/m, b = log p/m, w = (1-ω) q/m; ω is β, α and 1-α in turn. The share that the caller
names is kept, α and not 1-α, because 1-α has no digits of a small α. With t = d + log ω/(1-ω),

    a = -log(1-ω) - relu(t) - s,   b = -log ω - relu(-t) - s,   w = sigmoid(-t),   s = log1p(exp(-|t|))

In this form a is accurate to one rounding of ω if ω is small, and b to one rounding of 1-ω if 1-ω is small. The
divergence is then of that order itself, so it keeps its digits; and t never overflows.

A logit of -inf is a mass of 0: 0 log 0 is 0, and a mass divided by 0 gives +inf. In float32 a mass below 1e-45 is 0. A
row with NaN, +inf or only -inf is not a distribution: value and gradient are NaN.

Each pass over a block is one fast operation of torch. `softmax` and `log_softmax` cost less than one `exp`, and a mask
costs more than both. So the NaN of 0 * inf is removed after the product, and rows that must be NaN are set to it again.

The `slice_*` functions do the same for ranks that hold a slice of each row: a slice's softmax times its share of the
mass is that of the row, and sums over the slices are sums over the row (`sharded.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD_KL = "forward_kl"
REVERSE_KL = "reverse_kl"
GENERALIZED_JSD = "generalized_jsd"
SKEWED_FORWARD_KL = "skewed_forward_kl"
SKEWED_REVERSE_KL = "skewed_reverse_kl"
TOTAL_VARIATION = "total_variation"

# beyond ± this, sigmoid(t) is 0 or 1 and softplus(t) is 0 or t in every dtype
_SATURATED = 1e4
# blocks of rows in a scratch
_BUFFERS = 5


class Form(NamedTuple):
    """Which divergence, and of which mixture m = ω p + (1-ω) q."""

    kind: str
    share: float = (
        0.5  # 1-ω, the student's, for the skewed reverse KL; ω, the teacher's, for the others; no KL reads it
    )

    @property
    def shares(self) -> Shares:
        """ω and 1-ω with their logs, each to one rounding of itself."""
        known, rest = (self.share, math.log(self.share)), (1 - self.share, math.log1p(-self.share))
        (teacher, log_teacher), (student, log_student) = (
            (rest, known) if self.kind == SKEWED_REVERSE_KL else (known, rest)
        )
        return Shares(teacher, student, log_teacher, log_student)


class Shares(NamedTuple):
    """The shares of the two sides in a mixture."""

    teacher: float  # ω
    student: float  # 1-ω
    log_teacher: float
    log_student: float


class BlockResult(NamedTuple):
    """The divergence of a block of rows."""

    value: Tensor | None  # (R,) nats
    gradient: Tensor | None  # (R, V) with respect to z = student / τ, in the memory of the scratch


class Scratch:
    """Memory that all blocks of rows are computed in, one after the other.

    On a CPU it has about half a million entries per thread, so that a block stays in the cache from pass to pass, and
    at least one row per thread. It is larger on a GPU, where each pass costs a launch.
    """

    def __init__(self, total_rows: int, vocab_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        entries = 2**19 * threads if device.type == "cpu" else 2**26
        self.rows = max(1, min(total_rows, max(threads, entries // _BUFFERS // vocab_size)))
        self._buffers = torch.empty(_BUFFERS, self.rows, vocab_size, dtype=dtype, device=device)

    def blocks(self, total_rows: int) -> Iterator[slice]:
        """Slices of at most `rows` rows."""
        return (slice(start, start + self.rows) for start in range(0, total_rows, self.rows))

    def buffers(self, rows: int) -> tuple[Tensor, ...]:
        """Five uninitialised buffers (rows, V)."""
        return self._buffers[:, :rows].unbind(0)


def block_divergence(
    form: Form,
    student: Tensor,  # (R, V) logits
    teacher: Tensor,  # (R, V)
    scratch: Scratch,
    *,
    temperature: float,
    row_temperature: Tensor | None = None,  # (R,), in place of the number
    value: bool,
    gradient: bool,
) -> BlockResult:
    """The divergence of each row and its gradient, if they are asked for. The inputs are not modified."""
    kind, _ = form
    room, log_q, log_p, q, p = scratch.buffers(student.shape[0])
    tau = _tau(temperature, row_temperature, room)

    if kind == FORWARD_KL and not value:
        _distribution(student, tau, room, probabilities=q)
        _distribution(teacher, tau, room, probabilities=p)
        return BlockResult(None, q.sub_(p))
    needs_p = kind not in (REVERSE_KL, SKEWED_REVERSE_KL)
    needs_q = gradient or kind not in (FORWARD_KL, SKEWED_FORWARD_KL)
    _distribution(student, tau, room, logs=log_q, probabilities=q if needs_q else None)
    _distribution(teacher, tau, room, logs=log_p, probabilities=p if needs_p else None)
    nothing = log_q[:, 0].isnan() | log_p[:, 0].isnan()  # log_softmax makes all of a row NaN or none of it

    total, weighted = _terms(form, room, log_q, log_p, q, p, gradient)
    if not gradient:
        dz = None
    elif kind == FORWARD_KL:
        dz = q.sub_(p)
    else:
        dz = _through_softmax_(weighted, q, total if kind == REVERSE_KL else weighted.sum(-1), nothing)
    # a divergence is never negative, but rounding may make it so
    return BlockResult(total.clamp(min=0).masked_fill(nothing, math.nan), dz)


def slice_state(
    form: Form,
    student: Tensor,  # (R, V) logits of the slice
    teacher: Tensor,  # (R, V)
    scratch: Scratch,
    *,
    temperature: float,
    row_temperature: Tensor | None = None,  # (R,)
) -> Tensor:  # (R, 5)
    """(max z, log max softmax) of the student's slice and of the teacher's, then the KL inside it, 0 for a mixture."""
    kind, _ = form
    room, log_q, log_p, q, p = scratch.buffers(student.shape[0])
    tau = _tau(temperature, row_temperature, room)
    _distribution(student, tau, room, logs=log_q, probabilities=q if kind == REVERSE_KL else None)
    _distribution(teacher, tau, room, logs=log_p, probabilities=p if kind == FORWARD_KL else None)
    # dividing by τ and widening keep the order, so the largest z is that of the largest logit
    peaks = [student.amax(-1, keepdim=True).to(room.dtype) / tau, log_q.amax(-1, keepdim=True)]
    peaks += [teacher.amax(-1, keepdim=True).to(room.dtype) / tau, log_p.amax(-1, keepdim=True)]
    value = torch.zeros_like(peaks[1])
    if kind in (FORWARD_KL, REVERSE_KL):
        value = _terms(form, room, log_q, log_p, q, p, False)[0].clamp(min=0).unsqueeze(-1)
    return torch.cat([*peaks, value], -1)


def slice_terms(
    form: Form,
    student: Tensor,  # (R, V) logits of the slice
    teacher: Tensor,  # (R, V)
    scratch: Scratch,
    *,
    temperature: float,
    row_temperature: Tensor | None = None,  # (R,)
    shares: Tensor,  # (R, 2) log of the masses that q and p have in the slice
) -> Tensor:  # (R, 2)
    """The slice's part of the value, and of the sum of G."""
    room, log_q, log_p, q, p = scratch.buffers(student.shape[0])
    tau = _tau(temperature, row_temperature, room)
    _distribution(student, tau, room, shares[:, :1], logs=log_q, probabilities=q)
    _distribution(teacher, tau, room, shares[:, 1:], logs=log_p, probabilities=p)
    nothing = log_q[:, :1].isnan() | log_p[:, :1].isnan()
    total, weighted = _terms(form, room, log_q, log_p, q, p, True)
    return torch.stack([total, weighted.sum(-1)], -1).masked_fill(nothing, math.nan)


def slice_gradient(
    form: Form,
    student: Tensor,  # (R, V) logits of the slice
    teacher: Tensor,  # (R, V)
    scratch: Scratch,
    *,
    temperature: float,
    row_temperature: Tensor | None = None,  # (R,)
    shares: Tensor,  # (R, 2) log of the masses that q and p have in the slice
    slope: Tensor,  # (R,) the sum of G over all slices
) -> Tensor:  # (R, V), in the memory of the scratch
    """The slice's columns of dF/dz."""
    room, log_q, log_p, q, p = scratch.buffers(student.shape[0])
    tau = _tau(temperature, row_temperature, room)
    if form.kind == FORWARD_KL:
        _distribution(student, tau, room, shares[:, :1], probabilities=q)
        _distribution(teacher, tau, room, shares[:, 1:], probabilities=p)
        return q.sub_(p)
    _distribution(student, tau, room, shares[:, :1], logs=log_q, probabilities=q)
    _distribution(teacher, tau, room, shares[:, 1:], logs=log_p, probabilities=p)
    nothing = log_q[:, 0].isnan() | log_p[:, 0].isnan()
    _, weighted = _terms(form, room, log_q, log_p, q, p, True)
    return _through_softmax_(weighted, q, slope, nothing)


def _tau(temperature: float, row_temperature: Tensor | None, like: Tensor) -> float | Tensor:
    """τ as a number, or as (R, 1)."""
    return temperature if row_temperature is None else row_temperature.unsqueeze(-1).to(like.dtype)


def _terms(
    form: Form,
    room: Tensor,
    log_q: Tensor,
    log_p: Tensor,
    q: Tensor,
    p: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(sum over the columns of f(q, p), G of each column). Overwrites all buffers except q and p.

    G is undefined for the forward KL, and for the others unless `gradient` is set.
    """
    kind = form.kind
    if kind == FORWARD_KL:
        return _clean_(torch.sub(log_p, log_q, out=room).mul_(p)).sum(-1), room
    if kind == REVERSE_KL:
        return _clean_(torch.sub(log_q, log_p, out=room).mul_(q)).sum(-1), room
    if kind == TOTAL_VARIATION:
        torch.sub(q, p, out=room)
        return torch.abs(room, out=log_p).sum(-1).mul_(0.5), room.sign_().mul_(q).mul_(0.5)
    shares = form.shares
    t = log_p.sub_(log_q).add_(shares.log_teacher - shares.log_student).nan_to_num_(0.0, _SATURATED, -_SATURATED)
    s = torch.abs(t, out=room).neg_().exp_().log1p_()
    return _MIXTURES[kind](shares, t, s, q, p, log_q, gradient)


def _jsd(
    shares: Shares, t: Tensor, s: Tensor, q: Tensor, p: Tensor, room: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    weighted = _log_ratio(t, s, shares.log_student, out=room).mul_(q).mul_(shares.student)
    of_teacher = _log_ratio(t.neg_(), s, shares.log_teacher, out=t).mul_(p).sum(-1)
    return weighted.sum(-1).add_(of_teacher, alpha=shares.teacher), weighted


def _skewed_forward(
    shares: Shares, t: Tensor, s: Tensor, q: Tensor, p: Tensor, room: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    weighted = torch.neg(t, out=room)
    if gradient:
        weighted.sigmoid_().mul_(p).neg_()
    return _log_ratio(t.neg_(), s, shares.log_teacher, out=t).mul_(p).sum(-1), weighted


def _skewed_reverse(
    shares: Shares, t: Tensor, s: Tensor, q: Tensor, p: Tensor, room: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    a = _log_ratio(t, s, shares.log_student, out=room)
    total = torch.mul(a, q, out=s).sum(-1)
    return total, a.sub_(t.neg_().sigmoid_()).mul_(q) if gradient else a


# (shares, t, s, q, p, room, gradient) -> (value, G); all buffers except q and p are overwritten
_MIXTURES = {
    GENERALIZED_JSD: _jsd,
    SKEWED_FORWARD_KL: _skewed_forward,
    SKEWED_REVERSE_KL: _skewed_reverse,
}


def _distribution(
    logits: Tensor,
    tau: float | Tensor,
    room: Tensor,
    share: Tensor | None = None,  # (R, 1) log of the mass of these columns, if they are a slice of the rows
    *,
    logs: Tensor | None = None,
    probabilities: Tensor | None = None,
) -> None:
    """log softmax(logits / τ) into `logs` and softmax(logits / τ) into `probabilities`, if given. Overwrites `room`."""
    z = logits
    if isinstance(tau, Tensor) or tau != 1 or logits.dtype != room.dtype:
        z = room.copy_(logits)
        if isinstance(tau, Tensor) or tau != 1:
            z = z.div_(tau)
    if logs is not None:
        torch.log_softmax(z, -1, out=logs)
    if probabilities is not None:
        torch.softmax(z, -1, out=probabilities)
    if share is None:
        return
    massless = share == -math.inf  # the softmax of such a slice may be NaN
    if logs is not None:
        logs.add_(share).masked_fill_(massless, -math.inf)
    if probabilities is not None:
        probabilities.mul_(share.exp()).masked_fill_(massless, 0)


def _clean_(products: Tensor) -> Tensor:
    """Products of a mass and a log-ratio, in place: 0 * inf becomes 0, and infinities stay."""
    return products.nan_to_num_(0.0, math.inf, -math.inf)


def _log_ratio(t: Tensor, s: Tensor, log_share: float, *, out: Tensor) -> Tensor:
    """`-log_share - relu(t) - s`: a for t and 1-ω, b for -t and ω. `out` may be `t`, but not `s`."""
    return torch.clamp(t, min=0, out=out).add_(s).add_(log_share).neg_()


def _through_softmax_(weighted: Tensor, q: Tensor, total: Tensor, nothing: Tensor) -> Tensor:
    """dF/dz = G - q sum G, in place of G; NaN in rows that are `nothing`."""
    return weighted.addcmul_(q, total.masked_fill(nothing, math.nan).unsqueeze(-1), value=-1)
