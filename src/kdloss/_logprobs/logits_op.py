"""The operator `kdloss::logprobs`: from logits to log-probs and entropies, and back.

It takes blocks of rows that fit the cache, widens each to float32 in a scratch block and reads everything off it there
(`_softmax/rows.py`). The backward needs the logits, which the caller holds anyway, and three saved numbers per row; it
recomputes e^(z - m) block by block straight into the gradient. Beyond the gradient itself, both directions
need the scratch and nothing else, however many rows there are.

    forward    reads V logits a row, writes K + 4 numbers
    backward   reads V logits a row, writes V numbers

Where `triton` is set, kernels do the same (`_triton/_logits_forward.py`, `_triton/_logits_backward.py`).

Registered with `torch.library`, so that `torch.compile`, activation checkpointing and export see one operation. Where a
compiler traces it without kernels, the same mathematics is offered as a formula (`_logprobs/compiled.py`), as it
fuses the passes into one; it saves the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._softmax.rows import RowState, Scaling, Sums, Upstream, flat_rows, gradient_of

# Elements of a scratch block for each thread. On a CPU: 2 MiB of float32, of which three or four fit the last level of
# cache. On an accelerator a block must fill the device.
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 26


@torch.library.custom_op("kdloss::logprobs", mutates_args=())
def logprobs(
    logits: Tensor,  # (..., V)
    # (T, K) int64, -100 ignored, vocab_size: in another shard, whose log-prob may be anything here; T = the product of
    # the leading axes. For any label that is outside the vocabulary the kernels give NaN
    columns: Tensor,
    row_temperature: Tensor | None,  # (T,)
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,), maximum, peak (T,), mean (T,) or (0,)), anything in rows without a label.

    `maximum` is that of z; from the kernels that of softcap(logits), before the temperature.
    """
    if triton:
        from kdloss._triton._logits_forward import forward

        return forward(logits, columns, row_temperature, temperature, softcap, vocab_size, with_entropy)
    labelled = (columns >= 0).any(-1)
    scaling = Scaling(softcap, 1.0, temperature)
    rows = _RowBlocks(logits, labelled, vocab_size, scaling, row_temperature)
    state = _read(rows, with_entropy=with_entropy)
    mean = None if state.mean is None else rows.put_back(state.mean)
    state = RowState(rows.put_back(state.maximum), rows.put_back(state.peak), mean)
    logp = state.logp(rows.pick(columns.clamp(0, vocab_size - 1))).masked_fill(columns < 0, 0)
    maximum, peak = state.maximum.squeeze(-1), state.peak.squeeze(-1)
    if mean is None:
        return logp, logp.new_empty(0), maximum, peak, logp.new_empty(0)
    entropy = state.entropy().squeeze(-1).masked_fill(~labelled, 0)
    return logp, entropy, maximum, peak, mean.squeeze(-1)


def _read(rows: _RowBlocks, *, with_entropy: bool) -> RowState:
    """The state (N, 1) of the wanted rows."""
    z, p, shifted = rows.scratch(), rows.scratch(), rows.scratch() if with_entropy else None
    sums = Sums.empty(rows.count, like=z, with_entropy=with_entropy)
    for block, part in zip(rows.blocks(), sums.split(rows.sizes), strict=True):
        part.read_(block.load(z), block.cut(p), None if shifted is None else block.cut(shifted))
    return RowState.of(sums)


