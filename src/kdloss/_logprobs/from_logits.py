"""Log-probs of labels, and entropies, from logits.

    z = softcap(logits) / temperature,   softcap(x) = c * tanh(x / c)
    logp = z_label - logsumexp(z),       entropy = -sum_v p_v log p_v,   p = softmax(z)

Everything is in float32, or float64 for float64 logits. Half-precision logits are widened before the subtraction: a
log-prob rounded to bf16 is off by up to 3e-2 nats, which changes an importance ratio by 3 %.

A label outside the vocabulary raises on the CPU. On other devices, and under `torch.compile`, its log-prob is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._docs import documented
from kdloss._softmax.backend import Impl
from kdloss._softmax.vocabulary import (
    LOGITS_ARGS,
    Softmax,
    as_columns,
    check_labels,
    label_columns,
    labelled,
    prepare_logits,
)

from .compiled import compiled_logprobs
from .logits_op import logprobs
from .sharded import sharded_logprobs


class LogprobsAndEntropy(NamedTuple):
    """Log-probs of labels, and the entropy of the distributions that they are read from.

    Attributes:
        logp: (...,) or (..., K), the shape of the labels; nats. Differentiable.
        entropy: (...,) one value per row; nats. Differentiable.

    Example:
        >>> import torch, kdloss
        >>> logits, labels = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([1])
        >>> result: kdloss.LogprobsAndEntropy = kdloss.token_logprobs_and_entropy(logits, labels)
        >>> result.logp, result.entropy
        (tensor([-1.3863]), tensor([1.0397]))
    """

    logp: Tensor  # (...,) or (..., K), the shape of the labels
    entropy: Tensor  # (...,)


@documented(LOGITS_ARGS)
def token_logprobs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...,) or (..., K)
    *,
    temperature: float | Tensor = 1.0,  # or (...,)
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (...,) or (..., K)
    """Log-prob of each label under its row of logits: log softmax(z)[label], z = softcap(logits) / temperature.

    Args:
        {logits}
        {labels}
        {temperature}
        {softcap}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        The shape of `labels`, nats, float32 for half-precision logits. 0 without gradient where the label is ignored,
        even if that row of logits holds NaN; -inf where the label's logit is -inf.

    Expected gradient:
        That of log q(label): (onehot - softmax(z)) / temperature for the capped logits. Not a loss by itself.

    Raises:
        {TypeError}
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run, or (on the CPU) a label is outside the vocabulary.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
        >>> logp = kdloss.token_logprobs(logits, torch.tensor([0, 1]))
        >>> logp.exp()
        tensor([0.5000, 0.6000])
    """
    logits, _, softmax = prepare_logits(logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl)
    return logprobs_from_logits(logits, labels, softcap, softmax, with_entropy=False)[0]


@documented(LOGITS_ARGS)
def token_logprobs_and_entropy(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...,) or (..., K)
    *,
    temperature: float | Tensor = 1.0,  # or (...,)
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    impl: Impl = "auto",
) -> LogprobsAndEntropy:
    """Log-prob of each label and entropy of each row, from one read of the logits.

        logp = log softmax(z)[label],   z = softcap(logits) / temperature
        entropy = -sum_v p_v log p_v,   p = softmax(z)

    Args:
        {logits}
        {labels}
        {temperature}
        {softcap}
        {vocab_size}
        {shard}
        {impl}

    Returns:
        `LogprobsAndEntropy(logp, entropy)`, nats, float32 for half-precision logits. `logp` has the shape of `labels`,
        and is 0 without gradient where the label is ignored. `entropy` is (...,), and 0 without gradient in rows whose
        labels are all ignored. A logit of -inf has no mass and adds nothing to the entropy.

    Expected gradient:
        That of log q(label), (onehot - softmax(z)) / temperature for the capped logits, and that of the entropy. Both
        are exact: the entropy is no estimate.

    Raises:
        {TypeError}
        ValueError: shapes or devices disagree, an option is out of range, `impl` is "triton" where the kernels cannot
            run, or (on the CPU) a label is outside the vocabulary.

    Example:
        >>> import torch, kdloss
        >>> logits = torch.zeros(1, 4)  # uniform: the entropy is log 4, and so is -logp
        >>> out = kdloss.token_logprobs_and_entropy(logits, torch.tensor([2]))
        >>> out.logp, out.entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """
    logits, _, softmax = prepare_logits(logits, temperature=temperature, vocab_size=vocab_size, shard=shard, impl=impl)
    return LogprobsAndEntropy(*logprobs_from_logits(logits, labels, softcap, softmax, with_entropy=True))


def logprobs_from_logits(
    logits: Tensor, labels: Tensor, softcap: float | None, softmax: Softmax, *, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) in the shapes of the labels and of the rows; the entropy is empty if it is not asked for."""
    _checks.softcap(softcap=softcap)
    shape = logits.shape[:-1]
    check_labels(labels, shape, softmax.vocab_size)
    _checks.same_device("logits", logits, labels=labels)
    if softmax.row_temperature is not None:
        _checks.row_temperatures(softmax.row_temperature, labelled(labels, shape))
    labels = _checks.savable(labels)
    if softmax.kernels and softmax.shard is None:
        # the kernels give NaN for labels outside the vocabulary
        columns, outside = as_columns(labels, shape), None
    else:
        columns, outside = label_columns(labels, shape, softmax.vocab_size)
    options = (softmax.flat_temperature(), softmax.temperature, softcap, softmax.local_size, with_entropy)
    if softmax.shard is not None:
        logp, entropy = sharded_logprobs(logits, columns, softcap, softmax, with_entropy=with_entropy)
    elif softmax.kernels or not torch.compiler.is_compiling():
        logp, entropy, *_ = logprobs(logits, columns, *options, kernels=softmax.kernels)
    else:
        logp, entropy = compiled_logprobs(logits, columns, *options)
    if outside is not None:
        logp = logp.masked_fill(outside, torch.nan)
    return logp.reshape(labels.shape), entropy.reshape(shape if with_entropy else 0)
