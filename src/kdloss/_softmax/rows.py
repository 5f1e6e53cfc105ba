"""One block of rows of logits: its softmax state, and the gradient of log-probs and entropies, in few passes.

The distribution of a row follows from four values that one pass over its logits gives. The values of parts of a row
(vocabulary slices here, program splits in a kernel, shards of a head) merge into those of the row:

    z = softcap(logit_scale * x) / temperature
    s = sum_v e^(z_v - m),   u = sum_v (z_v - m) e^(z_v - m),   m of the row,   and z at the labels
    logp = (z_label - m) - log s,   entropy = log s - u / s,   p = e^(z - m) / s

m is the maximum of z, or its log-sum-exp rounded to float32. Everything is relative to it, so logits far from 0 lose
no digits: `logsumexp(z) - sum_v p_v z_v` would subtract two numbers as large as the offset.

    dz = sum_k g_k (onehot_k - p) - h p (log p + entropy),   log p + entropy = z - m - u / s

where g is the gradient of the log-probs and h that of the entropy.

On a CPU, each pass over a block costs about as much as its `exp`. So a pass is left out where that is safe: if the sum
of e^z has neither overflowed nor lost its largest terms, it is all that a forward needs, and in the backward
e^(z - m) = e^z e^-m needs no pass for the subtraction (`Upstream.unshifted`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def flat_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors (..., n) of one leading shape as (rows, n) views, in order; one view each if the strides allow it.

    Nothing is copied: `logits[:, :-1]` of (B, L, V), a common input from trainers, gives B views.
    """
    try:
        flat = tuple(x.view(-1, x.shape[-1]) for x in tensors)
    except RuntimeError:  # a copy would cost as much as the logits
        for parts in zip(*(x.unbind(0) for x in tensors), strict=True):
            yield from flat_rows(*parts)
    else:
        yield flat


class Scaling(NamedTuple):
    """The map from x, the product with the head, to z, the logits of the softmax."""

    softcap: float | None
    logit_scale: float
    temperature: float | Tensor  # of all rows, or (n, 1), one value per row

    @property
    def is_identity(self) -> bool:
        return (
            self.softcap is None
            and self.logit_scale == 1
            and not isinstance(self.temperature, Tensor)
            and self.temperature == 1
        )

    def split(self, sizes: list[int]) -> list[Scaling]:
        """The scaling of each of consecutive groups of rows."""
        if not isinstance(self.temperature, Tensor):
            return [self] * len(sizes)
        return [self._replace(temperature=part) for part in self.temperature.split(sizes)]

    def at(self, rows: slice) -> Scaling:
        return self._replace(temperature=self.temperature[rows]) if isinstance(self.temperature, Tensor) else self

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
        """dz (n, V) -> dx, in place. tanh' = 1 - tanh², where tanh is z * temperature / softcap. Overwrites z."""
        if self.softcap is not None:
            tanh = z.mul_(self.temperature).div_(self.softcap)
            dz.addcmul_(dz, tanh.square_(), value=-1)
        if self.logit_scale != 1:
            dz.mul_(self.logit_scale)
        if isinstance(self.temperature, Tensor) or self.temperature != 1:
            dz.div_(self.temperature)
        return dz


# If the sum of e^z is in this range, no large term has overflowed, and a term that has underflowed is below e^-70
# of the sum (float32).
CENTRAL_SUMS = (1e-7, 1e27)
# The same of e^z for all z of rows whose m is in this range.
_CENTRAL = (-16.0, 64.0)


