"""The logits at K kept ids of a row, and the log-sum-exp of all others: one read.

    z = x / τ,   kept = z at the ids,   rest = log sum_{v not in ids} e^(z_v)

The kept logits must not enter the sum: subtracting them afterwards would leave no digits where little remains.

A program takes one row, or one split of a row, in blocks of (lanes, width) logits as in `_logits_forward.py`, with a
state (m, s) per lane (`_row_math.py`). A lane takes a *cell* from a block: `width` logits, 16 bytes. The ids of a row
ascend, so a pointer advances along them with the blocks. The ids in a block mark their cells, and marked cells are left
out entirely, at the cost of two selections per lane. In the columns before the first cell and after the last one, each
id is left out by itself. The program that has the state of the whole row (in a second kernel if there are splits) reads
`kept` at the ids. It also reads the marked cells again, K at most, and adds their logits to the state, except those at
the ids. Splits and cells are merged in a fixed order without atomics: the same shapes give the same bits, if rows begin
at the same offsets from multiples of 16 bytes.

The alternatives, in instructions per logit for V = 151936 in bfloat16, beside those of the fold. Each of 256 threads
has two lanes, so 16 logits of a block:

    mark cells, pointer     17 per id and thread: 2 per logit at K = 64, 7 at 256; plus 1/4 to leave cells out
    mask logits, pointer    one compare per logit instead of per lane: 3 at K = 64, 13 at 256; plus 1 to mask
    a bit set, V / 8 bytes  2 for any K, and 12 % more bytes, as it is written before it is read

So up to about 100 ids the first is bound by memory, like the gather; at 256 ids it takes about a third longer.

    bytes       V logits read per row, 48 K for ids and cells, 8 per split written and read again, 4 + 4 K written.
                Without the rest, only the logits at the ids are read
    operations  17 per id and thread, and some 300 per id for its cell; those per logit are in `docs/kernels.md`

A row whose ids are all padding is not read: its rest is -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._row_math import (
    LOG2_E,
    body_of,
    empty_state,
    end_columns,
    fold,
    load_cells,
    log_of,
    merge,
    merge_all,
    row_offset,
    row_rate,
)

PADDING = -1


@triton.jit
def look_along(ids, row, n_ids, first, block_ids: tl.constexpr):
    """(how many ids of a row lie before column `first`, whether any id of the row is not padding)."""
    before, found = 0, 0
    for start in range(0, n_ids, block_ids):
        k = start + tl.arange(0, block_ids)
        value = tl.load(ids + row.to(tl.int64) * n_ids + k, mask=k < n_ids, other=-1)
        before += tl.sum(((value < first) & (k < n_ids)).to(tl.int32), 0)
        found += tl.sum((value != -1).to(tl.int32), 0)
    return before, found > 0


@triton.jit
def next_id(ids, pointer, n_ids):
    """The id at `pointer`, or a number past every column if there is none."""
    return tl.load(ids + pointer, mask=pointer < n_ids, other=0x7FFFFFFFFFFF)


@triton.jit
def fold_free(m, s, c, held, rate):
    """The state (n,) after one more block c (n, E), without held lanes: their NaN and +inf do not count."""
    top = tl.maximum(m, tl.where(held, float("-inf"), tl.max(c, 1)))
    base = tl.where(top == float("-inf"), 0.0, top)
    rate2 = rate * LOG2_E + tl.zeros_like(s)
    e = tl.exp2((c - base[:, None]) * rate2[:, None])
    return top, tl.exp2((m - base) * rate2) * s + tl.where(held, 0.0, tl.sum(e, 1))


@triton.jit
def finish_row(
    row_logits,
    ids,
    row,
    n_ids,
    vocab_size,
    rate,
    m,  # the row's state (m, s) without the cells that hold ids
    s,
    kept,
    rest,
    with_rest: tl.constexpr,
    width: tl.constexpr,
    block_ids: tl.constexpr,
):
    """Write the logits at the ids, add the other logits of their cells to the state, and write the rest."""
    head, cells = body_of(row_logits, vocab_size, width, False)
    for start in range(0, n_ids, block_ids):
        k = start + tl.arange(0, block_ids)
        place = row.to(tl.int64) * n_ids + k
        value = tl.load(ids + place, mask=k < n_ids, other=-1)
        inside = (value >= 0) & (value < vocab_size)
        x = tl.load(row_logits + value, mask=inside, other=0.0).to(tl.float32)
        tl.store(kept + place, tl.where(inside, x * rate, float("-inf")), mask=k < n_ids)
        if with_rest:
            # the first id of a cell represents it; up to `width` consecutive ids lie in one cell
            cell = (value - head) // width
            before = tl.load(ids + place - 1, mask=(k > 0) & (k < n_ids), other=-1)
            in_cell = inside & (value >= head) & (cell < cells)
            leads = in_cell & ((before < head) | ((before - head) // width != cell))
            taken = tl.zeros([block_ids], tl.int32)  # one bit per logit of the cell
            for step in tl.static_range(width):
                other = tl.load(ids + place + step, mask=k + step < n_ids, other=-1)
                near = (other >= head) & ((other - head) // width == cell)  # on a GPU -1 // width is 0
                taken = taken | tl.where(near, 1 << ((other - head) % width).to(tl.int32), 0)
            cell_m, cell_s, nothing = empty_state(block_ids)
            for place_in_cell in tl.static_range(width):
                column = head + cell * width + place_in_cell
                free = leads & ((taken >> place_in_cell) & 1 == 0)
                c = tl.load(row_logits + column, mask=free, other=float("-inf")).to(tl.float32)
                cell_m, cell_s, nothing = fold(cell_m, cell_s, nothing, c[:, None], rate, False)
            cell_m, cell_s, nothing = merge_all(cell_m, cell_s, nothing, rate, False)
            m, s, nothing = merge(m, s, nothing, cell_m, cell_s, nothing, rate, False)
    if with_rest:
        tl.store(rest + row, m * rate + log_of(s))
    else:
        tl.store(rest + row, float("-inf"))


@triton.jit
def marked(ids, pointer, held_id, n_ids, start, stop, lane, width: tl.constexpr):
    """(pointer, the id at it, whether a lane of the block from column `start` on has an id) after the ids to `stop`."""
    held = lane < 0
    while held_id < stop:
        cell = (held_id - start).to(tl.uint32) // width  # a single shift
        held = held | (lane == cell.to(tl.int32))
        pointer += 1
        held_id = next_id(ids, pointer, n_ids)
    return pointer, held_id, held


@triton.jit
def end_held(ids, pointer, n_ids, stop, column):
    """(the first id from `pointer` on that is not below `stop`, which of the columns (n,) are at ids before it)."""
    held = column < 0
    held_id = next_id(ids, pointer, n_ids)
    while held_id < stop:
        held = held | (column == held_id)
        pointer += 1
        held_id = next_id(ids, pointer, n_ids)
    return pointer, held


@triton.jit(
    do_not_specialize=[
        "logits",
        "vocab_size",
        "n_ids",
        "inner",
        "outer_stride",
        "inner_stride",
        "part_stride",
        "blocks",
        "splits",
    ]
)
def kept_and_rest_kernel(
    logits,  # rows (outer, inner)
    ids,  # (T, K) int64, contiguous; those inside the vocabulary ascend; -1 is padding, others match no column
    row_temperature,  # (T,) or None
    kept,  # (T, K) float32, like all that follow
    rest,  # (T,)
    parts,  # (2, T, splits) states, or None if one program has the whole row
    temperature,
    vocab_size,
    n_ids,
    inner,
    outer_stride: tl.int64,
    inner_stride,
    part_stride,  # T * splits
    blocks,  # per split, of lanes * width columns
    splits,
    lanes: tl.constexpr,
    width: tl.constexpr,
    block_ids: tl.constexpr,
):
    """One program per row, or per split of a row."""
    program = tl.program_id(0)
    row = program // splits
    row_logits = logits + row_offset(row, inner, outer_stride, inner_stride)
    head, cells = body_of(row_logits, vocab_size, width, False)
    first = tl.minimum((program % splits) * blocks * lanes, cells)
    last = tl.minimum(first + blocks * lanes, cells)
    whole = first + (last - first) // lanes * lanes
    at_start, at_stop = program % splits == 0, program % splits == splits - 1
    pointer, found = look_along(ids, row, n_ids, tl.where(at_start, 0, head + first * width), block_ids)
    rate = row_rate(row_temperature, row, temperature)
    row_ids = ids + row.to(tl.int64) * n_ids
    m, s, nothing = empty_state(lanes)
    if found:
        lane = tl.arange(0, lanes)
        column = end_columns(head, cells, width, lanes)
        if at_start:
            pointer, held_end = end_held(row_ids, pointer, n_ids, head, column)
            c_end = tl.load(row_logits + column, mask=(column < head) & ~held_end, other=float("-inf"))
            m, s, nothing = fold(m, s, nothing, c_end.to(tl.float32)[:, None], rate, False)
        held_id = next_id(row_ids, pointer, n_ids)
        for start in range(first, whole, lanes):
            pointer, held_id, held = marked(
                row_ids, pointer, held_id, n_ids, head + start * width, head + (start + lanes) * width, lane, width
            )
            c = load_cells(row_logits + head, start, cells, lanes, width, False, False)
            m, s = fold_free(m, s, c, held, rate)
        if whole < last:
            pointer, held_id, held = marked(
                row_ids, pointer, held_id, n_ids, head + whole * width, head + last * width, lane, width
            )
            c = load_cells(row_logits + head, whole, cells, lanes, width, True, False)
            m, s = fold_free(m, s, c, held, rate)
        if at_stop:
            pointer, held_end = end_held(row_ids, pointer, n_ids, vocab_size, column)
            at_end = (column >= head) & (column < vocab_size) & ~held_end
            c_end = tl.load(row_logits + column, mask=at_end, other=float("-inf"))
            m, s, nothing = fold(m, s, nothing, c_end.to(tl.float32)[:, None], rate, False)
    m, s, _ = merge_all(m, s, nothing, rate, False)
    if parts is None:
        finish_row(row_logits, ids, row, n_ids, vocab_size, rate, m, s, kept, rest, True, width, block_ids)
    else:
        tl.store(parts + program, m)
        tl.store(parts + part_stride + program, s)


@triton.jit(
    do_not_specialize=[
        "logits",
        "vocab_size",
        "n_ids",
        "inner",
        "outer_stride",
        "inner_stride",
        "part_stride",
        "splits",
    ]
)
def finish_kernel(
    logits,
    ids,
    row_temperature,
    kept,
    rest,
    parts,  # None: the rest is not wanted
    temperature,
    vocab_size,
    n_ids,
    inner,
    outer_stride: tl.int64,
    inner_stride,
    part_stride,
    splits,
    block_splits: tl.constexpr,  # at least `splits`
    width: tl.constexpr,
    block_ids: tl.constexpr,
):
    """Merge the splits of a row and handle its ids. The arguments are those of `kept_and_rest_kernel`."""
    row = tl.program_id(0)
    rate = row_rate(row_temperature, row, temperature)
    row_logits = logits + row_offset(row, inner, outer_stride, inner_stride)
    m, s = float("-inf"), 0.0
    if parts is not None:
        k = tl.arange(0, block_splits)
        place = parts + row * splits + k
        part_m = tl.load(place, mask=k < splits, other=float("-inf"))
        part_s = tl.load(place + part_stride, mask=k < splits, other=0.0)
        m, s, _ = merge_all(part_m, part_s, tl.zeros([block_splits], tl.float32), rate, False)
    finish_row(
        row_logits,
        ids,
        row,
        n_ids,
        vocab_size,
        rate,
        m,
        s,
        kept,
        rest,
        parts is not None,
        width,
        block_ids,
    )


def forward(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (..., K) int64; those inside the vocabulary ascend; -1 is padding
    row_temperature: Tensor | None,  # (...,)
    temperature: float,
    vocab_size: int,
    with_rest: bool,
) -> tuple[Tensor, Tensor]:
    """(kept (..., K), rest (...,)), float32, every element written."""
    n_ids = ids.shape[-1]
    flat, taus = rows_of(ids, row_temperature)
    kept = torch.empty(flat.shape, dtype=torch.float32, device=logits.device)
    rest = kept.new_empty(flat.shape[0])
    block_ids = _launch.block_labels(n_ids)
    with _launch.on_device(logits):
        for place, piece in _launch.pieces(logits):
            n = piece.rows
            if n == 0:
                continue
            # two lanes per thread: with four, their marks and 32 logits spill
            launch = _launch.forward(n, vocab_size, logits.dtype, most=512)
            split = with_rest and launch.splits > 1
            parts = kept.new_empty(2, n, launch.splits) if split else None
            arguments = (
                piece.x,
                flat[place],
                None if taus is None else taus[place],
                kept[place],
                rest[place],
                parts,
                temperature,
                vocab_size,
                n_ids,
                piece.inner,
                *piece.strides,
                n * launch.splits,
            )
            if with_rest:
                kept_and_rest_kernel[(n * launch.splits,)](
                    *arguments,
                    launch.blocks(vocab_size),
                    launch.splits,
                    launch.lanes,
                    launch.width,
                    block_ids,
                    num_warps=launch.warps,
                )
            if split or not with_rest:
                finish_kernel[(n,)](*arguments, launch.splits, _launch.SPLITS, launch.width, block_ids, num_warps=1)
    return kept.view(ids.shape), rest.view(ids.shape[:-1])


def rows_of(ids: Tensor, row_temperature: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(T, K) ids and (T,) temperatures, as the kernels read them."""
    taus = None if row_temperature is None else row_temperature.reshape(-1).float().contiguous()
    return ids.reshape(ids.shape[:-1].numel(), ids.shape[-1]).contiguous(), taus


