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

with m = ω p + (1-ω) q, a = log q/m, b = log p/m, w = (1-ω) q/m; ω is β, α and 1-α in turn. With t = d + log ω/(1-ω)

    a = -log(1-ω) - relu(t) - s,   b = -log ω - relu(-t) - s,   w = sigmoid(-t),   s = log1p(exp(-|t|))

In this form a is right to one rounding of ω where ω is small, and b to one of 1-ω where that is: the divergence is then
of that order itself, so it keeps its digits, and t never overflows.

A logit of -inf is a mass of 0. It gives 0 where 0 log 0 stands, and +inf where a mass is divided by it. In float32 a
mass below 1e-45 is 0. A row with NaN, +inf or nothing but -inf is no distribution: value and gradient are NaN.

Each pass over a block is one fast kernel: `softmax` and `log_softmax` cost less than one `exp`, and a mask more than
both, so the NaN of 0 * inf is removed after the product, and rows that are NaN by right are marked again.
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

# beyond it, sigmoid(t) is 0 or 1 and softplus(t) is 0 or t in every dtype
_SATURATED = 1e4
_BUFFERS = 5


class BlockResult(NamedTuple):
    value: Tensor | None  # (R,) nats
    gradient: Tensor | None  # (R, V) of value with respect to z = student / τ; lies in the scratch


class Scratch:
    """Room for blocks of rows; every row of every block is computed in it.

    About half a million entries a thread on a CPU, so that a block stays in the cache from pass to pass, and a row a
    thread at least; more on a GPU, where a pass costs a launch.
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
        return self._buffers[:, :rows].unbind(0)


def block(
    kind: str,
    omega: float,  # the weight of the teacher in the mixture
    student: Tensor,  # (R, V) logits
    teacher: Tensor,  # (R, V)
    scratch: Scratch,
    *,
    temperature: float,
    row_temperature: Tensor | None = None,  # (R,), in place of the number
    value: bool,
    gradient: bool,
) -> BlockResult:
    """The divergence of each row and its gradient, where they are asked for. The inputs are left as they are."""
    room, log_q, log_p, q, p = scratch.buffers(student.shape[0])
    tau = temperature if row_temperature is None else row_temperature.unsqueeze(-1).to(room.dtype)

    if kind == FORWARD_KL and not value:
        _distribution(student, tau, room, probabilities=q)
        _distribution(teacher, tau, room, probabilities=p)
        return BlockResult(None, q.sub_(p))
    needs_p = kind not in (REVERSE_KL, SKEWED_REVERSE_KL)
    needs_q = gradient or kind not in (FORWARD_KL, SKEWED_FORWARD_KL)
    _distribution(student, tau, room, logs=log_q, probabilities=q if needs_q else None)
    _distribution(teacher, tau, room, logs=log_p, probabilities=p if needs_p else None)
    nothing = log_q[:, 0].isnan() | log_p[:, 0].isnan()  # log_softmax makes all of a row NaN, or nothing of it

    if kind == FORWARD_KL:
        torch.sub(log_p, log_q, out=room)
        total = _clean(room.mul_(p)).sum(-1)
        dz = q.sub_(p) if gradient else None
    elif kind == REVERSE_KL:
        torch.sub(log_q, log_p, out=room)
        total = _clean(room.mul_(q)).sum(-1)
        dz = _through_softmax(room, q, total, nothing) if gradient else None
    else:
        t = log_p.sub_(log_q).add_(math.log(omega) - math.log1p(-omega)).nan_to_num_(0.0, _SATURATED, -_SATURATED)
        s = torch.abs(t, out=room).neg_().exp_().log1p_()
        total, weighted = _MIXTURES[kind](omega, t, s, q, p, log_q, gradient)
        dz = _through_softmax(weighted, q, weighted.sum(-1), nothing) if gradient else None
    # a divergence is never negative, whatever rounding says
    return BlockResult(total.clamp(min=0).masked_fill(nothing, math.nan), dz)


def _jsd(
    omega: float, t: Tensor, s: Tensor, q: Tensor, p: Tensor, room: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    weighted = _log_ratio(t, s, math.log1p(-omega), out=room).mul_(q).mul_(1 - omega)
    of_teacher = _log_ratio(t.neg_(), s, math.log(omega), out=t).mul_(p).sum(-1)
    return weighted.sum(-1).add_(of_teacher, alpha=omega), weighted


def _skewed_forward(
    omega: float, t: Tensor, s: Tensor, q: Tensor, p: Tensor, room: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    weighted = torch.neg(t, out=room)
    if gradient:
        weighted.sigmoid_().mul_(p).neg_()
    return _log_ratio(t.neg_(), s, math.log(omega), out=t).mul_(p).sum(-1), weighted


def _skewed_reverse(
    omega: float, t: Tensor, s: Tensor, q: Tensor, p: Tensor, room: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    a = _log_ratio(t, s, math.log1p(-omega), out=room)
    total = torch.mul(a, q, out=s).sum(-1)
    return total, a.sub_(t.neg_().sigmoid_()).mul_(q) if gradient else a


# (ω, t, s, q, p, room, gradient) -> (value, G); all buffers but q and p are spent
_MIXTURES = {
    GENERALIZED_JSD: _jsd,
    SKEWED_FORWARD_KL: _skewed_forward,
    SKEWED_REVERSE_KL: _skewed_reverse,
}


def _distribution(
    logits: Tensor,
    tau: float | Tensor,
    room: Tensor,
    *,
    logs: Tensor | None = None,
    probabilities: Tensor | None = None,
) -> None:
    """log softmax(logits / τ) and softmax(logits / τ) into the buffers that are given; `room` is overwritten."""
    z = logits
    if isinstance(tau, Tensor) or tau != 1 or logits.dtype != room.dtype:
        z = room.copy_(logits)
        if isinstance(tau, Tensor) or tau != 1:
            z = z.div_(tau)
    if logs is not None:
        torch.log_softmax(z, -1, out=logs)
    if probabilities is not None:
        torch.softmax(z, -1, out=probabilities)


def _clean(products: Tensor) -> Tensor:
    """Products of a mass and a log-ratio in place: 0 * inf is 0, and infinities stay."""
    return products.nan_to_num_(0.0, math.inf, -math.inf)


def _log_ratio(t: Tensor, s: Tensor, log_share: float, *, out: Tensor) -> Tensor:
    """`-log_share - relu(t) - s`: a for t and 1-ω, b for -t and ω. `out` may be `t`, and not `s`."""
    return torch.clamp(t, min=0, out=out).add_(s).add_(log_share).neg_()


def _through_softmax(weighted: Tensor, q: Tensor, total: Tensor, nothing: Tensor) -> Tensor:
    """`G - q sum G`, in the place of G."""
    return weighted.addcmul_(q, total.masked_fill(nothing, math.nan).unsqueeze(-1), value=-1)
