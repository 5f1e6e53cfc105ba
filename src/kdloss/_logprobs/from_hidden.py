"""Log-probs and entropies from hidden states and the output head, for the trained tokens only.

    logits = softcap(logit_scale * (hidden @ weight.T + bias)),   then as from logits

Only the rows with a label that is trained on meet the head, so time and memory go with their number. Which rows take
part follows from the mask alone: the same mask gives the same bits. The backward leaves out those whose incoming
gradient is 0 as well.

Finding the rows takes one wait for the device forward and one backward. `max_trained_tokens` is a static bound that
removes both (CUDA graphs), and computes that many rows either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.head import Head, Heads, prepare_head
from kdloss._softmax.vocabulary import IGNORE_INDEX, check_labels, label_columns

from .from_logits import LogprobsAndEntropy
from .hidden_op import DEVICE_KEPT_BYTES, KEPT_BYTES, linear_logprobs
from .sharded import sharded_linear_logprobs


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
    impl: str = "auto",
) -> Tensor:  # (T,) or (T, K)
    """`token_logprobs` of logits = logit_scale * (hidden @ weight.T + bias), for the trained tokens only.

    Args:
        hidden: (T, D) at prediction positions, any leading shape in place of T. Differentiable.
        weight: (V, D) the output head, of any floating dtype. Differentiable.
        labels: (T,) int64, or (T, K); -100 is ignored.
        loss_mask: (T,) bool. None: every row with a label.
        bias: (V,). Differentiable.
        temperature: > 0, a number or (T,); applied after bias, logit_scale and softcap, in that order.
        softcap: c > 0 of c * tanh(logits / c). None: none.
        logit_scale: finite factor of the logits.
        vocab_size: the true V, where the last rows of `weight` are padding.
        shard: which slice of the vocabulary `weight` and `bias` are, where ranks hold one each (`VocabShard`). Hidden
            states, labels, mask and the incoming gradient are the same on every rank; the gradient of `hidden` is
            summed over them. A DTensor head beside DTensor hidden states needs none.
        max_trained_tokens: a static bound on the trained tokens: no device sync. More trained tokens than this raise
            on the CPU and give NaN elsewhere.
        impl: "auto" | "torch" | "triton": the kernels where hidden is on a GPU; never; or else an error.

    Returns:
        The shape of `labels`, nats, float32 for half-precision inputs. 0 without gradient at untrained tokens,
        whatever their hidden states hold.

    Expected gradient:
        That of log q(label). Gradients have the dtypes of their inputs.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run, or (on the CPU) a label is outside the vocabulary or `max_trained_tokens` is exceeded.
    """
    head = Head(hidden, weight, bias, softcap, logit_scale)
    heads = prepare_head(
        head, loss_mask=loss_mask, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl
    )
    return evaluate(heads, labels, loss_mask=loss_mask, max_trained_tokens=max_trained_tokens)[0]


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
    impl: str = "auto",
) -> LogprobsAndEntropy:
    """`linear_token_logprobs`, and the entropy of every trained row's distribution.

    Args, errors and the gradient as in `linear_token_logprobs`.

    Returns:
        `LogprobsAndEntropy(logp, entropy)`; `entropy` is (T,), nats, differentiable, 0 at untrained tokens.
    """
    head = Head(hidden, weight, bias, softcap, logit_scale)
    heads = prepare_head(
        head, loss_mask=loss_mask, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl
    )
    return LogprobsAndEntropy(
        *evaluate(heads, labels, loss_mask=loss_mask, max_trained_tokens=max_trained_tokens, with_entropy=True)
    )


def evaluate(
    heads: Heads,
    labels: Tensor,
    *,
    loss_mask: Tensor | None,
    max_trained_tokens: int | None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), the latter empty unless it is asked for."""
    head, _, softmax, shape = heads
    check_head_labels(heads, labels, loss_mask)
    columns, outside = label_columns(labels, shape, softmax.vocab_size)
    if loss_mask is not None:
        untrained = ~loss_mask.reshape(-1, 1)
        columns, outside = columns.masked_fill(untrained, IGNORE_INDEX), outside & ~untrained
    rows, left_out = select_rows((columns != IGNORE_INDEX).any(-1), max_trained_tokens, kernels=softmax.kernels)
    store = rows is not None and _keeps_logits(rows.shape[0] * softmax.local_size, *head[:3])
    compact = max_trained_tokens is None
    if softmax.shard is None:
        logp, entropy, *_ = linear_logprobs(
            *head[:3],
            columns,
            rows,
            softmax.flat_temperature,
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
    """Labels fit the rows of the hidden states and the vocabulary of the head."""
    _checks.tensors(labels=labels)
    _checks.same_device("hidden", heads.student.hidden, labels=labels)
    check_labels(labels, heads.shape, heads.softmax.vocab_size, loss_mask=loss_mask)


def select_rows(
    trained: Tensor, max_trained_tokens: int | None, *, kernels: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """(rows to compute (N,), the trained ones among them; trained rows that they have no room for (T,)).

    Rows of None: whoever computes them finds them, as their number may not be known here (`torch.compile`). Nothing is
    left out without a bound; with one that is too small every trained row is, so that none is right by luck.
    """
    if max_trained_tokens is None:
        return (None if torch.compiler.is_compiling() else trained.nonzero().squeeze(-1)), None
    if isinstance(max_trained_tokens, bool) or not isinstance(max_trained_tokens, int):
        raise TypeError(f"max_trained_tokens must be an int, got {type(max_trained_tokens).__name__}")
    if max_trained_tokens < 0:
        raise ValueError(f"max_trained_tokens must be >= 0, got {max_trained_tokens}")
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


def _keeps_logits(elements: int, *inputs: Tensor | None) -> bool:
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    on_cpu = any(x is not None and x.device.type == "cpu" for x in inputs)
    budget = KEPT_BYTES if on_cpu else DEVICE_KEPT_BYTES
    return needed and elements * _checks.promoted_dtype(*inputs).itemsize <= budget
