"""From parts of rows to whole rows: the one all-gather that stands between a kernel and what is computed from it.

Each rank knows its part of a row by the state that `rows.py` reads off it, (m, 1 / s, u / s), and the log-probs of
labels under the part alone. With all parts' states the row's own is a merge, and a log-prob is moved from the part to
the row:

    M = max m_part,   log q = (z - m_part) + (m_part - M) - log S

The kernels' m is in another unit, that of logits before the temperature, and all else in that of z (`_row_math.py`):
there the differences m_part - M are taken first and divided then, so that no digit of them is lost, and M stays in the
unit that it came in, which is what the backward takes.

3 + K numbers of float32 a row go around, or 2 + K without an entropy. Every rank merges them in rank order, so all of
them hold the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdloss._distributed.collectives import gather
from kdloss._distributed.vocab_shard import VocabShard

from .rows import RowState


def whole_rows(
    state: RowState,  # of this rank's part
    logp: Tensor,  # (n, K) of the labels that are in the part, under it; anything for others
    columns: Tensor,  # (n, K) labels, as columns of the whole vocabulary; -100 is ignored
    shard: VocabShard,
    rate: Tensor | None = None,  # () or (n,): 1 / temperature, where `maximum` is before it
) -> tuple[RowState, Tensor]:
    """The state of whole rows, and their log-probs (n, K), 0 where the label is ignored. One collective."""
    # (-inf - -inf) of a part without mass is NaN, and a label in it has a logit of -inf
    relative = torch.where(state.peak == torch.inf, -torch.inf, logp - state.peak.log())
    fields = [x for x in state if x is not None]
    parts = gather(torch.cat([*fields, relative], -1), shard).split([1] * len(fields) + [relative.shape[-1]], -1)
    maximum = parts[0].amax(0)
    above = torch.where(parts[1] == torch.inf, -torch.inf, parts[0] - maximum)
    above = above if rate is None else above * rate.view(-1, 1)
    numbers = (x.unbind(0) for x in (above, *parts[1:-1]))
    of_ranks = [RowState(*x, *[None] * (3 - len(x))) for x in zip(*numbers, strict=True)]
    whole = of_ranks[0]
    for part in of_ranks[1:]:
        whole = whole.merge(part)
    shifted = torch.zeros_like(relative)
    for (start, stop), part, moved in zip(shard.bounds, of_ranks, parts[-1].unbind(0), strict=True):
        own = (columns >= start) & (columns < stop)
        shifted = torch.where(own, moved + (part.maximum - whole.maximum), shifted)
    return whole._replace(maximum=maximum), (shifted + whole.peak.log()).masked_fill(columns < 0, 0)


def rate_of(temperature: float, row_temperature: Tensor | None, like: Tensor) -> Tensor:
    """() or (n,): 1 / temperature in float32, as the kernels have it."""
    if row_temperature is not None:
        return row_temperature.float().reciprocal()
    return torch.full((), temperature, dtype=torch.float32, device=like.device).reciprocal()
