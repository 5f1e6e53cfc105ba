"""Oracles for log-probs and entropies, from logits and from hidden states, row by row.

One row: `x = (W h + b) s`, s = logit_scale; `z = cap(x) / τ`, `cap(x) = c tanh(x / c)`, c = softcap;
`logp = z - logsumexp(z)`. Only the first `vocab_size` entries count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .pairs import pair
from .types import (
    ArrayLike,
    BoolArray,
    FloatArray,
    Index,
    IntArray,
    LinearGradients,
    LogprobsAndEntropy,
    as_float,
    as_int,
    as_mask,
    trained,
)

IGNORE_INDEX = -100


def _log_softmax(logits: FloatArray, temperature: float, softcap: float | None) -> FloatArray:
    """`log softmax(cap(x) / τ)` of one row, (V,)."""
    capped = logits if softcap is None else softcap * np.tanh(logits / softcap)
    z = capped / temperature
    shifted = z - z.max()
    logp: FloatArray = shifted - math.log(np.exp(shifted).sum())
    return logp


def _entropy(logp: FloatArray) -> float:
    """`-sum p log p` of one row; an entry of probability 0 adds 0, a NaN row stays NaN."""
    present = logp[logp != -np.inf]
    return -float((np.exp(present) * present).sum())


def _row_gradient(
    logits: FloatArray,
    temperature: float,
    softcap: float | None,
    targets: list[int],
    upstream_logp: list[float],
    upstream_entropy: float,
) -> FloatArray:
    """The gradient of one row's logits x, (V,), through cap, τ and log-softmax.

    `d logp_k / dz_j = 1[j = k] - p_j`, `dH / dz_j = -p_j (log p_j + H)`, `dz_j / dx_j = (1 - tanh²(x_j / c)) / τ`.
    """
    logp = _log_softmax(logits, temperature, softcap)
    p = np.exp(logp)
    dz = np.zeros(logits.shape)
    for k, u in zip(targets, upstream_logp, strict=True):
        dz -= u * p
        dz[k] += u
    if upstream_entropy != 0:
        present = p > 0
        dz[present] -= upstream_entropy * p[present] * (logp[present] + _entropy(logp))
    slope = 1.0 if softcap is None else 1.0 - np.tanh(logits / softcap) ** 2
    return dz * slope / temperature


def _per_row(name: str, x: ArrayLike, lead: tuple[int, ...]) -> FloatArray:
    """A float or one value per row, as one value per row."""
    array = as_float(name, x)
    return np.broadcast_to(array, lead) if array.ndim == 0 else as_float(name, array, shape=lead)


def _upstream(name: str, x: ArrayLike | None, shape: tuple[int, ...]) -> FloatArray:
    """The upstream gradient of a result, zeros if it is None."""
    return np.zeros(shape) if x is None else as_float(name, x, shape=shape)


def _label_rows(labels: ArrayLike, lead: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """The labels in their own shape, (...,) or (..., K), and as (..., K)."""
    labels = as_int("labels", labels)
    if labels.shape == lead:
        return labels, labels[..., None]
    if labels.ndim == len(lead) + 1 and labels.shape[:-1] == lead:
        return labels, labels
    raise ValueError(f"labels must have shape {lead} or {(*lead, 'K')}, got {labels.shape}")


def _scored(rows: IntArray, mask: BoolArray, vocab: int) -> Iterator[tuple[Index, list[int], list[int]]]:
    """(row, places k of its valid labels, these labels) for every unmasked row with a valid label."""
    for row in trained(mask):
        places = [k for k, label in enumerate(rows[row]) if label != IGNORE_INDEX]
        targets = [int(rows[row][k]) for k in places]
        if any(not 0 <= target < vocab for target in targets):
            raise ValueError(f"labels must be in [0, {vocab}) or {IGNORE_INDEX}, got {targets}")
        if places:
            yield row, places, targets


def token_logprobs_and_entropy_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    upstream_logp: ArrayLike | None = None,
    upstream_entropy: ArrayLike | None = None,
) -> tuple[LogprobsAndEntropy, FloatArray]:
    """`logp = z_label - logsumexp(z)`, `H = -sum_j p_j log p_j`, `z = cap(logits) / τ`; 0 at ignored labels.

    logits: (..., V) float. labels: (...,) or (..., K) int, -100 ignored. temperature: float or (...,).
    Returns logp of labels' shape and entropy (...,), 0 where a row has no valid label.
    Source: softmax; softcap: Gemma 2, arXiv 2408.00118, section 2.

    Gradient: `dlogits_j = (sum_k u_k (1[j = k] - p_j) - v p_j (log p_j + H)) (1 - tanh²(x_j / c)) / τ`; 0 at ignored
    rows.

    logits: (..., V). labels, upstream_logp (u): (...,) or (..., K). upstream_entropy (v): (...,). temperature: float
    or (...,). Returns (..., V), 0 from vocab_size on. Source: derived from `token_logprobs_and_entropy`.
    """
    x = as_float("logits", logits)
    lead, vocab = x.shape[:-1], x.shape[-1] if vocab_size is None else vocab_size
    labels, rows = _label_rows(labels, lead)
    tau = _per_row("temperature", temperature, lead)
    u = _upstream("upstream_logp", upstream_logp, labels.shape).reshape(rows.shape)
    v = _upstream("upstream_entropy", upstream_entropy, lead)
    wants_gradient = upstream_logp is not None or upstream_entropy is not None
    logp, entropy, grad = np.zeros(rows.shape), np.zeros(lead), np.zeros(x.shape)
    for row, places, targets in _scored(rows, np.ones(lead, dtype=np.bool_), vocab):
        x_row, t = x[row][:vocab], float(tau[row])
        row_logp = _log_softmax(x_row, t, softcap)
        logp[row][places] = row_logp[targets]
        entropy[row] = _entropy(row_logp)
        if wants_gradient:
            grad[row][:vocab] = _row_gradient(x_row, t, softcap, targets, u[row][places].tolist(), float(v[row]))
    return LogprobsAndEntropy(logp.reshape(labels.shape), entropy), grad


token_logprobs_and_entropy, token_logprobs_and_entropy_grad = pair(token_logprobs_and_entropy_and_grad)


def token_logprobs_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`logp = z_label - logsumexp(z)`, `z = cap(logits) / τ`; 0 at ignored labels.

    logits: (..., V) float. labels: (...,) or (..., K) int. temperature: float or (...,). Returns labels' shape, nats.
    Source: softmax; softcap: Gemma 2, arXiv 2408.00118, section 2.

    Gradient: `dlogits_j = sum_k u_k (1[j = k] - p_j) (1 - tanh²(x_j / c)) / τ`; 0 at ignored rows.

    logits: (..., V). labels, upstream (u): (...,) or (..., K). temperature: float or (...,). Returns (..., V).
    Source: derived from `token_logprobs`.
    """
    (logp, _), grad = token_logprobs_and_entropy_and_grad(
        logits, labels, temperature=temperature, softcap=softcap, vocab_size=vocab_size, upstream_logp=upstream
    )
    return logp, grad


