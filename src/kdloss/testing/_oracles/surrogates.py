"""Oracles for the per-token policy-gradient losses and their gradients.

ρ = exp(logp - old_logp), A the advantage, w the weight (1 without `weights`), sg the stop-gradient. `old_logp=None` is
on-policy: ρ = exp(logp - sg(logp)), with value 1 and gradient 1. At untrained tokens loss and gradient are 0, ρ is 1.
Where A or w is exactly 0, the product is 0 even if ρ is inf. Every gradient here is per token: d loss_t / d logp_t;
d loss_t / d logp_u is 0 for u ≠ t. All arrays are (T,); all but the sequence form take any other shape, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .pairs import pair
from .types import ArrayLike, FloatArray, Index, Surrogate, as_float, as_mask, exp, segments, times, trained


class _Token(NamedTuple):
    """One trained token."""

    t: Index
    logp: float
    log_ratio: float
    ratio: float
    advantage: float
    weight: float


def _tokens(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    weights: ArrayLike | None,
) -> Iterator[_Token]:
    """The trained tokens, in order."""
    logp = as_float("logp", logp)
    old = logp if old_logp is None else as_float("old_logp", old_logp, shape=logp.shape)
    a = as_float("advantages", advantages, shape=logp.shape)
    w = np.ones(logp.shape) if weights is None else as_float("weights", weights, shape=logp.shape)
    for t in trained(as_mask("loss_mask", loss_mask, shape=logp.shape)):
        log_ratio = 0.0 if old_logp is None else float(logp[t]) - float(old[t])
        yield _Token(t, float(logp[t]), log_ratio, exp(log_ratio), float(a[t]), float(w[t]))


def _untrained(logp: ArrayLike) -> tuple[Surrogate, FloatArray]:
    """The results at untrained tokens: loss 0, ratio 1, nothing clipped; gradient 0."""
    shape = np.shape(logp)
    out = Surrogate(np.zeros(shape), np.ones(shape), np.zeros(shape, np.bool_), np.zeros(shape, np.bool_))
    return out, np.zeros(shape)


def _clamp(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def importance_sampled_surrogate_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    max_ratio: float | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Surrogate, FloatArray]:
    """`-ρ w A`; with max_ratio c, `-sg(min(ρ, c)) w A log q`, clipped where ρ > c.

    logp, old_logp, advantages, weights: (T,) float. loss_mask: (T,) bool. Returns Surrogate of (T,).
    Source: J_RKL of KDRL, arXiv 2506.02208; capped: truncated importance sampling, as in IMPALA, arXiv 1802.01561.

    Gradient: `-ρ w A` since dρ = ρ dlogp; with max_ratio c, `-min(ρ, c) w A`, the stopped factor of log q.

    logp, old_logp, advantages, weights: (T,). loss_mask: (T,) bool. Returns (T,).
    Source: derived from `importance_sampled_surrogate`.
    """
    out, grad = _untrained(logp)
    cap = math.inf if max_ratio is None else max_ratio
    for k in _tokens(logp, old_logp, advantages, loss_mask, weights):
        grad[k.t] = -times(min(k.ratio, cap), k.weight, k.advantage)
        out.loss[k.t] = grad[k.t] if max_ratio is None else -times(min(k.ratio, cap), k.weight, k.advantage, k.logp)
        out.ratio[k.t] = k.ratio
        out.clipped[k.t] = k.ratio > cap
    return out, grad


importance_sampled_surrogate, importance_sampled_surrogate_grad = pair(importance_sampled_surrogate_and_grad)


def clipped_surrogate_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Surrogate, FloatArray]:
    """`w max(-ρ A, -clip(ρ, 1 - clip_low, 1 + clip_high) A)`; where A < 0 and dual_clip c, `w min(that, -c A)`.

    clipped: (A > 0 and ρ > 1 + clip_high) or (A < 0 and ρ < 1 - clip_low). dual_clipped: A < 0 and ρ > c.
    logp, old_logp, advantages, weights: (T,) float. loss_mask: (T,) bool. Returns Surrogate of (T,).
    Source: PPO, arXiv 1707.06347, equation 7; dual clip: arXiv 1912.09729; two bounds: DAPO, arXiv 2503.14476.

    Gradient: `-ρ w A`, and 0 where clipped or dual-clipped: there the loss is a constant times w A.

    logp, old_logp, advantages, weights: (T,). loss_mask: (T,) bool. Returns (T,).
    Source: derived from `clipped_surrogate`.
    """
    out, grad = _untrained(logp)
    low, high = 1 - clip_low, 1 + clip_high
    for k in _tokens(logp, old_logp, advantages, loss_mask, weights):
        loss = max(-times(k.ratio, k.advantage), -times(_clamp(k.ratio, low, high), k.advantage))
        if dual_clip is not None and k.advantage < 0:
            loss = min(loss, -dual_clip * k.advantage)
            out.dual_clipped[k.t] = k.ratio > dual_clip
        out.loss[k.t] = times(k.weight, loss)
        out.ratio[k.t] = k.ratio
        out.clipped[k.t] = (k.advantage > 0 and k.ratio > high) or (k.advantage < 0 and k.ratio < low)
        ceiling = math.inf if dual_clip is None else dual_clip
        stopped = k.ratio > high if k.advantage > 0 else k.ratio < low or k.ratio > ceiling
        grad[k.t] = 0.0 if stopped else -times(k.ratio, k.weight, k.advantage)
    return out, grad


clipped_surrogate, clipped_surrogate_grad = pair(clipped_surrogate_and_grad)


def _sequence_ratios(
    logp: ArrayLike, old_logp: ArrayLike | None, advantages: ArrayLike, loss_mask: ArrayLike, cu_seqlens: ArrayLike
) -> FloatArray:
    """`s_b = exp(mean over the trained tokens of sequence b of logp - old_logp)` at each trained token, (T,)."""
    log_ratio = {k.t[0]: k.log_ratio for k in _tokens(logp, old_logp, advantages, loss_mask, None)}
    ratios = np.ones(np.shape(logp))
    for tokens in segments(cu_seqlens, ratios.size):
        counted = [t for t in tokens if t in log_ratio]
        for t in counted:
            ratios[t] = exp(sum(log_ratio[u] for u in counted) / len(counted))
    return ratios


def sequence_clipped_surrogate_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    cu_seqlens: ArrayLike,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: ArrayLike | None = None,
) -> tuple[Surrogate, FloatArray]:
    """`w max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)`, `r = sg(s) q / sg(q)`, `s = exp(mean log-ratio)`.

    The mean is over the trained tokens of the sequence; the value of r is s.
    clipped: (A > 0 and s > 1 + clip_high) or (A < 0 and s < 1 - clip_low).
    logp, old_logp, advantages, weights: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int.
    Returns Surrogate of (T,). Source: GSPO-token, arXiv 2507.18071.

    Gradient: `-s w A`, and 0 where clipped: s is stopped, so r depends on the token's own q alone: `dr = sg(s) dlogp`.

    logp, old_logp, advantages, weights: (T,). loss_mask: (T,) bool. cu_seqlens: (B+1,). Returns (T,).
    Source: derived from `sequence_clipped_surrogate`.
    """
    out, grad = _untrained(logp)
    low, high = 1 - clip_low, 1 + clip_high
    ratios = _sequence_ratios(logp, old_logp, advantages, loss_mask, cu_seqlens)
    for k in _tokens(logp, old_logp, advantages, loss_mask, weights):
        s = float(ratios[k.t])
        out.loss[k.t] = times(k.weight, max(-times(s, k.advantage), -times(_clamp(s, low, high), k.advantage)))
        out.ratio[k.t] = s
        out.clipped[k.t] = (k.advantage > 0 and s > high) or (k.advantage < 0 and s < low)
        stopped = s > high if k.advantage > 0 else s < low
        grad[k.t] = 0.0 if stopped else -times(s, k.weight, k.advantage)
    return out, grad


sequence_clipped_surrogate, sequence_clipped_surrogate_grad = pair(sequence_clipped_surrogate_and_grad)


def cispo_surrogate_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    clip_low: float | None = None,
    clip_high: float,
    weights: ArrayLike | None = None,
) -> tuple[Surrogate, FloatArray]:
    """`-sg(clip(ρ, 1 - clip_low, 1 + clip_high)) w A log q`, no lower bound without clip_low; clipped: ρ out of bounds.

    logp, old_logp, advantages, weights: (T,) float. loss_mask: (T,) bool. Returns Surrogate of (T,).
    Source: CISPO of MiniMax-M1, arXiv 2506.13585.

    Gradient: `-clip(ρ, 1 - clip_low, 1 + clip_high) w A`, the stopped factor of log q. The clip never zeroes it.

    logp, old_logp, advantages, weights: (T,). loss_mask: (T,) bool. Returns (T,).
    Source: derived from `cispo_surrogate`.
    """
    out, grad = _untrained(logp)
    low, high = 0.0 if clip_low is None else 1 - clip_low, 1 + clip_high
    for k in _tokens(logp, old_logp, advantages, loss_mask, weights):
        factor = _clamp(k.ratio, low, high)
        out.loss[k.t] = -times(factor, k.weight, k.advantage, k.logp)
        out.ratio[k.t] = k.ratio
        out.clipped[k.t] = k.ratio < low or k.ratio > high
        grad[k.t] = -times(factor, k.weight, k.advantage)
    return out, grad


cispo_surrogate, cispo_surrogate_grad = pair(cispo_surrogate_and_grad)


def sapo_surrogate_and_grad(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    weights: ArrayLike | None = None,
) -> tuple[Surrogate, FloatArray]:
    """`-f(ρ) w A`, `f(ρ) = (4 / τ) sigmoid(τ (ρ - 1))`, τ = tau_positive where A > 0, else tau_negative.

    logp, old_logp, advantages, weights: (T,) float. loss_mask: (T,) bool. Returns Surrogate of (T,), nothing clipped.
    Source: SAPO, arXiv 2511.20347.

    Gradient: `-f'(ρ) ρ w A`, `f'(ρ) = 4 σ (1 - σ)`, σ = sigmoid(τ (ρ - 1)); its limit 0 where ρ is inf.

    logp, old_logp, advantages, weights: (T,). loss_mask: (T,) bool. Returns (T,).
    Source: derived from `sapo_surrogate`.
    """
    out, grad = _untrained(logp)
    for k in _tokens(logp, old_logp, advantages, loss_mask, weights):
        tau = tau_positive if k.advantage > 0 else tau_negative
        decay = exp(-tau * (k.ratio - 1))
        gate, slope = 4 / tau / (1 + decay), 4 * decay / (1 + decay) ** 2
        out.loss[k.t] = -times(gate, k.weight, k.advantage)
        out.ratio[k.t] = k.ratio
        grad[k.t] = -times(slope, k.ratio, k.weight, k.advantage)
    return out, grad


sapo_surrogate, sapo_surrogate_grad = pair(sapo_surrogate_and_grad)
