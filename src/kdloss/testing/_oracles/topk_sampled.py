"""Oracles for the reverse KL that is exact on S and sampled elsewhere, row by row, token by token.

c_v = q_v h_v for v in S, and min(ρ, max_ratio) h_y / M for each of the M samples y outside S, h = log(q / p).
The value is the sum of all c, and its gradient is the sum of c d log q/dx, with c held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from .divergences import distribution
from .pairs import pair
from .types import ArrayLike, FloatArray, LinearGradients, as_float, as_int, as_mask, times

Row: TypeAlias = Callable[[int, FloatArray], tuple[float, FloatArray]]  # (row, logits (V,)) to value and gradient


def through_head(
    row_loss: Row,
    hidden: ArrayLike,
    weight: ArrayLike,
    loss_mask: ArrayLike,
    bias: ArrayLike | None,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int | None,
    upstream: ArrayLike | None,
) -> tuple[FloatArray, LinearGradients]:
    """Values (T,) of `row_loss` at the trained rows of `cap((W h + b) s)`, and the gradients of the head."""
    h, w = as_float("hidden", hidden), as_float("weight", weight)
    b = np.zeros(len(w)) if bias is None else as_float("bias", bias, shape=(len(w),))
    size = len(w) if vocab_size is None else vocab_size
    mask = as_mask("loss_mask", loss_mask, shape=h.shape[:1])
    u = np.zeros(len(h)) if upstream is None else as_float("upstream", upstream, shape=h.shape[:1])
    value, d_hidden, d_weight, d_bias = np.zeros(len(h)), np.zeros(h.shape), np.zeros(w.shape), np.zeros(len(w))
    for t in np.flatnonzero(mask):
        x = logit_scale * (w[:size] @ h[t] + b[:size])
        z = x if softcap is None else softcap * np.tanh(x / softcap)
        value[t], dz = row_loss(int(t), z)
        slope = 1.0 if softcap is None else 1.0 - np.tanh(x / softcap) ** 2
        g = float(u[t]) * logit_scale * dz * slope
        d_hidden[t] = g @ w[:size]
        d_weight[:size] += np.outer(g, h[t])
        d_bias[:size] += g
    return value, LinearGradients(d_hidden, d_weight, None if bias is None else d_bias)


def _row(
    x: FloatArray,
    tau: float,
    support: dict[int, float],
    drawn: list[tuple[int, float, float | None]],
    max_ratio: float | None,
) -> tuple[float, FloatArray]:
    """Value and gradient of one row: support is id to log p, drawn is (token, log p, log μ) of every sample."""
    if not drawn:
        return 0.0, np.zeros(x.shape)
    q = distribution(x, tau)
    costs = [(v, 0.0 if q[v] == 0 else float(q[v]) * (math.log(q[v]) - log_p)) for v, log_p in support.items()]
    for y, log_p, log_mu in drawn:
        if y not in support and q[y] > 0:
            ratio = 1.0 if log_mu is None else math.exp(math.log(q[y]) - log_mu)
            ratio = ratio if max_ratio is None else min(ratio, max_ratio)
            costs.append((y, times(ratio, math.log(q[y]) - log_p) / len(drawn)))
    gradient: FloatArray = sum((c * (np.eye(len(x))[v] - q) / tau for v, c in costs), np.zeros(x.shape))
    return math.fsum(c for _, c in costs), gradient


def _row_loss(
    lead: tuple[int, ...],
    labels: ArrayLike,
    teacher_logp: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    old_logp: ArrayLike | None,
    max_ratio: float | None,
    temperature: ArrayLike,
) -> Row:
    """The loss of row number n of the flattened leading axes."""
    rows = math.prod(lead)
    y = as_int("labels", labels).reshape(rows, -1)
    shape = np.shape(labels)
    log_p = as_float("teacher_logp", teacher_logp, shape=shape).reshape(y.shape)
    log_mu = None if old_logp is None else as_float("old_logp", old_logp, shape=shape).reshape(y.shape)
    ids = as_int("teacher_topk_ids", teacher_topk_ids)
    kept = as_float("teacher_topk_logp", teacher_topk_logp, shape=ids.shape).reshape(rows, -1)
    ids = ids.reshape(rows, -1)
    tau = np.broadcast_to(as_float("temperature", temperature), lead).reshape(rows)

    def loss(n: int, x: FloatArray) -> tuple[float, FloatArray]:
        support = {int(v): float(kept[n, k]) for k, v in enumerate(ids[n]) if v != -1}
        drawn = [
            (int(label), float(log_p[n, m]), None if log_mu is None else float(log_mu[n, m]))
            for m, label in enumerate(y[n])
            if label != -100
        ]
        return _row(x, float(tau[n]), support, drawn, max_ratio)

    return loss


def topk_sampled_reverse_kl_and_grad(
    logits: ArrayLike,
    labels: ArrayLike,
    teacher_logp: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    old_logp: ArrayLike | None = None,
    max_ratio: float | None = None,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`sum_S q h + mean over samples y of 1[y not in S] min(ρ, max_ratio) h_y`, `h = log(q/p)`, `ρ = q_y / μ_y`.

    logits: (..., V). labels, teacher_logp, old_logp: (...,) or (..., M). teacher_topk_logp, _ids: (..., K), id -1 is
    padding. Returns (...,), nats, 0 where every label is -100.

    Gradient: `u sum c d log q/dx`, with the terms c of the value held fixed. (..., V). upstream (u): (...,).
    """
    x = as_float("logits", logits)
    lead, size = x.shape[:-1], x.shape[-1] if vocab_size is None else vocab_size
    loss = _row_loss(lead, labels, teacher_logp, teacher_topk_logp, teacher_topk_ids, old_logp, max_ratio, temperature)
    u = np.zeros(lead) if upstream is None else as_float("upstream", upstream, shape=lead)
    value, grad = np.zeros(lead), np.zeros(x.shape)
    for n, row in enumerate(np.ndindex(lead)):
        value[row], slope = loss(n, x[row][:size])
        grad[row][:size] = float(u[row]) * slope
    return value, grad


topk_sampled_reverse_kl, topk_sampled_reverse_kl_grad = pair(topk_sampled_reverse_kl_and_grad)


def linear_topk_sampled_reverse_kl_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    teacher_logp: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    loss_mask: ArrayLike | None = None,
    old_logp: ArrayLike | None = None,
    max_ratio: float | None = None,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    max_trained_tokens: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, LinearGradients]:
    """`topk_sampled_reverse_kl` of `cap((W h + b) s)`; 0 where not trained.

    hidden: (T, D). weight: (V, D). labels, teacher_logp, old_logp: (T,) or (T, M). loss_mask: (T,) bool. bias: (V,).
    Returns (T,), nats; max_trained_tokens does not change it.

    Gradient: those of hidden (T, D), weight (V, D) and bias (V,) or None. upstream (u): (T,).
    """
    lead = np.shape(hidden)[:1]
    loss = _row_loss(lead, labels, teacher_logp, teacher_topk_logp, teacher_topk_ids, old_logp, max_ratio, temperature)
    mask = (as_int("labels", labels).reshape(*lead, -1) != -100).any(-1)
    mask = mask if loss_mask is None else mask & as_mask("loss_mask", loss_mask, shape=lead)
    return through_head(loss, hidden, weight, mask, bias, softcap, logit_scale, vocab_size, upstream)


linear_topk_sampled_reverse_kl, linear_topk_sampled_reverse_kl_grad = pair(linear_topk_sampled_reverse_kl_and_grad)
