"""Oracles for divergences from K log-probs per token, row by row: outcomes are listed, the chain rule is written out.

S is the set of the K ids. "bucket": the ids of S, and one outcome for all others. "renormalize": S, with the masses
divided by their sum. "truncate": S, with the masses unchanged. "generalized", for the KLs: F of "truncate", plus the
mass of its second argument, minus that of its first. s_o = q_o dF/dq_o is the slope of F in log q_o for outcome o, and
dF/dx_j = sum_o s_o d log q_o/dx_j.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .divergences import Form, distribution, forward_form, jsd_form, reverse_form
from .pairs import pair
from .topk_sampled import through_head
from .types import ArrayLike, FloatArray, LinearGradients, as_float, as_int

# A float64 tail below this is a rounding error: it counts as 0 in a numerator, and as this in a denominator.
_MIN_TAIL = 8 * 2.0**-52


def _row(
    form: Form, tail: str, x: FloatArray, logp: FloatArray, ids: list[int], tau: float, floor: float
) -> tuple[float, FloatArray]:
    """Value and gradient of one row's logits x, (V,)."""
    kept = [k for k, id_ in enumerate(ids) if id_ != -1]
    support = [ids[k] for k in kept]
    if not support:
        return 0.0, np.zeros(x.shape)
    q_all = distribution(x, tau)
    p, q = np.exp(logp[kept]), q_all[support]
    jacobian = np.eye(len(x))[support] - q_all  # d log q_o / dz_j, (K, V)
    if tail == "renormalize":
        inside = np.isin(np.arange(len(x)), support)
        within = np.where(inside, q_all, 0) / q.sum()
        p, q, jacobian = p / p.sum(), q / q.sum(), np.eye(len(x))[support] - within
    elif tail == "bucket" and len(support) < len(x):
        others = np.ones(len(x), dtype=np.bool_)
        others[support] = False
        rest = float(q_all[others].sum())
        left = 1 - float(p.sum())
        p, q = np.append(p, floor if left < _MIN_TAIL else left), np.append(q, rest)
        share = np.where(others, q_all, 0) / (rest if rest > 0 else 1)
        jacobian = np.vstack([jacobian, share - q_all])
    value, slope = form.value(p, q), form.slope(p, q)
    if tail == "generalized":
        sign = 1 if form.slope(np.ones(1), np.full(1, 0.5))[0] == -1 else -1  # the forward KL's slope is -p
        value, slope = value + sign * float(q.sum() - p.sum()), slope + sign * q
    gradient: FloatArray = slope @ jacobian / tau
    return value, gradient


def _topk(
    form: Form,
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    tail: str,
    temperature: ArrayLike,
    vocab_size: int | None,
    upstream: ArrayLike | None,
    floor: float = 0.0,
) -> tuple[FloatArray, FloatArray]:
    x = as_float("logits", logits)
    ids = as_int("teacher_topk_ids", teacher_topk_ids)
    logp = as_float("teacher_topk_logp", teacher_topk_logp, shape=ids.shape)
    lead, vocab = x.shape[:-1], x.shape[-1] if vocab_size is None else vocab_size
    tau = np.broadcast_to(as_float("temperature", temperature), lead)
    u = np.zeros(lead) if upstream is None else as_float("upstream", upstream, shape=lead)
    value, grad = np.zeros(lead), np.zeros(x.shape)
    for row in np.ndindex(lead):
        value[row], slope = _row(form, tail, x[row][:vocab], logp[row], ids[row].tolist(), float(tau[row]), floor)
        grad[row][:vocab] = float(u[row]) * slope
    return value, grad


def _of_rows(
    form: Form, logp: ArrayLike, ids: ArrayLike, tail: str, temperature: ArrayLike, floor: float = 0.0
) -> Callable[[int, FloatArray], tuple[float, FloatArray]]:
    """(row number, its logits) -> (value, gradient)."""
    of_rows = as_int("teacher_topk_ids", ids)
    kept = as_float("teacher_topk_logp", logp, shape=of_rows.shape)
    tau = np.broadcast_to(as_float("temperature", temperature), of_rows.shape[:1])
    return lambda t, x: _row(form, tail, x, kept[t], of_rows[t].tolist(), float(tau[t]), floor)


