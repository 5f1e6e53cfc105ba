"""Oracles for divergences between whole distributions, from logits and from hidden states, row by row.

q = softmax(x / τ), p = softmax(y / τ),   KL(a || b) = sum over a_v > 0 of a_v log(a_v / b_v),  +inf where b_v = 0
dF/dx_j = (s_j - q_j sum_v s_v) / τ,   s_v = q_v dF/dq_v, the slope of F in log q_v
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .pairs import pair
from .types import ArrayLike, FloatArray, LinearGradients, as_float, as_mask, trained


class Form(NamedTuple):
    """A divergence F and its slope s, both functions of (p, q), which need not sum to 1."""

    value: Callable[[FloatArray, FloatArray], float]
    slope: Callable[[FloatArray, FloatArray], FloatArray]


def distribution(logits: FloatArray, temperature: float) -> FloatArray:
    """`softmax(x / τ)` of one row; -inf has mass 0."""
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
    """log(a / b) where a > 0, else 0: it is always multiplied by a."""
    out = np.zeros(a.shape)
    here = a > 0
    with np.errstate(divide="ignore"):
        out[here] = np.log(a[here] / b[here])
    return out


def forward_form() -> Form:
    """`KL(p || q)`, slope `-p`."""
    return Form(kl, lambda p, q: -p)


def reverse_form() -> Form:
    """`KL(q || p)`, slope `q (log(q/p) + 1)`."""
    return Form(lambda p, q: kl(q, p), lambda p, q: q * (_log_ratio(q, p) + 1))


def jsd_form(beta: float) -> Form:
    """`β KL(p || m) + (1-β) KL(q || m)`, slope `(1-β) q log(q/m)`: the terms of dm/dq add up to 0."""

    def value(p: FloatArray, q: FloatArray) -> float:
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return Form(value, lambda p, q: (1 - beta) * q * _log_ratio(q, beta * p + (1 - beta) * q))


def skewed_forward_form(alpha: float) -> Form:
    """`KL(p || m)`, `m = α p + (1-α) q`, slope `-p (1-α) q / m`."""

    def slope(p: FloatArray, q: FloatArray) -> FloatArray:
        m = alpha * p + (1 - alpha) * q
        return -(1 - alpha) * p * q / np.where(m > 0, m, 1)

    return Form(lambda p, q: kl(p, alpha * p + (1 - alpha) * q), slope)


def skewed_reverse_form(alpha: float) -> Form:
    """`KL(q || m)`, `m = (1-α) p + α q`, slope `q (log(q/m) + 1 - α q/m)`."""

    def slope(p: FloatArray, q: FloatArray) -> FloatArray:
        m = (1 - alpha) * p + alpha * q
        return q * (_log_ratio(q, m) + 1 - alpha * q / np.where(m > 0, m, 1))

    return Form(lambda p, q: kl(q, (1 - alpha) * p + alpha * q), slope)


def total_variation_form() -> Form:
    """`½ sum |p - q|`, slope `½ q sign(q - p)`."""
    return Form(lambda p, q: 0.5 * math.fsum(np.abs(p - q).tolist()), lambda p, q: 0.5 * q * np.sign(q - p))


def _row_gradient(form: Form, x: FloatArray, y: FloatArray, tau: float) -> FloatArray:
    """The gradient of one row's logits x, (V,)."""
    p, q = distribution(y, tau), distribution(x, tau)
    slope = form.slope(p, q)
    gradient: FloatArray = (slope - q * slope.sum()) / tau
    return gradient


def _from_logits(
    form: Form,
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike,
    vocab_size: int | None,
    upstream: ArrayLike | None,
) -> tuple[FloatArray, FloatArray]:
    x, y = as_float("logits", logits), as_float("teacher_logits", teacher_logits)
    if vocab_size is None and x.shape != y.shape:
        raise ValueError(f"teacher_logits must have shape {x.shape}, got {y.shape}; or pass vocab_size")
    lead, vocab = x.shape[:-1], x.shape[-1] if vocab_size is None else vocab_size
    tau = np.broadcast_to(as_float("temperature", temperature), lead)
    u = None if upstream is None else as_float("upstream", upstream, shape=lead)
    value, grad = np.zeros(lead), np.zeros(x.shape)
    for row in np.ndindex(lead):
        t, x_row, y_row = float(tau[row]), x[row][:vocab], y[row][:vocab]
        value[row] = form.value(distribution(y_row, t), distribution(x_row, t))
        if u is not None:
            grad[row][:vocab] = float(u[row]) * _row_gradient(form, x_row, y_row, t)
    return value, grad


