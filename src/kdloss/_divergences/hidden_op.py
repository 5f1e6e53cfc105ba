"""The divergence of each trained token from hidden states and two heads, as one operator with its gradient.

    y = softcap(logit_scale * (hidden @ weight.T + bias)) on each side,   F(softmax(y / τ), softmax(y' / τ))
    dx = u dF/dz logit_scale (1 - (y / c)²) / τ,   dhidden = dx @ weight,   dweight = dx.T @ hidden,   dbias = sum dx

The trained rows are computed in chunks whose two blocks of logits fit a budget. A chunk goes through `rows.py` in a
smaller scratch, and its gradient overwrites its logits. A (T, V) tensor of either side never exists.

With T trained tokens, the forward takes 2 TV (D + D') multiplications and additions. The backward takes as many to
compute the logits again, and 4 TVD for its two products. If the student's head is frozen, each row of dhidden is linear
in u: it is computed in the forward, in float32, and the backward is one multiplication.

A half-precision head is widened one slice at a time, once per chunk: logits rounded to bf16 would be off by 3e-2 nats.
dweight and dbias are summed over chunks in float32 and rounded once. On a CPU that multiplies bfloat16, dx of bfloat16
hidden states and head is rounded to it before its two products (`_softmax/products.py`).

If each rank holds a slice of the vocabulary of both heads:

    forward    the products with both slices, 5 values per token from them, one all-gather; for a mixture the products
               again, 2 values per token, another all-gather (`sharded.py`)
    backward   the products again, and those with the gradient; the gradient of hidden states is summed over the ranks

Then the gradient is computed in the backward even if the head is frozen: the gradient of a chunk needs the other ranks'
values of that chunk, so computing it in the forward would cost an all-gather per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.head import Head, Heads
from kdloss._softmax.operator import operator
from kdloss._softmax.whole_rows import rate_of

from .hidden_passes import KernelPairChunks, Options, PairChunk, PairChunks, TorchPairChunks, chunk_rows, dtype_of
from .rows import Form
from .sharded import whole_divergence


def linear_divergence(
    heads: Heads,  # the teacher's tensors are detached here
    loss_mask: Tensor,  # (T,) bool
    form: Form,
) -> Tensor:  # (T,)
    """Divergence of each token, 0 where not trained; differentiable in the student's hidden states, weight and bias."""
    student, teacher, softmax, _ = heads
    assert teacher is not None
    trains_head = student.weight.requires_grad or (student.bias is not None and student.bias.requires_grad)
    in_forward = torch.is_grad_enabled() and student.hidden.requires_grad and not trains_head
    value: Tensor = _linear_divergence(
        *student.tensors(),
        *(None if x is None else x.detach() for x in teacher.tensors()),
        loss_mask,
        softmax.flat_temperature(),
        student.softcap,
        teacher.softcap,
        student.logit_scale,
        teacher.logit_scale,
        *form,
        softmax.temperature,
        softmax.local_size,
        softmax.kernels,
        in_forward,
    )[0]
    return value


@operator("linear_divergence")
def _linear_divergence(
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
    omega: float,  # `share` of `Form`
    temperature: float,
    vocab_size: int,
    kernels: bool,
    in_forward: bool,
) -> tuple[Tensor, Tensor]:
    """(the divergence (T,), 0 where not trained; dhidden (T, D) for u = 1 if `in_forward`, else (0,))."""
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    dtype = dtype_of(student, teacher)
    out = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
    d_hidden = torch.zeros(hidden.shape if in_forward else (0,), dtype=dtype, device=hidden.device)
    options = Options(Form(kind, omega), temperature, row_temperature, vocab_size)
    for rows, chunk in _chunks(student, teacher, loss_mask, options, kernels=kernels):
        value, gradient = chunk.divergence(None, gradient=in_forward)
        assert value is not None
        out[rows] = value
        if gradient is not None:
            d_hidden[rows] = gradient.of_hidden().to(dtype)
    return out, d_hidden


@_linear_divergence.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    in_forward = others[-1]
    dtype = _checks.promoted_dtype(hidden, *others[:5])
    out = hidden.new_empty(hidden.shape[0], dtype=dtype)
    return out, hidden.new_empty(hidden.shape if in_forward else (0,), dtype=dtype)


