"""The operator `kdloss::logprobs`: from logits to log-probs and entropies, and back.

It takes blocks of rows that fit the cache, widens each to float32 in a scratch and computes everything from it there
(`_softmax/rows.py`). The backward needs the logits, which the caller holds anyway, and up to three saved values per
row; it recomputes e^(z - m) block by block, straight into the gradient. Besides the gradient itself, both directions
need only the scratch, however many rows there are.

    forward    reads V logits per row, writes K + 4 values
    backward   reads V logits per row, writes V values

If `kernels` is set, Triton kernels do the same (`_triton/_logits_forward.py`, `_triton/_logits_backward.py`).

The operator is registered with `torch.library`, so `torch.compile`, activation checkpointing and export see one
operation. When a compiler traces without the kernels, `compiled.py` is used instead: the same mathematics as a formula,
whose passes the compiler fuses into one, with the same values saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._softmax.operator import operator
from kdloss._softmax.rows import RowState, Scaling, Sums, Upstream, flat_rows, gradient_of

# Elements of a scratch block, on a CPU per thread: 1.25 MiB of float32, so that a pass finds it in the cache. On
# an accelerator a block must fill the device.
_CPU_BLOCK = 5 << 16
_DEVICE_BLOCK = 1 << 26


@operator("logprobs")
def logprobs(
    logits: Tensor,  # (..., V)
    # (T, K) int64, with T the product of the leading axes. -100 is ignored; vocab_size marks a label in another shard,
    # whose log-prob is undefined here. The kernels give NaN for any label outside the vocabulary
    columns: Tensor,
    row_temperature: Tensor | None,  # (T,)
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
    kernels: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,), maximum (T,), peak (T,), mean (T,) or (0,)).

    logp and entropy are 0 where ignored; maximum, peak and mean are undefined in rows without a label. `maximum` is
    that of z; from the kernels that of softcap(logits), before the temperature.
    """
    if kernels:
        from kdloss._triton._logits_forward import forward

        return forward(logits, columns, row_temperature, temperature, softcap, vocab_size, with_entropy)
    labelled = (columns >= 0).any(-1)
    scaling = Scaling(softcap, 1.0, temperature)
    rows = _RowBlocks(logits, labelled, vocab_size, scaling, row_temperature)
    state = _state_of(rows, with_entropy=with_entropy)
    mean = None if state.mean is None else rows.put_back(state.mean)
    state = RowState(rows.put_back(state.maximum), rows.put_back(state.peak), mean)
    logp = state.logp(rows.pick(columns.clamp(0, vocab_size - 1))).masked_fill(columns < 0, 0)
    maximum, peak = state.maximum.squeeze(-1), state.peak.squeeze(-1)
    if mean is None:
        return logp, logp.new_empty(0), maximum, peak, logp.new_empty(0)
    entropy = state.entropy().squeeze(-1).masked_fill(~labelled, 0)
    return logp, entropy, maximum, peak, mean.squeeze(-1)


def _state_of(rows: _RowBlocks, *, with_entropy: bool) -> RowState:
    """The state (N, 1) of the wanted rows."""
    z, p, shifted = rows.scratch(), rows.scratch(), rows.scratch() if with_entropy else None
    sums = Sums.empty(rows.count, like=z, with_entropy=with_entropy)
    for block, part in zip(rows.blocks(), sums.split(rows.sizes), strict=True):
        part.read_(block.load(z), block.cut(p), None if shifted is None else block.cut(shifted))
    return RowState.of(sums)


