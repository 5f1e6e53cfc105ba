"""The logits of the kept ids, and the log-sum-exp of all others, from hidden states and a head, as one operator.

`topk_op.py` for logits that exist a tile at a time: some trained rows times a slice of the vocabulary. A slice is read
as that of a shard is, and its results are merged. The rest is summed over its own columns: from the log-probs of the
ids alone, 1 minus their mass would lose all its digits where little is left.

The backward takes the logits of a tile again, computed or kept (`keeps_logits`), and overwrites them with their
gradient. On a CPU a tile holds 16 MiB, and a slice of the head is widened, and its gradient rounded, once per slice. An
accelerator takes whole rows, as many as the budget of a chunk allows.

If each rank holds a slice of the vocabulary, the results of a rank are merged as in `topk_op.py`: one all-gather of
K + 1 values per token. The gradient of the hidden states is summed over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdloss import _checks
from kdloss._distributed.vocab_shard import VocabShard
from kdloss._logprobs.from_hidden import keeps_logits, select_rows
from kdloss._softmax.head import (
    Head,
    HeadGradient,
    Heads,
    KernelHeadGradient,
    TorchHeadGradient,
    head_product_,
    room_for_gradient,
)
from kdloss._softmax.operator import operator
from kdloss._softmax.rows import Scaling

from .hidden_passes import chunk_rows, product_of_rows_
from .topk_op import (
    gradient_of_kept_and_rest,
    gradient_of_kept_and_rest_,
    ids_of_slice,
    kept_and_rest_of_rows,
    merge_ranks,
)

# On a CPU: what a tile and a widened slice of the head may hold, 16 MiB of float32; the most rows and fewest columns.
_TILE_ENTRIES, _TILE_ROWS, _TILE_COLUMNS = 2**22, 2**11, 2**8


def linear_kept_and_rest(
    heads: Heads,
    ids: Tensor,  # (T, K) int64, distinct and ascending within a row; -1 is padding
    trained: Tensor,  # (T,) bool
    *,
    with_rest: bool,
) -> tuple[Tensor, Tensor]:  # (T, K), (T,)
    """`kept_and_rest` of the logits of the trained rows; 0 in the others. Differentiable in the student's head."""
    student, _, softmax, _ = heads
    taus = softmax.flat_temperature()
    rows, _ = select_rows(trained, None)
    store = rows is not None and keeps_logits(rows.shape[0] * softmax.local_size, *student.tensors())
    options = (
        student.softcap,
        student.logit_scale,
        softmax.temperature,
        softmax.local_size,
        with_rest,
        softmax.kernels,
        store,
    )
    if softmax.shard is None:
        kept, rest, _ = _linear_kept_and_rest(*student.tensors(), ids, trained, rows, taus, *options)
        return kept, rest
    hidden = softmax.shard.enter(student.hidden)
    inputs = (hidden, student.weight, student.bias, ids, trained, rows, taus, options, softmax.shard)
    kept, rest = _ShardedLinearTopk.apply(*inputs)  # type: ignore[no-untyped-call]
    return kept, rest


@operator("linear_kept_and_rest")
def _linear_kept_and_rest(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    trained: Tensor,
    rows: Tensor | None,  # (N,) the trained ones. None: found here
    row_temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
    kernels: bool,
    store: bool,  # keep the logits; only with `rows`, because their number must be known
) -> tuple[Tensor, Tensor, Tensor]:
    """(kept (T, K), rest (T,), logits (N, V) or (0, V))."""
    dtype = _checks.promoted_dtype(hidden, weight, bias)
    index = trained.nonzero().squeeze(-1) if rows is None else rows
    head = Head(hidden, weight, bias, softcap, logit_scale).without_padding(vocab_size)
    logits = hidden.new_empty(index.shape[0] if store else 0, vocab_size, dtype=dtype)
    columns = ids[index]
    taus = None if row_temperature is None else row_temperature[index]
    kept = hidden.new_full(columns.shape, -math.inf, dtype=dtype)
    rest = hidden.new_full(columns.shape[:1], -math.inf, dtype=dtype)
    for tile in _tiles(head, index, dtype, kernels=kernels):
        if store:
            logits[tile.rows, tile.columns] = tile.y
        here, tau = tile.of_slice(columns, taus)
        found = kept_and_rest_of_rows(tile.y, here, tau, temperature, tile.y.shape[1], with_rest, kernels)
        kept[tile.rows] = torch.maximum(kept[tile.rows], found[0])
        rest[tile.rows] = torch.logaddexp(rest[tile.rows], found[1])
    shape = ids.shape
    all_kept, all_rest = kept.new_zeros(shape).index_copy_(0, index, kept), rest.new_zeros(shape[:1])
    return all_kept, all_rest.index_copy_(0, index, rest), logits


