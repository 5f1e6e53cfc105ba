"""Merge the parts of rows that ranks hold into whole rows, by one all-gather after the operator.

Each rank has the state (m, 1 / s, u / s) of its part of a row (`rows.py`), and log-probs of labels relative to that
part. Merging the states of all parts gives the state of the row, and a log-prob is moved from the part to the row:

    M = max m_part,   log q = (z - m_part) + (m_part - M) - log S

The kernels keep m in another unit, that of logits before the temperature; all else is in the unit of z
(`_triton/_row_math.py`). There the differences m_part - M are taken first and divided by the temperature afterwards, so
that they lose no digit, and M keeps its unit, which the backward expects.

Each rank all-gathers 3 + K values per row, or 2 + K without an entropy: float32, or float64 for float64 inputs. Results
are merged in rank order, so all ranks hold the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdloss._distributed.collectives import gather
from kdloss._distributed.vocab_shard import VocabShard

from .rows import RowState


def whole_rows(
    state: RowState,  # of this rank's part
    logp: Tensor,  # (n, K) relative to this part; undefined for labels in other parts
    columns: Tensor,  # (n, K) labels as columns of the whole vocabulary, -100 ignored
    shard: VocabShard,
    rate: Tensor | None = None,  # () or (n,): 1 / temperature, if `state.maximum` is before the temperature
) -> tuple[RowState, Tensor]:
    """The state of whole rows, and log-probs (n, K) of the labels, 0 where ignored. One collective."""
    # a part without mass would give -inf - -inf = NaN; the logit of a label in it is -inf
    relative = torch.where(state.peak == torch.inf, -torch.inf, logp - state.peak.log())
    fields = [x for x in state if x is not None]
    parts = gather(torch.cat([*fields, relative], -1), shard).split([1] * len(fields) + [relative.shape[-1]], -1)
    maximum = parts[0].amax(0)
    above = torch.where(parts[1] == torch.inf, -torch.inf, parts[0] - maximum)
    above = above if rate is None else above * rate.view(-1, 1)
    per_field = (x.unbind(0) for x in (above, *parts[1:-1]))
    of_ranks = [RowState(*x, *[None] * (3 - len(x))) for x in zip(*per_field, strict=True)]
    whole = of_ranks[0]
    for part in of_ranks[1:]:
        whole = whole.merge(part)
    shifted = torch.zeros_like(relative)
    for (start, stop), part, moved in zip(shard.bounds, of_ranks, parts[-1].unbind(0), strict=True):
        own = (columns >= start) & (columns < stop)
        shifted = torch.where(own, moved + (part.maximum - whole.maximum), shifted)
    return RowState(maximum, whole.peak, whole.mean), (shifted + whole.peak.log()).masked_fill(columns < 0, 0)


def rate_of(temperature: float, row_temperature: Tensor | None, like: Tensor) -> Tensor:
    """1 / temperature in float32, as the kernels compute it: () for all rows, or (n,), one value per row."""
    if row_temperature is not None:
        return row_temperature.float().reciprocal()
    return torch.full((), temperature, dtype=torch.float32, device=like.device).reciprocal()
