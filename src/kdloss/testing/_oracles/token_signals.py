"""Oracles for the rewards of other divergences, masks and weights of tokens, and what joins reward and teacher.

q the student, p the teacher; `logp = log q(token)`, `teacher_logp = log p(token)`. Per-token functions take any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .types import AnyArray, ArrayLike, BoolArray, FloatArray, as_float, as_mask, as_wide, exp, segments, trained


def _reward(
    of_log_u: Callable[[float], float],
    logp: ArrayLike,
    teacher_logp: ArrayLike,
    loss_mask: ArrayLike,
    clip: float | None,
) -> FloatArray:
    """`clamp(r(log p/q), -clip, clip)` at the trained tokens, 0 elsewhere."""
    q = as_float("logp", logp)
    p = as_float("teacher_logp", teacher_logp, shape=q.shape)
    rewards = np.zeros(q.shape)
    for t in trained(as_mask("loss_mask", loss_mask, shape=q.shape)):
        r = of_log_u(float(p[t] - q[t]))
        rewards[t] = r if clip is None else min(max(r, -clip), clip)
    return rewards


def _expm1(x: float) -> float:
    """e^x - 1 without cancellation near 0, inf where it overflows."""
    return math.expm1(x) if x < 700 else exp(x)


def forward_kl_reward(
    logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike, clip: float | None = None
) -> FloatArray:
    """`u - 1`, `u = p/q`, clamped to `[-clip, clip]`; detached.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. Returns (T,). Source: `u f' - f` for `f = u log u - u + 1`.
    """
    return _reward(_expm1, logp, teacher_logp, loss_mask, clip)


def jsd_reward(
    logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike, beta: float, clip: float | None = None
) -> FloatArray:
    """`(1-β) log(1-β + β u)`, `u = p/q`, clamped to `[-clip, clip]`; detached.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. Returns (T,). Source: `u f' - f` for
    `f = β u log(u / m) - (1-β) log m`, `m = 1-β + β u`.
    """
    return _reward(lambda x: (1 - beta) * math.log1p(beta * _expm1(x)), logp, teacher_logp, loss_mask, clip)


def squared_hellinger_reward(
    logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike, clip: float | None = None
) -> FloatArray:
    """`(sqrt(u) - 1) / 2`, `u = p/q`, clamped to `[-clip, clip]`; detached.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. Returns (T,). Source: `u f' - f` for `f = (sqrt(u) - 1)² / 2`.
    """
    return _reward(lambda x: _expm1(x / 2) / 2, logp, teacher_logp, loss_mask, clip)


def total_variation_reward(
    logp: ArrayLike, teacher_logp: ArrayLike, *, loss_mask: ArrayLike, clip: float | None = None
) -> FloatArray:
    """`sign(u - 1) / 2`, `u = p/q`, clamped to `[-clip, clip]`; detached.

    logp, teacher_logp: (T,) float. loss_mask: (T,) bool. Returns (T,). Source: `u f' - f` for `f = |u - 1| / 2`.
    """
    return _reward(lambda x: ((x > 0) - (x < 0)) / 2, logp, teacher_logp, loss_mask, clip)


# --- which tokens -----------------------------------------------------------------------------------------------------


def _binary_kl(mu: float, q: float) -> float:
    """KL of the coin with probability `mu` from the one with probability `q`."""
    sides = ((mu, q), (1 - mu, 1 - q))
    return math.fsum(math.inf if b == 0 else a * math.log(a / b) for a, b in sides if a > 0)


def trust_region_mask(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    max_divergence: float,
    measure: str = "tv",
) -> BoolArray:
    """Not `D > max_divergence` where `A (q - μ) > 0`; `D = |q - μ|`, or the KL of the coins with these probabilities.

    logp, old_logp, advantages: (T,) float. loss_mask: (T,) bool. Returns (T,) bool. Source: DPPO, arXiv 2602.04879.
    """
    x = as_float("logp", logp)
    y = x if old_logp is None else as_float("old_logp", old_logp, shape=x.shape)
    a = as_float("advantages", advantages, shape=x.shape)
    kept = np.zeros(x.shape, dtype=np.bool_)
    for t in trained(as_mask("loss_mask", loss_mask, shape=x.shape)):
        q, mu = exp(float(x[t])), exp(float(y[t]))
        divergence = abs(q - mu) if measure == "tv" else _binary_kl(mu, q)
        away = (a[t] > 0 and x[t] > y[t]) or (a[t] < 0 and x[t] < y[t])
        kept[t] = not (away and divergence > max_divergence)
    return kept


def stale_sequence_mask(
    logp: ArrayLike,
    old_logp: ArrayLike,
    advantages: ArrayLike,
    *,
    loss_mask: ArrayLike,
    cu_seqlens: ArrayLike,
    max_divergence: float,
) -> BoolArray:
    """Not `A < 0` where the mean of `log μ - log q` over the trained tokens of the sequence exceeds `max_divergence`.

    logp, old_logp, advantages: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. Returns (T,) bool.
    Source: DeepSeek-V3.2, arXiv 2512.02556, equation 9.
    """
    x = as_float("logp", logp)
    y, a = as_float("old_logp", old_logp, shape=x.shape), as_float("advantages", advantages, shape=x.shape)
    mask = as_mask("loss_mask", loss_mask, shape=x.shape)
    kept = np.zeros(x.shape, dtype=np.bool_)
    for tokens in segments(cu_seqlens, x.size):
        own = [t for t in tokens if mask[t]]
        stale = bool(own) and math.fsum(float(y[t] - x[t]) for t in own) / len(own) > max_divergence
        for t in own:
            kept[t] = not (stale and a[t] < 0)
    return kept


def _number(fraction: float, count: int) -> int:
    """`fraction * count` to the nearest integer, at least 1 of one or more tokens."""
    return min(count, max(math.floor(fraction * count + 0.5), 1)) if fraction > 0 else 0


def _top(values: list[float], fraction: float) -> list[bool]:
    """Which values are at least as large as the last one that is kept."""
    number = _number(fraction, len(values))
    lowest = sorted(values, reverse=True)[number - 1] if number else math.inf
    return [number > 0 and value >= lowest for value in values]


def top_entropy_mask(entropy: ArrayLike, *, loss_mask: ArrayLike, fraction: float) -> BoolArray:
    """The trained tokens among the top `fraction` by entropy, and those that tie with the last of them.

    entropy: (T,) float. loss_mask: (T,) bool. Returns (T,) bool. Source: Beyond the 80/20 Rule, arXiv 2506.01939.
    """
    h = as_float("entropy", entropy)
    kept = np.zeros(h.shape, dtype=np.bool_)
    own = list(trained(as_mask("loss_mask", loss_mask, shape=h.shape)))
    for t, keep in zip(own, _top([float(h[t]) for t in own], fraction), strict=True):
        kept[t] = keep
    return kept


def _scaled(values: list[float]) -> list[float]:
    """The values, clipped at their 98th percentile, from 0 (the smallest) to 1; 0 where all are equal."""
    low, high = min(values), sorted(values, reverse=True)[math.floor(0.02 * len(values))]
    return [0.0 if high == low else 1.0 if x >= high else (x - low) / (high - low) for x in values]


def informative_token_mask(
    entropy: ArrayLike, divergence: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, fraction: float
) -> BoolArray:
    """Of each sequence the top `fraction` of trained tokens by `1 - (1 - h) (1 - d)`, scaled entropy and divergence.

    entropy, divergence: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. Returns (T,) bool.
    Source: TIP, arXiv 2604.14084, equation 7.
    """
    h = as_float("entropy", entropy)
    d = as_float("divergence", divergence, shape=h.shape)
    mask = as_mask("loss_mask", loss_mask, shape=h.shape)
    kept = np.zeros(h.shape, dtype=np.bool_)
    for tokens in segments(cu_seqlens, h.size):
        own = [t for t in tokens if mask[t]]
        if not own:
            continue
        pairs = zip(_scaled([float(h[t]) for t in own]), _scaled([float(d[t]) for t in own]), strict=True)
        for t, keep in zip(own, _top([1 - (1 - x) * (1 - y) for x, y in pairs], fraction), strict=True):
            kept[t] = keep
    return kept


# --- joining reward and teacher ---------------------------------------------------------------------------------------


def gate_kd_reward(kd_reward: ArrayLike, advantages: ArrayLike, *, loss_mask: ArrayLike) -> FloatArray:
    """`r` where it has the sign of `A`, else 0; detached.

    kd_reward, advantages: (T,) float. loss_mask: (T,) bool. Returns (T,). Source: OPDVR, arXiv 2608.24696.
    """
    r = as_float("kd_reward", kd_reward)
    a = as_float("advantages", advantages, shape=r.shape)
    gated = np.zeros(r.shape)
    for t in trained(as_mask("loss_mask", loss_mask, shape=r.shape)):
        if (a[t] > 0 and r[t] > 0) or (a[t] < 0 and r[t] < 0):
            gated[t] = r[t]
    return gated


def modulate_advantages(
    advantages: ArrayLike, kd_reward: ArrayLike, *, loss_mask: ArrayLike, mix: float, clip: float
) -> FloatArray:
    """`A ((1 - mix) + mix clamp(e^(sign(A) r), 1 - clip, 1 + clip))`; detached.

    advantages, kd_reward: (T,) float. loss_mask: (T,) bool. Returns (T,). Source: RLSD, arXiv 2604.03128.
    """
    a = as_float("advantages", advantages)
    r = as_float("kd_reward", kd_reward, shape=a.shape)
    modulated = np.zeros(a.shape)
    for t in trained(as_mask("loss_mask", loss_mask, shape=a.shape)):
        if a[t] != 0:
            factor = min(max(exp(float(r[t]) if a[t] > 0 else -float(r[t])), 1 - clip), 1 + clip)
            modulated[t] = a[t] * ((1 - mix) + mix * factor)
    return modulated


def prefix_weights(kd_reward: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, gain: float) -> FloatArray:
    """`1 + gain (1 - sum_{j < t} |r_j| / sum_j |r_j|)` over the trained tokens of the sequence; 0 at untrained tokens.

    kd_reward: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. Returns (T,). Source: IW-OPD, arXiv 2606.22600.
    """
    r = as_float("kd_reward", kd_reward)
    mask = as_mask("loss_mask", loss_mask, shape=r.shape)
    weights = np.zeros(r.shape)
    for tokens in segments(cu_seqlens, r.size):
        own = [t for t in tokens if mask[t]]
        total = math.fsum(abs(float(r[t])) for t in own)
        for i, t in enumerate(own):
            spent = math.fsum(abs(float(r[s])) for s in own[:i])
            weights[t] = 1 + gain * (1 if total == 0 else 1 - spent / total)
    return weights


def _moves(
    from_mask: ArrayLike,
    from_cu_seqlens: ArrayLike,
    to_mask: ArrayLike,
    to_cu_seqlens: ArrayLike,
) -> list[tuple[int, int]]:
    """(position in the first stream, position in the second) of every response token."""
    source, target = np.asarray(from_mask), np.asarray(to_mask)
    pairs = zip(segments(from_cu_seqlens, len(source)), segments(to_cu_seqlens, len(target)), strict=True)
    moves: list[tuple[int, int]] = []
    for first, second in pairs:
        moves += zip([t for t in first if source[t]], [t for t in second if target[t]], strict=True)
    return moves


def align_responses(
    x: ArrayLike,
    *,
    from_mask: ArrayLike,
    from_cu_seqlens: ArrayLike,
    to_mask: ArrayLike,
    to_cu_seqlens: ArrayLike,
    fill: float,
) -> AnyArray:
    """The i-th response token of each sequence moves to its i-th place in the second stream; `fill` elsewhere.

    x: (T, ...). from_mask: (T,) bool. to_mask: (T',) bool. from_cu_seqlens, to_cu_seqlens: (B+1,). Returns (T', ...).
    """
    x = as_wide(x)
    out = np.full((len(np.asarray(to_mask)), *x.shape[1:]), fill, dtype=x.dtype)
    for s, t in _moves(from_mask, from_cu_seqlens, to_mask, to_cu_seqlens):
        out[t] = x[s]
    return out


def align_responses_grad(
    x: ArrayLike,
    *,
    from_mask: ArrayLike,
    from_cu_seqlens: ArrayLike,
    to_mask: ArrayLike,
    to_cu_seqlens: ArrayLike,
    fill: float,
    upstream: ArrayLike,
) -> FloatArray:
    """The gradient of each response token's place in the second stream, 0 elsewhere.

    x: (T, ...). upstream: (T', ...). Returns (T, ...). Source: derived from `align_responses`.
    """
    u, grad = as_float("upstream", upstream), np.zeros(np.shape(x))
    for s, t in _moves(from_mask, from_cu_seqlens, to_mask, to_cu_seqlens):
        grad[s] = u[t]
    return grad
