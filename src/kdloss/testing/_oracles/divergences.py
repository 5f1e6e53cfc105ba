"""Oracles for divergences between whole distributions, from logits and from hidden states, row by row.

q = softmax(x / τ), p = softmax(y / τ),   KL(a || b) = sum over a_v > 0 of a_v log(a_v / b_v),  +inf where b_v = 0
dF/dx_j = (s_j - q_j sum_v s_v) / τ,   s_v = q_v dF/dq_v, the slope of F in log q_v
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .types import (
    ArrayLike,
    FloatArray,
    LinearGradients,
    as_float,
    as_mask,
    trained,
)

Value = Callable[[FloatArray, FloatArray], float]  # of (p, q), which need not sum to 1
Slope = Callable[[FloatArray, FloatArray], FloatArray]  # s, the same


def distribution(logits: FloatArray, temperature: float) -> FloatArray:
    """`softmax(x / τ)` of one row; -inf has no mass."""
    z = logits / temperature
    weights = np.exp(z - z.max())
    masses: FloatArray = weights / weights.sum()
    return masses


def kl(a: FloatArray, b: FloatArray) -> float:
    """KL(a || b) of masses that need not sum to 1."""
    return math.fsum(
        math.inf if y == 0 else x * math.log(x / y) for x, y in zip(a.tolist(), b.tolist(), strict=True) if x > 0
    )


def _log_ratio(a: FloatArray, b: FloatArray) -> FloatArray:
    """log(a / b) where a > 0, else 0: it stands beside a factor a."""
    out = np.zeros(a.shape)
    here = a > 0
    with np.errstate(divide="ignore"):
        out[here] = np.log(a[here] / b[here])
    return out


def forward_form() -> tuple[Value, Slope]:
    """`KL(p || q)`, slope `-p`."""
    return kl, lambda p, q: -p


def reverse_form() -> tuple[Value, Slope]:
    """`KL(q || p)`, slope `q (log(q/p) + 1)`."""
    return lambda p, q: kl(q, p), lambda p, q: q * (_log_ratio(q, p) + 1)


def jsd_form(beta: float) -> tuple[Value, Slope]:
    """`β KL(p || m) + (1-β) KL(q || m)`, slope `(1-β) q log(q/m)`: the terms of dm/dq add up to 0."""

    def value(p: FloatArray, q: FloatArray) -> float:
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value, lambda p, q: (1 - beta) * q * _log_ratio(q, beta * p + (1 - beta) * q)


def skewed_forward_form(alpha: float) -> tuple[Value, Slope]:
    """`KL(p || m)`, `m = α p + (1-α) q`, slope `-p (1-α) q / m`."""

    def slope(p: FloatArray, q: FloatArray) -> FloatArray:
        m = alpha * p + (1 - alpha) * q
        return -(1 - alpha) * p * q / np.where(m > 0, m, 1)

    return lambda p, q: kl(p, alpha * p + (1 - alpha) * q), slope


def skewed_reverse_form(alpha: float) -> tuple[Value, Slope]:
    """`KL(q || m)`, `m = (1-α) p + α q`, slope `q (log(q/m) + 1 - α q/m)`."""

    def slope(p: FloatArray, q: FloatArray) -> FloatArray:
        m = (1 - alpha) * p + alpha * q
        return q * (_log_ratio(q, m) + 1 - alpha * q / np.where(m > 0, m, 1))

    return lambda p, q: kl(q, (1 - alpha) * p + alpha * q), slope


def _rows(
    logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike, vocab_size: int | None
) -> tuple[FloatArray, FloatArray, FloatArray, int]:
    x, y = as_float("logits", logits), as_float("teacher_logits", teacher_logits)
    if vocab_size is None and x.shape != y.shape:
        raise ValueError(f"teacher_logits must have shape {x.shape}, got {y.shape}; or pass vocab_size")
    tau = np.broadcast_to(as_float("temperature", temperature), x.shape[:-1])
    return x, y, tau, x.shape[-1] if vocab_size is None else vocab_size


def _value(
    form: tuple[Value, Slope],
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    vocab_size: int | None,
) -> FloatArray:
    x, y, tau, vocab = _rows(logits, teacher_logits, temperature, vocab_size)
    out = np.zeros(x.shape[:-1])
    for row in np.ndindex(out.shape):
        t = float(tau[row])
        out[row] = form[0](distribution(y[row][:vocab], t), distribution(x[row][:vocab], t))
    return out


def _gradient(
    form: tuple[Value, Slope],
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    vocab_size: int | None,
    upstream: ArrayLike,
) -> FloatArray:
    x, y, tau, vocab = _rows(logits, teacher_logits, temperature, vocab_size)
    u = as_float("upstream", upstream, shape=x.shape[:-1])
    grad = np.zeros(x.shape)
    for row in np.ndindex(u.shape):
        grad[row][:vocab] = float(u[row]) * _row_gradient(form, x[row][:vocab], y[row][:vocab], float(tau[row]))
    return grad


def _row_gradient(form: tuple[Value, Slope], x: FloatArray, y: FloatArray, tau: float) -> FloatArray:
    p, q = distribution(y, tau), distribution(x, tau)
    slope = form[1](p, q)
    gradient: FloatArray = (slope - q * slope.sum()) / tau
    return gradient


def forward_kl(
    logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: ArrayLike = 1.0, vocab_size: int | None = None
) -> FloatArray:
    """`KL(p || q)`. logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), nats."""
    return _value(forward_form(), logits, teacher_logits, temperature, vocab_size)


def forward_kl_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """`u (q - p) / τ`, (..., V). upstream (u): (...,)."""
    return _gradient(forward_form(), logits, teacher_logits, temperature, vocab_size, upstream)


def reverse_kl(
    logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: ArrayLike = 1.0, vocab_size: int | None = None
) -> FloatArray:
    """`KL(q || p)`. logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), nats."""
    return _value(reverse_form(), logits, teacher_logits, temperature, vocab_size)


def reverse_kl_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """`u q (log(q/p) - KL(q || p)) / τ`, (..., V). upstream (u): (...,)."""
    return _gradient(reverse_form(), logits, teacher_logits, temperature, vocab_size, upstream)


def generalized_jsd(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> FloatArray:
    """`β KL(p || m) + (1-β) KL(q || m)`, `m = β p + (1-β) q`. Returns (...,). Source: GKD, arXiv 2306.13649."""
    return _value(jsd_form(beta), logits, teacher_logits, temperature, vocab_size)


def generalized_jsd_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """`u (1-β) q (log(q/m) - KL(q || m)) / τ`, (..., V). upstream (u): (...,)."""
    return _gradient(jsd_form(beta), logits, teacher_logits, temperature, vocab_size, upstream)


def skewed_forward_kl(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> FloatArray:
    """`KL(p || α p + (1-α) q)`. Returns (...,). Source: DistiLLM, arXiv 2402.03898."""
    return _value(skewed_forward_form(alpha), logits, teacher_logits, temperature, vocab_size)


def skewed_forward_kl_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """`u (q sum p w - p w) / τ`, `w = (1-α) q / m`, (..., V). upstream (u): (...,)."""
    return _gradient(skewed_forward_form(alpha), logits, teacher_logits, temperature, vocab_size, upstream)


def skewed_reverse_kl(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> FloatArray:
    """`KL(q || (1-α) p + α q)`. Returns (...,). Source: DistiLLM, arXiv 2402.03898."""
    return _value(skewed_reverse_form(alpha), logits, teacher_logits, temperature, vocab_size)


def skewed_reverse_kl_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """`u (s - q sum s) / τ`, `s = q (log(q/m) + 1 - α q/m)`, (..., V). upstream (u): (...,)."""
    return _gradient(skewed_reverse_form(alpha), logits, teacher_logits, temperature, vocab_size, upstream)


# --- from hidden states: hidden (T, D), weight (V, D), teacher_hidden (T, D'), teacher_weight (V, D') ----------------


def _head_row(
    hidden: FloatArray, weight: FloatArray, bias: ArrayLike | None, scale: float, softcap: float | None
) -> tuple[FloatArray, FloatArray]:
    """One row's `cap((W h + b) s)`, and the derivative of that with respect to `W h + b`."""
    x = (weight @ hidden + (0.0 if bias is None else as_float("bias", bias, shape=weight.shape[:1]))) * scale
    if softcap is None:
        return x, np.full(x.shape, scale)
    bent = np.tanh(x / softcap)
    return softcap * bent, scale * (1 - bent**2)


