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

from . import _checks
from ._compiled_logprobs import compiled_logprobs
from ._distributed import VocabShard, vocab_shard
from ._impl import takes_triton
from ._logits_operator import logprobs
from ._sharded_logprobs import sharded_logprobs

IGNORE_INDEX = -100


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
    logits, shard = vocab_shard("logits", logits, -1, shard)
    vocab_size = _check_logits(logits, labels, vocab_size, shard)
    shape = logits.shape[:-1]
    temperature, row_temperature = row_temperatures(temperature, "logits", logits)
    kernels = takes_triton(impl, logits=logits)
    if kernels and shard is None:
        options = (row_temperature, temperature, softcap, vocab_size, with_entropy)
        logp, entropy, *_ = logprobs(logits, as_columns(labels, shape), *options, triton=True)
        return logp.reshape(labels.shape), entropy.reshape(shape if with_entropy else 0)
    columns, outside = label_columns(labels, shape, vocab_size)
    if shard is None:
        run = compiled_logprobs if torch.compiler.is_compiling() else logprobs
        logp, entropy, *_ = run(logits, columns, row_temperature, temperature, softcap, vocab_size, with_entropy)
    else:
        local_size = shard.local_size(vocab_size)
        logp, entropy = sharded_logprobs(
            logits, columns, row_temperature, temperature, softcap, local_size, with_entropy, shard, kernels=kernels
        )
    return logp.masked_fill(outside, torch.nan).reshape(labels.shape), entropy.reshape(shape if with_entropy else 0)


def as_columns(labels: Tensor, rows: torch.Size) -> Tensor:
    """(T, K), whatever the labels hold."""
    return labels.reshape(rows.numel(), labels.shape[-1] if labels.ndim > len(rows) else 1)


def label_columns(labels: Tensor, rows: torch.Size, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels as (T, K) columns inside the vocabulary or -100, and where they were neither: there logp is NaN."""
    columns = as_columns(labels, rows)
    outside = (columns != IGNORE_INDEX) & ((columns < 0) | (columns >= vocab_size))
    return columns.masked_fill(outside, 0), outside


def check_labels(labels: Tensor, rows: torch.Size, vocab_size: int, *, loss_mask: Tensor | None = None) -> None:
    """Labels are int64, (*rows,) or (*rows, K), and -100 or inside the vocabulary wherever they are trained on."""
    _checks.integral(labels=labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, got {labels.dtype}")
    if labels.shape != rows and (labels.ndim != len(rows) + 1 or labels.shape[:-1] != rows):
        raise ValueError(f"labels must be {tuple(rows)} or {(*rows, 'K')}, got {tuple(labels.shape)}")
    if _checks.value_checks_allowed(labels):
        bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))
        if loss_mask is not None:
            bad &= loss_mask.reshape(loss_mask.shape + (1,) * (labels.ndim - loss_mask.ndim))
        if bad.any():
            raise ValueError(
                f"labels must be {IGNORE_INDEX} (ignored) or in 0 .. {vocab_size - 1}, got {int(labels[bad][0])}"
            )


def check_vocab_size(vocab_size: int | None, rows: int) -> int:
    """The true vocabulary: `vocab_size`, or all `rows` of the head."""
    if vocab_size is None:
        return rows
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= rows:
        raise ValueError(f"vocab_size must be in 1 .. {rows}, the size of the vocabulary axis, got {vocab_size}")
    return vocab_size


def _check_logits(logits: Tensor, labels: Tensor, vocab_size: int | None, shard: VocabShard | None) -> int:
    _checks.tensors(logits=logits)
    _checks.floating(logits=logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    vocab_size = check_vocab_size(vocab_size, logits.shape[-1] if shard is None else shard.vocab_size)
    check_labels(labels, logits.shape[:-1], vocab_size)
    _checks.same_device("logits", logits, labels=labels)
    return vocab_size


def row_temperatures(temperature: float | Tensor, name: str, reference: Tensor) -> tuple[float, Tensor | None]:
    """A number for all rows of `reference`, or (1.0, one value a row (T,)), detached."""
    found = _checks.row_temperature(name, reference, temperature)
    return (1.0, found.detach().flatten()) if isinstance(found, Tensor) else (float(found), None)
