"""Log-probs and entropies as formulas for a compiler: the mathematics of `kdloss::logprobs` without its blocks.

Under `torch.compile` the passes over a block are the compiler's to fuse. What it cannot find by itself is what to keep:
autograd would save the softmax, (T, V) in float32. These functions save the logits, as they are, and two or three
numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks


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


def _scaled(
    logits: Tensor,
    columns: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab: int,
) -> tuple[Tensor, Tensor | float]:
    """z (T, V) and its temperature (T, 1); 0 in rows without a label, which may hold NaN."""
    unused = (columns < 0).all(-1, keepdim=True)
    z = logits.reshape(-1, logits.shape[-1])[:, :vocab].to(_checks.promoted_dtype(logits)).masked_fill(unused, 0)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if row_temperature is not None:
        divisor = torch.where(unused, 1, row_temperature.to(z.dtype)[:, None])
        return z / divisor, divisor
    return z / temperature, temperature


def _state(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z - m, m and s."""
    maximum = z.amax(-1, keepdim=True)
    shifted = z - maximum
    return shifted, maximum, shifted.exp().sum(-1, keepdim=True)


def _picked(shifted: Tensor, total: Tensor, columns: Tensor) -> Tensor:
    logp = shifted.gather(-1, columns.clamp(min=0)) - total.log()
    return logp.masked_fill(columns < 0, 0)


def _backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor | None) -> Tensor:
    logits, columns, row_temperature, maximum, total, *entropy = ctx.saved_tensors
    temperature, softcap, vocab_size = ctx.options
    z, divisor = _scaled(logits, columns, row_temperature, temperature, softcap, vocab_size)
    ignored = columns < 0
    upstream = logp_gradient.masked_fill(ignored, 0)
    logp = z - maximum - total.log()
    slope = upstream.sum(-1, keepdim=True)
    if entropy_gradient is not None:
        # a log-prob below -1e4 has a probability of 0 in any dtype, and -inf times that would be NaN
        incoming = entropy_gradient.masked_fill(ignored.all(-1), 0)[:, None]
        slope = slope + incoming * (logp.clamp(min=-1e4) + entropy[0][:, None])
    dz = -logp.exp() * slope
    if columns.shape[-1] == 1:  # fuses with the rest, where a scatter would not
        dz = torch.where(torch.arange(vocab_size, device=dz.device) == columns, dz + upstream, dz)
    else:
        dz = dz.scatter_add(-1, columns.clamp(min=0), upstream)
    if softcap is not None:
        dz = dz * (1 - (z * divisor / softcap).square())
    dx = (dz / divisor).to(logits.dtype)
    return torch.nn.functional.pad(dx, (0, logits.shape[-1] - vocab_size)).reshape(logits.shape)


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
        z, _ = _scaled(logits, columns, row_temperature, temperature, softcap, vocab_size)
        shifted, maximum, total = _state(z)
        ctx.save_for_backward(logits, columns, row_temperature, maximum, total)
        ctx.options = (temperature, softcap, vocab_size)
        return _picked(shifted, total, columns)

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
        z, _ = _scaled(logits, columns, row_temperature, temperature, softcap, vocab_size)
        shifted, maximum, total = _state(z)
        # a logit of -inf has no mass: 0 * the lowest number is 0, where 0 * -inf would be NaN
        finite = shifted.clamp(min=torch.finfo(z.dtype).min)
        weighted = (shifted.exp() * finite).sum(-1, keepdim=True)
        entropy = (total.log() - weighted / total).squeeze(-1).masked_fill((columns < 0).all(-1), 0)
        ctx.save_for_backward(logits, columns, row_temperature, maximum, total, entropy)
        ctx.options = (temperature, softcap, vocab_size)
        return _picked(shifted, total, columns), entropy

    @staticmethod
    def backward(ctx: Any, logp_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, logp_gradient, entropy_gradient), *(None,) * 5