def forward_kl_and_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`KL(p || q)`. logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), nats.

    Gradient: `u (q - p) / τ`, (..., V). upstream (u): (...,).
    """
    return _from_logits(forward_form(), logits, teacher_logits, temperature, vocab_size, upstream)


forward_kl, forward_kl_grad = pair(forward_kl_and_grad)


def reverse_kl_and_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`KL(q || p)`. logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), nats.

    Gradient: `u q (log(q/p) - KL(q || p)) / τ`, (..., V). upstream (u): (...,).
    """
    return _from_logits(reverse_form(), logits, teacher_logits, temperature, vocab_size, upstream)


reverse_kl, reverse_kl_grad = pair(reverse_kl_and_grad)


def generalized_jsd_and_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`β KL(p || m) + (1-β) KL(q || m)`, `m = β p + (1-β) q`.

    logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), nats. Source: GKD, arXiv 2306.13649.

    Gradient: `u (1-β) q (log(q/m) - KL(q || m)) / τ`, (..., V). upstream (u): (...,).
    """
    return _from_logits(jsd_form(beta), logits, teacher_logits, temperature, vocab_size, upstream)


generalized_jsd, generalized_jsd_grad = pair(generalized_jsd_and_grad)


def skewed_forward_kl_and_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`KL(p || α p + (1-α) q)`.

    logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), nats.
    Source: DistiLLM, arXiv 2402.03898.

    Gradient: `u (q sum p w - p w) / τ`, `w = (1-α) q / m`, (..., V). upstream (u): (...,).
    """
    return _from_logits(skewed_forward_form(alpha), logits, teacher_logits, temperature, vocab_size, upstream)


skewed_forward_kl, skewed_forward_kl_grad = pair(skewed_forward_kl_and_grad)


def skewed_reverse_kl_and_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`KL(q || (1-α) p + α q)`.

    logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), nats.
    Source: DistiLLM, arXiv 2402.03898.

    Gradient: `u (s - q sum s) / τ`, `s = q (log(q/m) + 1 - α q/m)`, (..., V). upstream (u): (...,).
    """
    return _from_logits(skewed_reverse_form(alpha), logits, teacher_logits, temperature, vocab_size, upstream)


skewed_reverse_kl, skewed_reverse_kl_grad = pair(skewed_reverse_kl_and_grad)


def total_variation_and_grad(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`½ sum |p - q|`. logits, teacher_logits: (..., V). temperature: float or (...,). Returns (...,), in 0 .. 1.

    Gradient: `u ½ q (s - sum q s) / τ`, `s = sign(q - p)`, (..., V). upstream (u): (...,).
    """
    return _from_logits(total_variation_form(), logits, teacher_logits, temperature, vocab_size, upstream)


total_variation, total_variation_grad = pair(total_variation_and_grad)


# --- from hidden states -----------------------------------------------------------------------------------------------


def _head_row(
    hidden: FloatArray, weight: FloatArray, bias: ArrayLike | None, scale: float, softcap: float | None
) -> tuple[FloatArray, FloatArray]:
    """One row's `cap((W h + b) s)`, and its derivative with respect to `W h + b`."""
    x = (weight @ hidden + (0.0 if bias is None else as_float("bias", bias, shape=weight.shape[:1]))) * scale
    if softcap is None:
        return x, np.full(x.shape, scale)
    bent = np.tanh(x / softcap)
    return softcap * bent, scale * (1 - bent**2)


def _from_hidden(
    form: Form,
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
    u = None if upstream is None else as_float("upstream", upstream, shape=mask.shape)
    value, d_hidden, d_weight, d_bias = np.zeros(mask.shape), np.zeros(h.shape), np.zeros(w.shape), np.zeros(len(w))
    for row in trained(mask):
        x, bend = _head_row(h[row], w, bias, logit_scale, softcap)
        y, _ = _head_row(h_teacher[row], w_teacher, teacher_bias, teacher_logit_scale, teacher_softcap)
        x, y, t = x[:vocab], y[:vocab], float(tau[row])
        value[row] = form.value(distribution(y, t), distribution(x, t))
        if u is None:
            continue
        g = float(u[row]) * _row_gradient(form, x, y, t) * bend[:vocab]
        d_hidden[row] = g @ w[:vocab]
        d_weight[:vocab] += np.outer(g, h[row])
        d_bias[:vocab] += g
    return value, LinearGradients(d_hidden, d_weight, None if bias is None else d_bias)


def linear_forward_kl_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    upstream: ArrayLike | None = None,
    **options: Any,
) -> tuple[FloatArray, LinearGradients]:
    """`forward_kl` of the logits `cap((W h + b) s)` of student and teacher, (T,); 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_hidden: (T, D'). teacher_weight: (V, D'). options: loss_mask, bias,
    teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale, temperature, vocab_size.

    Gradient: `dh = Wᵀ g`, `dW = sum g hᵀ`, `db = sum g`, g the gradient of one row's `W h + b`. upstream: (T,).
    """
    return _from_hidden(forward_form(), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)