@_linear_kept_and_rest.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, rows, *_, vocab_size, _, _, store = others
    kept = hidden.new_empty(ids.shape, dtype=_checks.promoted_dtype(hidden, weight, bias))
    count = rows.shape[0] if store and rows is not None else 0
    return kept, kept.new_empty(ids.shape[:1]), kept.new_empty(count, vocab_size)


@operator("linear_kept_and_rest_backward")
def _linear_kept_and_rest_backward(
    upstream_kept: Tensor,
    upstream_rest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    trained: Tensor,
    rows: Tensor | None,
    row_temperature: Tensor | None,
    rest: Tensor,
    logits: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
    kernels: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias in their dtypes; (0,) for one that is not needed."""
    dtype = _checks.promoted_dtype(hidden, weight, bias)
    index = trained.nonzero().squeeze(-1) if rows is None else rows
    # tokens whose loss was clipped, masked or weighted to 0 cost nothing
    places = ((upstream_kept[index] != 0).any(-1) | (upstream_rest[index] != 0)).nonzero().squeeze(-1)
    index = index[places]
    head = Head(hidden, weight, bias, softcap, logit_scale).without_padding(vocab_size)
    columns, rest, u, v = ids[index], rest[index], upstream_kept[index], upstream_rest[index]
    taus = None if row_temperature is None else row_temperature[index]
    d_rows = hidden.new_zeros((index.shape[0] if needs_hidden else 0, hidden.shape[1]), dtype=dtype)
    d_weight = torch.zeros(weight.shape if needs_weight else (0,), dtype=weight.dtype, device=hidden.device)
    d_bias = torch.zeros(weight.shape[:1] if needs_bias else (0,), dtype=dtype, device=hidden.device)
    total = d_weight  # of one slice, in the dtype of the logits
    for tile in _tiles(head, index, dtype, kernels=kernels, logits=logits, places=places):
        here, tau = tile.of_slice(columns, taus)
        of_rows = (here, tau, rest[tile.rows], temperature, with_rest)
        gradient = tile.gradient(u[tile.rows], v[tile.rows], *of_rows)
        if needs_hidden:
            d_rows[tile.rows] += gradient.of_hidden()
        if needs_weight:
            if tile.rows.start == 0:
                slice_of = d_weight[tile.columns]
                total = slice_of if weight.dtype == dtype else torch.zeros_like(slice_of, dtype=dtype)
            gradient.add_to_weight_(total)
            if tile.rows.stop == index.shape[0] and weight.dtype != dtype:
                d_weight[tile.columns] = total
        if needs_bias:
            gradient.add_to_bias_(d_bias[tile.columns])
        del tile, gradient  # they hold the logits
    d_hidden = torch.zeros(hidden.shape if needs_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    if needs_hidden:
        d_hidden.index_copy_(0, index, d_rows.to(hidden.dtype))
    return d_hidden, d_weight, d_bias.to(weight.dtype if bias is None else bias.dtype)


@_linear_kept_and_rest_backward.register_fake
def _(
    upstream_kept: Tensor, upstream_rest: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = others[-3:]
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


# the first arguments of the operator
_TENSORS = 7


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.options = inputs[_TENSORS:-1]
    ctx.set_materialize_grads(False)  # None for the logits is cheaper than zeros


def _backward(
    ctx: Any, upstream_kept: Tensor | None, upstream_rest: Tensor | None, _: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    *tensors, rest, logits = ctx.saved_tensors
    ids = tensors[3]
    u = rest.new_zeros(ids.shape) if upstream_kept is None else upstream_kept
    v = torch.zeros_like(rest) if upstream_rest is None else upstream_rest
    needs = ctx.needs_input_grad[:3]
    found = _linear_kept_and_rest_backward(u, v, *tensors, rest, logits, *ctx.options, *needs)
    return tuple(x if needed else None for x, needed in zip(found, needs, strict=True))


_linear_kept_and_rest.register_autograd(_backward, _save)


class _ShardedLinearTopk(torch.autograd.Function):
    """`_linear_kept_and_rest` of a head that is a slice of the vocabulary; results are those of whole rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        trained: Tensor,
        rows: Tensor | None,
        row_temperature: Tensor | None,
        options: tuple[Any, ...],
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        tensors = (hidden, weight, bias, ids_of_slice(ids, shard.start), trained, rows, row_temperature)
        kept, rest, logits = _linear_kept_and_rest(*tensors, *options)
        kept, rest = merge_ranks(kept, rest, shard, with_rest=options[4])
        ctx.save_for_backward(*tensors, rest, logits)
        ctx.options = options[:-1]
        return kept, rest

    @staticmethod
    def backward(ctx: Any, upstream_kept: Tensor, upstream_rest: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, upstream_kept, upstream_rest), *(None,) * 6


class _Tile(NamedTuple):
    """Logits of n of the N rows at v columns."""

    rows: slice
    columns: slice
    y: Tensor  # (n, v)
    hidden: Tensor  # (n, D) in the dtype of the product
    head: Head  # of these columns
    kernels: bool

    def of_slice(self, ids: Tensor, taus: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The ids of these rows as columns of the tile, and their temperatures."""
        return ids_of_slice(ids[self.rows], self.columns.start), None if taus is None else taus[self.rows]

    def gradient(
        self,
        upstream_kept: Tensor,
        upstream_rest: Tensor,
        ids: Tensor,
        taus: Tensor | None,
        rest: Tensor,
        temperature: float,
        with_rest: bool,
    ) -> HeadGradient:
        """Overwrites the logits."""
        softcap, scale = self.head.softcap, self.head.logit_scale
        given = (upstream_kept * scale, upstream_rest * scale, self.y, ids, taus, rest, temperature)
        if self.kernels:
            dx = gradient_of_kept_and_rest(*given, self.y.shape[1], with_rest, kernels=True)
            dx = Scaling(softcap, 1.0, 1.0).backward_(dx, self.y)
            narrow = self.head.hidden.dtype == self.head.weight.dtype == torch.bfloat16
            return KernelHeadGradient(dx.to(torch.bfloat16) if narrow else dx, self.hidden, self.head.weight)
        out = room_for_gradient(self.y, self.head)
        if softcap is None:
            gradient_of_kept_and_rest_(out, *given, with_rest)
        else:
            dx = gradient_of_kept_and_rest_(torch.empty_like(self.y), *given, with_rest)
            out.copy_(Scaling(softcap, 1.0, 1.0).backward_(dx, self.y))
        return TorchHeadGradient(out, self.hidden.to(out.dtype), self.head.weight)


def _tiles(
    head: Head,
    index: Tensor,  # (N,) the rows
    dtype: torch.dtype,  # of the logits
    *,
    kernels: bool,
    logits: Tensor | None = None,  # (M, V) kept from the forward; (0, V) and None: computed
    places: Tensor | None = None,  # (N,) of the rows among the M
) -> Iterator[_Tile]:
    """Yield the tiles of a slice of the vocabulary, then those of the next. Their logits share memory."""
    count, vocab_size = index.shape[0], head.weight.shape[0]
    if kernels or index.device.type != "cpu":
        height, width = min(count, chunk_rows(vocab_size, index.device)), vocab_size
    else:
        height = min(count, _TILE_ROWS)
        width = min(max(_TILE_COLUMNS, _TILE_ENTRIES // max(1, height, head.hidden.shape[1])), vocab_size)
    room = head.hidden.new_empty(height * width, dtype=dtype)
    for left in range(0, vocab_size, width):
        columns = slice(left, min(left + width, vocab_size))
        bias = None if head.bias is None else head.bias[columns]
        part = head._replace(weight=head.weight[columns], bias=bias)
        for top in range(0, count, max(1, height)):
            rows = slice(top, min(top + height, count))
            shape = (rows.stop - top, columns.stop - left)
            y = room[: shape[0] * shape[1]].view(shape)
            if logits is not None and logits.shape[0]:
                assert places is not None
                torch.index_select(logits[:, columns], 0, places[rows], out=y)
                hidden = head.hidden.index_select(0, index[rows])
            else:
                hidden = _logits_(y, part, index[rows], kernels=kernels)
            yield _Tile(rows, columns, y, hidden, part, kernels)


def _logits_(y: Tensor, head: Head, rows: Tensor, *, kernels: bool) -> Tensor:
    """Write the logits (n, v) of some rows of the hidden states, and return these rows."""
    if kernels:
        hidden = product_of_rows_(y, head, rows)
        if head.bias is not None:
            y.add_(head.bias.to(y.dtype))
    else:
        hidden = head.hidden.index_select(0, rows)
        head_product_(y, hidden.to(y.dtype), head.weight, head.bias)
    Scaling(head.softcap, head.logit_scale, 1.0).apply_(y)
    return hidden
