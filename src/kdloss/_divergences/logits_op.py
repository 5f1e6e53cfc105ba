"""The divergence of each row of two sets of logits, as one operator with its gradient.

Forward and backward compute one block of rows at a time (`rows.py`); only the logits themselves are kept between the
two. Peak extra memory is a scratch in the forward, and the gradient and a scratch in the backward. As a custom operator
it is opaque to `torch.compile`, and autograd does not record its slices: the backward of each would allocate zeros of
the size of all logits. A gradient of the gradient is not defined, and raises.

If `kernels` is set, `_triton/_divergences.py` does the same without a scratch, and keeps five values per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.operator import operator
from kdloss._softmax.rows import all_zero, column, flat_rows
from kdloss._softmax.vocabulary import Softmax
from kdloss._softmax.whole_rows import rate_of

from .rows import Form, Scratch, block_divergence, slice_gradient, slice_state, slice_terms
from .sharded import whole_divergence

if TYPE_CHECKING:
    from kdloss._triton._divergences import Pair


def divergence(
    logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V); detached here
    form: Form,
    softmax: Softmax,
) -> Tensor:  # (...,)
    """`F(softmax(logits / τ), softmax(teacher_logits / τ))` of each row, differentiable only in `logits`."""
    options = (softmax.row_temperature, *form, softmax.temperature, softmax.local_size)
    if softmax.shard is not None:
        return _ShardedDivergence.apply(logits, teacher_logits.detach(), *options, softmax.shard, softmax.kernels)  # type: ignore[no-any-return, no-untyped-call]
    result: Tensor = _divergence(logits, teacher_logits.detach(), *options, softmax.kernels)[0]
    return result


@operator("divergence")
def _divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    row_temperature: Tensor | None,
    kind: str,
    omega: float,  # `share` of `Form`
    temperature: float,
    vocab_size: int,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """(the divergence (...,), what the backward of the kernels needs of each row (5, T) or, without kernels, (0,))."""
    dtype = _checks.promoted_dtype(logits, teacher_logits)
    out = torch.empty(logits.shape[:-1], dtype=dtype, device=logits.device)
    if kernels:
        known = out.new_empty(5, out.numel())
        for rows, pair in _pairs(logits, teacher_logits, row_temperature, kind, omega, temperature, vocab_size):
            pair.value_(out.view(-1)[rows], known[:, rows])
        return out, known
    scratch = Scratch(out.numel(), vocab_size, dtype=dtype, device=logits.device)
    tensors = (logits[..., :vocab_size], teacher_logits[..., :vocab_size], out.unsqueeze(-1))
    for student, teacher, result, tau in flat_rows(*tensors, column(row_temperature, out)):
        for rows in scratch.blocks(student.shape[0]):
            found = block_divergence(
                Form(kind, omega),
                student[rows],
                teacher[rows],
                scratch,
                temperature=temperature,
                row_temperature=None if row_temperature is None else tau[rows, 0],
                value=True,
                gradient=False,
            )
            assert found.value is not None
            result[rows, 0] = found.value
    return out, out.new_empty(0)


@_divergence.register_fake
def _(logits: Tensor, teacher_logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    kernels = options[-1]
    out = logits.new_empty(logits.shape[:-1], dtype=_checks.promoted_dtype(logits, teacher_logits))
    return out, out.new_empty((5, out.numel()) if kernels else (0,))


def _pairs(
    logits: Tensor,
    teacher_logits: Tensor,
    row_temperature: Tensor | None,
    kind: str,
    omega: float,
    temperature: float,
    vocab_size: int,
) -> Iterator[tuple[slice, Pair]]:
    """Yield (rows, both sides of these rows in the form that the kernels take)."""
    from kdloss._triton._divergences import Pair
    from kdloss._triton._row_math import LogitTransform

    taus = None if row_temperature is None else row_temperature.reshape(-1).contiguous()
    start = 0
    for student, teacher in flat_rows(logits[..., :vocab_size], teacher_logits[..., :vocab_size]):
        rows = slice(start, start + student.shape[0])
        tau = None if taus is None else taus[rows]
        x, y = (side if side.stride(-1) == 1 else side.contiguous() for side in (student, teacher))
        yield rows, Pair(kind, omega, x, y, LogitTransform(), LogitTransform(), temperature, tau, vocab_size)
        start = rows.stop


@operator("divergence_backward")
def _divergence_backward(
    upstream: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    row_temperature: Tensor | None,
    known: Tensor,
    kind: str,
    omega: float,
    temperature: float,
    vocab_size: int,
    kernels: bool,
    # arguments of `slice_gradient`, if the logits are a slice of the rows and torch computes
    shares: Tensor | None = None,  # (..., 2)
    slope: Tensor | None = None,  # (...,)
) -> Tensor:
    """The gradient of the logits, in their dtype: `upstream` (...,) times dF/dlogits, 0 in padding columns."""
    dtype = _checks.promoted_dtype(logits, teacher_logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if kernels:
        factor, matrix = upstream.contiguous().view(-1), grad.view(-1, grad.shape[-1])
        for place, pair in _pairs(logits, teacher_logits, row_temperature, kind, omega, temperature, vocab_size):
            pair.gradient_(matrix[place], known[:, place], factor[place])
        return grad
    grad[..., vocab_size:] = 0
    scratch = Scratch(upstream.numel(), vocab_size, dtype=dtype, device=logits.device)
    tensors = (logits[..., :vocab_size], teacher_logits[..., :vocab_size], grad[..., :vocab_size])
    factors = upstream.contiguous().unsqueeze(-1)
    log_shares = factors if shares is None else shares  # `factors` is a placeholder that nothing reads
    silent = factors == 0
    divisors = temperature if row_temperature is None else row_temperature.unsqueeze(-1).to(dtype)
    scales = torch.where(silent, 0, factors.to(dtype) / divisors)
    silence = silent.device.type != "cpu" or bool(silent.any())
    others = (scales, silent, column(row_temperature, upstream), log_shares, column(slope, upstream))
    for student, teacher, result, scale, zero, tau, share, total in flat_rows(*tensors, *others):
        for rows in scratch.blocks(student.shape[0]):
            if silence and all_zero(scale[rows]):
                result[rows] = 0
                continue
            taus = None if row_temperature is None else tau[rows, 0]
            inputs = (Form(kind, omega), student[rows], teacher[rows], scratch)
            if shares is None:
                found = block_divergence(
                    *inputs, temperature=temperature, row_temperature=taus, value=False, gradient=True
                )
                dz = found.gradient
                assert dz is not None
            else:
                dz = slice_gradient(
                    *inputs, temperature=temperature, row_temperature=taus, shares=share[rows], slope=total[rows, 0]
                )
            dz.mul_(scale[rows])
            result[rows] = dz.masked_fill_(zero[rows], 0) if silence else dz
    return grad


@_divergence_backward.register_fake
def _(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.options = inputs[3:]


def _backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (_divergence_backward(upstream, *ctx.saved_tensors, *ctx.options),)


_divergence.register_autograd(_backward, _save)


@operator("divergence_slice")
def _divergence_slice(
    logits: Tensor,
    teacher_logits: Tensor,
    row_temperature: Tensor | None,
    kind: str,
    omega: float,
    temperature: float,
    vocab_size: int,
    kernels: bool,
    row_state: Tensor | None,  # (..., 2), for the kernels (..., 4), as in `WholeDivergence`
) -> Tensor:
    """`slice_state` (..., 5) of each row or, if `row_state` is known, `slice_terms` (..., 2)."""
    dtype = _checks.promoted_dtype(logits, teacher_logits)
    out = torch.empty(*logits.shape[:-1], 5 if row_state is None else 2, dtype=dtype, device=logits.device)
    if kernels:
        found, states = out.view(-1, out.shape[-1]), None if row_state is None else row_state.reshape(-1, 4)
        for place, pair in _pairs(logits, teacher_logits, row_temperature, kind, omega, temperature, vocab_size):
            found[place] = pair.slice_state() if states is None else pair.slice_terms(states[place])
        return out
    scratch = Scratch(logits.shape[:-1].numel(), vocab_size, dtype=dtype, device=logits.device)
    tensors = (logits[..., :vocab_size], teacher_logits[..., :vocab_size], out)
    shares = out if row_state is None else row_state  # `out` is a placeholder that nothing reads
    for student, teacher, result, tau, share in flat_rows(*tensors, column(row_temperature, out[..., 0]), shares):
        for rows in scratch.blocks(student.shape[0]):
            taus = None if row_temperature is None else tau[rows, 0]
            inputs = (Form(kind, omega), student[rows], teacher[rows], scratch)
            if row_state is None:
                result[rows] = slice_state(*inputs, temperature=temperature, row_temperature=taus)
            else:
                result[rows] = slice_terms(*inputs, temperature=temperature, row_temperature=taus, shares=share[rows])
    return out


@_divergence_slice.register_fake
def _(logits: Tensor, teacher_logits: Tensor, *options: Any) -> Tensor:
    row_state = options[-1]
    dtype = _checks.promoted_dtype(logits, teacher_logits)
    return logits.new_empty((*logits.shape[:-1], 5 if row_state is None else 2), dtype=dtype)


class _ShardedDivergence(torch.autograd.Function):
    """`_divergence` of logits that are a slice of the rows; results are those of whole rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher_logits: Tensor,
        row_temperature: Tensor | None,
        kind: str,
        omega: float,
        temperature: float,
        vocab_size: int,
        shard: VocabShard,
        kernels: bool,
    ) -> Tensor:
        inputs = (logits, teacher_logits, row_temperature, kind, omega, temperature, vocab_size, kernels)
        rows = logits.shape[:-1]

        def terms(row_state: Tensor) -> Tensor:
            return _divergence_slice(*inputs, row_state.reshape(*rows, row_state.shape[-1])).reshape(-1, 2)  # type: ignore[no-any-return]

        taus = None if row_temperature is None else row_temperature.reshape(-1)
        rate = rate_of(temperature, taus, logits) if kernels else None
        found = whole_divergence(kind, _divergence_slice(*inputs, None).reshape(-1, 5), terms, shard, rate)
        if kernels:
            more: tuple[Tensor, ...] = (torch.cat([found.row_state.T, found.slope[None]]),)
        else:  # an empty `known`, which only the kernels read
            more = found.slope.new_empty(0), found.row_state.reshape(*rows, 2), found.slope.reshape(rows)
        ctx.save_for_backward(*inputs[:3], *more)
        ctx.options = inputs[3:]
        return found.value.reshape(rows)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, more = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        return _divergence_backward(upstream, *inputs, *ctx.options, *more), *(None,) * 8
