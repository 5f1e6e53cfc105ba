"""Oracles for the reductions of a per-token tensor to a scalar."""

from collections.abc import Iterable

import numpy as np

from .packing import segment_mean, segment_mean_grad
from .types import (
    ArrayLike,
    BoolArray,
    FloatArray,
    as_float,
    as_mask,
    scalar,
    segments,
    trained,
)


def _denominator(normalizer: ArrayLike | None, count: int) -> float:
    return float(count) if normalizer is None else float(as_float("normalizer", normalizer, shape=()))


def _divide(values: Iterable[float], denominator: float) -> FloatArray:
    return scalar(sum(values) / denominator if denominator != 0 else 0.0)


def token_mean(x: ArrayLike, *, loss_mask: ArrayLike, normalizer: ArrayLike | None = None) -> FloatArray:
    """`(sum of x_t over trained t) / N`, N = normalizer or the number of trained tokens; 0 where N = 0.

    x: (T,) float, or any shape. loss_mask: as x, bool. normalizer: 0-dim. Returns 0-dim.
    Source: DAPO, arXiv 2503.14476.
    """
    x = as_float("x", x)
    mask = as_mask("loss_mask", loss_mask, shape=x.shape)
    return _divide((float(x[t]) for t in trained(mask)), _denominator(normalizer, int(mask.sum())))


def token_mean_grad(x: ArrayLike, *, loss_mask: ArrayLike, normalizer: ArrayLike | None = None) -> FloatArray:
    """`d mean / dx_t = 1 / N` at trained tokens, 0 elsewhere and where N = 0.

    x: (T,), or any shape. loss_mask: as x, bool. normalizer: 0-dim. Returns x's shape.
    Source: derived from `token_mean`.
    """
    mask = as_mask("loss_mask", loss_mask, shape=np.shape(x))
    denominator = _denominator(normalizer, int(mask.sum()))
    return np.where(mask, 1 / denominator if denominator != 0 else 0.0, 0.0)


def _sequences_with_a_trained_token(mask: BoolArray, cu_seqlens: ArrayLike) -> int:
    return sum(any(mask[t] for t in tokens) for tokens in segments(cu_seqlens, mask.size))


def sequence_mean(
    x: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, normalizer: ArrayLike | None = None
) -> FloatArray:
    """`(sum over b of the mean of x over b's trained tokens) / N`; 0 where N = 0.

    N = normalizer or the number of sequences b with a trained token; a sequence without one adds 0.
    x: (T,) float. loss_mask: (T,) bool. cu_seqlens: (B+1,) int. normalizer: 0-dim. Returns 0-dim.
    Source: GRPO, arXiv 2402.03300, equation 3.
    """
    mask = as_mask("loss_mask", loss_mask, shape=np.shape(x))
    means = segment_mean(x, loss_mask=mask, cu_seqlens=cu_seqlens)
    return _divide(map(float, means), _denominator(normalizer, _sequences_with_a_trained_token(mask, cu_seqlens)))


def sequence_mean_grad(
    x: ArrayLike, *, loss_mask: ArrayLike, cu_seqlens: ArrayLike, normalizer: ArrayLike | None = None
) -> FloatArray:
    """`d mean / dx_t = 1 / (n_b N)` at the n_b trained tokens of sequence b, 0 elsewhere and where N = 0.

    x: (T,). loss_mask: (T,) bool. cu_seqlens: (B+1,). normalizer: 0-dim. Returns (T,).
    Source: derived from `sequence_mean`.
    """
    mask = as_mask("loss_mask", loss_mask, shape=np.shape(x))
    denominator = _denominator(normalizer, _sequences_with_a_trained_token(mask, cu_seqlens))
    upstream = np.full(len(segments(cu_seqlens, mask.size)), 1 / denominator if denominator != 0 else 0.0)
    return segment_mean_grad(np.zeros(mask.shape), loss_mask=mask, cu_seqlens=cu_seqlens, upstream=upstream)


def global_token_count(loss_mask: ArrayLike) -> int:
    """`n = the number of trained tokens`, where there is one rank.

    loss_mask: any shape, bool. Source: design.md section 4.
    """
    mask = np.asarray(loss_mask)
    return sum(1 for _ in trained(as_mask("loss_mask", mask, shape=mask.shape)))


def global_sequence_count(loss_mask: ArrayLike, *, cu_seqlens: ArrayLike) -> int:
    """`n = the number of sequences b with a trained token`, where there is one rank.

    loss_mask: (T,) bool. cu_seqlens: (B+1,) int. Source: design.md section 4.
    """
    flat = np.asarray(loss_mask)
    mask = as_mask("loss_mask", flat, shape=flat.shape)
    return _sequences_with_a_trained_token(mask, cu_seqlens)