@operator("linear_divergence_backward")
def _linear_divergence_backward(
    upstream: Tensor,
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
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    # if the heads are a slice of the vocabulary: `row_state` and `slope` of `WholeDivergence`. Compiled graphs in
    # inductor's cache pass these two by name, so a new name would break them
    shares: Tensor | None = None,  # (T, 2), for the kernels (T, 4)
    slope: Tensor | None = None,  # (T,)
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias in their dtypes; (0,) for one that is not needed."""
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    dtype = dtype_of(student, teacher)
    d_hidden = torch.zeros(hidden.shape if needs_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.zeros(weight.shape if needs_weight else (0,), dtype=dtype, device=hidden.device)
    d_bias = torch.zeros(weight.shape[:1] if needs_bias else (0,), dtype=dtype, device=hidden.device)
    options = Options(Form(kind, omega), temperature, row_temperature, vocab_size, shares, slope)
    # tokens whose loss was clipped, masked or weighted to 0 cost nothing
    trained = loss_mask & (upstream != 0)
    for rows, chunk in _chunks(student, teacher, trained, options, kernels=kernels):
        _, gradient = chunk.divergence(upstream.index_select(0, rows), gradient=True)
        assert gradient is not None
        if needs_hidden:
            d_hidden[rows] = gradient.of_hidden().to(hidden.dtype)
        if needs_weight:
            gradient.add_to_weight_(d_weight[:vocab_size])
        if needs_bias:
            gradient.add_to_bias_(d_bias[:vocab_size])
        del chunk, gradient  # they hold the logits, which are free before d_weight is rounded
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype if bias is None else bias.dtype)


@_linear_divergence_backward.register_fake
def _(_: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = others[14:17]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


# the first arguments of the operator
_TENSORS = 8


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[_TENSORS:-1]
    ctx.in_forward = inputs[-1]
    ctx.hidden_dtype = inputs[0].dtype
    *_, loss_mask, _ = tensors = inputs[:_TENSORS]
    # hidden states only show a second derivative where they came from
    ctx.save_for_backward(*((output[1], loss_mask, inputs[0]) if ctx.in_forward else tensors))
    ctx.set_materialize_grads(False)  # None for the second output is cheaper than zeros (T, D)


def _backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return ()
    if ctx.in_forward:
        d_hidden, loss_mask, _ = ctx.saved_tensors
        # masked, because an incoming NaN or inf at an untrained token, times 0, is NaN
        factor = torch.where(loss_mask, upstream, 0).unsqueeze(-1)
        return (torch.where(factor == 0, 0, d_hidden * factor).to(ctx.hidden_dtype),)
    needs = ctx.needs_input_grad[:3]
    found = _linear_divergence_backward(upstream, *ctx.saved_tensors, *ctx.options, *needs)
    return tuple(x if needed else None for x, needed in zip(found, needs, strict=True))


_linear_divergence.register_autograd(_backward, _save)


def sharded_linear_divergence(
    heads: Heads,  # the teacher's tensors are detached here
    loss_mask: Tensor,  # (T,) bool
    form: Form,
) -> Tensor:  # (T,)
    """`linear_divergence` of heads that are a slice of the vocabulary; results are those of whole rows."""
    student, teacher, softmax, _ = heads
    shard, taus = softmax.shard, softmax.flat_temperature()
    assert teacher is not None
    assert shard is not None
    total, index = loss_mask.shape[0], None
    if _checks.runs_eagerly(loss_mask):  # only values of trained tokens are all-gathered
        index = loss_mask.nonzero().squeeze(-1)
        student = student._replace(hidden=student.hidden.index_select(0, index))
        teacher = teacher._replace(hidden=teacher.hidden.index_select(0, index))
        loss_mask = loss_mask.index_select(0, index)
        taus = None if taus is None else taus.index_select(0, index)
    value: Tensor = _ShardedLinearDivergence.apply(  # type: ignore[no-untyped-call]
        shard.enter(student.hidden),
        student.weight,
        student.bias,
        *(None if x is None else x.detach() for x in teacher.tensors()),
        loss_mask,
        taus,
        (student.softcap, teacher.softcap, student.logit_scale, teacher.logit_scale),
        (*form, softmax.temperature, softmax.local_size, softmax.kernels),
        shard,
    )
    return value if index is None else value.new_zeros(total).index_copy(0, index, value)


class _ShardedLinearDivergence(torch.autograd.Function):
    """The divergence (T,) of whole rows from heads that are a slice of the vocabulary."""

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

        def terms(row_state: Tensor) -> Tensor:
            return _linear_divergence_slice(*tensors, *ctx.options, row_state)  # type: ignore[no-any-return]

        kind, _, temperature, _, kernels = options
        taus = None if row_temperature is None else torch.where(loss_mask, row_temperature, 1)
        rate = rate_of(temperature, taus, hidden) if kernels else None
        state = _linear_divergence_slice(*tensors, *ctx.options, None)
        found = whole_divergence(kind, state, terms, shard, rate)
        ctx.save_for_backward(*tensors, found.row_state, found.slope)
        return found.value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_state, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = _linear_divergence_backward(upstream, *tensors, *ctx.options, *needs, row_state, slope)
        return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None,) * 8


@operator("linear_divergence_slice")
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
    row_state: Tensor | None,  # (T, 2), for the kernels (T, 4), as in `WholeDivergence`
) -> Tensor:
    """`slice_state` (T, 5) of trained tokens or, if `row_state` is known, `slice_terms` (T, 2); 0 elsewhere."""
    student = Head(hidden, weight, bias, softcap, logit_scale)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    dtype = dtype_of(student, teacher)
    out = torch.zeros(hidden.shape[0], 5 if row_state is None else 2, dtype=dtype, device=hidden.device)
    options = Options(Form(kind, omega), temperature, row_temperature, vocab_size, row_state)
    for rows, chunk in _chunks(student, teacher, loss_mask, options, kernels=kernels):
        out[rows] = chunk.slice_values()
    return out


@_linear_divergence_slice.register_fake
def _(hidden: Tensor, *others: Any) -> Tensor:
    row_state = others[-1]
    dtype = _checks.promoted_dtype(hidden, *others[:5])
    return hidden.new_empty((hidden.shape[0], 5 if row_state is None else 2), dtype=dtype)


def _chunks(
    student: Head, teacher: Head, trained: Tensor, options: Options, *, kernels: bool
) -> Iterator[tuple[Tensor, PairChunk]]:
    """Yield (rows, their chunk): the rows where `trained` (T,) is True, as many at a time as the budget allows."""
    index = trained.nonzero().squeeze(-1)
    rows = chunk_rows(options.vocab_size, trained.device)
    make = KernelPairChunks if kernels else TorchPairChunks
    chunks: PairChunks = make(student, teacher, options, min(rows, index.shape[0]))
    for start in range(0, index.shape[0], rows):
        part = index[start : start + rows]
        yield part, chunks.chunk(part)