class Sums(NamedTuple):
    """Four reductions of a block of rows, (n, 1) each, where p is the softmax of the block."""

    maximum: Tensor  # m: about log sum e^z, or max z
    largest: Tensor  # p of a logit that is m
    mass: Tensor  # sum p: 1 up to rounding
    weighted: Tensor | None  # sum p (z - m); None without an entropy

    @classmethod
    def empty(cls, rows: int, *, like: Tensor, with_entropy: bool) -> Sums:
        """Uninitialised memory for the sums of `rows` rows."""
        columns = [like.new_empty(rows, 1) for _ in range(4 if with_entropy else 3)]
        return cls(*columns, *[None] * (4 - len(columns)))

    def split(self, sizes: list[int]) -> list[Sums]:
        """The sums of each of consecutive groups of rows, as views."""
        weighted = [None] * len(sizes) if self.weighted is None else self.weighted.split(sizes)
        parts = zip(self.maximum.split(sizes), self.largest.split(sizes), self.mass.split(sizes), weighted, strict=True)
        return [Sums(*part) for part in parts]

    def read_(self, z: Tensor, w: Tensor, shifted: Tensor | None) -> None:
        """Fill in the sums of a block z (n, V). w and, for the entropy, `shifted` are scratch; `shifted` may be z."""
        if z.device.type != "cpu":  # a look at the sums would wait for the device
            return self._read_any_(z, w, shifted)
        torch.exp(z, out=w)
        torch.sum(w, -1, keepdim=True, out=self.mass)
        low, high = CENTRAL_SUMS
        central = ((self.mass > low) & (self.mass < high)).squeeze(-1)
        if bool(central.all()):
            return self._read_central_(z, w, shifted)
        if not bool(central.any()):
            return self._read_any_(z, w, shifted)
        for index in (central.nonzero().squeeze(-1), (~central).nonzero().squeeze(-1)):
            # a row's values must not depend on the rows beside it
            part, rows = Sums.empty(len(index), like=z, with_entropy=self.weighted is not None), z[index]
            part.read_(rows, torch.empty_like(rows), torch.empty_like(rows))
            for whole, found in zip(self, part, strict=True):
                if whole is not None and found is not None:
                    whole[index] = found
        return None

    def _read_central_(self, z: Tensor, w: Tensor, shifted: Tensor | None) -> None:
        """From w = e^z, and its sum in `mass`, which becomes 1."""
        mass = self.mass.double()
        # m has fewer digits than it could have, so that z - m and e^m / sum lose none
        self.maximum.copy_(mass.log().float())
        self.largest.copy_(self.maximum.double().exp() / mass)
        if self.weighted is not None:
            assert shifted is not None
            weighted = w.mul_(torch.sub(z, self.maximum, out=shifted)).sum(-1, keepdim=True)
            if bool(weighted.isnan().any()):  # 0 * -inf, of a logit of -inf
                weighted = w.nan_to_num_(0.0).sum(-1, keepdim=True)
            self.weighted.copy_(weighted / mass)
        self.mass.fill_(1)

    def _read_any_(self, z: Tensor, w: Tensor, shifted: Tensor | None) -> None:
        """Of any z, from its softmax."""
        torch.amax(z, -1, keepdim=True, out=self.maximum)
        torch.softmax(z, -1, out=w)
        torch.amax(w, -1, keepdim=True, out=self.largest)
        torch.sum(w, -1, keepdim=True, out=self.mass)
        if self.weighted is not None:
            # a logit of -inf has no mass: 0 times the lowest finite number is 0, but 0 * -inf would be NaN
            assert shifted is not None
            torch.sub(z, self.maximum, out=shifted).clamp_(min=torch.finfo(z.dtype).min)
            torch.sum(w.mul_(shifted), -1, keepdim=True, out=self.weighted)


