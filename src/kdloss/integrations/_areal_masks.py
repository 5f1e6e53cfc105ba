"""Tokens that AReaL drops or reweights before its loss: M2PO's mask, and `rejection_sampling` of stale samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdloss

_METRICS = {"ratio": kdloss.kl_k1, "kl_k1": kdloss.kl_k1, "kl_k2": kdloss.kl_k2, "kl_k3": kdloss.kl_k3}


class Rejection(NamedTuple):
    """What `reject` returns."""

    kept: Tensor  # (T,) bool: trained and not rejected
    weights: Tensor  # (T,) behaviour weights prox/old, bounded; 0 where not kept
    fraction: Tensor  # () fraction of the trained tokens that were rejected or clamped


def m2po_mask(prox_logp: Tensor, old_logp: Tensor, loss_mask: Tensor, threshold: float) -> Tensor:
    """M2PO: drop the largest squared log-ratios until the mean of the rest is below `threshold`; keep at least one."""
    squared = kdloss.kl_k1(prox_logp, old_logp, loss_mask=loss_mask).square()
    ordered, index = torch.where(loss_mask, squared, -1).sort(descending=True)  # untrained tokens come last
    trained = ordered >= 0
    total = torch.where(trained, ordered, 0).flip(0).cumsum(0).flip(0)
    count = trained.flip(0).cumsum(0).flip(0)
    kept = trained & ((total < threshold * count) | (count == 1))
    return torch.zeros_like(loss_mask).scatter(0, index, kept)


def reject(
    prox_logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    trained: Tensor,  # (T,) bool
    config: Any,
    cu_seqlens: Callable[[], Tensor],
) -> Rejection:
    """Reject tokens or sequences that are too far from the policy that sampled them; weights prox/old for the rest.

    Args:
        config: AReaL's `RejectionSamplingConfig`.
        cu_seqlens: called at `level="sequence"` only, because a slice of a sequence has no `cu_seqlens`.
    """
    metric = _METRICS[config.metric](prox_logp, old_logp, loss_mask=trained)
    log_weights = kdloss.kl_k1(prox_logp, old_logp, loss_mask=trained)
    if config.level == "sequence":
        metric = _aggregate(metric, config.agg, trained, cu_seqlens())
        if config.metric == "ratio":
            log_weights = _aggregate(log_weights, "mean", trained, cu_seqlens())
    if config.metric == "ratio":
        metric = metric.exp()
    outside = metric > config.upper
    if config.lower is not None:
        outside = outside | (metric < config.lower)
    raw = log_weights.exp()
    if config.action == "clamp":
        weights = torch.where(outside, raw.clamp(config.lower or 0.0, config.upper), raw)
        kept, touched = trained, trained & (weights != raw)
    else:
        weights = torch.where(outside, 0, raw)
        kept, touched = trained & ~outside, trained & outside
    return Rejection(kept, torch.where(kept, weights, 0), touched.sum() / trained.sum().clamp(min=1))


def _aggregate(x: Tensor, how: str, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum, mean or maximum over the trained tokens of each sequence, repeated at each of its tokens."""
    if how == "max":
        ids = kdloss.segment_ids(cu_seqlens, total_tokens=x.shape[0])
        smallest = x.new_full((cu_seqlens.shape[0] - 1,), -torch.inf)
        # -inf for a sequence without trained tokens; it is never read
        aggregated = smallest.scatter_reduce(0, ids, torch.where(loss_mask, x, -torch.inf), "amax")
    else:
        reduce = {"sum": kdloss.segment_sum, "mean": kdloss.segment_mean}[how]
        aggregated = reduce(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
    return kdloss.broadcast_to_tokens(aggregated, cu_seqlens=cu_seqlens, total_tokens=x.shape[0])