token_logprobs, token_logprobs_grad = pair(token_logprobs_and_grad)


def _linear_inputs(
    hidden: ArrayLike, weight: ArrayLike, bias: ArrayLike | None, vocab_size: int | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """hidden (T, D), and the first vocab_size rows of weight (V, D) and of bias (V,), zeros if it is None."""
    w = as_float("weight", weight)
    h = as_float("hidden", hidden, shape=(np.shape(hidden)[0], w.shape[1]))
    b = np.zeros(w.shape[0]) if bias is None else as_float("bias", bias, shape=w.shape[:1])
    return h, w[:vocab_size], b[:vocab_size]


def _linear_mask(loss_mask: ArrayLike | None, rows: IntArray, max_trained_tokens: int | None) -> BoolArray:
    """The rows to score, (T,); a ValueError if more than `max_trained_tokens` of them have a label."""
    mask = (
        np.ones(len(rows), dtype=np.bool_) if loss_mask is None else as_mask("loss_mask", loss_mask, shape=(len(rows),))
    )
    count = int((mask & (rows != IGNORE_INDEX).any(axis=-1)).sum())
    if max_trained_tokens is not None and count > max_trained_tokens:
        raise ValueError(f"max_trained_tokens must bound the trained tokens, {count}, got {max_trained_tokens}")
    return mask


def linear_token_logprobs_and_entropy_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    *,
    loss_mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    max_trained_tokens: int | None = None,
    upstream_logp: ArrayLike | None = None,
    upstream_entropy: ArrayLike | None = None,
) -> tuple[LogprobsAndEntropy, LinearGradients]:
    """`z = cap((W h + b) s) / τ`, `logp = z_label - logsumexp(z)`, `H = -sum_j p_j log p_j`; 0 where not trained.

    hidden: (T, D). weight: (V, D). labels: (T,) or (T, K) int. loss_mask: (T,) bool. bias: (V,). temperature: float
    or (T,). Returns logp of labels' shape and entropy (T,); max_trained_tokens changes neither.
    Source: softmax; computed without (T, V) logits by Cut Cross-Entropy, arXiv 2411.09009.

    Gradient: `dh = s Wᵀ g`, `dW = sum s g hᵀ`, `db = sum s g`, g the gradient of a row's logits (W h + b) s.

    hidden: (T, D). weight: (V, D). labels, upstream_logp: (T,) or (T, K). loss_mask: (T,) bool. bias: (V,).
    temperature: float or (T,). upstream_entropy: (T,). Returns hidden (T, D), weight (V, D), bias (V,) or None;
    0 from vocab_size on. Source: derived from `linear_token_logprobs_and_entropy`.
    """
    h, w, b = _linear_inputs(hidden, weight, bias, vocab_size)
    labels, rows = _label_rows(labels, h.shape[:1])
    tau = _per_row("temperature", temperature, h.shape[:1])
    mask = _linear_mask(loss_mask, rows, max_trained_tokens)
    u = _upstream("upstream_logp", upstream_logp, labels.shape).reshape(rows.shape)
    v = _upstream("upstream_entropy", upstream_entropy, h.shape[:1])
    wants_gradient = upstream_logp is not None or upstream_entropy is not None
    logp, entropy = np.zeros(rows.shape), np.zeros(len(h))
    d_hidden, d_weight = np.zeros(h.shape), np.zeros(np.shape(weight))
    d_bias = np.zeros(len(d_weight))
    for row, places, targets in _scored(rows, mask, len(w)):
        x, t = (w @ h[row] + b) * logit_scale, float(tau[row])
        row_logp = _log_softmax(x, t, softcap)
        logp[row][places] = row_logp[targets]
        entropy[row] = _entropy(row_logp)
        if not wants_gradient:
            continue
        g = logit_scale * _row_gradient(x, t, softcap, targets, u[row][places].tolist(), float(v[row]))
        d_hidden[row] = g @ w
        d_weight[: len(w)] += np.outer(g, h[row])
        d_bias[: len(w)] += g
    gradients = LinearGradients(d_hidden, d_weight, None if bias is None else d_bias)
    return LogprobsAndEntropy(logp.reshape(labels.shape), entropy), gradients


