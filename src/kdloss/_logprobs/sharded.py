"""Log-probs and entropies of a vocabulary-sharded head, from operators that see only one part of each row.

    forward    the operator on this rank's part, then one all-gather that gives whole rows (`_softmax/whole_rows.py`)
    backward   the operator's backward, given the state of whole rows: p = e^(z - m) / s is then that of the whole row

The only collective of the backward sums the gradient of hidden states over the ranks (`VocabShard.enter`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.head import Head
from kdloss._softmax.rows import RowState
from kdloss._softmax.vocabulary import Softmax
from kdloss._softmax.whole_rows import rate_of, whole_rows

from .hidden_op import linear_logprobs, linear_logprobs_backward
from .logits_op import logprobs, logprobs_backward


def sharded_logprobs(
    logits: Tensor,  # (..., V of this slice)
    columns: Tensor,  # (T, K) of the whole vocabulary, -100 ignored
    softcap: float | None,
    softmax: Softmax,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,)), the same on every rank."""
    options = (softmax.temperature, softcap, softmax.local_size)
    taus, shard, kernels = softmax.flat_temperature(), softmax.shard, softmax.kernels
    return _ShardedLogprobs.apply(logits, columns, taus, options, with_entropy, shard, kernels)  # type: ignore[no-any-return, no-untyped-call]


def sharded_linear_logprobs(
    head: Head,  # of this slice
    columns: Tensor,  # (T, K) of the whole vocabulary, -100 ignored
    rows: Tensor | None,  # (N,) to compute. None: those with a label
    softmax: Softmax,
    *,
    with_entropy: bool,
    store: bool,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,)), the same on every rank."""
    total, hidden, taus, shard = columns.shape[0], head.hidden, softmax.flat_temperature(), softmax.shard
    assert shard is not None
    if rows is not None:  # only these are all-gathered
        hidden, columns = hidden.index_select(0, rows), columns.index_select(0, rows)
        taus = None if taus is None else taus.index_select(0, rows)
    hidden = shard.enter(hidden)
    options = (softmax.temperature, head.softcap, head.logit_scale, softmax.local_size, compact, softmax.kernels)
    logp, entropy = _ShardedLinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, columns, taus, options, rows is not None, with_entropy, store, shard
    )
    if rows is not None:
        logp = logp.new_zeros(total, *logp.shape[1:]).index_copy(0, rows, logp)
        entropy = entropy.new_zeros(total).index_copy(0, rows, entropy) if with_entropy else entropy
    return logp, entropy


def _merge_ranks(
    found: tuple[Tensor, ...], columns: Tensor, with_entropy: bool, shard: VocabShard, rate: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(logp, entropy, (maximum, peak, mean)) of whole rows, from what an operator returned for this rank's part."""
    logp, nothing, maximum, peak, mean, *_ = found
    part = RowState(maximum[:, None], peak[:, None], mean[:, None] if with_entropy else None)
    state, logp = whole_rows(part, logp, columns, shard, rate)
    maximum, peak = state.maximum.squeeze(-1), state.peak.squeeze(-1)
    if state.mean is None:
        return logp, nothing, (maximum, peak, nothing)
    entropy = state.entropy().squeeze(-1).masked_fill((columns < 0).all(-1), 0)
    return logp, entropy, (maximum, peak, state.mean.squeeze(-1))


class _ShardedLogprobs(torch.autograd.Function):
    """`logprobs` of logits that are a slice of the rows; results are those of whole rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        columns: Tensor,
        row_temperature: Tensor | None,
        options: tuple[Any, ...],
        with_entropy: bool,
        shard: VocabShard,
        kernels: bool,
    ) -> tuple[Tensor, Tensor]:
        here = shard.columns(columns, options[-1])
        found = logprobs(logits, here, row_temperature, *options, with_entropy, kernels)
        rate = rate_of(options[0], row_temperature, logits) if kernels else None
        logp, entropy, state = _merge_ranks(found, columns, with_entropy, shard, rate)
        ctx.save_for_backward(logits, here, row_temperature, *state)
        ctx.options, ctx.with_entropy = (*options, kernels), with_entropy
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        incoming = entropy_gradient if ctx.with_entropy else None
        return logprobs_backward(logp_gradient, incoming, *ctx.saved_tensors, *ctx.options, True), *(None,) * 6


class _ShardedLinearLogprobs(torch.autograd.Function):
    """`linear_logprobs` of a slice of the head; results are those of whole rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        columns: Tensor,
        row_temperature: Tensor | None,
        options: tuple[Any, ...],
        all_rows: bool,
        with_entropy: bool,
        store: bool,
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        temperature, *_, vocab_size, _, kernels = options
        here = shard.columns(columns, vocab_size)
        rows = torch.arange(columns.shape[0], device=columns.device) if all_rows else None
        found = linear_logprobs(hidden, weight, bias, here, rows, row_temperature, *options, with_entropy, store)
        rate = rate_of(temperature, row_temperature, hidden) if kernels else None
        logp, entropy, state = _merge_ranks(found[:5], columns, with_entropy, shard, rate)
        ctx.save_for_backward(hidden, weight, bias, here, rows, row_temperature, *state, found[5])
        ctx.options, ctx.with_entropy = options, with_entropy
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        incoming = entropy_gradient if ctx.with_entropy else None
        needs = ctx.needs_input_grad[:3]
        found = linear_logprobs_backward(logp_gradient, incoming, *ctx.saved_tensors, *ctx.options, *needs)
        return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None,) * 7