def _linear(
    form: tuple[Value, Slope],
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    upstream: ArrayLike | None,
    *,
    loss_mask: ArrayLike,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> tuple[FloatArray, LinearGradients]:
    h, w = as_float("hidden", hidden), as_float("weight", weight)
    h_teacher, w_teacher = as_float("teacher_hidden", teacher_hidden), as_float("teacher_weight", teacher_weight)
    vocab = len(w) if vocab_size is None else vocab_size
    mask = as_mask("loss_mask", loss_mask, shape=h.shape[:1])
    tau = np.broadcast_to(as_float("temperature", temperature), mask.shape)
    u = np.zeros(mask.shape) if upstream is None else as_float("upstream", upstream, shape=mask.shape)
    value, d_hidden, d_weight, d_bias = np.zeros(mask.shape), np.zeros(h.shape), np.zeros(w.shape), np.zeros(len(w))
    for row in trained(mask):
        x, bend = _head_row(h[row], w, bias, logit_scale, softcap)
        y, _ = _head_row(h_teacher[row], w_teacher, teacher_bias, teacher_logit_scale, teacher_softcap)
        x, y, t = x[:vocab], y[:vocab], float(tau[row])
        value[row] = form[0](distribution(y, t), distribution(x, t))
        g = float(u[row]) * _row_gradient(form, x, y, t) * bend[:vocab]
        d_hidden[row] = g @ w[:vocab]
        d_weight[:vocab] += np.outer(g, h[row])
        d_bias[:vocab] += g
    return value, LinearGradients(d_hidden, d_weight, None if bias is None else d_bias)


def linear_forward_kl(
    hidden: ArrayLike, weight: ArrayLike, teacher_hidden: ArrayLike, teacher_weight: ArrayLike, **options: Any
) -> FloatArray:
    """`forward_kl` of `cap((W h + b) s)` on either side, (T,); 0 where not trained."""
    return _linear(forward_form(), hidden, weight, teacher_hidden, teacher_weight, None, **options)[0]


def linear_forward_kl_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    upstream: ArrayLike,
    **options: Any,
) -> LinearGradients:
    """`g` the gradient of a row's `W h + b`: `dh = Wᵀ g`, `dW = sum g hᵀ`, `db = sum g`. upstream: (T,)."""
    return _linear(forward_form(), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)[1]