linear_forward_kl, linear_forward_kl_grad = pair(linear_forward_kl_and_grad)


def linear_reverse_kl_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    upstream: ArrayLike | None = None,
    **options: Any,
) -> tuple[FloatArray, LinearGradients]:
    """`reverse_kl` of the logits `cap((W h + b) s)` of student and teacher, (T,); 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_hidden: (T, D'). teacher_weight: (V, D'). options: loss_mask, bias,
    teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale, temperature, vocab_size.

    Gradient: `dh = Wᵀ g`, `dW = sum g hᵀ`, `db = sum g`, g the gradient of one row's `W h + b`. upstream: (T,).
    """
    return _from_hidden(reverse_form(), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)


linear_reverse_kl, linear_reverse_kl_grad = pair(linear_reverse_kl_and_grad)


def linear_generalized_jsd_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    beta: float,
    upstream: ArrayLike | None = None,
    **options: Any,
) -> tuple[FloatArray, LinearGradients]:
    """`generalized_jsd` of the logits `cap((W h + b) s)` of student and teacher, (T,); 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_hidden: (T, D'). teacher_weight: (V, D'). options: loss_mask, bias,
    teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale, temperature, vocab_size.

    Gradient: `dh = Wᵀ g`, `dW = sum g hᵀ`, `db = sum g`, g the gradient of one row's `W h + b`. upstream: (T,).
    """
    return _from_hidden(jsd_form(beta), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)


linear_generalized_jsd, linear_generalized_jsd_grad = pair(linear_generalized_jsd_and_grad)


def linear_skewed_forward_kl_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    alpha: float,
    upstream: ArrayLike | None = None,
    **options: Any,
) -> tuple[FloatArray, LinearGradients]:
    """`skewed_forward_kl` of the logits `cap((W h + b) s)` of student and teacher, (T,); 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_hidden: (T, D'). teacher_weight: (V, D'). options: loss_mask, bias,
    teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale, temperature, vocab_size.

    Gradient: `dh = Wᵀ g`, `dW = sum g hᵀ`, `db = sum g`, g the gradient of one row's `W h + b`. upstream: (T,).
    """
    return _from_hidden(skewed_forward_form(alpha), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)


linear_skewed_forward_kl, linear_skewed_forward_kl_grad = pair(linear_skewed_forward_kl_and_grad)


def linear_skewed_reverse_kl_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    alpha: float,
    upstream: ArrayLike | None = None,
    **options: Any,
) -> tuple[FloatArray, LinearGradients]:
    """`skewed_reverse_kl` of the logits `cap((W h + b) s)` of student and teacher, (T,); 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_hidden: (T, D'). teacher_weight: (V, D'). options: loss_mask, bias,
    teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale, temperature, vocab_size.

    Gradient: `dh = Wᵀ g`, `dW = sum g hᵀ`, `db = sum g`, g the gradient of one row's `W h + b`. upstream: (T,).
    """
    return _from_hidden(skewed_reverse_form(alpha), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)


linear_skewed_reverse_kl, linear_skewed_reverse_kl_grad = pair(linear_skewed_reverse_kl_and_grad)


def linear_total_variation_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_weight: ArrayLike,
    *,
    upstream: ArrayLike | None = None,
    **options: Any,
) -> tuple[FloatArray, LinearGradients]:
    """`total_variation` of the logits `cap((W h + b) s)` of student and teacher, (T,); 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_hidden: (T, D'). teacher_weight: (V, D'). options: loss_mask, bias,
    teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale, temperature, vocab_size.

    Gradient: `dh = Wᵀ g`, `dW = sum g hᵀ`, `db = sum g`, g the gradient of one row's `W h + b`. upstream: (T,).
    """
    return _from_hidden(total_variation_form(), hidden, weight, teacher_hidden, teacher_weight, upstream, **options)


linear_total_variation, linear_total_variation_grad = pair(linear_total_variation_and_grad)
