"""Divergences of rows whose vocabulary is split across ranks: what ranks all-gather, and how it is merged.

With Q_r and P_r the masses of q and p in rank r's slice, and q_r and p_r the distributions inside it,

    KL(p || q) = sum_r P_r (KL(p_r || q_r) + log P_r / Q_r)

and likewise KL(q || p). So a KL takes one all-gather of 5 values per row: (m, log 1/s) of both sides, and the KL inside
the slice. The formula has only divergences in it, so no large numbers are subtracted.

A mixture m = ω p + (1-ω) q inside a slice depends on P_r and Q_r, which are known only after that all-gather. So the
JSD and the skewed KLs take a second pass and a second all-gather, of 2 values per row: the slice's part of the value
and of the sum of G (`rows.py`). No backward needs an all-gather.

torch's operations compute a slice from its softmax and its share of the mass. The kernels use no shares: they take
(m, log s) of whole rows, in their own unit (`_softmax/whole_rows.py`), and compute q and p of the row directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdloss._distributed.collectives import gather, ordered_sum
from kdloss._distributed.vocab_shard import VocabShard

from .rows import FORWARD_KL, REVERSE_KL


class WholeDivergence(NamedTuple):
    """A divergence of whole rows, and what the gradient of a slice needs from the other slices."""

    value: Tensor  # (R,)
    # (R, 2) log of the masses of q and p in this rank's slice; for the kernels (R, 4), (m, log s) twice
    row_state: Tensor
    slope: Tensor  # (R,) the sum of G


def whole_divergence(
    kind: str,
    state: Tensor,  # (R, 5) of `slice_state`
    terms: Callable[[Tensor], Tensor],  # row_state -> (R, 2) of `slice_terms`
    shard: VocabShard,
    rate: Tensor | None = None,  # () or (R,): 1 / temperature, if maxima are before the temperature, as for the kernels
) -> WholeDivergence:
    """The divergence of whole rows: the same on every rank, except for the masses of the rank's own slice."""
    states = gather(state, shard)
    log_q, *of_student = _log_shares(states[..., 0], states[..., 1], rate)
    log_p, *of_teacher = _log_shares(states[..., 2], states[..., 3], rate)
    fields = [log_q[shard.rank], log_p[shard.rank]] if rate is None else [*of_student, *of_teacher]
    row_state = torch.stack(fields, -1)
    if kind in (FORWARD_KL, REVERSE_KL):
        own, other = (log_p, log_q) if kind == FORWARD_KL else (log_q, log_p)
        # without mass on one side there is no divergence inside the slice: the masses alone give 0 or inf
        inside = states[..., 4].masked_fill((log_q == -torch.inf) | (log_p == -torch.inf), 0)
        of_slices = torch.where(own == -torch.inf, 0, own.exp() * (inside + own - other))
        value = of_slices.sum(0)
        slope = torch.where(value.isnan(), value, -1) if kind == FORWARD_KL else value
    else:
        value, slope = ordered_sum(terms(row_state), shard).unbind(-1)
    return WholeDivergence(value.clamp(min=0), row_state, slope)


def of_ranks(x: Tensor, shard: VocabShard | None) -> Tensor:
    """`x` of every rank, (ranks, *x.shape); of one rank without a shard."""
    return x.unsqueeze(0) if shard is None else gather(x, shard)


def log_softmax_of_slices(sides: list[Tensor], shard: VocabShard | None) -> list[Tensor]:
    """The columns of this rank of log softmax(z), for z (R, n) of each side. One collective for all sides."""
    if shard is None:
        return [z.log_softmax(-1) for z in sides]
    maxima = torch.stack([z.amax(-1) for z in sides])
    shifts = torch.where(maxima == -torch.inf, 0, maxima)
    sums = torch.stack([(z - m.unsqueeze(-1)).exp().sum(-1) for z, m in zip(sides, shifts, strict=True)])
    of_slices, log_sums = gather(torch.stack([maxima, sums.log()], -1), shard).unbind(-1)  # (ranks, sides, R)
    largest = of_slices.amax(0)
    log_sum = (of_slices - largest + log_sums).logsumexp(0)
    levels = zip(sides, largest.unsqueeze(-1), log_sum.unsqueeze(-1), strict=True)
    return [(z - m) - s for z, m, s in levels]


def _log_shares(maximum: Tensor, log_peak: Tensor, rate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log of each slice's mass (ranks, R), m (R,), log s (R,)), from max z and log max softmax inside the slices."""
    largest = maximum.amax(0)
    above = maximum - largest if rate is None else (maximum - largest) * rate
    log_mass = torch.where(maximum == -torch.inf, -torch.inf, above - log_peak)
    log_sum = log_mass.logsumexp(0)
    return log_mass - log_sum, largest, log_sum
