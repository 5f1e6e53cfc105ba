"""The operator `kdloss::logprobs`: from a matrix of logits to log-probs and entropies, and back.

It walks over blocks of rows that fit the cache, widens each to float32 in a scratch block and reads everything off it
there (`_rows.py`). Saved for the backward are the logits, which the caller holds anyway, and three numbers a row; the
backward recomputes e^(z - m) block by block straight into the gradient. Beyond the gradient itself, both directions
need the scratch and nothing else, however many rows there are.

    forward    reads V logits a row, writes K + 3 numbers
    backward   reads V logits a row, writes V numbers

Registered with `torch.library`, so that `torch.compile`, activation checkpointing and export see one operation. Under
`torch.compile` the same mathematics is offered as a formula instead (`compiled_logprobs`), since a compiler fuses its
passes into one; it saves the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._rows import RowState, Scaling, Upstream, gradient_of, state_of

# Elements of a scratch block for each thread. On a CPU: 2 MiB of float32, of which three or four fit the last level of
# cache. On an accelerator a block must fill the device.
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 26


def _block_rows(logits: Tensor) -> int:
    elements = _CPU_BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else _DEVICE_BLOCK
    return max(1, elements // logits.shape[-1])


def _matrices(x: Tensor) -> Iterator[Tensor]:
    """(..., V) as (rows, V) views in order, never as a copy: `logits[:, :-1]` of (B, L, V) is B of them."""
    if x.ndim < 2:
        yield x.reshape(1, -1)
        return
    try:
        yield x.view(-1, x.shape[-1])
    except RuntimeError:
        for part in x.unbind():
            yield from _matrices(part)


def _blocks(logits: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, slice | Tensor, slice | Tensor]]:
    """(matrix, rows of it, the same rows of the whole) for blocks of the `wanted` rows, (T,) bool.

    Only on a CPU are unwanted rows passed over: elsewhere finding them would wait for the device.
    """
    size, start = _block_rows(logits), 0
    skip = wanted.device.type == "cpu" and not bool(wanted.all())
    for matrix in _matrices(logits):
        rows = matrix.shape[0]
        if skip:
            for index in wanted[start : start + rows].nonzero().squeeze(-1).split(size):
                if index.numel():
                    yield matrix, index, index + start
        else:
            for first in range(0, rows, size):
                last = min(first + size, rows)
                yield matrix, slice(first, last), slice(start + first, start + last)
        start += rows


class _Scratch:
    """Blocks of one shape, made when first asked for."""

    def __init__(self, logits: Tensor, vocab_size: int) -> None:
        rows = min(_block_rows(logits), logits.numel() // logits.shape[-1])
        self._shape = (rows, vocab_size)
        self._options: dict[str, Any] = {"dtype": _checks.promoted_dtype(logits), "device": logits.device}
        self._made: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, *, zero: bool = False) -> Tensor:
        if name not in self._made:
            make = torch.zeros if zero else torch.empty
            self._made[name] = make(self._shape, **self._options)
        return self._made[name][:rows]


def _load(matrix: Tensor, rows: slice | Tensor, wanted: Tensor, scaling: Scaling, scratch: _Scratch) -> Tensor:
    """z of a block: a view of the logits where nothing has to be done to them, else in the block `z`."""
    vocab_size = scratch("z", 0).shape[-1]
    x = matrix[rows][:, :vocab_size]
    plain = x.dtype == scratch("z", 0).dtype and x.stride(-1) == 1 and scaling.is_identity
    if plain and x.device.type == "cpu":
        return x
    z = scratch("z", x.shape[0]).copy_(x)
    if x.device.type != "cpu":
        z.masked_fill_(~wanted[:, None], 0)  # what a CPU passes over: an unwanted row may hold NaN
    return scaling.apply_(z)


def row_scaling(
    softcap: float | None,
    temperature: float,
    row_temperature: Tensor | None,  # (T,), anything where a row is not wanted
    wanted: Tensor,  # (T,) bool
    dtype: torch.dtype,
    *,
    logit_scale: float = 1.0,
) -> Scaling:
    if row_temperature is None:
        return Scaling(softcap, logit_scale, temperature)
    return Scaling(softcap, logit_scale, torch.where(wanted, row_temperature.to(dtype), 1).unsqueeze(-1))


@torch.library.custom_op("kdloss::logprobs", mutates_args=())
def logprobs(
    logits: Tensor,  # (..., V)
    columns: Tensor,  # (T, K) int64 inside the vocabulary, -100 ignored; T = the product of the leading axes
    row_temperature: Tensor | None,  # (T,)
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,), maximum (T,), peak (T,), mean (T,) or (0,)); 0 where all labels are ignored."""
    wide = _checks.promoted_dtype(logits)
    used = (columns >= 0).any(-1)
    logp = torch.zeros(columns.shape, dtype=wide, device=logits.device)
    maximum, peak = logp.new_zeros(columns.shape[:1]), logp.new_ones(columns.shape[:1])
    entropy = logp.new_zeros(columns.shape[0] if with_entropy else 0)
    mean = torch.zeros_like(entropy)
    all_scaling = row_scaling(softcap, temperature, row_temperature, used, wide)
    scratch = _Scratch(logits, vocab_size)
    for matrix, rows, places in _blocks(logits, used):
        block_columns, block_used = columns[places], used[places]
        z = _load(matrix, rows, block_used, all_scaling.of(places), scratch)
        count = z.shape[0]
        picked = z.gather(-1, block_columns.clamp(min=0))
        state = state_of(z, scratch("p", count), scratch("shifted", count) if with_entropy else None)
        logp[places] = ((picked - state.maximum) + state.peak.log()).masked_fill(block_columns < 0, 0)
        maximum[places] = state.maximum.squeeze(-1)
        peak[places] = state.peak.squeeze(-1)
        if state.mean is not None:
            entropy[places] = state.entropy.squeeze(-1).masked_fill(~block_used, 0)
            mean[places] = state.mean.squeeze(-1)
    return logp, entropy, maximum, peak, mean


