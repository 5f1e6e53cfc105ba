"""Oracles for divergences from K log-probs a token, row by row: outcomes are listed, the chain rule written out.

"bucket": the ids of S and one outcome for all others. "renormalize": S, masses divided by those of S. "truncate": S, as
they are. Outcome o has slope s_o in log q_o (see `_reference_divergences`), and dF/dx_j = sum_o s_o d log q_o/dx_j.
"""

import numpy as np

from .divergences import (
    Slope,
    Value,
    distribution,
    forward_form,
    jsd_form,
    reverse_form,
)
from .types import ArrayLike, FloatArray, as_float, as_int

# A tail below this is what rounding left: 0 as a numerator, this as a denominator (float64).
LEAST_TAIL = 8 * 2.0**-52


def _row(
    form: tuple[Value, Slope], tail: str, x: FloatArray, logp: FloatArray, ids: list[int], tau: float, floor: float
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
        p, q = np.append(p, floor if left < LEAST_TAIL else left), np.append(q, rest)
        share = np.where(others, q_all, 0) / (rest if rest > 0 else 1)
        jacobian = np.vstack([jacobian, share - q_all])
    gradient: FloatArray = form[1](p, q) @ jacobian / tau
    return form[0](p, q), gradient


def _topk(
    form: tuple[Value, Slope],
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


def topk_forward_kl(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> FloatArray:
    """`sum_S p log(p/q)` and the tail. logits: (..., V). teacher_topk_logp, _ids: (..., K), id -1 is padding."""
    return _topk(forward_form(), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, None)[0]


def topk_forward_kl_grad(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """(..., V). upstream: (...,)."""
    return _topk(forward_form(), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, upstream)[
        1
    ]


def topk_reverse_kl(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> FloatArray:
    """`sum_S q log(q/p)` and the tail. logits: (..., V). teacher_topk_logp, _ids: (..., K), id -1 is padding."""
    return _topk(
        reverse_form(), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, None, LEAST_TAIL
    )[0]


def topk_reverse_kl_grad(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """(..., V). upstream: (...,)."""
    return _topk(
        reverse_form(), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, upstream, LEAST_TAIL
    )[1]


def topk_generalized_jsd(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    beta: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> FloatArray:
    """`β KL(p || m) + (1-β) KL(q || m)` over S, and the tail. logits: (..., V). teacher_topk_logp, _ids: (..., K)."""
    return _topk(jsd_form(beta), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, None)[0]


def topk_generalized_jsd_grad(
    logits: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    tail: str,
    beta: float,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
    upstream: ArrayLike,
) -> FloatArray:
    """(..., V). upstream: (...,)."""
    return _topk(jsd_form(beta), logits, teacher_topk_logp, teacher_topk_ids, tail, temperature, vocab_size, upstream)[
        1
    ]
