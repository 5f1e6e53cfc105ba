"""The logits of the kept ids, and the log-sum-exp of all others, from hidden states and a head, as one operator.

`topk_op.py` for logits that never exist at once: a chunk of the trained rows is computed, read, and computed again in
the backward. The rest is summed over its own columns: from the log-probs of the ids alone, 1 minus their mass would
lose all its digits where little is left.

If each rank holds a slice of the vocabulary, the results of a rank are merged as in `topk_op.py`: one all-gather of
K + 1 values per token. The gradient of the hidden states is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.head import Head, HeadGradient, Heads, KernelHeadGradient, TorchHeadGradient, head_product_
from kdloss._softmax.operator import operator
from kdloss._softmax.products import rounds_gradient
from kdloss._softmax.rows import Scaling

from .hidden_passes import chunk_rows, product_of_rows_
from .topk_op import gradient_of_kept_and_rest, ids_of_slice, kept_and_rest_of_rows, merge_ranks


def linear_kept_and_rest(
    heads: Heads,
    ids: Tensor,  # (T, K) int64, distinct and ascending within a row; -1 is padding
    trained: Tensor,  # (T,) bool
    *,
    with_rest: bool,
) -> tuple[Tensor, Tensor]:  # (T, K), (T,)
    """`kept_and_rest` of the logits of the trained rows; 0 in the others. Differentiable in the student's head."""
    student, _, softmax, _ = heads
    options = (
        student.softcap,
        student.logit_scale,
        softmax.temperature,
        softmax.local_size,
        with_rest,
        softmax.kernels,
    )
    if softmax.shard is None:
        tensors = (*student[:3], ids, trained, softmax.flat_temperature)
        kept, rest = _linear_kept_and_rest(*tensors, *options)
        return kept, rest
    hidden = softmax.shard.enter(student.hidden)
    inputs = (hidden, *student[1:3], ids, trained, softmax.flat_temperature, options, softmax.shard)
    kept, rest = _ShardedLinearTopk.apply(*inputs)  # type: ignore[no-untyped-call]
    return kept, rest


