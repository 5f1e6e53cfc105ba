"""The operator `kdloss::linear_logprobs`: from hidden states and a head to log-probs and entropies, and back.

The vocabulary is processed in slices, so only one tile of the (N, V) logits exists at a time:

    forward    for each slice, for each tile of rows:  z = h @ w.T, merged into the rows' state (`_softmax/rows.py`)
    backward   for each slice, for each tile of rows:  z again, dz from it, dh += dz @ w, dw += dz.T @ h

This is one matrix product forward and three backward, or two if the logits were kept. Slices are the outer loop, so
each slice of the head is widened once, and each slice of its gradient is written once, from one product or from a
float32 accumulator; dh is accumulated in float32 too. On a CPU that multiplies bfloat16, dz of bfloat16 hidden states
and head is rounded to it before its two products (`_softmax/products.py`). The width of a slice depends on D, V and the
device type, never on the mask.

N rows are gathered and computed: those with a label. The backward gathers those of them whose incoming gradient is not
0, so clipped tokens and groups without advantage cost nothing.

If `kernels` is set, `_triton/_linear.py` does the same, in slices whose width depends on T and V.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._softmax.head import Head
from kdloss._softmax.operator import operator
from kdloss._softmax.products import add_product_, product, product_, rounds_gradient
from kdloss._softmax.rows import RowState, Scaling, Sums, Upstream, gradient_of


class _Budget(NamedTuple):
    """The most that a tile of logits and a widened slice of the head may hold."""

    tile_rows: int
    tile_columns: int
    slice_elements: int


# On a CPU a slice and a tile take at most 16 MiB of float32. Tiles are square, because dh is summed over the slices and
# dw over the tiles of a slice. An accelerator needs fewer and larger products.
_CPU = _Budget(1 << 11, 1 << 11, 1 << 22)
_DEVICE = _Budget(8192, 1 << 15, 1 << 26)
# Logits of a block of rows, per thread: 2 MiB of float32.
_CPU_BLOCK = 1 << 19


@operator("linear_logprobs")
def linear_logprobs(
    hidden: Tensor,  # (T, D), anything in rows without a label
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    columns: Tensor,  # (T, K) int64; -100 is ignored, vocab_size marks a label in another shard
    rows: Tensor | None,  # (N,) int64, distinct, including all rows with a label. None: exactly these, found here
    row_temperature: Tensor | None,  # (T,)
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int,
    compact: bool,  # the backward leaves out rows without an incoming gradient, which waits for the device once
    kernels: bool,  # compute with the Triton kernels
    with_entropy: bool,
    store: bool,  # keep the logits; only with `rows`, because their number must be known
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,), maximum (T,), peak (T,), mean like entropy, logits (N, V) or (0, V)).

    A label in another shard only causes its row to be computed; its log-prob here is undefined.

    `maximum` is that of z, and the logits are z. From the kernels it is that of softcap(logit_scale * x), before the
    temperature, and the logits are the products with the head, before the bias.
    """
    index = _labelled(columns) if rows is None else rows
    if kernels:
        from kdloss._triton import _launch, _linear
        from kdloss._triton._row_math import LogitTransform

        count = index.shape[0] if store else 0
        products = _launch.room(count, vocab_size, dtype=torch.float32, device=hidden.device)
        transform = LogitTransform.of(bias, logit_scale, softcap)
        inputs = (hidden, weight, columns, index, transform, temperature, row_temperature)
        return *_linear.forward(*inputs, products, with_entropy), products
    n_tokens, columns = columns.shape[0], columns[index]
    head = Head(hidden, weight, bias, softcap, logit_scale)
    slices = _HeadSlices(head, columns, index, temperature, row_temperature)
    count, wide = index.shape[0], slices.hidden
    state = RowState.empty(count, like=wide, with_entropy=with_entropy)
    picked = wide.new_zeros(columns.shape)
    kept = wide.new_empty(count if store else 0, vocab_size)
    p = slices.scratch()
    for tile in slices.tiles(vocab_size):
        z = tile.logits()
        if store:
            kept[tile.rows, tile.columns] = z
        local = columns[tile.rows] - tile.columns.start
        outside = (local < 0) | (local >= z.shape[-1])
        picked[tile.rows] += z.gather(-1, local.masked_fill(outside, 0)).masked_fill(outside, 0)
        sums = Sums.empty(z.shape[0], like=z, with_entropy=with_entropy)
        for block, part in zip(z.split(slices.block_rows), sums.split(slices.blocks(z)), strict=True):
            part.read_(block, _shaped(p, block), block if with_entropy else None)
        merged = state.at(tile.rows).merge(RowState.of(sums))
        for whole, found in zip(state, merged, strict=True):
            if whole is not None and found is not None:
                whole[tile.rows] = found
        del z, block  # before the next tile is allocated

    def put_back(x: Tensor) -> Tensor:  # (N, ...) -> (T, ...), 0 elsewhere
        return x.new_zeros(n_tokens, *x.shape[1:]).index_copy_(0, index, x)

    logp = put_back(state.logp(picked).masked_fill(columns < 0, 0))
    maximum, peak = put_back(state.maximum).squeeze(-1), put_back(state.peak).squeeze(-1)
    if state.mean is None:
        return logp, wide.new_empty(0), maximum, peak, wide.new_empty(0), kept
    entropy = state.entropy().masked_fill((columns < 0).all(-1, keepdim=True), 0)
    return logp, put_back(entropy).squeeze(-1), maximum, peak, put_back(state.mean).squeeze(-1), kept


@linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, rows: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, vocab_size, _, kernels, with_entropy, store = options
    logp = hidden.new_empty(columns.shape, dtype=_checks.promoted_dtype(hidden, weight, bias))
    maximum = logp.new_empty(columns.shape[0])
    entropy = logp.new_empty(columns.shape[0] if with_entropy else 0)
    count = rows.shape[0] if store and rows is not None else 0
    if kernels:
        from kdloss._triton import _launch

        kept = _launch.room(count, vocab_size, dtype=torch.float32, device=logp.device)
    else:
        kept = logp.new_empty(count, vocab_size)
    return logp, entropy, maximum, torch.empty_like(maximum), torch.empty_like(entropy), kept


@operator("linear_logprobs_backward")
def linear_logprobs_backward(
    logp_gradient: Tensor | None,  # (T, K)
    entropy_gradient: Tensor | None,  # (T,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    rows: Tensor | None,
    row_temperature: Tensor | None,
    maximum: Tensor,
    peak: Tensor,
    mean: Tensor,
    kept: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    vocab_size: int,
    compact: bool,  # leave out rows without an incoming gradient, which waits for the device once
    kernels: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias in their dtypes; (0,) for one that is not needed.

    The state (maximum, peak, mean) is that of whole rows, of which the head may be a shard. The gradient of a label in
    another shard then goes only through the normalisation, and the gradient of hidden is this shard's share.
    """
    needs = (needs_hidden, needs_weight, needs_bias)
    wide_dtype = _checks.promoted_dtype(hidden, weight, bias)
    ignored = columns < 0
    g = torch.zeros(columns.shape, dtype=wide_dtype, device=hidden.device) if logp_gradient is None else logp_gradient
    g = g.masked_fill(ignored, 0)
    h = None if entropy_gradient is None else entropy_gradient.masked_fill(ignored.all(-1), 0)[:, None]
    index = _labelled(columns) if rows is None else rows
    places = None  # of the active rows among the computed ones
    if compact:
        active = (g[index] != 0).any(-1) if h is None else (g[index] != 0).any(-1) | (h[index, 0] != 0)
        places = active.nonzero().squeeze(-1)
        index = index[places]
    bias_dtype = (hidden if bias is None else bias).dtype
    if kernels:
        from kdloss._triton import _linear
        from kdloss._triton._row_math import LogitTransform, State

        known = State(columns, temperature, row_temperature, maximum, peak, None if h is None else mean)
        transform = LogitTransform.of(bias, logit_scale, softcap)
        dhidden, dhead, dshift = _linear.backward(
            g, None if h is None else h.squeeze(-1), known, hidden, weight, index, places, transform, kept, needs
        )
        return dhidden, dhead, dshift.to(bias_dtype)
    state = RowState(maximum[index, None], peak[index, None], None if h is None else mean[index, None])
    upstream = Upstream.of(state, columns[index], g[index], None if h is None else h[index]).unshifted()
    head = Head(hidden, weight, bias, softcap, logit_scale)
    slices = _HeadSlices(head, columns[index], index, temperature, row_temperature)

    x = slices.hidden
    narrow = rounds_gradient(hidden, weight, x.dtype)
    operand = slices.given if narrow else x
    gradients = _TileGradients(slices, upstream, kept, places, dtype=operand.dtype)
    dhidden = torch.zeros_like(x) if needs[0] else x.new_empty(0)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0)
    dbias = x.new_zeros(weight.shape[0] if needs[2] else 0)
    # sums over tiles are in the dtype of x; a single tile, or a head of that dtype, needs no other memory for them
    in_place = x.shape[0] <= slices.tile_rows or weight.dtype == x.dtype
    accumulator = x.new_empty(slices.width if needs[1] and not in_place else 0, x.shape[1])
    for tile in slices.tiles(vocab_size, widen=kept.shape[0] == 0 or (needs[0] and not narrow)):
        dz = gradients.of(tile)
        if needs[0]:
            add_product_(dhidden[tile.rows], dz, tile.weight if narrow else tile.wide)
        if narrow:
            gradients.add_labels_(dz, tile, dhidden[tile.rows] if needs[0] else None)
        if needs[1]:
            dw = dweight[tile.columns] if in_place else accumulator[: dz.shape[1]]
            (product_ if tile.first else add_product_)(dw, dz.T, operand[tile.rows])
            if tile.last and not in_place:
                dweight[tile.columns] = dw
        if needs[2]:
            dbias[tile.columns] += dz.sum(0, dtype=x.dtype)
        del dz  # before the next tile is allocated
    if needs[0]:
        dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, index, dhidden.to(hidden.dtype))
    return dhidden, dweight, dbias.to(bias_dtype)


@linear_logprobs_backward.register_fake
def _(
    _: Tensor | None, __: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = others[-3:]
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if needs[2] else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, columns, rows, row_temperature, *ctx.options, _, _ = inputs
    _, _, maximum, peak, mean, kept = output
    ctx.save_for_backward(hidden, weight, bias, columns, rows, row_temperature, maximum, peak, mean, kept)
    ctx.set_materialize_grads(False)  # None for an unused entropy is cheaper than zeros


def _differentiate(
    ctx: Any, logp_gradient: Tensor | None, entropy_gradient: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if entropy_gradient is not None and entropy_gradient.numel() == 0:
        entropy_gradient = None  # the forward computed no entropy
    if logp_gradient is None and entropy_gradient is None:
        return ()
    needs = ctx.needs_input_grad[:3]
    found = linear_logprobs_backward(logp_gradient, entropy_gradient, *ctx.saved_tensors, *ctx.options, *needs)
    return tuple(x if needed else None for x, needed in zip(found, needs, strict=True))


linear_logprobs.register_autograd(_differentiate, _save)


class _Tile(NamedTuple):
    """Some rows times one slice of the head: n rows, v columns."""

    rows: slice  # of the N
    columns: slice  # of the vocabulary
    hidden: Tensor  # (n, D), widened
    weight: Tensor  # (v, D) in the dtype of the head
    wide: Tensor  # (v, D), widened; the same as `weight` if nobody reads it
    bias: Tensor | None  # (v,)
    scaling: Scaling
    first: bool  # whether it is the first tile of its slice
    last: bool

    def logits(self) -> Tensor:
        """z (n, v), in new memory."""
        z = product(self.hidden, self.wide.T)
        if self.bias is not None:
            z.add_(self.bias)
        return self.scaling.apply_(z)


class _HeadSlices:
    """Gathered and widened rows of hidden states, and the head that they are multiplied with, slice by slice."""

    def __init__(
        self,
        head: Head,
        columns: Tensor,  # (N, K) labels of the rows
        index: Tensor,  # (N,) the rows
        temperature: float,
        row_temperature: Tensor | None,  # (T,), in place of the number
    ) -> None:
        dtype = _checks.promoted_dtype(*head.tensors())
        used = (columns >= 0).any(-1, keepdim=True)
        # set to 0, because NaN in an unlabelled row, times 0, would reach the gradient of the weight
        self.given = head.hidden.index_select(0, index).masked_fill_(~used, 0)
        self.hidden = self.given.to(dtype)
        self._weight, self._bias = head.weight, head.bias
        self.scaling = Scaling(head.softcap, head.logit_scale, temperature)
        if row_temperature is not None:
            divisor = torch.where(used, row_temperature.index_select(0, index).to(dtype)[:, None], 1)
            self.scaling = self.scaling._replace(temperature=divisor)
        on_cpu = index.device.type == "cpu"
        budget = _CPU if on_cpu else _DEVICE
        columns_that_fit = budget.slice_elements // max(1, self.hidden.shape[1]) // 256 * 256
        self.width = min(max(256, columns_that_fit), budget.tile_columns, head.weight.shape[0])
        self.tile_rows = min(budget.tile_rows, index.shape[0])
        threads = torch.get_num_threads()
        block_rows = max(threads, _CPU_BLOCK * threads // self.width) if on_cpu else self.tile_rows
        self.block_rows = max(1, min(block_rows, self.tile_rows))

    def scratch(self) -> Tensor:
        """Uninitialised memory for a block of rows of a tile, flat."""
        return self.hidden.new_empty(self.block_rows * self.width)

    def blocks(self, z: Tensor) -> list[int]:
        """The numbers of rows of the blocks that a tile z (n, v) is computed in."""
        return [block.shape[0] for block in z.split(self.block_rows)]

    def tiles(self, vocab_size: int, *, widen: bool = True) -> Iterator[_Tile]:
        """All tiles, slice by slice. `widen`: whether `_Tile.wide` is read."""
        count, dtype = self.hidden.shape[0], self.hidden.dtype
        for start in range(0, vocab_size if count else 0, self.width):
            columns = slice(start, min(start + self.width, vocab_size))
            weight = self._weight[columns]
            wide = weight.to(dtype) if widen else weight
            bias = None if self._bias is None else self._bias[columns].to(dtype)
            for first in range(0, count, self.tile_rows):
                rows = slice(first, min(first + self.tile_rows, count))
                hidden, scaling = self.hidden[rows], self.scaling.at(rows)
                yield _Tile(rows, columns, hidden, weight, wide, bias, scaling, first == 0, rows.stop == count)
            del wide  # before the next slice is widened


class _TileGradients:
    """dz of one tile after the other, computed by blocks of rows that stay in the cache.

    A bfloat16 dz is first without the incoming gradient of labels, which is the largest part of it: `add_labels_` adds
    that part to dh in float32. Otherwise it would be rounded twice, in the product with a slice and in the sum.
    """

    def __init__(
        self,
        slices: _HeadSlices,
        upstream: Upstream,  # of the N rows
        kept: Tensor,  # (M, V) logits, or (0, V)
        places: Tensor | None,  # (N,) of the rows among the M. None: all of them
        *,
        dtype: torch.dtype,  # of dz: that of the logits, or bfloat16
    ) -> None:
        self._slices, self._upstream, self._kept, self._places = slices, upstream, kept, places
        self._recompute = kept.shape[0] == 0
        wide, softcap = slices.hidden, slices.scaling.softcap
        # whether dz overwrites the logits: not if it has another dtype, and not if they belong to the caller
        self._in_place = self._recompute and dtype == wide.dtype
        self._room = wide.new_empty(0 if self._in_place else slices.tile_rows * slices.width, dtype=dtype)
        self._scratch = None if upstream.entropy is None else slices.scratch()
        self._loaded = None if self._recompute else slices.scratch()
        self._separate = None if softcap is None else slices.scratch()
        self._without_labels = dtype != wide.dtype
        self._labels = wide.new_empty(0, 1)  # (n, K) the part of dz that is left out in this tile
        self._columns = upstream.columns[:0]  # (n, K) where it belongs

    def of(self, tile: _Tile) -> Tensor:
        """dz (n, v), valid until the next tile."""
        n, v = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        z = tile.logits() if self._recompute else None
        dz = z if self._in_place else self._room[: n * v].view(n, v)
        assert dz is not None
        upstream = self._upstream.at(tile.rows).part(tile.columns.start, tile.columns.stop)
        labels = upstream.logp
        if self._without_labels:
            upstream, labels = upstream._replace(logp=torch.zeros_like(labels)), labels.clone()
        sizes, start = self._slices.blocks(dz), 0
        parts = zip(dz.split(sizes), upstream.split(sizes), tile.scaling.split(sizes), strict=True)
        for target, incoming, scaling in parts:
            rows = slice(start, start + target.shape[0])
            block = self._load(tile, rows, target) if z is None else z[rows]
            if self._separate is not None:
                out = _shaped(self._separate, block)
            else:
                out = target if target.dtype == block.dtype else block
            scratch = None if self._scratch is None else _shaped(self._scratch, block)
            if self._without_labels:
                scaling.backward_(labels[rows], block.gather(-1, incoming.columns))
            gradient_of(block, incoming, out=out, scratch=scratch)
            scaling.backward_(out, block)
            if out is not target:
                target.copy_(out)
            start = rows.stop
        self._labels, self._columns = labels, upstream.columns
        return dz

    def add_labels_(self, dz: Tensor, tile: _Tile, dhidden: Tensor | None) -> None:
        """Add what was left out of dz (n, v): to it and, times the head, to dhidden (n, D)."""
        rows = self._labels.any(-1).nonzero().squeeze(-1)
        for column, label in zip(self._columns[rows].unbind(-1), self._labels[rows].unbind(-1), strict=True):
            if dhidden is not None:
                dhidden.index_add_(0, rows, tile.weight[column] * label[:, None])
            dz[rows, column] = (dz[rows, column] + label).to(dz.dtype)

    def _load(self, tile: _Tile, rows: slice, like: Tensor) -> Tensor:
        """A copy of some rows of the tile's kept logits."""
        assert self._loaded is not None
        of_all = slice(tile.rows.start + rows.start, tile.rows.start + rows.stop)
        index = of_all if self._places is None else self._places[of_all]
        return _shaped(self._loaded, like).copy_(self._kept[index, tile.columns])


def _labelled(columns: Tensor) -> Tensor:
    """The rows (N,) that have a label."""
    return (columns >= 0).any(-1).nonzero().squeeze(-1)


def _shaped(scratch: Tensor, like: Tensor) -> Tensor:
    """The beginning of a flat scratch, in the shape of `like`."""
    return scratch[: like.numel()].view(like.shape)
