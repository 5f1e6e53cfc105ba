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

A logit of -inf is a mass of 0: 0 log 0 is 0, and a mass divided by 0 gives +inf. In float32 a mass below 1e-37 may be
0. A row with NaN, +inf or only -inf is not a distribution: value and gradient are NaN.

Each pass over a block is one fast operation of torch, and all cost about the same on a CPU, a mask included. So there q
and p are e^z over its sum in rows where that is safe (`central`). There d is a difference of the logits plus one value
per row, which saves two log-softmax passes. Elsewhere `softmax` and `log_softmax` are used. The NaN of 0 * inf is
removed after the product, on a CPU only if a sum shows that there is one, and rows that must be NaN are set to it
again.

The `slice_*` functions do the same for ranks that hold a slice of each row: a slice's softmax times its share of the
mass is that of the row, and sums over the slices are sums over the row (`sharded.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdloss._softmax.rows import CENTRAL_SUMS

FORWARD_KL = "forward_kl"
REVERSE_KL = "reverse_kl"
GENERALIZED_JSD = "generalized_jsd"
SKEWED_FORWARD_KL = "skewed_forward_kl"
SKEWED_REVERSE_KL = "skewed_reverse_kl"
TOTAL_VARIATION = "total_variation"

# beyond ± this, sigmoid(t) is 0 or 1 and softplus(t) is 0 or t in every dtype
_SATURATED = 1e4
# d is rounded at the size of z_teacher - z_student, which is the difference of the two log-sum-exps where a row is
# sure. So d is a difference of logits only if those differ by less than 4: then it loses no more than 4 roundings.
_NEAR = math.exp(4)
# blocks of rows in a scratch
_BUFFERS = 5


class Form(NamedTuple):
    """Which divergence, and of which mixture m = ω p + (1-ω) q."""

    kind: str
    # 1-ω, the student's, for the skewed reverse KL; ω, the teacher's, for the others; no KL reads it
    share: float = 0.5

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
    buffers = scratch.buffers(student.shape[0])
    room, log_q, log_p, q, p = buffers
    tau = _tau(temperature, row_temperature, room)

    if room.device.type == "cpu" and student.shape[1] > 1:  # a single column has exactly the mass 1
        exponentials = _exponentials(student, teacher, tau, buffers)
        central = exponentials.central()
        if bool(central.all()):
            return _central_divergence(form, exponentials, buffers, value, gradient)
        if bool(central.any()):  # a row's values must not depend on the rows beside it
            return _by_rows(form, student, teacher, scratch, temperature, row_temperature, value, gradient, central)

    if kind == FORWARD_KL and not value:
        _distribution(student, tau, room, probabilities=q)
        _distribution(teacher, tau, room, probabilities=p)
        return BlockResult(None, q.sub_(p))
    needs_p = kind not in (REVERSE_KL, SKEWED_REVERSE_KL)
    needs_q = gradient or kind not in (FORWARD_KL, SKEWED_FORWARD_KL)
    _distribution(student, tau, room, logs=log_q, probabilities=q if needs_q else None)
    _distribution(teacher, tau, room, logs=log_p, probabilities=p if needs_p else None)
    nothing = log_q[:, 0].isnan() | log_p[:, 0].isnan()  # log_softmax makes all of a row NaN or none of it

    total, weighted = _terms(form, log_p.sub_(log_q), room, log_q, q, p, value=True, gradient=gradient)
    if not gradient:
        dz = None
    elif kind == FORWARD_KL:
        dz = q.sub_(p)
    else:
        dz = _through_softmax_(weighted, q, total if kind == REVERSE_KL else weighted.sum(-1), nothing)
    # a divergence is never negative, but rounding may make it so
    return BlockResult(total.clamp(min=0).masked_fill(nothing, math.nan), dz)


class _Exponentials(NamedTuple):
    """What follows from e^z of both sides, without its maximum taken off."""

    x: Tensor  # (R, V) z of the student: the logits, or in the first buffer
    y: Tensor  # (R, V) of the teacher: the logits, or in the second buffer
    sums: Tensor  # (2, R, 1) of e^x, which is in the fourth buffer, and of e^y, which is in the fifth

    def central(self) -> Tensor:
        """(R,) bool, the rows where q, p and d keep their digits."""
        low, high = CENTRAL_SUMS
        ratio = self.sums[0] / self.sums[1]
        near = (ratio > 1 / _NEAR) & (ratio < _NEAR)
        return (((self.sums > low) & (self.sums < high)).all(0) & near).squeeze(-1)


def _exponentials(student: Tensor, teacher: Tensor, tau: float | Tensor, buffers: tuple[Tensor, ...]) -> _Exponentials:
    first, second, _, q, p = buffers
    x, y = _scaled(student, tau, first), _scaled(teacher, tau, second)
    return _Exponentials(x, y, torch.stack([torch.exp(x, out=q).sum(-1, True), torch.exp(y, out=p).sum(-1, True)]))


def _central_divergence(
    form: Form, exponentials: _Exponentials, buffers: tuple[Tensor, ...], value: bool, gradient: bool
) -> BlockResult:
    """The divergence of rows that are all central: each is a distribution."""
    kind, (x, y, sums) = form.kind, exponentials
    room, spare, d, q, p = buffers
    student_sum, teacher_sum = sums.unbind(0)
    if gradient or kind in (GENERALIZED_JSD, SKEWED_REVERSE_KL, TOTAL_VARIATION):
        q.div_(student_sum)
    if kind in (GENERALIZED_JSD, SKEWED_FORWARD_KL, TOTAL_VARIATION) or (kind == FORWARD_KL and gradient):
        p.div_(teacher_sum)
    if kind == FORWARD_KL and not value:
        return BlockResult(None, q.sub_(p))
    if kind != TOTAL_VARIATION:
        student_level, teacher_level = sums.double().log().unbind(0)
        torch.sub(y, x, out=d).add_((student_level - teacher_level).to(d.dtype))
    total, weighted = _terms(form, d, room, spare, q, p, value=value, gradient=gradient)
    if kind in (FORWARD_KL, REVERSE_KL) and not gradient:
        total = total / (teacher_sum if kind == FORWARD_KL else student_sum).squeeze(-1)
    if not gradient:
        dz = None
    elif kind == FORWARD_KL:
        dz = q.sub_(p)
    else:
        slope = total if kind == REVERSE_KL else weighted.sum(-1)
        dz = weighted.addcmul_(q, slope.unsqueeze(-1), value=-1)
    # without `value`, the sum of a mixture is undefined
    return BlockResult(total.clamp(min=0) if value else None, dz)


def _by_rows(
    form: Form,
    student: Tensor,
    teacher: Tensor,
    scratch: Scratch,
    temperature: float,
    row_temperature: Tensor | None,
    value: bool,
    gradient: bool,
    central: Tensor,  # (R,) bool
) -> BlockResult:
    """`block_divergence` of a block of which some rows are central and others are not: each kind by itself."""
    values = scratch.buffers(len(central))[0].new_empty(len(central)) if value else None
    gradients = torch.empty_like(scratch.buffers(len(central))[0]) if gradient else None
    for index in (central.nonzero().squeeze(-1), (~central).nonzero().squeeze(-1)):
        taus = None if row_temperature is None else row_temperature[index]
        found = block_divergence(
            form,
            student[index],
            teacher[index],
            scratch,
            temperature=temperature,
            row_temperature=taus,
            value=value,
            gradient=gradient,
        )
        for whole, part in ((values, found.value), (gradients, found.gradient)):
            if whole is not None and part is not None:
                whole[index] = part
    return BlockResult(values, gradients)


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
        terms = _terms(form, log_p.sub_(log_q), room, log_q, q, p, value=True, gradient=False)
        value = terms[0].clamp(min=0).unsqueeze(-1)
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
    total, weighted = _terms(form, log_p.sub_(log_q), room, log_q, q, p, value=True, gradient=True)
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
    _, weighted = _terms(form, log_p.sub_(log_q), room, log_q, q, p, value=False, gradient=True)
    return _through_softmax_(weighted, q, slope, nothing)


def _tau(temperature: float, row_temperature: Tensor | None, like: Tensor) -> float | Tensor:
    """τ as a number, or as (R, 1)."""
    return temperature if row_temperature is None else row_temperature.unsqueeze(-1).to(like.dtype)


def _terms(
    form: Form,
    d: Tensor,
    room: Tensor,
    spare: Tensor,
    q: Tensor,
    p: Tensor,
    *,
    value: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(sum over the columns of f(q, p), G of each column), in `d`, `room` and `spare`.

    The sum of a mixture is undefined unless `value` is set. G is undefined for the forward KL, and for the others
    unless `gradient` is set.
    """
    kind = form.kind
    if kind == FORWARD_KL:
        return _sum_of_products(d.mul_(p)), d
    if kind == REVERSE_KL:
        products = d.mul_(q).neg_() if gradient else d.mul_(q)
        total = _sum_of_products(products)
        return (total if gradient else 0 - total), products
    if kind == TOTAL_VARIATION:
        torch.sub(q, p, out=d)
        return torch.abs(d, out=room).sum(-1).mul_(0.5), d.sign_().mul_(q).mul_(0.5)
    shares = form.shares()
    t = d.add_(shares.log_teacher - shares.log_student)
    if not _all_finite(t):
        t.nan_to_num_(0.0, _SATURATED, -_SATURATED)
    return _MIXTURES[kind](shares, t, q, p, room, spare, value, gradient)


def _jsd(
    shares: Shares, t: Tensor, q: Tensor, p: Tensor, room: Tensor, spare: Tensor, value: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    s = _softplus_of_minus_abs(t, out=room)
    weighted = _log_ratio(t, s, shares.log_student, out=spare).mul_(q).mul_(shares.student)
    if not value:
        return t, weighted
    of_teacher = _log_ratio(t.neg_(), s, shares.log_teacher, out=t).mul_(p).sum(-1)
    return weighted.sum(-1).add_(of_teacher, alpha=shares.teacher), weighted


def _skewed_forward(
    shares: Shares, t: Tensor, q: Tensor, p: Tensor, room: Tensor, spare: Tensor, value: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    weighted = torch.neg(t, out=spare)
    if gradient:
        weighted.sigmoid_().mul_(p).neg_()
    if not value:
        return t, weighted
    s = _softplus_of_minus_abs(t, out=room)
    return _log_ratio(t.neg_(), s, shares.log_teacher, out=t).mul_(p).sum(-1), weighted


def _skewed_reverse(
    shares: Shares, t: Tensor, q: Tensor, p: Tensor, room: Tensor, spare: Tensor, value: bool, gradient: bool
) -> tuple[Tensor, Tensor]:
    s = _softplus_of_minus_abs(t, out=room)
    a = _log_ratio(t, s, shares.log_student, out=spare)
    total = torch.mul(a, q, out=s).sum(-1) if value else t
    return total, a.sub_(t.neg_().sigmoid_()).mul_(q) if gradient else a


# (shares, t, q, p, room, spare, value, gradient) -> (value, G); all buffers except q and p are overwritten
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
    z = _scaled(logits, tau, room)
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


def _scaled(logits: Tensor, tau: float | Tensor, room: Tensor) -> Tensor:
    """logits / τ: the logits themselves if they need no change, else in `room`."""
    divides = isinstance(tau, Tensor) or tau != 1
    if not divides and logits.dtype == room.dtype:
        return logits
    z = room.copy_(logits)
    return z.div_(tau) if divides else z


def _sum_of_products(products: Tensor) -> Tensor:
    """The sums of products of a mass and a log-ratio, in which 0 * inf becomes 0, in place; infinities stay."""
    total = products.sum(-1)
    if _all_finite(total):
        return total
    return products.nan_to_num_(0.0, math.inf, -math.inf).sum(-1)


def _all_finite(x: Tensor) -> bool:
    """Whether a sum shows that x has no NaN and no infinity. False off the CPU, where to look would wait."""
    return x.device.type == "cpu" and math.isfinite(float(x.sum()))


def _softplus_of_minus_abs(t: Tensor, *, out: Tensor) -> Tensor:
    """s = log1p(exp(-|t|))."""
    return torch.abs(t, out=out).neg_().exp_().log1p_()


def _log_ratio(t: Tensor, s: Tensor, log_share: float, *, out: Tensor) -> Tensor:
    """`-log_share - relu(t) - s`: a for t and 1-ω, b for -t and ω. `out` may be `t`, but not `s`."""
    return torch.clamp(t, min=0, out=out).add_(s).add_(log_share).neg_()


def _through_softmax_(weighted: Tensor, q: Tensor, total: Tensor, nothing: Tensor) -> Tensor:
    """dF/dz = G - q sum G, in place of G; NaN in rows that are `nothing`."""
    return weighted.addcmul_(q, total.masked_fill(nothing, math.nan).unsqueeze(-1), value=-1)
