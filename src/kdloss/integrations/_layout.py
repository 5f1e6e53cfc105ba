"""Padded (B, L) tensors as packed streams, and ratios of whole sequences in either."""

from __future__ import annotations

import torch
from torch import Tensor

import kdloss


def row_cu_seqlens(
    padded: Tensor,  # (B, L)
) -> Tensor:  # (B + 1,)
    """The rows as sequences of the flat stream."""
    rows, length = padded.shape
    return torch.arange(rows + 1, device=padded.device) * length


def sequence_means(
    x: Tensor,  # (T,)
    *,
    loss_mask: Tensor,  # (T,) bool
    cu_seqlens: Tensor,  # (B + 1,)
) -> Tensor:  # (T,)
    """Every token gets the mean over the trained tokens of its sequence; differentiable.

    Of log-ratios this makes any per-token surrogate, its ratio then against 0, one of whole sequences, as GSPO is.
    """
    means = kdloss.segment_mean(x, loss_mask=loss_mask, cu_seqlens=cu_seqlens)
    return kdloss.broadcast_to_tokens(means, cu_seqlens=cu_seqlens, total_tokens=x.shape[0])