class RowState(NamedTuple):
    """(m, 1 / s, u / s) of each row, (n, 1) each. For a row without mass, where every z is -inf: (-inf, inf, 0)."""

    maximum: Tensor
    peak: Tensor  # 1 / s, the probability of a logit that is m: p = peak * e^(z - m)
    mean: Tensor | None  # u / s, the mean of z - m under p; None without an entropy

    @classmethod
    def of(cls, sums: Sums) -> RowState:
        """The state that follows from the sums of a block.

        torch's softmax divides by a sum whose rounding error grows with V. All of its entries share this error, so
        dividing by `mass` removes it.
        """
        empty = sums.maximum == -torch.inf
        peak = (sums.largest / sums.mass).masked_fill(empty, torch.inf)
        mean = None if sums.weighted is None else (sums.weighted / sums.mass).masked_fill(empty, 0)
        return cls(sums.maximum, peak, mean)

    @classmethod
    def empty(cls, rows: int, *, like: Tensor, with_entropy: bool) -> RowState:
        """The state of no logits at all, which merging starts from."""
        infinity = like.new_full((rows, 1), torch.inf)
        return cls(-infinity, infinity, torch.zeros_like(infinity) if with_entropy else None)

    def at(self, rows: slice) -> RowState:
        return RowState(self.maximum[rows], self.peak[rows], None if self.mean is None else self.mean[rows])

    def logp(self, z: Tensor) -> Tensor:
        """Log-probs (n, K) of logits z (n, K) of these rows."""
        return (z - self.maximum) + self.peak.log()

    def entropy(self) -> Tensor:
        """(n, 1); NaN for a row without mass, which is not a distribution."""
        assert self.mean is not None
        return (-self.peak.log() - self.mean).masked_fill(self.peak == torch.inf, torch.nan)

    def merge(self, other: RowState) -> RowState:
        """The state of rows that consist of two parts, each of whose sums is shifted to the larger maximum."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for part in (self, other):
            shift = torch.where(part.maximum == -torch.inf, 0, part.maximum - maximum)
            mass = shift.exp() / part.peak
            total += mass
            if part.mean is not None:
                weighted += mass * (part.mean + shift)
        mean = None if self.mean is None else weighted / total.masked_fill(total == 0, 1)
        return RowState(maximum, total.reciprocal(), mean)


class Upstream(NamedTuple):
    """The incoming gradient of some rows, in the form that `gradient_of` takes."""

    maximum: Tensor | None  # (n, 1) m, or 0 in a row whose `scale` includes e^-m; None if all rows do
    scale: Tensor  # (n, 1): sum_k g_k / s; 1 / s with an entropy gradient
    columns: Tensor  # (n, K) int64, each inside the block; any column where logp is 0
    logp: Tensor  # (n, K) g, 0 where the label is ignored or in another part of the row
    entropy: Tensor | None  # (n, 1) h
    offset: Tensor | None  # (n, 1): h (log p + entropy) + sum_k g_k = h * (z - m) + offset

    @classmethod
    def of(cls, state: RowState, columns: Tensor, logp: Tensor, entropy: Tensor | None) -> Upstream:
        """From labels (n, K) of whole rows, -100 ignored, and the gradients g (n, K) and h (n, 1)."""
        ignored = columns < 0
        logp, columns = logp.masked_fill(ignored, 0), columns.masked_fill(ignored, 0)
        total = logp.sum(-1, keepdim=True)
        if entropy is None:
            return cls(state.maximum, total * state.peak, columns, logp, None, None)
        assert state.mean is not None
        return cls(state.maximum, state.peak, columns, logp, entropy, total - entropy * state.mean)

    def unshifted(self) -> Upstream:
        """The same gradient with e^-m included in `scale` where that is safe, which saves the subtraction of m.

        Unchanged if there is an entropy gradient.
        """
        if self.maximum is None or self.entropy is not None:
            return self
        shift, scale = without_shift(self.scale, self.maximum)
        return self._replace(maximum=shift, scale=scale)

    def split(self, sizes: list[int]) -> list[Upstream]:
        """The gradient of each of consecutive groups of rows."""
        fields = [[None] * len(sizes) if x is None else x.split(sizes) for x in self]
        return [Upstream(*part) for part in zip(*fields, strict=True)]

    def at(self, rows: slice) -> Upstream:
        return Upstream(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]

    def part(self, start: int, stop: int) -> Upstream:
        """The gradient for a block that has only columns start .. stop - 1 of the vocabulary."""
        outside = (self.columns < start) | (self.columns >= stop)
        columns = (self.columns - start).masked_fill(outside, 0)
        return self._replace(columns=columns, logp=self.logp.masked_fill(outside, 0))


def without_shift(factor: Tensor, m: Tensor) -> tuple[Tensor | None, Tensor]:
    """(shift, scale) with `factor * e^(z - m) = scale * e^(z - shift)`, all (n, 1). A shift of None is 0 in every row.

    The shift is 0 in a row where that is safe: e^z does not overflow, and the product with e^-m loses no digits. Off
    the CPU it is m, because a look at the rows would wait for the device.
    """
    if m.device.type != "cpu":
        return m, factor
    low, high = _CENTRAL
    scale = (factor.double() * (-m.double()).exp()).to(factor.dtype)
    safe = (m > low) & (m < high) & ((scale.abs() >= torch.finfo(scale.dtype).tiny) | (factor == 0))
    if bool(safe.all()):
        return None, scale
    return m.masked_fill(safe, 0), torch.where(safe, scale, factor)


def gradient_of(z: Tensor, upstream: Upstream, *, out: Tensor, scratch: Tensor | None) -> Tensor:
    """dz (n, V) into `out`, which may be z. `scratch` (n, V) is for the entropy."""
    shifted = z if upstream.maximum is None else torch.sub(z, upstream.maximum, out=out)
    if upstream.entropy is None:
        dz = torch.exp(shifted, out=out).mul_(-upstream.scale)
    else:
        assert scratch is not None
        assert upstream.offset is not None
        torch.exp(shifted, out=scratch).mul_(-upstream.scale)
        # e^-1e4 is 0 in any dtype, but 0 * -inf would be NaN
        dz = torch.clamp(shifted, min=-1e4, out=out).mul_(upstream.entropy).add_(upstream.offset).mul_(scratch)
    return dz.scatter_add_(-1, upstream.columns, upstream.logp)


def column(rows: Tensor | None, like: Tensor) -> Tensor:
    """Values per row (...,) as contiguous (..., 1); for None a placeholder that nothing reads."""
    return (torch.empty_like(like) if rows is None else rows).contiguous().unsqueeze(-1)


def all_zero(factors: Tensor) -> bool:
    """Whether all factors of a block's gradient are 0. False off the CPU, where reading one waits for the device."""
    return factors.device.type == "cpu" and not bool(factors.count_nonzero())


def scale_(dz: Tensor, factor: Tensor, temperature: float | Tensor) -> Tensor:
    """`factor * dz / τ`, in place; exactly 0 where `factor` is 0, even if the row holds NaN."""
    silent = factor == 0
    dz.mul_(torch.where(silent, 0, factor / temperature))
    return dz.masked_fill_(silent, 0) if dz.device.type != "cpu" or bool(silent.any()) else dz
