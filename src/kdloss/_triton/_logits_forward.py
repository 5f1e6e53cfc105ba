"""Logits to log-probs and entropies: one read.

A program takes one row, or one split of a row, in blocks of (lanes, width) logits. `width` logits are a cell of 16
bytes (`_row_math.py`), wherever the row begins. The columns before the first cell and after the last one come last.
Each lane has its own state (m, s, u), so threads exchange nothing inside the loop. Every logit costs one exponential:
a lane first takes the maximum of its `width` new logits, then rescales its state once for all of them. After the loop
the lanes are merged in a tree. A second kernel merges the splits of a row in the same way. Neither uses atomics: the
same shapes give the same bits, if rows begin at the same offsets from multiples of 16 bytes.

The program that has the state of the whole row reads the logits at the labels again, K per row. A row whose labels are
all ignored is not read.

    bytes       V logits read per row; 12 per split written and read again if there are several; 16 + 4 K written
    operations  widen, subtract, scale, e^x, add, and the max; with the entropy also clamp and multiply-add

`docs/kernels.md` has the instructions per logit that ptxas makes of this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._row_math import (
    body_of,
    capped,
    empty_state,
    end_columns,
    entropy_of,
    fold,
    label_logp,
    load_cells,
    mean_of,
    merge_all,
    row_offset,
    row_rate,
)

IGNORE_INDEX = -100
LOWEST = -3.0e38


@triton.jit
def any_label(columns, row, n_labels, block_labels: tl.constexpr):
    """Whether a row has a label that is not ignored."""
    found = 0
    for start in range(0, n_labels, block_labels):
        k = start + tl.arange(0, block_labels)
        label = tl.load(columns + row.to(tl.int64) * n_labels + k, mask=k < n_labels, other=-100)
        found += tl.sum((label != -100).to(tl.int32), 0)
    return found > 0


@triton.jit
def write_row(row_logits, columns, row, n_labels, vocab_size, softcap, rate, state, out, block_labels):
    """Write what follows from a row's whole state (m, s, u) to `out`: logp, entropy, maximum, peak, mean."""
    m, s, u = state
    logp, entropy, maximum, peak, mean = out
    for start in range(0, n_labels, block_labels):
        k = start + tl.arange(0, block_labels)
        place = row.to(tl.int64) * n_labels + k
        label = tl.load(columns + place, mask=k < n_labels, other=-100)
        inside = (label >= 0) & (label < vocab_size)
        x = tl.load(row_logits + label, mask=inside, other=0.0)
        value = label_logp(capped(x, None, softcap), m, s, rate)
        value = tl.where(inside, value, tl.where(label == -100, 0.0, float("nan")))
        tl.store(logp + place, value, mask=k < n_labels)
    tl.store(maximum + row, m)
    tl.store(peak + row, tl.div_rn(1.0, s))
    if entropy is not None:
        average = mean_of(s, u, rate)
        tl.store(mean + row, average)
        tl.store(entropy + row, entropy_of(s, average))


@triton.jit
def write_ignored_row(row, n_labels, out, block_labels: tl.constexpr):
    """Write the results of a row without a label."""
    logp, entropy, maximum, peak, mean = out
    for start in range(0, n_labels, block_labels):
        k = start + tl.arange(0, block_labels)
        tl.store(logp + row.to(tl.int64) * n_labels + k, tl.zeros([block_labels], tl.float32), mask=k < n_labels)
    tl.store(maximum + row, 0.0)
    tl.store(peak + row, 1.0)
    if entropy is not None:
        tl.store(mean + row, 0.0)
        tl.store(entropy + row, 0.0)