def linear_reverse_kl(
    hidden: ArrayLike, weight: ArrayLike, teacher_hidden: ArrayLike, teacher_weight: ArrayLike, **options: Any
) -> FloatArray:
    """`reverse_kl` of `cap((W h + b) s)` on either side, (T,); 0 where not trained."""
    return _linear(reverse_form(), hidden, weight, teacher_hidden, teacher_weight, None, **options)[0]


def linear_reverse_kl_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    upstream: ArrayLike,
    **options: Any,
) -> LinearGradients:
    """As `linear_forward_kl_grad`."""
    return _linear(reverse_form(), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)[1]


def linear_generalized_jsd(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    beta: float,
    **options: Any,
) -> FloatArray:
    """`generalized_jsd` of `cap((W h + b) s)` on either side, (T,); 0 where not trained."""
    return _linear(jsd_form(beta), hidden, weight, teacher_hidden, teacher_weight, None, **options)[0]


def linear_generalized_jsd_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    beta: float,
    upstream: ArrayLike,
    **options: Any,
) -> LinearGradients:
    """As `linear_forward_kl_grad`."""
    return _linear(jsd_form(beta), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)[1]


def linear_skewed_forward_kl(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    alpha: float,
    **options: Any,
) -> FloatArray:
    """`skewed_forward_kl` of `cap((W h + b) s)` on either side, (T,); 0 where not trained."""
    return _linear(skewed_forward_form(alpha), hidden, weight, teacher_hidden, teacher_weight, None, **options)[0]


def linear_skewed_forward_kl_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    alpha: float,
    upstream: ArrayLike,
    **options: Any,
) -> LinearGradients:
    """As `linear_forward_kl_grad`."""
    return _linear(skewed_forward_form(alpha), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)[1]


def linear_skewed_reverse_kl(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    alpha: float,
    **options: Any,
) -> FloatArray:
    """`skewed_reverse_kl` of `cap((W h + b) s)` on either side, (T,); 0 where not trained."""
    return _linear(skewed_reverse_form(alpha), hidden, weight, teacher_hidden, teacher_weight, None, **options)[0]


def linear_skewed_reverse_kl_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    alpha: float,
    upstream: ArrayLike,
    **options: Any,
) -> LinearGradients:
    """As `linear_forward_kl_grad`."""
    return _linear(skewed_reverse_form(alpha), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)[1]