linear_token_logprobs_and_entropy, linear_token_logprobs_and_entropy_grad = pair(
    linear_token_logprobs_and_entropy_and_grad
)


def linear_token_logprobs_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    *,
    loss_mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    max_trained_tokens: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, LinearGradients]:
    """`z = cap((W h + b) s) / τ`, `logp = z_label - logsumexp(z)`; 0 where not trained.

    hidden: (T, D). weight: (V, D). labels: (T,) or (T, K) int. loss_mask: (T,) bool. bias: (V,). temperature: float
    or (T,). Returns labels' shape, nats. Source: softmax; Cut Cross-Entropy, arXiv 2411.09009.

    Gradient: `dh = s Wᵀ g`, `dW = sum s g hᵀ`, `db = sum s g`, g the gradient of a row's logits (W h + b) s.

    hidden: (T, D). weight: (V, D). labels, upstream: (T,) or (T, K). loss_mask: (T,) bool. bias: (V,). temperature:
    float or (T,). Returns hidden (T, D), weight (V, D), bias (V,) or None.
    Source: derived from `linear_token_logprobs`.
    """
    (logp, _), gradients = linear_token_logprobs_and_entropy_and_grad(
        hidden,
        weight,
        labels,
        loss_mask=loss_mask,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        vocab_size=vocab_size,
        max_trained_tokens=max_trained_tokens,
        upstream_logp=upstream,
    )
    return logp, gradients


linear_token_logprobs, linear_token_logprobs_grad = pair(linear_token_logprobs_and_grad)
