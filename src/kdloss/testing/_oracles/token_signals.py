"""Oracles for the rewards of other divergences, masks and weights of tokens, and what joins reward and teacher.

q the student, p the teacher; `logp = log q(token)`, `teacher_logp = log p(token)`. Per-token functions take any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .types import ArrayLike, FloatArray, as_float, as_mask, exp, trained


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
