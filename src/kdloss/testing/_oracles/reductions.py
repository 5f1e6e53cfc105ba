"""Oracles for the reductions of a per-token tensor to a scalar."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .packing import segment_mean, segment_mean_grad
from .pairs import pair
from .types import ArrayLike, BoolArray, FloatArray, as_float, as_mask, scalar, segments, trained


def _denominator(normalizer: ArrayLike | None, count: int) -> float:
    return float(count) if normalizer is None else float(as_float("normalizer", normalizer, shape=()))


def _divide(values: Iterable[float], denominator: float) -> FloatArray:
    return scalar(sum(values) / denominator if denominator != 0 else 0.0)


def token_mean_and_grad(
    x: ArrayLike, *, loss_mask: ArrayLike, normalizer: ArrayLike | None = None
) -> tuple[FloatArray, FloatArray]:
    """`(sum of x_t over trained t) / N`, N = normalizer or the number of trained tokens; 0 where N = 0.

    x: (T,) float, or any shape. loss_mask: x's shape, bool. normalizer: 0-dim. Returns 0-dim.
    Source: DAPO, arXiv 2503.14476.

    Gradient: `d mean / dx_t = 1 / N` at trained tokens, 0 elsewhere and where N = 0.

    x: (T,), or any shape. loss_mask: x's shape, bool. normalizer: 0-dim. Returns x's shape.
    Source: derived from `token_mean`.
    """
    x = as_float("x", x)
    mask = as_mask("loss_mask", loss_mask, shape=x.shape)
    n = _denominator(normalizer, int(mask.sum()))
    return _divide((float(x[t]) for t in trained(mask)), n), np.where(mask, 1 / n if n != 0 else 0.0, 0.0)


token_mean, token_mean_grad = pair(token_mean_and_grad)


def _sequences_with_a_trained_token(mask: BoolArray, cu_seqlens: ArrayLike) -> int:
    return sum(any(mask[t] for t in tokens) for tokens in segments(cu_seqlens, mask.size))


def sequence_mean_and_grad(
    x: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, normalizer: ArrayLike | None = None
) -> tuple[FloatArray, FloatArray]:
    """`(sum over b of the mean of x over b's trained tokens) / N`; 0 where N = 0.

    N = normalizer or the number of sequences b with a trained token; a sequence without one adds 0.
    x: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. normalizer: 0-dim. Returns 0-dim.
    Source: GRPO, arXiv 2402.03300, equation 3.

    Gradient: `d mean / dx_t = 1 / (n_b N)` at the n_b trained tokens of sequence b, 0 elsewhere and where N = 0.

    x: (T,). loss_mask: (T,) bool. cu_seqlens: (B+1,). normalizer: 0-dim. Returns (T,).
    Source: derived from `sequence_mean`.
    """
    mask = as_mask("loss_mask", loss_mask, shape=np.shape(x))
    means = segment_mean(x, loss_mask=mask, cu_seqlens=cu_seqlens)
    n = _denominator(normalizer, _sequences_with_a_trained_token(mask, cu_seqlens))
    upstream = np.full(means.shape, 1 / n if n != 0 else 0.0)
    grad = segment_mean_grad(x, loss_mask=mask, cu_seqlens=cu_seqlens, upstream=upstream)
    return _divide(map(float, means), n), grad


sequence_mean, sequence_mean_grad = pair(sequence_mean_and_grad)


def global_token_count(loss_mask: ArrayLike) -> int:
    """`n = the number of trained tokens`, on a single rank.

    loss_mask: any shape, bool.
    """
    mask = np.asarray(loss_mask)
    return sum(1 for _ in trained(as_mask("loss_mask", mask, shape=mask.shape)))


def global_sequence_count(loss_mask: ArrayLike, *, cu_seqlens: ArrayLike) -> int:
    """`n = the number of sequences b with a trained token`, on a single rank.

    loss_mask: (T,) bool. cu_seqlens: (B+1,) int.
    """
    flat = np.asarray(loss_mask)
    mask = as_mask("loss_mask", flat, shape=flat.shape)
    return _sequences_with_a_trained_token(mask, cu_seqlens)
