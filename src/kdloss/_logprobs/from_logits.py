"""Log-probs of labels, and entropies, from logits.

    z = softcap(logits) / temperature,   softcap(x) = c * tanh(x / c)
    logp = z_label - logsumexp(z),       entropy = -sum_v p_v log p_v,   p = softmax(z)

Everything is in float32, or float64 for float64 logits. Half-precision logits are widened before the subtraction: a
log-prob rounded to bf16 is off by up to 3e-2 nats, which an importance ratio turns into 3 %.

A label outside the vocabulary raises on the CPU; on other devices, and under `torch.compile`, its log-prob is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._softmax.vocabulary import as_columns, check_labels, label_columns, prepare_logits

from .compiled import compiled_logprobs
from .logits_op import logprobs
from .sharded import sharded_logprobs


class LogprobsAndEntropy(NamedTuple):
    """Log-probs of the labels and the entropy of the distribution they are read from, in nats. Both differentiable."""

    logp: Tensor  # (...,) or (..., K), the shape of the labels
    entropy: Tensor  # (...,)


def token_logprobs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...,) or (..., K)
    *,
    temperature: float | Tensor = 1.0,  # or (...,)
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> Tensor:  # (...,) or (..., K)
    """Log-prob of each label under its row of logits: log softmax(z)[label], z = softcap(logits) / temperature.

    Args:
        logits: (..., V) of any floating dtype and strides. Differentiable.
        labels: (...,) int64, or (..., K) for K labels a row; -100 is ignored.
        temperature: > 0, a number or one value a row; applied after the softcap. It carries no gradient.
        softcap: c > 0 of c * tanh(logits / c). None: none.
        vocab_size: the true V, where the last columns are padding: they get no mass and no gradient.
        shard: which slice of the vocabulary these logits are, where ranks hold one each (`VocabShard`); labels are
            those of the whole vocabulary. Logits that are a DTensor placed `Shard(-1)` need none.
        impl: "auto" | "torch" | "triton": the kernels where logits are on a GPU; never; or else an error.

    Returns:
        The shape of `labels`, nats, float32 for half-precision logits. 0 without gradient where the label is ignored,
        whatever that row of logits holds; -inf where the label's logit is -inf.

    Expected gradient:
        That of log q(label): (onehot - softmax(z)) / temperature for the capped logits. Not a loss by itself.

    Raises:
        TypeError: `logits` is not floating-point, or `labels` not int64.
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run, or (on the CPU) a label is outside the vocabulary.
    """
    logp, _ = _evaluate(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        shard=shard,
        impl=impl,
        with_entropy=False,
    )
    return logp


def token_logprobs_and_entropy(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...,) or (..., K)
    *,
    temperature: float | Tensor = 1.0,  # or (...,)
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: str = "auto",
) -> LogprobsAndEntropy:
    """`token_logprobs`, and the entropy -sum_v p_v log p_v of every row, p = softmax(softcap(logits) / temperature).

    Args, errors and what carries gradient as in `token_logprobs`.

    Returns:
        `LogprobsAndEntropy(logp, entropy)`: `entropy` is (...,), nats, differentiable, and 0 without gradient on rows
        that have no label but -100. Logits of -inf have no mass and take no part.

    Expected gradient:
        Those of log q(label) and of the entropy, exactly: the entropy is not an estimate.
    """
    logp, entropy = _evaluate(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        shard=shard,
        impl=impl,
        with_entropy=True,
    )
    return LogprobsAndEntropy(logp, entropy)


def _evaluate(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
    shard: VocabShard | None,
    impl: str,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy), the latter empty unless it is asked for."""
    _checks.positive(softcap=softcap)
    logits, _, softmax = prepare_logits(logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl)
    shape = logits.shape[:-1]
    check_labels(labels, shape, softmax.vocab_size)
    _checks.same_device("logits", logits, labels=labels)
    if softmax.kernels and softmax.shard is None:
        # the kernels give NaN for labels outside the vocabulary
        columns, outside = as_columns(labels, shape), None
    else:
        columns, outside = label_columns(labels, shape, softmax.vocab_size)
    options = (softmax.flat_temperature, softmax.temperature, softcap, softmax.local_size, with_entropy)
    if softmax.shard is not None:
        logp, entropy = sharded_logprobs(logits, columns, softcap, softmax, with_entropy=with_entropy)
    elif softmax.kernels or not torch.compiler.is_compiling():
        logp, entropy, *_ = logprobs(logits, columns, *options, triton=softmax.kernels)
    else:
        logp, entropy = compiled_logprobs(logits, columns, *options)
    if outside is not None:
        logp = logp.masked_fill(outside, torch.nan)
    return logp.reshape(labels.shape), entropy.reshape(shape if with_entropy else 0)
