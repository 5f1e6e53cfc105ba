"""Log-probs and entropies as formulas for a compiler: the mathematics of `kdloss::logprobs` without its blocks.

Under `torch.compile` the passes over a block are the compiler's to fuse. What it cannot find by itself is what to keep:
autograd would save the softmax, (T, V) in float32. These functions save the logits, as they are, and two or three
numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdloss import _checks


def compiled_logprobs(
    logits: Tensor,  # (..., V)
    columns: Tensor,  # (T, K) int64 inside the vocabulary, -100 ignored
    row_temperature: Tensor | None,  # (T,)
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,))."""
    if with_entropy:
        apply = _LogprobsAndEntropy.apply
        logp, entropy = apply(logits, columns, row_temperature, temperature, softcap, vocab_size)  # type: ignore[no-untyped-call]
        return logp, entropy
    apply = _Logprobs.apply
    logp = apply(logits, columns, row_temperature, temperature, softcap, vocab_size)  # type: ignore[no-untyped-call]
    return logp, logp.new_empty(0)


class _CompiledRows:
    """What both directions need of the rows. Masks are laid on numbers a row, and on logits no more than once a pass.

    An unused row, one without a label, may hold NaN: it reaches that row's numbers, which are masked, and nothing else.
    """

    def __init__(
        self,
        logits: Tensor,
        columns: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float | None,
        vocab_size: int,
    ) -> None:
        self.dtype = _checks.promoted_dtype(logits)
        self.columns, self.ignored = columns.clamp(min=0), columns < 0
        self.unused = self.ignored.all(-1, keepdim=True)
        self.x = logits.reshape(-1, logits.shape[-1])[:, :vocab_size]
        self.softcap, self.vocab_size, self.columns_in_all = softcap, vocab_size, logits.shape[-1]
        self.divisor: Tensor | float = temperature
        if row_temperature is not None:
            self.divisor = torch.where(self.unused, 1, row_temperature.to(self.dtype)[:, None])

    def scaled(self, x: Tensor) -> Tensor:
        """z (T, n) of logits (T, n). A division by 1 would be carried out."""
        z = x.to(self.dtype)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.divisor if self._divides else z

    def unscaled(self, dz: Tensor, z: Tensor) -> Tensor:
        """dx (T, n) of dz."""
        if self.softcap is not None:
            dz = dz * (1 - (z * self.divisor / self.softcap).square())
        return (dz / self.divisor if self._divides else dz).masked_fill(self.unused, 0)

    def padded(self, dx: Tensor) -> Tensor:
        """With the columns beyond the vocabulary, whose gradient is 0."""
        missing = self.columns_in_all - self.vocab_size
        return torch.nn.functional.pad(dx, (0, missing)) if missing else dx

    @property
    def _divides(self) -> bool:
        return isinstance(self.divisor, Tensor) or self.divisor != 1

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """z - m (T, V), and (T, 1) m and s."""
        z = self.scaled(self.x)
        maximum = z.amax(-1, keepdim=True)
        shifted = z - maximum
        return shifted, maximum, shifted.exp().sum(-1, keepdim=True)

    def logp(self, maximum: Tensor, total: Tensor) -> Tensor:
        picked = self.scaled(self.x.gather(-1, self.columns))
        return ((picked - maximum) - total.log()).masked_fill(self.ignored, 0)


def _backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor | None) -> Tensor:
    logits, columns, row_temperature, maximum, total, *entropy = ctx.saved_tensors
    rows = _CompiledRows(logits, columns, row_temperature, *ctx.options)
    upstream = logp_gradient.masked_fill(rows.ignored, 0)
    slope, incoming = upstream.sum(-1, keepdim=True), None
    if entropy_gradient is not None:
        incoming = entropy_gradient.masked_fill(rows.ignored.all(-1), 0)[:, None]
        slope = slope + incoming * (entropy[0][:, None] - total.log())
    slope = slope / total
    incoming = None if incoming is None else incoming / total

    z = rows.scaled(rows.x)
    dz = _descent(z - maximum, slope, incoming)
    if columns.shape[-1] > 1:
        dx = rows.unscaled(dz.scatter_add(-1, rows.columns, upstream), z).to(logits.dtype)
        return rows.padded(dx).view(logits.shape)
    # written over, not added to: one number a row, into what the pass over the logits has stored
    picked = rows.scaled(rows.x.gather(-1, rows.columns))
    label = rows.unscaled(upstream + _descent(picked - maximum, slope, incoming), picked).to(logits.dtype)
    dx = rows.padded(rows.unscaled(dz, z).to(logits.dtype))
    return dx.scatter(-1, rows.columns, label).view(logits.shape)


def _descent(shifted: Tensor, slope: Tensor, incoming: Tensor | None) -> Tensor:
    """-p (sum g + h (log p + entropy)) of z - m (T, n)."""
    if incoming is not None:
        # a logit 1e4 below the largest has a probability of 0 in any dtype, and -inf times that would be NaN
        slope = slope + incoming * shifted.clamp(min=-1e4)
    return -shifted.exp() * slope


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        columns: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float | None,
        vocab_size: int,
    ) -> Tensor:
        rows = _CompiledRows(logits, columns, row_temperature, temperature, softcap, vocab_size)
        _, maximum, total = rows.state()
        ctx.save_for_backward(logits, columns, row_temperature, maximum, total)
        ctx.options = (temperature, softcap, vocab_size)
        return rows.logp(maximum, total)

    @staticmethod
    def backward(ctx: Any, logp_gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, logp_gradient, None), *(None,) * 5


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        columns: Tensor,
        row_temperature: Tensor | None,
        temperature: float,
        softcap: float | None,
        vocab_size: int,
    ) -> tuple[Tensor, Tensor]:
        rows = _CompiledRows(logits, columns, row_temperature, temperature, softcap, vocab_size)
        shifted, maximum, total = rows.state()
        # a logit of -inf has no mass: 0 * the lowest number is 0, where 0 * -inf would be NaN
        finite = shifted.clamp(min=torch.finfo(shifted.dtype).min)
        weighted = (shifted.exp() * finite).sum(-1, keepdim=True)
        entropy = (total.log() - weighted / total).masked_fill(rows.unused, 0).squeeze(-1)
        ctx.save_for_backward(logits, columns, row_temperature, maximum, total, entropy)
        ctx.options = (temperature, softcap, vocab_size)
        return rows.logp(maximum, total), entropy

    @staticmethod
    def backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, logp_gradient, entropy_gradient), *(None,) * 5