@triton.jit(
    do_not_specialize=[
        "logits",
        "vocab_size",
        "inner",
        "outer_stride",
        "inner_stride",
        "part_stride",
        "blocks",
        "splits",
    ],
    do_not_specialize_on_alignment=["n_labels"],
)
def forward_kernel(
    logits,  # rows (outer, inner)
    columns,  # (T, K) int64 labels, contiguous; -100 is ignored, any other outside the vocabulary gives NaN
    row_temperature,  # (T,) or None
    logp,  # (T, K) float32, like all that follow
    entropy,  # (T,) or None
    maximum,  # (T,), of the capped logits
    peak,  # (T,), 1 / s
    mean,  # (T,), rate * u / s, or None
    parts,  # (3, T, splits) states, or None if one program has the whole row
    temperature,
    softcap,  # or None
    vocab_size,
    n_labels,
    inner,
    outer_stride: tl.int64,
    inner_stride,
    part_stride,  # T * splits
    blocks,  # per split, of lanes * width columns
    splits,
    lanes: tl.constexpr,
    width: tl.constexpr,
    block_labels: tl.constexpr,
):
    """One program per row, or per split of a row."""
    program = tl.program_id(0)
    row = program // splits
    out = (logp, entropy, maximum, peak, mean)
    if any_label(columns, row, n_labels, block_labels):
        rate = row_rate(row_temperature, row, temperature)
        row_logits = logits + row_offset(row, inner, outer_stride, inner_stride)
        m, s, u = empty_state(lanes)
        head, cells = body_of(row_logits, vocab_size, width, False)
        body = row_logits + head
        first = (program % splits) * blocks * lanes
        last = tl.minimum(first + blocks * lanes, cells)
        whole = first + tl.maximum(last - first, 0) // lanes * lanes
        for start in range(first, whole, lanes):
            c = capped(load_cells(body, start, cells, lanes, width, False, False), None, softcap)
            m, s, u = fold(m, s, u, c, rate, entropy is not None)
        if whole < last:
            c = capped(load_cells(body, whole, cells, lanes, width, True, False), None, softcap)
            if softcap is not None:  # which takes -inf to -softcap
                c = tl.where((whole + tl.arange(0, lanes) < cells)[:, None], c, float("-inf"))
            m, s, u = fold(m, s, u, c, rate, entropy is not None)
        if first == 0:
            column = end_columns(head, cells, width, lanes)
            x = tl.load(row_logits + column, mask=column < vocab_size, other=0.0)
            c = tl.where(column < vocab_size, capped(x, None, softcap), float("-inf"))
            m, s, u = fold(m, s, u, c[:, None], rate, entropy is not None)
        m, s, u = merge_all(m, s, u, rate, entropy is not None)
        if parts is None:
            write_row(
                row_logits,
                columns,
                row,
                n_labels,
                vocab_size,
                softcap,
                rate,
                (m, s, u),
                out,
                block_labels,
            )
        else:
            tl.store(parts + program, m)
            tl.store(parts + part_stride + program, s)
            tl.store(parts + 2 * part_stride + program, u)
    elif parts is None:
        write_ignored_row(row, n_labels, out, block_labels)


@triton.jit(
    do_not_specialize=["logits", "vocab_size", "inner", "outer_stride", "inner_stride", "part_stride", "splits"],
    do_not_specialize_on_alignment=["n_labels"],
)
def merge_kernel(
    logits,
    columns,
    row_temperature,
    logp,
    entropy,
    maximum,
    peak,
    mean,
    parts,
    temperature,
    softcap,
    vocab_size,
    n_labels,
    inner,
    outer_stride: tl.int64,
    inner_stride,
    part_stride,
    splits,
    block_splits: tl.constexpr,  # at least `splits`
    block_labels: tl.constexpr,
):
    """Merge the splits of a row, one program per row. The arguments are those of `forward_kernel`."""
    row = tl.program_id(0)
    out = (logp, entropy, maximum, peak, mean)
    if any_label(columns, row, n_labels, block_labels):
        rate = row_rate(row_temperature, row, temperature)
        k = tl.arange(0, block_splits)
        place = parts + row * splits + k
        m = tl.load(place, mask=k < splits, other=float("-inf"))
        s = tl.load(place + part_stride, mask=k < splits, other=0.0)
        u = tl.load(place + 2 * part_stride, mask=k < splits, other=0.0)
        state = merge_all(m, s, u, rate, entropy is not None)
        row_logits = logits + row_offset(row, inner, outer_stride, inner_stride)
        write_row(row_logits, columns, row, n_labels, vocab_size, softcap, rate, state, out, block_labels)
    else:
        write_ignored_row(row, n_labels, out, block_labels)