@logprobs.register_fake
def _(
    logits: Tensor,
    columns: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = columns.shape[0]
    logp = torch.empty(columns.shape, dtype=_checks.promoted_dtype(logits), device=logits.device)
    entropy = logp.new_empty(rows if with_entropy else 0)
    return logp, entropy, logp.new_empty(rows), logp.new_empty(rows), torch.empty_like(entropy)


@torch.library.custom_op("kdloss::logprobs_backward", mutates_args=())
def logprobs_backward(
    logp_gradient: Tensor | None,  # (T, K)
    entropy_gradient: Tensor | None,  # (T,)
    logits: Tensor,
    columns: Tensor,
    row_temperature: Tensor | None,
    maximum: Tensor,
    peak: Tensor,
    mean: Tensor,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype; rows without an incoming gradient cost their zeros."""
    wide = _checks.promoted_dtype(logits)
    if logp_gradient is None:
        logp_gradient = torch.zeros(columns.shape, dtype=wide, device=logits.device)
    logp_gradient = logp_gradient.masked_fill(columns < 0, 0)
    wanted = (logp_gradient != 0).any(-1)
    if entropy_gradient is not None:
        entropy_gradient = entropy_gradient.masked_fill((columns < 0).all(-1), 0)
        wanted |= entropy_gradient != 0
    complete = vocab_size == logits.shape[-1] and (logits.device.type != "cpu" or bool(wanted.all()))
    make = torch.empty if complete else torch.zeros
    gradient = make(logits.shape, dtype=logits.dtype, device=logits.device)
    flat_gradient = gradient.view(columns.shape[0], logits.shape[-1])
    all_scaling = row_scaling(softcap, temperature, row_temperature, wanted, wide)
    # where a row is not wanted its logits are read as 0, or not at all
    maximum, peak = maximum.masked_fill(~wanted, 0), peak.masked_fill(~wanted, 1)
    scratch = _Scratch(logits, vocab_size)
    for matrix, rows, places in _blocks(logits, wanted):
        scaling = all_scaling.of(places)
        z = _load(matrix, rows, wanted[places], scaling, scratch)
        count = z.shape[0]
        state = RowState(maximum[places, None], peak[places, None], None)
        upstream = Upstream.of(columns[places], logp_gradient[places])
        if entropy_gradient is not None:
            state = state._replace(mean=mean[places, None])
            upstream = upstream._replace(entropy=entropy_gradient[places, None])
        in_place = complete and gradient.dtype == wide and isinstance(places, slice)
        dz = flat_gradient[places] if in_place else scratch("dz", count)
        gradient_of(z, state, upstream, out=dz, seeds=scratch("seeds", count, zero=True))
        scaling.backward_(dz, z)
        if not in_place:
            flat_gradient[places, :vocab_size] = dz.to(gradient.dtype) if isinstance(places, Tensor) else dz
    return gradient


@logprobs_backward.register_fake
def _(
    logp_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
    logits: Tensor,
    columns: Tensor,
    row_temperature: Tensor | None,
    maximum: Tensor,
    peak: Tensor,
    mean: Tensor,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, columns, row_temperature, *ctx.options, _ = inputs
    _, _, maximum, peak, mean = output
    ctx.save_for_backward(logits, columns, row_temperature, maximum, peak, mean)
    ctx.set_materialize_grads(False)  # no gradient through the entropy is cheaper than one of 0


def _differentiate(
    ctx: Any, logp_gradient: Tensor | None, entropy_gradient: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if logp_gradient is None and entropy_gradient is None:
        return (None,) * 7
    gradient = logprobs_backward(logp_gradient, entropy_gradient, *ctx.saved_tensors, *ctx.options)
    return gradient, *(None,) * 6


logprobs.register_autograd(_differentiate, setup_context=_save)
