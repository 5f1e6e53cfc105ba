"""Oracles for diagnostics and schedules: statistics of the trained tokens, the distillation weight by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .divergences import distribution
from .types import ArrayLike, FloatArray, as_float, as_int, as_mask, exp, scalar, trained


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def diagnostics(
    logp: ArrayLike,
    old_logp: ArrayLike | None,
    *,
    loss_mask: ArrayLike,
    teacher_logp: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
) -> dict[str, FloatArray]:
    """Statistics over the N trained tokens, `ρ = exp(logp - old_logp)`; all 0 if N = 0.

    tokens: N. ratio_mean, ratio_min, ratio_max: of ρ. approx_kl: `mean(ρ - 1 - log ρ)`. effective_sample_size:
    `(sum ρ)² / (N sum ρ²)`. logp, old_logp, entropy: means. teacher_logp: the mean of its values above -9984.
    reverse_kl: `mean(logp - teacher_logp)`. teacher_neg_inf: the number of teacher_logp <= -9984. entropy and the last
    three are reported only if their argument is given.
    logp, old_logp, teacher_logp, entropy: (T,) float. loss_mask: (T,) bool. Returns a dict of 0-dim arrays.
    Source: approx_kl: Schulman, Approximating KL Divergence, 2020; effective sample size: Kish, Survey Sampling, 1965.
    """
    q = as_float("logp", logp)
    mask = as_mask("loss_mask", loss_mask, shape=q.shape)
    tokens = list(trained(mask))

    def values(name: str, x: ArrayLike) -> list[float]:
        array = as_float(name, x, shape=q.shape)
        return [float(array[t]) for t in tokens]

    new = values("logp", q)
    old = new if old_logp is None else values("old_logp", old_logp)
    log_ratios = [0.0 if old_logp is None else a - b for a, b in zip(new, old, strict=True)]
    ratios = [exp(x) for x in log_ratios]
    # the effective sample size does not depend on the scale of ρ, so the largest ρ is scaled to 1
    scaled = [exp(x - max(log_ratios)) for x in log_ratios]
    effective = sum(scaled) ** 2 / (len(scaled) * sum(r * r for r in scaled)) if scaled else 0.0
    result = {
        "tokens": float(len(tokens)),
        "ratio_mean": _mean(ratios),
        "ratio_min": min(ratios, default=0.0),
        "ratio_max": max(ratios, default=0.0),
        "approx_kl": _mean([r - 1 - x for r, x in zip(ratios, log_ratios, strict=True)]),
        "effective_sample_size": effective,
        "logp": _mean(new),
        "old_logp": _mean(old),
    }
    if teacher_logp is not None:
        teacher = values("teacher_logp", teacher_logp)
        result["teacher_logp"] = _mean([p for p in teacher if not p <= -9984])
        result["reverse_kl"] = _mean([a - p for a, p in zip(new, teacher, strict=True)])
        result["teacher_neg_inf"] = float(sum(p <= -9984 for p in teacher))
    if entropy is not None:
        result["entropy"] = _mean(values("entropy", entropy))
    return {name: scalar(value) for name, value in result.items()}


def topk_diagnostics(
    logits: ArrayLike,
    labels: ArrayLike,
    teacher_topk_logp: ArrayLike,
    teacher_topk_ids: ArrayLike,
    *,
    loss_mask: ArrayLike,
    temperature: ArrayLike = 1.0,
    vocab_size: int | None = None,
) -> dict[str, FloatArray]:
    """Means over the trained rows with an id, S the ids of a row: `sum_S p`, `sum_S q`, shares of S and of samples.

    tokens: trained rows. scored: those with an id. overlap: the share of S whose logit is no smaller than the |S|-th
    largest, and not -inf. sampled_inside: the share of the labels of a row, -100 left out, that are in S.
    logits: (..., V). labels: (...,) or (..., M). teacher_topk_logp, _ids: (..., K), id -1 is padding. loss_mask: (...,)
    bool. Returns a dict of 0-dim arrays, 0 where nothing is scored.
    """
    x = as_float("logits", logits)
    lead, size = x.shape[:-1], x.shape[-1] if vocab_size is None else vocab_size
    y = as_int("labels", labels).reshape(*lead, -1)
    ids = as_int("teacher_topk_ids", teacher_topk_ids)
    log_p = as_float("teacher_topk_logp", teacher_topk_logp, shape=ids.shape)
    mask = as_mask("loss_mask", loss_mask, shape=lead)
    tau = np.broadcast_to(as_float("temperature", temperature), lead)
    columns: dict[str, list[float]] = {"teacher_mass": [], "student_mass": [], "overlap": [], "sampled_inside": []}
    for row in trained(mask):
        support = {int(v): float(log_p[row][k]) for k, v in enumerate(ids[row]) if v != -1}
        if not support:
            continue
        z = x[row][:size]
        q, least = distribution(z, float(tau[row])), sorted(z)[-len(support)]
        drawn = [int(label) for label in y[row] if label != -100]
        columns["teacher_mass"].append(sum(exp(p) for p in support.values()))
        columns["student_mass"].append(sum(float(q[v]) for v in support))
        columns["overlap"].append(_mean([float(-math.inf < z[v] and z[v] >= least) for v in support]))
        columns["sampled_inside"].append(_mean([float(label in support) for label in drawn]))
    counts = {"tokens": float(mask.sum()), "scored": float(len(columns["overlap"]))}
    means = {name: _mean(values) for name, values in columns.items()}
    return {name: scalar(value) for name, value in (counts | means).items()}


def constant(step: int, *, value: float) -> float:
    """`w(step) = value`.

    step: optimizer steps done. Source: KDRL, arXiv 2506.02208, a fixed distillation weight.
    """
    return value


def linear_floor(step: int, *, start: float = 5e-3, slope: float = 5e-5, floor: float = 1e-3) -> float:
    """`w(step) = max(start - slope * step, floor)`.

    step: optimizer steps done. slope: decrease per step. Source: KDRL, arXiv 2506.02208, annealed distillation weight.
    """
    return max(start - slope * step, floor)


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """`w(step) = end + ½ (start - end) (1 + cos(π step / total_steps))`, `end` from total_steps on.

    step, total_steps: optimizer steps. Source: SGDR, arXiv 1608.03983, equation 5.
    """
    if step >= total_steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def switch(step: int, *, before: float, after: float, at: int) -> float:
    """`w(step) = before` for step < at, else `after`.

    step, at: optimizer steps.
    """
    return before if step < at else after