def forward_in_torch(
    logits: Tensor,  # (T, V)
    ids: Tensor,  # (T, K)
    row_temperature: Tensor | None,
    temperature: float,
    vocab_size: int,
    with_rest: bool,
) -> tuple[Tensor, Tensor]:
    """The same algorithm in torch, block after block, with all splits of all rows side by side."""
    rows, columns = logits.shape
    launch = _launch.forward(rows, vocab_size, logits.dtype, most=512)
    rate = torch.full((rows,), temperature) if row_temperature is None else row_temperature
    rate = rate.to(logits.device, torch.float32).reciprocal()
    inside, padded = (ids >= 0) & (ids < vocab_size), (ids == PADDING).all(-1)
    c = logits.float().masked_fill(torch.arange(columns, device=logits.device) >= vocab_size, -torch.inf)
    kept = (c.gather(-1, ids.clamp(0, columns - 1)) * rate[:, None]).masked_fill(~inside, -torch.inf)
    if not with_rest:
        return kept, kept.new_full((rows,), -torch.inf)

    blocks = launch.blocks(vocab_size)
    size = launch.splits * blocks * launch.lanes * launch.width
    c = torch.nn.functional.pad(c[:, :vocab_size], (0, size - vocab_size), value=-torch.inf)
    taken = torch.zeros(rows, size + 1, dtype=torch.bool, device=c.device)
    taken = taken.scatter_(-1, torch.where(inside, ids, size), True)[:, :-1]
    shape = (rows, launch.splits, blocks, launch.lanes, launch.width)
    cells, taken = c.masked_fill(padded[:, None], -torch.inf).view(shape), taken.view(shape)
    held = taken.any(-1, keepdim=True)
    m, s = cells.masked_fill(held, -torch.inf), torch.ones_like(cells)
    for axis in (4, 2, 2, 1):  # merges cells, then blocks, lanes and splits
        m, s = _merged(m, s, rate, axis)
    held_m, held_s = _merged(cells.masked_fill(~held | taken, -torch.inf).flatten(1), torch.ones_like(c), rate, 1)
    m, s = _merged(torch.stack([m, held_m], 1), torch.stack([s, held_s], 1), rate, 1)
    return kept, m * rate + s.log()


def _merged(m: Tensor, s: Tensor, rate: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The states of parts along an axis, merged into one."""
    top = m.amax(axis, keepdim=True)
    a = torch.exp((m - top.masked_fill(top == -torch.inf, 0)) * rate.view(-1, *(1,) * (m.ndim - 1)))
    return top.squeeze(axis), (a * s).sum(axis)
