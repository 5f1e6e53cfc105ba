"""The divergence of every trained token where ranks hold a slice of both heads' vocabulary.

    forward    the products with both slices, 5 numbers a token from them, one all-gather; for a mixture the products
               again, 2 numbers, another all-gather (`_divergences/sharded.py`)
    backward   the products again, and those with the gradient; the gradient of hidden states is summed over the ranks

Where the head is frozen the gradient could not be taken in the forward, as it is in one process: a chunk's gradient
needs the other ranks' numbers of that chunk, and an all-gather a chunk is what this avoids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.head import Head, Heads
from kdloss._softmax.whole_rows import rate_of

from .hidden_op import linear_divergence_backward, passes
from .hidden_passes import Options, dtype_of
from .rows import Form
from .sharded import whole_divergence


def sharded_linear_divergence(
    heads: Heads,  # the teacher's is detached here
    loss_mask: Tensor,  # (T,)
    form: Form,
) -> Tensor:  # (T,)
    """0 where `loss_mask` is False; differentiable in the student's hidden states, weight and bias."""
    student, teacher, softmax, _ = heads
    shard, taus = softmax.shard, softmax.flat_temperature
    assert teacher is not None
    assert shard is not None
    total, index = loss_mask.shape[0], None
    if not torch.compiler.is_compiling():  # only the trained tokens go around
        index = loss_mask.nonzero().squeeze(-1)
        student = student._replace(hidden=student.hidden.index_select(0, index))
        teacher = teacher._replace(hidden=teacher.hidden.index_select(0, index))
        loss_mask = loss_mask.index_select(0, index)
        taus = None if taus is None else taus.index_select(0, index)
    value: Tensor = _FromHidden.apply(  # type: ignore[no-untyped-call]
        shard.enter(student.hidden),
        student.weight,
        student.bias,
        *(None if x is None else x.detach() for x in teacher[:3]),
        loss_mask,
        taus,
        (student.softcap, teacher.softcap, student.logit_scale, teacher.logit_scale),
        (*form, softmax.temperature, softmax.local_size, softmax.kernels),
        shard,
    )
    return value if index is None else value.new_zeros(total).index_copy(0, index, value)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        loss_mask: Tensor,
        row_temperature: Tensor | None,
        scaling: tuple[Any, ...],
        options: tuple[Any, ...],
        shard: VocabShard,
    ) -> Tensor:
        tensors = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, loss_mask, row_temperature)
        ctx.options = (*scaling, *options)

        def terms(shares: Tensor) -> Tensor:
            return _linear_divergence_slice(*tensors, *ctx.options, shares)  # type: ignore[no-any-return]

        kind, _, temperature, _, kernels = options
        taus = None if row_temperature is None else torch.where(loss_mask, row_temperature, 1)
        rate = rate_of(temperature, taus, hidden) if kernels else None
        state = _linear_divergence_slice(*tensors, *ctx.options, None)
        found = whole_divergence(kind, state, terms, shard, rate)
        ctx.save_for_backward(*tensors, found.known, found.slope)
        return found.value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, shares, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = linear_divergence_backward(upstream, *tensors, *ctx.options, *needs, shares, slope)
        return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None,) * 8


@torch.library.custom_op("kdloss::linear_divergence_slice", mutates_args=())
def _linear_divergence_slice(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    loss_mask: Tensor,
    row_temperature: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    logit_scale: float,
    teacher_logit_scale: float,
    kind: str,
    omega: float,
    temperature: float,
    vocab_size: int,
    kernels: bool,
    shares: Tensor | None,  # (T, 2); for the kernels (T, 4), the state of whole rows
) -> Tensor:
    """`slice_state` (T, 5) of the trained tokens, 0 elsewhere; with the shares, `slice_terms` (T, 2)."""
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    dtype = dtype_of(student, teacher)
    out = torch.zeros(hidden.shape[0], 5 if shares is None else 2, dtype=dtype, device=hidden.device)
    options = Options(Form(kind, omega), temperature, vocab_size, shares)
    for rows, over in passes(student, teacher, loss_mask, row_temperature, options, kernels=kernels):
        out[rows] = over.slice_numbers()
    return out


@_linear_divergence_slice.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    loss_mask: Tensor,
    row_temperature: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    logit_scale: float,
    teacher_logit_scale: float,
    kind: str,
    omega: float,
    temperature: float,
    vocab_size: int,
    kernels: bool,
    shares: Tensor | None,
) -> Tensor:
    dtype = _checks.promoted_dtype(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    return hidden.new_empty((hidden.shape[0], 5 if shares is None else 2), dtype=dtype)
