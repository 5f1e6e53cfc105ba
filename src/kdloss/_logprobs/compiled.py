"""Log-probs and entropies as formulas for a compiler: the mathematics of `kdloss::logprobs` without its blocks.

Under `torch.compile`, the compiler fuses the passes over the logits. It cannot decide what to save: autograd would save
the softmax, (T, V) in float32. These functions save the logits as they are, and two or three values per row.
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
        apply = _CompiledLogprobsAndEntropy.apply
        logp, entropy = apply(logits, columns, row_temperature, temperature, softcap, vocab_size)  # type: ignore[no-untyped-call]
        return logp, entropy
    apply = _CompiledLogprobs.apply
    logp = apply(logits, columns, row_temperature, temperature, softcap, vocab_size)  # type: ignore[no-untyped-call]
    return logp, logp.new_empty(0)


class _CompiledRows:
    """What both directions compute from the rows. Masks apply to per-row values, and to logits at most once per pass.

    A row without a label is unused and may hold NaN. The NaN reaches only that row's values, which are masked.
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
        """z (T, n) of logits (T, n). Division by 1 is left out here, because the compiler would keep it."""
        z = x.to(self.dtype)
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.divisor if self._divides else z

    def unscaled(self, dz: Tensor, z: Tensor) -> Tensor:
        """dx (T, n) of dz (T, n), 0 in unused rows."""
        if self.softcap is not None:
            dz = dz * (1 - (z * self.divisor / self.softcap).square())
        return (dz / self.divisor if self._divides else dz).masked_fill(self.unused, 0)

    def padded(self, dx: Tensor) -> Tensor:
        """dx with the padding columns of the vocabulary, whose gradient is 0."""
        missing = self.columns_in_all - self.vocab_size
        return torch.nn.functional.pad(dx, (0, missing)) if missing else dx

    @property
    def _divides(self) -> bool:
        return isinstance(self.divisor, Tensor) or self.divisor != 1

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """(z - m (T, V), m (T, 1), s (T, 1))."""
        z = self.scaled(self.x)
        maximum = z.amax(-1, keepdim=True)
        shifted = z - maximum
        return shifted, maximum, shifted.exp().sum(-1, keepdim=True)

    def logp(self, maximum: Tensor, total: Tensor) -> Tensor:
        """Log-probs (T, K) of the labels, 0 where ignored, from m and s (T, 1)."""
        picked = self.scaled(self.x.gather(-1, self.columns))
        return ((picked - maximum) - total.log()).masked_fill(self.ignored, 0)


def _backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor | None) -> Tensor:
    """The gradient of the logits, in their shape and dtype."""
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
    dz = _dense_dz(z - maximum, slope, incoming)
    if columns.shape[-1] > 1:
        dx = rows.unscaled(dz.scatter_add(-1, rows.columns, upstream), z).to(logits.dtype)
        return rows.padded(dx).view(logits.shape)
    # the label's entry is overwritten, not added to: one value per row, after the pass over the logits
    picked = rows.scaled(rows.x.gather(-1, rows.columns))
    label = rows.unscaled(upstream + _dense_dz(picked - maximum, slope, incoming), picked).to(logits.dtype)
    dx = rows.padded(rows.unscaled(dz, z).to(logits.dtype))
    return dx.scatter(-1, rows.columns, label).view(logits.shape)


def _dense_dz(shifted: Tensor, slope: Tensor, incoming: Tensor | None) -> Tensor:
    """dz without the terms g_k at the labels: -p (sum g + h (log p + entropy)), from z - m and factors divided by s."""
    if incoming is not None:
        # a logit 1e4 below the largest has probability 0 in any dtype, but 0 * -inf would be NaN
        slope = slope + incoming * shifted.clamp(min=-1e4)
    return -shifted.exp() * slope


class _CompiledLogprobs(torch.autograd.Function):
    """logp (T, K); saves m and s of each row beside the inputs."""

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


class _CompiledLogprobsAndEntropy(torch.autograd.Function):
    """(logp (T, K), entropy (T,)); saves m, s and the entropy of each row beside the inputs."""

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
        # a logit of -inf has no mass: 0 times the lowest finite number is 0, but 0 * -inf would be NaN
        finite = shifted.clamp(min=torch.finfo(shifted.dtype).min)
        weighted = (shifted.exp() * finite).sum(-1, keepdim=True)
        entropy = (total.log() - weighted / total).masked_fill(rows.unused, 0).squeeze(-1)
        ctx.save_for_backward(logits, columns, row_temperature, maximum, total, entropy)
        ctx.options = (temperature, softcap, vocab_size)
        return rows.logp(maximum, total), entropy

    @staticmethod
    def backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, logp_gradient, entropy_gradient), *(None,) * 5
