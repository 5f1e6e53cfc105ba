"""Divergences of rows whose vocabulary is split across ranks: what ranks tell each other, and what is made of it.

With Q_r and P_r the mass that q and p have in rank r's slice, and q_r, p_r the distributions inside it,

    KL(p || q) = sum_r P_r (KL(p_r || q_r) + log P_r / Q_r)

and the other way round, so that a KL takes one all-gather of 5 numbers a row: both sides' (m, log 1/s) and the KL
inside the slice. Everything in it is a divergence, so nothing large is subtracted.

A mixture m = ω p + (1-ω) q inside a slice hangs on P_r and Q_r, which are known after that all-gather. So the JSD and
the skewed KLs take a second pass and a second all-gather, of 2 numbers: the slice's terms of the value and of the
gradient's normalisation. No backward needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._distributed import VocabShard, gather, ordered_sum
from ._divergence_rows import FORWARD_KL, REVERSE_KL


class WholeRows(NamedTuple):
    """A divergence of whole rows, and what a slice's gradient needs to know of the other slices."""

    value: Tensor  # (R,)
    shares: Tensor  # (R, 2) log of the mass that q and p have in this rank's slice
    slope: Tensor  # (R,) the sum of G


def whole_divergence(
    kind: str,
    state: Tensor,  # (R, 5) of `slice_state`
    terms: Callable[[Tensor], Tensor],  # shares (R, 2) -> (R, 2), as `slice_terms`
    shard: VocabShard,
) -> WholeRows:
    """The same on every rank but for the shares, which are each rank's own."""
    states = gather(state, shard)
    log_q, log_p = _log_shares(states[..., 0], states[..., 1]), _log_shares(states[..., 2], states[..., 3])
    shares = torch.stack([log_q[shard.rank], log_p[shard.rank]], -1)
    if kind in (FORWARD_KL, REVERSE_KL):
        own, other = (log_p, log_q) if kind == FORWARD_KL else (log_q, log_p)
        # a slice without mass on either side has no divergence inside: the masses themselves say 0 or inf
        inside = states[..., 4].masked_fill((log_q == -torch.inf) | (log_p == -torch.inf), 0)
        of_slices = torch.where(own == -torch.inf, 0, own.exp() * (inside + own - other))
        slope = of_slices.sum(0)
        value = slope
    else:
        value, slope = ordered_sum(terms(shares), shard).unbind(-1)
    return WholeRows(value.clamp(min=0), shares, slope)


def _log_shares(maximum: Tensor, log_peak: Tensor) -> Tensor:
    """(ranks, R): the log of each slice's mass, from max z and log max softmax inside the slices."""
    above = maximum - maximum.amax(0)
    log_mass = torch.where(maximum == -torch.inf, -torch.inf, above - log_peak)
    return log_mass - log_mass.logsumexp(0)
