"""Log-probs and entropies from hidden states and the output head, for the trained tokens only.

    logits = softcap(logit_scale * (hidden @ weight.T + bias)),   then as from logits

Only rows with a trained label are multiplied with the head, so time and memory are proportional to their number. Which
rows these are depends only on mask and labels, so the same mask gives the same bits. The backward also leaves out rows
whose incoming gradient is 0.

Finding the rows waits for the device once forward and once backward. A static bound, `max_trained_tokens`, removes both
waits (for CUDA graphs); that many rows are then always computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._softmax.backend import Impl
from kdloss._softmax.head import HEAD_ARGS, Head, Heads, prepare_heads
from kdloss._softmax.vocabulary import IGNORE_INDEX, check_labels, label_columns, labelled

from .from_logits import LogprobsAndEntropy
from .hidden_op import linear_logprobs
from .sharded import sharded_linear_logprobs

# Up to this many bytes of logits are kept for the backward, on a CPU and elsewhere; more are computed again. On a CPU,
# those of 2048 tokens and 32,000 words are more: keeping them would be half of what plain torch holds.
KEPT_BYTES, DEVICE_KEPT_BYTES = 3 << 26, 1 << 30


@documented(HEAD_ARGS)
def linear_token_logprobs(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,) or (T, K)
    *,
    loss_mask: Tensor | None = None,  # (T,) bool
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    max_trained_tokens: int | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (T,) or (T, K)
    """Log-probs of labels from hidden states and the output head, for the trained tokens only.

        logp = log softmax(z)[label],   z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature

    Equal to `token_logprobs` of these logits, but the (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {labels}
        {loss_mask}
        {bias}
        {temperature}
        {softcap}
        {logit_scale}
        {vocab_size}
        {shard}
        {max_trained_tokens}
        {impl}

    Returns:
        The shape of `labels`, nats, float32 for half-precision inputs. 0 without gradient at untrained tokens, even if
        their hidden states hold NaN.

    Expected gradient:
        That of log q(label), carried on to `hidden`, `weight` and `bias`, in the dtype of each.

    Raises:
        {TypeError}
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run, or (on the CPU) a label is outside the vocabulary, `loss_mask` is True where every label is -100, or
            there are more trained tokens than `max_trained_tokens`.

    Example:
        >>> import torch, kdloss
        >>> weight = torch.tensor([[0.5, 0.1], [0.3, 0.6], [0.2, 0.3]]).log()
        >>> labels, loss_mask = torch.tensor([0, 1]), torch.tensor([True, False])
        >>> kdloss.linear_token_logprobs(torch.eye(2), weight, labels, loss_mask=loss_mask).exp()
        tensor([0.5000, 1.0000])
    """
    head = Head(hidden, weight, bias, softcap, logit_scale)
    heads = prepare_heads(
        head, loss_mask=loss_mask, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl
    )
    return logprobs_from_hidden(heads, labels, loss_mask=loss_mask, max_trained_tokens=max_trained_tokens)[0]


@documented(HEAD_ARGS)
def linear_token_logprobs_and_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,) or (T, K)
    *,
    loss_mask: Tensor | None = None,  # (T,) bool
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    max_trained_tokens: int | None = None,
    impl: Impl = "auto",
) -> LogprobsAndEntropy:
    """Log-probs of labels and entropies from hidden states and the output head, for the trained tokens only.

        logp = log softmax(z)[label],   entropy = -sum_v p_v log p_v,   p = softmax(z)
        z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature

    Equal to `token_logprobs_and_entropy` of these logits, but the (T, V) logits never exist at once.

    Args:
        {hidden}
        {weight}
        {labels}
        {loss_mask}
        {bias}
        {temperature}
        {softcap}
        {logit_scale}
        {vocab_size}
        {shard}
        {max_trained_tokens}
        {impl}

    Returns:
        `LogprobsAndEntropy(logp, entropy)`, nats, float32 for half-precision inputs. `logp` has the shape of `labels`,
        `entropy` is (T,). Both are 0 without gradient at untrained tokens, even if their hidden states hold NaN.

    Expected gradient:
        Those of log q(label) and of the entropy, carried on to `hidden`, `weight` and `bias`, in the dtype of each.

    Raises:
        {TypeError}
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run, or (on the CPU) a label is outside the vocabulary, `loss_mask` is True where every label is -100, or
            there are more trained tokens than `max_trained_tokens`.

    Example:
        >>> import torch, kdloss
        >>> hidden, weight = torch.ones(1, 2), torch.zeros(4, 2)  # uniform: the entropy is log 4
        >>> out = kdloss.linear_token_logprobs_and_entropy(hidden, weight, torch.tensor([2]))
        >>> out.logp, out.entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """
    head = Head(hidden, weight, bias, softcap, logit_scale)
    heads = prepare_heads(
        head, loss_mask=loss_mask, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl
    )
    return LogprobsAndEntropy(
        *logprobs_from_hidden(
            heads, labels, loss_mask=loss_mask, max_trained_tokens=max_trained_tokens, with_entropy=True
        )
    )


def logprobs_from_hidden(
    heads: Heads,
    labels: Tensor,
    *,
    loss_mask: Tensor | None,
    max_trained_tokens: int | None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) in the shapes of the labels and of the rows; the entropy is empty if it is not asked for."""
    head, _, softmax, shape = heads
    check_head_labels(heads, labels, loss_mask)
    columns, outside = label_columns(labels, shape, softmax.vocab_size)
    if loss_mask is not None:
        untrained = ~loss_mask.reshape(-1, 1)
        columns, outside = columns.masked_fill(untrained, IGNORE_INDEX), outside & ~untrained
    rows, left_out = select_rows((columns != IGNORE_INDEX).any(-1), max_trained_tokens, kernels=softmax.kernels)
    store = rows is not None and keeps_logits(rows.shape[0] * softmax.local_size, *head.tensors())
    compact = max_trained_tokens is None
    if softmax.shard is None:
        logp, entropy, *_ = linear_logprobs(
            *head.tensors(),
            columns,
            rows,
            softmax.flat_temperature(),
            softmax.temperature,
            head.softcap,
            head.logit_scale,
            softmax.local_size,
            compact,
            softmax.kernels,
            with_entropy,
            store,
        )
    else:
        logp, entropy = sharded_linear_logprobs(
            head, columns, rows, softmax, with_entropy=with_entropy, store=store, compact=compact
        )
    logp = logp.masked_fill(outside, torch.nan)
    if left_out is not None:
        logp = logp.masked_fill(left_out[:, None] & (columns != IGNORE_INDEX), torch.nan)
        entropy = entropy.masked_fill(left_out, torch.nan) if with_entropy else entropy
    return logp.reshape(labels.shape), entropy.reshape(shape if with_entropy else 0)


def check_head_labels(heads: Heads, labels: Tensor, loss_mask: Tensor | None) -> None:
    """Raise unless labels fit the rows of the hidden states and the vocabulary of the head."""
    _checks.tensors(labels=labels)
    _checks.same_device("hidden", heads.student.hidden, labels=labels)
    check_labels(labels, heads.shape, heads.softmax.vocab_size, loss_mask=loss_mask)
    if (taus := heads.softmax.row_temperature) is not None:
        counts = labelled(labels, heads.shape)
        _checks.row_temperatures(taus, counts if loss_mask is None else counts & loss_mask)


def select_rows(
    trained: Tensor, max_trained_tokens: int | None, *, kernels: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """(rows to compute (N,), which include the trained ones; mask (T,) of trained rows that are left out).

    The rows are None where their number is unknown, as under `torch.compile`: the operator finds them. Without a bound
    no row is left out, and the mask is None. If the bound is too small, every trained row is marked as left out, so
    that a partial result cannot pass unnoticed.
    """
    if max_trained_tokens is None:
        return (trained.nonzero().squeeze(-1) if _checks.runs_eagerly(trained) else None), None
    _checks.integer(max_trained_tokens=max_trained_tokens)
    _checks.non_negative(max_trained_tokens=max_trained_tokens)
    if _checks.value_checks_allowed(trained) and trained.sum() > max_trained_tokens:
        raise ValueError(
            f"max_trained_tokens must hold the {int(trained.sum())} trained tokens, got {max_trained_tokens}"
        )
    if kernels and not torch.compiler.is_compiling():
        from kdloss._triton import _compaction

        rows = _compaction.order(trained, max_trained_tokens)
    else:
        # a stable sort brings the trained rows to the front, in order, at a static shape
        rows = torch.argsort((~trained).to(torch.uint8), stable=True)[:max_trained_tokens]
    return rows, trained & (trained.sum() > max_trained_tokens)


def keeps_logits(elements: int, *inputs: Tensor | None) -> bool:
    """Whether that many logits are kept for the backward: an input needs a gradient, and they fit the budget."""
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    on_cpu = any(x is not None and x.device.type == "cpu" for x in inputs)
    budget = KEPT_BYTES if on_cpu else DEVICE_KEPT_BYTES
    return needed and elements * _checks.promoted_dtype(*inputs).itemsize <= budget