@operator("linear_kept_and_rest")
def _linear_kept_and_rest(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    trained: Tensor,
    row_temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """(kept (T, K), rest (T,))."""
    dtype = _checks.promoted_dtype(hidden, weight, bias)
    kept = torch.zeros(ids.shape, dtype=dtype, device=hidden.device)
    rest = torch.zeros(ids.shape[:1], dtype=dtype, device=hidden.device)
    head = Head(hidden, weight, bias, softcap, logit_scale).without_padding(vocab_size)
    for rows, chunk in _chunks(head, trained, dtype, kernels=kernels):
        tau = None if row_temperature is None else row_temperature.index_select(0, rows)
        found = kept_and_rest_of_rows(chunk.y, ids[rows], tau, temperature, vocab_size, with_rest, kernels)
        kept[rows], rest[rows] = found
    return kept, rest


@_linear_kept_and_rest.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = _checks.promoted_dtype(hidden, weight, bias)
    return hidden.new_empty(ids.shape, dtype=dtype), hidden.new_empty(ids.shape[:1], dtype=dtype)


@operator("linear_kept_and_rest_backward")
def _linear_kept_and_rest_backward(
    upstream_kept: Tensor,
    upstream_rest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    trained: Tensor,
    row_temperature: Tensor | None,
    rest: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
    kernels: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias in their dtypes; (0,) for one that is not needed."""
    dtype = _checks.promoted_dtype(hidden, weight, bias)
    d_hidden = torch.zeros(hidden.shape if needs_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    d_weight = torch.zeros(weight.shape if needs_weight else (0,), dtype=dtype, device=hidden.device)
    d_bias = torch.zeros(weight.shape[:1] if needs_bias else (0,), dtype=dtype, device=hidden.device)
    head = Head(hidden, weight, bias, softcap, logit_scale).without_padding(vocab_size)
    # tokens whose loss was clipped, masked or weighted to 0 cost nothing
    wanted = trained & ((upstream_kept != 0).any(-1) | (upstream_rest != 0))
    for rows, chunk in _chunks(head, wanted, dtype, kernels=kernels):
        tau = None if row_temperature is None else row_temperature.index_select(0, rows)
        of_rows = (chunk.y, ids[rows], tau, rest[rows], temperature, vocab_size, with_rest, kernels)
        dz = gradient_of_kept_and_rest(upstream_kept[rows], upstream_rest[rows], *of_rows)
        gradient = chunk.through_head(dz)
        if needs_hidden:
            d_hidden[rows] = gradient.of_hidden().to(hidden.dtype)
        if needs_weight:
            gradient.add_to_weight_(d_weight[:vocab_size])
        if needs_bias:
            gradient.add_to_bias_(d_bias[:vocab_size])
        del chunk, dz, gradient  # they hold the logits, which are free before d_weight is rounded
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype if bias is None else bias.dtype)


@_linear_kept_and_rest_backward.register_fake
def _(
    upstream_kept: Tensor, upstream_rest: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = others[-3:]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


# the first arguments of the operator
_TENSORS = 6


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.options = inputs[_TENSORS:]


def _backward(ctx: Any, upstream_kept: Tensor, upstream_rest: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = _linear_kept_and_rest_backward(upstream_kept, upstream_rest, *ctx.saved_tensors, *ctx.options, *needs)
    return tuple(x if needed else None for x, needed in zip(found, needs, strict=True))


_linear_kept_and_rest.register_autograd(_backward, _save)


class _ShardedLinearTopk(torch.autograd.Function):
    """`_linear_kept_and_rest` of a head that is a slice of the vocabulary; results are those of whole rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        trained: Tensor,
        row_temperature: Tensor | None,
        options: tuple[Any, ...],
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        here = ids_of_slice(ids, shard.start)
        kept, rest = _linear_kept_and_rest(hidden, weight, bias, here, trained, row_temperature, *options)
        kept, rest = merge_ranks(kept, rest, shard, with_rest=options[4])
        ctx.save_for_backward(hidden, weight, bias, here, trained, row_temperature, rest)
        ctx.options = options
        return kept, rest

    @staticmethod
    def backward(ctx: Any, upstream_kept: Tensor, upstream_rest: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, upstream_kept, upstream_rest), *(None,) * 5


class _Chunk(NamedTuple):
    """Rows whose logits have been computed."""

    y: Tensor  # (n, V)
    hidden: Tensor  # (n, D) in the dtype of the product
    head: Head
    kernels: bool

    def through_head(self, dz: Tensor) -> HeadGradient:
        """From the gradient (n, V) of y, which is overwritten, as y is."""
        dx = Scaling(self.head.softcap, self.head.logit_scale, 1.0).backward_(dz, self.y)
        if self.kernels:
            narrow = self.head.hidden.dtype == self.head.weight.dtype == torch.bfloat16
            return KernelHeadGradient(dx.to(torch.bfloat16) if narrow else dx, self.hidden, self.head.weight)
        dx = dx.to(torch.bfloat16) if rounds_gradient(self.head.hidden, self.head.weight, dx.dtype) else dx
        return TorchHeadGradient(dx, self.hidden.to(dx.dtype), self.head.weight)


def _chunks(head: Head, trained: Tensor, dtype: torch.dtype, *, kernels: bool) -> Iterator[tuple[Tensor, _Chunk]]:
    """Yield (rows, their chunk): the rows where `trained` (T,) is True, as many at a time as the budget allows."""
    index, vocab_size = trained.nonzero().squeeze(-1), head.weight.shape[0]
    size = chunk_rows(vocab_size, trained.device)
    room = head.hidden.new_empty(min(size, index.shape[0]), vocab_size, dtype=dtype)
    for start in range(0, index.shape[0], size):
        rows = index[start : start + size]
        y = room[: rows.shape[0]]
        if kernels:
            hidden = product_of_rows_(y, head, rows)
            if head.bias is not None:
                y.add_(head.bias.to(dtype))
        else:
            hidden = head.hidden.index_select(0, rows)
            head_product_(y, hidden.to(dtype), head.weight, head.bias)
        Scaling(head.softcap, head.logit_scale, 1.0).apply_(y)
        yield rows, _Chunk(y, hidden, head, kernels)
