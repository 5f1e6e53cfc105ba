"""Discounted returns over a packed stream, as one operator: a segmented doubling scan.

After k rounds, returns[t] covers the 2^k positions from t on, and decay[t] is the discount across them:

    returns[t] += decay[t] * returns[t + 2^k],    decay[t] *= decay[t + 2^k]

The decay is 0 at the last token of a sequence, so nothing enters from the next one. Infinite and NaN rewards are
scanned apart from the finite ones, as counts: 0 * inf would be NaN in the sequence before. A round is two launches on
both, and there are ceil(log2 T) rounds. One operator for all of them keeps compiled graphs small, and the same for
every T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._softmax.operator import operator

# A count of rewards of inf is in units of this, one of -inf in units of 1; a NaN counts as both. Sums are exact in
# float64 up to this many of each.
_POSITIVE = 2.0**26


@operator("discounted_scan")
def discounted_scan(rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    """(T,) returns in the dtype for long sums. At an untrained token: the return of the next trained token.

    Args:
        rewards: (T,) rewards, of which those at untrained tokens are not read.
        loss_mask: (T,) bool.
        cu_seqlens: (B + 1,). Where it does not fit, the returns are of no use, and nothing is read out of bounds.
        discount: 0 .. 1.
    """
    total, dtype = rewards.shape[0], _checks.accumulator_dtype(rewards)
    spans = [2**k for k in range((total - 1).bit_length())] if total > 1 else []
    length = total + (spans[-1] if spans else 0)  # what is read past the end is 0
    finite, infinite = 0, 1  # the rows of each buffer
    buffers = rewards.new_zeros(4, 2, length + 1, dtype=dtype)
    returns, next_returns, decay, next_decay = buffers.unbind(0)

    decay.fill_(1)
    decay[finite, 1 : total + 1].masked_fill_(loss_mask, discount)
    # entry t + 1 is the decay of token t until here, so that every entry of cu_seqlens is the end of a sequence
    decay.index_fill_(1, cu_seqlens.clamp(0, total).to(torch.int64), 0)
    decay, next_decay = decay[:, 1:], next_decay[:, 1:]

    kept = torch.where(loss_mask, rewards.to(dtype), buffers.new_zeros(()))
    torch.nan_to_num(kept, 0.0, 0.0, 0.0, out=returns[finite, :total])
    rest = kept - returns[finite, :total]  # 0, or the reward where it is not finite
    torch.nan_to_num(rest, nan=_POSITIVE + 1, posinf=_POSITIVE, neginf=1.0, out=returns[infinite, :total])

    for span in spans:
        here, ahead = slice(0, total), slice(span, span + total)
        torch.addcmul(returns[:, here], decay[:, here], returns[:, ahead], out=next_returns[:, here])
        if span != spans[-1]:
            torch.mul(decay[:, here], decay[:, ahead], out=next_decay[:, here])
        returns, next_returns, decay, next_decay = next_returns, returns, next_decay, decay

    found, counts = returns[:, :total]
    negative = counts.fmod(_POSITIVE)
    positive = counts - negative
    # n / (n == 0) is inf, or 0 where n is 0
    result: Tensor = found - negative / (negative == 0) + positive / (positive == 0)
    return result


@discounted_scan.register_fake
def _(rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, discount: float) -> Tensor:
    return torch.empty_like(rewards, dtype=_checks.accumulator_dtype(rewards), memory_format=torch.contiguous_format)