def forward(
    logits: Tensor,  # (..., V)
    columns: Tensor,  # (T, K) int64, T = the product of the leading axes
    row_temperature: Tensor | None,  # (T,)
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp (T, K), entropy (T,) or (0,), maximum, peak (T,), mean (T,) or (0,)), float32, every element written."""
    rows, n_labels = columns.shape
    columns = columns.contiguous()
    if row_temperature is not None:
        row_temperature = row_temperature.float().contiguous()
    logp = torch.empty(columns.shape, dtype=torch.float32, device=logits.device)
    maximum, peak = logp.new_empty(rows), logp.new_empty(rows)
    entropy, mean = (logp.new_empty(rows if with_entropy else 0) for _ in range(2))
    block_labels = _launch.block_labels(n_labels)
    with _launch.on_device(logits):
        for place, piece in _launch.pieces(logits):
            n = piece.rows
            if n == 0:
                continue
            launch = _launch.forward(n, vocab_size, logits.dtype)
            parts = logp.new_empty(3, n, launch.splits) if launch.splits > 1 else None
            arguments = (
                piece.x,
                columns[place],
                None if row_temperature is None else row_temperature[place],
                logp[place],
                entropy[place] if with_entropy else None,
                maximum[place],
                peak[place],
                mean[place] if with_entropy else None,
                parts,
                temperature,
                softcap,
                vocab_size,
                n_labels,
                piece.inner,
                *piece.strides,
                n * launch.splits,
            )
            forward_kernel[(n * launch.splits,)](
                *arguments,
                launch.blocks(vocab_size),
                launch.splits,
                launch.lanes,
                launch.width,
                block_labels,
                num_warps=launch.warps,
            )
            if parts is not None:
                merge_kernel[(n,)](*arguments, launch.splits, _launch.SPLITS, block_labels, num_warps=1)
    return logp, entropy, maximum, peak, mean


def forward_in_torch(
    logits: Tensor,  # (T, V)
    columns: Tensor,  # (T, K) inside the vocabulary or -100
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same algorithm in torch, block after block, with all splits of all rows side by side."""
    rows = logits.shape[0]
    launch = _launch.forward(rows, vocab_size, logits.dtype)
    ignored = (columns == IGNORE_INDEX).all(-1)
    x = logits[:, :vocab_size].float().masked_fill(ignored[:, None], 0)
    c = x if softcap is None else softcap * torch.tanh(x / softcap)
    rate = (torch.full((rows,), temperature) if row_temperature is None else row_temperature).float().reciprocal()
    rate = rate.masked_fill(ignored, 1).to(c.device)[:, None, None]  # broadcasts over (T, splits, lanes)

    blocks = launch.blocks(vocab_size)
    padded = torch.nn.functional.pad(
        c, (0, launch.splits * blocks * launch.lanes * launch.width - vocab_size), value=-torch.inf
    )
    tiles = padded.view(rows, launch.splits, blocks, launch.lanes, launch.width)
    m = padded.new_full((rows, launch.splits, launch.lanes), -torch.inf)
    s, u = torch.zeros_like(m), torch.zeros_like(m)
    for tile in tiles.unbind(2):
        top = torch.maximum(m, tile.amax(-1))
        base = top.masked_fill(top == -torch.inf, 0)
        d, shift = tile - base[..., None], m - base
        e, a = torch.exp(d * rate[..., None]), torch.exp(shift * rate)
        u = a * (u + shift.clamp(min=LOWEST) * s) + (d.clamp(min=LOWEST) * e).sum(-1)
        m, s = top, a * s + e.sum(-1)
    for _ in ("lanes", "splits"):
        top = m.amax(-1, keepdim=True)
        shift = m - top.masked_fill(top == -torch.inf, 0)
        a = torch.exp(shift * rate)
        u, s, m = (a * (u + shift.clamp(min=LOWEST) * s)).sum(-1), (a * s).sum(-1), top.squeeze(-1)
        rate = rate.squeeze(-1)

    picked = c.gather(-1, columns.clamp(min=0))
    logp = ((picked - m[:, None]) * rate[:, None] - s.log()[:, None]).masked_fill(columns == IGNORE_INDEX, 0)
    m, peak, mean = m.masked_fill(ignored, 0), s.reciprocal().masked_fill(ignored, 1), rate * u / s
    mean = mean.masked_fill(s == 0, 0)
    if not with_entropy:
        return logp, logp.new_empty(0), m, peak, logp.new_empty(0)
    entropy = (s.log() - mean).masked_fill(s == 0, torch.nan).masked_fill(ignored, 0)
    return logp, entropy, m, peak, mean.masked_fill(ignored, 0)
