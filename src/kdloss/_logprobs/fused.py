"""A user's per-token loss from hidden states, with its gradients, in one pass over the head.

The two-step path computes log-probs, passes them to a loss, and computes the logits again in the backward: four
products with the head. Here the loss is computed while a chunk of logits exists, and its gradient with it: three
products.

    for each chunk of trained rows:
        z = head(h)                            logp, entropy from it
        l = token_loss(logp, entropy, ...)     and dl / dlogp, dl / dentropy by autograd
        dz from those,   dh = dz @ w,   dw += dz.T @ h

A chunk is some rows by the whole vocabulary, because the loss of a token needs its complete log-prob; so dw is summed
over chunks, in float32. The gradients stay in float32 until the backward, which multiplies them by the incoming
gradient and only then rounds them to the dtypes of their inputs: a gradient scaler loses no digits. On a CPU that
multiplies bfloat16, dz of bfloat16 hidden states and head is rounded to it before its two products, which have the
exponents of float32 (`_softmax/products.py`).

If the head is sharded, the states of a chunk's rows are merged before the loss, by one all-gather per chunk. A slice of
the vocabulary is narrow, so chunks have many rows and are few. The gradient of hidden states is summed over the ranks
in the backward.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._packing.reductions import token_mean
from kdloss._softmax.backend import Impl
from kdloss._softmax.head import HEAD_ARGS, Head, Heads, prepare_heads
from kdloss._softmax.vocabulary import IGNORE_INDEX, Softmax, label_columns

from .from_hidden import check_head_labels, logprobs_from_hidden, select_rows
from .fused_passes import Chunks, KernelChunks, TorchChunks, put_back
from .token_loss import TokenLoss, UserLoss

# Bytes of a chunk of logits, at most. Each chunk reads and writes all of dw once, so chunks are few and large.
_CHUNK_BYTES = {"cpu": 1 << 28, "other": 1 << 30}
# On a CPU a chunk has at most D rows, so that its logits take no more memory than dw; this many where D is smaller.
_CPU_ROWS = 512


class FusedLoss(NamedTuple):
    """The reduced loss, which is minimised, and what it was computed from, for logging.

    Attributes:
        loss: () the reduced loss. Differentiable in hidden states, weight and bias.
        logp: (T,) log-probs of the labels in nats, detached; 0 at untrained tokens.
        entropy: (T,) entropies in nats, detached; 0 at untrained tokens.

    Example:
        >>> import torch, kdloss
        >>> hidden, weight, labels = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
        >>> nll, mask = lambda logp, entropy: -logp, torch.tensor([True, False])
        >>> out: kdloss.FusedLoss = kdloss.fused_linear_loss(hidden, weight, labels, nll, loss_mask=mask)
        >>> out.loss, out.entropy  # log 4
        (tensor(1.3863), tensor([1.3863, 0.0000]))
    """

    loss: Tensor  # (), differentiable in hidden, weight and bias
    logp: Tensor  # (T,), detached, 0 at untrained tokens
    entropy: Tensor  # (T,), detached, 0 at untrained tokens


@documented(HEAD_ARGS)
def fused_linear_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    token_loss: TokenLoss,
    *token_inputs: Tensor | None,  # (T, ...) each
    loss_mask: Tensor,  # (T,) bool
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    max_trained_tokens: int | None = None,
    impl: Impl = "auto",
) -> FusedLoss:
    """The token mean of a per-token loss of your own, and its gradients, in one pass over the head.

        loss = (1 / normalizer) * sum over trained t of token_loss(logp_t, entropy_t, ...)

    Equal in value and gradient to `linear_token_logprobs_and_entropy`, then `token_loss`, then `token_mean`, with three
    products of the head's size instead of four.

    Args:
        {hidden}
        {weight}
        labels: (T,) int64. -100 is ignored: log-prob and entropy are 0 there, without gradient.
        token_loss: maps log-probs (t,), entropies (t,) and the same t rows of every token input to losses (t,), by
            differentiable operations that change nothing in place and draw no random numbers. It is elementwise: the
            loss of a token depends only on that token. It is called on some of the tokens at a time, and more than
            once. Tensors that it captures get no gradient, and may not be per token: pass those in `token_inputs`.
        *token_inputs: per-token tensors of any dtype, (T,) or (T, ...), detached; 0-dim tensors and None are passed on.
        loss_mask: (T,) bool, True where a token is trained on. A True where the label is -100 raises on the CPU;
            elsewhere `token_loss` gets log-prob 0 and entropy 0 there, and the token counts in the denominator.
        normalizer: the denominator, a number or a 0-dim tensor, detached. None: the count of `loss_mask`.
        {bias}
        {temperature}
        {softcap}
        {logit_scale}
        {vocab_size}
        {shard}
        {max_trained_tokens}
        {impl}

    Returns:
        `FusedLoss(loss, logp, entropy)`. Only `loss` carries gradient, to `hidden`, `weight` and `bias`. If the count
        or the normalizer is 0, the loss is a 0 that is still attached to the graph.

    Expected gradient:
        That of `token_loss` under `token_mean`. With `kdrl_token_loss`: that of `kdrl_loss`.

    Raises:
        {TypeError}
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run; `token_loss` does not return (t,), changes its inputs in place, or fails on some of the tokens; or, on
            the CPU, a label is outside the vocabulary, `loss_mask` is True where the label is -100, there are more
            trained tokens than `max_trained_tokens`, two calls of `token_loss` differ, or the loss of one token moves
            with another (a sequence-level ratio, a discount): such a loss needs `linear_token_logprobs` and a loss on
            whole sequences.

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([[0.5, 0.1], [0.3, 0.6], [0.2, 0.3]]).log().requires_grad_()
        >>> labels, loss_mask = torch.tensor([0, 1]), torch.tensor([True, True])
        >>> cross_entropy = lambda logp, entropy: -logp
        >>> out = kdloss.fused_linear_loss(torch.eye(2), weight, labels, cross_entropy, loss_mask=loss_mask)
        >>> (gradient,) = torch.autograd.grad(out.loss, weight)
        >>> gradient  # (q - onehot) / 2, a column per token
        tensor([[-0.2500,  0.0500],
                [ 0.1500, -0.2000],
                [ 0.1000,  0.1500]])
    """
    _checks.tensors(loss_mask=loss_mask)
    _checks.normalizer(normalizer)
    head = Head(hidden, weight, bias, softcap, logit_scale)
    heads = prepare_heads(
        head, loss_mask=loss_mask, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl
    )
    check_head_labels(heads, labels, loss_mask)
    head, _, softmax, shape = heads
    if labels.shape != shape:
        raise ValueError(f"labels must match the rows of hidden {tuple(shape)}, got {tuple(labels.shape)}")
    inputs = [_token_input(number, x, shape, head.hidden) for number, x in enumerate(token_inputs)]
    user_loss = UserLoss(token_loss, inputs, math.prod(shape))
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head.tensors())
    if not (needs_gradient and _checks.runs_eagerly(loss_mask)):
        # without a gradient there is nothing to fuse; a compiler cannot trace the number of chunks
        return _two_steps(heads, labels, user_loss, loss_mask, normalizer, max_trained_tokens)
    columns, outside = label_columns(labels, shape, softmax.vocab_size)
    trained = loss_mask.flatten()
    columns = columns.masked_fill(~trained[:, None], IGNORE_INDEX)
    rows, left_out = select_rows(trained, max_trained_tokens, kernels=softmax.kernels)
    assert rows is not None
    logp, entropy, total = _Fused.apply(  # type: ignore[no-untyped-call]
        *head, softmax, user_loss, trained, normalizer, columns, outside & trained[:, None], rows
    )
    if left_out is not None:
        total = total + torch.where(left_out.any(), torch.nan, 0.0).to(total)
        logp, entropy = logp.masked_fill(left_out, torch.nan), entropy.masked_fill(left_out, torch.nan)
    return FusedLoss(total, logp.detach().reshape(shape), entropy.detach().reshape(shape))


def _two_steps(
    heads: Heads,
    labels: Tensor,
    user_loss: UserLoss,
    loss_mask: Tensor,
    normalizer: float | Tensor | None,
    bound: int | None,
) -> FusedLoss:
    """The same loss from log-probs of all tokens, with 0 at untrained ones."""
    logp, entropy = logprobs_from_hidden(
        heads, labels, loss_mask=loss_mask, max_trained_tokens=bound, with_entropy=True
    )
    mask = loss_mask.flatten()
    flat = logp.flatten(), entropy.flatten()
    if _checks.value_checks_allowed(mask):
        rows = mask.nonzero().squeeze(-1)
        user_loss.at(rows).check_elementwise(*(x.detach()[rows] for x in flat))
    losses = user_loss.attached(*flat)
    loss = token_mean(losses, loss_mask=mask, normalizer=normalizer)
    # the bound counts tokens of the mask, as in the fused pass: a trained token without a label has a loss too
    if bound is not None:
        _, left_out = select_rows(mask, bound)
        assert left_out is not None
        loss = loss + torch.where(left_out.any(), torch.nan, 0.0).to(loss)
    return FusedLoss(loss, logp.detach(), entropy.detach())


def _token_input(number: int, x: Tensor | None, shape: torch.Size, hidden: Tensor) -> Tensor | None:
    """A token input as (T, ...), detached; a 0-dim tensor or None as it is."""
    if x is None:
        return None
    name = f"token_inputs[{number}]"
    _checks.tensors(**{name: x})
    _checks.same_device("hidden", hidden, **{name: x})
    x = _checks.savable(x)
    if x.ndim == 0:
        return x.detach()
    if x.shape[: len(shape)] != shape:
        raise ValueError(f"{name} must be {tuple(shape)} or {_checks.axes(*shape, '...')}, got {tuple(x.shape)}")
    return x.detach().reshape(math.prod(shape), *x.shape[len(shape) :])


class _Fused(torch.autograd.Function):
    """(logp (T,), entropy (T,), loss ()); only the loss carries gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D)
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        softmax: Softmax,
        user_loss: UserLoss,
        mask: Tensor,  # (T,)
        normalizer: float | Tensor | None,
        columns: Tensor,  # (T, 1) inside the vocabulary, or -100
        outside: Tensor,  # (T, 1) bool: trained tokens whose label was neither
        rows: Tensor,  # (N,) the trained tokens, and others under a static bound
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _checks.promoted_dtype(hidden, weight, bias)
        count = mask.sum() if normalizer is None else normalizer
        unit = token_mean(torch.ones_like(mask[:1], dtype=dtype), loss_mask=torch.ones_like(mask[:1]), normalizer=count)
        logp = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        entropy, losses = torch.zeros_like(logp), torch.zeros_like(logp)
        needs = ctx.needs_input_grad[:3]
        dhidden = logp.new_empty(rows.shape[0] if needs[0] else 0, hidden.shape[1])
        dweight = logp.new_zeros(weight.shape) if needs[1] else None
        dbias = logp.new_zeros(weight.shape[0]) if needs[2] else None

        vocab_size, shard = softmax.local_size, softmax.shard
        kind = "cpu" if mask.device.type == "cpu" else "other"
        # all ranks use the same chunks, because results are merged chunk by chunk
        widest = vocab_size if shard is None else shard.widest
        most = max(hidden.shape[1], _CPU_ROWS) if kind == "cpu" else rows.shape[0]
        size = max(1, min(_CHUNK_BYTES[kind] // (widest * dtype.itemsize), most, rows.shape[0]))
        make = KernelChunks if softmax.kernels else TorchChunks
        head = Head(hidden, weight, bias, softcap, logit_scale).without_padding(vocab_size)
        chunks: Chunks = make(head, columns, softmax, size)
        for start in range(0, rows.shape[0], size):
            part = rows[start : start + size]
            chunk, trained = chunks.chunk(part), mask[part]
            chunk_logp = chunk.logp.masked_fill(outside[part].squeeze(-1), torch.nan)
            chunk_loss, upstream = user_loss.at(part), torch.where(trained, unit, 0)
            chunk_losses, *slopes = chunk_loss.slopes(chunk_logp, chunk.entropy, upstream)
            if start == 0 and _checks.value_checks_allowed(mask):
                chunk_loss.check_elementwise(chunk_logp, chunk.entropy)
            logp[part], entropy[part] = chunk_logp, chunk.entropy
            losses[part] = torch.where(trained, chunk_losses, 0).to(dtype)

            g, h = (x.to(dtype).masked_fill(~trained, 0) for x in slopes)
            gradient = chunk.gradient(g, h)
            if needs[0]:
                dhidden[start : start + size] = gradient.of_hidden()
            if dweight is not None:
                gradient.add_to_weight_(dweight[:vocab_size])
            if dbias is not None:
                gradient.add_to_bias_(dbias[:vocab_size])
        # the inputs only show a second derivative where they came from
        ctx.save_for_backward(rows, dhidden, dweight, dbias, hidden, weight, bias)
        ctx.kernels = softmax.kernels
        ctx.like = [(x.shape, x.dtype) if x is not None else None for x in (hidden, weight, bias)]
        ctx.shard = shard
        ctx.mark_non_differentiable(logp, entropy)
        return logp, entropy, token_mean(losses, loss_mask=mask, normalizer=count)

    @staticmethod
    def backward(ctx: Any, _logp: Tensor, _entropy: Tensor, incoming: Tensor) -> tuple[Tensor | None, ...]:
        rows, dhidden, dweight, dbias, *inputs = ctx.saved_tensors
        shape, dtype = ctx.like[0]
        found: list[Tensor | None] = [None, None, None]
        with torch.no_grad():
            if ctx.needs_input_grad[0]:
                if ctx.shard is None:
                    found[0] = put_back(dhidden, rows, shape[0], dtype, incoming, kernels=ctx.kernels)
                else:
                    summed = ctx.shard.sum_gradients((dhidden * incoming).to(dtype))
                    found[0] = summed.new_zeros(shape).index_copy_(0, rows, summed)
            for place, x in ((1, dweight), (2, dbias)):
                if x is not None:
                    found[place] = torch.mul(x, incoming, out=x.new_empty(x.shape, dtype=ctx.like[place][1]))
        if torch.is_grad_enabled():  # create_graph=True
            refuse = partial(_checks.refuse_second_derivative, "fused_linear_loss")
            found = [None if x is None else refuse(x, incoming, *inputs) for x in found]
        return *found, *(None,) * 9
