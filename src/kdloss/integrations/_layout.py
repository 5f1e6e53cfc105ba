"""Padded (B, L) tensors as packed streams, and means over whole sequences."""

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
