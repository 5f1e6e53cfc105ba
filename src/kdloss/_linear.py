"""Log-probs and entropies from hidden states and the output head, for the trained tokens only.

    logits = softcap(logit_scale * (hidden @ weight.T + bias)),   then as from logits

Hidden rows are compacted to the trained ones first, and results are scattered back, so time and memory go with the
number of trained tokens. Which rows take part follows from the mask alone: the same mask gives the same bits.

Compaction has a data-dependent shape, so it waits for the device once. `max_trained_tokens` is a static bound that
removes the wait (CUDA graphs). Under `torch.compile` without it, all rows are computed, the untrained ones masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._logprobs import (
    IGNORE_INDEX,
    LogprobsAndEntropy,
    check_labels,
    check_options,
    check_vocab_size,
    token_logprobs_and_entropy,
)


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
    shard: object = None,
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
        shard: a vocabulary-sharded head. Not supported yet.
        max_trained_tokens: a static bound on the trained tokens: no device sync. More trained tokens than this raise
            on the CPU and give NaN elsewhere.
        impl: "auto" | "torch" | "triton". The last is not supported yet.

    Returns:
        The shape of `labels`, nats, float32 for half-precision inputs. 0 without gradient at untrained tokens,
        whatever their hidden states hold.

    Expected gradient:
        That of log q(label). Gradients have the dtypes of their inputs.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, an option is out of range, or (on the CPU) a label is outside the
            vocabulary or `max_trained_tokens` is exceeded.
        NotImplementedError: `shard` is given, or `impl` is "triton".
    """
    return linear_token_logprobs_and_entropy(
        hidden,
        weight,
        labels,
        loss_mask=loss_mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        shard=shard,
        max_trained_tokens=max_trained_tokens,
        impl=impl,
    ).logp


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
    shard: object = None,
    max_trained_tokens: int | None = None,
    impl: str = "auto",
) -> LogprobsAndEntropy:
    """`linear_token_logprobs`, and the entropy of every trained row's distribution.

    Args, errors and the gradient as in `linear_token_logprobs`.

    Returns:
        `LogprobsAndEntropy(logp, entropy)`; `entropy` is (T,), nats, differentiable, 0 at untrained tokens.
    """
    check_options(shard=shard, impl=impl, softcap=softcap)
    _checks.tensors(hidden=hidden, weight=weight)
    shape = hidden.shape[:-1]
    _checks.boolean(loss_mask=loss_mask)
    if loss_mask is not None and loss_mask.shape != shape:
        raise ValueError(f"loss_mask must match the rows of hidden {tuple(shape)}, got {tuple(loss_mask.shape)}")
    vocab_size = _check_head(hidden, weight, labels, loss_mask, bias, logit_scale, vocab_size)
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        if temperature.shape != shape:
            raise ValueError(f"temperature must be a number, 0-dim or {tuple(shape)}, got {tuple(temperature.shape)}")
        temperature = temperature.flatten()

    hidden = hidden.flatten(0, -2) if hidden.ndim != 2 else hidden
    total = hidden.shape[0]
    columns = labels.reshape(total, labels.shape[-1] if labels.ndim > len(shape) else 1)  # (T, K)
    labelled = (columns != IGNORE_INDEX).any(-1)
    trained = labelled if loss_mask is None else labelled & loss_mask.flatten()

    rows = _select_rows(trained, max_trained_tokens)
    dtype = _checks.promoted_dtype(hidden, weight, bias)
    # zeroed as well as ignored: 0 * NaN of an untrained row would reach the gradient of the weight
    used_hidden = torch.where(rows.valid[:, None], hidden.index_select(0, rows.source).to(dtype), 0)
    used_columns = torch.where(rows.valid[:, None], columns.index_select(0, rows.source), IGNORE_INDEX)
    used_bias = None if bias is None else bias[:vocab_size].to(dtype)
    logits = torch.nn.functional.linear(used_hidden, weight[:vocab_size].to(dtype), used_bias) * logit_scale
    used = token_logprobs_and_entropy(
        logits,
        used_columns,
        temperature=temperature.index_select(0, rows.source)
        if isinstance(temperature, Tensor) and temperature.ndim
        else temperature,
        softcap=softcap,
    )
    logp = rows.scatter(used.logp, trained).reshape(labels.shape)
    return LogprobsAndEntropy(logp, rows.scatter(used.entropy, trained).reshape(shape))


class _Rows(NamedTuple):
    source: Tensor  # (N,) int64: distinct rows of hidden, the trained ones among them
    valid: Tensor  # (N,) bool: which of them are trained
    fits: Tensor | None  # () bool: all trained rows are among them; None: they are

    def scatter(self, x: Tensor, trained: Tensor) -> Tensor:
        """(N, ...) -> (T, ...): back to their places, 0 elsewhere, NaN where trained rows were left out."""
        out = x.new_zeros(trained.shape[0], *x.shape[1:]).index_copy(0, self.source, x)
        if self.fits is None:
            return out
        left_out = trained & ~self.fits
        return out.masked_fill(left_out.reshape(-1, *[1] * (x.ndim - 1)), torch.nan)


def _select_rows(trained: Tensor, max_trained_tokens: int | None) -> _Rows:
    total = trained.shape[0]
    if max_trained_tokens is None:
        if torch.compiler.is_compiling():
            return _Rows(torch.arange(total, device=trained.device), trained, None)
        index = trained.nonzero().squeeze(-1)
        return _Rows(index, torch.ones_like(index, dtype=torch.bool), None)
    if isinstance(max_trained_tokens, bool) or not isinstance(max_trained_tokens, int):
        raise TypeError(f"max_trained_tokens must be an int, got {type(max_trained_tokens).__name__}")
    if max_trained_tokens < 0:
        raise ValueError(f"max_trained_tokens must be >= 0, got {max_trained_tokens}")
    if _checks.value_checks_allowed(trained) and trained.sum() > max_trained_tokens:
        raise ValueError(
            f"max_trained_tokens must hold the {int(trained.sum())} trained tokens, got {max_trained_tokens}"
        )
    # a stable sort brings the trained rows to the front, in order, at a static shape
    index = torch.argsort((~trained).to(torch.uint8), stable=True)[:max_trained_tokens]
    return _Rows(index, trained.index_select(0, index), trained.sum() <= max_trained_tokens)


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    vocab_size: int | None,
) -> int:
    _checks.floating(hidden=hidden, weight=weight, bias=bias)
    _checks.finite(logit_scale=logit_scale)
    if hidden.ndim < 2:
        raise ValueError(f"hidden must be (T, D), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(f"weight must be (V, D) with D = {hidden.shape[-1]} of hidden, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must match the rows of weight ({weight.shape[0]},), got {tuple(bias.shape)}")
    vocab_size = check_vocab_size(vocab_size, weight.shape[0])
    _checks.tensors(labels=labels)
    _checks.same_device("hidden", hidden, weight=weight, bias=bias, labels=labels, loss_mask=loss_mask)
    check_labels(labels, hidden.shape[:-1], vocab_size, loss_mask=loss_mask)
    return vocab_size