@logprobs.register_fake
def _(
    logits: Tensor,
    columns: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
    triton: bool = False,
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
    triton: bool,
    part: bool = False,
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype; rows without an incoming gradient cost their zeros.

    With the state (maximum, peak, mean) of whole rows, logits may be a part of them: where `part` says so, the label
    vocab_size is in another one, and its gradient goes through the normalisation alone. Without it the kernels, which
    are handed labels as they come, pass over it as over any other that is outside the vocabulary.
    """
    if triton:
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
    triton: bool,
    part: bool = False,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, columns, row_temperature, *options, _, triton = inputs
    ctx.options = (*options, triton)
    _, _, maximum, peak, mean = output
    ctx.save_for_backward(logits, columns, row_temperature, maximum, peak, mean)
    ctx.set_materialize_grads(False)  # no gradient through the entropy is cheaper than one of 0


def _differentiate(
    ctx: Any, logp_gradient: Tensor | None, entropy_gradient: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if entropy_gradient is not None and entropy_gradient.numel() == 0:
        entropy_gradient = None  # none was asked for
    if logp_gradient is None and entropy_gradient is None:
        return (None,) * 8
    gradient = logprobs_backward(logp_gradient, entropy_gradient, *ctx.saved_tensors, *ctx.options)
    return gradient, *(None,) * 7


logprobs.register_autograd(_differentiate, setup_context=_save)


class _RowBlock(NamedTuple):
    """Some rows of one matrix of logits."""

    x: Tensor  # (n, V): a view, or a copy of picked rows
    place: slice | Tensor  # which of the T rows they are
    unwanted: Tensor | None  # (n, 1) bool: rows to read as 0
    scaling: Scaling
    as_it_is: bool  # whether x is z

    def load(self, scratch: Tensor) -> Tensor:
        """z: the logits themselves where nothing has to be done to them, else in `scratch`."""
        if self.as_it_is:
            return self.x
        z = self.cut(scratch).copy_(self.x)
        if self.unwanted is not None:
            z.masked_fill_(self.unwanted, 0)
        return self.scaling.apply_(z)

    def cut(self, scratch: Tensor) -> Tensor:
        """As many rows of a scratch block as this one has."""
        n = self.x.shape[0]
        return scratch if n == scratch.shape[0] else scratch[:n]


class _RowBlocks:
    """The wanted rows of logits, block after block: N of the T.

    Only on a CPU are unwanted rows passed over: elsewhere finding them would wait for the device, so there all rows are
    walked over and the unwanted ones, which may hold NaN, are read as 0.
    """

    def __init__(
        self,
        logits: Tensor,  # (..., V)
        wanted: Tensor,  # (T,)
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
        # logits that need no scratch leave their share of it to more rows
        self._in_place = self._on_cpu and logits.dtype == self._dtype and self._scaling.is_identity
        elements = _CPU_BLOCK * torch.get_num_threads() if self._on_cpu else _DEVICE_BLOCK
        self._size = max(1, (2 if self._in_place else 1) * elements // vocab_size)
        self._pieces = list(self._cut())
        self.sizes = [
            place.stop - place.start if isinstance(place, slice) else len(place) for *_, place in self._pieces
        ]
        self.count = sum(self.sizes)
        # whether the blocks together are all of the logits
        self.cover_all = self._walk_all and vocab_size == logits.shape[-1]

    def _cut(self) -> Iterator[tuple[Tensor, Tensor | None, slice | Tensor]]:
        """(views of rows or a whole matrix, which rows of it, which of the T rows they are)."""
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
        unwanted = None if self._on_cpu else ~self._wanted[:, None]
        scalings = self._scaling._replace(temperature=self._temperature()).split(self.sizes)
        for (matrix, index, place), scaling in zip(self._pieces, scalings, strict=True):
            x = matrix if index is None else matrix[index]
            skipped = None if unwanted is None else unwanted[place]
            yield _RowBlock(x, place, skipped, scaling, self._in_place and x.stride(-1) == 1)

    def targets(self, gradient: Tensor) -> Iterator[Tensor | None]:
        """Where in a contiguous gradient of the logits each block belongs, as a view; None where it is none."""
        matrix = self.matrix_of(gradient)
        yield from matrix.split(self.sizes) if self._walk_all else (None for _ in self.sizes)

    def matrix_of(self, gradient: Tensor) -> Tensor:
        return gradient.view(self._wanted.shape[0], gradient.shape[-1])[:, : self._vocab_size]

    def scratch(self) -> Tensor:
        rows = max(self.sizes, default=0)
        return torch.empty(rows, self._vocab_size, dtype=self._dtype, device=self._logits.device)

    def pick(self, columns: Tensor) -> Tensor:
        """z (T, K) at columns (T, K)."""
        shape = (*self._logits.shape[:-1], columns.shape[-1])
        x = self._logits.gather(-1, columns.view(shape)).view(columns.shape).to(self._dtype)
        return self._scaling.apply_(x.masked_fill(~self._wanted[:, None], 0))

    def _temperature(self) -> float | Tensor:
        temperature = self._scaling.temperature
        return self.take(temperature) if isinstance(temperature, Tensor) else temperature

    def take(self, x: Tensor) -> Tensor:
        """(T, ...) -> (N, ...), the rows of the blocks in their order."""
        return x if self._walk_all else x[self._index]

    def put_back(self, x: Tensor) -> Tensor:
        """(N, ...) -> (T, ...), 0 elsewhere."""
        if self._walk_all:
            return x
        return x.new_zeros(self._wanted.shape[0], *x.shape[1:]).index_copy_(0, self._index, x)
