"""How each kernel is launched, by shape. Chosen by arithmetic, not measured.

What the numbers follow from, on a GPU of 132 multiprocessors that copies 4.3 TB/s:

- to keep that many bytes in flight for the 0.8 us that one read takes, a multiprocessor holds about 26 KiB of loads;
- a row of 150k bf16 logits is 300 KB: of whole rows by eight warps each, 500 are on their way at a time, and the last
  ones to finish leave multiprocessors idle for 2 % of the time of 8192 rows;
- fewer rows than a few thousand are therefore split, so that there are about 2000 programs whatever T is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Labels of a row that are looked at side by side, at most.
LABELS = 128

# Programs that a launch should have at least: 16 for each of 132 multiprocessors.
PROGRAMS = 2112
# Splits of a row, at most: one program merges them.
SPLITS = 256
# Up to so many logits, programs take smaller blocks: otherwise one row would not give each multiprocessor one.
FEW_LOGITS = PROGRAMS * 4096


class Forward(NamedTuple):
    """How rows are read."""

    lanes: int  # states that a program keeps side by side; each is folded 16 bytes of logits at a time
    width: int  # logits in 16 bytes
    splits: int  # programs a row
    warps: int

    def blocks(self, vocab_size: int) -> int:
        """Blocks of a split."""
        return -(-vocab_size // (self.lanes * self.width * self.splits))


def forward(rows: int, vocab_size: int, dtype: torch.dtype, *, apart: bool = False) -> Forward:
    """Of the kernel that reads each row once. Columns that lie `apart` take an address each, so a thread has half."""
    width = 16 // dtype.itemsize
    few = rows * vocab_size <= FEW_LOGITS
    lanes, warps = (1024 // width, 4) if few else (512 if apart else 1024, 8)
    blocks = -(-vocab_size // (lanes * width))
    return Forward(lanes, width, -(-blocks // _blocks_a_split(blocks, rows)), warps)


def _blocks_a_split(blocks: int, rows: int) -> int:
    return max(1, blocks // -(-PROGRAMS // max(1, rows)), -(-blocks // SPLITS))


class Backward(NamedTuple):
    """How gradients are written."""

    block: int  # logits that a program has at a time
    blocks: int  # that it takes one after the other
    chunks: int  # programs a row
    warps: int


def backward(rows: int, columns: int, dtype: torch.dtype, *, even: bool = True) -> Backward:
    """Of the kernel that reads and writes each row once: a thread has twice 16 bytes at a time.

    Half of that where rows that are read, or written, are not `even` (`aligned`): logits then have an address each, and
    where one side alone does, threads exchange them on their way, which spilled.
    """
    few = rows * columns <= FEW_LOGITS
    block, warps = (1024, 4) if few else (512 * 16 // dtype.itemsize, 8)
    block = block if even else block // 2
    blocks = -(-columns // block)
    blocks_a_chunk = max(1, min(8, blocks * rows // PROGRAMS))
    return Backward(block, blocks_a_chunk, -(-blocks // blocks_a_chunk), warps)


class Pairs(NamedTuple):
    """How rows of two sets of logits are read together."""

    block: int  # logits of either side that a program has at a time
    blocks: int  # that it takes one after the other
    splits: int  # programs a row
    warps: int


def pairs(rows: int, vocab_size: int, block: int) -> Pairs:
    """Of the kernels that read each row once for its sums."""
    block, warps = (1024, 4) if block > 1024 and rows * vocab_size <= FEW_LOGITS else (block, 8)
    blocks = -(-vocab_size // block)
    blocks_a_split = _blocks_a_split(blocks, rows)
    return Pairs(block, blocks_a_split, -(-blocks // blocks_a_split), warps)


def pairs_backward(rows: int, columns: int, block: int) -> Pairs:
    """Of the one that writes a gradient."""
    block, warps = (1024, 4) if rows * columns <= FEW_LOGITS else (block, 8)
    blocks = -(-columns // block)
    blocks_a_split = max(1, min(4, blocks * rows // PROGRAMS))
    return Pairs(block, blocks_a_split, -(-blocks // blocks_a_split), warps)


def block_labels(count: int, most: int = LABELS) -> int:
    """The power of two that holds `count` labels, up to `most`."""
    return min(1 << max(0, count - 1).bit_length(), most)


class Piece(NamedTuple):
    """Rows that one launch can walk over: row r is (r // inner, r % inner) of a (outer, inner, V) tensor."""

    x: Tensor
    rows: int
    inner: int
    strides: tuple[int, ...]  # of outer, inner, column


def pieces(x: Tensor) -> Iterator[tuple[slice, Piece]]:
    """(which rows, piece) of a (..., V) tensor, never as a copy: one piece, unless leading axes are irregular twice."""
    start = 0
    for part in _matrices(x):
        outer, inner, _ = part.shape
        # of an axis of one, the stride moves nothing: 0 is aligned, and of one type, whatever the shapes
        strides = [stride if n > 1 else 0 for n, stride in zip((outer, inner), part.stride()[:2], strict=True)]
        yield slice(start, start + outer * inner), Piece(part, outer * inner, max(1, inner), (*strides, part.stride(2)))
        start += outer * inner


def _matrices(x: Tensor) -> Iterator[Tensor]:
    """(outer, inner, V) views of the rows, in order."""
    if (matrix := _view(x, 1, -1)) is not None or (matrix := _view(x, -1, x.shape[-2])) is not None:
        yield matrix
        return
    for part in x.unbind(0):
        yield from _matrices(part)


def _view(x: Tensor, outer: int, inner: int) -> Tensor | None:
    try:
        return x.view(outer, inner, x.shape[-1])
    except RuntimeError:  # the strides allow none
        return None


# Triton reads and writes 16 bytes at a time where it knows 16 to divide an address in bytes, and strides and bounds in
# elements: it looks for no other divisor.
_UNIT = 16


def room(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(..., V), not initialised, whose rows begin at multiples of 16 elements, with memory up to another one."""
    *rows, columns = shape
    return torch.empty(*rows, _rounded(columns), dtype=dtype, device=device)[..., :columns]


def readable(x: Tensor, columns: int) -> int:
    """Columns of the rows (..., V) that a kernel may read, whatever they hold: a multiple of 16 where memory allows."""
    last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    fits = x.stride(-1) == 1 and (last + _rounded(columns)) * x.element_size() <= x.untyped_storage().nbytes()
    return _rounded(columns) if fits else columns


def writable(x: Tensor) -> int:
    """Columns of the rows of (R, V) that a kernel may write: up to the next multiple of 16 where rows lie so far apart.

    Only of memory that is ours, as `room` makes it.
    """
    rounded = _rounded(x.shape[1])
    return rounded if x.stride(0) >= rounded == readable(x, x.shape[1]) else x.shape[1]


def aligned(x: Tensor, columns: int) -> bool:
    """Whether the first `columns` of the rows (..., V) are read 16 bytes at a time."""
    strides = (stride for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)
    return x.stride(-1) == 1 and x.data_ptr() % _UNIT == columns % _UNIT == 0 and all(n % _UNIT == 0 for n in strides)


def _rounded(columns: int) -> int:
    return -(-columns // _UNIT) * _UNIT


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
