"""The operator `kdloss::logprobs`: from logits to log-probs and entropies, and back.

It walks over blocks of rows that fit the cache, widens each to float32 in a scratch block and reads everything off it
there (`_rows.py`). Saved for the backward are the logits, which the caller holds anyway, and three numbers a row; the
backward recomputes e^(z - m) block by block straight into the gradient. Beyond the gradient itself, both directions
need the scratch and nothing else, however many rows there are.

    forward    reads V logits a row, writes K + 4 numbers
    backward   reads V logits a row, writes V numbers

Registered with `torch.library`, so that `torch.compile`, activation checkpointing and export see one operation. Under
`torch.compile` the same mathematics is offered as a formula instead (`_compiled_logprobs.py`), since a compiler fuses
its passes into one; it saves the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._rows import RowState, Scaling, Sums, Upstream, flat_rows, gradient_of

# Elements of a scratch block for each thread. On a CPU: 2 MiB of float32, of which three or four fit the last level of
# cache. On an accelerator a block must fill the device.
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 26


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
    """(logp (T, K), entropy (T,) or (0,), maximum, peak (T,), mean (T,) or (0,)), anything in rows without a label."""
    rows = _Rows(logits, (columns >= 0).any(-1), vocab_size)
    columns = rows.take(columns)
    scaling = rows.scaling(softcap, temperature, row_temperature)
    z, p, shifted = rows.scratch(), rows.scratch(), rows.scratch() if with_entropy else None
    sums = Sums.empty(columns.shape[0], like=z, with_entropy=with_entropy)
    picked = z.new_empty(columns.shape)
    parts = zip(columns.clamp(min=0).split(rows.sizes), picked.split(rows.sizes), strict=True)
    for block, part, (places, target) in zip(rows.blocks(scaling), sums.split(rows.sizes), parts, strict=True):
        n = places.shape[0]
        loaded = block.load(z[:n])
        part.read_(loaded, p[:n], None if shifted is None else shifted[:n])
        torch.gather(loaded, -1, places, out=target)
    state = RowState.of(sums)
    logp = rows.put_back(state.logp(picked).masked_fill(columns < 0, 0))
    maximum, peak = rows.put_back(state.maximum).squeeze(-1), rows.put_back(state.peak).squeeze(-1)
    if state.mean is None:
        return logp, z.new_empty(0), maximum, peak, z.new_empty(0)
    entropy = state.entropy().masked_fill((columns < 0).all(-1, keepdim=True), 0)
    return logp, rows.put_back(entropy).squeeze(-1), maximum, peak, rows.put_back(state.mean).squeeze(-1)


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
    ignored = columns < 0
    g = torch.zeros(columns.shape, dtype=wide, device=logits.device) if logp_gradient is None else logp_gradient
    g = g.masked_fill(ignored, 0)
    h = None if entropy_gradient is None else entropy_gradient.masked_fill(ignored.all(-1), 0)
    wanted = (g != 0).any(-1)
    if h is not None:
        wanted |= h != 0
    rows = _Rows(logits, wanted, vocab_size)
    scaling = rows.scaling(softcap, temperature, row_temperature)
    upstream = Upstream.of(
        # of a row that is not wanted the logits are read as 0, if at all
        RowState(
            rows.take(maximum.masked_fill(~wanted, 0)[:, None]),
            rows.take(peak.masked_fill(~wanted, 1)[:, None]),
            None if h is None else rows.take(mean.masked_fill(~wanted, 0)[:, None]),
        ),
        rows.take(columns),
        rows.take(g),
        None if h is None else rows.take(h[:, None]),
    )
    z, seeds = rows.scratch(), rows.scratch().zero_()
    dz = rows.scratch() if softcap is not None else z
    scratch = None if h is None else rows.scratch()
    make = torch.empty if rows.cover_all else torch.zeros
    gradient = make(logits.shape, dtype=logits.dtype, device=logits.device)
    matrix = gradient.view(columns.shape[0], logits.shape[-1])
    for block, part in zip(rows.blocks(scaling), upstream.split(rows.sizes), strict=True):
        n = part.scale.shape[0]
        loaded = block.load(z[:n])
        place = block.place if isinstance(block.place, slice) else None
        in_place = rows.cover_all and gradient.dtype == wide and place is not None
        out = matrix[place] if in_place else dz[:n]
        gradient_of(loaded, part, out=out, seeds=seeds[:n], scratch=None if scratch is None else scratch[:n])
        block.scaling.backward_(out, loaded)
        if place is None:
            matrix[block.place, :vocab_size] = out.to(gradient.dtype)
        elif not in_place:
            matrix[place, :vocab_size] = out
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
    if entropy_gradient is not None and entropy_gradient.numel() == 0:
        entropy_gradient = None  # none was asked for
    if logp_gradient is None and entropy_gradient is None:
        return (None,) * 7
    gradient = logprobs_backward(logp_gradient, entropy_gradient, *ctx.saved_tensors, *ctx.options)
    return gradient, *(None,) * 6


logprobs.register_autograd(_differentiate, setup_context=_save)


class _Block(NamedTuple):
    """Some rows of one matrix of logits."""

    x: Tensor  # (n, V): a view, or a copy of picked rows
    place: slice | Tensor  # which of the T rows they are
    unwanted: Tensor | None  # (n, 1) bool: rows to read as 0
    scaling: Scaling

    def load(self, scratch: Tensor) -> Tensor:
        """z: the logits themselves where nothing has to be done to them, else in `scratch`."""
        as_it_is = self.x.dtype == scratch.dtype and self.x.stride(-1) == 1 and self.scaling.is_identity
        if as_it_is and self.unwanted is None:
            return self.x
        z = scratch.copy_(self.x)
        if self.unwanted is not None:
            z.masked_fill_(self.unwanted, 0)
        return self.scaling.apply_(z)


class _Rows:
    """The wanted rows of logits, block after block.

    Only on a CPU are unwanted rows passed over: elsewhere finding them would wait for the device, so there all rows are
    walked over and the unwanted ones, which may hold NaN, are read as 0.
    """

    def __init__(self, logits: Tensor, wanted: Tensor, vocab_size: int) -> None:
        self._logits, self._wanted, self._vocab_size = logits, wanted, vocab_size
        on_cpu = logits.device.type == "cpu"
        self._walk_all = not on_cpu or bool(wanted.all())
        self._index = torch.empty(0) if self._walk_all else wanted.nonzero().squeeze(-1)
        elements = _CPU_BLOCK * torch.get_num_threads() if on_cpu else _DEVICE_BLOCK
        self._size = max(1, elements // vocab_size)
        self._pieces = list(self._cut())
        self.sizes = [
            place.stop - place.start if isinstance(place, slice) else len(place) for *_, place in self._pieces
        ]
        # whether the blocks together are all of the logits
        self.cover_all = self._walk_all and vocab_size == logits.shape[-1]

    def _cut(self) -> Iterator[tuple[Tensor, slice | Tensor, slice | Tensor]]:
        """(matrix, rows of it, which of the T rows they are)."""
        start = 0
        for (matrix,) in flat_rows(self._logits):
            rows = matrix.shape[0]
            if self._walk_all:
                for first in range(0, rows, self._size):
                    last = min(first + self._size, rows)
                    yield matrix, slice(first, last), slice(start + first, start + last)
            else:
                index = self._wanted[start : start + rows].nonzero().squeeze(-1)
                for part in index.split(self._size) if index.numel() else ():
                    yield matrix, part, part + start
            start += rows

    def blocks(self, scaling: Scaling) -> Iterator[_Block]:
        unwanted = ~self._wanted[:, None]
        for (matrix, rows, place), part in zip(self._pieces, scaling.split(self.sizes), strict=True):
            x = matrix[rows]
            if self._vocab_size != x.shape[-1]:
                x = x[:, : self._vocab_size]
            yield _Block(x, place, None if self._logits.device.type == "cpu" else unwanted[place], part)

    def scaling(self, softcap: float | None, temperature: float, row_temperature: Tensor | None) -> Scaling:
        if row_temperature is None:
            return Scaling(softcap, 1.0, temperature)
        divisor = torch.where(self._wanted, row_temperature.to(_checks.promoted_dtype(self._logits)), 1)
        return Scaling(softcap, 1.0, self.take(divisor[:, None]))

    def scratch(self) -> Tensor:
        rows = max(self.sizes, default=0)
        dtype = _checks.promoted_dtype(self._logits)
        return torch.empty(rows, self._vocab_size, dtype=dtype, device=self._logits.device)

    def take(self, x: Tensor) -> Tensor:
        """(T, ...) -> (N, ...), the rows of the blocks in their order."""
        return x if self._walk_all else x[self._index]

    def put_back(self, x: Tensor) -> Tensor:
        """(N, ...) -> (T, ...), 0 elsewhere."""
        if self._walk_all:
            return x
        return x.new_zeros(self._wanted.shape[0], *x.shape[1:]).index_copy_(0, self._index, x)