@logprobs.register_fake
def _(logits: Tensor, columns: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_entropy = options[4]
    rows = columns.shape[0]
    logp = torch.empty(columns.shape, dtype=_checks.promoted_dtype(logits), device=logits.device)
    entropy = logp.new_empty(rows if with_entropy else 0)
    return logp, entropy, logp.new_empty(rows), logp.new_empty(rows), torch.empty_like(entropy)


@operator("logprobs_backward")
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
    kernels: bool,
    part: bool = False,
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype. Rows without an incoming gradient are only set to 0.

    The state (maximum, peak, mean) is that of whole rows, of which the logits may be a part. If `part` is set, label
    vocab_size is in another part, and its gradient goes only through the normalisation. Otherwise the kernels, whose
    labels are not checked, skip it like any other label outside the vocabulary.
    """
    if kernels:
        from kdloss._triton._logits_backward import backward
        from kdloss._triton._row_math import State

        known = State(columns, temperature, row_temperature, maximum, peak, mean)
        return backward(logp_gradient, entropy_gradient, logits, known, softcap, vocab_size, part=part)
    wide = _checks.promoted_dtype(logits)
    ignored = columns < 0
    g = torch.zeros(columns.shape, dtype=wide, device=logits.device) if logp_gradient is None else logp_gradient
    g = g.masked_fill(ignored, 0)
    h = None if entropy_gradient is None else entropy_gradient.masked_fill(ignored.all(-1), 0)
    wanted = (g != 0).any(-1)
    if h is not None:
        wanted |= h != 0
    rows = _RowBlocks(logits, wanted, vocab_size, Scaling(softcap, 1.0, temperature), row_temperature)
    upstream = (
        Upstream.of(
            # the logits of an unwanted row are read as 0, if at all
            RowState(
                rows.take(maximum.masked_fill(~wanted, 0)[:, None]),
                rows.take(peak.masked_fill(~wanted, 1)[:, None]),
                None if h is None else rows.take(mean.masked_fill(~wanted, 0)[:, None]),
            ),
            rows.take(columns),
            rows.take(g),
            None if h is None else rows.take(h[:, None]),
        )
        .unshifted()
        .part(0, vocab_size)
    )
    z, seeds = rows.scratch(), rows.scratch().zero_()
    dz = rows.scratch() if softcap is not None else z
    scratch = None if h is None else rows.scratch()
    make = torch.empty if rows.cover_all else torch.zeros
    gradient = make(logits.shape, dtype=logits.dtype, device=logits.device)
    targets = rows.targets(gradient)
    for block, incoming, target in zip(rows.blocks(), upstream.split(rows.sizes), targets, strict=True):
        loaded = block.load(z)
        in_place = target is not None and gradient.dtype == wide and rows.cover_all
        out = target if in_place else block.cut(dz)
        assert out is not None
        gradient_of(
            loaded, incoming, out=out, seeds=block.cut(seeds), scratch=None if scratch is None else block.cut(scratch)
        )
        block.scaling.backward_(out, loaded)
        if target is None:
            rows.matrix_of(gradient)[block.place] = out.to(gradient.dtype)
        elif not in_place:
            target.copy_(out)
    return gradient


@logprobs_backward.register_fake
def _(logp_gradient: Tensor | None, entropy_gradient: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, columns, row_temperature, *options, _, kernels = inputs
    ctx.options = (*options, kernels)
    _, _, maximum, peak, mean = output
    ctx.save_for_backward(logits, columns, row_temperature, maximum, peak, mean)
    ctx.set_materialize_grads(False)  # None for an unused entropy is cheaper than zeros


def _differentiate(
    ctx: Any, logp_gradient: Tensor | None, entropy_gradient: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if entropy_gradient is not None and entropy_gradient.numel() == 0:
        entropy_gradient = None  # the forward computed no entropy
    if logp_gradient is None and entropy_gradient is None:
        return ()
    return (logprobs_backward(logp_gradient, entropy_gradient, *ctx.saved_tensors, *ctx.options),)


logprobs.register_autograd(_differentiate, _save)


class _RowBlock(NamedTuple):
    """Some rows of one matrix of logits."""

    x: Tensor  # (n, V): a view, or a copy of picked rows
    place: slice | Tensor  # which of the T rows they are
    unwanted: Tensor | None  # (n, 1) bool, rows to read as 0; None if there are none
    scaling: Scaling
    unchanged: bool  # whether z is x itself

    def load(self, scratch: Tensor) -> Tensor:
        """z: the logits themselves if they need no change, else a copy in `scratch`."""
        if self.unchanged:
            return self.x
        z = self.cut(scratch).copy_(self.x)
        if self.unwanted is not None:
            z.masked_fill_(self.unwanted, 0)
        return self.scaling.apply_(z)

    def cut(self, scratch: Tensor) -> Tensor:
        """The first rows of `scratch`, as many as this block has."""
        n = self.x.shape[0]
        return scratch if n == scratch.shape[0] else scratch[:n]


class _RowBlocks:
    """Walks over N of the T rows of logits, block by block: the wanted rows on a CPU, all rows elsewhere.

    Finding the wanted rows would wait for an accelerator, so there unwanted rows, which may hold NaN, are read as 0.
    """

    def __init__(
        self,
        logits: Tensor,  # (..., V)
        wanted: Tensor,  # (T,) bool
        vocab_size: int,
        scaling: Scaling,
        row_temperature: Tensor | None,  # (T,)
    ) -> None:
        self._logits, self._wanted, self._scaling = logits, wanted, scaling
        self._vocab_size, self._dtype = vocab_size, _checks.promoted_dtype(logits)
        if row_temperature is not None:
            divisor = torch.where(wanted, row_temperature.to(self._dtype), 1)[:, None]
            self._scaling = scaling._replace(temperature=divisor)
        self._on_cpu = logits.device.type == "cpu"
        self._walk_all = not self._on_cpu or bool(wanted.all())
        self._index = torch.empty(0) if self._walk_all else wanted.nonzero().squeeze(-1)
        # logits that need no scratch leave room for more rows
        self._in_place = self._on_cpu and logits.dtype == self._dtype and self._scaling.is_identity
        elements = _CPU_BLOCK * torch.get_num_threads() if self._on_cpu else _DEVICE_BLOCK
        self._size = max(1, (2 if self._in_place else 1) * elements // vocab_size)
        self._pieces = list(self._cut())
        self.sizes = [
            place.stop - place.start if isinstance(place, slice) else len(place) for *_, place in self._pieces
        ]
        self.count = sum(self.sizes)
        # whether the blocks cover all of the logits
        self.cover_all = self._walk_all and vocab_size == logits.shape[-1]

    def _cut(self) -> Iterator[tuple[Tensor, Tensor | None, slice | Tensor]]:
        """Yield (x, index, place) per block: x, or x[index] if there is an index, holds the rows `place` of the T."""
        start = 0
        for (matrix,) in flat_rows(self._logits):
            rows, x = matrix.shape[0], matrix[:, : self._vocab_size]
            if self._walk_all:
                for first, view in zip(range(0, rows, self._size), x.split(self._size), strict=False):
                    yield view, None, slice(start + first, start + min(first + self._size, rows))
            else:
                index = self._wanted[start : start + rows].nonzero().squeeze(-1)
                for part in index.split(self._size) if index.numel() else ():
                    yield x, part, part + start
            start += rows

    def blocks(self) -> Iterator[_RowBlock]:
        """The blocks in the order of their rows."""
        unwanted = None if self._on_cpu else ~self._wanted[:, None]
        scalings = self._scaling._replace(temperature=self._temperature()).split(self.sizes)
        for (matrix, index, place), scaling in zip(self._pieces, scalings, strict=True):
            x = matrix if index is None else matrix[index]
            skipped = None if unwanted is None else unwanted[place]
            yield _RowBlock(x, place, skipped, scaling, self._in_place and x.stride(-1) == 1)

    def targets(self, gradient: Tensor) -> Iterator[Tensor | None]:
        """Each block's view of a contiguous gradient of the logits; None for a block of picked rows."""
        matrix = self.matrix_of(gradient)
        yield from matrix.split(self.sizes) if self._walk_all else (None for _ in self.sizes)

    def matrix_of(self, gradient: Tensor) -> Tensor:
        """A contiguous gradient of the logits as (T, V), without padding columns."""
        return gradient.view(self._wanted.shape[0], gradient.shape[-1])[:, : self._vocab_size]

    def scratch(self) -> Tensor:
        """Uninitialised memory for the largest block."""
        rows = max(self.sizes, default=0)
        return torch.empty(rows, self._vocab_size, dtype=self._dtype, device=self._logits.device)

    def pick(self, columns: Tensor) -> Tensor:
        """z (T, K) at columns (T, K); finite in unwanted rows, even if they hold NaN."""
        shape = (*self._logits.shape[:-1], columns.shape[-1])
        x = self._logits.gather(-1, columns.view(shape)).view(columns.shape).to(self._dtype)
        return self._scaling.apply_(x.masked_fill(~self._wanted[:, None], 0))

    def _temperature(self) -> float | Tensor:
        """The temperature of the N rows, or of all."""
        temperature = self._scaling.temperature
        return self.take(temperature) if isinstance(temperature, Tensor) else temperature

    def take(self, x: Tensor) -> Tensor:
        """(T, ...) -> (N, ...), the rows of the blocks in order."""
        return x if self._walk_all else x[self._index]

    def put_back(self, x: Tensor) -> Tensor:
        """(N, ...) -> (T, ...), 0 elsewhere."""
        if self._walk_all:
            return x
        return x.new_zeros(self._wanted.shape[0], *x.shape[1:]).index_copy_(0, self._index, x)
