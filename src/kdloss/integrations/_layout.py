"""Padded (B, L) tensors as packed streams, means over whole sequences, and weights that mask the RL term."""

from __future__ import annotations

import torch
from torch import Tensor

import kdloss


def row_cu_seqlens(
    padded: Tensor,  # (B, L)
) -> Tensor:  # (B + 1,)
    """`cu_seqlens` of the flattened tensor, with one sequence per row."""
    rows, length = padded.shape
    return torch.arange(rows + 1, device=padded.device) * length


def sequence_means(
    x: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
) -> Tensor:  # (T,)
    """Each token gets the mean over the trained tokens of its sequence; differentiable.

    A per-token surrogate of the mean log-ratios against 0 is a surrogate of whole sequences, as in GSPO.
    """
    means = kdloss.segment_mean(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
    return kdloss.broadcast_to_tokens(means, cu_seqlens=cu_seqlens, total_tokens=x.shape[0])


def rl_weights(
    weights: Tensor | None,  # (T,)
    logp: Tensor,  # (T,)
    old_logp: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor | None,  # (B + 1,)
    trust_region: float | None,
    stale_sequences: float | None,
) -> Tensor | None:  # (T,)
    """`weights` of the RL term, or None for 1, with 0 at the tokens that the masks drop. Denominators do not change."""
    if trust_region is None and stale_sequences is None:
        return weights
    kept = loss_mask
    if trust_region is not None:
        kept = kept & kdloss.trust_region_mask(
            logp, old_logp, advantages, loss_mask=loss_mask, max_divergence=trust_region
        )
    if stale_sequences is not None:
        assert cu_seqlens is not None
        kept = kept & kdloss.stale_sequence_mask(
            logp, old_logp, advantages, loss_mask=loss_mask, cu_seqlens=cu_seqlens, max_divergence=stale_sequences
        )
    return kept.to(logp.dtype) if weights is None else torch.where(kept, weights, 0)


def per_token(
    number: float | None,
    like: Tensor,  # (T,)
) -> Tensor | None:  # (T,)
    """The number at every token; None stays None."""
    return None if number is None else torch.full_like(like, number, requires_grad=False)
