"""One block of rows of logits: its softmax state, and the gradient of log-probs and entropies, in few passes.

A row's distribution is read from four numbers that one pass over its logits gives, and that the parts of a row merge
into (vocabulary slices here, program splits in a kernel, shards of a head):

    z = softcap(logit_scale * x) / temperature
    m = max z,   s = sum_v e^(z_v - m),   u = sum_v (z_v - m) e^(z_v - m),   and z at the labels
    logp = (z_label - m) - log s,   entropy = log s - u / s,   p = e^(z - m) / s

Everything is relative to the maximum, so logits far off centre lose no digits: `logsumexp(z) - sum_v p_v z_v` would
subtract two numbers of the size of the offset.

    dz = sum_k g_k (onehot_k - p) - h p (log p + entropy),   log p + entropy = z - m - u / s

with g the gradient of the log-probs and h that of the entropy.

On a CPU `exp` is what a row costs. torch's fused softmax and the backward of its log-softmax take one `exp` a logit at
half the price of `torch.exp`, so both directions are written around them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """What stands between x, the product with the head, and z, the logits of the softmax."""

    softcap: float | None
    logit_scale: float
    temperature: float | Tensor  # one for all, or (n, 1) of the block's rows

    @property
    def is_identity(self) -> bool:
        return self.softcap is None and self.logit_scale == 1 and not isinstance(self.temperature, Tensor) and (
            self.temperature == 1
        )

    def of(self, index: slice | Tensor) -> Scaling:
        """For some of the rows."""
        if not isinstance(self.temperature, Tensor):
            return self
        return self._replace(temperature=self.temperature[index])

    def apply_(self, x: Tensor) -> Tensor:
        """x (n, V) -> z, in place."""
        if self.logit_scale != 1:
            x.mul_(self.logit_scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        if isinstance(self.temperature, Tensor) or self.temperature != 1:
            x.div_(self.temperature)
        return x

    def backward_(self, dz: Tensor, z: Tensor) -> Tensor:
        """dz (n, V) -> dx, in place. dtanh = 1 - tanh², and tanh is z * temperature / softcap. z is used up."""
        if self.softcap is not None:
            tanh = z.mul_(self.temperature).div_(self.softcap)
            dz.addcmul_(dz, tanh.square_(), value=-1)
        if self.logit_scale != 1:
            dz.mul_(self.logit_scale)
        if isinstance(self.temperature, Tensor) or self.temperature != 1:
            dz.div_(self.temperature)
        return dz


class RowState(NamedTuple):
    """(m, 1 / s, u / s) of each row, (n, 1). Of no mass at all, where every z is -inf: (-inf, inf, 0)."""

    maximum: Tensor
    peak: Tensor  # 1 / s, the probability of the largest logit: p = peak * e^(z - maximum)
    mean: Tensor | None  # u / s, the mean of z - m under p; None where no entropy is wanted

    @property
    def entropy(self) -> Tensor:
        assert self.mean is not None
        return -self.peak.log() - self.mean

    def merge(self, other: RowState) -> RowState:
        """The state of two parts of the same rows side by side: a e^(m - m') for each, m' the larger maximum."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for part in (self, other):
            shift = torch.where(part.maximum == -torch.inf, 0, part.maximum - maximum)
            mass = shift.exp() / part.peak
            total += mass
            if part.mean is not None:
                weighted += mass * (part.mean + shift)
        return RowState(maximum, total.reciprocal(), None if self.mean is None else weighted / total.clamp(min=1))


def empty_state(rows: int, *, like: Tensor, with_entropy: bool) -> RowState:
    """Of no logits at all: what merging starts from."""
    infinity = like.new_full((rows, 1), torch.inf)
    return RowState(-infinity, infinity, torch.zeros_like(infinity) if with_entropy else None)


def state_of(z: Tensor, p: Tensor, shifted: Tensor | None = None) -> RowState:
    """The state of z (n, V). p and shifted (n, V) are scratch; without `shifted`, which may be z, there is no u."""
    maximum = z.amax(-1, keepdim=True)
    empty = maximum == -torch.inf
    torch.softmax(z, -1, out=p)
    # torch divides by a sum whose rounding grows with V; all of p shares it, so dividing by their own sum removes it
    mass = p.sum(-1, keepdim=True)
    peak = (p.amax(-1, keepdim=True) / mass).masked_fill(empty, torch.inf)
    if shifted is None:
        return RowState(maximum, peak, None)
    # a logit of -inf has no mass: 0 * the lowest number is 0, where 0 * -inf would be NaN
    torch.sub(z, maximum, out=shifted).clamp_(min=torch.finfo(z.dtype).min)
    return RowState(maximum, peak, (p.mul_(shifted).sum(-1, keepdim=True) / mass).masked_fill(empty, 0))


class Upstream(NamedTuple):
    """The incoming gradient of a block's rows, and the labels that it comes through."""

    columns: Tensor  # (n, K) int64, each inside the block's columns; any column where logp is 0
    logp: Tensor  # (n, K), 0 where the label is ignored or in another part of the row
    total: Tensor  # (n, 1): the sum over all K labels of the row, those in other parts included
    entropy: Tensor | None  # (n, 1)

    @classmethod
    def of(cls, columns: Tensor, logp: Tensor) -> Upstream:
        """From labels (n, K), -100 where ignored, of whole rows."""
        ignored = columns < 0
        logp = logp.masked_fill(ignored, 0)
        return cls(columns.masked_fill(ignored, 0), logp, logp.sum(-1, keepdim=True), None)

    def part(self, start: int, stop: int) -> Upstream:
        """Seen from columns start .. stop of the vocabulary."""
        outside = (self.columns < start) | (self.columns >= stop)
        columns = (self.columns - start).masked_fill(outside, 0)
        return self._replace(columns=columns, logp=self.logp.masked_fill(outside, 0))


def gradient_of(z: Tensor, row: RowState, upstream: Upstream, *, out: Tensor, seeds: Tensor) -> Tensor:
    """dz (n, V) into `out`, which may be z. `seeds` (n, V) is 0 everywhere, and is left so.

    The backward of log-softmax is grad - e^output * sum(grad): a grad with one entry S a row gives -S e^output in one
    pass over the block, and the entry itself is repaired after it.
    """
    shifted = torch.sub(z, row.maximum, out=out)
    probability = shifted[:, :1].exp() * row.peak
    if upstream.entropy is None:
        factor = upstream.total
        seeds[:, :1] = factor * row.peak
        _negative_exp(shifted, seeds, out)
    else:
        seeds[:, :1] = row.peak
        negative = _negative_exp(shifted, seeds, torch.empty_like(shifted))
        # log p + entropy = (z - m) - u / s; e^-1e4 is 0 in any dtype, and -inf times that would be NaN
        slope = shifted.clamp_(min=-1e4).sub_(row.mean).mul_(upstream.entropy).add_(upstream.total)
        factor = slope[:, :1].clone()
        torch.mul(negative, slope, out=out)
    seeds[:, :1] = 0
    out[:, :1] = -factor * probability
    return out.scatter_add_(-1, upstream.columns, upstream.logp)


def _negative_exp(x: Tensor, seeds: Tensor, out: Tensor) -> Tensor:
    """-e^x times the one entry of each row of `seeds`, wrong at that entry."""
    return torch._log_softmax_backward_data(seeds, x, -1, x.dtype, out=out)  # type: ignore[no-any-return]