def topk_forward_kl_and_grad(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`sum_S p log(p/q)`, and the tail.

    logits: (..., V). teacher_topk_logp, _ids: (..., K), id -1 is padding. Returns (...,), nats.

    Gradient: `u dF/dx_j = u sum_o s_o d log q_o/dx_j`, (..., V). upstream (u): (...,).
    """
    return _topk(forward_form(), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, upstream)


topk_forward_kl, topk_forward_kl_grad = pair(topk_forward_kl_and_grad)


def topk_reverse_kl_and_grad(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`sum_S q log(q/p)`, and the tail.

    logits: (..., V). teacher_topk_logp, _ids: (..., K), id -1 is padding. Returns (...,), nats.

    Gradient: `u dF/dx_j = u sum_o s_o d log q_o/dx_j`, (..., V). upstream (u): (...,).
    """
    return _topk(
        reverse_form(), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, upstream, _MIN_TAIL
    )


topk_reverse_kl, topk_reverse_kl_grad = pair(topk_reverse_kl_and_grad)


def topk_generalized_jsd_and_grad(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    beta: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray]:
    """`β KL(p || m) + (1-β) KL(q || m)` over S, and the tail.

    logits: (..., V). teacher_topk_logp, _ids: (..., K), id -1 is padding. Returns (...,), nats.

    Gradient: `u dF/dx_j = u sum_o s_o d log q_o/dx_j`, (..., V). upstream (u): (...,).
    """
    return _topk(jsd_form(beta), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, upstream)


topk_generalized_jsd, topk_generalized_jsd_grad = pair(topk_generalized_jsd_and_grad)


def linear_topk_forward_kl_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    loss_mask: ArrayLike,
    tail: str,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, LinearGradients]:
    """`sum_S p log(p/q)`, and the tail, of `cap((W h + b) s)`; 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_topk_logp, _ids: (T, K), id -1 is padding. Returns (T,), nats.

    Gradient: those of hidden (T, D), weight (V, D) and bias (V,) or None. upstream (u): (T,).
    """
    loss = _of_rows(forward_form(), teacher_topk_logp, teacher_topk_ids, tail, temperature)
    return through_head(loss, hidden, weight, loss_mask, bias, softcap, logit_scale, vocab_size, upstream)


linear_topk_forward_kl, linear_topk_forward_kl_grad = pair(linear_topk_forward_kl_and_grad)


def linear_topk_reverse_kl_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    loss_mask: ArrayLike,
    tail: str,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, LinearGradients]:
    """`sum_S q log(q/p)`, and the tail, of `cap((W h + b) s)`; 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_topk_logp, _ids: (T, K), id -1 is padding. Returns (T,), nats.

    Gradient: those of hidden (T, D), weight (V, D) and bias (V,) or None. upstream (u): (T,).
    """
    loss = _of_rows(reverse_form(), teacher_topk_logp, teacher_topk_ids, tail, temperature, _MIN_TAIL)
    return through_head(loss, hidden, weight, loss_mask, bias, softcap, logit_scale, vocab_size, upstream)


linear_topk_reverse_kl, linear_topk_reverse_kl_grad = pair(linear_topk_reverse_kl_and_grad)


def linear_topk_generalized_jsd_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    loss_mask: ArrayLike,
    tail: str,
    beta: float,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike | None = None,
) -> tuple[FloatArray, LinearGradients]:
    """`β KL(p || m) + (1-β) KL(q || m)` over S, and the tail, of `cap((W h + b) s)`; 0 where not trained.

    hidden: (T, D). weight: (V, D). teacher_topk_logp, _ids: (T, K), id -1 is padding. Returns (T,), nats.

    Gradient: those of hidden (T, D), weight (V, D) and bias (V,) or None. upstream (u): (T,).
    """
    loss = _of_rows(jsd_form(beta), teacher_topk_logp, teacher_topk_ids, tail, temperature)
    return through_head(loss, hidden, weight, loss_mask, bias, softcap, logit_scale, vocab_size, upstream)


linear_topk_generalized_jsd, linear_topk_generalized_jsd_grad = pair(linear_topk_generalized_jsd_and_grad)
