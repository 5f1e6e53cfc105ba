"""Divergences of rows whose vocabulary is split across ranks: what ranks tell each other, and what is made of it.

With Q_r and P_r the mass that q and p have in rank r's slice, and q_r, p_r the distributions inside it,

    KL(p || q) = sum_r P_r (KL(p_r || q_r) + log P_r / Q_r)

and the other way round, so that a KL takes one all-gather of 5 numbers a row: both sides' (m, log 1/s) and the KL
inside the slice. Everything in it is a divergence, so nothing large is subtracted.

A mixture m = ω p + (1-ω) q inside a slice hangs on P_r and Q_r, which are known after that all-gather. So the JSD and
the skewed KLs take a second pass and a second all-gather, of 2 numbers: the slice's terms of the value and of the
gradient's normalisation. No backward needs one.

torch's operations know a slice by its softmax and its share of the mass. The kernels know no shares: they are handed
(m, log s) of the whole rows, in their own unit (`_softmax/whole_rows.py`), and see q and p as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdloss._distributed.collectives import gather, ordered_sum
from kdloss._distributed.vocab_shard import VocabShard

from .rows import FORWARD_KL, REVERSE_KL


class WholeRows(NamedTuple):
    """A divergence of whole rows, and what a slice's gradient needs to know of the other slices."""

    value: Tensor  # (R,)
    known: Tensor  # (R, 2) log of the mass that q and p have in this rank's slice; (R, 4) for the kernels
    slope: Tensor  # (R,) the sum of G


def whole_divergence(
    kind: str,
    state: Tensor,  # (R, 5) of `slice_state`
    terms: Callable[[Tensor], Tensor],  # what is known -> (R, 2), as `slice_terms`
    shard: VocabShard,
    rate: Tensor | None = None,  # () or (R,): 1 / temperature, where maxima are before it, as the kernels'
) -> WholeRows:
    """The same on every rank but for the shares, which are each rank's own."""
    states = gather(state, shard)
    log_q, *of_student = _log_shares(states[..., 0], states[..., 1], rate)
    log_p, *of_teacher = _log_shares(states[..., 2], states[..., 3], rate)
    known = [log_q[shard.rank], log_p[shard.rank]] if rate is None else [*of_student, *of_teacher]
    numbers = torch.stack(known, -1)
    if kind in (FORWARD_KL, REVERSE_KL):
        own, other = (log_p, log_q) if kind == FORWARD_KL else (log_q, log_p)
        # a slice without mass on either side has no divergence inside: the masses themselves say 0 or inf
        inside = states[..., 4].masked_fill((log_q == -torch.inf) | (log_p == -torch.inf), 0)
        of_slices = torch.where(own == -torch.inf, 0, own.exp() * (inside + own - other))
        value = of_slices.sum(0)
        slope = torch.where(value.isnan(), value, -1) if kind == FORWARD_KL else value
    else:
        value, slope = ordered_sum(terms(numbers), shard).unbind(-1)
    return WholeRows(value.clamp(min=0), numbers, slope)


def _log_shares(maximum: Tensor, log_peak: Tensor, rate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The log of each slice's mass (ranks, R), from max z and log max softmax inside the slices; (m, log s) (R,)."""
    largest = maximum.amax(0)
    above = maximum - largest if rate is None else (maximum - largest) * rate
    log_mass = torch.where(maximum == -torch.inf, -torch.inf, above - log_peak)
    log_sum = log_mass.logsumexp(0)
    return log_mass - log_sum, largest, log_sum
